"""True shapes with random weights: sizes as released, and a small one that runs like any other engine."""

import pytest
import torch

from model import loading, shapes
from model.catalog import count
from model.errors import UserError
from model.families import detect
from model.types import Sampling
from tests import tiny


@pytest.mark.parametrize(
    "name, billions, plan",
    [
        ("Qwen3-VL-2B", (2.1, 2.2), "base@0,0@1,1@2,2@3"),
        ("Qwen3-VL-8B", (8.7, 8.8), "base@0,0@1,1@2,2@3"),
        ("Granite-4-Vision", (3.9, 4.6), "0@9,1@6,2@3,3@0,4@12,5@15,6@18,7@21"),
        ("DeepStack-L-7B", (7.0, 7.1), "base@0,0@1,1@2,2@3,3@4"),
    ],
)
def test_the_shapes_are_those_of_the_released_checkpoints(name, billions, plan):
    config = shapes.SHAPES[name].config()
    assert billions[0] <= count(config) / 1e9 <= billions[1]
    layout = detect(config).layout_of(config)[0]
    assert str(layout.default) == plan


def test_a_small_one_answers_as_plain_transformers_would():
    engine = shapes.build("TINY", device="cpu")
    assert engine.name == "tiny with random weights" and "answers are not" in " ".join(engine.reasons)
    prompt = engine.prompt(tiny.ask(tiny.image(0, (512, 512)), "What is it?"))
    assert prompt.visual_tokens == 256
    answer = engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=5))
    inputs, plan = engine.adapter.plain_inputs(prompt)
    made = engine.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert plan == engine.layout.default and made[0, -5:].tolist() == [token.id for token in answer.tokens]


def test_the_number_format_is_the_one_asked_for_and_nothing_else_changes():
    engine = shapes.build("tiny", device="cpu", dtype="bfloat16")
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16} and engine.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32 and torch.zeros(1).device.type == "cpu"


def test_an_unknown_shape_and_one_that_does_not_fit_are_one_sentence(monkeypatch):
    with pytest.raises(UserError, match="no shape “Qwen9”.* there are Qwen3-VL-2B"):
        shapes.build("Qwen9")
    monkeypatch.setattr(loading, "free_memory", lambda device: 10**9)
    with pytest.raises(UserError, match="Qwen3-VL-8B needs 19.* GB of memory on cpu and 1.0 GB are free"):
        shapes.build("Qwen3-VL-8B", device="cpu", dtype="bfloat16")
