"""The address: what goes in comes back, defaults are left out, nonsense does no harm."""

from __future__ import annotations

from urllib.parse import parse_qsl

import pytest

from app.url import MAX_CHARS, Place, decode, encode


@pytest.mark.parametrize(
    "place",
    [
        Place(),
        Place("embedded/hires", "base@0,0@1*0.5", "receipt.png", "What does the lemon cost?", "stacks"),
        Place(question="a&b=c #d% +é “x”"),
        Place(plan="none"),
    ],
)
def test_round_trip(place: Place):
    query = encode(place)
    assert query.startswith("?")
    assert decode(dict(parse_qsl(query[1:]))) == place


def test_a_plan_stays_readable():
    assert encode(Place(plan="base@0,0@1*0.5")) == "?p=base@0,0@1*0.5"
    assert encode(Place()) == "?"


def test_too_long_a_question_is_left_out():
    assert encode(Place(question="x" * (MAX_CHARS + 1))) == "?"
    assert len(decode({"q": "x" * 10**6}).question) == MAX_CHARS


def test_unknown_fields_are_passed_over():
    assert decode({"__theme": "dark", "p": "none"}) == Place(plan="none")
