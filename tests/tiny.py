"""Tiny random models as complete folders in the released formats: loadable by the app and by plain transformers.

Everything that tests need without weights to download: a Qwen3-VL folder (sharded safetensors, config with the released
keys, tokenizer, processor and chat-template files) and DeepStack-L folders, seeded, on the CPU in float32.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from model.engine import Engine
from model.families import detect

QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The parts of the released template that images and text use.
QWEN_TEMPLATE = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].content is string %}
        {{- messages[0].content }}
    {%- else %}
        {%- for content in messages[0].content %}
            {%- if 'text' in content %}
                {{- content.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for content in message.content %}
                {%- if content.type == 'image' or 'image' in content or 'image_url' in content %}
                    {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
                {%- elif content.type == 'video' %}
                    {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
                {%- elif 'text' in content %}
                    {{- content.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for content_item in message.content %}
                {%- if 'text' in content_item %}
                    {{- content_item.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

HIRES_TEMPLATE = """{{- '<s>' }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- for part in message.content %}{{- part.text }}{%- endfor %}
        {{- '</s>' }}
    {%- else %}
        {%- for part in message.content if part.type == 'image' %}{{- '<image>' }}{%- endfor %}
        {%- for part in message.content if part.type == 'text' %}{{- part.text | lower }}{%- endfor %}
        {{- '<answer>' }}
    {%- endif %}
{%- endfor %}
"""

_SENTENCES = [
    "What does the sign say? Read the text in the picture, please.",
    "The receipt shows the total, the date and the number of items.",
    "How many red circles are there? What colour is the square at the top left?",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,:;?!'-+/()|<>_",
]


def _tokenizer(special: tuple[str, ...], size: int) -> Tokenizer:
    """A byte-level BPE, able to write any text, with these special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return tokenizer


def _write(path: Path, name: str, data: dict) -> None:
    (path / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _randomise(model: torch.nn.Module, seed: int, scale: float = 0.15) -> None:
    """Weights large enough that every part of the input shows in the logits, norms near one."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw) * scale
        parameter.data = 1 + noise if "norm" in name and name.endswith("weight") else noise


def qwen_vision(taps: tuple[int, ...] = (0, 1, 2)) -> dict:
    """The vision_config of a Qwen tower: 4 blocks, patches of 8 px, rows 64 wide."""
    return {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": list(taps),
    }


def qwen_text(tokenizer: Tokenizer, layers: int = 5) -> dict:
    """The text_config of a Qwen decoder, 64 wide."""
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }


def qwen_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids that a Qwen config names."""
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: tokenizer.token_to_id(text) for name, text in names.items()}


def qwen_files(path: Path, tokenizer: Tokenizer, processor: str = "Qwen3VLProcessor") -> None:
    """Everything of a Qwen folder but config and weights: tokenizer, chat template, processors."""
    tokenizer.save(str(path / "tokenizer.json"))
    _write(
        path,
        "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "unk_token": None,
            "additional_special_tokens": list(QWEN_SPECIAL[1:]),
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "chat_template": QWEN_TEMPLATE,
        },
    )
    _write(path, "chat_template.json", {"chat_template": QWEN_TEMPLATE})
    qwen_pixels(path, processor, "Qwen2VLImageProcessorFast")


def qwen_pixels(path: Path, processor: str, image_processor: str) -> None:
    """The processor files of a Qwen tower: patches of 8 px, at most 64 x 64 px."""
    pixels = {
        "size": {"longest_edge": 64 * 64, "shortest_edge": 32 * 32},
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": processor,
    }
    _write(path, "preprocessor_config.json", {**pixels, "image_processor_type": image_processor})
    pixels |= {"size": {"longest_edge": 8 * 64 * 64, "shortest_edge": 32 * 32}}  # of a whole video
    _write(path, "video_preprocessor_config.json", {**pixels, "video_processor_type": "Qwen3VLVideoProcessor"})


