"""What injection does to the residual stream, what recording reads from it, and that neither leaves anything behind."""

import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import LlavaForConditionalGeneration, Qwen3VLForConditionalGeneration

from model import instrument
from model.instrument import ATTENTION, Injection, Pass, active
from model.loading import load
from model.plan import Plan
from model.probe import AttentionWish, Probe
from model.types import Sampling
from tests import tiny

KINDS = ("hires", "qwen")
FAMILY = pytest.mark.parametrize("kind", KINDS)


def prompt_of(kind, *seeds, text="What does the sign say?"):
    images = [tiny.image(seed, (40, 32)) for seed in (seeds or (0,))]
    return tiny.engine(kind).prompt(tiny.ask("Look.", *images, text))


@pytest.fixture
def states():
    """Watches a decoder from outside: watch(engine) -> dict of layer inputs (after injection) and outputs [B, T, d]."""
    handles = []

    def watch(engine):
        seen = {"input": {}, "output": {}}
        for index, layer in enumerate(engine.adapter.decoder.layers):

            def before(module, args, index=index):
                seen["input"][index] = args[0].detach()

            def after(module, args, out, index=index):
                seen["output"][index] = out.detach()

            handles.append(layer.register_forward_pre_hook(before))
            handles.append(layer.register_forward_hook(after))
        return seen

    yield watch
    for handle in handles:
        handle.remove()


@FAMILY
def test_what_enters_before_a_layer_is_the_sources_rows_at_image_positions_and_nothing_elsewhere(kind, states):
    engine, prompt = tiny.engine(kind), prompt_of(kind, 0, 1)
    seen = states(engine)
    plan = Plan.parse("base@0,0@1,1@1*0.5,2@3,0@4*-2")
    engine.logits(prompt, plan)
    features = engine.see(prompt).features
    rows = np.concatenate([grid.positions for grid in prompt.grids])
    for layer in range(1, engine.layout.n_layers):
        added = seen["input"][layer] - seen["output"][layer - 1]
        want = torch.zeros_like(added)
        for source, gain in plan.at(layer):
            want[0, rows] += gain * features[source]
        torch.testing.assert_close(added, want, atol=2e-6, rtol=0)
        text = np.setdiff1d(np.arange(added.shape[1]), rows)
        assert not added[0, text].any()
    assert torch.equal(seen["input"][0][0, rows], features["base"])


@FAMILY
def test_the_base_can_enter_at_any_layer(kind, states):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    seen = states(engine)
    rows = prompt.grids[0].positions
    engine.logits(prompt, Plan.parse("base@2"))
    assert not seen["input"][0][0, rows].any()
    base = engine.see(prompt).features["base"]
    torch.testing.assert_close((seen["input"][2] - seen["output"][1])[0, rows], base, atol=2e-6, rtol=0)


@FAMILY
def test_linear_in_the_gain_at_the_injection(kind, states):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    seen = states(engine)
    inputs = {}
    for gain in (0.0, 0.25, 1.0, -3.0):
        engine.logits(prompt, Plan([("base", 0, 1), ("0", 2, gain)]))
        inputs[gain] = seen["input"][2]
    step = inputs[1.0] - inputs[0.0]
    for gain in (0.25, -3.0):
        torch.testing.assert_close(inputs[gain], inputs[0.0] + gain * step, atol=2e-6, rtol=0)


@FAMILY
def test_without_an_image_every_plan_is_bitwise_the_same(kind):
    engine = tiny.engine(kind)
    prompt = engine.prompt(tiny.ask("How many red circles are there?"))
    want = engine.logits(prompt, engine.layout.default)
    for text in ("none", "base@0", "base@3,0@0*7"):
        assert torch.equal(engine.logits(prompt, Plan.parse(text)), want)


@FAMILY
def test_positions_before_the_image_do_not_depend_on_the_plan(kind):
    engine = tiny.engine(kind)
    earlier = [*tiny.ask("Hello."), {"role": "assistant", "content": "Yes?"}]
    prompt = engine.prompt([*earlier, *tiny.ask(tiny.image(), "x")])
    first = prompt.grids[0].positions[0]
    default = engine.logits(prompt, engine.layout.default)
    for text in ("none", "base@0", "base@1,0@0,1@2*3"):
        other = engine.logits(prompt, Plan.parse(text))
        assert torch.equal(other[:first], default[:first])
        assert not torch.equal(other[-1], default[-1])


