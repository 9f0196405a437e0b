"""What every handler of the page works with: the models on offer and the line before them, the limits, the
store, the example images.

Nothing in it belongs to one visitor. Knows nothing about gradio.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from app.line import Line
from app.session import Held, Store
from model.engine import Engine
from model.errors import UserError
from model.images import Limits, read_image
from model.loading import Zoo
from model.plan import Plan, presets

EXAMPLES = Path(__file__).resolve().parent.parent / "assets" / "examples"


@dataclass(frozen=True)
class Example:
    """An image that comes with the app, a question to ask about it and the right answer."""

    file: str
    question: str
    answer: str
    caption: str
    scene: str  # "lab": of the kind that the lab's variants are trained on

    @cached_property
    def held(self) -> Held:
        """The opened image."""
        image, notes = read_image(EXAMPLES / self.file)
        return Held(image, self.file, notes, example=self.file)


def examples() -> dict[str, Example]:
    """The examples by file name, in the order of examples.json."""
    rows = json.loads((EXAMPLES / "examples.json").read_text(encoding="utf-8"))
    fields = ("file", "question", "answer", "caption", "scene")
    return {row["file"]: Example(**{name: row[name] for name in fields}) for row in rows}


@dataclass(frozen=True)
class Desk:
    """The first argument of every handler."""

    zoo: Zoo
    limits: Limits = field(default_factory=Limits)
    store: Store = field(default_factory=Store)
    examples: dict[str, Example] = field(default_factory=examples)
    line: Line = field(default_factory=Line)

    def engine(self, name: str | None, progress: Callable[[float, str], None] | None = None) -> Engine:
        """The engine of an offered model, loaded on first use; the default one for no name."""
        # gr.Progress is false while it is empty, so it is wrapped
        report = None if progress is None else lambda done, what: progress(done, what)
        return self.zoo.get(name or self.zoo.default, report)

    def plan(self, text: str | None, engine: Engine) -> Plan:
        """A plan as it was typed, or a preset's name, checked against the model; the default one for None."""
        if text is None:
            return engine.layout.default
        named = presets(engine.layout).get(" ".join(str(text).lower().split()))
        return named if named is not None and str(text).strip() else Plan.parse(text).validate(engine.layout)

    def held(self, key: str) -> Held:
        """An image by its id: an example's file name, or what the store gave. UserError when it is gone."""
        return self.examples[key].held if key in self.examples else self.store.image(key)

    def example(self, name: str) -> Example:
        """An example by its file name; UserError with the names there are."""
        if name not in self.examples:
            raise UserError(f"There is no example “{str(name)[:60]}”; there are {', '.join(self.examples)}.")
        return self.examples[name]
