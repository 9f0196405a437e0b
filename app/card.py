"""Scores an embedded checkpoint on test scenes it has never seen and writes its card: results.json, README.md, figures.

Test scenes are drawn with seeds of their own, 2,000 in the training's fonts and 500 in fonts kept out of it. Knows
nothing about how a checkpoint is trained beyond its recipe.json and curve.jsonl.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis import figures_mpl
from analysis.evaluate import acuity, evaluate
from model.engine import Engine
from model.plan import BASE, Plan

TEST_SETS = {"train": (2000, 7001), "held-out": (500, 7002)}  # fonts -> scenes, seed; training uses seeds 1000 and up
STATEMENTS = {
    "hires": "A global view (64 x 64 px) at the input, nine samples of a 192 x 192 px view before layers 1 to 9.",
    "hires-single": "The trained single-injection twin of `hires`: the global view alone, the same context length.",
    "hires-concat": "The rival of `hires`: the same pixels, merged once on the feature axis at the input.",
    "taps": "Qwen3-VL's class at toy size: three taps of the vision tower, added after the first LLM layers.",
    "taps-single": "The trained single-injection twin of `taps`: no taps.",
}
LIMITS = (
    "It reads printed capitals and digits on scenes like its own, 192 x 192 px seen at most: no photographs, no lower "
    "case, no long texts.{} All figures are from one training run."
)
TILED = {"hires", "hires-concat"}  # whose high-resolution view is cut into tiles
CUT = " Text that a tile border cuts is read worse."


def test_scenes(folder: Path, fonts: str, n: int | None = None, progress=None) -> tuple[Path, list[dict]]:
    """The test set of these fonts, drawn into folder/FONTS on first use: its folder and its records."""
    from model.training.scenes import write_scenes

    count, seed = TEST_SETS[fonts]
    count = n or count
    file = folder / fonts / "answers.jsonl"
    if not file.exists() or len(file.read_text(encoding="utf-8").splitlines()) != count:
        write_scenes(file.parent, count, seed, fonts, progress)
    return file.parent, [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def chance(records: Sequence[dict]) -> dict[str, float]:
    """Exact match of the best answer that ignores the picture, by kind: per topic the commonest answer of the set."""
    hits: Counter = Counter()
    totals: Counter = Counter(record["kind"] for record in records)
    for topic in {(record["kind"], record["topic"]) for record in records}:
        answers = Counter(r["answer"] for r in records if (r["kind"], r["topic"]) == topic)
        hits[topic[0]] += answers.most_common(1)[0][1]
    return {kind: hits[kind] / total for kind, total in sorted(totals.items())}


def runs(engine: Engine) -> list[tuple[str, Plan, str]]:
    """What is scored: (fonts, plan, state). A model with stacks is scored without them too: ablated, no baseline."""
    default = engine.layout.default
    found = [("train", default, "trained"), ("held-out", default, "trained")]
    if engine.layout.stack_names:
        found.append(("train", Plan([(BASE, 0, 1.0)]), "ablated"))
    return found


def write(
    folder: Path, engine: Engine, scenes: Path, n: int | None = None, progress: Callable[[int, int], None] | None = None
) -> dict:
    """Scores `engine`, the model in `folder`, and writes its card there; returns what results.json holds.

    `scenes` keeps the test pictures between cards; `n` takes fewer of them (a trial).
    """
    results = []
    for fonts, plan, state in runs(engine):
        root, records = test_scenes(scenes, fonts, n)
        found = evaluate(engine, records, plan, root, progress)
        kept = ("n", "exact_match", "cer", "by_kind", "by_topic", "fine_by_glyph_px", "seconds", "device")
        results.append(
            {"plan": str(plan), "state": state, "fonts": fonts, "seed": TEST_SETS[fonts][1]}
            | {key: found[key] for key in kept}
            | {"chance": chance(records)}
        )
    data = {"name": folder.name, "results": results}
    (folder / "results.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    _figures(folder, results)
    (folder / "README.md").write_text(_text(folder, engine, results), encoding="utf-8")
    return data


def _figures(folder: Path, results: Sequence[dict]) -> None:
    curves = {f"{r['state']}, {r['fonts']} fonts": acuity(r["fine_by_glyph_px"]) for r in results}
    (folder / "acuity.svg").write_bytes(figures_mpl.svg(figures_mpl.acuity_curves(curves)))
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [line for line in lines if "answer" in line]  # the first steps ask nothing
    curve = {"answer loss (training)": ([line["step"] for line in asked], [line["answer"] for line in asked])}
    (folder / "curve.svg").write_bytes(figures_mpl.svg(figures_mpl.loss_curve(curve)))


def _text(folder: Path, engine: Engine, results: Sequence[dict]) -> str:
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    name = recipe["name"]
    rows = ["| plan | | test scenes | fine: exact | fine: CER | coarse: exact | coarse: CER | chance, fine | coarse |"]
    rows.append("|---|---|---|--:|--:|--:|--:|--:|--:|")
    for r in results:
        kinds = [r["by_kind"][k] for k in ("fine", "coarse")]
        shares = [f"{100 * kind[number]:.1f} %" for kind in kinds for number in ("exact_match", "cer")]
        lucky = [f"{100 * r['chance'][k]:.1f} %" for k in ("fine", "coarse")]
        rows.append(f"| `{r['plan']}` | {r['state']} | {r['n']}, {r['fonts']} fonts | {' | '.join(shares + lucky)} |")
    legible = folder / "legibility.json"
    seen = _legibility(json.loads(legible.read_text(encoding="utf-8"))) if legible.exists() else ""
    facts = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in recipe.items())
    return (
        f"# {name}\n\n{STATEMENTS[name]} {LIMITS.format(CUT if name in TILED else '')}\n\n"
        "Greedy answers on scenes of other seeds; *held-out* fonts were never trained on. *Ablated* is the trained "
        "model with its stacks switched off: it shows what this model relies on, it is not a baseline. "
        "*Chance* is the best answer that ignores the picture.\n\n" + "\n".join(rows) + "\n\n"
        "![Exact match by glyph height](acuity.svg)\n\n![Training loss](curve.svg)\n\n"
        f"{_topics(results[0])}{seen}## Recipe\n\n`python -m app train {name}`\n\n{facts}\n\n"
        f"Default plan `{engine.layout.default}`; weights are float16 safetensors, under the repository's licence, "
        "trained on pictures that the repository draws itself.\n"
    )


def _topics(result: dict) -> str:
    """What is answered best and worst, by topic of the question; chance varies from topic to topic."""
    scores = sorted(result["by_topic"].items(), key=lambda item: item[1]["exact_match"])
    rows = [f"| {topic} | {value['n']} | {100 * value['exact_match']:.1f} % |" for topic, value in scores]
    return (
        f"## By question\n\nExact, {result['state']}, {result['fonts']} fonts, worst first.\n\n"
        "| topic | questions | exact |\n|---|--:|--:|\n" + "\n".join(rows) + "\n\n"
    )


def _legibility(found: dict) -> str:
    """What towers alone tell of fine text, by capital height: the ceiling of a model that sees one view."""
    views = {key: value for key, value in found.items() if isinstance(value, dict)}
    heights = sorted({height for value in views.values() for height in value}, key=float)
    rows = [
        f"| {view} | " + " | ".join(f"{100 * value[h]['strings']:.0f} %" if h in value else "" for h in heights) + " |"
        for view, value in views.items()
    ]
    return (
        "## What the views can tell\n\nWhole strings named by a vision tower's own heads, without a language model, "
        f"on {found['scenes']} fresh scenes, by capital height in pixels of the high-resolution view (a third of that "
        "in the global one). A view can tell at least as much as its best row says; a tower trained on small text "
        "alone learns slowly.\n\n"
        f"| | {' | '.join(f'{h} px' for h in heights)} |\n|---{'|--:' * len(heights)}|\n" + "\n".join(rows) + "\n\n"
    )
