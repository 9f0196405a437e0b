"""Golden traces: what one run of a DeepStack model was, in a few numbers, and what sets two such records apart.

A record (`Golden`) holds seeded projections of the rows that enter and leave every decoder layer. A projection is
linear, so input(l) - output(l-1) is the projection of exactly what was added before layer l, whatever happened
upstream: each layer is judged by itself against our stacks. The comparison is in four steps:

1. explain(): which of our sources, whole, scaled, cut, shifted or from another block, accounts for what was added
2. judge(): from what was found and what the plan says to a fault in words
3. with nothing found: does one layer, the head or the decoding part, or are there only numerics
4. the verdict, with figures

Knows nothing about models, files or how a record is made. The format is in app/GOLDEN.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np

from model.plan import BASE, Entry, Plan, source_order

SEED, COLUMNS = 0, 16  # of the projections that we write; a record may have others
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}  # relative, of a whole model's rows
UNIT = {"float32": 1e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}  # rounding of one row, with room for its additions
OTHER = 1e-1  # tolerance of any other number format: quantised weights
BETTER = 0.25  # an explanation replaces a simpler one when its squared error is less than this share of it
_GAMMA, _MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def signs(seed: int, columns: int, width: int) -> np.ndarray:
    """float32 [columns, width] of +1 and -1: the top bit of splitmix64's output number column * width + j (0: +1)."""
    with np.errstate(over="ignore"):
        state = np.arange(1, columns * width + 1, dtype=np.uint64) * np.uint64(_GAMMA) + np.uint64(seed)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(_MIX[0])
        state = (state ^ (state >> np.uint64(27))) * np.uint64(_MIX[1])
    state ^= state >> np.uint64(31)
    return (1 - 2 * (state >> np.uint64(63)).astype(np.float32)).reshape(columns, width)


