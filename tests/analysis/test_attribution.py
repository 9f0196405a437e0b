"""Attributions against what the engine says when the same part is really withheld; no trace left on the model."""

import numpy as np
import pytest
import torch

from analysis import attribution
from model.errors import UserError
from model.plan import Plan
from model.types import Sampling
from tests import tiny


def asked(kind: str, *images):
    """(engine, prompt, answer) of a tiny model."""
    engine = tiny.engine(kind)
    prompt = engine.prompt(tiny.ask(*images, "What does the sign say?"))
    return engine, prompt, engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=4))


@pytest.fixture(scope="module", params=["hires", "qwen"])
def seen(request):
    return asked(request.param, tiny.image(1, (48, 32)))


def score(engine, prompt, plan, answer) -> float:
    """Log-probability of an answer under a plan, from a replay."""
    return float(engine.replay(prompt, answer, plan).logprobs.sum())


def test_shares_of_the_stacks_add_up(seen):
    """Completeness: the shares sum to f(on) - f(off), and both ends are what replays give."""
    engine, prompt, answer = seen
    found = attribution.integrated_gradients(engine, prompt, answer)
    plan = engine.layout.default
    base_only = Plan(e for e in plan if e.source == "base")
    assert found.on == pytest.approx(score(engine, prompt, plan, answer), abs=1e-4)
    assert found.off == pytest.approx(score(engine, prompt, base_only, answer), abs=1e-4)
    assert found.values.sum() == pytest.approx(found.on - found.off, abs=1e-3)
    assert found.delta == pytest.approx(found.values.sum() - (found.on - found.off), abs=1e-4)
    assert found.by_source()["base"] == 0  # it was never moved
    assert abs(found.by_source()["0"]) > 1e-3


def test_shares_from_no_image_report_their_error(seen):
    engine, prompt, answer = seen
    found = attribution.integrated_gradients(engine, prompt, answer, keep_base=False)
    assert found.off == pytest.approx(score(engine, prompt, Plan(), answer), abs=1e-4)
    assert found.values.sum() - (found.on - found.off) == pytest.approx(found.delta, abs=1e-4)
    assert abs(found.delta) < 0.05 * abs(found.on - found.off)  # the straight path with 128 even steps misses by half


def test_shares_of_the_tokens_add_up_to_those_of_the_answer(seen):
    engine, prompt, answer = seen
    whole = attribution.integrated_gradients(engine, prompt, answer)
    parts = [attribution.integrated_gradients(engine, prompt, answer, token=i) for i in range(len(answer.tokens))]
    assert sum(part.values for part in parts) == pytest.approx(whole.values, abs=1e-4)


def test_withholding_a_source_is_the_plan_without_it(seen):
    engine, prompt, answer = seen
    plan = engine.layout.default
    found = attribution.ablation(engine, prompt, answer)
    for source, loss in found.by_source().items():
        off = score(engine, prompt, plan.without(source), answer)
        assert loss == pytest.approx(found.on - off, abs=1e-4)


def test_withholding_squares_is_setting_their_gains_to_zero():
    engine, prompt, answer = asked("hires", tiny.image(1, (48, 32)))
    found = attribution.ablation(engine, prompt, answer, block=2, per_source=False)
    gains = torch.ones(len(engine.layout.sources), 16)
    gains[:, [2, 3, 6, 7]] = 0.0  # the upper right quarter of 4 x 4
    with torch.no_grad():
        off = float(engine.logprob_of(prompt, answer, engine.layout.default, gains).sum())
    assert found.map().values[:2, 2:].sum() == pytest.approx(found.on - off, abs=1e-4)
    assert np.ptp(found.map().values[:2, 2:]) == pytest.approx(0)


def test_gains_of_the_plan_count():
    """Half the gain is half the injection: the end point is the plan itself."""
    engine, prompt, answer = asked("qwen", tiny.image(1))
    plan = Plan.parse("base@0,0@2*0.5")
    found = attribution.integrated_gradients(engine, prompt, answer, plan)
    assert found.sources == ("base", "0")
    assert found.on == pytest.approx(score(engine, prompt, plan, answer), abs=1e-4)


def test_a_zero_stack_has_no_share():
    engine, prompt, answer = asked("hires", tiny.image(6, (96, 32)))  # three tiles: sample 3 is absent
    assert attribution.integrated_gradients(engine, prompt, answer).by_source()["3"] == 0
    assert attribution.ablation(engine, prompt, answer).by_source()["3"] == pytest.approx(0, abs=1e-5)


