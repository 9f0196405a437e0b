"""Qwen3.5 with a mixture of experts: Qwen3.5 in all else, no stacks either."""

from __future__ import annotations

from model.families.qwen3_5 import Qwen35


class Qwen35Moe(Qwen35):
    """`Qwen3_5MoeForConditionalGeneration`."""

    name = "qwen3_5_moe"
    title = "Qwen3.5 MoE"
    model_types = ("qwen3_5_moe",)
    model_class = "Qwen3_5MoeForConditionalGeneration"
