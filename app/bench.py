"""`bench`: what things cost here, as seconds and as ratios within one run.

The things that are compared take turns, round after round, so that a busy machine slows all of them alike; every figure
is a median over the rounds. Plain transformers means `generate` of the same weights in the same process. The page is
started as a visitor would start it, in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from statistics import median

import torch

from analysis import attention, figures, norms
from app import passes, scaling
from app.commands import how, introduce, load_from
from app.doctor import QUESTION, picture
from app.output import Outcome, ProgressLine, table
from model.engine import Engine
from model.errors import UserError
from model.loading import gigabytes
from model.plan import BASE
from model.probe import Probe
from model.types import Sampling

ROUNDS = 7
TOKENS = 8  # of the answers that are timed: a short answer
PAGE_TIMEOUT = 120  # seconds
TABLES = ("answer", "parts", *scaling.TABLES)  # what can be asked for alone


def run(options: argparse.Namespace) -> Outcome:
    """The tables of one model on this machine."""
    drawn = options.random_weights
    wanted = tuple(options.only or TABLES)
    engine = build_from(drawn, options) if drawn else load_from(options.model, options)
    introduce(engine)
    data = {
        "model": engine.name,
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "machine": f"{platform.processor() or platform.machine()}, {engine.threads or torch.get_num_threads()} threads",
        "how": list(engine.reasons),
        "random_weights": bool(drawn),
    }
    said = [RANDOM] if drawn else []
    said.append(f"{engine.name} on {data['device']} ({data['machine']}), {data['dtype']}")
    if "answer" in wanted:
        seconds = measure(engine)
        page = None if drawn else page_start(options)
        data |= {"rounds": ROUNDS, "answer_tokens": TOKENS, "memory_bytes": engine.memory_bytes}
        data |= {"seconds": {**seconds, "page_start": page}, "ratios": ratios(seconds)}
        said.append(_answer_in_words(engine, data))
    if "parts" in wanted:
        data["parts"] = passes.measure(engine)
        said.append(passes.in_words(data["parts"], engine.reasons[-1]))
    if grown := scaling.measure(engine, wanted):
        data["scaling"] = {**grown, "answer_tokens": scaling.TOKENS, "decode_alone": engine.together.why_not}
        said.append(f"Medians of {scaling.ROUNDS} rounds, answers of {scaling.TOKENS} tokens each.")
        said.append(scaling.tables(grown, engine.together.why_not))
    return Outcome(data, "\n\n".join(said))


def _answer_in_words(engine: Engine, data: dict) -> str:
    """The table of short answers."""
    seconds, page = data["seconds"], data["seconds"]["page_start"]
    rows = [
        ["a short answer, warm, picture not seen before", f"{seconds['answer']:.3f} s"],
        ["a toggle: new answer and new figures, picture seen", f"{seconds['toggle']:.3f} s"],
        *([] if page is None else [["the page, from the command to the first byte", f"{page:.1f} s"]]),
        ["memory held", gigabytes(engine.memory_bytes)],
        *[
            [words, "-" if data["ratios"][key] is None else f"{data['ratios'][key]:.2f}"]
            for key, words in RATIOS.items()
        ],
    ]
    title = f"Short answers, medians of {ROUNDS} rounds in turn, of up to {TOKENS} tokens:"
    return f"{title}\n{table(['what', 'figure'], rows)}"


RANDOM = "Random weights in the true shape: speeds and memory are real, answers are not."


def build_from(shape: str, options: argparse.Namespace) -> Engine:
    """An engine of this shape with random weights, with progress on a terminal."""
    from model import shapes  # its configs and processors are wanted by nobody else

    progress = ProgressLine()
    try:
        return shapes.build(shape, **how(options), progress=progress.fraction)
    finally:
        progress.clear()


RATIOS = {
    "answer_over_plain": "answer ÷ plain transformers' generate, same plan",
    "traced_over_plain": "traced answer ÷ plain transformers' generate, same plan",
    "traced_over_answer": "traced answer ÷ answer",
    "two_plans_over_one": "two plans in one batch ÷ one plan, picture seen",
    "cached_over_not": "answer with the picture seen ÷ not seen",
}


def ratios(seconds: dict[str, float]) -> dict[str, float | None]:
    """What the medians say of one another; None where plain transformers cannot run the checkpoint."""
    plain = seconds.get("plain_generate")
    return {
        "answer_over_plain": seconds["answer_same_plan"] / plain if plain else None,
        "traced_over_plain": seconds["traced_same_plan"] / plain if plain else None,
        "traced_over_answer": seconds["answer_traced"] / seconds["answer"],
        "two_plans_over_one": seconds["two_plans"] / seconds["answer_cached"],
        "cached_over_not": seconds["answer_cached"] / seconds["answer"],
    }


def measure(engine: Engine) -> dict[str, float]:
    """Median seconds of each thing, all of them in turn, after one round that is not counted."""
    prompt = engine.prompt(
        [{"role": "user", "content": [{"type": "image", "image": picture(engine)}, {"type": "text", "text": QUESTION}]}]
    )
    plan, sampling = engine.layout.default, Sampling(max_new_tokens=TOKENS)
    stacks = [name for name in plan.sources() if name != BASE]
    toggled = plan.without(stacks[-1] if stacks else BASE)
    plain = engine.adapter.plain_inputs(prompt)
    layers = engine.layout.attention_layers

    def unseen(work: Callable) -> Callable:
        def run() -> None:
            engine.forget()
            work()

        return run

    def trace(answer) -> None:
        wishes = (attention.wish(prompt, answer, layers),) if answer.tokens else ()
        found = engine.replay(prompt, answer, answer.plan, Probe(attention=wishes))
        figures.norms_by_layer(norms.summarise(found)).to_json()

    def toggle() -> None:
        trace(engine.answer(prompt, toggled, sampling))
        engine.image_effect(prompt, None, toggled)

    work = {
        "answer": unseen(lambda: engine.answer(prompt, plan, sampling)),
        "answer_cached": lambda: engine.answer(prompt, plan, sampling),
        "answer_traced": unseen(lambda: trace(engine.answer(prompt, plan, sampling))),
        "two_plans": lambda: engine.answer_many(prompt, [plan, toggled], sampling),
        "toggle": toggle,
    }
    if plain is not None:
        inputs, same = {key: value.to(engine.device) for key, value in plain[0].items()}, plain[1]

        def plain_generate() -> None:
            with engine.compute_threads():
                engine.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)

        work["plain_generate"] = plain_generate
        work["answer_same_plan"] = unseen(lambda: engine.answer(prompt, same, sampling))
        work["traced_same_plan"] = unseen(lambda: trace(engine.answer(prompt, same, sampling)))
    times: dict[str, list[float]] = {name: [] for name in work}
    progress = ProgressLine("round")
    for turn in range(ROUNDS + 1):
        for name, once in work.items():
            start = time.perf_counter()
            once()
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)
            if turn:
                times[name].append(time.perf_counter() - start)
        progress.count(turn, ROUNDS)
    progress.clear()
    return {name: median(values) for name, values in times.items()}


def page_start(options: argparse.Namespace) -> float:
    """Seconds from `python -m app` to the page's first byte."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "app", "--port", str(port), "--model", options.model]
    for option, value in how(options).items():
        command += [f"--{option}", value] if value else []
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ, text=True)
    try:
        while time.perf_counter() - start < PAGE_TIMEOUT:
            if process.poll() is not None:
                raise UserError(f"The page did not start: {process.stderr.read().strip()[-300:]}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
                    return time.perf_counter() - start
            except OSError:
                time.sleep(0.05)
        raise UserError(f"The page did not start within {PAGE_TIMEOUT} seconds.")
    finally:
        process.terminate()
        process.wait(30)
