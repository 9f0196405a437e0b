"""One model, many people: 32 threads at once get what each would get alone, and nothing stays behind on the model.

The model runs at one thread per pass in float32, so "the same" is bit for bit for tokens and traces. The tokens'
log-probabilities are the same within rounding: requests that decode at once share their steps. The engine's own lock
and its ContextVar each keep requests apart; taking both away makes these tests fail.
"""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from analysis import attribution
from model import instrument
from model.errors import UserError
from model.plan import Plan
from model.probe import AttentionWish, Probe
from model.types import Sampling
from tests import tiny

PEOPLE = 32
FAMILY = pytest.mark.parametrize("kind", ("hires", "qwen", "compiled"))
SIZES = ((40, 32), (64, 16), (24, 48), (32, 32))
PLANS = [
    "base@0,0@1,1@2,2@3", "base@0", "none", "base@0,0@1", "base@0,0@2*3", "base@1", "base@0,2@4*-1", "0@1,1@2,2@3",
]  # fmt: skip


@pytest.fixture(autouse=True)
def often():
    """Threads take turns a hundred times as often as Python lets them, so that they meet inside a request."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 100)
    yield
    sys.setswitchinterval(usual)


@cache
def engine_of(kind: str):
    """A tiny engine; "compiled" is "qwen" whose lone steps are one program, run as torch.compile has traced it."""
    if kind != "compiled":
        return tiny.engine(kind)
    engine = tiny.build(tiny.folder("qwen"))
    engine.decode_by("compiled", lambda program, inputs: program.forward)
    return engine


@dataclass(frozen=True)
class Job:
    """What one of the people asks: messages of their own, a plan, sampling, and what is looked at."""

    messages: list
    plan: Plan
    sampling: Sampling
    layer: int

    def prompt(self, engine):
        return engine.prompt(self.messages)

    def probe(self, prompt) -> Probe:
        last = prompt.input_ids.shape[1] - 1
        return Probe(attention=(AttentionWish((self.layer,), (last,)),), hidden=(self.layer,))


def jobs(engine) -> list[Job]:
    """32 of them: no two have the same plan, images and question."""
    made = []
    for i in range(PEOPLE):
        images = [tiny.image(100 + i + k, SIZES[(i + k) % len(SIZES)]) for k in range(1 + i % 3 // 2)]
        gain = 1 + (i // len(PLANS)) / 4
        plan = Plan((e.source, e.layer, e.gain * gain) for e in Plan.parse(PLANS[i % len(PLANS)]))
        sampling = Sampling(max_new_tokens=3 + i % 4, temperature=i % 2, seed=i)
        words = "What does the sign say, please?"[: 10 + i % 20]
        made.append(Job(tiny.ask(*images, words), plan, sampling, i % engine.layout.n_layers))
    return made


def run(engine, job: Job):
    """(tokens of a stream, its replay, its largest logit): all from the messages on, as a visitor's request does it."""
    prompt = job.prompt(engine)
    with engine.stream(prompt, job.plan, job.sampling) as stream:
        tokens = list(stream)
    largest = engine.logits(prompt, job.plan, stream.answer).abs().max().item()
    return tokens, engine.replay(prompt, stream.answer, job.plan, job.probe(prompt)), largest


def same(found, wanted, shared: bool = True) -> None:
    """Bit for bit but for the tokens' probabilities, which a shared step rounds in another order: within 2.1e-6 of the
    largest logit, as any batch does.
    """
    (tokens, trace, _), (want_tokens, want, largest) = found, wanted
    rounding = 2.1e-6 * max(1, largest) if shared else 0
    assert [(t.id, t.text) for t in tokens] == [(t.id, t.text) for t in want_tokens]
    for token, other in zip(tokens, want_tokens, strict=True):
        assert [text for text, _ in token.top] == [text for text, _ in other.top]
        assert token.logprob == pytest.approx(other.logprob, abs=rounding, rel=0)
        assert [p for _, p in token.top] == pytest.approx([p for _, p in other.top], abs=rounding, rel=0)
    for name in ("residual_rms", "before_rms", "ratio", "cosine", "logprobs"):
        np.testing.assert_array_equal(getattr(trace, name), getattr(want, name))
    for name in ("injected_rms", "attention", "hidden"):
        one, other = getattr(trace, name), getattr(want, name)
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def left_on(engine) -> dict:
    """All that a request could leave on a model or in transformers' registries."""
    modules = list(engine.model.modules())
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    parameters = list(engine.model.parameters())
    return {
        "hooks": {kind: sum(len(getattr(module, kind)) for module in modules) for kind in kinds},
        "forwards": [module for module in modules if "forward" in vars(module)],
        "attention": [config._attn_implementation for config in configs.values()],
        "functions": {name: AttentionInterface()[name] for name in AttentionInterface().valid_keys()},
        "masks": {name: AttentionMaskInterface()[name] for name in AttentionMaskInterface().valid_keys()},
        "gradients": sum(p.grad is not None or p.requires_grad for p in parameters),
        "training": sum(module.training for module in modules),
        "pass": instrument._ACTIVE.get(),
        "shared rows": (len(engine.together), engine.together.bytes, len(engine.together._asked)),
        "seats": engine.compiled is not None and len(engine.compiled._all) - len(engine.compiled._free),
    }