def save_qwen(path: Path, model: PreTrainedModel, tokenizer: Tokenizer, seed: int) -> None:
    """Random weights, in shards, with the end tokens of the released generation_config.json."""
    _randomise(model, seed)
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    model.generation_config.eos_token_id = [end, pad]
    model.generation_config.pad_token_id = pad
    model.save_pretrained(path, max_shard_size="200KB")


def qwen3_vl_folder(path: str | Path, taps: tuple[int, ...] = (0, 1, 2), seed: int = 0, layers: int = 5) -> Path:
    """A Qwen3-VL folder in the released format with a 4-block tower, `layers` LLM layers, 64 wide."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(QWEN_SPECIAL, 400)
    config = Qwen3VLConfig(
        text_config=qwen_text(tokenizer, layers),
        vision_config=qwen_vision(taps),
        tie_word_embeddings=True,
        **qwen_tokens(tokenizer),
    )
    save_qwen(path, Qwen3VLForConditionalGeneration(config), tokenizer, seed)
    qwen_files(path, tokenizer)
    return path


def hires_folder(
    path: str | Path,
    merge: str = "stack",
    seed: int = 0,
    start: int = 1,
    interval: int = 1,
    num_crops: int = 4,
    vision_layers: int = 3,
    **more: object,
) -> Path:
    """A DeepStack-L folder: 16 px tiles of 4x4 tokens, 64 wide, 6 LLM layers, or as many as nine stacks need.

    merge: "stack", "none" or "concat"; more: of the config's "deepstack" entry."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    special = ("<pad>", "<s>", "</s>", "<image>", "<answer>")
    tokenizer = _tokenizer(special, 400)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=vision_layers,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=max(6, num_crops + 2),
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=tokenizer.token_to_id("<s>"),
            eos_token_id=tokenizer.token_to_id("</s>"),
            pad_token_id=tokenizer.token_to_id("<pad>"),
        ),
        image_token_index=tokenizer.token_to_id("<image>"),
        image_seq_length=16,
        vision_feature_layer=[-1] * (num_crops + 1) if merge == "concat" else -1,
        vision_feature_select_strategy="default",
        deepstack={
            **{"merge": merge, "num_crops": num_crops, "sampling": "2d", "start": start, "interval": interval},
            **more,
        },
    )
    model = LlavaForConditionalGeneration(config)
    _randomise(model, seed)
    model.generation_config.eos_token_id = tokenizer.token_to_id("</s>")
    model.save_pretrained(path)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<image>", "<answer>"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = HIRES_TEMPLATE
    fast.save_pretrained(path)
    _write(
        path,
        "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"height": 16, "width": 16},
            "do_center_crop": False,
            "resample": 3,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.25, 0.25, 0.25],
            "rescale_factor": 1 / 255,
        },
    )
    return path


KINDS = ("hires", "single", "concat", "qwen")


@cache
def folder(kind: str) -> Path:
    """One folder per kind and test process, written on first use."""
    path = Path(tempfile.mkdtemp(prefix=f"tiny-{kind}-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    if kind == "qwen":
        return qwen3_vl_folder(path)
    if kind == "nine":
        return hires_folder(path, num_crops=9)
    return hires_folder(path, {"hires": "stack", "single": "none", "concat": "concat"}[kind])


def build(path: str | Path, name: str | None = None, dtype: torch.dtype = torch.float32) -> Engine:
    """An engine of a folder, through the registry, on the CPU."""
    return detect(AutoConfig.from_pretrained(path)).build(str(path), "cpu", dtype, name=name)


@cache
def engine(kind: str) -> Engine:
    """A cached engine: one of KINDS, or "nine", which is "hires" with nine stacks."""
    return build(folder(kind), name=f"tiny-{kind}")


def image(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Random blocks of colour, different for each seed. size: (width, height) in pixels."""
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 256, (max(1, size[1] // 4), max(1, size[0] // 4), 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.NEAREST)


def ask(*parts: Image.Image | str) -> list[dict]:
    """One user message of images and texts in this order."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return [{"role": "user", "content": content}]
