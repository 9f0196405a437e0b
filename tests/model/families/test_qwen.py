"""What only the Qwen3-VL class does, for each family of it: taps and mergers, odd configs, weights that are not loaded.

The truths that it shares with other families are in test_every_family.py.
"""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from analysis import attribution, norms
from analysis.compare import plan_badge
from model.errors import UserError
from model.families import detect
from model.loading import check_files, load
from model.plan import Plan
from model.types import Sampling
from tests import tiny
from tests.families import ENTRIES, engine, folder, plain
from tests.families.qwen import ENTRIES as QWEN

CLASS = pytest.mark.parametrize("kind", QWEN)
QUESTION = tiny.ask(tiny.image(0, (40, 32)), "What does the sign say?")


def reference_logits(kind, path, inputs):
    """[T, V] of transformers' own forward on the folder at `path`."""
    model = ENTRIES[kind].model_class.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(**inputs).logits[0]


@CLASS
def test_zeroed_mergers_are_stacks_off_too(kind):
    model = plain(kind)
    for merger in model.model.visual.deepstack_merger_list:
        last = [module for module in merger.modules() if isinstance(module, nn.Linear)][-1]
        last.weight.data.zero_()
        last.bias.data.zero_()
    with torch.no_grad():
        want = model(**ENTRIES[kind].inputs(folder(kind), QUESTION)).logits[0]
    loaded = engine(kind)
    assert torch.equal(loaded.logits(loaded.prompt(QUESTION), Plan.parse("base@0")), want)


@CLASS
@pytest.mark.parametrize("taps", [(0, 1, 2), (2, 0)])
def test_stacks_are_the_mergers_of_the_tapped_blocks(kind, taps, tmp_path):
    QWEN[kind].write(tmp_path, taps=taps)
    image, loaded = tiny.image(3, (48, 32)), load(str(tmp_path), device="cpu")
    model = ENTRIES[kind].model_class.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tower, blocks = model.model.visual, {}
    for index, block in enumerate(tower.blocks):
        block.register_forward_hook(lambda module, args, out, index=index: blocks.update({index: out}))
    inputs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(images=[image], return_tensors="pt")
    with torch.no_grad():
        model.model.get_image_features(**inputs)
        features = loaded.see(loaded.prompt(tiny.ask(image, "x"))).features
        for k, tap in enumerate(loaded.adapter.taps):
            assert torch.equal(features[str(k)], tower.deepstack_merger_list[taps.index(tap)](blocks[tap]))
        assert torch.equal(features["base"], tower.merger(blocks[3]))
    assert loaded.adapter.taps == tuple(sorted(taps))


@CLASS
def test_an_idle_engine_leaves_the_model_bit_equal(kind):
    inputs = ENTRIES[kind].inputs(folder(kind), QUESTION)
    with torch.no_grad():
        assert torch.equal(engine(kind).model(**inputs).logits, plain(kind)(**inputs).logits)


@CLASS
@pytest.mark.parametrize(
    ("taps", "kept", "said"),
    [
        ((), (), None),
        ((2, 0), (0, 2), "out of order (2, 0)"),
        ((0, 1, 1), (0, 1), "block 1 more than once"),
        ((0, 9), (0,), "taps vision block 9, but the blocks are 0 to 3"),
        ((-1, 1), (1,), "taps vision block -1"),
    ],
)
def test_taps_are_what_the_tower_really_makes_and_oddities_are_said(tmp_path, kind, taps, kept, said):
    QWEN[kind].write(tmp_path, taps=taps)
    config = AutoConfig.from_pretrained(tmp_path)
    layout, warnings = detect(config).layout_of(config)
    assert tuple(source.tap for source in layout.sources[1:]) == kept
    assert (said is None and not warnings) or (len(warnings) == 1 and said in warnings[0])
    loaded = load(str(tmp_path), device="cpu")
    assert loaded.warnings == warnings and loaded.layout == layout
    assert loaded.trained == ("trained with stacks" if kept else "trained single injection")
    prompt = loaded.prompt(QUESTION)
    assert list(loaded.see(prompt).features) == ["base", *layout.stack_names]
    want = reference_logits(kind, tmp_path, QWEN[kind].inputs(tmp_path, QUESTION))
    assert torch.equal(loaded.logits(prompt, loaded.layout.default), want)


