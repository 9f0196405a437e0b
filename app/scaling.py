"""What grows and how fast: more clients at once, more visual tokens, more plans. Tables of `bench`.

Clients that ask one after another and clients that ask at once are timed in turn within one run, each with an image, a
question and a plan of its own. A size that the model or the memory has no room for is a row with the reason. Knows
nothing about how a model is loaded.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median

import torch
from PIL import Image, ImageDraw

from app.output import ProgressLine, table
from model.engine import Engine
from model.errors import UserError
from model.loading import gigabytes
from model.need import of_answer
from model.plan import Plan
from model.prompt import Prompt
from model.types import Answer, Sampling

TABLES = ("clients", "images", "plans")
CLIENTS = (1, 4, 16, 32)
VISUAL = (256, 512, 1024, 2048, 4096)  # visual tokens
PLANS = (1, 2, 4, 8)
TOKENS = 32  # of every answer: end tokens do not end it here
ROUNDS = 3
SIDES = (64, 128, 256, 512, 1024, 2048)  # pixels of the pictures that are tried for a number of visual tokens


def measure(engine: Engine, wanted: Sequence[str] = TABLES) -> dict[str, list[dict]]:
    """The rows of these of the tables, as plain values."""
    rows = {"clients": clients, "images": images, "plans": plans}
    with unending(engine):
        return {name: rows[name](engine) for name in TABLES if name in wanted}


@contextmanager
def unending(engine: Engine) -> Iterator[None]:
    """Answers are as long as they may be, so that all that are timed have the same number of tokens."""
    end, engine._end = engine._end, frozenset()
    try:
        yield
    finally:
        engine._end = end


# ---- clients


def clients(engine: Engine) -> list[dict]:
    """Per number of clients: tokens per second one after another and at once, and whether the answers are the same."""
    jobs = [(_prompt(engine, [_picture(i)], f"What does sign {i} say?"), _plan(engine, i)) for i in range(max(CLIENTS))]

    def ask(job: tuple[Prompt, Plan]) -> Answer:
        return engine.answer(*job, _whole())

    def at_once(asked: list) -> list[Answer]:
        ready = threading.Barrier(len(asked))
        with ThreadPoolExecutor(len(asked)) as pool:
            return list(pool.map(lambda job: (ready.wait(), ask(job))[1], asked))

    ask(jobs[0])  # the first is slower, whatever it is
    rows = []
    progress = ProgressLine("clients")
    for at, count in enumerate(CLIENTS):
        alone, together, first, same = [], [], [], 0
        for _ in range(ROUNDS):
            seconds, wanted = _timed(engine, lambda count=count: [ask(job) for job in jobs[:count]])
            alone.append(_tokens(wanted) / seconds)
            seconds, found = _timed(engine, lambda count=count: at_once(jobs[:count]))
            together.append(_tokens(found) / seconds)
            first.append(max(answer.first_token_seconds for answer in found))
            same = sum(_ids(one) == _ids(other) for one, other in zip(found, wanted, strict=True))
        rows.append(
            {
                "clients": count,
                "tokens_per_second_alone": median(alone),
                "tokens_per_second_at_once": median(together),
                "ratio": median(together) / median(alone),
                "last_first_token_seconds": median(first),
                "same_answers": same,
            }
        )
        progress.count(at + 1, len(CLIENTS))
    progress.clear()
    return rows


# ---- larger images, more plans


def images(engine: Engine) -> list[dict]:
    """Per number of visual tokens: what the tower, the first token and each further one take."""
    rows = []
    for wanted in VISUAL:
        row = {"asked": wanted, "refused": ""}
        try:
            prompt = _prompt(engine, pictures(engine, wanted), "What does the sign say?")
            need = of_answer(engine, prompt, [_plan(engine, 0)], TOKENS)
            need.check(engine)
            made, peak = [], []
            for _ in range(ROUNDS):
                before = _reset_peak(engine)
                made += _timed(engine, lambda prompt=prompt: [engine.answer(prompt, _plan(engine, 0), _whole())])[1]
                peak.append(_peak(engine, before))
        except UserError as error:
            rows.append({**row, "refused": str(error)})
            continue
        pace = [(len(answer.tokens) - 1) / (answer.seconds - answer.first_token_seconds or 1) for answer in made]
        rows.append(
            {
                **row,
                "visual_tokens": prompt.visual_tokens,
                "prompt_tokens": prompt.input_ids.shape[1],
                "vision_seconds": median(answer.vision_seconds for answer in made),
                "first_token_seconds": median(answer.first_token_seconds for answer in made),
                "decode_tokens_per_second": median(pace) or None,  # None: no room for a second token
                "estimated_bytes": need.bytes,
                "peak_bytes": None if None in peak else max(peak),
            }
        )
    return rows


def plans(engine: Engine) -> list[dict]:
    """Per number of plans in one batch: seconds, and as a multiple of one plan's."""
    prompt = _prompt(engine, [_picture(0)], "What does the sign say?")
    rows, one = [], 0.0
    for count in PLANS:
        batch = [_plan(engine, i) for i in range(count)]
        try:
            of_answer(engine, prompt, batch, TOKENS).check(engine)
            times = [
                _timed(engine, lambda batch=batch: engine.answer_many(prompt, batch, _whole()))[0]
                for _ in range(ROUNDS)
            ]
        except UserError as error:
            rows.append({"plans": count, "refused": str(error)})
            continue
        one = one or median(times)
        rows.append({"plans": count, "seconds": median(times), "over_one": median(times) / one, "refused": ""})
    return rows


