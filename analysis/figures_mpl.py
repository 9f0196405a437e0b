"""Figures to take away (matplotlib): the charts of `figures`, same names and arguments, as PNG or SVG bytes.

Drawn without pyplot, so that nothing is shared between requests. Knows no models and no pages.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from analysis import marks
from analysis.attention import Flow, Look
from analysis.attribution import Attribution, CausalCheck
from analysis.evaluate import Acuity
from analysis.figures import shares
from analysis.grids import GridMap
from analysis.lab import (
    COSTS,
    FIGURE_3,
    PAPER,
    PAPER_BASELINE,
    PAPER_DEEPSTACK,
    RECALL_AXIS,
    Interval,
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
    source_name,
    text_colour,
    theme,
)
from analysis.subsets import SubsetRun
from analysis.sweep import Sweep

WIDTH = 6.4  # inches
DPI = 160
SIZE, TITLE = 9, 10.5  # points
_SAVING = threading.Lock()  # rcParams are global, and saving reads them
_DIVERGING = LinearSegmentedColormap.from_list("deepstack", DIVERGING)


def png(fig: Figure) -> bytes:
    """PNG bytes at 160 dots per inch."""
    return _saved(fig, format="png", dpi=DPI, metadata={"Software": None})


def svg(fig: Figure) -> bytes:
    """SVG bytes with text as text; the same figure gives the same bytes."""
    return _saved(fig, format="svg", metadata={"Date": None})


def _saved(fig: Figure, **how) -> bytes:
    out = io.BytesIO()
    with _SAVING, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "deepstack-lens"}):
        fig.savefig(out, facecolor=fig.get_facecolor(), **how)
    return out.getvalue()


def norms_by_layer(norms: LayerNorms, dark: bool = False) -> Figure:
    """Mean RMS of the residual stream at image rows (band: 10 to 90 % of them) and text rows, and of each injection."""
    fig, ax, look = _figure("Residual stream and injections, mean RMS", dark)
    layers = np.arange(norms.n_layers + 1)
    injected = list(norms.injected.values())
    log = marks.needs_log(np.concatenate([norms.residual_image, norms.residual_text, injected]))
    low, high = marks.span(np.concatenate([norms.residual_image_high, norms.residual_text, injected]), log)
    ends = []
    if np.isfinite(norms.residual_image).any():
        band = [np.maximum(edge, low) for edge in (norms.residual_image_low, norms.residual_image_high)]
        ax.fill_between(layers, *band, color=STACK_COLOURS[5], alpha=0.18, lw=0)
    for name, line, hue, dash in (
        ("image rows", norms.residual_image, colour("5", dark), "-"),
        ("text rows", norms.residual_text, look.muted, ":"),
    ):
        if np.isfinite(line).any():
            ax.plot(layers, line, dash, color=hue, lw=2)
            ends.append((name, float(line[-1]), hue))
    dense = norms.n_layers > 12
    for i, source in enumerate(norms.sources()):
        below = dense and i % 2 == 0
        for (name, layer), rms in norms.injected.items():
            if name == source:
                ax.plot([layer], [rms], "D", color=colour(source, dark), ms=6, clip_on=False, zorder=3)
                ax.annotate(
                    source,
                    (layer, rms),
                    xytext=(0, -7 if below else 6),
                    textcoords="offset points",
                    ha="center",
                    va="top" if below else "bottom",
                    color=text_colour(source, dark),
                    fontsize=SIZE,
                    fontweight="bold",
                )
    _value_axis(ax, "RMS", low, high, log)
    _layer_axis(ax, norms.n_layers)
    _end_labels(ax, ends, dark)
    return fig


def ratio_and_cosine(norms: LayerNorms, dark: bool = False) -> Figure:
    """Per layer with an injection: |injected| / |residual before| and their cosine, means over image rows."""
    fig, axes, look = _figure("Injected ÷ residual, and their cosine", dark, rows=2, height=3.6)
    layers = sorted({layer for _, layer in norms.injected})
    hues, names = [], []
    for layer in layers:
        here = [source for source, at in norms.injected if at == layer]
        hues.append(colour(here[0], dark) if len(here) == 1 else look.muted)
        names.append(f"{','.join(here)}@{layer}")
    for ax, values, what in ((axes[0], norms.ratio, "÷ residual"), (axes[1], norms.cosine, "cosine")):
        for i, (value, hue) in enumerate(zip(values[layers], hues, strict=True)):
            if np.isfinite(value):
                ax.bar(i, value, color=hue, width=0.7)
                ax.annotate(
                    marks.number(value),
                    (i, value),
                    xytext=(0, 2 if value >= 0 else -2),
                    textcoords="offset points",
                    ha="center",
                    va="bottom" if value >= 0 else "top",
                    fontsize=SIZE - 1,
                    color=look.ink,
                )
            else:
                narrow = len(names) > marks.WIDE_BARS
                text, turn = ("no residual", 90) if narrow else ("no residual\nbefore it", 0)
                ax.text(i, 0, text, rotation=turn, ha="center", va="bottom", fontsize=SIZE - 2, color=look.muted)
        ax.set_ylabel(what)
        ax.axhline(0, color=look.muted, lw=0.8)
        ax.set_xlim(-0.6, len(layers) - 0.4)
    axes[0].set_ylim(0, marks.span(norms.ratio[layers], False)[1] * 1.1)
    axes[1].set_ylim(-1.3, 1.3)
    axes[0].set_xticks(range(len(layers)), [""] * len(layers))
    axes[1].set_xticks(range(len(layers)), names)
    axes[1].set_xlabel("source@layer")
    return fig


def image_map(
    shown: GridMap,
    picture: Image.Image | None = None,
    *,
    opacity: float = 0.65,
    fixed: bool = True,
    dark: bool = False,
    outlined: Sequence[tuple[int, int]] = (),
) -> Figure:
    """A map over its image at the true aspect ratio. `fixed`: the scale of all layers, else of this view alone."""
    width, height = shown.size
    inches = min(max(4.6 * height / width, 1.2), 7.0)
    across = min(max(inches * width / height, 3.2), 1.5 * WIDTH)  # room for the title, and no banner
    fig, ax, _ = _figure(marks.title(shown), dark, height=inches, width=across, note=shown.note)
    drawn = _draw_map(ax, shown, picture, opacity, *shown.scale(fixed))
    rows, columns = shown.values.shape
    for row, column in outlined:
        corner = (column * width / columns, row * height / rows)
        ax.add_patch(Rectangle(corner, width / columns, height / rows, fill=False, ec=STACK_COLOURS[1], lw=1.5, ls=":"))
    _colour_bar(fig, drawn, ax, dark)
    return fig


def attention_map(
    look: Look,
    picture: Image.Image | None = None,
    *,
    opacity: float = 0.65,
    fixed: bool = True,
    dark: bool = False,
) -> Figure:
    """`image_map` of a look, with where the rest of the attention went, sinks outlined."""
    shown = replace(look.map, note=f"{shares(look)} {look.map.note}")
    return image_map(shown, picture, opacity=opacity, fixed=fixed, dark=dark, outlined=look.sinks)


def map_row(
    maps: Mapping[str, GridMap],
    picture: Image.Image | None = None,
    *,
    title: str,
    opacity: float = 0.65,
    fixed: bool = True,
    dark: bool = False,
) -> Figure:
    """Several maps of one image side by side under one colour scale; keys are sources or other labels."""
    first = next(iter(maps.values()))
    columns = min(len(maps), 4)
    rows = math.ceil(len(maps) / columns)
    width = 1.25 * WIDTH
    each = min(width / columns * first.size[1] / first.size[0], 5.0)
    fig, axes, look = _figure(title, dark, rows=rows, columns=columns, height=rows * (each + 0.2), width=width)
    axes = list(np.atleast_1d(axes).ravel())
    for spare in axes[len(maps) :]:
        spare.remove()
    axes = axes[: len(maps)]
    low, high = marks.common_scale(list(maps.values()), fixed)
    for ax, (label, shown) in zip(axes, maps.items(), strict=True):
        drawn = _draw_map(ax, shown, picture, opacity, low, high)
        hue = label_colour(label, dark)
        ax.set_title(_plain(source_name(label)), fontsize=SIZE, fontweight="bold", color=hue, loc="left", pad=3)
    _colour_bar(fig, drawn, axes, dark)
    return fig


def attention_by_layer(flow: Flow, n_layers: int, dark: bool = False) -> Figure:
    """Share of attention on image (band: lowest to highest head), sinks, first token and other text, by layer."""
    fig, ax, look = _figure("Attention of answer rows by layer, %", dark)
    layers = list(flow.layers)
    ax.fill_between(layers, 100 * flow.image_low, 100 * flow.image_high, color=STACK_COLOURS[5], alpha=0.2, lw=0)
    ends = []
    for name, values, hue, dash, width in (
        ("image", flow.image, colour("5", dark), "-", 2.5),
        ("image sinks", flow.sinks, colour("1", dark), ":", 1.8),
        ("first token", flow.first, colour("3", dark), "--", 1.8),
        ("other text", flow.text, look.muted, "-", 1.8),
    ):
        ax.plot(layers, 100 * values, dash, color=hue, lw=width, marker="o" if len(layers) == 1 else None)
        ends.append((name, float(100 * values[-1]), hue))
    _value_axis(ax, "share of attention, %", 0, 104, False)
    _layer_axis(ax, n_layers, output=False)
    _end_labels(ax, ends, dark)
    return fig


def effect_heatmap(effect: Effect, dark: bool = False) -> Figure:
    """Sources x layers: how far the stream at the image rows moves when one source is switched off. Ring: its entry."""
    entries = [(e.layer, effect.sources.index(e.source)) for e in effect.plan if not e.in_tower]
    note = "‖h on − h off‖ ÷ ‖h on‖ at image rows. Ring: where it enters."
    if not entries:
        note = "The plan is none: there is nothing to switch off."
    rows, columns = effect.values.shape
    fig, ax, look = _figure("Effect of each source, relative change", dark, height=0.32 * rows + 0.4, note=note)
    high = float(effect.values.max()) if effect.values.size else 0.0
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    drawn = ax.pcolormesh(
        *edges, effect.values, cmap=SEQUENTIAL, vmin=0, vmax=high or 1.0, edgecolors=fig.get_facecolor(), lw=1.2
    )
    for layer, row in entries:
        ax.plot([layer], [row], "o", mfc="none", mec="white", mew=1.6, ms=7)
    _layer_axis(ax, columns - 1)
    ax.set_ylim(rows - 0.5, -0.5)
    ax.set_xlim(-0.5, columns - 0.5)
    ax.grid(False)
    ax.set_yticks(range(rows), effect.sources)
    for label, source in zip(ax.get_yticklabels(), effect.sources, strict=True):
        label.set_color(text_colour(source, dark) if source in effect.plan.sources() else look.muted)
        label.set_fontweight("bold")
    _colour_bar(fig, drawn, ax, dark)
    return fig


def shapley_bars(run: SubsetRun, dark: bool = False, first: int = marks.MAX_TOKENS) -> Figure:
    """Per token of the target, what each stack adds to its log-probability (nats)."""
    count = min(len(run.tokens), first)
    cut = f"First {count} of {len(run.tokens)} tokens." if count < len(run.tokens) else ""
    fig, ax, look = _figure("What each stack adds to each token, nats", dark, note=cut)
    k = len(run.stacks)
    for i, stack in enumerate(run.stacks):
        places = np.arange(count) + (i - (k - 1) / 2) * 0.8 / k
        ax.bar(places, run.shapley[i, :count], width=0.8 / k, color=colour(stack, dark))
    for i, stack in enumerate(run.stacks):
        ax.text(
            0.01 + 0.13 * i,
            1.01,
            source_name(stack),
            transform=ax.transAxes,
            color=text_colour(stack, dark),
            fontsize=SIZE,
            fontweight="bold",
            va="bottom",
        )
    ax.axhline(0, color=look.muted, lw=0.8)
    names = [_plain(marks.short(marks.visible(token), 10)) for token in run.tokens[:count]]
    ax.set_xticks(range(count), names, fontsize=SIZE + 2 if count <= 12 else SIZE, rotation=0 if count <= 12 else 60)
    ax.grid(False, axis="x")
    ax.set_ylabel("nats")
    return fig


def subset_strip(run: SubsetRun, dark: bool = False) -> Figure:
    """Every on/off state of the stacks: its answer, and the target's probability per token."""
    rows, k = list(run.rows), len(run.stacks)
    note = f"Bars: probability per token of “{marks.short(run.target, 24)}”"
    height = 0.21 * len(rows) + 0.3
    fig, (left, right), look = _figure(
        "Answers under every subset of the stacks", dark, columns=2, height=height, note=note, ratios=(0.62, 0.38)
    )
    for y, row in enumerate(rows):
        for i, stack in enumerate(run.stacks):
            on = stack in row.on
            hue = colour(stack, dark) if on else look.muted
            left.plot([i], [y], "o", ms=6.5, mfc=hue if on else "none", mec=hue, alpha=1 if on else 0.5)
        said = marks.short(row.answer.text, 26) or "(nothing)"
        left.text(k - 0.3, y, _plain(("✓ " if row.match else "") + said), va="center", family="DejaVu Sans Mono")
        right.barh(
            y,
            math.exp(row.logprob / max(1, len(run.tokens))),
            color=STACK_COLOURS[2] if row.match else look.muted,
            alpha=0.8,
            height=0.75,
        )
    for text in left.texts:
        text.set(color=look.ink, fontsize=SIZE)
    for ax in (left, right):
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_yticks([])
    left.grid(False)
    left.set_xlim(-0.6, k + 10)
    left.set_xticks(range(k), run.stacks)
    left.xaxis.tick_top()
    for label, stack in zip(left.get_xticklabels(), run.stacks, strict=True):
        label.set(color=text_colour(stack, dark), fontweight="bold")
    for spine in left.spines.values():
        spine.set_visible(False)
    right.set_xlim(0, 1)
    right.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    return fig