@CLASS
def test_a_stack_after_the_last_layer_is_left_out_and_said(tmp_path, kind):
    QWEN[kind].write(tmp_path, taps=(0, 1, 2), layers=3)
    loaded = load(str(tmp_path), device="cpu")
    assert str(loaded.layout.default) == "base@0,0@1,1@2"
    assert "Stack 2 would be added after LLM layer 2 or later" in loaded.warnings[0]
    prompt = loaded.prompt(QUESTION)
    want = reference_logits(kind, tmp_path, QWEN[kind].inputs(tmp_path, QUESTION))
    text = [i for i, t in enumerate(prompt.texts) if t]
    assert torch.equal(loaded.logits(prompt, loaded.layout.default)[text], want[text])


@CLASS
def test_the_layout_speaks_the_familys_words(kind):
    loaded = engine(kind)
    layout = loaded.layout
    assert (layout.family, layout.n_layers, layout.n_vision_layers, layout.hidden_size) == (kind, 5, 4, 64)
    assert [s.label for s in layout.sources[1:]] == [f"tap after vision block {k}" for k in range(3)]
    assert layout.source("1").own_words == "added after LLM layer 1" and layout.source("1").home == 2
    assert layout.convention.startswith(f"{loaded.adapter.title}'s code adds stack k after LLM layer k")


@CLASS
def test_the_view_is_the_resized_image_with_its_token_grid(kind):
    loaded, image = engine(kind), tiny.image(0, (100, 50))
    (view,) = loaded.views(image)
    assert view.grid == loaded.prompt(tiny.ask(image, "x")).grids[0].grid
    assert view.image.size == (view.grid[1] * 16, view.grid[0] * 16)
    assert view.image.width * view.image.height <= 64 * 64
    with pytest.raises(UserError, match=f"too long and narrow for {loaded.adapter.title}"):
        loaded.views(tiny.image(0, (900, 4)))


@CLASS
def test_only_the_weights_that_are_loaded_are_counted(kind):
    """Cosmos' file holds a Generator, Qwen3-Omni's a talker: counted, they would hide a missing weight (next test)."""
    loaded = engine(kind)
    held = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert check_files(folder(kind), "m", loaded.adapter.unused_weights()) == held
    more = check_files(folder(kind), "m") - held
    assert more > 0 if kind in ("qwen3_omni_moe", "cosmos3_omni") else more == 0


@pytest.mark.parametrize("kind", ["qwen3_omni_moe", "cosmos3_omni"])
def test_a_weight_missing_beside_unused_ones_is_said(kind, tmp_path):
    path = shutil.copytree(folder(kind), tmp_path / kind)
    index = path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    name = next(name for name in sorted(listed["weight_map"]) if name.endswith("norm1.bias"))
    file = path / listed["weight_map"].pop(name)
    weights = load_file(file)
    size = weights.pop(name).numel()
    save_file(weights, file, metadata={"format": "pt"})
    index.write_text(json.dumps(listed))
    with pytest.raises(UserError, match=f"lacks {size} of the model's"):
        load(str(path), device="cpu")


def test_a_thinker_alone_is_the_same_family():
    whole = AutoConfig.from_pretrained(folder("qwen3_omni_moe"))
    assert detect(whole) is detect(whole.thinker_config)
    assert detect(whole).layout_of(whole) == detect(whole).layout_of(whole.thinker_config)


def test_coheres_logits_are_scaled(monkeypatch):
    loaded = engine("cohere_compass")
    prompt = loaded.prompt(QUESTION)
    want = loaded.logits(prompt, loaded.layout.default)
    monkeypatch.setattr(loaded.model, "logit_scale", None)
    torch.testing.assert_close(loaded.logits(prompt, loaded.layout.default) * 0.25, want)


def test_coheres_sliding_layers_do_not_see_the_whole_prompt():
    """Otherwise the shared test of attention rows would not tell a window from none."""
    config = engine("cohere_compass").model.config.text_config
    length = engine("cohere_compass").prompt(QUESTION).input_ids.shape[1]
    assert length > 2 * config.sliding_window and set(config.layer_types) == {"sliding_attention", "full_attention"}


# ---- untrained taps


