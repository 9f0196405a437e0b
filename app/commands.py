"""What each command does: options in, an Outcome out. The words of the command line are in app/cli.py.

Imports the heavy half of the app, so app/cli.py imports it only when a command is known. `doctor` and `bench` have
files of their own.
"""

from __future__ import annotations

import argparse
import json
import logging
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from analysis import compare as comparing
from analysis import evaluate as scoring
from app.limits import limits_from
from app.output import Outcome, ProgressLine, log, printable, table
from model.engine import Engine
from model.errors import UserError
from model.images import Limits, check_prompt, check_question, read_image
from model.loading import EMBEDDED, Zoo, canonical, check, choose_device, embedded_names, gigabytes, introduction, load
from model.need import of_answer
from model.plan import Plan, presets
from model.prompt import Prompt
from model.types import Answer, Sampling

DEFAULT_PLAN = ("default", "as trained")
HOW = ("device", "dtype", "attention", "decode")  # options that say where and how a model runs

# ---- from options to values; each refuses with a UserError


def sampling_from(options: argparse.Namespace, limits: Limits) -> Sampling:
    """The sampling settings, the answer no longer than the limits allow."""
    if options.max_new_tokens > limits.max_answer_tokens:
        raise UserError(
            f"--max-new-tokens is {options.max_new_tokens}; at most {limits.max_answer_tokens} are allowed "
            "(--max-answer-tokens)."
        )
    return Sampling(options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.seed)


def messages_from(images: Sequence[str], question: str, limits: Limits) -> tuple[list[dict], list[str]]:
    """(one user's turn: the images, then the question; what was done to the images, a line each)."""
    if len(images) > limits.max_images:
        raise UserError(f"{len(images)} images were given; at most {limits.max_images} are taken (--max-images).")
    question = check_question(question, limits)
    content: list[dict] = []
    done: list[str] = []
    for path in images:
        image, notes = read_image(path, limits)
        done += [f"{path}: {'; '.join(notes)}"] if notes else []
        content.append({"type": "image", "image": image})
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}], done


def prompt_from(engine: Engine, messages: list[dict], limits: Limits) -> Prompt:
    """The tokenised prompt, checked against the limits."""
    prompt = engine.prompt(messages)
    check_prompt(prompt.input_ids.shape[1], limits)
    return prompt


def plan_from(text: str | None, engine: Engine) -> Plan:
    """A plan by its text or by a preset's name, checked against the model; None is as trained."""
    if text is None or text.strip().lower() in DEFAULT_PLAN:
        return engine.layout.default
    return presets(engine.layout).get(text.strip().lower(), None) or Plan.parse(text).validate(engine.layout)


def check_plan_text(text: str | None) -> None:
    """UserError for a plan that no model could run, said before a model is loaded."""
    if text is not None and "@" in text:
        Plan.parse(text)


def how(options: argparse.Namespace) -> dict[str, str | None]:
    """Where and how a model is to run, as `load` takes it."""
    return {name: getattr(options, name) for name in HOW}


def load_from(name: str, options: argparse.Namespace) -> Engine:
    """The engine, with progress on a terminal."""
    progress = ProgressLine()
    try:
        engine = load(name, **how(options), brief=options.brief, progress=progress.fraction)
        engine.max_memory = getattr(options, "max_memory", engine.max_memory)
        return engine
    finally:
        progress.clear()


def introduce(engine: Engine, notes: Sequence[str] = ()) -> None:
    """Logs what is about to run, and why there; called when nothing can be refused any more."""
    for line in (*notes, *introduction(engine)):
        log(line)


# ---- commands


