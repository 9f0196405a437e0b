"""DeepStack-V: stacks enter the vision tower's own layers, and what comes out enters the LLM once.

A LLaVA-shaped folder (deepstack_llava.py) whose "deepstack" entry has "vit_start", as the lab ships them, or a
checkpoint of type `deepstack_llama` (deepstack_llama.py) whose `deepstack_args_for_ablation` name `deepstack_vit`. The
tiles of the high-resolution view go through the tower's first layers, up to vit_start or `lsvit_start_layer_N` (half of
them where the released config does not say); the tokens that they are there are dilated into sets, and set k is added
to the global view's tokens before vision layer N + k, the class token left alone. A plan writes them `v0@v12,v1@v13`
and may move, scale or drop each; it never moves the layer at which the sets are taken.

Traps: the selected hidden state, the released models' last but one, is the *input* of the last layer, with what is
added there. The released code stops on an image that it does not cut into num_crops square tiles (unless `2xsample`
says so) and where no start layer is given; here every image is cut so and the default holds. A start at the tower's
end, for which the code adds five layers of its own, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextvars import ContextVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, PreTrainedConfig

from model.errors import UserError
from model.families.deepstack_llama import DeepStackLlama, stack_scale
from model.families.deepstack_llava import (
    NOTES,
    DeepStackLlava,
    mosaic,
    owners_of,
    sample,
    set_label,
    settings_of,
    tiles,
)
from model.instrument import Injection, Pass, active, hook_layers
from model.layout import Layout, StackSource
from model.plan import BASE, VISION, Entry, Plan, enters_tower
from model.types import View

ARGUMENT = "deepstack_vit"
START = re.compile(r"lsvit_start_layer_([0-9]{1,4})")
NOTE = "A global view enters at the input; a dilated high-resolution view has entered the vision tower, layer by layer."
SQUARE = "2xsample"  # every image in num_crops square tiles, as they always are here


class _Reached(Exception):
    """The tower has come to the layer before which the sets are taken."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


_UNTIL_START: ContextVar[bool] = ContextVar("deepstack_lens_until_start", default=False)


def _stop_here(module: nn.Module, args: tuple) -> None:
    if _UNTIL_START.get():
        raise _Reached(args[0])