@CLASS
def test_an_untrained_tap_goes_through_the_nearest_trained_merger(kind, tmp_path):
    QWEN[kind].write(tmp_path, taps=(2, 0))  # unsorted: block 0's merger is the second
    loaded, image = load(str(tmp_path), device="cpu"), tiny.image(3, (48, 32))
    assert [source.name for source in loaded.layout.untrained] == ["tap1", "tap3"]
    assert "untrained tap after vision block 1, through the merger of block 0" == loaded.layout.source("tap1").label
    model = ENTRIES[kind].model_class.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tower, blocks = model.model.visual, {}
    for index, block in enumerate(tower.blocks):
        block.register_forward_hook(lambda module, args, out, index=index: blocks.update({index: out}))
    inputs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(images=[image], return_tensors="pt")
    plan, prompt = Plan.parse("base@0,tap3@1,tap1@4*0.5"), loaded.prompt(tiny.ask(image, "x"))
    with torch.no_grad():
        model.model.get_image_features(**inputs)
        wanted = {"tap1": tower.deepstack_merger_list[1](blocks[1]), "tap3": tower.deepstack_merger_list[0](blocks[3])}
    features = loaded.features(prompt, plan)
    names = [source.name for source in loaded.layout.sources_for(plan)]
    assert names == ["base", "0", "1", "tap1", "tap3"] and len(features) == 5
    for name, rows in wanted.items():
        assert torch.equal(features[names.index(name)], rows)
    # As if the rows of tap 3 were those of a trained stack.
    swapped = torch.stack([features[0], features[4], features[2]])
    as_stack = loaded.logits(prompt, Plan.parse("base@0,0@1"), features=swapped)
    assert torch.equal(loaded.logits(prompt, Plan.parse("base@0,tap3@1")), as_stack)


def test_a_plan_with_untrained_taps_goes_everywhere_a_plan_goes():
    loaded = load_with_taps()
    two = tiny.ask(tiny.image(0, (40, 32)), tiny.image(1, (64, 32)), "What does the sign say?")
    prompt, plan = loaded.prompt(two), Plan.parse("base@0,0@1,tap3@2*0.5")
    sampling = Sampling(max_new_tokens=4)
    answer = loaded.answer(prompt, plan, sampling)
    mixed = loaded.answer_many(prompt, [loaded.layout.default, plan], sampling)
    assert [t.id for t in mixed[1].tokens] == [t.id for t in answer.tokens] and answer.plan == plan
    trace = loaded.replay(prompt, answer, plan)
    assert set(trace.injected_rms) == {("base", 0), ("0", 1), ("tap3", 2)}
    effect = loaded.image_effect(prompt, answer, plan)
    assert effect.shape == (4, 6) and effect[3, 2] > 0 and not effect[3, :2].any() and not effect[2].any()
    gains = torch.ones(4, prompt.visual_tokens, requires_grad=True)
    logprobs = loaded.logprob_of(prompt, answer, plan, gains)
    torch.testing.assert_close(logprobs.detach(), torch.tensor([t.logprob for t in answer.tokens]), atol=1e-5, rtol=0)
    logprobs.sum().backward()
    assert gains.grad[3].abs().sum() > 0 and not gains.grad[2].any()
    assert np.isfinite(attribution.ablation(loaded, prompt, answer, plan).values).all()
    assert norms.effect(loaded, prompt, answer, plan).sources == ("base", "0", "1", "tap3")
    assert plan_badge(loaded.layout, plan)[1] == "stack 1 off; untrained tap 3 added at layer 2"


@cache
def load_with_taps():
    """A tower of four blocks, two of them tapped."""
    path = Path(tempfile.mkdtemp(prefix="tiny-taps-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return load(str(tiny.qwen3_vl_folder(path, taps=(0, 2))), device="cpu")


def test_the_tower_runs_once_more_for_untrained_taps_and_not_again(monkeypatch):
    loaded, runs = load_with_taps(), []
    loaded.cache.clear()
    real = loaded.adapter.encode_taps
    monkeypatch.setattr(loaded.adapter, "encode_taps", lambda image, names: runs.append(names) or real(image, names))
    prompt = loaded.prompt(QUESTION)
    loaded.logits(prompt, loaded.layout.default)
    loaded.logits(prompt, Plan.parse("base@0,tap1@1"))
    loaded.logits(prompt, Plan.parse("tap1@2,tap3@1"))
    loaded.logits(prompt, Plan.parse("base@0,tap3@1"))
    assert runs == [["tap1"], ["tap3"]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base@0,tap2@1", "tap2 is this model's stack 1: write 1@1"),
        ("base@0,tap4@1", "has base, 0, 1 and untrained taps of its vision blocks 0 to 3"),
        ("base@0,7@1", "has base, 0, 1 and untrained taps"),
        ("base@0,tap1@9", "LLM layers are 0 to 4"),
    ],
)
def test_a_tap_that_is_not_there_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        load_with_taps().answer(load_with_taps().prompt(QUESTION), Plan.parse(text))


def test_a_model_without_stacks_has_no_mergers_to_tap_through(tmp_path):
    tiny.qwen3_vl_folder(tmp_path, taps=())
    loaded = load(str(tmp_path), device="cpu")
    assert loaded.layout.untrained == ()
    with pytest.raises(UserError, match="has base only, it has no stacks"):
        loaded.answer(loaded.prompt(QUESTION), Plan.parse("base@0,tap1@1"))
