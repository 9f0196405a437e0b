"""The paper's claims, each as comparisons between variants of the lab, and what our results say of them.

A claim is supported where every comparison holds, contradicted where one is the other way round, and otherwise
undecided: an interval that includes both, ways of asking that differ, a variant that has not been run, or no variant
with a second seed. Each interval stands for itself: of a claim with four comparisons chance alone contradicts up to one
in ten. Knows nothing about pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from analysis.lab import REFERENCE, Interval, Summary

ALIKE = 0.2  # of the stacks' gain over none, or of the other's score if that is less: about as good, or far from it
SINGLE = "none"
MARKS = {"supported": "✓", "contradicted": "✗", "undecided": "?"}
# how two variants may differ -> (1 for upwards, how many margins the difference has to pass, in words)
HOW = {
    "above": (1, 0, "above"),
    "below": (-1, 0, "below"),
    "not above": (-1, -1, "at most {} above"),
    "not below": (1, -1, "at most {} below"),
    "far below": (-1, 1, "more than {} below"),
}


@dataclass(frozen=True)
class Comparison:
    """`variant` is HOW `against`."""

    variant: str
    how: str
    against: str

    def words(self, margin: float | None = None) -> str:
        """In words; `margin`: a share, None where it is not known."""
        points = "a little" if margin is None else f"{100 * margin:.1f} points"
        return f"{self.variant} {HOW[self.how][2].format(points)} {self.against}"


@dataclass(frozen=True)
class Claim:
    """What the paper says, where, and what would show it here."""

    words: str
    source: str
    shown_by: tuple[Comparison, ...]
    caution: str = ""  # what besides the claim could make ours come out as they do


CLAIMS = (
    Claim(
        "What helps is high-resolution tokens; the residual connection without new tokens does not.",
        "table 6",
        (
            Comparison(REFERENCE, "above", SINGLE),
            Comparison(REFERENCE, "above", "dummy"),
            Comparison("dummy", "not above", SINGLE),
        ),
    ),
    Claim(
        "Stacks do about as well as all tokens in the sequence, with a quarter to a fifth of the context.",
        "table 7",
        tuple(Comparison(REFERENCE, "not below", string) for string in ("global-string", "string")),
        "At equal steps, and which of so many rows a colour names takes longer to learn. The paper's own stacks lie "
        "4.6 to 4.8 points below its strings on DocVQA.",
    ),
    Claim(
        "Stacks in several layers are better than the same tokens merged once at the input.",
        "table 7",
        (Comparison(REFERENCE, "above", "concat"),),
    ),
    Claim(
        "A sample should cover the whole image, each token on the global token of its place.",
        "table 5",
        tuple(Comparison(REFERENCE, "above", f"stack-{other}") for other in ("grid", "1d-sequential", "1d")),
        "At equal steps: more training may teach displaced samples colours, too. The paper's text describes the "
        "sequential 1d, its code does the other.",
    ),
    Claim(
        "Both views should show things in the same place.",
        "table 5",
        (Comparison(REFERENCE, "above", "inconsistent-resize"),),
    ),
    Claim(
        "Visual tokens must enter early: up to a quarter of the depth is acceptable, past the middle much is lost.",
        "figure 3 a",
        tuple(
            Comparison(f"global-deeper-{layer}{guided}", how, f"{SINGLE}{guided}")
            for guided in ("", "-unguided")
            for layer, how in ((2, "not below"), (6, "far below"))
        ),
        "All are taught at the last layer what image rows hold, and all but the unguided where to read: both may make "
        "a late start easier. Eight layers, short codes.",
    ),
    Claim(
        "Stacks help at every interval between their layers.",
        "figure 3 b",
        tuple(Comparison(f"interval-{k}", "above", SINGLE) for k in (2, 3, 4)),
        "In eight layers an interval of 3 leaves room for three stacks, one of 4 for two.",
    ),
    Claim(
        "Four stacks are better than fewer.",
        "figure 3 c",
        tuple(Comparison(REFERENCE, "above", f"layers-{k}") for k in (1, 2, 3)),
        "Each stack left out is also a quarter of the pixels left out. More than four, no better in the paper, "
        "are not tried: ours has four samples.",
    ),
    Claim(
        "Stacks help in the vision tower too, if its first layers see the tokens first.",
        "table 4",
        (
            Comparison("deepstack-v-3", "above", "none-tuned"),
            Comparison("deepstack-v-4", "above", "none-tuned"),
            Comparison("deepstack-v-0", "below", "none-tuned"),
        ),
        "Ours has five tower layers: of four stacks deepstack-v-3 keeps two and deepstack-v-4 one, so fewer pixels; "
        "the tower is trained by changes of rank 8 alone.",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """One comparison in our results. kind: "holds" | "fails" | "open" | "not run"; difference: variant - against."""

    comparison: Comparison
    kind: str
    difference: Interval | None = None
    seeds: tuple[int, int] = (0, 0)  # how many, of the variant and of what it is compared with
    margin: float | None = None
    ways: Mapping[str, Interval] = field(default_factory=dict)  # how it is asked -> difference, where that matters

    @property
    def words(self) -> str:
        """The comparison and its points in one line."""
        if self.difference is None:
            return f"{self.comparison.words()}: not run"
        gap, (ours, other) = self.difference, self.seeds
        seeds = f"{ours} seed{'s' if ours > 1 else ''}" + ("" if ours == other else f" against {other}")
        ways = "".join(f"; {way} {each.points} ({each.points_ends})" for way, each in self.ways.items())
        points = f"{gap.points} points ({gap.points_ends}, {seeds})"
        return f"{self.comparison.words(self.margin)}: {self.kind}, {points}{ways}"


@dataclass(frozen=True)
class Finding:
    """One claim and what our results say. kind: "supported" | "contradicted" | "undecided"."""

    claim: Claim
    outcomes: tuple[Outcome, ...]

    @property
    def kind(self) -> str:
        kinds = {outcome.kind for outcome in self.outcomes}
        if "fails" in kinds:
            return "contradicted"
        return "supported" if kinds == {"holds"} else "undecided"


def findings(found: Summary) -> list[Finding]:
    """Every claim of the paper in the results of one setting."""
    return [Finding(claim, tuple(outcome(found, each) for each in claim.shown_by)) for claim in CLAIMS]


def outcome(found: Summary, comparison: Comparison) -> Outcome:
    """One comparison: it holds, or fails, where the whole 95 % interval of the difference does, and in each way of
    asking where that matters; open as long as no variant has a second seed."""
    ours, other = found.row(comparison.variant), found.row(comparison.against)
    margin = _margin(found, comparison)
    if ours is None or other is None or margin is None:
        return Outcome(comparison, "not run")
    ways = found.depends(comparison.variant, comparison.against)
    kinds = {_kind(comparison, each) for each in [found, *(found.ways if ways else ())]}
    kind = kinds.pop() if len(kinds) == 1 and ours.spread is not None else "open"
    return Outcome(comparison, kind, ours.minus(other), (len(ours.runs), len(other.runs)), margin, ways)


def _kind(comparison: Comparison, found: Summary) -> str:
    """Of both variants' difference under one score."""
    margin = _margin(found, comparison)
    if margin is None:
        return "open"
    sign, margins, _ = HOW[comparison.how]
    gap = found.row(comparison.variant).minus(found.row(comparison.against))
    low, high = (gap.low, gap.high) if sign > 0 else (-gap.high, -gap.low)
    least = margins * margin
    return "holds" if low > least else "fails" if high < least else "open"


def _margin(found: Summary, comparison: Comparison) -> float | None:
    """What is a little here, or far: ALIKE of what stacks gain over a single injection, or of what the other one reads
    where that is less; 0 where it does not count. None where one of them has not been run."""
    if not HOW[comparison.how][1]:
        return 0.0
    stacks, single, other = found.reference, found.row(SINGLE), found.row(comparison.against)
    if stacks is None or single is None or other is None:
        return None
    return ALIKE * max(0.0, min(stacks.minus(single).value, other.mean.value))
