"""`golden`: a small portable record of one run, and what sets another implementation's record apart from ours.

    python -m app golden export [IMAGE… QUESTION] [--model M] [--out DIR]    writes golden.safetensors and golden.json
    python -m app golden check THEIRS [--model M]                           says what is wrong; exit 1 if anything is

A check runs our model on the pixels and tokens of the record, so that what differs is the model; what our own
preprocessing makes of the same picture is compared apart from it. app/GOLDEN.md describes the format for whoever writes
an exporter; the comparison is analysis/golden.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from analysis.golden import COLUMNS, SEED, Finding, Golden, Tower, Verdict, compare, neighbours, signs
from app.commands import introduce, load_from, messages_from, prompt_from
from app.desk import EXAMPLES, examples
from app.limits import limits_from
from app.output import Outcome, plain
from model.clip import Clip, clip_of, marked
from model.engine import Engine
from model.errors import UserError
from model.images import Limits
from model.outside import layers_seen, pixels_seen, retapped, tap_of
from model.plan import BASE, Plan
from model.prompt import Prompt
from model.types import Sampling

FORMAT, VERSION = "deepstack-golden", 1
NAME = "golden"  # of the two files that `export` writes
RESIZED = 0.02  # relative difference of preprocessed pixels that another library's resizing explains
MOST_COLUMNS = 1024

Calls = Sequence[Mapping[str, np.ndarray]]  # what enters the vision tower, call by call: argument -> tensor


def run(options: argparse.Namespace) -> Outcome:
    """`export` or `check`."""
    return {"export": export, "check": check}[options.action](options)


# ---- export


def export(options: argparse.Namespace) -> Outcome:
    """Writes the record of one run of this model under its default plan."""
    if len(options.inputs) == 1:
        raise UserError("golden export needs images and a question, or neither (see python -m app golden --help).")
    limits = limits_from(options)
    *paths, question = options.inputs or _example()
    messages, notes = messages_from(paths, question, limits)
    sampling = Sampling(max_new_tokens=options.max_new_tokens)
    engine = load_from(options.model, options)
    prompt = prompt_from(engine, messages, limits)
    introduce(engine, notes)
    plan = engine.layout.default
    answer = engine.answer(prompt, plan, sampling)
    golden = record(engine, prompt, plan, [token.id for token in answer.tokens])
    golden.about.update(question=question, answer=answer.text)
    files = write(golden, Path(options.out))
    size = sum(file.stat().st_size for file in files)
    text = (
        f"{answer.text}\n\n{files[0]} and {files[1].name}: {size / 1e6:.1f} MB, {len(golden.ids)} prompt tokens "
        f"({len(golden.image_positions)} visual), {golden.n_layers} layers"
    )
    data = {"files": [str(file) for file in files], "bytes": size, "answer": answer.text, "model": engine.name}
    return Outcome(data, text)


def _example() -> tuple[str, str]:
    """The first of the pictures that come with the app, and its question."""
    first = next(iter(examples().values()))
    return str(EXAMPLES / first.file), first.question


def look(engine: Engine, prompt: Prompt, pixels: Calls | None = None) -> tuple[Tensor, Calls]:
    """(features [sources, N, d], what our preprocessing makes); the tower runs on `pixels` where they are given."""
    theirs = None if pixels is None else [{k: torch.from_numpy(v) for k, v in call.items()} for call in pixels]
    with pixels_seen(engine, theirs) as calls:
        features = engine.features(prompt)
    return features, tuple({name: _array(value) for name, value in call.items()} for call in calls)


def _array(value: Tensor) -> np.ndarray:
    return (value.float() if value.is_floating_point() else value.long()).numpy()


def record(
    engine: Engine,
    prompt: Prompt,
    plan: Plan,
    answer: Sequence[int],
    *,
    features: Tensor | None = None,
    projection: tuple[int, int] = (SEED, COLUMNS),
) -> Golden:
    """One pass of this engine over prompt + answer, as a record.

    features [sources, N, d] stand in for what the vision tower makes of our own pixels; projection: (seed, columns).
    """
    own, calls = look(engine, prompt)
    features = own if features is None else features
    seed, columns = projection
    matrix = torch.from_numpy(signs(seed, columns, engine.layout.hidden_size)).to(engine.device)
    length = prompt.input_ids.shape[1]
    image = torch.as_tensor(_image_positions(prompt))
    text = torch.as_tensor(np.setdiff1d(np.arange(length), image.numpy()))
    inputs, outputs, statistics = [], [], {}

    def note(name: str, hidden: Tensor, kept: list[np.ndarray]) -> None:
        rows = hidden[0, :length].float()
        kept.append(project(rows, matrix))
        statistics[name] = {"image": _statistics(rows[image]), "text": _statistics(rows[text])}

    with layers_seen(
        engine.adapter.decoder,
        lambda layer, hidden: note(f"layer.{layer}.input", hidden, inputs),
        lambda layer, hidden: note(f"layer.{layer}.output", hidden, outputs),
    ):
        logits = engine.logits(prompt, plan, list(answer), features=features, last=len(answer) + 1)
    stacks = {source.name: rows.float() for source, rows in zip(engine.layout.sources, features, strict=True)}
    for name, rows in stacks.items():
        statistics[f"stack.{name}"] = {"image": _statistics(rows)}
    return Golden(
        ids=prompt.input_ids[0].numpy(),
        answer=np.asarray(answer, dtype=np.int64),
        image_positions=image.numpy(),
        inputs=np.stack(inputs),
        outputs=np.stack(outputs),
        stacks={name: project(rows, matrix) for name, rows in stacks.items()},
        logits=logits.float().cpu().numpy(),
        pixels=calls,
        images=tuple(np.asarray(picture) for picture in prompt.images),
        position_ids=prompt.extra["position_ids"].cpu().numpy(),
        about={
            "format": FORMAT,
            "version": VERSION,
            "made_by": f"deepstack-lens, transformers {transformers.__version__}, torch {torch.__version__}",
            "model": engine.name,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "projection": {"seed": seed, "columns": columns, "width": engine.layout.hidden_size},
            "layers": engine.layout.n_layers,
            "images": [_about(picture) for picture in prompt.images],
            "statistics": statistics,
        },
    )


def _about(picture: Image.Image) -> dict:
    """What the JSON says of one picture."""
    clip = clip_of(picture)
    return {"size": list(picture.size), **({} if clip is None else {"frames": clip.to_json()})}


def project(rows: Tensor, matrix: Tensor) -> np.ndarray:
    """Rows [..., d] and signs [P, d] -> float32 [..., P], each about as large as the row's RMS."""
    return (rows.to(matrix.device) @ matrix.T / matrix.shape[1] ** 0.5).cpu().numpy()


