"""Plans: which stack enters before which layer, and with which gain.

A plan is a sparse matrix of gains, stacks x layers, and the one object that every part reads and writes: the picture,
the URL, the command line, a sweep. "Before layer m" is the only convention. The layers are the LLM's, but for vision
stacks ("v0"), which enter the vision tower's own stream: their layers are the tower's, and written so, `v0@v3`. Nothing
here knows tensors or models; a `Layout` says which plans a model can run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from model.errors import UserError

if TYPE_CHECKING:
    from model.layout import Layout

BASE = "base"
DEEPEST = "deepest tap only"  # the preset that is to a model without a base what base@0 is to the others
VISION = "v"  # "v0": stack 0 of those that enter the vision tower's own layers; before one of its layers: "v0@v3"
TAP = "tap"  # "tap6": what vision block 6 gives, through the merger of the nearest trained tap
_ENTRY = re.compile(r"(?P<source>[^@*\s]+)\s*@\s*(?P<layer>[^@*\s]+)\s*(?:\*\s*(?P<gain>[^@*\s]+))?")
_HOW = "Write a plan as source@layer or source@layer*gain, joined by commas, for example base@0,0@1,1@2*0.5 (or none)"


class Entry(NamedTuple):
    """One injection: `gain` times the rows of `source`, added before layer `layer`, the LLM's or the vision tower's."""

    source: str
    layer: int
    gain: float

    @property
    def in_tower(self) -> bool:
        """Whether it enters the vision tower, not the LLM."""
        return enters_tower(self.source)

    @property
    def place(self) -> str:
        """Source and layer as they are written: "0@1", "v0@v3"."""
        return f"{self.source}@{VISION if self.in_tower else ''}{self.layer}"

    def __str__(self) -> str:
        gain = repr(self.gain).removesuffix(".0")
        return self.place if self.gain == 1.0 else f"{self.place}*{gain}"


def enters_tower(source: str) -> bool:
    """Whether a source of this name enters the vision tower's layers, not the LLM's."""
    return source.startswith(VISION)


def source_order(source: str) -> tuple[int, int]:
    """Sort key of source names: base, the stacks by number, untrained taps by vision block, vision stacks by number."""
    if source == BASE:
        return (0, 0)
    for kind, prefix in enumerate((VISION, TAP)):
        if source.startswith(prefix):
            return (3 - kind, int(source.removeprefix(prefix)))
    return (1, int(source))


class Plan:
    """An immutable, hashable set of injections in canonical order (base first, stacks by number, then by layer).

    Entries with gain 0 are dropped, a (source, layer) pair given twice is refused. `str(plan)` is canonical and
    `Plan.parse(str(plan)) == plan`; the empty plan is written "none".
    """

    __slots__ = ("entries",)
    entries: tuple[Entry, ...]

    def __init__(self, entries: Iterable[tuple[str, int, float]] = ()):
        seen: set[tuple[str, int]] = set()
        kept = []
        for source, layer, gain in entries:
            name = _source(source)
            entry = Entry(name, _layer(layer, name), _gain(gain))
            if (entry.source, entry.layer) in seen:
                raise UserError(f"{entry.place} is given twice. Give each stack and layer once.")
            seen.add((entry.source, entry.layer))
            if entry.gain != 0.0:
                kept.append(entry)
        kept.sort(key=lambda e: (source_order(e.source), e.layer))
        object.__setattr__(self, "entries", tuple(kept))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Plan cannot be changed ({name}); make a new one")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Plan cannot be changed ({name}); make a new one")

    def __reduce__(self):
        return (Plan, (self.entries,))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.entries == other.entries

    def __hash__(self) -> int:
        return hash(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __bool__(self) -> bool:
        return bool(self.entries)

    def __str__(self) -> str:
        return ",".join(map(str, self.entries)) or "none"

    def __repr__(self) -> str:
        return f"Plan.parse({str(self)!r})"

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Reads `base@0,0@1,1@2*0.5`. Spaces are ignored, a stray comma too; "none" or nothing is the empty plan."""
        if not isinstance(text, str):
            raise UserError(f"A plan is text, not {type(text).__name__}. {_HOW}.")
        parts = [part.strip() for part in re.split(r"[,;\n]", text)]
        parts = [part for part in parts if part]
        if [part.lower() for part in parts] in ([], ["none"]):
            return cls()
        entries = []
        for part in parts:
            match = _ENTRY.fullmatch(part)
            if match is None:
                raise UserError(f"“{_short(part)}” is not an injection. {_HOW}.")
            entries.append((match["source"], match["layer"], match["gain"] if match["gain"] is not None else 1.0))
        return cls(entries)

    def to_json(self) -> list[dict]:
        """A list of {stack, layer, gain}, in canonical order."""
        return [{"stack": e.source, "layer": e.layer, "gain": e.gain} for e in self.entries]

    @classmethod
    def from_json(cls, data: Sequence[dict]) -> Plan:
        """The inverse of `to_json`; a missing gain is 1."""
        try:
            return cls((item["stack"], item["layer"], item.get("gain", 1.0)) for item in data)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"A plan in JSON is a list of {{stack, layer, gain}}, not {_short(data)}.") from error

    def gain(self, source: str, layer: int) -> float:
        """The gain at one place, 0.0 where the plan injects nothing."""
        return next((e.gain for e in self.entries if e.source == source and e.layer == layer), 0.0)

    def sources(self) -> tuple[str, ...]:
        """The sources used, each once, base first."""
        return tuple(dict.fromkeys(e.source for e in self.entries))

    def at(self, layer: int) -> tuple[tuple[str, float], ...]:
        """What enters before LLM layer `layer`: (source, gain) pairs, base first."""
        return tuple((e.source, e.gain) for e in self.entries if e.layer == layer and not e.in_tower)

    @property
    def tower(self) -> Plan:
        """What of it enters the vision tower: all that the features of an image depend on."""
        return Plan(e for e in self.entries if e.in_tower)

    def toggle(self, source: str, layer: int) -> Plan:
        """Without this injection if it is there, with it (gain 1) if it is not."""
        return self.with_gain(source, layer, 0.0 if self.gain(source, layer) else 1.0)

    def with_gain(self, source: str, layer: int, gain: float) -> Plan:
        """The same plan with this gain at (source, layer); 0 removes the injection."""
        rest = (e for e in self.entries if (e.source, e.layer) != (source, layer))
        return Plan([*rest, (source, layer, gain)])

    def move(self, source: str, old: int, new: int) -> Plan:
        """The same plan with the injection of `source` before layer `old` moved before layer `new`, gain kept."""
        gain = self.gain(source, old)
        if not gain:
            raise UserError(f"{Entry(source, old, 1.0).place} is not in the plan {self}, so it cannot be moved.")
        if old != new and self.gain(source, new):
            raise UserError(
                f"{Entry(source, new, 1.0).place} is already in the plan; remove it first or move {source} elsewhere."
            )
        return self.with_gain(source, old, 0.0).with_gain(source, new, gain)

    def without(self, source: str) -> Plan:
        """The same plan with every injection of `source` removed."""
        return Plan(e for e in self.entries if e.source != source)

    def matrix(self, sources: Sequence[str], n_layers: int) -> np.ndarray:
        """Gains as float64 [sources, layers]; entries outside are left out."""
        gains = np.zeros((len(sources), n_layers))
        for e in self.entries:
            if e.source in sources and e.layer < n_layers:
                gains[list(sources).index(e.source), e.layer] = e.gain
        return gains

    def validate(self, layout: Layout) -> Plan:
        """Returns itself if the model can run it, else raises a UserError that lists what is allowed."""
        names = [source.name for source in (*layout.all_sources, *layout.untrained)]
        for e in self.entries:
            if e.source not in names:
                for source in layout.sources:
                    if source.tap is not None and e.source == f"{TAP}{source.tap}":
                        raise UserError(
                            f"{e.source} is this model's stack {source.name}: write {source.name}@{e.layer}."
                        )
                trained = [source.name for source in layout.all_sources]
                has = f"has {trained[0]} only, it has no stacks" if len(trained) == 1 else f"has {', '.join(trained)}"
                if layout.untrained:
                    has += f" and untrained taps of its vision blocks 0 to {layout.n_vision_layers - 1}"
                raise UserError(f"The plan {self} uses the stack “{_short(e.source)}”, but this model {has}.")
            if e.layer >= layout.layers_of(e.source):
                last, whose = layout.layers_of(e.source) - 1, "vision" if e.in_tower else "LLM"
                raise UserError(
                    f"The plan {self} injects before layer {e.layer}, but this model's {whose} layers are 0 to {last}."
                )
        return self


