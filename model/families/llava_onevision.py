"""LLaVA-OneVision: LLaVA-NeXT's two views of a single image; of several images, one padded view each.

Traps: an image is encoded otherwise when it is not alone in the conversation (one view padded to a square, and one row
end after it), so a second image changes what the first one gives. A large view of more than `vision_aspect_ratio`
(“anyres_max_9”: nine tiles) is shrunk after the projector, so its tokens are fewer than its tiles have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from model.families.llava_next import LlavaNext
from model.types import Region


class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`."""

    name = "llava_onevision"
    title = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    mixes_images = True

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        return dict(self.processor(images=[list(images)], return_tensors="pt"))  # a list of lists: one prompt's images

    def encode(self, image: Image.Image, names: Sequence[str], alone: bool = True) -> dict[str, Tensor]:
        if alone:
            return super().encode(image, names)
        both = self.pixels([image, image])  # of two images the processor makes one view each
        one = {name: both[name][:1] for name in ("pixel_values", "image_sizes")}
        return self.sources(self.features({**one, "batch_num_images": both["batch_num_images"]}))

    def large(self, image: Image.Image) -> tuple[int, int]:
        rows, columns = super().large(image)
        most = int(self.model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * self.side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def regions(self, image: Image.Image, alone: bool = True) -> tuple[Region, ...]:
        if alone:
            return super().regions(image)
        side = max(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        square = Region((self.side, self.side), (left, top, left + side, top + side), "whole image")
        return square, Region((1, 1), (image.width, 0, image.width + 1, 1), "row end")
