"""The line before the models: order, places, what a visitor reads while waiting, and that nobody is left in it."""

from __future__ import annotations

import threading

import gradio as gr
import pytest

from app.line import Line, in_words
from app.session import Focus, Session
from app.wiring import in_turn
from model.errors import UserError
from tests.app.given import HIRES, SETTINGS, skipped


def test_places_move_up_in_the_order_of_coming():
    line = Line(at_once=2)
    tickets = [line.enter() for _ in range(5)]
    assert [ticket.place for ticket in tickets] == [0, 0, 1, 2, 3]
    tickets[1].leave()
    assert [tickets[i].place for i in (0, 2, 3, 4)] == [0, 0, 1, 2]
    tickets[3].leave()  # one that waited has gone
    assert [tickets[i].place for i in (0, 2, 4)] == [0, 0, 1]
    for i in (0, 2, 4):
        tickets[i].leave()
    assert len(line) == 0


def test_whoever_waits_is_woken_by_a_change_of_place():
    line = Line(at_once=1)
    first, second = line.enter(), line.enter()
    assert second.wait(1, seconds=0) == 1  # nothing has changed
    thread = threading.Thread(target=first.leave)
    thread.start()
    assert second.wait(1, seconds=3600) == 0
    thread.join()


def test_a_full_line_is_one_sentence():
    line = Line(at_once=1, waiting=2)
    tickets = [line.enter() for _ in range(3)]
    with pytest.raises(UserError, match="2 requests are waiting .* try again"):
        line.enter()
    tickets[1].leave()
    assert line.enter().place == 2


def test_places_in_words():
    said = {1: "1st", 2: "2nd", 3: "3rd", 4: "4th", 11: "11th", 12: "12th", 13: "13th", 21: "21st", 64: "64th"}
    assert all(in_words(place) == f"{words} in line" for place, words in said.items())


# ---- a handler in its turn


class OneDesk:
    """The desk as far as a line goes: one request at once."""

    def __init__(self):
        self.line = Line(at_once=1)


def numbers(desk, count: int):
    for number in range(count):
        if number == 2:
            raise UserError("too many")
        yield number, "x"


def event(desk, fn=numbers, outputs=2):
    return in_turn(fn, desk, ["output"] * outputs, "line")["fn"]


def test_a_visitor_reads_the_place_until_the_turn_has_come():
    desk = OneDesk()
    before = [desk.line.enter(), desk.line.enter()]
    steps = event(desk)(1)
    *others, said = next(steps)
    assert all(map(skipped, others)) and "2nd in line" in said
    before[0].leave()
    assert "1st in line" in next(steps)[-1]
    before[1].leave()
    assert next(steps) == (*others, "")  # gone before anything is answered
    assert next(steps) == (0, "x", gr.skip())
    assert len(desk.line) == 1 and list(steps) == [] and len(desk.line) == 0


def test_without_others_nothing_is_said():
    desk = OneDesk()
    assert list(event(desk)(2)) == [(0, "x", gr.skip()), (1, "x", gr.skip())]
    assert list(event(desk, lambda desk: "alone", outputs=1)()) == [("alone", gr.skip())]
    assert list(event(desk, lambda desk: ("a", "b"))()) == [("a", "b", gr.skip())]


def test_an_error_a_closed_page_and_a_visitor_who_gives_up_leave_the_line():
    desk = OneDesk()
    with pytest.raises(gr.Error, match="too many"):
        list(event(desk)(3))
    assert len(desk.line) == 0
    closed = event(desk)(2)
    next(closed)
    waiting = event(desk)(2)
    assert "1st in line" in next(waiting)[-1]
    behind = event(desk)(2)
    assert "2nd in line" in next(behind)[-1]
    waiting.close()
    assert "1st in line" in next(behind)[-1]
    closed.close()
    assert next(behind)[-1] == "" and next(behind)[0] == 0


def test_the_handler_of_a_closed_page_is_closed_with_it():
    ended = []

    def endless(desk):
        try:
            while True:
                yield 1, 2
        finally:
            ended.append(True)

    steps = event(OneDesk(), endless)()
    next(steps)
    steps.close()
    assert ended == [True]


def test_every_event_that_runs_a_model_says_the_place_in_its_own_tab(zoo):
    """One request fills the line of the real page; each tab's event then says its place in that tab's own line."""
    from app import page

    demo = page.build(zoo)
    lines = [block for block in demo.blocks.values() if "dl-waiting" in (getattr(block, "elem_classes", None) or [])]
    model = [fn for fn in demo.fns.values() if fn.concurrency_id == "model"]
    assert len(lines) == 4  # chat, layers, compare, stacks
    assert {fn.outputs[-1]._id for fn in model} == {line._id for line in lines}
    assert {fn.api_name for fn in model} == {
        "ask", "ask_example", "retry", "edit", "resume", "look", "answer_again", "heads", "download", "compare",
        "compare_question", "live", "ask_live", "open_stacks", "reopen_layers", "live_example_answer",
    }  # fmt: skip
    fn = next(fn for fn in model if fn.api_name == "ask_example").fn
    desk = next(cell.cell_contents for cell in fn.__closure__ if type(cell.cell_contents).__name__ == "Desk")
    others = [desk.line.enter() for _ in range(desk.line.at_once + 1)]
    steps = fn("signs.png", HIRES, "none", *SETTINGS, Session(), Focus())
    assert "2nd in line" in next(steps)[-1]
    for name in ("resume", "reopen_layers"):  # a page that has just been opened asks nothing, so it does not wait
        opened = next(fn for fn in model if fn.api_name == name)
        values = [Focus() if isinstance(block.value, Focus) else None for block in opened.inputs]
        assert [step[-1] for step in opened.fn(*values)] == [gr.skip()]
    for ticket in others:
        ticket.leave()
    shown = list(steps)
    assert shown[0][-1] == "" and shown[-1][3].record and len(desk.line) == 0
