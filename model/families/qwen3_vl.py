"""Qwen3-VL: stacks are tapped after blocks of the vision tower; its own code adds stack k after LLM layer k.

"After layer k" is "before layer k+1" here. Taps come from the loaded config. Runs without torchvision: the PIL image
processor, the tokenizer and the chat template are loaded one by one. Images only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.utils import cached_file

from model.engine import Engine
from model.errors import UserError
from model.families import Family, load_kwargs
from model.layout import Layout, StackSource
from model.plan import BASE, Plan
from model.prompt import Prompt
from model.types import View


class Qwen3VL(Family):
    """`Qwen3VLForConditionalGeneration`."""

    name = "qwen3_vl"
    title = "Qwen3-VL"
    model_types = ("qwen3_vl",)
    needs = "a folder or hub id in the released format; no torchvision needed for images"

    def __init__(self, model: Qwen3VLForConditionalGeneration, tokenizer, processor, chat_template: str | None):
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.chat_template = chat_template
        self.decoder = model.model.language_model
        self.layout, self.warnings = layout_of(model.config)
        single = not self.layout.stack_names
        self.trained = "trained single injection" if single else "trained with stacks"
        self.note = (
            "Its config lists no taps: the image enters once, at the input."
            if single
            else f"Stacks are tapped after vision blocks {', '.join(map(str, self.taps))}."
        )

    @classmethod
    def build(
        cls,
        source: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        name: str | None = None,
        reasons: Sequence[str] = (),
        **hub: Any,
    ) -> Engine:
        source = str(source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **hub)
        processor = Qwen2VLImageProcessorPil.from_pretrained(source, **hub)
        model = Qwen3VLForConditionalGeneration.from_pretrained(source, **load_kwargs(device, dtype, hub))
        family = cls(model, tokenizer, processor, chat_template(source, hub))
        return Engine(family, name=name or source, reasons=reasons)

    @staticmethod
    def layout_of(config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        return layout_of(config)

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
                f"The image is {size} pixels, too long and narrow for Qwen3-VL (at most 200:1). Crop it."
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
        stacks = {str(k): feature[0] for k, feature in enumerate(seen.deepstack_features)}
        return {BASE: seen.pooler_output[0], **stacks}

    def views(self, image: Image.Image) -> tuple[View, ...]:
        height, width = self._size(image)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        return (View("what the model sees", resized, self.grid(image)),)

    def positions(self, input_ids: Tensor, grids: Sequence[tuple[int, int]]) -> tuple[Tensor, int]:
        length = input_ids.shape[1]
        if not grids:
            return torch.arange(length).expand(3, 1, length), length
        merge = self.processor.merge_size
        ids, delta = self.model.model.get_rope_index(
            input_ids,
            mm_token_type_ids=(input_ids == self.image_token_id).int(),
            image_grid_thw=torch.tensor([[1, rows * merge, columns * merge] for rows, columns in grids]),
        )
        return ids, length + int(delta)

    def plain_inputs(self, prompt: Prompt) -> tuple[dict[str, Tensor], Plan]:
        ids = prompt.input_ids
        pixels = self.processor(images=list(prompt.images), return_tensors="pt") if prompt.images else {}
        types = (ids == self.image_token_id).int()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **pixels}
        return inputs, self.layout.default


def chat_template(source: str, hub: dict[str, Any]) -> str | None:
    """The processor's own chat template (chat_template.jinja or .json); None where only the tokenizer has one."""
    for file in ("chat_template.jinja", "chat_template.json"):
        path = cached_file(source, file, _raise_exceptions_for_missing_entries=False, **hub)
        if path is not None:
            text = Path(path).read_text(encoding="utf-8")
            return json.loads(text)["chat_template"] if file.endswith(".json") else text
    return None


def layout_of(config) -> tuple[Layout, tuple[str, ...]]:
    """The layout that a config's taps really give, and warnings in words where that is not what they say.

    The tower makes one stack per distinct in-range tap, in order of depth, through the merger at its listed place.
    """
    depth, layers = config.vision_config.depth, config.text_config.num_hidden_layers
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
        warnings.append(
            f"The config lists vision block {', '.join(map(str, repeated))} more than once ({text}): "
            "the model makes one stack of it, through its first merger; the other merger is never used."
        )
    if taps != sorted(taps, key=listed.index):
        warnings.append(
            f"The config lists its taps out of order ({text}): the model makes stacks in order of depth "
            f"({', '.join(map(str, taps))}), each through the merger at its listed place."
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
        family=Qwen3VL.name,
        sources=tuple(sources),
        n_layers=layers,
        n_vision_layers=depth,
        hidden_size=config.text_config.hidden_size,
        default=default,
        convention="Qwen3-VL's code adds stack k after LLM layer k; that is before layer k+1 here.",
    )
    return layout, tuple(warnings)
