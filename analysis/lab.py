"""The lab's results, read: means and spreads per variant, beside the DeepStack paper's own numbers.

1. read(): assets/lab/results.jsonl, one JSON object per finished run; a broken line is an error with its number
2. settings(): runs are compared only at the same size, for the same steps, on the same kind of device and in the same
   precision
3. summary(): per variant mean, spread between seeds, the difference to its control with a 95 % interval
4. judge(): whether that difference has the sign that the paper reports, the other one, or cannot decide

The paper's numbers (PAPER, FIGURE_3) stay on their own scale: benchmarks of photographs and documents, single runs.
Knows nothing about how a variant is built or trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import betaln, stdtrit

from analysis.evaluate import Acuity, acuity, wilson
from analysis.tables import Table
from model.errors import UserError
from model.lab import results
from model.lab.results import RESULTS, SEARCHES
from model.lab.texts import RECALL
from model.lab.variants import GROUPS, LAYERS, LONG, PARTS, SHORT, VARIANTS, layers_of, variant_of

REFERENCE = "stack-2d"
TEXT = "text"  # the group that reads long texts and no pictures: its numbers are those of another task ...
TEXT_REFERENCE = "text-truncated"  # ... and are compared with this one
REQUIRED = ("variant", "group", "seed", "steps", "device", "accuracy")
PARTED = ("by_glyph_px", "by_position")  # what of a run's accuracy is told by height or place, not by kind
# what a variant is compared with where the paper has no such row: all else is compared with the reference
CONTROLS = {
    "start-5": "layers-3",  # the same stacks, as many as find a layer
    "start-6": "layers-2",
    "start-7": "layers-1",
    "start-last": "none",  # whose answers see no stack either
    "none-unguided": "none",
    "start-4-unguided": "stack-2d-unguided",
    **dict.fromkeys(("taps-1", "taps-2", "taps-3", "taps-samples"), "taps-0"),
    "taps-3-last": "taps-3",
    **{f"budget-{share}{by}": f"budget-{share}-random" for share in (50, 25) for by in ("", "-question")},
}
TIMID = 1.0  # points; the paper has no error bars, and differences of single runs below this are no effects
LEVEL = 0.95  # of every interval
ASKED = ("scenes_seeds", "texts_seeds", "test", "side", "glyphs", "text", "fact")  # of a config: the test set
ROUNDED = 1e-4  # how far a share may be from its questions': a line has four digits of it


class Metric(NamedTuple):
    """One way of scoring a run: accuracy[kind][key], a share."""

    kind: str
    key: str
    words: str
    per: int = 1  # questions of a picture's about one thing: a code is asked for by its colour and by its place
    topics: tuple[str, ...] = ()  # of accuracy: which of their questions were right; each asks for the same things
    things: str = "codes"  # what a picture's questions ask for
    way: str = ""  # how they ask for it, where others ask for the same in another way
    ways: tuple[str, ...] = ()  # metrics that tell of the same things, each asked for in one way, and exactly right


BOTH_WAYS = ("ink", "place")  # metrics below
METRICS = {
    "fine": Metric("fine", "exact_match", "fine detail, exact match", 2, (*BOTH_WAYS, RECALL), ways=BOTH_WAYS),
    "characters": Metric("fine", "characters", "fine detail, characters right", 2, ways=BOTH_WAYS),
    "first character": Metric("fine", "first_character", "fine detail, first character right", 2, ways=BOTH_WAYS),
    "ink": Metric("ink", "exact_match", "fine detail asked for by colour, exact match", 1, ("ink",), way="by colour"),
    "place": Metric(
        "place", "exact_match", "fine detail asked for by place, exact match", 1, ("place",), way="by place"
    ),
    "coarse": Metric("coarse", "exact_match", "coarse questions, exact match", 1, ("coarse",), "questions"),
}
FACTS = "facts"  # what a text's questions ask for


class Cost(NamedTuple):
    """One cost of a run: cost[key], or a field of the run."""

    unit: str
    words: str


COSTS = {
    "context": Cost("rows", "context of a question with its image"),
    "tower_flops": Cost("FLOPs", "work of the vision tower for an image"),
    "prefill_flops": Cost("FLOPs", "work of a prefill"),
    "prefill_seconds": Cost("s", "time of a prefill (on a CPU the processor’s)"),
    "prefill_bytes": Cost("bytes", "memory of a prefill"),
    "step_seconds": Cost("s", "time of a training step (on a CPU the processor’s)"),
    "step_flops": Cost("FLOPs", "work of a training step"),
    "step_bytes": Cost("bytes", "memory of a training step"),
    "parameters": Cost("parameters", "size without the vision tower"),
}

RECALL_AXIS = f"part of the text, 1 to {PARTS}"
SHORT_PARTS = f"The last {PARTS * SHORT // LONG} parts are the short context."


# ---- the paper's numbers (arXiv 2406.04334; Phi-3 of 32 layers, CLIP-L of 24; no seeds, no error bars)

BENCHES = ("AVG", "GQA", "POPE", "SEED", "TextVQA", "DocVQA", "ChartQA", "InfoVQA")


def _scores(text: str) -> dict[str, float]:
    """Scores as the paper prints them: seven benchmarks, then their average."""
    *each, average = map(float, text.split())
    return {"AVG": average, **dict(zip(BENCHES[1:], each, strict=True))}


PAPER_DEEPSTACK = _scores("63.0 86.4 62.9 58.8 38.7 17.2 30.8 51.1")  # tables 5, 6 and 7: consistent, 2d, frozen tower
PAPER_BASELINE = _scores("62.5 85.5 63.5 56.7 31.7 15.8 28.3 49.1")  # the ablations' baseline


@dataclass(frozen=True)
class Paper:
    """What the paper says of one variant: scores on its benchmarks, or (figure 3) only a direction."""

    source: str  # "table 6"
    words: str  # its own name for the row
    scores: Mapping[str, float] = field(default_factory=dict)
    against: str = REFERENCE  # the variant that it is compared with
    against_scores: Mapping[str, float] = field(default_factory=lambda: PAPER_DEEPSTACK)
    sign: int | None = None  # of the difference, where only that is said; None without scores: it says neither

    def difference(self, bench: str) -> float | None:
        """Points on one benchmark against `against`; None where the paper prints none."""
        return None if bench not in self.scores else round(self.scores[bench] - self.against_scores[bench], 1)


# Table 4: DeepStack-V, fine-tuned tower of 24 layers: the first N layers see the tokens, the next 4 get the stacks.
TABLE_4 = {
    0: _scores("56.9 80.8 54.9 44.4 13.7 12.3 25.3 41.2"),
    4: _scores("58.7 83.1 57.4 48.2 17.0 13.2 26.1 43.4"),
    8: _scores("60.4 84.2 59.7 51.8 23.1 14.7 26.6 45.8"),
    12: _scores("61.8 85.5 62.1 55.5 29.3 16.0 26.2 48.1"),
    16: _scores("62.9 86.3 63.9 59.1 36.9 18.2 29.3 50.9"),
    20: _scores("62.8 86.1 64.0 60.1 38.4 17.1 30.6 51.3"),
}
TABLE_4_TUNED = _scores("62.4 85.8 64.0 56.1 27.5 15.3 28.3 48.5")  # its baseline: the tower tuned, no stacks
OUR_TOWER, ITS_TOWER = 5, 24  # layers


def _nearest(start: int) -> int:
    """The N of table 4 that is as deep in its tower as our start layer is in ours."""
    return min(TABLE_4, key=lambda n: abs(n / ITS_TOWER - start / OUR_TOWER))


PAPER: dict[str, Paper] = {
    REFERENCE: Paper("tables 5, 6, 7", "DeepStack: consistent, 2d spatial", PAPER_DEEPSTACK),
    "none": Paper("baseline of the ablations", "baseline", PAPER_BASELINE),
    "dummy": Paper("table 6", "dummy tokens", _scores("62.2 85.3 63.8 56.9 31.2 15.4 28.8 49.1")),
    "string": Paper("table 7", "hi-res string", _scores("61.8 86.2 62.1 55.0 43.5 16.2 30.4 50.7")),
    "global-string": Paper("table 7", "global + hi-res string", _scores("62.3 86.4 62.6 54.7 43.3 16.7 31.2 51.0")),
    "concat": Paper("table 7", "dimension concat", _scores("59.5 86.3 62.9 56.4 35.9 16.4 28.5 49.4")),
    "stack-grid": Paper("table 5", "2d grid", _scores("60.6 86.2 61.2 57.1 33.2 16.4 28.6 49.0")),
    "stack-1d-sequential": Paper("table 5", "1d sequential", _scores("61.6 86.2 61.9 57.1 33.1 15.2 30.0 49.3")),
    "stack-1d": Paper(
        "table 5", "1d sequential, as its code does it", _scores("61.6 86.2 61.9 57.1 33.1 15.2 30.0 49.3")
    ),
    "inconsistent-resize": Paper(
        "table 5",
        "inconsistent, 2d: the high-resolution view padded",
        _scores("62.2 85.1 62.3 58.1 35.1 16.4 30.1 49.9"),
    ),
    **{
        name: Paper(
            "figure 3 a",
            "the global tokens moved to a quarter of the depth at most: acceptable",
            against="none-unguided" if name.endswith("unguided") else "none",
        )
        for name in ("global-deeper-1", "global-deeper-2", "global-deeper-2-unguided")
    },
    "global-deeper": Paper("figure 3 a", "the global tokens moved to the midpoint: neither named", against="none"),
    **{
        f"global-deeper-6{guided}": Paper(
            "figure 3 a",
            "the global tokens moved past the midpoint: a significant drop",
            against=f"none{guided}",
            sign=-1,
        )
        for guided in ("", "-unguided")
    },
    **{
        f"interval-{k}": Paper("figure 3 b", "every interval better than none", against="none", sign=1)
        for k in (2, 3, 4)
    },
    **{f"layers-{k}": Paper("figure 3 c", "best with four stacked layers", sign=-1) for k in (1, 2, 3)},
    "none-tuned": Paper("table 4", "baseline with its tower tuned", TABLE_4_TUNED, "none", PAPER_BASELINE),
    **{
        f"deepstack-v-{k}": Paper(
            "table 4", f"N = {n} of {ITS_TOWER} tower layers, about as deep", TABLE_4[n], "none-tuned", TABLE_4_TUNED
        )
        for k in range(OUR_TOWER)
        for n in [_nearest(k)]
    },
}


@dataclass(frozen=True)
class Axis:
    """One way of moving the injection along, as in the paper's figure 3 or table 4."""

    title: str
    unit: str
    names: str  # pattern of the variants on it; its first group is the value where that is a number
    keys: tuple[str, ...]  # of a run's config that hold the value
    home: str  # the variant from which it moves away
    paper: Mapping[float, Mapping[str, float]]  # what the paper's tables print along it
    said: str  # what the paper says of it
    scale: float = 1.0  # what our values are multiplied by to be of the unit


