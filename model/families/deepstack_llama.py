"""The paper's own checkpoints as released: DeepStack-L and DeepStack-L-HD on Vicuna, type `deepstack_llama`.

transformers has no such type: config.json (LLaVA-1.5's keys and a few of its own) and the weight names are read here
into `LlavaForConditionalGeneration`, HD into `LlavaNextForConditionalGeneration`, whose parts are the same CLIP,
projector and Llama. The stacks are those of deepstack_llava.py. HD packs every set as LLaVA-NeXT packs its views: the
whole image, then the tiles with `image_newline` after each row. Nothing is cut off for padding, because the views are
stretched, never padded, whatever `mm_patch_merge_type` says.

Traps: a released folder has no image processor and no tokenizer.json, and its tower is only named (`mm_vision_tower`),
though its weights may lie among the others; then they are the ones that were trained. The vocabulary has no image
token, so the unknown token, which its bytes make needless, holds an image's places. Each text between two images is
tokenised alone, as the released code does.

Defects of the released code that are not reproduced: the place of an image is looked up in the prompt before images are
expanded, so the stacks of a second image, or of any image after padding, land too early; stacks that reach beyond the
end of a truncated prompt are cut without a word. Here every stack lies on its own image, and a prompt that is too long
is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import DecodeError
from PIL import Image
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from model.errors import UserError
from model.families.deepstack_llava import (
    SAMPLINGS,
    DeepStackLlava,
    layout_of,
    mosaic,
    owners_of,
    sample,
    settings_of,
    tiles,
    view_sizes,
)
from model.layout import Layout
from model.plan import BASE, Plan
from model.prompt import CUT, Prompt
from model.types import Region, View

# Vicuna v1 as LLaVA-1.5 uses it: the images of a message come first, each on a line of its own.
TEMPLATE = """{%- if messages[0].role == 'system' %}
    {%- for part in messages[0].content %}{{- part.text }}{%- endfor %}
{%- else %}
    {{- "A chat between a curious user and an artificial intelligence assistant. " }}
    {{- "The assistant gives helpful, detailed, and polite answers to the user's questions." }}
{%- endif %}
{{- ' ' }}
{%- for message in messages if message.role != 'system' %}
    {{- 'USER: ' if message.role == 'user' else 'ASSISTANT: ' }}
    {%- for part in message.content if part.type == 'image' %}{{- unk_token + '\n' }}{%- endfor %}
    {%- for part in message.content if part.type == 'text' %}{{- part.text }}{%- endfor %}
    {{- ' ' if message.role == 'user' else eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"""

NAMES = {  # released name -> transformers'
    r"^model\.(?=embed_tokens|layers|norm)": "model.language_model.",
    r"^model\.mm_projector\.0": "model.multi_modal_projector.linear_1",
    r"^model\.mm_projector\.2": "model.multi_modal_projector.linear_2",
    r"^model\.vision_tower\.vision_tower\.(vision_model\.)?": "model.vision_tower.",
}
TOWER = "model.vision_tower."
KNOWN_TOWER = "openai/clip-vit-large-patch14-336"  # LlavaConfig's defaults are its config.json
TEXT_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings rms_norm_eps rope_theta rope_scaling attention_bias tie_word_embeddings bos_token_id "
    "eos_token_id pad_token_id"
).split()
REQUIRED = {  # key of config.json -> the values that can be run, the first one where the key is missing
    "image_aspect_ratio": ("deepstack",),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch",),
    "deepstack_sampling": SAMPLINGS,
    "deepstack_args_for_ablation": (None, ""),
    "twoviews_unshare": (None, False),
    "mm_use_im_start_end": (False, None),
    "s2": (False, None),
}


class DeepStackLlama(DeepStackLlava):
    """A checkpoint of type `deepstack_llama`, in the shape of LLaVA, or of LLaVA-NeXT for HD."""

    name = "deepstack_llama"
    title = "DeepStack-L as released"
    model_types = ("deepstack_llama",)
    needs = "a released folder or hub id with safetensors, and CLIP's where mm_vision_tower names another than OpenAI's"
    fold_case = False
    own_type = True
    lacks = ("image processor",)
    differs = (
        "The released code shifts the stacks of a second image and cuts off what is too long without a word; here each "
        "stack lies on its own image and a prompt that is too long is refused."
    )

    def __init__(self, model: PreTrainedModel, tokenizer, processor: CLIPImageProcessorPil, chat_template: str | None):
        super().__init__(model, tokenizer, processor, TEMPLATE)  # a released folder has none
        model.config.image_token_id = tokenizer.unk_token_id
        self.hd = self.settings["hd"]
        self.scale = stack_scale(self.settings)
        self.note += f" {self.differs}"

    @classmethod
    def matches(cls, config: PreTrainedConfig) -> bool:
        return config.model_type in cls.model_types

    @classmethod
    def read_tokenizer(cls, source: str, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
        if not (Path(source) / "tokenizer.json").is_file():
            check_vocabulary(Path(source) / "tokenizer.model")
        return super().read_tokenizer(source, hub | {"config": LlamaConfig()})

    @classmethod
    def parts(cls, source: str, options: dict[str, Any], hub: dict[str, Any]) -> tuple[Any, PreTrainedModel]:
        said = PreTrainedConfig.get_config_dict(source, **hub)[0]
        released = PreTrainedConfig.from_dict({key: value for key, value in said.items() if value is not None})
        place = find_tower(released, Path(source))
        vision, processor = read_tower(place)
        config = cls.shaped(released, vision)
        model, seen = model_class(config).from_pretrained(
            source, config=config, key_mapping=NAMES, output_loading_info=True, **options
        )
        tower = {TOWER + name for name in model.model.vision_tower.state_dict()}
        if tower <= set(seen["missing_keys"]):
            whole = {key: value for key, value in options.items() if key != "quantization_config"}
            model.model.vision_tower = read_tower_weights(place, whole)
            model.config.deepstack["tower"] = place
        return processor, model

    @classmethod
    def unfilled(cls, config: PreTrainedConfig) -> PreTrainedModel:
        config = cls.shaped(config, read_tower(config.mm_vision_tower)[0])
        return model_class(config)(config)

    @classmethod
    def shaped(cls, config: PreTrainedConfig, vision: CLIPVisionConfig) -> LlavaConfig | LlavaNextConfig:
        """The config of transformers' model that a released config describes; UserError where it cannot be run."""
        return shaped(config, vision)

    @classmethod
    def as_read(cls, config: PreTrainedConfig) -> PreTrainedConfig:
        """What a released config is read into; that itself as it is."""
        released = config.model_type in cls.model_types
        return cls.shaped(config, read_tower(config.mm_vision_tower)[0]) if released else config

    @classmethod
    def layout_of(cls, config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        """Of a released config, or of what it is read into."""
        config = cls.as_read(config)
        settings = settings_of(config)
        if not settings["hd"]:
            return layout_of(config, cls.name)
        layout, warnings = layout_of(config, cls.name, num_crops=stack_scale(settings) ** 2, sampling="2d")
        if settings["sampling"] != "2d":
            warnings += (
                f"The config asks for {settings['sampling']} sampling, which HD does not look at: its views are always "
                "sampled 2d.",
            )
        return layout, warnings

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.unk_token_id

    def image_text(self, image: Image.Image, alone: bool = True) -> str:
        return CUT + super().image_text(image, alone) + CUT

    # HD

    def regions(self, image: Image.Image, alone: bool = True) -> tuple[Region, ...]:
        if not self.hd:
            return super().regions(image, alone)
        rows, columns = (n * self.side for n in self.high_resolution(image)[1])
        beyond = image.width * (columns + 1) / columns
        return (
            Region((self.side, self.side), None, "global view"),
            Region((rows, columns + 1), (0, 0, beyond, image.height), "high-resolution view"),
        )

    def encode(self, image: Image.Image, names: Sequence[str]) -> dict[str, Tensor]:
        if not self.hd:
            return super().encode(image, names)
        image = image.convert("RGB")
        high, grid = self.high_resolution(image)
        found: dict[str, Tensor] = {}
        if BASE in names:
            views = self._project([self.low_resolution(image), *tiles(high, self.tile)])
            found[BASE] = self._packed(views, grid)
        if set(names) - {BASE}:
            # Every view once more, `scale` times as large, in tiles of its own: its sets are as large as the view.
            wide = self.scale * self.tile
            larger = [self._stretched(image, (1, 1)), *tiles(self._stretched(image, grid), wide)]
            seen = self._project([tile for view in larger for tile in tiles(view, self.tile)])
            square, count = (self.scale, self.scale), self.scale**2
            sets = [sample(mosaic(of_view, square), square, count) for of_view in seen.split(count)]
            stacks = [torch.stack(sets_k).unflatten(1, (self.side, self.side)) for sets_k in zip(*sets, strict=True)]
            found |= {str(k): self._packed(rows, grid) for k, rows in enumerate(stacks)}
        return found

    def _project(self, views: list[Image.Image]) -> Tensor:
        """Views of one tile each -> [B, side, side, d], in the residual stream's width."""
        return self.model.model.multi_modal_projector(self._features(self._pixels(views)))

    def _stretched(self, image: Image.Image, grid: tuple[int, int]) -> Image.Image:
        """The image over (rows, columns) views, each `scale` times as large as a tile."""
        wide = self.scale * self.tile
        return image.resize((grid[1] * wide, grid[0] * wide), Image.Resampling.BICUBIC)

    def _packed(self, views: Tensor, grid: tuple[int, int]) -> Tensor:
        """Views [1 + rows*columns, side, side, d] -> [N, d]: the whole image, then the tiles' rows and their ends."""
        large = mosaic(views[1:], grid)
        ends = self.model.model.image_newline.expand(len(large), 1, -1)
        return torch.cat([views[0].flatten(0, 1), torch.cat([large, ends], dim=1).flatten(0, 1)])

    def views(self, image: Image.Image) -> tuple[View, ...]:
        if not self.hd:
            return super().views(image)
        image = image.convert("RGB")
        grid = self.high_resolution(image)[1]
        large = self._stretched(image, grid)
        shape = (large.height * self.side // self.tile, large.width * self.side // self.tile)
        owners = owners_of(shape, (self.scale, self.scale), "2d")
        return (
            View("global view", self.low_resolution(image), (self.side, self.side)),
            View("high-resolution view", large, shape, owners),
        )

    def plain_inputs(self, prompt: Prompt) -> tuple[dict[str, Tensor], Plan] | None:
        if not self.hd or not prompt.images:
            return super().plain_inputs(prompt)
        ids = prompt.input_ids
        shown = [self.high_resolution(image.convert("RGB"))[0] for image in prompt.images]
        views = [
            self._pixels([self.low_resolution(image.convert("RGB")), *tiles(high, self.tile)]).cpu()
            for image, high in zip(prompt.images, shown, strict=True)
        ]
        most = max(map(len, views))
        pixels = torch.stack([torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in views])
        sizes = torch.tensor([(high.height, high.width) for high in shown])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        return {**inputs, "image_sizes": sizes}, Plan([(BASE, 0, 1.0)])


def stack_scale(settings: dict) -> int:
    """How many times larger, in each direction, HD's views are seen for the stacks."""
    return int(settings["num_crops"] ** 0.5)


def check_vocabulary(file: Path) -> None:
    """UserError where a SentencePiece file is damaged, empty or no byte-pair model, which all of Llama's are:
    transformers would take the first for a file of another kind and read the others as byte pairs."""
    vocabulary = ModelProto()
    try:
        vocabulary.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise UserError(f"The vocabulary {file} cannot be read: {error}; download it again.") from error
    if not vocabulary.pieces or vocabulary.trainer_spec.model_type != TrainerSpec.BPE:
        raise UserError(f"The vocabulary {file} is no byte-pair model; only those are read, as Llama's are.")


def model_class(config: LlavaConfig | LlavaNextConfig) -> type[PreTrainedModel]:
    """transformers' model with the parts of a released one; HD's has `image_newline` too."""
    return LlavaNextForConditionalGeneration if config.deepstack["hd"] else LlavaForConditionalGeneration


def shaped(config: PreTrainedConfig, vision: CLIPVisionConfig) -> LlavaConfig | LlavaNextConfig:
    """The config of transformers' model that a released config describes; UserError where it cannot be run."""
    for key, allowed in REQUIRED.items():
        value = getattr(config, key, allowed[0])
        if value not in allowed:
            able = " or ".join(str(x) for x in allowed if x) or "none"
            raise UserError(f"The config.json says {key} {value!r}, which cannot be run here; supported is {able}.")
    if getattr(config, "mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise UserError(
            f"The config.json says mm_hidden_size {config.mm_hidden_size}, but the vision tower "
            f"{config.mm_vision_tower} is {vision.hidden_size} wide; correct mm_vision_tower."
        )
    text = LlamaConfig(**{key: getattr(config, key) for key in TEXT_KEYS if hasattr(config, key)})
    common = {
        "vision_config": vision,
        "text_config": text,
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
        "vision_feature_layer": getattr(config, "mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": text.tie_word_embeddings,
        "deepstack": {
            "merge": "stack",
            "num_crops": getattr(config, "num_crops", 4),
            "sampling": getattr(config, "deepstack_sampling", "2d"),
            "start": getattr(config, "deepstack_start_id", 1),
            "interval": getattr(config, "deepstack_interval", 1),
            "hd": bool(getattr(config, "is_anyres_deepstack", False)),
            "tower": None,  # where its weights were read from, if not from the checkpoint
        },
    }
    if not common["deepstack"]["hd"]:
        return LlavaConfig(**common)
    sizes = view_sizes(vision.image_size, common["deepstack"]["num_crops"])
    return LlavaNextConfig(**common, image_grid_pinpoints=[list(size) for size in sizes])


def find_tower(config: PreTrainedConfig, folder: Path) -> str:
    """The folder that `mm_vision_tower` means, inside the checkpoint's or not, or else the hub id."""
    named = getattr(config, "mm_vision_tower", None) or getattr(config, "vision_tower", None)
    if not isinstance(named, str):
        raise UserError("The config.json names no vision tower; give mm_vision_tower, a CLIP folder or hub id.")
    for place in (folder / named, Path(named).expanduser()):
        if place.is_dir():
            return str(place)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", named):
        return named
    raise UserError(
        f"The vision tower {named} that the config.json names (mm_vision_tower) is not there, neither as a folder nor "
        f"inside {folder}; put the folder of {KNOWN_TOWER} there."
    )


def read_tower(place: str) -> tuple[CLIPVisionConfig, CLIPImageProcessorPil]:
    """The config and the image processor of a CLIP folder or hub id; of OpenAI's large one no file is needed."""
    if place == KNOWN_TOWER:
        vision = LlavaConfig().vision_config
        side = vision.image_size
        return vision, CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    try:
        kind = PreTrainedConfig.get_config_dict(place)[0].get("model_type")
        vision, processor = CLIPVisionConfig.from_pretrained(place), CLIPImageProcessorPil.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise UserError(_unread(place, error)) from error
    if kind not in ("clip", "clip_vision_model"):
        raise UserError(f"The vision tower {place} (mm_vision_tower) is of type “{kind}”; it has to be a CLIP.")
    return vision, processor


def read_tower_weights(place: str, options: dict[str, Any]) -> CLIPVisionModel:
    """The tower of a CLIP folder or hub id; UserError where it has no safetensors. options: for from_pretrained."""
    if Path(place).is_dir() and not list(Path(place).glob("*.safetensors")):
        raise UserError(
            f"The vision tower {place} has no safetensors; other formats can hold code and are not opened. Save it "
            "again with transformers' save_pretrained."
        )
    try:
        return CLIPVisionModel.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise UserError(_unread(place, error)) from error


def _unread(place: str, error: Exception) -> str:
    words = " ".join(str(error).split())[:150].rstrip(".")
    return (
        f"The vision tower {place} (mm_vision_tower in config.json) cannot be read: {words}. "
        "Give a CLIP folder with config.json, preprocessor_config.json and model.safetensors."
    )
