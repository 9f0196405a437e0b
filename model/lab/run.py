"""One run of the lab: train a variant, test it, measure what it costs, and say so in one record.

All runs of a size see the same scenes and questions in the same order of a seed. Knows nothing about other runs; many
at once: model/lab/many.py.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlavaConfig

from model.errors import UserError
from model.lab import cost, results, scenes, texts
from model.lab.text_twin import SPREAD, TextTwin
from model.lab.twin import RANK, LabTwin
from model.lab.variants import LAYERS, LONG, Variant, first_layer, variant_of
from model.training import dataset, twins
from model.training.scenes import Question
from model.training.tokenizer import make_tokenizer
from model.training.tower import PRECISIONS, accelerator_for, precision_on

SAMPLE, SAMPLE_PIXELS = 300, 100  # scenes whose features are measured first; fewer where the tower has to run for it
MOST = 30  # questions of a test scene: all of them


@dataclass(frozen=True)
class Size:
    """How large a lab is: the decoder, the scenes that are drawn for it, and its steps."""

    name: str
    width: int
    layers: int
    scenes: int
    steps: int
    batch: int = twins.BATCH  # scenes in a step
    rate: float = 0.02
    validation: int = scenes.VALIDATION
    test: int = scenes.TEST


SIZES = {
    size.name: size
    for size in (
        Size("small", width=128, layers=LAYERS, scenes=4000, steps=2000),
        Size("large", width=256, layers=LAYERS, scenes=20_000, steps=8000, batch=16, rate=0.014, test=600),
    )
}


def size_of(name: str | None, gpu: bool = False) -> Size:
    """The size of this name, or large on a GPU and small elsewhere. UserError for an unknown one."""
    name = name or ("large" if gpu else "small")
    if name not in SIZES:
        raise UserError(f"There is no lab size {name!r}; there are {', '.join(SIZES)}.")
    return SIZES[name]


@dataclass(frozen=True)
class Job:
    """One run: what, how large, from which seed, for how many steps, where."""

    variant: Variant
    size: Size
    seed: int
    steps: int
    device: str = "cpu"  # "cpu" | "cuda"
    precision: str = ""  # of the decoder's matrices: "bfloat16" | "float32"; "" becomes what this machine is fast in

    def __post_init__(self):
        if not self.precision:
            object.__setattr__(self, "precision", precision_on(self.device))

    @property
    def name(self) -> str:
        return f"{self.variant.name} {self.seed}"

    def config(self) -> dict:
        """Everything that defines the run, but its variant's name, seed, steps, device and precision."""
        size = {key: value for key, value in asdict(self.size).items() if key not in ("name", "steps")}
        # "layers" would be the number of layers that get a stack, to those who read the results
        decoder = {"llm_width": size.pop("width"), "llm_layers": size.pop("layers")}
        start = {"start": first_layer(self.variant, self.size.layers)}
        if self.variant.reads == "text":
            text = {"text": LONG, "fact": texts.FACT, "spread": SPREAD}
            text |= {"texts_seeds": [texts.TRAINING_SEED, texts.VALIDATION_SEED, texts.TEST_SEED]}
            return {"size": self.size.name, **decoder, **size, **text, **self.variant.config(), **start}
        view = {"side": scenes.SIDE, "glyphs": {str(key): share for key, share in scenes.GLYPHS.items()}}
        seeds = {"scenes_seeds": [scenes.TRAINING_SEED, scenes.VALIDATION_SEED, scenes.TEST_SEED]}
        tower = {"tower": scenes.tower_mark()} | ({"tower_rank": RANK} if self.variant.tuned else {})
        return {"size": self.size.name, **decoder, **size, **view, **seeds, **tower, **self.variant.config(), **start}

    def key(self) -> str:
        """The same for two runs that are to give the same."""
        record = {"variant": self.variant.name, "seed": self.seed, "steps": self.steps}
        where = {"device": self.device, "precision": self.precision}
        return results.key_of(record | where | {"config": self.config()})

    def folder(self, workdir: Path) -> Path:
        mark = hashlib.sha256(self.key().encode()).hexdigest()[:8]
        return workdir / "lab" / "runs" / f"{self.variant.name}-{self.seed}-{self.steps}-{mark}"


