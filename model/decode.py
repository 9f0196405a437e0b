"""From logits to tokens to text: one token chosen under a request's sampling, text that grows token by token.

Knows nothing about models, images or plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.types import Sampling

TOP = 5  # alternatives kept for each token


class Choice(NamedTuple):
    """One chosen token: its id, its log-probability, and the `TOP` most probable (id, log-probability)."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def generators(sampling: Sampling, rows: int) -> list[torch.Generator | None]:
    """One generator per batch row, all from the request's seed: a row draws what it would draw alone."""
    if sampling.greedy:
        return [None] * rows
    return [torch.Generator().manual_seed(sampling.seed) for _ in range(rows)]


def choose(logits: Tensor, samplings: Sequence[Sampling], draws: Sequence[torch.Generator | None]) -> list[Choice]:
    """Logits [B, V] -> one choice per row. Log-probabilities are the model's own, before temperature, top-p, top-k."""
    ids = logits.argmax(-1)
    for at, (sampling, draw) in enumerate(zip(samplings, draws, strict=True)):
        if not sampling.greedy:
            ids[at] = sample(logits[at], sampling, draw)
    return describe(logits.float().log_softmax(-1), ids)


def describe(logprobs: Tensor, ids: Tensor) -> list[Choice]:
    """Log-probabilities float32 [B, V] and the ids taken [B] -> choices with their alternatives."""
    top, top_ids = logprobs.topk(min(TOP, logprobs.shape[-1]), dim=-1)
    chosen = logprobs.gather(1, ids[:, None]).squeeze(1)
    return [
        Choice(token, logprob, tuple(zip(best_ids, best, strict=True)))
        for token, logprob, best_ids, best in zip(
            ids.tolist(), chosen.tolist(), top_ids.tolist(), top.tolist(), strict=True
        )
    ]


def sample(logits: Tensor, sampling: Sampling, draw: torch.Generator) -> int:
    """Draws one token from logits [V]: temperature, then the k best, then the smallest set with probability top_p."""
    probabilities = (logits.float() / sampling.temperature).softmax(-1)
    probabilities, order = probabilities.sort(descending=True, stable=True)
    if sampling.top_k:
        probabilities, order = probabilities[: sampling.top_k], order[: sampling.top_k]
        probabilities = probabilities / probabilities.sum()
    if sampling.top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities  # probability of all better tokens
        probabilities = probabilities * (before < sampling.top_p)
    # Drawn on the CPU, so that a seed means the same on every device.
    drawn = torch.multinomial(probabilities.cpu(), 1, generator=draw)
    return int(order[drawn.to(order.device)])


class TextStream:
    """Text of a growing token list. Holds back bytes of a character that is not complete yet."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # the window that is decoded again, for spaces that depend on the token before
        self._shown = 0

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def add(self, token: int) -> str:
        """The text this token adds, "" while a character is incomplete."""
        self._ids.append(token)
        shown = self._decode(self._ids[self._start : self._shown])
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(shown) or text.endswith("\ufffd"):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(shown) :]
