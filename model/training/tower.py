"""Train the vision tower: read every patch of dense pages and scenes. Knows nothing about language models.

The tower is transformers' CLIP vision model; linear heads on its last hidden state name the characters, their place in
their string, the ink and the objects of each patch. The heads are thrown away. The twins share the frozen tower.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from model.training import pages, scenes
from model.training.muon import Muon

MEAN, STD = 0.5, 0.5  # pixel normalisation of all embedded models, per channel, for values in 0..1
WIDTH, LAYERS = 192, 5
DRAINED = 6  # sheets taken in at a step: drawing new ones must not cost as much as training
HEAD_WEIGHTS = {
    "left": 1.0,
    "right": 1.0,
    "left_index": 0.5,
    "right_index": 0.5,
    "ink": 0.3,
    "object": 0.2,
    "object_colour": 0.2,
}


PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # of what matrices are multiplied in


def accelerator_for(device: str | None) -> Accelerator:
    """Where to train, and how precisely; `device` "cpu" forces the CPU."""
    cuda = torch.cuda.is_available() and device != "cpu"
    fast = precision_on("cuda" if cuda else "cpu") == "bfloat16"
    return Accelerator(mixed_precision="bf16" if fast else "no", cpu=not cuda)


def precision_on(device: str) -> str:
    """In what training multiplies matrices on "cuda" or on this machine's "cpu": bfloat16 on CUDA and on CPUs that have
    instructions for it, where a step takes 0.22 instead of 0.36 s (AMX) or 0.23 instead of 0.40 (AVX-512 BF16), else
    float32. Both round what is multiplied alike and add in float32."""
    fast = device == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """What matrices are multiplied in, in the forward pass and in Muon's iteration."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def machine(device: str | None) -> dict[str, str | int]:
    """What a run was made on, for its recipe."""
    accelerator = accelerator_for(device)
    precision = precision_on(accelerator.device.type)
    return {"device": str(accelerator.device), "precision": precision, "threads": torch.get_num_threads()}


def config(width: int = WIDTH, layers: int = LAYERS) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        image_size=pages.TILE,
        patch_size=8,
        hidden_act="relu",
        projection_dim=width,
    )


