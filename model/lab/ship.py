"""The model of a finished run as a folder that the app loads like any other: for Chat and Compare.

What is written is projector and decoder, and the changes of a tuned vision tower; the tower stays with the embedded
model that it is of, which the folder names (model/families/deepstack_llava.py). Knows nothing about cards and pages.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlavaConfig

from model import lowrank
from model.errors import UserError
from model.families.deepstack_llava import CHANGE, TRAINED
from model.lab import scenes
from model.lab.run import Job
from model.lab.twin import LabTwin
from model.lab.variants import LAST, SETS, Variant, first_layer, layers_of
from model.loading import EMBEDDED, LAB
from model.plan import BASE, Plan
from model.training.pages import TILE
from model.training.tokenizer import make_tokenizer
from model.training.train import CHECKPOINTS, export

# what of a variant the family can run; one that sets anything else has numbers only
RUN = {"name", "group", "words", "merge", "rows", "sampling", "start", "interval", "count", "base_at", "gate"}
RUN |= {"tuned", "tower_start", "guided"}
DIGITS = 4  # of a gate as the default plan's gain


def folder_of(variant: Variant, root: Path = CHECKPOINTS) -> Path:
    """Where the model of a variant is looked for, inside the folder of checkpoints."""
    return root / f"{LAB}{variant.name}"


def check(variant: Variant) -> None:
    """UserError for a variant that cannot be run outside its training."""
    own = [f.name for f in fields(Variant) if f.name not in RUN and getattr(variant, f.name) != f.default]
    own += ["merge"] * (variant.merge not in TRAINED) + ["gate"] * (variant.gate == "channel")
    if own:
        raise UserError(
            f"The lab variant {variant.name} cannot be shipped: no model of the app has its {', '.join(own)}; "
            "its numbers are in the table."
        )
    if variant.start == LAST:
        raise UserError(
            f"The lab variant {variant.name} cannot be shipped: its stack is added after the last layer, which no "
            "plan can say and no answer sees; none answers in the same way."
        )


def entry(variant: Variant, layers: int, gates: list[float] | None = None) -> dict:
    """What the config says of a variant with so many decoder `layers`, as the family reads it. gates: one number per
    stack where they are learned; they become the gains of the default plan."""
    check(variant)
    merge = "dummy" if variant.merge == "stack" and variant.rows == "global" else variant.merge
    if variant.tower_start is not None:
        return {"merge": "stack", "num_crops": SETS, "sampling": variant.sampling, "vit_start": variant.tower_start}
    found = {"merge": merge, "num_crops": SETS, "sampling": variant.sampling}
    found |= {"start": first_layer(variant, layers), "interval": variant.interval}
    gains = [1.0] * SETS if gates is None else [round(gate, DIGITS) for gate in gates]
    places = layers_of(variant, layers)
    if gates is not None or variant.base_at or (places and variant.count < SETS):
        entries = [(str(k), layer, gains[k]) for layer, k in places.items()]
        found["plan"] = str(Plan([(BASE, variant.base_at, 1.0), *entries]))
    return found


def trained(job: Job, workdir: Path, command: str = "") -> LabTwin:
    """What a finished run left in the work folder; UserError where it is not there or has not ended, with the `command`
    that trains it where that is given."""
    check(job.variant)
    file = job.folder(workdir) / "last.pt"
    saved = torch.load(file, weights_only=True, map_location="cpu") if file.exists() else {"step": 0}
    if saved["step"] < job.steps:
        how = f", or train it with {command}" if command else ""
        raise UserError(
            f"{job.name} has done {saved['step']:,} of {job.steps:,} steps in {workdir}; give the --workdir of a run "
            f"that has ended{how}."
        )
    vision = LlavaConfig.from_pretrained(scenes.TOWER).vision_config
    # The checkpoint brings the whitening that training made of other features.
    read, tower = torch.eye(vision.hidden_size)[None], None
    if job.variant.pixels:
        read, tower = torch.rand(2, 1 + SETS, TILE, TILE, 3) * 255, scenes.load_tower().tower
    twin = LabTwin(job.variant, vision, len(make_tokenizer()), read, job.size.width, job.size.layers, tower)
    twin.load_state_dict(saved["twin"])
    return twin.eval()


def ship(twin: LabTwin, out: Path, recipe: dict) -> Path:
    """Write a trained model as the folder `out`, `recipe` beside it; returns it. Folds the twin's whitening, merges the
    changes of its tower."""
    gates = twin.gates.detach().flatten().tolist() if twin.variant.gate == "scalar" else None
    layers = twin.model.config.text_config.num_hidden_layers
    lender = {"tower": f"{EMBEDDED}/{scenes.TOWER.name}", "tower_mark": scenes.tower_mark()}
    if twin.changes:
        lender["tower_change"] = True
        out.mkdir(parents=True, exist_ok=True)
        tower = twin.model.model.vision_tower
        save_file({name: change.half() for name, change in lowrank.changes(tower).items()}, out / CHANGE)
        lowrank.merge(tower)
    twin.model.config.deepstack = entry(twin.variant, layers, gates) | lender
    export(twin, scenes.load_tower(), out, recipe, whole=False)
    return out
