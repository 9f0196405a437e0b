"""DeepStack-V: stacks in the vision tower's own layers, against a plain loop over transformers' CLIP layers.

Run: pytest tests/model/families/test_deepstack_v.py. The truths that every family shares are in test_every_family.py.
"""

import json

import pytest
import torch

from analysis import attribution, norms, subsets, sweep
from analysis.compare import plan_badge
from app.doctor import diagnose
from model.errors import UserError
from model.families.deepstack_v import DeepStackV
from model.loading import check_type, load
from model.plan import Plan, presets
from model.types import Sampling
from tests import tiny
from tests.families import engine, folder
from tests.families.deepstack_llama import ReferenceV, inputs, v_folder

V = "deepstack_v"
QUESTION = "What does the sign say?"
TWO = tiny.ask(tiny.image(0, (64, 32)), "and", tiny.image(1, (24, 40)), QUESTION)


@pytest.fixture
def prompt():
    return engine(V).prompt(tiny.ask(tiny.image(0), QUESTION))


def started(path):
    return load(str(path), device="cpu", dtype="float32")


def hidden_before(loaded, prompt, plan):
    """The global view's tokens before each vision layer [1 + N, width], all that is added there included."""
    seen = {}
    layers = loaded.model.model.vision_tower.encoder.layers
    handles = [
        layer.register_forward_pre_hook(lambda m, args, at=at: seen.__setitem__(at, args[0][0].detach()))
        for at, layer in enumerate(layers)
    ]
    try:
        rows = loaded.adapter.encode(prompt.images[0], plan.tower.sources())
        seen.clear()
        entering = [(entry, rows[entry.source]) for entry in plan.tower]
        loaded.adapter.encode(prompt.images[0], ["base"], entering=entering)
    finally:
        for handle in handles:
            handle.remove()
    return seen


# ---- the released config


def test_the_config_decides_the_family():
    file = folder(V) / "config.json"
    assert check_type(file, "x") is DeepStackV
    assert json.loads(file.read_text())["model_type"] == "deepstack_llama"


