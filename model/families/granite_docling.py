"""Granite Docling: a page cut into tiles with their own text marks, a base and three stacks as in Qwen3-VL.

Traps: the decoder multiplies what is put into its input by `embedding_multiplier` (12.0), so the base is 12 times what
the connector gives, the stacks are not. Mergers go to taps by order, not by place in the config's list. A page's tokens
lie between text marks (`<row_1_col_1>` …), tile by tile, then a thumbnail; here all tiles are one region, row by row of
the page. “Off” means base@0, as in Qwen3-VL. Tokens per tile follow the processor's `fine_route`; the density router is
not asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig

from model.families.granite import Granite
from model.families.llava_next import mosaic
from model.families.qwen import nearest, tapped_layout
from model.layout import Layout
from model.plan import BASE
from model.types import Region, View

EDGE, THUMBNAIL = "<fake_token_around_image>", "<global-img>"  # marks of the released processor


class GraniteDocling(Granite):
    """`GraniteDoclingForConditionalGeneration`."""

    name = "granite_docling"
    title = "Granite Docling"
    model_types = ("granite_docling",)

    def __init__(self, *args):
        super().__init__(*args)
        vision = self.model.config.vision_config
        factor = vision.scale_factor // 2 if self.processor.fine_route else vision.scale_factor
        self.side = vision.image_size // vision.patch_size // factor  # tokens of one side of a tile
        self.note = (
            f"Stacks are tapped after vision blocks {', '.join(str(s.tap) for s in self.layout.sources[1:])}. The base "
            f"is multiplied by {self.model.config.text_config.embedding_multiplier:g} on its way in, they are not."
        )

    @classmethod
    def layout_of(cls, config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        return tapped_layout(config, cls.name, cls.title, by_place=False)

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        made = dict(self.processor(images=[list(images)], return_tensors="pt"))
        return {name: value for name, value in made.items() if name not in ("rows", "cols")}

    def sources(self, seen) -> dict[str, Tensor]:
        base = seen.pooler_output[0] * self.model.config.text_config.embedding_multiplier
        stacks = {str(k): rows[0] for k, rows in enumerate(seen.deepstack_features)}
        return {BASE: base, **stacks}

    def encode(self, image: Image.Image, names: Sequence[str]) -> dict[str, Tensor]:
        return self._in_order(image, super().encode(image, names))

    def encode_taps(self, image: Image.Image, names: Sequence[str]) -> dict[str, Tensor]:
        pixels, tower = self.pixels([image]), self.model.model.vision_model
        path = tower.connector.fine if self.processor.fine_route else tower.connector.coarse
        tiles = pixels["pixel_values"][pixels["pixel_attention_mask"]].to(tower.device, tower.dtype)
        states = tower(tiles, output_hidden_states=True).hidden_states  # before block 0, after block 0, …
        trained = [source.tap for source in self.layout.sources if source.tap is not None]
        found = {}
        for name in names:
            tap = self.layout.source(name).tap
            merger = path.deepstack_mergers[trained.index(nearest(tap, trained))]
            found[name] = merger(path.pixel_shuffle(states[tap + 1].contiguous(), path.scale_factor)).flatten(0, 1)
        return self._in_order(image, found)

    def _in_order(self, image: Image.Image, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rows tile by tile -> rows in the order of the regions."""
        order = np.concatenate([region.rows for region in self.regions(image)])
        return {name: rows[order] for name, rows in found.items()}

    def regions(self, image: Image.Image, alone: bool = True) -> tuple[Region, ...]:
        side, (rows, columns) = self.side, self.processor.get_tile_grid(image.height, image.width)
        numbers = np.arange(rows * columns * side * side).reshape(rows, columns, side, side)
        page = Region((rows * side, columns * side), None, "page in tiles", numbers.transpose(0, 2, 1, 3).ravel())
        if rows * columns == 1:
            return (Region(page.grid, None, "", page.rows),)
        return page, Region((side, side), None, "thumbnail", numbers.size + np.arange(side * side))

    def image_text(self, image: Image.Image, alone: bool = True) -> str:
        rows, columns = self.processor.get_tile_grid(image.height, image.width)
        tile = self.image_token * self.side**2
        text = ""
        for row in range(1, rows + 1):
            text += "".join(f"{EDGE}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1)) + "\n"
        return text if rows * columns == 1 else f"{text}\n{EDGE}{THUMBNAIL}{tile}{EDGE}"

    def views(self, image: Image.Image) -> tuple[View, ...]:
        tiles = list(self.pixels([image])["pixel_values"][0])
        columns = self.processor.get_tile_grid(image.height, image.width)[1]
        page, *thumbnail = self.regions(image)
        cut = tiles[:-1] if thumbnail else tiles
        views = [View(page.name or "what the model sees", self.picture(mosaic(cut, columns)), page.grid)]
        views += [View(region.name, self.picture(tiles[-1]), region.grid) for region in thumbnail]
        return tuple(views)
