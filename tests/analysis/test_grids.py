"""Scales of maps: fixed or per view, honest zeros, symmetric signs."""

import numpy as np
import pytest

from analysis.grids import GridMap, finite_limits, grid_of, image_slice
from model.types import ImageGrid
from tests.analysis import hand


def made(values, **more) -> GridMap:
    return GridMap(np.array(values, dtype=float), "something", "RMS", (40, 20), **more)


def test_scale_fixed_or_of_this_view():
    shown = made([[1, 2], [3, np.nan]], limits=(0, 9))
    assert shown.scale(fixed=True) == (0, 9)
    assert shown.scale(fixed=False) == (0, 3)  # 1 is below half of 3: the scale starts at zero
    assert made([[8, 9]]).scale() == (8, 9)  # it does not where that would hide the differences


def test_scale_with_a_sign_is_symmetric_and_an_empty_one_is_not_empty():
    assert made([[-1, 4]], diverging=True).scale() == (-4, 4)
    assert made([[np.nan]]).scale() == (0, 1)
    low, high = made([[5, 5]]).scale()
    assert low < high


def test_peak():
    assert made([[1, 2], [7, np.nan]]).peak() == (1, 0)
    assert made([[np.nan]]).peak() is None


def test_limits():
    assert finite_limits(np.array([2, 5, np.nan, np.inf])) == (0, 5)
    assert finite_limits(np.array([-2, 1]), diverging=True) == (-2, 2)
    assert finite_limits(np.array([np.nan])) is None
    assert made([[1]]).with_limits(0, 4).limits == (0, 4)


def test_rows_of_the_second_image():
    grids = (ImageGrid(0, np.arange(1, 5), (2, 2), (40, 20)), ImageGrid(1, np.arange(6, 8), (1, 2), (8, 4)))
    trace = hand.trace(grids=grids)
    assert image_slice(trace, 1) == slice(4, 6)
    assert grid_of(trace, 1).grid == (1, 2)
    with pytest.raises(ValueError, match="no image 2"):
        grid_of(trace, 2)
