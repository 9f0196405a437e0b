"""A run's model as a folder: it loads as any other, and the engine answers as the trained twin does.

Run: pytest tests/model/lab/test_ship.py
"""

import json
import shutil

import numpy as np
import pytest
import torch

from model.errors import UserError
from model.lab import run as lab
from model.lab import scenes, ship
from model.lab.variants import VARIANTS
from model.loading import load
from model.plan import Plan, presets
from model.probe import AttentionWish, Probe
from model.training import twins
from model.training.tokenizer import make_tokenizer
from model.types import Sampling
from tests.model.lab.lab_sizes import job

SHIPPED = (
    *("stack-2d", "none", "dummy", "string", "global-string", "concat", "average", "stack-grid", "stack-1d"),
    *("start-4", "start-6", "interval-2", "layers-2", "global-deeper", "gate", "none-tuned", "deepstack-v-2"),
)
CLOSE = 2e-2  # of a log-probability: weights in float16


@pytest.fixture(scope="module")
def shipped(workdir, tmp_path_factory):
    """By name: the trained twin, and the engine of its folder."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def trained(name):
        twin = ship.trained(job(name), workdir)
        if name == "gate":  # two steps leave gates near 1
            twin.gates.data = torch.tensor([1.5, 0.5, -0.5, 2.0]).view_as(twin.gates)
        generator = torch.Generator().manual_seed(0)
        for change in twin.changes:  # and a tower as it was
            change.data = 0.03 * torch.randn(change.shape, generator=generator)
        return twin

    def make(name):
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(lab, "costs", lambda *_: {})
                lab.run(job(name), workdir)
            out = ship.ship(trained(name), root / name, {"made": name})
            made[name] = trained(name), load(str(out))
        return made[name]

    return make


@pytest.fixture(scope="module")
def scene():
    """The first test scene, and what a run reads of it: features, or views."""
    made = scenes.make_scene(np.random.default_rng([scenes.TEST_SEED, 0]))
    batch = scenes.render(1, scenes.TEST_SEED)
    return made, scenes.encode(scenes.load_tower(), batch).float(), scenes.views_of(batch).float()


def asked(scene, question=None):
    text = (question or scene.questions[0].question).upper()
    content = [{"type": "image", "image": scene.image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


@torch.no_grad()
def told(twin, features, question, ids, stacks=True):
    """The trained twin's log-probabilities at each of the answer's tokens `ids`: `[ids, vocabulary]`."""
    questions = twins.Questions(make_tokenizer())
    before = questions.tokens(question.lower()) + questions.answer
    targets = [-100] * (len(before) - 1) + ids + [-100]
    rows = questions.pad([(before + ids, targets, [-1] * len(targets), [])])
    enter = type(twin).inject

    class Without(type(twin)):
        def inject(self, features):
            return enter(self, features)[0], {}

    kind = type(twin)
    twin.__class__ = kind if stacks else Without
    logits, _ = twin(features, rows)
    twin.__class__ = kind
    return logits.log_softmax(-1)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_engine_answers_as_the_trained_twin(shipped, scene, name):
    """Two steps from nothing, written, loaded: the same tokens and log-probabilities, as trained and single."""
    made, features, views = scene
    twin, engine = shipped(name)
    features = views if twin.variant.pixels else features
    prompt = engine.prompt(asked(made))
    plans = [engine.layout.default]
    if engine.layout.stack_names and not twin.variant.pixels:
        plans.append(Plan.parse("base@0"))
    for number, plan in enumerate(plans):
        answer = engine.answer(prompt, plan, Sampling(max_new_tokens=6))
        ids = [token.id for token in answer.tokens]
        assert ids, "the untrained model said nothing: choose another question"
        wanted = told(twin, features, made.questions[0].question, ids, stacks=number == 0)
        found = torch.tensor([token.logprob for token in answer.tokens])
        torch.testing.assert_close(found, wanted.gather(1, torch.tensor(ids)[:, None])[:, 0], atol=CLOSE, rtol=0)
        assert (wanted.max(-1).values - found < CLOSE).all(), "another token is the twin's best"


@pytest.mark.parametrize("name", SHIPPED)
def test_what_the_page_shows_of_it_fits_together(shipped, scene, name):
    """Views, grids, presets and a replay of a square and of a wide picture."""
    _, engine = shipped(name)
    for picture in (scene[0].image, scene[0].image.resize((200, 90))):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "what is it?"}]
        prompt = engine.prompt([{"role": "user", "content": content}])
        views = engine.views(picture)
        sizes = [grid.grid for grid in prompt.grids]
        assert sizes[-1] == (views[-1] if "string" in name else views[0]).grid
        assert sum(len(grid.positions) for grid in prompt.grids) == sum(rows * columns for rows, columns in sizes)
        chosen = [*presets(engine.layout).values()]
        answers = engine.answer_many(prompt, chosen, Sampling(max_new_tokens=2))
        probe = Probe(attention=(AttentionWish((2,), (prompt.input_ids.shape[1] - 1,)),))
        trace = engine.replay(prompt, answers[0], chosen[0], probe)
        assert np.isfinite(trace.residual_rms).all() and trace.grids == prompt.grids
        assert engine.image_effect(prompt, answers[0], chosen[0]).shape[0] == len(
            engine.layout.sources + engine.layout.tower
        )


def test_plans_and_views_of_the_shipped_variants(shipped, scene):
    plans = {name: str(shipped(name)[1].layout.default) for name in ("dummy", "start-4", "start-6", "layers-2")}
    assert plans == {
        "dummy": "base@0,0@1,1@2,2@3,3@4",
        "start-4": "base@0,0@4,1@5,2@6,3@7",
        "start-6": "base@0,0@6,1@7",
        "layers-2": "base@0,0@1,1@2",
    }
    assert str(shipped("global-deeper")[1].layout.default) == "base@4"
    assert shipped("global-deeper")[1].layout.sources[0].home == 4
    rows = {name: len(shipped(name)[1].prompt(asked(scene[0])).grids) for name in ("stack-2d", "global-string")}
    assert rows == {"stack-2d": 1, "global-string": 2}
    assert [view.name for view in shipped("string")[1].views(scene[0].image)] == ["high-resolution view"]
    assert [view.name for view in shipped("dummy")[1].views(scene[0].image)] == ["global view"]
    assert shipped("dummy")[1].trained == "trained with the global view for every stack"


def test_gates_are_the_gains_of_the_default_plan():
    found = ship.entry(VARIANTS["gate"], 8, [1.25, 0.5, -0.123456, 1.0])
    assert found["plan"] == "base@0,0@1*1.25,1@2*0.5,2@3*-0.1235,3@4"
    assert "plan" not in ship.entry(VARIANTS["stack-2d"], 8)


def test_a_shipped_folder_is_small_and_leaves_the_tower_where_it_is(shipped, tmp_path, workdir):
    """The lab's own size, with weights that nobody trained: under 4 MB, because the tower is not in it."""
    twin, engine = shipped("concat")
    small = lab.SIZES["small"]
    vision, count = twin.model.config.vision_config, len(make_tokenizer())
    largest = ship.LabTwin(VARIANTS["concat"], vision, count, torch.eye(vision.hidden_size)[None], small.width, 8)
    out = ship.ship(largest, tmp_path / "concat", {"made": "concat"})
    assert sum(file.stat().st_size for file in out.iterdir()) < 4_000_000
    assert json.loads((out / "recipe.json").read_text()) == {"made": "concat"}
    assert load(str(out)).adapter.borrowed == engine.adapter.borrowed > 2_000_000
    wanted = scenes.load_tower().tower.state_dict()
    found = engine.model.model.vision_tower.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_tuned_tower_is_the_embedded_one_and_what_training_changed(shipped):
    twin, engine = shipped("deepstack-v-2")
    assert str(engine.layout.default) == "base@0,v0@v2,v1@v3,v2@v4"
    assert "Its tower was read from embedded/hires and changed in training." in engine.adapter.note
    start = scenes.load_tower().tower.state_dict()
    wanted, found = twin.model.model.vision_tower, engine.model.model.vision_tower
    moved = 0.0
    for name, layer in found.named_modules():
        if isinstance(layer, torch.nn.Linear):
            torch.testing.assert_close(layer.weight, wanted.get_submodule(name).weight, atol=2e-5, rtol=0)
            moved = max(moved, (layer.weight - start[f"{name}.weight"]).abs().max().item())
    assert moved > 1e-3


