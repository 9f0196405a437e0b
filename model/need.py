"""How much memory a request will take beside the weights, estimated before it runs; refused where there is not enough.

An upper estimate from shapes alone, of what lives at once at the worst moment: for each row of the batch the keys and
values of all its tokens, the widest moment of one layer, the logits; as much of the vision tower as the plans want, on
the largest image; the attention rows and hidden states that a probe keeps. Measured on tiny models it is 1 to 4 times
what is really taken. Knows nothing about pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig

from model.errors import UserError
from model.loading import free_memory, gigabytes
from model.plan import BASE, Plan
from model.probe import Probe
from model.prompt import Prompt

if TYPE_CHECKING:
    from model.engine import Engine

FULL = 4  # bytes of a number in float32, as norms, softmax, probes and pixels have it
CACHE, LAYER, LOGITS, IMAGE, KEPT = "key-value cache", "layers", "logits", "vision tower", "what is recorded"
SEAT = "buffers of compiled decoding"


@dataclass(frozen=True)
class Need:
    """Bytes by what takes them, and what a person can ask for less of."""

    parts: dict[str, int]
    images: bool
    plans: int

    @property
    def bytes(self) -> int:
        """All of it. The vision tower has let go of its memory before the layers run."""
        return max(self.parts[IMAGE], sum(size for name, size in self.parts.items() if name != IMAGE))

    def in_words(self) -> str:
        """'about 3.1 GB (key-value cache 2.9 GB, one layer 140 MB)', largest first, without what hardly counts."""
        told = sorted(((size, name) for name, size in self.parts.items() if size > self.bytes / 20), reverse=True)
        parts = ", ".join(f"{name} {gigabytes(size)}" for size, name in told)
        return f"about {gigabytes(self.bytes)} of memory beside the weights ({parts})"

    def check(self, engine: Engine) -> None:
        """UserError with the figure and the way out where that is over the engine's limit or more than is free.

        What the engine holds of earlier requests makes room first.
        """
        if self.bytes > engine.max_memory:
            why = f"at most {gigabytes(engine.max_memory)} may be taken (max_memory)"
        elif self.bytes <= free_memory(engine.device):
            return
        else:
            engine.forget()
            if self.bytes <= (free := free_memory(engine.device)):
                return
            why = f"{gigabytes(free)} are free on {engine.device}"
        ways = ["smaller or fewer images (fewer pixels)"] if self.images else ["a shorter conversation"]
        ways += ["fewer plans at once"] if self.plans > 1 else []
        ways += ["fewer recorded rows"] if self.parts[KEPT] else []
        raise UserError(f"This needs {self.in_words()}, but {why}. Use {' or '.join(ways)}.")


def of_answer(engine: Engine, prompt: Prompt, plans: Sequence[Plan], new_tokens: int) -> Need:
    """Of answers under these plans at once, each of up to so many tokens.

    Where steps are compiled and there is room for their buffers, these are among its parts; else it decodes plainly.
    """
    length = prompt.input_ids.shape[1]
    tokens = min(length + new_tokens, engine.max_tokens)
    text, attends = _text(engine), len(engine.layout.attention_layers)
    keys = 2 * _heads(text)[1] * _heads(text)[2] * engine.dtype.itemsize  # bytes of one token in one layer
    cache = len(plans) * tokens * keys * (attends + 1)  # one layer's twice: it is copied while it grows
    need = _need(engine, prompt, plans, length, outputs=1, cache=cache)
    if engine.compiled is None:
        return need
    rows, positions = engine.compiled.room(len(plans), tokens)
    seated = replace(need, parts={**need.parts, SEAT: rows * positions * keys * attends})
    return seated if seated.bytes <= min(engine.max_memory, free_memory(engine.device)) else need


def of_pass(
    engine: Engine,
    prompt: Prompt,
    plans: Sequence[Plan],
    answer_tokens: int,
    probe: Probe | None = None,
    grad: bool = False,
) -> Need:
    """Of one pass over prompt and answer, a batch row for each of the plans, and of what a probe keeps of it.

    With `grad` every layer's numbers stay until the gradient has been taken.
    """
    length = prompt.input_ids.shape[1] + answer_tokens
    text, kept = _text(engine), 0
    heads, width = _heads(text)[0], _heads(text)[2]
    for layer in range(engine.layout.n_layers) if probe is not None else ():
        kept += heads * len(probe.attention_rows(layer)) * length * FULL
    if probe is not None and probe.attention:
        most = max(len(probe.attention_rows(layer)) for wish in probe.attention for layer in wish.layers)
        kept += heads * length * (most * 3 * FULL + width * engine.dtype.itemsize)  # scores, mask, softmax; keys
    if probe is not None:
        hidden = prompt.visual_tokens if probe.hidden_rows == "image" else length
        kept += len(set(probe.hidden)) * hidden * engine.layout.hidden_size * FULL
    return _need(engine, prompt, plans, length, outputs=answer_tokens, kept=kept, grad=grad)


def _need(
    engine: Engine, prompt: Prompt, plans: Sequence[Plan], length: int, *, outputs: int, cache: int = 0, kept: int = 0,
    grad: bool = False,
) -> Need:  # fmt: skip
    text, item, rows = _text(engine), engine.dtype.itemsize, len(plans)
    width, (heads, groups, head) = engine.layout.hidden_size, _heads(text)
    inner = _inner(text)
    attention = (4 * heads + 4 * groups) * head  # queries, keys, values: as they are, rotated, repeated
    layer = rows * length * ((6 * width + max(3 * inner, attention)) * item + 2 * width * FULL)
    linear = engine.layout.n_layers - len(engine.layout.attention_layers)
    if linear:
        # Linear attention, in chunks of 64 tokens and float32; each layer's state stays as its cache.
        values, key, value = text.linear_num_value_heads, text.linear_key_head_dim, text.linear_value_head_dim
        cache += rows * linear * values * key * value * FULL
        layer += rows * -(-length // 64) * 64 * values * (8 * (key + value) + 6 * 64) * FULL
    layer *= 2 * engine.layout.n_layers if grad else 1
    visual = prompt.visual_tokens * width * item
    layer += visual * (len(engine.layout.sources) + 3 * rows)  # what is injected, scaled and summed per row
    logits = rows * outputs * text.vocab_size * (item + 2 * FULL)
    parts = {CACHE: cache, LAYER: layer, LOGITS: logits, IMAGE: _tower(engine, prompt, plans), KEPT: kept}
    return Need(parts, bool(prompt.images), rows)


def _tower(engine: Engine, prompt: Prompt, plans: Sequence[Plan]) -> int:
    """Bytes of the vision tower on the image with the most rows; images go through it one by one."""
    vision = getattr(engine.model.config, "vision_config", None)
    views = _views(engine, plans)
    if vision is None or not prompt.grids or not views:
        return 0
    rows = [0] * len(prompt.images)
    for grid in prompt.grids:
        rows[grid.index] += len(grid.positions)
    merged = _patches_a_row(engine, vision)
    patches = max(rows) * merged * views
    width = vision.hidden_size
    inner = getattr(vision, "intermediate_size", 4 * width)
    pixels = getattr(vision, "patch_size", 14) ** 2 * 3 * getattr(vision, "temporal_patch_size", 1)
    working = patches * (8 * width + 2 * inner) * engine.dtype.itemsize + patches * 4 * pixels * FULL
    merging = max(rows) * views * (merged * width * 2 + engine.layout.hidden_size) * engine.dtype.itemsize
    original = max(image.width * image.height for image in prompt.images) * 3 * (1 + FULL)
    taps = len(engine.layout.sources) * max(rows) * engine.layout.hidden_size * engine.dtype.itemsize
    return working + merging + original + taps


def _patches_a_row(engine: Engine, vision: PreTrainedConfig) -> int:
    """Patches of the vision tower behind one visual row, which its merger or what projects a tile makes into one."""
    side = getattr(engine.adapter, "side", None)  # visual rows along a tile, in families that cut into tiles
    return (vision.image_size // vision.patch_size // side if side else vision.spatial_merge_size) ** 2


def _views(engine: Engine, plans: Sequence[Plan]) -> int:
    """How many times an image's rows go through the vision tower for these plans.

    Taps come out of the run that makes the base. Samples of a larger view are tiles of their own, all of them where one
    is wanted. Nothing is looked at where nothing enters the LLM.
    """
    entries = {entry for plan in set(plans) for entry in plan}
    if all(entry.in_tower for entry in entries):
        return 0
    wanted = {entry.source for entry in entries}
    samples = {source.name for source in engine.layout.all_sources if source.tap is None and source.name != BASE}
    return (len(samples) if wanted & samples else 0) + bool(wanted - samples)


def _text(engine: Engine):
    return engine.adapter.decoder.config


def _heads(text) -> tuple[int, int, int]:
    """(query heads, key-value heads, width of one)."""
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    return heads, groups, getattr(text, "head_dim", None) or text.hidden_size // heads


def _inner(text) -> int:
    """Width inside the feed-forward part; of a mixture all experts that one token goes through."""
    experts = getattr(text, "num_experts_per_tok", 0) or 0
    mixed = experts * (getattr(text, "moe_intermediate_size", 0) or 0)
    return max(mixed, getattr(text, "intermediate_size", 0) or 0)
