"""Session, focus and the store: what is kept, what is dropped, who ends whose answer."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
from PIL import Image

from app.session import Focus, Held, Record, Session, Store, Turn
from model.errors import UserError
from tests.waiting import wait_until


def held(side: int = 10) -> Held:
    return Held(Image.new("RGB", (side, side)), "a.png")


def record(question: str = "q") -> Record:
    return Record(answer=None, prompt=None, messages=[], question=question, images=(), sampling=None)


def test_a_visitor_is_named_once():
    session = Session().known()
    assert session.visitor and session.known() is session
    assert Session().known().visitor != session.visitor


def test_a_session_is_not_changed_in_place():
    session = Session("me").answered(Turn("a")).answered(Turn("b"))
    assert [turn.question for turn in session.before(1).turns] == ["a"]
    assert len(session.turns) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        session.visitor = "you"


def test_focus_keeps_the_answer_before_for_the_same_question_only():
    first = Focus().on("r1", "q", ("i",), "x")
    assert (first.record, first.before) == ("r1", "")
    again = first.on("r2", "q", ("i",), "x", "t")
    assert (again.record, again.before, again.truth) == ("r2", "r1", "t")
    other = again.on("r3", "other", ("i",), "x")
    assert (other.before, other.truth) == ("", "")
    assert again.on("r3", "q", ("j",), "").before == ""


def test_images_beyond_the_limit_are_dropped_oldest_first():
    store = Store(image_bytes=2 * held().bytes)
    keys = [store.hold("me", held()) for _ in range(2)]
    store.image(keys[0])  # used last, so the other one goes
    third = store.hold("me", held())
    assert store.image(keys[0]) and store.image(third)
    with pytest.raises(UserError, match="upload it again"):
        store.image(keys[1])


def test_one_image_larger_than_the_limit_is_still_held():
    store = Store(image_bytes=1)
    assert store.image(store.hold("me", held()))


def test_records_beyond_the_limit_are_dropped_and_say_nothing():
    store = Store(records=2)
    keys = [store.keep("me", record()) for _ in range(3)]
    assert store.record(keys[0]) is None and store.record(keys[2]) is not None
    assert store.record("") is None


def test_a_visitor_who_leaves_takes_everything_along_and_nothing_of_others():
    store = Store()
    mine, yours = store.hold("me", held()), store.hold("you", held())
    store.keep("me", record())
    with store.alone("me", "chat") as event, store.alone("you", "chat") as other:
        store.forget(Session("me"))
        assert len(store) == 1 and store.image(yours)
        with pytest.raises(UserError):
            store.image(mine)
        assert event.is_set() and not other.is_set()


def test_what_runs_alone_begins_when_what_ran_before_has_ended():
    store, order = Store(), []

    def run(name: str) -> None:
        with store.alone("me", "chat") as stop:
            order.append((name, store.newest("me", "chat", stop)))

    with store.alone("me", "chat") as first, store.alone("you", "chat") as yours, store.alone("me", "stacks") as other:
        assert store.newest("me", "chat", first)
        threads = []
        for name in ("second", "third"):
            at = store._stops["me", "chat"]
            threads.append(threading.Thread(target=run, args=(name,)))
            threads[-1].start()
            wait_until(lambda before=at: store._stops["me", "chat"] is not before)
        assert first.is_set() and order == [] and not yours.is_set() and not other.is_set()
        assert not store.newest("me", "chat", first) and store.newest("me", "stacks", other)
        store.stop("me", "stacks")
        assert other.is_set() and store.newest("me", "stacks", other)
        store.stop("nobody", "chat")
    for thread in threads:
        thread.join(10)
    assert order == [("second", False), ("third", True)]
    with pytest.raises(ZeroDivisionError), store.alone("me", "chat"):
        raise ZeroDivisionError
    run("fourth")  # does not wait for what has failed
    store.forget(Session("me"))
    assert not [key for key in (*store._stops, *store._ends) if key[0] == "me"]


def test_a_conversation_is_current_until_it_is_cleared():
    store, mine, yours = Store(), Session("me", (Turn("What?"),)), Session("you", (Turn("Who?"),))
    assert store.current(mine) is mine
    empty = store.clear(mine)
    assert (empty.visitor, empty.turns) == ("me", ()) and store.current(empty) is empty
    assert store.current(mine) == empty and store.current(yours) is yours
    assert store.current(empty.answered(Turn("And?"))).turns and store.clear(empty) != empty
    store.forget(empty)
    assert store.current(mine) is mine


def test_what_a_record_computes_is_computed_once():
    made = []
    kept = record()
    for _ in range(2):
        assert kept.once("k", lambda: made.append(1) or "value") == "value"
    assert made == [1]


def test_records_are_dropped_by_what_they_hold_too_also_when_it_grows():
    """A trace of 192 MB is made long after its answer was kept; 512 of those would be 96 GB."""

    def pictured() -> Record:
        content = [{"type": "image", "image": held(10).image}, {"type": "text", "text": "q"}]
        return dataclasses.replace(record(), messages=[{"role": "user", "content": content}])

    store = Store(record_bytes=1000)
    keys = [store.keep("me", pictured()) for _ in range(4)]  # 300 bytes each
    assert [store.record(key) is not None for key in keys] == [False, True, True, True]
    seen = Turn("a dataclass", images=(np.zeros(50), {"k": [np.zeros(25, np.float32)]}))  # 400 + 100 bytes
    newest = store.record(keys[3])
    newest.once("seen", lambda: seen)
    assert newest.bytes == 800
    assert [store.record(key) is not None for key in keys] == [False, False, False, True]
    newest.once("more", lambda: np.zeros(500))
    assert store.record(keys[3]) is newest  # one is always held
