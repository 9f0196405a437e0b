"""Qwen3-Omni: the thinker, which reads and answers in text; talker and speech decoder are not loaded.

Traps: only what is seen has stacks, what is heard has none. The config lies one level deeper (`thinker_config`), and a
checkpoint of the whole model holds the thinker's weights under "thinker.". Its position ids are made without token
types, from the ids around each picture, and as floats.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from model.families.qwen import Qwen
from model.layout import Layout
from model.plan import Plan
from model.prompt import Prompt


class Qwen3OmniMoe(Qwen):
    """`Qwen3OmniMoeThinkerForConditionalGeneration`."""

    name = "qwen3_omni_moe"
    title = "Qwen3-Omni"
    model_types = ("qwen3_omni_moe", "qwen3_omni_moe_thinker")
    model_class = "Qwen3OmniMoeThinkerForConditionalGeneration"
    needs = "a released checkpoint (only its thinker is loaded); no torchvision needed for images"

    @classmethod
    def unused_weights(cls) -> tuple[str, ...]:
        return (r"^talker\.", r"^code2wav\.")

    @classmethod
    def layout_of(cls, config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        return super().layout_of(getattr(config, "thinker_config", config))

    def _rope(self, input_ids: Tensor, shapes: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        patches, attention = shapes["image_grid_thw"], torch.ones_like(input_ids)
        positions, delta = self.model.get_rope_index(input_ids, patches, attention_mask=attention)
        return positions.long(), delta

    def plain_inputs(self, prompt: Prompt) -> tuple[dict[str, Tensor], Plan]:
        inputs, plan = super().plain_inputs(prompt)
        del inputs["mm_token_type_ids"]  # this model knows none
        return inputs, plan
