"""The command `sweep`: one model's scores along one way of changing its plan, or several.

What the axes are: `analysis.sweep`. Knows nothing about how scenes are made.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from analysis import figures_mpl, tables
from analysis.sweep import CAUTION, Point, Sweep, collect, plans_along
from app.commands import introduce, load_from, read_scenes, score
from app.limits import limits_from
from app.output import Outcome, table, write_files
from model.types import Sampling


def run(options: argparse.Namespace) -> Outcome:
    """Every question under every plan of the axes; each plan once, all plans of a question in one batch."""
    limits = limits_from(options)
    folder, records = read_scenes(options.scenes, options.limit)
    engine = load_from(options.model, options)
    axes = {over: plans_along(engine.layout, over) for over in dict.fromkeys(options.over)}
    plans = list(dict.fromkeys(plan for points in axes.values() for plan in points.values()))
    found = dict(zip(plans, score(engine, records, plans, folder, limits, Sampling()), strict=True))
    introduce(engine)
    sweeps = [collect(engine.layout, over, points, found) for over, points in axes.items()]
    text = "\n\n".join([*map(_in_words, sweeps), CAUTION])
    if options.out:
        text += f"\n\n{len(write_files(options.out, _files(sweeps)))} files are in {options.out}"
    data = {"model": engine.name, "questions": len(records), "sweeps": [swept.to_json() for swept in sweeps]}
    return Outcome(data, text)


def _in_words(swept: Sweep) -> str:
    kinds = [kind for kind in ("fine", "coarse") if any(kind in point.exact for point in swept.points)]
    rows = [[p.label, p.state, *(_share(p, kind) for kind in kinds), str(p.plan)] for p in swept.points]
    return f"{swept.title}\n" + table([swept.axis, "", *kinds, "plan"], rows)


def _share(point: Point, kind: str) -> str:
    """An exact match with its interval: "73 % (70 to 76)"."""
    return "{:.0f} % ({:.0f} to {:.0f})".format(*(100 * value for value in point.exact[kind]))


def _files(sweeps: Sequence[Sweep]) -> dict[str, bytes]:
    """Per sweep a figure (PNG, SVG) and a table (CSV), and sweep.json with all of them."""
    files = {"sweep.json": json.dumps([swept.to_json() for swept in sweeps], indent=2).encode() + b"\n"}
    for swept in sweeps:
        figure = figures_mpl.sweep_curve(swept)
        files[f"{swept.axis}.png"], files[f"{swept.axis}.svg"] = figures_mpl.png(figure), figures_mpl.svg(figure)
        files[f"{swept.axis}.csv"] = tables.sweep(swept).csv().encode()
    return files
