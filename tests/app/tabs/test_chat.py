"""The chat's handlers: what they say, what they keep, and that a mistake loses nothing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from PIL import Image

from app import asking, page
from app.session import Focus, Session
from app.tabs import chat, layers, stacks
from model.errors import UserError
from model.plan import Plan
from tests.app.given import HIRES, SETTINGS, last, skipped
from tests.waiting import wait_until

PLAN = "base@0,0@1"


def say(desk, session, focus, text="What is it?", files=(), remember=False, plan=PLAN):
    message = {"text": text, "files": list(files)}
    return chat.ask(desk, message, HIRES, plan, *SETTINGS, remember, session, focus)


def texts(bubbles: list[dict]) -> list[str]:
    return [bubble["role"] for bubble in bubbles]


def test_an_upload_and_a_question_are_answered(desk, session, tmp_path):
    path = tmp_path / "mine.png"
    Image.new("RGB", (50, 40), "red").save(path)
    states = list(say(desk, session, Focus(), files=[path]))
    assert states[0][0].value["text"] == ""  # the box is emptied with the first state
    box, bubbles, session, focus, views, note = last(states)
    assert texts(bubbles) == ["user", "user", "assistant"]
    assert len(session.turns) == 1 and desk.store.record(session.turns[0].record).answer.plan == Plan.parse(PLAN)
    assert focus.record == session.turns[0].record and focus.question == "What is it?"
    assert views["name"] == "mine.png" and "50 × 40" in note and "not part of the address" in note
    assert "trained" not in bubbles[-1]["content"] and "ablated" in bubbles[-1]["content"]


def test_the_answer_is_that_of_the_engine(desk, session, focus):
    _, _, session, *_ = last(say(desk, session, focus))
    record = desk.store.record(session.turns[0].record)
    engine = desk.engine(HIRES)
    assert record.answer.text == engine.answer(record.prompt, Plan.parse(PLAN), record.sampling).text


def test_a_follow_up_uses_the_same_image_and_shows_it_once(desk, session, focus):
    _, _, session, focus, *_ = last(say(desk, session, focus))
    _, bubbles, session, focus, *_ = last(say(desk, session, focus, text="And now?"))
    assert texts(bubbles) == ["user", "user", "assistant", "user", "assistant"]
    assert session.turns[1].images == ("receipt.png",)
    assert len(desk.store.record(focus.record).messages) == 1  # earlier turns are not sent unless so wished
    _, _, session, focus, *_ = last(say(desk, session, focus, text="And then?", remember=True))
    assert len(desk.store.record(focus.record).messages) == 5
    assert len(desk.store.record(focus.record).prompt.images) == 1


@pytest.mark.parametrize(
    ("text", "plan", "words"),
    [("  ", PLAN, "empty"), ("x", "0@77", "layers are 0 to"), ("x" * 30_000, PLAN, "at most 20,000")],
)
def test_a_mistake_changes_nothing(desk, session, focus, text, plan, words):
    before = len(desk.store)
    with pytest.raises(UserError, match=words):
        next(say(desk, session, focus, text=text, plan=plan))
    assert len(desk.store) == before


def test_a_file_that_is_no_picture_is_one_sentence(desk, session, tmp_path):
    path = tmp_path / "fake.png"
    path.write_bytes(b"not a picture")
    with pytest.raises(UserError, match="not an image"):
        next(say(desk, session, Focus(), files=[path]))


def test_an_example_asks_its_own_question(desk, session):
    _, bubbles, session, focus, *_ = last(
        chat.ask_example(desk, "signs.png", HIRES, "none", *SETTINGS, session, Focus())
    )
    assert focus.truth == "EAGLE" and focus.example == "signs.png"
    with pytest.raises(UserError, match="no example"):
        next(chat.ask_example(desk, "../x", HIRES, "none", *SETTINGS, session, Focus()))


def test_retry_asks_the_same_under_the_plan_of_now(desk, session, focus):
    for text in ("one", "two"):
        _, _, session, focus, *_ = last(say(desk, session, focus, text=text))
    event = SimpleNamespace(index=1, value="one")
    out = last(chat.retry(desk, HIRES, "base@0", *SETTINGS, False, session, focus, event))
    assert [turn.question for turn in out[2].turns] == ["one"]
    assert desk.store.record(out[2].turns[0].record).answer.plan == Plan.parse("base@0")


def test_an_edited_question_takes_the_place_of_the_old_one(desk, session, focus):
    for text in ("one", "two"):
        _, _, session, focus, *_ = last(say(desk, session, focus, text=text))
    event = SimpleNamespace(index=3, value="three", previous_value="two")
    out = last(chat.edit(desk, HIRES, PLAN, *SETTINGS, False, session, focus, event))
    assert [turn.question for turn in out[2].turns] == ["one", "three"]
    with pytest.raises(UserError, match="no longer part"):
        next(chat.edit(desk, HIRES, PLAN, *SETTINGS, False, session, focus, SimpleNamespace(index=99, value="x")))


def test_clear_keeps_the_visitor(desk, session, focus):
    _, _, session, *_ = last(say(desk, session, focus))
    bubbles, cleared, _ = last(chat.clear(desk, session))
    assert bubbles == [] and cleared.turns == () and cleared.visitor == session.visitor


def step_by_step(desk, session, focus):
    return chat.ask(desk, {"text": "What?", "files": []}, HIRES, PLAN, 48, *SETTINGS[1:], False, session, focus)


def test_a_cleared_conversation_does_not_come_back_when_its_answer_ends(desk, session, focus):
    steps = step_by_step(desk, session, focus)
    next(steps)
    with ThreadPoolExecutor(1) as other:
        clearing = other.submit(last, chat.clear(desk, session))
        wait_until(lambda: desk.store.current(session) is not session)
        assert not clearing.done()
        assert [value for step in steps for value in step if not skipped(value)] == []
        bubbles, cleared, box = clearing.result()
    assert bubbles == [] and not cleared.turns and box.submit_btn and not box.stop_btn


def test_the_last_words_of_an_answer_are_out_before_the_conversation_is_cleared(desk, session, focus):
    """What an answer had already handed on used to arrive after the empty conversation, and stayed."""
    steps = step_by_step(desk, session, focus)
    states = [next(steps)]
    while skipped(states[-1][3]):  # the focus comes with the last of them
        states.append(next(steps))
    order = ["answer"]
    with ThreadPoolExecutor(1) as other:
        clearing = other.submit(lambda: (last(chat.clear(desk, states[-1][2])), order.append("cleared")))
        wait_until(lambda: desk.store.current(states[-1][2]) is not states[-1][2])
        order.append("handed on")
        assert list(steps) == []
        clearing.result()
    assert order == ["answer", "handed on", "cleared"]


def test_an_emptied_conversation_is_emptied_again_once_an_answer_is_drawn(desk, session, focus):
    _, _, answered, *_ = last(say(desk, session, focus))
    assert all(map(skipped, chat.settled(desk, answered)))
    bubbles, box = chat.settled(desk, last(chat.clear(desk, answered))[1])
    assert bubbles == [] and box.submit_btn and not box.stop_btn


def test_what_was_asked_before_the_conversation_was_cleared_shows_nothing(desk, session, focus, monkeypatch):
    """A question's thread may begin after that of a click that came later."""
    _, _, session, focus, *_ = last(say(desk, session, focus))
    late = say(desk, session, focus, text="Late?")
    retried = chat.retry(desk, HIRES, PLAN, *SETTINGS, False, session, focus, SimpleNamespace(index=1, value="x"))
    cleared = last(chat.clear(desk, session))[1]
    with pytest.raises(UserError, match="no longer part"):
        next(retried)
    first = last(late)[2]  # as far as anybody can tell it was asked after that
    assert [turn.question for turn in first.turns] == ["Late?"] and first.cleared == cleared.cleared
    assert len(last(say(desk, first, focus))[2].turns) == 2

    prepare = asking.prepare

    def prepared(*args, **more):
        last(chat.clear(desk, first))  # while its model is being loaded, say
        return prepare(*args, **more)

    monkeypatch.setattr(asking, "prepare", prepared)
    assert all(map(skipped, next(say(desk, first, focus))))


