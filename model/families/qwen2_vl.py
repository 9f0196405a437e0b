"""Qwen2-VL: Qwen3-VL's kind of tower and prompt without stacks; the image enters once, at the input.

Traps: it looks like a Qwen3-VL whose taps were lost, and no stack can be asked of it: there are no mergers to make one.
Released configs are flat, with the LLM's numbers at the top level; transformers sorts them. A video is one block of
tokens: what is seen together has one position in time, and two frames follow two without a word between them.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from model.families.qwen import PROCESSORS_FILE, VIDEO_FILE, OneBlock, Qwen
from model.families.released import single_layout
from model.layout import Layout


class SingleQwen(Qwen):
    """What the families of Qwen share that have no stacks."""

    def __init__(self, *args):
        super().__init__(*args)
        self.note = "It has no stacks: the image enters once, at the input."

    @classmethod
    def layout_of(cls, config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        return single_layout(config, cls.name), ()


class Qwen2VL(OneBlock, SingleQwen):
    """`Qwen2VLForConditionalGeneration`."""

    name = "qwen2_vl"
    title = "Qwen2-VL"
    model_types = ("qwen2_vl",)
    model_class = "Qwen2VLForConditionalGeneration"
    takes_video = True
    # As transformers looks for it; most folders have no own one for videos.
    video_files = (PROCESSORS_FILE, VIDEO_FILE, "preprocessor_config.json")
