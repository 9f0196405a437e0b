"""The lab's figures and tables as files, for the Lab tab and for `lab table`.

Knows nothing about pages and options.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis import figures_mpl, lab, tables
from analysis.lab import Run, Summary
from model.errors import UserError

FIGURES = {
    "variants": "lab-variants",
    "along figure 3": "lab-axes",
    "acuity": "lab-acuity",
    "budget": "lab-budget",
    "recall": "lab-recall",
    "cost": "lab-cost",
}
KINDS = ("png", "svg", "csv")
TABLES = ("variants", "acuity", "recall")  # figures with a table of their own
FIRST = ("stack-2d", "none", "dummy", "string", "concat")  # what the paper's argument needs least
SHOWN = 5  # acuity curves that are drawn unasked


def shown_curves(found: Summary, curves: Sequence[str] | None) -> list[str]:
    """The variants whose acuity is drawn: those chosen, else the first of the paper's argument that were run."""
    there = [row.variant for row in found.rows if len(row.acuity.n)]
    kept = [variant for variant in curves or () if variant in there]
    return kept or ([v for v in FIRST if v in there] or there)[:SHOWN]


def axes_of(found: Summary) -> list[str]:
    """The axes of figure 3 along which something can be drawn."""
    return [axis for axis in lab.FIGURE_3 if len(found.along(axis)) > 1]


def drawable(found: Summary, curves) -> dict[str, bool]:
    """Whether these runs can fill each of FIGURES; curves: those of acuity that are drawn."""
    return {
        "variants": bool(found.pictures),
        "along figure 3": bool(axes_of(found)),
        "acuity": bool(curves),
        "budget": bool(lab.budgets(found)),
        "recall": any(row.recall for row in found.texts),
        "cost": bool(found.pictures),
    }


def taken(runs: Sequence[Run], found: Summary, what: str, kind: str, cost: str, curves: Sequence[str]) -> bytes:
    """The bytes of one figure (png, svg) or of its table (csv). UserError where the runs hold nothing to draw."""
    drawn = lab.curves(found, curves)
    if not drawable(found, drawn)[what]:
        raise UserError(f"These runs hold nothing to draw for “{what}”.")
    if kind == "csv":
        own = {"acuity": lambda: tables.acuity(drawn), "recall": lambda: lab.recall_table(found)}
        return own.get(what, lambda: lab.table(runs, found.metric, found.bench))().csv().encode()
    figure = {
        "variants": lambda: figures_mpl.lab_variants(found),
        "along figure 3": lambda: figures_mpl.lab_axes(found),
        "acuity": lambda: figures_mpl.acuity_curves(drawn),
        "budget": lambda: figures_mpl.lab_budget(found),
        "recall": lambda: figures_mpl.lab_recall(found),
        "cost": lambda: figures_mpl.lab_cost(found, cost),
    }[what]()
    return figures_mpl.png(figure) if kind == "png" else figures_mpl.svg(figure)


def files(runs: Sequence[Run], found: Summary, cost: str = "context") -> dict[str, bytes]:
    """Every figure that these runs can fill, PNG and SVG, and the tables: name -> bytes."""
    curves = shown_curves(found, None)
    full = drawable(found, curves)
    made = {}
    for what, name in FIGURES.items():
        for kind in KINDS:
            if full[what] and (kind != "csv" or what in TABLES):
                made[f"{name}.{kind}"] = taken(runs, found, what, kind, cost, curves)
    return made
