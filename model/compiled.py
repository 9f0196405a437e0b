"""Compiled decoding: the step from one token to the next as one program, over keys and values of a fixed size.

A request is prefilled as ever, with its injections. Then its keys and values move into a seat, transformers'
StaticCache, whose buffers keep their size and their place in memory, so that one program, compiled once, makes every
step of every request, and on a GPU is replayed as a CUDA graph. Nothing is injected while decoding: no plan, no image
and no hook is in that program. A seat goes from one request to the next; who finds none decodes plainly, to the same
tokens. Knows nothing about prompts, plans and what a token means.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import DynamicCache, StaticCache

from model.errors import UserError, is_out_of_memory
from model.loading import check_decode, free_memory

if TYPE_CHECKING:
    from model.engine import Engine
    from model.together import Part, Wanted

SHORTEST = 1024  # positions of the smallest seat; the next ones double
SEATS = 4  # at a time: on a GPU each has a CUDA graph of its own
ROWS = 16  # of the widest seat: answers of one request
CANNOT = (TorchDynamoException, FailOnRecompileLimitHit)  # what torch.compile raises where it cannot


@dataclass(eq=False)
class Seat:
    """Buffers [rows, H, size, hd] per layer, and what of them the request in it has filled."""

    home: Compiled
    cache: StaticCache
    rows: int
    size: int
    length: int = 0  # positions that are filled
    which: list[int] = field(default_factory=list)  # rows of the request's answers; the others are computed for nothing
    left: weakref.finalize | None = None  # gives the seat back where a request is dropped without a word

    @property
    def bytes(self) -> int:
        """What the buffers take."""
        return sum(t.element_size() * t.nelement() for layer in self.cache.layers for t in (layer.keys, layer.values))

    def fill(self, cache: DynamicCache, rows: int, length: int) -> None:
        """Moves what so many rows have computed in here, layer by layer."""
        self.length, self.which = length, list(range(rows))
        for layer, own in zip(self.cache.layers, cache.layers, strict=True):
            for buffer, new in ((layer.keys, own.keys), (layer.values, own.values)):
                buffer[:rows, :, :length] = new
                buffer[:rows, :, length:] = 0  # a mask hides what another left there, but not a NaN
                buffer[rows:] = 0
            layer.cumulative_length.fill_(length)
            own.reset()


class Compiled:
    """The compiled step of one engine and its seats."""

    def __init__(self, engine: Engine, max_bytes: int, backend: str | Callable = "inductor"):
        """max_bytes: of all seats. backend: of torch.compile; inductor is the one that makes machine code."""
        self.engine, self.max_bytes = engine, max_bytes
        decoder, embed, head = engine.adapter.decoder, engine.adapter.embed, engine.adapter.lm_head

        def program(ids: Tensor, positions: Tensor, mask: Tensor, cache: StaticCache) -> Tensor:
            hidden = decoder(
                inputs_embeds=embed(ids), position_ids=positions, attention_mask=mask, past_key_values=cache,
                use_cache=True,
            ).last_hidden_state  # fmt: skip
            return head(hidden[:, -1])

        # As transformers' generate does on a GPU; fullgraph: what cannot be one program is an error, not a slow one.
        how: dict[str, Any] = {"mode": "reduce-overhead"} if backend == "inductor" else {}
        self._program = torch.compile(program, backend=backend, fullgraph=True, isolate_recompiles=True, **how)
        parts = [*decoder.modules(), *embed.modules(), *head.modules()]
        self._hooks = [hooks for part in parts for hooks in (part._forward_pre_hooks, part._forward_hooks)]
        # CUDA graphs belong to the thread that recorded them, and every request comes in a thread of its own.
        self._worker = ThreadPoolExecutor(1, "compiled-decode")
        self._guard = threading.RLock()  # of the two below; a seat may come back while the guard is held
        self._free: list[Seat] = []  # least recently used first
        self._all: weakref.WeakSet[Seat] = weakref.WeakSet()

    @property
    def bytes(self) -> int:
        """What the seats that nobody is in take."""
        with self._guard:
            return sum(seat.bytes for seat in self._free)

    def room(self, answers: int, positions: int) -> tuple[int, int]:
        """(rows, positions) of the seat for so many answers of one request, and so many tokens."""
        size = max(SHORTEST, 1 << (positions - 1).bit_length())
        return 1 << (answers - 1).bit_length(), max(positions, min(size, self.engine.max_tokens))

    def seat(self, part: Part, answers: int) -> bool:
        """Whether a request's next step is compiled: it has a seat, or has moved into one now.

        It has none where there is no room, and must leave its own while somebody watches. Call under the engine's lock.
        """
        if not part.most or self._watched():
            return False
        if part.seat is not None:
            return True
        try:
            seat = self._found(*self.room(answers, part.most), part.cache)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.engine._free(error)
            return False
        if seat is None:
            return False
        seat.fill(part.cache, answers, len(part))
        seat.left = weakref.finalize(part, self._back, seat)
        part.seat, part.cache = seat, None
        return True

    def step(self, seat: Seat, wanted: Wanted) -> Tensor:
        """Logits [K, V] after a request's last tokens; it has a position more then. Call under the engine's lock."""
        device, ids = self.engine.device, [0] * seat.rows
        for row, token in zip(seat.which, wanted.ids, strict=True):
            ids[row] = token
        mask = (torch.arange(seat.size, device=device) <= seat.length)[None, None, None]
        torch._dynamo.maybe_mark_dynamic(mask, 3)
        logits = self._worker.submit(
            self._run,
            torch.tensor(ids, device=device)[:, None],
            torch.full((*wanted.axes, seat.rows, 1), wanted.position, device=device),
            mask,
            seat.cache,
        ).result()
        seat.length += 1
        return logits if len(seat.which) == seat.rows else logits[seat.which]

    def leave(self, part: Part, broken: bool = False) -> None:
        """Lets go of a request's seat. One in which a step has failed is not used again."""
        seat, part.seat = part.seat, None
        seat.left.detach()
        if not broken:
            self._back(seat)

    def forget(self) -> None:
        """Lets go of the seats that nobody is in."""
        with self._guard:
            self._free.clear()

    # Inside

    def _run(self, *inputs: Any) -> Tensor:
        """One step, in the thread that makes all of them."""
        if self.engine.device.type == "cuda":
            torch.cuda.set_device(self.engine.device)
        with torch.inference_mode(), self.engine.compute_threads():
            torch.compiler.cudagraph_mark_step_begin()
            return self._program(*inputs).clone()  # a graph's next step writes to where this one has

    def _watched(self) -> bool:
        """Whether others than we and transformers have hooks here, which would be traced into the program."""
        own = ("model.instrument", "transformers.")
        return any(
            not str(getattr(hook, "__module__", "")).startswith(own) for hooks in self._hooks for hook in hooks.values()
        )

    def _back(self, seat: Seat) -> None:
        with self._guard:
            self._free.append(seat)

    def _found(self, rows: int, size: int, like: DynamicCache) -> Seat | None:
        """A free seat of this size, or a new one where the limits and the memory that is free allow it."""
        if rows > ROWS:
            return None
        with self._guard:
            fitting = [seat for seat in self._free if seat.rows == rows and size <= seat.size <= 2 * size]
            if fitting:
                seat = min(fitting, key=lambda seat: seat.size)
                self._free.remove(seat)
                return seat
            width = sum(t.element_size() * t.shape[1] * t.shape[3] for o in like.layers for t in (o.keys, o.values))
            need, held = rows * size * width, [seat.bytes for seat in self._all]
            while self._free and (len(self._all) >= SEATS or sum(held) + need > self.max_bytes):
                del self._free[0]
                held = [seat.bytes for seat in self._all]
        if len(held) >= SEATS or sum(held) + need > self.max_bytes or need > free_memory(self.engine.device):
            return None
        return self._made(rows, size, like)

    def _made(self, rows: int, size: int, like: DynamicCache) -> Seat:
        cache = StaticCache(config=self.engine.adapter.decoder.config, max_cache_len=size)
        for layer, own in zip(cache.layers, like.layers, strict=True):
            layer.lazy_initialization(*(t[:1].expand(rows, -1, -1, -1) for t in (own.keys, own.values)))
            for tensor in (layer.keys, layer.values, layer.cumulative_length):
                # It does so itself, but not while another thread compiles; without it there is no CUDA graph.
                torch._dynamo.mark_static_address(tensor)
            for tensor in (layer.keys, layer.values):  # one program for every size, and one more for several answers
                torch._dynamo.maybe_mark_dynamic(tensor, [0, 2] if rows > 1 else 2)
        seat = Seat(self, cache, rows, size)
        self._all.add(seat)
        return seat


