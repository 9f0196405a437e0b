"""Answers side by side: differences, errors against a truth, where two answers part. Knows nothing about models.

Before a match or an error rate is counted, both texts are normalised: Unicode NFKC, runs of white space made one space,
ends stripped. Case and punctuation count: reading "k7px2" off a sign that says "K7PX2" is an error, and so is an added
full stop.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
from rapidfuzz.distance import LCSseq

from analysis.palette import source_name
from model.layout import Layout
from model.plan import BASE, Plan, enters_tower
from model.types import Answer, Token

SAME, DROPPED, ADDED = "same", "dropped", "added"
FEW = 3  # moved or scaled stacks that are told one by one
Span = tuple[str, str]  # (SAME | DROPPED | ADDED, text)


def normalise(text: str) -> str:
    """The text as it is compared (rule: top of this file)."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip()


def exact(text: str, truth: str) -> bool:
    """Whether the two are the same after `normalise`."""
    return normalise(text) == normalise(truth)


def cer(text: str, truth: str) -> float:
    """Character error rate: (substituted + missing + added characters) / characters of the truth, after `normalise`.

    0 is perfect; it can exceed 1. Against an empty truth it is 0 for an empty text and else the number of characters.
    """
    text, truth = normalise(text), normalise(truth)
    if not truth:
        return float(len(text))
    return float(jiwer.cer(truth, text))


def corpus_cer(pairs: Sequence[tuple[str, str]]) -> float:
    """Errors over all (text, truth) pairs divided by the characters of all truths; NaN when there are none."""
    errors = characters = 0.0
    for text, truth in pairs:
        length = len(normalise(truth))
        errors += cer(text, truth) * max(length, 1)
        characters += length
    return errors / characters if characters else float("nan")


def diff(a: str, b: str, unit: str | None = None) -> list[Span]:
    """What changed from `a` to `b`, as spans; `unit` "word" or "character" (default: `best_unit`).

    Joined, the same and dropped spans give `a`, the same and added spans give `b`; neighbours of one kind are merged,
    and a replacement is a dropped span followed by an added one.
    """
    unit = unit or best_unit(a, b)
    if unit not in ("word", "character"):
        raise ValueError(f"the unit of a diff is word or character, not {unit}")
    left, right = (_words(a), _words(b)) if unit == "word" else (list(a), list(b))
    spans: list[Span] = []
    for step in LCSseq.opcodes(left, right):
        if step.tag == "equal":
            spans.append((SAME, "".join(left[step.src_start : step.src_end])))
        else:
            spans.append((DROPPED, "".join(left[step.src_start : step.src_end])))
            spans.append((ADDED, "".join(right[step.dest_start : step.dest_end])))
    return _merged(spans)


def best_unit(a: str, b: str) -> str:
    """Characters for short readings (at most two words each), words for sentences."""
    return "character" if max(len(a.split()), len(b.split())) <= 2 else "word"


def _words(text: str) -> list[str]:
    """Words, single marks and runs of white space; joined they are the text."""
    return re.findall(r"\s+|\w+|[^\w\s]", text)


def _merged(spans: list[Span]) -> list[Span]:
    """Within each run of changes one dropped and one added span; white space kept between two changes joins them."""
    out: list[Span] = []
    dropped = added = ""

    def flush() -> None:
        nonlocal dropped, added
        out.extend(span for span in ((DROPPED, dropped), (ADDED, added)) if span[1])
        dropped = added = ""

    for i, (op, text) in enumerate(spans):
        if op == DROPPED:
            dropped += text
        elif op == ADDED:
            added += text
        elif text.isspace() and (dropped or added) and any(rest != SAME for rest, _ in spans[i + 1 :]):
            dropped, added = dropped + text, added + text
        elif text:
            flush()
            if out and out[-1][0] == SAME:
                out[-1] = (SAME, out[-1][1] + text)
            else:
                out.append((SAME, text))
    flush()
    return out


@dataclass(frozen=True)
class Side:
    """One answer at the place where two answers part."""

    index: int  # which token of its answer, from 0
    token: Token | None  # None: this answer had ended
    top: tuple[tuple[str, float], ...]  # its five most probable tokens there (text, log-probability); () if not known


