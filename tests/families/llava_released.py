"""Entries of the LLaVA class: CLIP or SigLIP before Llama, Mistral or Qwen2, prompts through the released processors.

The tokenizer of the first two puts a beginning-of-text token first, which their chat templates do not write.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import processors
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests import tiny
from tests.families import Entry

LLAMA = {"pad": "<pad>", "start": "<s>", "end": "</s>"}
QWEN = {"pad": "<|endoftext|>", "start": "<|im_start|>", "end": "<|im_end|>"}
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]

TEMPLATE = """{%- for message in messages %}
    {{- message.role.upper() + ': ' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}{{- '<image>\\n' }}{%- else %}{{- part.text }}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- ' ' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"""


def tokenizer_of(names: dict[str, str], more: tuple[str, ...] = ("<image>",), starts: bool = False):
    """A tokenizer with these special tokens; one that `starts` puts the start token before every text."""
    tokenizer = tiny._tokenizer((*names.values(), *more), 400)
    if starts:
        start = names["start"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=names["pad"],
        bos_token=names["start"],
        eos_token=names["end"],
        extra_special_tokens=list(more),
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def text_of(tokenizer: PreTrainedTokenizerFast, layers: int = 5) -> dict:
    """A text_config 64 wide."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def save(path: Path, model: PreTrainedModel, tokenizer, seed: int, template: str, image: dict, processor: dict) -> None:
    """Random weights in shards, tokenizer, chat template and processor files, as the hub holds them."""
    path.mkdir(parents=True, exist_ok=True)
    tiny._randomise(model, seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(path, max_shard_size="100KB")
    tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text(template)
    mean, std = [0.5, 0.45, 0.4], [0.25, 0.3, 0.25]
    pixels = {"image_mean": mean, "image_std": std, "rescale_factor": 1 / 255, **image}
    tiny._write(path, "preprocessor_config.json", {**pixels, "processor_class": processor["processor_class"]})
    tiny._write(path, "processor_config.json", processor)


def llava_folder(path: Path, **options: object) -> None:
    """LLaVA-1.5: CLIP without its class token, the centre square of the image."""
    tokenizer = tokenizer_of(LLAMA, starts=True)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=LlamaConfig(**text_of(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        **{"vision_feature_layer": -2, **options},
    )
    image = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
    }
    strategy = config.vision_feature_select_strategy
    processor = {"processor_class": "LlavaProcessor", "patch_size": 4, "num_additional_image_tokens": 1}
    processor["vision_feature_select_strategy"] = strategy
    save(path, LlavaForConditionalGeneration(config), tokenizer, 10, TEMPLATE, image, processor)


def llava_next_folder(path: Path) -> None:
    """LLaVA-1.6 on Mistral, its vision features from two layers."""
    tokenizer = tokenizer_of(LLAMA, starts=True)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=MistralConfig(**text_of(tokenizer), sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=[-2, -1],
    )
    image = {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
        "image_grid_pinpoints": PINPOINTS,
    }
    processor = {"processor_class": "LlavaNextProcessor", "patch_size": 4, "num_additional_image_tokens": 1}
    processor["vision_feature_select_strategy"] = "default"
    save(path, LlavaNextForConditionalGeneration(config), tokenizer, 11, TEMPLATE, image, processor)


def llava_onevision_folder(path: Path) -> None:
    """SigLIP and Qwen2; more than two tiles of tokens are shrunk."""
    tokenizer = tokenizer_of(QWEN, ("<image>", "<video>"))
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Qwen2Config(**text_of(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )
    image = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": 16, "width": 16},
        "image_grid_pinpoints": PINPOINTS,
    }
    processor = {"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 16}
    processor |= {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_2"}
    save(path, LlavaOnevisionForConditionalGeneration(config), tokenizer, 12, TEMPLATE, image, processor)


def chat(processor, messages: list[dict]) -> dict[str, Tensor]:
    """A conversation through the released processor's own chat route."""
    made = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    return {name: value for name, value in made.items() if name not in ("token_type_ids", "mm_token_type_ids")}


def inputs(folder: Path, messages: list[dict]) -> dict[str, Tensor]:
    return chat(AutoProcessor.from_pretrained(folder), messages)


def onevision_inputs(folder: Path, messages: list[dict]) -> dict[str, Tensor]:
    """By hand, since the processor's part for video needs torchvision; each placeholder as often as the model has rows.

    All images of a conversation go to the image processor as one list in a list, which is what the chat route does.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [p["image"] for m in messages if not isinstance(m["content"], str) for p in m["content"] if "image" in p]
    out = {}
    if images:
        out = dict(AutoImageProcessor.from_pretrained(folder, backend="pil")(images=[images], return_tensors="pt"))
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder).eval()
        with torch.no_grad():
            seen = model.model.get_image_features(**out).pooler_output
        for rows in seen:
            text = text.replace("<image>", "<here>" * len(rows), 1)
    ids = tokenizer(text.replace("<here>", "<image>"), return_tensors="pt", add_special_tokens=False)["input_ids"]
    return {**out, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def forward(plain: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """[T, V] of transformers' own forward, the tower run image by image: joint runs round differently."""
    inputs = dict(inputs)
    if len(inputs.get("pixel_values", ())) > 1:
        pixels = {name: inputs.pop(name) for name in ("pixel_values", "image_sizes") if name in inputs}
        counts = {name: inputs.pop(name) for name in ("batch_num_images",) if name in inputs}
        each = [
            plain.model.get_image_features(**{name: value[i : i + 1] for name, value in pixels.items()}, **counts)
            for i in range(len(pixels["pixel_values"]))
        ]
        inputs["mm_encoder_outputs"] = {"image": joined(each)}
    return plain(**inputs).logits[0]


def joined(each: list):
    """What `get_image_features` gives for all images, from what it gave for each."""
    joint = each[0]
    if joint.pooler_output is not None:
        joint.pooler_output = [torch.cat(list(seen.pooler_output)) for seen in each]
    if getattr(joint, "deepstack_features", None) is not None:
        joint.deepstack_features = [
            (layer, [seen.deepstack_features[k][1][0] for seen in each])
            for k, (layer, _) in enumerate(joint.deepstack_features)
        ]
    return joint


SINGLE = {"default": "base@0", "forward": forward}

ENTRIES = {
    "llava": Entry("llava", llava_folder, LlavaForConditionalGeneration, inputs, pad_token="<pad>", **SINGLE),
    "llava_next": Entry(
        "llava_next", llava_next_folder, LlavaNextForConditionalGeneration, inputs, pad_token="<pad>", **SINGLE
    ),
    "llava_onevision": Entry(
        "llava_onevision",
        llava_onevision_folder,
        LlavaOnevisionForConditionalGeneration,
        onevision_inputs,
        pad_token="<|endoftext|>",
        **SINGLE,
    ),
}
