"""What can be run: the embedded checkpoints that are here, and the released ones that are known, described not loaded.

Layouts come from configs through the families' own rules, parameters from file headers or from the model built without
memory. Knows nothing about devices or answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig, PreTrainedConfig, Qwen3VLConfig

from model.families import detect, families
from model.layout import Layout
from model.loading import check_files, embedded_names, find
from model.plan import BASE


@dataclass(frozen=True)
class Described:
    """One checkpoint: what it is and what it needs."""

    name: str
    family: str  # title
    here: bool  # False: would be downloaded
    layout: Layout
    parameters: int

    def bytes(self, dtype: torch.dtype) -> int:
        """Memory of the weights in this number format."""
        return self.parameters * dtype.itemsize

    def to_json(self) -> dict:
        """Plain values for `--json`."""
        stacks = [source for source in self.layout.sources if source.name != BASE]
        return {
            "name": self.name,
            "family": self.family,
            "here": self.here,
            "stacks": [{"stack": s.name, "from": s.label, "tap": s.tap, "own_code": s.own_words} for s in stacks],
            "default_plan": str(self.layout.default),
            "own_code": self.layout.convention,
            "vision_layers": self.layout.n_vision_layers,
            "llm_layers": self.layout.n_layers,
            "hidden_size": self.layout.hidden_size,
            "parameters": self.parameters,
            "bytes_bfloat16": self.bytes(torch.bfloat16),
            "bytes_float32": self.bytes(torch.float32),
        }


def describe_families() -> list[dict]:
    """The supported families: title, the model_type of their config.json, and what a checkpoint must have."""
    return [{"family": f.title, "model_types": list(f.model_types), "needs": f.needs} for f in families()]


def describe_models() -> list[Described]:
    """The embedded checkpoints, then the released ones by size."""
    described = []
    for name in embedded_names():
        folder = find(name)
        config = AutoConfig.from_pretrained(folder)
        check_files(folder, name)
        described.append(_describe(name, config, count(config), here=True))  # what is borrowed is in memory too
    for name, config in RELEASED.items():
        described.append(_describe(name, config(), count(config()), here=False))
    return described


def _describe(name: str, config: PreTrainedConfig, parameters: int, here: bool) -> Described:
    family = detect(config)
    return Described(name, family.title, here, family.layout_of(config)[0], parameters)


def count(config: PreTrainedConfig) -> int:
    """Parameters of a config's model, shared ones once; built on the meta device, which takes no memory."""
    with torch.device("meta"):
        model = detect(config).unfilled(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def _qwen3_vl(vision: tuple, taps: list[int], text: tuple, tied: bool):
    """A maker of a released Qwen3-VL config from the numbers of its config.json.

    vision: (blocks, width, MLP width); text: (layers, width, heads, MLP width). Eight key-value heads of 128 in all.
    """
    depth, width, inner = vision
    layers, hidden, heads, mlp = text

    def config() -> Qwen3VLConfig:
        return Qwen3VLConfig(
            vision_config={
                "depth": depth,
                "hidden_size": width,
                "intermediate_size": inner,
                "num_heads": 16,
                "out_hidden_size": hidden,
                "deepstack_visual_indexes": taps,
            },
            text_config={
                "num_hidden_layers": layers,
                "hidden_size": hidden,
                "num_attention_heads": heads,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "intermediate_size": mlp,
                "vocab_size": 151936,
                "tie_word_embeddings": tied,
            },
            tie_word_embeddings=tied,
        )

    return config


def _deepstack_llama(hd: bool):
    """A maker of the released config of DeepStack-L on Vicuna 7B, or of its HD form, with LLaVA-1.5's keys."""

    def config() -> PreTrainedConfig:
        config = PreTrainedConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            vocab_size=32000,
            tie_word_embeddings=False,
            image_aspect_ratio="deepstack",
            mm_hidden_size=1024,
            mm_projector_type="mlp2x_gelu",
            mm_vision_select_layer=-2,
            mm_vision_tower="openai/clip-vit-large-patch14-336",
            num_crops=4,
            is_anyres_deepstack=hd,
        )
        config.model_type = "deepstack_llama"
        return config

    return config


SMALL_TOWER, LARGE_TOWER = (24, 1024, 4096), (27, 1152, 4304)
RELEASED = {  # from the config.json of each checkpoint
    "Qwen/Qwen3-VL-2B-Instruct": _qwen3_vl(SMALL_TOWER, [5, 11, 17], (28, 2048, 16, 6144), True),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(SMALL_TOWER, [5, 11, 17], (36, 2560, 32, 9728), True),
    "menglc/deepstack-l-vicuna-7b": _deepstack_llama(hd=False),
    "menglc/deepstack-l-hd-vicuna-7b": _deepstack_llama(hd=True),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(LARGE_TOWER, [8, 16, 24], (36, 4096, 32, 12288), False),
    "Qwen/Qwen3-VL-32B-Instruct": _qwen3_vl(LARGE_TOWER, [8, 16, 24], (64, 5120, 64, 25600), False),
}
