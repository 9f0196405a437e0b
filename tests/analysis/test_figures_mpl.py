"""Figures to take away: real PNG and SVG, the same each time, also from several threads at once."""

import io
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from analysis import figures, figures_mpl, norms, palette
from analysis.grids import GridMap
from tests.analysis import drawn, hand


@pytest.fixture(scope="module")
def all_figures():
    return drawn.every(figures_mpl)


def test_both_modules_draw_the_same_charts(all_figures):
    assert set(all_figures) == set(drawn.every(figures))


def test_every_figure_becomes_png(all_figures):
    for name, fig in all_figures.items():
        image = Image.open(io.BytesIO(figures_mpl.png(fig)))
        assert image.format == "PNG" and min(image.size) > 150, name
        pixels = np.asarray(image.convert("RGB"), dtype=int)
        assert tuple(pixels[0, 0]) == (255, 255, 255)  # the margin is the page
        assert (np.abs(pixels - 255).sum(-1) > 60).mean() > 0.01, f"{name} is blank"


def words(fig) -> str:
    root = ElementTree.fromstring(figures_mpl.svg(fig))
    return " ".join("".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text"))


def test_svg_keeps_words_as_words(all_figures):
    assert "Residual stream and injections, mean RMS" in words(all_figures["norms_by_layer"])
    assert "image rows" in words(all_figures["norms_by_layer"])
    assert "Injected" not in words(all_figures["image_map"]) and "RMS" in words(all_figures["image_map"])


def test_dollars_and_angles_are_not_read_as_markup(all_figures):
    assert "K7 <b>$x$" in words(all_figures["subset_strip"])
    assert "<b>$x$" in words(all_figures["lab_variants"]) and "<b>$x$" in words(all_figures["lab_cost"])
    assert "␣K" in words(all_figures["shapley_bars"]) and "$7$ <b>" in words(all_figures["shapley_bars"])


def test_dark_figures_have_a_dark_page():
    fig = figures_mpl.norms_by_layer(norms.summarise(hand.trace()), dark=True)
    corner = Image.open(io.BytesIO(figures_mpl.png(fig))).convert("RGB").getpixel((0, 0))
    assert "#{:02X}{:02X}{:02X}".format(*corner) == palette.DARK_SURFACE


@pytest.mark.parametrize("width, height", [(300, 100), (20, 1000), (1000, 20)])
def test_a_map_covers_the_whole_image_in_its_aspect_ratio(width, height):
    fig = figures_mpl.image_map(GridMap(np.array([[0.0, 1.0], [1.0, 0.0]]), "x", "RMS", (width, height)))
    ax = fig.axes[0]
    fig.canvas.draw()
    box = ax.get_window_extent()
    assert box.width / box.height == pytest.approx(width / height, rel=0.02)
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, width), (height, 0))
    assert ax.images[0].get_extent() == [0, width, height, 0]
    assert max(fig.get_size_inches()) < 10


def test_the_same_figure_gives_the_same_bytes_also_from_threads():
    def make(_: int) -> bytes:
        return figures_mpl.svg(figures_mpl.shapley_bars(hand.subset_run()))

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(make, range(4)))
    assert len(set(made)) == 1


def test_no_window_and_no_shared_state():
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_conversations_without_image_or_injection_are_drawn_too():
    found = drawn.without_image()
    for draw in (figures_mpl.norms_by_layer, figures_mpl.ratio_and_cosine):
        assert figures_mpl.png(draw(found)).startswith(b"\x89PNG")


def test_many_maps_wrap_into_rows():
    shown = norms.norm_map(hand.trace(), "before", 1)
    fig = figures_mpl.map_row({str(i): shown for i in range(6)}, title="Six, RMS")
    tops = {round(ax.get_position().y1, 2) for ax in fig.axes if ax.images}
    figures_mpl.png(fig)
    tops = {round(ax.get_position().y1, 2) for ax in fig.axes if ax.images}
    assert len(tops) == 2
