"""Qwen3-Omni: the thinker, which reads and answers in text; talker and speech decoder are not loaded.

Traps: only what is seen has stacks, what is heard has none. The config lies one level deeper (`thinker_config`), and a
checkpoint of the whole model holds the thinker's weights under "thinker.". Its position ids are made without token
types, from the ids around each picture, and as floats. A video's frames lie as far apart as in time, at
`position_id_per_seconds` (13) a second and nothing rounded, so whatever follows a video, an answer too, stands between
whole numbers. Its processor takes one frame a second for granted unless it is told `fps`; here it is what the frames
have. How large a frame may be that processor says itself, whatever the folder says. A video's sound is not read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from model.clip import Clip
from model.families.qwen import OneBlock
from model.layout import Layout
from model.plan import Plan
from model.prompt import Prompt


class Qwen3OmniMoe(OneBlock):
    """`Qwen3OmniMoeThinkerForConditionalGeneration`."""

    name = "qwen3_omni_moe"
    title = "Qwen3-Omni"
    model_types = ("qwen3_omni_moe", "qwen3_omni_moe_thinker")
    model_class = "Qwen3OmniMoeThinkerForConditionalGeneration"
    takes_video = True
    video_files = ()
    video_size = {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32}  # of a frame
    needs = "a released checkpoint (only its thinker is loaded); no torchvision needed for images"

    @classmethod
    def unused_weights(cls) -> tuple[str, ...]:
        return (r"^talker\.", r"^code2wav\.")

    @classmethod
    def layout_of(cls, config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        return super().layout_of(getattr(config, "thinker_config", config))

    def _timing(self, clip: Clip) -> dict[str, float]:
        return {"video_second_per_grid": self.processor.temporal_patch_size / clip.fps}

    def _rope(self, input_ids: Tensor, shapes: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        positions, delta = self.model.get_rope_index(
            self._own_ids(input_ids, shapes["mm_token_type_ids"]),
            shapes.get("image_grid_thw"),
            shapes.get("video_grid_thw"),
            attention_mask=torch.ones_like(input_ids),
            second_per_grids=shapes.get("video_second_per_grid"),
        )
        return (positions, delta) if "video_grid_thw" in shapes else (positions.long(), delta.long())

    def plain_inputs(self, prompt: Prompt) -> tuple[dict[str, Tensor], Plan]:
        inputs, plan = super().plain_inputs(prompt)
        del inputs["mm_token_type_ids"]  # this model knows none
        return inputs, plan