def test_maps_of_two_images_lie_on_their_own_grids():
    engine, prompt, answer = asked("qwen", tiny.image(1, (64, 32)), tiny.image(2, (32, 48)))
    found = attribution.integrated_gradients(engine, prompt, answer)
    maps = [found.map("1", image) for image in (0, 1)]
    assert [shown.values.shape for shown in maps] == [grid.grid for grid in prompt.grids]
    assert sum(shown.values.sum() for shown in maps) == pytest.approx(found.by_source()["1"])
    assert found.map(None, 1).values == pytest.approx(sum(found.map(s, 1).values for s in found.sources))
    assert maps[0].diverging and maps[0].size == (64, 32) and "miss" in maps[0].note
    with pytest.raises(ValueError, match="no source “9”"):
        found.map("9")


def test_parts_by_hand():
    prompt = asked("qwen", tiny.image(1, (48, 32)), tiny.image(2, (32, 32)))[1]
    first, second = (grid.grid for grid in prompt.grids)
    assert (first, second) == ((2, 3), (2, 2))
    assert attribution.part_mask(prompt, 1, 2, True).tolist() == [[0, 0, 1, 0, 0, 1, 2, 2, 2, 2]]
    assert attribution.part_mask(prompt, 2, None, True).tolist() == [[0] * 10, [1] * 10]
    assert attribution.part_mask(prompt, 2, 2, False).tolist() == [[0, 0, 1, 0, 0, 1, 2, 2, 2, 2]] * 2
    assert np.unique(attribution.part_mask(prompt, 3, 1, True)).tolist() == list(range(30))
    with pytest.raises(ValueError, match="at least 1"):
        attribution.part_mask(prompt, 1, 0, True)


def test_causal_check_withholds_what_the_map_marks():
    engine, prompt, answer = asked("hires", tiny.image(1, (48, 32)))
    values = np.zeros(16)
    values[[5, 9]] = 1.0
    values[3] = np.nan  # a hidden sink is never chosen
    found = attribution.causal_check(engine, prompt, answer, values, k=2, draws=5)
    gains = torch.ones(len(engine.layout.sources), 16)
    gains[:, [5, 9]] = 0.0
    with torch.no_grad():
        off = float(engine.logprob_of(prompt, answer, engine.layout.default, gains).sum())
    on = score(engine, prompt, engine.layout.default, answer)
    assert found.marked == pytest.approx(on - off, abs=1e-4)
    assert found.random.shape == (5,) and found.beats == (found.random < found.marked).mean()
    again = attribution.causal_check(engine, prompt, answer, values, k=2, draws=5)
    assert again.random.tolist() == found.random.tolist()


def test_a_map_of_the_true_losses_beats_chance():
    """The check works: marking the patches whose removal costs most costs more than random patches do."""
    engine, prompt, answer = asked("hires", tiny.image(1, (48, 32)))
    losses = attribution.ablation(engine, prompt, answer, block=1, per_source=False).map().values
    assert attribution.causal_check(engine, prompt, answer, losses, k=4, draws=16).beats >= 0.9


def test_nothing_is_left_on_the_model(seen):
    engine, prompt, answer = seen

    def hooks() -> int:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return sum(len(getattr(module, kind)) for module in engine.model.modules() for kind in kinds)

    before = hooks()
    attribution.integrated_gradients(engine, prompt, answer, steps=4)
    attribution.ablation(engine, prompt, answer)
    with pytest.raises(ValueError):
        attribution.integrated_gradients(engine, prompt, answer, token=99)
    assert hooks() == before
    assert not any(p.requires_grad or p.grad is not None for p in engine.model.parameters())
    assert engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=4)).tokens == answer.tokens


def test_nothing_to_attribute():
    engine, prompt, answer = asked("qwen", tiny.image(1))
    text_only = engine.prompt(tiny.ask("Hello?"))
    with pytest.raises(UserError, match="no image"):
        attribution.ablation(engine, text_only, answer)
    with pytest.raises(UserError, match="plan none brings nothing into the LLM"):
        attribution.ablation(engine, prompt, answer, Plan())
    with pytest.raises(ValueError, match="one part"):
        attribution.ablation(engine, prompt, answer, per_source=False)
    with pytest.raises(ValueError, match="16 values|values, the prompt"):
        attribution.causal_check(engine, prompt, answer, np.zeros(3))