def jobs(
    names: Iterable[str],
    seeds: Iterable[int],
    size: Size,
    steps: int | None = None,
    device: str = "cpu",
    precision: str = "",
) -> list[Job]:
    """Every variant from every seed, all variants of a seed before the next seed."""
    variants = [variant_of(name) for name in dict.fromkeys(names)]
    return [
        Job(variant, size, seed, steps or size.steps, device, precision)
        for seed in dict.fromkeys(seeds)
        for variant in variants
    ]


def forget(job: Job, workdir: Path) -> None:
    """Take away the checkpoint of a run: the next one begins anew."""
    shutil.rmtree(job.folder(workdir), ignore_errors=True)


def run(job: Job, workdir: Path, progress=None, runs: Path | None = None) -> dict:
    """Train, test and measure; the record of the run. Goes on from the run's last checkpoint in `workdir`, or in `runs`
    where that is given. progress(share, words). UserError where it is to use a GPU and there is none."""
    twin, questions, training, _, tested = train(job, workdir, progress, runs)
    curve = (job.folder(runs or workdir) / "curve.jsonl").read_text().splitlines()
    accelerator = accelerator_for(job.device)
    return {
        "variant": job.variant.name,
        "group": job.variant.group,
        "config": job.config(),
        "seed": job.seed,
        "steps": job.steps,
        "device": job.device,
        "precision": job.precision,
        "hours": round(json.loads(curve[-1])["minutes"] / 60, 3),
        "parameters": twin.counted(),
        "accuracy": marks(twins.answered(twin, questions, *tested, most=MOST)),
        "cost": costs(twin, questions, training[0], job.size.batch, PRECISIONS[job.precision]),
        "when": datetime.date.today().isoformat(),
        "versions": versions(accelerator.device),
    } | learned(twin)  # fmt: skip


def train(job: Job, workdir: Path, progress=None, runs: Path | None = None, until: int | None = None) -> tuple:
    """Train, as `run` does, to the end or to the step `until`: (twin, questions, training, validation, test), the twin
    ready to be asked."""
    if job.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but the machine of this run has no GPU that works; give --device cpu.")
    folder, size = job.folder(runs or workdir), job.size
    made = _with_text(job) if job.variant.reads == "text" else _with_pictures(job, workdir)
    twin, questions, training, watched, _ = made
    options = {"batch": size.batch, "seed": job.seed, "rate": size.rate, "device": job.device, "progress": progress}
    options |= {"until": until, "log": lambda line: None, "precision": job.precision}
    twins.fit(job.name, twin, questions, training, watched, folder, (job.steps,), **options)
    twin.to(accelerator_for(job.device).device).eval()
    return made


def _with_pictures(job: Job, workdir: Path) -> tuple:
    """(twin, questions, training, validation, test) of a run on scenes, its weights drawn from its seed."""
    size, layers, pixels = job.size, job.size.layers, job.variant.pixels
    data = scenes.prepare(workdir, size.scenes, size.validation, size.test, device=job.device, pixels=pixels)
    training = [(scenes.placed(batch, job.variant, layers), features) for batch, features in data.training]
    watched, tested = (
        (scenes.placed(batch, job.variant, layers), features) for batch, features in (data.validation, data.test)
    )
    tower = scenes.load_tower().tower if pixels else None
    torch.manual_seed(job.seed)
    tokenizer = make_tokenizer()
    vision = LlavaConfig.from_pretrained(scenes.TOWER).vision_config
    sample = training[0][1][: SAMPLE_PIXELS if pixels else SAMPLE]
    twin = LabTwin(job.variant, vision, len(tokenizer), sample, size.width, layers, tower)
    return twin, twins.Questions(tokenizer), training, watched, tested


