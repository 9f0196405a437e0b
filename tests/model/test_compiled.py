"""Compiled decoding: to the tokens of plain decoding, one program for all steps, and nothing left behind.

torch.compile traces the whole step here; its backend only runs what was traced (but for one test, which makes machine
code), so that a test takes seconds. On a GPU the same program is replayed as a CUDA graph.
Run: pytest tests/model/test_compiled.py
"""

import gc
import os
import shutil
import threading

import pytest
import torch

from model import compiled
from model.compiled import Compiled, choose_decode, why_plain
from model.engine import Generation
from model.errors import OutOfMemory, UserError
from model.instrument import Pass
from model.loading import load
from model.need import SEAT, of_answer
from model.plan import Plan
from model.probe import AttentionWish, Probe
from model.types import Sampling
from tests import families, tiny
from tests.families import ENTRIES

TOLERANCE = 1e-5  # nats, float32: a buffer with empty places, and heads in groups, add up in another order
PLANS = [Plan.parse(t) for t in ("base@0,0@1,1@2,2@3", "base@0", "base@0,0@2*3")]
PLAIN = {  # families that decode plainly, and why
    "cohere_compass": "a sliding window",
    "qwen3_5": "no keys and values of every position",
    "qwen3_5_moe": "no keys and values of every position",
    "qwen3_omni_moe": "transformers does not make one program",
}


class Count:
    """A backend that runs what was traced, and counts the programs that it was given."""

    def __init__(self):
        self.programs, self.steps, self.fails = 0, 0, None

    def __call__(self, program: torch.fx.GraphModule, inputs: list):
        self.programs += 1

        def run(*args):
            self.steps += 1
            if self.fails is not None and self.steps == self.fails[0]:
                raise self.fails[1]
            return program.forward(*args)

        return run


class Pair:
    """The same model twice: decoding plainly, and compiled."""

    def __init__(self, path):
        self.plain, self.engine, self.count = tiny.build(path), tiny.build(path), Count()
        self.engine.decode_by("compiled", self.count)

    def prompt(self, number: int = 1, text: str = "Read the sign.", size=(40, 32)):
        return self.engine.prompt(tiny.ask(tiny.image(number, size), text))


@pytest.fixture(scope="module", params=["hires", "qwen"])
def pair(request):
    return Pair(tiny.folder(request.param))


def same(found, wanted):
    assert [t.id for t in found.tokens] == [t.id for t in wanted.tokens] and found.stopped == wanted.stopped
    assert [t.logprob for t in found.tokens] == pytest.approx([t.logprob for t in wanted.tokens], abs=TOLERANCE)


def hooks(engine) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.adapter.decoder.modules())


@pytest.mark.parametrize("kind", ENTRIES)
def test_every_family_decodes_compiled_or_says_why_not(kind):
    engine, count = families.engine(kind), Count()
    if kind in PLAIN:
        with pytest.raises(UserError, match=f"cannot decode compiled: .*{PLAIN[kind]}.* Leave --decode out"):
            engine.decode_by("compiled")
        assert engine.compiled is None and PLAIN[kind] in engine.reasons[-1]
        return
    assert why_plain(engine) == ""
    prompt = engine.prompt(tiny.ask(tiny.image(1, (40, 32)), "What is it?"))
    plans, sampling = [engine.layout.default, Plan()], Sampling(max_new_tokens=4)
    wanted = [engine.answer(prompt, plan, sampling) for plan in plans]
    try:
        engine.decode_by("compiled", count)
        for plan, want in zip(plans, wanted, strict=True):
            same(engine.answer(prompt, plan, sampling), want)
        assert (count.programs, count.steps) == (1, sum(len(w.tokens) - (w.stopped == "length") for w in wanted))
    finally:
        engine.decode_by("auto")


def test_one_program_whatever_the_length_the_plan_and_the_number_of_answers(pair, monkeypatch):
    """Answers of 2 to 60 tokens in seats of three sizes, then 2 to 5 plans at once: no program per token or size."""
    monkeypatch.setattr(compiled, "SHORTEST", 64)
    before = pair.count.programs
    for at, tokens in enumerate((2, 9, 60, 5, 200)):
        plan, prompt, sampling = PLANS[at % 3], pair.prompt(at, "Read." * (1 + at)), Sampling(max_new_tokens=tokens)
        same(pair.engine.answer(prompt, plan, sampling), pair.plain.answer(prompt, plan, sampling))
    assert len({seat.size for seat in pair.engine.compiled._free}) == 3
    assert pair.count.programs - before <= 1
    for many in (2, 3, 5):
        plans, sampling = [PLANS[i % 3] for i in range(many)], Sampling(max_new_tokens=6)
        wanted = pair.plain.answer_many(pair.prompt(), plans, sampling)
        for found, want in zip(pair.engine.answer_many(pair.prompt(), plans, sampling), wanted, strict=True):
            same(found, want)
    assert pair.count.programs - before <= 2


