"""What a replay tells of an answer, as the Layers tab shows it: one replay per answer, and its arrays for the browser.

`see` replays once and is kept with the answer's record; `look_value` packs maps and attention so that hovering,
clicking and moving the layer slider need no further request. Knows nothing about components.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from functools import cache

import matplotlib
import numpy as np

from analysis import attention, norms
from analysis.captions import caption
from analysis.palette import DIVERGING, SEQUENTIAL, source_name
from app.markup import data_uri, words
from app.session import Record
from model.engine import Engine
from model.errors import UserError
from model.probe import AttentionWish, Probe
from model.trace import Trace

ATTENTION_BYTES = 192 * 2**20  # of recorded attention rows per answer; words beyond it cannot be clicked
HEADS_BYTES = 2 * 2**20  # of single heads sent at once; above it a layer's heads are sent when they are asked for


@dataclass(frozen=True)
class Seen:
    """One answer's replay and what follows from it."""

    trace: Trace
    summary: norms.LayerNorms
    effect: norms.Effect  # of every source of the model, 0 for those that are off
    flow: attention.Flow | None  # None when there was no answer to look from
    tokens: int  # how many of the answer's tokens have their attention recorded


def see(engine: Engine, record: Record) -> Seen:
    """The replay of a record, made on the first call. UserError for an answer without an image."""
    if not record.prompt.grids:
        raise UserError("This answer was given without an image, so there are no visual rows to look at.")

    def make() -> Seen:
        answer, prompt = record.answer, record.prompt
        layers = engine.layout.attention_layers
        wish, tokens = _affordable(engine, record, attention.wish(prompt, answer, layers))
        trace = engine.replay(prompt, answer, answer.plan, Probe(attention=(wish,) if tokens else ()))
        sources = tuple(source.name for source in engine.layout.sources_for(answer.plan))
        effect = norms.Effect(answer.plan, sources, engine.image_effect(prompt, answer, answer.plan))
        flow = attention.by_layer(trace) if tokens else None
        return Seen(trace, norms.summarise(trace), effect, flow, tokens)

    return record.once("seen", make)


