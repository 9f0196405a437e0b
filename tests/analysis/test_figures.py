"""Charts hold the numbers that they were given, on any background, and nothing that a browser would run."""

import base64
import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from analysis import attention, figures, norms, palette
from analysis.grids import GridMap
from model.plan import Plan
from tests.analysis import drawn, hand


@pytest.fixture(scope="module")
def light():
    return drawn.every(figures, dark=False)


@pytest.mark.parametrize("dark", [None, False, True])
def test_every_chart_is_plain_json_on_a_transparent_background(dark):
    for name, fig in drawn.every(figures, dark=dark).items():
        data = json.loads(
            fig.to_json(), parse_constant=lambda constant, name=name: pytest.fail(f"{constant} in {name}")
        )
        layout = data["layout"]
        assert layout["paper_bgcolor"] == layout["plot_bgcolor"] == "rgba(0,0,0,0)", name
        assert "width" not in layout and layout["autosize"] and 100 < layout["height"] < 800, name
        assert layout["dragmode"] is False and layout["showlegend"] is False
        axes = [axis for key, axis in layout.items() if key.startswith(("xaxis", "yaxis"))]
        assert all(axis["fixedrange"] for axis in axes)
        assert (
            min(
                item["font"]["size"]
                for item in [layout, *layout.get("annotations", [])]
                if "font" in item and "size" in item["font"]
            )
            >= 11
        )
        assert "bdata" not in fig.to_json()  # numbers as numbers, for any plotly.js
        assert len(fig.to_json()) < 40_000


def title(fig) -> str:
    (text,) = (a.text for a in fig.layout.annotations if a.xref == "paper" and a.yref == "paper" and a.x == 0)
    return text


def test_titles_say_quantity_and_unit(light):
    for name, unit in [
        *(("norms_by_layer", "RMS"), ("image_map", "RMS"), ("attention_map", "share"), ("shapley_bars", "nats")),
        *(("lab_variants", "%"), ("lab_axes", "exact match"), ("lab_cost", "%")),
        *(("attribution_map", "nats"), ("causal_strip", "nats"), ("acuity_curves", "%"), ("loss_curve", "nats")),
    ]:
        assert unit in title(light[name]).replace("<br>", " ")


def test_norms_by_layer(light):
    fig = light["norms_by_layer"]
    by_colour = {trace.marker.color: trace for trace in fig.data if trace.mode == "markers+text"}
    stack = by_colour[palette.colour("0", False)]
    assert (list(stack.x), list(stack.y), list(stack.text)) == ([1], [2.0], ["0"])
    lines = [trace for trace in fig.data if trace.mode == "lines" and trace.fill is None]
    assert lines[0].y == pytest.approx(norms.summarise(hand.trace()).residual_image)
    assert {"<b>image rows</b>", "<b>text rows</b>"} <= {a.text for a in fig.layout.annotations}


def test_a_wide_range_gets_a_log_axis_with_full_labels():
    residual = hand.trace().residual_rms.copy()
    residual[2] = 300
    fig = figures.norms_by_layer(norms.summarise(hand.trace(residual_rms=residual)))
    assert fig.layout.yaxis.type == "log" and "log" in fig.layout.yaxis.title.text
    low, high = fig.layout.yaxis.range
    assert low < math.log10(0.5) and high > math.log10(300)


def test_ratio_and_cosine_name_the_source_and_admit_the_first_layer(light):
    fig = light["ratio_and_cosine"]
    ratio, cosine = fig.data
    assert list(ratio.x) == ["base@0", "0@1"]
    assert ratio.y == (None, pytest.approx((2 + 1 + 2 / 3 + 0.5) / 4)) and cosine.y == (None, 0.75)
    assert sum("no residual" in a.text for a in fig.layout.annotations) == 2
    assert list(ratio.marker.color)[1] == palette.colour("0", False)


def test_map_lies_on_the_image_at_its_aspect_ratio(light):
    fig = light["image_map"]
    (heat,) = fig.data
    assert [list(row) for row in heat.z] == [[1, 2], [3, 4]]
    assert (heat.x0, heat.dx, heat.y0, heat.dy) == (10, 20, 5, 10)  # tokens of 20 x 10 px, centres
    assert (fig.layout.yaxis.scaleanchor, fig.layout.yaxis.scaleratio) == ("x", 1)
    assert list(fig.layout.yaxis.range) == [20, 0] and list(fig.layout.xaxis.range) == [0, 40]
    (picture,) = fig.layout.images
    assert (picture.x, picture.y, picture.sizex, picture.sizey, picture.layer) == (0, 0, 40, 20, "below")
    seen = Image.open(io.BytesIO(base64.b64decode(picture.source.split(",")[1])))
    assert seen.size == (40, 20)
    assert heat.opacity == 0.65 and figures.image_map(norms.norm_map(hand.trace(), "before", 1)).data[0].opacity == 1


