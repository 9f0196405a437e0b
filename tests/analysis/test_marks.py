"""Drawing decisions, by hand."""

import numpy as np
import pytest
from PIL import Image

from analysis import lab, marks
from analysis.grids import GridMap
from tests import lab as made


def test_layer_ticks_end_with_the_output():
    assert marks.layer_ticks(3) == ([0, 1, 2, 3], ["0", "1", "2", "out"])
    for n_layers in (8, 28, 36, 94):
        places, labels = marks.layer_ticks(n_layers)
        assert (places[0], places[-1], labels[-1]) == (0, n_layers, "out")
        assert len(places) == len(labels) <= marks.MAX_TICKS + 1
        assert min(np.diff(places)) >= min(np.diff(places)[:-1])  # "out" never crowds the last layer


def test_log_axis_only_where_it_is_needed():
    assert not marks.needs_log([1, 29, np.nan, 0]) and marks.needs_log([1, 31])
    assert not marks.needs_log([]) and not marks.needs_log([np.nan])
    low, high = marks.span([0.5, 40, np.nan], log=True)
    assert low < 0.5 and high > 40
    assert marks.log_ticks(0.6, 60) == ([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    assert marks.log_ticks(0.6, 6000)[1] == ["1", "10", "100", "1000"]


def test_linear_axis_starts_at_zero():
    low, high = marks.span([2, 10], log=False)
    assert low == 0 and 10 < high < 12
    assert marks.span([-1, 1], log=False)[0] < -1
    assert marks.span([], log=False) == (0, 1)


def test_labels_are_moved_apart_and_keep_their_order():
    assert marks.spread([0.2, 0.8], 0.1) == pytest.approx([0.2, 0.8])
    moved = marks.spread([0.51, 0.5, 0.52, 0.9], 0.1)
    assert np.diff(np.sort(moved)).min() >= 0.1 - 1e-6
    assert moved[1] < moved[0] < moved[2] < moved[3] == pytest.approx(0.9)
    assert max(marks.spread([0.99, 1.0, 0.98], 0.1)) <= 1.0
    assert marks.spread([], 0.1) == []


def test_white_space_in_tokens_is_visible():
    assert [marks.visible(text) for text in (" K", "  a b", "\n", "", " ")] == ["␣K", "␣␣a b", "⏎", "␣", "␣"]


def test_text_is_shortened_and_wrapped():
    assert marks.short("a\n b   c", 9) == "a b c" and marks.short("abcdefgh", 5) == "abcd…"
    assert marks.lines("one two three", 8) == ["one two", "three"] and marks.lines("", 8) == []
    assert (marks.number(0.12345), marks.number(-12345.6)) == ("0.123", "-12,346")


def test_the_picture_under_a_map_has_the_true_aspect_ratio():
    assert marks.underlay(Image.new("RGBA", (64, 64)), (2000, 500)).size == (640, 160)
    assert marks.underlay(Image.new("L", (10, 10)), (40, 20)).size == (40, 20)
    assert marks.underlay(Image.new("RGB", (9, 9)), (1, 3000)).size == (1, 640)


def test_one_scale_for_several_maps():
    maps = [GridMap(np.array([[low, high]]), "x", "RMS", (2, 1)) for low, high in ((0.0, 1.0), (0.0, 4.0))]
    assert marks.common_scale(maps, fixed=False) == (0, 4)
    assert marks.title(maps[0]) == "x, RMS"


def test_variants_that_recall_all_are_said_not_to_be_told_apart(tmp_path):
    told = {"text-full": 1.0, "text-stack-dilated": 0.996, "text-truncated": 0.24}
    lines = [made.line(name, share) for name, share in told.items()]
    note = marks.recall_note(lab.summary(lab.read(made.write(tmp_path / "results.jsonl", lines))))
    assert note.endswith("At the ceiling, so not told apart: full, stack-dilated.")
    alone = marks.recall_note(lab.summary(lab.read(made.write(tmp_path / "results.jsonl", lines[::2]))))
    assert "ceiling" not in alone
