"""Qwen3.5: the tower and prompt of Qwen3-VL with its stacks removed, before a decoder of linear attention.

Traps: the released config still has an (empty) `deepstack_visual_indexes`; the code does not read it. Three of four LLM
layers have linear attention and with it no attention rows: only the others can be asked where they look.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from model.families.qwen2_vl import SingleQwen
from model.layout import Layout


class Qwen35(SingleQwen):
    """`Qwen3_5ForConditionalGeneration`."""

    name = "qwen3_5"
    title = "Qwen3.5"
    model_types = ("qwen3_5",)
    model_class = "Qwen3_5ForConditionalGeneration"
    takes_video = True

    @classmethod
    def layout_of(cls, config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        layout, warnings = super().layout_of(config)
        kinds = config.text_config.layer_types
        return replace(layout, attends=tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")), warnings
