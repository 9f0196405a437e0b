"""Drawing decisions that both kinds of figure share: tick labels, scales, where a direct label goes, words.

Knows nothing about plotly or matplotlib.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from analysis.grids import GridMap
from analysis.lab import GROUPS, RANKINGS, SHORT_PARTS, Row, Summary, budgets
from model.lab.variants import SETS

CEILING = 0.995  # of recall: from here on variants that differ would still score the same
WIDE_BARS = 6  # bars in one chart that have room for two words between them
MAX_TICKS = 11  # layer labels on one axis, readable at 400 px
MAX_TOKENS = 24  # answer tokens in one bar chart
MAX_SIDE = 640  # pixels of a picture laid under a map


def layer_ticks(n_layers: int) -> tuple[list[int], list[str]]:
    """Tick places and labels for layers 0..L-1 and the final output ("out") at L."""
    step = max(1, int(np.ceil(n_layers / (MAX_TICKS - 1))))
    places = [layer for layer in range(0, n_layers, step) if layer == 0 or n_layers - layer >= step] + [n_layers]
    return places, [str(place) for place in places[:-1]] + ["out"]


def needs_log(values: Sequence[float] | np.ndarray) -> bool:
    """Whether positive values span so much (more than a factor of 30) that a linear axis would hide the small ones."""
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values) & (values > 0)]
    return bool(values.size) and bool(values.max() / values.min() > 30)


def span(values: Sequence[float] | np.ndarray, log: bool) -> tuple[float, float]:
    """(low, high) of an axis that starts at 0, or on a log axis a little below the smallest positive value."""
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    if log:
        positive = values[values > 0]
        return float(positive.min()) / 1.8, float(positive.max()) * 1.5
    high = float(values.max()) if values.size else 0.0
    low = min(0.0, float(values.min())) if values.size else 0.0
    return (low * 1.12, high * 1.12) if high > low else (low, low + 1.0)


def log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Ticks of a log axis with their labels in full: 1, 2, 5, 10, …; powers of ten alone where those would be many."""
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    steps = (1, 2, 5) if np.log10(high / low) < 2.5 else (1,)
    places = [step * 10.0**power for power in powers for step in steps]
    places = [place for place in places if low <= place <= high]
    return places, [f"{place:g}" for place in places]


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Label places in [0, 1] moved apart to at least `gap`, order and middle kept as far as they fit."""
    order = np.argsort(places, kind="stable")
    moved = np.array(places, dtype=np.float64)[order]
    for _ in range(100):
        close = np.diff(moved) < gap - 1e-9
        if not close.any():
            break
        for i in np.flatnonzero(close):
            middle = (moved[i] + moved[i + 1]) / 2
            moved[i], moved[i + 1] = middle - gap / 2, middle + gap / 2
    if moved.size:
        moved += max(0.0, -moved[0])
        moved -= max(0.0, moved[-1] - 1.0)
    out = np.empty_like(moved)
    out[order] = moved
    return out.tolist()


def around(values: Sequence[float]) -> tuple[float, float]:
    """(low, high) of an axis that shows these values and a little more, not necessarily zero."""
    low, high = (min(values), max(values)) if len(values) else (0.0, 1.0)
    more = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - more, high + more


def shares_of(values: Sequence[float], low: float, high: float, log: bool) -> list[float]:
    """Where values lie between the ends of an axis, 0 to 1."""
    if log:
        values, low, high = np.log10(values), np.log10(low), np.log10(high)
    return [float((value - low) / (high - low)) for value in values]


def room(across: Sequence[float], up: Sequence[float], wide: float = 0.4, tall: float = 0.065) -> dict[int, bool]:
    """Which points (places in [0, 1]) can carry a name of `wide` by `tall` beside them without lying on another's or
    leaving the plot; the value says whether the name goes to the left. Earlier points come first."""
    taken: list[tuple[float, float]] = []
    named = {}
    for i, (x, y) in enumerate(zip(across, up, strict=True)):
        for left, start in ((False, x), (True, x - wide)):
            free = all(abs(y - other) >= tall or abs(start - begin) >= wide for begin, other in taken)
            if free and 0 <= start <= 1 - wide:
                taken.append((start, y))
                named[i] = left
                break
    return named


def by_group(rows: Sequence[Row]) -> Iterator[tuple[str, list[int]]]:
    """(source whose colour it has, places) of the lab's variants, group by group; unknown groups share one colour."""
    for group in dict.fromkeys(row.group for row in rows):
        at = GROUPS.index(group) if group in GROUPS else len(GROUPS)
        yield str(at), [i for i, row in enumerate(rows) if row.group == group]