def test_an_image_that_is_chosen_during_an_answer_stays_in_focus(desk, session, focus, tmp_path):
    """What ended last used to win: the note showed the new image, and the next question was about the old one."""
    steps = say(desk, session, focus)
    next(steps)
    page.choose_example(desk, "shapes.png", HIRES, PLAN, session)
    assert last(steps)[3] is None
    other = Focus(images=("shapes.png",), example="shapes.png", question="Count the triangles")
    assert last(say(desk, session, other))[3].images == other.images
    path = tmp_path / "mine.png"
    Image.new("RGB", (50, 40), "red").save(path)
    found = last(say(desk, session, other, files=[path]))[3]  # one that comes with the question is turned to
    assert desk.held(found.images[0]).name == "mine.png"
    page.choose_example(desk, "shapes.png", HIRES, PLAN, session)
    late = last(say(desk, session, found))  # had waited in line when the example was chosen
    assert [value is None for value in late] == [False, False, False, True, True, True]


def test_an_answer_of_a_conversation_keeps_its_image_in_focus(desk, session, focus):
    """A question with earlier turns sends no image of its own; asked again elsewhere, the focus was on none."""
    for text in ("one", "two"):
        _, _, session, focus, *_ = last(say(desk, session, focus, text=text, remember=True))
    assert desk.store.record(focus.record).images == ()
    assert layers.answer_again(desk, False, "base@0", HIRES, session, focus)[1].images == ("receipt.png",)
    assert last(stacks.live(desk, "", "none", HIRES, *SETTINGS, session, focus))[2].images == ("receipt.png",)