def _with_text(job: Job) -> tuple:
    """As _with_pictures, of a run on long texts."""
    size, layers = job.size, job.size.layers
    torch.manual_seed(job.seed)
    tokenizer = make_tokenizer()
    questions = texts.Questions(tokenizer)
    drawn = (
        texts.draw(size.scenes, texts.TRAINING_SEED),
        texts.draw(size.validation, texts.VALIDATION_SEED),
        texts.draw(size.test, texts.TEST_SEED),
    )
    training, *held_out = ((each.batch(job.variant, layers), each.ids(questions)) for each in drawn)
    return TextTwin(job.variant, len(tokenizer), size.width, layers), questions, [training], *held_out


def versions(device: torch.device) -> dict[str, str]:
    """Of what the numbers of a run may depend on, and the GPU's name where there is one."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    own = {"python": platform.python_version(), "torch": torch.__version__}
    return own | {"transformers": transformers.__version__} | gpu


def learned(twin: LabTwin | TextTwin) -> dict:
    """The gates of a variant that has them, one number per stack: a mean over channels where there are many."""
    return {"gates": twin.gates.detach().mean(-1).flatten().tolist()} if twin.variant.gate != "none" else {}


def marks(answers: Iterable[tuple[Question, torch.Tensor]]) -> dict:
    """Exact match by kind, of fine questions also characters and first characters, by topic (what singles the text out:
    ink or place; or recall) and by glyph height, or of a text's by the part of it that was asked for. Each topic, and
    each kind without topics, also with which of its questions are right, in the test set's order."""
    by_kind: dict[str, list[torch.Tensor]] = {}
    by_topic: dict[str, list[torch.Tensor]] = {}
    by_height: dict[float, list[torch.Tensor]] = {}
    by_part: dict[float, list[torch.Tensor]] = {}
    for question, right in answers:
        by_kind.setdefault(question.kind, []).append(right)
        if question.kind == "fine":
            by_topic.setdefault(question.topic, []).append(right)
        if isinstance(question, texts.Recall):
            by_part.setdefault(question.part, []).append(right)
        elif question.kind == "fine":
            by_height.setdefault(question.glyph_px, []).append(right)
    found = {name: _share(of) for name, of in (by_kind | by_topic).items()}
    for name, of in ({kind: each for kind, each in by_kind.items() if kind != "fine"} | by_topic).items():
        found[name]["right"] = results.packed([bool(right.all()) for right in of])
    found["fine"]["characters"] = round(float(np.mean([float(r[:-1].float().mean()) for r in by_kind["fine"]])), 4)
    found["fine"]["first_character"] = round(float(np.mean([bool(r[0]) for r in by_kind["fine"]])), 4)
    for name, each in (("by_glyph_px", by_height), ("by_position", by_part)):
        if each:
            found[name] = {f"{place:g}": _share(each[place]) for place in sorted(each)}
    return found


def _share(found: list[torch.Tensor]) -> dict:
    return {"n": len(found), "exact_match": round(float(np.mean([bool(right.all()) for right in found])), 4)}


def costs(
    twin: LabTwin | TextTwin,
    questions: twins.Questions,
    data: tuple[dataset.Batch, torch.Tensor],
    batch: int,
    dtype: torch.dtype,
) -> dict:
    """Of a prefill of one scene with one question, and of a training step with questions; see model/lab/cost.py."""
    device = next(twin.parameters()).device
    items = data[0].items[:batch]
    features = data[1][:batch].float().to(device)
    if not twin.variant.tuned:
        with torch.no_grad():
            features = twin.see(features, dtype)
    item = items[0][0]
    one = questions.pad([questions.turn(item.question.question, item.question.answer, item.cells)]).to(device)
    rows = questions.rows(items, np.random.default_rng(0)).to(device)
    words = twin.language.embed_tokens.weight[questions.words].detach()

    def step():
        twin.zero_grad(set_to_none=True)
        logits, result = twin(features, rows, dtype)
        sum(twins.answer_losses(twin, logits, result, rows, words).values()).backward()

    found = cost.measure(twin, features[:1], one, step, dtype)
    twin.zero_grad(set_to_none=True)
    return found
