"""Decoding together: requests of different prompts, plans and lengths in one step, each as it would be alone.

The device's lock is held here until all who shall share a step wait for it, so what is shared does not hang on luck.
Run: pytest tests/model/test_together.py
"""

import gc
import threading
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaModel, MistralConfig, Qwen3_5TextConfig

from model.decode import choose
from model.engine import Generation
from model.errors import OutOfMemory
from model.plan import Plan
from model.together import Together, why_alone
from model.types import Sampling
from tests import families, tiny
from tests.families import ENTRIES

FAMILY = pytest.mark.parametrize("kind", ("hires", "qwen"))
PLANS = [Plan.parse(t) for t in ("base@0,0@1,1@2,2@3", "base@0", "none", "base@0,0@2*3")]
SIZES = ((40, 32), (64, 16), (24, 48), (32, 32))


def fresh_engine(kind: str = "hires"):
    """One that no other test has left a request on."""
    return tiny.build(tiny.folder(kind))


def ask(engine, i: int, tokens: int = 8, temperature: float = 0.0, plans=None) -> Generation:
    """One request: an image, a question and a plan of its own."""
    prompt = engine.prompt(tiny.ask(tiny.image(50 + i, SIZES[i % 4]), "What does the sign say, please?"[: 8 + 5 * i]))
    sampling = Sampling(max_new_tokens=tokens, temperature=temperature, seed=i)
    return Generation(engine, prompt, plans or [PLANS[i % 4]], sampling, None)


def finish(generation: Generation):
    """Its answers, made alone from here on."""
    while not generation.done:
        generation.step()
    return generation.answers()


def at_once(engine, calls) -> list:
    """What these calls return or raise; none of them gets the device before all wait for it."""
    found = [None] * len(calls)

    def call(i):
        try:
            found[i] = calls[i]()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    with engine._lock:
        for count, thread in enumerate(threads, 1):
            thread.start()
            while len(engine._lock) < count:
                threading.Event().wait(0.001)
    for thread in threads:
        thread.join()
    return found


@contextmanager
def counted(engine):
    """How many rows each shared step had."""
    sizes, make = [], engine.together._make

    def spy(parts):
        sizes.append(sum(len(part.rows) for part in parts))
        return make(parts)

    engine.together._make = spy
    try:
        yield sizes
    finally:
        del engine.together._make


