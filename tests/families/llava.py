"""Entries of the LLaVA-shaped families: DeepStack-L and DeepStack-V, whose stacks transformers alone does not know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedModel

from tests import tiny
from tests.families import Entry


def inputs(folder: Path, messages: list[dict]) -> dict[str, Tensor]:
    """What plain LLaVA takes: each image squashed to one tile, its placeholder repeated for each token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = text.replace("<image>", "<image>" * 16)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    images = [p["image"] for m in messages if not isinstance(m["content"], str) for p in m["content"] if "image" in p]
    if images:
        views = [image.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC) for image in images]
        pixels = (np.stack([np.asarray(view, dtype=np.float32) for view in views]) / 255 - 0.5) / np.float32(0.25)
        out["pixel_values"] = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return out


def forward(plain: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """[T, V] of transformers' own forward, the tower run image by image: joint runs round differently."""
    inputs = dict(inputs)
    if len(inputs.get("pixel_values", ())) > 1:
        each = [plain.model.get_image_features(pixels) for pixels in inputs.pop("pixel_values").split(1)]
        each[0].pooler_output = [seen.pooler_output[0] for seen in each]
        inputs["mm_encoder_outputs"] = {"image": each[0]}
    return plain(**inputs).logits[0]


def v_folder(path: Path) -> None:
    """A folder whose stacks enter its vision tower, as the lab ships one."""
    tiny.hires_folder(path, vision_layers=5, vit_start=1)


ENTRIES = {
    "deepstack_llava_v": Entry(
        "deepstack_llava_v",
        v_folder,
        LlavaForConditionalGeneration,
        inputs,
        default="base@0,v0@v1,v1@v2,v2@v3,v3@v4",
        pad_token="<pad>",
        own_plan="base@0",
        forward=forward,
    ),
    "deepstack_llava": Entry(
        "deepstack_llava",
        tiny.hires_folder,
        LlavaForConditionalGeneration,
        inputs,
        default="base@0,0@1,1@2,2@3,3@4",
        pad_token="<pad>",
        own_plan="base@0",
        forward=forward,
    ),
}
