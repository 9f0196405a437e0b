"""All on/off subsets of the stacks at once, and what each stack is worth on average (Shapley values).

1. `subsets_of(plan)`: the 2^K plans, base kept, bit i of the index switches stack i on.
2. `run` answers under each (one batch) and scores one text, the target, under each (a second batch): the
   log-probability of each of its tokens, given the ones before.
3. `shapley`: for every order of switching the K stacks on, what each one adds when its turn comes, averaged over the
   orders. Exact from the 2^K scores:  phi_i = sum over S without i of |S|! (K-|S|-1)! / K! * (v(S + i) - v(S)).

Knows nothing about figures or pages; the engine is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import factorial

import numpy as np
import torch

from analysis.compare import exact
from model.errors import UserError
from model.plan import BASE, Plan
from model.prompt import Prompt
from model.types import Answer, Sampling, Token

MAX_STACKS = 6  # 64 plans in one batch


@dataclass(frozen=True)
class Subset:
    """One on/off state of the stacks and what the model said under it."""

    plan: Plan
    on: tuple[str, ...]  # the stacks switched on
    label: str  # "all 4", "without 2", "only 0, 1", "base only"
    answer: Answer
    match: bool | None  # whether the answer is the truth; None without a truth
    logprob: float  # of the target under this plan, nats


@dataclass(frozen=True)
class SubsetRun:
    """Every subset, those with most stacks first, and the Shapley values that follow from them."""

    plan: Plan  # with everything on
    stacks: tuple[str, ...]  # [K]
    rows: tuple[Subset, ...]  # [2^K]
    target: str  # the text that is scored: the truth if one was given, else the answer with everything on
    tokens: tuple[str, ...]  # [A] texts of the target's tokens
    scores: np.ndarray  # float64 [2^K, A] log-probability of each token; index = bits, bit i is stack i
    shapley: np.ndarray  # float64 [K, A], nats; over K they sum to scores[all on] - scores[all off]
    seconds: float  # of the batch of answers


def subsets_of(plan: Plan) -> list[Plan]:
    """All 2^K on/off subsets of a plan's K stacks, base kept; bit i of the index is stack i (in the plan's order)."""
    stacks = stacks_of(plan)
    if len(stacks) > MAX_STACKS:
        raise UserError(f"The plan has {len(stacks)} stacks; all subsets are tried for {MAX_STACKS} at most.")
    return [
        Plan(e for e in plan if e.source == BASE or bits >> stacks.index(e.source) & 1)
        for bits in range(2 ** len(stacks))
    ]


def stacks_of(plan: Plan) -> tuple[str, ...]:
    """The plan's stacks, without the base."""
    return tuple(source for source in plan.sources() if source != BASE)


def shapley(values: np.ndarray) -> np.ndarray:
    """Exact Shapley values of a game. values [2^K, ...]: worth of every coalition, bit i is player i -> [K, ...]."""
    values = np.asarray(values, dtype=np.float64)
    players = len(values).bit_length() - 1
    if len(values) != 2**players:
        raise ValueError(f"a game of K players has 2^K values, not {len(values)}")
    phi = np.zeros((players, *values.shape[1:]))
    for bits in range(len(values)):
        size = bits.bit_count()
        for i in range(players):
            if not bits >> i & 1:
                weight = factorial(size) * factorial(players - size - 1) / factorial(players)
                phi[i] += weight * (values[bits | 1 << i] - values[bits])
    return phi


def run(
    engine, prompt: Prompt, plan: Plan | None = None, sampling: Sampling | None = None, truth: str | None = None
) -> SubsetRun:
    """Answers under all subsets of `plan` (default: the model's own), and Shapley values of the target's score.

    The target is `truth` if given, else the answer with everything on; UserError if that is empty.
    """
    plan = engine.layout.default if plan is None else plan
    plans = subsets_of(plan)
    answers = engine.answer_many(prompt, plans, sampling or Sampling())
    target = truth if truth else answers[-1].text
    if not target.strip():
        raise UserError("There is nothing to score: the answer is empty. Give the true answer, or ask something else.")
    tokens = engine.score(prompt, plan, target)
    scores = scores_of(engine, prompt, plan, tokens)
    stacks = stacks_of(plan)
    rows = []
    for bits in sorted(range(len(plans)), key=lambda b: (-b.bit_count(), b)):
        on = tuple(stack for i, stack in enumerate(stacks) if bits >> i & 1)
        match = exact(answers[bits].text, truth) if truth else None
        label = subset_label(stacks, on, base=BASE in plan.sources())
        rows.append(Subset(plans[bits], on, label, answers[bits], match, float(scores[bits].sum())))
    return SubsetRun(
        plan=plan,
        stacks=stacks,
        rows=tuple(rows),
        target=target,
        tokens=tuple(token.text for token in tokens),
        scores=scores,
        shapley=shapley(scores),
        seconds=max(answer.seconds for answer in answers),
    )


def scores_of(engine, prompt: Prompt, plan: Plan, tokens: Sequence[Token]) -> np.ndarray:
    """Log-probability of each token under every subset of the plan's stacks, float64 [2^K, A], as one batch of 2^K."""
    stacks = stacks_of(plan)
    sources = [source.name for source in engine.layout.sources_for(plan)]
    gains = torch.ones(2 ** len(stacks), len(sources), prompt.visual_tokens)
    for bits in range(len(gains)):
        for i, stack in enumerate(stacks):
            if not bits >> i & 1:
                gains[bits, sources.index(stack)] = 0.0
    with torch.no_grad():
        return engine.logprob_of(prompt, tokens, plan, gains).double().cpu().numpy()


def subset_label(stacks: tuple[str, ...], on: tuple[str, ...], base: bool = True) -> str:
    """What a subset is called: "all 4", "without 2", "only 0, 1", "base only" ("nothing" in a plan without base)."""
    off = [stack for stack in stacks if stack not in on]
    if not on:
        return "base only" if base else "nothing"
    if not off:
        return "as it is" if len(stacks) == 1 else f"all {len(stacks)}"
    if len(off) < len(on):
        return "without " + ", ".join(off)
    return "only " + ", ".join(on)
