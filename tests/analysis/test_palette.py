"""Colours can be told apart and read on both backgrounds."""

import pytest

from analysis import palette


def test_contrast_by_hand():
    assert palette.contrast_ratio("#000000", "#FFFFFF") == pytest.approx(21)
    assert palette.contrast_ratio("#777777", "#FFFFFF") == pytest.approx(4.48, abs=0.01)  # the textbook grey


@pytest.mark.parametrize("dark", [False, True])
def test_every_source_can_be_read(dark):
    surface = palette.theme(dark).surface
    for source in ("base", *map(str, range(12))):
        assert palette.contrast_ratio(palette.colour(source, dark), surface) >= 3
        assert palette.contrast_ratio(palette.text_colour(source, dark), surface) >= 4.5
    assert palette.contrast_ratio(palette.theme(dark).ink, surface) > 12
    assert palette.contrast_ratio(palette.theme(dark).muted, surface) >= 4.5


def test_one_colour_for_either_background():
    both = palette.theme(None)
    for surface in (palette.LIGHT_SURFACE, palette.DARK_SURFACE):
        assert palette.contrast_ratio(both.ink, surface) >= 4
        for source in ("base", *map(str, range(9))):
            assert palette.contrast_ratio(palette.colour(source), surface) >= 2


def test_the_first_nine_stacks_differ_and_base_is_grey():
    assert len({palette.colour(str(i)) for i in range(9)} | {palette.colour("base")}) == 10
    assert palette.colour("9") == palette.colour("0")
    red, green, blue = (int(palette.colour("base")[i : i + 2], 16) for i in (1, 3, 5))
    assert max(red, green, blue) - min(red, green, blue) < 24


def test_readable_moves_no_further_than_needed():
    assert palette.readable("#0072B2", "#FFFFFF", 3) == "#0072B2"
    with pytest.raises(ValueError, match="no shade"):
        palette.readable("#0072B2", "#FFFFFF", 22)


def test_css_variables_hold_both_themes():
    light, dark = palette.css_variables().split(".dark {")
    for text, is_dark in ((light, False), (dark, True)):
        assert f"--source-0: {palette.colour('0', is_dark)};" in text
        assert f"--source-base-text: {palette.text_colour('base', is_dark)};" in text
        assert f"--ink: {palette.theme(is_dark).ink};" in text
    assert palette.css_variables().count("{") == palette.css_variables().count("}") == 2


def test_labels_take_the_colour_of_their_source():
    assert palette.label_colour("stack 1, layer 2", True) == palette.text_colour("1", True)
    assert palette.label_colour("base@0") == palette.colour("base")
    assert palette.label_colour("cosine", False) == palette.label_colour("10th", False) == palette.theme(False).ink


def test_signed_colours_over_a_picture_are_clear_at_zero():
    stops = palette.diverging_with_alpha()
    places = [place for place, *_ in stops]
    assert places == sorted(places) and (places[0], places[-1]) == (0, 1)
    assert stops[len(stops) // 2] == (0.5, palette.DIVERGING[1], 0.0)
    assert stops[0] == (0.0, palette.DIVERGING[0], 1.0) and stops[-1] == (1.0, palette.DIVERGING[2], 1.0)


def test_names_for_people():
    assert palette.source_name("base") == "base"
    assert palette.source_name("3") == "stack 3"