@pytest.mark.parametrize(
    "tower, mark, words",
    [
        ("embedded/hires", "00000000", "trained on another vision tower \\(00000000\\) than embedded/hires has now"),
        ("../hires", None, "must name an embedded checkpoint"),
        ("embedded/none", None, "There is no model embedded/none"),
    ],
)
def test_another_tower_is_refused(shipped, tmp_path, tower, mark, words):
    out = shutil.copytree(shipped("none")[1].name, tmp_path / "none")
    config = json.loads((out / "config.json").read_text())
    config["deepstack"] |= {"tower": tower, "tower_mark": mark}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        load(str(out))


@pytest.mark.parametrize(
    "name, words",
    [
        ("gate-channel", "cannot be shipped: no model of the app has its gate"),
        ("layer-positions", "has its positions"),
        ("budget-50", "has its keep_all, keep_some"),
        ("budget-50-question", "has its keep_all, keep_some, keep_by"),
        ("inconsistent-resize", "has its consistent"),
        ("taps-3", "has its merge"),
        ("start-last", "added after the last layer"),
    ],
)
def test_what_no_family_can_run_is_refused(workdir, name, words):
    with pytest.raises(UserError, match=words):
        ship.trained(job(name), workdir)


def test_a_run_that_has_not_ended_is_refused(shipped, workdir):
    shipped("none")
    with pytest.raises(UserError, match="none 0 has done 0 of 9 steps in .* that has ended, or train it with this.$"):
        ship.trained(job("none", steps=9), workdir, "this")
