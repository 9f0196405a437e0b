"""A search for where stacks enter: successive halving over start, interval and count, for a fixed budget of steps.

1. candidates(): every way to place one to four samples in the decoder's layers; so many as the budget pays for are
   drawn by chance, as many of each number of stacks
2. plan(): all of them train for half of a run, the better half goes on to its end; each run keeps the schedule of a
   full run and only pauses, so that what ends is the run of its variant
3. halve(): ranked by characters right on validation scenes; test scenes have no part in it

Source: Jamieson and Talwalkar 2016 (successive halving). ray.tune and optuna have it too; the first needs pyarrow,
tensorboardX and fsspec beside ray, the second is one more framework, each for the ten lines of `halve`. Runs go through
Ray as all others do. Knows nothing about how many of them run at once.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model.errors import UserError
from model.lab import run as lab
from model.lab.run import Job
from model.lab.variants import SETS, Variant, placed
from model.training import twins

RULE = "stack-2d"  # the paper's rule of thumb: before layer 1, every layer, four stacks, whatever the decoder's depth
WIDEST = 4  # layers from one stack to the next
# Of a run, where it is ranked: twice as far with half as many. Not at a quarter: the first 327 of 2,000 steps ask
# nothing, so that at 500 a variant has been asked questions for 173 steps, and losses are hardly apart (measured:
# answer losses of 1.66 to 1.90, hardly in the order of the end); by 1,000 they are.
RUNGS = (0.5, 1.0)
BUDGET = 8  # full runs, unless told


class Rung(NamedTuple):
    """So many runs are trained up to this step and ranked."""

    step: int
    count: int


@dataclass(frozen=True)
class Found:
    """What a search has done: per rung what each run scored, the best first; the winner is the first of the last."""

    rungs: tuple[tuple[Rung, tuple[tuple[Job, dict], ...]], ...]

    @property
    def winner(self) -> Job:
        return self.rungs[-1][1][0][0]


def candidates(layers: int) -> list[Variant]:
    """Every placement in a decoder of so many layers whose stacks all find one."""
    return [
        variant
        for count in range(1, SETS + 1)
        for interval in range(1, WIDEST + 1)
        for start in range(layers - interval * (count - 1))
        if (variant := placed(start, interval, count, layers))
    ]


def drawn(layers: int, count: int, seed: int) -> list[Variant]:
    """So many of the candidates, by chance, as many of each number of stacks as there can be."""
    rng = np.random.default_rng(seed)
    by_count: dict[int, list[Variant]] = {}
    for variant in candidates(layers):
        by_count.setdefault(variant.count, []).append(variant)
    turns = [[each[i] for i in rng.permutation(len(each))] for each in reversed(by_count.values())]
    return [variant for turn in zip_longest(*turns) for variant in turn if variant][:count]


def plan(budget: int, steps: int, most: int) -> list[Rung]:
    """What a budget of training steps pays for, with runs of `steps` and `most` candidates. UserError where it does not
    pay for two."""
    found: list[Rung] = []
    for count in range(2, most + 1):
        rungs = [Rung(max(1, round(steps * share)), max(1, count >> k)) for k, share in enumerate(RUNGS)]
        if spent(rungs) > budget:
            break
        found = rungs
    if not found:
        least = spent([Rung(max(1, round(steps * share)), max(1, 2 >> k)) for k, share in enumerate(RUNGS)])
        raise UserError(f"--budget is {budget:,}; two candidates of {steps:,} steps each need {least:,} steps.")
    return found


def spent(rungs: Sequence[Rung]) -> int:
    """Training steps of these rungs: each goes on from the one before."""
    before = [0, *(rung.step for rung in rungs)]
    return sum(rung.count * (rung.step - start) for rung, start in zip(rungs, before, strict=False))


def halve(jobs: Sequence[Job], rungs: Sequence[Rung], climb: Callable[[list[Job], int], list[dict]]) -> Found:
    """climb(jobs, step): trains these up to a step and gives what `scored` says of each."""
    left, told = list(jobs), []
    for rung in rungs:
        left = left[: rung.count]
        ranked = sorted(zip(left, climb(left, rung.step), strict=True), key=lambda pair: _rank(pair[1]))
        left = [job for job, _ in ranked]
        told.append((rung, tuple(ranked)))
    return Found(tuple(told))


def _rank(scores: dict) -> tuple[float, float]:
    """The best first: characters tell runs apart long before whole strings are read."""
    return -scores["characters"], -scores["exact_match"]


def home(workdir: Path) -> Path:
    """Where the runs of searches are kept, apart from those of `lab run`, which were not ranked on their way."""
    return workdir / "lab" / "search"


def ranked(job: Job, workdir: Path, until: int) -> dict | None:
    """What a candidate scored at this step; None where it has not been there."""
    said = job.folder(home(workdir)) / f"rung-{until}.json"
    return json.loads(said.read_text()) if said.exists() else None


def climb(job: Job, workdir: Path, until: int, progress=None) -> dict:
    """Train one candidate up to a step, from where it was; what it scores on the validation scenes then. Steps that
    were lost in a kill are trained again, and not counted."""
    if there := ranked(job, workdir, until):
        return there
    folder = job.folder(home(workdir))
    said = folder / f"rung-{until}.json"
    if (folder / "last.pt").exists() and torch.load(folder / "last.pt", weights_only=True)["step"] > until:
        lab.forget(job, home(workdir))  # it went on without having been ranked here

    def within(share: float, words: str) -> None:
        progress(share * job.steps / until, words)

    twin, questions, _, watched, _ = lab.train(job, workdir, progress and within, home(workdir), until)
    scores = lab.marks(twins.answered(twin, questions, *watched, most=lab.MOST))["fine"]
    new = said.with_suffix(".new")
    new.write_text(json.dumps(scores))
    new.replace(said)
    return scores


def finish(job: Job, workdir: Path, progress=None) -> dict:
    """Test and measure a run that a search has trained to its end; its record."""
    return lab.run(job, workdir, progress, home(workdir))


def record(found: Found, budget: int, ended: dict) -> dict:
    """One line for the file of searches. ended: the record of the winner's run."""
    job = found.winner
    size = {key: value for key, value in job.config().items() if key not in job.variant.config()}
    rungs = [
        {
            "step": rung.step,
            "ranking": [{"variant": each.variant.name, **_place(each.variant), **scores} for each, scores in ranked],
        }
        for rung, ranked in found.rungs
    ]
    return {
        "variant": "search",
        "config": {**size, "budget": budget},
        "seed": job.seed,
        "steps": job.steps,
        **{key: ended[key] for key in ("device", "precision", "versions")},
        "budget": budget,
        "spent": spent([rung for rung, _ in found.rungs]),
        "candidates": len(candidates(job.size.layers)),
        "rungs": rungs,
        "winner": job.variant.name,
        "rule": RULE,
        "when": datetime.date.today().isoformat(),
    }


def _place(variant: Variant) -> dict[str, int]:
    return {key: getattr(variant, key) for key in ("start", "interval", "count")}
