"""Charts for the page (plotly): analysis results in, `plotly.graph_objects.Figure` out. Knows no models and no pages.

Backgrounds are transparent and there is no width, so a figure fills its place; `dark` says what lies behind (None: made
to be read on both). Texts that come from a model or a visitor are escaped. Zooming is off, so that a finger scrolls the
page. The same figures to take away: `figures_mpl`.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape

import numpy as np
import plotly.graph_objects as go
from PIL import Image
from plotly.subplots import make_subplots

from analysis import marks
from analysis.attention import Flow, Look
from analysis.attribution import Attribution, CausalCheck
from analysis.evaluate import Acuity
from analysis.grids import GridMap
from analysis.lab import (
    COSTS,
    FIGURE_3,
    PAPER,
    PAPER_BASELINE,
    PAPER_DEEPSTACK,
    RANKINGS,
    RECALL_AXIS,
    Interval,
    Row,
    Summary,
    budgets,
)
from analysis.norms import Effect, LayerNorms
from analysis.palette import (
    DIVERGING,
    SEQUENTIAL,
    STACK_COLOURS,
    colour,
    diverging_with_alpha,
    for_words,
    label_colour,
    rgba,
    source_name,
    text_colour,
    theme,
)
from analysis.subsets import SubsetRun

FONT = "Inter, system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
SIZE, TITLE = 12, 13  # px
LABELS = 98  # px at the right for direct labels
NOTHING = "rgba(0,0,0,0)"


def norms_by_layer(norms: LayerNorms, dark: bool | None = None) -> go.Figure:
    """Mean RMS of the residual stream at image rows (band: 10 to 90 % of them) and text rows, and of each injection."""
    look = theme(dark)
    layers = list(range(norms.n_layers + 1))
    values = np.concatenate([norms.residual_image_high, norms.residual_text, list(norms.injected.values())])
    log = marks.needs_log(np.concatenate([norms.residual_image, norms.residual_text, list(norms.injected.values())]))
    low, high = marks.span(values, log)
    fig = go.Figure()
    if np.isfinite(norms.residual_image).any():
        band = [*norms.residual_image_low, *norms.residual_image_high[::-1]]
        fig.add_scatter(
            x=layers + layers[::-1],
            y=[max(float(value), low) for value in band],
            mode="lines",
            fill="toself",
            fillcolor=rgba(STACK_COLOURS[5], 0.16),
            line={"width": 0},
            hoverinfo="skip",
        )
    ends = []
    for name, line, hue, dash in (
        ("image rows", norms.residual_image, STACK_COLOURS[5], "solid"),
        ("text rows", norms.residual_text, look.muted, "dot"),
    ):
        if np.isfinite(line).any():
            fig.add_scatter(
                x=layers,
                y=_list(line),
                mode="lines",
                line={"color": hue, "width": 2.5, "dash": dash},
                hovertemplate=f"{name}, layer %{{x}}: RMS %{{y:.3g}}<extra></extra>",
            )
            ends.append((name, float(line[-1]), hue))
    dense = norms.n_layers > 12  # neighbours' labels then go above and below in turn
    for i, source in enumerate(norms.sources()):
        places = [(layer, rms) for (name, layer), rms in norms.injected.items() if name == source]
        fig.add_scatter(
            x=[layer for layer, _ in places],
            y=[rms for _, rms in places],
            mode="markers+text",
            marker={"symbol": "diamond", "size": 11, "color": colour(source, dark)},
            text=[source] * len(places),
            textposition="bottom center" if dense and i % 2 == 0 else "top center",
            textfont={"color": text_colour(source, dark), "size": SIZE},
            cliponaxis=False,
            hovertemplate=f"{source_name(source)} before layer %{{x}}: RMS %{{y:.3g}}<extra></extra>",
        )
    _frame(fig, "Residual stream and injections, mean RMS", dark, height=320, right=LABELS)
    _layers(fig, norms.n_layers)
    fig.update_yaxes(title_text="RMS, log scale" if log else "RMS", **_log_range(low, high, log))
    _end_labels(fig, ends, low, high, log, dark)
    return fig


def ratio_and_cosine(norms: LayerNorms, dark: bool | None = None) -> go.Figure:
    """Per layer with an injection: |injected| / |residual before| and their cosine, means over image rows."""
    look = theme(dark)
    layers = sorted({layer for _, layer in norms.injected})
    hues, names = [], []
    for layer in layers:
        here = [source for source, at in norms.injected if at == layer]
        hues.append(colour(here[0], dark) if len(here) == 1 else look.muted)
        names.append(f"{','.join(here)}@{layer}")
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.12)
    for row, values, what in ((1, norms.ratio[layers], "ratio"), (2, norms.cosine[layers], "cosine")):
        known = np.isfinite(values)
        fig.add_bar(
            x=names,
            y=_list(values),
            marker={"color": hues},
            text=[marks.number(value) if ok else "" for value, ok in zip(values, known, strict=True)],
            textposition="outside",
            cliponaxis=False,
            hovertemplate=f"%{{x}}: {what} %{{y:.3g}}<extra></extra>",
            row=row,
            col=1,
        )
        for name in np.array(names)[~known]:
            narrow = len(names) > marks.WIDE_BARS
            place = {"x": str(name), "y": 0, "yanchor": "bottom", "textangle": -90 if narrow else 0}
            text = "no residual" if narrow else "no residual<br>before it"
            fig.add_annotation(text=text, showarrow=False, row=row, col=1, **place)
    _frame(fig, "Injected ÷ residual, and their cosine", dark, height=340)
    top = marks.span(norms.ratio[layers], False)[1]
    fig.update_yaxes(title_text="÷ residual", range=[0, top * 1.1], row=1, col=1)
    fig.update_yaxes(title_text="cosine", range=[-1.25, 1.25], tickvals=[-1, 0, 1], row=2, col=1)
    fig.update_xaxes(type="category", categoryarray=names)
    fig.update_xaxes(title_text="source@layer", row=2, col=1)
    return fig


def image_map(
    shown: GridMap,
    picture: Image.Image | None = None,
    *,
    opacity: float = 0.65,
    fixed: bool = True,
    dark: bool | None = None,
    outlined: Sequence[tuple[int, int]] = (),
) -> go.Figure:
    """A map over its image at the true aspect ratio. `fixed`: the scale of all layers, else of this view alone.

    `opacity` 0 shows the picture, 1 the map; `outlined` marks (row, column) tokens.
    """
    fig = go.Figure()
    width, height = shown.size
    low, high = shown.scale(fixed)
    _map_traces(fig, shown, picture, opacity, low, high, "x", "y", _bar())
    rows, columns = shown.values.shape
    for row, column in outlined:
        fig.add_shape(
            type="rect",
            x0=column * width / columns,
            x1=(column + 1) * width / columns,
            y0=row * height / rows,
            y1=(row + 1) * height / rows,
            line={"color": STACK_COLOURS[1], "width": 2, "dash": "dot"},
        )
    place = min(max(380 * height / width, 120), 520)
    _frame(fig, marks.title(shown), dark, height=place, note=shown.note, bottom=36, left=8)
    _map_axes(fig, shown, "")
    return fig


def attention_map(
    look: Look,
    picture: Image.Image | None = None,
    *,
    opacity: float = 0.65,
    fixed: bool = True,
    dark: bool | None = None,
) -> go.Figure:
    """`image_map` of a look, with where the rest of the attention went, sinks outlined."""
    shown = replace(look.map, note=f"{shares(look)} {look.map.note}")
    return image_map(shown, picture, opacity=opacity, fixed=fixed, dark=dark, outlined=look.sinks)


def shares(look: Look) -> str:
    """Where all of a row's attention went, in words."""
    return f"Image {look.image_share:.0%}, first token {look.first_share:.0%}, other text {look.text_share:.0%}."


