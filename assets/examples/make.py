"""Draws the example pictures of the page again, with their exact answers: `make examples`.

Every example is one scene of the public generator, drawn from a seed of its own that no training uses. They were chosen
for how they look, before any model had answered them, so an example that a model gets wrong stays. Loads no model.
Those of the scene "lab" are of the kind that the lab's variants are trained on (model/lab/scenes.py).

examples.json: a list of {file, scene, question, answer, caption, kind ("fine" | "coarse")}.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.lab import scenes as lab
from model.training.scenes import make_scene

SEED = 20261121  # the first half of every example's seed; training and test sets use small numbers
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Example:
    """File stem, scene of the generator (or "lab"), second half of the seed, fonts, and the question: number-th of a
    topic."""

    stem: str
    scene: str
    draw: int
    fonts: str
    topic: str
    number: int
    caption: str


EXAMPLES = (
    Example("signs", "signs", 5, "train", "sign", 1, "Signs: the text on one of several"),
    Example("labels", "labels", 1, "train", "label", 0, "Labels: the text beside a shape"),
    Example("receipt", "receipt", 10, "train", "item", 1, "A receipt: the price of one item"),
    Example("codes", "lab", 100, "train", "ink", 0, "Codes: what the lab's variants are trained on"),
    Example("table", "table", 7, "train", "cell", 5, "A table: one cell by row and column"),
    Example("bar-chart", "bar chart", 15, "held-out", "tallest", 0, "A bar chart: the tallest bar, no reading needed"),
    Example("eye-chart", "eye chart", 17, "held-out", "line", -1, "An eye chart: its last line, in an unseen typeface"),
    Example("notice", "notice", 12, "held-out", "ink", 0, "A notice: the line in one colour, in an unseen typeface"),
    Example("card", "card", 0, "train", "field", 2, "A card: one labelled field, light on dark"),
    Example("corners", "corners", 16, "held-out", "place", 2, "Corners: the text at a place, in an unseen typeface"),
    Example("shapes", "shapes", 6, "train", "count_shape", 0, "Shapes: counting, no reading needed"),
    Example("codes-dark", "lab", 110, "train", "ink", 1, "Codes on a dark ground: as the lab's variants know them"),
)


def draw(example: Example):
    """The example's picture (PIL, RGB) and its record for examples.json."""
    rng = np.random.default_rng([SEED, example.draw])
    own = example.scene == "lab"
    scene = lab.make_scene(rng, example.fonts) if own else make_scene(rng, example.fonts, example.scene)
    asked = [question for question in scene.questions if question.topic == example.topic][example.number]
    record = {
        "file": f"{example.stem}.png",
        "scene": example.scene,
        "question": asked.question[:1].upper() + asked.question[1:],
        "answer": asked.answer,
        "caption": example.caption,
        "kind": asked.kind,
    }
    return scene.image, record


def make(out: Path) -> list[dict]:
    """Write every picture and examples.json into `out`; returns the records."""
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for example in EXAMPLES:
        image, record = draw(example)
        image.save(out / record["file"], optimize=True)
        records.append(record)
    (out / "examples.json").write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    return records


if __name__ == "__main__":
    for line in make(HERE):
        print(f"{line['file']:16} {line['question']} -> {line['answer']}", file=sys.stderr)
