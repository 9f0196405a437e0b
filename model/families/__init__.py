"""Model families: what the engine must know about one kind of model, one small file each, and their registry.

A family turns messages into token ids, images into features and a config into a Layout. It never injects or records:
that is the engine's, the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from model.errors import UserError
from model.layout import Layout
from model.types import Message, View

if TYPE_CHECKING:
    from model.engine import Engine
    from model.plan import Plan
    from model.prompt import Prompt


class Family(ABC):
    """One loaded model seen through its family's eyes. Subclasses set the class attributes and the abstract methods."""

    name: str  # "qwen3_vl"
    title: str  # "Qwen3-VL"
    model_types: tuple[str, ...]  # of config.json
    needs: str  # one sentence: what such a checkpoint must have
    fold_case = False  # True when the chat template changes the case of user text

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    warnings: tuple[str, ...]
    trained: str
    note: str
    decoder: nn.Module  # .layers, .norm, called with inputs_embeds
    chat_template: str | None = None  # None: the tokenizer's own

    @classmethod
    def matches(cls, config: PreTrainedConfig) -> bool:
        """Whether this family can run a checkpoint with this config."""
        return config.model_type in cls.model_types

    @classmethod
    @abstractmethod
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
        """Loads a folder or hub id. `hub` goes to transformers' from_pretrained (revision, cache_dir, token …)."""

    @staticmethod
    @abstractmethod
    def layout_of(config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        """The layout that a config's checkpoint has, without loading it, and warnings in words."""

    @property
    @abstractmethod
    def image_token_id(self) -> int:
        """The placeholder that each image contributes once to the rendered text."""

    @abstractmethod
    def grid(self, image: Image.Image) -> tuple[int, int]:
        """(rows, columns) of visual tokens that this image takes; UserError if it cannot be used."""

    @abstractmethod
    def encode(self, image: Image.Image) -> dict[str, Tensor]:
        """The vision tower on one image: source name -> [N, d], every source of the layout, row-major over `grid`."""

    @abstractmethod
    def views(self, image: Image.Image) -> tuple[View, ...]:
        """What the model sees of this image."""

    @abstractmethod
    def positions(self, input_ids: Tensor, grids: Sequence[tuple[int, int]]) -> tuple[Tensor, int]:
        """Position ids [..., 1, T] of a prompt as transformers computes them, and the next token's position."""

    @abstractmethod
    def plain_inputs(self, prompt: Prompt) -> tuple[dict[str, Tensor], Plan] | None:
        """What transformers' own forward or generate of this model takes for a prompt, and the plan which that runs.

        Tensors on the CPU. None where transformers alone cannot run this checkpoint.
        """

    @property
    def embed(self) -> nn.Module:
        """Token ids -> input embeddings."""
        return self.model.get_input_embeddings()

    @property
    def lm_head(self) -> nn.Module:
        """Hidden states -> logits."""
        return self.model.get_output_embeddings()

    def special_tokens(self) -> tuple[str, ...]:
        """Strings the tokenizer would turn into special tokens."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return tuple(dict.fromkeys([*added, *self.tokenizer.all_special_tokens]))

    def render(self, messages: list[Message]) -> str:
        """The chat template's text, ready for an answer."""
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, chat_template=self.chat_template
        )

    def end_tokens(self) -> frozenset[int]:
        """Ids that end an answer."""
        ids: list[int] = []
        generation = getattr(self.model, "generation_config", None)
        for value in (getattr(generation, "eos_token_id", None), self.tokenizer.eos_token_id):
            ids += value if isinstance(value, list | tuple) else [] if value is None else [value]
        return frozenset(ids)


def load_kwargs(device: torch.device | str, dtype: torch.dtype, hub: dict[str, Any]) -> dict[str, Any]:
    """Arguments for from_pretrained: safetensors only, no code from the hub, straight to an accelerator."""
    kwargs = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False, **hub}
    if torch.device(device).type != "cpu":
        kwargs["device_map"] = {"": device}
    return kwargs


def families() -> tuple[type[Family], ...]:
    """All families, in the order in which they are asked."""
    from model.families.deepstack_llava import DeepStackLlava
    from model.families.qwen3_vl import Qwen3VL

    return (Qwen3VL, DeepStackLlava)


_WITHOUT = {
    "qwen3_5": "Qwen3.5 has no DeepStack: its code removed it, all visual tokens enter once at the input",
    "qwen3_5_moe": "Qwen3.5 has no DeepStack: its code removed it, all visual tokens enter once at the input",
    "qwen2_vl": "Qwen2-VL has no DeepStack: all visual tokens enter once at the input",
    "qwen2_5_vl": "Qwen2.5-VL has no DeepStack: all visual tokens enter once at the input",
    "llava": "this LLaVA checkpoint's config has no “deepstack” entry, so it is an ordinary LLaVA without stacks",
}


def detect(config: PreTrainedConfig) -> type[Family]:
    """The family of a checkpoint's config; UserError with the list of supported ones otherwise."""
    for family in families():
        if family.matches(config):
            return family
    supported = "; ".join(f"{family.title} ({', '.join(family.model_types)})" for family in families())
    reason = _WITHOUT.get(config.model_type, f"models of type “{config.model_type}” are not supported")
    raise UserError(f"Cannot use this model: {reason}. Supported: {supported}.")