AXES_NOTE = "Dots: ours, left; a number: stacks that find a layer, of four. Diamonds: the paper's, right."


def fewer_stacks(axis: str, row: Row) -> str:
    """How many stacks of a variant find a layer, on the axes where that is fewer than it has; else ""."""
    return str(row.stacks) if axis in ("start", "interval") and row.stacks not in (None, SETS) else ""


# Of the rankings of a budget, in their order: the mark in plotly and in matplotlib, and its plural.
RANKED = (("circle", "o", "circles"), ("square", "s", "squares"), ("diamond", "D", "diamonds"))


def budget_note(found: Summary) -> str:
    """Which mark is which way to choose the rows."""
    said = [f"{RANKED[at][2]} {RANKINGS[ranking]}" for at, ranking in enumerate(budgets(found))]
    return f"Rows ranked: {', '.join(said)}. Ends: none, and every row every stack."


def _seeds(rows: Sequence[Row]) -> str:
    seeds = sorted({len(row.runs) for row in rows})
    return f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seed{'s' if seeds[0] > 1 else ''}"


def lab_note(found: Summary) -> str:
    """How many seeds and questions stand behind the lab's numbers."""
    dotted = "" if found.reference is None else f"; dotted: {found.reference.variant}"
    each = _seeds(found.pictures)
    return f"{found.setting}, {each}; bars: 95 %{dotted}. ✓ the paper's sign, ✗ the other, ? undecided."


def recall_note(found: Summary) -> str:
    """How many rows of context each variant of the group "text" takes, how many seeds there are, and which variants
    nothing here can tell apart, since they recall all."""
    rows = {row.variant: row.spent("context") for row in found.texts}
    taken = ", ".join(f"{of_text(name)} {count:.0f}" for name, count in rows.items() if count is not None)
    note = f"{found.setting}, {_seeds(found.texts)}; bars: 95 % of what is asked. {SHORT_PARTS}"
    all_of_it = [of_text(row.variant) for row in found.texts if row.mean.value >= CEILING]
    full = f" At the ceiling, so not told apart: {', '.join(all_of_it)}." if len(all_of_it) > 1 else ""
    return note + (f" Rows of context: {taken}." if taken else "") + full


def of_text(variant: str) -> str:
    """A variant of the group "text" as a short name: text-full is full."""
    return variant.removeprefix("text-")


def visible(text: str) -> str:
    """A token as a label: its outer spaces and line breaks made visible, never empty."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    body = shown.strip(" ")
    return "␣" * (len(shown) - len(shown.lstrip(" "))) + body if body else "␣" * max(1, len(shown))


def short(text: str, limit: int) -> str:
    """At most `limit` characters, cut with an ellipsis; white space made single spaces."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def lines(text: str, width: int) -> list[str]:
    """Text broken at words into lines of at most `width` characters; [] for none."""
    return textwrap.wrap(text, width)


def title(shown: GridMap) -> str:
    """Quantity and unit of a map."""
    return f"{shown.quantity}, {shown.unit}"


def number(value: float) -> str:
    """Three significant digits, no exponent for everyday sizes."""
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:,.0f}"


def underlay(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture under a map: RGB, no side over `MAX_SIDE`, at the aspect ratio of the original `size`."""
    scale = min(1.0, MAX_SIDE / max(size))
    target = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    return picture.convert("RGB").resize(target, Image.Resampling.LANCZOS)


def common_scale(maps: Sequence[GridMap], fixed: bool) -> tuple[float, float]:
    """One colour scale (low, high) for several maps."""
    lows, highs = zip(*(shown.scale(fixed) for shown in maps), strict=True)
    return min(lows), max(highs)
