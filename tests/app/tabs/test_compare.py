"""The Compare tab's handlers: columns that stream together are what each would be alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from app import asking
from app.session import Focus, Session
from app.tabs import compare
from model.errors import UserError
from tests.app.given import HIRES, SETTINGS, SINGLE, TAPS, last, skipped
from tests.waiting import wait_until


def go(desk, session, focus, columns=((HIRES, ""), (SINGLE, ""), (HIRES, "base@0")), truth="5.63", count=3):
    flat = [value for column in columns for value in column]
    return compare.run(desk, "What is it?", truth, count, *flat, *SETTINGS, session, focus)


def test_columns_answer_as_they_would_alone(desk, session, focus):
    asked = [
        asking.prepare(desk, model=model, plan=plan, question="What?", images=focus.images, settings=asking.Sampling(8))
        for model, plan in ((HIRES, None), (SINGLE, None), (TAPS, "base@0"))
    ]
    states = list(compare.together(asked, threading.Event()))
    alone = [one.engine.answer(one.prompt, one.plan, one.sampling).text for one in asked]
    assert [answer.text for answer in states[-1]] == alone


def test_the_defaults_are_the_model_its_twin_and_its_ablation(desk):
    assert compare.default_columns(desk) == [(HIRES, ""), (SINGLE, ""), (HIRES, "base@0")]


def test_a_run_shows_badges_numbers_and_every_pair(desk, session, focus):
    kept, one, two, three, pairs = last(go(desk, session, focus))
    assert ">trained<" in one and ">trained<" in two and ">ablated<" in three
    for column in (one, two, three):
        assert "CER" in column and "log p (truth)" in column
    assert pairs.count("dl-pair") == 3 + 1  # three cards and the box around them
    assert kept is None  # the conversation is left alone


def test_two_columns_leave_the_third_empty(desk, session, focus):
    _, one, two, three, pairs = last(go(desk, session, focus, truth="", count=2))
    assert three == "" and "CER" not in one and pairs.count("<h3>") == 1


def test_each_pair_says_what_it_shows(desk, focus, monkeypatch):
    def asked(model: str, plan: str | None):
        return asking.prepare(desk, model=model, plan=plan, question="What?", images=focus.images)

    trained, twin, ablated = asked(HIRES, None), asked(SINGLE, None), asked(HIRES, "base@0")
    assert compare.pair_view(trained, twin) == compare.pair_view(twin, trained) == "hires_vs_single"
    assert compare.pair_view(trained, ablated) == "trained_vs_ablated"
    assert compare.pair_view(ablated, twin) == "compare"
    assert compare.pair_view(ablated, asked(HIRES, "none")) == "compare"
    monkeypatch.setattr(trained.engine, "name", "embedded/lab-gate")
    assert compare.pair_view(trained, twin) == "compare"
    monkeypatch.setattr(twin.engine, "name", "embedded/lab-dummy")
    assert compare.pair_view(trained, twin) == "lab_pair"


def test_a_mistake_names_its_column(desk, session, focus):
    with pytest.raises(UserError, match="Column 2: .*layers are 0 to"):
        next(go(desk, session, focus, columns=((HIRES, ""), (SINGLE, "base@99"), (HIRES, ""))))
    with pytest.raises(UserError, match="no image yet"):
        next(go(desk, session, Focus()))
    with pytest.raises(UserError, match="2 or 3"):
        next(go(desk, session, focus, count=None))


def test_a_client_without_a_page_is_given_an_id(desk, focus):
    assert last(go(desk, Session(), focus))[0].visitor


def test_the_current_question_is_filled_in_once(desk, focus):
    new = ("", ())
    question, truth, filled, image = compare.opened(desk, "", "", new, focus)
    assert (question, truth) == (focus.question, "5.63") and "<img" in image
    assert compare.opened(desk, "my own", "mine", filled, focus)[:2] == ("my own", "mine")
    assert "No image yet" in compare.opened(desk, "", "", new, Focus())[3]
    assert "no longer held here" in compare.opened(desk, "", "", new, Focus(images=("dropped",)))[3]


def test_the_truth_of_one_image_is_not_that_of_the_next(desk, focus):
    """An upload keeps the question; it was then judged by the answer to the example before it."""
    *_, filled, _ = compare.opened(desk, "", "", ("", ()), focus)
    mine = Focus(images=("shapes.png",), question=focus.question)
    assert compare.opened(desk, "my own", "5.63", filled, mine)[:2] == ("my own", "")


def test_stop_ends_all_columns(desk, session, focus):
    with desk.store.alone(session.visitor, "compare") as event:
        compare.stop(desk, session)
        assert event.is_set()


def test_a_later_question_takes_over(desk, session, focus):
    early = go(desk, session, focus)
    next(early)
    with ThreadPoolExecutor(1) as other:
        stop = desk.store._stops[session.visitor, "compare"]
        later = other.submit(last, go(desk, session, focus, count=2))
        wait_until(stop.is_set)
        assert not later.done()
        assert all(skipped(value) for state in early for value in state)
        assert later.result()[3] == "" and "dl-pair" in later.result()[4]


def test_the_third_column_can_be_hidden():
    assert [each.visible for each in compare.show_columns(2)] == [False, False]
    assert [each.visible for each in compare.show_columns(3)] == [True, True]


def test_nothing_is_skipped_at_the_end(desk, session, focus):
    assert not any(skipped(value) for value in list(go(desk, session, focus))[-1][1:])
