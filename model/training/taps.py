"""Train the Qwen3-VL shaped twins: `taps`, whose stacks are tapped from earlier blocks of the tower, and `taps-single`.

Both see the picture at 192 x 192 pixels as 576 patches merged into 144 visual tokens (four mergers of three by three
patches would hold 13 million weights), through the same frozen tower, with the same scenes, questions, steps and seed;
`taps-single` has no taps. The tower starts from the weights of the DeepStack-L models' CLIP tower where shapes allow,
and is trained on. Knows nothing about scoring or the page.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from model.training import dataset, packed, pages, tower, train, twins
from model.training.canvas import CHARACTERS, PATCH, SIDE
from model.training.tokenizer import QWEN, make_tokenizer

KEPT = (1, 2, 3)  # tower blocks (of 0 to 4) whose output is kept as a tap, beside the last one's
TAPS = {"taps": KEPT, "taps-single": ()}
PATCHES = SIDE // PATCH  # per side of the view
MERGE = 2  # patches per side of a visual token
GRID = PATCHES // MERGE  # visual tokens per side
LEAST_PIXELS, MOST_PIXELS = 180**2, 195**2  # of a resized upload: every square becomes 192 x 192, rounding or not
SHARDS = 3  # files of scenes, train.SHARD each: four maps of features a scene fill memory
TOWER_STEPS, TOWER_BATCH, TOWER_RATE = 600, 16, 0.01  # half the rate of a tower from nothing
STEPS = 2000  # of each language model, in one cycle of the rate
WATCHED, INSPECTED = (4, 5), 4  # layers that are shown where the answer is; input that must know the contents


def vision_configuration(taps: tuple[int, ...], like) -> Qwen3VLVisionConfig:
    """A tower as wide and deep as the CLIP tower of configuration `like`, for views of 24 x 24 patches."""
    return Qwen3VLVisionConfig(
        depth=like.num_hidden_layers,
        hidden_size=like.hidden_size,
        intermediate_size=like.intermediate_size,
        num_heads=like.num_attention_heads,
        hidden_act=like.hidden_act,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        temporal_patch_size=2,
        out_hidden_size=twins.WIDTH,
        num_position_embeddings=PATCHES**2,
        deepstack_visual_indexes=list(taps),
    )


def configuration(taps: tuple[int, ...], like, tokenizer, layers: int = 6) -> Qwen3VLConfig:
    width = twins.WIDTH
    image, video, start, end, stop, pad = tokenizer.convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>", "<|endoftext|>"]
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 352 * width // 128,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": stop,
        "pad_token_id": pad,
        "rope_parameters": {  # 100 turns per position suffice: a turn of a conversation has about 30 positions
            "rope_type": "default",
            "rope_theta": 100.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision_configuration(taps, like).to_dict(),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )


class Reader(tower.Reader):
    """Qwen3-VL's tower and the training heads: pixels `[B, 3, 192, 192]` to logits `[B, 576, classes]` per head."""

    def __init__(self, configuration: Qwen3VLVisionConfig):
        nn.Module.__init__(self)
        self.tower = Qwen3VLVisionModel(configuration)
        self.tower.merger.requires_grad_(False)  # each twin trains its own
        self.norm = nn.LayerNorm(configuration.hidden_size)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(configuration.hidden_size, classes) for name, classes in pages.HEADS.items()}
        )

    def blocks(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Output of every block, `[B, 576, width]` each, the patches of a visual token after one another."""
        batch, _, height, width = pixels.shape
        grid = torch.tensor([[1, height // PATCH, width // PATCH]] * batch, device=pixels.device)
        states = self.tower(patches(pixels), grid, output_hidden_states=True).hidden_states[1:]
        return tuple(state.view(batch, -1, state.shape[-1]) for state in states)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Last hidden state `[B, 576, width]`, row by row."""
        cells = PATCHES // MERGE
        state = self.blocks(pixels)[-1].unflatten(1, (cells, cells, MERGE, MERGE))
        return state.transpose(2, 3).flatten(1, 4)


def patches(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels `[B, 3, H, W]` as Qwen's image processor lays them out, `[B * patches, 3 * 2 * 8 * 8]`: the patches of a
    visual token after one another, each twice, as two frames of a film that stands still.
    """
    batch, colours, height, width = pixels.shape
    cell = PATCH * MERGE
    out = pixels.view(batch, colours, height // cell, MERGE, PATCH, width // cell, MERGE, PATCH)
    out = out.permute(0, 2, 5, 3, 6, 1, 4, 7)  # B, cell row, cell column, row, column, colour, y, x
    return out.unsqueeze(6).expand(*out.shape[:6], 2, PATCH, PATCH).reshape(-1, colours * 2 * PATCH * PATCH)


@torch.no_grad()
def warm_start(reader: Reader, old: tower.Reader, tiles: torch.Tensor) -> None:
    """Fill `reader` from a CLIP tower and its heads. tiles: `[B, 3, 64, 64]` pixels that show how large values are.

    Blocks are taken as they are; the table of 8 x 8 positions is laid out nine times. CLIP's norm before its blocks,
    which Qwen's tower lacks, goes into the patch embedding with its average scale: what remains is left to training.
    """
    clip, new = old.tower.state_dict(), reader.tower.state_dict()
    kernel = clip["embeddings.patch_embedding.weight"]
    table = clip["embeddings.position_embedding.weight"][1:]
    embedded = nn.functional.conv2d(tiles, kernel, stride=PATCH).flatten(2).transpose(1, 2) + table
    gain = clip["pre_layrnorm.weight"] / embedded.std(-1, correction=0).mean()
    kernel = (kernel - kernel.mean(0)) * gain[:, None, None, None]
    table = (table - table.mean(1, keepdim=True)) * gain
    new["patch_embed.proj.weight"] = kernel[:, :, None].expand(-1, -1, 2, -1, -1) / 2
    new["patch_embed.proj.bias"] = clip["pre_layrnorm.bias"]
    side = round(len(table) ** 0.5)
    new["pos_embed.weight"] = table.view(side, side, -1).repeat(PATCHES // side, PATCHES // side, 1).flatten(0, 1)
    for block in range(reader.tower.config.depth):
        for kind in ("weight", "bias"):
            at, to = f"encoder.layers.{block}", f"blocks.{block}"
            new[f"{to}.attn.qkv.{kind}"] = torch.cat([clip[f"{at}.self_attn.{x}_proj.{kind}"] for x in "qkv"])
            new[f"{to}.attn.proj.{kind}"] = clip[f"{at}.self_attn.out_proj.{kind}"]
            for k in (1, 2):
                new[f"{to}.norm{k}.{kind}"] = clip[f"{at}.layer_norm{k}.{kind}"]
                new[f"{to}.mlp.linear_fc{k}.{kind}"] = clip[f"{at}.mlp.fc{k}.{kind}"]
    reader.tower.load_state_dict(new)
    reader.norm.load_state_dict(old.norm.state_dict())
    reader.heads.load_state_dict(old.heads.state_dict())


def load_reader(out: Path) -> Reader:
    saved = torch.load(out / "tower.pt", weights_only=True)
    reader = Reader(Qwen3VLVisionConfig(**saved["config"]))
    reader.load_state_dict(saved["reader"])
    return reader.eval().requires_grad_(False)


@torch.no_grad()
def encode(reader: Reader, batch: dataset.Batch, chunk: int = 16) -> torch.Tensor:
    """Tower features of every scene, float16 `[n, 4, 576, width]`: after blocks 1, 2, 3 and after the last."""
    out = torch.empty(len(batch.high), len(KEPT) + 1, PATCHES**2, reader.tower.config.hidden_size, dtype=torch.float16)
    for start in range(0, len(out), chunk):
        blocks = reader.blocks(tower.to_pixels(batch.high[start : start + chunk]))
        out[start : start + chunk] = torch.stack([*(blocks[k] for k in KEPT), blocks[-1]], 1).half()
    return out


def questions_of(tokenizer) -> twins.Questions:
    """Questions as the chat template writes them."""
    return twins.Questions(tokenizer, "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", "\n<|im_start|>user\n")


class Twin(nn.Module):
    """The model of one variant and the training-only head. Its tower is unused: features come from the cache."""

    def __init__(self, taps: tuple[int, ...], like, tokenizer):
        super().__init__()
        self.model = Qwen3VLForConditionalGeneration(configuration(taps, like, tokenizer))
        visual = self.model.model.visual.requires_grad_(False)
        visual.merger.requires_grad_(True)
        visual.deepstack_merger_list.requires_grad_(True)
        width = self.model.config.text_config.hidden_size
        self.heads = packed.Heads(width, dataset.CONTENTS, len(CHARACTERS) + 1)
        self.lead = tokenizer("<|im_start|>user\n<|vision_start|>", add_special_tokens=False).input_ids
        self.closing = tokenizer("<|vision_end|>", add_special_tokens=False).input_ids

    @property
    def language(self) -> nn.Module:
        """The decoder's layers and embeddings."""
        return self.model.model.language_model

    def inject(self, features: torch.Tensor):
        """Features `[B, 4, 576, width]` to the base `[B, 144, d]` and stacks by layer: stack k before layer k + 1."""
        visual, batch = self.model.model.visual, len(features)
        mergers = [*visual.deepstack_merger_list]
        stacks = {
            k + 1: merger(features[:, k].contiguous()).view(batch, -1, visual.config.out_hidden_size)
            for k, merger in enumerate(mergers)
        }
        return visual.merger(features[:, -1]).view(batch, -1, visual.config.out_hidden_size), stacks

    def places(self, side: int) -> torch.Tensor:
        """Rotary positions `[3, prefix]` (time, row, column) of the tokens up to the questions, Qwen3-VL's."""
        first = len(self.lead)
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        image = first + torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1)
        closing = first + side + torch.arange(len(self.closing))
        return torch.cat([torch.arange(first).expand(3, -1), image, closing.expand(3, -1)], 1)

    def forward(self, features: torch.Tensor, rows: packed.Rows | None, dtype: torch.dtype = torch.float32):
        """Logits `[S, vocabulary]` at scored positions (None without rows) and the pass, layers computed in `dtype`."""
        base, stacks = self.inject(features)
        lead, closing = (torch.tensor(ids, device=features.device) for ids in (self.lead, self.closing))
        places = self.places(round(base.shape[1] ** 0.5))
        result = packed.forward(self.language, lead, base, stacks, rows, WATCHED, INSPECTED, closing, places, dtype)
        return None if rows is None else self.model.lm_head(result.hidden), result


def tower_stage(
    workdir: Path, steps: int, start_steps: int, sample: dataset.Batch, device, seed: int, progress
) -> Reader:
    """The frozen tower of both twins, in workdir/taps-tower. It starts from workdir/tower, which is made if need be."""
    out = workdir / "taps-tower"
    old = tower.load_reader(train.tower_stage(workdir, start_steps, device, seed, progress))
    torch.manual_seed(seed)
    reader = Reader(vision_configuration((), old.tower.config))
    warm_start(reader, old, tower.to_pixels(sample.high[:64, : pages.TILE, : pages.TILE]))
    options = {"batch": TOWER_BATCH, "rate": TOWER_RATE, "reader": reader, "side": SIDE}
    tower.train_tower(out, steps, seed=seed, device=device, progress=progress, **options)
    return load_reader(out)


def features_of(reader: Reader, file: Path, made_by: Path) -> tuple[dataset.Batch, torch.Tensor]:
    """A file of scenes, their pixels left out, with its tower features, made once, after the tower, kept beside it."""
    batch, kept = dataset.load(file), file.with_suffix(".taps.pt")
    if not kept.exists() or kept.stat().st_mtime < made_by.stat().st_mtime:
        torch.save(encode(reader, batch), kept)
    return batch.without_views(), torch.load(kept, weights_only=True, mmap=True)


def export(twin: Twin, reader: Reader, tokenizer, out: Path) -> None:
    """Write a folder in Qwen3-VL's released format: config, float16 weights, tokenizer, image processor, template."""
    out.mkdir(parents=True, exist_ok=True)
    model = twin.model
    own = {name: value for name, value in reader.tower.state_dict().items() if "merger" not in name}
    model.model.visual.load_state_dict(own, strict=False)
    stop, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [stop, pad], pad
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": LEAST_PIXELS, "longest_edge": MOST_PIXELS},
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        image_mean=[tower.MEAN] * 3,
        image_std=[tower.STD] * 3,
    )
    processor.save_pretrained(out)