def _statistics(rows: Tensor) -> dict[str, float]:
    """Of rows [n, d]: root mean square and largest magnitude; 0 for no rows."""
    if not rows.numel():
        return {"rms": 0.0, "max": 0.0}
    return {"rms": float(rows.pow(2).mean().sqrt()), "max": float(rows.abs().max())}


def _image_positions(prompt: Prompt) -> np.ndarray:
    return np.concatenate([grid.positions for grid in prompt.grids]) if prompt.grids else np.zeros(0, np.int64)


# ---- files


def write(golden: Golden, folder: Path) -> list[Path]:
    """golden.safetensors and golden.json in `folder`; UserError where it cannot be written."""
    tensors = {
        "input_ids": golden.ids,
        "answer_ids": golden.answer,
        "image_positions": golden.image_positions,
        "logits": golden.logits,
        **{f"layer.{layer}.input": rows for layer, rows in enumerate(golden.inputs)},
        **{f"layer.{layer}.output": rows for layer, rows in enumerate(golden.outputs)},
        **{f"stack.{name}": rows for name, rows in golden.stacks.items()},
        **{f"pixels.{at}.{name}": value for at, call in enumerate(golden.pixels) for name, value in call.items()},
        **{f"image.{at}": picture for at, picture in enumerate(golden.images)},
    }
    if golden.position_ids is not None:
        tensors["position_ids"] = golden.position_ids
    files = [folder.expanduser() / f"{NAME}.safetensors", folder.expanduser() / f"{NAME}.json"]
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, files[0])
        about = json.dumps(plain(golden.about), indent=1, allow_nan=False, ensure_ascii=False)
        files[1].write_text(about + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}.") from error
    return files