# ---- the choice


def why_plain(engine: Engine) -> str:
    """Why this model's steps cannot be compiled, "" where they can."""
    if engine.together.why_not:
        return engine.together.why_not
    quantizer = getattr(engine.model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return "its quantised weights cannot be compiled"
    if not getattr(engine.adapter.decoder, "_can_compile_fullgraph", False):
        return "transformers does not make one program of its decoder"
    return ""


def choose_decode(wanted: str | None, engine: Engine, brief: bool = False) -> tuple[bool, str]:
    """(whether to compile, why); UserError where compiled was asked for and cannot be, and for an unknown word.

    brief: a few answers are all that will be asked for.
    """
    check_decode(wanted)
    if wanted == "plain":
        return False, "plain decoding: asked for"
    hindrance = why_plain(engine)
    if wanted == "compiled":
        if hindrance:
            raise UserError(f"{engine.name} cannot decode compiled: {hindrance}. Leave --decode out, or use plain.")
        return True, "compiled decoding: asked for"
    if hindrance:
        return False, f"plain decoding: {hindrance}"
    if engine.device.type != "cuda":
        return False, "plain decoding: compiling its steps pays on a GPU"
    if brief:
        return False, "plain decoding: compiling takes longer than a few answers"
    from torch.utils._triton import has_triton

    if not has_triton():
        return False, "plain decoding: Triton, which compiles for a GPU, is not installed or does not run on this one"
    return True, "compiled decoding: on a GPU it takes most of the time from a step; compiled once, when loaded"


def in_words(error: Exception) -> str:
    """What hindered torch.compile, in its own words, cut short: "backend='inductor' raised: …"."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    more = lines[1] if lines[0].endswith(":") and len(lines) > 1 else ""
    return f"{lines[0]} {more}"[:200].strip().rstrip(".")
