"""The truths that hold for every family, against transformers' own code on a tiny random model of each.

Run: pytest tests/model/families/test_every_family.py -k cohere. Adding a family is one entry in tests/families.
"""

import pytest
import torch

from model.engine import Generation
from model.families import families
from model.plan import Plan
from model.probe import AttentionWish, Probe
from model.types import Sampling
from tests import tiny
from tests.families import ENTRIES, engine, folder, plain

EVERY = pytest.mark.parametrize("kind", ENTRIES)
WITH_STACKS = pytest.mark.parametrize("kind", [kind for kind, entry in ENTRIES.items() if entry.off])
SAME = 2.1e-6  # of the largest logit: the same sums in another order, in float32


def said(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


CONVERSATIONS = {
    "one image": tiny.ask(tiny.image(0, (40, 32)), "What does the sign say?"),
    "two images": tiny.ask(tiny.image(0), "and", tiny.image(1, (64, 32)), "Which is red?"),
    "image in a later turn": [
        said("system", "Be brief."),
        *tiny.ask("Hello there."),
        said("assistant", "Hello. Show me a picture."),
        *tiny.ask(tiny.image(2, (24, 64)), "What is this?"),
    ],
    "text only": tiny.ask("How many red circles are there?"),
}
EVERY_CONVERSATION = pytest.mark.parametrize("name", CONVERSATIONS)


def inputs_of(kind, name):
    return ENTRIES[kind].inputs(folder(kind), CONVERSATIONS[name])


def prompt_of(kind, name="one image"):
    return engine(kind).prompt(CONVERSATIONS[name])


def own_plan(kind):
    return Plan.parse(ENTRIES[kind].plan)


def same(kind):
    """The tolerance for logits of this kind that are summed in another order, as a share of the largest."""
    return SAME * ENTRIES[kind].rounding


def image_rows(prompt):
    rows = [torch.from_numpy(grid.positions) for grid in prompt.grids]
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)


def added(prompt, features, plan, layer, like):
    """What `plan` adds before `layer`: [T, d], zero at text."""
    out = torch.zeros_like(like)
    for source, gain in plan.at(layer):
        out[image_rows(prompt)] += gain * features[source]
    return out


def watch(layers):
    """Layer inputs, after all that is added, and outputs [T, d] of each forward from now on; and the hooks."""
    seen = {"input": {}, "output": {}}
    handles = []
    for index, layer in enumerate(layers):

        def before(module, args, index=index):
            seen["input"][index] = args[0][0].detach()

        def after(module, args, out, index=index):
            seen["output"][index] = (out[0] if isinstance(out, tuple) else out)[0].detach()

        handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    return seen, handles


@pytest.fixture
def states():
    """watch(engine) for one test: afterwards its hooks are gone."""
    handles = []

    def start(of):
        seen, more = watch(of.adapter.decoder.layers)
        handles.extend(more)
        return seen

    yield start
    for handle in handles:
        handle.remove()


# ---- the registry and the folders


def test_every_registered_family_has_an_entry():
    covered = {entry.family for entry in ENTRIES.values()}
    missing = {family.name for family in families()} - covered
    assert not missing, f"add an entry for {missing} to tests/families"


@EVERY
def test_a_folder_in_the_released_format_loads(kind):
    path = folder(kind)
    names = {file.name for file in path.iterdir()}
    assert set(ENTRIES[kind].files) <= names
    loaded = engine(kind)  # through model.loading.load
    assert loaded.family == ENTRIES[kind].family and loaded.name == str(path) and not loaded.warnings
    assert str(loaded.layout.default) == ENTRIES[kind].default
    _, info = ENTRIES[kind].model_class.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    answer = loaded.answer(prompt_of(kind), loaded.layout.default, Sampling(max_new_tokens=3))
    assert answer.tokens and answer.visual_tokens == len(image_rows(prompt_of(kind)))


# ---- the default plan is the model


@EVERY
@EVERY_CONVERSATION
def test_its_plan_is_transformers_own_forward(kind, name):
    inputs, prompt = inputs_of(kind, name), prompt_of(kind, name)
    assert torch.equal(prompt.input_ids, inputs["input_ids"])
    ours, reference = engine(kind).logits(prompt, own_plan(kind)), plain(kind)
    with torch.no_grad():
        assert torch.equal(ours, ENTRIES[kind].forward(reference, inputs))
        joint = reference(**inputs).logits[0]  # the tower on all images at once rounds differently
    torch.testing.assert_close(ours, joint, atol=1e-5 * ENTRIES[kind].rounding, rtol=0)


