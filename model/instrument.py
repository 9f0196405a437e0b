"""Injection and recording: hooks installed once on a decoder, inert unless a ContextVar names the active pass.

One pre-hook per decoder layer does all injection, for every family: the family's own injection is never called. A pass
is active only inside one prefill or replay call of one thread, so nothing has to be removed afterwards and concurrent
requests cannot see one another. A compiled step (model/compiled.py) has no trace of the hooks in it. Knows nothing
about families, tokens or images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from model.probe import Probe

ATTENTION = {  # how attention is computed -> our function's name in transformers' registry
    "sdpa": "deepstack_lens",
    "flash": "deepstack_lens_fa",  # a name with "flash" in it would get masks of another kind
    "eager": "deepstack_lens_eager",
}


class Injection(NamedTuple):
    """`gains[b] * rows` is added for batch row b."""

    source: str
    gains: tuple[float, ...]  # [B]
    rows: Tensor  # [N, d] or [B, N, d]

    def scaled(self) -> Tensor:
        """[N, d] if every batch row gets the same, else [B, N, d]."""
        if all(gain == self.gains[0] for gain in self.gains):
            return self.rows if self.gains[0] == 1.0 else self.rows * self.gains[0]
        return self.rows * self.rows.new_tensor(self.gains)[:, None, None]


class Recorder(Protocol):
    """What a pass can be asked to write down. Tensors are those of the running pass: copy what you keep."""

    def layer_input(self, layer: int, before: Tensor, injected: dict[str, Tensor], after: Tensor) -> None:
        """Input of `layer` before and after injection [B, T, d]; injected: source -> [N, d] or [B, N, d]."""

    def final(self, hidden: Tensor) -> None:
        """Output of the last layer [B, T, d], before the final norm."""

    def attention(self, layer: int, query: Tensor, key: Tensor, scaling: float, window: int | None) -> None:
        """Query [B, H, T, hd] and key [B, H_kv, T, hd] of `layer`, rotated; window: keys it sees, None for all."""


@dataclass
class Pass:
    """One forward pass: what enters before which layer, at which sequence positions, and who writes down."""

    injections: dict[int, list[Injection]]
    positions: Tensor | None  # int64 [N], on the device where what a recorder gets is wanted
    recorder: Recorder | None = None

    def after(self, begin: int) -> Pass:
        """The same pass over the positions from `begin` on."""
        if not begin or self.positions is None:
            return self
        kept = self.positions >= begin
        injections = {
            layer: [entry._replace(rows=entry.rows[..., kept, :]) for entry in entries]
            for layer, entries in self.injections.items()
        }
        return replace(self, injections=injections, positions=self.positions[kept] - begin)

    def before_layer(self, layer: int, hidden: Tensor) -> Tensor:
        """The layer's input with this pass's injections added; the tensor itself where there are none."""
        wanted = self.injections.get(layer, ())
        after, parts = hidden, {}
        if wanted:
            # Layers may lie on several devices: what is added goes to where the stream is.
            parts = {injection.source: injection.scaled().to(hidden.device) for injection in wanted}
            total = None
            for part in parts.values():
                total = part if total is None else total + part
            after = hidden.clone()
            after[:, self.positions.to(hidden.device)] += total
        if self.recorder is not None:
            here = self.positions.device
            moved = {source: part.to(here) for source, part in parts.items()}
            self.recorder.layer_input(layer, hidden.to(here), moved, after.to(here))
        return after


_ACTIVE: ContextVar[Pass | None] = ContextVar("deepstack_lens_pass", default=None)


def _running() -> Pass | None:
    """The pass of this thread; none while a decode step is compiled, in which nothing enters and nothing is recorded.

    torch.compile cannot read a ContextVar; asked in this order it sees a constant, and the hooks leave no trace. Not
    `torch.compiler.is_compiling`, which is true in every thread while one compiles: their stacks would be dropped.
    """
    return None if torch.compiler.is_dynamo_compiling() else _ACTIVE.get()


@contextmanager
def active(current: Pass) -> Iterator[Pass]:
    """Makes `current` the pass of this thread. Never yield to a caller inside: a generator may resume elsewhere."""
    token = _ACTIVE.set(current)
    try:
        yield current
    finally:
        _ACTIVE.reset(token)


def install(decoder: nn.Module) -> list:
    """Hooks a decoder (`.layers`, `.norm`) once, at load. Returns the handles.

    Without an active pass each hook costs one ContextVar read and changes nothing.
    """
    decoder.set_attn_implementation(ATTENTION["sdpa"])
    handles = hook_layers(decoder.layers)

    def before_norm(module: nn.Module, args: tuple) -> None:
        current = _running()
        if current is not None and current.recorder is not None:
            current.recorder.final(args[0].to(current.positions.device))

    handles.append(decoder.norm.register_forward_pre_hook(before_norm))
    return handles


def hook_layers(layers: Iterable[nn.Module]) -> list:
    """Lets an active pass add to the input of these layers, a decoder's or a vision tower's. Returns the handles."""
    handles = []
    for index, layer in enumerate(layers):

        def before(module: nn.Module, args: tuple, index: int = index):
            current = _running()
            if current is None or (current.recorder is None and index not in current.injections):
                return None
            return (current.before_layer(index, args[0]), *args[1:])

        handles.append(layer.register_forward_pre_hook(before))
    return handles


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    """transformers' SDPA attention; in a compiled step without its copies of keys and values for groups of heads."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1 or query.shape[2] > 1 or not torch.compiler.is_dynamo_compiling():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    packed = query.reshape(query.shape[0], key.shape[1], groups, query.shape[3])  # a group's heads as its rows
    out = scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"))
    return out.reshape(query.shape[0], 1, query.shape[1], value.shape[3]), None


