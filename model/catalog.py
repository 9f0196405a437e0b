"""What can be run: the embedded checkpoints that are here, and the released ones that are known, described not loaded.

Layouts come from configs through the families' own rules, parameters from the model built without memory. Of some
released checkpoints not every shape is known: their parameters are what their names say, and what else is missing
stands in their own configs. Knows nothing about devices or answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    AutoConfig,
    Blip2QFormerConfig,
    Granite4VisionConfig,
    Granite4VisionTextConfig,
    GraniteDoclingConfig,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
)

from model.families import detect, families
from model.families.llava import Llava
from model.families.qwen2_vl import SingleQwen
from model.layout import Layout
from model.loading import check_files, embedded_names, find
from model.plan import BASE, Plan

SINGLE = (SingleQwen, Llava)  # families without stacks, of which only Granite's has some
BASE_ALONE = str(Plan([(BASE, 0, 1.0)]))


@dataclass(frozen=True)
class Described:
    """One checkpoint: what it is and what it needs."""

    name: str
    family: str  # title
    needs: str  # what such a checkpoint must have
    here: bool  # False: would be downloaded
    layout: Layout | None  # None: to be read from its own config
    single: bool  # whether it has no stacks
    parameters: int | None  # None: not known here
    counted: bool = True  # False: what its name says

    def bytes(self, dtype: torch.dtype) -> int | None:
        """Memory of the weights in this number format."""
        return None if self.parameters is None else self.parameters * dtype.itemsize

    def to_json(self) -> dict:
        """Plain values for `--json`; None of what is not known here."""
        layout = self.layout
        sources = layout.sources if layout else ()
        stacks = [
            {"stack": source.name, "from": source.label, "tap": source.tap, "own_code": source.own_words}
            for source in sources
            if source.name != BASE
        ]
        plan = str(layout.default) if layout else BASE_ALONE if self.single else None
        return {
            "name": self.name,
            "family": self.family,
            "needs": self.needs,
            "here": self.here,
            "stacks": stacks if layout or self.single else None,
            "default_plan": plan,
            "own_code": layout.convention if layout else None,
            "vision_layers": layout.n_vision_layers if layout else None,
            "llm_layers": layout.n_layers if layout else None,
            "hidden_size": layout.hidden_size if layout else None,
            "parameters": self.parameters,
            "parameters_counted": self.counted and self.parameters is not None,
            "bytes_bfloat16": self.bytes(torch.bfloat16),
            "bytes_float32": self.bytes(torch.float32),
        }


def describe_families() -> list[dict]:
    """The supported families: title, the model_type of their config.json, and what a checkpoint must have."""
    return [{"family": f.title, "model_types": list(f.model_types), "needs": f.needs} for f in families()]


def describe_models() -> list[Described]:
    """The embedded checkpoints, then the released ones by size, those of unknown size last."""
    described = []
    for name in embedded_names():
        folder = find(name)
        config = AutoConfig.from_pretrained(folder)
        check_files(folder, name)
        described.append(_describe(name, config, count(config), here=True))  # what is borrowed is in memory too
    counts = {maker: count(maker()) for maker in dict.fromkeys(RELEASED.values())}
    released = [_describe(name, maker(), counts[maker], here=False) for name, maker in RELEASED.items()]
    released += [_partly(name, known) for name, known in PARTLY.items()]
    return described + sorted(released, key=lambda row: row.parameters or float("inf"))


def _describe(name: str, config: PreTrainedConfig, parameters: int, here: bool) -> Described:
    family = detect(config)
    layout = family.layout_of(config)[0]
    return Described(name, family.title, family.needs, here, layout, not layout.stack_names, parameters)


def _partly(name: str, known: Known) -> Described:
    family = next(family for family in families() if family.name == known.family)
    layout = family.layout_of(known.config())[0] if known.config else None
    single = not layout.stack_names if layout else issubclass(family, SINGLE)
    parameters = None if known.billions is None else round(known.billions * 1e9)
    return Described(name, family.title, family.needs, False, layout, single, parameters, counted=False)


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


def _qwen3_vl_moe(text: tuple, expert: int | None = None):
    """A maker of a released Qwen3-VL-MoE config: eight of 128 experts, each `expert` wide, 4 key-value heads of 128.

    text: (layers, width, heads). Without `expert` enough for the layout alone.
    """
    depth, width, inner = LARGE_TOWER
    layers, hidden, heads = text

    def config() -> Qwen3VLMoeConfig:
        vision = {"depth": depth, "hidden_size": width, "intermediate_size": inner, "num_heads": 16}
        return Qwen3VLMoeConfig(
            vision_config=vision | {"out_hidden_size": hidden, "deepstack_visual_indexes": [8, 16, 24]},
            text_config={
                "num_hidden_layers": layers,
                "hidden_size": hidden,
                "num_attention_heads": heads,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "vocab_size": 151936,
                **({"moe_intermediate_size": expert} if expert else {}),
            },
            tie_word_embeddings=False,
        )

    return config


def granite4_vision() -> Granite4VisionConfig:
    """ibm-granite/granite-vision-4.1-4b: SigLIP at 384 pixels below the 3B decoder of Granite 4.1.

    Known: width, layers and key-value heads of the decoder. Assumed: the q-former, the grids of
    tiles, the multipliers.
    """
    side = 384
    tiles = [(rows, columns) for rows in range(1, 11) for columns in range(1, 11) if rows * columns <= 10]
    return Granite4VisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=side,
            patch_size=16, vision_use_head=False,
        ),
        text_config=Granite4VisionTextConfig(
            vocab_size=100353, hidden_size=2560, intermediate_size=8192, num_hidden_layers=40, num_attention_heads=40,
            num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=True, embedding_multiplier=12.0,
            logits_scaling=10.0, residual_multiplier=0.22, attention_multiplier=0.015625,
        ),
        qformer_config=Blip2QFormerConfig(
            hidden_size=1152, encoder_hidden_size=1152, num_hidden_layers=1, num_attention_heads=18,
            intermediate_size=3072, cross_attention_frequency=1, max_position_embeddings=2048,
            use_qformer_text_input=False,
        ),
        image_grid_pinpoints=[[side * rows, side * columns] for rows, columns in tiles],
        vision_feature_select_strategy="full",
        downsample_rate="4/8",
        deepstack_layer_map=[[-19, 9], [-13, 6], [-7, 3], [-1, 0]],
        spatial_vision_layer=-1,
        spatial_target_layers=[12, 15, 18, 21],
    )  # fmt: skip


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
QWEN3_VL = {
    "2B": _qwen3_vl(SMALL_TOWER, [5, 11, 17], (28, 2048, 16, 6144), True),
    "4B": _qwen3_vl(SMALL_TOWER, [5, 11, 17], (36, 2560, 32, 9728), True),
    "8B": _qwen3_vl(LARGE_TOWER, [8, 16, 24], (36, 4096, 32, 12288), False),
    "32B": _qwen3_vl(LARGE_TOWER, [8, 16, 24], (64, 5120, 64, 25600), False),
    "30B-A3B": _qwen3_vl_moe((48, 2048, 32), expert=768),
}
QWEN3_VL_235B = _qwen3_vl_moe((94, 4096, 64))
EDITIONS = ("Instruct", "Thinking")  # of the same shapes
RELEASED = {  # from the config.json of each checkpoint
    **{f"Qwen/Qwen3-VL-{size}-{kind}": maker for size, maker in QWEN3_VL.items() for kind in EDITIONS},
    "menglc/deepstack-l-vicuna-7b": _deepstack_llama(hd=False),
    "menglc/deepstack-l-hd-vicuna-7b": _deepstack_llama(hd=True),
    # From transformers' defaults, where those are named after the checkpoint and count what its name says.
    "ibm-granite/granite-for-docling-500m": GraniteDoclingConfig,
    "llava-hf/llava-1.5-7b-hf": LlavaConfig,
    "Qwen/Qwen3.5-35B-A3B": Qwen3_5MoeConfig,
}


@dataclass(frozen=True)
class Known:
    """What is known of a released checkpoint without all of its shapes."""

    family: str  # its name in the registry
    billions: float | None = None  # of parameters, as its name says
    config: Callable[[], PreTrainedConfig] | None = None  # enough of its config for the layout


PARTLY = {
    **{f"Qwen/Qwen3-VL-235B-A22B-{kind}": Known("qwen3_vl_moe", 235, QWEN3_VL_235B) for kind in EDITIONS},
    **{f"Qwen/Qwen3-Omni-30B-A3B-{kind}": Known("qwen3_omni_moe", 30) for kind in EDITIONS},
    "nvidia/Cosmos3-Nano": Known("cosmos3_omni"),
    "CohereLabs/North-Micro-Vision-Instruct": Known("cohere_compass"),
    "ibm-granite/granite-4.0-3b-vision": Known("granite4_vision", 3, granite4_vision),
    "ibm-granite/granite-vision-4.1-4b": Known("granite4_vision", 4, granite4_vision),
    "Qwen/Qwen2-VL-7B-Instruct": Known("qwen2_vl", 7),
    "Qwen/Qwen2.5-VL-7B-Instruct": Known("qwen2_5_vl", 7),
    "Qwen/Qwen3.5-27B": Known("qwen3_5", 27),
    "llava-hf/llava-v1.6-mistral-7b-hf": Known("llava_next", 7, LlavaNextConfig),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": Known("llava_onevision", 7),
}