def map_row(
    maps: Mapping[str, GridMap],
    picture: Image.Image | None = None,
    *,
    title: str,
    opacity: float = 0.65,
    fixed: bool = True,
    dark: bool | None = None,
) -> go.Figure:
    """Several maps of one image side by side under one colour scale; keys are sources or other labels."""
    first = next(iter(maps.values()))
    columns = 2 if len(maps) in (2, 4) else min(len(maps), 3)
    rows = math.ceil(len(maps) / columns)
    fig = make_subplots(rows=rows, cols=columns, horizontal_spacing=0.03, vertical_spacing=0.16 / rows)
    low, high = marks.common_scale(list(maps.values()), fixed)
    for i, (label, shown) in enumerate(maps.items()):
        number = "" if i == 0 else str(i + 1)
        bar = _bar() if i == 0 else None
        _map_traces(fig, shown, picture, opacity, low, high, f"x{number}", f"y{number}", bar)
        fig.add_annotation(
            text=f"<b>{escape(source_name(label))}</b>",
            x=0,
            y=1,
            xref=f"x{number} domain",
            yref=f"y{number} domain",
            xanchor="left",
            yanchor="bottom",
            showarrow=False,
            font={"color": label_colour(label, dark)},
        )
    each = min(max(380 / columns * first.size[1] / first.size[0], 60), 300)
    _frame(fig, title, dark, height=rows * (each + 24), bottom=36, left=8, lift=16)
    for i in range(rows * columns):
        _map_axes(fig, first, "" if i == 0 else str(i + 1))
    fig.update_layout(
        {f"{axis}axis{i + 1}": {"visible": False} for axis in "xy" for i in range(len(maps), rows * columns)}
    )
    return fig