FIGURE_3 = {
    "start": Axis(
        "First layer that gets a stack", "LLM layer", r"start-(\d+|last)", ("start",), REFERENCE,
        {1: PAPER_DEEPSTACK},
        "The paper's code starts before layer 1 of 32; it prints no other number.",
    ),
    "interval": Axis(
        "Layers from one stack to the next", "layers", r"interval-(\d+)", ("interval",), REFERENCE,
        {1: PAPER_DEEPSTACK},
        "Figure 3 b: every interval tried is better than none; a plot without numbers.",
    ),
    "layers": Axis(
        "Layers that get a stack", "stacks", r"layers-(\d+)", ("count",), REFERENCE,
        {0: PAPER_BASELINE, 4: PAPER_DEEPSTACK}, "Figure 3 c: best with four; a plot without numbers between.",
    ),
    "global": Axis(
        "Where global tokens enter", "% of depth, no stacks", r"global-deeper(?:-(\d+))?",
        ("base_at",), "none", {0: PAPER_BASELINE},
        "Figure 3 a: up to a quarter of the depth (layer 8 of 32) acceptable, past the midpoint a significant drop; a "
        "plot without numbers.", 100 / LAYERS,
    ),
    "tower": Axis(
        "First tower layer stacked", "% of its depth", r"deepstack-v-(\d+)",
        ("tower_start",), "", {100 * n / ITS_TOWER: scores for n, scores in TABLE_4.items()},
        "Table 4: the later the better, above its baseline from layer 16 of 24 (67 %) on.", 100 / OUR_TOWER,
    ),
}  # fmt: skip

