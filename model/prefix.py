"""What a request has computed already: key-value caches of finished answers, to be taken up where a new prompt agrees.

The next turn, a retry and another plan share the beginning of what was answered before: up to the first other token,
and with another plan up to the first image row, before which no injection is felt. Knows nothing about models or
tokens' meaning.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from model.plan import Plan


@dataclass(frozen=True)
class Held:
    """One finished answer. marks: what stands at each position, a token's id or (image, row)."""

    marks: tuple[Hashable, ...]
    plan: Plan
    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values [1, H, T, hd] per layer
    bytes: int

    def shared(self, marks: Sequence[Hashable], plans: Sequence[Plan]) -> int:
        """How many positions from the start on are the same under all of `plans`."""
        same = all(plan == self.plan for plan in plans)
        for at, (mine, theirs) in enumerate(zip(self.marks, marks, strict=False)):
            if mine != theirs or not same and isinstance(mine, tuple):
                return at
        return min(len(self.marks), len(marks))


class PrefixCache:
    """Key-value caches by what they hold, least recently used out first, up to `max_bytes`."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self._held: list[Held] = []  # least recently used first
        self._lock = threading.Lock()

    def take_up(self, cache: DynamicCache, marks: Sequence[Hashable], plans: Sequence[Plan], shortest: int = 1) -> int:
        """Fill the empty `cache` for a batch of `plans` with the longest beginning of `marks` that is held.

        The last position is always left to compute. Returns the length, 0 where none of `shortest` positions fits. What
        is held stays as it is.
        """
        with self._lock:
            lengths = [min(held.shared(marks, plans), len(marks) - 1) for held in self._held]
            best = max(range(len(lengths)), key=lambda at: (lengths[at], at), default=None)
            if best is None or lengths[best] < shortest:
                return 0
            held = self._held.pop(best)
            self._held.append(held)
        length = lengths[best]
        for layer, (keys, values) in zip(cache.layers, held.layers, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = (
                tensor[:, :, :length].expand(len(plans), -1, -1, -1) for tensor in (keys, values)
            )
        return length

    def keep(self, cache: DynamicCache, marks: Sequence[Hashable], plan: Plan) -> None:
        """Hold the `cache` [1, H, T, hd] of an answer under `plan` whose first T positions are `marks`.

        Caches that cannot be cut at any position (sliding windows, linear attention) are not held, nor is one over the
        limit; what is a beginning of the new one makes room for it.
        """
        if not all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers):
            return
        length = cache.get_seq_length()
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        size = sum(tensor.element_size() * tensor.nelement() for pair in layers for tensor in pair)
        new = Held(tuple(marks[:length]), plan, layers, size)
        with self._lock:
            self._held = [
                held for held in self._held if held.plan != plan or new.shared(held.marks, [plan]) < len(held.marks)
            ]
            if size <= self.max_bytes:
                self._held.append(new)
            self.bytes = sum(held.bytes for held in self._held)
            while self.bytes > self.max_bytes:
                self.bytes -= self._held.pop(0).bytes

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._held.clear()
            self.bytes = 0

    def __len__(self) -> int:
        return len(self._held)
