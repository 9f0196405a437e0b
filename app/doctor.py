"""`doctor`: is DeepStack active and aligned in this model, on this machine?

One picture, one question, one answer; each check looks at the running model from outside (its own hooks on the layers,
transformers' own forward, eager attention) and never at what the engine says of itself:

1. watch(): every decoder layer's input and output during one real answer
2. checks on what was seen: rows finite, injections counted, each one where and what the plan says; and the vision
   blocks that the stacks really depend on, found by disturbing them
3. the same answer another way: recomputed without cache, with eager attention, by transformers' own forward
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw
from torch import Tensor

from app.commands import introduce, load_from
from app.output import Outcome, table
from model.engine import Engine
from model.loading import HEADROOM, free_memory, gigabytes
from model.outside import blocks_of, layers_seen, tap_of, tapped_blocks
from model.plan import BASE, Plan
from model.probe import AttentionWish, Probe
from model.prompt import Prompt
from model.types import Answer, Sampling

QUESTION = "What does the sign say?"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # relative; about eight last places


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    figure: str  # what was seen, with its unit

    def to_json(self) -> dict:
        """Plain values for `--json`."""
        return {"name": self.name, "ok": self.ok, "figure": self.figure}


def run(options: argparse.Namespace) -> Outcome:
    """All checks; exit status 1 if one fails."""
    engine = load_from(options.model, options)
    introduce(engine)
    checks = diagnose(engine)
    failed = [check for check in checks if not check.ok]
    data = {"model": engine.name, "ok": not failed, "checks": [check.to_json() for check in checks]}
    rows = [["ok" if check.ok else "FAILED", check.name, check.figure] for check in checks]
    verdict = f"{len(failed)} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed"
    return Outcome(
        data, f"{table(['', 'check', 'seen'], rows, widest=300)}\n\n{engine.name}: {verdict}", 1 if failed else 0
    )


def diagnose(engine: Engine) -> list[Check]:
    """Every check of one loaded model, in the order in which they are shown."""
    prompt = engine.prompt(
        [{"role": "user", "content": [{"type": "image", "image": picture(engine)}, {"type": "text", "text": QUESTION}]}]
    )
    plan = engine.layout.default
    engine.forget()
    sampling = Sampling(max_new_tokens=8)
    if len(engine.answer(prompt, plan, sampling).tokens) < 2:  # it ends at once: other words show decoding as well
        sampling = Sampling(max_new_tokens=8, temperature=100.0)
    engine.forget()  # of a long prompt the prefix would be taken up, and no injection seen
    with watch(engine) as seen:  # decodes plainly: a compiled step would show nobody what is in it
        engine.answer(prompt, plan, sampling)
    engine.forget()
    answer = engine.answer(prompt, plan, sampling)  # as everybody's
    engine.forget()
    checks = [
        Check("device and number format", True, "; ".join(engine.reasons) or f"{engine.device}, {engine.dtype}"),
        Check(
            "versions",
            True,
            f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}",
        ),
        memory(engine),
        Check("the config's stacks", not engine.warnings, " ".join(engine.warnings) or _stacks_in_words(engine)),
    ]
    for check in (taps, finite, injections, aligned):
        checks.append(check(engine, prompt, plan, seen))
    if plan.tower:
        checks.append(inside(engine, prompt, plan))
    for check in (switching, recompute, eager, parity):
        checks.append(check(engine, prompt, plan, answer))
    return checks


def memory(engine: Engine) -> Check:
    """What the model holds, beside what is free: a tenth of it is needed for a prefill, as when it was loaded."""
    held, free = engine.memory_bytes, free_memory(engine.device)
    needed = held * (HEADROOM - 1)
    figure = f"{gigabytes(held)} held, {gigabytes(needed)} more needed, {gigabytes(free)} free on {engine.device}"
    return Check("memory", free >= needed, figure)


def picture(engine: Engine) -> Image.Image:
    """The sign, as large as it takes to give every stack rows: DeepStack-L cuts a small one into fewer tiles."""
    for scale in (1, 2, 4, 8, 16):
        image = sign(scale)
        dealt = {name for view in engine.views(image) for row in view.owners or () for name in row}
        if not dealt or dealt >= set(engine.layout.stack_names):
            break
    return image


def sign(scale: int = 1) -> Image.Image:
    """A sign with a short text, 128 px times `scale`, that needs no file."""
    image = Image.new("RGB", (128 * scale, 128 * scale), (40, 70, 120))
    draw = ImageDraw.Draw(image)
    draw.rectangle((14 * scale, 40 * scale, 114 * scale, 88 * scale), fill=(250, 240, 200))
    draw.text((64 * scale, 64 * scale), "K7PX2", fill=(30, 30, 30), anchor="mm", font_size=24 * scale)
    return image


# ---- 1. looking from outside


@dataclass
class Watched:
    """One entry per call of the decoder: the layers' inputs and outputs [T, d], float32 on the CPU."""

    inputs: list[dict[int, Tensor]] = field(default_factory=list)
    outputs: list[dict[int, Tensor]] = field(default_factory=list)