CANNOT_SAY = {
    "what enters": (
        "Most of our codes are too small for the global view, so this gap is larger than photographs can show; only "
        "its sign can be compared. All three have the same number of parameters."
    ),
    "how it enters": (
        "All are trained for the same steps: one that reads far less by colour than by place (scores of their own) may "
        "only need more of them. The string lacks the global view, and concat's wider projector has more parameters. "
        "The paper's trade, 576 against 2,880 rows, cannot be read off contexts this short."
    ),
    "sampling": (
        "Our tiles are a few tokens a side; how much displaced tokens hurt on CLIP's 24 × 24 does not follow from "
        "that, nor whether more training would teach them colours. For the inconsistent resize we squeeze the global "
        "view, where the paper pads the high-resolution one."
    ),
    "where": (
        "Training shows one attention head of the last two layers where each answer stands, and teaches image rows, at "
        "the input of the last layer, what they hold. The unguided lack the first, not the second, and are compared "
        "with each other: a late start may cost less here than elsewhere. Stacks that would enter beyond "
        "layer 7 are left out: start-6 and interval-4 keep two of four, interval-3 and start-5 three. Fewer layers "
        "also means fewer pixels; more than four stacks are not tried."
    ),
    "tower": (
        "Our tower was trained on rendered text and has five layers: stacks that start late find no layer, and "
        "whether a tower trained on photographs tolerates them half-way is open. A training step of a tuned tower "
        "runs it, one of a frozen tower reads its stored features: their costs are not alike. taps-0 sees no global "
        "view and merges with weights of its own: it is the control of the other taps, and differs from stack-2d in "
        "more than one thing. Each tap brings a merger of its own, so more taps are also more parameters."
    ),
    "strength": (
        "The paper proposes these and measures none, so there is nothing to agree with, and a gate may need "
        "longer than our runs."
    ),
    "text": (
        f"Another task, so compared with {TEXT_REFERENCE}: 256 tokens of facts drawn by chance, one of which is asked "
        "for. A fact has four tokens and dilation puts those four on one row, which suits stacks. Nothing here speaks "
        "for prose, or for models trained on long contexts."
    ),
    "budget": (
        "Our questions are answered from one place of the image; how much a question about a photograph needs is "
        "another matter."
    ),
}


def what(variant: str) -> str:
    """A variant in words; "" for one that is not known here."""
    try:
        return variant_of(variant).words
    except UserError:
        return ""


# ---- runs


@dataclass(frozen=True)
class Run:
    """One finished run, a line of the results file."""

    variant: str
    group: str
    seed: int
    steps: int
    device: str  # "cpu" | "cuda"
    # kind -> {n, exact_match, …}; "by_glyph_px" -> height -> the same; "by_position" -> part of a text -> the same
    accuracy: Mapping[str, Mapping[str, Any]]
    cost: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    precision: str = ""
    hours: float | None = None
    parameters: int | None = None
    when: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    gates: Sequence[float] = ()  # what a variant with gates has learned, one number per stack

    def share(self, metric: str) -> tuple[float, int] | None:
        """(share of right answers, questions) of one metric; None where the run has none."""
        kind, key, *_ = METRICS[metric]
        scores = self.accuracy.get(kind) or {}
        return None if scores.get(key) is None else (float(scores[key]), int(scores["n"]))

    def right(self, metric: str) -> np.ndarray | None:
        """The share of right answers to each thing that one metric's questions ask for, in the test set's order
        (`[things]`); None where the run holds their mean alone."""
        told = [self.accuracy[topic] for topic in METRICS[metric].topics if topic in self.accuracy]
        if not told or any("right" not in each for each in told):
            return None
        right = [results.unpacked(each["right"], each["n"]) for each in told]
        whole = len({len(each) for each in right}) == 1 and sum(map(len, right)) == self.share(metric)[1]
        return np.mean(right, axis=0) if whole else None

    @property
    def asked(self) -> list:
        """What tells the test set of this run from others."""
        return [self.config.get(key) for key in ASKED]

    def spent(self, cost: str) -> float | None:
        """One cost; None where it was not measured."""
        return self.parameters if cost == "parameters" else self.cost.get(cost)


class Setting(NamedTuple):
    """What runs must share to be compared."""

    steps: int
    device: str  # "cpu" | "cuda"
    size: str = ""  # of the model and its data, where the config names one
    precision: str = ""  # of its matrices: "bfloat16" | "float32"

    def __str__(self) -> str:
        precision = f" in {self.precision}" if self.precision else ""
        return f"{self.size + ', ' if self.size else ''}{self.steps:,} steps on {self.device}{precision}"

    @property
    def options(self) -> str:
        """What tells a command of the lab to work at this setting, wherever it is typed."""
        named = {"size": self.size, "steps": self.steps, "device": self.device, "precision": self.precision}
        return "".join(f" --{name} {value}" for name, value in named.items() if value)

    @staticmethod
    def of(run: Run) -> Setting:
        """That of one run."""
        return Setting(run.steps, run.device, str(run.config.get("size", "")), run.precision)


def read(path: Path | str = RESULTS) -> list[Run]:
    """All runs of a results file in its order; [] where there is no file. UserError with file and line number for a
    line that is no run."""
    runs = []
    for number, record in results.lines(Path(path)):
        try:
            runs.append(_run(record))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{results.short(Path(path))}, line {number}, is no finished run: {error}. {results.AGAIN}"
            ) from error
    return runs


def _run(raw: Mapping[str, Any]) -> Run:
    """ValueError in words for what is no run."""
    missing = [key for key in REQUIRED if key not in raw]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    for key, fits in FIELDS.items():
        if (key in REQUIRED or raw.get(key) is not None) and not fits(raw[key]):
            raise ValueError(f"its {key} is {str(raw[key])[:60]!r}")
    accuracy = raw["accuracy"]
    for name in PARTED:
        if not isinstance(accuracy.get(name, {}), dict):
            raise ValueError(f"its accuracy {name} is {str(accuracy[name])[:60]!r}")
    parts = [pair for name in PARTED for pair in accuracy.get(name, {}).items()]
    for kind, scores in [*accuracy.items(), *parts]:
        if kind not in PARTED:
            _check_scores(kind, scores)
    if "fine" not in accuracy and "coarse" not in accuracy:
        raise ValueError("its accuracy has neither fine nor coarse")
    for place, _ in parts:
        if not _number(_float(place)):
            raise ValueError(f"its accuracy is told for {place!r}, which is no number")
    for name, value in (raw.get("cost") or {}).items():
        if value is not None and not _number(value):
            raise ValueError(f"its cost {name} is {value!r}")
    return Run(**{name: raw[name] for name in Run.__dataclass_fields__ if raw.get(name) is not None})