def page(options: argparse.Namespace) -> Outcome:
    """Opens the page and stays until it is stopped."""
    limits = limits_from(options)
    for name in options.model:  # what cannot be loaded is said now, not when a visitor picks it
        check(name)
    names = [*options.model, *embedded_names()]
    if not names:
        raise UserError("No embedded model is here; give one with --model, or make one: python -m app train hires.")
    check_port(options.host, options.port)
    from app.page import launch

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("model").setLevel(logging.INFO)  # which model was loaded when, and why it runs where it runs
    zoo = Zoo(names, max_memory=limits.max_memory, **how(options))
    served = launch(zoo, limits, host=options.host, port=options.port, block=False)
    host = f"[{options.host}]" if ":" in options.host else options.host
    log(f"DeepStack Lens is at http://{host}:{options.port} (Ctrl-C stops it)")
    if options.host not in ("localhost", "::1") and not options.host.startswith("127."):
        log("warning: other machines can reach the page, and it asks nobody for a password")
    try:
        threading.Event().wait()
    finally:
        served.close(verbose=False)
    return Outcome({})


def check_port(host: str, port: int) -> None:
    """UserError where the page could not listen."""
    if not 0 < port < 65536:
        raise UserError(f"--port is {port}; it must be between 1 and 65535.")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"Cannot listen on {host}:{port} ({why}); choose another --port.") from error


def models(options: argparse.Namespace) -> Outcome:
    """The supported families and what can be run."""
    from model.catalog import describe_families, describe_models

    families, found = describe_families(), [model.to_json() for model in describe_models()]
    rows = [
        [
            model["name"] + ("" if model["here"] else " *"),
            model["family"],
            _stacks_in_words(model["stacks"]),
            model["default_plan"] or UNKNOWN,
            f"{model['vision_layers']} / {model['llm_layers']}" if model["llm_layers"] else UNKNOWN,
            model["hidden_size"] or UNKNOWN,
            _parameters_in_words(model),
            *(_memory_in_words(model, key) for key in ("bytes_bfloat16", "bytes_float32")),
        ]
        for model in found
    ]
    heads = ["model", "family", "stacks", "default plan", "layers", "width", "parameters", "bfloat16", "float32"]
    notes = ["Stacks: tapped vision blocks, or samples of a high-resolution view. Layers: vision / LLM."]
    notes += ["Width: of the LLM's stream. Parameters: counted in the shapes of its config; with ~ as its name says."]
    notes += [f"Memory: of all weights. {UNKNOWN}: not known here; it stands in the checkpoint's own config."]
    notes += ["* not here: downloaded when it is asked for. Any other checkpoint of these families loads too:"]
    notes += [f"  {f['family']} (model_type {', '.join(f['model_types'])}): {f['needs']}" for f in families]
    notes += ["Where the family's own code adds the stacks, in its own words:"]
    notes += [f"  {words}" for words in dict.fromkeys(model["own_code"] for model in found if model["own_code"])]
    return Outcome({"families": families, "models": found}, "\n".join([table(heads, rows), "", *notes]))


UNKNOWN = "-"


def _stacks_in_words(stacks: list[dict] | None) -> str:
    if stacks is None:
        return UNKNOWN
    taps = dict.fromkeys(str(stack["tap"]) for stack in stacks if stack["tap"] is not None)
    return f"taps {', '.join(taps)}" if taps else f"{len(stacks)} samples" if stacks else "none"


def _parameters_in_words(model: dict) -> str:
    if model["parameters"] is None:
        return UNKNOWN
    counted = f"{model['parameters'] / 1e6:,.1f} M"
    return counted if model["parameters_counted"] else f"~{model['parameters'] / 1e9:g} B"


def _memory_in_words(model: dict, key: str) -> str:
    if model[key] is None:
        return UNKNOWN
    return f"{'' if model['parameters_counted'] else '~'}{gigabytes(model[key])}"