def read(path: str | Path) -> Golden:
    """A record: a folder with golden.json, or one of its two files. UserError for whatever is wrong with it."""
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / f"{NAME}.json"
    about_file, file = path.with_suffix(".json"), path.with_suffix(".safetensors")
    for wanted in (about_file, file):
        if not wanted.is_file():
            raise UserError(f"There is no {wanted}; a record is a .json and a .safetensors of the same name.")
    try:
        about = json.loads(about_file.read_text(encoding="utf-8"))
        if about["format"] != FORMAT or about["version"] != VERSION:
            raise UserError(f"{about_file} is not a record of format {FORMAT}, version {VERSION}.")
        layers, seed, columns, width = (
            int(value)
            for value in (
                about["layers"],
                *(about["projection"][name] for name in ("seed", "columns", "width")),
            )
        )
        sizes = [(int(item["size"][0]), int(item["size"][1])) for item in about["images"]]
        for item, size in zip(about["images"], sizes, strict=True):
            if "frames" in item and Clip.from_json(item["frames"]).sheet_size != size:
                raise ValueError("the frames of an image do not fill it")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{about_file} cannot be used: {_words(error)}.") from error
    if not (0 < columns <= MOST_COLUMNS and 0 <= seed < 2**64 and layers > 0 and width > 0):
        raise UserError(f"{about_file} has an impossible number of layers, or an impossible projection.")
    for size in sizes:
        if min(size) < 1 or size[0] * size[1] > Limits().max_pixels:
            raise UserError(f"{about_file} gives an image of {size[0]}×{size[1]} pixels, which is not taken.")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: a number format that numpy does not have
        raise UserError(f"{file} cannot be used: {_words(error)} (see app/GOLDEN.md).") from error

    def take(name: str, *shape: int | None, optional: bool = False, kind: str = "f") -> np.ndarray | None:
        value = tensors.pop(name, None)
        if value is None:
            if optional:
                return None
            raise UserError(f"{file} has no tensor {name} (see app/GOLDEN.md).")
        fits = len(value.shape) == len(shape) and all(
            b is None or a == b for a, b in zip(value.shape, shape, strict=True)
        )
        if not fits or value.dtype.kind not in kind:
            want = [length if length is not None else "any" for length in shape]
            raise UserError(
                f"{name} in {file} is {value.dtype} {list(value.shape)}; it must be "
                f"{'float32' if kind == 'f' else 'integers'} {want}."
            )
        return value.astype(np.float32 if kind == "f" else np.int64)

    ids = take("input_ids", None, kind="iu")
    answer = take("answer_ids", None, kind="iu")
    positions = take("image_positions", None, kind="iu")
    length, n = len(ids), len(positions)
    names = [name.removeprefix("stack.") for name in tensors if name.startswith("stack.")]
    images = [tensors.pop(f"image.{at}", None) for at in range(len(sizes))]
    for at, (picture, size) in enumerate(zip(images, sizes, strict=True)):
        if picture is not None and (picture.shape != (size[1], size[0], 3) or picture.dtype != np.uint8):
            raise UserError(f"image.{at} in {file} must be uint8 [{size[1]}, {size[0]}, 3], as its size says.")
    position_ids = tensors.pop("position_ids", None)
    return Golden(
        ids=ids,
        answer=answer,
        image_positions=positions,
        inputs=np.stack([take(f"layer.{layer}.input", length, columns) for layer in range(layers + 1)]),
        outputs=np.stack([take(f"layer.{layer}.output", length, columns) for layer in range(layers)]),
        stacks={name: take(f"stack.{name}", n, columns) for name in names},
        logits=take("logits", len(answer) + 1, None),
        pixels=_calls(tensors),
        images=tuple(images) if images and all(picture is not None for picture in images) else (),
        position_ids=position_ids,
        about=about,
    )