@dataclass(frozen=True, eq=False)
class Golden:
    """One record. T prompt tokens, N visual rows, L layers, P projected columns, A answer tokens, V vocabulary."""

    ids: np.ndarray  # int64 [T]
    answer: np.ndarray  # int64 [A]
    image_positions: np.ndarray  # int64 [N], in the prompt
    inputs: np.ndarray  # float32 [L+1, T, P]: input of layer l, injections included; last: input of the final norm
    outputs: np.ndarray  # float32 [L, T, P]: output of layer l, before what is injected after it
    stacks: dict[str, np.ndarray]  # source -> float32 [N, P]; may lack some in a record from elsewhere
    logits: np.ndarray  # float32 [A+1, V]: row a predicts answer token a, the last row what follows
    pixels: tuple[dict[str, np.ndarray], ...]  # per call of the vision tower
    images: tuple[np.ndarray, ...] = ()  # uint8 [height, width, 3], or none
    position_ids: np.ndarray | None = None  # int64 [..., T]
    about: dict = field(default_factory=dict)  # the JSON beside the tensors

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.outputs)

    @property
    def dtype(self) -> str:
        """The number format that the run was computed in."""
        return str(self.about.get("dtype", "float32"))

    def added(self) -> np.ndarray:
        """float32 [L+1, T, P]: what stands before layer l and did not leave layer l-1; for l = 0 the whole input."""
        return np.concatenate([self.inputs[:1], self.inputs[1:] - self.outputs])

    def noise(self) -> np.ndarray:
        """float32 [L+1, T]: how far rounding can move one row of `added`."""
        return UNIT.get(self.dtype, UNIT["bfloat16"]) * np.linalg.norm(self.inputs, axis=-1)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, in words, and the same as values."""

    kind: str  # "missing" | "tap" | "permuted" | "late" | "early" | "extra" | "rows" | "scaled" | "foreign" | …
    text: str
    where: dict = field(default_factory=dict)  # stacks, layers, position … as plain values

    def to_json(self) -> dict:
        """Plain values."""
        return {"kind": self.kind, "text": self.text, **self.where}


@dataclass(frozen=True)
class Verdict:
    """What two records have to say to each other."""

    findings: tuple[Finding, ...]
    figures: dict  # relative differences: stacks, layers, logits; and the tolerance

    @property
    def ok(self) -> bool:
        """True when they agree."""
        return not self.findings


class Part(NamedTuple):
    """Something that enters before one layer: a source, and what sets it apart from our own rows of that source."""

    source: str
    gain: float = 1.0
    block: int | None = None  # the vision block it is made of, None for our own
    start: int | None = None  # from this visual row on, rows are not the ones that belong there
    shift: int | None = None  # row i is row i - shift from `start` on; None with a start: nothing enters there


# ---- 1. what enters before one layer


def explain(
    added: np.ndarray,
    noise: np.ndarray,
    sources: Mapping[str, np.ndarray],
    expected: Mapping[str, float],
    variants: Mapping[tuple[str, int], np.ndarray],
    tolerance: float,
) -> tuple[tuple[Part, ...], float]:
    """The simplest parts that account for the rows added before one layer, and what they leave unexplained.

    added [N, P], noise [N]; sources: name -> [N, P], ours; expected: source -> gain, as the plan has it here; variants:
    (source, vision block) -> [N, P]. The second value is a share of a stack's size: 0 all is explained.
    """
    added, noise = added.astype(np.float64), noise.astype(np.float64)
    live = {name: rows.astype(np.float64) for name, rows in sources.items() if rows.any()}
    unseen = tuple(Part(name, gain) for name, gain in expected.items() if name not in live)  # zeros: no one can tell
    expected = {name: gain for name, gain in expected.items() if name in live}
    known = [live[name] for name in (expected or live)]
    scale = float(np.sqrt(np.mean([np.square(rows).sum(1).mean() for rows in known]))) if known else 1.0
    weight = 1.0 / (8 * noise + 4 * tolerance * scale + 1e-30)  # [N] a row's error in units of what is allowed
    exact = noise + tolerance * scale / 50  # [N] errors that no other explanation could better
    nothing = np.zeros_like(added)

    def cost(fit: np.ndarray) -> float:
        return float((np.square(added - fit).sum(1) * weight**2).sum())

    def fitted(rows: Sequence[np.ndarray], target: np.ndarray) -> np.ndarray:
        a = np.stack([(r * weight[:, None]).ravel() for r in rows], axis=1)
        return np.linalg.lstsq(a, (target * weight[:, None]).ravel(), rcond=None)[0]

    plain = sum((gain * live[name] for name, gain in expected.items()), nothing)
    best = (tuple(Part(name, gain) for name, gain in expected.items()), plain)
    if (np.linalg.norm(added - plain, axis=1) <= exact).all():
        return (*unseen, *best[0]), 0.0

    def offer(parts: tuple[Part, ...], fit: np.ndarray) -> None:
        nonlocal best
        if (np.linalg.norm(added - best[1], axis=1) > exact).any() and cost(fit) < BETTER * cost(best[1]):
            best = (parts, fit)

    offer((), nothing)
    for name, rows in live.items():
        gain = float(fitted([rows], added)[0])
        offer((Part(name, gain),), gain * rows)
    wanted = list(expected) or list(live)
    for name in wanted:
        others = tuple(Part(other, gain) for other, gain in expected.items() if other != name)
        rest = sum((gain * live[other] for other, gain in expected.items() if other != name), nothing)
        for (source, block), rows in variants.items():
            if source == name and rows.any():
                gain = float(fitted([rows.astype(np.float64)], added - rest)[0])
                offer((*others, Part(name, gain, block)), rest + gain * rows)
    names = list(live)
    gains = fitted([live[name] for name in names], added)
    names = [name for name, gain in zip(names, gains, strict=True) if abs(gain) > 0.1]
    if len(names) > 1:
        gains = fitted([live[name] for name in names], added)
        fit = sum(gain * live[name] for name, gain in zip(names, gains, strict=True))
        offer(tuple(Part(name, float(gain)) for name, gain in zip(names, gains, strict=True)), fit)
    for name in wanted:
        others = tuple(Part(other, gain) for other, gain in expected.items() if other != name)
        rest = sum((gain * live[other] for other, gain in expected.items() if other != name), nothing)
        gain = expected.get(name, 1.0)
        for part, fit in _moved_rows(name, gain, added - rest, live[name], weight):
            offer((*others, part), rest + fit)
    parts, fit = best
    over = np.square(added - fit).sum(1) - np.square(8 * noise)
    return (*unseen, *parts), float(np.sqrt(np.maximum(over, 0).mean())) / scale


def _moved_rows(
    name: str, gain: float, target: np.ndarray, rows: np.ndarray, weight: np.ndarray
) -> Iterable[tuple[Part, np.ndarray]]:
    """The best explanation by rows cut off, and by rows shifted: (part, fit [N, P]).

    A change point: rows before it are where they belong, rows from it on are absent, or belong `shift` rows later.
    """
    rows = gain * rows
    n = len(rows)
    right = np.square(target - rows).sum(1) * weight**2  # [n] error of each row in its own place
    empty = np.square(target).sum(1) * weight**2
    before = np.concatenate([[0.0], np.cumsum(right)])[:n]  # error of rows 0 .. at-1

    def after(errors: np.ndarray) -> np.ndarray:
        return np.cumsum(errors[::-1])[::-1]  # [n] error of rows at ..

    at = int((before + after(empty)).argmin())
    if at > 0:
        fit = rows.copy()
        fit[at:] = 0
        yield Part(name, gain, start=at), fit
    # error of row i if it held row j, as |t|^2 - 2 t.r + |r|^2
    pairs = np.square(target).sum(1)[:, None] - 2 * target @ rows.T + np.square(rows).sum(1)[None]
    pairs = np.maximum(pairs, 0) * (weight**2)[:, None]
    best = (np.inf, 0, 0)
    for shift in range(-(n - 1), n):
        if shift == 0:
            continue
        errors = empty.copy()
        inside = np.arange(max(shift, 0), n + min(shift, 0))
        errors[inside] = pairs[inside, inside - shift]
        total = before + after(errors)
        where = int(total.argmin())
        best = min(best, (float(total[where]), shift, where))
    if not np.isfinite(best[0]):
        return
    # Rows may come round again within what is shifted; which, and the exact first row, is tried out near the best.
    _, shift, where = best
    tries = []
    for at in range(max(0, where - abs(shift) - 1), min(n - 1, where + abs(shift) + 1) + 1):
        index = np.arange(at, n)
        for round_again in (False, True):
            origin = at + (index - at - shift) % (n - at) if round_again else index - shift
            fit = rows.copy()
            fit[at:] = np.where(((origin >= 0) & (origin < n))[:, None], rows[np.clip(origin, 0, n - 1)], 0)
            errors = np.square(target - fit).sum(1) * weight**2
            tries.append((round(float(errors.sum()), 6), at, round_again, fit, errors))
    _, at, round_again, fit, errors = min(tries, key=lambda found: found[:3])
    if round_again:  # seven rows on by three, or back by four
        period = n - at
        shift = (shift + period // 2) % period - period // 2
    while at < n - 1 and right[at] <= 4 * errors[at] + 1e-6:  # equal rows (a blank sky) are not misaligned yet
        at += 1
    yield Part(name, gain, start=at, shift=shift), fit


# ---- 2. from parts to faults


def judge(
    expected: Iterable[Entry],
    found: Mapping[int, Sequence[Part]],
    unexplained: Mapping[int, float],
    taps: Mapping[str, int],
    positions: np.ndarray,
    n_layers: int,
) -> list[Finding]:
    """The faults that set what was found apart from the plan. found: layer -> parts; unexplained: layer -> share."""
    findings: list[Finding] = []
    wanted = {(entry.source, entry.layer): entry.gain for entry in expected}
    seen = {(part.source, layer): part for layer, parts in found.items() for part in parts}
    findings += _taps(seen, taps)
    findings += _rows(seen, positions)

    lost = [(s, at) for s, at in wanted if (s, at) not in seen and at not in unexplained]
    extra = [(s, at) for s, at in seen if (s, at) not in wanted]
    moved = {}
    for source, at in lost:
        there = [layer for name, layer in extra if name == source]
        if there:
            moved[source, at] = min(there, key=lambda layer: abs(layer - at))
    if len(moved) > 1 and {at for _, at in moved} == set(moved.values()):
        order = sorted(moved, key=lambda entry: entry[1])
        now = {layer: source for (source, _), layer in moved.items()}
        findings.append(
            Finding(
                "permuted",
                f"{_stacks(s for s, _ in order)} are permuted: "
                + ", ".join(f"before layer {at} comes {_stack(now[at])} instead of {_stack(s)}" for s, at in order)
                + ".",
                {
                    "stacks": [s for s, _ in order],
                    "found": [now[at] for _, at in order],
                    "layers": [at for _, at in order],
                },
            )
        )
    else:
        for delta in sorted({layer - at for (_, at), layer in moved.items()}, key=abs):
            group = [(s, at) for (s, at), layer in moved.items() if layer - at == delta]
            fallen = [(s, at) for s, at in lost if (s, at) not in moved and at + delta >= n_layers and delta > 0]
            lost = [entry for entry in lost if entry not in fallen]
            names = [s for s, _ in group]
            how = f"{_count(abs(delta), 'layer')} {'late' if delta > 0 else 'early'}"
            text = (
                f"{_stacks(names)} {_is(names)} added {how}: before layer "
                f"{_list(at + delta for _, at in group)} instead of {_list(at for _, at in group)}."
            )
            if fallen:
                text += f" {_stacks(s for s, _ in fallen)} would come after the last layer: nothing of it enters."
            where = {"stacks": names, "layers": [at + delta for _, at in group], "by": delta}
            findings.append(Finding("late" if delta > 0 else "early", text, where))
    gone = [(s, at) for s, at in lost if (s, at) not in moved]
    if gone:
        names, layers = [s for s, _ in gone], [at for _, at in gone]
        text = (
            f"{_stacks(names)} {_is(names)} missing: nothing of {'it' if len(names) == 1 else 'them'} enters before "
            f"layer {_list(layers)}."
        )
        findings.append(Finding("missing", text, {"stacks": names, "layers": layers}))
    for source, at in extra:
        if at not in [layer for (s, _), layer in moved.items() if s == source]:
            text = f"{_stack(source)} also enters before layer {at}, where the plan has nothing of it."
            findings.append(Finding("extra", _capital(text), {"stacks": [source], "layers": [at]}))
    for (source, at), part in seen.items():
        want = wanted.get((source, at), 1.0)
        if abs(part.gain - want) > 0.05 * abs(want) and part.block is None:
            text = f"{_stack(source)} enters before layer {at} scaled by {part.gain:.3g} instead of {want:g}."
            findings.append(
                Finding("scaled", _capital(text), {"stacks": [source], "layers": [at], "gain": round(part.gain, 4)})
            )
    for layer, share in unexplained.items():
        names = [source for source, at in wanted if at == layer]
        text = f"What enters before layer {layer} is none of this model's stacks ({share:.0%} of it is unexplained"
        text += f"; {_stacks(names)} should enter there)." if names else "; nothing should enter there)."
        findings.append(Finding("foreign", text, {"stacks": names, "layers": [layer]}))
    return findings


def _taps(seen: Mapping[tuple[str, int], Part], taps: Mapping[str, int]) -> list[Finding]:
    """Stacks made of other vision blocks than the config says: exchanged among one another, or early, or late."""
    odd = {source: part.block for (source, _), part in seen.items() if part.block is not None}
    if not odd:
        return []
    names = sorted(odd, key=source_order)
    ours = [taps[name] for name in names]
    theirs = [odd[name] for name in names]
    where = {"stacks": names, "blocks": theirs, "expected": ours}
    if len(names) > 1 and sorted(ours) == sorted(theirs):
        text = (
            f"{_stacks(names)} are permuted before their mergers: the mergers get vision blocks {_list(theirs)} "
            f"instead of {_list(ours)}."
        )
        return [Finding("permuted", text, where)]
    findings = []
    for delta in sorted({block - tap for block, tap in zip(theirs, ours, strict=True)}):
        group = [at for at in range(len(names)) if theirs[at] - ours[at] == delta]
        chosen = [names[at] for at in group]
        blocks, wanted = [theirs[at] for at in group], [ours[at] for at in group]
        text = (
            f"The taps of {_stacks(chosen, capital=False)} are {_count(abs(delta), 'block')} "
            f"{'early' if delta < 0 else 'late'}: after vision block {_list(blocks)} instead of {_list(wanted)}."
        )
        findings.append(Finding("tap", text, {"stacks": chosen, "blocks": blocks, "expected": wanted, "by": delta}))
    return findings


def _rows(seen: Mapping[tuple[str, int], Part], positions: np.ndarray) -> list[Finding]:
    """Stacks whose rows stop, or are not in their places, from one visual row on."""
    findings = []
    groups: dict[tuple[int, int | None], list[str]] = {}
    for (source, _), part in seen.items():
        if part.start is not None:
            groups.setdefault((part.start, part.shift), []).append(source)
    for (start, shift), names in groups.items():
        names = sorted(set(names), key=source_order)
        where = {"stacks": names, "visual_token": start, "position": int(positions[start]), "by": shift}
        place = f"visual token {start} (position {positions[start]} of the prompt) on"
        if shift is None:
            text = f"{_stacks(names)} {'stops' if len(names) == 1 else 'stop'}: nothing enters from {place}."
        else:
            text = (
                f"The rows of {_stacks(names, capital=False)} are misaligned from {place}: each is "
                f"{_count(abs(shift), 'token')} too {'late' if shift > 0 else 'early'}."
            )
        findings.append(Finding("rows", text, where))
    return findings


def _stack(name: str) -> str:
    return "the base" if name == BASE else f"stack {name}"


def _stacks(names: Iterable[str], capital: bool = True) -> str:
    names = list(names)
    numbers = [name for name in names if name != BASE]
    said = ["the base"] if BASE in names else []
    if numbers:
        said.append(f"stack {numbers[0]}" if len(numbers) == 1 else f"stacks {_list(numbers)}")
    text = " and ".join(said)
    return _capital(text) if capital else text


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _count(n: int, what: str) -> str:
    return f"{'one' if n == 1 else n} {what}{'' if n == 1 else 's'}"


# ---- stacks that enter the vision tower, seen in the base that comes out of it


class Tower(NamedTuple):
    """What the base would be if other stacks entered the vision tower than the plan says."""

    layers: int  # of the vision tower
    bases: Mapping[Plan, np.ndarray]  # plan -> [N, P]


def neighbours(plan: Plan, layers: int) -> list[Plan]:
    """Plans that differ from this one by one fault in a vision tower of so many layers.

    One stack or all missing, or a layer early or late, or two in each other's place.
    """
    entering, others = list(plan.tower), [entry for entry in plan if not entry.in_tower]

    def but(*changed: Entry) -> Plan:
        return Plan([*others, *(entry for entry in changed if 0 <= entry.layer < layers)])

    found = [but()]
    for at, entry in enumerate(entering):
        rest = entering[:at] + entering[at + 1 :]
        found += [but(*rest), *(but(*rest, entry._replace(layer=entry.layer + by)) for by in (1, -1))]
    found += [but(*(entry._replace(layer=entry.layer + by) for entry in entering)) for by in (1, -1)]
    for one, other in combinations(entering, 2):
        rest = [entry for entry in entering if entry not in (one, other)]
        found.append(but(*rest, one._replace(source=other.source), other._replace(source=one.source)))
    return [other for other in dict.fromkeys(found) if other != plan]


def _inside(rows: np.ndarray, ours: np.ndarray, plan: Plan, tower: Tower | None, allowed: float) -> list[Finding]:
    """Why the base differs from ours [N, P], in a model whose stacks enter its vision tower."""
    bases = tower.bases if tower else {}
    apart = {other: _relative(rows, base) for other, base in bases.items()}
    nearest = min(apart, key=apart.__getitem__, default=None)
    if nearest is None or apart[nearest] > 4 * allowed:
        names = [entry.source for entry in plan.tower]
        text = (
            f"The base differs by {_relative(rows, ours):.1e}: what enters the vision tower "
            f"({_stacks(names, capital=False)}) is not what the plan says, or the tower computes something else."
        )
        return [Finding("tower", text, {"stacks": names})]
    found: dict[int, list[Part]] = {}
    for entry in nearest.tower:
        found.setdefault(entry.layer, []).append(Part(entry.source, entry.gain))
    findings = judge(plan.tower, found, {}, {}, np.zeros(0, dtype=np.int64), tower.layers)
    return [replace(finding, text=finding.text.replace("before layer", "before vision layer")) for finding in findings]


# ---- 3 and 4. the comparison


def compare(
    theirs: Golden,
    ours: Golden,
    plan: Plan,
    taps: Mapping[str, int] | None = None,
    variants: Mapping[tuple[str, int], np.ndarray] | None = None,
    tolerance: float | None = None,
    tower: Tower | None = None,
) -> Verdict:
    """What is wrong with their run, beside ours on the same pixels and tokens.

    plan: what ours ran under. taps: source -> vision block. variants: (source, vision block) -> [N, P], what a source
    would be if it were made of another block. tolerance: relative; by default that of their number format. tower: of a
    model whose stacks enter its vision tower.
    """
    allowed = tolerance if tolerance is not None else max(_tolerance(theirs.dtype), _tolerance(ours.dtype))
    image = ours.image_positions
    text = np.setdiff1d(np.arange(len(ours.ids)), image)
    broken = _not_finite(theirs)
    if broken:
        return Verdict((broken,), {"tolerance": allowed})
    figures = _figures(theirs, ours, image, text, allowed)
    added, noise = theirs.added(), theirs.noise()
    found, unexplained, inside = {}, {}, []
    for layer in range(ours.n_layers + 1):
        expected = dict(plan.at(layer))
        rows, parts = added[layer, image], ()
        if len(image):
            parts, left = explain(rows, noise[layer, image], ours.stacks, expected, variants or {}, allowed)
            if plan.tower and BASE in expected and left > 4 * allowed:
                inside += _inside(rows / expected[BASE], ours.stacks[BASE], plan, tower, allowed)
                parts = tuple(Part(name, gain) for name, gain in expected.items())
            elif left > 0.5:
                unexplained[layer] = left
                continue
        if parts:
            found[layer] = parts
    findings = inside + judge(
        [entry for entry in plan if not entry.in_tower], found, unexplained, taps or {}, image, ours.n_layers
    )
    findings += _strays(added, noise, ours, text, findings, allowed)
    findings += _positions(theirs, ours)
    if not findings:
        findings += _elsewhere(figures, theirs, allowed)
    return Verdict(tuple(_said(finding, theirs, ours, allowed) for finding in findings), figures)


def _tolerance(dtype: str) -> float:
    return TOLERANCE.get(dtype, OTHER)


def _not_finite(theirs: Golden) -> Finding | None:
    """The first place in the order of computing that is not a number."""
    places = [(f"the rows of {_stack(name)}", rows) for name, rows in theirs.stacks.items()]
    for layer in range(theirs.n_layers):
        places += [(f"the input of layer {layer}", theirs.inputs[layer])]
        places += [(f"the output of layer {layer}", theirs.outputs[layer])]
    for what, values in [*places, ("the input of the final norm", theirs.inputs[-1]), ("the logits", theirs.logits)]:
        if not np.isfinite(values).all():
            return Finding("not finite", f"{_capital(what)} of the record holds NaN or infinite values.")
    return None


def _relative(theirs: np.ndarray, ours: np.ndarray) -> float:
    """|theirs - ours| / |ours|, Frobenius; 0 for nothing at all."""
    size = float(np.linalg.norm(ours))
    apart = float(np.linalg.norm(theirs - ours))
    return apart / size if size else float(apart > 0)


def _figures(theirs: Golden, ours: Golden, image: np.ndarray, text: np.ndarray, allowed: float) -> dict:
    """Relative differences of everything that both have."""

    def apart(a: np.ndarray, b: np.ndarray) -> list[float]:
        return [max(_relative(x[rows], y[rows]) for rows in (image, text)) for x, y in zip(a, b, strict=True)]

    centred = ours.logits - ours.logits.mean(1, keepdims=True)
    other = theirs.logits - theirs.logits.mean(1, keepdims=True)
    return {
        "tolerance": allowed,
        "stacks": {
            name: _relative(rows, ours.stacks[name]) for name, rows in theirs.stacks.items() if name in ours.stacks
        },
        "inputs": apart(theirs.inputs, ours.inputs),
        "outputs": apart(theirs.outputs, ours.outputs),
        "logits": [_relative(a, b) for a, b in zip(other, centred, strict=True)],
    }


def _strays(
    added: np.ndarray,
    noise: np.ndarray,
    ours: Golden,
    text: np.ndarray,
    findings: Sequence[Finding],
    allowed: float,
) -> list[Finding]:
    """Text rows that are not what they should be: embeddings at the input, something added further up."""
    if not len(text):
        return []
    if any(finding.kind == "rows" for finding in findings):
        return []  # rows that are shifted may well spill over
    size = np.linalg.norm(ours.inputs[0, text], axis=-1)
    wrong = np.linalg.norm(added[0, text] - ours.inputs[0, text], axis=-1) > 4 * allowed * size + 8 * noise[0, text]
    strays = []
    if wrong.any():
        first = int(text[wrong.argmax()])
        share = wrong.mean()
        strays.append(
            Finding(
                "embeddings",
                f"The embeddings of {share:.0%} of the text tokens differ, the first at position {first}.",
                {"position": first, "share": round(float(share), 4)},
            )
        )
    scale = np.sqrt(np.mean([np.square(rows).sum(1).mean() for rows in ours.stacks.values()])) if ours.stacks else 1.0
    rows = np.linalg.norm(added[1:, text], axis=-1) > 8 * noise[1:, text] + 4 * allowed * scale  # [L, text]
    layers = [int(layer) + 1 for layer in np.flatnonzero(rows.any(1))]
    if layers:
        first = int(text[rows.any(0).argmax()])
        strays.append(
            Finding(
                "stray",
                f"Before layer {_list(layers)} something is added to text rows too, the first at position {first}.",
                {"layers": layers, "position": first},
            )
        )
    return strays


def _positions(theirs: Golden, ours: Golden) -> list[Finding]:
    """Position ids that are not this model's, where the record has them."""
    if theirs.position_ids is None or ours.position_ids is None:
        return []
    a, b = theirs.position_ids, ours.position_ids
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    if a.shape != b.shape:
        return [Finding("positions", f"The position ids have shape {list(a.shape)}, here they have {list(b.shape)}.")]
    wrong = (np.abs(a - b) > 1e-3).any(0)  # fractions (after a video) may differ in their last bits
    if not wrong.any():
        return []
    first = int(wrong.argmax())
    text = (
        f"The position ids differ from position {first} on: {_list(a[:, first])} instead of {_list(b[:, first])}; what "
        "follows in the layers was not looked at."
    )
    return [Finding("positions", text, {"position": first})]


