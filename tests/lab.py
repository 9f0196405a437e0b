"""Results files of the lab, for tests and for looking at the page: made up, never measured."""

from __future__ import annotations

import json
from pathlib import Path

from model.lab.variants import VARIANTS

# variant -> (group, share of fine questions right); the sizes mean nothing
MADE_UP = {
    "stack-2d": ("what enters", 0.60),
    "none": ("what enters", 0.10),
    "dummy": ("what enters", 0.11),
    "string": ("how it enters", 0.72),
    "concat": ("how it enters", 0.59),
    "stack-grid": ("sampling", 0.70),
    "start-0": ("where", 0.58),
    "start-last": ("where", 0.15),
    "layers-2": ("where", 0.40),
    "interval-2": ("where", 0.50),
    "global-deeper": ("where", 0.09),
    "global-deeper-6": ("where", 0.03),
    "gate": ("strength", 0.61),
    "text-full": ("text", 0.95),
    "text-truncated": ("text", 0.24),
    "text-stack-dilated": ("text", 0.70),
    "budget-50": ("budget", 0.45),
    "budget-25": ("budget", 0.30),
    "budget-50-random": ("budget", 0.35),
}
NOISE = (0.0, 0.01, -0.01, 0.02)  # by seed


def line(variant: str, share: float | None = None, *, group: str = "", seed: int = 0, **more) -> dict:
    """One run; `more` replaces fields."""
    fine = (MADE_UP[variant][1] if share is None else share) + NOISE[seed % len(NOISE)]
    config = {"start": {"start-last": 5}.get(variant, 1), "interval": 1, "count": 4, "base_at": 0}
    if variant.startswith("budget"):
        config |= {key: value for key, value in VARIANTS[variant].config().items() if key.startswith("keep")}
    config |= {"base_at": 4} if variant == "global-deeper" else {}
    heights = {"7": fine / 2, "8": fine, "10": min(1.0, fine + 0.1)}
    context = 162 if variant == "string" else 66
    accuracy = {
        "fine": {"n": 600, "exact_match": fine, "characters": (1 + fine) / 2, "first_character": (2 + fine) / 3},
        "coarse": {"n": 400, "exact_match": 0.9 + NOISE[seed % len(NOISE)]},
        "by_glyph_px": {height: {"n": 100, "exact_match": value} for height, value in heights.items()},
    }
    if variant.startswith("text"):
        parts = [0.0] * 6 + [0.97] * 2 if variant == "text-truncated" else [fine] * 8
        shares = {str(part): {"n": 75, "exact_match": share} for part, share in enumerate(parts, 1)}
        accuracy = {"fine": accuracy["fine"], "by_position": shares}
        context = 258 if variant == "text-full" else 66
    cost = {
        **{"context": context, "prefill_flops": 1.5e7 * context, "prefill_seconds": 1e-4 * context},
        **{"prefill_bytes": 2e5 * context, "step_seconds": 0.3, "step_bytes": 1e8},
    }
    made = {
        **{"variant": variant, "group": group or MADE_UP[variant][0], "config": config, "seed": seed, "steps": 2000},
        **{"device": "cpu", "hours": 0.17, "parameters": 1_400_000, "accuracy": accuracy, "cost": cost},
        **{"when": "2026-01-01", "versions": {}},
    }
    return {**made, **more}


def write(path: Path, lines: list[dict] | None = None, seeds: int = 3) -> Path:
    """A results file of these runs, or of every made-up variant with so many seeds; `gate` has one."""
    if lines is None:
        lines = [line(name, seed=seed) for name in MADE_UP for seed in range(1 if name == "gate" else seeds)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    return path


def search(winner: str = "start-2-interval-1-count-3", **more) -> dict:
    """A search at the setting of `line`; `more` replaces fields."""
    names = {
        "start-2-interval-1-count-3": (2, 1, 3),
        "stack-2d": (1, 1, 4),
        "layers-1": (1, 1, 1),
        "start-4": (4, 1, 4),
    }
    order = sorted(names, key=lambda name: name != winner)
    tried = [
        {"variant": name, **dict(zip(("start", "interval", "count"), names[name], strict=True)), "n": 300}
        | {"characters": 0.8 - number / 10, "exact_match": 0.5 - number / 10}
        for number, name in enumerate(order)
    ]
    rungs = [{"step": step, "ranking": tried[:count]} for step, count in ((500, 4), (1000, 2), (2000, 1))]
    made = {"variant": "search", "config": {"budget": 5000}, "seed": 0, "steps": 2000, "device": "cpu", "budget": 5000}
    made |= {"spent": 4000, "candidates": 49, "rungs": rungs, "winner": winner, "rule": "stack-2d"}
    return {**made, "when": "2026-01-01", "versions": {}, **more}