def at_once(work: list) -> list:
    """The results of these calls, or the errors they ended with, started together on a thread each."""
    ready = threading.Barrier(len(work))

    def start(call):
        ready.wait()
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(start, work))


@FAMILY
def test_thirty_two_people_get_what_each_would_get_alone(kind):
    engine = engine_of(kind)
    asked = jobs(engine)
    alone = [run(engine, job) for job in asked]
    assert len({tuple(token.id for token in tokens) for tokens, _, _ in alone}) > PEOPLE / 2  # they differ at all
    before = left_on(engine)
    for _ in range(2):
        engine.cache.clear()
        found = at_once([lambda job=job: run(engine, job) for job in asked])
        for one, want in zip(found, alone, strict=True):
            assert not isinstance(one, Exception), one
            same(one, want)
    assert left_on(engine) == before


class Broken(Exception):
    """What a consumer or a recorder of these tests ends with."""


class BrokenRecorder:
    """A probe that fails in the middle of a pass, at layer 2."""

    def layer_input(self, layer, before, injected, after):
        if layer == 2:
            raise Broken

    def final(self, hidden):
        raise AssertionError("the pass went on")

    def attention(self, *args):
        """Nothing."""


def closed(engine, job: Job):
    """A page that is closed after one token."""
    with engine.stream(job.prompt(engine), job.plan, Sampling(max_new_tokens=200)) as stream:
        next(stream)
    assert stream.done and stream.answer.stopped == "stopped"


def dropped(engine, job: Job):
    """A stream that nobody closes."""
    next(engine.stream(job.prompt(engine), job.plan, Sampling(max_new_tokens=200)))


def raising(engine, job: Job):
    """A consumer that fails after one token."""
    with engine.stream(job.prompt(engine), job.plan, Sampling(max_new_tokens=200)) as stream:
        for _ in stream:
            raise Broken


def breaking(engine, job: Job):
    """A recorder that fails inside a pass."""
    with torch.no_grad(), engine._device():
        engine._run(job.prompt(engine), [job.plan], (), recorder=BrokenRecorder())


def refused(engine, job: Job):
    """A probe of a layer that there is not."""
    prompt = job.prompt(engine)
    answer = engine.answer(prompt, job.plan, Sampling(max_new_tokens=1))
    engine.replay(prompt, answer, job.plan, Probe(hidden=(99,)))


def nothing(engine, job: Job):
    """A probe that asks for nothing gets nothing but the log-probabilities."""
    prompt = job.prompt(engine)
    answer = engine.answer(prompt, job.plan, Sampling(max_new_tokens=3))
    trace = engine.replay(prompt, answer, job.plan, Probe(norms=False))
    assert not trace.residual_rms.size and not trace.attention and not trace.hidden and not trace.injected_rms
    np.testing.assert_allclose(trace.logprobs, [token.logprob for token in answer.tokens], atol=1e-5)


def attributed(engine, job: Job):
    """captum: its gradients run outside the lock, between other people's tokens."""
    prompt = job.prompt(engine)
    answer = engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=2))
    shares = attribution.integrated_gradients(engine, prompt, answer, steps=4, batch=2)
    return shares.values, attribution.ablation(engine, prompt, answer).values


@FAMILY
def test_trouble_beside_a_request_changes_nothing_and_leaves_nothing(kind):
    engine = engine_of(kind)
    asked = jobs(engine)
    trouble = [closed, dropped, raising, breaking, refused, nothing, attributed]
    ends = {raising: Broken, breaking: Broken, refused: UserError}
    good, bad = asked[: PEOPLE // 4], asked[PEOPLE // 4 :]
    kinds = [trouble[i % len(trouble)] for i in range(len(bad))]
    alone = [run(engine, job) for job in good]
    shares = {i: attributed(engine, job) for i, job in enumerate(bad) if kinds[i] is attributed}
    before = left_on(engine)
    engine.cache.clear()
    calls = [lambda job=job: run(engine, job) for job in good]
    calls += [lambda job=job, do=do: do(engine, job) for job, do in zip(bad, kinds, strict=True)]
    found = at_once(calls)
    for one, want in zip(found[: len(good)], alone, strict=True):
        assert not isinstance(one, Exception), one
        same(one, want)
    for i, (one, do) in enumerate(zip(found[len(good) :], kinds, strict=True)):
        assert isinstance(one, ends[do]) if do in ends else not isinstance(one, Exception), (do.__name__, one)
        if do is attributed:
            for values, want in zip(one, shares[i], strict=True):
                np.testing.assert_array_equal(values, want)
    assert left_on(engine) == before
    assert engine._lock.acquire(blocking=False) and engine._lock.release() is None
    same(run(engine, asked[-1]), run(engine, asked[-1]), shared=False)
    for job, want in zip(good, alone, strict=True):
        same(run(engine, job), want, shared=False)
