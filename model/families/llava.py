"""LLaVA as released: one view of the image, one injection.

Trap: the processor of most checkpoints cuts the centre square out of the image (its box is said with the grid), so what
lies at the ends of a long picture is never seen. `vision_feature_layer` may be a list: several vision layers, joined on
the feature axis before the projector, still one injection.
"""

from __future__ import annotations

from PIL import Image
from transformers import PreTrainedConfig

from model.errors import UserError
from model.families.released import Released
from model.layout import Layout
from model.types import Box, Region, View

CLASS_TOKEN = {"clip_vision_model": True, "siglip_vision_model": False}  # supported towers: whether they have one


class Llava(Released):
    """`LlavaForConditionalGeneration` without a "deepstack" entry in its config."""

    name = "llava"
    title = "LLaVA"
    model_types = ("llava",)

    @classmethod
    def matches(cls, config: PreTrainedConfig) -> bool:
        return config.model_type in cls.model_types and not isinstance(getattr(config, "deepstack", None), dict)

    @classmethod
    def layout_of(cls, config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        check_tower(config, cls.title)
        return super().layout_of(config)

    @property
    def tile(self) -> int:
        """Pixels of one side of what the tower takes."""
        return self.model.config.vision_config.image_size

    @property
    def side(self) -> int:
        """Visual tokens of one side of that."""
        return self.tile // self.model.config.vision_config.patch_size

    def regions(self, image: Image.Image, alone: bool = True) -> tuple[Region, ...]:
        return (Region((self.side, self.side), self._box(image)),)

    def _box(self, image: Image.Image) -> Box | None:
        """The part of the image that the processor keeps; beyond the image where it pads."""
        width, height = image.size
        short = getattr(self.processor.size, "shortest_edge", None)
        if getattr(self.processor, "do_pad", False):
            seen = (max(width, height), max(width, height))
        elif short and self.processor.do_center_crop:
            crop, scale = self.processor.crop_size, min(width, height) / short
            seen = (crop["width"] * scale, crop["height"] * scale)
        else:
            return None  # squashed
        left, top = (width - seen[0]) / 2, (height - seen[1]) / 2
        return left, top, left + seen[0], top + seen[1]

    def views(self, image: Image.Image) -> tuple[View, ...]:
        picture = self.picture(self.pixels([image])["pixel_values"][0])
        return (View("what the model sees", picture, (self.side, self.side)),)


def check_tower(config: PreTrainedConfig, title: str) -> None:
    """UserError unless the tower's tokens fill a square."""
    tower = config.vision_config.model_type
    if tower not in CLASS_TOKEN:
        raise UserError(
            f"This {title} checkpoint has a vision tower of type “{tower}”; {' and '.join(CLASS_TOKEN)} are supported."
        )
    keeps = config.vision_feature_select_strategy == "full"
    if CLASS_TOKEN[tower] and keeps:
        raise UserError(
            f"This {title} checkpoint keeps the class token among the visual tokens (vision_feature_select_strategy "
            "“full”), which has no place on the image; “default” is supported."
        )
    if not CLASS_TOKEN[tower] and not keeps:
        raise UserError(
            f"This {title} checkpoint drops the first patch of every view (vision_feature_select_strategy “default” "
            "with a tower that has no class token); “full” is supported."
        )
