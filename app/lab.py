"""The command `lab`: the paper's experiments, listed, run, searched, shown as a table, shipped as models to chat with.

What a variant is and what a run does: model/lab. Knows nothing about training.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from analysis import claims
from analysis import lab as reading
from app.lab_files import FIRST, files
from app.output import Outcome, ProgressLine, log, table, write_files
from model.errors import UserError
from model.families.deepstack_llava import CHANGE
from model.lab import many, results, scenes, search, ship
from model.lab import run as lab
from model.lab.variants import GROUPS, VARIANTS
from model.loading import CHECKPOINTS, choose_device, gigabytes

TRAINING = ("run", "search", "ship")
# which actions use an option, and its default
OPTIONS = {
    "results": (("list", "table", *TRAINING), str(results.RESULTS)),
    "workdir": (TRAINING, "runs"),
    "seeds": (TRAINING, "0"),
    **dict.fromkeys(("steps", "size", "device", "precision"), (TRAINING, None)),
    **dict.fromkeys(("ray", "again"), (("run", "search"), None)),
    "budget": (("search",), None),
    "metric": (("table",), "fine"),
    "bench": (("table",), "AVG"),
    "out": (("table", "ship"), None),
}


def run(options: argparse.Namespace) -> Outcome:
    """One of the actions. UserError for names or an option that it does not use."""
    if options.action not in ("run", "ship") and options.names:
        raise UserError(f"lab {options.action} takes no names, not {' '.join(options.names)}.")
    for name, (actions, default) in OPTIONS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif options.action not in actions:
            raise UserError(f"lab {options.action} has no use for --{name}; lab {' and lab '.join(actions)} have.")
    return {"list": _list, "run": _run, "search": _search, "table": _table, "ship": _ship}[options.action](options)


def _list(options: argparse.Namespace) -> Outcome:
    """Every variant, and how many runs of it are in the file of results."""
    runs = [record.get("variant") for _, record in results.lines(Path(options.results).expanduser())]
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
    file, workdir, device, size = _where(options)
    names = VARIANTS if "all" in options.names else options.names
    wanted = lab.jobs(names, _seeds(options.seeds), size, options.steps, device, options.precision or "")
    there = {} if options.again else {results.key_of(record): record for _, record in results.lines(file)}
    todo = [job for job in wanted if job.key() not in there]
    for job in wanted:
        if job.key() in there:
            log(f"{job.name} is in {results.short(file)} already; --again trains it anew.")
    records, died = _through_ray(todo, options, workdir, file) if todo else ([], [])
    for job, why in died:
        log(_dead(job, why))
    found = {job.key(): there.get(job.key()) for job in wanted} | {results.key_of(record): record for record in records}
    shown = [record for record in found.values() if record]
    text = table(
        ["variant", "seed", "steps", "fine", "coarse", "context", "minutes"], [_row(record) for record in shown]
    )
    text += f"\n\n{len(records)} of {len(wanted)} runs are new; all are in {results.short(file)}"
    data = {"results": str(file), "new": len(records), "died": [job.name for job, _ in died], "runs": shown}
    return Outcome(data, text, 1 if died else 0)


def _where(options: argparse.Namespace) -> tuple[Path, Path, str, lab.Size]:
    """(file of results, work folder, device, size) of runs. UserError for steps that are none, and, before anything is
    trained, for places that cannot be written to."""
    if options.steps is not None and options.steps < 1:
        raise UserError(f"--steps is {options.steps}; it must be at least 1.")
    device = (options.device or "cuda") if options.ray else str(choose_device(options.device)[0])
    device = device.partition(":")[0]  # Ray deals out the GPUs
    size = lab.size_of(options.size, gpu=device == "cuda")
    file, workdir = Path(options.results).expanduser(), Path(options.workdir).expanduser().resolve()
    _usable(file.parent)
    if not options.ray:  # else it lies on the machines of the cluster
        _usable(workdir)
    return file, workdir, device, size


def _usable(folder: Path) -> None:
    """Makes a folder; UserError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be used: {error.strerror or error}.") from error