def attribution_map(
    found: Attribution,
    source: str | None = None,
    picture: Image.Image | None = None,
    *,
    image: int = 0,
    opacity: float = 0.7,
    fixed: bool = True,
    dark: bool = False,
) -> Figure:
    """One source's share of the answer's log-probability on the image, or all sources together."""
    return image_map(found.map(source, image), picture, opacity=opacity, fixed=fixed, dark=dark)


def attribution_by_source(found: Attribution, dark: bool = False) -> Figure:
    """The sums over all image rows, one bar per source (nats)."""
    sums = found.by_source()
    note = f"From {marks.number(found.off)} (withheld) to {marks.number(found.on)} (as it is)."
    if found.delta is not None:
        note += f" Remainder {found.delta:+.2g}."
    title = f"{found.method.capitalize()} by source, nats"
    fig, ax, look = _figure(title, dark, height=0.34 * len(sums) + 0.4, note=note)
    low, high = min(0.0, *sums.values()), max(0.0, *sums.values())
    room = 0.2 * ((high - low) or 1.0)
    for y, (source, value) in enumerate(sums.items()):
        ax.barh(y, value, color=colour(source, dark), height=0.7)
        ax.annotate(
            f"{value:+.3g}",
            (value, y),
            xytext=(4 if value >= 0 else -4, 0),
            textcoords="offset points",
            ha="left" if value >= 0 else "right",
            va="center",
            fontsize=SIZE,
            color=look.ink,
        )
    ax.axvline(0, color=look.muted, lw=0.8)
    ax.set_yticks(range(len(sums)), [source_name(source) for source in sums])
    ax.set_ylim(len(sums) - 0.4, -0.6)
    ax.set_xlim(low - room * (low < 0), high + room * (high > 0))
    ax.set_xlabel("nats")
    return fig


