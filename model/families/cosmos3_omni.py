"""Cosmos 3: its Reasoner is a Qwen3-VL, inside a checkpoint that also draws, acts and hears.

Trap: the released weights carry a second, interleaved expert per layer (the Generator) and the towers of other senses,
under Diffusers' names. transformers renames the Reasoner's and drops the rest, so a file holds far more than the model
that is loaded; only the Reasoner is looked at here.
"""

from __future__ import annotations

import transformers

from model.families.qwen import Qwen


class Cosmos3Omni(Qwen):
    """`Cosmos3OmniForConditionalGeneration`, the Reasoner."""

    name = "cosmos3_omni"
    title = "Cosmos 3"
    model_types = ("cosmos3_omni",)
    model_class = "Cosmos3OmniForConditionalGeneration"
    takes_video = True
    needs = "the Reasoner of a released checkpoint (its Generator is not loaded); no torchvision needed for images"

    @classmethod
    def unused_weights(cls) -> tuple[str, ...]:
        return tuple(getattr(transformers, cls.model_class)._keys_to_ignore_on_load_unexpected)
