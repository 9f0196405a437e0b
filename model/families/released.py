"""What families share whose released checkpoints transformers' Auto classes load as they are.

Model, PIL image processor, tokenizer and chat template are loaded one by one, so no torchvision is needed. Images only.
A family of this kind says how an image lies in the sequence and which sources the model's own `get_image_features`
gives; by default one image is one square, and its rows are the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from model.families import Family
from model.layout import Layout, StackSource
from model.plan import BASE, Plan
from model.prompt import Prompt
from model.types import ImageGrid


class Released(Family):
    """A family whose checkpoint `AutoModelForImageTextToText` loads and whose processor runs on PIL."""

    needs = "a folder or hub id in the released format; no torchvision needed"

    def __init__(self, model: PreTrainedModel, tokenizer, processor, chat_template: str | None):
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.chat_template = chat_template
        self.decoder = model.get_decoder()
        self.layout, self.warnings = self.layout_of(model.config)
        self.trained = "trained with stacks" if self.layout.stack_names else "trained single injection"
        self.note = "It has no stacks: the image enters once, at the input."

    @classmethod
    def parts(cls, source: str, options: dict[str, Any], hub: dict[str, Any]) -> tuple[Any, PreTrainedModel]:
        cls.layout_of(AutoConfig.from_pretrained(source, **hub))  # refuses what cannot be run, before weights are read
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False, **hub)
        return processor, AutoModelForImageTextToText.from_pretrained(source, **options)

    @classmethod
    def layout_of(cls, config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        return single_layout(config, cls.name), ()

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the processor makes of the images of one prompt, as the model takes it."""
        return dict(self.processor(images=list(images), return_tensors="pt"))

    def encode(self, image: Image.Image, names: Sequence[str]) -> dict[str, Tensor]:
        return self.sources(self.features(self.pixels([image])))

    def features(self, pixels: dict[str, Tensor]):
        """The model's own `get_image_features` of one image's pixels."""
        on_device = {name: value.to(self.model.device) for name, value in pixels.items()}
        return self.model.model.get_image_features(**on_device, return_dict=True)

    def sources(self, seen) -> dict[str, Tensor]:
        """Source name -> [N, d], from what `get_image_features` gave for one image."""
        return {BASE: seen.pooler_output[0]}

    def positions(
        self, input_ids: Tensor, grids: Sequence[ImageGrid], images: Sequence[Image.Image]
    ) -> tuple[Tensor, int]:
        length = input_ids.shape[1]
        return torch.arange(length)[None], length

    def plain_inputs(self, prompt: Prompt) -> tuple[dict[str, Tensor], Plan]:
        ids = prompt.input_ids
        pixels = self.pixels(prompt.images) if prompt.images else {}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}, self.layout.default

    def picture(self, pixels: Tensor) -> Image.Image:
        """Normalised pixels [3, H, W] as a picture: what the tower is shown."""
        values = pixels.permute(1, 2, 0).float().cpu().numpy()
        if self.processor.do_normalize:
            values = values * np.asarray(self.processor.image_std) + np.asarray(self.processor.image_mean)
        return Image.fromarray((values * 255 + 0.5).clip(0, 255).astype(np.uint8))


def single_layout(config: PreTrainedConfig, family: str) -> Layout:
    """The layout of a model without stacks: the base, put into the input."""
    base = StackSource(BASE, "image embedding", None, 0, "put in place of the image tokens' embeddings")
    return Layout(
        family=family,
        sources=(base,),
        n_layers=config.text_config.num_hidden_layers,
        n_vision_layers=config.vision_config.num_hidden_layers,
        hidden_size=config.text_config.hidden_size,
        default=Plan([(BASE, 0, 1.0)]),
        convention="This model has no stacks: the image enters once, before LLM layer 0.",
    )