@dataclass(frozen=True)
class Divergence:
    """The first place where two answers differ."""

    prefix: str  # the text that both share before it
    sides: tuple[Side, Side]


def first_divergence(a: Answer, b: Answer) -> Divergence | None:
    """Where the two answers part, found on their text (so tokenizers may differ); None if they never do.

    Each side is the token that holds the first differing character. If one answer is the beginning of the other, the
    shorter one has ended there: its token is None, and its top five can be had from
    `engine.next_tokens(prompt, plan, tokens)`.
    """
    left, right = ("".join(token.text for token in answer.tokens) for answer in (a, b))
    if left == right:
        return None
    at = next((i for i, (x, y) in enumerate(zip(left, right, strict=False)) if x != y), min(len(left), len(right)))
    sides, starts = [], []
    for answer in (a, b):
        start = 0
        for index, token in enumerate(answer.tokens):  # noqa: B007
            if start <= at < start + len(token.text):
                sides.append(Side(index, token, token.top))
                break
            start += len(token.text)
        else:
            sides.append(Side(len(answer.tokens), None, ()))
        starts.append(start)
    return Divergence(left[: min(starts)], (sides[0], sides[1]))


def plan_badge(layout: Layout, plan: Plan) -> tuple[str, str]:
    """("trained" | "ablated", why): whether the model runs as it was trained, and if not, what is different.

    "Ablated" is said of every plan other than the default one: the model never saw it in training.
    """
    if plan == layout.default:
        return "trained", "as trained"
    changed: dict[str, dict[str, str]] = {"off": {}, "added": {}, "moved": {}, "scaled": {}}  # kind -> source -> how
    for name in dict.fromkeys((*layout.default.sources(), *plan.sources())):
        was = {e.layer: e.gain for e in layout.default if e.source == name}
        now = {e.layer: e.gain for e in plan if e.source == name}
        where = "vision " if enters_tower(name) else ""
        if was == now:
            continue
        if not now:
            changed["off"][name] = ""
        elif not was:
            changed["added"][name] = f" at {where}{_places(now)}"
        elif set(was) != set(now):
            changed["moved"][name] = f" from {where}{_places(was)} to {_places(now)}"
        else:
            changed["scaled"][name] = f", {_places(now, gains=True)}"
    stacks = [name for name in layout.default.sources() if name != BASE]
    words = []
    for kind, found in changed.items():
        several = [name for name in found if name in stacks]
        together = several if len(several) > (1 if kind == "off" else FEW) else []
        words += [f"{source_name(name)} {kind}{how}" for name, how in found.items() if name not in together]
        if together:
            words.append(f"{'all stacks' if together == stacks else 'stacks ' + ', '.join(together)} {kind}")
    return "ablated", "; ".join(words)


def _places(entries: dict[int, float], gains: bool = False) -> str:
    if gains:
        return ", ".join(f"×{gain:g}" for _, gain in sorted(entries.items()))
    return ("layer " if len(entries) == 1 else "layers ") + ", ".join(map(str, sorted(entries)))


def logprob(tokens: Sequence[Token]) -> float:
    """Log-probability of the whole text, natural logarithm: the sum over its tokens."""
    return float(sum(token.logprob for token in tokens))


def rows(
    answers: Sequence[Answer],
    labels: Sequence[str],
    truth: str | None = None,
    truth_scores: Sequence[Sequence[Token] | None] | None = None,
) -> list[dict]:
    """One row per column of the comparison; what is not known is None.

    `truth_scores`: the truth's tokens under each column (`engine.score`), for its log-probability.
    """
    scores = truth_scores or [None] * len(answers)
    table = []
    for answer, label, scored in zip(answers, labels, scores, strict=True):
        table.append(
            {
                "column": label,
                "model": answer.model,
                "plan": str(answer.plan),
                "answer": answer.text,
                "exact": None if truth is None else exact(answer.text, truth),
                "cer": None if truth is None else cer(answer.text, truth),
                "logprob_answer": logprob(answer.tokens),
                "logprob_truth": None if scored is None else logprob(scored),
                "tokens": len(answer.tokens),
                "visual_tokens": answer.visual_tokens,
                "seconds": answer.seconds,
            }
        )
    return table