def _short(value: object, limit: int = 60) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _source(value: object) -> str:
    name = str(value).strip().lower()
    if name == BASE:
        return name
    number = re.fullmatch(rf"({TAP}|{VISION})?([0-9]{{1,4}})", name)
    if number:
        return f"{number[1] or ''}{int(number[2])}"
    raise UserError(
        f"“{_short(value)}” is not a source: use base or the number of a stack (0, 1, 2 …), tap6 for an untrained tap "
        f"after vision block 6, or v0 for a stack that enters the vision tower. {_HOW}."
    )


def _layer(value: object, source: str) -> int:
    """A layer as a number, or as text: "3", and of the vision tower "v3", for the sources that enter there."""
    text = str(value).strip().lower()
    prefix = VISION if enters_tower(source) and isinstance(value, str) else ""
    if re.fullmatch(rf"{prefix}[0-9]{{1,4}}", text):
        return int(text.removeprefix(prefix))
    if prefix and text.isdecimal():
        raise UserError(
            f"{source} enters the vision tower: write {source}@{VISION}{text}, its layer with a v before it."
        )
    if re.fullmatch(rf"{VISION}[0-9]{{1,4}}", text):
        raise UserError(
            f"{source} enters the LLM, not the vision tower: write {source}@{text.removeprefix(VISION)}; only vision "
            f"stacks (v0, v1 …) enter before {text}."
        )
    raise UserError(f"“{_short(value)}” is not a layer: use a whole number from 0. {_HOW}.")


