"""What the stack picture is told, and that its script and Python write plans alike."""

from __future__ import annotations

import json

import numpy as np
import pytest

from app.picture import StackPicture, effect_value, picture_value, sees, views_value
from app.session import Held
from model.plan import Plan


def test_the_picture_is_told_all_it_needs(desk):
    engine = desk.engine("embedded/hires")
    value = json.loads(json.dumps(picture_value(engine, Plan.parse("base@0,1@3*0.5"))))
    assert value["plan"] == "base@0,1@3*0.5" and value["badge"][0] == "ablated"
    assert [s["name"] for s in value["layout"]["sources"]] == ["base", "0", "1", "2", "3"]
    assert value["layout"]["layers"] == engine.layout.n_layers
    assert dict(value["presets"])["as trained"] == value["trained"]


def test_views_carry_their_grid_and_owners(desk):
    engine = desk.engine("embedded/hires")
    held = desk.held("receipt.png")
    views = views_value(engine, held)["views"]
    fine = next(view for view in views if view["owners"])
    rows, columns = fine["grid"]
    assert len(fine["owners"]) == rows and len(fine["owners"][0]) == columns
    assert {name for row in fine["owners"] for name in row} == {"0", "1", "2", "3"}
    assert all(view["src"].startswith("data:image/png") for view in views)
    assert views_value(engine, None) is None
    taps = views_value(desk.engine("embedded/taps"), held)["views"]
    assert all(view["owners"] is None for view in taps)


def test_uploads_are_said_not_to_be_in_the_address(desk):
    example = desk.held("receipt.png")
    assert "address" not in sees(example)
    upload = Held(example.image, "<b>.png", ("first frame of the animation",))
    assert "address" in sees(upload) and "<b>.png" not in sees(upload) and "first frame" in sees(upload)
    assert "No image" in sees(None)


def test_effects_are_scaled_to_the_strongest(desk):
    engine = desk.engine("embedded/hires")
    effect = np.zeros((5, engine.layout.n_layers + 1), dtype=np.float32)
    effect[1, 2] = 0.5
    value = effect_value(engine, engine.layout.default, effect)
    assert value["scale"] == 0.5 and value["most"][2] == 0.5 and value["rows"]["0"][2] == 0.5


def test_its_events_exist():
    with pytest.raises(AttributeError):
        StackPicture().no_such_event  # noqa: B018
    assert StackPicture().plan and StackPicture().live
