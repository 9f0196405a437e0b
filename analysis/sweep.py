"""Sweeps: how a model scores along one way of changing its plan, as in figure 3 of the DeepStack paper.

The model stays as it was trained: every plan but its own is ablated, so a sweep shows what the trained weights bear,
not what another plan would have taught. Knows nothing about pages; scores are given (`analysis.evaluate`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from analysis.compare import plan_badge
from analysis.evaluate import wilson
from model.errors import UserError
from model.layout import Layout
from model.plan import BASE, Entry, Plan

GAINS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
LONGEST_INTERVAL = 4  # layers, the paper's figure 3
CAUTION = (
    "Every plan but the trained one is ablated: this shows what the trained weights bear, not what a model trained "
    "with that plan would do."
)


@dataclass(frozen=True)
class Axis:
    """One way of changing a plan."""

    words: str  # for --help
    unit: str  # of the values, for the axis of a figure
    plans: Callable[[Layout], dict[float, Plan]]


@dataclass(frozen=True)
class Point:
    """One plan of a sweep. exact: kind -> (share of exact answers, lower, upper end of its 95 % interval)."""

    value: float
    plan: Plan
    state: str  # "trained" | "ablated"
    exact: dict[str, tuple[float, float, float]]
    result: dict  # of analysis.evaluate

    @property
    def label(self) -> str:
        return f"{self.value:g}"


@dataclass(frozen=True)
class Sweep:
    axis: str
    unit: str
    points: tuple[Point, ...]

    @property
    def title(self) -> str:
        return f"{self.axis}: {AXES[self.axis].words}"

    def to_json(self) -> dict:
        """Plain values: axis, unit, points [{value, plan, state, exact_match, cer, by_kind}]."""
        kept = ("n", "exact_match", "cer", "by_kind", "fine_by_glyph_px")
        points = [
            {"value": p.value, "plan": str(p.plan), "state": p.state} | {key: p.result[key] for key in kept}
            for p in self.points
        ]
        return {"axis": self.axis, "unit": self.unit, "points": points}


def _stacks(layout: Layout) -> list[Entry]:
    return [entry for entry in layout.default if entry.source != BASE]


def _rest(layout: Layout) -> list[Entry]:
    return [entry for entry in layout.default if entry.source == BASE]


def _layers(layout: Layout) -> int:
    """How many layers the stacks can enter before."""
    return min(layout.layers_of(entry.source) for entry in _stacks(layout))


def _start(layout: Layout) -> dict[float, Plan]:
    stacks, rest = _stacks(layout), _rest(layout)
    first, last = min(e.layer for e in stacks), max(e.layer for e in stacks)
    return {
        float(start): Plan([*rest, *(e._replace(layer=e.layer - first + start) for e in stacks)])
        for start in range(_layers(layout) - (last - first))
    }


def _interval(layout: Layout) -> dict[float, Plan]:
    stacks, rest = sorted(_stacks(layout), key=lambda e: e.layer), _rest(layout)
    first = stacks[0].layer
    return {
        float(step): Plan([*rest, *(e._replace(layer=first + step * i) for i, e in enumerate(stacks))])
        for step in range(LONGEST_INTERVAL + 1)
        if first + step * (len(stacks) - 1) < _layers(layout)
    }


def _count(layout: Layout) -> dict[float, Plan]:
    stacks, rest = sorted(_stacks(layout), key=lambda e: e.layer), _rest(layout)
    return {float(count): Plan([*rest, *stacks[:count]]) for count in range(len(stacks) + 1)}


def _gain(layout: Layout) -> dict[float, Plan]:
    stacks, rest = _stacks(layout), _rest(layout)
    return {gain: Plan([*rest, *(e._replace(gain=e.gain * gain) for e in stacks if gain)]) for gain in GAINS}


def _base(layout: Layout) -> dict[float, Plan]:
    if not _rest(layout):
        raise UserError("This model has no base to move: all its visual rows are stacks.")
    return {
        float(layer): Plan([*_stacks(layout), *(e._replace(layer=layer) for e in _rest(layout))])
        for layer in range(layout.n_layers)
    }


def _alone(layout: Layout) -> dict[float, Plan]:
    stacks = _stacks(layout)
    return {float(i): Plan([*_rest(layout), e]) for i, e in enumerate(stacks)}


def _without(layout: Layout) -> dict[float, Plan]:
    return {float(i): layout.default.without(e.source) for i, e in enumerate(_stacks(layout))}


AXES = {
    "start": Axis("the layer of the first stack, the others keep their distance", "layer", _start),
    "interval": Axis("layers from one stack to the next (0: all before one layer)", "layers", _interval),
    "count": Axis("how many stacks, the earliest first", "stacks", _count),
    "gain": Axis("the gain of all stacks", "gain", _gain),
    "base": Axis("the layer of the base, zeros at the input", "LLM layer", _base),
    "alone": Axis("each stack alone", "stack", _alone),
    "without": Axis("each stack left out", "stack", _without),
}


def plans_along(layout: Layout, over: str) -> dict[float, Plan]:
    """The plans of an axis by value, ascending. UserError for an unknown axis or a model with nothing to change."""
    if over not in AXES:
        raise UserError(f"There is no axis {over!r}; there are {', '.join(AXES)}.")
    if over != "base" and not _stacks(layout):
        raise UserError(f"This model has no stacks, so there is nothing to sweep over {over}; --over base works.")
    return AXES[over].plans(layout)


def collect(layout: Layout, over: str, points: Mapping[float, Plan], found: Mapping[Plan, dict]) -> Sweep:
    """A sweep from the results of its plans (`evaluate_many`)."""
    made = []
    for value, plan in points.items():
        result = found[plan]
        exact = {
            kind: (scores["exact_match"], *wilson(round(scores["exact_match"] * scores["n"]), scores["n"]))
            for kind, scores in result["by_kind"].items()
        }
        made.append(Point(value, plan, plan_badge(layout, plan)[0], exact, result))
    return Sweep(over, AXES[over].unit, tuple(made))