def test_sampling_draws_what_it_would(pair):
    for seed in range(3):
        sampling = Sampling(max_new_tokens=8, temperature=1.0, top_p=0.9, seed=seed)
        same(
            pair.engine.answer(pair.prompt(), PLANS[0], sampling), pair.plain.answer(pair.prompt(), PLANS[0], sampling)
        )
    wanted = pair.plain.answer_many(pair.prompt(), PLANS, sampling)
    for found, want in zip(pair.engine.answer_many(pair.prompt(), PLANS, sampling), wanted, strict=True):
        same(found, want)


def test_rows_of_a_batch_stop_independently(pair, monkeypatch):
    sampling = Sampling(max_new_tokens=10)
    alone = [pair.plain.answer(pair.prompt(), plan, sampling) for plan in PLANS]
    ends = frozenset(answer.tokens[1 + i].id for i, answer in enumerate(alone))
    for engine in (pair.plain, pair.engine):
        monkeypatch.setattr(engine, "_end", ends)
    alone = [pair.plain.answer(pair.prompt(), plan, sampling) for plan in PLANS]
    assert len({len(answer.tokens) for answer in alone}) > 1
    for found, want in zip(pair.engine.answer_many(pair.prompt(), PLANS, sampling), alone, strict=True):
        same(found, want)


def test_nothing_enters_in_a_compiled_step_and_nothing_is_left(pair, monkeypatch):
    """As many injections as the plan has, all in the prefill; as many hooks as before."""
    count, steps, entered = hooks(pair.engine), pair.count.steps, []
    before = Pass.before_layer
    monkeypatch.setattr(Pass, "before_layer", lambda *args: entered.append(args[1]) or before(*args))
    answer = pair.engine.answer(pair.prompt(), PLANS[2], Sampling(max_new_tokens=6))
    assert entered == [0, 2] and len(answer.tokens) > 4 and pair.count.steps - steps >= 4
    assert hooks(pair.engine) == count == pair.engine.layout.n_layers + 1


def test_whoever_watches_sees_plain_steps(pair):
    """Hooks of others would be traced into the program, each time anew; transformers' own recording ones may stay."""
    sampling, seen, steps, programs = Sampling(max_new_tokens=6), [], pair.count.steps, pair.count.programs
    want = pair.plain.answer(pair.prompt(), PLANS[0], sampling)
    stream = pair.engine.stream(pair.prompt(), PLANS[0], sampling)
    next(stream), next(stream)
    layer = pair.engine.adapter.decoder.layers[1]
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    next(stream), next(stream)
    handle.remove()
    assert seen == [1, 1] and pair.count.steps - steps == 1
    list(stream)
    same(stream.answer, want)
    assert pair.count.steps - steps == 3 and pair.count.programs - programs <= 1


def test_looking_after_a_compiled_answer(pair):
    """Trace, attention rows and log-probabilities of a replay are those after a plain answer, and fit the answer's."""
    sampling = Sampling(max_new_tokens=6)
    answer = pair.engine.answer(pair.prompt(), PLANS[0], sampling)
    probe = Probe(attention=(AttentionWish((0, 2), (3,)),))
    one, other = (e.replay(pair.prompt(), answer, PLANS[0], probe) for e in (pair.engine, pair.plain))
    assert (one.residual_rms == other.residual_rms).all() and (one.attention[2] == other.attention[2]).all()
    assert one.injected_rms.keys() == other.injected_rms.keys() and len(one.injected_rms) == 4
    assert [t.logprob for t in answer.tokens] == pytest.approx(one.logprobs.tolist(), abs=TOLERANCE)


