"""Scores a model on questions with known answers: exact match and CER, by kind and by glyph height.

How texts are normalised before a match is counted: `analysis.compare`. Knows nothing about how scenes are made; the
engine is given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from analysis.compare import cer, corpus_cer, exact
from model.errors import UserError
from model.images import Limits, open_image
from model.plan import Plan
from model.types import Sampling

KEYS = ("image", "question", "answer", "kind", "glyph_px")


def evaluate(
    engine,
    records: Sequence[dict],
    plan: Plan | None = None,
    root: Path | str = ".",
    progress: Callable[[int, int], None] | None = None,
    sampling: Sampling | None = None,
    n_wrong: int = 20,
    limits: Limits | None = None,
) -> dict:
    """Scores one plan (default: the model's own) on `records`: `evaluate_many`, of which it is the simplest case."""
    plans = [engine.layout.default if plan is None else plan]
    return evaluate_many(engine, records, plans, root, progress, sampling, n_wrong, limits)[0]


def evaluate_many(
    engine,
    records: Sequence[dict],
    plans: Sequence[Plan],
    root: Path | str = ".",
    progress: Callable[[int, int], None] | None = None,
    sampling: Sampling | None = None,
    n_wrong: int = 20,
    limits: Limits | None = None,
) -> list[dict]:
    """Asks every question of `records` (lines of answers.jsonl) under every plan and scores the answers, plan by plan.
    All values are plain JSON.

    Questions of one image follow one another, so the vision tower runs once per image (the engine caches by content);
    all plans of a question are one batch, `seconds` is each plan's even share of the whole. CER is errors over
    characters of the whole group. `progress(done, total)` is called after each question. UserError for a record without
    the keys `image question answer kind glyph_px`, an image that cannot be opened, or no records.
    """
    if not len(records):
        raise UserError("There are no questions to score: answers.jsonl is empty.")
    for number, record in enumerate(records, 1):
        missing = [key for key in KEYS if key not in record]
        if missing:
            raise UserError(f"Question {number} has no {', '.join(missing)}; each line needs {', '.join(KEYS)}.")
    plans = [plan.validate(engine.layout) for plan in plans]
    sampling = sampling or Sampling()
    start = time.perf_counter()
    results: list[list[dict]] = [[{}] * len(records) for _ in plans]
    order = sorted(range(len(records)), key=lambda i: (str(records[i]["image"]), i))
    done = 0
    for path, group in groupby(order, key=lambda i: str(records[i]["image"])):
        image = open_image(Path(root) / path, limits or Limits())
        for i in group:
            content = [{"type": "image", "image": image}, {"type": "text", "text": str(records[i]["question"])}]
            answers = engine.answer_many(engine.prompt([{"role": "user", "content": content}]), plans, sampling)
            for found, answer in zip(results, answers, strict=True):
                found[i] = _result(records[i], answer.text)
            done += 1
            if progress is not None:
                progress(done, len(records))
    shared = {
        "images": len({str(record["image"]) for record in records}),
        "seconds": (time.perf_counter() - start) / max(1, len(plans)),
        "device": str(engine.device),
    }
    return [
        {"model": engine.name, "plan": str(plan), **_summary(found, n_wrong), **shared}
        for plan, found in zip(plans, results, strict=True)
    ]


def _summary(results: list[dict], n_wrong: int) -> dict:
    """Scores of one plan's results, in all and by kind, topic (where records name theirs) and height, and the first
    wrong ones."""
    wrong = [result for result in results if not result["exact"]]
    sized = [result for result in results if result["glyph_px"] is not None]
    return {
        **score(results),
        "by_kind": _by(results, "kind"),
        "by_topic": _by([result for result in results if result["topic"]], "topic"),
        "by_glyph_px": _by(sized, "glyph_px"),
        "fine_by_glyph_px": _by([result for result in sized if result["kind"] == "fine"], "glyph_px"),
        "wrong": [{key: result[key] for key in (*KEYS, "said", "cer")} for result in wrong[:n_wrong]],
    }


def _result(record: dict, said: str) -> dict:
    """One question with what was said; the glyph height rounded to whole pixels, None where the question has none."""
    truth = str(record["answer"])
    height = record["glyph_px"]
    return {
        "image": str(record["image"]),
        "question": str(record["question"]),
        "answer": truth,
        "kind": str(record["kind"]),
        "topic": str(record.get("topic", "")),
        "glyph_px": round(height) if height else None,
        "said": said,
        "exact": exact(said, truth),
        "cer": cer(said, truth),
    }


def score(results: Iterable[dict]) -> dict:
    """{n, exact_match, cer} of results with keys `said`, `answer`, `exact`; NaN-free: None where there are none."""
    results = list(results)
    if not results:
        return {"n": 0, "exact_match": None, "cer": None}
    total = corpus_cer([(result["said"], result["answer"]) for result in results])
    return {
        "n": len(results),
        "exact_match": sum(result["exact"] for result in results) / len(results),
        "cer": None if math.isnan(total) else total,
    }


def _by(results: list[dict], key: str) -> dict[str, dict]:
    """Scores by the value of `key`, smallest first; keys as text, as JSON wants them."""
    values = sorted({result[key] for result in results})
    return {str(value): score(result for result in results if result[key] == value) for value in values}


@dataclass(frozen=True)
class Acuity:
    """Exact match by glyph height, with 95 % Wilson intervals. Arrays of equal length [G], smallest glyph first."""

    glyph_px: np.ndarray
    n: np.ndarray
    exact: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def smallest_read(self, share: float = 0.5) -> float | None:
        """The smallest glyph height from which on every height is read at least this often; None if none is."""
        read = None
        for height, value in zip(self.glyph_px[::-1], self.exact[::-1], strict=True):
            if value < share:
                break
            read = float(height)
        return read


def acuity(by_glyph_px: dict[str, dict]) -> Acuity:
    """The curve of `evaluate(...)["fine_by_glyph_px"]` (or "by_glyph_px")."""
    heights = sorted(by_glyph_px, key=float)
    n = np.array([by_glyph_px[height]["n"] for height in heights], dtype=np.int64)
    share = np.array([by_glyph_px[height]["exact_match"] for height in heights], dtype=np.float64)
    bounds = np.array([wilson(round(s * k), int(k)) for s, k in zip(share, n, strict=True)]).reshape(-1, 2)
    return Acuity(np.array([float(height) for height in heights]), n, share, bounds[:, 0], bounds[:, 1])


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval for a share of `hits` in `n` (z: 1.96 for 95 %): (low, high); (0, 1) when n is 0."""
    if n == 0:
        return 0.0, 1.0
    share = hits / n
    middle = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