@EVERY
@EVERY_CONVERSATION
def test_its_plan_is_transformers_own_greedy_generate(kind, name):
    inputs = inputs_of(kind, name)
    length = inputs["input_ids"].shape[1]
    want = plain(kind).generate(**inputs, do_sample=False, max_new_tokens=12)[0, length:].tolist()
    answer = engine(kind).answer(prompt_of(kind, name), own_plan(kind), Sampling(max_new_tokens=12))
    end = [answer.stopped == "end"] * (len(want) - len(answer.tokens))
    assert [token.id for token in answer.tokens] == want[: len(answer.tokens)] and all(end) and len(end) <= 1


@EVERY
def test_a_left_padded_batch_of_transformers_is_our_single_runs(kind):
    each = [inputs_of(kind, name) for name in CONVERSATIONS]
    longest = max(inputs["input_ids"].shape[1] for inputs in each)
    pad = engine(kind).tokenizer.convert_tokens_to_ids(ENTRIES[kind].pad_token)
    batch = {}
    for key in {key for inputs in each for key in inputs}:
        found = [inputs[key] for inputs in each if key in inputs]
        if key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            fill = pad if key == "input_ids" else 0
            found = [torch.nn.functional.pad(x, (longest - x.shape[1], 0), value=fill) for x in found]
        if key.startswith("pixel"):  # images in tiles: those of the other prompts may have more
            most = max(x.shape[1] for x in found)
            found = [torch.cat([x, x.new_zeros(len(x), most - x.shape[1], *x.shape[2:])], dim=1) for x in found]
        batch[key] = torch.cat(found)
    with torch.no_grad():
        logits = plain(kind)(**batch).logits
    for row, name in zip(logits, CONVERSATIONS, strict=True):
        ours = engine(kind).logits(prompt_of(kind, name), own_plan(kind))
        assert (row[-len(ours) :] - ours).abs().max() <= 2 * same(kind) * max(1, ours.abs().max())


@EVERY
def test_what_its_own_code_adds_is_the_rows_of_the_stacks(kind):
    """input(l) - output(l-1) of a model that we never touched: the stack's rows at the image, zero at text."""
    reference, prompt = plain(kind), prompt_of(kind, "two images")
    plan = own_plan(kind)
    features = engine(kind).see(prompt, plan).features
    seen, _ = watch(ENTRIES[kind].decoder(reference).layers)
    with torch.no_grad():
        ENTRIES[kind].forward(reference, inputs_of(kind, "two images"))
    first = seen["input"][0]
    torch.testing.assert_close(first[image_rows(prompt)], added(prompt, features, plan, 0, first)[image_rows(prompt)])
    for layer in range(1, engine(kind).layout.n_layers):
        found = seen["input"][layer] - seen["output"][layer - 1]
        torch.testing.assert_close(found, added(prompt, features, plan, layer, found), atol=4e-6, rtol=0)


@WITH_STACKS
def test_its_stacks_switched_off_by_its_own_means_are_a_plan(kind):
    entry, reference = ENTRIES[kind], plain(kind)
    entry.off(reference)
    with torch.no_grad():
        want = entry.forward(reference, inputs_of(kind, "one image"))
    ours = engine(kind).logits(prompt_of(kind), Plan.parse(entry.off_plan))
    assert torch.equal(ours, want)
    assert not torch.equal(ours, engine(kind).logits(prompt_of(kind), own_plan(kind)))


# ---- any plan


@EVERY
def test_any_stack_enters_before_any_layer_and_nowhere_else(kind, states):
    loaded, prompt = engine(kind), prompt_of(kind)
    seen = states(loaded)
    for source in loaded.layout.sources:
        for layer in range(loaded.layout.n_layers):
            plan = Plan([(source.name, layer, -0.5)])
            features = loaded.see(prompt, plan).features
            loaded.logits(prompt, plan)
            start = seen["input"][0][image_rows(prompt)]
            assert layer == 0 or not start.any(), "the image rows start empty: the base is an injection too"
            for at in range(loaded.layout.n_layers):
                before = seen["output"][at - 1] if at else seen["input"][0].index_fill(0, image_rows(prompt), 0.0)
                found = seen["input"][at] - before
                torch.testing.assert_close(found, added(prompt, features, plan, at, found), atol=4e-6, rtol=0)


@EVERY
def test_linear_in_the_gain_at_the_injection(kind, states):
    loaded, prompt = engine(kind), prompt_of(kind)
    seen = states(loaded)
    base, last = own_plan(kind).at(0), loaded.layout.sources[-1].name
    inputs = {}
    for gain in (0.0, 0.25, 1.0, -3.0):
        loaded.logits(prompt, Plan([*((source, 0, g) for source, g in base), (last, 2, gain)]))
        inputs[gain] = seen["input"][2]
    step = inputs[1.0] - inputs[0.0]
    assert step.abs().max() > 1e-3
    for gain in (0.25, -3.0):
        torch.testing.assert_close(inputs[gain], inputs[0.0] + gain * step, atol=4e-6, rtol=0)


