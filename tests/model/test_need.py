"""What a request will need, beside what it really takes; refused before it starts; and what is left when it fails."""

import json
import os
import subprocess
import sys

import pytest
import torch

from app.peak import Peak
from model.errors import OutOfMemory, UserError, is_out_of_memory
from model.need import CACHE, IMAGE, KEPT, LAYER, LOGITS, of_answer, of_pass
from model.plan import Plan
from model.probe import AttentionWish, Probe
from model.types import Sampling
from tests import families, tiny

FAMILY = pytest.mark.parametrize("kind", ("hires", "qwen"))
LONG = {"hires": 80, "qwen": 600}  # words


def long_prompt(kind: str, size=(64, 64)):
    return tiny.engine(kind).prompt(tiny.ask(tiny.image(3, size), "word " * LONG[kind]))


@FAMILY
@pytest.mark.parametrize("plans", [1, 6])
def test_an_answer_takes_no_more_than_was_estimated_and_not_much_less(kind, plans):
    engine, prompt = tiny.engine(kind), long_prompt(kind)
    engine.cache.clear()
    chosen = [engine.layout.default, *([Plan()] * (plans - 1))]
    with Peak() as peak:
        engine.answer_many(prompt, chosen, Sampling(max_new_tokens=4))
    need = of_answer(engine, prompt, chosen, 4)
    assert peak.most <= need.bytes <= 4 * peak.most, (peak.most, need)


@FAMILY
def test_a_replay_takes_no_more_than_was_estimated_and_not_much_less(kind):
    engine, prompt = tiny.engine(kind), long_prompt(kind)
    answer = engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=4))
    rows = tuple(range(0, prompt.input_ids.shape[1], 2))
    probe = Probe(attention=(AttentionWish(tuple(range(engine.layout.n_layers)), rows),), hidden=(1, 2))
    with Peak() as peak:
        engine.replay(prompt, answer, engine.layout.default, probe)
    need = of_pass(engine, prompt, [engine.layout.default], 4, probe)
    assert peak.most <= need.bytes <= 4 * peak.most, (peak.most, need)
    assert need.parts[KEPT] > need.bytes / 2  # rows of attention are what it takes


@FAMILY
def test_gradients_take_no_more_than_was_estimated(kind):
    engine, prompt = tiny.engine(kind), long_prompt(kind)
    answer = engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=2))
    gains = torch.ones(3, len(engine.layout.sources), prompt.visual_tokens, requires_grad=True)
    with Peak() as peak:
        engine.logprob_of(prompt, answer, engine.layout.default, gains).sum().backward()
    need = of_pass(engine, prompt, [engine.layout.default] * 3, 2, grad=True)
    assert peak.most <= need.bytes <= 4 * peak.most, (peak.most, need)


@FAMILY
def test_the_vision_tower_on_a_large_image_takes_no_more_than_was_estimated(kind):
    engine = tiny.engine(kind)
    prompt = engine.prompt(tiny.ask(tiny.image(4, (900, 700)), "x"))
    engine.cache.clear()
    with Peak() as peak:
        engine.see(prompt)
    assert peak.most <= of_answer(engine, prompt, [engine.layout.default], 1).parts[IMAGE]


@pytest.mark.parametrize("kind", sorted(families.ENTRIES))
def test_every_family_can_be_estimated(kind):
    engine = families.engine(kind)
    prompt = engine.prompt(tiny.ask(tiny.image(1, (48, 32)), "What?"))
    plans = [engine.layout.default] * 2
    need = of_answer(engine, prompt, plans, 8)
    assert all(need.parts[name] > 0 for name in (CACHE, LAYER, LOGITS, IMAGE)), need
    engine.cache.clear()
    with Peak() as peak:
        engine.answer_many(prompt, plans, Sampling(max_new_tokens=2))
    assert peak.most <= need.bytes, (peak.most, need)


@pytest.mark.parametrize("kind", sorted(families.ENTRIES))
def test_what_the_plans_do_not_want_of_the_vision_tower_is_not_counted(kind):
    """Stacks that are samples of a larger view are most of it; taps come out of the run that makes the base."""
    engine = families.engine(kind)
    default, layout = engine.layout.default, engine.layout
    prompt = engine.prompt(tiny.ask(tiny.image(2, (96, 64)), "What?"))
    found = {}
    plans = [default, Plan(), *(Plan([entry]) for entry in default)]
    for plan in (p for p in plans if all(not e.in_tower for e in p) or p == default):
        engine.cache.clear()
        with Peak() as peak:
            engine.see(prompt, plan)
        found[plan] = of_answer(engine, prompt, [plan], 4).parts[IMAGE]
        assert peak.most <= found[plan], (str(plan), peak.most, found[plan])
    assert found[Plan()] == 0 and max(found.values()) == found[default]
    assert found[default] == of_answer(engine, prompt, plans, 4).parts[IMAGE]
    samples = [source for source in layout.all_sources if source.tap is None and source.name != "base"]
    if "base" in default.sources():
        (base,) = (plan for plan in found if plan.sources() == ("base",))
        assert found[default] > 2 * found[base] if samples else found[default] == found[base]


# ---- refused before it starts


@pytest.fixture
def small():
    """A model of one's own whose requests may take next to nothing, and how often its decoder has run."""
    engine = tiny.build(tiny.folder("qwen"))
    engine.max_memory = 10_000
    runs = []
    engine.adapter.decoder.register_forward_pre_hook(lambda *args: runs.append(1))
    engine.adapter.model.model.visual.register_forward_pre_hook(lambda *args: runs.append(1))
    return engine, runs