def ask(options: argparse.Namespace) -> Outcome:
    """One answer, streamed to a terminal."""
    limits = limits_from(options)
    sampling = sampling_from(options, limits)
    messages, notes = messages_from(options.images, options.question, limits)
    check_plan_text(options.plan)
    engine = load_from(options.model, options)
    plan = plan_from(options.plan, engine)
    prompt = prompt_from(engine, messages, limits)
    need = of_answer(engine, prompt, [plan], sampling.max_new_tokens)
    need.check(engine)
    introduce(engine, notes)
    log(f"this needs {need.in_words()}")
    with engine.stream(prompt, plan, sampling) as stream:
        for token in stream:
            if not options.json:
                print(printable(token.text), end="", flush=True)
    if not options.json:
        print(flush=True)
    answer = stream.answer
    badge, why = comparing.plan_badge(engine.layout, plan)
    said = badge if badge == "trained" else f"{badge}: {why}"
    log(
        f"plan {answer.plan} ({said}) · {answer.seconds:.2f} s, first token {answer.first_token_seconds:.2f} s · "
        f"{answer.prompt_tokens} prompt tokens, {answer.visual_tokens} of them visual"
    )
    return Outcome({**answer.to_json(), "notes": notes})


def trace(options: argparse.Namespace) -> Outcome:
    """One answer, replayed with everything recorded."""
    from app.tracing import look, write

    limits = limits_from(options)
    sampling = sampling_from(options, limits)
    messages, notes = messages_from(options.images, options.question, limits)
    check_plan_text(options.plan)
    engine = load_from(options.model, options)
    plan = plan_from(options.plan, engine)
    prompt = prompt_from(engine, messages, limits)
    introduce(engine, notes)
    seen = look(engine, prompt, plan, sampling)
    text = seen.text()
    if options.out:
        written = write(seen, Path(options.out))
        text += f"\n\n{len(written)} files are in {options.out}"
    return Outcome(seen.to_json(), text)


def compare(options: argparse.Namespace) -> Outcome:
    """Columns of models and plans, on one question or on a folder of them."""
    limits = limits_from(options)
    sampling = sampling_from(options, limits)
    for text in options.plan:
        check_plan_text(text)
    if options.scenes:
        if options.inputs:
            raise UserError("Give either images and a question, or --scenes, not both.")
        return _compare_scenes(options, limits, sampling)
    if len(options.inputs) < 2:
        raise UserError("compare needs an image and a question, or --scenes DIR (see python -m app compare --help).")
    messages, notes = messages_from(options.inputs[:-1], options.inputs[-1], limits)
    answers: list[Answer] = []
    labels, badges, truths, ends = [], [], [], []
    columns = [(engine, plans, prompt_from(engine, messages, limits)) for engine, plans in _columns(options)]
    for engine, plans, prompt in columns:
        introduce(engine, notes)
        notes = []
        for plan, answer in zip(plans, engine.answer_many(prompt, plans, sampling), strict=True):
            answers.append(answer)
            labels.append(f"{engine.name} {plan}")
            badges.append(comparing.plan_badge(engine.layout, plan))
            truths.append(engine.score(prompt, plan, options.truth) if options.truth else None)
            ends.append(engine.next_tokens(prompt, plan, answer.tokens) if answer.stopped == "end" else ())
    rows = comparing.rows(answers, labels, options.truth, truths)
    for row, answer, (badge, why) in zip(rows, answers, badges, strict=True):
        row |= {"badge": badge, "why": why, "stopped": answer.stopped}
    parts = [_divergence(answers, labels, ends, other) for other in range(1, len(answers))]
    data = {"question": options.inputs[-1], "truth": options.truth, "columns": rows, "divergence": parts}
    heads = ["model", "plan", "", "answer"] + (["exact", "CER", "log p(truth)"] if options.truth else []) + ["seconds"]
    lines = [
        [row["model"], row["plan"], row["badge"], row["answer"]]
        + ([row["exact"], row["cer"], row["logprob_truth"]] if options.truth else [])
        + [row["seconds"]]
        for row in rows
    ]
    return Outcome(data, "\n".join([table(heads, lines), "", *map(_divergence_in_words, parts)]).rstrip())