@contextmanager
def watch(engine: Engine) -> Iterator[Watched]:
    """Everything that the decoder layers get and give, with what was injected."""
    seen = Watched()

    def before(layer: int, hidden: Tensor) -> None:
        if layer == 0:
            seen.inputs.append({})
            seen.outputs.append({})
        if layer < engine.layout.n_layers:
            seen.inputs[-1][layer] = hidden[0].float().cpu()

    def after(layer: int, hidden: Tensor) -> None:
        seen.outputs[-1][layer] = hidden[0].float().cpu()

    with layers_seen(engine.adapter.decoder, before, after):
        yield seen


# ---- 2. what was seen during one answer


def taps(engine: Engine, prompt: Prompt, plan: Plan, seen: Watched) -> Check:
    """The vision blocks that the stacks really depend on, beside those in the config."""
    wanted = tap_of(engine)
    if not wanted:
        return Check("taps", True, "none: no source is made of one vision block")
    found = tapped_blocks(engine, prompt, list(wanted))
    seen, listed = ([", ".join(dict.fromkeys(map(str, blocks)))] for blocks in (found.values(), wanted.values()))
    return Check("taps", found == wanted, f"vision blocks {seen[0]}; the config says {listed[0]}")


def finite(engine: Engine, prompt: Prompt, plan: Plan, seen: Watched) -> Check:
    """Every source has finite rows that are not all zero."""
    features = engine.see(prompt).features
    sizes = {name: float(rows.float().pow(2).mean().sqrt()) for name, rows in features.items()}
    figure = "RMS " + ", ".join(f"{name} {size:.3g}" for name, size in sizes.items())
    return Check("stacks finite and not zero", all(np.isfinite(size) and size > 0 for size in sizes.values()), figure)


def injections(engine: Engine, prompt: Prompt, plan: Plan, seen: Watched) -> Check:
    """How many layers got an input other than the output of the layer before, in the prefill and after it."""
    wanted = sorted({entry.layer for entry in plan if entry.layer > 0 and not entry.in_tower})
    changed = [
        [layer for layer in range(1, engine.layout.n_layers) if not torch.equal(ins[layer], outs[layer - 1])]
        for ins, outs in zip(seen.inputs, seen.outputs, strict=True)
    ]
    later = sum(map(len, changed[1:]))
    where = f"before layers {', '.join(map(str, changed[0]))}" if changed[0] else "at layer 0 only"
    steps = len(changed) - 1
    figure = f"{len(changed[0])} of {len(wanted)} {where} in the prefill; {later} in {steps} later steps"
    return Check("injections, prefill only", changed[0] == wanted and later == 0 and steps > 0, figure)


def aligned(engine: Engine, prompt: Prompt, plan: Plan, seen: Watched) -> Check:
    """input(l+1) - output(l) is the stack's rows at the image's positions, and nothing elsewhere."""
    features = engine.see(prompt).features
    image = torch.as_tensor(np.concatenate([grid.positions for grid in prompt.grids]))
    inputs, outputs = seen.inputs[0], seen.outputs[0]
    worst, stray = 0.0, 0.0
    for layer in range(1, engine.layout.n_layers):
        added = inputs[layer] - outputs[layer - 1]
        wanted = torch.zeros_like(added)
        for name, gain in plan.at(layer):
            wanted[image] += gain * features[name].float().cpu()
        length = outputs[layer - 1][image].abs().max() + wanted.abs().max()
        worst = max(worst, float((added - wanted)[image].abs().max() / length))
        added[image] = 0
        stray = max(stray, float(added.abs().max()))
    first = torch.zeros_like(inputs[0][image])
    for name, gain in plan.at(0):
        first += gain * features[name].float().cpu()
    length = max(float(rows.abs().max()) for rows in features.values())
    worst = max(worst, float((inputs[0][image] - first).abs().max()) / length)
    ok = worst <= TOLERANCE[engine.dtype] and stray == 0.0
    return Check(
        "rows where the plan says", ok, f"difference {worst:.1e} of the stream at image rows, {stray:g} elsewhere"
    )