def _search(options: argparse.Namespace) -> Outcome:
    """Spends the budget on a search from the first seed; then runs what the comparison with the rule still lacks."""
    file, workdir, device, size = _where(options)
    seed, steps = _seeds(options.seeds)[0], options.steps or size.steps
    budget = search.BUDGET * steps if options.budget is None else options.budget
    rungs = search.plan(budget, steps, len(search.candidates(size.layers)))
    drawn = search.drawn(size.layers, rungs[0].count, seed)
    jobs = [lab.Job(variant, size, seed, steps, device, options.precision or "") for variant in drawn]
    with _progress(workdir) as progress:
        _prepare(jobs, options, workdir, progress)
        if options.again:
            for job in jobs:
                lab.forget(job, search.home(workdir))

        def climb(left: list[lab.Job], until: int) -> list[dict]:
            scores = [search.ranked(job, workdir, until) for job in left]
            todo = [number for number, each in enumerate(scores) if each is None]
            log(f"step {until:,}: {len(left)} runs, {len(left) - len(todo)} of them there already")
            given = [(left[number], workdir, until) for number in todo]
            runs = many.through_ray(search.climb, given, options.ray, device == "cuda", progress) if given else ()
            for place, each in runs:
                if isinstance(each, many.Died):
                    raise UserError(_dead(left[todo[place]], each))
                scores[todo[place]] = each
            return scores

        found = search.halve(jobs, rungs, climb)
        winner = found.winner
        ended = {results.key_of(each): each for _, each in results.lines(file)}.get(winner.key())
        if ended is None:
            ((_, ended),) = many.through_ray(search.finish, [(winner, workdir)], options.ray, device == "cuda")
            if isinstance(ended, many.Died):
                raise UserError(_dead(winner, ended))
            results.write(ended, file)
    record = search.record(found, budget, ended)
    results.write(record, file.with_name(results.SEARCHES.name))
    _, died = _compare(winner, options, workdir, file)
    told = reading.read_searches(file.with_name(results.SEARCHES.name))[-1]
    text = "\n\n".join(
        [
            f"{told.spent:,} of {budget:,} steps spent on {told.rungs[0].count} of {told.candidates} placements, "
            "drawn evenly over the numbers of stacks",
            *(f"at step {rung.step:,}:\n{table(reading.RUNG, rung.rows)}" for rung in told.rungs),
            reading.outcome(told, reading.read(file)),
        ]
    )
    return Outcome(record, text, 1 if died else 0)


def _compare(winner: lab.Job, options: argparse.Namespace, workdir: Path, file: Path) -> tuple[list, list]:
    """Runs of the winner and of the rule from all seeds that are not in the results yet, and those that died."""
    there = {results.key_of(record) for _, record in results.lines(file)}
    names = [winner.variant.name, search.RULE]
    wanted = lab.jobs(names, _seeds(options.seeds), winner.size, winner.steps, winner.device, winner.precision)
    jobs = [job for job in wanted if job.key() not in there]
    records, died = _through_ray(jobs, options, workdir, file) if jobs else ([], [])
    for job, why in died:
        log(_dead(job, why))
    return records, died


