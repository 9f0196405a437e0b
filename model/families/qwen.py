"""What the Qwen3-VL class of families shares: stacks tapped after vision blocks, stack k added after LLM layer k.

"After layer k" is "before layer k+1" here. Taps come from the loaded config. Runs without torchvision: the PIL image
processor, the tokenizer and the chat template are loaded one by one. A video (`takes_video`) is read two frames at a
time: the tower and the positions of Qwen3-VL treat each two as an image of its own, so here they lie at image tokens
where transformers writes video tokens, with the same result. A family of the class is a declaration beside this file;
what a model does with sound, speech or drawing is not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as video_resize
from transformers.utils import cached_file

from model.clip import Clip, clip_of, frames_of
from model.errors import UserError
from model.families import Family
from model.layout import Layout, StackSource
from model.plan import BASE, TAP, Plan
from model.prompt import Prompt
from model.types import ImageGrid, Message, Region, View

CONTEXT = 128_000  # tokens, of which a whole video in one block takes nine tenths at most
VIDEO = "<|video_pad|>"  # what the released templates write for a video, inside the tokens that enclose an image
PROCESSORS_FILE = "processor_config.json"  # of a folder that transformers 5 wrote: all its processors in one
VIDEO_FILE = "video_preprocessor_config.json"
VIDEO_SIZE = {"shortest_edge": 4 * 32 * 32, "longest_edge": 24_576 * 32 * 32}  # pixels of a video, as released
FRAME_TOKENS = 768  # visual tokens of a frame, at most


class Qwen(Family):
    """A family whose model has Qwen3-VL's parts: `model.visual`, `model.language_model`, `get_image_features`.

    Subclasses name the classes of transformers; they are imported when a checkpoint is loaded, not before.
    """

    model_class: str  # of transformers: "Qwen3VLForConditionalGeneration"
    processor_class = "Qwen2VLImageProcessorPil"
    # Where a folder says how large a video may be: the first that it has and that says so.
    video_files: tuple[str, ...] = (PROCESSORS_FILE, VIDEO_FILE)
    video_size: Mapping[str, int] = VIDEO_SIZE  # how large where it says nothing
    needs = "a folder or hub id in the released format; no torchvision needed for images"

    def __init__(self, model: PreTrainedModel, tokenizer, processor, chat_template: str | None):
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.chat_template = chat_template
        self.decoder = model.model.language_model
        self.layout, self.warnings = self.layout_of(model.config)
        single = not self.layout.stack_names
        self.trained = "trained single injection" if single else "trained with stacks"
        self.note = (
            "Its config lists no taps: the image enters once, at the input."
            if single
            else f"Stacks are tapped after vision blocks {', '.join(map(str, self.taps))}."
        )

    @classmethod
    def parts(cls, source: str, options: dict[str, Any], hub: dict[str, Any]) -> tuple[Any, PreTrainedModel]:
        processor = getattr(transformers, cls.processor_class).from_pretrained(source, **hub)
        processor.video_size = video_size(source, hub, cls.video_files, cls.video_size)
        return processor, getattr(transformers, cls.model_class).from_pretrained(source, **options)

    @classmethod
    def layout_of(cls, config: PreTrainedConfig) -> tuple[Layout, tuple[str, ...]]:
        return tapped_layout(config, cls.name, cls.title)

    def render(self, messages: list[Message]) -> str:
        text = super().render(messages)
        return text.replace(VIDEO, self.image_token) if self.takes_video else text

    @property
    def taps(self) -> tuple[int, ...]:
        """Vision blocks whose output becomes a stack, in stack order."""
        return tuple(source.tap for source in self.layout.sources if source.tap is not None)

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    def _size(self, image: Image.Image) -> tuple[int, int]:
        """(height, width) after the processor's resize, pixels; of a video's frames."""
        clip = clip_of(image)
        width, height = image.size if clip is None else clip.size
        factor = self.processor.patch_size * self.processor.merge_size
        try:
            if clip is not None:
                return self._frame_size(len(clip.seconds), height, width, factor)
            least, most = self.processor.size["shortest_edge"], self.processor.size["longest_edge"]
            return smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)
        except ValueError as error:
            size = f"{width}×{height}"
            raise UserError(
                f"The image is {size} pixels, too long and narrow for {self.title} (at most 200:1). Crop it."
            ) from error

    def _frame_size(self, frames: int, height: int, width: int, factor: int) -> tuple[int, int]:
        """(height, width) of a video's frames after the resize, pixels, as Qwen's own code has it (qwen-vl-utils).

        The budget is the whole video's, and no frame takes more than FRAME_TOKENS; transformers' video processor has
        that as `cap_pixels_per_frame`. ValueError for a frame longer than 200:1.
        """
        together, size = self.processor.temporal_patch_size, self.processor.video_size
        count = max(frames, together)
        most = min(FRAME_TOKENS * factor**2, size["longest_edge"] // count)
        most = max(most, int(1.05 * size["shortest_edge"])) * count
        least = size["shortest_edge"]
        return video_resize(count, height, width, together, factor, min_pixels=least, max_pixels=most)

    def grid(self, image: Image.Image) -> tuple[int, int]:
        height, width = self._size(image)
        cell = self.processor.patch_size * self.processor.merge_size
        return height // cell, width // cell

    def regions(self, image: Image.Image, alone: bool = True) -> tuple[Region, ...]:
        clip = clip_of(image)
        if clip is None:
            return super().regions(image, alone)
        grid, together = self.grid(image), self.processor.temporal_patch_size
        times = self._times(clip)
        return tuple(Region(grid, clip.box(n * together), f"{time:.1f} s") for n, time in enumerate(times))

    def _times(self, clip: Clip) -> list[float]:
        """When the frames that are read together are shown, seconds: the mean of the first's and the last's."""
        together = self.processor.temporal_patch_size
        starts = range(0, len(clip.seconds), together)
        ends = [min(start + together, len(clip.seconds)) - 1 for start in starts]
        return [(clip.seconds[start] + clip.seconds[end]) / 2 for start, end in zip(starts, ends, strict=True)]

    def image_text(self, image: Image.Image, alone: bool = True) -> str:
        clip = clip_of(image)
        if clip is None:
            return super().image_text(image, alone)
        rows, columns = self.grid(image)
        visual = f"<|vision_start|>{self.image_token * (rows * columns)}<|vision_end|>"
        return "".join(f"<{time:.1f} seconds>{visual}" for time in self._times(clip))

    def pixels(self, image: Image.Image) -> dict[str, Tensor]:
        """The processor's `pixel_values` [patches, channels * frames * patch²] and `image_grid_thw` [views, 3]."""
        if clip_of(image) is None:
            return self.processor(images=[image], return_tensors="pt")
        height, width = self._size(image)
        frames = [frame.resize((width, height), Image.Resampling.BICUBIC) for frame in frames_of(image)]
        together, patch = self.processor.temporal_patch_size, self.processor.patch_size
        frames += frames[-1:] * (-len(frames) % together)
        seen = self.processor(images=frames, do_resize=False, return_tensors="pt")
        # Each frame was taken for a still image, which is repeated in time; one of each makes a patch of several.
        still = seen["pixel_values"].unflatten(1, (-1, together, patch**2))[:, :, 0]
        groups = still.unflatten(0, (len(frames) // together, together, -1))  # [group, frame, patches, channels, p²]
        values = groups.permute(0, 2, 3, 1, 4).flatten(2).flatten(0, 1)
        return {"pixel_values": values, "image_grid_thw": seen["image_grid_thw"][::together]}

    def encode(self, image: Image.Image, names: Sequence[str]) -> dict[str, Tensor]:
        inputs = self.pixels(image)
        seen = self.model.model.get_image_features(
            inputs["pixel_values"].to(self.model.device), inputs["image_grid_thw"].to(self.model.device)
        )
        stacks = {str(k): feature for k, feature in enumerate(getattr(seen, "deepstack_features", ()))}
        return {name: torch.cat(list(views)) for name, views in {BASE: seen.pooler_output, **stacks}.items()}

    def encode_taps(self, image: Image.Image, names: Sequence[str]) -> dict[str, Tensor]:
        inputs = self.pixels(image)
        tower, listed = self.model.model.visual, list(self.model.model.visual.config.deepstack_visual_indexes)
        states = tower(
            inputs["pixel_values"].to(tower.device, tower.dtype),
            grid_thw=inputs["image_grid_thw"].to(tower.device),
            output_hidden_states=True,
        ).hidden_states  # before block 0, after block 0, …
        taps = [self.layout.source(name).tap for name in names]
        mergers = [tower.deepstack_merger_list[listed.index(nearest(tap, self.taps))] for tap in taps]
        return {name: merger(states[tap + 1]) for name, tap, merger in zip(names, taps, mergers, strict=True)}

    def views(self, image: Image.Image) -> tuple[View, ...]:
        height, width = self._size(image)
        if (clip := clip_of(image)) is not None:
            together, grid = self.processor.temporal_patch_size, self.grid(image)
            frames = [frame.resize((width, height), Image.Resampling.BICUBIC) for frame in frames_of(image)[::together]]
            return tuple(
                View(f"at {time:.1f} s", frame, grid) for time, frame in zip(self._times(clip), frames, strict=True)
            )
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        return (View("what the model sees", resized, self.grid(image)),)

    def positions(
        self, input_ids: Tensor, grids: Sequence[ImageGrid], images: Sequence[Image.Image]
    ) -> tuple[Tensor, int | float]:
        length = input_ids.shape[1]
        if not grids:
            return torch.arange(length).expand(3, 1, length), length
        ids, delta = self._rope(input_ids, self._shapes(input_ids, grids, images))
        return ids, length + delta.item()

    def _rope(self, input_ids: Tensor, shapes: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """transformers' own position ids [3, 1, T] and their offset."""
        return self.model.model.get_rope_index(input_ids, **shapes)

    def _shapes(
        self, input_ids: Tensor, grids: Sequence[ImageGrid], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """What transformers makes positions of: token types [1, T], and (frames, rows, columns) of what lies there."""
        merge = self.processor.merge_size
        patches = [[1, grid.grid[0] * merge, grid.grid[1] * merge] for grid in grids]
        types = (input_ids == self.image_token_id).int()
        return {"mm_token_type_ids": types, **({"image_grid_thw": torch.tensor(patches)} if patches else {})}

    def plain_inputs(self, prompt: Prompt) -> tuple[dict[str, Tensor], Plan]:
        ids = prompt.input_ids
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs |= self._shapes(ids, prompt.grids, prompt.images)
        if prompt.images:
            inputs["pixel_values"] = torch.cat([self.pixels(image)["pixel_values"] for image in prompt.images])
        return inputs, self.layout.default


class OneBlock(Qwen):
    """What the families share to which a video is one block of tokens, without times between its frames.

    Where its frames lie in time their positions say, as the model's own code makes them of `_timing`. Each frame has a
    budget of its own, where Qwen3-VL's share one.
    """

    video_size = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}  # of a frame

    def _frame_size(self, frames: int, height: int, width: int, factor: int) -> tuple[int, int]:
        """(height, width) of a video's frames after the resize, pixels, as Qwen's own code has it (qwen-vl-utils).

        A frame has a budget, and an even share of the whole video's; transformers' video processor has that as
        `cap_pixels_per_frame`. ValueError for a frame longer than 200:1.
        """
        size = self.processor.video_size
        share = int(CONTEXT * factor * factor * 0.9) * self.processor.temporal_patch_size // frames
        most = max(min(size["longest_edge"], share), int(1.05 * size["shortest_edge"]))
        return smart_resize(height, width, factor=factor, min_pixels=size["shortest_edge"], max_pixels=most)

    def image_text(self, image: Image.Image, alone: bool = True) -> str:
        return Family.image_text(self, image, alone)  # of a video too

    def _shapes(
        self, input_ids: Tensor, grids: Sequence[ImageGrid], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """As Qwen3-VL's; a video is one shape, with its token type and how many seconds go by between two grids."""
        merge = self.processor.merge_size
        types = (input_ids == self.image_token_id).int()
        found: dict[str, list] = {}
        for index, image in enumerate(images):
            own = [grid for grid in grids if grid.index == index]
            shape = [len(own), own[0].grid[0] * merge, own[0].grid[1] * merge]
            if (clip := clip_of(image)) is None:
                found.setdefault("image_grid_thw", []).append(shape)
                continue
            found.setdefault("video_grid_thw", []).append(shape)
            for name, value in self._timing(clip).items():
                found.setdefault(name, []).append(value)
            for grid in own:
                types[0, grid.positions] = 2
        return {"mm_token_type_ids": types, **{name: torch.tensor(values) for name, values in found.items()}}

    def _timing(self, clip: Clip) -> dict[str, float]:
        """What the model is told of a video's time."""
        return {}

    def _own_ids(self, ids: Tensor, types: Tensor) -> Tensor:
        """The ids [1, T] as transformers reads them: video tokens where a video lies."""
        return ids.masked_fill(types == 2, self.model.config.video_token_id)

    def plain_inputs(self, prompt: Prompt) -> tuple[dict[str, Tensor], Plan]:
        inputs, plan = super().plain_inputs(prompt)
        videos = inputs["mm_token_type_ids"] == 2
        if videos.any():
            inputs["input_ids"] = self._own_ids(inputs["input_ids"], inputs["mm_token_type_ids"])
            del inputs["pixel_values"]
            for name, is_video in (("pixel_values", False), ("pixel_values_videos", True)):
                seen = [self.pixels(image) for image in prompt.images if (clip_of(image) is not None) == is_video]
                if seen:
                    inputs[name] = torch.cat([each["pixel_values"] for each in seen])
        return inputs, plan


def video_size(source: str, hub: Mapping[str, Any], files: Sequence[str], usual: Mapping[str, int]) -> dict[str, int]:
    """Pixels of a video, least and most, as the first of `files` that a folder or hub id has says; else the usual."""
    for file in files:
        path = cached_file(source, file, _raise_exceptions_for_missing_entries=False, **hub)
        said = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        if file == PROCESSORS_FILE:
            said = said.get("video_processor") or {}
        if said:
            edges = {"shortest_edge": said.get("min_pixels"), "longest_edge": said.get("max_pixels")}
            told = {edge: pixels for edge, pixels in edges.items() if pixels is not None}
            return {**usual, **(said.get("size") or {}), **told}
    return dict(usual)


def nearest(block: int, taps: Sequence[int]) -> int:
    """The trained tap nearest to a vision block, the shallower of two."""
    return min(taps, key=lambda tap: (abs(tap - block), tap))


def tapped_layout(
    config: PreTrainedConfig, family: str, title: str, by_place: bool = True
) -> tuple[Layout, tuple[str, ...]]:
    """The layout that a config's taps really give, and warnings in words where that is not what they say.

    config: one with `vision_config` and `text_config`; family, title: whose layout it is, and its name for people.

    The tower makes one stack per distinct in-range tap, in order of depth, through the merger at the tap's listed
    place, or, not `by_place`, stack k through merger k.
    """
    depth, layers = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
    listed = list(config.vision_config.deepstack_visual_indexes)
    taps = sorted({tap for tap in listed if 0 <= tap < depth})
    text = ", ".join(map(str, listed))
    warnings = []
    outside = [tap for tap in listed if not 0 <= tap < depth]
    if outside:
        warnings.append(
            f"The config taps vision block {', '.join(map(str, outside))}, but the blocks are 0 to {depth - 1}: "
            "the model makes no stack of it and gives no error."
        )
    repeated = sorted({tap for tap in taps if listed.count(tap) > 1})
    if repeated:
        how = "through its first merger; the other" if by_place else "and stack k goes through merger k; the last"
        warnings.append(
            f"The config lists vision block {', '.join(map(str, repeated))} more than once ({text}): "
            f"the model makes one stack of it, {how} merger is never used."
        )
    if taps != sorted(taps, key=listed.index):
        how = "each through the merger at its listed place" if by_place else "stack k through merger k all the same"
        warnings.append(
            f"The config lists its taps out of order ({text}): the model makes stacks in order of depth "
            f"({', '.join(map(str, taps))}), {how}."
        )
    late = [k for k in range(len(taps)) if k + 1 >= layers]
    if late:
        warnings.append(
            f"Stack {', '.join(map(str, late))} would be added after LLM layer {layers - 1} or later, where no answer "
            f"can depend on it (the LLM has layers 0 to {layers - 1}): the default plan leaves it out."
        )
    sources = [StackSource(BASE, "image embedding", None, 0, "put in place of the image tokens' embeddings")]
    for k, tap in enumerate(taps):
        home = min(k + 1, layers - 1)
        sources.append(StackSource(str(k), f"tap after vision block {tap}", tap, home, f"added after LLM layer {k}"))
    default = Plan([(BASE, 0, 1.0), *((str(k), k + 1, 1.0) for k in range(len(taps)) if k + 1 < layers)])
    layout = Layout(
        family=family,
        sources=tuple(sources),
        n_layers=layers,
        n_vision_layers=depth,
        hidden_size=config.text_config.hidden_size,
        default=default,
        convention=f"{title}'s code adds stack k after LLM layer k; that is before layer k+1 here.",
        untrained=untrained_taps(depth, {source.tap: source.home for source in sources[1:]}),
    )
    return layout, tuple(warnings)


def untrained_taps(depth: int, homes: Mapping[int, int], through: str = "merger") -> tuple[StackSource, ...]:
    """Sources for the vision blocks of which no stack was made, if any was made of others.

    homes: trained tap -> the LLM layer its stack enters before; through: what a tap goes through, for people.
    """
    found = []
    for block in range(depth if homes else 0):
        if block not in homes:
            near = nearest(block, tuple(homes))
            label = f"untrained tap after vision block {block}, through the {through} of block {near}"
            found.append(StackSource(f"{TAP}{block}", label, block, homes[near], "not in the model's own code"))
    return tuple(found)