@EVERY
def test_without_an_image_every_plan_is_bitwise_the_same(kind):
    loaded, prompt = engine(kind), prompt_of(kind, "text only")
    want, last = loaded.logits(prompt, own_plan(kind)), loaded.layout.sources[-1].name
    for plan in (Plan(), Plan([(last, 0, 1.0)]), Plan([(last, 3, 7.0)])):
        assert torch.equal(loaded.logits(prompt, plan), want)


@EVERY
def test_positions_before_the_image_do_not_depend_on_the_plan(kind):
    """Bit for bit; but an expert multiplies the rows that are sent to it at once, and how many come from the image
    depends on the plan: there a CPU may round otherwise."""
    loaded, prompt = engine(kind), prompt_of(kind, "image in a later turn")
    first, last = int(image_rows(prompt)[0]), loaded.layout.sources[-1].name
    want = loaded.logits(prompt, own_plan(kind))
    for plan in (Plan(), Plan([(last, 0, 1.0), (last, 2, 3.0)])):
        other = loaded.logits(prompt, plan)
        assert not torch.equal(other[-1], want[-1])
        if any("experts" in name for name, _ in loaded.adapter.model.named_parameters()):
            torch.testing.assert_close(other[:first], want[:first], atol=4e-6 * float(want.abs().max()), rtol=0)
        else:
            assert torch.equal(other[:first], want[:first])


def some_plans(loaded):
    last = loaded.layout.sources[-1].name
    return [loaded.layout.default, Plan(), Plan([(last, 0, 1.0)]), Plan([(last, 2, -0.5), (last, 4, 2.0)])]


@EVERY
def test_a_batch_of_plans_is_its_single_runs(kind):
    loaded, prompt = engine(kind), prompt_of(kind, "two images")
    plans, sampling = some_plans(loaded), Sampling(max_new_tokens=6)
    with torch.inference_mode():
        together = Generation(loaded, prompt, plans, sampling, None)._prefill()
        for row, plan in zip(together, plans, strict=True):
            alone = Generation(loaded, prompt, [plan], sampling, None)._prefill()[0]
            assert (row - alone).abs().max() <= same(kind) * max(1, alone.abs().max())
    answers = loaded.answer_many(prompt, plans, sampling)
    for answer, plan in zip(answers, plans, strict=True):
        alone = loaded.answer(prompt, plan, sampling)
        assert [token.id for token in answer.tokens] == [token.id for token in alone.tokens]


@EVERY
def test_cached_decode_is_recompute(kind):
    """The log-probabilities of an answer made token by token are those of one pass over prompt and answer."""
    loaded, prompt = engine(kind), prompt_of(kind)
    for plan in some_plans(loaded):
        answer = loaded.answer(prompt, plan, Sampling(max_new_tokens=8))
        ids = [token.id for token in answer.tokens]
        whole = loaded.logits(prompt, plan, ids)[-len(ids) - 1 : -1]
        want = whole.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        found = torch.tensor([token.logprob for token in answer.tokens])
        assert (found - want).abs().max() <= 2 * SAME * max(1, whole.abs().max())


@EVERY
def test_attention_rows_are_eager_attentions(kind):
    loaded, prompt = engine(kind), prompt_of(kind)
    plan, layers = own_plan(kind), loaded.layout.attention_layers
    rows = (1, int(image_rows(prompt)[1]), prompt.input_ids.shape[1] - 1)
    empty = loaded.answer(prompt, plan, Sampling(max_new_tokens=1))
    trace = loaded.replay(prompt, empty, plan, Probe(attention=(AttentionWish(layers, rows),)))
    eager = plain(kind, attn_implementation="eager")
    weights = {}
    for index in layers:
        attend = ENTRIES[kind].decoder(eager).layers[index].self_attn
        attend.register_forward_hook(lambda m, args, out, index=index: weights.update({index: out[1][0]}))
    with torch.no_grad():
        ENTRIES[kind].forward(eager, inputs_of(kind, "one image"))
    length = prompt.input_ids.shape[1]
    for layer in layers:
        found = torch.from_numpy(trace.attention[layer])[:, :, :length]
        torch.testing.assert_close(found, weights[layer][:, list(rows)], atol=4e-6 * ENTRIES[kind].rounding, rtol=0)


@EVERY
def test_a_gradient_reaches_every_source(kind):
    loaded, prompt = engine(kind), prompt_of(kind)
    features = loaded.features(prompt).requires_grad_()
    logits = loaded.logits(prompt, loaded.layout.default, features=features, grad=True)
    logits[-1].max().backward()
    norms = features.grad.flatten(1).norm(dim=1)
    used = [source.name in loaded.layout.default.sources() for source in loaded.layout.sources]
    assert (norms[torch.tensor(used)] > 1e-4).all() and norms.isfinite().all()