def test_stop_ends_the_answer_and_keeps_what_was_said(desk, session, focus):
    settings = (48, *SETTINGS[1:])
    steps = chat.ask(desk, {"text": "What?", "files": []}, HIRES, PLAN, *settings, False, session, focus)
    next(steps)
    thread = threading.Thread(target=chat.stop, args=(desk, session))
    thread.start()
    thread.join()
    _, bubbles, session, *_ = last(steps)
    record = desk.store.record(session.turns[0].record)
    assert record.answer.stopped == "stopped" and len(record.answer.tokens) < 48
    assert "stopped" in bubbles[-1]["content"]


def test_a_fault_in_the_middle_leaves_the_question_and_a_usable_box(desk, session, focus, monkeypatch):
    def broken(asked, stop=None):
        raise UserError("out of memory")
        yield

    monkeypatch.setattr(chat.asking, "stream", broken)
    steps = say(desk, session, focus)
    states = [next(steps), next(steps)]
    with pytest.raises(UserError, match="out of memory"):
        next(steps)
    assert states[1][0].submit_btn and texts(states[1][1]) == ["user", "user"]
    assert len(states[0][2].turns) == 1


def test_what_the_address_asked_is_asked_once_the_page_is_there(desk, session, focus):
    _, bubbles, session, *_ = last(chat.resume(desk, HIRES, PLAN, *SETTINGS, session, focus))
    assert texts(bubbles) == ["user", "user", "assistant"]
    assert len(list(chat.resume(desk, HIRES, PLAN, *SETTINGS, session, Focus()))) == 1


def test_an_answer_that_was_dropped_says_so(desk):
    gone = Session("me").answered(chat.Turn("q", ("gone",), "gone"))
    bubbles = chat.bubbles(desk, gone)
    assert "no longer held" in bubbles[0]["content"] and "no longer held" in bubbles[-1]["content"]
    assert chat.turn_of(gone, 2) == 0


def test_an_image_is_shown_as_a_file_and_written_once(desk, session):
    key = desk.store.hold(session.visitor, chat.Held(Image.new("RGB", (20, 20)), 'a/"><script>.png', ("<i>",)))
    shown = chat.bubbles(desk, session.answered(chat.Turn("q", (key,))))[0]["content"]
    again = chat.bubbles(desk, session.answered(chat.Turn("q", (key,))))[0]["content"]
    assert shown == again and shown["alt_text"].endswith("; <i>")
    with Image.open(shown["path"]) as image:
        assert image.size == (20, 20)
