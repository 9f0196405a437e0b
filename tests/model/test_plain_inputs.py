"""What transformers' own forward takes, made by each family: it must run the plan that is named beside it.

Run: pytest tests/model/test_plain_inputs.py
"""

import pytest
import torch

from tests import tiny

QUESTION = "What does the sign say?"


@pytest.mark.parametrize("kind", ["qwen", "hires", "single"])
@pytest.mark.parametrize("sizes", [[], [(40, 32)], [(40, 32), (64, 16)]])
def test_transformers_own_forward_on_these_inputs_is_the_plan_named_with_them(kind, sizes):
    engine = tiny.engine(kind)
    prompt = engine.prompt(tiny.ask(*(tiny.image(i, size) for i, size in enumerate(sizes)), QUESTION))
    inputs, plan = engine.adapter.plain_inputs(prompt)
    with torch.no_grad():
        plain = engine.model(**inputs).logits[0]
    # Several images: transformers runs the tower on them as one batch, the engine one by one, so last bits differ.
    torch.testing.assert_close(plain, engine.logits(prompt, plan), atol=1e-5 if len(sizes) > 1 else 0, rtol=0)


def test_a_model_that_transformers_alone_cannot_run_says_so():
    engine = tiny.engine("concat")
    assert engine.adapter.plain_inputs(engine.prompt(tiny.ask(tiny.image(), QUESTION))) is None