def test_a_chat_goes_on_from_what_a_compiled_answer_computed(pair, monkeypatch):
    monkeypatch.setattr(pair.engine, "shortest_prefix", 1)
    messages, sampling = tiny.ask(tiny.image(1, (40, 32)), "Read the sign."), Sampling(max_new_tokens=5)
    try:
        first = pair.engine.answer(pair.engine.prompt(messages), PLANS[0], sampling)
        assert len(pair.engine.prefixes) == 1
        messages += [
            {"role": "assistant", "content": [{"type": "text", "text": first.text}]},
            {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
        ]
        read = []
        handle = pair.engine.adapter.decoder.layers[0].register_forward_pre_hook(
            lambda module, args: read.append(args[0].shape[1])
        )
        prompt = pair.engine.prompt(messages)
        found = pair.engine.answer(prompt, PLANS[0], sampling)
        handle.remove()
        assert read[0] < prompt.input_ids.shape[1] - pair.prompt().visual_tokens
        same(found, pair.plain.answer(prompt, PLANS[0], sampling))
    finally:
        pair.engine.forget()


def test_stopped_closed_and_dropped_answers_give_their_seats_back(pair):
    pair.engine.forget()
    gc.collect()
    seats, plan, sampling = pair.engine.compiled, PLANS[0], Sampling(max_new_tokens=30)
    want, stop = pair.plain.answer(pair.prompt(), plan, sampling), threading.Event()
    stopped = pair.engine.stream(pair.prompt(), plan, sampling, stop)
    closed, dropped = (pair.engine.stream(pair.prompt(), plan, sampling) for _ in range(2))
    for stream in (stopped, closed, dropped):
        next(stream), next(stream)
    assert (len(seats._all), len(seats._free)) == (3, 0)
    stop.set()
    assert list(stopped) == []
    closed.close()
    del dropped, stream
    gc.collect()
    assert (len(seats._all), len(seats._free)) == (3, 3) and seats.bytes > 0
    assert pair.engine.memory_bytes >= seats.bytes
    same(pair.engine.answer(pair.prompt(), plan, sampling), want)
    pair.engine.forget()
    gc.collect()
    assert (len(seats._all), seats.bytes) == (0, 0)


def test_what_another_left_in_a_seat_is_not_seen(pair):
    """A mask hides a number from the softmax, but nothing hides a NaN."""
    sampling = Sampling(max_new_tokens=5)
    want = pair.plain.answer(pair.prompt(), PLANS[0], sampling)
    pair.engine.answer(pair.prompt(), PLANS[0], Sampling(max_new_tokens=5))
    with torch.inference_mode():
        for seat in pair.engine.compiled._free:
            for layer in seat.cache.layers:
                layer.keys.fill_(torch.nan), layer.values.fill_(torch.nan)
    same(pair.engine.answer(pair.prompt(), PLANS[0], sampling), want)


def test_whoever_finds_no_seat_decodes_plainly(pair, monkeypatch):
    """More streams at once than seats; no memory for one; too many answers for the widest."""
    pair.engine.forget()
    gc.collect()
    sampling = Sampling(max_new_tokens=5)
    prompts = [pair.prompt(i) for i in range(6)]
    wanted = [pair.plain.answer(prompt, PLANS[0], sampling) for prompt in prompts]
    streams = [pair.engine.stream(prompt, PLANS[0], sampling) for prompt in prompts]
    steps = pair.count.steps
    while any(not stream.done for stream in streams):
        for stream in streams:
            next(stream, None)
    for stream, want in zip(streams, wanted, strict=True):
        same(stream.answer, want)
    assert 0 < pair.count.steps - steps <= compiled.SEATS * 5 and len(pair.engine.compiled._free) == compiled.SEATS
    pair.engine.forget()
    del streams, stream
    gc.collect()
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "free_memory", lambda device: 0)
        same(pair.engine.answer(prompts[0], PLANS[0], sampling), wanted[0])
    monkeypatch.setattr(compiled, "ROWS", 2)
    for found in pair.engine.answer_many(prompts[0], [PLANS[0]] * 3, sampling):
        same(found, wanted[0])
    assert not pair.engine.compiled._all


