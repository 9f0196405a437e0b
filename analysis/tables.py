"""Every view as a table, to take away as CSV. Knows nothing about pages or models.

Numbers are written in full; a missing value is an empty cell. Columns name their unit where there is one.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.attention import Flow
from analysis.attribution import Attribution, CausalCheck
from analysis.evaluate import Acuity
from analysis.grids import GridMap
from analysis.norms import Effect, LayerNorms
from analysis.subsets import SubsetRun
from analysis.sweep import Sweep
from model.types import Answer


@dataclass(frozen=True)
class Table:
    """Named columns and rows of plain values (str, int, float, bool, None)."""

    columns: tuple[str, ...]
    rows: tuple[tuple, ...]

    def csv(self) -> str:
        """RFC 4180 text with a header line; NaN and None become empty cells."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\r\n")
        writer.writerow(self.columns)
        writer.writerows([_cell(value) for value in row] for row in self.rows)
        return out.getvalue()

    def records(self) -> list[dict]:
        """One dict per row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def _cell(value: object) -> object:
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    return value


def _table(columns: Sequence[str], rows: Iterable[Sequence]) -> Table:
    plain = (tuple(value.item() if isinstance(value, np.generic) else value for value in row) for row in rows)
    return Table(tuple(columns), tuple(plain))


def norms(summary: LayerNorms) -> Table:
    """One row per layer input, and the final output."""
    sources = summary.sources()
    columns = ["layer", "residual_rms_image", "residual_rms_image_p10", "residual_rms_image_p90", "residual_rms_text"]
    columns += ["before_rms_image", *(f"injected_rms_{source}" for source in sources), "ratio", "cosine"]
    rows = []
    for layer in range(summary.n_layers + 1):
        last = layer == summary.n_layers
        row = ["output" if last else layer, summary.residual_image[layer], summary.residual_image_low[layer]]
        row += [summary.residual_image_high[layer], summary.residual_text[layer]]
        row += [None if last else summary.before_image[layer]]
        row += [summary.injected.get((source, layer)) for source in sources]
        row += [None, None] if last else [summary.ratio[layer], summary.cosine[layer]]
        rows.append(row)
    return _table(columns, rows)


def grid(shown: GridMap) -> Table:
    """One row per visual token, with its box on the original image in pixels."""
    rows_, columns_ = shown.values.shape
    width, height = shown.size
    rows = [
        [
            *(shown.image, r, c, c * width / columns_, r * height / rows_),
            *((c + 1) * width / columns_, (r + 1) * height / rows_, shown.values[r, c]),
        ]
        for r in range(rows_)
        for c in range(columns_)
    ]
    return _table(["image", "row", "column", "left", "top", "right", "bottom", shown.unit], rows)


def effect(shown: Effect) -> Table:
    """One row per source and layer."""
    last = shown.values.shape[1] - 1
    rows = [
        [source, "output" if layer == last else layer, shown.values[i, layer]]
        for i, source in enumerate(shown.sources)
        for layer in range(last + 1)
    ]
    return _table(["source", "layer", "relative_change"], rows)


def flow(shown: Flow) -> Table:
    """One row per layer: shares of attention."""
    columns = ["layer", "image", "image_lowest_head", "image_highest_head", "image_sinks", "first_token", "text"]
    table = np.stack([shown.image, shown.image_low, shown.image_high, shown.sinks, shown.first, shown.text], axis=1)
    return _table(columns, [[layer, *row] for layer, row in zip(shown.layers, table, strict=True)])


def readers(rows: Sequence[tuple[int, str, float]]) -> Table:
    """Which rows look at one patch (`attention.readers`)."""
    return _table(["position", "text", "share_of_attention"], rows)


def subsets(run: SubsetRun) -> Table:
    """One row per on/off state of the stacks."""
    columns = ["plan", "label", *(f"stack_{stack}" for stack in run.stacks), "answer", "match", "logprob_target"]
    rows = [
        [str(row.plan), row.label, *(stack in row.on for stack in run.stacks), row.answer.text, row.match, row.logprob]
        for row in run.rows
    ]
    return _table(columns, rows)


def shapley(run: SubsetRun) -> Table:
    """One row per token of the target: the stacks' values in nats, their standard errors where orders were sampled,
    and the two scores they lie between."""
    parts = {"shapley": run.shapley} | ({} if run.error is None else {"error": run.error})
    columns = ["token", *(f"{part}_{stack}" for part in parts for stack in run.stacks)]
    values = np.concatenate([*parts.values(), run.scores[[0, -1]]]).T
    rows = [[text, *row] for text, row in zip(run.tokens, values, strict=True)]
    return _table([*columns, "logprob_stacks_off", "logprob_stacks_on"], rows)


def sweep(swept: Sweep) -> Table:
    """One row per plan and kind of question: exact match and the ends of its 95 % interval."""
    columns = [swept.axis, "plan", "state", "kind", "n", "exact_match", "low", "high", "cer"]
    rows = [
        [p.value, str(p.plan), p.state, kind, scores["n"], *p.exact[kind], scores["cer"]]
        for p in swept.points
        for kind, scores in p.result["by_kind"].items()
    ]
    return _table(columns, rows)


def attribution(found: Attribution) -> Table:
    """One row per image row (row-major, images in order): what each source adds there, in nats."""
    places = [
        (grid.index, n // grid.grid[1], n % grid.grid[1])
        for grid in found.prompt.grids
        for n in range(len(grid.positions))
    ]
    rows = [[*place, *found.values[:, n]] for n, place in enumerate(places)]
    return _table(["image", "row", "column", *(f"nats_{source}" for source in found.sources)], rows)


def causal(check: CausalCheck) -> Table:
    """The loss without the marked patches, then one row per random draw."""
    rows = [["marked", check.marked], *(["random", loss] for loss in check.random)]
    return _table(["patches", "nats_lost"], rows)


def comparison(rows: Sequence[dict]) -> Table:
    """The rows of `compare.rows`."""
    columns = list(rows[0]) if rows else []
    return _table(columns, [[row[column] for column in columns] for row in rows])


def tokens(answer: Answer) -> Table:
    """One row per answer token with its five most probable alternatives."""
    width = max((len(token.top) for token in answer.tokens), default=0)
    columns = ["token", "logprob"]
    for i in range(1, width + 1):
        columns += [f"top{i}", f"top{i}_logprob"]
    rows = []
    for token in answer.tokens:
        row = [token.text, token.logprob, *(value for pair in token.top for value in pair)]
        rows.append(row + [None] * (len(columns) - len(row)))
    return _table(columns, rows)


def acuity(curves: dict[str, Acuity]) -> Table:
    """One row per model and glyph height."""
    rows = [
        [label, height, n, share, low, high]
        for label, curve in curves.items()
        for height, n, share, low, high in zip(curve.glyph_px, curve.n, curve.exact, curve.low, curve.high, strict=True)
    ]
    return _table(["model", "glyph_px", "n", "exact_match", "low_95", "high_95"], rows)
