"""Cohere's Compass (North Micro Vision): Qwen3-VL's tower and stacks before Cohere's decoder.

Traps: the logits are scaled by the config's `logit_scale` after the head. A layer is full or sliding attention, with
its own rotary embedding or none, so an image can lie outside a sliding layer's window: a stack added there still passes
on along the residual stream, but later rows of that layer do not attend to it.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.families.qwen import Qwen


class CohereCompass(Qwen):
    """`CohereCompassForConditionalGeneration`."""

    name = "cohere_compass"
    title = "Cohere Compass"
    model_types = ("cohere_compass",)
    model_class = "CohereCompassForConditionalGeneration"
    processor_class = "CohereCompassImageProcessorPil"

    @property
    def lm_head(self) -> nn.Module:
        return ScaledHead(super().lm_head, self.model.logit_scale)


class ScaledHead(nn.Module):
    """Hidden states -> logits times the model's own scale (None: as they are)."""

    def __init__(self, head: nn.Module, scale: float | None):
        super().__init__()
        self.head, self.scale = head, scale

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        return logits if self.scale is None else logits * self.scale
