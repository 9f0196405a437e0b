"""Decoding together: one step of many requests as one batch, whatever their prompts, plans and lengths.

A request is prefilled alone, with its own images and plan, and while it is the only one it decodes alone as well. Where
others wait for their next token at the same time, whoever gets the device first makes the step for all of them: the
keys and values of each move, once, into a row of buffers that all share, right-padded, and a mask hides what is behind
a row's own end. Nothing is injected while decoding, so no plan and no image is known here. Requests join and leave
between two steps. A row's greedy tokens are those that it would get alone, its log-probabilities within rounding.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from model.decode import Choice, choose
from model.errors import is_out_of_memory
from model.loading import free_memory
from model.types import Sampling

if TYPE_CHECKING:
    from model.compiled import Seat
    from model.engine import Engine

ROWS = 64  # most of one step
CHUNK = 256  # positions by which the shared buffers grow


class Row:
    """One answer's place in the shared buffers."""

    def __init__(self, at: int, length: int):
        self.at, self.length = at, length  # row of the buffers; positions of it that are filled
        self.gone = False


@dataclass
class Wanted:
    """The next token of each of a request's answers: what was said last, where it stands, how it is chosen."""

    ids: list[int]  # [K]
    position: int | float  # a float where the family's position ids are
    axes: tuple[int, ...]  # leading axes of the model's position ids: () or (3,)
    sampling: Sampling
    draws: list[torch.Generator | None]  # [K]


@dataclass(eq=False)
class Part:
    """What one request has computed so far, in a cache of its own, a seat for compiled steps, or shared rows."""

    most: int = 0  # positions that it may have in a seat; 0: it decodes plainly
    cache: DynamicCache | None = None
    seat: Seat | None = None
    rows: list[Row] = field(default_factory=list)
    apart: bool = False  # it grew too long to be shared
    wanted: Wanted | None = None
    made: list[Choice] | None = None  # of the step that it waits for

    def __len__(self) -> int:
        """How many positions are filled."""
        if self.rows or self.seat is not None:
            return self.rows[0].length if self.rows else self.seat.length
        return self.cache.get_seq_length() if self.cache is not None else 0

    @property
    def layers(self) -> list[CacheLayerMixin]:
        """Of the cache that is not shared."""
        return (self.cache if self.seat is None else self.seat.cache).layers


@dataclass
class Step:
    """Which rows of the buffers take part in a step, and at which position each writes."""

    rows: Tensor  # int64 [B], ascending
    at: Tensor  # int64 [B]
    upto: int  # positions that are looked at
    whole: bool  # the rows are the first B: they need no copying

    def mask(self) -> Tensor:
        """bool [B, 1, 1, upto]: what each row sees."""
        return (torch.arange(self.upto, device=self.at.device) <= self.at[:, None])[:, None, None]

    def of(self, buffer: Tensor) -> Tensor:
        """[R, H, C, hd] -> [B, H, upto, hd]."""
        buffer = buffer[:, :, : self.upto]
        return buffer[: len(self.rows)] if self.whole else buffer[self.rows]


class SharedLayer(DynamicLayer):
    """One layer's keys and values [R, H, C, hd] of all rows; a step writes one position of each in place."""

    step: Step

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        step = self.step
        self.keys[step.rows, :, step.at] = key_states[:, :, 0]
        self.values[step.rows, :, step.at] = value_states[:, :, 0]
        return step.of(self.keys), step.of(self.values)

    def get_seq_length(self) -> int:
        return self.step.upto - 1

    def resize(self, like: CacheLayerMixin, rows: int, positions: int) -> None:
        """Makes room for so many rows and positions; what is in it stays, what is new is zero."""
        for name in ("keys", "values"):
            old, one = getattr(self, name), getattr(like, name)
            new = one.new_zeros(rows, one.shape[1], positions, one.shape[3])
            if old is not None:
                new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)
        self.is_initialized = True

    def fill(self, at: int, keys: Tensor, values: Tensor) -> None:
        """Puts [H, T, hd] into one row. What stood behind is wiped: a mask hides a number, but not a NaN."""
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer[at, :, : new.shape[1]] = new
            buffer[at, :, new.shape[1] :] = 0