def test_scale_fixed_or_of_this_view():
    shown = norms.norm_map(hand.trace(), "residual", 1)
    fixed, own = (figures.image_map(shown, fixed=fixed).data[0] for fixed in (True, False))
    assert (fixed.zmin, fixed.zmax) == (0, 30) and own.zmax == 6
    signed = figures.image_map(norms.norm_map(hand.trace(), "cosine", 1)).data[0]
    assert (signed.zmin, signed.zmax) == (-1, 1) and signed.colorscale[1][1] == palette.DIVERGING[1]


def test_a_token_without_a_value_is_a_gap():
    fig = figures.image_map(
        GridMap(np.array([[1.0, np.nan], [np.inf, 2.0]]), "x", "RMS", (2, 2), note="Two are missing.")
    )
    assert [list(row) for row in fig.data[0].z] == [[1, None], [None, 2]]
    assert "Two are missing." in title(fig)


def test_attention_says_where_the_rest_went_and_outlines_sinks():
    rows = (5, 6, 7)
    weights = np.zeros((1, 3, 9))
    weights[0, :, 0], weights[0, :, 1] = 0.1, 0.9
    trace = hand.trace(attention={0: weights}, attention_rows=rows)
    # one of four patches cannot have four times an equal share and more, but exactly four times it has
    look = attention.to_image(trace, 6, 0)
    fig = figures.attention_map(look)
    text = title(fig).replace("<br>", " ")
    assert "Image 90%, first token 10%, other text 0%." in text and "1 sink patch with 90%" in text
    (outline,) = fig.layout.shapes
    assert (outline.x0, outline.y0, outline.x1, outline.y1) == (0, 0, 20, 10)


def test_maps_side_by_side_share_one_scale():
    maps = {s: GridMap(np.full((2, 2), v), "x", "RMS", (40, 20)) for s, v in (("0", 1.0), ("1", 5.0))}
    fig = figures.map_row(maps, title="Two, RMS")
    heats = [trace for trace in fig.data if trace.type == "heatmap"]
    assert len({(heat.zmin, heat.zmax) for heat in heats}) == 1
    assert [heat.showscale for heat in heats] == [True, False]
    assert fig.layout.yaxis2.scaleanchor == "x2"


def test_effect_marks_where_a_source_enters(light):
    heat, rings = light["effect_heatmap"].data
    assert [list(row) for row in heat.z] == [[1.0, 0.9, 0.8], [0.0, 0.5, 0.25]] and heat.zmin == 0
    assert list(zip(rings.x, rings.y, strict=True)) == [(0, 0), (1, 1)]
    empty = figures.effect_heatmap(norms.Effect(Plan(), ("base", "0"), np.zeros((2, 3))))
    assert "nothing to switch off" in title(empty).replace("<br>", " ")


def test_shapley_bars_are_the_values(light):
    fig = light["shapley_bars"]
    run = hand.subset_run()
    assert [list(bar.y) for bar in fig.data] == [pytest.approx(list(row)) for row in run.shapley]
    long = hand.subset_run(tokens=("a",) * 40)
    cut = figures.shapley_bars(long)
    assert len(cut.data[0].y) == 24 and "first 24 of 40 tokens" in title(cut)


def test_subset_strip_has_all_states_and_marks_right_answers_by_more_than_colour(light):
    fig = light["subset_strip"]
    answers = [a.text for a in fig.layout.annotations if "K7 " in a.text and a.xref == "x"]
    assert len(answers) == 4 and sum(text.startswith("✓") for text in answers) == 3
    dots = [trace for trace in fig.data if trace.type == "scatter"]
    assert [dot.marker.symbol.count("circle") for dot in dots] == [2, 2]
    (bars,) = (trace for trace in fig.data if trace.type == "bar")
    assert bars.x[0] == pytest.approx(math.exp(-0.1))


def test_acuity_shows_its_intervals(light):
    (line,) = light["acuity_curves"].data
    assert line.y == (20, 90)
    assert line.y[0] - line.error_y.arrayminus[0] == pytest.approx(100 * 0.0807, abs=0.1)