def _check_scores(kind: str, scores: Any) -> None:
    if not isinstance(scores, dict) or not {"n", "exact_match"} <= set(scores):
        raise ValueError(f"its accuracy for {kind} lacks n or exact_match")
    if not _whole(scores["n"]) or scores["n"] < 1:
        raise ValueError(f"its n for {kind} is {scores['n']!r}, not a number of questions")
    for key in ("exact_match", "characters", "first_character"):
        share = scores.get(key)
        if share is not None and not (_number(share) and 0 <= share <= 1):
            raise ValueError(f"its {key} for {kind} is {share!r}, not a share between 0 and 1")
    if "right" in scores:
        if not isinstance(scores["right"], str):
            raise ValueError(f"its right for {kind} is {scores['right']!r}")
        told = float(np.mean(results.unpacked(scores["right"], scores["n"])))
        if abs(told - scores["exact_match"]) > ROUNDED:
            raise ValueError(f"of its questions for {kind} {told:.4f} are right, not {scores['exact_match']}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


# what of a line must be what; those that are not REQUIRED may be missing or null
FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("variant", "group", "device", "precision", "when"), _text),
    **dict.fromkeys(("seed", "steps", "parameters"), _whole),
    **dict.fromkeys(("accuracy", "cost", "config"), _object),
    "versions": lambda value: _object(value) and all(map(_text, value.values())),
    "hours": _number,
    "gates": lambda value: isinstance(value, list) and all(map(_number, value)),
}


def settings(runs: Iterable[Run]) -> dict[Setting, list[Run]]:
    """Runs by what they share, the setting with most variants first. Of two lines for one variant and seed the later
    counts."""
    found: dict[Setting, dict[tuple[str, int], Run]] = {}
    for run in runs:
        found.setdefault(Setting.of(run), {})[run.variant, run.seed] = run
    made = {setting: list(each.values()) for setting, each in found.items()}
    return dict(sorted(made.items(), key=lambda item: (-len({r.variant for r in item[1]}), -len(item[1]))))


# ---- intervals


@cache
def t_quantile(df: float, level: float = LEVEL) -> float:
    """Half the width, in standard errors, of a two-sided Student interval; infinite without degrees of freedom."""
    return float(stdtrit(df, (1 + level) / 2)) if df > 0 else math.inf


class Interval(NamedTuple):
    """A value with the ends of its 95 % interval, shares between -1 and 1."""

    value: float
    low: float
    high: float

    @property
    def percent(self) -> str:
        """A share's value in words."""
        return f"{100 * self.value:.1f}"

    @property
    def percent_ends(self) -> str:
        return f"{100 * self.low:.1f} to {100 * self.high:.1f}"

    @property
    def points(self) -> str:
        """A difference's value in words."""
        return f"{100 * self.value:+z.1f}"

    @property
    def points_ends(self) -> str:
        return f"{100 * self.low:+z.1f} to {100 * self.high:+z.1f}"


class Spread(NamedTuple):
    """How far runs of one variant lie apart that differ in their seed alone: standard deviation, and the degrees of
    freedom that it is known with."""

    deviation: float
    df: float

    def half(self, runs: int) -> float:
        """Half the width of Student's interval of the mean of so many."""
        return t_quantile(self.df) * self.deviation / math.sqrt(runs)


def moderated(groups: Sequence[Sequence[float]]) -> list[Spread | None]:
    """The spread of each variant's shares `[seeds]`; None for all where no variant has two.

    A variance of two or three runs says little alone, and one for all is wrong where some variants scatter and others
    do not. So each is its own drawn toward the others', by as much as theirs are alike: by the weight of some degrees
    of freedom, fitted to all of them as variances that scatter around a common one (moderated t, Smyth 2004; fitted by
    likelihood, so that a variance of zero does no harm). Where variants scatter alike this is the variance pooled over
    all; a variant run once has the common one, with few degrees of freedom where variants differ much."""
    df = [len(group) - 1 for group in groups]
    if not any(df):
        return [None] * len(groups)
    variances = [float(np.var(group, ddof=1)) if own else 0.0 for group, own in zip(groups, df, strict=True)]
    known = [(variance, own) for variance, own in zip(variances, df, strict=True) if own]
    common, weight = _common(*zip(*known, strict=True))
    return [
        Spread(math.sqrt(common + own / (own + weight) * (variance - common)), min(own + weight, sum(df)))
        for variance, own in zip(variances, df, strict=True)
    ]


FEW, MANY = 1.0, 1e4  # degrees of freedom: as sure as two runs are, at least; as good as one variance for all


@cache
def _common(variances: tuple[float, ...], df: tuple[int, ...]) -> tuple[float, float]:
    """(the variance that those of variants scatter around, the degrees of freedom that it is worth to each of them).

    Each ÷ the common one has Fisher's F distribution with its degrees of freedom and those (Smyth 2004, equation 6)."""
    x, d = np.array(variances), np.array(df, float)
    pooled = float(x @ d / d.sum())
    if len(x) == 1 or not pooled:
        return pooled, math.inf
    x = np.maximum(x, 1e-9 * pooled)  # of a zero the likelihood is infinite, whatever the two are

    def unlikely(log_common: float, weight: float) -> float:
        ratio = d / weight * x / math.exp(log_common)
        return float((betaln(d / 2, weight / 2) - d / 2 * np.log(ratio) + (d + weight) / 2 * np.log1p(ratio)).sum())

    def best(log_weight: float):
        within = (math.log(pooled) - 15, math.log(pooled) + 3)
        return minimize_scalar(unlikely, args=(math.exp(log_weight),), bounds=within, method="bounded")

    bounds = (math.log(FEW), math.log(MANY))
    log_weight = minimize_scalar(lambda x: best(x).fun, bounds=bounds, method="bounded").x
    common = best(log_weight)
    if best(bounds[1]).fun <= common.fun + 1e-3:  # nats: nothing speaks for a difference
        return pooled, math.inf
    return math.exp(common.x), math.exp(log_weight)


