"""The desk: examples, plans as they are typed, images by id."""

from __future__ import annotations

import pytest

from app.desk import Desk
from model.errors import UserError
from model.plan import Plan


def test_the_examples_open(desk):
    for name, example in desk.examples.items():
        held = desk.held(name)
        assert held.image.mode == "RGB" and held.example == name
        assert example.question and example.answer and example.caption


def test_a_plan_by_text_or_preset(desk):
    engine = desk.engine("embedded/hires")
    assert desk.plan(None, engine) == engine.layout.default
    assert desk.plan(" base@0 , 0@2 ", engine) == Plan.parse("base@0,0@2")
    assert desk.plan("Single  Injection", engine) == Plan.parse("base@0")
    assert desk.plan("", engine) == Plan() == desk.plan("none", engine)
    with pytest.raises(UserError, match="layers are 0 to"):
        desk.plan("0@99", engine)


def test_a_model_that_is_not_offered_is_refused(desk):
    assert desk.engine("").name == "embedded/hires"
    for name in ("/etc", "Qwen/Qwen3-VL-2B-Instruct", "../x"):
        with pytest.raises(UserError, match="not offered"):
            desk.engine(name)


def test_loading_is_reported_even_by_a_progress_bar_that_is_empty_so_far(zoo):
    told = []

    class Empty:
        def __len__(self):
            return 0

        def __call__(self, done, what):
            told.append(what)

    class Offers:
        default = "m"

        def get(self, name, progress=None):
            if progress:
                progress(0.5, f"loading {name}")

    Desk(Offers()).engine("m", Empty())
    assert told == ["loading m"]


def test_an_unknown_image_or_example_is_a_sentence(desk):
    with pytest.raises(UserError, match="upload it again"):
        desk.held("nothing")
    with pytest.raises(UserError, match="receipt.png"):
        desk.example("../../secret.png")
