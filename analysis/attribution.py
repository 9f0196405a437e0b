"""Which sources and patches the answer's log-probability rests on, by captum.

The function attributed is f(g) = log p(answer | image, question) with a gain g[s, n] on each source s and image row n,
on top of the plan: all ones is the plan as it is, all zeros is no image at all. Attributing to gains rather than to
pixels keeps every number on the token grid and says which source it came through. What enters the vision tower is no
such source: it stays as the plan has it.

Each pass takes the engine's own lock; gradients flow to the gains only. Nothing is installed on the model. Knows
nothing about figures; the engine is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from analysis.grids import GridMap, finite_limits
from analysis.palette import source_name
from model.errors import UserError
from model.plan import BASE, Plan, enters_tower
from model.prompt import Prompt
from model.types import Answer

BATCH = 8  # passes run together
STEPS, STEPS_FROM_NOTHING = 32, 128  # points on the path; measured: remainder below 1e-5 and about 0.01 nats


@dataclass(frozen=True)
class Attribution:
    """Shares of f(on) - f(off) in nats, per source and image row."""

    method: str  # "integrated gradients" | "ablation"
    prompt: Prompt
    plan: Plan
    sources: tuple[str, ...]  # [S] those of the plan that enter the LLM
    values: np.ndarray  # float64 [S, N]; N rows of all images, in order
    on: float  # f at gains 1
    off: float  # f at the baseline: gains 0 (the base's kept at 1 if so asked)
    delta: float | None  # integrated gradients: sum of values - (on - off), its numerical error; else None
    token: int | None  # which answer token; None is the whole answer
    seconds: float

    def by_source(self) -> dict[str, float]:
        """The sum over all rows, per source."""
        return {source: float(row.sum()) for source, row in zip(self.sources, self.values, strict=True)}

    def map(self, source: str | None = None, image: int = 0) -> GridMap:
        """One source on one image's grid, or the sum over sources; ValueError for a source that is not in the plan."""
        if source is not None and source not in self.sources:
            raise ValueError(f"there is no source “{source}” here: {', '.join(self.sources)}")
        start = sum(len(grid.positions) for grid in self.prompt.grids[:image])
        grid = self.prompt.grids[image]
        here = self.values[:, start : start + len(grid.positions)]
        values = here.sum(0) if source is None else here[self.sources.index(source)]
        named = "all sources" if source is None else source_name(source)
        note = "" if self.delta is None else f"The shares miss the true difference by {self.delta:+.2g} nats in total."
        return GridMap(
            values=values.reshape(grid.grid),
            quantity=f"{self.method.capitalize()}: {named}",
            unit="nats",
            size=grid.size,
            image=image,
            limits=finite_limits(here if source is not None else values, diverging=True),
            diverging=True,
            note=note,
        )


def integrated_gradients(
    engine,
    prompt: Prompt,
    answer: Answer,
    plan: Plan | None = None,
    *,
    token: int | None = None,
    keep_base: bool | None = None,
    steps: int | None = None,
    batch: int = BATCH,
) -> Attribution:
    """Gains grow from 0 to 1 together: each row's share of what that changes.

    With `keep_base` the base stays at 1, so the shares are of what the stacks add (default where the plan has both).
    From no image at all, f is steep near gain 0, because every layer normalises its input: there the path is walked as
    t^4, the same straight line with more of its points near 0, and with more steps.
    """
    from captum.attr import IntegratedGradients  # here, not above: it would take a third of the page's start

    start = time.perf_counter()
    plan, sources, index, full = _prepare(engine, prompt, answer, plan, token)
    if keep_base is None:
        keep_base = BASE in sources and len(sources) > 1
    baseline = torch.zeros_like(full)
    if keep_base and BASE in sources:
        baseline[:, sources.index(BASE)] = 1.0
    f = _function(engine, prompt, answer, plan, index, token)
    with torch.enable_grad():
        values, delta = IntegratedGradients(f if keep_base else lambda t: f(t**4)).attribute(
            full,
            baselines=baseline,
            n_steps=steps or (STEPS if keep_base else STEPS_FROM_NOTHING),
            internal_batch_size=batch,
            return_convergence_delta=True,
        )
    on, off = _values(f, torch.cat([full, baseline]))
    return Attribution(
        method="integrated gradients",
        prompt=prompt,
        plan=plan,
        sources=sources,
        values=values[0].detach().double().cpu().numpy(),
        on=on,
        off=off,
        delta=float(delta[0]),
        token=token,
        seconds=time.perf_counter() - start,
    )