def _columns(options: argparse.Namespace) -> list[tuple[Engine, list[Plan]]]:
    """Per model its plans. Given neither: the embedded twins as trained, and the first of them with its stacks off."""
    names, texts = list(options.model), list(options.plan)
    if not names and not texts:
        twins = [name for name in embedded_names() if name.startswith(canonical(EMBEDDED))]
        columns = [(load_from(name, options), []) for name in twins]
        for i, (engine, plans) in enumerate(columns):
            plans.append(engine.layout.default)
            single = presets(engine.layout).get("single injection")
            if i == 0 and single is not None:
                plans.append(single)
        return columns
    columns = []
    for name in dict.fromkeys(canonical(name) for name in names or [EMBEDDED]):
        engine = load_from(name, options)
        columns.append((engine, list(dict.fromkeys(plan_from(text, engine) for text in texts or [None]))))
    return columns


def _divergence(answers: list[Answer], labels: list[str], ends: list[tuple], other: int) -> dict:
    """Where the first column's answer and another one part, as plain values; `at` is None where they do not."""
    found = comparing.first_divergence(answers[0], answers[other])
    data: dict = {"columns": [labels[0], labels[other]], "at": None}
    if found is None:
        return data
    sides = [
        {
            "token": side.token.text if side.token else None,
            "logprob": side.token.logprob if side.token else None,
            "top": [list(pair) for pair in side.top or ends[index]],
        }
        for side, index in zip(found.sides, (0, other), strict=True)
    ]
    return {**data, "at": len(found.prefix), "prefix": found.prefix, "sides": sides}


def _divergence_in_words(part: dict) -> str:
    first, second = part["columns"]
    if part["at"] is None:
        return f"{second} says the same as {first}."
    said = [f"“{side['token']}”" if side["token"] is not None else "the end" for side in part["sides"]]
    return f"{second} parts from {first} after “{part['prefix']}”: {said[1]} instead of {said[0]}."


def _compare_scenes(options: argparse.Namespace, limits: Limits, sampling: Sampling) -> Outcome:
    """Every question of a folder under every column."""
    folder, records = read_scenes(options.scenes, options.limit)
    results, labels = [], []
    columns = _columns(options)
    for engine, plans in columns:
        labels += [f"{engine.name} {plan}" for plan in plans]
        results += score(engine, records, plans, folder, limits, sampling, n_wrong=len(records))
    for engine, _ in columns:
        introduce(engine)
    wrong = [{(item["image"], item["question"]): item["said"] for item in result["wrong"]} for result in results]
    questions = []
    for record in records:
        key = (str(record["image"]), str(record["question"]))
        said = [misread.get(key, str(record["answer"])) for misread in wrong]
        if any(key in misread for misread in wrong):
            questions.append({"image": key[0], "question": key[1], "answer": record["answer"], "said": said})
    for result in results:
        del result["wrong"]
    heads = ["model", "plan", "n", "exact", "CER", "fine", "coarse", "seconds"]
    rows = [
        [result["model"], result["plan"], result["n"], result["exact_match"], result["cer"]]
        + [result["by_kind"].get(kind, {}).get("exact_match") for kind in ("fine", "coarse")]
        + [result["seconds"]]
        for result in results
    ]
    shown = [[q["question"], q["answer"], *q["said"]] for q in questions[:20]]
    words = [table(heads, rows)]
    if shown:
        words += ["", f"Questions that some column got wrong ({len(shown)} of {len(questions)} shown):"]
        words += [table(["question", "truth", *labels], shown)]
    return Outcome({"columns": results, "misread": questions, "labels": labels}, "\n".join(words))


