"""Small things that the tests of the page's handlers share."""

from __future__ import annotations

SETTINGS = (8, 0.0, 1.0, 0, 0)  # max_new_tokens, temperature, top_p, top_k, seed
HIRES, SINGLE, TAPS = "embedded/hires", "embedded/hires-single", "embedded/taps"


def last(steps) -> tuple:
    """The last state of a streaming handler with every skipped value filled from the states before it."""
    merged: list = []
    for step in steps:
        merged = merged or [None] * len(step)
        merged = [old if skipped(new) else new for old, new in zip(merged, step, strict=True)]
    return tuple(merged)


def skipped(value) -> bool:
    """Whether a value is gr.skip()."""
    return isinstance(value, dict) and value == {"__type__": "update"}
