"""Make an embedded checkpoint again from nothing: draw scenes, train the tower, freeze it, train the language model,
export.

Twins share data, tower, steps and seed: whatever another run left in the work folder under the same settings is used
again, so `train hires` and then `train hires-single` trains the tower once. Knows nothing about scoring or the page.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from model.errors import UserError
from model.training import dataset, pages, tower, twins
from model.training.pages import TILE
from model.training.tokenizer import make_tokenizer

CHECKPOINTS = Path(__file__).resolve().parents[2] / "assets" / "checkpoints"
NAMES = (*twins.MERGE, "taps", "taps-single")
SHARD = 2500  # scenes in a file
SHARDS = 8
VALIDATION_SEED, TRAINING_SEED = 900_001, 1000  # test scenes use other seeds: see app/card.py
FIRST_TOWER_STEPS, FIRST_TOWER_RATE = 5200, 0.02  # of the tower on smaller text, from nothing
TOWER_STEPS, TOWER_RATE = 4000, 0.012  # of the tower after that, on text as tall as in scenes
STEPS = 9200
LOW_STEPS = 1500  # of a tower that sees global views alone
TOWER = "vision_tower."  # in the names of its weights
LEGIBILITY_SCENES, LEGIBILITY_SEED = 300, 7003


def check_name(name: str) -> None:
    """UserError unless there is a recipe of this name."""
    if name not in NAMES:
        raise UserError(f"There is no recipe for {name!r}; there are {', '.join(NAMES)}.")


def data_stage(
    workdir: Path, shards: int, progress, per_shard: int = SHARD, folder: str = "data", grid: int = dataset.GRID
):
    """Rendered scenes in workdir/folder: `shards` files for training and one for validation. grid: see
    `dataset.render`."""
    files = [workdir / folder / f"train-{k:03d}.pkl" for k in range(shards)]
    wanted = [(workdir / folder / "validation.pkl", min(500, per_shard), VALIDATION_SEED)]
    wanted += [(file, per_shard, TRAINING_SEED + k) for k, file in enumerate(files)]
    for number, (file, count, seed) in enumerate(wanted):
        if not file.exists():
            dataset.save(dataset.render(count, seed, grid=grid), file)
        if progress:
            progress((number + 1) / len(wanted), f"scenes {number + 1} of {len(wanted)} files")
    return files, workdir / folder / "validation.pkl"


def first_tower_steps(steps: int) -> int:
    """How many steps on smaller text go before `steps` on text as tall as in scenes."""
    return round(FIRST_TOWER_STEPS * steps / TOWER_STEPS)


def tower_stage(workdir: Path, steps: int, device, seed: int, progress) -> Path:
    """The tower that the twins share, in workdir/tower: from nothing on smaller text, then `steps` steps on text as
    tall as in scenes. Returns its folder."""
    first, out = workdir / "first-tower", workdir / "tower"
    options = {"seed": seed, "device": device, "progress": progress}
    begun = (out / "tower.pt").exists()
    if not begun:
        glyphs = pages.SMALLER_GLYPHS
        tower.train_tower(first, first_tower_steps(steps), rate=FIRST_TOWER_RATE, glyphs=glyphs, **options)
    reader = tower.load_reader(out if begun else first).train().requires_grad_(True)
    tower.train_tower(out, steps, rate=TOWER_RATE, reader=reader, **options)
    return out


def tower_curve(workdir: Path) -> tuple[str, float]:
    """What the stages of the shared tower logged, and the minutes they took."""
    stages = [workdir / folder / "tower.jsonl" for folder in ("first-tower", "tower")]
    curves = [file.read_text() for file in stages if file.exists()]
    return "".join(curves), round(sum(json.loads(curve.splitlines()[-1])["minutes"] for curve in curves), 2)


def features_of(reader: tower.Reader, file: Path) -> tuple[dataset.Batch, torch.Tensor]:
    """A file of scenes, their pixels left out, with its tower features, which are made once and kept beside it."""
    batch, kept = dataset.load(file), file.with_suffix(".features.pt")
    if kept.exists() and kept.stat().st_mtime > (file.parent.parent / "tower" / "tower.pt").stat().st_mtime:
        return batch.without_views(), torch.load(kept, weights_only=True, mmap=True)
    features = twins.encode(reader, batch)
    torch.save(features, kept)
    return batch.without_views(), features


def legibility_stage(workdir: Path, steps: int, out: Path, scenes: int, device, seed: int, progress) -> None:
    """Measure how far fine text is illegible in the global view and legible in the high-resolution one, without a
    language model: out/legibility.json.

    One tower is trained on global views alone; the frozen one that the twins share learned to read on larger text.
    """
    tower.train_tower(workdir / "low-tower", steps, seed=seed, low_only=True, device=device, progress=progress)
    alone, shared = (
        tower.legibility(tower.load_reader(workdir / folder), scenes, LEGIBILITY_SEED)
        for folder in ("low-tower", "tower")
    )
    found = {
        "scenes": scenes,
        "seed": LEGIBILITY_SEED,
        "low_only_steps": steps,
        "global view, tower trained on it alone": alone["global"],
        "global view, shared tower": shared["global"],
        "high-resolution view, shared tower": shared["high-resolution"],
    }
    (out / "legibility.json").write_text(json.dumps(found, indent=2) + "\n")


def export(twin: twins.Twin, reader: tower.Reader, out: Path, recipe: dict, whole: bool = True) -> None:
    """Write a folder that transformers loads: config, float16 safetensors, tokenizer, image processor, template.

    whole: False leaves the vision tower's weights out, where the config says of which folder they are.
    """
    out.mkdir(parents=True, exist_ok=True)
    twin.fold()
    model = twin.model
    model.model.vision_tower.load_state_dict(reader.tower.state_dict())
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 3, 0
    kept = {name: value for name, value in model.half().state_dict().items() if whole or TOWER not in name}
    model.save_pretrained(out, state_dict=kept)
    make_tokenizer().save_pretrained(out)
    size = {"height": TILE, "width": TILE}
    processor = CLIPImageProcessorPil(
        size=size,
        crop_size=size,
        do_center_crop=False,
        image_mean=[tower.MEAN] * 3,
        image_std=[tower.STD] * 3,
    )
    processor.save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")


def train(
    name: str,
    *,
    out: Path | None = None,
    steps: int | None = None,
    tower_steps: int | None = None,
    device: str | None = None,
    seed: int = 0,
    workdir: Path = Path("runs"),
    resume: bool = False,
    progress=None,
    shards: int = SHARDS,
    per_shard: int = SHARD,
) -> Path:
    """Train `name` and write its folder (default assets/checkpoints/NAME); returns it.

    `tower_steps` are the tower's, `steps` the language model's; `resume` goes on from what is in workdir.
    `progress(fraction, text)` is called as it goes. UserError for an unknown name, or a run that is there already.
    """
    check_name(name)
    out, run = out or CHECKPOINTS / name, workdir / name
    if (run / "last.pt").exists() and not resume:
        raise UserError(
            f"{run} holds an earlier run of {name}: go on with it by --resume, or choose another --workdir."
        )
    if name.startswith("taps"):
        from model.training.taps import train_taps

        options = {"device": device, "seed": seed, "resume": resume, "progress": progress}
        return train_taps(name, workdir=workdir, out=out, steps=steps, **options)
    steps, tower_steps = steps or STEPS, tower_steps or TOWER_STEPS
    files, validation = data_stage(workdir, shards, progress, per_shard)
    reader = tower.load_reader(tower_stage(workdir, tower_steps, device, seed, progress))
    data = [features_of(reader, file) for file in files]
    twin = twins.train_twin(
        name, reader, data, features_of(reader, validation), run, steps, seed=seed, device=device, progress=progress
    )
    curve = (run / "curve.jsonl").read_text()
    last = json.loads(curve.splitlines()[-1])
    tower_log, tower_minutes = tower_curve(workdir)
    recipe = {
        "name": name,
        "merge": twins.MERGE[name],
        "seed": seed,
        "scenes": shards * per_shard,
        **twins.shown(twins.cycle_ends(steps)),
        "training_losses": "answers; pointing at the answer; contents and question words of visual tokens",
        "tower_steps": [first_tower_steps(tower_steps), tower_steps],
        "tower_minutes": tower_minutes,
        "language_model_minutes": last["minutes"],
        "hours": round((tower_minutes + last["minutes"]) / 60, 2),
        **tower.machine(device),
        "parameters": sum(p.numel() for p in twin.model.parameters()),
    }
    export(twin, reader, out, recipe)
    (out / "curve.jsonl").write_text(curve)
    (out / "tower.jsonl").write_text(tower_log)
    if name == "hires-single":
        count = min(LEGIBILITY_SCENES, shards * per_shard)
        legibility_stage(workdir, min(LOW_STEPS, tower_steps), out, count, device, seed, progress)
    return out