@FAMILY
def test_exactly_the_plans_injections_happen_once_at_prefill(kind, monkeypatch):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    made = []
    real = Pass.before_layer

    def counted(self, layer, hidden):
        made.append((layer, len(self.injections.get(layer, ())), hidden.shape[1]))
        return real(self, layer, hidden)

    monkeypatch.setattr(Pass, "before_layer", counted)
    answer = engine.answer(prompt, Plan.parse("base@0,0@1,1@1,2@3"), Sampling(max_new_tokens=6))
    assert len(answer.tokens) > 1
    length = prompt.input_ids.shape[1]
    assert made == [(0, 1, length), (1, 2, length), (3, 1, length)]


@FAMILY
def test_a_gradient_reaches_every_source(kind):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    features = engine.features(prompt).requires_grad_()
    logits = engine.logits(prompt, engine.layout.default, features=features, grad=True)
    assert torch.equal(logits, engine.logits(prompt, engine.layout.default))
    logits[-1].max().backward()
    norms = features.grad.flatten(1).norm(dim=1)
    assert (norms > 1e-3).all() and norms.isfinite().all()
    assert all(parameter.grad is None for parameter in engine.model.parameters())


# Recording


@FAMILY
def test_a_trace_is_what_the_layers_saw(kind, states):
    engine, prompt = tiny.engine(kind), prompt_of(kind, 0, 1)
    plan = Plan.parse("base@0,0@1,1@1*0.5,2@3")
    answer = engine.answer(prompt, plan, Sampling(max_new_tokens=5))
    seen = states(engine)
    layers = engine.layout.n_layers
    trace = engine.replay(prompt, answer, plan, Probe(hidden=(0, 1, layers)))
    length = prompt.input_ids.shape[1] + len(answer.tokens)
    assert trace.residual_rms.shape == (layers + 1, length) and trace.before_rms.shape == (layers, length)
    assert len(trace.texts) == length and trace.answer_start == prompt.input_ids.shape[1]
    rows = trace.image_positions

    def rms(x):
        return x.double().pow(2).mean(-1).sqrt().numpy()

    features = engine.see(prompt).features
    for layer in range(layers):
        np.testing.assert_allclose(trace.residual_rms[layer], rms(seen["input"][layer][0]), rtol=1e-5)
        before = seen["output"][layer - 1][0] if layer else seen["input"][0][0].index_fill(0, torch.tensor(rows), 0.0)
        np.testing.assert_allclose(trace.before_rms[layer], rms(before), rtol=1e-5)
        parts = [gain * features[source] for source, gain in plan.at(layer)]
        for (source, _), part in zip(plan.at(layer), parts, strict=True):
            np.testing.assert_allclose(trace.injected_rms[source, layer], rms(part), rtol=1e-5)
        if parts and layer:
            total = sum(parts)
            ratio = (total.norm(dim=-1) / before[rows].norm(dim=-1)).numpy()
            np.testing.assert_allclose(trace.ratio[layer], ratio, rtol=1e-5)
            cosine = torch.cosine_similarity(total, before[rows], dim=-1).numpy()
            np.testing.assert_allclose(trace.cosine[layer], cosine, atol=1e-6)
        elif not parts:
            assert not trace.ratio[layer].any() and np.isnan(trace.cosine[layer]).all()
    assert np.isinf(trace.ratio[0]).all() and np.isnan(trace.cosine[0]).all()  # the base lands on zeros
    np.testing.assert_allclose(trace.residual_rms[layers], rms(seen["output"][layers - 1][0]), rtol=1e-5)
    np.testing.assert_array_equal(trace.hidden[1], seen["input"][1][0].numpy())
    np.testing.assert_array_equal(trace.hidden[layers], seen["output"][layers - 1][0].numpy())
    assert set(trace.injected_rms) == {("base", 0), ("0", 1), ("1", 1), ("2", 3)}
    assert trace.map(trace.ratio[1], 1).shape == prompt.grids[1].grid
    first = prompt.grids[0].positions.size
    np.testing.assert_array_equal(trace.map(trace.ratio, 0)[1].ravel(), trace.ratio[1, :first])
    summary = trace.to_json()
    assert [row["layer"] for row in summary["layers"]] == list(range(layers + 1))
    assert summary["layers"][1]["injected"][1]["stack"] == "1" and summary["layers"][0]["ratio"] is None


@FAMILY
def test_a_probe_records_only_what_it_asks(kind):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    answer = engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=3))
    trace = engine.replay(prompt, answer, engine.layout.default, Probe(norms=False, hidden=(2,), hidden_rows="image"))
    assert trace.residual_rms.size == trace.ratio.size == 0 and not trace.injected_rms and not trace.attention
    assert trace.hidden[2].shape == (prompt.visual_tokens, engine.layout.hidden_size)
    np.testing.assert_array_equal(trace.hidden_positions, prompt.grids[0].positions)


