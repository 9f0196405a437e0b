"""Values on an image's token grid: what every map over an image is made of. Knows nothing about how it is drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from model.trace import Trace
from model.types import ImageGrid


@dataclass(frozen=True)
class GridMap:
    """One number per visual token of one image, in the place of the token.

    `values` float64 [gh, gw]; NaN is "no value here" (nothing injected, or hidden on purpose) and is drawn empty.
    """

    values: np.ndarray
    quantity: str  # what the number is of: "Injected before layer 1: stack 0"
    unit: str  # "RMS" (gain included), "ratio", "cosine", "share", "nats"
    size: tuple[int, int]  # (width, height) of the original image, pixels
    image: int = 0  # which image of the prompt
    limits: tuple[float, float] | None = None  # (low, high) of the fixed scale, the same for all layers of this view
    diverging: bool = False  # the sign matters: colours are symmetric around zero
    note: str = ""  # one sentence that must be shown with the map

    def scale(self, fixed: bool = True) -> tuple[float, float]:
        """(low, high) of the colours: `limits` when fixed and known, else from these values; never empty."""
        if fixed and self.limits is not None:
            low, high = self.limits
        else:
            finite = self.values[np.isfinite(self.values)]
            low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
            if self.diverging:
                high = max(abs(low), abs(high))
                low = -high
            elif low > 0 and low < 0.5 * high:
                low = 0.0  # an honest zero where it costs little of the range
        return (low, high) if high > low else (low, low + 1.0)

    def peak(self) -> tuple[int, int] | None:
        """(row, column) of the largest value, None if there is none."""
        if not np.isfinite(self.values).any():
            return None
        row, column = np.unravel_index(int(np.nanargmax(self.values)), self.values.shape)
        return int(row), int(column)

    def with_limits(self, low: float, high: float) -> GridMap:
        """The same map with this fixed scale."""
        return replace(self, limits=(float(low), float(high)))


def grid_of(trace: Trace, image: int) -> ImageGrid:
    """The grid of one image of the prompt; ValueError if there is no such image."""
    if not 0 <= image < len(trace.grids):
        raise ValueError(f"there is no image {image}: this prompt has {len(trace.grids)}")
    return trace.grids[image]


def image_slice(trace: Trace, image: int) -> slice:
    """Where the rows of one image lie on the axis N (rows of all images, in order)."""
    start = sum(len(grid.positions) for grid in trace.grids[:image])
    return slice(start, start + len(grid_of(trace, image).positions))


def finite_limits(values: np.ndarray, diverging: bool = False) -> tuple[float, float] | None:
    """(low, high) over all finite values, from zero or symmetric around it; None if there are none."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        return None
    if diverging:
        high = float(np.abs(finite).max())
        return -high, high
    return min(0.0, float(finite.min())), float(finite.max())