def attention_by_layer(flow: Flow, n_layers: int, dark: bool | None = None) -> go.Figure:
    """Share of attention on image (band: lowest to highest head), sinks, first token and other text, by layer."""
    look = theme(dark)
    layers = list(flow.layers)
    fig = go.Figure()
    hue = STACK_COLOURS[5]
    fig.add_scatter(
        x=layers + layers[::-1],
        y=[*_list(100 * flow.image_low), *_list(100 * flow.image_high[::-1])],
        mode="lines",
        fill="toself",
        fillcolor=rgba(hue, 0.18),
        line={"width": 0},
        hoverinfo="skip",
    )
    ends = []
    for name, values, line in (
        ("image", flow.image, {"color": hue, "width": 3}),
        ("image sinks", flow.sinks, {"color": STACK_COLOURS[1], "width": 2, "dash": "dot"}),
        ("first token", flow.first, {"color": STACK_COLOURS[3], "width": 2, "dash": "dash"}),
        ("other text", flow.text, {"color": look.muted, "width": 2}),
    ):
        fig.add_scatter(
            x=layers,
            y=_list(100 * values),
            mode="lines" if len(layers) > 1 else "markers",
            line=line,
            marker={"color": line["color"], "size": 9},
            hovertemplate=f"{name}, layer %{{x}}: %{{y:.1f}} %<extra></extra>",
        )
        ends.append((name, float(100 * values[-1]), line["color"]))
    _frame(fig, "Attention of answer rows by layer, %", dark, height=320, right=LABELS)
    _layers(fig, n_layers, output=False)
    fig.update_yaxes(title_text="share of attention, %", range=[0, 104])
    _end_labels(fig, ends, 0, 104, False, dark)
    return fig


