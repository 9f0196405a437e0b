"""Granite 4 Vision: eight stacks of one tower and no base; the deepest tap enters before layer 0, the rest higher up.

Traps: there is no image embedding at the input. The image rows start as zero vectors, so with every stack off the
picture is gone; what compares with the `base@0` of other families is the plan “deepest tap only”. The order is the
reverse of Qwen3-VL's: shallow taps enter the deep layers. The config counts the tower's hidden states, where 0 is the
patch embeddings and n the output of block n-1, and adds *before* LLM layer l, the convention used here. Two stacks for
one layer do not add up: the model's own code keeps the last. A block that is not in the config's map can be tapped
through the projector of the nearest one that is. Tokens lie as LLaVA-NeXT's do, row ends included.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig

from model.errors import UserError
from model.families.granite import Granite
from model.families.llava import check_tower
from model.families.llava_next import LlavaNext
from model.families.qwen import nearest, untrained_taps
from model.layout import Layout, StackSource
from model.plan import Plan

CORNERS = ("top left", "top right", "bottom left", "bottom right")  # of each 2×2 patches, one spatial stack each


class Granite4Vision(Granite, LlavaNext):
    """`Granite4VisionForConditionalGeneration`."""

    name = "granite4_vision"
    title = "Granite 4 Vision"
    model_types = ("granite4_vision",)

    def __init__(self, *args):
        super().__init__(*args)
        self.note = (
            "It has no base: the image rows are empty until a stack enters. With all stacks off the picture is gone; "
            "“deepest tap only” is its single injection."
        )

    @classmethod
    def layout_of(cls, config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        return layout_of(config)

    @property
    def side(self) -> int:
        return int(super().side * Fraction(self.model.config.downsample_rate))

    def sources(self, seen) -> dict[str, Tensor]:
        return {str(k): rows[0] for k, (_, rows) in enumerate(seen.deepstack_features)}

    def encode_taps(self, image: Image.Image, names: Sequence[str]) -> dict[str, Tensor]:
        inner, config = self.model.model, self.model.config
        pixels = {name: value.to(self.model.device) for name, value in self.pixels([image]).items()}
        states = inner.vision_tower(pixels["pixel_values"][0], output_hidden_states=True).hidden_states
        depth, strategy = config.vision_config.num_hidden_layers, config.vision_feature_select_strategy
        trained = {block_of(state, depth): k for k, (state, _) in enumerate(config.deepstack_layer_map)}
        found = {}
        for name in names:
            tap = self.layout.source(name).tap
            seen = states[tap + 1][:, 1:] if strategy == "default" else states[tap + 1]
            views = inner.layerwise_projectors[trained[nearest(tap, self.taps)]](seen)
            packed = inner.pack_image_features([views], pixels["image_sizes"], strategy, inner.image_newline)
            found[name] = packed[0]
        return found

    @property
    def taps(self) -> tuple[int, ...]:
        """Vision blocks of which the model makes a stack of its own; the four spatial ones share one."""
        return trained_taps(self.model.config)


def layout_of(config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
    """The layout that a config's two maps really give, and warnings in words where that is not what they say."""
    check_tower(config, Granite4Vision.title)
    depth, layers = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
    spatial = list(config.spatial_target_layers)
    if len(spatial) > len(CORNERS):
        raise UserError(f"The config lists {len(spatial)} spatial_target_layers, but the model makes {len(CORNERS)}.")
    pairs = [(state, layer, "") for state, layer in config.deepstack_layer_map or ()]
    pairs += [(config.spatial_vision_layer, layer, f" · {CORNERS[i]}") for i, layer in enumerate(spatial)]
    outside = [str(state) for state, _, _ in pairs if not -depth - 1 <= state <= depth]
    if outside:
        raise UserError(
            f"The config taps hidden state {', '.join(outside)} of the vision tower, which has 0 to {depth} "
            f"(or {-depth - 1} to -1): the model cannot run."
        )
    if not pairs:
        raise UserError("The config lists no deepstack_layer_map and no spatial_target_layers: no image could enter.")
    last = {layer: str(k) for k, (_, layer, _) in enumerate(pairs)}  # the model's own dict: later ones overwrite
    sources, entries, lost, late = [], [], [], []
    for k, (state, layer, corner) in enumerate(pairs):
        tap = block_of(state, depth)
        label = f"tap after vision block {tap}{corner}" if tap >= 0 else f"patch embeddings{corner}"
        home = min(max(layer, 0), layers - 1)
        sources.append(StackSource(str(k), label, tap if tap >= 0 else None, home, f"added before LLM layer {layer}"))
        if not 0 <= layer < layers:
            late.append(str(k))
        elif last[layer] != str(k):
            lost.append(f"{k} (overwritten by {last[layer]} at layer {layer})")
        else:
            entries.append((str(k), layer, 1.0))
    warnings = []
    if lost:
        warnings.append(
            f"Two stacks name the same LLM layer: the model adds only the last. Stack {', '.join(lost)} never "
            "enters and the default plan leaves it out."
        )
    if late:
        warnings.append(
            f"Stack {', '.join(late)} names a layer that the LLM does not have (it has 0 to {layers - 1}): the model "
            "never adds it and gives no error, the default plan leaves it out."
        )
    if not any(layer == 0 for _, layer, _ in entries):
        warnings.append("No stack enters before LLM layer 0: the image rows are zero vectors until the first one does.")
    layout = Layout(
        family=Granite4Vision.name,
        sources=tuple(sources),
        n_layers=layers,
        n_vision_layers=depth,
        hidden_size=config.text_config.hidden_size,
        default=Plan(entries),
        convention="Granite's code adds a stack before the LLM layer that its config names; the same is meant here.",
        untrained=untrained_taps(depth, {s.tap: s.home for s in sources if s.tap in trained_taps(config)}, "projector"),
    )
    return layout, tuple(warnings)


def block_of(state: int, depth: int) -> int:
    """The vision block whose output a hidden state is; -1 of the patch embeddings. state: counted from either end."""
    return (state if state >= 0 else depth + 1 + state) - 1


def trained_taps(config: PreTrainedConfig) -> tuple[int, ...]:
    """The vision blocks of `deepstack_layer_map`, in its order, each once."""
    depth = config.vision_config.num_hidden_layers
    found = (block_of(state, depth) for state, _ in config.deepstack_layer_map or ())
    return tuple(dict.fromkeys(block for block in found if block >= 0))
