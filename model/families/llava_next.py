"""LLaVA-NeXT: one small view of the whole image and a large one in tiles, all in the sequence, one injection.

Trap: the tokens of an image are no rectangle. First come the small view's, then those of the large view, which loses
the rows or columns of its padding and gains one learned “row end” at the end of each row. Here the small view is one
region and the large view another, whose last column are the row ends: it lies beside the picture.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from model.errors import UserError
from model.families.llava import Llava
from model.types import Region, View


class LlavaNext(Llava):
    """`LlavaNextForConditionalGeneration`."""

    name = "llava_next"
    title = "LLaVA-NeXT"
    model_types = ("llava_next",)

    @classmethod
    def matches(cls, config) -> bool:
        return config.model_type in cls.model_types

    def large(self, image: Image.Image) -> tuple[int, int]:
        """(rows, columns) of the large view's tokens, without the row ends."""
        size = (image.height, image.width)
        rows, columns = get_anyres_image_grid_shape(size, self.model.config.image_grid_pinpoints, self.tile)
        canvas = torch.empty(1, rows * self.side, columns * self.side, device="meta")
        rows, columns = unpad_image(canvas, size).shape[1:]
        if not rows or not columns:
            size = f"{image.width}×{image.height}"
            raise UserError(f"The image is {size} pixels, too long and narrow for {self.title}. Crop it.")
        return rows, columns

    def regions(self, image: Image.Image, alone: bool = True) -> tuple[Region, ...]:
        rows, columns = self.large(image)
        beyond = image.width * (columns + 1) / columns
        return (
            Region((self.side, self.side), None, "global view"),
            Region((rows, columns + 1), (0, 0, beyond, image.height), "high-resolution view"),
        )

    def views(self, image: Image.Image) -> tuple[View, ...]:
        size = (image.height, image.width)
        small, *tiles = self.pixels([image])["pixel_values"][0]
        across = get_anyres_image_grid_shape(size, self.model.config.image_grid_pinpoints, self.tile)[1]
        large = self.picture(unpad_image(mosaic(tiles, across), size))
        first, second = self.regions(image)
        strip = Image.new("RGB", (large.width + round(large.width / (second.grid[1] - 1)), large.height), "grey")
        strip.paste(large)
        return View(first.name, self.picture(small), first.grid), View(second.name, strip, second.grid)


def mosaic(tiles: list[Tensor], across: int) -> Tensor:
    """Tiles [3, h, w], row by row, `across` in a row -> one picture [3, H, W]."""
    rows = [torch.cat(tiles[i : i + across], dim=2) for i in range(0, len(tiles), across)]
    return torch.cat(rows, dim=1)