def _flash(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    """The package flash-attn where nothing is masked: a prefill, a step alone. SDPA, which takes masks, elsewhere."""
    if attention_mask is not None:
        return _sdpa(module, query, key, value, attention_mask, **kwargs)
    attend = import_module("flash_attn").flash_attn_func  # which nothing else needs
    rows = (states.transpose(1, 2) for states in (query, key, value))  # [B, T, H, hd], as it takes them
    return attend(*rows, softmax_scale=kwargs.get("scaling"), causal=query.shape[2] > 1), None


def _eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    """All scores at once, softmax in float32: slow, and as plain as it can be."""
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    key, value = (repeat_kv(states, query.shape[1] // states.shape[1]) for states in (key, value))
    seen = attention_mask
    if seen is None:  # of the last `query.shape[2]` positions
        lengths = query.shape[2], key.shape[2]
        seen = torch.ones(lengths, dtype=torch.bool, device=query.device).tril(lengths[1] - lengths[0])
    scores = (query @ key.transpose(2, 3) * scaling).float().masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1).to(query.dtype) @ value).transpose(1, 2).contiguous(), None


def _recorded(attend: Callable) -> Callable:
    """An attention function of transformers; a recording pass sees query and key as well."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
        current = _running()
        if current is not None and current.recorder is not None:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            current.recorder.attention(module.layer_idx, query, key, scaling, kwargs.get("sliding_window"))
        return attend(module, query, key, value, attention_mask, **kwargs)

    return attention


for _way, _attend in {"sdpa": _sdpa, "flash": _flash, "eager": _eager}.items():
    AttentionInterface.register(ATTENTION[_way], _recorded(_attend))
    AttentionMaskInterface.register(ATTENTION[_way], sdpa_mask)


def rms(rows: Tensor) -> Tensor:
    """[..., d] -> float32 [...]: sqrt(mean(x^2))."""
    return rows.float().pow(2).mean(-1).sqrt()


@dataclass
class TraceRecorder:
    """Records one batch row (B = 1) of a full pass over prompt and answer, as a Probe asks.

    All stays on the model's device until the pass is over: a copy in the middle of it would wait for the device.
    """

    probe: Probe
    positions: Tensor  # int64 [N] image rows
    hidden_positions: Tensor  # int64 [rows]
    n_layers: int
    residual: list[Tensor] = field(default_factory=list)  # [T] per layer, then the final output
    before: list[Tensor] = field(default_factory=list)  # [T] per layer
    injected: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # [N]
    ratio: list[Tensor] = field(default_factory=list)  # [N] per layer
    cosine: list[Tensor] = field(default_factory=list)  # [N] per layer
    hidden: dict[int, Tensor] = field(default_factory=dict)  # [rows, d]
    rows: dict[int, Tensor] = field(default_factory=dict)  # [H, Q, T] attention
    _unseen: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)  # query positions, what they do not see

    def layer_input(self, layer: int, before: Tensor, injected: dict[str, Tensor], after: Tensor) -> None:
        if layer in self.probe.hidden:
            self.hidden[layer] = after[0, self.hidden_positions].float()
        if not self.probe.norms:
            return
        self.before.append(rms(before[0]))
        self.residual.append(rms(after[0]) if injected else self.before[-1])
        n = len(self.positions)
        if not injected:
            self.ratio.append(torch.zeros(n, device=before.device))
            self.cosine.append(torch.full((n,), torch.nan, device=before.device))
            return
        for source, part in injected.items():
            self.injected[source, layer] = rms(part)
        total = sum(part.float() for part in injected.values())
        image = before[0, self.positions].float()
        length = image.norm(dim=-1)
        self.ratio.append(total.norm(dim=-1) / length)  # inf where the residual is zero, as under base@0
        cosine = (total * image).sum(-1) / (total.norm(dim=-1) * length)
        self.cosine.append(cosine)

    def final(self, hidden: Tensor) -> None:
        if self.n_layers in self.probe.hidden:
            self.hidden[self.n_layers] = hidden[0, self.hidden_positions].float()
        if self.probe.norms:
            self.residual.append(rms(hidden[0]))

    def attention(self, layer: int, query: Tensor, key: Tensor, scaling: float, window: int | None) -> None:
        wanted = self.probe.attention_rows(layer)
        if not wanted:
            return
        place = (wanted, window, key.device)
        if place not in self._unseen:  # the same for most layers
            at = torch.tensor(wanted, device=key.device)
            self._unseen[place] = at, unseen(at, key.shape[2], window)
        self.rows[layer] = attention_rows(query, key, scaling, *self._unseen[place])[0]


def unseen(at: Tensor, length: int, window: int | None = None) -> Tensor:
    """bool [Q, T]: keys after the queries at these positions, or `window` and more before them."""
    ahead = torch.arange(length, device=at.device) - at[:, None]
    return ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)


def attention_rows(query: Tensor, key: Tensor, scaling: float, at: Tensor, hidden: Tensor) -> Tensor:
    """Causal softmax rows float32 [B, H, Q, T] of the queries at these positions, for a pass without cache.

    query [B, H, T, hd], key [B, H_kv, T, hd]; what is `hidden` (bool [Q, T]) gets exactly 0.
    """
    key = repeat_kv(key, query.shape[1] // key.shape[1])
    scores = (query[:, :, at] @ key.transpose(2, 3)) * scaling  # [B, H, Q, T]
    return scores.float().masked_fill(hidden, -torch.inf).softmax(-1)


@dataclass
class EffectRecorder:
    """How far batch rows 1.. stand from batch row 0 at the image rows, before each layer and at the end."""

    positions: Tensor  # int64 [N]
    effect: list[Tensor] = field(default_factory=list)  # [B-1] per layer, then the final output

    def _add(self, hidden: Tensor) -> None:
        image = hidden[:, self.positions].float()  # [B, N, d]
        length = image[0].norm()
        change = (image[1:] - image[:1]).flatten(1).norm(dim=1)
        self.effect.append(torch.where(change > 0, change / length, torch.zeros_like(change)))

    def layer_input(self, layer: int, before: Tensor, injected: dict[str, Tensor], after: Tensor) -> None:
        self._add(after)

    def final(self, hidden: Tensor) -> None:
        self._add(hidden)

    def attention(self, layer: int, query: Tensor, key: Tensor, scaling: float, window: int | None) -> None:
        """Attention is not compared."""