def _affordable(engine: Engine, record: Record, wish: AttentionWish) -> tuple[AttentionWish, int]:
    """The wish with so many of the answer's rows that the record stays within `ATTENTION_BYTES`, and how many."""
    answer, start = record.answer, record.prompt.input_ids.shape[1]
    config = engine.adapter.decoder.config
    per_row = 4 * config.num_attention_heads * len(wish.layers) * (start + len(answer.tokens))
    asked = [row for row in wish.rows if row < start - 1]
    room = max(1, ATTENTION_BYTES // per_row - len(asked))
    tokens = min(len(answer.tokens), room)
    return AttentionWish(wish.layers, (*asked, *range(start - 1, start - 1 + tokens))), tokens


# ---- packed for the browser


def look_value(engine: Engine, record: Record, seen: Seen, key: str) -> dict:
    """Everything that the linked view of words, patches and layers shows. `key` tells one answer from the next."""
    trace = seen.trace
    images, start = [], 0
    for at, grid in enumerate(trace.grids):
        n = len(grid.positions)
        source = data_uri(record.prompt.picture(at), 640)
        view = {"src": source, "size": list(grid.size), "grid": list(grid.grid), "start": start, "n": n}
        images.append(view)
        start += n
    rows = trace.attention_rows
    asked = [row for row in rows if row < trace.answer_start - 1]
    said = words(record.answer.tokens)
    return {
        "id": key,
        "model": record.answer.model,
        "plan": str(record.answer.plan),
        "images": images,
        "question": [trace.texts[row] for row in asked],
        "words": [
            {"text": w.text, "tokens": [i for i in range(w.first, w.first + len(w.tokens)) if i < seen.tokens],
             "p": w.probability}
            for w in said
        ],  # fmt: skip
        "tokens": [{"text": token.text, "p": math.exp(token.logprob)} for token in record.answer.tokens],
        "recorded": seen.tokens,
        "layers": trace.n_layers,
        "kinds": [*_kinds(seen)],
        "attention": _attention(trace, len(asked), seen.tokens),
        "ramp": ramp(SEQUENTIAL),
        "diverging": list(DIVERGING),
        "captions": {
            "attention": caption("attention"), "readers": caption("readers"), "injected": caption("norms"),
            "residual": caption("norms"), "ratio": caption("ratio"), "cosine": caption("ratio"), "map": caption("map"),
        },  # fmt: skip
    }  # fmt: skip


def _kinds(seen: Seen):
    """The maps: one dict per quantity, `data` float32 [layers, N] of all images' rows."""
    trace = seen.trace
    residual = trace.residual_rms[:, trace.image_positions]
    yield _kind("residual", "Residual stream", "RMS", residual, range(trace.n_layers + 1))
    for (source, layer), values in trace.injected_rms.items():
        found = _kind(f"injected {source}@{layer}", source_name(source), "RMS", values[None], [layer])
        yield {**found, "source": source}
    places = sorted({layer for _, layer in trace.injected_rms})
    if places:
        yield _kind("ratio", "Injected ÷ residual", "ratio", trace.ratio[places], places)
        yield _kind("cosine", "Injected against residual", "cosine", trace.cosine[places], places, (-1.0, 1.0))


def _kind(
    key: str, label: str, unit: str, values: np.ndarray, layers, limits: tuple[float, float] | None = None
) -> dict:
    finite = values[np.isfinite(values)]
    low, high = limits or (0.0, float(finite.max()) if finite.size else 1.0)
    return {
        "key": key,
        "label": label,
        "unit": unit,
        "layers": list(layers),
        "low": low,
        "high": high,
        "diverging": limits is not None,
        "data": pack(values, np.float32),
    }


def _attention(trace: Trace, asked: int, tokens: int) -> dict | None:
    """Rows: the recorded question rows, then the answer's tokens. `mean` float16 [L, rows, N], `heads` by layer.

    NaN, drawn empty, in layers that have no attention rows.
    """
    if not tokens:
        return None
    positions = trace.image_positions
    layers = sorted(trace.attention)
    mean = np.full((trace.n_layers, len(trace.attention_rows), len(positions)), np.nan)  # [L, Q, N]
    for layer in layers:
        mean[layer] = trace.attention[layer].mean(0)[:, positions]
    heads = len(trace.attention[layers[0]])
    whole = 2 * heads * mean.size <= HEADS_BYTES
    sinks = [[] for _ in range(trace.n_layers)]
    for layer in layers:
        found = set(attention.sink_patches(trace, layer)[0].tolist())
        sinks[layer] = [i for i, position in enumerate(positions.tolist()) if position in found]
    return {
        "asked": asked,
        "tokens": tokens,
        "n": len(positions),
        "heads": heads,
        "mean": pack(mean, np.float16),
        "byLayer": {str(layer): heads_of(trace, layer) for layer in layers} if whole else {},
        "sinks": sinks,
        "sinksKnown": bool(attention.sink_patches(trace, layers[0])[1]),
    }


def heads_of(trace: Trace, layer: int) -> str:
    """One layer's heads, packed float16 [heads, rows, N]; UserError for a layer that was not recorded."""
    if layer not in trace.attention:
        known = ", ".join(map(str, sorted(trace.attention)))
        raise UserError(f"There are no attention rows of layer {layer}; there are of {known}.")
    return pack(trace.attention[layer][:, :, trace.image_positions], np.float16)


def pack(values: np.ndarray, dtype: type) -> str:
    """An array as base64 of its little-endian bytes."""
    return base64.b64encode(np.ascontiguousarray(values, np.dtype(dtype).newbyteorder("<")).tobytes()).decode()


@cache
def ramp(name: str, steps: int = 17) -> list[str]:
    """A matplotlib colour map as #RRGGBB, low to high."""
    colours = matplotlib.colormaps[name](np.linspace(0, 1, steps))
    return ["#" + "".join(f"{round(255 * c):02x}" for c in rgba[:3]) for rgba in colours]