def _apart(one: Spread | None, runs: int, two: Spread | None, others: int) -> float:
    """Half of what seeds add to the interval of the difference of two means of so many runs: the two means' own,
    combined (Zou and Donner 2008), which is Student's interval where one variance is pooled; 0 where no variant has two
    runs."""
    return math.hypot(one.half(runs), two.half(others)) if one and two else 0.0


def mean_interval(shares: Sequence[float], n: int, spread: Spread | None = None) -> Interval:
    """The mean of seeds: Wilson's interval for the n things that one test set asks for, which all seeds share, and what
    other seeds would add to it."""
    mean = float(np.mean(shares))
    low, high = wilson(round(mean * n), n)
    seeds = spread.half(len(shares)) if spread else 0.0
    return Interval(
        mean, max(0.0, mean - math.hypot(mean - low, seeds)), min(1.0, mean + math.hypot(high - mean, seeds))
    )


def difference_interval(a: Sequence[float], b: Sequence[float], n: int, seeds: float = 0.0) -> Interval:
    """mean(a) - mean(b): Newcombe's interval for n things asked for, as if each had its own, and what other seeds would
    add to it (`_apart`)."""
    one, two = float(np.mean(a)), float(np.mean(b))
    value = one - two
    (low1, high1), (low2, high2) = (wilson(round(mean * n), n) for mean in (one, two))
    low = value - math.hypot(one - low1, high2 - two, seeds)
    return Interval(value, low, value + math.hypot(high1 - one, two - low2, seeds))


def paired_interval(a: np.ndarray, b: np.ndarray, seeds: float = 0.0) -> Interval:
    """mean(a) - mean(b) of shares `[things]` that both were asked for: Student's interval of the differences thing by
    thing, and what other seeds would add to it (`_apart`). What seeds do differently thing by thing is in both, so that
    it is a little too wide. So that answers that are all alike are no certainty, it is as wide as with
    half a thing more that only the first gets right, and half a one for the second (Agresti and Min 2005)."""
    differences = np.asarray(a, float) - np.asarray(b, float)
    n, value = len(differences), float(np.mean(differences))
    squares = float(np.sum((differences - value) ** 2)) + 1.0
    things = t_quantile(n - 1) * math.sqrt(squares / (n - 1) / n) if n > 1 else math.inf
    half = math.hypot(things, seeds)
    return Interval(value, value - half, value + half)


# ---- the summary


@dataclass(frozen=True)
class Verdict:
    """Whether ours has the paper's sign.

    kind: "agrees" | "disagrees" | "cannot decide" | "not in the paper" | "reference"
    """

    kind: str
    why: str

    @property
    def mark(self) -> str:
        return {"agrees": "✓", "disagrees": "✗", "cannot decide": "?"}.get(self.kind, "–")