def ablation(
    engine,
    prompt: Prompt,
    answer: Answer,
    plan: Plan | None = None,
    *,
    block: int | None = None,
    per_source: bool = True,
    token: int | None = None,
    batch: int = BATCH,
) -> Attribution:
    """What f loses when one part is withheld (gain 0), the rest kept.

    Parts are whole sources (`block` None), or squares of `block` x `block` tokens: per source, or of all sources
    together. A part's loss is divided equally over its rows, so that sums over a part give its loss; unlike shares of
    integrated gradients the losses of all parts need not add up to on - off.
    """
    if block is None and not per_source:
        raise ValueError("withholding all sources of the whole image leaves one part: give a block")
    from captum.attr import FeatureAblation  # here, not above: see integrated_gradients

    start = time.perf_counter()
    plan, sources, index, full = _prepare(engine, prompt, answer, plan, token)
    mask = part_mask(prompt, len(sources), block, per_source)
    f = _function(engine, prompt, answer, plan, index, token)
    with torch.no_grad():
        loss = FeatureAblation(f).attribute(
            full, baselines=0.0, feature_mask=torch.from_numpy(mask)[None], perturbations_per_eval=batch
        )
    on, off = _values(f, torch.cat([full, torch.zeros_like(full)]))
    size = np.bincount(mask.ravel())[mask]  # [S, N] rows in the part of each row
    return Attribution(
        method="ablation",
        prompt=prompt,
        plan=plan,
        sources=sources,
        values=loss[0].double().cpu().numpy() / size,
        on=on,
        off=off,
        delta=None,
        token=token,
        seconds=time.perf_counter() - start,
    )


def part_mask(prompt: Prompt, n_sources: int, block: int | None, per_source: bool) -> np.ndarray:
    """Which part each source and image row belongs to: int64 [S, N], numbered from 0 without gaps."""
    if block is not None and block < 1:
        raise ValueError(f"a block has at least 1 token per side, not {block}")
    if block is None:
        parts = np.zeros(prompt.visual_tokens, dtype=np.int64)
    else:
        found, taken = [], 0
        for grid in prompt.grids:
            rows, columns = (np.arange(side) // block for side in grid.grid)
            found.append((taken + rows[:, None] * (columns[-1] + 1) + columns[None]).ravel())
            taken = int(found[-1].max()) + 1
        parts = np.concatenate(found)
    offset = (parts.max() + 1) * np.arange(n_sources) if per_source else np.zeros(n_sources, dtype=np.int64)
    return parts[None] + offset[:, None]


@dataclass(frozen=True)
class CausalCheck:
    """What the answer loses without the k patches a map marks most, beside k random ones. Nats; positive is a loss."""

    k: int
    marked: float
    random: np.ndarray  # float64 [draws]

    @property
    def beats(self) -> float:
        """Share of the random draws that lose less than the marked patches do."""
        return float((self.random < self.marked).mean())


def causal_check(
    engine,
    prompt: Prompt,
    answer: Answer,
    values: np.ndarray,
    plan: Plan | None = None,
    *,
    k: int = 4,
    draws: int = 16,
    seed: int = 0,
    token: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CausalCheck:
    """Withholds the k image rows where `values` [N] is largest, from all sources; then k random rows, `draws` times."""
    plan, sources, index, full = _prepare(engine, prompt, answer, plan, token)
    values = np.where(np.isfinite(values), values, -np.inf).ravel()
    n = full.shape[-1]
    if values.size != n:
        raise ValueError(f"the map has {values.size} values, the prompt {n} image rows")
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; it must be 1 to {n}")
    random = np.random.default_rng(seed)
    chosen = [np.argsort(-values, kind="stable")[:k], *(random.permutation(n)[:k] for _ in range(draws))]
    gains = full.repeat(len(chosen) + 1, 1, 1)  # row 0 keeps everything
    for row, rows in enumerate(chosen, 1):
        gains[row, :, torch.from_numpy(rows)] = 0.0
    f = _function(engine, prompt, answer, plan, index, token)
    scores: list[float] = []
    for part in gains.split(BATCH):
        scores += _values(f, part)
        if on_progress is not None:
            on_progress(len(scores), len(gains))
    losses = scores[0] - np.array(scores[1:])
    return CausalCheck(k, float(losses[0]), losses[1:])


def _prepare(engine, prompt: Prompt, answer: Answer, plan: Plan | None, token: int | None):
    """(plan, its sources for the LLM, their rows in the layout, gains of one [1, S, N]).

    UserError if there is nothing to share.
    """
    plan = engine.layout.default if plan is None else plan.validate(engine.layout)
    if not prompt.grids:
        raise UserError("There is no image in this conversation, so there is nothing to attribute the answer to.")
    if not answer.tokens:
        raise UserError("The answer is empty, so there is nothing to attribute.")
    sources = tuple(source for source in plan.sources() if not enters_tower(source))
    if not sources:
        raise UserError(f"The plan {plan} brings nothing into the LLM, so there is nothing to attribute the answer to.")
    if token is not None and not 0 <= token < len(answer.tokens):
        raise ValueError(f"there is no answer token {token}: the answer has {len(answer.tokens)}")
    names = [source.name for source in engine.layout.rows_for(plan)]
    index = torch.tensor([names.index(source) for source in sources])
    return plan, sources, index, torch.ones(1, len(sources), prompt.visual_tokens)


def _function(engine, prompt: Prompt, answer: Answer, plan: Plan, index: Tensor, token: int | None):
    """f: gains [B, S, N] of the plan's sources -> [B] log-probability of the answer, or of one of its tokens."""
    n_sources = len(engine.layout.rows_for(plan))

    def f(gains: Tensor) -> Tensor:
        every = gains.new_ones(len(gains), n_sources, gains.shape[-1])
        every = every.index_copy(1, index, gains)
        logprobs = engine.logprob_of(prompt, answer, plan, every).float().cpu()
        return logprobs.sum(-1) if token is None else logprobs[:, token]

    return f


def _values(f, gains: Tensor) -> list[float]:
    with torch.no_grad():
        return [float(value) for value in f(gains)]
