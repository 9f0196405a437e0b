"""On/off subsets of the stacks at once, and what each stack is worth on average (Shapley values).

1. `subsets_of(plan)`: plans with some of the K stacks, base kept: all 2^K, or the telling ones of more than
   six stacks.
2. `run` answers under each (one batch) and scores one text, the target, under each and whatever 3. needs (a second
   batch): the log-probability of each of its tokens, given the ones before.
3. `shapley`: for every order of switching the K stacks on, what each one adds when its turn comes, averaged over the
   orders. Exact from the 2^K scores:  phi_i = sum over S without i of |S|! (K-|S|-1)! / K! * (v(S + i) - v(S)).
   Of more than six stacks `sampled_shapley` takes some orders, drawn at random and each with its reverse, which cancels
   part of the noise (Mitchell et al. 2022, Sampling permutations for Shapley value estimation), and gives its error.

A subset is written as bits: bit i switches stack i on. Knows nothing about figures or pages; the engine is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import factorial

import numpy as np

from analysis.compare import exact
from model.errors import UserError
from model.plan import BASE, Plan
from model.prompt import Prompt
from model.types import Answer, Sampling, Token

MAX_ALL = 6  # stacks whose 64 subsets are all tried
ORDERS = 16  # of switching on, for more stacks than that: eight and their reverses


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
    """Subsets, those with most stacks first, and the Shapley values of the stacks."""

    plan: Plan  # with everything on
    stacks: tuple[str, ...]  # [K]
    rows: tuple[Subset, ...]  # [S], all of the 2^K or the telling ones
    target: str  # the text that is scored: the truth if one was given, else the answer with everything on
    tokens: tuple[str, ...]  # [A] texts of the target's tokens
    scores: np.ndarray  # float64 [T, A] log-probability of each token; first with all stacks off, last with all on
    shapley: np.ndarray  # float64 [K, A], nats; over K they sum to scores[-1] - scores[0]
    error: np.ndarray | None  # float64 [K, A], standard error of the values, nats; None where they are exact
    seconds: float  # of the batch of answers


def bits_of(count: int) -> list[int]:
    """The subsets of `count` stacks that are answered, ascending: all 2^K of up to six stacks; else none, all, each
    stack alone, all but each, the first n and the last n."""
    if count <= MAX_ALL:
        return list(range(2**count))
    everything = 2**count - 1
    single = {1 << i for i in range(count)}
    first = {(1 << n) - 1 for n in range(count + 1)}
    return sorted(single | {everything ^ bits for bits in single} | first | {everything ^ bits for bits in first})


def subsets_of(plan: Plan) -> dict[int, Plan]:
    """Bits to plan, ascending: the subsets of a plan's stacks that are answered, base kept; bit i is stack i in the
    plan's order."""
    return {bits: subset_of(plan, bits) for bits in bits_of(len(stacks_of(plan)))}


def subset_of(plan: Plan, bits: int) -> Plan:
    """The plan with those of its stacks whose bit is set, base kept."""
    stacks = stacks_of(plan)
    return Plan(e for e in plan if e.source == BASE or bits >> stacks.index(e.source) & 1)


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


def orders_of(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """ORDERS orders of `count` stacks: random ones, each followed by its reverse."""
    rng = np.random.default_rng(seed)
    drawn = [tuple(int(i) for i in rng.permutation(count)) for _ in range(ORDERS // 2)]
    return [order for one in drawn for order in (one, one[::-1])]


def passed(order: Sequence[int]) -> list[int]:
    """Bits of the subsets that switching stacks on in this order passes through, from none to all."""
    return [sum(1 << i for i in order[:n]) for n in range(len(order) + 1)]


def sampled_shapley(values: Mapping[int, np.ndarray], orders: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Shapley values `[K, ...]` estimated from `orders`, each with its reverse after it, and their standard error.

    values: worth of every subset that the orders pass, by bits. An order and its reverse count as one draw.
    """
    added = np.zeros((len(orders), len(orders[0]), *np.shape(values[0])))
    for n, order in enumerate(orders):
        steps = passed(order)
        for place, player in enumerate(order):
            added[n, player] = values[steps[place + 1]] - values[steps[place]]
    draws = (added[::2] + added[1::2]) / 2
    return draws.mean(0), draws.std(0, ddof=1) / len(draws) ** 0.5


def run(
    engine, prompt: Prompt, plan: Plan | None = None, sampling: Sampling | None = None, truth: str | None = None
) -> SubsetRun:
    """Answers under subsets of `plan` (default: the model's own), and Shapley values of the target's score.

    The target is `truth` if given, else the answer with everything on; UserError if that is empty.
    """
    plan = engine.layout.default if plan is None else plan
    plans = subsets_of(plan)
    said = engine.answer_many(prompt, list(plans.values()), sampling or Sampling())
    answers = dict(zip(plans, said, strict=True))
    target = truth if truth else said[-1].text
    if not target.strip():
        raise UserError("There is nothing to score: the answer is empty. Give the true answer, or ask something else.")
    tokens = engine.score(prompt, plan, target)
    stacks = stacks_of(plan)
    orders = orders_of(len(stacks)) if len(stacks) > MAX_ALL else []
    wanted = sorted({*plans, *(bits for order in orders for bits in passed(order))})
    scores = scores_of(engine, prompt, plan, tokens, wanted)
    worth = dict(zip(wanted, scores, strict=True))
    shares, error = sampled_shapley(worth, orders) if orders else (shapley(scores), None)
    rows = []
    for bits in sorted(plans, key=lambda b: (-b.bit_count(), b)):
        on = tuple(stack for i, stack in enumerate(stacks) if bits >> i & 1)
        match = exact(answers[bits].text, truth) if truth else None
        label = subset_label(stacks, on, base=BASE in plan.sources())
        rows.append(Subset(plans[bits], on, label, answers[bits], match, float(worth[bits].sum())))
    return SubsetRun(
        plan=plan,
        stacks=stacks,
        rows=tuple(rows),
        target=target,
        tokens=tuple(token.text for token in tokens),
        scores=scores,
        shapley=shares,
        error=error,
        seconds=max(answer.seconds for answer in said),
    )


def scores_of(engine, prompt: Prompt, plan: Plan, tokens: Sequence[Token], subsets: Sequence[int]) -> np.ndarray:
    """Log-probability of each token under each subset of the plan's stacks, given as bits: float64 [T, A], in one
    batch."""
    return engine.logprobs(prompt, tokens, [subset_of(plan, bits) for bits in subsets]).double().cpu().numpy()


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
