"""Dense pages of text with the truth for every vision patch: what the tower is trained on.

A page is drawn at the same glyph sizes as scenes and cut into tiles; a patch is told which characters have their centre
in its left and right half, their place in their string, the text's colour, and the object that covers its centre.
Knows nothing about questions.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from model.training import fonts, strings
from model.training.canvas import CHARACTERS, COLOURS, OBJECTS, PATCH, SHAPES, SIDE, Canvas, luminance

TILE = 64  # pixels: side of the tower's input
NONE = 0  # label "nothing here" of every head; real classes start at 1
LONGEST = 8  # characters: places in a string that have a class of their own
GLYPHS = {
    8: 0.35,
    9: 0.4,
    10: 0.25,
}  # heights of fine capitals, pixels of the high-resolution view: shares
SMALLER_GLYPHS = {6: 0.22, 7: 0.45, 8: 0.27, 9: 0.06}  # what the tower learns to read first
HEADS = {  # classes per patch label, "nothing" included
    "left": len(CHARACTERS) + 1,
    "right": len(CHARACTERS) + 1,
    "left_index": LONGEST + 1,
    "right_index": LONGEST + 1,
    "ink": len(COLOURS) + 1,
    "object": len(OBJECTS) + 1,
    "object_colour": len(COLOURS) + 1,
}
_COLOUR = {name: i + 1 for i, name in enumerate(COLOURS)}
_OBJECT = {name: i + 1 for i, name in enumerate(OBJECTS)}
_CHARACTER = {name: i + 1 for i, name in enumerate(CHARACTERS)}


def _covered(centre: float, half: float, patch: int, n: int) -> slice:
    """The patches of a row or column whose middle lies within `half` of `centre`, pixels; empty where none does."""
    first = int(np.ceil((centre - half) / patch - 0.5))
    last = int(np.floor((centre + half) / patch - 0.5))
    return slice(min(max(first, 0), n), min(max(last + 1, 0), n))


def patch_labels(glyphs, things, side: int, patch: int = PATCH) -> dict[str, np.ndarray]:
    """Truth per patch of a view `side` pixels wide; glyph and object coordinates are pixels of that view."""
    n = side // patch
    out = {head: np.zeros((n, n), np.uint8) for head in HEADS}
    for thing in things:
        rows = _covered(thing.y, thing.half_height, patch, n)
        cols = _covered(thing.x, thing.half_width, patch, n)
        out["object"][rows, cols] = _OBJECT[thing.kind]
        out["object_colour"][rows, cols] = _COLOUR[thing.colour]
    for glyph in glyphs:
        column, row = int(glyph.x // patch), int(glyph.y // patch)
        if 0 <= column < n and 0 <= row < n:
            half = "left" if glyph.x % patch < patch / 2 else "right"
            out[half][row, column] = _CHARACTER[glyph.character]
            out[half + "_index"][row, column] = min(glyph.index, LONGEST - 1) + 1
            out["ink"][row, column] = _COLOUR[glyph.colour]
    return out


def place_of(glyph, side: int, patch: int = PATCH) -> tuple[int, int, str] | None:
    """Where a glyph's centre lies in a view of `side` pixels: number of the tile, of the patch in it, and the half of
    that patch; None outside. Tiles and patches are counted row by row."""
    if not (0 <= glyph.x < side and 0 <= glyph.y < side):
        return None
    tile = int(glyph.y // TILE) * (side // TILE) + int(glyph.x // TILE)
    x, y = glyph.x % TILE, glyph.y % TILE
    return tile, int(y // patch) * (TILE // patch) + int(x // patch), "left" if x % patch < patch / 2 else "right"


def dense_page(
    rng: np.random.Generator, side: int = 256, font_set: str = "train", glyphs: dict[int, float] = GLYPHS
) -> Sheet:
    """Lines of short strings over the whole page, some on panels, with a few shapes between them."""
    canvas = Canvas(rng, scale=int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2])), side=side)
    names = list(fonts.SETS[font_set])
    y = float(rng.uniform(1, 6))
    while y < side - 8:
        font, capital = str(rng.choice(names)), float(rng.choice(list(glyphs), p=list(glyphs.values())))
        paper = canvas.background
        if rng.random() < 0.3:  # a band of another colour, as on a sign
            band = str(rng.choice(list(COLOURS)))
            rgb = canvas.shade(band)
            canvas.thing(
                "panel", band, side / 2, y + capital / 2, side / 2 + 4, capital / 2 + float(rng.uniform(2, 5)), rgb=rgb
            )
            paper = rgb
        choices = canvas.readable_on(paper)
        colour = str(rng.choice(choices))
        x = float(rng.uniform(1, 8))
        while x < side - 6:
            if rng.random() < 0.08:
                half = float(rng.uniform(3.5, 8))
                canvas.thing(
                    str(rng.choice(SHAPES)),
                    str(rng.choice([c for c in COLOURS if abs(luminance(COLOURS[c]) - luminance(paper)) > 30])),
                    x + half,
                    y + capital / 2,
                    half,
                )
                x += 2 * half + float(rng.uniform(3, 8))
                continue
            draw = rng.random()
            text = (
                strings.anything(rng)
                if draw < 0.5
                else strings.price(rng)
                if draw < 0.6
                else str(rng.choice(strings.LEXICON))
                if draw < 0.75
                else strings.code(rng, 1, 6)
            )
            canvas.text(x, y, text, font, capital, colour)
            x += canvas.width(text, font, capital) + float(rng.uniform(0.6, 1.8)) * capital
            if rng.random() < 0.3:
                colour = str(rng.choice(choices))
        y += capital + float(rng.uniform(1.5, 5))
    image = canvas.finish()
    return Sheet(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)), canvas.glyphs, canvas.things)


class Sheet:
    """A finished picture that random tiles are cut from, at any offset, with the patch truth of each."""

    def __init__(self, pixels: np.ndarray, glyphs, things):
        self.pixels, self.glyphs, self.things = pixels, glyphs, things
        self.x, self.y = np.array([g.x for g in glyphs]), np.array([g.y for g in glyphs])

    def tile(self, left: int, top: int, side: int = TILE) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Pixels `[side, side, 3]` and labels `[side / 8, side / 8]` of the tile whose corner is at (left, top)."""
        inside = np.flatnonzero((self.x >= left) & (self.x < left + side) & (self.y >= top) & (self.y < top + side))
        glyphs = [replace(self.glyphs[i], x=self.x[i] - left, y=self.y[i] - top) for i in inside]
        things = [replace(t, x=t.x - left, y=t.y - top) for t in self.things]
        return self.pixels[top : top + side, left : left + side], patch_labels(glyphs, things, side)

    def random_tile(self, rng: np.random.Generator, side: int = TILE):
        most = self.pixels.shape[0] - side
        return self.tile(int(rng.integers(0, most + 1)), int(rng.integers(0, most + 1)), side)


def scene_sheets(image: Image.Image, glyphs, things) -> tuple[Sheet, Sheet]:
    """The global view (one tile) and the high-resolution view (3 x 3 tiles) of a scene, each with its truth."""
    high = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    low = np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
    ratio = TILE / SIDE
    small_glyphs = [replace(g, x=g.x * ratio, y=g.y * ratio) for g in glyphs]
    small_things = [
        replace(t, x=t.x * ratio, y=t.y * ratio, half_width=t.half_width * ratio, half_height=t.half_height * ratio)
        for t in things
    ]
    return Sheet(low, small_glyphs, small_things), Sheet(high, glyphs, things)