def causal_strip(check: CausalCheck, dark: bool = False) -> Figure:
    """Loss without the marked patches, among the losses without as many random ones (nats)."""
    draws = len(check.random)
    note = f"The marked patches cost more than {check.beats:.0%} of {draws} random draws."
    fig, ax, look = _figure(f"Loss without {check.k} patches, nats", dark, height=1.1, note=note)
    ax.plot(check.random, [0.16 * ((i * 7) % 5 - 2) for i in range(draws)], "o", color=look.muted, alpha=0.6, ms=6)
    ax.plot([check.marked], [0], "D", color=STACK_COLOURS[1], ms=9)
    hue = text_colour("1", dark)
    ax.annotate("marked", (check.marked, 0), xytext=(0, 8), textcoords="offset points", ha="center", color=hue)
    ax.set_ylim(-0.8, 1.0)
    ax.set_yticks([])
    ax.set_xlabel("nats lost")
    return fig


def acuity_curves(curves: Mapping[str, Acuity], dark: bool = False) -> Figure:
    """Exact match by glyph height with 95 % intervals, one line per model."""
    fig, ax, _ = _figure("Texts read exactly, % by glyph height", dark)
    ends = []
    for i, (label, curve) in enumerate(curves.items()):
        hue = colour(str(i), dark)
        error = 100 * np.stack([curve.exact - curve.low, curve.high - curve.exact])
        ax.errorbar(
            curve.glyph_px,
            100 * curve.exact,
            yerr=np.maximum(error, 0),
            color=hue,
            marker="osD^vP*X"[i % 8],
            ms=5,
            lw=2,
            elinewidth=1,
            capsize=3,
        )
        if len(curve.exact):
            ends.append((label, float(100 * curve.exact[-1]), hue))
    _value_axis(ax, "exact match, %", 0, 104, False)
    ax.set_xlabel("glyph height in the high-resolution view, px")
    _end_labels(ax, ends, dark)
    return fig


