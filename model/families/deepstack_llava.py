"""DeepStack-L on a LLaVA-shaped model: a global view, and a high-resolution view dilated into stacks.

CLIP tower, two-layer projector, Llama decoder (`LlavaForConditionalGeneration`), plus one config entry "deepstack":
{"merge": one of TRAINED, "num_crops": 4, "sampling": one of SAMPLINGS, "start": 1, "interval": 1}.
merge "none" sees the global view only; "concat" merges both views once, on the feature axis before the projector; the
other ways of the paper's experiments are the lab's (model/lab/ship.py): "dummy" has the global view for every stack,
"string" the high-resolution tokens row by row in the sequence, "global-string" the global ones before them, "average"
the mean of the samples on top of the global view. Two entries more are the lab's: "plan", the default plan in words,
where it is not the one of start and interval (learned gates are its gains); "tower", the embedded checkpoint whose
vision tower is this model's too and is not stored again, with "tower_mark", the digits of the tower it was trained on,
and "tower_change": true where training changed that tower, by the low-rank matrices in tower_change.safetensors.
The paper's own checkpoints are read into this shape by deepstack_llama.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import cached_file

from model.errors import UserError
from model.families import Family
from model.layout import Layout, StackSource
from model.lowrank import changed
from model.plan import BASE, Plan
from model.prompt import Prompt
from model.types import ImageGrid, Region, View

DEFAULTS = {
    "merge": "stack",
    "num_crops": 4,
    "sampling": "2d",
    "start": 1,
    "interval": 1,
    "plan": None,
    "tower": None,
    "tower_mark": None,
    "tower_change": False,
    "vit_start": None,
}
CHANGE = "tower_change.safetensors"
TRAINED = {
    "stack": "trained with stacks",
    "none": "trained single injection",
    "concat": "trained with one merge (dimension concatenation)",
    "dummy": "trained with the global view for every stack",
    "string": "trained with the high-resolution tokens in the sequence",
    "global-string": "trained with both views' tokens in the sequence",
    "average": "trained with one merge (the mean of the samples added)",
}
STACKED = ("stack", "dummy")  # the merges whose layout has stacks
SAMPLINGS = ("2d", "grid", "1d", "1d-sequential")  # how the high-resolution view is cut into sets, see `sample`
NOTES = {
    "stack": "A global view enters at the input, a dilated high-resolution view layer by layer.",
    "none": "Sees the global view only; it enters once, at the input.",
    "concat": "Sees the same pixels as the stacks, merged once on the feature axis; they enter once, at the input.",
    "dummy": "Sees the global view only; it enters at the input and again as every stack.",
    "string": "Sees the high-resolution view only; its tokens stand in the sequence, four times as many of a square.",
    "global-string": "Sees both views; the tokens of both stand in the sequence, five times as many of a square.",
    "average": "Sees the same pixels as the stacks; the mean of the samples is added to the global view, at the input.",
}
GLOBAL, HIGH = "global view", "high-resolution view"


class DeepStackLlava(Family):
    """`LlavaForConditionalGeneration` with a "deepstack" entry in its config."""

    name = "deepstack_llava"
    title = "DeepStack-L"
    model_types = ("llava",)
    needs = "a LLaVA-shaped folder whose config.json has a “deepstack” entry, as the embedded models have"
    fold_case = True  # the embedded models' chat template lower-cases user text

    def __init__(
        self, model: LlavaForConditionalGeneration, tokenizer, processor: CLIPImageProcessorPil, chat_template
    ):
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.chat_template = chat_template
        self.decoder = model.model.language_model
        self.settings = settings_of(model.config)
        self.layout, self.warnings = self.layout_of(model.config)
        self.trained = TRAINED[self.settings["merge"]]
        self.note = NOTES[self.settings["merge"]]
        if self.settings["tower"]:
            self.borrowed = model.model.vision_tower.num_parameters()
            later = " and changed in training" if self.settings["tower_change"] else ""
            self.note += f" Its tower was read from {self.settings['tower']}{later}."
        vision = model.config.vision_config
        self.tile = vision.image_size  # pixels, one side of a view or tile
        self.side = vision.image_size // vision.patch_size  # tokens, one side
        layers = model.config.vision_feature_layer
        self.vision_layer = layers if isinstance(layers, int) else layers[0]
        self._mean = np.asarray(processor.image_mean, dtype=np.float32)
        self._std = np.asarray(processor.image_std, dtype=np.float32)

    @classmethod
    def matches(cls, config: PreTrainedConfig) -> bool:
        return config.model_type in cls.model_types and isinstance(getattr(config, "deepstack", None), dict)

    @classmethod
    def parts(
        cls, source: str, options: dict[str, Any], hub: dict[str, Any]
    ) -> tuple[Any, LlavaForConditionalGeneration]:
        processor = CLIPImageProcessorPil.from_pretrained(source, **hub)
        model = LlavaForConditionalGeneration.from_pretrained(source, **options)
        settings = settings_of(model.config)
        if settings["tower"]:
            weights = shared_tower(settings["tower"], settings["tower_mark"])
            if settings["tower_change"]:
                weights = changed(weights, load_file(cached_file(source, CHANGE, **hub)))
            model.model.vision_tower.load_state_dict(weights)
        return processor, model

    @staticmethod
    def layout_of(config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        return layout_of(config)

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    def grid(self, image: Image.Image) -> tuple[int, int]:
        return self.side, self.side

    def regions(self, image: Image.Image, alone: bool = True) -> tuple[Region, ...]:
        if not self.settings["merge"].endswith("string"):
            return super().regions(image, alone)
        high = Region(self._shape(self.high_resolution(image)[1]), None, HIGH)
        return (high,) if self.settings["merge"] == "string" else (Region(self.grid(image), None, GLOBAL), high)

    def _shape(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Tiles as (rows, columns) -> tokens of the high-resolution view."""
        return grid[0] * self.side, grid[1] * self.side

    def positions(
        self, input_ids: Tensor, grids: Sequence[ImageGrid], images: Sequence[Image.Image]
    ) -> tuple[Tensor, int]:
        length = input_ids.shape[1]
        return torch.arange(length)[None], length

    def low_resolution(self, image: Image.Image) -> Image.Image:
        """The global view: the whole image squashed to one tile."""
        return image.resize((self.tile, self.tile), Image.Resampling.BICUBIC)

    def high_resolution(self, image: Image.Image) -> tuple[Image.Image, tuple[int, int]]:
        """The high-resolution view (stretched, not padded) and its tiles as (rows, columns)."""
        rows, columns = best_grid(image.size, self.tile, self.settings["num_crops"])
        size = (columns * self.tile, rows * self.tile)
        return image.resize(size, Image.Resampling.BICUBIC), (rows, columns)

    def _pixels(self, views: list[Image.Image]) -> Tensor:
        """Views of one tile each -> [B, 3, tile, tile], normalised."""
        pixels = np.stack([np.asarray(view, dtype=np.float32) for view in views]) / 255.0
        pixels = (pixels - self._mean) / self._std
        parameter = self.model.model.multi_modal_projector.linear_1.weight
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(parameter.device, parameter.dtype)

    def _states(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, tile, tile] -> the tower's hidden states, before layer 0, after layer 0, …"""
        return self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states

    def _features(self, pixels: Tensor) -> Tensor:
        """[B, 3, tile, tile] -> [B, side, side, vision width]: the tower's selected layer, without the class token."""
        return self._square(self._states(pixels)[self.vision_layer])

    def _square(self, states: Tensor) -> Tensor:
        """Hidden states of views -> [B, side, side, vision width]."""
        if self.model.config.vision_feature_select_strategy == "default":
            states = states[:, 1:]
        return states.unflatten(1, (self.side, self.side))

    def encode(self, image: Image.Image, names: Sequence[str]) -> dict[str, Tensor]:
        image = image.convert("RGB")
        project = self.model.model.multi_modal_projector
        merge, n_sets = self.settings["merge"], self.settings["num_crops"]
        if merge == "stack":
            found = {BASE: project(self._low(image))} if BASE in names else {}
            if set(names) - {BASE}:
                seen, grid = self._high(image)
                stacks = sample(mosaic(project(seen), grid), grid, n_sets, self.settings["sampling"])
                found |= {str(k): rows for k, rows in enumerate(stacks)}
            return found
        if merge == "string":
            seen, grid = self._high(image)
            return {BASE: mosaic(project(seen), grid).flatten(0, 1)}
        low = self._low(image)
        if merge == "none":
            return {BASE: project(low)}
        if merge == "dummy":
            base = project(low)
            return {BASE: base, **{str(k): base for k in range(n_sets)}}
        seen, grid = self._high(image)
        if merge == "concat":
            sets = sample(mosaic(seen, grid), grid, n_sets, self.settings["sampling"])
            return {BASE: project(torch.cat([low, *sets], dim=-1))}
        rows = mosaic(project(seen), grid)
        if merge == "global-string":
            return {BASE: torch.cat([project(low), rows.flatten(0, 1)])}
        stacks = sample(rows, grid, n_sets, self.settings["sampling"])  # merge "average"
        return {BASE: project(low) + torch.stack(stacks[: grid[0] * grid[1]]).mean(0)}

    def _low(self, image: Image.Image) -> Tensor:
        """The global view's tokens [N, vision width]. It goes alone, as in plain LLaVA: in a batch with the tiles its
        last bits would depend on them."""
        return self._features(self._pixels([self.low_resolution(image)])).flatten(0, 2)

    def _high(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """The tokens of the high-resolution view's tiles [B, side, side, vision width], and the tiles' grid."""
        high, grid = self.high_resolution(image)
        return self._features(self._pixels(tiles(high, self.tile))), grid

    def views(self, image: Image.Image) -> tuple[View, ...]:
        image = image.convert("RGB")
        merge = self.settings["merge"]
        low = View(GLOBAL, self.low_resolution(image), self.grid(image))
        if merge in ("none", "dummy"):
            return (low,)
        high, grid = self.high_resolution(image)
        shape = self._shape(grid)
        owners = owners_of(shape, grid, self.settings["sampling"]) if merge == "stack" else None
        seen = View(HIGH, high, shape, owners)
        return (seen,) if merge == "string" else (low, seen)

    def plain_inputs(self, prompt: Prompt) -> tuple[dict[str, Tensor], Plan] | None:
        if self.settings["merge"] not in (*STACKED, "none"):
            return None  # transformers would feed the global view alone, or as often as there are crops
        inputs = {"input_ids": prompt.input_ids, "attention_mask": torch.ones_like(prompt.input_ids)}
        if prompt.images:
            inputs["pixel_values"] = self._pixels(
                [self.low_resolution(image.convert("RGB")) for image in prompt.images]
            ).cpu()
        return inputs, Plan([(BASE, 0, 1.0)])


def best_grid(size: tuple[int, int], tile: int, num_crops: int) -> tuple[int, int]:
    """The paper's choice of tiles (rows, columns) for an image of `size` (width, height): 2 to num_crops."""
    height, width = select_best_resolution((size[1], size[0]), view_sizes(tile, num_crops))
    return height // tile, width // tile


def view_sizes(tile: int, num_crops: int) -> list[tuple[int, int]]:
    """The sizes (height, width) in pixels that a high-resolution view can have: 2 to num_crops tiles."""
    return [
        (rows * tile, columns * tile)
        for columns in range(1, num_crops + 1)
        for rows in range(1, num_crops // columns + 1)
        if (rows, columns) != (1, 1)
    ]


def tiles(image: Image.Image, tile: int) -> list[Image.Image]:
    """Cuts an image whose sides are multiples of `tile`, row-major."""
    return [
        image.crop((left, top, left + tile, top + tile))
        for top in range(0, image.height, tile)
        for left in range(0, image.width, tile)
    ]


def mosaic(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tiles [rows*columns, n, n, d] (row-major) -> one map [rows*n, columns*n, d]."""
    rows, columns = grid
    n, d = features.shape[1], features.shape[-1]
    return features.reshape(rows, columns, n, n, d).transpose(1, 2).reshape(rows * n, columns * n, d)


def sample(features: Tensor, grid: tuple[int, int], n_sets: int, sampling: str = "2d") -> list[Tensor]:
    """A map [rows*n, columns*n, d] -> n_sets sets [n*n, d]; those beyond rows*columns are zero and change nothing.

    "2d": set (i, j) = features[i::rows, j::columns], so that its tokens lie on the global view's. "1d", as the paper's
    code does it: every (rows*columns)-th token of the flattened map; "1d-sequential", as its text has it: one part of
    the flattened map after another. "grid": one tile each.
    """
    rows, columns = grid
    if sampling == "2d":
        sets = [features[i::rows, j::columns].flatten(0, 1) for i in range(rows) for j in range(columns)]
    elif sampling == "1d":
        sets = [features.flatten(0, 1)[k :: rows * columns] for k in range(rows * columns)]
    elif sampling == "1d-sequential":
        sets = [*features.flatten(0, 1).chunk(rows * columns)]
    else:
        sets = [tile.flatten(0, 1) for row in features.chunk(rows) for tile in row.chunk(columns, dim=1)]
    return sets + [torch.zeros_like(sets[0])] * (n_sets - len(sets))


def dealt(shape: tuple[int, int], grid: tuple[int, int], sampling: str) -> list[list[int]]:
    """Which tokens of a map of this shape (row-major) each set takes, in the order of the image's places."""
    cells = torch.arange(shape[0] * shape[1]).reshape(*shape, 1)
    return [taken.flatten().tolist() for taken in sample(cells, grid, grid[0] * grid[1], sampling)]


def owners_of(shape: tuple[int, int], grid: tuple[int, int], sampling: str) -> tuple[tuple[str, ...], ...]:
    """The stack that each token of a map of this shape goes into, by rows."""
    owners = torch.empty(shape[0] * shape[1], dtype=torch.long)
    for k, taken in enumerate(dealt(shape, grid, sampling)):
        owners[taken] = k
    return tuple(tuple(map(str, row)) for row in owners.reshape(shape).tolist())


def settings_of(config: PreTrainedConfig) -> dict:
    """The config's "deepstack" entry with the paper's defaults filled in; UserError where it cannot be run."""
    settings = {**DEFAULTS, **config.deepstack}
    if settings["merge"] not in TRAINED:
        raise UserError(f"deepstack.merge is {settings['merge']!r}; it must be one of {', '.join(TRAINED)}.")
    if settings["sampling"] not in SAMPLINGS:
        raise UserError(f"deepstack.sampling is {settings['sampling']!r}; it must be one of {', '.join(SAMPLINGS)}.")
    if settings["num_crops"] < 2 or settings["interval"] < 1 or settings["start"] < 0:
        raise UserError(f"deepstack needs num_crops ≥ 2, interval ≥ 1 and start ≥ 0, not {config.deepstack}.")
    return settings


def tower_mark(folder: Path) -> str:
    """Eight digits that change with the tower's weights in a checkpoint's folder, whatever lies beside them."""
    found = hashlib.sha256()
    with safe_open(folder / "model.safetensors", "pt") as weights:
        for name in sorted(name for name in weights.keys() if "vision_tower" in name):
            found.update(weights.get_tensor(name).numpy().tobytes())
    return found.hexdigest()[:8]


def shared_tower(name: str, mark: str | None) -> dict[str, Tensor]:
    """The weights of an embedded checkpoint's vision tower; UserError where it is not the one with this mark."""
    from model.loading import EMBEDDED, find

    if not str(name).startswith(f"{EMBEDDED}/"):
        raise UserError(f"deepstack.tower is {name!r}; it must name an embedded checkpoint, as embedded/hires.")
    folder = find(name)
    if tower_mark(folder) != mark:
        raise UserError(
            f"This model was trained on another vision tower ({mark}) than {name} has now ({tower_mark(folder)}); "
            "train and ship it again."
        )
    lender = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return lender.model.vision_tower.state_dict()


def set_label(k: int, num_crops: int, sampling: str) -> str:
    """Where set k lies in the high-resolution view of a square image."""
    if sampling != "2d":
        words = {"grid": f"tile {k}", "1d": f"sample {k} · tokens {k}::{num_crops}"}
        return words.get(sampling, f"sample {k} · run {k} of {num_crops}")
    side = round(num_crops**0.5)
    if side * side != num_crops:
        return f"sample {k} of the high-resolution view"
    return f"sample {k} · rows {k // side}::{side}, cols {k % side}::{side}"


def layout_of(
    config: PreTrainedConfig, family: str = DeepStackLlava.name, **other: object
) -> tuple[Layout, tuple[str, ...]]:
    """The layout a config gives, and warnings in words about stacks that its start and interval put nowhere.

    family: whose layout it is; other: settings that hold in place of the config's.
    """
    settings = settings_of(config) | other
    layers = config.text_config.num_hidden_layers
    start, interval = settings["start"], settings["interval"]
    merge, crops = settings["merge"], settings["num_crops"]
    seen = {"string": HIGH, "global-string": f"{GLOBAL}, then {HIGH}"}.get(merge, GLOBAL)
    sources = [StackSource(BASE, seen, None, 0, "put in place of the image tokens' embeddings")]
    entries = [(BASE, 0, 1.0)]
    late = []
    for k in range(crops if merge in STACKED else 0):
        layer = start + k * interval
        home = min(layer, layers - 1)
        words = f"added before LLM layer {layer} (start {start}, interval {interval})"
        label = f"{GLOBAL} again" if merge == "dummy" else set_label(k, crops, settings["sampling"])
        sources.append(StackSource(str(k), label, None, home, words))
        if layer < layers:
            entries.append((str(k), layer, 1.0))
        else:
            late.append(str(k))
    convention = "DeepStack-L's code adds stack k before LLM layer start + k·interval, the same convention as here."
    if merge not in STACKED:
        convention = "This model has no stacks: the image enters once, before LLM layer 0."
    default = Plan(entries)
    if settings["plan"] is not None:
        default = Plan.parse(settings["plan"])
        places = {entry.source: entry.layer for entry in reversed(default.entries)}
        sources = [_moved(source, places.get(source.name, source.home)) for source in sources]
    layout = Layout(
        family=family,
        sources=tuple(sources),
        n_layers=layers,
        n_vision_layers=config.vision_config.num_hidden_layers,
        hidden_size=config.text_config.hidden_size,
        default=default,
        convention=convention,
    )
    default.validate(layout)
    warnings = ()
    if late:
        warnings = (
            f"Stack {', '.join(late)} would enter before a layer that the LLM does not have (start {start}, interval "
            f"{interval}, layers 0 to {layers - 1}): the paper's loop never adds it, the default plan leaves it out.",
        )
    return layout, warnings


def _moved(source: StackSource, layer: int) -> StackSource:
    """A source whose home is another layer than start and interval say."""
    if layer == source.home:
        return source
    empty = "; zeros are put in place of the image tokens' embeddings" if source.name == BASE else ""
    return replace(source, home=layer, own_words=f"added before LLM layer {layer}{empty}")