def test_without_a_start_layer_the_stacks_begin_half_way(tmp_path):
    loaded = started(v_folder(tmp_path, deepstack_args_for_ablation="deepstack_vit"))
    assert str(loaded.layout.default) == "base@0,v0@v3,v1@v4,v2@v5"
    assert "Stack v3 would enter before a layer that the vision tower does not have" in loaded.warnings[0]
    with torch.no_grad():
        want = ReferenceV.from_pretrained(tmp_path).eval()(**inputs(tmp_path, TWO)).logits[0]
    assert torch.equal(loaded.logits(loaded.prompt(TWO), loaded.layout.default), want)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"deepstack_args_for_ablation": "deepstack_vit+dummy_local"}, "of these dummy_local cannot be run here"),
        ({"deepstack_args_for_ablation": "deepstack_vit+lsvit_start_layer_6"}, "starts its stacks at vision layer 6"),
        ({"num_crops": 3}, "a square num_crops .* not 3 and False"),
        ({"is_anyres_deepstack": True}, "no is_anyres_deepstack, not 4 and True"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        started(v_folder(tmp_path, **change))


def test_another_sampling_is_warned_about(tmp_path):
    loaded = started(v_folder(tmp_path, deepstack_sampling="grid"))
    assert "grid sampling, which DeepStack-V does not look at" in loaded.warnings[0]
    assert loaded.views(tiny.image(0))[1].owners[0] == ("v0", "v1") * 4


# ---- what enters the tower


def test_each_stack_enters_before_any_vision_layer_at_the_patches_alone(prompt):
    loaded = engine(V)
    rows = loaded.adapter._sets(prompt.images[0])
    off = hidden_before(loaded, prompt, Plan())
    for k in range(4):
        for layer in range(6):
            seen = hidden_before(loaded, prompt, Plan.parse(f"v{k}@v{layer}*-0.5"))
            for at in range(layer):
                assert torch.equal(seen[at], off[at])
            added = seen[layer] - off[layer]
            assert not added[0].any(), "the class token is left alone"
            torch.testing.assert_close(added[1:], -0.5 * rows[f"v{k}"], atol=4e-6, rtol=0)


def test_a_stack_before_the_last_layer_is_in_the_selected_state(prompt):
    """The last but one hidden state is the input of the last layer: a record of outputs alone would miss it."""
    loaded = engine(V)
    with_it, without = (loaded.see(prompt, Plan.parse(p)).features["base"] for p in ("base@0,v3@v5", "base@0"))
    assert not torch.equal(with_it, without)


def test_jointly_run_tiles_differ_in_the_last_bits_only(prompt):
    """The released code runs the global view and its tiles as one batch."""
    loaded = engine(V)
    adapter, tower = loaded.adapter, loaded.model.model.vision_tower
    image = prompt.images[0].convert("RGB")
    high = adapter.high_resolution(image)[0]
    views = [adapter.low_resolution(image), *(high.crop((x, y, x + 16, y + 16)) for y in (0, 16) for x in (0, 16))]
    with torch.no_grad():
        hidden = tower.pre_layrnorm(tower.embeddings(adapter._pixels(views)))
        for layer in tower.encoder.layers[:2]:
            hidden = layer(hidden, None)
        wide = hidden[1:, 1:].reshape(2, 2, 4, 4, -1).transpose(1, 2).reshape(8, 8, -1)
    rows = adapter._sets(image)
    for k in range(4):
        want = wide[k // 2 :: 2, k % 2 :: 2].flatten(0, 1)
        torch.testing.assert_close(rows[f"v{k}"], want, atol=1e-5, rtol=0)


# ---- plans


def test_what_was_seen_is_kept_by_what_enters_the_tower(prompt):
    loaded = engine(V)
    loaded.cache.clear()
    plan = Plan.parse("base@0,v0@v2,v1@v3")
    assert not loaded.see(prompt, plan).cached and loaded.see(prompt, plan).cached
    assert loaded.see(prompt, Plan.parse("base@2*0.5,v0@v2,v1@v3")).cached, "what enters the LLM changes nothing there"
    moved = loaded.see(prompt, Plan.parse("base@0,v0@v2,v1@v4"))
    assert not moved.cached and not torch.equal(moved.features["base"], loaded.see(prompt, plan).features["base"])
    assert not loaded.see(prompt, Plan.parse("base@0,v0@v2,v1@v3*2")).cached


def test_plans_that_differ_inside_the_tower_are_one_batch(prompt):
    loaded = engine(V)
    plans = [loaded.layout.default, Plan.parse("base@0"), Plan.parse("base@0*0.5,v2@v1"), Plan.parse("base@2,v0@v2")]
    answers = loaded.answer_many(prompt, plans, Sampling(max_new_tokens=5))
    for answer, plan in zip(answers, plans, strict=True):
        alone = loaded.answer(prompt, plan, Sampling(max_new_tokens=5))
        assert [token.id for token in answer.tokens] == [token.id for token in alone.tokens]
        assert answer.tokens[0].logprob == pytest.approx(alone.tokens[0].logprob, abs=1e-4)
    assert len({answer.text for answer in answers}) > 1


def test_a_plan_for_the_tower_is_checked(prompt):
    loaded = engine(V)
    for text, said in (("v4@v0", "“v4”, but this model has base, v0"), ("v0@v6", "vision layers are 0 to 5")):
        with pytest.raises(UserError, match=said):
            loaded.see(prompt, Plan.parse(text))
    with pytest.raises(UserError, match="“v0”, but this model has base only|“v0”, but this model has base, 0"):
        engine("deepstack_llama").logits(prompt, Plan.parse("base@0,v0@v0"))


def test_presets_and_badges_speak_of_vision_layers():
    layout = engine(V).layout
    found = {name: str(plan) for name, plan in presets(layout).items()}
    assert found["single injection"] == "base@0" and found["only v1"] == "base@0,v1@v3"
    assert found["reversed"] == "base@0,v0@v5,v1@v4,v2@v3,v3@v2"
    moved = plan_badge(layout, Plan.parse("base@0,v0@v1,v1@v3,v2@v4"))
    assert moved == ("ablated", "vision stack 3 off; vision stack 0 moved from vision layer 2 to layer 1")


def test_every_view_of_an_answer_works(prompt):
    """Subsets, effects, norms, attribution and a sweep, with the stacks in the tower."""
    loaded = engine(V)
    run = subsets.run(loaded, prompt, sampling=Sampling(max_new_tokens=3))
    assert run.stacks == ("v0", "v1", "v2", "v3") and len(run.rows) == 16 and (abs(run.shapley) > 1e-6).any(1).all()
    plan = loaded.layout.default
    answer = loaded.answer(prompt, plan, Sampling(max_new_tokens=3))
    felt = norms.effect(loaded, prompt, answer, plan)
    assert felt.sources == ("base", "v0", "v1", "v2", "v3") and (felt.values[:, 0] > 0).all()
    summary = norms.summarise(loaded.replay(prompt, answer, plan))
    assert summary.sources() == ("base",) and list(summary.injected) == [("base", 0)]
    shares = attribution.ablation(loaded, prompt, answer, plan)
    assert shares.sources == ("base",) and shares.values.sum() == pytest.approx(shares.on - shares.off, abs=1e-3)
    with pytest.raises(UserError, match="The plan v0@v2 brings nothing into the LLM"):
        attribution.ablation(loaded, prompt, answer, Plan.parse("v0@v2"))
    assert [str(p) for p in sweep.plans_along(loaded.layout, "start").values()] == [
        f"base@0,v0@v{s},v1@v{s + 1},v2@v{s + 2},v3@v{s + 3}" for s in range(3)
    ]


def test_doctor_passes():
    assert [check.name for check in diagnose(engine(V)) if not check.ok] == []
