"""Model families: what the engine must know about one kind of model, one small file each, and their registry.

A family turns messages into token ids, images into features and a config into a Layout. It never injects or records:
that is the engine's, the same for all.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import cached_file

from model.errors import UserError
from model.layout import Layout
from model.types import ImageGrid, Message, Region, View

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
    mixes_images = False  # True when an image beside others is encoded otherwise than alone
    takes_video = False  # True when it reads a sheet of frames (model/clip.py) as a video
    own_type = False  # True when transformers has no class for its model_type and the family reads config.json itself
    lacks: tuple[str, ...] = ()  # of loading.NEEDED: what such a checkpoint comes without
    borrowed = 0  # parameters of the loaded model that are not in the checkpoint's own files

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
    def unused_weights(cls) -> tuple[str, ...]:
        """Patterns of weight names that a released checkpoint holds and this family never loads."""
        return ()

    @classmethod
    def build(
        cls,
        source: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        name: str | None = None,
        reasons: Sequence[str] = (),
        placing: Mapping[str, Any] | None = None,
        **hub: Any,
    ) -> Engine:
        """Loads a folder or hub id. `hub` goes to transformers' from_pretrained (revision, cache_dir, token …).

        placing: more of the model's alone (device_map, quantization_config).
        """
        from model.engine import Engine

        source = str(source)
        tokenizer = cls.read_tokenizer(source, hub)
        processor, model = cls.parts(source, load_kwargs(device, dtype, hub) | dict(placing or {}), hub)
        return Engine(
            cls(model, tokenizer, processor, chat_template(source, hub)), name=name or source, reasons=reasons
        )

    @classmethod
    def read_tokenizer(cls, source: str, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
        """The tokenizer of a folder or hub id."""
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **hub)

    @classmethod
    @abstractmethod
    def parts(cls, source: str, options: dict[str, Any], hub: dict[str, Any]) -> tuple[Any, PreTrainedModel]:
        """The image processor and the model. `options`: for the model's from_pretrained, `hub` among them."""

    @classmethod
    def unfilled(cls, config: PreTrainedConfig) -> PreTrainedModel:
        """The model of a config with whatever weights; on torch's meta device it takes no memory."""
        return AutoModelForImageTextToText.from_config(config)

    @staticmethod
    @abstractmethod
    def layout_of(config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        """The layout that a config's checkpoint has, without loading it, and warnings in words."""

    @property
    @abstractmethod
    def image_token_id(self) -> int:
        """The placeholder that each image contributes once to the rendered text."""

    def grid(self, image: Image.Image) -> tuple[int, int]:
        """(rows, columns) of visual tokens that this image takes; UserError if it cannot be used.

        A family whose images take several rectangles says so in `regions` instead.
        """
        raise NotImplementedError(f"{type(self).__name__} says neither grid nor regions")

    def regions(self, image: Image.Image, alone: bool = True) -> tuple[Region, ...]:
        """The rectangles of visual tokens that this image takes, in order. `alone`: see `mixes_images`."""
        return (Region(self.grid(image)),)

    def image_text(self, image: Image.Image, alone: bool = True) -> str:
        """What stands in the prompt's text for one image, with one placeholder per visual token."""
        return self.image_token * sum(region.grid[0] * region.grid[1] for region in self.regions(image, alone))

    @abstractmethod
    def encode(self, image: Image.Image, names: Sequence[str]) -> dict[str, Tensor]:
        """The vision tower on one image: source name -> [N, d], at least of `names`, sources of the layout.

        Only what these need goes through the tower; what comes out of the same run is given too. The rest is asked for
        when a plan wants it, so a source's rows must not depend on what is asked for beside it. Rows are row-major over
        each of the image's regions, in order. A family that mixes images takes `alone` too. One whose layout has a
        `tower` gives those sources as well, as wide as the tower is, and takes `entering`: what of a plan enters the
        tower, an entry and its source's rows each.
        """

    def encode_taps(self, image: Image.Image, names: Sequence[str]) -> dict[str, Tensor]:
        """Untrained taps of the layout on one image: name -> [N, d]. Only asked of a family whose layout has some."""
        raise NotImplementedError(f"{self.title} has no untrained taps")

    @abstractmethod
    def views(self, image: Image.Image) -> tuple[View, ...]:
        """What the model sees of this image."""

    @abstractmethod
    def positions(
        self, input_ids: Tensor, grids: Sequence[ImageGrid], images: Sequence[Image.Image]
    ) -> tuple[Tensor, int | float]:
        """Position ids [..., 1, T] of a prompt as transformers computes them, and the next token's position.

        Whole numbers, int64; where the model itself stands between them, float32 and a float.

        grids: where every region of every image lies, in order.
        """

    @abstractmethod
    def plain_inputs(self, prompt: Prompt) -> tuple[dict[str, Tensor], Plan] | None:
        """What transformers' own forward or generate of this model takes for a prompt, and the plan which that runs.

        Tensors on the CPU. None where transformers alone cannot run this checkpoint.
        """

    @property
    def image_token(self) -> str:
        """The placeholder as text."""
        return self.tokenizer.convert_ids_to_tokens(self.image_token_id)

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
        return tuple(dict.fromkeys([*added, *self.tokenizer.all_special_tokens, self.image_token]))

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


def chat_template(source: str, hub: dict[str, Any]) -> str | None:
    """The processor's own chat template (chat_template.jinja or .json); None where only the tokenizer has one."""
    for file in ("chat_template.jinja", "chat_template.json"):
        path = cached_file(source, file, _raise_exceptions_for_missing_entries=False, **hub)
        if path is not None:
            text = Path(path).read_text(encoding="utf-8")
            return json.loads(text)["chat_template"] if file.endswith(".json") else text
    return None


def families() -> tuple[type[Family], ...]:
    """All families, in the order in which they are asked: those with stacks, then the single injections."""
    from model.families.cohere_compass import CohereCompass
    from model.families.cosmos3_omni import Cosmos3Omni
    from model.families.deepstack_llama import DeepStackLlama
    from model.families.deepstack_llava import DeepStackLlava
    from model.families.deepstack_v import DeepStackLlavaV, DeepStackV
    from model.families.granite4_vision import Granite4Vision
    from model.families.granite_docling import GraniteDocling
    from model.families.llava import Llava
    from model.families.llava_next import LlavaNext
    from model.families.llava_onevision import LlavaOnevision
    from model.families.qwen2_5_vl import Qwen25VL
    from model.families.qwen2_vl import Qwen2VL
    from model.families.qwen3_5 import Qwen35
    from model.families.qwen3_5_moe import Qwen35Moe
    from model.families.qwen3_omni_moe import Qwen3OmniMoe
    from model.families.qwen3_vl import Qwen3VL
    from model.families.qwen3_vl_moe import Qwen3VLMoe

    stacks = (Qwen3VL, Qwen3VLMoe, Qwen3OmniMoe, Cosmos3Omni, CohereCompass, Granite4Vision, GraniteDocling)
    papers = (DeepStackV, DeepStackLlama, DeepStackLlavaV, DeepStackLlava)
    return (*stacks, *papers, Qwen2VL, Qwen25VL, Qwen35, Qwen35Moe, Llava, LlavaNext, LlavaOnevision)


def detect(config: PreTrainedConfig) -> type[Family]:
    """The family of a checkpoint's config; UserError with the list of supported ones otherwise."""
    for family in families():
        if family.matches(config):
            if not family.own_type and config.model_type not in CONFIG_MAPPING_NAMES:
                raise UserError(
                    f"Cannot use this model: the installed transformers {transformers.__version__} does not have the "
                    f"type “{config.model_type}” ({family.title}). Install a newer one: pip install -U transformers."
                )
            return family
    supported = ", ".join(family.title for family in families())
    raise UserError(
        f"Cannot use this model: models of type “{config.model_type}” are not supported. Supported are {supported}; "
        "`python -m app models` says what each needs."
    )