def test_buffers_are_part_of_the_estimate_and_left_out_where_they_do_not_fit(pair, monkeypatch):
    prompt, sampling = pair.prompt(), Sampling(max_new_tokens=5)
    need, plain = (of_answer(engine, prompt, PLANS[:1], 5) for engine in (pair.engine, pair.plain))
    pair.engine.forget()
    pair.engine.answer(prompt, PLANS[0], sampling)
    (seat,) = pair.engine.compiled._free
    assert need.parts == {**plain.parts, SEAT: seat.bytes} and need.bytes >= seat.bytes + plain.parts["layers"]
    monkeypatch.setattr(pair.engine, "max_memory", need.bytes - 1)
    steps = pair.count.steps
    same(pair.engine.answer(prompt, PLANS[0], sampling), pair.plain.answer(prompt, PLANS[0], sampling))
    assert SEAT not in of_answer(pair.engine, prompt, PLANS[:1], 5).parts and pair.count.steps == steps


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
def test_a_step_that_fails_fails_its_request_alone(pair, kind):
    sampling = Sampling(max_new_tokens=8)
    want = pair.plain.answer(pair.prompt(), PLANS[0], sampling)
    stream, other = (pair.engine.stream(pair.prompt(), PLANS[0], sampling) for _ in range(2))
    next(stream), next(stream), next(other), next(other)
    pair.count.fails = (pair.count.steps + 1, kind("the device is gone"))
    with pytest.raises(OutOfMemory if kind is MemoryError else RuntimeError):
        next(stream)
    pair.count.fails = None
    assert stream.done and stream._generation._part.seat is None and list(stream) == []
    list(other)
    same(other.answer, want)
    same(pair.engine.answer(pair.prompt(), PLANS[0], sampling), want)


def test_requests_that_share_steps_leave_their_seats_and_take_one_again(pair):
    """Two answer alone, then together, then the longer one alone: compiled, shared, compiled."""
    sampling = [Sampling(max_new_tokens=n) for n in (6, 14)]
    wanted = [pair.plain.answer(pair.prompt(i), PLANS[i], s) for i, s in enumerate(sampling)]
    one, other = (Generation(pair.engine, pair.prompt(i), [PLANS[i]], s, None) for i, s in enumerate(sampling))
    for generation in (one, other):
        generation.step(), generation.step()
        assert generation._part.seat is not None
    threads = [threading.Thread(target=lambda g=g: [g.step() for _ in range(3)]) for g in (one, other)]
    with pair.engine._lock:
        for number, thread in enumerate(threads, 1):
            thread.start()
            while len(pair.engine._lock) < number:
                threading.Event().wait(0.001)
    for thread in threads:
        thread.join()
    shared = [generation._part for generation in (one, other)]
    assert any(part.rows and part.seat is None for part in shared)
    while not one.done:
        one.step()
    other.step()
    assert other._part.seat is not None and not other._part.rows and not len(pair.engine.together)
    while not other.done:
        other.step()
    for generation, want in zip((one, other), wanted, strict=True):
        same(generation.answers()[0], want)


def test_decoding_can_be_switched_in_the_middle_of_an_answer(pair):
    sampling = Sampling(max_new_tokens=8)
    stream = pair.engine.stream(pair.prompt(), PLANS[0], sampling)
    next(stream), next(stream)
    held, pair.engine.compiled = pair.engine.compiled, None
    next(stream), next(stream)
    assert stream._generation._part.seat is None
    pair.engine.compiled = held
    next(stream)
    assert stream._generation._part.seat is not None
    list(stream)
    same(stream.answer, pair.plain.answer(pair.prompt(), PLANS[0], sampling))


def test_others_are_injected_while_one_compiles():
    """torch says of every thread that it compiles while one does; a prefill in another must keep its stacks."""
    other, want, found = tiny.engine("qwen"), [], []
    prompt, sampling = other.prompt(tiny.ask(tiny.image(3), "What?")), Sampling(max_new_tokens=3)
    want.append(other.answer(prompt, other.layout.default, sampling))

    def backend(program, inputs):
        assert torch.compiler.is_compiling()
        thread = threading.Thread(target=lambda: found.append(other.answer(prompt, other.layout.default, sampling)))
        thread.start()
        thread.join()
        return program.forward

    engine = tiny.build(tiny.folder("hires"))
    engine.decode_by("compiled", backend)
    engine.warm_up()
    assert [t.logprob for a in found for t in a.tokens] == pytest.approx(
        [t.logprob for a in want for t in a.tokens], abs=TOLERANCE
    )


def test_warming_up_compiles_before_the_first_request():
    pair = Pair(tiny.folder("hires"))
    pair.engine.warm_up()
    assert (pair.count.programs, pair.count.steps) == (1, 3) and len(pair.engine.compiled._free) == 1
    sampling = Sampling(max_new_tokens=4)
    same(pair.engine.answer(pair.prompt(), PLANS[0], sampling), pair.plain.answer(pair.prompt(), PLANS[0], sampling))
    assert pair.count.programs == 1
    pair.plain.warm_up()  # nothing to do


