"""Entries of the Qwen families without stacks: Qwen2-VL, Qwen2.5-VL and Qwen3.5, with experts too.

The first two folders have the flat config of the released checkpoints, with the LLM's numbers at the top level.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from tests import tiny
from tests.families import Entry
from tests.families.qwen import QWEN_PAD, forward, inputs


def text_of(tokenizer) -> dict:
    """A text_config as Qwen2's, with its multimodal positions."""
    text = {**tiny.qwen_text(tokenizer), "rope_parameters": None}
    del text["head_dim"]
    return {**text, "rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]}}


def flat(path: Path) -> None:
    """The config as it was released: the LLM's numbers beside the tower's, none of its own under text_config."""
    data = json.loads((path / "config.json").read_text())
    text = data.pop("text_config")
    text.pop("model_type")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    (path / "config.json").write_text(json.dumps({**text, **data}))


def pixels(path: Path) -> None:
    """The processor file as it was released, with its limits under their old names."""
    file = path / "preprocessor_config.json"
    data = json.loads(file.read_text())
    size = data.pop("size")
    data |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    file.write_text(json.dumps(data | {"image_processor_type": "Qwen2VLImageProcessor"}))


def flat_folder(path: Path, vision: dict, config_class, model_class, seed: int, processor: str, **more) -> None:
    """A folder as Qwen2-VL's and its successor's were released."""
    tokenizer = tiny._tokenizer(tiny.QWEN_SPECIAL, 400)
    vision = {"depth": 3, "num_heads": 2, "patch_size": 8, **vision}
    config = config_class(text_config=text_of(tokenizer), vision_config=vision, **tiny.qwen_tokens(tokenizer), **more)
    tiny.save_qwen(path, model_class(config), tokenizer, seed=seed)
    tiny.qwen_files(path, tokenizer, processor)
    flat(path)
    pixels(path)
    (path / "video_preprocessor_config.json").unlink()  # they have none


def qwen2_vl_folder(path: Path) -> None:
    vision = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    classes = (Qwen2VLConfig, Qwen2VLForConditionalGeneration)
    flat_folder(path, vision, *classes, 30, "Qwen2VLProcessor", tie_word_embeddings=True)


def qwen2_5_vl_folder(path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
    flat_folder(path, vision, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, 31, "Qwen2_5_VLProcessor")


def qwen3_5_folder(path: Path) -> None:
    write_qwen3_5(path, Qwen3_5Config, Qwen3_5ForConditionalGeneration, 32)


def qwen3_5_moe_folder(path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    experts |= {"shared_expert_intermediate_size": 24}
    write_qwen3_5(path, Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration, 33, **experts)


def write_qwen3_5(path: Path, config_class, model_class, seed: int, **more) -> None:
    """Linear attention in all layers but the fourth, as released, and the empty list of taps that no code reads."""
    tokenizer = tiny._tokenizer(tiny.QWEN_SPECIAL, 400)
    rope = {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.5}
    text = {
        **tiny.qwen_text(tokenizer),
        "rope_parameters": {**rope, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        **more,
    }
    vision = {**tiny.qwen_vision(()), "depth": 3}
    config = config_class(text_config=text, vision_config=vision, **tiny.qwen_tokens(tokenizer))
    tiny.save_qwen(path, model_class(config), tokenizer, seed=seed)
    tiny.qwen_files(path, tokenizer)


def entry(name: str, write, model_class: type[PreTrainedModel], **more) -> Entry:
    return Entry(name, write, model_class, inputs, default="base@0", pad_token=QWEN_PAD, forward=forward, **more)


ENTRIES = {
    "qwen2_vl": entry("qwen2_vl", qwen2_vl_folder, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": entry("qwen2_5_vl", qwen2_5_vl_folder, Qwen2_5_VLForConditionalGeneration),
    # A change of the image's rows by 1e-7 of their size moves its logits by 9e-5: the delta rule of random weights.
    "qwen3_5": entry("qwen3_5", qwen3_5_folder, Qwen3_5ForConditionalGeneration, rounding=30.0),
    "qwen3_5_moe": entry("qwen3_5_moe", qwen3_5_moe_folder, Qwen3_5MoeForConditionalGeneration, rounding=30.0),
}
