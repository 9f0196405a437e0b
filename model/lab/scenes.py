"""The lab's pictures: short codes in distinct colours at named places among coloured shapes, and what a run reads.

The high-resolution view has 128 x 128 pixels, in four tiles of 64; in the global view of 64 x 64 the codes are half as
tall. Scenes are drawn and their features encoded by the frozen vision tower of the embedded `hires` once, and kept in
the work folder; so are the views themselves, for variants that run the tower. Knows nothing about variants' training.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from model.families.deepstack_llava import tower_mark as mark_of
from model.lab.variants import FITTED, HIGH, LOW, Variant, landing
from model.training import dataset, strings, tower, twins
from model.training.canvas import SHAPES
from model.training.pages import TILE
from model.training.scenes import Builder, Scene
from model.training.train import CHECKPOINTS

SIDE = 128  # pixels: side of the high-resolution view
GLYPHS = {6: 0.2, 7: 0.3, 8: 0.3, 9: 0.2}  # capital heights, pixels of the high-resolution view: shares
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
TRAINING_SEED, VALIDATION_SEED, TEST_SEED = 2000, 900_101, 7101
VALIDATION, TEST = 60, 200  # scenes
GREY = 128  # around a global view that is fitted with margins
TOWER = CHECKPOINTS / "hires"


def make_scene(rng: np.random.Generator, font_set: str = "train") -> Scene:
    """One scene: three to five codes, each in its own colour, and two to four shapes, on a grid of nine places."""
    b = Builder(rng, font_set, GLYPHS, side=SIDE)
    inks, colours = b.inks(int(rng.integers(3, 6))), b.colours(int(rng.integers(2, 5)))
    few = b.some(SHAPES, int(rng.integers(2, 4)))
    shapes = [b.pick(few) for _ in colours]
    places = b.some(range(9), len(inks) + len(colours))
    step = SIDE / 3
    centres = [
        ((n % 3 + 0.5) * step + float(rng.uniform(-6, 6)), (n // 3 + 0.5) * step + float(rng.uniform(-6, 6)))
        for n in places
    ]
    for ink, place, (x, y) in zip(inks, places, centres, strict=False):
        text = strings.code(rng, 2, 3)
        string = b.write(x - b.canvas.width(text, b.font, b.capital) / 2, y - b.capital / 2, text, ink)
        b.read("ink", string, c=ink)
        b.read("place", string, p=PLACES[place])
    for thing, (shape, colour) in enumerate(zip(shapes, colours, strict=True)):
        b.canvas.thing(shape, colour, *centres[len(inks) + thing], float(rng.uniform(6, 10)))
        if shapes.count(shape) == 1:
            b.ask("shape_colour", colour, "coarse", thing=thing, s=shape)
        b.ask("colour_shape", shape, "coarse", thing=thing, c=colour)
    b.ask("count_all", str(len(shapes)), "coarse")
    b.ask("count_shape", str(shapes.count(few[0])), "coarse", s=few[0])
    b.ask("exists", "yes", "coarse", c=colours[0], s=shapes[0])
    b.ask("exists", "no", "coarse", c=colours[0], s=b.pick([s for s in SHAPES if s != shapes[0]]))
    return Scene("lab", b.canvas.finish(), b.canvas.glyphs, b.canvas.things, b.questions)


def render(count: int, seed: int) -> dataset.Batch:
    """`count` scenes; contents and places are told by token of the high-resolution view."""
    return dataset.render(count, seed, draw=make_scene, side=SIDE, grid=HIGH)


def fitted(low: np.ndarray) -> np.ndarray:
    """Global views `[n, 64, 64, 3]` as a resize that keeps the aspect of a wide picture would give: margins above and
    below, everything between them flatter. The high-resolution view, which fills its frame, then shows each thing in
    another place. (The paper's inconsistent resize pads the high-resolution view, which also makes its text smaller.)
    """
    height = round(TILE * FITTED)
    out = np.full_like(low, GREY)
    top = (TILE - height) // 2
    for view, into in zip(low, out, strict=True):
        into[top : top + height] = np.asarray(Image.fromarray(view).resize((TILE, height), Image.Resampling.BICUBIC))
    return out


@cache
def tower_mark(folder: Path = TOWER) -> str:
    """Eight digits that change with the tower's weights, whatever language model lies beside them."""
    return mark_of(folder)


def load_tower(folder: Path = TOWER) -> tower.Reader:
    """The frozen vision tower of an embedded model, without the heads that it was trained with."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    reader = tower.Reader(model.config.vision_config)
    reader.tower.load_state_dict(model.model.vision_tower.state_dict())
    return reader.eval().requires_grad_(False)


@torch.no_grad()
def encode(reader: tower.Reader, batch: dataset.Batch, chunk: int = 32, progress=None) -> torch.Tensor:
    """Tower features of every scene, float16 `[n, 384, width]`: 64 of the global view, 64 of the fitted one, 256 of the
    high-resolution view, each row by row."""
    n, low = len(batch.low), LOW**2
    out = torch.empty(n, 2 * low + HIGH**2, reader.tower.config.hidden_size, dtype=torch.float16)
    device = next(reader.parameters()).device
    for start in range(0, n, chunk):
        end = min(start + chunk, n)
        views = [batch.low[start:end], fitted(batch.low[start:end]), twins.cut(batch.high[start:end])]
        small, flat, tiles = reader.features(tower.to_pixels(np.concatenate(views)).to(device)).split(
            [len(view) for view in views]
        )
        joined = twins.joined(tiles, end - start).flatten(1, 2)
        out[start:end] = torch.cat([small, flat, joined], 1).half().cpu()
        if progress:
            progress(end / n, f"features of {end} of {n} scenes")
    return out


def views_of(batch: dataset.Batch) -> torch.Tensor:
    """The global view and the four tiles of the high-resolution view of every scene, uint8 `[n, 5, 64, 64, 3]`."""
    tiles = twins.cut(batch.high).reshape(len(batch.low), -1, *batch.low.shape[1:])
    return torch.from_numpy(np.concatenate([batch.low[:, None], tiles], 1))


@dataclass
class Data:
    """What every run of one size shares: (scenes without their pixels, features, or views where asked for) to train on,
    to watch and to test."""

    training: list[tuple[dataset.Batch, torch.Tensor]]
    validation: tuple[dataset.Batch, torch.Tensor]
    test: tuple[dataset.Batch, torch.Tensor]


def prepare(
    workdir: Path,
    scenes: int,
    validation: int = VALIDATION,
    test: int = TEST,
    per_file: int = 1000,
    device: str | None = None,
    progress=None,
    pixels: bool = False,
) -> Data:
    """The data of a lab with so many training `scenes`, made where it is not yet in workdir/lab, files of `per_file`.

    pixels: with the views instead of the features; the scenes and their questions are the same. Several processes may
    do this at once: each writes whole files under a name of its own first.
    """
    folder = workdir / "lab" / f"data-{tower_mark()}"
    sizes = [min(per_file, scenes - first) for first in range(0, scenes, per_file)]
    wanted = [(f"train-{k:03d}-{size}", size, TRAINING_SEED + k) for k, size in enumerate(sizes)]
    wanted += [(f"validation-{validation}", validation, VALIDATION_SEED), (f"test-{test}", test, TEST_SEED)]
    kind = "views" if pixels else "features"
    missing = [entry for entry in wanted if not (folder / f"{entry[0]}.{kind}.pt").exists()]
    reader = load_tower().to(tower.accelerator_for(device).device) if missing and not pixels else None
    for number, (name, count, seed) in enumerate(missing):
        batch = render(count, seed)

        def within(share, words, done=number):
            if progress:
                progress((done + share) / len(missing), words)

        tensor = encode(reader, batch, progress=within) if reader else views_of(batch)
        own = folder / f"{name}.{uuid.uuid4().hex}"
        dataset.save(batch.without_views(), own)
        own.replace(folder / f"{name}.pkl")
        torch.save(tensor, own)
        own.replace(folder / f"{name}.{kind}.pt")
    *training, watched, tested = (
        (
            dataset.load(folder / f"{name}.pkl"),
            torch.load(folder / f"{name}.{kind}.pt", weights_only=True, mmap=True),
        )
        for name, *_ in wanted
    )
    return Data(training, watched, tested)


def placed(batch: dataset.Batch, variant: Variant, layers: int) -> dataset.Batch:
    """The same scenes with contents and places told by the variant's image rows instead of high-resolution tokens."""
    tokens, things, count = landing(variant, layers)
    contents = np.zeros((len(batch.contents), count, batch.contents.shape[-1]), np.uint8)
    for token, row in enumerate(tokens.tolist()):
        # where two tokens of one row hold characters of the same place in their strings, the later in the alphabet
        np.maximum(contents[:, row], batch.contents[:, token], out=contents[:, row])

    def moved(item: dataset.Item) -> dataset.Item:
        rows = tokens if item.question.string is not None else things
        return replace(item, cells=tuple(int(rows[cell]) if cell >= 0 else -1 for cell in item.cells))

    return replace(batch, contents=contents, items=[[moved(item) for item in items] for items in batch.items])