def effect_heatmap(effect: Effect, dark: bool | None = None) -> go.Figure:
    """Sources x layers: how far the stream at the image rows moves when one source is switched off. ○: enters here."""
    look = theme(dark)
    n_layers = effect.values.shape[1] - 1
    high = float(effect.values.max()) if effect.values.size else 0.0
    fig = go.Figure()
    fig.add_heatmap(
        z=effect.values.tolist(),
        zmin=0,
        zmax=high or 1.0,
        colorscale=SEQUENTIAL,
        xgap=2,
        ygap=2,
        colorbar=_bar(below=44),
        hovertemplate="source %{y}, layer %{x}: %{z:.3g}<extra></extra>",
    )
    entries = [(e.layer, effect.sources.index(e.source)) for e in effect.plan if not e.in_tower]
    fig.add_scatter(
        x=[layer for layer, _ in entries],
        y=[row for _, row in entries],
        mode="markers",
        marker={"symbol": "circle-open", "size": 9, "color": "#FFFFFF", "line": {"width": 2}},
        hoverinfo="skip",
    )
    note = "‖h on − h off‖ ÷ ‖h on‖ at image rows. Ring: where it enters."
    if not entries:
        note = "The plan is none: there is nothing to switch off."
    rows = len(effect.sources)
    _frame(fig, "Effect of each source, relative change", dark, 34 * rows, note, bottom=78)
    _layers(fig, n_layers)
    fig.update_xaxes(showgrid=False, range=[-0.5, n_layers + 0.5])
    fig.update_yaxes(
        tickvals=list(range(rows)),
        ticktext=[_span(s, text_colour(s, dark) if s in effect.plan.sources() else look.muted) for s in effect.sources],
        range=[rows - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    return fig


def shapley_bars(run: SubsetRun, dark: bool | None = None, first: int = marks.MAX_TOKENS) -> go.Figure:
    """Per token of the target, what each stack adds to its log-probability (nats)."""
    fig = go.Figure()
    count = min(len(run.tokens), first)
    for i, stack in enumerate(run.stacks):
        fig.add_bar(
            x=list(range(count)),
            y=_list(run.shapley[i, :count]),
            marker={"color": colour(stack, dark)},
            hovertemplate=f"{source_name(stack)}: %{{y:+.3g}} nats<extra></extra>",
        )
    key = "  ".join(_span(source_name(stack), text_colour(stack, dark)) for stack in run.stacks)
    if count < len(run.tokens):
        key += f"  (first {count} of {len(run.tokens)} tokens)"
    _frame(fig, "What each stack adds to each token, nats", dark, height=250, note=key, raw_note=True)
    fig.update_layout(barmode="group", bargap=0.25)
    fig.update_xaxes(
        tickvals=list(range(count)),
        ticktext=[escape(marks.short(marks.visible(token), 10)) for token in run.tokens[:count]],
        showgrid=False,
        tickfont={"size": 14},
        tickangle=0 if count <= 12 else -60,
    )
    fig.update_yaxes(title_text="nats", zeroline=True)
    return fig


def subset_strip(run: SubsetRun, dark: bool | None = None) -> go.Figure:
    """Every on/off state of the stacks: its answer, and the target's probability per token."""
    look = theme(dark)
    rows = list(run.rows)
    fig = make_subplots(rows=1, cols=2, column_widths=[0.62, 0.38], horizontal_spacing=0.02, shared_yaxes=True)
    k = len(run.stacks)
    for i, stack in enumerate(run.stacks):
        on = [stack in row.on for row in rows]
        fig.add_scatter(
            x=[i] * len(rows),
            y=list(range(len(rows))),
            mode="markers",
            marker={
                "size": 11,
                "symbol": ["circle" if each else "circle-open" for each in on],
                "color": [colour(stack, dark) if each else look.muted for each in on],
                "opacity": [1.0 if each else 0.45 for each in on],
            },
            hovertext=[f"{source_name(stack)} {'on' if each else 'off'}" for each in on],
            hoverinfo="text",
            row=1,
            col=1,
        )
    per_token = [math.exp(row.logprob / max(1, len(run.tokens))) for row in rows]
    fig.add_bar(
        x=per_token,
        y=list(range(len(rows))),
        orientation="h",
        marker={"color": [STACK_COLOURS[2] if row.match else look.muted for row in rows], "opacity": 0.75},
        hovertext=[f"{escape(row.label)}: {p:.1%} per token" for row, p in zip(rows, per_token, strict=True)],
        hoverinfo="text",
        row=1,
        col=2,
    )
    for y, row in enumerate(rows):
        mark = {True: "✓ ", False: "", None: ""}[row.match]
        fig.add_annotation(
            x=k - 0.3,
            y=y,
            text=mark + escape(marks.short(row.answer.text, 22) or "(nothing)"),
            showarrow=False,
            xanchor="left",
            font={"color": look.ink, "family": "'DejaVu Sans Mono', ui-monospace, monospace"},
            row=1,
            col=1,
        )
    note = f"Bars: probability per token of “{marks.short(run.target, 24)}”"
    _frame(fig, "Answers under every subset of the stacks", dark, 22 * len(rows) + 30, note, left=8, right=30, lift=20)
    fig.update_xaxes(
        range=[-0.6, k + 10],
        tickvals=list(range(k)),
        ticktext=[_span(stack, text_colour(stack, dark)) for stack in run.stacks],
        side="top",
        showgrid=False,
        zeroline=False,
        row=1,
        col=1,
    )
    fig.update_xaxes(range=[0, 1], tickvals=[0, 0.5, 1], ticktext=["0 %", "50 %", "100 %"], row=1, col=2)
    fig.update_yaxes(range=[len(rows) - 0.4, -0.6], showgrid=False, showticklabels=False, zeroline=False)
    return fig


def attribution_map(
    found: Attribution,
    source: str | None = None,
    picture: Image.Image | None = None,
    *,
    image: int = 0,
    opacity: float = 0.7,
    fixed: bool = True,
    dark: bool | None = None,
) -> go.Figure:
    """One source's share of the answer's log-probability on the image, or all sources together."""
    return image_map(found.map(source, image), picture, opacity=opacity, fixed=fixed, dark=dark)


def attribution_by_source(found: Attribution, dark: bool | None = None) -> go.Figure:
    """The sums over all image rows, one bar per source (nats)."""
    sums = found.by_source()
    fig = go.Figure()
    fig.add_bar(
        x=list(sums.values()),
        y=[source_name(source) for source in sums],
        orientation="h",
        marker={"color": [colour(source, dark) for source in sums]},
        text=[f"{value:+.3g}" for value in sums.values()],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{x:+.4g} nats<extra></extra>",
    )
    note = f"From {marks.number(found.off)} (withheld) to {marks.number(found.on)} (as it is)."
    if found.delta is not None:
        note += f" Remainder {found.delta:+.2g}."
    title = f"{found.method.capitalize()} by source, nats"
    _frame(fig, title, dark, height=34 * len(sums) + 40, note=note, left=64)
    low, high = min(0.0, *sums.values()), max(0.0, *sums.values())
    room = 0.25 * ((high - low) or 1.0)
    fig.update_yaxes(autorange="reversed", showgrid=False)
    fig.update_xaxes(title_text="nats", zeroline=True, range=[low - room * (low < 0), high + room * (high > 0)])
    return fig


def causal_strip(check: CausalCheck, dark: bool | None = None) -> go.Figure:
    """Loss without the marked patches, among the losses without as many random ones (nats)."""
    look = theme(dark)
    fig = go.Figure()
    draws = len(check.random)
    fig.add_scatter(
        x=_list(check.random),
        y=[0.16 * ((i * 7) % 5 - 2) for i in range(draws)],
        mode="markers",
        marker={"size": 9, "color": look.muted, "opacity": 0.6},
        hovertemplate="random patches: %{x:.3g} nats<extra></extra>",
    )
    fig.add_scatter(
        x=[check.marked],
        y=[0],
        mode="markers+text",
        marker={"size": 15, "symbol": "diamond", "color": STACK_COLOURS[1]},
        text=["marked"],
        textposition="top center",
        textfont={"color": for_words(STACK_COLOURS[1], dark)},
        cliponaxis=False,
        hovertemplate="marked patches: %{x:.3g} nats<extra></extra>",
    )
    note = f"The marked patches cost more than {check.beats:.0%} of {draws} random draws."
    _frame(fig, f"Loss without {check.k} patches, nats", dark, height=120, note=note, left=12)
    fig.update_yaxes(visible=False, range=[-0.8, 1.0])
    fig.update_xaxes(title_text="nats lost", zeroline=True)
    return fig


def acuity_curves(curves: Mapping[str, Acuity], dark: bool | None = None) -> go.Figure:
    """Exact match by glyph height with 95 % intervals, one line per model."""
    fig = go.Figure()
    ends = []
    for i, (label, curve) in enumerate(curves.items()):
        hue = STACK_COLOURS[i % len(STACK_COLOURS)]
        fig.add_scatter(
            x=_list(curve.glyph_px),
            y=_list(100 * curve.exact),
            mode="lines+markers",
            line={"color": hue, "width": 2.5},
            marker={"size": 8, "symbol": i},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": _list(100 * (curve.high - curve.exact)),
                "arrayminus": _list(100 * (curve.exact - curve.low)),
                "color": hue,
                "thickness": 1.2,
                "width": 4,
            },
            customdata=curve.n.tolist(),
            hovertemplate=f"{escape(label)}, %{{x}} px: %{{y:.1f}} % of %{{customdata}}<extra></extra>",
        )
        if len(curve.exact):
            ends.append((marks.short(label, 16), float(100 * curve.exact[-1]), hue))
    longest = max((len(name) for name, *_ in ends), default=0)
    _frame(fig, "Texts read exactly, % by glyph height", dark, height=300, right=24 + 7 * longest)
    fig.update_xaxes(title_text="glyph height in the high-resolution view, px")
    fig.update_yaxes(title_text="exact match, %", range=[0, 104])
    _end_labels(fig, ends, 0, 104, False, dark)
    return fig


def lab_variants(found: Summary, dark: bool | None = None) -> go.Figure:
    """One row per variant: ours with 95 % intervals on the left, the paper's on its own scale on the right; lines mark
    the reference. ✓ the same sign, ✗ the other one, ? undecided."""
    look = theme(dark)
    rows = list(found.pictures)
    # ours has the intervals, and so the room
    fig = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.06, column_widths=[0.64, 0.36])
    for source, places in marks.by_group(rows):
        hue = colour(source, dark)
        means = [rows[i].mean for i in places]
        fig.add_scatter(
            x=[100 * mean.value for mean in means],
            y=list(places),
            mode="markers",
            marker={"size": 9, "color": hue},
            error_x=_arms(means, hue),
            hovertext=[_told(rows[i]) for i in places],
            hoverinfo="text",
            row=1,
            col=1,
        )
    printed = [(i, PAPER[row.variant]) for i, row in enumerate(rows) if PAPER.get(row.variant)]
    printed = [(i, paper) for i, paper in printed if paper.scores]
    fig.add_scatter(
        x=[paper.scores[found.bench] for _, paper in printed],
        y=[i for i, _ in printed],
        mode="markers",
        marker={"size": 10, "symbol": "diamond", "color": look.muted},
        hovertext=[f"{escape(p.words)}: {p.scores[found.bench]:.1f} ({p.source})" for _, p in printed],
        hoverinfo="text",
        row=1,
        col=2,
    )
    for i, row in enumerate(rows):
        verdict = found.judge(row)
        if verdict.mark != "–":
            fig.add_annotation(
                text=f"<b>{verdict.mark}</b>",
                x=1,
                y=i,
                xref="x2 domain",
                yref="y2",
                xanchor="left",
                xshift=4,
                showarrow=False,
                hovertext=escape(verdict.why),
                font={"color": look.ink, "size": 14},
            )
    if found.reference is not None:
        fig.add_vline(
            x=100 * found.reference.mean.value, line={"color": look.muted, "width": 1, "dash": "dot"}, row=1, col=1
        )
    fig.add_vline(x=PAPER_DEEPSTACK[found.bench], line={"color": look.muted, "width": 1, "dash": "dot"}, row=1, col=2)
    longest = max((len(row.variant) for row in rows), default=0)
    left = 16 + round(6.4 * longest)
    title = f"{found.words.capitalize()}, %, beside the paper's {found.bench}"
    _frame(fig, title, dark, 23 * len(rows) + 16, marks.lab_note(found), left=left, right=24)
    fig.update_xaxes(nticks=4)
    fig.update_xaxes(title_text="ours, %", row=1, col=1)
    fig.update_xaxes(title_text=f"paper's {found.bench}", row=1, col=2)
    fig.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[escape(row.variant) for row in rows],
        range=[len(rows) - 0.5, -0.5],
        showgrid=True,
    )
    return fig