def _gain(value: object) -> float:
    try:
        gain = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        gain = math.nan
    if not math.isfinite(gain):
        raise UserError(f"“{_short(value)}” is not a gain: use a number such as 1, 0.5 or -1. {_HOW}.")
    return gain


def _stacks_at(layout: Layout, layers: Sequence[int]) -> Plan:
    """The default plan's base, and its stacks (in order) at `layers`, gains kept."""
    stacks = [e for e in layout.default if e.source != BASE]
    base = [e for e in layout.default if e.source == BASE]
    return Plan([*base, *((e.source, layer, e.gain) for e, layer in zip(stacks, layers, strict=True))])


def presets(layout: Layout) -> dict[str, Plan]:
    """Named plans for this model, only those it can run, each plan once (under its first name)."""
    default = layout.default
    known = {source.name for source in layout.all_sources}
    stacks = [e for e in default if e.source != BASE]
    names = list(dict.fromkeys(e.source for e in stacks))
    layers = [e.layer for e in stacks]
    first = layers[0] if layers else 0
    single = Plan(e for e in default if e.source == BASE) or Plan([(BASE, 0, 1.0)])
    wanted: dict[str, Plan] = {"as trained": default, "single injection": single, "none": Plan()}
    if BASE not in known:
        wanted[DEEPEST] = Plan(e for e in default if e.layer == 0)
    for name in names:
        wanted[f"only {name}"] = Plan(e for e in default if e.source in (BASE, name))
    for name in names:
        wanted[f"all but {name}"] = default.without(name)
    wanted["every 2nd layer"] = _stacks_at(layout, [first + 2 * i for i in range(len(layers))])
    wanted["every 3rd layer"] = _stacks_at(layout, [first + 3 * i for i in range(len(layers))])
    wanted["one layer deeper"] = _stacks_at(layout, [layer + 1 for layer in layers])
    wanted["two layers deeper"] = _stacks_at(layout, [layer + 2 for layer in layers])
    wanted["reversed"] = _stacks_at(layout, layers[::-1])

    chosen: dict[str, Plan] = {}
    for label, plan in wanted.items():
        fits = all(e.source in known and e.layer < layout.layers_of(e.source) for e in plan)
        if fits and plan not in chosen.values():
            chosen[label] = plan
    return chosen
