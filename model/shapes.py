"""Engines of true shapes with random weights: what a checkpoint costs on a machine that does not have it.

Layers, widths and heads are as in the released config, so times and memory are real (of Granite some are assumed, see
there); the weights are drawn at random and the tokenizer spells byte by byte, so what such a model says means nothing.
Knows nothing about what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, Qwen3VLConfig
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model.catalog import RELEASED, count, granite4_vision
from model.engine import Engine
from model.errors import UserError
from model.families import detect
from model.families.deepstack_llama import read_tower
from model.loading import (
    Progress,
    check_decode,
    check_memory,
    choose_attention,
    choose_device,
    choose_dtype,
    make_ready,
)

TEMPLATE = """{%- for message in messages %}
    {{- message.role + ': ' }}
    {%- for part in message.content %}
        {%- if part.type == 'image' %}{{- IMAGE }}{%- else %}{{- part.text }}{%- endif %}
    {%- endfor %}
    {{- '\\n' }}
{%- endfor %}
{{- 'assistant:' }}"""
HALF = [0.5, 0.5, 0.5]


class Shape(NamedTuple):
    """How one model is built: its config, its image processor, and the placeholder of an image."""

    config: Callable[[], PreTrainedConfig]
    processor: Callable[[PreTrainedConfig], Any]
    placeholder: str


def _qwen_pixels(config: PreTrainedConfig) -> Qwen2VLImageProcessorPil:
    """As released with Qwen3-VL: 256 to 65,536 pixels of 32 x 32 each."""
    vision = config.vision_config
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": 65536, "longest_edge": 16777216},
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        image_mean=HALF,
        image_std=HALF,
    )


def _tiny() -> Qwen3VLConfig:
    """Qwen3-VL's class, small enough for any machine: to try the command, not to measure."""
    vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    text = {"num_hidden_layers": 5, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"head_dim": 16, "intermediate_size": 96, "vocab_size": 512, "max_position_embeddings": 8192}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]}
    text["rope_parameters"]["mrope_interleaved"] = True
    return Qwen3VLConfig(vision_config=vision | {"deepstack_visual_indexes": [0, 1, 2]}, text_config=text)


def _granite_pixels(config: PreTrainedConfig) -> LlavaNextImageProcessorPil:
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    return LlavaNextImageProcessorPil(
        size=square, crop_size=square, image_grid_pinpoints=config.image_grid_pinpoints, image_mean=HALF, image_std=HALF
    )


def _clip_pixels(config: PreTrainedConfig) -> Any:
    return read_tower(config.mm_vision_tower)[1]


SHAPES = {
    "Qwen3-VL-2B": Shape(RELEASED["Qwen/Qwen3-VL-2B-Instruct"], _qwen_pixels, "<image>"),
    "Qwen3-VL-8B": Shape(RELEASED["Qwen/Qwen3-VL-8B-Instruct"], _qwen_pixels, "<image>"),
    "Granite-4-Vision": Shape(granite4_vision, _granite_pixels, "<image>"),
    "DeepStack-L-7B": Shape(RELEASED["menglc/deepstack-l-vicuna-7b"], _clip_pixels, "<unk>"),
    "tiny": Shape(_tiny, _qwen_pixels, "<image>"),
}


def build(
    name: str, *, device: str | None = None, dtype: str | None = None, attention: str | None = None,
    decode: str | None = None, progress: Progress | None = None,
) -> Engine:  # fmt: skip
    """An engine of this shape; UserError for an unknown name, and where its weights do not fit into memory.

    device, dtype, attention and decode as in `loading.load`.
    """
    known = {shape.lower(): shape for shape in SHAPES}
    if name.lower() not in known:
        raise UserError(f"There is no shape “{name}” for random weights; there are {', '.join(SHAPES)}.")
    name = known[name.lower()]
    shape = SHAPES[name]
    config = shape.config()
    parameters = count(config)
    where, why_device = choose_device(device)
    number, why_dtype = choose_dtype(dtype, where, parameters)
    check_memory(parameters * number.itemsize, where, name)
    choose_attention(attention, where, number)
    check_decode(decode)
    if progress:
        progress(0.5, f"drawing {parameters:,} weights of {name}")
    tokenizer = _tokenizer(shape.placeholder)
    family = detect(config)
    with _default(where, number):
        model = family.unfilled(config)
    model = model.to(where, number)
    marker = tokenizer.convert_tokens_to_ids(shape.placeholder)
    for key in ("image_token_id", "image_token_index"):
        if hasattr(model.config, key):
            setattr(model.config, key, marker)
    template = TEMPLATE.replace("IMAGE", f"'{shape.placeholder}'")
    adapter = family(model, tokenizer, shape.processor(config), template)
    reasons = (why_device, why_dtype, "random weights: speeds are real, answers are not")
    engine = Engine(adapter, name=f"{name} with random weights", reasons=reasons)
    make_ready(engine, attention, decode, progress=progress)
    return engine


def _tokenizer(placeholder: str) -> PreTrainedTokenizerFast:
    """One token per byte, and the special ones that a family asks for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict.fromkeys(("<s>", "</s>", "<unk>", placeholder))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        extra_special_tokens=[placeholder] if placeholder != "<unk>" else [], clean_up_tokenization_spaces=False,
    )  # fmt: skip


@contextmanager
def _default(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New tensors are made on this device and of this type, so that a large model is never held twice."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