def _elsewhere(figures: Mapping, theirs: Golden, allowed: float) -> list[Finding]:
    """With every stack in its place: a layer that computes something else, the head, decoding, or only numerics."""
    ins, outs, logits = figures["inputs"], figures["outputs"], figures["logits"]
    for layer, (before, after) in enumerate(zip(ins[:-1], outs, strict=True)):
        if after > max(min(0.2, 20 * allowed), allowed) and after > 10 * before:
            text = (
                f"Layer {layer} computes something else: its input agrees ({before:.1e}) and its output does not "
                f"({after:.1e}). Look at its positions, masks and weights."
            )
            return [Finding("layer", text, {"layers": [layer], "difference": after})]
    stream = max([*ins, *outs, *figures["stacks"].values()])
    if stream <= allowed:
        if logits[0] > max(0.1, allowed):
            text = f"Every layer agrees ({stream:.1e}) and the logits do not ({logits[0]:.1e}): the final norm or head."
            return [Finding("head", text, {"difference": logits[0]})]
        later = next((at for at, apart in enumerate(logits) if apart > max(0.1, allowed)), None)
        if later is not None:
            text = (
                f"The prompt agrees, and from answer token {later - 1} on decoding does not: the logits after it "
                f"differ by {logits[later]:.1e}. Look at the cache and at the positions of new tokens."
            )
            return [Finding("decode", text, {"answer_token": later - 1, "difference": logits[later]})]
    places = {f"output of layer {at}": apart for at, apart in enumerate(outs)}
    places |= {f"input of layer {at}": apart for at, apart in enumerate(ins)}
    places |= {f"rows of {_stack(name)}": apart for name, apart in figures["stacks"].items()}
    places |= {f"logits of answer token {at}": apart for at, apart in enumerate(logits)}
    worst = max(places, key=places.__getitem__)
    if places[worst] <= allowed:
        return []
    text = (
        f"Only numerics: every stack is in its place, and the {worst} differs by {places[worst]:.1e} "
        f"({allowed:.0e} is allowed for {theirs.dtype})."
    )
    return [Finding("numerics", text, {"worst": worst, "difference": places[worst]})]


def _said(finding: Finding, theirs: Golden, ours: Golden, allowed: float) -> Finding:
    """For a missing stack, also whether it was computed at all."""
    if finding.kind != "missing":
        return finding
    said = []
    for name in finding.where["stacks"]:
        rows = theirs.stacks.get(name)
        if rows is None:
            continue
        apart = _relative(rows, ours.stacks[name])
        what = "as zeros" if not rows.any() else "right" if apart <= allowed else f"{apart:.1e} from ours"
        said.append(f"{_stack(name)} {what}")
    more = f" As computed: {', '.join(said)}." if said else ""
    return Finding(finding.kind, finding.text + more, finding.where)