@FAMILY
def test_attention_rows_are_eager_attentions(kind):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    cls = Qwen3VLForConditionalGeneration if kind == "qwen" else LlavaForConditionalGeneration
    eager = cls.from_pretrained(tiny.folder(kind), dtype=torch.float32, attn_implementation="eager").eval()
    answer = engine.answer(prompt, Plan.parse("base@0"), Sampling(max_new_tokens=4))
    length = prompt.input_ids.shape[1] + len(answer.tokens)
    rows = (1, int(prompt.grids[0].positions[1]), length - 1)
    probe = Probe(attention=(AttentionWish((0, 2), rows), AttentionWish((4,), rows)))
    trace = engine.replay(prompt, answer, Plan.parse("base@0"), probe)
    assert list(trace.attention) == [0, 2, 4] and trace.attention_rows == rows

    ids = torch.cat([prompt.input_ids, torch.tensor([[token.id for token in answer.tokens]])], 1)
    embeddings = eager.get_input_embeddings()(ids)
    embeddings[0, prompt.grids[0].positions] = engine.see(prompt).features["base"]
    positions = prompt.extra["position_ids"]
    more = prompt.extra["next_position"] + torch.arange(len(answer.tokens))
    positions = torch.cat([positions, more.expand(*positions.shape[:-1], -1)], -1)
    with torch.no_grad():
        want = eager.model.language_model(inputs_embeds=embeddings, position_ids=positions, output_attentions=True)
    for layer, found in trace.attention.items():
        # Deeper layers inherit the rounding of SDPA against eager in the layers before.
        tolerance = 1.2e-7 if layer == 0 else 2e-6
        eager_rows = want.attentions[layer][0][:, list(rows)].numpy()
        np.testing.assert_allclose(found, eager_rows, atol=tolerance, rtol=0)
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
        assert not found[:, 0, rows[0] + 1 :].any()


@FAMILY
def test_image_effect_is_one_source_off_at_a_time(kind, states):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    plan = Plan.parse("base@0,0@1*0.5,0@3,2@2")
    effect = engine.image_effect(prompt, None, plan)
    names = [source.name for source in engine.layout.sources]
    assert effect.shape == (len(names), engine.layout.n_layers + 1)
    rows = prompt.grids[0].positions
    seen = states(engine)

    def image_rows(of):
        engine.logits(prompt, of)
        last = seen["output"][engine.layout.n_layers - 1]
        return [*(seen["input"][layer][0, rows] for layer in range(engine.layout.n_layers)), last[0, rows]]

    on = image_rows(plan)
    for source, row in zip(names, effect, strict=True):
        off = image_rows(plan.without(source))
        want = [float((a - b).norm() / a.norm()) for a, b in zip(on, off, strict=True)]
        np.testing.assert_allclose(row, want, atol=2e-6)
    assert not effect[names.index("1")].any() and effect[names.index("2"), 2] > 0
    assert not engine.image_effect(engine.prompt(tiny.ask("x")), None, plan).any()


# Nothing left behind


