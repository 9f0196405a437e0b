"""Shapley values by hand, by their axioms and by trying every order; subsets against one-by-one runs."""

from itertools import permutations

import numpy as np
import pytest

from analysis import subsets
from model.errors import UserError
from model.plan import Plan
from model.plan import subsets as plan_subsets
from model.types import Sampling
from tests import tiny

SHORT = Sampling(max_new_tokens=4)


def test_two_stacks_by_hand():
    """Nothing 0, first alone 1, second alone 2, both 5: each adds its own and half of the 2 that come from both."""
    assert subsets.shapley([0, 1, 2, 5]) == pytest.approx([2, 3])


def test_one_stack_and_none():
    assert subsets.shapley([-3, -1]) == pytest.approx([2])
    assert subsets.shapley([-3]).shape == (0,)
    with pytest.raises(ValueError, match="2\\^K values, not 3"):
        subsets.shapley([1, 2, 3])


def test_it_is_the_mean_over_all_orders():
    values = np.random.default_rng(0).normal(size=(16, 3))
    added = np.zeros((4, 3))
    orders = list(permutations(range(4)))
    for order in orders:
        on = 0
        for player in order:
            added[player] += values[on | 1 << player] - values[on]
            on |= 1 << player
    assert subsets.shapley(values) == pytest.approx(added / len(orders))


def test_axioms():
    draw = np.random.default_rng(1)
    values = draw.normal(size=16)
    phi = subsets.shapley(values)
    assert phi.sum() == pytest.approx(values[-1] - values[0])  # efficiency
    idle = np.array([values[bits & 0b1011] for bits in range(16)])  # player 2 changes nothing
    assert subsets.shapley(idle)[2] == pytest.approx(0)
    swap = [(bits & 0b1100) | (bits & 1) << 1 | (bits & 2) >> 1 for bits in range(16)]
    same = values + values[swap]  # players 0 and 1 are interchangeable
    assert subsets.shapley(same)[0] == pytest.approx(subsets.shapley(same)[1])
    other = draw.normal(size=16)
    assert subsets.shapley(values + 2 * other) == pytest.approx(phi + 2 * subsets.shapley(other))  # linear


def test_subsets_of_a_plan_keep_the_base_and_the_gains():
    found = subsets.subsets_of(Plan.parse("base@0,0@1,2@3*0.5,2@5"))
    assert [str(plan) for plan in found] == ["base@0", "base@0,0@1", "base@0,2@3*0.5,2@5", "base@0,0@1,2@3*0.5,2@5"]
    with pytest.raises(UserError, match="7 stacks"):
        subsets.subsets_of(Plan([(str(i), i, 1.0) for i in range(7)]))


@pytest.mark.parametrize(
    "on, label",
    [
        (("0", "1", "2", "3"), "all 4"),
        (("0", "1", "3"), "without 2"),
        (("0", "1"), "only 0, 1"),
        (("3",), "only 3"),
        ((), "base only"),
    ],
)
def test_labels(on, label):
    assert subsets.subset_label(("0", "1", "2", "3"), on) == label


def test_labels_of_other_plans():
    assert subsets.subset_label(("0",), ("0",)) == "as it is"
    assert subsets.subset_label(("0", "1"), (), base=False) == "nothing"
    assert subsets.subset_label((), ()) == "base only"


@pytest.mark.parametrize("kind", ["hires", "qwen"])
def test_a_run_is_what_each_plan_gives_alone(kind):
    engine = tiny.engine(kind)
    prompt = engine.prompt(tiny.ask(tiny.image(5, (40, 40)), "Read the text."))
    run = subsets.run(engine, prompt, sampling=SHORT, truth="total")
    assert {row.plan for row in run.rows} == set(plan_subsets(engine.layout))
    assert run.rows[0].plan == engine.layout.default and run.rows[-1].label == "base only"
    for row in run.rows:
        assert row.answer.text == engine.answer(prompt, row.plan, SHORT).text
        alone = sum(token.logprob for token in engine.score(prompt, row.plan, "total"))
        assert row.logprob == pytest.approx(alone, abs=1e-4)
        assert row.match is (row.answer.text.strip() == "total")
    assert run.shapley.sum(0) == pytest.approx(run.scores[-1] - run.scores[0])
    assert "".join(run.tokens) == run.target == "total"


def test_without_a_truth_the_answer_with_everything_on_is_scored():
    engine = tiny.engine("qwen")
    prompt = engine.prompt(tiny.ask(tiny.image(1, (48, 32)), "What does the sign say?"))
    plan = Plan.parse("base@0,0@1,2@3*3")
    run = subsets.run(engine, prompt, plan, SHORT)
    assert (run.stacks, len(run.rows), run.rows[0].match) == (("0", "2"), 4, None)
    assert run.target == run.rows[0].answer.text == engine.answer(prompt, plan, SHORT).text
    assert run.target != run.rows[-1].answer.text  # else this would not tell them apart


def test_an_absent_stack_is_worth_nothing():
    """A picture three times as wide as high has three tiles: the fourth sample is zero, a dummy player."""
    engine = tiny.engine("hires")
    prompt = engine.prompt(tiny.ask(tiny.image(6, (96, 32)), "Read the text."))
    run = subsets.run(engine, prompt, sampling=SHORT, truth="total")
    assert run.shapley[3] == pytest.approx(np.zeros(len(run.tokens)), abs=1e-5)
    assert np.abs(run.shapley[0]).max() > 1e-3


def test_a_model_without_stacks_and_a_prompt_without_image():
    engine = tiny.engine("single")
    run = subsets.run(engine, engine.prompt(tiny.ask(tiny.image(5), "Read.")), sampling=SHORT, truth="total")
    assert (len(run.rows), run.shapley.shape) == (1, (0, len(run.tokens)))
    engine = tiny.engine("qwen")
    run = subsets.run(engine, engine.prompt(tiny.ask("Read.")), sampling=SHORT, truth="total")
    assert run.shapley == pytest.approx(np.zeros((3, len(run.tokens))), abs=1e-5)


def test_nothing_to_score():
    engine = tiny.engine("qwen")
    with pytest.raises(UserError, match="nothing to score"):
        subsets.run(engine, engine.prompt(tiny.ask(tiny.image(5), "Read.")), sampling=SHORT, truth="  ")
