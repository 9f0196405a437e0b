"""What a budget would keep: which image rows get every stack, the first half of them, or none, by their relevance.

How many rows keep what is the rule of the lab's budget variants (model/lab/twin.py). Knows nothing about models.
"""

from __future__ import annotations

import numpy as np

from analysis import lab
from analysis.grids import GridMap
from model.trace import Trace
from model.types import ImageGrid

RANKINGS = {key: lab.RANKINGS[key] for key in ("norm", "question")}  # chance has nothing to show


def by_norm(stacks: np.ndarray) -> np.ndarray:
    """Relevance `[N]` of image rows whose stacks hold `[S, N, d]`: squared norms, summed over the stacks."""
    return np.square(stacks.astype(np.float64)).sum((0, 2))


def by_question(trace: Trace, layer: int) -> np.ndarray:
    """Relevance `[N]` of image rows: the attention that the recorded text rows give them in one layer, mean over rows
    and heads."""
    return trace.attention[layer].mean((0, 1))[trace.image_positions]


def kept(relevance: np.ndarray, stacks: int, some: float) -> np.ndarray:
    """How many of so many `stacks` each row keeps, `[N]`: the share `some` of the rows, those ranked first, the first
    half of them, and the first half of these rows all."""
    rank = np.argsort(np.argsort(-relevance, kind="stable"))
    count = len(relevance)
    return np.where(rank < some / 2 * count, stacks, np.where(rank < some * count, stacks // 2, 0))


def entering(some: float) -> float:
    """The share of all stack rows that enter where the share `some` of the rows keeps some: half of the stacks for
    these rows, the other half for half of them."""
    return some * 3 / 4


def kept_map(counts: np.ndarray, stacks: int, grid: ImageGrid) -> GridMap:
    """The counts of the rows of the first grid in their places; empty where nothing is kept."""
    values = counts[: len(grid.positions)].astype(np.float64).reshape(grid.grid)
    values[values == 0] = np.nan
    limits, note = (0, stacks), "A row without colour keeps none."
    return GridMap(
        values, "Stacks kept by each image row", f"of {stacks}", grid.size, grid.index, limits=limits, note=note
    )
