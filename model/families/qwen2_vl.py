"""Qwen2-VL: Qwen3-VL's kind of tower and prompt without stacks; the image enters once, at the input.

Trap: it looks like a Qwen3-VL whose taps were lost, and no stack can be asked of it: there are no mergers to make one.
Released configs are flat, with the LLM's numbers at the top level; transformers sorts them.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from model.families.qwen import Qwen
from model.families.released import single_layout
from model.layout import Layout


class Qwen2VL(Qwen):
    """`Qwen2VLForConditionalGeneration`, and what those after it share that have no stacks either."""

    name = "qwen2_vl"
    title = "Qwen2-VL"
    model_types = ("qwen2_vl",)
    model_class = "Qwen2VLForConditionalGeneration"

    def __init__(self, *args):
        super().__init__(*args)
        self.note = "It has no stacks: the image enters once, at the input."

    @classmethod
    def layout_of(cls, config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        return single_layout(config, cls.name), ()
