"""Entries of the Qwen3-VL class: one tower with taps before five decoders, one way of writing prompts and patches.

Each folder has the weight names and config of its released checkpoints: the experts of Qwen3-VL-MoE joined and
transposed, those of Qwen3-Omni one by one below "thinker.", Cosmos' names without their prefixes and beside weights
that are not loaded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CohereCompassConfig,
    CohereCompassForConditionalGeneration,
    Cosmos3OmniConfig,
    Cosmos3OmniForConditionalGeneration,
    PreTrainedModel,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests import tiny
from tests.families import Entry

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}


def inputs(folder: Path, messages: list[dict], placeholder: str = "<|image_pad|>") -> dict[str, Tensor]:
    """What the released processor makes: the placeholder repeated in the text, patches, grids, token types."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, chat_template=template)
    images = [p["image"] for m in messages if not isinstance(m["content"], str) for p in m["content"] if "image" in p]
    out = {}
    if images:
        out = dict(Qwen2VLImageProcessorPil.from_pretrained(folder)(images=images, return_tensors="pt"))
        for grid in out["image_grid_thw"]:
            text = text.replace(placeholder, "<|here|>" * (int(grid.prod()) // 4), 1)
        text = text.replace("<|here|>", placeholder)
    out["input_ids"] = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    out["attention_mask"] = torch.ones_like(out["input_ids"])
    out["mm_token_type_ids"] = (out["input_ids"] == tokenizer.convert_tokens_to_ids(placeholder)).int()
    return out


def inputs_without_types(folder: Path, messages: list[dict]) -> dict[str, Tensor]:
    """Qwen3-Omni's: its positions come from the ids alone."""
    out = inputs(folder, messages)
    del out["mm_token_type_ids"]
    return out


def cohere_inputs(folder: Path, messages: list[dict]) -> dict[str, Tensor]:
    return inputs(folder, messages, "<|IMAGE_PAD|>")


def forward(plain: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """[T, V] of transformers' own forward, the tower run image by image: joint runs round differently (3e-6)."""
    inputs = dict(inputs)
    if len(inputs.get("image_grid_thw", ())) > 1:
        grids, sizes = inputs["image_grid_thw"], inputs["image_grid_thw"].prod(1).tolist()
        pixels = inputs.pop("pixel_values").split(sizes)
        each = [plain.model.get_image_features(p, g[None]) for p, g in zip(pixels, grids, strict=True)]
        joint = each[0]
        joint.pooler_output = [seen.pooler_output[0] for seen in each]
        stacks = range(len(getattr(joint, "deepstack_features", ())))
        joint.deepstack_features = [[seen.deepstack_features[k][0] for seen in each] for k in stacks]
        inputs["mm_encoder_outputs"] = {"image": joint}
    return plain(**inputs).logits[0]


def no_taps(plain: PreTrainedModel) -> None:
    """The tower makes a stack for each block in this list, so for none in an empty one."""
    plain.model.visual.deepstack_visual_indexes = []


def _shards(path: Path) -> dict[str, Tensor]:
    """All weights of a folder; its shards and their index are removed."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    return tensors


def _save_shards(path: Path, tensors: dict[str, Tensor], shards: int = 3) -> None:
    """These weights as so many shards with an index, under exactly these names."""
    names = sorted(tensors)
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[i::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def qwen3_vl_moe_folder(path: Path, taps: tuple[int, ...] = (0, 1, 2), layers: int = 5) -> None:
    tokenizer = tiny._tokenizer(tiny.QWEN_SPECIAL, 400)
    config = Qwen3VLMoeConfig(
        text_config={**tiny.qwen_text(tokenizer, layers), **EXPERTS, "mlp_only_layers": []},
        vision_config=tiny.qwen_vision(taps),
        tie_word_embeddings=False,
        **tiny.qwen_tokens(tokenizer),
    )
    tiny.save_qwen(path, Qwen3VLMoeForConditionalGeneration(config), tokenizer, seed=1)
    tiny.qwen_files(path, tokenizer)


def qwen3_omni_moe_folder(path: Path, taps: tuple[int, ...] = (0, 1, 2), layers: int = 5) -> None:
    """The whole model's folder: the thinker's weights below "thinker.", beside a talker that is not looked at."""
    special = (*tiny.QWEN_SPECIAL, "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>")
    tokenizer = tiny._tokenizer(special, 400)
    config = Qwen3OmniMoeThinkerConfig(
        text_config={**tiny.qwen_text(tokenizer, layers), **EXPERTS},
        vision_config=tiny.qwen_vision(taps),
        audio_config={
            "num_mel_bins": 8,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "d_model": 16,
            "output_dim": 64,
            "downsample_hidden_size": 8,
            "max_source_positions": 16,
        },
        audio_token_id=tokenizer.token_to_id("<|audio_pad|>"),
        audio_start_token_id=tokenizer.token_to_id("<|audio_start|>"),
        position_id_per_seconds=13,  # as released; 25 where a config says nothing
        **tiny.qwen_tokens(tokenizer),
    )
    tiny.save_qwen(path, Qwen3OmniMoeThinkerForConditionalGeneration(config), tokenizer, seed=2)
    weights = {}
    for name, tensor in _shards(path).items():
        name = name.removeprefix("thinker.")
        name = re.sub(r"^model\.(visual|audio_tower)", r"\1", name)
        name = name.replace("model.language_model.", "model.")
        weights[f"thinker.{name}"] = tensor
    _save_shards(path, {**weights, "talker.model.norm.weight": torch.ones(8), "code2wav.bias": torch.ones(8)})
    thinker = json.loads((path / "config.json").read_text())
    whole = {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "enable_audio_output": True,
        "thinker_config": thinker,
        "im_start_token_id": tokenizer.token_to_id("<|im_start|>"),
        "im_end_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    (path / "config.json").write_text(json.dumps(whole))
    tiny.qwen_files(path, tokenizer, "Qwen3OmniMoeProcessor")


COSMOS_NAMES = {  # of transformers' model -> of the unified checkpoint
    r"^model\.language_model\.": "",
    r"^model\.visual\.": "",
    r"\.self_attn\.([qkv])_proj\.": r".self_attn.to_\1.",
    r"\.self_attn\.o_proj\.": ".self_attn.to_out.",
    r"\.self_attn\.([qk])_norm\.": r".self_attn.norm_\1.",
}


def cosmos3_omni_folder(path: Path, taps: tuple[int, ...] = (0, 1, 2), layers: int = 5) -> None:
    """The unified checkpoint: the Reasoner under Diffusers' names, beside parts of a Generator."""
    tokenizer = tiny._tokenizer(tiny.QWEN_SPECIAL, 400)
    config = Cosmos3OmniConfig(
        text_config={**tiny.qwen_text(tokenizer, layers), "model_type": "qwen3_vl_text"},
        vision_config={**tiny.qwen_vision(taps), "model_type": "qwen3_vl_vision"},
        tie_word_embeddings=False,
        **tiny.qwen_tokens(tokenizer),
    )
    model = Cosmos3OmniForConditionalGeneration(config)
    tiny.save_qwen(path, model, tokenizer, seed=3)
    _shards(path)
    weights = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in COSMOS_NAMES.items():
            name = re.sub(pattern, replacement, name)
        weights[name] = tensor
    generator = {f"layers.{i}.self_attn.add_q_proj.weight": torch.ones(64, 64) for i in range(layers)}
    _save_shards(path, {**weights, **generator, "proj_in.weight": torch.ones(64, 8)})
    tiny.qwen_files(path, tokenizer)


COHERE_SPECIAL = (
    "<PAD>",
    "<BOS_TOKEN>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|VISION_START|>",
    "<|VISION_END|>",
    "<|IMAGE_PAD|>",
    "<|VIDEO_PAD|>",
)

COHERE_TEMPLATE = """{{- '<BOS_TOKEN>' }}
{%- set roles = {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>'} %}
{%- for message in messages %}
    {{- '<|START_OF_TURN_TOKEN|>' + roles[message.role] }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|VISION_START|><|IMAGE_PAD|><|VISION_END|>' }}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}
{%- endif %}
"""


def cohere_compass_folder(path: Path, taps: tuple[int, ...] = (0, 1, 2), layers: int = 5) -> None:
    """Three sliding layers to a full one without positions, as released; the window is shorter than a prompt."""
    tokenizer = tiny._tokenizer(COHERE_SPECIAL, 400)
    ids = {text: tokenizer.token_to_id(text) for text in COHERE_SPECIAL}
    text = tiny.qwen_text(tokenizer, layers)
    del text["head_dim"]
    config = CohereCompassConfig(
        text_config={
            **text,
            "pad_token_id": ids["<PAD>"],
            "bos_token_id": ids["<BOS_TOKEN>"],
            "eos_token_id": ids["<|END_OF_TURN_TOKEN|>"],
            "logit_scale": 0.25,
            "sliding_window": 8,
            "layer_types": ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)],
            "rope_parameters": {"sliding_attention": text["rope_parameters"], "full_attention": None},
        },
        vision_config=tiny.qwen_vision(taps),
        image_token_id=ids["<|IMAGE_PAD|>"],
        video_token_id=ids["<|VIDEO_PAD|>"],
        vision_start_token_id=ids["<|VISION_START|>"],
        vision_end_token_id=ids["<|VISION_END|>"],
        tie_word_embeddings=True,
    )
    model = CohereCompassForConditionalGeneration(config)
    tiny._randomise(model, seed=4)
    model.generation_config.eos_token_id = ids["<|END_OF_TURN_TOKEN|>"]
    model.generation_config.pad_token_id = ids["<PAD>"]
    model.save_pretrained(path, max_shard_size="200KB")
    tokenizer.save(str(path / "tokenizer.json"))
    tiny._write(
        path,
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<BOS_TOKEN>",
            "eos_token": "<|END_OF_TURN_TOKEN|>",
            "pad_token": "<PAD>",
            "additional_special_tokens": list(COHERE_SPECIAL[2:]),
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
        },
    )
    tiny._write(path, "chat_template.json", {"chat_template": COHERE_TEMPLATE})
    tiny.qwen_pixels(path, "CohereCompassProcessor", "CohereCompassImageProcessor")


DEFAULT = "base@0,0@1,1@2,2@3"
QWEN_PAD = "<|endoftext|>"
QWEN = {"default": DEFAULT, "pad_token": QWEN_PAD, "off": no_taps, "forward": forward}

ENTRIES = {
    "qwen3_vl": Entry("qwen3_vl", tiny.qwen3_vl_folder, Qwen3VLForConditionalGeneration, inputs, **QWEN),
    "qwen3_vl_moe": Entry("qwen3_vl_moe", qwen3_vl_moe_folder, Qwen3VLMoeForConditionalGeneration, inputs, **QWEN),
    "qwen3_omni_moe": Entry(
        "qwen3_omni_moe",
        qwen3_omni_moe_folder,
        Qwen3OmniMoeThinkerForConditionalGeneration,
        inputs_without_types,
        **QWEN,
    ),
    "cosmos3_omni": Entry("cosmos3_omni", cosmos3_omni_folder, Cosmos3OmniForConditionalGeneration, inputs, **QWEN),
    "cohere_compass": Entry(
        "cohere_compass",
        cohere_compass_folder,
        CohereCompassForConditionalGeneration,
        cohere_inputs,
        **{**QWEN, "pad_token": "<PAD>"},
    ),
}