def _table(options: argparse.Namespace) -> Outcome:
    """What is in the file of results beside the paper's numbers, setting by setting; as files with --out."""
    file = Path(options.results).expanduser()
    runs = reading.read(file)
    if not runs:
        raise UserError(f"There are no results in {results.short(file)}; first {reading.run_command(FIRST, (0, 1, 2))}")
    parts, written = [], {}
    for setting, each in reading.settings(runs).items():
        found = reading.summary(each, options.metric, options.bench)
        rows = [_compared(found, row) for row in found.rows]
        headers = ["variant", "seeds", "ours, %", "95 %", "against its control", f"paper {found.bench}"]
        parts.append(f"{setting}: {found.words}\n{table([*headers, 'sign', 'context'], rows)}\n{found.pairs}")
        parts.append("\n".join(["What the paper claims:", *map(_told, claims.findings(found))]))
        written |= {f"{_slug(str(setting))}/{name}": data for name, data in files(each, found).items()}
    for each in reading.read_searches(file.with_name(results.SEARCHES.name)):
        parts.append(f"search, {each.setting}, seed {each.seed}: {reading.outcome(each, runs)}")
    if options.out:
        parts.append(f"{len(write_files(options.out, written))} files are in {options.out}")
    return Outcome(reading.table(runs, options.metric, options.bench).records(), "\n\n".join(parts))


def _ship(options: argparse.Namespace) -> Outcome:
    """Writes the models of finished runs where the app looks for them, a card beside each."""
    if not options.names or "all" in options.names:
        raise UserError("lab ship needs names of variants; python -m app lab list shows them.")
    seeds = _seeds(options.seeds)
    if len(seeds) > 1:
        raise UserError(f"lab ship takes the model of one seed, not of {options.seeds}.")
    file, workdir = Path(options.results).expanduser(), Path(options.workdir).expanduser().resolve()
    root = Path(options.out).expanduser() if options.out else CHECKPOINTS
    device = choose_device(options.device)[0].type
    size = lab.size_of(options.size, gpu=device == "cuda")
    jobs = lab.jobs(options.names, seeds, size, options.steps, device, options.precision or "")
    runs = {results.key_of(record): record for _, record in results.lines(file)}
    # whatever is wrong is said before anything is written
    twins = [ship.trained(job, workdir, _command(job, again=job.key() in runs)) for job in jobs]
    for job in jobs:
        if job.key() not in runs:
            raise UserError(f"{job.name} has no line in {results.short(file)}; its run writes one: {_command(job)}")
    rows, found = [], []
    for job, twin in zip(jobs, twins, strict=True):
        record = runs[job.key()]
        out = ship.ship(twin, ship.folder_of(job.variant, root), record)
        (out / "README.md").write_text(card(job, record), encoding="utf-8")
        held = sum(path.stat().st_size for path in out.iterdir())
        found.append({"variant": job.variant.name, "folder": str(out), "bytes": held})
        rows.append([job.variant.name, str(out), gigabytes(held)])
    return Outcome({"shipped": found}, table(["variant", "folder", "size"], rows))


def card(job: lab.Job, record: dict) -> str:
    """What a shipped model is, how it scored, and what makes it again."""
    run = reading.Run(**{name: record[name] for name in reading.Run.__dataclass_fields__ if name in record})
    setting = reading.Setting.of(run)
    again = [_command(job, again=True), reading.ship_command(job.variant.name, job.seed, setting)]
    scores = {"fine detail": run.accuracy["fine"], "coarse": run.accuracy["coarse"]}
    scores |= {f"fine, glyphs of {height} px": each for height, each in run.accuracy["by_glyph_px"].items()}
    lines = [f"| {name} | {each['n']} | {100 * each['exact_match']:.1f} % |" for name, each in scores.items()]
    tower = "the frozen vision tower is that of `embedded/hires`, and is read from there"
    if job.variant.tuned:
        tower = (
            "the vision tower was trained, too: it is that of `embedded/hires`, read from there, and the changes in "
            f"{CHANGE}"
        )
    return (
        f"# lab-{job.variant.name}\n\nA variant of the lab: {job.variant.words}. Seed {job.seed}, {setting}, "
        f"{run.when}. One seed, at toy size: what can be concluded, from all seeds, says `python -m app lab table`. "
        "It reads short codes in colour on scenes like its own, 128 x 128 px seen at most: no photographs.\n\n"
        "| exact match | questions | |\n|---|--:|--:|\n" + "\n".join(lines) + "\n\n"
        "Scored by the run itself, before its weights were rounded to float16.\n\n"
        f"## Recipe\n\n    {again[0]}\n    {again[1]}\n\n"
        "All that defines the run is in recipe.json, its line of the results. The weights are projector and decoder; "
        f"{tower}.\n"
    )