def same(found, wanted):
    assert [t.id for t in found.tokens] == [t.id for t in wanted.tokens] and found.stopped == wanted.stopped
    for one, other in zip(found.tokens, wanted.tokens, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


def empty(engine) -> bool:
    return (len(engine.together), engine.together.bytes, engine.together._asked) == (0, 0, [])


@FAMILY
def test_a_shared_steps_log_probabilities_are_those_of_a_step_alone(kind, monkeypatch):
    engine, scale = fresh_engine(kind), []
    logits = engine._logits
    monkeypatch.setattr(
        engine, "_logits", lambda hidden: scale.append(float(logits(hidden).abs().max())) or logits(hidden)
    )
    temperatures = (0.0, 1.0, 0.0, 0.7)
    wanted = [finish(ask(engine, i, temperature=t))[0] for i, t in enumerate(temperatures)]
    asked = [ask(engine, i, temperature=t) for i, t in enumerate(temperatures)]
    assert len({g.prompt.input_ids.shape[1] for g in asked}) > 2
    with counted(engine) as sizes:
        while any(not generation.done for generation in asked):
            at_once(engine, [generation.step for generation in asked])
    assert sizes == [4] * 7 and empty(engine)
    for generation, want in zip(asked, wanted, strict=True):
        (found,) = generation.answers()
        same(found, want)
        for one, other in zip(found.tokens, want.tokens, strict=True):
            assert abs(one.logprob - other.logprob) <= 2.1e-6 * max(1, *scale)


@FAMILY
def test_requests_join_and_leave_between_two_steps(kind):
    """One ends early, one comes later, one has several plans, one misses a step; each gets its own answer."""
    engine = fresh_engine(kind)
    lengths = (3, 9, 6, 8)
    plans = (None, None, PLANS[:3], None)

    def fresh():
        return [ask(engine, i, n, i % 2, p) for i, (n, p) in enumerate(zip(lengths, plans, strict=True))]

    wanted, (a, b, c, d) = [finish(generation) for generation in fresh()], fresh()
    with counted(engine) as sizes:
        for asked in ((a, b, c), (a, b, c), (a, b, c), (d,), (b, c, d), (d, b), (c, b, d)):
            at_once(engine, [generation.step for generation in asked])
        assert a.done and not b.done and len(engine.together) == 5
        assert sizes == [5, 5, 5, 2, 5]  # the first three were prefilled one by one, and so was d
        found = [finish(generation) for generation in (a, b, c, d)]
    assert empty(engine)
    for answers, want in zip(found, wanted, strict=True):
        for one, other in zip(answers, want, strict=True):
            same(one, other)


def test_a_lone_request_never_touches_the_shared_buffers(monkeypatch):
    engine = fresh_engine()
    monkeypatch.setattr(Together, "_gather", None)
    assert len(finish(ask(engine, 0))[0].tokens) == 8
    assert len(engine.answer_many(ask(engine, 1).prompt, PLANS, Sampling(max_new_tokens=4))) == 4


def started(engine, count: int, tokens: int = 8) -> list[Generation]:
    """So many requests that have made two tokens, the second one together."""
    asked = [ask(engine, i, tokens) for i in range(count)]
    for _ in range(2):
        at_once(engine, [generation.step for generation in asked])
    assert len(engine.together) == count
    return asked


def test_whoever_is_stopped_closed_or_dropped_leaves_the_others_alone():
    engine = fresh_engine()
    wanted = [finish(ask(engine, i))[0] for i in range(4)]
    stopped, closed, dropped, kept = started(engine, 4)
    stopped.stop = threading.Event()
    stopped.stop.set()
    closed.end("stopped")
    del dropped
    gc.collect()
    stopped.step()
    kept.step()
    assert stopped.done and len(stopped.rows[0].tokens) == 2 and len(engine.together) == 1
    same(finish(kept)[0], wanted[3])
    assert empty(engine)
    asked = started(engine, 3)
    while asked:  # dropped by all: the last one takes the buffers along
        asked.pop()
    gc.collect()
    assert empty(engine)


@pytest.mark.parametrize("error", [RuntimeError("the device is gone"), MemoryError("can't allocate memory")])
def test_a_shared_step_that_fails_is_made_one_by_one(error, monkeypatch):
    engine = fresh_engine()
    wanted = [finish(ask(engine, i))[0] for i in range(4)]
    asked, decode = started(engine, 4), engine.adapter.decoder.layers[3].forward

    def fails(hidden, *args, **kwargs):
        if len(hidden) > 1:
            raise error
        return decode(hidden, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine.adapter.decoder.layers[3], "forward", fails)
        for _ in range(2):
            assert not any(isinstance(found, Exception) for found in at_once(engine, [g.step for g in asked]))
    assert engine.together.most == 1
    for generation, want in zip(asked, wanted, strict=True):
        same(finish(generation)[0], want)
    assert empty(engine) and engine.together.most > 1


def test_a_step_that_fails_after_drawing_draws_the_same_again(monkeypatch):
    engine = fresh_engine()
    wanted = [finish(ask(engine, i, temperature=1.0))[0] for i in range(3)]
    asked = [ask(engine, i, temperature=1.0) for i in range(3)]
    at_once(engine, [generation.step for generation in asked])

    def fails(logits, samplings, draws):
        made = choose(logits, samplings, draws)
        if len(samplings) > 1:
            raise MemoryError("can't allocate memory")
        return made

    with monkeypatch.context() as patch:
        patch.setattr("model.together.choose", fails)
        at_once(engine, [generation.step for generation in asked])
    for generation, want in zip(asked, wanted, strict=True):
        same(finish(generation)[0], want)


def test_a_request_that_fails_alone_has_failed_and_the_others_go_on(monkeypatch):
    engine = fresh_engine()
    wanted = [finish(ask(engine, i))[0] for i in range(3)]
    asked = started(engine, 3)
    bad = {generation._part: generation for generation in asked[:1]}
    make = engine.together._make

    def fails(parts):
        if bad.keys() & set(parts):
            raise MemoryError("can't allocate memory")
        make(parts)

    with monkeypatch.context() as patch:
        patch.setattr(engine.together, "_make", fails)
        found = at_once(engine, [generation.step for generation in asked])
    assert isinstance(found[0], OutOfMemory) and not any(isinstance(one, Exception) for one in found[1:])
    assert asked[0].done and len(engine.together) == 2
    for generation, want in zip(asked[1:], wanted[1:], strict=True):
        same(finish(generation)[0], want)
    assert empty(engine)


def test_what_does_not_fit_decodes_by_itself(monkeypatch):
    """No room at all; then room for two of three; then a limit that those who share outgrow."""
    engine = fresh_engine()
    wanted = [finish(ask(engine, i))[0] for i in range(3)]
    width = 2 * 2 * 16 * 4 * engine.layout.n_layers  # keys and values of two heads, 16 wide, float32
    for rows, sizes_wanted in ((0, []), (2, [2] * 7)):
        monkeypatch.setattr(engine.together, "max_bytes", rows * 256 * width)
        asked = [ask(engine, i) for i in range(3)]
        with counted(engine) as sizes:
            while any(not generation.done for generation in asked):
                at_once(engine, [generation.step for generation in asked])
        assert sizes == sizes_wanted
        for generation, want in zip(asked, wanted, strict=True):
            same(generation.answers()[0], want)
    monkeypatch.setattr(engine.together, "max_bytes", 4 * 256 * width)
    monkeypatch.setattr("model.together.CHUNK", 1)
    asked = started(engine, 3)
    monkeypatch.setattr(engine.together, "max_bytes", engine.together.bytes)
    at_once(engine, [generation.step for generation in asked])
    longest = max(asked, key=lambda generation: generation.prompt.input_ids.shape[1])
    assert longest._part.apart and not longest._part.rows and longest._part.cache is not None
    for generation, want in zip(asked, wanted, strict=True):
        same(finish(generation)[0], want)
    assert empty(engine)


def test_what_another_left_in_the_buffers_is_not_seen():
    """A mask hides a number from the softmax, but nothing hides a NaN."""
    engine = fresh_engine()
    first, second = started(engine, 2)
    with torch.inference_mode():
        for layer in engine.together._layers:
            layer.keys[first._part.rows[0].at] = torch.nan
            layer.values[first._part.rows[0].at] = torch.nan
    first.end("stopped")
    want, later = finish(ask(engine, 2))[0], ask(engine, 2)
    later.step()
    at_once(engine, [second.step, later.step])
    assert len(engine.together) == 2
    same(finish(later)[0], want)
    finish(second)


def test_a_shared_answer_is_taken_up_like_any_other(monkeypatch):
    engine = fresh_engine()
    monkeypatch.setattr(engine, "shortest_prefix", 1)
    wanted = [finish(ask(engine, i))[0] for i in range(2)]
    engine.forget()
    asked = started(engine, 2)
    for generation in asked:
        finish(generation)
    assert len(engine.prefixes) == 2 and empty(engine)
    for i, want in enumerate(wanted):
        same(finish(ask(engine, i))[0], want)


def test_a_long_answer_delays_a_new_one_by_one_step():
    """Three long answers want their next tokens when a fourth request comes: it waits for one step of theirs."""
    engine, before = fresh_engine(), []
    asked, new = started(engine, 3, tokens=40), ask(engine, 3)
    prefill = new._prefill
    with counted(engine) as sizes:
        new._prefill = lambda: before.append(len(sizes)) or prefill()
        at_once(engine, [*(lambda g=g: [g.step() for _ in range(4)] for g in asked), new.step])
    assert before == [1] and sum(sizes) == 12


def test_models_that_cannot_share_are_named():
    def words(config):
        return why_alone(AutoModel.from_config(config))

    small = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert words(LlamaConfig(**small)) == ""
    split = LlamaModel(LlamaConfig(**small))
    split.layers[2].to("meta")
    assert why_alone(split) == "its layers lie on several devices"
    assert words(MistralConfig(**small, sliding_window=4)) == "some layers have a sliding window"
    assert "no keys and values" in words(Qwen3_5TextConfig(**small))


@pytest.mark.parametrize("kind", ENTRIES)
def test_every_family_shares_or_says_why_not(kind):
    engine = families.engine(kind)
    assert bool(engine.together.why_not) == (kind in ("cohere_compass", "qwen3_5", "qwen3_5_moe"))
    last = engine.layout.sources[-1].name
    plans = [engine.layout.default, Plan([(last, 0, 1.0)]), Plan()]
    size = SIZES[0]

    def fresh():
        prompts = [engine.prompt(tiny.ask(tiny.image(i, size), "what is it"[: 4 + 3 * i])) for i in range(3)]
        pairs = zip(prompts, plans, strict=True)
        return [Generation(engine, prompt, [plan], Sampling(max_new_tokens=4), None) for prompt, plan in pairs]

    wanted, asked = [finish(generation)[0] for generation in fresh()], fresh()
    with counted(engine) as sizes:
        while any(not generation.done for generation in asked):
            at_once(engine, [generation.step for generation in asked])
    assert sizes == ([] if engine.together.why_not else [3] * 3) or any(len(want.tokens) < 4 for want in wanted)
    for generation, want in zip(asked, wanted, strict=True):
        (found,) = generation.answers()
        assert [t.id for t in found.tokens] == [t.id for t in want.tokens]
    assert empty(engine)