class Together:
    """The decoding of one engine's requests. Thread-safe; every step is made under the engine's lock."""

    def __init__(self, engine: Engine, max_bytes: int):
        """max_bytes: of the shared keys and values, padding included; who does not fit in decodes alone."""
        self.engine, self.max_bytes = engine, max_bytes
        self.why_not = why_alone(engine.adapter.decoder)  # "" where requests can share
        self.most = ROWS  # rows of one step; fewer after one that failed, until all have gone
        self._guard = threading.Lock()  # of all below; never held during a pass
        self._asked: list[Part] = []
        self._rows: list[weakref.ref[Row]] = []  # one per used row of the buffers
        self._layers: list[SharedLayer] = []
        self._busy = False  # a step is being made: rows stay where they are

    def __len__(self) -> int:
        """How many rows of the shared buffers are in use."""
        return sum(_alive(row) for row in self._rows)

    @property
    def bytes(self) -> int:
        """What the shared buffers take."""
        return sum(t.element_size() * t.nelement() for layer in self._layers for t in (layer.keys, layer.values))

    def step(self, part: Part, wanted: Wanted, alone: Callable[[], Tensor]) -> list[Choice]:
        """The next token of each of this request's answers, made together with those of all who wait now.

        `alone` decodes what is not shared by itself: logits [K, V].
        """
        part.wanted, part.made = wanted, None
        with self._guard:
            self._asked.append(part)
        try:
            with torch.inference_mode(), self.engine._device():
                if part.made is None:  # nobody has made it meanwhile
                    self._lead(part, alone)
            return part.made
        finally:
            with self._guard:
                if part in self._asked:
                    self._asked.remove(part)

    def leave(self, part: Part, broken: bool = False) -> None:
        """Lets go of all that a request has; broken: a step of it has failed."""
        self._drop(part, [])
        if part.seat is not None:
            part.seat.home.leave(part, broken)
        part.cache = None

    def keep(self, part: Part, rows: list[int]) -> None:
        """Lets go of all of a request's rows but these."""
        if part.rows:
            self._drop(part, rows)
        elif part.seat is not None:
            part.seat.which = [part.seat.which[at] for at in rows]
        else:
            part.cache.batch_select_indices(torch.tensor(rows))  # on the CPU: layers may be on several devices

    def take_out(self, part: Part) -> DynamicCache:
        """A request's cache: its own, or a copy of what it has in its seat or in shared rows."""
        if part.cache is not None:
            return part.cache
        with self._guard, torch.inference_mode():
            return self._copied(part)

    # Inside, under the engine's lock

    def _drop(self, part: Part, kept: list[int]) -> None:
        for at, row in enumerate(part.rows):
            row.gone = at not in kept
        part.rows = [row for row in part.rows if not row.gone]
        self._sweep()

    def _lead(self, part: Part, alone: Callable[[], Tensor]) -> None:
        """Makes the step of `part` and of whoever else waits and can be joined."""
        with self._guard:
            others = [other for other in self._asked if other is not part and other.made is None]
        if self.engine.compiled is not None and part.rows and not others and len(self) == len(part.rows):
            part.cache = self.take_out(part)  # everybody else has gone: compiled steps are faster
            self._drop(part, [])
        if not self.why_not and not part.apart and (others or part.rows):
            try:
                self._share([part, *others])
            finally:
                self._busy = False
                self._sweep()
        if part.made is None:
            part.made = choose(alone(), [part.wanted.sampling] * len(part.wanted.ids), part.wanted.draws)

    def _share(self, parts: list[Part]) -> None:
        """Makes the step of the first of `parts`, and of the others, as far as they can be joined."""
        first, found = parts[0], self._gather(parts)
        if first not in found:
            return
        drawn = [(draw, draw.get_state()) for part in found for draw in part.wanted.draws if draw is not None]
        try:
            self._make(found)
        except Exception as error:
            if len(found) == 1:
                raise
            for draw, state in drawn:  # what is made again draws the same again
                draw.set_state(state)
            # The others come to a turn of their own; who fails alone has failed.
            self.most = max(1, sum(len(part.rows) for part in found) // 2)
            if is_out_of_memory(error):
                self.engine._free(error)
            self._make([first])

    def _gather(self, parts: list[Part]) -> list[Part]:
        """Those of `parts` that have rows in the shared buffers, or can be given some now; the first goes first."""
        with self._guard:
            self._busy = True
            self._compact()
            found: list[Part] = []
            for part in parts:
                many = sum(len(each.wanted.ids) for each in (*found, part))
                if part.apart or (found and many > self.most):
                    continue
                try:
                    if self._seated(part):
                        found.append(part)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    self.engine._free(error)
            return found

    def _seated(self, part: Part) -> bool:
        """Whether a request has rows with room for one position more. One that has outgrown the limit gets its own."""
        if part.rows:
            if self._grown(len(self._rows), len(part) + 1):
                return True
            part.cache, part.apart = self._copied(part), True
            for row in part.rows:
                row.gone = True
            part.rows = []
            return False
        count, first = len(part.wanted.ids), len(self._rows)
        if not self._grown(first + count, len(part) + 1, part.layers):
            return False
        own_rows = range(count) if part.seat is None else part.seat.which
        for layer, own in zip(self._layers, part.layers, strict=True):
            for i, at in enumerate(own_rows):
                layer.fill(first + i, own.keys[at, :, : len(part)], own.values[at, :, : len(part)])
        part.rows = [Row(first + i, len(part)) for i in range(count)]
        self._rows += [weakref.ref(row, self._died) for row in part.rows]
        if part.seat is not None:
            part.seat.home.leave(part)
        part.cache = None
        return True

    def _grown(self, rows: int, positions: int, like: list[CacheLayerMixin] | None = None) -> bool:
        """Whether the buffers hold so many, after growing where the limit and the memory that is free allow it."""
        now = self._layers[0].keys.shape if self._layers else (0, 0, 0, 0)
        if rows <= now[0] and positions <= now[2]:
            return True
        rows = max(now[0], 1 << (rows - 1).bit_length())
        positions = max(now[2], -(-positions // CHUNK) * CHUNK)
        layers = self._layers or [SharedLayer() for _ in like]
        one = self._layers if like is None else like
        width = sum(t.element_size() * t.shape[1] * t.shape[3] for layer in one for t in (layer.keys, layer.values))
        size = rows * positions * width
        if size > self.max_bytes or size - self.bytes + size // len(layers) > free_memory(self.engine.device):
            return False
        for layer, own in zip(layers, one, strict=True):
            layer.resize(own, rows, positions)
        self._layers = layers
        return True

    def _compact(self) -> None:
        """Fills the rows of those who have left with the last ones."""
        while self._rows:
            if not _alive(self._rows[-1]):
                self._rows.pop()
                continue
            hole = next((at for at, row in enumerate(self._rows) if not _alive(row)), None)
            if hole is None:
                return
            last = self._rows.pop()
            row = last()
            if row is None:
                continue
            for layer in self._layers:
                layer.keys[hole], layer.values[hole] = layer.keys[row.at], layer.values[row.at]
            row.at, self._rows[hole] = hole, last

    def _make(self, parts: list[Part]) -> None:
        """One step of all rows of `parts`. One that fails has changed nothing: what it wrote is written again."""
        engine, device = self.engine, self.engine.device
        each = [(row, part, i) for part in parts for i, row in enumerate(part.rows)]
        each.sort(key=lambda entry: entry[0].at)
        rows = [row.at for row, _, _ in each]
        lengths = [row.length for row, _, _ in each]
        step = Step(
            torch.tensor(rows, device=device), torch.tensor(lengths, device=device), max(lengths) + 1,
            rows == list(range(len(rows))),
        )  # fmt: skip
        for layer in self._layers:
            layer.step = step
        last = torch.tensor([[part.wanted.ids[i]] for _, part, i in each], device=device)
        positions = torch.tensor([[part.wanted.position] for _, part, _ in each], device=device)
        hidden = engine.adapter.decoder(
            inputs_embeds=engine.adapter.embed(last),
            position_ids=positions.expand(*parts[0].wanted.axes, -1, -1),
            attention_mask=step.mask(),
            past_key_values=Cache(layers=self._layers),
            use_cache=True,
        ).last_hidden_state
        samplings, draws = [], []
        for _, part, i in each:
            samplings.append(part.wanted.sampling)
            draws.append(part.wanted.draws[i])
        choices = choose(engine._logits(hidden[:, -1]), samplings, draws)
        made: dict[Part, list[Choice]] = {part: [None] * len(part.rows) for part in parts}
        for (row, part, i), choice in zip(each, choices, strict=True):
            row.length += 1
            made[part][i] = choice
        for part, found in made.items():
            part.made = found

    def _copied(self, part: Part) -> DynamicCache:
        cache = DynamicCache(config=self.engine.adapter.decoder.config)
        layers, rows = (self._layers, [row.at for row in part.rows]) if part.rows else (part.layers, part.seat.which)
        for layer, held in zip(cache.layers, layers, strict=True):
            layer.update(held.keys[rows, :, : len(part)], held.values[rows, :, : len(part)])
        return cache

    def _died(self, row: weakref.ref) -> None:
        """A request was dropped without a word."""
        if self._guard.acquire(blocking=False):  # else the next to leave looks
            try:
                self._release()
            finally:
                self._guard.release()

    def _sweep(self) -> None:
        with self._guard:
            self._release()

    def _release(self) -> None:
        """Gives the buffers back once nobody is in them."""
        if not self._busy and self._layers and not len(self):
            self._rows, self._layers, self.most = [], [], ROWS


def _alive(row: weakref.ref[Row]) -> bool:
    found = row()
    return found is not None and not found.gone


def why_alone(decoder: nn.Module) -> str:
    """Why requests of this model cannot decode together, "" where they can.

    A row of another length is padded and masked, which only full attention lets one do.
    """
    if len({parameter.device for parameter in decoder.parameters()}) > 1:
        return "its layers lie on several devices"
    cache = DynamicCache(config=decoder.config)
    kinds = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
    if not kinds:
        return ""
    windows = any("Sliding" in kind or "Chunk" in kind for kind in kinds)
    return "some layers have a sliding window" if windows else "some layers have no keys and values of every position"