def _command(job: lab.Job, again: bool = False) -> str:
    """What trains it; again: although its line is in the results."""
    setting = reading.Setting(job.steps, job.device, job.size.name, job.precision)
    return reading.run_command([job.variant.name], [job.seed], setting, again)


def _dead(job: lab.Job, why: many.Died) -> str:
    return f"{job.name} died {many.RETRIES + 1} times ({why}); the same command goes on from its last checkpoint."


def _told(finding: claims.Finding) -> str:
    lines = [f"{finding.kind}: {finding.claim.words} ({finding.claim.source})"]
    lines += [f"    {outcome.words}" for outcome in finding.outcomes]
    return "\n".join([*lines, *([f"    ({finding.claim.caution})"] if finding.claim.caution else [])])


def _slug(words: str) -> str:
    return "-".join(words.replace(",", "").split())


def _compared(found: reading.Summary, row: reading.Row) -> list:
    gap, paper = found.difference(row), reading.PAPER.get(row.variant)
    printed = paper.scores.get(found.bench) if paper else None
    control = found.against(row)
    beside = None if control == row.variant else f"{control} has not been run"
    if gap is not None:
        beside = f"{gap.points} ({gap.points_ends}) against {control}"
    return [
        row.variant,
        len(row.seeds),
        row.percent,
        row.mean.percent_ends,
        beside,
        None if printed is None else f"{printed:.1f}",
        found.judge(row).kind,
        row.spent("context"),
    ]


def _row(record: dict) -> list:
    found = [record["accuracy"].get(kind) for kind in ("fine", "coarse")]  # no text has coarse questions
    scores = [each and f"{100 * each['exact_match']:.1f} %" for each in found]
    start = [record["variant"], record["seed"], record["steps"]]
    return [*start, *scores, record["cost"]["context"], f"{60 * record['hours']:.1f}"]


def _through_ray(todo: Sequence[lab.Job], options: argparse.Namespace, workdir: Path, file: Path):
    """(records of the runs that ended, (job, why) of those that died), the data made first."""
    records, died = [], []
    work, gpu = [(job, workdir) for job in todo], todo[0].device == "cuda"
    with _progress(workdir) as progress:
        _prepare(todo, options, workdir, progress)
        if options.again and options.action == "run":
            for job in todo:
                lab.forget(job, workdir)
        for number, found in many.through_ray(lab.run, work, options.ray, gpu, progress):
            if isinstance(found, many.Died):
                died.append((todo[number], found))
            else:
                results.write(found, file)
                records.append(found)
    return records, died


@contextmanager
def _progress(workdir: Path) -> Iterator[Callable[[float, str], None]]:
    """A line that says how far it is, and UserError for a work folder that cannot be used."""
    line = ProgressLine(every=60)
    try:
        yield line.fraction
    except OSError as error:
        raise UserError(f"{error.filename or workdir} cannot be used: {error.strerror or error}.") from error
    finally:
        line.clear()


def _prepare(jobs: Sequence[lab.Job], options: argparse.Namespace, workdir: Path, progress) -> None:
    """What these runs read, made here unless they run on a cluster: there each machine makes what it lacks."""
    size, device = jobs[0].size, jobs[0].device
    if not options.ray:
        for pixels in sorted({job.variant.pixels for job in jobs if job.variant.reads != "text"}):
            scenes.prepare(
                workdir, size.scenes, size.validation, size.test, device=device, progress=progress, pixels=pixels
            )


def _seeds(text: str) -> list[int]:
    """Seeds from "0,1,2"; UserError where one is no whole number from 0 on."""
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        seeds = [-1]
    if min(seeds) < 0:
        raise UserError(f"--seeds is {text}; give whole numbers from 0 on, as 0,1,2.")
    return seeds