@dataclass(frozen=True)
class Row:
    """One variant: its runs of one setting under one metric."""

    variant: str
    group: str
    runs: tuple[Run, ...]  # by seed
    metric: str
    n: int  # questions of one run
    spread: Spread | None = None  # between seeds

    @property
    def things(self) -> int:
        """What the questions of one run ask for, each counted once."""
        return self.n // (1 if self.group == TEXT else METRICS[self.metric].per)

    @property
    def stacks(self) -> int | None:
        """How many stacks find a layer of the decoder; None for a variant or decoder that is not known."""
        try:
            return len(layers_of(variant_of(self.variant), self.runs[0].config["llm_layers"]))
        except (UserError, KeyError):
            return None

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def shares(self) -> list[float]:
        """One per seed."""
        return [run.share(self.metric)[0] for run in self.runs]

    @cached_property
    def right(self) -> np.ndarray | None:
        """The share of right answers to each thing asked for, over all seeds (`[things]`); None where a run does not
        tell."""
        told = [run.right(self.metric) for run in self.runs]
        if any(each is None for each in told) or any(run.asked != self.runs[0].asked for run in self.runs):
            return None
        return np.mean(told, axis=0) if len({len(each) for each in told}) == 1 else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None for one seed."""
        return float(np.std(self.shares, ddof=1)) if len(self.runs) > 1 else None

    @cached_property
    def mean(self) -> Interval:
        return mean_interval(self.shares, self.things, self.spread)

    @property
    def percent(self) -> str:
        """The mean of all seeds, and each where there are several: "70.8 (70.9, 70.6)"."""
        each = ", ".join(f"{100 * share:.1f}" for share in self.shares)
        return self.mean.percent + (f" ({each})" if len(self.runs) > 1 else "")

    @property
    def counted(self) -> str:
        """How many seeds, and what each was asked for: "2 seeds × 772 codes"."""
        things = FACTS if self.group == TEXT else METRICS[self.metric].things
        return f"{len(self.runs)} seed{'s' if len(self.runs) > 1 else ''} × {self.things} {things}"

    def minus(self, other: Row) -> Interval:
        """The difference to another variant: thing by thing where both are `paired`, else as if each had been asked for
        things of its own, which is wider."""
        seeds = _apart(self.spread, len(self.runs), other.spread, len(other.runs))
        if self.paired(other):
            return paired_interval(self.right, other.right, seeds)
        return difference_interval(self.shares, other.shares, min(self.things, other.things), seeds)

    def paired(self, other: Row) -> bool:
        """Whether both tell of each thing that they were asked for, and were asked for the same."""
        if self.right is None or other.right is None or self.runs[0].asked != other.runs[0].asked:
            return False
        return len(self.right) == len(other.right)

    def spent(self, cost: str) -> float | None:
        """Mean over seeds of one cost; None where it was not measured."""
        found = [value for run in self.runs if (value := run.spent(cost)) is not None]
        return float(np.mean(found)) if found else None

    @property
    def acuity(self) -> Acuity:
        """Exact match by glyph height, the mean of all seeds, which are asked for the same codes."""
        found = [run.accuracy.get("by_glyph_px", {}) for run in self.runs]
        heights = {
            height: {"n": found[0][height]["n"] // METRICS["fine"].per, "exact_match": float(np.mean(shares))}
            for height in sorted(set.intersection(*map(set, found)))
            if None not in (shares := [each[height]["exact_match"] for each in found])
        }
        return acuity({height: scores for height, scores in heights.items() if scores["n"]})

    @property
    def recall(self) -> dict[int, Interval]:
        """Exact match by the part of the text that was asked for, from 1, the mean of all seeds."""
        found = [run.accuracy.get("by_position", {}) for run in self.runs]
        told = {}
        for part in sorted(set.intersection(*map(set, found)), key=int):
            shares, counts = zip(*((each[part]["exact_match"], each[part]["n"]) for each in found), strict=True)
            told[int(part)] = mean_interval(shares, min(counts))
        return told

    @property
    def command(self) -> str:
        return commands([self])[0]


def run_command(
    variants: Iterable[str], seeds: Iterable[int], setting: Setting | None = None, again: bool = False
) -> str:
    """What trains and scores these variants; without a setting as the lab does it by default. again: also those that
    are in the results, which are replaced."""
    text = f"python -m app lab run {' '.join(variants)} --seeds {','.join(map(str, seeds))}"
    return text + (setting.options if setting else "") + " --again" * again


def ship_command(variant: str, seed: int, setting: Setting) -> str:
    """What makes a model to ask out of a finished run."""
    return f"python -m app lab ship {variant} --seeds {seed}{setting.options}"


def commands(rows: Iterable[Row]) -> list[str]:
    """What makes the numbers of these variants again, one command for all that have the same seeds."""
    by_seeds: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        by_seeds.setdefault(row.seeds, []).append(row)
    return [
        run_command([row.variant for row in each], seeds, Setting.of(each[0].runs[0]), again=True)
        for seeds, each in by_seeds.items()
    ]


@dataclass(frozen=True)
class Summary:
    """All variants of one setting under one metric, beside the paper on one of its benchmarks."""

    setting: Setting
    metric: str
    bench: str
    rows: tuple[Row, ...]  # by group, the reference first

    @property
    def scatter(self) -> list[float]:
        """Standard deviations between seeds of the variants that are asked about pictures, where they have several."""
        return [row.deviation for row in self.pictures if row.deviation is not None]

    def row(self, variant: str) -> Row | None:
        return next((row for row in self.rows if row.variant == variant), None)

    @property
    def reference(self) -> Row | None:
        return self.row(REFERENCE)

    @property
    def pictures(self) -> tuple[Row, ...]:
        """The variants that are asked about pictures: those that can be drawn on one axis."""
        return tuple(row for row in self.rows if row.group != TEXT)

    @property
    def texts(self) -> tuple[Row, ...]:
        """The variants that read long texts."""
        return tuple(row for row in self.rows if row.group == TEXT)

    @property
    def words(self) -> str:
        return METRICS[self.metric].words

    def under(self, metric: str) -> Summary:
        """The same runs under another metric."""
        return self if metric == self.metric else summary(self.runs, metric, self.bench)

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.rows for run in row.runs]

    @cached_property
    def ways(self) -> list[Summary]:
        """Exact match under each way of asking that this metric joins (by colour, by place); [] where it joins none."""
        return [self.under(each) for each in METRICS[self.metric].ways]

    def depends(self, variant: str, other: str) -> dict[str, Interval]:
        """Way of asking -> the difference between two variants, where these differences depend on it: where the
        interval of what lies between two of them has no zero in it. {} where they do not."""
        told = [each for each in self.ways if each.row(variant) and each.row(other)]
        gaps = [between(one, two, variant, other) for one, two in combinations(told, 2)]
        if all(gap.low <= 0 <= gap.high for gap in gaps):
            return {}
        return {METRICS[each.metric].way: each.row(variant).minus(each.row(other)) for each in told}

    def against(self, row: Row) -> str:
        """The variant that this one is compared with: as in the paper, or the one that is most alike."""
        if row.group == TEXT:
            return TEXT_REFERENCE
        paper = PAPER.get(row.variant)
        return paper.against if paper else CONTROLS.get(row.variant, REFERENCE)

    def difference(self, row: Row) -> Interval | None:
        """To what it is compared with; None for that itself, or where it has not been run."""
        other = self.row(self.against(row))
        return None if other is None or other is row else row.minus(other)

    @property
    def pairs(self) -> str:
        """How the intervals of differences come about, in a sentence or two; "" where there are none."""
        compared = [row for row in self.rows if self.difference(row) is not None]
        apart = [row.variant for row in compared if not row.paired(self.row(self.against(row)))]
        told = []
        if len(apart) < len(compared):
            told.append(
                "The interval of a difference compares two variants question by question: both were asked the same."
            )
        if apart:
            whose = "differences" if len(apart) == len(compared) else f"the differences of {listed(apart)}"
            told.append(
                f"Of {whose} the results hold means alone, so that their intervals are as if each variant had been "
                "asked questions of its own: wider."
            )
        if self.texts and self.texts[0].spread is None:
            told.append("No variant of the group text has a second seed: its intervals count what is asked alone.")
        return " ".join(told)

    def judge(self, row: Row) -> Verdict:
        """Whether our difference has the paper's sign."""
        paper = PAPER.get(row.variant)
        if row.variant == self.against(row):
            return Verdict("reference", "The others are compared with it.")
        if paper is None:
            return Verdict("not in the paper", "The paper has no number for it.")
        other = self.row(paper.against)
        if other is None:
            return Verdict("cannot decide", f"{paper.against}, with which the paper compares it, has not been run.")
        if row.spread is None:
            return Verdict("cannot decide", "No variant has a second seed yet: how far another would be is not known.")
        gap = paper.difference(self.bench)
        if gap is None and paper.sign is None:
            return Verdict("not in the paper", f"The paper gives no number and no sign ({paper.words}).")
        if gap is not None and abs(gap) < TIMID:
            words = f"The paper's {gap:+.1f} is between two single runs, and smaller than {TIMID:g} point."
            return Verdict("cannot decide", words)
        sign = paper.sign if gap is None else int(math.copysign(1, gap))
        ours = row.minus(other)
        if ours.low <= 0 <= ours.high:
            words = f"Our interval against {paper.against}, {ours.points_ends} points, includes zero."
            return Verdict("cannot decide", words)
        by_way = self.depends(row.variant, paper.against)
        if any(each.low <= 0 <= each.high or (each.value > 0) != (ours.value > 0) for each in by_way.values()):
            told = " and ".join(f"{way} {each.points} points ({each.points_ends})" for way, each in by_way.items())
            exact = "" if METRICS[self.metric].key == "exact_match" else ", exactly right,"
            return Verdict("cannot decide", f"It depends on how a code{exact} is asked for: {told}.")
        theirs = f"{gap:+.1f} points of {self.bench}" if gap is not None else ("better" if sign > 0 else "worse")
        same = (ours.value > 0) == (sign > 0)
        mine = f"{ours.points} points against {paper.against}"
        return Verdict("agrees" if same else "disagrees", f"Ours: {mine}; the paper's: {theirs}.")

    def along(self, axis: str) -> list[tuple[float, Row]]:
        """The variants on one axis of figure 3, ascending, the reference at its own place; those whose value neither
        name nor config tells are left out."""
        found = []
        for row in self.rows:
            named = re.fullmatch(FIGURE_3[axis].names, row.variant)
            if named and (named[1] or "").isdecimal():
                value: float | None = float(named[1])
            elif named or row.variant == FIGURE_3[axis].home:
                value = _setting_of(row.runs[0].config, FIGURE_3[axis].keys)
            elif axis == "layers" and row.variant == "none":
                value = 0.0
            else:
                continue
            if value is not None:
                found.append((value * FIGURE_3[axis].scale, row))
        return sorted(found, key=lambda pair: pair[0])


