"""Where recorded attention rows look: on the image, on the first token, on the text. Knows nothing about models.

A row of attention is a softmax: it sums to 1 over the positions it can see. The row that decides answer token i is the
one *before* it, position `answer_start + i - 1`: what stood there when the token was chosen.

Sinks. Some positions take attention from every query, whatever is asked; they hold weight without being looked at. The
usual one is the first token, and some patches of an image behave alike. The rule here, and the only one: a patch is a
sink in a layer when every recorded text row after the images (question and answer alike, mean over heads, at least
`SINK_ROWS` of them) gives it at least `SINK_TIMES` its equal share of what that row gives to all images. The share on
sinks is always reported; they are hidden only when asked for, and the map then says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from analysis.grids import GridMap, grid_of
from model.probe import AttentionWish
from model.prompt import Prompt
from model.trace import Trace
from model.types import Answer

SINK_TIMES = 4.0  # times an equal share; 1 would be a patch like any other
SINK_ROWS = 3  # with fewer rows "whatever is asked" cannot be told
QUESTION_ROWS = 16  # text rows before the answer that `wish` records for the rule: the last ones of the prompt


@dataclass(frozen=True)
class Look:
    """From one row to one image, in one layer, for one head or their mean. Shares are of the whole row, 0 to 1."""

    map: GridMap  # share per patch; its sum is this image's share, less hidden sinks
    row: int
    layer: int
    head: int | None  # None is the mean over heads
    image_share: float  # on all images of the prompt, sinks included
    first_share: float  # on the first position, if that is text (else 0: it is then a patch)
    text_share: float  # on all other text
    sink_share: float  # the part of image_share that lies on sink patches
    sinks: tuple[tuple[int, int], ...]  # (row, column) of this image's sink patches in this layer
    sinks_known: bool  # False when too few rows were recorded to tell
    hidden: bool  # whether the sinks are left out of the map


@dataclass(frozen=True)
class Flow:
    """What a set of rows gives to the image, the first token and the text, by layer (mean over rows and heads)."""

    layers: tuple[int, ...]
    image: np.ndarray  # float64 [layers], sinks included
    image_low: np.ndarray  # the head that gives the image least
    image_high: np.ndarray  # the head that gives the image most
    sinks: np.ndarray  # the part of `image` that lies on sink patches
    first: np.ndarray
    text: np.ndarray
    rows: tuple[int, ...]


def query_row(trace: Trace, token: int) -> int:
    """The position whose row decided answer token `token` (from 0)."""
    if not 0 <= token < len(trace.texts) - trace.answer_start:
        raise ValueError(f"there is no answer token {token}: the answer has {len(trace.texts) - trace.answer_start}")
    return trace.answer_start + token - 1


def wish(prompt: Prompt, answer: Answer, layers: tuple[int, ...], rows: tuple[int, ...] = ()) -> AttentionWish:
    """What to record so that every answer token can be looked at and sinks can be told.

    The rows that decide the answer's tokens, the last `QUESTION_ROWS` text rows of the prompt after its images, and
    `rows` (absolute positions, for more).
    """
    start = int(prompt.input_ids.shape[1])
    end_of_images = max((int(grid.positions.max()) + 1 for grid in prompt.grids), default=0)
    question = range(max(end_of_images, start - QUESTION_ROWS), start)
    deciding = range(start - 1, start - 1 + len(answer.tokens))
    return AttentionWish(tuple(layers), tuple(sorted({*question, *deciding, *rows})))


def to_image(
    trace: Trace, row: int, layer: int, head: int | None = None, image: int = 0, hide_sinks: bool = False
) -> Look:
    """Where position `row` looks on one image. ValueError if that row or layer was not recorded."""
    weights = _row(trace, row, layer, head)  # [T]
    grid = grid_of(trace, image)
    first, text = _first(trace), _text(trace)
    sinks, known = sink_patches(trace, layer)
    sink_share = float(weights[sinks].sum())
    here = np.isin(grid.positions, sinks)  # [N of this image]
    values = weights[grid.positions].astype(np.float64)
    if hide_sinks:
        values[here] = np.nan
    columns = grid.grid[1]
    which = "all heads" if head is None else f"head {head}"
    limit = 0.0  # over all recorded layers, so that a layer slider keeps its colours
    for other in trace.attention:
        seen = _row(trace, row, other, head)[grid.positions]
        if hide_sinks:
            seen = seen[~np.isin(grid.positions, sink_patches(trace, other)[0])]
        limit = max(limit, float(seen.max(initial=0.0)))
    shown = GridMap(
        values=values.reshape(grid.grid),
        quantity=f"Attention {_quoted(trace, row)}, layer {layer}, {which}",
        unit="share",
        size=grid.size,
        image=image,
        limits=(0.0, limit) if limit > 0 else None,
        note=_sink_note(int(here.sum()), float(weights[grid.positions][here].sum()), known, hide_sinks),
    )
    return Look(
        map=shown,
        row=row,
        layer=layer,
        head=head,
        image_share=float(weights[trace.image_positions].sum()),
        first_share=float(weights[first].sum()),
        text_share=float(weights[text].sum()),
        sink_share=sink_share,
        sinks=tuple((int(i // columns), int(i % columns)) for i in np.flatnonzero(here)),
        sinks_known=known,
        hidden=hide_sinks,
    )


def difference(a: Look, b: Look) -> GridMap:
    """Where `a` looks more (positive) or less than `b`: the same image and layer, for two words or two plans."""
    if a.map.values.shape != b.map.values.shape:
        raise ValueError("only two looks at the same grid can be compared")
    values = a.map.values - b.map.values
    quantity = f"{a.map.quantity}, minus row {b.row}"
    return replace(a.map, values=values, quantity=quantity, limits=None, diverging=True, note="")


def sink_patches(trace: Trace, layer: int) -> tuple[np.ndarray, bool]:
    """(absolute positions of this layer's sink patches, whether there were rows enough to tell). Rule: see above."""
    attention = _layer(trace, layer)
    positions = trace.image_positions
    if not positions.size:
        return positions, True
    after = [q for q, row in enumerate(trace.attention_rows) if row > positions.max()]
    if len(after) < SINK_ROWS:
        return positions[:0], False
    to_images = attention[:, after].mean(0)[:, positions]  # [rows, N]
    given = to_images.sum(-1, keepdims=True)
    equal_shares = np.divide(to_images * positions.size, given, out=np.zeros_like(to_images), where=given > 0)
    return positions[equal_shares.min(0) >= SINK_TIMES], True


def by_layer(trace: Trace, rows: tuple[int, ...] | None = None) -> Flow:
    """What `rows` give to image, first token and text in every recorded layer.

    Default: the rows that decide the answer. ValueError for a row that was not recorded or a trace without attention.
    """
    if not trace.attention:
        raise ValueError("this trace has no attention: replay with Probe(attention=(wish(...),))")
    if rows is None:
        start, end = trace.answer_start - 1, len(trace.texts) - 1
        rows = tuple(row for row in trace.attention_rows if start <= row < end)
    if not rows:
        raise ValueError("no row was given, and none of those that decide the answer was recorded")
    index = [_index(trace, row) for row in rows]
    layers = tuple(sorted(trace.attention))
    image, first, text = trace.image_positions, _first(trace), _text(trace)
    table = np.empty((6, len(layers)))
    for i, layer in enumerate(layers):
        weights = np.asarray(trace.attention[layer], dtype=np.float64)[:, index].mean(1)  # [heads, T]
        per_head = weights[:, image].sum(-1)
        on_sinks = weights[:, sink_patches(trace, layer)[0]].sum(-1).mean()
        on_first, on_text = weights[:, first].sum(-1).mean(), weights[:, text].sum(-1).mean()
        table[:, i] = per_head.mean(), per_head.min(), per_head.max(), on_sinks, on_first, on_text
    return Flow(layers, *table, rows=tuple(rows))


def heads_to_image(trace: Trace, row: int, layer: int) -> np.ndarray:
    """What each head of a layer gives to the images from this row, float64 [heads]."""
    weights = np.asarray(_layer(trace, layer)[:, _index(trace, row)], dtype=np.float64)
    return weights[:, trace.image_positions].sum(-1)


def readers(
    trace: Trace, layer: int, patch: tuple[int, int], head: int | None = None, image: int = 0
) -> list[tuple[int, str, float]]:
    """The other way round: which recorded rows look at one patch (row, column). (position, text, share), in order."""
    grid = grid_of(trace, image)
    if not (0 <= patch[0] < grid.grid[0] and 0 <= patch[1] < grid.grid[1]):
        raise ValueError(f"there is no patch {patch}: the grid is {grid.grid[0]} × {grid.grid[1]}")
    position = grid.positions[patch[0] * grid.grid[1] + patch[1]]
    shares = [float(_row(trace, row, layer, head)[position]) for row in trace.attention_rows]
    return [(row, trace.texts[row], share) for row, share in zip(trace.attention_rows, shares, strict=True)]


def _layer(trace: Trace, layer: int) -> np.ndarray:
    if layer not in trace.attention:
        recorded = ", ".join(map(str, sorted(trace.attention))) or "none"
        raise ValueError(f"attention of layer {layer} was not recorded; recorded: {recorded}")
    return trace.attention[layer]


def _index(trace: Trace, row: int) -> int:
    if row not in trace.attention_rows:
        raise ValueError(f"attention of row {row} was not recorded; recorded: {list(trace.attention_rows)}")
    return trace.attention_rows.index(row)


def _row(trace: Trace, row: int, layer: int, head: int | None) -> np.ndarray:
    """Weights of one row, float64 [T]: one head, or the mean over heads."""
    weights = np.asarray(_layer(trace, layer)[:, _index(trace, row)], dtype=np.float64)  # [heads, T]
    if head is None:
        return weights.mean(0)
    if not 0 <= head < len(weights):
        raise ValueError(f"there is no head {head}: heads are 0 to {len(weights) - 1}")
    return weights[head]


def _first(trace: Trace) -> np.ndarray:
    """Position 0 if it is text, else nothing."""
    return np.array([p for p in (0,) if p not in trace.image_positions], dtype=np.int64)


def _text(trace: Trace) -> np.ndarray:
    return np.setdiff1d(trace.text_positions, [0])


def _quoted(trace: Trace, row: int) -> str:
    """How a row is called: by the answer token it decides, else by its own text."""
    if trace.answer_start - 1 <= row < len(trace.texts) - 1:
        return f"when “{trace.texts[row + 1].strip() or '␣'}” was chosen"
    return f"from “{trace.texts[row].strip() or '␣'}” (position {row})"


def _sink_note(count: int, share: float, known: bool, hidden: bool) -> str:
    if not known:
        return f"Sinks are not marked: fewer than {SINK_ROWS} text rows were recorded."
    if not count:
        return "No sink patches found on this image."
    patches = "1 sink patch" if count == 1 else f"{count} sink patches"
    return f"{patches} with {share:.0%} of this row's attention, {'hidden' if hidden else 'shown'}."