class DeepStackLlavaV(DeepStackLlava):
    """`LlavaForConditionalGeneration` whose "deepstack" entry says "vit_start"."""

    name = "deepstack_llava_v"
    needs = "a LLaVA-shaped folder whose config.json has a “deepstack” entry with vit_start, as the lab ships it"
    title = "DeepStack-V"

    def __init__(self, *parts):
        super().__init__(*parts)
        self.trained = "trained with stacks in its vision tower"
        self.note = self.note.replace(NOTES[self.settings["merge"]], NOTE)
        self.start = self.settings["vit_start"]
        self.scale = stack_scale(self.settings)
        layers = self.model.model.vision_tower.encoder.layers
        hook_layers(layers)
        layers[self.start].register_forward_pre_hook(_stop_here)

    @classmethod
    def matches(cls, config: PreTrainedConfig) -> bool:
        return super().matches(config) and settings_of(config)["vit_start"] is not None

    @classmethod
    def layout_of(cls, config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        check(config)
        return tower_layout(config, cls.name)

    def high_resolution(self, image: Image.Image) -> tuple[Image.Image, tuple[int, int]]:
        """The high-resolution view (stretched, not padded) and its tiles: as many rows as columns."""
        side = self.scale * self.tile
        return image.resize((side, side), Image.Resampling.BICUBIC), (self.scale, self.scale)

    def encode(
        self, image: Image.Image, names: Sequence[str], entering: Sequence[tuple[Entry, Tensor]] = ()
    ) -> dict[str, Tensor]:
        image = image.convert("RGB")
        found = self._sets(image) if any(map(enters_tower, names)) else {}
        if BASE in names:
            found[BASE] = self._base(image, entering)
        return found

    def _base(self, image: Image.Image, entering: Sequence[tuple[Entry, Tensor]]) -> Tensor:
        """The global view's rows for the LLM [N, d], with what enters the tower."""
        injections: dict[int, list[Injection]] = {}
        for entry, rows in entering:
            injections.setdefault(entry.layer, []).append(Injection(entry.source, (entry.gain,), rows))
        pixels = self._pixels([self.low_resolution(image)])
        current = Pass(injections, torch.arange(1, 1 + self.side**2, device=pixels.device))  # 0 is the class token
        with active(current):
            states = self._states(pixels)
        at = self.vision_layer % len(states)
        # A recorded state is the output of the layer before; only the first one already has what enters there.
        seen = current.before_layer(at, states[at]) if at else states[0]
        return self.model.model.multi_modal_projector(self._square(seen)).flatten(0, 2)

    def _sets(self, image: Image.Image) -> dict[str, Tensor]:
        """Vision stack -> [N, vision width]: the tiles' tokens before vision layer `start`, dilated."""
        high, grid = self.high_resolution(image)
        seen = self._square(self._until_start(self._pixels(tiles(high, self.tile))))
        sets = sample(mosaic(seen, grid), grid, self.settings["num_crops"])
        return {f"{VISION}{k}": rows for k, rows in enumerate(sets)}

    def _until_start(self, pixels: Tensor) -> Tensor:
        """[B, 3, tile, tile] -> the tower's hidden states before vision layer `start`; no layer from there on runs."""
        token = _UNTIL_START.set(True)
        try:
            self.model.model.vision_tower(pixels)
        except _Reached as reached:
            return reached.hidden
        finally:
            _UNTIL_START.reset(token)
        raise RuntimeError("the vision tower went past the layer before which its stacks are taken")

    def views(self, image: Image.Image) -> tuple[View, ...]:
        image = image.convert("RGB")
        high, grid = self.high_resolution(image)
        shape = (self.scale * self.side, self.scale * self.side)
        owners = tuple(tuple(f"{VISION}{k}" for k in row) for row in owners_of(shape, grid, "2d"))
        low = View("global view", self.low_resolution(image), self.grid(image))
        return low, View("high-resolution view", high, shape, owners)


class DeepStackV(DeepStackLlavaV, DeepStackLlama):
    """A checkpoint of type `deepstack_llama` whose stacks enter its vision tower."""

    name = "deepstack_v"
    title = "DeepStack-V as released"
    needs = "as DeepStack-L as released, with deepstack_vit among the config's deepstack_args_for_ablation"
    differs = (
        "The released code stops on images that it does not cut into a square of tiles; here every image is cut so."
    )

    @classmethod
    def matches(cls, config: PreTrainedConfig) -> bool:
        return config.model_type in cls.model_types and ARGUMENT in arguments_of(config)

    @classmethod
    def shaped(cls, config: PreTrainedConfig, vision: CLIPVisionConfig) -> LlavaConfig:
        """As DeepStack-L's, with the start layer as `vit_start`; UserError where it cannot be run."""
        start = start_of(config, vision.num_hidden_layers)
        plain = PreTrainedConfig.from_dict(config.to_dict() | {"deepstack_args_for_ablation": None})
        out = super().shaped(plain, vision)
        out.deepstack["vit_start"] = start
        check(out)
        return out

    @classmethod
    def layout_of(cls, config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        return tower_layout(cls.as_read(config), cls.name)


def check(config: LlavaConfig) -> None:
    """UserError for a config with a `vit_start` that cannot be run."""
    settings, depth = settings_of(config), config.vision_config.num_hidden_layers
    start, crops, hd = settings["vit_start"], settings["num_crops"], settings.get("hd", False)
    if stack_scale(settings) ** 2 != crops or hd:
        raise UserError(
            f"A DeepStack-V config has a square num_crops (4, 9 …) and no is_anyres_deepstack, not {crops} and {hd}; "
            "it cannot be run."
        )
    if not isinstance(start, int) or not 0 <= start < depth:
        raise UserError(
            f"The config.json starts its stacks at vision layer {start}, but the tower has layers 0 to {depth - 1}; "
            "the five layers that the released code adds at its end cannot be run here."
        )


def arguments_of(config: PreTrainedConfig) -> list[str]:
    """What the released code splits its `deepstack_args_for_ablation` into."""
    return [part for part in (getattr(config, "deepstack_args_for_ablation", None) or "").split("+") if part]


def start_of(config: PreTrainedConfig, depth: int) -> int:
    """The vision layer before which the first stack is to enter; UserError for arguments that cannot be run."""
    start = depth // 2
    for part in arguments_of(config):
        if found := START.fullmatch(part):
            start = int(found[1])
        elif part not in (ARGUMENT, SQUARE):
            raise UserError(
                f"The config.json says deepstack_args_for_ablation {config.deepstack_args_for_ablation!r}; of these "
                f"{part} cannot be run here, supported are {ARGUMENT}, {SQUARE} and lsvit_start_layer_N."
            )
    return start


def tower_layout(config: LlavaConfig, family: str) -> tuple[Layout, tuple[str, ...]]:
    """The layout of what a released config is read into, and warnings in words."""
    settings, depth = settings_of(config), config.vision_config.num_hidden_layers
    start, crops = settings["vit_start"], settings["num_crops"]
    entries: list[tuple[str, int, float]] = [(BASE, 0, 1.0)]
    stacks, late = [], []
    for k in range(crops):
        name, layer = f"{VISION}{k}", start + k
        label = f"{set_label(k, crops, '2d')}, as tokens before vision layer {start}"
        words = f"added before vision layer {layer}"
        stacks.append(StackSource(name, label, None, min(layer, depth - 1), words))
        if layer < depth:
            entries.append((name, layer, 1.0))
        else:
            late.append(name)
    base = StackSource(
        BASE, "global view, with what entered the tower", None, 0, "put in place of the image tokens' embeddings"
    )
    layout = Layout(
        family=family,
        sources=(base,),
        n_layers=config.text_config.num_hidden_layers,
        n_vision_layers=depth,
        hidden_size=config.text_config.hidden_size,
        default=Plan(entries),
        convention="DeepStack-V's code adds stack k before vision layer start + k, the same convention as here.",
        tower=tuple(stacks),
    )
    warnings = []
    if late:
        warnings.append(
            f"Stack {', '.join(late)} would enter before a layer that the vision tower does not have (start {start}, "
            f"layers 0 to {depth - 1}): the paper's loop never adds it, the default plan leaves it out."
        )
    if settings["sampling"] != "2d":
        warnings.append(
            f"The config asks for {settings['sampling']} sampling, which DeepStack-V does not look at: its view is "
            "always sampled 2d."
        )
    return layout, tuple(warnings)