def _calls(tensors: Mapping[str, np.ndarray]) -> Calls:
    """`pixels.C.NAME` -> per call C its tensors by name."""
    calls: dict[int, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        parts = key.split(".", 2)
        if parts[0] == "pixels" and len(parts) == 3 and parts[1].isdecimal():
            calls.setdefault(int(parts[1]), {})[parts[2]] = value
    return tuple(calls[at] for at in sorted(calls))


def _words(error: Exception) -> str:
    words = " ".join(str(error).split())[:150]
    return f"it has no {words}" if type(error) is KeyError else words or type(error).__name__


# ---- check


def check(options: argparse.Namespace) -> Outcome:
    """Compares a record with a run of this model on its pixels and tokens; exit status 1 if something is wrong."""
    if len(options.inputs) != 1:
        raise UserError("golden check needs one record: a folder that golden export has written, or its .json.")
    if options.tolerance is not None and not 0 < options.tolerance < 1:
        raise UserError(f"--tolerance is {options.tolerance}; it must be between 0 and 1.")
    theirs = read(options.inputs[0])
    engine = load_from(options.model, options)
    fits(engine, theirs)
    introduce(engine)
    verdict = judged(engine, theirs, options.tolerance)
    made_by = str(theirs.about.get("made_by", "unknown"))
    data = {
        "ok": verdict.ok,
        "model": engine.name,
        "record": str(options.inputs[0]),
        "made_by": made_by,
        "findings": [finding.to_json() for finding in verdict.findings],
        "figures": verdict.figures,
    }
    lines = [f"{engine.name} beside {options.inputs[0]} ({made_by}, {theirs.dtype})", ""]
    lines += [f"WRONG  {finding.text}" for finding in verdict.findings] or [_agreement(verdict)]
    return Outcome(data, "\n".join(lines), 0 if verdict.ok else 1)


def _agreement(verdict: Verdict) -> str:
    figures = verdict.figures
    stacks = max(figures["stacks"].values(), default=0.0)
    layers = max([*figures["inputs"], *figures["outputs"]])
    return (
        f"In agreement: stacks differ by {stacks:.1e}, layers by {layers:.1e}, logits by {max(figures['logits']):.1e} "
        f"({figures['tolerance']:.0e} is allowed)."
    )


def fits(engine: Engine, theirs: Golden) -> None:
    """UserError where the record is of another model."""
    ours = (engine.layout.n_layers, engine.layout.hidden_size, engine.adapter.embed.weight.shape[0])
    other = (theirs.n_layers, int(theirs.about["projection"]["width"]), theirs.logits.shape[1])
    for what, mine, value in zip(("layers", "columns in its stream", "words"), ours, other, strict=True):
        if mine != value:
            raise UserError(f"The record is of another model: it has {value} {what}, {engine.name} has {mine}.")
    tokens = np.concatenate([theirs.ids, theirs.answer])
    if not len(theirs.ids) or tokens.min() < 0 or tokens.max() >= ours[2]:
        raise UserError(f"The record has token ids that {engine.name} does not have, or none.")
    if len(tokens) > engine.max_tokens:
        raise UserError(f"The record has {len(tokens)} tokens; {engine.name} reads at most {engine.max_tokens}.")


def judged(engine: Engine, theirs: Golden, tolerance: float | None = None) -> Verdict:
    """The verdict on a record: preprocessing first, then the model on the record's own pixels and tokens."""
    plan = engine.layout.default
    prompt, findings = _prompt(engine, theirs)
    if prompt is None:
        return Verdict(tuple(findings), {})
    _, calls = look(engine, prompt)
    findings += _pixels(theirs, calls)
    if any(finding.kind == "shapes" for finding in findings):
        return Verdict(tuple(findings), {})
    features, _ = look(engine, prompt, theirs.pixels)
    projection = theirs.about["projection"]
    seed, columns = int(projection["seed"]), int(projection["columns"])
    ours = record(engine, prompt, plan, theirs.answer.tolist(), features=features, projection=(seed, columns))
    taps = tap_of(engine)
    matrix = torch.from_numpy(signs(seed, columns, engine.layout.hidden_size)).to(engine.device)
    pairs = {(name, tap + by) for name, tap in taps.items() for by in (-1, 1)}
    pairs |= {(name, other) for name, tap in taps.items() for other in taps.values() if other != tap}
    with pixels_seen(engine, [{k: torch.from_numpy(v) for k, v in call.items()} for call in theirs.pixels]):
        others = retapped(engine, prompt, sorted(pairs)) if theirs.pixels else {}
    variants = {pair: project(rows.float(), matrix) for pair, rows in others.items()}
    tower = None
    if plan.tower and not findings:  # with other pixels than ours the base would differ anyway
        layers, bases = engine.layout.n_vision_layers, {}
        for other in neighbours(plan, layers):
            bases[other] = project(engine.see(prompt, other).features[BASE].float(), matrix)
        tower = Tower(layers, bases)
    verdict = compare(theirs, ours, plan, taps, variants, tolerance, tower)
    return Verdict((*findings, *verdict.findings), verdict.figures)


def _prompt(engine: Engine, theirs: Golden) -> tuple[Prompt | None, list[Finding]]:
    """The record's tokens as a prompt of ours, and how they differ from what our template makes of the question."""
    sizes = [tuple(item["size"]) for item in theirs.about["images"]]
    # Without the pictures themselves: blank ones of their sizes, each unlike the others.
    pictures = [Image.fromarray(rgb) for rgb in theirs.images] or [
        Image.new("RGB", size, (at % 256, 0, 0)) for at, size in enumerate(sizes)
    ]
    for picture, item in zip(pictures, theirs.about["images"], strict=True):
        if "frames" in item:
            marked(picture, Clip.from_json(item["frames"]))
    question = theirs.about.get("question")
    content = [{"type": "image", "image": picture} for picture in pictures]
    content.append({"type": "text", "text": question if isinstance(question, str) and question.strip() else "?"})
    own = engine.prompt([{"role": "user", "content": content}])
    findings = []
    mine = own.input_ids[0].numpy()
    where = np.flatnonzero(theirs.ids == engine.adapter.image_token_id)
    if len(where) != own.visual_tokens:
        text = f"The prompt has {len(where)} image tokens; this model makes {own.visual_tokens} of these images."
        return None, [Finding("count", text, {"theirs": len(where), "ours": own.visual_tokens})]
    if not np.array_equal(where, np.sort(theirs.image_positions)):
        text = "image_positions are not where the prompt has its image tokens."
        findings.append(Finding("image positions", text))
    if np.array_equal(mine, theirs.ids):
        return own, findings
    if question:
        length = min(len(mine), len(theirs.ids))
        at = int((np.r_[mine[:length] != theirs.ids[:length], True]).argmax())
        text = f"The prompt's tokens differ from this model's from position {at} on; the rest was compared on theirs."
        findings.append(Finding("tokens", text, {"position": at}))
    old = np.concatenate([grid.positions for grid in own.grids]) if own.grids else where
    new = dict(zip(np.sort(old).tolist(), where.tolist(), strict=True))
    grids = tuple(replace(grid, positions=np.array([new[p] for p in grid.positions.tolist()])) for grid in own.grids)
    ids = torch.from_numpy(theirs.ids)[None]
    position_ids, next_position = engine.adapter.positions(ids, grids, own.images)
    extra = {**own.extra, "position_ids": position_ids, "next_position": next_position}
    return replace(own, input_ids=ids, grids=grids, extra=extra, texts=("",) * len(theirs.ids)), findings


def _pixels(theirs: Golden, ours: Calls) -> list[Finding]:
    """How their preprocessing differs from ours: in shapes always, in values where the record has the picture."""
    names = {name for call in ours for name in call}
    shapes = [
        [{name: list(value.shape) for name, value in call.items() if name in names} for call in calls]
        for calls in (theirs.pixels, ours)
    ]
    if shapes[0] != shapes[1]:
        text = f"Their preprocessing makes {shapes[0]} of these images, ours {shapes[1]}."
        return [Finding("shapes", text)]
    if not theirs.images:
        return []
    for at, (call, own) in enumerate(zip(theirs.pixels, ours, strict=True)):
        for name, value in own.items():
            size = float(np.linalg.norm(value.astype(np.float64)))
            apart = float(np.linalg.norm(call[name].astype(np.float64) - value)) / (size or 1.0)
            if not apart <= RESIZED:
                text = (
                    f"Preprocessing: pixels.{at}.{name} differs from ours by {apart:.1e} of its size; the rest was "
                    "compared on theirs."
                )
                return [Finding("pixels", text, {"call": at, "difference": apart})]
    return []