def pictures(engine: Engine, wanted: int) -> list[Image.Image]:
    """Pictures that take about so many visual tokens: one of a fitting size, or several where one cannot."""
    best, taken = None, 0
    for side in SIDES:
        for size in ((side, side), (2 * side, side)):
            try:
                count = sum(math.prod(region.grid) for region in engine.adapter.regions(_picture(0, size)))
            except UserError:  # too small, or too long and narrow for this model
                continue
            if best is None or abs(math.log(count / wanted)) < abs(math.log(taken / wanted)):
                best, taken = size, count
    if best is None:
        raise UserError(f"{engine.name} takes none of the pictures of the bench.")
    return [_picture(i, best) for i in range(max(1, round(wanted / taken)))]


# ---- in words


def tables(rows: dict[str, list[dict]], why_alone: str) -> str:
    """The tables as text; `why_alone`: why this model's requests decode one by one, "" where they share."""
    words = {"clients": lambda rows: _clients(rows, why_alone), "images": _images, "plans": _plans}
    return "\n\n".join(words[name](found) for name, found in rows.items())


def _clients(rows: list[dict], why_alone: str) -> str:
    parts = ["Clients at once, each with an image, a question and a plan of its own:"]
    parts += [f"Their requests decode one by one: {why_alone}."] if why_alone else []
    names = ("clients", "tokens_per_second_alone", "tokens_per_second_at_once", "ratio", "last_first_token_seconds")
    heads = ["clients", "tokens/s alone", "tokens/s at once", "ratio", "last first token (s)", "same answers"]
    cells = [[*map(row.get, names), f"{row['same_answers']} of {row['clients']}"] for row in rows]
    return "\n".join([*parts, table(heads, cells)])


def _images(rows: list[dict]) -> str:
    names = ["visual_tokens", "prompt_tokens", "vision_seconds", "first_token_seconds", "decode_tokens_per_second"]
    heads = ["about", "visual", "prompt", "vision (s)", "first token (s)", "tokens/s", "estimate", "peak"]
    cells = [
        [row["asked"], *map(row.get, names), gigabytes(row["estimated_bytes"]), _size(row["peak_bytes"])]
        for row in rows
        if not row["refused"]
    ]
    parts = ["Visual tokens:", *([table(heads, cells)] if cells else [])]
    return "\n".join([*parts, *(f"{row['asked']}: {row['refused']}" for row in rows if row["refused"])])


def _plans(rows: list[dict]) -> str:
    done = [[row["plans"], row["seconds"], row["over_one"]] for row in rows if not row["refused"]]
    parts = ["Plans in one batch:", table(["plans", "seconds", "÷ one"], done)] if done else ["Plans:"]
    return "\n".join([*parts, *(f"{row['plans']}: {row['refused']}" for row in rows if row["refused"])])


def _size(bytes: int | None) -> str:
    return "-" if bytes is None else gigabytes(bytes)


# ---- small things


def _whole() -> Sampling:
    return Sampling(max_new_tokens=TOKENS)


def _prompt(engine: Engine, shown: list[Image.Image], question: str) -> Prompt:
    content = [{"type": "image", "image": image} for image in shown]
    return engine.prompt([{"role": "user", "content": [*content, {"type": "text", "text": question}]}])


def _picture(number: int, size: tuple[int, int] = (128, 128)) -> Image.Image:
    """A sign with its number; no two are the same picture."""
    image = Image.new("RGB", size, (40, 70 + number % 128, 120))
    ImageDraw.Draw(image).text((size[0] // 2, size[1] // 2), f"SIGN {number}", fill=(250, 240, 200), anchor="mm")
    return image


def _plan(engine: Engine, number: int) -> Plan:
    """The default plan with gains of its own; number 0 is the default plan."""
    return Plan((e.source, e.layer, e.gain * (1 + number / 64)) for e in engine.layout.default)


def _timed(engine: Engine, work: Callable[[], list[Answer]]) -> tuple[float, list[Answer]]:
    """(seconds, what it gave) of some work that finds nothing computed before."""
    engine.forget()
    start = time.perf_counter()
    found = work()
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    return time.perf_counter() - start, found


def _reset_peak(engine: Engine) -> int:
    """Bytes in use on a GPU, from where the peak counts anew; 0 elsewhere."""
    if engine.device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(engine.device)
    return torch.cuda.memory_allocated(engine.device)


def _peak(engine: Engine, before: int) -> int | None:
    """Bytes taken beside those at most; None where torch does not count them."""
    return torch.cuda.max_memory_allocated(engine.device) - before if engine.device.type == "cuda" else None


def _tokens(answers: list[Answer]) -> int:
    return sum(len(answer.tokens) for answer in answers)


def _ids(answer: Answer) -> list[int]:
    return [token.id for token in answer.tokens]