def sweep_curve(swept: Sweep, dark: bool = False) -> Figure:
    """Exact match by the value of a sweep, one line per kind of question with 95 % intervals; a ring marks the plan
    that the model was trained with."""
    fig, ax, _ = _figure(f"Exact answers, % by {swept.title}", dark)
    ends = []
    kinds = dict.fromkeys(kind for point in swept.points for kind in point.exact)
    for i, kind in enumerate(kinds):
        hue = colour(str(i), dark)
        points = [point for point in swept.points if kind in point.exact]
        x = np.array([point.value for point in points])
        y, low, high = (100 * np.array([point.exact[kind][end] for point in points]) for end in range(3))
        error = np.maximum([y - low, high - y], 0)
        ax.errorbar(x, y, yerr=error, color=hue, marker="os"[i % 2], lw=2, elinewidth=1, capsize=3)
        trained = [n for n, point in enumerate(points) if point.state == "trained"]
        ax.scatter(x[trained], y[trained], s=140, facecolors="none", edgecolors=hue, linewidths=1.5)
        ends.append((kind, float(y[-1]), hue))
    _value_axis(ax, "exact match, %", 0, 104, False)
    ax.set_xticks([point.value for point in swept.points], [point.label for point in swept.points])
    ax.set_xlabel(f"{swept.unit} (ring: as trained, all others are ablated; bars: 95 %)")
    _end_labels(ax, ends, dark)
    return fig