def test_over_the_limit_it_is_refused_with_the_figure_and_the_way_out(small):
    engine, runs = small
    prompt = engine.prompt(tiny.ask(tiny.image(0), "What?"))
    plan = engine.layout.default
    figure = r"needs about \d+ kB of memory .*layers.*at most 10 kB may be taken \(max_memory\)"
    with pytest.raises(UserError, match=figure + r".* Use smaller or fewer images \(fewer pixels\)\.$"):
        engine.stream(prompt, plan)
    with pytest.raises(UserError, match="or fewer plans at once"):
        engine.answer_many(prompt, [plan, plan])
    with pytest.raises(UserError, match="or fewer plans at once"):
        engine.image_effect(prompt, None, plan)
    with pytest.raises(UserError, match="shorter conversation"):
        engine.answer(engine.prompt(tiny.ask("word " * 50)), plan)
    with pytest.raises(UserError, match=r"max_memory"):
        engine.logprob_of(prompt, [5, 6], plan, torch.ones(len(engine.layout.sources), prompt.visual_tokens))
    answer = tiny.engine("qwen").answer(prompt, plan, Sampling(max_new_tokens=2))
    probe = Probe(attention=(AttentionWish((0,), tuple(range(10))),))
    with pytest.raises(UserError, match="or fewer recorded rows"):
        engine.replay(prompt, answer, plan, probe)
    assert not runs
    engine.max_memory = 10**9
    assert engine.answer(prompt, plan, Sampling(max_new_tokens=2)).tokens == answer.tokens and runs


def test_a_plan_without_stacks_is_answered_where_one_with_them_is_refused():
    engine = tiny.build(tiny.folder("hires"))
    prompt, base = engine.prompt(tiny.ask(tiny.image(2, (96, 64)), "What?")), Plan.parse("base@0")
    engine.max_memory = of_answer(engine, prompt, [base], 2).bytes
    assert engine.answer(prompt, base, Sampling(max_new_tokens=2)).tokens
    for plans in ([engine.layout.default], [base, engine.layout.default]):
        with pytest.raises(UserError, match="vision tower .*max_memory"):
            engine.answer_many(prompt, plans, Sampling(max_new_tokens=2))


def test_more_than_is_free_is_refused_whatever_the_limit(small):
    engine, _ = small
    engine.max_memory = 2**60
    prompt, plan = engine.prompt(tiny.ask(tiny.image(0), "word " * 600)), engine.layout.default
    need = of_answer(engine, prompt, [plan] * 10**6, 48)
    with pytest.raises(UserError, match="GB are free on cpu"):
        need.check(engine)
    of_answer(engine, prompt, [plan], 48).check(engine)


def test_what_is_held_makes_room_before_anything_is_refused(monkeypatch):
    """As if the machine had a little more free than is needed, once what is held has gone."""
    engine = tiny.build(tiny.folder("qwen"))
    engine.shortest_prefix = 1
    prompt = engine.prompt(tiny.ask(tiny.image(0), "What?"))
    need = of_answer(engine, prompt, [engine.layout.default], 4)
    engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=4))
    held = engine.cache.bytes + engine.prefixes.bytes
    assert engine.cache.bytes and engine.prefixes.bytes
    total = need.bytes + held // 2
    monkeypatch.setattr("model.need.free_memory", lambda device: total - engine.cache.bytes - engine.prefixes.bytes)
    need.check(engine)
    assert engine.cache.bytes == engine.prefixes.bytes == 0
    total = need.bytes - 1
    with pytest.raises(UserError, match="are free on cpu"):
        need.check(engine)


# ---- out of memory in the middle


SCRIPT = """
import gc, json, resource
import torch
from model.probe import AttentionWish, Probe
from model.types import Sampling
from tests import tiny

engine = tiny.engine("qwen")
plan = engine.layout.default
small = engine.prompt(tiny.ask(tiny.image(0), "What does it say?"))
large = engine.prompt(tiny.ask(tiny.image(1), "x " * 400))
few = Sampling(max_new_tokens=4)
rows = tuple(range(large.input_ids.shape[1]))
probe = Probe(attention=(AttentionWish(tuple(range(engine.layout.n_layers)), rows),))
short = engine.answer(large, plan, Sampling(max_new_tokens=1))

def held():
    gc.collect()
    return sum(t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor)

def tokens():
    return [[token.id, token.logprob] for token in engine.answer(small, plan, few).tokens]

def limited(call):
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 8 * 2**20, resource.RLIM_INFINITY))
    try:
        call()
        return "", ""
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

first, before, ends = tokens(), held(), []
for call in (
    lambda: engine.answer_many(large, [plan] * 240, few),
    lambda: engine.replay(large, short, plan, probe),
    lambda: list(engine.stream(large, plan, few)) and engine.answer_many(large, [plan] * 240, few),
):
    ends.append([*limited(call), held(), tokens() == first])
print(json.dumps({"ends": ends, "tokens": len(first), "held": before, "depth": engine._lock._depth}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process")
def test_a_request_that_finds_no_memory_fails_alone(root):
    """The allocator really fails: a process of its own may not grow any more while large requests run.

    One arena alone: glibc reserves 64 MB of address space for each further one, where a request could still find room.
    """
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=root,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] == 4 and found["depth"] == 0
    for name, words, left, right in found["ends"]:
        assert name == "OutOfMemory" and "ran out of memory on cpu" in words and "smaller image" in words
        assert right and left <= found["held"] + 200_000, found


def test_how_there_being_no_memory_is_said():
    for make in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytearray(2**62)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            make()
        assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory.")) and is_out_of_memory(OutOfMemory("x"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit")) and not is_out_of_memory(UserError("x"))


def test_other_errors_of_a_pass_stay_what_they_are():
    engine = tiny.engine("qwen")
    with pytest.raises(RuntimeError, match="something else") as error, engine._device():
        raise RuntimeError("something else")
    assert not isinstance(error.value, UserError)