def between(one: Summary, two: Summary, variant: str, other: str) -> Interval:
    """How much more two variants differ under one metric than under another that asks for the same things: thing by
    thing where both variants are paired under both, else as if all had been asked for things of their own."""
    (a, b), (c, d) = ((each.row(variant), each.row(other)) for each in (one, two))
    same_runs = a.seeds == c.seeds and b.seeds == d.seeds
    if same_runs and a.paired(b) and c.paired(d) and len(a.right) == len(c.right):
        shares = {
            row.variant: np.subtract(row.shares, there.shares)
            for row in one.rows
            if (there := two.row(row.variant)) and row.seeds == there.seeds
        }
        spreads = dict(zip(shares, moderated([*shares.values()]), strict=True))
        seeds = _apart(spreads[variant], len(a.runs), spreads[other], len(b.runs))
        return paired_interval(a.right - b.right, c.right - d.right, seeds)
    first, second = a.minus(b), c.minus(d)
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    return Interval(value, low, value + math.hypot(first.high - first.value, second.value - second.low))


# How the rows that keep their stacks are chosen -> in words.
RANKINGS = {"norm": "by norm", "random": "by chance", "question": "by the question"}


def budgets(found: Summary) -> dict[str, list[tuple[float, Row]]]:
    """Ranking -> (share of all stack rows that enter, variant), ascending, between `none` and the reference where they
    were run; only rankings with a run."""
    made: dict[str, list[tuple[float, Row]]] = {}
    for row in found.rows:
        config = row.runs[0].config
        shares = [_setting_of(config, (key,)) for key in ("keep_all", "keep_some")]
        if None not in shares and shares[1] < 1 and config.get("keep_by") in RANKINGS:
            # half of the stacks enter at the rows that keep some, the others at those that keep all
            made.setdefault(config["keep_by"], []).append((sum(shares) / 2, row))
    ends = [(share, row) for share, row in ((0.0, found.row("none")), (1.0, found.reference)) if row]
    return {
        ranking: sorted([*made[ranking], *ends], key=lambda pair: pair[0]) for ranking in RANKINGS if ranking in made
    }


def at_budget(found: Summary, share: float) -> str:
    """What the runs say of a budget that lets this share of the stack rows enter, ranking by ranking, in words."""
    told = []
    for ranking, points in budgets(found).items():
        below = [row for at, row in points if at <= share + 1e-9]
        above = [row for at, row in points if at >= share - 1e-9]
        ends = {row.variant: f"{row.variant} {100 * row.mean.value:.1f} %" for row in below[-1:] + above[:1]}
        told.append(f"{RANKINGS[ranking]} {' to '.join(ends.values())}")
    if not told:
        return f"{100 * share:.1f} % of the stack rows enter. No budget variant has been run at this setting."
    return f"{100 * share:.1f} % of the stack rows enter. Variants trained with such budgets read: {'; '.join(told)}."


