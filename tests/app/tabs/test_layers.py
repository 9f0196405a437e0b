"""The Layers tab's handlers: views of the last answer, files to take away, hostile state from the browser."""

from __future__ import annotations

import csv
import io
import json

import pytest

from app import looking
from app.session import Focus
from app.tabs import chat, layers
from model.errors import UserError
from model.plan import Plan
from tests.app.given import HIRES, SETTINGS, last, skipped

PLAN = "base@0,0@1"
STATE = {"mode": "attention", "layer": 2, "head": "mean", "fixed": True, "hide": False, "image": 0, "tokens": [0]}


@pytest.fixture
def asked(desk, session, focus):
    """(session, focus) after one question."""
    message = {"text": "What is it?", "files": []}
    out = last(chat.ask(desk, message, HIRES, PLAN, *SETTINGS, False, session, focus))
    return out[2], out[3]


def test_without_an_answer_there_is_an_empty_state(desk):
    drawn, head, body, *rest = layers.look(desk, False, PLAN, HIRES, "", Focus())
    assert drawn == "" and "Nothing to look at yet" in head and body.visible is False and rest == [None] * 6


def test_the_last_answer_is_shown(desk, asked):
    drawn, head, body, view, *plots, bars = layers.look(desk, True, PLAN, HIRES, "", asked[1])
    assert body.visible and view["id"] == asked[1].record and drawn.startswith(asked[1].record)
    assert len(plots) == 4 and all(plot.data for plot in plots)
    assert set(bars["rows"]) == {"base", "0", "1", "2", "3"} and max(bars["rows"]["2"]) == 0
    assert "dl-stale" not in head
    again = layers.look(desk, True, PLAN, HIRES, drawn, asked[1])
    assert all(map(skipped, again[2:]))
    assert "dl-stale" in layers.look(desk, True, "none", HIRES, drawn, asked[1])[1]


def test_answer_again_uses_the_plan_of_now(desk, asked):
    session, focus = asked
    kept, focus, *views = layers.answer_again(desk, False, "none", HIRES, session, focus)
    assert skipped(kept) and desk.store.record(focus.record).answer.plan == Plan() and focus.before == asked[1].record
    assert views[3]["plan"] == "none"
    with pytest.raises(UserError, match="no question yet"):
        layers.answer_again(desk, False, "none", HIRES, session, Focus())


def test_heads_of_one_layer(desk, asked):
    value = layers.heads(desk, 2, asked[1])
    seen = looking.see(desk.engine(HIRES), desk.store.record(asked[1].record))
    assert value == {"id": asked[1].record, "layer": 2, "data": looking.heads_of(seen.trace, 2)}
    with pytest.raises(UserError):
        layers.heads(desk, 99, asked[1])


@pytest.mark.parametrize("what", [name for name in layers.FIGURES if name != "the answer's tokens"])
def test_figures_can_be_taken_away(desk, asked, what):
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("csv", b"")):
        path = layers.download(desk, what, kind, json.dumps(STATE), asked[1])
        with open(path, "rb") as file:
            data = file.read()
        assert data.startswith(start) and len(data) > 50 and path.endswith(kind)


def test_a_table_of_a_map_has_a_row_per_token(desk, asked):
    record = desk.store.record(asked[1].record)
    seen = looking.see(desk.engine(HIRES), record)
    text = layers.taken(desk.engine(HIRES), record, seen, "map", "csv", json.dumps(STATE)).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == record.prompt.visual_tokens
    row = seen.trace.attention_rows.index(seen.trace.answer_start - 1)
    first = seen.trace.attention[2][:, row].mean(0)[seen.trace.image_positions[0]]
    assert float(list(rows[0].values())[-1]) == pytest.approx(float(first), abs=1e-6)


@pytest.mark.parametrize("mode", ["injected", "residual", "ratio", "cosine"])
def test_every_map_can_be_taken_away_as_shown(desk, asked, mode):
    record = desk.store.record(asked[1].record)
    seen = looking.see(desk.engine(HIRES), record)
    maps, picture, fixed = layers.as_shown(record, seen, json.dumps(STATE | {"mode": mode, "layer": 1, "fixed": False}))
    assert len(maps) == (2 if mode == "injected" else 1) and not fixed and picture.size == (384, 384)


@pytest.mark.parametrize(
    "state",
    [
        "", "[]", "null", "{}", '{"mode": 1}',
        json.dumps(STATE | {"layer": 99}), json.dumps(STATE | {"layer": -1}), json.dumps(STATE | {"image": 5}),
        json.dumps(STATE | {"tokens": [10**9]}), json.dumps(STATE | {"tokens": "x"}),
        json.dumps(STATE | {"mode": "__class__"}), json.dumps(STATE | {"asked": -3}), json.dumps(STATE | {"head": {}}),
    ],
)  # fmt: skip
def test_a_state_that_is_none_is_one_sentence(desk, asked, state):
    with pytest.raises(UserError):
        layers.download(desk, "the map as shown", "csv", state, asked[1])


def test_what_there_is_not_is_one_sentence(desk, asked):
    with pytest.raises(UserError, match="choose one of"):
        layers.download(desk, "../etc", "png", "", asked[1])
    with pytest.raises(UserError, match="as CSV"):
        layers.download(desk, "the answer's tokens", "png", "", asked[1])
    assert layers.download(desk, "the answer's tokens", "csv", "", asked[1]).endswith(".csv")
    with pytest.raises(UserError, match="ask a question first"):
        layers.download(desk, "norms by layer", "png", "", Focus())
