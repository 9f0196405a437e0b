"""Differences, errors and divergence, by hand and for any text."""

import random

import pytest

from analysis import compare
from analysis.compare import ADDED, DROPPED, SAME
from model.layout import Layout, StackSource
from model.plan import Plan
from model.types import Token
from tests.analysis import hand


@pytest.mark.parametrize(
    "text, truth, same",
    [
        ("K7PX2", " K7PX2\n", True),
        ("two  words", "two words", True),
        ("ﬁne", "fine", True),  # a ligature
        ("K7PX2", "k7px2", False),
        ("K7PX2.", "K7PX2", False),
        ("", "", True),
    ],
)
def test_what_counts_as_the_same(text, truth, same):
    assert compare.exact(text, truth) is same


@pytest.mark.parametrize(
    "text, truth, rate",
    [
        ("K7PX2", "K7PX2", 0.0),
        ("K7FXZ", "K7PX2", 0.4),
        ("K7X2", "K7PX2", 0.2),
        ("", "K7PX2", 1.0),
        ("ab", "a", 1.0),
        ("abc", "a", 2.0),
        ("", "", 0.0),
        ("no", "", 2.0),
    ],
)
def test_character_error_rate_by_hand(text, truth, rate):
    assert compare.cer(text, truth) == pytest.approx(rate)


def test_character_error_rate_of_many_counts_characters_not_questions():
    pairs = [("a", "b"), ("123456789", "123456789")]  # 1 error in 10 characters, not the mean of 100 % and 0 %
    assert compare.corpus_cer(pairs) == pytest.approx(0.1)
    assert compare.corpus_cer([("xy", ""), ("ab", "ab")]) == pytest.approx(1.0)


def test_diff_of_a_reading_is_by_character():
    assert compare.diff("K7FXZ", "K7PX2") == [
        *((SAME, "K7"), (DROPPED, "F"), (ADDED, "P"), (SAME, "X"), (DROPPED, "Z"), (ADDED, "2")),
    ]


def test_diff_of_a_sentence_is_by_word():
    spans = compare.diff("The code is K7 FX, I think.", "The code is K7 PX.")
    assert spans == [
        *((SAME, "The code is K7 "), (DROPPED, "FX, I think"), (ADDED, "PX"), (SAME, ".")),
    ]


def test_diff_unit_can_be_chosen():
    assert compare.diff("K7FXZ", "K7PX2", "word") == [(DROPPED, "K7FXZ"), (ADDED, "K7PX2")]
    assert compare.diff("one two three", "one two three") == [(SAME, "one two three")]
    assert compare.diff("", "") == []
    with pytest.raises(ValueError, match="word or character"):
        compare.diff("a", "b", "letter")


@pytest.mark.parametrize("unit", ["word", "character"])
def test_spans_always_give_both_texts_back(unit):
    draw = random.Random(0)
    for _ in range(300):
        a, b = ("".join(draw.choices("ab .\n", k=draw.randrange(14))) for _ in "ab")
        spans = compare.diff(a, b, unit)
        assert "".join(text for op, text in spans if op != ADDED) == a
        assert "".join(text for op, text in spans if op != DROPPED) == b
        assert all(text for _, text in spans)
        assert all(x[0] != y[0] for x, y in zip(spans, spans[1:], strict=False))
        if a == b:
            assert all(op == SAME for op, _ in spans)


def test_long_texts_are_compared_quickly():
    a = "word " * 4000
    assert compare.diff(a, a + "end")[-1] == (ADDED, "end")


def test_first_divergent_token():
    found = compare.first_divergence(hand.answer("K7PX2"), hand.answer("K7FX2"))
    assert found.prefix == "K7"
    assert [side.index for side in found.sides] == [2, 2]
    assert [side.token.text for side in found.sides] == ["P", "F"]
    assert found.sides[0].top == (("P", -0.5), ("?", -3.0))


def test_divergence_where_tokenizers_differ():
    found = compare.first_divergence(hand.answer("K7PX2", pieces=("K7P", "X2")), hand.answer("K7FX2"))
    assert found.prefix == ""  # the left token that holds the difference starts at the beginning
    assert [(side.index, side.token.text) for side in found.sides] == [(0, "K7P"), (2, "F")]


def test_divergence_where_one_answer_ends():
    found = compare.first_divergence(hand.answer("K7"), hand.answer("K7PX2"))
    assert found.prefix == "K7"
    assert (found.sides[0].index, found.sides[0].token, found.sides[0].top) == (2, None, ())
    assert found.sides[1].token.text == "P"


def test_no_divergence():
    assert compare.first_divergence(hand.answer("K7"), hand.answer("K7", pieces=("K7",))) is None


def layout(stacks: int = 2) -> Layout:
    names = [str(i) for i in range(stacks)]
    plan = Plan.parse(",".join(["base@0", *(f"{name}@{i}" for i, name in enumerate(names, 1))]))
    sources = [StackSource(name, name, None, i, "") for i, name in enumerate(("base", *names))]
    return Layout("by hand", tuple(sources), 8, 2, 8, plan, "")


@pytest.mark.parametrize(
    "plan, badge, why",
    [
        ("base@0,0@1,1@2", "trained", "as trained"),
        ("base@0,0@1", "ablated", "stack 1 off"),
        ("base@0", "ablated", "all stacks off"),
        ("none", "ablated", "base off; all stacks off"),
        ("base@0,0@1,1@4", "ablated", "stack 1 moved from layer 2 to layer 4"),
        ("base@0,0@1*0.5,1@2", "ablated", "stack 0 scaled, ×0.5"),
        ("base@0,0@1,0@3,1@2", "ablated", "stack 0 moved from layer 1 to layers 1, 3"),
        ("base@1,0@1", "ablated", "stack 1 off; base moved from layer 0 to layer 1"),
    ],
)
def test_badge_says_what_is_different_from_training(plan, badge, why):
    assert compare.plan_badge(layout(), Plan.parse(plan)) == (badge, why)


@pytest.mark.parametrize(
    "plan, why",
    [
        ("base@0,0@1,2@3,4@5", "stacks 1, 3 off"),
        ("base@0,0@5,1@4,2@3,3@2,4@1", "stacks 0, 1, 3, 4 moved"),
        ("base@0,0@2,1@3,2@4,3@5,4@6", "all stacks moved"),
        ("base@0*2,0@1*2,1@2*2,2@3*2,3@4*2,4@5*2", "base scaled, ×2; all stacks scaled"),
    ],
)
def test_many_changes_of_a_kind_are_one(plan, why):
    assert compare.plan_badge(layout(stacks=5), Plan.parse(plan)) == ("ablated", why)


def test_rows_of_a_comparison():
    answers = [hand.answer("K7PX2"), hand.answer("K7", Plan())]
    truth = [[Token(0, "K7PX2", -0.25, ())], None]
    first, second = compare.rows(answers, ["stacks", "none"], "K7PX2", truth)
    assert (first["exact"], first["cer"], first["logprob_truth"]) == (True, 0, -0.25)
    assert first["logprob_answer"] == pytest.approx(-2.5)
    assert (second["exact"], second["cer"], second["plan"]) == (False, pytest.approx(0.6), "none")
    assert second["logprob_truth"] is None
    assert compare.rows(answers, ["a", "b"])[0]["exact"] is None
    with pytest.raises(ValueError):
        compare.rows(answers, ["only one label"])