def lab_axes(found: Summary, dark: bool | None = None) -> go.Figure:
    """Along the axes of FIGURE_3: ours (dots, left scale) and what the paper prints (diamonds, right). A number beside
    a dot: the stacks that find a layer, where others do not."""
    look = theme(dark)
    axes = {axis: points for axis in FIGURE_3 if len(points := found.along(axis)) > 1}
    fig = make_subplots(
        rows=max(1, len(axes)),
        cols=1,
        vertical_spacing=0.34 / max(1, len(axes)),
        specs=[[{"secondary_y": True}]] * max(1, len(axes)),
    )
    hue = colour("0", dark)
    for at, (axis, points) in enumerate(axes.items(), 1):
        of = FIGURE_3[axis]
        means = [row.mean for _, row in points]
        fig.add_scatter(
            x=[value for value, _ in points],
            y=[100 * mean.value for mean in means],
            mode="lines+markers+text",
            text=[marks.fewer_stacks(axis, row) for _, row in points],
            textposition="middle right",
            textfont={"size": 11, "color": look.muted},
            line={"color": hue, "width": 2},
            marker={"size": 8},
            error_y=_arms(means, hue),
            hovertext=[_told(row) for _, row in points],
            hoverinfo="text",
            row=at,
            col=1,
        )
        fig.add_scatter(
            x=list(of.paper),
            y=[scores[found.bench] for scores in of.paper.values()],
            mode="markers",
            marker={"size": 10, "symbol": "diamond-open", "color": look.muted, "line": {"width": 2}},
            hovertemplate=f"the paper, %{{x}} {of.unit}: %{{y:.1f}}<extra></extra>",
            row=at,
            col=1,
            secondary_y=True,
        )
        low, high = marks.around([v for mean in means for v in (100 * mean.low, 100 * mean.high)])
        theirs = marks.around([PAPER_BASELINE[found.bench], *(scores[found.bench] for scores in of.paper.values())])
        places = [*(value for value, _ in points), *of.paper]
        title = f"{of.title.lower()} ({of.unit})"
        edge = max(0.4, 0.03 * (max(places) - min(places)))
        fig.update_xaxes(title_text=title, title_font_size=12, row=at, col=1)  # the longest fits a narrow window
        fig.update_xaxes(range=[min(places) - edge, max(places) + edge], row=at, col=1)
        fig.update_yaxes(title_text="ours, %", range=[low, high], row=at, col=1)
        fig.update_yaxes(
            title_text=f"paper's {found.bench}", range=list(theirs), showgrid=False, row=at, col=1, secondary_y=True
        )
    _frame(
        fig,
        f"{found.words.capitalize()}, along figure 3 and table 4",
        dark,
        165 * max(1, len(axes)),
        marks.AXES_NOTE,
        right=48,
    )
    fig.update_xaxes(nticks=8)
    return fig


