"""Entries of IBM's Granite families: stacks without a base, and a page in tiles with a base and stacks."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from torch import Tensor, nn
from transformers import (
    Blip2QFormerConfig,
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    Granite4VisionTextConfig,
    GraniteDoclingConfig,
    GraniteDoclingForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)

from tests.families import Entry
from tests.families.llava_released import forward, inputs, save, text_of, tokenizer_of

NAMES = {"pad": "<|pad|>", "start": "<|end_of_text|>", "end": "<|end_of_text|>"}
ROLES = ("<|start_of_role|>", "<|end_of_role|>")
SCALES = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 10.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0625,
}
VISION = {"intermediate_size": 48, "num_hidden_layers": 4, "image_size": 32, "patch_size": 4}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
LAYER_MAP, SPATIAL = ((-4, 3), (-3, 2), (-2, 1), (-1, 0)), (4, 5, 6, 7)

TEMPLATE = """{%- for message in messages %}
    {{- '<|start_of_role|>' + message.role + '<|end_of_role|>' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}{{- '<image>' }}{%- else %}{{- part.text }}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""


def granite4_vision_folder(path: Path, layer_map=LAYER_MAP, spatial=SPATIAL, layers: int = 8) -> None:
    """Four taps and four spatial stacks as released, the deepest to LLM layer 0."""
    tokenizer = tokenizer_of(NAMES, ("<image>", *ROLES))
    config = Granite4VisionConfig(
        vision_config=SiglipVisionConfig(hidden_size=64, num_attention_heads=2, vision_use_head=False, **VISION),
        text_config=Granite4VisionTextConfig(**text_of(tokenizer, layers), **SCALES),
        qformer_config=Blip2QFormerConfig(
            num_hidden_layers=1,
            intermediate_size=48,
            cross_attention_frequency=1,
            max_position_embeddings=64,
            use_qformer_text_input=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
        downsample_rate="4/8",
        deepstack_layer_map=[list(pair) for pair in layer_map],
        spatial_vision_layer=-1,
        spatial_target_layers=list(spatial),
    )
    image = {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"height": 32, "width": 32},
        "crop_size": {"height": 32, "width": 32},
        "image_grid_pinpoints": PINPOINTS,
    }
    processor = {"processor_class": "Granite4VisionProcessor", "patch_size": 4, "downsample_rate": "4/8"}
    processor["vision_feature_select_strategy"] = "full"
    save(path, Granite4VisionForConditionalGeneration(config), tokenizer, 20, TEMPLATE, image, processor)


def deepest_only(plain: PreTrainedModel) -> None:
    """Its two maps are emptied but for the entry to layer 0; projectors are told by their place."""
    plain.model.config.deepstack_layer_map = [LAYER_MAP[-1]]
    plain.model.config.spatial_target_layers = []
    plain.model.layerwise_projectors = nn.ModuleList([plain.model.layerwise_projectors[-1]])


@cache
def docling_tokenizer():
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    marks = ("<fake_token_around_image>", "<global-img>", *tiles)
    return tokenizer_of(NAMES, ("<image>", *ROLES, *marks))


def granite_docling_folder(path: Path, taps: tuple[int, ...] = (0, 1, 2), fine: bool = False) -> None:
    """Pages of up to four tiles of 2 x 2 tokens, 4 x 4 on the fine path."""
    tokenizer = docling_tokenizer()
    vision = {"hidden_size": 32, "num_attention_heads": 2, "out_hidden_size": 64, "scale_factor": 4, **VISION}
    config = GraniteDoclingConfig(
        vision_config={**vision, "deepstack_visual_indexes": list(taps)},
        text_config={**text_of(tokenizer), **SCALES},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    image = {
        "image_processor_type": "GraniteDoclingImageProcessor",
        "size": {"height": 32, "width": 32},
        "max_patches": 4,
        "fine_route": fine,
    }
    processor = {"processor_class": "GraniteDoclingProcessor", "image_seq_len": 4}
    save(path, GraniteDoclingForConditionalGeneration(config), tokenizer, 21, TEMPLATE, image, processor)


def docling_forward(plain: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """[T, V] of transformers' own forward, the tower run page by page: a page begins with tile 1, 1."""
    inputs = dict(inputs)
    ids = inputs["input_ids"][0]
    first = docling_tokenizer().convert_tokens_to_ids("<row_1_col_1>")
    starts = (ids == first).nonzero().flatten().tolist()
    if len(starts) > 1:
        pixels, image = inputs.pop("pixel_values"), ids == plain.config.image_token_id
        mask, per_tile = inputs.pop("pixel_attention_mask"), plain.model.image_seq_len
        sizes = [int(image[a:b].sum()) // per_tile for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
        pages = zip(pixels.split(sizes, dim=1), mask.split(sizes, dim=1), strict=True)
        each = [plain.model.get_image_features(page, real) for page, real in pages]
        joint = each[0]
        joint.pooler_output = [seen.pooler_output[0] for seen in each]
        stacks = range(len(joint.deepstack_features))
        joint.deepstack_features = [[seen.deepstack_features[k][0] for seen in each] for k in stacks]
        inputs["mm_encoder_outputs"] = {"image": joint}
    return plain(**inputs).logits[0]


def no_taps(plain: PreTrainedModel) -> None:
    plain.model.vision_model.config.deepstack_visual_indexes = []


ENTRIES = {
    "granite4_vision": Entry(
        "granite4_vision",
        granite4_vision_folder,
        Granite4VisionForConditionalGeneration,
        inputs,
        default="0@3,1@2,2@1,3@0,4@4,5@5,6@6,7@7",
        pad_token="<|pad|>",
        off=deepest_only,
        off_plan="3@0",
        forward=forward,
    ),
    "granite_docling": Entry(
        "granite_docling",
        granite_docling_folder,
        GraniteDoclingForConditionalGeneration,
        inputs,
        default="base@0,0@1,1@2,2@3",
        pad_token="<|pad|>",
        off=no_taps,
        forward=docling_forward,
        decoder=lambda plain: plain.model.text_model,
    ),
}
