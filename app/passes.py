"""What the parts of an answer cost beside one another: prefill, replay, first token, step. A table of `bench`.

The things that are compared take turns within one run, as everywhere in the bench; every figure is a median over the
rounds. Decoding is also held against the memory: no step can be faster than its weights are read. Knows nothing about
how a model is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

from app.doctor import QUESTION, picture
from app.output import ProgressLine, table
from app.peak import peak_of
from app.scaling import unending
from model.engine import Engine
from model.loading import free_memory, gigabytes
from model.plan import BASE
from model.probe import AttentionWish, Probe
from model.types import Answer, Sampling

ROUNDS = 5
TOKENS = 32  # of the answers whose decoding is timed
ROWS = 64  # attention rows of the replay
COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes that are copied to measure the memory

FIGURES = {  # name -> (what it is, what it should be)
    "replay_over_prefill": (f"replay with all norms and {ROWS} attention rows ÷ one prefill", "≤ 1.3"),
    "eager_over_prefill": ("the same pass by eager attention, all maps kept ÷ one prefill", ""),
    "toggle_over_pixels": ("first token after a toggle ÷ first token from pixels", "≤ 1.05 × the next"),
    "prefill_share": ("prefill ÷ first token from pixels", ""),
    "decode_over_plain": ("tokens/s of decoding ÷ plain transformers'", ""),
    "compiled_over_plain": ("tokens/s of compiled ÷ plain decoding", ""),
    "decode_share": ("tokens/s of decoding ÷ what the memory allows", "≥ 0.5 at 2B on a GPU"),
    "peak_over_plain": ("peak memory, weights included: answer ÷ plain transformers' generate", "≤ 1.10"),
}


def measure(engine: Engine) -> dict[str, float | None]:
    """Ratios of `FIGURES` and what they are made of; None where something cannot be had here."""
    content = [{"type": "image", "image": picture(engine)}, {"type": "text", "text": QUESTION}]
    prompt = engine.prompt([{"role": "user", "content": content}])
    plan, once, long = engine.layout.default, Sampling(max_new_tokens=1), Sampling(max_new_tokens=TOKENS)
    stacks = [name for name in plan.sources() if name != BASE]
    toggled = plan.without(stacks[-1] if stacks else BASE)
    plain = engine.adapter.plain_inputs(prompt)
    inputs, same = (None, plan) if plain is None else ({k: v.to(engine.device) for k, v in plain[0].items()}, plain[1])
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        times.setdefault(name, []).append(time.perf_counter() - start)

    def first(name: str, plan) -> None:
        times.setdefault(name, []).append(engine.answer(prompt, plan, once).first_token_seconds)

    def pace(name: str, of: Callable[[], float]) -> None:
        times.setdefault(name, []).append(of())

    with unending(engine):
        answer = engine.answer(prompt, plan, long)
        probe = _probe(engine, prompt.input_ids.shape[1] + len(answer.tokens))
        fits = _maps(engine, prompt.input_ids.shape[1] + len(answer.tokens)) < free_memory(engine.device) / 2
        progress = ProgressLine("round of passes")
        for turn in range(ROUNDS + 1):
            engine.forget()
            first("pixels", plan)
            first("toggle", toggled)
            timed("prompt", lambda: engine.logits(prompt, toggled, last=1))
            timed("prefill", lambda: engine.logits(prompt, plan, answer, last=1))
            timed("replay", lambda: engine.replay(prompt, answer, plan, probe))
            if fits:
                timed("eager", lambda: _every_map(engine, lambda: engine.logits(prompt, plan, answer, last=1)))
            with plainly(engine):
                pace("plain", lambda: _pace(engine.answer(prompt, same, long)))
            if engine.compiled is not None:
                pace("compiled", lambda: _pace(engine.answer(prompt, same, long)))
            if inputs is not None:
                pace("transformers", lambda: _plain_pace(engine, inputs))
            if not turn:
                times.clear()  # the first of everything is slower
            progress.count(turn, ROUNDS)
        progress.clear()
        memory = bandwidth(engine)
        with plainly(engine):
            peaks = _peaks(engine, prompt, same, inputs, long)
    found = {name: median(values) for name, values in times.items()}
    length = prompt.input_ids.shape[1] + TOKENS / 2
    limit = memory / step_bytes(engine, length)
    decode = found.get("compiled", found["plain"])

    def over(one: str, other: str) -> float | None:
        return found[one] / found[other] if one in found and other in found else None

    return {
        "replay_over_prefill": over("replay", "prefill"),
        "eager_over_prefill": over("eager", "prefill"),
        "toggle_over_pixels": over("toggle", "pixels"),
        "prefill_share": over("prompt", "pixels"),
        "decode_over_plain": over("compiled" if engine.compiled else "plain", "transformers"),
        "compiled_over_plain": over("compiled", "plain"),
        "decode_share": decode / limit,
        "peak_over_plain": peaks,
        "prefill_seconds": found["prefill"],
        "pixels_seconds": found["pixels"],
        "decode_tokens_per_second": decode,
        "limit_tokens_per_second": limit,
        "memory_bytes_per_second": memory,
    }


def in_words(found: dict[str, float | None], why_decode: str) -> str:
    """The table, and what the ratios are made of. why_decode: why it decodes as it does."""
    rows = [[words, found[name], goal] for name, (words, goal) in FIGURES.items()]
    return (
        f"Parts of an answer, medians of {ROUNDS} rounds in turn, answers of {TOKENS} tokens:\n"
        f"{table(['what', 'figure', 'goal'], rows)}\n"
        f"Decoding: {found['decode_tokens_per_second']:.3g} tokens/s ({why_decode}); the memory copies "
        f"{gigabytes(found['memory_bytes_per_second'])}/s, which allows {found['limit_tokens_per_second']:.3g}."
    )


@contextmanager
def plainly(engine: Engine) -> Iterator[None]:
    """Decodes plainly meanwhile."""
    compiled, engine.compiled = engine.compiled, None
    try:
        yield
    finally:
        engine.compiled = compiled


def step_bytes(engine: Engine, length: float) -> float:
    """Bytes that one token's step reads at least: the LLM's weights, and keys and values of `length` positions.

    Of a mixture of experts those that one token goes through; of the embeddings one row, which is as good as nothing.
    """
    text = engine.adapter.decoder.config
    experts = getattr(text, "num_experts", 0) or getattr(text, "num_local_experts", 0) or 0
    share = (getattr(text, "num_experts_per_tok", 0) or 0) / experts if experts else 1.0
    rows = {tensor.data_ptr() for tensor in engine.adapter.embed.parameters()}
    named = [(name, t) for name, t in engine.adapter.decoder.named_parameters() if t.data_ptr() not in rows]
    named += list(engine.adapter.lm_head.named_parameters())
    weights = sum(t.element_size() * t.nelement() * (share if ".experts." in f".{name}" else 1.0) for name, t in named)
    heads = text.num_attention_heads
    groups, width = getattr(text, "num_key_value_heads", None) or heads, getattr(text, "head_dim", None)
    keys = 2 * groups * (width or text.hidden_size // heads) * engine.dtype.itemsize
    return weights + length * keys * len(engine.layout.attention_layers)


def bandwidth(engine: Engine) -> float:
    """Bytes per second that this device reads and writes when it copies a large tensor: the best of a few times."""
    source = torch.ones(COPIED.get(engine.device.type, COPIED["cpu"]), dtype=torch.uint8, device=engine.device)
    target, best = torch.empty_like(source), float("inf")
    with engine.compute_threads():
        for _ in range(5):
            start = time.perf_counter()
            target.copy_(source)
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)
            best = min(best, time.perf_counter() - start)
    return 2 * source.nelement() / best


# ---- inside


def _probe(engine: Engine, length: int) -> Probe:
    """All norms, and the last rows of attention in every layer that has some."""
    wish = AttentionWish(engine.layout.attention_layers, tuple(range(max(0, length - ROWS), length)))
    return Probe(attention=(wish,))


def _maps(engine: Engine, length: int) -> int:
    """Bytes of every attention map of one pass."""
    text = engine.adapter.decoder.config
    return len(engine.layout.attention_layers) * text.num_attention_heads * length**2 * engine.dtype.itemsize


def _every_map(engine: Engine, work: Callable[[], object]) -> None:
    """Some pass by transformers' eager attention, with every map kept, as `output_attentions` does it."""
    decoder, kept = engine.adapter.decoder, []
    before = decoder.config._attn_implementation
    layers = [decoder.layers[layer].self_attn for layer in engine.layout.attention_layers]
    handles = [layer.register_forward_hook(lambda module, args, out: kept.append(out[1])) for layer in layers]
    try:
        decoder.set_attn_implementation("eager")
        work()
    finally:
        decoder.set_attn_implementation(before)
        for handle in handles:
            handle.remove()


def _pace(answer: Answer) -> float:
    """Tokens per second after the first."""
    return (len(answer.tokens) - 1) / (answer.seconds - answer.first_token_seconds)


class _Clock:
    """When transformers' generate hands over the prompt and each token."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is to be done at the end."""


def _plain_pace(engine: Engine, inputs: dict[str, torch.Tensor]) -> float:
    """Tokens per second of plain transformers after the first, with its usual cache."""
    clock = _Clock()
    with engine.compute_threads():
        engine.model.generate(
            **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, streamer=clock
        )  # fmt: skip
    return (len(clock.times) - 2) / (clock.times[-1] - clock.times[1])


def _peaks(engine: Engine, prompt, plan, inputs, sampling: Sampling) -> float | None:
    """Peak memory of an answer from pixels ÷ that of plain generate, each with the weights."""
    if inputs is None:
        return None
    engine.forget()
    weights = engine.memory_bytes
    ours = peak_of(lambda: engine.answer(prompt, plan, sampling), engine.device)
    engine.forget()
    how = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    return (weights + ours) / (weights + peak_of(lambda: engine.model.generate(**inputs, **how), engine.device))