def sine_positions(side: int, width: int) -> torch.Tensor:
    """Two-dimensional sine and cosine table `[side * side, width]`: neighbouring patches start out recognisable."""
    frequency = 1.0 / (100 ** (torch.arange(width // 4) / (width // 4)))
    angle = torch.arange(side)[:, None] * frequency[None]
    table = torch.cat([angle.sin(), angle.cos()], 1)
    rows = table[:, None, :].expand(side, side, -1)
    return torch.cat([rows, rows.transpose(0, 1)], 2).reshape(side * side, width)


class Reader(nn.Module):
    """Tower and its training heads: pixels `[B, 3, 64, 64]` to logits `[B, 64, classes]` per head."""

    def __init__(self, configuration: CLIPVisionConfig):
        super().__init__()
        self.tower = CLIPVisionModel._from_config(configuration, attn_implementation="eager")  # fastest to train
        embeddings = self.tower.embeddings if hasattr(self.tower, "embeddings") else self.tower.vision_model.embeddings
        side = configuration.image_size // configuration.patch_size
        with torch.no_grad():
            embeddings.position_embedding.weight[1:] = 0.5 * sine_positions(side, configuration.hidden_size)
            nn.init.normal_(embeddings.patch_embedding.weight, std=(3 * configuration.patch_size**2) ** -0.5)
        self.norm = nn.LayerNorm(configuration.hidden_size)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(configuration.hidden_size, classes) for name, classes in pages.HEADS.items()}
        )

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Last hidden state without the class token, `[B, 64, width]`: what the language model is given."""
        return self.tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.norm(self.features(pixels))
        return {name: head(hidden) for name, head in self.heads.items()}


def to_pixels(tiles: np.ndarray) -> torch.Tensor:
    """uint8 `[B, H, W, 3]` to normalised float `[B, 3, H, W]`."""
    return normalised(torch.from_numpy(np.ascontiguousarray(tiles)))


def normalised(tiles: torch.Tensor) -> torch.Tensor:
    """Pixels from 0 to 255 `[B, H, W, 3]` to what the tower is given, `[B, 3, H, W]`."""
    return (tiles.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def _make_sheets(queue, seed: int, low_only: bool, glyphs: dict[int, float]):
    """Background process: dense pages and scenes for ever."""
    os.nice(5)  # the trainer comes first; a sheet serves many tiles
    rng = np.random.default_rng(seed)
    while True:
        if not low_only and rng.random() < 0.6:
            queue.put(("page", pages.dense_page(rng, glyphs=glyphs)))
        else:
            scene = scenes.make_scene(rng, glyphs=glyphs)
            low, high = pages.scene_sheets(scene.image, scene.glyphs, scene.things)
            queue.put(("low", low))
            if not low_only:
                queue.put(("high", high))


class Sheets:
    """A growing pool of sheets that a background process draws; tiles of `side` pixels are cut from it at random.

    Which sheets are there at a step depends on the machine's speed, so a run is repeatable in kind, not bit by bit.
    """

    MOST = {"page": 2500, "low": 8000, "high": 8000}  # sheets kept; then a new one replaces a random one

    def __init__(
        self,
        seed: int,
        low_only: bool = False,
        held_out: int = 150,
        fewest: int = 40,
        side: int = pages.TILE,
        glyphs: dict[int, float] = pages.GLYPHS,
    ):
        """Draws `held_out` sheets for validation first, then waits for `fewest` of each kind."""
        context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
        self.queue = context.Queue(64)
        self.maker = context.Process(target=_make_sheets, args=(self.queue, seed, low_only, glyphs), daemon=True)
        self.maker.start()
        self.rng = np.random.default_rng(seed)
        self.side = side
        self.shares = {"low": 1.0} if low_only else {"page": 0.68, "high": 0.2, "low": 0.12}
        if side > pages.TILE:  # a global view is one small tile
            self.shares = {"page": 0.7, "high": 0.3}
        self.pool: dict[str, list] = {kind: [] for kind in self.shares}
        held = [self.queue.get() for _ in range(held_out)]
        self.validation = [(kind, sheet) for kind, sheet in held if kind in self.shares]
        while not all(len(sheets) >= fewest for sheets in self.pool.values()):
            self._keep(*self.queue.get())

    def _keep(self, kind: str, sheet):
        if kind not in self.shares:
            return
        sheets = self.pool[kind]
        if len(sheets) < self.MOST[kind]:
            sheets.append(sheet)
        else:
            sheets[self.rng.integers(len(sheets))] = sheet

    def sample(self, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Pixels `[count, 3, side, side]` and labels `[count, patches]` per head."""
        for _ in range(DRAINED):
            if self.queue.empty():
                break
            self._keep(*self.queue.get())
        tiles, labels = [], {head: [] for head in pages.HEADS}
        for kind in self.rng.choice(list(self.shares), count, p=list(self.shares.values())):
            tile, truth = self.pool[kind][self.rng.integers(len(self.pool[kind]))].random_tile(self.rng, self.side)
            tiles.append(tile)
            for head, values in truth.items():
                labels[head].append(values.reshape(-1))
        return to_pixels(np.stack(tiles)), {h: torch.from_numpy(np.stack(v)).long() for h, v in labels.items()}

    def close(self):
        self.maker.terminate()


def patch_loss(logits: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> torch.Tensor:
    """Weighted cross-entropy over all heads; patches with nothing to name count half."""
    total = 0.0
    for head, weight in HEAD_WEIGHTS.items():
        values, target = logits[head].flatten(0, 1).float(), truth[head].flatten()
        each = nn.functional.cross_entropy(values, target, reduction="none")
        total = total + weight * (each * (0.5 + 0.5 * (target > 0))).mean()
    return total


def train_tower(
    out: Path,
    steps: int,
    seed: int = 0,
    batch: int = 64,
    width: int = WIDTH,
    layers: int = LAYERS,
    low_only: bool = False,
    rate: float = 0.02,
    device: str | None = None,
    progress=None,
    log=print,
    reader: nn.Module | None = None,
    side: int = pages.TILE,
    glyphs: dict[int, float] = pages.GLYPHS,
) -> None:
    """Train for `steps` steps of `batch` tiles and write out/tower.pt with its heads; resumable, and done at once
    where done.

    With `low_only` the tower sees global views alone: its character accuracy is the ceiling of what they can tell.
    `reader` is a tower that has learned something, or one of another kind with the same heads, to be trained on tiles
    of `side` pixels. `glyphs` are the capital heights of its text, pixels, and their shares.
    """
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    reader = Reader(config(width, layers)) if reader is None else reader
    accelerator = accelerator_for(device)
    reader.to(accelerator.device)
    matrices = [p for n, p in reader.tower.named_parameters() if p.ndim == 2 and "embed" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in reader.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(matrices, lr=rate, dtype=compute_dtype(accelerator)),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    state, first, spent = out / "tower.pt", 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        reader.load_state_dict(saved["reader"])
        first, spent = saved["step"], saved["minutes"]
        if first >= steps:
            return
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
    short = max(2, steps // 10)  # a trial run does not wait for many sheets
    sheets = Sheets(seed + 1 + first, low_only, min(150, short), min(40, short), side, glyphs)
    started = time.time() - spent * 60
    for step in range(first, steps):
        factor = min(1.0, (step + 1) / 100, max(0.02, (1 - step / steps) / 0.5))
        for optimizer, rate_ in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate_ * factor
        pixels, truth = sheets.sample(batch)
        with accelerator.autocast():
            logits = reader(pixels.to(accelerator.device))
        loss = patch_loss(logits, {head: values.to(accelerator.device) for head, values in truth.items()})
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        if progress:
            progress((step + 1) / steps, f"tower step {step + 1} of {steps}, loss {loss.item():.3f}")
        if (step + 1) % 300 == 0 or step + 1 == steps:
            minutes = (time.time() - started) / 60
            record = {"step": step + 1, "minutes": round(minutes, 2), "loss": round(loss.item(), 4)}
            record |= validate(reader, sheets.validation, side)
            log(json.dumps(record))
            values = {"reader": reader.state_dict(), "config": reader.tower.config.to_dict()}
            torch.save(
                values | {"optimizers": [o.state_dict() for o in optimizers], "step": step + 1, "minutes": minutes},
                state,
            )
            with open(out / "tower.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
    sheets.close()


@torch.no_grad()
def validate(reader: nn.Module, sheets, side: int = pages.TILE) -> dict[str, float]:
    """Share of characters named rightly on held-out sheets, by kind of sheet, and the other heads' accuracy where
    there is something.
    """
    rng = np.random.default_rng(12345)
    hits: dict[str, list[float]] = {}
    for kind, sheet in sheets:
        tile, truth = sheet.random_tile(rng, side)
        logits = reader(to_pixels(tile[None]).to(next(reader.parameters()).device))
        for head, target in truth.items():
            target = torch.from_numpy(target.reshape(-1).astype(np.int64))
            filled = target > 0
            name = f"{kind}_chars" if head in ("left", "right") else head
            hits.setdefault(name, []).append(
                [float((logits[head][0].argmax(-1).cpu() == target)[filled].sum()), float(filled.sum())]
            )
    return {
        name: round(float(np.sum(values, 0)[0] / max(1.0, np.sum(values, 0)[1])), 4) for name, values in hits.items()
    }


def load_reader(out: Path) -> Reader:
    saved = torch.load(out / "tower.pt", weights_only=True)
    reader = Reader(CLIPVisionConfig(**saved["config"]))
    reader.load_state_dict(saved["reader"])
    return reader.eval().requires_grad_(False)


@torch.no_grad()
def legibility(reader: Reader, scenes_count: int, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """What a tower alone can tell of fine text on fresh scenes: view -> capital height in pixels of the high-resolution
    view -> share of `characters` named rightly and of whole `strings`, and how many strings there were.

    A string counts as read when each of its characters is named at the patch and half that hold its centre; where two
    share one, the label is the later one's, so this is an estimate from below for narrow letters.
    """
    found: dict[str, dict[float, list[tuple[float, bool]]]] = {"global": {}, "high-resolution": {}}
    for number in range(scenes_count):
        scene = scenes.make_scene(np.random.default_rng([seed, number]))
        heights = {question.string: question.glyph_px for question in scene.questions if question.string is not None}
        low, high = pages.scene_sheets(scene.image, scene.glyphs, scene.things)
        for view, sheet in (("global", low), ("high-resolution", high)):
            corners = range(0, sheet.pixels.shape[0], pages.TILE)
            tiles = {(x, y): sheet.tile(x, y)[0].copy() for y in corners for x in corners}
            logits = reader(to_pixels(np.stack(list(tiles.values()))).to(next(reader.parameters()).device))
            named = {half: logits[half].argmax(-1).view(len(tiles), -1).cpu() for half in ("left", "right")}
            strings: dict[int, list[bool]] = {}
            for glyph in sheet.glyphs:
                place = pages.place_of(glyph, sheet.pixels.shape[0])
                if glyph.string in heights and place is not None:
                    tile, patch, half = place
                    truth = pages.CHARACTERS.index(glyph.character) + 1
                    strings.setdefault(glyph.string, []).append(int(named[half][tile, patch]) == truth)
            for string, hits in strings.items():
                found[view].setdefault(heights[string], []).append((float(np.mean(hits)), all(hits)))
    return {
        view: {
            f"{height:g}": {
                "strings": round(float(np.mean([whole for _, whole in hits])), 3),
                "characters": round(float(np.mean([share for share, _ in hits])), 3),
                "n": len(hits),
            }
            for height, hits in sorted(heights_found.items())
        }
        for view, heights_found in found.items()
    }