def lab_budget(found: Summary, dark: bool | None = None, at_share: float | None = None) -> go.Figure:
    """Accuracy with 95 % intervals against the share of stack rows that enter, one line per ranking of the rows.
    at_share: a line at this share."""
    fig, ends = go.Figure(), []
    for at, (ranking, points) in enumerate(budgets(found).items()):
        means = [row.mean for _, row in points]
        ends += [100 * end for mean in means for end in (mean.low, mean.high)]
        hue = colour(str(at), dark)
        fig.add_scatter(
            x=[100 * share for share, _ in points],
            y=[100 * mean.value for mean in means],
            mode="lines+markers",
            line={"color": hue, "width": 2},
            marker={"size": 9, "symbol": marks.RANKED[at][0]},
            error_y=_arms(means, hue),
            hovertext=[f"{_told(row)}<br>{RANKINGS[ranking]}" for _, row in points],
            hoverinfo="text",
        )
    _frame(fig, f"{found.words.capitalize()}, %, by budget", dark, 240, marks.budget_note(found))
    if at_share is not None:
        muted = theme(dark).muted
        fig.add_vline(
            x=100 * at_share,
            line={"color": muted, "width": 1, "dash": "dot"},
            annotation={"text": "the slider below", "font": {"color": muted}, "yanchor": "bottom"},
            annotation_position=f"bottom {'left' if at_share > 0.5 else 'right'}",  # above, it would lie on the heading
        )
    fig.update_xaxes(title_text="stack rows that enter, %", range=[-3, 103])
    fig.update_yaxes(title_text="ours, %", range=list(marks.around(ends)))
    return fig


def lab_recall(found: Summary, dark: bool | None = None) -> go.Figure:
    """Facts recalled by where in the text they stand, with 95 % intervals, one line per variant of the group "text"."""
    fig, ends = go.Figure(), []
    for at, row in enumerate(found.texts):
        means = row.recall
        if not means:
            continue
        hue = STACK_COLOURS[at % len(STACK_COLOURS)]
        fig.add_scatter(
            x=[*means],
            y=[100 * mean.value for mean in means.values()],
            mode="lines+markers",
            line={"color": hue, "width": 2},
            marker={"size": 8, "symbol": at},
            error_y=_arms([*means.values()], hue),
            hovertext=[f"{_told(row)}<br>part {part}: {100 * mean.value:.1f} %" for part, mean in means.items()],
            hoverinfo="text",
        )
        ends.append((marks.short(marks.of_text(row.variant), 16), 100 * [*means.values()][-1].value, hue))
    longest = max((len(name) for name, *_ in ends), default=0)
    note = marks.recall_note(found)
    _frame(fig, "Facts recalled exactly, %, by place in the text", dark, 300, note, right=24 + 7 * longest)
    fig.update_xaxes(title_text=RECALL_AXIS, dtick=1)
    fig.update_yaxes(title_text="recalled, %", range=[0, 104])
    _end_labels(fig, ends, 0, 104, False, dark)
    return fig