def lab_variants(found: Summary, dark: bool = False) -> Figure:
    """One row per variant: ours with 95 % intervals on the left, the paper's on its own scale on the right; lines mark
    the reference. ✓ the same sign, ✗ the other one, ? undecided."""
    rows = list(found.pictures)
    title = f"{found.words.capitalize()}, %, beside the paper's {found.bench}"
    fig, (left, right), look = _figure(
        title, dark, columns=2, height=0.2 * len(rows) + 0.4, note=marks.lab_note(found), ratios=(0.6, 0.4)
    )
    for source, places in marks.by_group(rows):
        means = [rows[i].mean for i in places]
        left.errorbar(
            [100 * mean.value for mean in means], places, xerr=_arms(means), fmt="o", ms=5, capsize=2, lw=0,
            color=colour(source, dark), elinewidth=1.2,
        )  # fmt: skip
    for i, row in enumerate(rows):
        paper, verdict = PAPER.get(row.variant), found.judge(row)
        if paper is not None and paper.scores:
            right.plot([paper.scores[found.bench]], [i], "D", ms=5, color=look.muted)
        if verdict.mark != "–":
            where = right.get_yaxis_transform()
            right.text(1.02, i, verdict.mark, transform=where, va="center", color=look.ink, fontsize=SIZE + 1)
    if found.reference is not None:
        left.axvline(100 * found.reference.mean.value, color=look.muted, lw=0.8, ls=":")
    right.axvline(PAPER_DEEPSTACK[found.bench], color=look.muted, lw=0.8, ls=":")
    for ax in (left, right):
        ax.set_ylim(len(rows) - 0.5, -0.5)
    left.set_yticks(range(len(rows)), [_plain(row.variant) for row in rows])
    right.set_yticks(range(len(rows)), [""] * len(rows))
    left.set_xlabel("ours, %")
    right.set_xlabel(f"paper's {found.bench}")
    return fig


