"""Traces, answers and runs made by hand, small enough to check on paper. Knows nothing about models."""

from __future__ import annotations

import numpy as np

from analysis import subsets
from model.plan import BASE, Plan
from model.trace import Trace
from model.types import Answer, ImageGrid, Token

PLAN = Plan.parse("base@0,0@1")


def trace(**changes) -> Trace:
    """Two layers; positions: <s>, four patches (2 x 2 on a 40 x 20 image), "a", "b", then the answer "X", "Y".

    d = 2. The residual at the patches has RMS 1, 2, 3, 4 before layer 1 and 0 before layer 0; stack 0 adds rows of RMS
    2, at right angles to patch 1's row and along the others.
    """
    patches = np.arange(1, 5)
    before = np.full((2, 9), 0.5)
    before[0, patches], before[1, patches] = 0.0, [1, 2, 3, 4]
    residual = np.full((3, 9), 0.5)
    residual[0, patches] = [1, 1, 2, 2]
    residual[1, patches] = [3, np.sqrt(8), 5, 6]  # along: 1+2, 3+2, 4+2; at right angles: sqrt(4+4)
    residual[2, patches] = [10, 10, 10, 30]
    with np.errstate(divide="ignore"):
        ratio = np.array([[1, 1, 2, 2] / np.zeros(4), [2 / 1, 2 / 2, 2 / 3, 2 / 4]])
    made = {
        "model": "by hand",
        "plan": PLAN,
        "texts": ("<s>", "", "", "", "", "a", "b", "X", "Y"),
        "answer_start": 7,
        "grids": (ImageGrid(0, patches, (2, 2), (40, 20)),),
        "residual_rms": residual,
        "before_rms": before,
        "injected_rms": {(BASE, 0): np.array([1.0, 1, 2, 2]), ("0", 1): np.full(4, 2.0)},
        "ratio": ratio,
        "cosine": np.array([[np.nan] * 4, [1.0, 0.0, 1.0, 1.0]]),
        "attention": {},
        "attention_rows": (),
        "hidden": {},
        "hidden_positions": np.arange(0),
        "logprobs": np.array([-0.1, -0.2]),
        "seconds": 0.0,
    }
    return Trace(**{**made, **changes})


def attending() -> Trace:
    """`trace` with two heads of attention from rows 5, 6, 7 in layers 0 and 1.

    In layer 0 head 0 of every row: 0.5 on <s>, 0.4 on patch 0, 0.1 on the row itself; head 1: 0.2 on <s>, 0.8 on one
    patch, which is 1, 2, 3 for rows 5, 6, 7. In layer 1 every head looks at <s> alone.
    """
    rows = (5, 6, 7)
    layer0, layer1 = np.zeros((2, 2, 3, 9))
    for q, row in enumerate(rows):
        layer0[0, q, [0, 1, row]] = 0.5, 0.4, 0.1
        layer0[1, q, [0, 2 + q]] = 0.2, 0.8
    layer1[:, :, 0] = 1.0
    return trace(attention={0: layer0, 1: layer1}, attention_rows=rows)


def answer(text: str, plan: Plan = PLAN, pieces: tuple[str, ...] | None = None, logprob: float = -0.5) -> Answer:
    """An answer whose tokens are the characters of `text`, or `pieces`."""
    tokens = tuple(Token(i, p, logprob, ((p, logprob), ("?", -3.0))) for i, p in enumerate(pieces or tuple(text)))
    return Answer("by hand", plan, text, tokens, 0.04, 0.01, 0.0, True, "end", 9, 4, "cpu")


def subset_run(tokens: tuple[str, ...] = ("K", "7"), stacks: int = 2, said: str = "K7") -> subsets.SubsetRun:
    """A run whose scores are -1 per stack that is off, for each token."""
    plan = Plan([(BASE, 0, 1.0), *((str(i), i + 1, 1.0) for i in range(stacks))])
    names = subsets.stacks_of(plan)
    scores = np.array([[bits.bit_count() - stacks - 0.1] * len(tokens) for bits in range(2**stacks)], dtype=float)
    rows = []
    for bits in sorted(range(2**stacks), key=lambda b: -b.bit_count()):
        on = tuple(name for i, name in enumerate(names) if bits >> i & 1)
        label = subsets.subset_label(names, on)
        each = subsets.subsets_of(plan)[bits]
        rows.append(subsets.Subset(each, on, label, answer(said, each), bits > 0, float(scores[bits].sum())))
    return subsets.SubsetRun(plan, names, tuple(rows), "K7", tokens, scores, subsets.shapley(scores), None, 0.1)
