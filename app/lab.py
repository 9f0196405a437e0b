"""The command `lab`: the paper's experiments, listed, run, and shown as a table.

What a variant is and what a run does: model/lab. Knows nothing about training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from analysis import lab as reading
from app.lab_files import FIRST, files
from app.output import Outcome, ProgressLine, log, table, write_files
from model.errors import UserError
from model.lab import many, results, scenes
from model.lab import run as lab
from model.lab.variants import GROUPS, VARIANTS
from model.loading import choose_device


def run(options: argparse.Namespace) -> Outcome:
    """One of the actions."""
    if options.action != "run" and options.names:
        raise UserError(f"lab {options.action} takes no names, not {' '.join(options.names)}.")
    return {"list": _list, "run": _run, "table": _table}[options.action](options)


def _list(options: argparse.Namespace) -> Outcome:
    """Every variant, and how many runs of it are in the file of results."""
    runs = [record.get("variant") for _, record in results.lines(Path(options.results))]
    found = [
        {"variant": v.name, "group": v.group, "words": v.words, "runs": runs.count(v.name), "config": v.config()}
        for group in GROUPS
        for v in VARIANTS.values()
        if v.group == group
    ]
    rows = [[entry["variant"], entry["group"], entry["runs"], entry["words"]] for entry in found]
    return Outcome({"variants": found}, table(["variant", "group", "runs", ""], rows))


def _run(options: argparse.Namespace) -> Outcome:
    """Runs what is named and not yet in the file of results, each line written as its run ends."""
    if not options.names:
        raise UserError("lab run needs names of variants, or all; python -m app lab list shows them.")
    if options.steps is not None and options.steps < 1:
        raise UserError(f"--steps is {options.steps}; it must be at least 1.")
    file, workdir = Path(options.results).expanduser(), Path(options.workdir).expanduser().resolve()
    device = (options.device or "cuda") if options.ray else str(choose_device(options.device)[0])
    device = device.partition(":")[0]  # Ray deals out the GPUs
    size = lab.size_of(options.size, gpu=device == "cuda")
    names = VARIANTS if options.names == ["all"] else options.names
    wanted = lab.jobs(names, _seeds(options.seeds), size, options.steps)
    there = {} if options.again else {results.key_of(record): record for _, record in results.lines(file)}
    todo = [job for job in wanted if job.key() not in there]
    for job in wanted:
        if job.key() in there:
            log(f"{job.name} is in {file} already; --again trains it anew.")
    records, died = _through_ray(todo, options, device, workdir, file) if todo else ([], [])
    for job, why in died:
        log(f"{job.name} died {many.RETRIES + 1} times ({why}); the same command goes on from its last checkpoint.")
    found = {job.key(): there.get(job.key()) for job in wanted} | {results.key_of(record): record for record in records}
    shown = [record for record in found.values() if record]
    text = table(
        ["variant", "seed", "steps", "fine", "coarse", "context", "minutes"], [_row(record) for record in shown]
    )
    text += f"\n\n{len(records)} of {len(wanted)} runs are new; all are in {file}"
    data = {"results": str(file), "new": len(records), "died": [job.name for job, _ in died], "runs": shown}
    return Outcome(data, text, 1 if died else 0)


def _table(options: argparse.Namespace) -> Outcome:
    """What is in the file of results beside the paper's numbers, setting by setting; as files with --out."""
    file = Path(options.results).expanduser()
    runs = reading.read(file)
    if not runs:
        raise UserError(f"There are no results in {file}; first {reading.run_command(FIRST, (0, 1, 2))}")
    parts, written = [], {}
    for setting, each in reading.settings(runs).items():
        found = reading.summary(each, options.metric, options.bench)
        rows = [_compared(found, row) for row in found.rows]
        headers = ["variant", "seeds", "ours, %", "95 %", f"against {reading.REFERENCE}", f"paper {found.bench}"]
        parts.append(f"{setting}: {found.words}\n{table([*headers, 'sign', 'context'], rows)}")
        written |= {f"{_slug(str(setting))}/{name}": data for name, data in files(each, found).items()}
    if options.out:
        parts.append(f"{len(write_files(options.out, written))} files are in {options.out}")
    return Outcome(reading.table(runs, options.metric, options.bench).records(), "\n\n".join(parts))


def _slug(words: str) -> str:
    return "-".join(words.replace(",", "").split())


def _compared(found: reading.Summary, row: reading.Row) -> list:
    gap, paper = found.difference(row), reading.PAPER.get(row.variant)
    spread = "" if row.deviation is None else f" ± {100 * row.deviation:.1f}"
    printed = paper.scores.get(found.bench) if paper else None
    return [
        row.variant,
        len(row.seeds),
        f"{100 * row.mean.value:.1f}{spread}",
        f"{100 * row.mean.low:.1f} to {100 * row.mean.high:.1f}",
        None if gap is None else f"{100 * gap.value:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})",
        None if printed is None else f"{printed:.1f}",
        found.judge(row).kind,
        row.spent("context"),
    ]


def _row(record: dict) -> list:
    scores = [f"{100 * record['accuracy'][kind]['exact_match']:.1f} %" for kind in ("fine", "coarse")]
    start = [record["variant"], record["seed"], record["steps"]]
    return [*start, *scores, record["cost"]["context"], f"{60 * record['hours']:.1f}"]


def _through_ray(todo: Sequence[lab.Job], options: argparse.Namespace, device: str, workdir: Path, file: Path):
    """(records of the runs that ended, (job, why) of those that died), the data made first."""
    size = todo[0].size
    progress = ProgressLine(every=60)
    records, died = [], []
    work = [(job, workdir, device) for job in todo]
    try:
        if not options.ray:  # else each machine makes what it lacks
            scenes.prepare(workdir, size.scenes, size.validation, size.test, device=device, progress=progress.fraction)
        if options.again:
            for job in todo:
                lab.forget(job, workdir)
        for number, found in many.through_ray(lab.run, work, options.ray, device == "cuda", progress.fraction):
            if isinstance(found, many.Died):
                died.append((todo[number], found))
            else:
                results.write(found, file)
                records.append(found)
    except OSError as error:
        raise UserError(f"{error.filename or workdir} cannot be used: {error.strerror or error}.") from error
    finally:
        progress.clear()
    return records, died


def _seeds(text: str) -> list[int]:
    """Seeds from "0,1,2"; UserError where one is no whole number from 0 on."""
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        seeds = [-1]
    if min(seeds) < 0:
        raise UserError(f"--seeds is {text}; give whole numbers from 0 on, as 0,1,2.")
    return seeds