def evaluate(options: argparse.Namespace) -> Outcome:
    """Exact match and CER of one model on a folder of scenes."""
    limits = limits_from(options)
    folder, records = read_scenes(options.scenes, options.limit)
    check_plan_text(options.plan)
    engine = load_from(options.model, options)
    plan = plan_from(options.plan, engine)
    (result,) = score(engine, records, [plan], folder, limits, Sampling())
    introduce(engine)
    heads = ["", "n", "exact match", "CER"]
    rows = [["all", result["n"], result["exact_match"], result["cer"]]]
    for kind, scores in result["by_kind"].items():
        rows.append([kind, *scores.values()])
    for height, scores in result["fine_by_glyph_px"].items():
        rows.append([f"fine, glyphs of {height} px", *scores.values()])
    title = f"{result['model']}, plan {result['plan']}: {result['seconds']:.0f} s on {result['device']}"
    return Outcome(result, f"{title}\n{table(heads, rows)}")


def read_scenes(folder: str, limit: int | None) -> tuple[Path, list[dict]]:
    """The folder and the records of its answers.jsonl; UserError where it is not one or a line is no JSON object."""
    path = Path(folder).expanduser()
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; it must be at least 1.")
    file = path / "answers.jsonl"
    if not file.is_file():
        raise UserError(f"There is no {file}; make one with: python -m app scenes --out {folder} --n 100 --seed 1.")
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise UserError(f"Line {number} of {file} is not JSON.") from error
        if record is not None and not isinstance(record, dict):
            raise UserError(f"Line {number} of {file} is not a JSON object.")
        if record is not None:
            records.append(record)
    return path, records[:limit]


def score(engine, records, plans, folder, limits, sampling, n_wrong: int = 20) -> list[dict]:
    """`evaluate_many` with a progress line."""
    said = plans[0] if len(plans) == 1 else f"{len(plans)} plans"
    progress = ProgressLine(f"{engine.name} {said}: question")
    try:
        return scoring.evaluate_many(engine, records, plans, folder, progress.count, sampling, n_wrong, limits)
    finally:
        progress.clear()


def scenes(options: argparse.Namespace) -> Outcome:
    """Renders scenes with exact answers."""
    from model.training.scenes import write_scenes

    if options.n < 1:
        raise UserError(f"--n is {options.n}; it must be at least 1.")
    if options.seed < 0:
        raise UserError(f"--seed is {options.seed}; it must be 0 or more.")
    progress = ProgressLine("scene")
    try:
        file = write_scenes(Path(options.out).expanduser(), options.n, options.seed, options.fonts, progress.count)
    except OSError as error:
        raise UserError(f"{options.out} cannot be written: {error.strerror or error}.") from error
    finally:
        progress.clear()
    data = {"out": str(file.parent), "answers": str(file), "n": options.n, "seed": options.seed, "fonts": options.fonts}
    return Outcome(data, f"{options.n} scenes are in {file.parent}, their questions and answers in {file}")


def train(options: argparse.Namespace) -> Outcome:
    """Makes an embedded checkpoint from nothing, then scores it on test scenes and writes its card."""
    from app import card
    from model.training.train import CHECKPOINTS, check_name
    from model.training.train import train as run

    check_name(options.name)
    for option in ("steps", "tower_steps"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} is {value}; it must be at least 1.")
    device = str(choose_device(options.device)[0])
    folder, workdir = Path(options.out or CHECKPOINTS / options.name).expanduser(), Path(options.workdir).expanduser()
    progress = ProgressLine("test question", every=60)
    try:
        if not options.card:
            run(
                options.name,
                out=folder,
                steps=options.steps,
                tower_steps=options.tower_steps,
                device=device,
                seed=options.seed,
                workdir=workdir,
                resume=options.resume,
                progress=progress.fraction,
            )
        engine = load(str(folder), device=device)
        found = card.write(folder, engine, workdir / "test", progress=progress.count)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be used: {error.strerror or error}.") from error
    finally:
        progress.clear()
    data = {"name": options.name, "out": str(folder), "results": found["results"]}
    return Outcome(data, f"{options.name} is in {folder}; its card: {folder / 'README.md'}")