def lab_axes(found: Summary, dark: bool = False) -> Figure:
    """Along the axes of FIGURE_3: ours (dots, left scale) and what the paper prints (diamonds, right). A number beside
    a dot: the stacks that find a layer, where others do not."""
    drawn = {axis: points for axis in FIGURE_3 if len(points := found.along(axis)) > 1}
    count = max(1, len(drawn))
    title = f"{found.words.capitalize()}, along figure 3 and table 4"
    fig, axes, look = _figure(title, dark, rows=count, height=1.9 * count, note=marks.AXES_NOTE)
    for ax, (axis, points) in zip(np.atleast_1d(axes), drawn.items(), strict=False):
        of, means = FIGURE_3[axis], [row.mean for _, row in points]
        hue = colour("0", dark)
        shares_ = [100 * mean.value for mean in means]
        ax.errorbar(
            [value for value, _ in points], shares_, yerr=_arms(means), color=hue, marker="o", lw=1.8, capsize=3
        )
        for (value, row), share in zip(points, shares_, strict=True):
            ax.annotate(
                marks.fewer_stacks(axis, row), (value, share), textcoords="offset points", xytext=(6, 0), va="center",
                color=look.muted, fontsize=8,
            )  # fmt: skip
        _value_axis(ax, "ours, %", *marks.around([v for m in means for v in (100 * m.low, 100 * m.high)]), False)
        other = ax.twinx()
        _style(other, look)
        other.grid(False)
        other.spines["right"].set_visible(True)
        other.plot(list(of.paper), [s[found.bench] for s in of.paper.values()], "D", mfc="none", mec=look.muted, ms=7)
        other.set_ylim(marks.around([PAPER_BASELINE[found.bench], *(s[found.bench] for s in of.paper.values())]))
        other.set_ylabel(f"the paper's {found.bench}")
        ax.locator_params(axis="x", integer=True)
        ax.set_xlabel(f"{of.title.lower()} ({of.unit})")
    return fig


def lab_budget(found: Summary, dark: bool = False) -> Figure:
    """Accuracy with 95 % intervals against the share of stack rows that enter, one line per ranking of the rows."""
    title = f"{found.words.capitalize()}, %, by budget"
    fig, ax, _ = _figure(title, dark, note=marks.budget_note(found))
    ends = []
    for at, points in enumerate(budgets(found).values()):
        means = [row.mean for _, row in points]
        ends += [100 * end for mean in means for end in (mean.low, mean.high)]
        ax.errorbar(
            [100 * share for share, _ in points], [100 * mean.value for mean in means], yerr=_arms(means),
            color=colour(str(at), dark), marker=marks.RANKED[at][1], lw=1.8, capsize=3,
        )  # fmt: skip
    _value_axis(ax, "ours, %", *marks.around(ends), False)
    ax.set_xlim(-3, 103)
    ax.set_xlabel("stack rows that enter, %")
    return fig


