"""Qwen2-VL: Qwen3-VL's kind of tower and prompt without stacks; the image enters once, at the input.

Traps: it looks like a Qwen3-VL whose taps were lost, and no stack can be asked of it: there are no mergers to make one.
Released configs are flat, with the LLM's numbers at the top level; transformers sorts them. A video is one block of
tokens without times between its frames: what is seen together has one position in time, and two frames follow two
without a word between them. Each frame has a budget of its own, where Qwen3-VL's share one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from model.clip import Clip, clip_of
from model.families import Family
from model.families.qwen import VIDEO_FILE, Qwen
from model.families.released import single_layout
from model.layout import Layout
from model.plan import Plan
from model.prompt import Prompt
from model.types import ImageGrid

CONTEXT = 128_000  # tokens, of which a whole video takes nine tenths at most


class SingleQwen(Qwen):
    """What the families of Qwen share that have no stacks."""

    def __init__(self, *args):
        super().__init__(*args)
        self.note = "It has no stacks: the image enters once, at the input."

    @classmethod
    def layout_of(cls, config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        return single_layout(config, cls.name), ()


class Qwen2VL(SingleQwen):
    """`Qwen2VLForConditionalGeneration`."""

    name = "qwen2_vl"
    title = "Qwen2-VL"
    model_types = ("qwen2_vl",)
    model_class = "Qwen2VLForConditionalGeneration"
    takes_video = True
    video_files = (VIDEO_FILE, "preprocessor_config.json")  # as transformers looks for it; most folders have no own one
    video_size = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}  # of a frame

    def _frame_size(self, frames: int, height: int, width: int, factor: int) -> tuple[int, int]:
        """(height, width) of a video's frames after the resize, pixels, as Qwen's own code has it (qwen-vl-utils).

        A frame has a budget, and an even share of the whole video's; transformers' video processor has that as
        `cap_pixels_per_frame`. ValueError for a frame longer than 200:1.
        """
        size = self.processor.video_size
        share = int(CONTEXT * factor * factor * 0.9) * self.processor.temporal_patch_size // frames
        most = max(min(size["longest_edge"], share), int(1.05 * size["shortest_edge"]))
        return smart_resize(height, width, factor=factor, min_pixels=size["shortest_edge"], max_pixels=most)

    def image_text(self, image: Image.Image, alone: bool = True) -> str:
        return Family.image_text(self, image, alone)  # of a video too: no times

    def _shapes(
        self, input_ids: Tensor, grids: Sequence[ImageGrid], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """As Qwen3-VL's; a video is one shape, with its token type and how many seconds go by between two grids."""
        merge = self.processor.merge_size
        types = (input_ids == self.image_token_id).int()
        found: dict[str, list] = {}
        for index, image in enumerate(images):
            own = [grid for grid in grids if grid.index == index]
            shape = [len(own), own[0].grid[0] * merge, own[0].grid[1] * merge]
            if (clip := clip_of(image)) is None:
                found.setdefault("image_grid_thw", []).append(shape)
                continue
            found.setdefault("video_grid_thw", []).append(shape)
            for name, value in self._timing(clip).items():
                found.setdefault(name, []).append(value)
            for grid in own:
                types[0, grid.positions] = 2
        return {"mm_token_type_ids": types, **{name: torch.tensor(values) for name, values in found.items()}}

    def _timing(self, clip: Clip) -> dict[str, float]:
        """What the model is told of a video's time."""
        return {}

    def plain_inputs(self, prompt: Prompt) -> tuple[dict[str, Tensor], Plan]:
        inputs, plan = super().plain_inputs(prompt)
        videos = inputs["mm_token_type_ids"] == 2
        if videos.any():
            video_token = self.model.config.video_token_id
            inputs["input_ids"] = inputs["input_ids"].masked_fill(videos, video_token)
            del inputs["pixel_values"]
            for name, is_video in (("pixel_values", False), ("pixel_values_videos", True)):
                seen = [self.pixels(image) for image in prompt.images if (clip_of(image) is not None) == is_video]
                if seen:
                    inputs[name] = torch.cat([each["pixel_values"] for each in seen])
        return inputs, plan
