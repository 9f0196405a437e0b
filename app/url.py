"""The page's state in its address, short and readable: model, plan, example image, question, tab.

    ?m=embedded/hires&p=base@0,0@1&x=receipt.png&q=What+does+the+lemon+cost%3F&t=stacks

A field at its default is left out. Uploaded images are not in it. Knows nothing about models or the page: what a field
says is checked by whoever uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote_plus

MAX_CHARS = 2000  # of the question; addresses much longer than this are cut by browsers and mail programs


@dataclass(frozen=True)
class Place:
    """What an address says; "" where it says nothing."""

    model: str = ""
    plan: str = ""
    example: str = ""
    question: str = ""
    tab: str = ""


FIELDS = {"model": "m", "plan": "p", "example": "x", "question": "q", "tab": "t"}


def encode(place: Place) -> str:
    """The query string, "?" for an empty place. A question too long for an address is left out."""
    parts = []
    for name, key in FIELDS.items():
        value = getattr(place, name)
        if value and len(value) <= MAX_CHARS:
            parts.append(f"{key}={quote_plus(value, safe='/@,*-.')}")
    return "?" + "&".join(parts)


def decode(query: Mapping[str, str]) -> Place:
    """The place that these query parameters name; unknown ones are passed over."""
    return Place(**{name: str(query.get(key, ""))[:MAX_CHARS] for name, key in FIELDS.items()})
