"""The `trace` command's work: one answer, replayed once with everything recorded, as numbers, tables and figures.

Knows nothing about how options are written. Figures come from analysis/figures_mpl.py, tables from analysis/tables.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from analysis import attention, norms, tables
from analysis import figures_mpl as draw
from analysis.palette import source_name
from app.output import plain, table, write_files
from model.engine import Engine
from model.plan import Plan
from model.probe import Probe
from model.prompt import Prompt
from model.trace import Trace
from model.types import Answer, Sampling


@dataclass(frozen=True)
class Seen:
    """One answer and all that its replay and its ablations tell."""

    prompt: Prompt
    answer: Answer
    trace: Trace
    summary: norms.LayerNorms
    effect: norms.Effect
    flow: attention.Flow | None  # None for an empty answer

    def to_json(self) -> dict:
        """What --json prints: the answer, the trace's layers, and per layer effect and attention."""
        data = self.trace.to_json()
        for layer, row in enumerate(data["layers"]):
            row["effect"] = {
                name: values[layer] for name, values in zip(self.effect.sources, self.effect.values, strict=True)
            }
            if self.flow is not None and layer in self.flow.layers:
                row["attention_to_image"] = self.flow.image[self.flow.layers.index(layer)]
        return plain(
            {**self.answer.to_json(), **data, "seconds": self.answer.seconds, "replay_seconds": self.trace.seconds}
        )

    def text(self) -> str:
        """What a person reads: the answer and one line per layer."""
        summary, last = self.summary, self.summary.n_layers
        rows = []
        for layer in range(last + 1):
            entering = [f"{name} ({summary.injected[name, at]:.3g})" for name, at in summary.injected if at == layer]
            row = ["output" if layer == last else str(layer), ", ".join(entering) or "-"]
            row += [summary.residual_image[layer], summary.residual_text[layer]]
            row += [np.nan, np.nan] if layer == last else [summary.ratio[layer], summary.cosine[layer]]
            rows.append([*row, *self.effect.values[:, layer].tolist()])
        heads = ["layer", "injected (RMS)", "image RMS", "text RMS", "ratio", "cosine"]
        heads += [f"effect of {name}" for name in self.effect.sources]
        return (
            f"{self.answer.text}\n\nplan {self.answer.plan}, {self.answer.model}\n{table(heads, rows)}\n\n"
            "Ratio and cosine: what is injected beside the residual before it. Effect: how far the image rows move "
            "when the source is switched off. A norm is not an effect, and an effect is not a benefit."
        )


def look(engine: Engine, prompt: Prompt, plan: Plan, sampling: Sampling) -> Seen:
    """Answers, then replays with norms and the attention rows of every layer, then switches each source off in turn."""
    answer = engine.answer(prompt, plan, sampling)
    layers = engine.layout.attention_layers
    wishes = (attention.wish(prompt, answer, layers),) if answer.tokens else ()
    trace = engine.replay(prompt, answer, plan, Probe(attention=wishes))
    used = plan.sources()
    names = [source.name for source in engine.layout.sources_for(plan)]
    effect = engine.image_effect(prompt, answer, plan)[[names.index(name) for name in used]]
    flow = attention.by_layer(trace) if wishes else None
    return Seen(prompt, answer, trace, norms.summarise(trace), norms.Effect(plan, used, effect), flow)


def figures(seen: Seen) -> dict[str, Figure]:
    """By name: norms, ratio and effect by layer, attention by layer, and per grid a map of each injection."""
    drawn = {
        "norms": draw.norms_by_layer(seen.summary),
        "ratio": draw.ratio_and_cosine(seen.summary),
        "effect": draw.effect_heatmap(seen.effect),
    }
    if seen.flow is not None:
        drawn["attention"] = draw.attention_by_layer(seen.flow, seen.trace.n_layers)
    for index in range(len(seen.prompt.grids) if seen.trace.injected_rms else 0):
        maps = {
            f"{source_name(name)}, layer {layer}": norms.norm_map(seen.trace, "injected", layer, name, index)
            for name, layer in seen.trace.injected_rms
        }
        drawn[f"image{index}-injected"] = draw.map_row(
            maps, seen.prompt.picture(index), title="What is injected, RMS by visual token"
        )
    return drawn


def write(seen: Seen, folder: Path) -> list[Path]:
    """trace.json, a CSV per table, a PNG and SVG per figure; returns their paths. UserError where it cannot write."""
    rows = {
        "norms": tables.norms(seen.summary),
        "effect": tables.effect(seen.effect),
        "tokens": tables.tokens(seen.answer),
    }
    if seen.flow is not None:
        rows["attention"] = tables.flow(seen.flow)
    files = {"trace.json": json.dumps(seen.to_json(), indent=1, allow_nan=False).encode() + b"\n"}
    files |= {f"{name}.csv": found.csv().encode() for name, found in rows.items()}
    for name, figure in figures(seen).items():
        files |= {f"{name}.png": draw.png(figure), f"{name}.svg": draw.svg(figure)}
    return write_files(folder, files)