def _arms(means: Sequence[Interval], hue: str) -> dict:
    """Error bars of shares, in points."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [100 * (mean.high - mean.value) for mean in means],
        "arrayminus": [100 * (mean.value - mean.low) for mean in means],
        "color": hue,
        "thickness": 1.2,
        "width": 4,
    }


def lab_cost(found: Summary, cost: str = "context", dark: bool | None = None) -> go.Figure:
    """Accuracy with 95 % intervals against one measured cost, coloured by group."""
    rows = [row for row in found.pictures if row.spent(cost) is not None]
    spent = [row.spent(cost) for row in rows]
    log = marks.needs_log(spent)
    low, high = marks.around(spent) if not log else marks.span(spent, True)
    bottom, top = marks.around([100 * end for row in rows for end in (row.mean.low, row.mean.high)])
    fig = go.Figure()
    named = marks.room(
        marks.shares_of(spent, low, high, log), [(row.mean.value * 100 - bottom) / (top - bottom) for row in rows]
    )
    for source, places in marks.by_group(rows):
        hue = colour(source, dark)
        means = [rows[i].mean for i in places]
        fig.add_scatter(
            x=[spent[i] for i in places],
            y=[100 * mean.value for mean in means],
            mode="markers+text",
            marker={"size": 9, "color": hue},
            text=[escape(rows[i].variant) if i in named else "" for i in places],
            textposition=["middle left" if named.get(i) else "middle right" for i in places],
            textfont={"color": for_words(hue, dark), "size": SIZE},
            cliponaxis=False,
            error_y=_arms(means, hue),
            hovertext=[f"{_told(rows[i])}<br>{marks.number(spent[i])} {COSTS[cost].unit}" for i in places],
            hoverinfo="text",
        )
    note = "" if len(named) == len(rows) else "Names that would lie on others are left out; point at a dot."
    _frame(fig, f"{found.words.capitalize()}, %, by {COSTS[cost].words}", dark, height=300, note=note, right=24)
    fig.update_yaxes(title_text="ours, %", range=[bottom, top])
    words = f"{COSTS[cost].words}, {COSTS[cost].unit}"
    fig.update_xaxes(title_text=f"{words}, log scale" if log else words, **_log_range(low, high, log))
    return fig


def _told(row: Row) -> str:
    """A variant's numbers, for hovering."""
    ours = f"<b>{escape(row.variant)}</b>: {row.percent} %, {row.counted}"
    return f"{ours}<br>95 %: {row.mean.percent_ends}"


def loss_curve(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], dark: bool | None = None) -> go.Figure:
    """Training loss by step; curves: label -> (steps, loss)."""
    fig = go.Figure()
    every = np.concatenate([np.asarray(loss, dtype=np.float64) for _, loss in curves.values()])
    log = marks.needs_log(every)
    low, high = marks.span(every, log)
    ends = []
    for i, (label, (steps, loss)) in enumerate(curves.items()):
        hue = STACK_COLOURS[i % len(STACK_COLOURS)]
        fig.add_scatter(
            x=list(steps),
            y=list(loss),
            mode="lines",
            line={"color": hue, "width": 2},
            hovertemplate=f"{escape(label)}, step %{{x}}: %{{y:.4g}}<extra></extra>",
        )
        ends.append((marks.short(label, 16), float(loss[-1]), hue))
    longest = max(len(name) for name, *_ in ends)
    _frame(fig, "Training loss, nats per token", dark, height=300, right=24 + 7 * longest)
    fig.update_xaxes(title_text="step")
    fig.update_yaxes(title_text="loss, log scale" if log else "loss", **_log_range(low, high, log))
    _end_labels(fig, ends, low, high, log, dark)
    return fig


def _list(values: np.ndarray) -> list[float | None]:
    """Plain numbers for JSON; None where there is none, which plotly draws as a gap."""
    return [float(value) if np.isfinite(value) else None for value in np.asarray(values, dtype=np.float64)]


def _span(text: str, hue: str) -> str:
    return f'<span style="color:{hue}"><b>{escape(text)}</b></span>'


def _bar(below: int = 6) -> dict:
    """A colour bar `below` px under the plot."""
    return {
        "orientation": "h",
        "thickness": 9,
        "len": 0.9,
        "y": 0,
        "yanchor": "top",
        "ypad": below,
        "outlinewidth": 0,
        "nticks": 5,
    }


def _scale(shown: GridMap, over_picture: bool):
    if not shown.diverging:
        return SEQUENTIAL
    if over_picture:
        return [[place, rgba(hue, alpha)] for place, hue, alpha in diverging_with_alpha()]
    return [[i / (len(DIVERGING) - 1), hue] for i, hue in enumerate(DIVERGING)]


