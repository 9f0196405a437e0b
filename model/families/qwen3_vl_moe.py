"""Qwen3-VL with a mixture of experts in the LLM: tower, taps and injection are Qwen3-VL's.

Trap: an injection changes which experts a visual row is sent to, so the effect of a gain is not smooth: it jumps
where the choice of experts changes. The injection itself stays linear.
"""

from __future__ import annotations

from model.families.qwen import Qwen


class Qwen3VLMoe(Qwen):
    """`Qwen3VLMoeForConditionalGeneration`."""

    name = "qwen3_vl_moe"
    title = "Qwen3-VL-MoE"
    model_types = ("qwen3_vl_moe",)
    model_class = "Qwen3VLMoeForConditionalGeneration"
    takes_video = True
