"""What a request asks to record during a replay. Knows nothing about how it is recorded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionWish:
    """Attention rows (softmax over the keys, every head) of these queries in these layers."""

    layers: tuple[int, ...]
    rows: tuple[int, ...]  # absolute sequence positions of the queries


@dataclass(frozen=True)
class Probe:
    """What to record. Nothing asked for costs nothing."""

    norms: bool = True  # RMS of the residual stream and of what is injected, ratio, cosine
    attention: tuple[AttentionWish, ...] = ()
    hidden: tuple[int, ...] = ()  # layer inputs after injection; n_layers means the final output before the norm
    hidden_rows: str = "all"  # "all" | "image"

    def attention_rows(self, layer: int) -> tuple[int, ...]:
        """The query positions wished for in `layer`, sorted, each once."""
        return tuple(sorted({row for wish in self.attention if layer in wish.layers for row in wish.rows}))
