"""HTML of the page: words and their probability, nothing of a model's or a visitor's text as markup."""

from __future__ import annotations

import math
import re
from html import unescape

from PIL import Image

from app import markup
from model.plan import Plan
from model.types import Answer, Token
from tests import tiny

HOSTILE = '<img src=x onerror="alert(1)"> **b** [a](javascript:1) `c` & $x$'


def tokens(*texts: str, p: float = 0.5) -> tuple[Token, ...]:
    return tuple(
        Token(i, text, math.log(p), ((text, math.log(p)), ("other", math.log(0.1)))) for i, text in enumerate(texts)
    )


def answer(plan: Plan, *texts: str, stopped: str = "end", seconds: float = 0.0384) -> Answer:
    made = tokens(*texts)
    return Answer("m", plan, "".join(texts), made, seconds, 0.01, 0.0, True, stopped, 9, 4, "cpu")


def test_tokens_become_words():
    found = markup.words(tokens("K7", "PX", " is", " the", " co", "de", ".", "\n", "New"))
    assert [word.text for word in found] == ["K7PX", " is", " the", " code.", "\nNew"]
    assert [word.first for word in found] == [0, 2, 3, 4, 7]
    assert math.isclose(found[0].probability, 0.25)


def test_words_joined_are_the_text():
    texts = (" ", "a", "  ", "b c", "d", " ")
    assert "".join(word.text for word in markup.words(tokens(*texts))) == "".join(texts)
    assert markup.words(()) == []


def test_nothing_of_the_answer_is_markup():
    html = markup.word_spans(tokens(*HOSTILE))
    inside = re.sub(r'</?span(?: class="[a-z0-9 -]+")?(?: title="[^"]*")?>', "", html)
    assert not set(inside) & set("<>*`[]()$\"'_")
    assert unescape(inside) == HOSTILE


def test_the_title_tells_the_probability():
    html = unescape(markup.word_spans(tokens("a", p=0.84)))
    assert "a: 84 %" in html and "dl-p8" in html and "else other 10 %" in html
    assert "a 50 % · b 50 %" in unescape(markup.word_spans(tokens("a", "b")))


def test_percent_does_not_round_onto_the_ends():
    assert [markup.percent(p) for p in (1.0, 0.999, 0.5, 0.001, 0.0)] == ["100 %", "99+ %", "50 %", "<1 %", "0 %"]


def test_the_footnote_names_plan_badge_and_cost():
    layout = tiny.engine("hires").layout
    trained = markup.footnote(layout, answer(layout.default, "x"))
    assert ">trained<" in trained and "38 ms" in unescape(trained)
    ablated = markup.footnote(layout, answer(Plan.parse("base@0"), "x", stopped="length"))
    assert ">ablated<" in ablated and "all stacks off" in unescape(ablated) and "token limit" in unescape(ablated)


def test_a_difference_marks_what_was_dropped_and_added():
    assert markup.differing("K7PX", "K7FX") == "K7<del>P</del><ins>F</ins>X"
    assert "<img" not in markup.differing("", HOSTILE)


def test_small_images_travel_without_loss_and_large_ones_smaller():
    small = markup.data_uri(Image.new("RGB", (64, 64)))
    assert small.startswith("data:image/png;base64,")
    large = markup.data_uri(Image.effect_noise((2000, 1000), 60).convert("RGB"), 640)
    assert large.startswith("data:image/jpeg") and len(large) < 300_000


def test_example_cards_are_escaped(desk):
    html = markup.example_cards(list(desk.examples.values()))
    assert html.count("data-pick=") == len(desk.examples) >= 10
