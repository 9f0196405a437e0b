"""Rendered scenes as arrays for the language models' training: views, patch contents, questions with where to look.

Knows nothing about models: pixels go out as uint8, tower features come back in as float16.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from model.training import scenes
from model.training.canvas import CHARACTERS, PATCH, SIDE
from model.training.pages import LONGEST, TILE

GRID = TILE // PATCH  # visual tokens, one side
CONTENTS = 2 * LONGEST  # per visual token: upper or lower half, place in the string


@dataclass(frozen=True)
class Item:
    """A question of a stored scene. `cells`: for each answer character the visual token that shows it, -1 where there
    is none.
    """

    question: scenes.Question
    cells: tuple[int, ...]


@dataclass
class Batch:
    """`count` scenes: low `[n, 64, 64, 3]`, high `[n, 192, 192, 3]` uint8; contents `[n, 64, 16]` uint8 (0 nothing,
    else character + 1).
    """

    low: np.ndarray
    high: np.ndarray
    contents: np.ndarray
    items: list[list[Item]]

    def without_views(self) -> Batch:
        """The same scenes for a run on features: the pixels of 2,500 scenes take 0.3 GB."""
        return replace(self, low=self.low[:0].copy(), high=self.high[:0].copy())


def cell_of(x: float, y: float, side: int = SIDE, grid: int = GRID) -> int:
    """Row-major number, of `grid` by `grid`, of the cell over a point of a view of `side` pixels; -1 outside."""
    width = side // grid
    column, row = int(x // width), int(y // width)
    return row * grid + column if 0 <= column < grid and 0 <= row < grid else -1


def render(
    count: int,
    seed: int,
    font_set: str = "train",
    progress=None,
    draw: Callable[[np.random.Generator, str], scenes.Scene] = scenes.make_scene,
    side: int = SIDE,
    grid: int = GRID,
) -> Batch:
    """Draw `count` scenes; scene i depends on (seed, i) alone.

    draw: what makes a scene from random numbers and a set of fonts; side: pixels of the high-resolution view; grid:
    cells per side that contents and places are told by, one for each visual token unless more are asked for.
    """
    width = side // grid
    low = np.empty((count, TILE, TILE, 3), np.uint8)
    high = np.empty((count, side, side, 3), np.uint8)
    contents = np.zeros((count, grid * grid, CONTENTS), np.uint8)
    items = []
    for i in range(count):
        scene = draw(np.random.default_rng([seed, i]), font_set)
        low[i] = np.asarray(scene.image.resize((TILE, TILE), Image.Resampling.BICUBIC))
        high[i] = np.asarray(scene.image.resize((side, side), Image.Resampling.BICUBIC))
        cells: dict[int, list[int]] = {}
        for glyph in scene.glyphs:
            cell = cell_of(glyph.x, glyph.y, side, grid)
            cells.setdefault(glyph.string, []).append(cell)
            if cell >= 0:
                half = int(glyph.y % width >= width / 2)
                contents[i, cell, half * LONGEST + min(glyph.index, LONGEST - 1)] = (
                    CHARACTERS.index(glyph.character) + 1
                )
        items.append([Item(q, _cells(q, cells, scene.things, side, grid)) for q in scene.questions])
        if progress:
            progress(i + 1, count)
    return Batch(low, high, contents, items)


def _cells(question, cells, things, side, grid) -> tuple[int, ...]:
    if question.string is not None:
        return tuple(cells[question.string])
    if question.thing is not None:
        return (cell_of(things[question.thing].x, things[question.thing].y, side, grid),)
    return ()


def save(batch: Batch, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        pickle.dump(batch, file, protocol=5)


def load(path: Path) -> Batch:
    """Read back what `save` wrote in this training folder (own files only: pickle)."""
    with open(path, "rb") as file:
        return pickle.load(file)
