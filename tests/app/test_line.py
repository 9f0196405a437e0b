"""The line before the models: order, places, what a visitor reads while waiting, and that nobody is left in it."""

from __future__ import annotations

import threading

import gradio as gr
import pytest

from app import wiring
from app.line import Line, in_words
from app.session import Focus, Session, Store
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


def test_giving_up_leaves_the_line_at_once_and_never_touches_what_runs():
    line = Line(at_once=1)
    runs, waits, behind = line.enter("ann"), line.enter("ben"), line.enter()
    assert runs.begin() and [ticket.place for ticket in (runs, waits, behind)] == [0, 1, 2]
    thread = threading.Thread(target=line.give_up, args=("ben",))
    thread.start()
    assert waits.wait(1, seconds=3600) == 0 and waits.gone and not waits.begin()
    thread.join()
    assert behind.place == 1 and len(line) == 2
    line.give_up("ann")
    line.give_up("nobody")
    assert len(line) == 2 and not runs.gone
    waits.leave()  # as its handler does in the end
    again = line.enter("ann")
    assert (
        len(line) == 3 and line.enter("ann").place == 2 and again.gone and len(line) == 3
    )  # the newer takes its place
    runs.leave()
    assert behind.place == 0 and behind.begin()


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


def test_stop_ends_the_waiting_and_shows_the_button_meanwhile():
    """The handler of a request that was stopped in line never begins."""
    desk, begun = OneDesk(), []
    desk.store = Store()

    def handler(desk, session):
        begun.append(session.visitor)
        yield "answer", session

    steps = in_turn(handler, desk, ["box", "session"], "line", stops="chat", boxes=(lambda: "stop", lambda: "send"))[
        "fn"
    ]
    first = desk.line.enter()
    asked = {name: steps(Session(visitor=name)) for name in ("ann", "ben", "cat")}
    shown = {name: next(made) for name, made in asked.items()}
    assert all(box == "stop" for box, _, _ in shown.values())
    assert "1st in line" in shown["ann"][2] and "Stop leaves the line" in shown["ann"][2]
    wiring.end(desk, Session(visitor="ann"), "layers")  # the stop button of another place
    assert len(desk.line) == 4
    wiring.end(desk, Session(visitor="ann"), "chat")
    assert len(desk.line) == 3 and "1st in line" in next(asked["ben"])[2]
    assert [box for box, *_ in asked["ann"]] == ["send"] and begun == []
    first.leave()
    assert next(asked["ben"])[0] == "send" and next(asked["ben"])[0] == "answer" and begun == ["ben"]
    assert asked["ben"].close() is None and next(asked["cat"])[0] == "send"
    asked["cat"].close()
    assert len(desk.line) == 0
    stranger = desk.line.enter()
    waiting = steps(Session())  # a client without a page: nobody could say who is to be stopped
    assert "Stop" not in next(waiting)[2]
    stranger.leave()
    waiting.close()


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
    queue = [fn for fn in demo.fns.values() if fn.concurrency_id == "model"]
    model = [fn for fn in queue if fn.api_name != "clear"]  # it only keeps its order with the questions
    assert len(model) == len(queue) - 1
    assert len(lines) == 5  # chat, layers, compare, stacks, lab
    assert {fn.outputs[-1]._id for fn in model} == {line._id for line in lines}
    assert {fn.api_name for fn in model} == {
        "ask", "ask_example", "retry", "edit", "resume", "look", "answer_again", "heads", "download", "compare",
        "compare_question", "live", "ask_live", "open_stacks", "reopen_layers", "live_example_answer",
        "keep",
    }  # fmt: skip
    fn = next(fn for fn in model if fn.api_name == "ask_example").fn
    desk = next(cell.cell_contents for cell in fn.__closure__ if type(cell.cell_contents).__name__ == "Desk")
    others = [desk.line.enter() for _ in range(desk.line.at_once + 1)]
    steps = fn("signs.png", HIRES, "none", *SETTINGS, Session(), Focus())
    assert "2nd in line" in next(steps)[-1]
    given_up = fn("signs.png", HIRES, "none", *SETTINGS, Session(visitor="ann"), Focus())
    box, *_, said = next(given_up)
    assert "3rd in line" in said and "Stop leaves the line" in said and box.stop_btn
    next(fn for fn in demo.fns.values() if fn.api_name == "stop").fn(Session(visitor="ann"))
    box, *_, said = next(given_up)
    assert (said, box.submit_btn, box.stop_btn, list(given_up)) == ("", True, False, [])
    for name in ("resume", "reopen_layers"):  # a page that has just been opened asks nothing, so it does not wait
        opened = next(fn for fn in model if fn.api_name == name)
        values = [Focus() if isinstance(block.value, Focus) else None for block in opened.inputs]
        assert [step[-1] for step in opened.fn(*values)] == [gr.skip()]
    for ticket in others:
        ticket.leave()
    shown = list(steps)
    assert shown[0][-1] == "" and shown[-1][3].record and len(desk.line) == 0
