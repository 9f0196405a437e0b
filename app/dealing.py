"""How a high-resolution view is dealt out to stacks and layers, for the step-through picture of the Lab tab.

Which token goes where is asked of the model's own sampling (`model.families.deepstack_llava.sample`), run on an index
grid: the picture cannot differ from what a model of that kind does. Drawing is assets/js/deal.js.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from analysis.captions import caption
from app.markup import data_uri
from app.session import Held
from model.engine import Engine
from model.families.deepstack_llava import DEFAULTS, SAMPLINGS, DeepStackLlava, best_grid, dealt

SIDE, TILE = 8, 128  # tokens and pixels a side of a tile, for models that have none of their own
ORDINALS = ("", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
WORDS = {  # name, and what a set takes of {rows} x {columns} tiles, {sets} sets, as ordinals; {count}: sets as a number
    "2d": (
        "2d",
        "Each set takes every {rows} row and every {columns} column. A place gets the tokens that lie on it, so that "
        "every stack is the whole image once more.",
    ),
    "grid": (
        "grid",
        "Each tile is a set. A place gets one token from every tile: parts of the image far from it and from one "
        "another.",
    ),
    "1d": (
        "1d, strided",
        "The grid is read row by row and every {sets} token goes to one set, as the paper's code does it: "
        "rows of tokens no longer lie on rows of places.",
    ),
    "1d-sequential": (
        "1d, sequential",
        "The grid is read row by row and cut into {count} runs, as the paper's text says. Each stack is one band of "
        "the image, spread over all places.",
    ),
}


def deal_value(engine: Engine, held: Held | None) -> dict | None:
    """Everything that the picture shows of an image; None without one."""
    if held is None:
        return None
    image = held.image.convert("RGB")
    adapter = engine.adapter
    own = isinstance(adapter, DeepStackLlava)
    settings = adapter.settings if own else DEFAULTS
    side, tile = (adapter.side, adapter.tile) if own else (SIDE, TILE)
    rows, columns = best_grid(image.size, tile, settings["num_crops"])
    seen = image.resize((columns * tile, rows * tile), Image.Resampling.BICUBIC)
    shape, sets = (rows * side, columns * side), rows * columns
    layers = [settings["start"] + k * settings["interval"] for k in range(sets)]
    stacked = settings["merge"] == "stack" and len(engine.layout.sources) > 1
    note = f"This model was trained with {WORDS[settings['sampling']][0]}. "
    if not (own and stacked):
        lacks = "stacks no samples onto its language model" if own else "cuts no image into samples"
        note = f"This model {lacks}: shown is what the paper's settings would do. "
    return {
        "model": engine.name,
        "name": held.name,
        "src": data_uri(seen, 480),
        "size": list(image.size),
        "grid": list(shape),
        "places": [side, side],
        "layers": layers,
        "depth": engine.layout.n_layers,
        "note": note,
        "samplings": [_sampling(key, shape, (rows, columns), side) for key in SAMPLINGS],
        "captions": {"deal": caption("deal"), "context": caption("context")},
    }


def _sampling(key: str, shape: tuple[int, int], grid: tuple[int, int], side: int) -> dict:
    name, words = WORDS[key]
    sets = dealt(shape, grid, key)
    every = {"rows": ordinal(grid[0]), "columns": ordinal(grid[1]), "sets": ordinal(len(sets))}
    said = " ".join(words.format(**every, count=len(sets)).split())
    return {"key": key, "name": name, "words": said, "sets": sets, "apart": round(apart(sets, shape, side), 2)}


def ordinal(n: int) -> str:
    """'third' for 3; nothing for 1, as in "every row"."""
    return ORDINALS[n - 1] if n <= len(ORDINALS) else f"{n}th"


def apart(sets: list[list[int]], shape: tuple[int, int], side: int) -> float:
    """How far a token lies from the place it is added to, on average, in widths of a place."""
    index = np.array(sets)  # [sets, side * side]
    places = np.arange(side * side)
    down = ((index // shape[1]) + 0.5) / shape[0] - (places // side + 0.5) / side
    across = ((index % shape[1]) + 0.5) / shape[1] - (places % side + 0.5) / side
    return float(side * np.hypot(down, across).mean())
