"""Choosing tokens and turning them into text."""

import math

import pytest
import torch

from model.decode import TextStream, choose, generators, sample
from model.errors import UserError
from model.types import Sampling
from tests import tiny


def test_a_choice_has_the_models_own_probabilities():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0, 0.5, 0.2], [3.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    first, second = choose(logits, [Sampling()] * 2, [None, None])
    total = sum(math.exp(x) for x in logits[0].tolist())
    assert first.id == 1 and first.logprob == pytest.approx(2 - math.log(total), abs=1e-6)
    assert [i for i, _ in first.top] == [1, 2, 4, 5, 0] and first.top[0][1] == first.logprob
    assert second.id == 0
    hot = choose(logits[:1], [Sampling(temperature=5.0, seed=3)], generators(Sampling(temperature=5.0, seed=3), 1))[0]
    assert hot.logprob == pytest.approx(float(logits[0, hot.id]) - math.log(total), abs=1e-6)


def test_sampling_draws_from_what_temperature_top_k_and_top_p_leave():
    logits = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))

    def drawn(**settings):
        sampling = Sampling(**{"temperature": 1.0, **settings})
        draw = torch.Generator().manual_seed(0)
        counts = torch.zeros(4)
        for _ in range(2000):
            counts[sample(logits, sampling, draw)] += 1
        return counts / 2000

    torch.testing.assert_close(drawn(), logits.exp(), atol=0.04, rtol=0)
    torch.testing.assert_close(drawn(top_k=2), torch.tensor([0, 2 / 3, 0, 1 / 3]), atol=0.04, rtol=0)
    torch.testing.assert_close(drawn(top_p=0.6), torch.tensor([0, 2 / 3, 0, 1 / 3]), atol=0.04, rtol=0)
    torch.testing.assert_close(drawn(top_p=0.5), torch.tensor([0.0, 1, 0, 0]), atol=0, rtol=0)
    cold = (logits / 0.5).softmax(-1)
    torch.testing.assert_close(drawn(temperature=0.5), cold, atol=0.04, rtol=0)


def test_every_row_of_a_batch_draws_what_it_would_alone():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(temperature=1.0, seed=7)
    alone = choose(logits, [sampling], generators(sampling, 1))[0]
    assert {c.id for c in choose(logits.expand(4, -1), [sampling] * 4, generators(sampling, 4))} == {alone.id}


@pytest.mark.parametrize(
    "bad", [{"max_new_tokens": 0}, {"temperature": -1}, {"temperature": math.nan}, {"top_p": 0}, {"top_k": -1}]
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)


def test_text_grows_by_whole_characters():
    tokenizer = tiny.engine("qwen").tokenizer
    text = "Naïve 日本語 text 🙂 end"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    parts = [stream.add(token) for token in ids]
    assert "".join(parts) == text
    assert "" in parts and not any("\ufffd" in part for part in parts)
