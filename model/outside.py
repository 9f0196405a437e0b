"""A loaded model seen and driven from outside, by hooks of our own that are gone afterwards.

What enters and leaves each decoder layer, what enters the vision tower, what its stacks would be from other blocks. The
hooks come after the engine's, so a layer is seen with what was injected into it. They belong to the model, not to one
request: for commands that have the model to themselves (`doctor`, `golden`), not for the page.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model.engine import Engine, FeatureCache
from model.errors import UserError
from model.prefix import PrefixCache
from model.prompt import Prompt

Seen = Callable[[int, Tensor], None]  # (layer, hidden states [B, T, d])
TOWERS = ("visual", "vision_tower", "vision_model")  # what families call it in `model.model`


def tower_of(engine: Engine) -> nn.Module:
    """The vision tower; UserError where it is not where families keep it."""
    for name in TOWERS:
        found = getattr(engine.model.model, name, None)
        if found is not None:
            return found
    raise UserError(f"{engine.name} keeps its vision tower in an unknown place, so it cannot be looked at.")


@contextmanager
def layers_seen(decoder: nn.Module, before: Seen, after: Seen) -> Iterator[None]:
    """Calls before(l, input of layer l, injections included) and after(l, its output), in order.

    The input of the final norm is before(number of layers, …).
    """
    handles = []

    def first(value) -> Tensor:
        return (value[0] if isinstance(value, tuple) else value).detach()

    for index, layer in enumerate([*decoder.layers, decoder.norm]):
        handles.append(layer.register_forward_pre_hook(lambda m, args, at=index: before(at, first(args))))
    for index, layer in enumerate(decoder.layers):
        handles.append(layer.register_forward_hook(lambda m, args, output, at=index: after(at, first(output))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def uncached(engine: Engine) -> Iterator[None]:
    """The vision tower runs whenever it is asked, every prompt is read whole, and nothing made meanwhile is kept."""
    cache, engine.cache = engine.cache, FeatureCache(0)
    prefixes, engine.prefixes = engine.prefixes, PrefixCache(0)
    try:
        yield
    finally:
        engine.cache, engine.prefixes = cache, prefixes


@contextmanager
def pixels_seen(engine: Engine, theirs: Sequence[dict[str, Tensor]] | None = None) -> Iterator[list[dict[str, Tensor]]]:
    """What enters the vision tower, call by call: argument name -> tensor, on the CPU; nothing comes from the cache.

    With `theirs` the tower runs on those tensors instead, in turn and from the first again after the last. UserError
    where one is missing.
    """
    tower = tower_of(engine)
    signature = inspect.signature(tower.forward)
    calls: list[dict[str, Tensor]] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict):
        bound = signature.bind(*args, **kwargs)
        given = {name: value for name, value in bound.arguments.items() if isinstance(value, Tensor)}
        calls.append({name: value.detach().cpu() for name, value in given.items()})
        if not theirs:
            return None
        call = (len(calls) - 1) % len(theirs)
        for name, value in given.items():
            if name not in theirs[call]:
                raise UserError(f"The record has no pixels.{call}.{name}, which this model's vision tower takes.")
            bound.arguments[name] = theirs[call][name].to(value.device, value.dtype)
        return bound.args, bound.kwargs

    handle = tower.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with uncached(engine):
            yield calls
    finally:
        handle.remove()


def blocks_of(engine: Engine) -> nn.ModuleList:
    """The vision tower's blocks, in order; UserError where the tower keeps them in an unknown place."""
    depth = engine.layout.n_vision_layers
    for name, module in tower_of(engine).named_modules():
        if name.rpartition(".")[2] in ("blocks", "layers") and isinstance(module, nn.ModuleList):
            if len(module) == depth:
                return module
    raise UserError(f"{engine.name} keeps its {depth} vision blocks in an unknown place, so they cannot be looked at.")