def lab_cost(found: Summary, cost: str = "context", dark: bool = False) -> Figure:
    """Accuracy with 95 % intervals against one measured cost, coloured by group."""
    rows = [row for row in found.pictures if row.spent(cost) is not None]
    spent = [row.spent(cost) for row in rows]
    log = marks.needs_log(spent)
    low, high = marks.span(spent, True) if log else marks.around(spent)
    bottom, top = marks.around([100 * end for row in rows for end in (row.mean.low, row.mean.high)])
    up = [(100 * row.mean.value - bottom) / (top - bottom) for row in rows]
    named = marks.room(marks.shares_of(spent, low, high, log), up, wide=0.24)
    note = "" if len(named) == len(rows) else "Names that would lie on others are left out; the table has them."
    fig, ax, _ = _figure(f"{found.words.capitalize()}, %, by {COSTS[cost].words}", dark, note=note)
    for source, places in marks.by_group(rows):
        hue, means = colour(source, dark), [rows[i].mean for i in places]
        ax.errorbar(
            [spent[i] for i in places], [100 * mean.value for mean in means], yerr=_arms(means), fmt="o", ms=5,
            color=hue, capsize=2, lw=0, elinewidth=1.2,
        )  # fmt: skip
        for i in places:
            if i in named:
                ax.annotate(
                    _plain(rows[i].variant), (spent[i], 100 * rows[i].mean.value), textcoords="offset points",
                    xytext=(-7 if named[i] else 7, 0), ha="right" if named[i] else "left", va="center",
                    fontsize=SIZE, color=for_words(hue, dark),
                )  # fmt: skip
    _value_axis(ax, "ours, %", bottom, top, False)
    if log:
        ax.set_xscale("log")
        ax.set_xticks(*marks.log_ticks(low, high))
        ax.set_xticks([], minor=True)
    ax.set_xlim(low, high)
    ax.set_xlabel(f"{COSTS[cost].words}, {COSTS[cost].unit}{', log scale' if log else ''}")
    return fig


def lab_recall(found: Summary, dark: bool = False) -> Figure:
    """Facts recalled by where in the text they stand, with 95 % intervals, one line per variant of the group "text"."""
    fig, ax, _ = _figure("Facts recalled exactly, %, by place in the text", dark, note=marks.recall_note(found))
    ends = []
    for at, row in enumerate(found.texts):
        means = row.recall
        if not means:
            continue
        hue, shares_ = colour(str(at), dark), [100 * mean.value for mean in means.values()]
        ax.errorbar(
            [*means], shares_, yerr=_arms([*means.values()]), color=hue, marker="osD^vP*X"[at % 8], lw=1.8, capsize=3
        )
        ends.append((marks.of_text(row.variant), shares_[-1], hue))
    _value_axis(ax, "recalled, %", 0, 104, False)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel(RECALL_AXIS)
    _end_labels(ax, ends, dark)
    return fig


def _arms(means: Sequence[Interval]) -> np.ndarray:
    """[2, n] lengths of error bars in points, down and up."""
    arms = np.array([[mean.value - mean.low, mean.high - mean.value] for mean in means]).T
    return 100 * np.maximum(arms, 0)


def loss_curve(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], dark: bool = False) -> Figure:
    """Training loss by step; curves: label -> (steps, loss)."""
    fig, ax, _ = _figure("Training loss, nats per token", dark)
    every = np.concatenate([np.asarray(loss, dtype=np.float64) for _, loss in curves.values()])
    log = marks.needs_log(every)
    ends = []
    for i, (label, (steps, loss)) in enumerate(curves.items()):
        ax.plot(steps, loss, color=colour(str(i), dark), lw=1.6)
        ends.append((label, float(loss[-1]), colour(str(i), dark)))
    _value_axis(ax, "loss", *marks.span(every, log), log)
    ax.set_xlabel("step")
    _end_labels(ax, ends, dark)
    return fig


def _plain(text: str) -> str:
    """Text that matplotlib must not read as mathematics."""
    return text.replace("$", r"\$")


def _figure(
    title: str,
    dark: bool,
    *,
    rows: int = 1,
    columns: int = 1,
    height: float = 2.9,
    width: float = WIDTH,
    note: str = "",
    ratios: tuple[float, ...] | None = None,
):
    """(figure, axes, theme) in the common look; height and width are those of the plot itself, in inches."""
    look = theme(dark)
    fig = Figure(figsize=(width, height), layout="constrained", facecolor=look.surface)
    FigureCanvasAgg(fig)
    axes = fig.subplots(rows, columns, width_ratios=ratios)
    limit = max(36, int(width * 11))
    heads, notes = marks.lines(title, limit), marks.lines(note, int(limit * 1.2))
    above = 0.18 + 0.19 * len(heads) + 0.165 * len(notes)  # inches over the plot
    tall = height + above + 0.35
    fig.set_size_inches(width, tall)
    fig.get_layout_engine().set(rect=(0, 0, 1, 1 - above / tall), w_pad=0.1, h_pad=0.06)
    for i, line in enumerate(heads):
        y = 1 - (0.09 + 0.19 * i) / tall
        fig.text(0.1 / width, y, _plain(line), fontsize=TITLE, fontweight="bold", color=look.ink, va="top")
    for i, line in enumerate(notes):
        y = 1 - (0.11 + 0.19 * len(heads) + 0.165 * i) / tall
        fig.text(0.1 / width, y, _plain(line), fontsize=SIZE, color=look.muted, va="top")
    for ax in np.atleast_1d(axes).ravel():
        _style(ax, look)
    return fig, axes, look


