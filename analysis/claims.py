"""The paper's claims, each as comparisons between variants of the lab, and what our results say of them.

A claim is supported where every comparison holds, contradicted where one is the other way round, and otherwise
undecided: an interval that includes both, a variant that has not been run, or no variant with a second seed. Knows
nothing about pages.
"""

from __future__ import annotations

from dataclasses import dataclass

from analysis.lab import REFERENCE, Interval, Summary

ALIKE = 0.2  # of the stacks' gain over none: what may lie between two that a claim calls about as good
SINGLE = "none"
MARKS = {"supported": "✓", "contradicted": "✗", "undecided": "?"}
HOW = ("above", "below", "not above", "not below")  # "not": by no more than ALIKE of the gain


@dataclass(frozen=True)
class Comparison:
    """`variant` is HOW `against`, under the metric of the results or one of its own."""

    variant: str
    how: str
    against: str
    metric: str = ""

    @property
    def words(self) -> str:
        own = f", asked by {self.metric}" if self.metric else ""
        return f"{self.variant} {self.how.replace('not ', 'not clearly ')} {self.against}{own}"


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
        "Stacks do about as well as all tokens in the sequence, with a fifth of the context.",
        "table 7",
        tuple(
            Comparison(REFERENCE, "not below", string, metric)
            for metric in ("", "place")
            for string in ("global-string", "string")
        ),
        "At equal steps. Which of so many rows a colour names takes longer to learn: the score by place counts, too.",
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
        "The paper's text describes the sequential 1d, its code does the other.",
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
            for layer, how in ((2, "not below"), (6, "below"))
        ),
        "Our training has all but the unguided read in the last two layers, which may make a late start easier.",
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
        "Each stack left out is also a quarter of the pixels left out.",
    ),
    Claim(
        "Stacks help in the vision tower too, if its first layers see the tokens first.",
        "table 4",
        (
            Comparison("deepstack-v-3", "above", "none-tuned"),
            Comparison("deepstack-v-4", "above", "none-tuned"),
            Comparison("deepstack-v-0", "below", "none-tuned"),
        ),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """One comparison in our results. kind: "holds" | "fails" | "open" | "not run"; difference: variant - against."""

    comparison: Comparison
    kind: str
    difference: Interval | None = None
    seeds: int = 0  # of the variant with fewer

    @property
    def words(self) -> str:
        """The comparison and its points in one line."""
        if self.difference is None:
            return f"{self.comparison.words}: not run"
        gap = self.difference
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        return f"{self.comparison.words}: {self.kind}, {gap.points} points ({gap.points_ends}, {seeds})"


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
    return [
        Finding(claim, tuple(outcome(found, each) for each in claim.shown_by if each.metric != found.metric))
        for claim in CLAIMS
    ]


def outcome(found: Summary, comparison: Comparison) -> Outcome:
    """One comparison: it holds, or fails, where the whole 95 % interval of the difference does; open as long as no
    variant has a second seed."""
    found = found.under(comparison.metric or found.metric)
    ours, other = found.row(comparison.variant), found.row(comparison.against)
    if ours is None or other is None:
        return Outcome(comparison, "not run")
    gap, seeds = ours.minus(other), min(len(ours.runs), len(other.runs))
    margin = _margin(found) if comparison.how.startswith("not") else 0.0
    if margin is None:
        return Outcome(comparison, "not run")
    up = comparison.how.endswith("below") == comparison.how.startswith("not")  # what would be for it is upwards
    low, high = (gap.low, gap.high) if up else (-gap.high, -gap.low)
    kind = "holds" if low > -margin else "fails" if high < -margin else "open"
    return Outcome(comparison, "open" if ours.spread is None else kind, gap, seeds)


def _margin(found: Summary) -> float | None:
    """ALIKE of what stacks gain over a single injection here; None where that has not been run."""
    stacks, single = found.reference, found.row(SINGLE)
    return None if stacks is None or single is None else ALIKE * abs(stacks.minus(single).value)
