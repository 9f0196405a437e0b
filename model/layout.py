"""What one loaded model offers to plans: its sources of visual rows, its layers, its default plan, its own words.

Knows nothing about tensors; families make layouts, everything else reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.errors import UserError
from model.plan import BASE, Plan, enters_tower


@dataclass(frozen=True)
class StackSource:
    """One set of visual rows [N, d] that a plan can inject."""

    name: str  # "base", "0", "1", …; "v0", "v1", … of those that enter the vision tower
    label: str  # for people: "tap after vision block 5", "sample 0 · rows 0::2, cols 0::2"
    tap: int | None  # 0-based vision block whose output it is made from; None for a high-resolution sample or the base
    home: int  # the layer before which the default plan injects it
    own_words: str  # the family's own words: "added after LLM layer 0"


@dataclass(frozen=True)
class Layout:
    """The control surface of a model: sources x layers, and the plan it was trained with."""

    family: str
    sources: tuple[StackSource, ...]  # base first, where there is one
    n_layers: int  # decoder layers of the LLM
    n_vision_layers: int
    hidden_size: int  # d of the residual stream
    default: Plan
    convention: str  # one sentence in the family's words
    attends: tuple[int, ...] | None = None  # decoder layers with attention rows, where not all have them
    untrained: tuple[StackSource, ...] = ()  # taps that no stack was trained on, for plans that name them ("tap6@0")
    tower: tuple[StackSource, ...] = ()  # stacks that enter the vision tower's own layers ("v0@v12"): what is in
    # `sources` depends on them

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Decoder layers that can be asked where they look."""
        return tuple(range(self.n_layers)) if self.attends is None else self.attends

    @property
    def all_sources(self) -> tuple[StackSource, ...]:
        """All that was trained: what enters the LLM, then what enters the vision tower."""
        return (*self.sources, *self.tower)

    @property
    def stack_names(self) -> tuple[str, ...]:
        """The stacks' names, without the base."""
        return tuple(source.name for source in self.all_sources if source.name != BASE)

    def layers_of(self, source: str) -> int:
        """How many layers a source of this name can enter before: the vision tower's, or the LLM's."""
        return self.n_vision_layers if enters_tower(source) else self.n_layers

    def rows_for(self, plan: Plan) -> tuple[StackSource, ...]:
        """What has rows for the LLM: the sources, and after them the untrained taps that this plan uses."""
        used = plan.sources()
        return (*self.sources, *(source for source in self.untrained if source.name in used))

    def sources_for(self, plan: Plan) -> tuple[StackSource, ...]:
        """All that this plan could switch: `rows_for`, and after them what enters the vision tower."""
        return (*self.rows_for(plan), *self.tower)

    def source(self, name: str) -> StackSource:
        """The source of this name; UserError if there is none."""
        for source in (*self.all_sources, *self.untrained):
            if source.name == name:
                return source
        raise UserError(f"There is no source “{name}”; this model has {', '.join(s.name for s in self.all_sources)}.")
