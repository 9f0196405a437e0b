"""The Stacks tab's handlers: each change answers again, the subsets are computed once, the last change wins."""

from __future__ import annotations

import html
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.session import Focus
from app.tabs import stacks
from model.errors import UserError
from model.plan import Plan
from tests.app.given import HIRES, SETTINGS, SINGLE, last, skipped
from tests.waiting import wait_until

PLAN = "base@0,0@1,1@2,2@3,3@4"


def go(desk, session, focus, plan=PLAN, question="", model=HIRES):
    return stacks.live(desk, question, plan, model, *SETTINGS, session, focus)


def of(part: str) -> str:
    """The model and plan that a part of the tab says it is of."""
    return html.unescape(re.match('<div data-of="(.*?)">', part)[1])


def test_without_a_question_there_is_an_empty_state(desk, session):
    out = last(go(desk, session, Focus()))
    assert "No question yet" in out[3] and out[4] == out[5] == ""
    assert "No question yet" in last(go(desk, session, Focus(question="asked, but of what?")))[3]


def test_a_change_answers_again_beside_the_answer_before(desk, session, focus):
    first = last(go(desk, session, focus))
    assert "before" not in first[3]
    question, kept, focus, card, strip, felt, bars = last(go(desk, session, first[2], plan="base@0,0@1"))
    assert question == "What does the lemon cost?" and kept is None
    now, before = desk.store.record(focus.record), desk.store.record(focus.before)
    assert now.answer.plan == Plan.parse("base@0,0@1") and before.answer.plan == Plan.parse(PLAN)
    assert "before, under" in card and ">ablated<" in card and "truth" in card
    assert strip.count("data-plan=") == 16 and "without 3" in strip
    assert "How far each source" in felt and "Which stack gave" in felt
    assert bars["plan"] == "base@0,0@1"


def test_the_answer_is_what_the_engine_says_under_that_plan(desk, session, focus):
    focus = last(go(desk, session, focus, plan="base@0,2@2*0.5"))[2]
    record = desk.store.record(focus.record)
    assert record.answer.text == desk.engine(HIRES).answer(record.prompt, record.answer.plan, record.sampling).text


def test_the_answer_comes_before_what_follows_from_it(desk, session, focus):
    *_, answered, rest = list(go(desk, session, focus))
    assert not skipped(answered[3]) and "being answered" in answered[4]
    assert skipped(rest[3]) and not skipped(rest[4])


def test_the_subsets_are_computed_once_per_question(desk, session, focus, monkeypatch):
    runs = []
    real = stacks.subsets.run
    monkeypatch.setattr(stacks.subsets, "run", lambda *args: runs.append(args) or real(*args))
    focus = last(go(desk, session, focus))[2]
    focus = last(go(desk, session, focus, plan="base@0"))[2]
    focus = last(go(desk, session, focus, plan="base@0,3@4"))[2]
    assert len(runs) == 1
    last(go(desk, session, focus, plan="base@0,3@5"))  # a stack that has moved: other subsets
    assert len(runs) == 2


def test_nothing_new_is_drawn_again_without_an_answer(desk, session, focus):
    focus = last(go(desk, session, focus))[2]
    held = len(desk.store)
    assert last(go(desk, session, focus))[2] is None and len(desk.store) == held  # the focus stays as it is


def test_a_later_change_takes_over(desk, session, focus):
    """It begins when the one before has handed on what it had; that one shows nothing more."""
    focus = last(go(desk, session, focus))[2]
    early = go(desk, session, focus, plan="base@0")
    shown = next(early)
    with ThreadPoolExecutor(1) as other:
        stop = desk.store._stops[session.visitor, "stacks"]
        later = other.submit(last, go(desk, session, focus, plan="none"))
        wait_until(stop.is_set)
        assert not later.done()
        rest = list(early)
        card = later.result()[3]
    assert (of(shown[3]), of(card)) == (f"{HIRES} base@0", f"{HIRES} none")
    assert all(skipped(value) for state in rest for value in state), "the overtaken answer must leave the views alone"


def test_switched_back_at_once_the_focus_is_on_what_is_shown(desk, session, focus):
    """The second of two quick switches reads the focus before the first has written it; it used to leave it there."""
    first = last(go(desk, session, focus))[2]
    switched = last(go(desk, session, first, plan="base@0"))[2]
    assert switched.record != first.record
    back, card = last(go(desk, session, first))[2:4]
    assert back.record == first.record and of(card) == f"{HIRES} {PLAN}"


def test_every_part_says_what_it_is_of(desk, session, focus):
    states = list(go(desk, session, focus))
    parts = [value for state in states for value in state[3:6] if isinstance(value, str) and value]
    assert len(parts) >= 4 and {of(part) for part in parts} == {f"{HIRES} {PLAN}"}


def test_subsets_of_a_moved_plan_are_its_own(desk):
    layout = desk.engine(HIRES).layout
    assert stacks.everything(layout, Plan.parse("base@0,2@3")) == layout.default
    moved = Plan.parse("base@0,0@3")
    assert stacks.everything(layout, moved) == moved


def test_a_model_without_stacks_says_so(desk, session, focus):
    strip = last(go(desk, session, focus, plan="base@0", model=SINGLE))[4]
    assert "single injection" in strip


def test_a_plan_that_cannot_be_run_is_a_sentence(desk, session, focus):
    with pytest.raises(UserError, match="layers are 0 to"):
        next(go(desk, session, focus, plan="0@77"))


def test_another_question_about_the_same_image(desk, session, focus):
    focus = last(go(desk, session, focus))[2]
    question, _, focus, card, *_ = last(go(desk, session, focus, question="How many lines?"))
    assert question == "How many lines?" and focus.before == "" and "before, under" not in card
    stacks.stop(desk, session)