def _style(ax, look) -> None:
    ax.set_facecolor("none")
    ax.tick_params(colors=look.muted, labelsize=SIZE, length=3)
    ax.xaxis.label.set(color=look.muted, fontsize=SIZE)
    ax.yaxis.label.set(color=look.muted, fontsize=SIZE)
    ax.grid(True, color=look.muted, alpha=0.2, lw=0.7)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(look.muted)
        spine.set_alpha(0.5)


def _draw_map(ax, shown: GridMap, picture: Image.Image | None, opacity: float, low: float, high: float):
    """The picture and the map over it, in pixels of the original image; returns what a colour bar needs."""
    width, height = shown.size
    extent = (0, width, height, 0)
    if picture is not None:
        ax.imshow(np.asarray(marks.underlay(picture, shown.size)), extent=extent, interpolation="lanczos")
    values = np.ma.masked_invalid(shown.values)
    colours, alpha = _DIVERGING if shown.diverging else SEQUENTIAL, 1.0 if picture is None else opacity
    if picture is not None and shown.diverging:  # clear at zero, so that the picture shows
        stops = [(place, (*to_rgb(hue), share * opacity)) for place, hue, share in diverging_with_alpha()]
        colours, alpha = LinearSegmentedColormap.from_list("over a picture", stops), None
    drawn = ax.imshow(
        values,
        extent=extent,
        cmap=colours,
        vmin=low,
        vmax=high,
        alpha=alpha,
        interpolation="nearest",
    )
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    ax.set_axis_off()
    return drawn


def _colour_bar(fig: Figure, drawn, axes, dark: bool) -> None:
    look = theme(dark)
    bar = fig.colorbar(drawn, ax=axes, orientation="horizontal", fraction=0.05, pad=0.03, aspect=45)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=look.muted, labelsize=SIZE - 1, length=2)
    if drawn.get_alpha() is not None:
        bar.solids.set(alpha=1.0, rasterized=False, edgecolor="face")


def _value_axis(ax, name: str, low: float, high: float, log: bool) -> None:
    if log:
        ax.set_yscale("log")
        places, labels = marks.log_ticks(low, high)
        ax.set_yticks(places, labels)
        ax.set_yticks([], minor=True)
    ax.set_ylim(low, high)
    ax.set_ylabel(f"{name}, log scale" if log else name)


def _layer_axis(ax, n_layers: int, output: bool = True) -> None:
    places, labels = marks.layer_ticks(n_layers)
    if not output:
        places, labels = places[:-1], labels[:-1]
    ax.set_xticks(places, labels)
    ax.set_xlim(-0.5, n_layers + 0.2 if output else n_layers - 0.8)
    ax.set_xlabel("LLM layer (out: final output)" if output else "LLM layer")


def _end_labels(ax, ends: list[tuple[str, float, str]], dark: bool) -> None:
    """Names at the right end of their lines, moved apart where they would overlap."""
    ends = [end for end in ends if math.isfinite(end[1])]
    shares_ = [ax.transAxes.inverted().transform(ax.transData.transform((0, value)))[1] for _, value, _ in ends]
    for (name, _, hue), y in zip(ends, marks.spread(shares_, 0.07), strict=True):
        ax.text(
            1.01,
            y,
            _plain(marks.short(name, 24)),
            transform=ax.transAxes,
            color=for_words(hue, dark),
            fontsize=SIZE,
            fontweight="bold",
            va="center",
        )
