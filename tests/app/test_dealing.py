"""The step-through picture's values are the model's own sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from app import dealing
from model.families.deepstack_llava import SAMPLINGS, sample
from tests.app.given import HIRES, SINGLE, TAPS


def value(desk, model=HIRES, name="receipt.png"):
    return dealing.deal_value(desk.engine(model), desk.held(name))


def test_every_sampling_of_the_model_is_shown_and_told(desk):
    shown = value(desk)["samplings"]
    assert [each["key"] for each in shown] == list(SAMPLINGS)
    assert all(each["words"].endswith(".") and "{" not in each["words"] for each in shown)


def test_tokens_go_where_the_model_puts_them(desk):
    """A map whose features are their own place, through the function that the model's `encode` uses."""
    shown = value(desk)
    rows, columns = shown["grid"]
    numbered = torch.arange(rows * columns).reshape(rows, columns, 1).float()
    for each in shown["samplings"]:
        sets = sample(numbered, (rows // 4, columns // 4), len(each["sets"]), each["key"])
        assert [part.flatten().long().tolist() for part in sets] == each["sets"]
        assert sorted(sum(each["sets"], [])) == list(range(rows * columns))
        assert {len(part) for part in each["sets"]} == {int(np.prod(shown["places"]))}


def test_the_stacks_of_the_rail_are_the_sets_of_2d(desk):
    engine, held = desk.engine(HIRES), desk.held("receipt.png")
    owners = np.array(engine.views(held.image)[1].owners).flatten()
    for k, part in enumerate(value(desk)["samplings"][0]["sets"]):
        assert set(owners[part]) == {str(k)}


def test_layers_are_those_of_the_default_plan(desk):
    shown = value(desk)
    entries = {e.source: e.layer for e in desk.engine(HIRES).layout.default if e.source != "base"}
    assert {str(k): layer for k, layer in enumerate(shown["layers"])} == entries and shown["depth"] == 6


def test_only_2d_keeps_tokens_at_their_place(desk):
    apart = {each["key"]: each["apart"] for each in value(desk)["samplings"]}
    assert apart["2d"] == pytest.approx(
        np.hypot(0.25, 0.25), abs=0.01
    )  # two tokens a side of a place: a quarter each way
    assert min(apart[key] for key in SAMPLINGS if key != "2d") > 2 * apart["2d"]


def test_other_models_get_the_papers_settings_and_say_so(desk):
    assert value(desk)["note"] == "This model was trained with 2d. "
    single = value(desk, SINGLE)
    assert "stacks no samples onto its language model" in single["note"] and single["grid"] == [8, 8]
    shown = value(desk, TAPS)
    assert "cuts no image into samples" in shown["note"] and shown["layers"] == [1, 2, 3, 4]
    assert dealing.deal_value(desk.engine(HIRES), None) is None


def test_ordinals():
    assert [dealing.ordinal(n) for n in (1, 2, 9, 16)] == ["", "second", "ninth", "16th"]