def tap_of(engine: Engine) -> dict[str, int]:
    """Source -> vision block whose output the config makes it of, 0-based; without sources that have no such choice."""
    listed = {source.name: source.tap for source in engine.layout.sources if source.tap is not None}
    index = getattr(engine.model.config, "vision_feature_layer", None)
    chosen = {index} if isinstance(index, int) else set(index or ())
    if listed or len(chosen) != 1:  # of several levels at once: of no one block
        return listed
    block = (chosen.pop() % (engine.layout.n_vision_layers + 1)) - 1  # hidden state 0 is the embeddings
    return {source.name: block for source in engine.layout.sources}


def tapped_blocks(engine: Engine, prompt: Prompt, names: Sequence[str]) -> dict[str, int | None]:
    """Source -> the last vision block that it depends on, found by disturbing blocks one by one; None for none.

    Disturbing a block changes what is tapped after it and at it, and nothing that is tapped before it.
    """
    blocks, taps = blocks_of(engine), tap_of(engine)
    with uncached(engine):
        healthy = engine.see(prompt).features
        changed: dict[int, set[str]] = {}

        def disturb(at: int) -> None:
            handle = blocks[at].register_forward_hook(_disturbed, prepend=True)  # before those that write down
            try:
                seen = engine.see(prompt).features
            finally:
                handle.remove()
            changed[at] = {name for name in names if not torch.equal(seen[name], healthy[name])}

        likely = {at for name in names if name in taps for at in (taps[name], taps[name] + 1) if at < len(blocks)}
        for at in sorted(likely):
            disturb(at)
        as_listed = all(
            name in taps and name in changed[taps[name]] and name not in changed.get(taps[name] + 1, ())
            for name in names
        )
        for at in range(len(blocks)) if not as_listed else ():
            if at not in changed:
                disturb(at)
    return {name: max((at for at, hit in changed.items() if name in hit), default=None) for name in names}


def _disturbed(module: nn.Module, args: tuple, output):
    """A block's output with other rows; not a multiple of them, which a norm would take away again."""
    rows = output[0] if isinstance(output, tuple) else output
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(rows.device, rows.dtype)
    return _with_rows(output, rows + noise * rows.float().std().to(rows.dtype))


def retapped(engine: Engine, prompt: Prompt, pairs: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Tensor]:
    """Rows [N, d] that a source would have if it were made of another vision block, through the same merger.

    pairs: (source, block); those that the tower cannot make are left out. One pass of the tower for each other block.
    """
    blocks, taps = blocks_of(engine), tap_of(engine)
    wanted: dict[tuple[int, int], list[str]] = {}  # (listed block, other block) -> sources
    for name, other in pairs:
        if name in taps and 0 <= other < len(blocks):
            wanted.setdefault((taps[name], other), []).append(name)
    found: dict[tuple[str, int], Tensor] = {}
    for (listed, other), names in wanted.items():
        handles = _instead(blocks, listed, other)
        try:
            with uncached(engine):
                seen = engine.see(prompt).features
        finally:
            for handle in handles:
                handle.remove()
        found |= {(name, other): seen[name] for name in names}
    return found


def _instead(blocks: nn.ModuleList, listed: int, other: int) -> list:
    """Hooks that make block `listed` give what block `other` gives; what is tapped further up is no longer right."""

    def skipped(module: nn.Module, args: tuple, kwargs: dict, output):
        return _with_rows(output, args[0] if args else kwargs["hidden_states"])

    def carried_on(module: nn.Module, args: tuple, kwargs: dict, output):
        for block in blocks[listed + 1 : other + 1]:
            rows = output[0] if isinstance(output, tuple) else output
            given = (rows, *args[1:]) if args else ()
            output = block.forward(*given, **(kwargs if args else {**kwargs, "hidden_states": rows}))
        return output

    # Before the hooks with which transformers writes hidden states down.
    if other < listed:
        skip = blocks[other + 1 : listed + 1]
        return [block.register_forward_hook(skipped, prepend=True, with_kwargs=True) for block in skip]
    return [blocks[listed].register_forward_hook(carried_on, prepend=True, with_kwargs=True)]


def _with_rows(output, rows: Tensor):
    """A block's output with other rows."""
    return (rows, *output[1:]) if isinstance(output, tuple) else rows