def test_what_cannot_be_compiled_is_said_and_decodes_plainly():
    def backend(program, inputs):
        raise NotImplementedError("no such kernel")

    engine, plain = tiny.build(tiny.folder("hires")), tiny.engine("hires")
    prompt, sampling = engine.prompt(tiny.ask(tiny.image(1), "What?")), Sampling(max_new_tokens=4)
    engine.decode_by("compiled", backend)
    with pytest.raises(UserError, match="cannot decode compiled here: .*no such kernel.* Leave --decode out"):
        engine.answer(prompt, PLANS[0], sampling)
    engine.compiled, engine._insist = Compiled(engine, 2**30, backend), False  # as where it was chosen by itself
    same(engine.answer(prompt, PLANS[0], sampling), plain.answer(prompt, PLANS[0], sampling))
    assert engine.compiled is None and "compiling failed here (" in engine.reasons[-1]
    assert engine._lock.acquire(blocking=False) and engine._lock.release() is None


class Elsewhere:
    """What the choice looks at, of an engine on another device."""

    def __init__(self, engine, device):
        self.name, self.together, self.model, self.adapter = "it", engine.together, engine.model, engine.adapter
        self.device = torch.device(device)


def test_the_choice_comes_with_its_reason(monkeypatch):
    engine = tiny.engine("hires")
    assert (
        choose_decode("auto", engine)
        == choose_decode(None, engine)
        == (
            False,
            "plain decoding: compiling its steps pays on a GPU",
        )
    )
    assert choose_decode("plain", engine) == (False, "plain decoding: asked for")
    assert choose_decode("compiled", engine) == (True, "compiled decoding: asked for")
    with pytest.raises(UserError, match="“fast” is not known; use one of auto, plain, compiled"):
        choose_decode("fast", engine)
    on_gpu = Elsewhere(engine, "cuda")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    assert choose_decode("auto", on_gpu)[0] and "GPU" in choose_decode("auto", on_gpu)[1]
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert not choose_decode("auto", on_gpu)[0] and "Triton" in choose_decode("auto", on_gpu)[1]
    windows = Elsewhere(families.engine("cohere_compass"), "cuda")
    assert choose_decode(None, windows) == (False, "plain decoding: some layers have a sliding window")


@pytest.mark.slow
def test_machine_code_decodes_to_the_same_tokens():
    """The backend that is used, once: C++ on the CPU, or the reason in one sentence where there is no compiler."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++"))):
        with pytest.raises(UserError, match="cannot decode compiled here: .*compiler.* Leave --decode out"):
            load(str(tiny.folder("hires")), device="cpu", decode="compiled")
        return
    engine, plain = load(str(tiny.folder("hires")), device="cpu", decode="compiled"), tiny.engine("hires")
    prompt, sampling = engine.prompt(tiny.ask(tiny.image(1), "What?")), Sampling(max_new_tokens=6)
    assert engine.reasons[-1] == "compiled decoding: asked for"
    for plan in PLANS[:2]:
        same(engine.answer(prompt, plan, sampling), plain.answer(prompt, plan, sampling))


def test_nothing_grows(pair):
    """150 requests more, of changing images, plans and lengths, every fifth given up: as many bytes in tensors."""

    def held() -> int:
        gc.collect()
        found = {}
        for thing in gc.get_objects():
            if type(thing) is torch.Tensor or type(thing) is torch.nn.Parameter:
                found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        return sum(found.values())

    def ask(numbers):
        for i in numbers:
            plan = Plan.parse(f"base@0,{i % 2}@{1 + i % 3}*{1 + i / 100}")
            prompt = pair.prompt(i % 7, "What?" * (1 + i % 5))
            with pair.engine.stream(prompt, plan, Sampling(max_new_tokens=2 + i % 3, seed=i)) as stream:
                next(stream), next(stream, None)
                if i % 5:
                    list(stream)

    pair.engine.forget()
    ask(range(30))
    before, programs = held(), pair.count.programs
    ask(range(30, 180))
    assert held() - before < 64_000 and pair.count.programs == programs  # less than one request's keys and values
    assert len(pair.engine.compiled._all) == len(pair.engine.compiled._free) == 1
