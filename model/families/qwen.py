"""What the Qwen3-VL class of families shares: stacks tapped after vision blocks, stack k added after LLM layer k.

"After layer k" is "before layer k+1" here. Taps come from the loaded config. Runs without torchvision: the PIL image
processor, the tokenizer and the chat template are loaded one by one. Images only. A family of the class is a
declaration beside this file; what a model does with sound, speech or drawing is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from model.errors import UserError
from model.families import Family
from model.layout import Layout, StackSource
from model.plan import BASE, TAP, Plan
from model.prompt import Prompt
from model.types import View


class Qwen(Family):
    """A family whose model has Qwen3-VL's parts: `model.visual`, `model.language_model`, `get_image_features`.

    Subclasses name the classes of transformers; they are imported when a checkpoint is loaded, not before.
    """

    model_class: str  # of transformers: "Qwen3VLForConditionalGeneration"
    processor_class = "Qwen2VLImageProcessorPil"
    needs = "a folder or hub id in the released format; no torchvision needed for images"

    def __init__(self, model: PreTrainedModel, tokenizer, processor, chat_template: str | None):
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.chat_template = chat_template
        self.decoder = model.model.language_model
        self.layout, self.warnings = self.layout_of(model.config)
        single = not self.layout.stack_names
        self.trained = "trained single injection" if single else "trained with stacks"
        self.note = (
            "Its config lists no taps: the image enters once, at the input."
            if single
            else f"Stacks are tapped after vision blocks {', '.join(map(str, self.taps))}."
        )

    @classmethod
    def parts(cls, source: str, options: dict[str, Any], hub: dict[str, Any]) -> tuple[Any, PreTrainedModel]:
        processor = getattr(transformers, cls.processor_class).from_pretrained(source, **hub)
        return processor, getattr(transformers, cls.model_class).from_pretrained(source, **options)

    @classmethod
    def layout_of(cls, config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        return tapped_layout(config, cls.name, cls.title)

    @property
    def taps(self) -> tuple[int, ...]:
        """Vision blocks whose output becomes a stack, in stack order."""
        return tuple(source.tap for source in self.layout.sources if source.tap is not None)

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    def _size(self, image: Image.Image) -> tuple[int, int]:
        """(height, width) after the processor's resize, pixels."""
        try:
            return smart_resize(
                image.height,
                image.width,
                factor=self.processor.patch_size * self.processor.merge_size,
                min_pixels=self.processor.size["shortest_edge"],
                max_pixels=self.processor.size["longest_edge"],
            )
        except ValueError as error:
            size = f"{image.width}×{image.height}"
            raise UserError(
                f"The image is {size} pixels, too long and narrow for {self.title} (at most 200:1). Crop it."
            ) from error

    def grid(self, image: Image.Image) -> tuple[int, int]:
        height, width = self._size(image)
        cell = self.processor.patch_size * self.processor.merge_size
        return height // cell, width // cell

    def encode(self, image: Image.Image) -> dict[str, Tensor]:
        inputs = self.processor(images=[image], return_tensors="pt")
        seen = self.model.model.get_image_features(
            inputs["pixel_values"].to(self.model.device), inputs["image_grid_thw"].to(self.model.device)
        )
        stacks = {str(k): feature[0] for k, feature in enumerate(getattr(seen, "deepstack_features", ()))}
        return {BASE: seen.pooler_output[0], **stacks}

    def encode_taps(self, image: Image.Image, names: Sequence[str]) -> dict[str, Tensor]:
        inputs = self.processor(images=[image], return_tensors="pt")
        tower, listed = self.model.model.visual, list(self.model.model.visual.config.deepstack_visual_indexes)
        states = tower(
            inputs["pixel_values"].to(tower.device, tower.dtype),
            grid_thw=inputs["image_grid_thw"].to(tower.device),
            output_hidden_states=True,
        ).hidden_states  # before block 0, after block 0, …
        taps = [self.layout.source(name).tap for name in names]
        mergers = [tower.deepstack_merger_list[listed.index(nearest(tap, self.taps))] for tap in taps]
        return {name: merger(states[tap + 1]) for name, tap, merger in zip(names, taps, mergers, strict=True)}

    def views(self, image: Image.Image) -> tuple[View, ...]:
        height, width = self._size(image)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        return (View("what the model sees", resized, self.grid(image)),)

    def positions(self, input_ids: Tensor, grids: Sequence[tuple[int, int]]) -> tuple[Tensor, int]:
        length = input_ids.shape[1]
        if not grids:
            return torch.arange(length).expand(3, 1, length), length
        merge = self.processor.merge_size
        patches = torch.tensor([[1, rows * merge, columns * merge] for rows, columns in grids])
        ids, delta = self._rope(input_ids, patches)
        return ids, length + int(delta)

    def _rope(self, input_ids: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """transformers' own position ids [3, 1, T] and their offset; patches: [images, 3], each (1, rows, columns)."""
        return self.model.model.get_rope_index(
            input_ids, mm_token_type_ids=self._token_types(input_ids), image_grid_thw=patches
        )

    def _token_types(self, input_ids: Tensor) -> Tensor:
        """1 at the rows of images, 0 at text."""
        return (input_ids == self.image_token_id).int()

    def plain_inputs(self, prompt: Prompt) -> tuple[dict[str, Tensor], Plan]:
        ids = prompt.input_ids
        pixels = self.processor(images=list(prompt.images), return_tensors="pt") if prompt.images else {}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": self._token_types(ids)}
        return {**inputs, **pixels}, self.layout.default


def nearest(block: int, taps: Sequence[int]) -> int:
    """The trained tap nearest to a vision block, the shallower of two."""
    return min(taps, key=lambda tap: (abs(tap - block), tap))


def tapped_layout(
    config: PreTrainedConfig, family: str, title: str, by_place: bool = True
) -> tuple[Layout, tuple[str, ...]]:
    """The layout that a config's taps really give, and warnings in words where that is not what they say.

    config: one with `vision_config` and `text_config`; family, title: whose layout it is, and its name for people.

    The tower makes one stack per distinct in-range tap, in order of depth, through the merger at the tap's listed
    place, or, not `by_place`, stack k through merger k.
    """
    depth, layers = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
    listed = list(config.vision_config.deepstack_visual_indexes)
    taps = sorted({tap for tap in listed if 0 <= tap < depth})
    text = ", ".join(map(str, listed))
    warnings = []
    outside = [tap for tap in listed if not 0 <= tap < depth]
    if outside:
        warnings.append(
            f"The config taps vision block {', '.join(map(str, outside))}, but the blocks are 0 to {depth - 1}: "
            "the model makes no stack of it and gives no error."
        )
    repeated = sorted({tap for tap in taps if listed.count(tap) > 1})
    if repeated:
        how = "through its first merger; the other" if by_place else "and stack k goes through merger k; the last"
        warnings.append(
            f"The config lists vision block {', '.join(map(str, repeated))} more than once ({text}): "
            f"the model makes one stack of it, {how} merger is never used."
        )
    if taps != sorted(taps, key=listed.index):
        how = "each through the merger at its listed place" if by_place else "stack k through merger k all the same"
        warnings.append(
            f"The config lists its taps out of order ({text}): the model makes stacks in order of depth "
            f"({', '.join(map(str, taps))}), {how}."
        )
    late = [k for k in range(len(taps)) if k + 1 >= layers]
    if late:
        warnings.append(
            f"Stack {', '.join(map(str, late))} would be added after LLM layer {layers - 1} or later, where no answer "
            f"can depend on it (the LLM has layers 0 to {layers - 1}): the default plan leaves it out."
        )
    sources = [StackSource(BASE, "image embedding", None, 0, "put in place of the image tokens' embeddings")]
    for k, tap in enumerate(taps):
        home = min(k + 1, layers - 1)
        sources.append(StackSource(str(k), f"tap after vision block {tap}", tap, home, f"added after LLM layer {k}"))
    default = Plan([(BASE, 0, 1.0), *((str(k), k + 1, 1.0) for k in range(len(taps)) if k + 1 < layers)])
    layout = Layout(
        family=family,
        sources=tuple(sources),
        n_layers=layers,
        n_vision_layers=depth,
        hidden_size=config.text_config.hidden_size,
        default=default,
        convention=f"{title}'s code adds stack k after LLM layer k; that is before layer k+1 here.",
        untrained=untrained_taps(depth, {source.tap: source.home for source in sources[1:]}),
    )
    return layout, tuple(warnings)


def untrained_taps(depth: int, homes: Mapping[int, int], through: str = "merger") -> tuple[StackSource, ...]:
    """Sources for the vision blocks of which no stack was made, if any was made of others.

    homes: trained tap -> the LLM layer its stack enters before; through: what a tap goes through, for people.
    """
    found = []
    for block in range(depth if homes else 0):
        if block not in homes:
            near = nearest(block, tuple(homes))
            label = f"untrained tap after vision block {block}, through the {through} of block {near}"
            found.append(StackSource(f"{TAP}{block}", label, block, homes[near], "not in the model's own code"))
    return tuple(found)