def train_taps(
    name: str,
    *,
    workdir: Path,
    out: Path,
    steps: int | None = None,
    device: str | None = None,
    seed: int = 0,
    resume: bool = False,
    progress=None,
    tower_steps: int = TOWER_STEPS,
    start_steps: int = train.TOWER_STEPS,
    shards: int = SHARDS,
    per_shard: int = train.SHARD,
) -> Path:
    """Train `taps` or `taps-single` and write its folder `out`: data, tower, language model, export. Returns `out`.

    `steps` are the language model's; `tower_steps` the tower's, after `start_steps` of the CLIP tower that it starts
    from. Every stage goes on from what is in workdir; without `resume`, an earlier language model is dropped.
    """
    run, steps = workdir / name, steps or STEPS
    if not resume:
        for file in ("last.pt", "curve.jsonl"):
            (run / file).unlink(missing_ok=True)
    files, validation = train.data_stage(workdir, shards, progress, per_shard, folder="taps-data", grid=GRID)
    reader = tower_stage(workdir, tower_steps, start_steps, dataset.load(validation), device, seed, progress)
    made_by = workdir / "taps-tower" / "tower.pt"
    data = [features_of(reader, file, made_by) for file in files]
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(QWEN)
    twin = Twin(TAPS[name], tower.load_reader(workdir / "tower").tower.config, tokenizer)
    held_out = features_of(reader, validation, made_by)
    options = {"seed": seed, "device": device, "progress": progress}
    twins.fit(name, twin, questions_of(tokenizer), data, held_out, run, (steps,), **options)
    export(twin, reader, tokenizer, out)
    curves = {"curve.jsonl": run / "curve.jsonl", "tower.jsonl": workdir / "taps-tower" / "tower.jsonl"}
    for file, source in curves.items():
        (out / file).write_text(source.read_text())
    minutes = {
        "start of the tower": train.tower_curve(workdir)[1],
        "tower": _last(curves["tower.jsonl"])["minutes"],
        "language model": _last(curves["curve.jsonl"])["minutes"],
    }
    recipe = {
        "name": name,
        "taps": list(TAPS[name]),
        "seed": seed,
        "hours": round(sum(minutes.values()) / 60, 2),
        "scenes": shards * per_shard,
        **twins.shown((steps,)),
        "stages": [
            {
                "stage": "start of the tower",
                "what": "CLIP tower of the DeepStack-L models, from nothing: dense pages and scenes with patch labels",
                "steps": _last(workdir / "tower" / "tower.jsonl")["step"],
            },
            {
                "stage": "tower",
                "what": "its blocks, patch and position embeddings taken over, rotary positions added, norm before "
                "the blocks folded in; trained on by the same labels on views of 192 pixels; frozen, for both twins",
                "steps": tower_steps,
                "batch": TOWER_BATCH,
            },
            {
                "stage": "language model",
                "what": "mergers and decoder from nothing, on the frozen tower's cached features",
                "steps": steps,
                "batch": twins.BATCH,
                "questions_per_scene": twins.ROWS,
            },
        ],
        **tower.machine(device),
        "parameters": sum(p.numel() for p in twin.model.parameters()),
    }
    for stage in recipe["stages"]:
        stage["minutes"] = minutes[stage["stage"]]
    (out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    return out


def _last(curve: Path) -> dict:
    return json.loads(curve.read_text().splitlines()[-1])