def _map_traces(fig, shown: GridMap, picture, opacity: float, low: float, high: float, x: str, y: str, bar) -> None:
    """The picture and the heat map over it, on the axes named x and y, in pixels of the original image."""
    width, height = shown.size
    rows, columns = shown.values.shape
    unit = escape(shown.unit)
    if picture is not None:
        fig.add_layout_image(
            source=_data_uri(marks.underlay(picture, shown.size)),
            xref=x,
            yref=y,
            x=0,
            y=0,
            sizex=width,
            sizey=height,
            sizing="stretch",
            layer="below",
        )
    fig.add_heatmap(
        z=[_list(row) for row in shown.values],
        x0=width / columns / 2,
        dx=width / columns,
        y0=height / rows / 2,
        dy=height / rows,
        zmin=low,
        zmax=high,
        colorscale=_scale(shown, picture is not None),
        opacity=opacity if picture is not None else 1.0,
        xgap=1,
        ygap=1,
        showscale=bar is not None,
        colorbar=bar,
        customdata=[[[r, c] for c in range(columns)] for r in range(rows)],
        hoverongaps=False,
        hovertemplate=f"row %{{customdata[0]}}, column %{{customdata[1]}}: %{{z:.4g}} {unit}<extra></extra>",
        xaxis=x,
        yaxis=y,
    )


def _map_axes(fig, shown: GridMap, number: str) -> None:
    """Hidden axes in image pixels, one pixel as wide as high."""
    width, height = shown.size
    anchor = f"x{number}"
    fig.update_layout(
        {
            f"xaxis{number}": {"visible": False, "range": [0, width], "constrain": "domain"},
            f"yaxis{number}": {
                "visible": False,
                "range": [height, 0],
                "scaleanchor": anchor,
                "scaleratio": 1,
                "constrain": "domain",
            },
        }
    )


def _data_uri(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _log_range(low: float, high: float, log: bool) -> dict:
    if not log:
        return {"range": [low, high]}
    places, labels = marks.log_ticks(low, high)
    return {"type": "log", "range": [math.log10(low), math.log10(high)], "tickvals": places, "ticktext": labels}


def _layers(fig, n_layers: int, output: bool = True) -> None:
    places, labels = marks.layer_ticks(n_layers)
    end = n_layers + 0.2 if output else n_layers - 0.8
    if not output:
        places, labels = places[:-1], labels[:-1]
    title = "LLM layer (out: final output)" if output else "LLM layer"
    fig.update_xaxes(title_text=title, tickvals=places, ticktext=labels, tickangle=0, range=[-0.5, end], zeroline=False)


def _end_labels(fig, ends: list[tuple[str, float, str]], low: float, high: float, log: bool, dark: bool | None) -> None:
    """Names at the right end of their lines, moved apart where they would overlap."""
    ends = [end for end in ends if math.isfinite(end[1])]

    def share(value: float) -> float:
        if log:
            value, bottom, top = math.log10(max(value, low)), math.log10(low), math.log10(high)
        else:
            bottom, top = low, high
        return (value - bottom) / (top - bottom)

    for (name, _, hue), y in zip(ends, marks.spread([share(end[1]) for end in ends], 0.075), strict=True):
        fig.add_annotation(
            text=f"<b>{escape(name)}</b>",
            x=1,
            y=y,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="middle",
            xshift=6,
            showarrow=False,
            font={"color": for_words(hue, dark), "size": SIZE},
        )


def _title(title: str, dark: bool | None, note: str, raw_note: bool) -> tuple[str, int]:
    """Title with a note in smaller type below it, and the pixels they take."""
    heads = [escape(line) for line in marks.lines(title, 40)]
    notes = [note] if raw_note else [escape(line) for line in marks.lines(note, 48)]
    text = "<br>".join(f"<b>{line}</b>" for line in heads)
    if notes:
        small = "<br>".join(notes)
        text += f'<br><span style="font-size:{SIZE}px;color:{theme(dark).muted}">{small}</span>'
    return text, 18 * len(heads) + 17 * len(notes)


def _frame(
    fig,
    title: str,
    dark: bool | None,
    height: float,
    note: str = "",
    *,
    raw_note: bool = False,
    left: int = 48,
    right: int = 12,
    bottom: int = 44,
    lift: int = 0,
) -> None:
    """The common look; `height` is that of the plot itself, `lift` is room above it for tick labels, all in px.

    The title is an annotation that stands on the plot: plotly's own title moves with its number of lines.
    """
    look = theme(dark)
    text, tall = _title(title, dark, note, raw_note)
    top = tall + lift + 20
    fig.add_annotation(
        text=text,
        x=0,
        y=1,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="bottom",
        xshift=8 - left,
        yshift=6 + lift,
        align="left",
        showarrow=False,
        font={"size": TITLE, "color": look.ink},
    )
    fig.update_layout(
        template="none",
        autosize=True,
        height=round(height + top + bottom),
        margin={"l": left, "r": right, "t": top, "b": bottom},
        paper_bgcolor=NOTHING,
        plot_bgcolor=NOTHING,
        font={"family": FONT, "size": SIZE, "color": look.muted},
        showlegend=False,
        dragmode=False,
        hoverlabel={"bgcolor": "#1B1F24", "font": {"color": "#FFFFFF", "size": 13, "family": FONT}},
        modebar={"bgcolor": NOTHING, "color": look.muted, "activecolor": look.ink},
    )
    axis = {"gridcolor": look.grid, "zerolinecolor": look.muted, "linecolor": look.grid, "fixedrange": True}
    fig.update_xaxes(automargin=False, title_standoff=6, zeroline=False, **axis)
    fig.update_yaxes(automargin=False, title_standoff=4, zeroline=False, **axis)
