"""How long the rows are: the residual stream and what is injected into it, by layer and on the image.

RMS of a row is sqrt(mean(x^2)) over the hidden size. Means are over rows. Before layer 0 the image rows of the residual
are zero, the base being an injection like any other, so there is no ratio and no cosine. Nothing here says what a
change does: that is `ripple` and `effect`, which compare runs of an engine that is given. Knows nothing of figures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.grids import GridMap, finite_limits, grid_of, image_slice
from analysis.palette import source_name
from model.plan import Plan, enters_tower
from model.probe import Probe
from model.prompt import Prompt
from model.trace import Trace
from model.types import Answer

KINDS = ("residual", "before", "injected", "ratio", "cosine")


@dataclass(frozen=True)
class LayerNorms:
    """Per-layer summary of one trace. L LLM layers; index L of the first four is the final output before the norm.

    NaN where there is nothing: no image rows, or no injection before that layer.
    """

    plan: Plan
    residual_image: np.ndarray  # float64 [L+1] mean RMS at image rows, after injection
    residual_image_low: np.ndarray  # [L+1] 10 % of the image rows are below
    residual_image_high: np.ndarray  # [L+1] 10 % of the image rows are above
    residual_text: np.ndarray  # [L+1] mean RMS at all other rows
    before_image: np.ndarray  # [L] mean RMS at image rows before injection
    injected: dict[tuple[str, int], float]  # (source, layer) -> mean RMS of gain * X over image rows
    ratio: np.ndarray  # [L] mean over rows of |injected| / |residual before|; NaN also where the residual is zero
    cosine: np.ndarray  # [L] mean over rows of cos(injected, residual before); NaN also where the residual is zero

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.before_image)

    def sources(self) -> tuple[str, ...]:
        """The sources injected into the LLM, base first."""
        return tuple(source for source in self.plan.sources() if not enters_tower(source))


@dataclass(frozen=True)
class Effect:
    """How far the stream at the image rows moves when one source is switched off, by layer.

    values float64 [S, L+1]: |h_on - h_off| / |h_on| at the input of layer l; the last column is the final output.
    """

    plan: Plan
    sources: tuple[str, ...]  # [S]
    values: np.ndarray


def effect(engine, prompt: Prompt, answer: Answer | None, plan: Plan) -> Effect:
    """The effect of every source that the model has under `plan`, in one batch; 0 for a source not in the plan."""
    sources = tuple(source.name for source in engine.layout.sources_for(plan))
    return Effect(plan, sources, np.asarray(engine.image_effect(prompt, answer, plan), dtype=np.float64))


def ripple_of(engine, prompt: Prompt, answer: Answer, plan: Plan, source: str) -> tuple[Trace, np.ndarray]:
    """(trace under `plan`, `ripple` of switching `source` off), from two replays."""
    probe = Probe(hidden=tuple(range(engine.layout.n_layers + 1)), hidden_rows="image")
    on, off = (engine.replay(prompt, answer, each, probe) for each in (plan, plan.without(source)))
    return on, ripple(on, off)


def summarise(trace: Trace) -> LayerNorms:
    """Per-layer means of a trace taken with `Probe(norms=True)`; ValueError otherwise."""
    _need_norms(trace)
    image, text = trace.image_positions, trace.text_positions
    at_image = np.asarray(trace.residual_rms, dtype=np.float64)[:, image]  # [L+1, N]
    low, high = _quantiles(at_image, (0.1, 0.9))
    injects = np.zeros(trace.n_layers, dtype=bool)
    injects[[layer for _, layer in trace.injected_rms]] = True
    return LayerNorms(
        plan=trace.plan,
        residual_image=_mean(at_image),
        residual_image_low=low,
        residual_image_high=high,
        residual_text=_mean(trace.residual_rms[:, text]),
        before_image=_mean(trace.before_rms[:, image]),
        injected={key: float(_mean(rows[None])[0]) for key, rows in trace.injected_rms.items()},
        ratio=np.where(injects, _mean(trace.ratio), np.nan),
        cosine=np.where(injects, _mean(trace.cosine), np.nan),
    )


def norm_map(trace: Trace, kind: str, layer: int, source: str | None = None, image: int = 0) -> GridMap:
    """One quantity at one layer on one image's grid, with the scale that is the same for all layers of that image.

    kind: "residual" (after injection; layer L is the final output), "before", "injected" (needs `source`), "ratio",
    "cosine". A place where nothing is injected is NaN. ValueError for an unknown kind, layer, source or image.
    """
    _need_norms(trace)
    rows = image_slice(trace, image)
    positions = grid_of(trace, image).positions
    last = trace.n_layers if kind == "residual" else trace.n_layers - 1
    if not 0 <= layer <= last:
        raise ValueError(f"there is no layer {layer} for {kind}: layers are 0 to {last}")
    limits, note = None, ""
    if kind in ("residual", "before"):
        table = trace.residual_rms if kind == "residual" else trace.before_rms
        values, limits = table[layer, positions], finite_limits(table[:, positions])
        when = "after injection" if kind == "residual" else "before injection"
        quantity, unit = f"Residual stream, layer {layer}, {when}", "RMS"
        if kind == "residual" and layer == trace.n_layers:
            quantity = "Residual stream, final output"
    elif kind == "injected":
        if source is None:
            raise ValueError("the map of what is injected needs a source")
        found = trace.injected_rms.get((source, layer))
        values = np.full(len(positions), np.nan) if found is None else found[rows]
        if trace.injected_rms:
            limits = finite_limits(np.concatenate([rms[rows] for rms in trace.injected_rms.values()]))
        quantity, unit = f"Injected before layer {layer}: {source_name(source)}", "RMS"
    elif kind == "ratio":
        empty = not any(at == layer for _, at in trace.injected_rms)
        values = np.full(len(positions), np.nan) if empty else trace.ratio[layer, rows]
        values = np.where(np.isfinite(values), values, np.nan)
        limits = finite_limits(trace.ratio[:, rows])
        quantity, unit = f"Injected ÷ residual, layer {layer}", "ratio"
    elif kind == "cosine":
        values, limits = trace.cosine[layer, rows], (-1.0, 1.0)
        quantity, unit = f"Injected and residual, layer {layer}", "cosine"
    else:
        raise ValueError(f"there is no map of “{kind}”: choose one of {', '.join(KINDS)}")
    if not np.isfinite(values).any():
        zero = kind in ("ratio", "cosine") and any(at == layer for _, at in trace.injected_rms)
        note = "The image enters here: the residual before it is zero." if zero else "Nothing is injected here."
    return _grid_map(trace, image, values, quantity, unit, limits, diverging=kind == "cosine", note=note)


def ripple(on: Trace, off: Trace) -> np.ndarray:
    """How far every image row moves, by layer: |h_on - h_off| / |h_on|, float64 [L+1, N].

    Both traces are of the same prompt and answer, taken with hidden states of all layers 0..L at image rows (or all
    rows); ValueError otherwise. Where both are zero the result is 0.
    """
    layers = range(on.n_layers + 1)
    if not all(layer in trace.hidden for trace in (on, off) for layer in layers):
        raise ValueError("both traces need the hidden states of every layer: Probe(hidden=tuple(range(L + 1)))")
    out = np.empty((len(layers), len(on.image_positions)))
    for layer in layers:
        a, b = (_image_rows(trace, layer) for trace in (on, off))
        if a.shape != b.shape:
            raise ValueError(f"the traces differ in shape at layer {layer}: {a.shape} and {b.shape}")
        moved, length = np.linalg.norm(a - b, axis=-1), np.linalg.norm(a, axis=-1)
        out[layer] = np.divide(moved, length, out=np.zeros_like(moved), where=length > 0)
    return out


def ripple_map(on: Trace, values: np.ndarray, layer: int, what: str, image: int = 0) -> GridMap:
    """One layer of `ripple` on one image's grid; `what` names the source that was switched off."""
    rows = image_slice(on, image)
    where = "final output" if layer == on.n_layers else f"input of layer {layer}"
    quantity = f"Moved by {source_name(what)} at the {where}"
    return _grid_map(on, image, values[layer, rows], quantity, "relative", finite_limits(values[:, rows]))


def _grid_map(trace, image, values, quantity, unit, limits, diverging=False, note="") -> GridMap:
    grid = grid_of(trace, image)
    values = np.asarray(values, dtype=np.float64).reshape(grid.grid)
    return GridMap(values, quantity, unit, grid.size, image, limits, diverging, note)


def _image_rows(trace: Trace, layer: int) -> np.ndarray:
    """Hidden states at image rows, float64 [N, d]."""
    index = {int(position): i for i, position in enumerate(trace.hidden_positions)}
    rows = [index[int(position)] for position in trace.image_positions]
    return np.asarray(trace.hidden[layer], dtype=np.float64)[rows]


def _need_norms(trace: Trace) -> None:
    if not len(trace.residual_rms):
        raise ValueError("this trace has no norms: replay with Probe(norms=True)")


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean of the finite values of each row [R, C] -> float64 [R]; NaN for a row without any."""
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    count = finite.sum(-1)
    total = np.where(finite, values, 0.0).sum(-1)
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _quantiles(values: np.ndarray, at: tuple[float, float]) -> np.ndarray:
    """[R, C] -> [2, R]; NaN where there are no columns."""
    if not values.shape[1]:
        return np.full((2, len(values)), np.nan)
    return np.quantile(values, at, axis=1)
