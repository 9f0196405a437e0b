"""What a variant sees that runs the vision tower itself: DeepStack-V's stacks in the tower, taps of its blocks.

Pixels come as one global view and the four tiles of the high-resolution view, 64 x 64 each. Knows nothing about the
language model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModel

from model.lab.variants import SETS, Variant, sets_of
from model.training import tower as towers
from model.training import twins


def states(
    tower: CLIPVisionModel, views: Tensor, stacks: Mapping[int, Tensor] | None = None, stop: int | None = None
) -> list[Tensor]:
    """The tokens of views `[n, 3, 64, 64]` before each layer of the tower, before what enters there is added, and after
    the last: `[n, 65, width]` each, the class token first.

    stacks: tower layer -> `[n, 64, width]` added to the patches before it, the class token left alone, as DeepStack-V's
    code does. stop: the layer before which it ends.
    """
    found = [tower.pre_layrnorm(tower.embeddings(views))]
    for number, layer in enumerate(tower.encoder.layers[:stop]):
        entering = found[-1]
        if stacks and number in stacks:
            entering = entering + F.pad(stacks[number], (0, 0, 1, 0))
        found.append(layer(entering, attention_mask=None))
    return found


def see(tower: CLIPVisionModel, variant: Variant, pixels: Tensor) -> Tensor:
    """Pixels `[B, 5, 64, 64, 3]` from 0 to 255 to what enters the projector: the global view's tokens `[B, 64, width]`,
    with the high-resolution view's in them for DeepStack-V; of a variant with taps those of the high-resolution view,
    row by row, for each of its `variant.blocks` once, `[B, blocks, 256, width]`."""
    views = towers.normalised(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
    low, tiles = views[:, 0], views[:, 1:].flatten(0, 1)

    def joined(hidden: Tensor) -> Tensor:
        return twins.joined(hidden[:, 1:], len(pixels)).flatten(1, 2)

    if variant.tower_start is not None:
        start, depth = variant.tower_start, len(tower.encoder.layers)
        high = joined(states(tower, tiles, stop=start)[start])
        sets = high[:, sets_of(variant.sampling)]
        stacks = {start + k: sets[:, k] for k in range(SETS) if start + k < depth}
        return states(tower, low, stacks)[-1][:, 1:]
    if variant.merge == "none":
        return states(tower, low)[-1][:, 1:]
    after = states(tower, tiles)[1:]
    return torch.stack([joined(after[block]) for block in dict.fromkeys(variant.blocks)], 1)