def test_variants_stand_beside_the_paper_with_their_verdicts(light):
    fig, found = light["lab_variants"], drawn.lab_summary()
    rows = [row.variant for row in found.pictures]
    ours = {rows[y]: (x, up) for t in fig.data[:-1] for x, y, up in zip(t.x, t.y, t.error_x.array, strict=True)}
    mean = found.row("none").mean
    assert ours["none"] == (pytest.approx(100 * mean.value), pytest.approx(100 * (mean.high - mean.value)))
    assert set(ours) == set(rows)
    theirs = {rows[y]: x for x, y in zip(fig.data[-1].x, fig.data[-1].y, strict=True)}
    assert theirs["none"] == 49.1 and theirs["stack-grid"] == 49.0 and "gate" not in theirs
    marks_ = {rows[a.y]: a.text for a in fig.layout.annotations if a.xref == "x2 domain"}
    assert (marks_["none"], marks_["stack-grid"], marks_["string"]) == ("<b>✓</b>", "<b>✗</b>", "<b>?</b>")
    assert "gate" not in marks_


def test_figure_3_keeps_both_scales_on_one_axis(light):
    fig = light["lab_axes"]
    start, paper, *_ = fig.data
    assert list(start.x) == [0, 1, 5] and start.y[1] == pytest.approx(60.5)
    assert (list(paper.x), list(paper.y), paper.yaxis) == ([1], [51.1], "y2")
    counts = fig.data[5]
    assert dict(zip(counts.x, counts.y, strict=True)) == {0: 49.1, 4: 51.1}
    titles = [fig.layout[name].title for name in fig.layout if name.startswith("xaxis")]
    assert all(0.51 * each.font.size * len(each.text) < 320 for each in titles)  # px that a window of 390 has for it


def test_the_budget_goes_from_none_to_every_row_by_each_ranking(light):
    """budget-25 keeps an eighth of two stacks and a quarter of two, budget-50 twice as much; question has no run."""
    fig = light["lab_budget"]
    by_norm, by_chance = fig.data
    assert list(by_norm.x) == [0, 18.75, 37.5, 100] and list(by_chance.x) == [0, 37.5, 100]
    means = {row.variant: 100 * row.mean.value for row in drawn.lab_summary().rows}
    assert list(by_norm.y) == pytest.approx([means[name] for name in ("none", "budget-25", "budget-50", "stack-2d")])
    assert by_chance.y[1] == pytest.approx(means["budget-50-random"])
    assert "circles by norm, squares by chance." in title(fig).replace("<br>", " ")


@pytest.mark.parametrize(("share", "side"), [(0.04, "left"), (0.375, "left"), (0.8, "right")])
def test_the_name_of_the_sliders_line_lies_inside_the_plot(share, side):
    """Above it stood on the figure's heading; each half has room on its other side."""
    (label,) = [
        each for each in figures.lab_budget(drawn.lab_summary(), at_share=share).layout.annotations if each.y == 0
    ]
    assert (label.text, label.yanchor, label.xanchor) == ("the slider below", "bottom", side)


def test_recall_goes_along_the_text_with_a_name_at_each_line(light):
    fig = light["lab_recall"]
    truncated = fig.data[1]
    assert list(truncated.x) == [*range(1, 9)] and list(truncated.y) == pytest.approx([0] * 6 + [97] * 2)
    assert {"<b>full</b>", "<b>truncated</b>", "<b>stack-dilated</b>"} <= {a.text for a in fig.layout.annotations}
    assert "Rows of context: full 258, truncated 66, stack-dilated 66." in title(fig).replace("<br>", " ")


def test_names_at_dots_do_not_lie_on_one_another(light):
    fig = light["lab_cost"]
    named = [text for trace in fig.data for text in trace.text if text]
    assert "stack-2d" in named and len(named) < len(drawn.lab_summary().rows)
    assert "point at a dot" in title(fig).replace("<br>", " ")


def test_texts_of_models_and_visitors_are_escaped(light):
    for name in ("shapley_bars", "subset_strip", "acuity_curves", "map_row", "lab_variants", "lab_cost"):
        text = light[name].to_json()
        assert "&lt;" in text, name
        for raw in ("<b>$x$", "$7$ <b>", "<hires>", "<i>"):
            assert raw not in text, name


def test_conversations_without_image_or_injection_are_drawn_too():
    found = drawn.without_image()
    lines = [trace for trace in figures.norms_by_layer(found).data if trace.mode == "lines"]
    assert len(lines) == 1  # text rows
    assert figures.ratio_and_cosine(found).to_json()


def test_a_dark_page_gets_light_words():
    for dark, surface in ((False, palette.LIGHT_SURFACE), (True, palette.DARK_SURFACE)):
        fig = drawn.every(figures, dark=dark)["attention_by_layer"]
        for note in fig.layout.annotations:
            assert palette.contrast_ratio(note.font.color, surface) >= 4.5