def inside(engine: Engine, prompt: Prompt, plan: Plan) -> Check:
    """As `injections` and `aligned` in one, of the stacks that enter the vision tower: of its last run, the base's."""
    blocks, inputs, outputs = blocks_of(engine), {}, {}
    engine.forget()
    handles = []
    for at, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(lambda m, args, at=at: inputs.__setitem__(at, _first(args))))
        handles.append(block.register_forward_hook(lambda m, args, out, at=at: outputs.__setitem__(at, _first(out))))
    try:
        engine.see(prompt, plan)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        rows = engine.adapter.encode(prompt.images[0], plan.tower.sources())
    worst, stray, changed = 0.0, 0.0, []
    for layer in range(1, len(blocks)):
        added = inputs[layer] - outputs[layer - 1]
        if added.any():
            changed.append(layer)
        n = sum(len(grid.positions) for grid in prompt.grids)  # the class token comes before them
        wanted = torch.zeros_like(added)
        for entry in plan.tower:
            if entry.layer == layer:
                wanted[-n:] += entry.gain * rows[entry.source].float().cpu()
        length = outputs[layer - 1].abs().max() + wanted.abs().max()
        worst = max(worst, float((added - wanted)[-n:].abs().max() / length))
        stray = max(stray, float(added[:-n].abs().max()))
    planned = sorted({entry.layer for entry in plan.tower if entry.layer > 0})
    figure = f"{len(changed)} of {len(planned)} before vision layers {', '.join(map(str, changed)) or 'none'}; "
    figure += f"difference {worst:.1e} of the stream at the view's rows, {stray:g} elsewhere"
    ok = changed == planned and worst <= TOLERANCE[engine.dtype] and stray == 0.0
    return Check("stacks inside the vision tower", ok, figure)


def _first(value: Tensor | tuple) -> Tensor:
    """The first view's hidden states [T, d], float32 on the CPU."""
    return (value[0] if isinstance(value, tuple) else value)[0].detach().float().cpu()


# ---- 3. the same answer another way


def switching(engine: Engine, prompt: Prompt, plan: Plan, answer: Answer) -> Check:
    """The next token's logits move when a stack is switched off."""
    names = [name for name in plan.sources() if name != BASE] or [BASE]
    on = engine.logits(prompt, plan)[-1].float()
    moved = {name: float((engine.logits(prompt, plan.without(name))[-1].float() - on).abs().max()) for name in names}
    figure = "logits move by " + ", ".join(f"{moved[name]:.3g} without {name}" for name in names)
    return Check("switching a stack off changes the answer's logits", all(moved.values()), figure)


def recompute(engine: Engine, prompt: Prompt, plan: Plan, answer: Answer) -> Check:
    """Log-probabilities of the answer, decoded token by token with a cache, beside one pass over all of it."""
    whole = engine.replay(prompt, answer, plan, Probe(norms=False)).logprobs
    worst = float(np.abs(whole - [token.logprob for token in answer.tokens]).max(initial=0.0))
    ok = bool(answer.tokens) and worst <= 10 * TOLERANCE[engine.dtype]
    return Check(
        "cached decode equals recompute", ok, f"log-probabilities differ by {worst:.1e} in {len(answer.tokens)} tokens"
    )


def eager(engine: Engine, prompt: Prompt, plan: Plan, answer: Answer) -> Check:
    """The attention rows that a trace shows, beside those that eager attention computes."""
    known = engine.layout.attention_layers
    layers = tuple(sorted({known[0], known[len(known) // 2], known[-1]}))
    row = prompt.input_ids.shape[1] - 1
    wish = AttentionWish(layers, (row,))
    shown = engine.replay(prompt, answer, plan, Probe(norms=False, attention=(wish,))).attention
    decoder = engine.adapter.decoder
    before = decoder.config._attn_implementation
    weights: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable:
        return lambda module, args, output: weights.__setitem__(layer, output[1][0, :, row].detach().float().cpu())

    handles = [decoder.layers[layer].self_attn.register_forward_hook(keep(layer)) for layer in layers]
    try:
        decoder.set_attn_implementation("eager")
        engine.logits(prompt, plan, answer)
    finally:
        decoder.set_attn_implementation(before)
        for handle in handles:
            handle.remove()
    worst = max(float(np.abs(shown[layer][:, 0] - weights[layer].numpy()).max()) for layer in layers)
    figure = f"shares differ by {worst:.1e} in layers {', '.join(map(str, layers))}"
    return Check("attention rows equal eager's", worst <= TOLERANCE[engine.dtype], figure)


def parity(engine: Engine, prompt: Prompt, plan: Plan, answer: Answer) -> Check:
    """Logits and greedy tokens beside transformers' own forward and generate on the same weights."""
    name = "parity with plain transformers"
    found = engine.adapter.plain_inputs(prompt)
    if found is None:
        return Check(name, True, "not to be compared: transformers alone cannot run this checkpoint")
    inputs, same = {key: value.to(engine.device) for key, value in found[0].items()}, found[1]
    with torch.no_grad():
        plain = engine.model(**inputs).logits[0].float()
        tokens = engine.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    ours = engine.logits(prompt, same).float()
    worst = float((ours - plain).abs().max() / plain.abs().max())
    greedy = [token.id for token in engine.answer(prompt, same, Sampling(max_new_tokens=8)).tokens]
    agree = tokens.tolist()[: len(greedy)] == greedy
    figure = f"logits differ by {worst:.1e} under {same}, greedy tokens {'agree' if agree else 'differ'}"
    return Check(name, worst <= TOLERANCE[engine.dtype] and agree, figure)


def _stacks_in_words(engine: Engine) -> str:
    names = engine.layout.stack_names
    return f"{len(names)} stacks, default plan {engine.layout.default}" if names else "no stacks: a single injection"
