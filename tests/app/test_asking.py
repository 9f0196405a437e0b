"""From a question to an answer: what is checked before, what is sent, what is kept."""

from __future__ import annotations

import threading

import pytest

from app import asking
from app.desk import Desk
from app.session import Focus, Turn
from model.errors import UserError
from model.images import Limits
from model.plan import Plan
from model.types import Sampling
from tests.app.given import HIRES, TAPS

ASK = {"model": HIRES, "plan": "base@0", "question": " What is it? ", "images": ["receipt.png"]}


def test_a_question_is_prepared(desk):
    asked = asking.prepare(desk, **ASK)
    assert (asked.question, asked.plan, asked.images) == ("What is it?", Plan.parse("base@0"), ("receipt.png",))
    assert asked.prompt.visual_tokens == asked.engine.prompt(asked.messages).visual_tokens > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": "  "}, "question is empty"),
        ({"question": "x" * 20_001}, "at most 20,000"),
        ({"images": []}, "no image yet"),
        ({"images": ["receipt.png"] * 9}, "at most 8"),
        ({"images": ["gone"]}, "upload it again"),
        ({"plan": "7@0"}, "has base, 0, 1, 2, 3"),
        ({"plan": "rubbish"}, "not an injection"),
        ({"model": "nobody/nothing"}, "not offered"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(desk, change, words):
    with pytest.raises(UserError, match=words):
        asking.prepare(desk, **{**ASK, **change})


def test_the_limit_of_tokens_counts_the_image(desk):
    small = Desk(desk.zoo, Limits(max_prompt_tokens=5))
    with pytest.raises(UserError, match="max_prompt_tokens"):
        asking.prepare(small, **ASK)


@pytest.mark.parametrize("bad", [(None, 0, 1, 0, 0), ("x", 0, 1, 0, 0), (8, 0, 1, 0, float("inf")), (8, -1, 1, 0, 0)])
def test_settings_that_are_no_numbers_are_refused(desk, bad):
    with pytest.raises(UserError):
        asking.sampling(desk, *bad)
    with pytest.raises(UserError, match="max_answer_tokens"):
        asking.sampling(desk, 10**6, 0, 1, 0, 0)


def test_the_stream_ends_with_what_an_answer_would_be(desk):
    asked = asking.prepare(desk, **ASK, settings=Sampling(max_new_tokens=6))
    states = list(asking.stream(asked))
    assert states[-1][1] and not any(done for _, done in states[:-1])
    assert states[-1][0].text == asked.engine.answer(asked.prompt, asked.plan, asked.sampling).text


def test_a_stopped_stream_ends_at_once(desk):
    event = threading.Event()
    event.set()
    asked = asking.prepare(desk, **ASK, settings=Sampling(max_new_tokens=40))
    answer, done = list(asking.stream(asked, event))[-1]
    assert done and answer.stopped == "stopped" and len(answer.tokens) <= 1


def test_earlier_turns_are_sent_along(desk, session):
    first = asking.prepare(desk, **ASK, settings=Sampling(max_new_tokens=4))
    key = asking.keep(desk, session, first, list(asking.stream(first))[-1][0])
    turns = [Turn(first.question, first.images, key), Turn("lost", (), "gone")]
    later = asking.prepare(desk, **{**ASK, "images": []}, turns=turns)
    assert [message["role"] for message in later.messages] == ["user", "assistant", "user"]
    assert len(later.prompt.images) == 1


def test_asking_again_uses_the_same_words_under_another_model_and_plan(desk, session):
    first = asking.prepare(desk, **ASK, settings=Sampling(max_new_tokens=4))
    record = desk.store.record(asking.keep(desk, session, first, list(asking.stream(first))[-1][0]))
    same = asking.again(desk, record, model=HIRES, plan="none")
    assert same.prompt is first.prompt and same.plan == Plan() and same.sampling == first.sampling
    other = asking.again(desk, record, model=TAPS, plan=None)
    assert other.prompt is not first.prompt and other.plan == other.engine.layout.default


def test_the_truth_is_known_for_an_example_s_own_question(desk, session):
    own = asking.prepare(desk, **{**ASK, "question": "what does the LEMON cost?"})
    assert asking.refocused(desk, Focus(), "r", own).truth == "5.63"
    other = asking.prepare(desk, **ASK)
    assert asking.refocused(desk, Focus(), "r", other).truth == ""


def test_the_address_leaves_defaults_out(desk):
    engine = desk.engine(HIRES)
    assert asking.address(desk, engine, engine.layout.default, Focus()) == "?"
    text = asking.address(desk, desk.engine(TAPS), Plan(), Focus(example="signs.png", question="Why?"))
    assert text == "?m=embedded/taps&p=none&x=signs.png&q=Why%3F"


def test_embedded_models_are_sent_single_questions(desk):
    assert not asking.remembers(desk.engine(HIRES))
