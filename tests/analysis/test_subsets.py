"""Shapley values by hand, by their axioms and by trying every order; subsets against one-by-one runs."""

from itertools import permutations

import numpy as np
import pytest

from analysis import subsets
from model.errors import UserError
from model.plan import Plan
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
    plans = ["base@0", "base@0,0@1", "base@0,2@3*0.5,2@5", "base@0,0@1,2@3*0.5,2@5"]
    assert {bits: str(plan) for bits, plan in found.items()} == dict(enumerate(plans))


def test_of_many_stacks_the_telling_subsets_are_answered():
    """None, all, each alone, without each, the first n, the last n; of six stacks all 64."""
    assert subsets.bits_of(6) == list(range(64))
    found = subsets.bits_of(7)
    assert len(found) == 2 + 7 + 7 + 4 + 4 and found == sorted(set(found))
    assert {0b0000000, 0b1111111, 0b0001000, 0b1110111, 0b0001111, 0b1110000} <= set(found)
    assert 0b0101000 not in found


def test_sampled_values_are_exact_where_nothing_interacts_and_near_where_it_does():
    draw = np.random.default_rng(3)
    orders = subsets.orders_of(8)
    assert len(orders) == subsets.ORDERS and all(orders[n + 1] == orders[n][::-1] for n in range(0, len(orders), 2))
    each = draw.normal(size=(8, 2))
    on = (np.arange(256)[:, None] >> np.arange(8) & 1).astype(float)
    phi, error = subsets.sampled_shapley(dict(enumerate(on @ each)), orders)
    assert phi == pytest.approx(each) and error == pytest.approx(np.zeros((8, 2)))
    pairs = on @ each + (on[:, :1] * on[:, 1:2]) * 3.0  # players 0 and 1 are worth 3 together, besides
    phi, error = subsets.sampled_shapley(dict(enumerate(pairs)), orders)
    assert phi == pytest.approx(subsets.shapley(pairs), abs=1e-9)  # an order and its reverse share a pair evenly
    wild = draw.normal(size=(256, 2))
    phi, error = subsets.sampled_shapley(dict(enumerate(wild)), orders)
    assert phi.sum(0) == pytest.approx(wild[-1] - wild[0])
    assert (np.abs(phi - subsets.shapley(wild)) < 5 * error).all() and error.min() > 0


def test_a_run_with_nine_stacks():
    """32 answers, values with their error, and every score that of a plan alone."""
    nine = tiny.engine("nine")
    prompt = nine.prompt(tiny.ask(tiny.image(5, (40, 40)), "Read the text."))
    run = subsets.run(nine, prompt, sampling=SHORT, truth="AB")
    assert (len(run.stacks), len(run.rows), run.shapley.shape) == (9, 32, (9, len(run.tokens)))
    assert run.shapley.sum(0) == pytest.approx(run.scores[-1] - run.scores[0], abs=1e-5) and run.error.max() > 0
    for row in (run.rows[0], run.rows[7], run.rows[-1]):
        alone = sum(token.logprob for token in nine.score(prompt, row.plan, "AB"))
        assert row.logprob == pytest.approx(alone, abs=1e-3)
        assert row.answer.text == nine.answer(prompt, row.plan, SHORT).text


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
    assert {row.plan for row in run.rows} == set(subsets.subsets_of(engine.layout.default).values())
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