def _setting_of(config: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    """The number under the first of these keys, at the top of a config or one level down."""
    levels = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    return next((float(level[key]) for key in keys for level in levels if _number(level.get(key))), None)


def summary(runs: Sequence[Run], metric: str = "fine", bench: str = "AVG") -> Summary:
    """Runs of one setting, variant by variant. UserError for an unknown metric or benchmark, or runs that cannot be
    compared; variants without this metric are left out."""
    for what, name, known in (("metric", metric, METRICS), ("benchmark of the paper's", bench, BENCHES)):
        if name not in known:
            raise UserError(f"There is no {what} “{name}”; choose of {', '.join(known)}.")
    found = settings(runs)
    if len(found) != 1:
        raise UserError(f"Runs of one setting can be compared, not of {len(found)}; choose one first.")
    ((setting, runs),) = found.items()
    by_variant: dict[str, list[Run]] = {}
    for run in runs:
        if run.share(metric) is not None:
            by_variant.setdefault(run.variant, []).append(run)
    rows = []
    for variant, each in by_variant.items():
        each.sort(key=lambda run: run.seed)
        rows.append(Row(variant, each[0].group, tuple(each), metric, min(run.share(metric)[1] for run in each)))
    tasks = [[row for row in rows if (row.group == TEXT) is of] for of in (True, False)]
    rows = [
        replace(row, spread=spread)
        for task in tasks
        for row, spread in zip(task, moderated([row.shares for row in task]), strict=True)
    ]
    known = {group: place for place, group in enumerate(GROUPS)}
    order = {variant: place for place, variant in enumerate(dict.fromkeys([*VARIANTS, *by_variant]))}
    rows.sort(key=lambda r: (r.variant != REFERENCE, known.get(r.group, len(GROUPS)), r.group, order[r.variant]))
    return Summary(setting, metric, bench, tuple(rows))


def table(runs: Sequence[Run], metric: str = "fine", bench: str = "AVG") -> Table:
    """One row per setting and variant: ours, the paper's, the verdict, costs, and the command that makes it again."""
    columns = [*Setting._fields, "group", "variant", "seeds", "metric", "questions"]
    columns += ["mean", "deviation", "low", "high"]
    columns += ["against", "difference", "difference_low", "difference_high", "paired"]
    columns += ["paper", "paper_benchmark", "paper_score", "paper_difference"]
    columns += ["verdict", "why", *COSTS, "hours", "command"]
    rows = []
    for each in settings(runs).values():
        found = summary(each, metric, bench)
        for row in found.rows:
            paper, verdict = PAPER.get(row.variant), found.judge(row)
            gap, other = found.difference(row), found.row(found.against(row))
            hours = [run.hours for run in row.runs if run.hours is not None]
            rows.append(
                (
                    *found.setting, row.group, row.variant, " ".join(map(str, row.seeds)), metric, row.n,
                    row.mean.value, row.deviation, row.mean.low, row.mean.high,
                    found.against(row), *(gap or (None, None, None)), gap and row.paired(other),
                    paper and paper.source, bench if paper and paper.scores else None,
                    paper and paper.scores.get(bench), paper and paper.difference(bench), verdict.kind, verdict.why,
                    *(row.spent(cost) for cost in COSTS), sum(hours) if hours else None, row.command,
                )
            )  # fmt: skip
    return Table(tuple(columns), tuple(rows))


def recall_table(found: Summary) -> Table:
    """One row per variant that reads texts and part of the text."""
    rows = [(row.variant, part, *each) for row in found.texts for part, each in row.recall.items()]
    return Table(("variant", "part", "exact_match", "low_95", "high_95"), tuple(rows))


def curves(found: Summary, variants: Sequence[str]) -> dict[str, Acuity]:
    """Acuity of these variants, those left out that have no glyph heights."""
    wanted = [row for row in found.rows if row.variant in variants]
    return {row.variant: curve for row in wanted if len((curve := row.acuity).n)}


# ---- searches for where stacks enter

RUNG = ("variant", "start", "interval", "stacks", "characters, %", "exact, %", "")  # columns of Rung.rows


class Tried(NamedTuple):
    """One run of a search at one rung: shares of validation questions' characters and whole answers."""

    variant: str
    start: int
    interval: int
    count: int
    characters: float
    exact_match: float


@dataclass(frozen=True)
class Rung:
    """The runs of a search at one step, the best first; the first `kept` went on, or won."""

    step: int
    ranking: tuple[Tried, ...]
    kept: int

    @property
    def count(self) -> int:
        return len(self.ranking)

    @property
    def rows(self) -> list[list]:
        """For a table with the columns RUNG; the last says whether it went on."""
        return [
            [each.variant, each.start, each.interval, each.count, f"{100 * each.characters:.1f}",
             f"{100 * each.exact_match:.1f}", "kept" if number < self.kept else ""]
            for number, each in enumerate(self.ranking)
        ]  # fmt: skip


@dataclass(frozen=True)
class Search:
    """One finished search, a line of its file."""

    setting: Setting
    seed: int
    budget: int
    spent: int
    candidates: int  # placements that there are
    rungs: tuple[Rung, ...]
    winner: str
    rule: str

    @property
    def command(self) -> str:
        return f"python -m app lab search --seeds {self.seed} --budget {self.budget}{self.setting.options}"


def read_searches(path: Path | str = SEARCHES) -> list[Search]:
    """All searches of a file in its order; [] where there is no file. UserError with file and line number for a line
    that is none."""
    found = []
    for number, raw in results.lines(Path(path)):
        try:
            ranked = [
                [Tried(*(each[name] for name in Tried._fields)) for each in rung["ranking"]] for rung in raw["rungs"]
            ]
            kept = [*(len(each) for each in ranked[1:]), 1]
            rungs = [
                Rung(int(rung["step"]), tuple(each), n)
                for rung, each, n in zip(raw["rungs"], ranked, kept, strict=True)
            ]
            size, precision = str(raw["config"].get("size", "")), str(raw.get("precision", ""))
            setting = Setting(int(raw["steps"]), str(raw["device"]), size, precision)
            numbers = (int(raw[name]) for name in ("seed", "budget", "spent", "candidates"))
            found.append(Search(setting, *numbers, tuple(rungs), str(raw["winner"]), str(raw["rule"])))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            words = f"{type(error).__name__} {error}"
            raise UserError(
                f"{results.short(Path(path))}, line {number}, is no search: {words}. {results.AGAIN}"
            ) from error
    return found


def outcome(search: Search, runs: Sequence[Run]) -> str:
    """Whether the winner of a search beats the paper's rule of thumb on test scenes, in one or two sentences."""
    if search.winner == search.rule:
        return f"The search ended at the paper's rule of thumb, {search.rule}: it finds nothing better."
    here = settings(runs).get(search.setting, [])
    # the run that won was picked for being good: where there are others of its kind, they speak for it
    rest = [run for run in here if (run.variant, run.seed) != (search.winner, search.seed)]
    others = any(run.variant == search.winner for run in rest)
    here = rest if others else here
    row = {each.variant: each for each in summary(here).rows} if here else {}
    lacks = [name for name in (search.winner, search.rule) if name not in row]
    if lacks:
        return f"Not compared yet: {' and '.join(lacks)} {'has' if len(lacks) == 1 else 'have'} no run on test scenes."
    winner, rule = row[search.winner], row[search.rule]
    picked = "" if others else " Its only run is the one that the search picked, which flatters it."
    gap = winner.minus(rule)
    ends = f"{gap.points} points on fine questions, {gap.points_ends}"
    seeds = f"seed{'s' if len(winner.seeds) > 1 else ''} {listed(winner.seeds)} against {listed(rule.seeds)}"
    if winner.spread is None:
        told = f"Undecided: {search.winner} against the rule of thumb {search.rule}, {ends}, one seed of each"
    elif gap.low <= 0 <= gap.high:
        told = f"Undecided: {search.winner} against the rule of thumb {search.rule}, {ends}, and that includes zero"
    else:
        word = "beats" if gap.value > 0 else "does not beat"
        told = f"{search.winner} {word} the rule of thumb {search.rule}: {ends}"
    return f"{told} ({seeds}).{picked}"


def listed(things: Sequence) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, [", ".join(map(str, things[:-1])), str(things[-1])]))