def hooks(engine):
    """On the decoder: transformers' own recording hooks, put once on the vision tower, are not ours."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.adapter.decoder.modules())


@FAMILY
def test_an_error_in_a_pass_leaves_nothing_behind(kind, monkeypatch):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    want = engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=4))
    count = hooks(engine)

    def broken(self, layer, hidden):
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Pass, "before_layer", broken)
        with pytest.raises(RuntimeError, match="the device is gone"):
            engine.answer(prompt, engine.layout.default)
        stream = engine.stream(prompt, engine.layout.default)
        with pytest.raises(RuntimeError, match="the device is gone"):
            next(stream)
        assert stream.done and not len(stream._generation._part) and list(stream) == []
        with pytest.raises(RuntimeError, match="the device is gone"):
            engine.replay(prompt, want, engine.layout.default)
    assert instrument._ACTIVE.get() is None
    assert hooks(engine) == count == engine.layout.n_layers + 1
    assert engine._lock.acquire(blocking=False) and engine._lock.release() is None
    again = engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=4))
    assert again.tokens == want.tokens


@FAMILY
def test_a_closed_stream_leaves_nothing_behind(kind):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    count = hooks(engine)
    stream = engine.stream(prompt, Plan.parse("base@1"), Sampling(max_new_tokens=30))
    next(stream)
    assert instrument._ACTIVE.get() is None and engine._lock.acquire(blocking=False)
    engine._lock.release()
    stream.close()
    assert stream.done and stream.answer.stopped == "stopped" and len(stream.answer.tokens) == 1
    assert list(stream) == []
    assert not len(stream._generation._part) and hooks(engine) == count


def test_an_active_pass_belongs_to_its_thread_and_ends_with_its_block():
    mine = Pass({}, None)
    found = []
    with active(mine):
        thread = threading.Thread(target=lambda: found.append(instrument._ACTIVE.get()))
        thread.start()
        thread.join()
        assert instrument._ACTIVE.get() is mine
    assert found == [None] and instrument._ACTIVE.get() is None


def test_gains_of_a_batch_are_per_row():
    rows = torch.randn(3, 4)
    injection = Injection("0", (1.0, 0.0, -0.5), rows)
    assert torch.equal(injection.scaled(), torch.stack([rows, rows * 0, rows * -0.5]))
    assert Injection("0", (1.0, 1.0), rows).scaled() is rows
    assert torch.equal(Injection("0", (2.0,), rows).scaled(), rows * 2)


@FAMILY
def test_only_the_language_model_uses_the_recording_attention(kind):
    engine = tiny.engine(kind)
    assert engine.adapter.decoder.config._attn_implementation == ATTENTION["sdpa"]
    assert engine.model.config.vision_config._attn_implementation == "sdpa"


def reference_flash_attn(query, key, value, *, softmax_scale, causal):
    """What flash-attn's documentation says its function does, slowly: [B, T, H, hd], causal at the lower right."""
    groups = query.shape[2] // key.shape[2]
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * softmax_scale
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@FAMILY
@pytest.mark.parametrize("way", ["eager", "flash"])
def test_other_attention_gives_the_same_answers_and_rows(kind, way, monkeypatch):
    """Prefill, prefix, decoding, batch, trace. flash-attn does not run on a CPU: its function is written out here."""
    engine, used = tiny.build(tiny.folder(kind)), []
    engine.shortest_prefix = 1
    prompt, sampling = engine.prompt(tiny.ask(tiny.image(1), "Read the sign.")), Sampling(max_new_tokens=5)
    plans = [engine.layout.default, Plan.parse("base@0")]

    def look():
        engine.forget()
        answers = [*engine.answer_many(prompt, plans, sampling), engine.answer(prompt, plans[0], sampling)]
        answers.append(engine.answer(prompt, plans[1], sampling))  # goes on from before the image
        return answers, engine.replay(prompt, answers[0], plans[0], Probe(attention=(AttentionWish((1,), (20,)),)))

    def flash(query, key, value, **how):
        used.append(query.shape[1])
        return reference_flash_attn(query, key, value, **how)

    wanted, trace = look()
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash))
    engine.adapter.decoder.set_attn_implementation(ATTENTION[way])
    found, other = look()
    assert engine.adapter.decoder.config._attn_implementation == ATTENTION[way]
    for one, two in zip(found, wanted, strict=True):
        assert [t.id for t in one.tokens] == [t.id for t in two.tokens]
        assert [t.logprob for t in one.tokens] == pytest.approx([t.logprob for t in two.tokens], abs=1e-5)
    assert np.allclose(other.attention[1], trace.attention[1], atol=1e-6)
    whole = (prompt.input_ids.shape[1], other.residual_rms.shape[1])
    assert set(used) == ({1, *whole} if way == "flash" else set())


# ---- layers on several devices


def test_what_enters_goes_to_where_the_stream_is():
    """The meta device stands for a second GPU: adding what lies on another device would be an error."""
    rows, positions = torch.ones(2, 8), torch.tensor([1, 2])
    current = Pass({3: [Injection("0", (1.0, 0.5), rows)]}, positions)
    assert current.before_layer(3, torch.zeros(2, 4, 8, device="meta")).device.type == "meta"
    here = current.before_layer(3, torch.zeros(2, 4, 8))
    assert here[1, 1:3].eq(0.5).all() and not here[:, 0].any()


@FAMILY
def test_a_dispatched_model_answers_as_the_whole_one(kind):
    """accelerate's hooks on every part, and two layers whose weights lie elsewhere until they run."""
    whole, spread = tiny.engine(kind), load(str(tiny.folder(kind)), device="cpu")
    layers = spread.adapter.decoder.layers
    for layer in (layers[1], layers[2]):
        cpu_offload(layer, execution_device=torch.device("cpu"))
    for part in (*layers, spread.adapter.decoder.norm, spread.adapter.lm_head):
        add_hook_to_module(part, AlignDevicesHook(torch.device("cpu"), io_same_device=True), append=True)
    assert layers[1].mlp.up_proj.weight.device.type == "meta"
    prompt, plan = prompt_of(kind), whole.layout.default.without("0")
    assert torch.equal(spread.logits(prompt, plan), whole.logits(prompt, plan))
    answer = spread.answer(prompt, plan, Sampling(max_new_tokens=4))
    assert [t.id for t in answer.tokens] == [
        t.id for t in whole.answer(prompt, plan, Sampling(max_new_tokens=4)).tokens
    ]
    np.testing.assert_array_equal(
        spread.replay(prompt, answer, plan).residual_rms, whole.replay(prompt, answer, plan).residual_rms
    )
