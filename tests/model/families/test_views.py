"""Only what the plans need goes through the vision tower: its runs counted, view by view.

Of families whose stacks come from views of their own; a family that taps its tower has all of one run. Run:
pytest tests/model/families/test_views.py
"""

from contextlib import contextmanager

import pytest
import torch

from model.engine import Engine
from model.outside import tower_of
from model.plan import Plan
from model.types import Sampling
from tests import tiny
from tests.families import ENTRIES, engine

IMAGE = tiny.image(0, (32, 32))  # 2 x 2 tiles beside the global view
ONE = Sampling(max_new_tokens=1)
# kind -> views of the base; views that the stacks need beside them, or anew (DeepStack-V's global view)
VIEWS = {
    "deepstack_llava": ([1], [4]),
    "deepstack_llama": ([1], [4]),
    "deepstack_llama_hd": ([5], [20]),  # a global view and four tiles, each again twice as large
    "deepstack_v": ([1], [4, 1]),
    "deepstack_llava_v": ([1], [4, 1]),
}
SEPARATE = pytest.mark.parametrize("kind", VIEWS)


def fresh(kind: str) -> Engine:
    """The engine of this kind with nothing held."""
    loaded = engine(kind)
    loaded.forget()
    return loaded


@contextmanager
def views_seen(loaded: Engine):
    """How many views each run of the tower sees from now on."""
    seen: list[int] = []
    handle = tower_of(loaded).register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


def asked(loaded: Engine, *images):
    return loaded.prompt(tiny.ask(*(images or [IMAGE]), "What does the sign say?"))


@SEPARATE
def test_the_base_alone_needs_its_own_views_and_the_stacks_the_remaining_ones(kind):
    loaded = fresh(kind)
    with views_seen(loaded) as seen:
        for _ in range(2):
            loaded.answer(asked(loaded), Plan.parse("base@0"), ONE)
            assert seen == VIEWS[kind][0]
        seen.clear()
        for _ in range(2):
            answer = loaded.answer(asked(loaded), loaded.layout.default, ONE)
            assert seen == VIEWS[kind][1]
        assert answer.vision_cached


@SEPARATE
def test_a_plan_that_brings_no_rows_needs_no_view(kind):
    loaded = fresh(kind)
    with views_seen(loaded) as seen:
        loaded.answer(asked(loaded), Plan(), ONE)
    assert seen == []


@SEPARATE
def test_plans_at_once_need_the_union(kind):
    loaded = fresh(kind)
    base, default = Plan.parse("base@0"), loaded.layout.default
    plans = [base, default.without(loaded.layout.stack_names[0]), Plan.parse("base@1"), default]
    with views_seen(loaded) as seen:
        answers = loaded.answer_many(asked(loaded), plans, ONE)
    of_base, of_stacks = VIEWS[kind]
    # DeepStack-V's global view goes through its tower once for each way of what enters there.
    assert sorted(seen) == sorted(of_base + of_stacks + of_base * kind.endswith("_v"))
    for answer, plan in zip(answers, plans, strict=True):
        alone = fresh(kind).answer(asked(loaded), plan, ONE)
        assert [token.id for token in answer.tokens] == [token.id for token in alone.tokens]


def test_the_tiles_of_deepstack_v_go_through_its_tower_once_whatever_enters():
    loaded = fresh("deepstack_v")
    with views_seen(loaded) as seen:
        for plan in ("base@0,v0@v2", "base@0,v0@v3", "base@0,v1@v2*0.5,v3@v2", "base@2,v0@v3"):
            loaded.answer(asked(loaded), Plan.parse(plan), ONE)
    assert seen == [4, 1, 1, 1]


def test_the_tiles_of_deepstack_v_go_no_further_than_to_where_they_are_taken():
    loaded = fresh("deepstack_v")
    runs: dict[int, list[int]] = {}
    layers = loaded.model.model.vision_tower.encoder.layers
    handles = [
        layer.register_forward_hook(lambda module, args, out, at=at: runs.setdefault(at, []).append(len(args[0])))
        for at, layer in enumerate(layers)
    ]
    try:
        loaded.answer(asked(loaded), loaded.layout.default, ONE)
    finally:
        for handle in handles:
            handle.remove()
    assert runs == {0: [4, 1], 1: [4, 1], 2: [1], 3: [1], 4: [1], 5: [1]}  # taken before layer 2


@pytest.mark.parametrize("kind", ENTRIES)
def test_completed_features_are_those_of_a_fresh_engine(kind):
    """Whatever was asked first, every plan's logits are bit for bit those that it gets alone."""
    loaded = engine(kind)
    default = loaded.layout.default
    base = Plan(entry for entry in default if entry.layer == 0)
    plans = [Plan(), base, *(default.without(name) for name in loaded.layout.stack_names[:2]), default]
    prompt = asked(loaded, IMAGE, tiny.image(1, (48, 32)))
    alone = {plan: fresh(kind).logits(prompt, plan) for plan in plans}
    for order in (plans, plans[::-1]):
        fresh(kind)
        for plan in order:
            assert torch.equal(loaded.logits(prompt, plan), alone[plan]), plan
    everything = fresh(kind).features(prompt)
    fresh(kind).logits(prompt, base)
    assert torch.equal(loaded.features(prompt), everything)


@SEPARATE
def test_under_the_plan_of_plain_transformers_the_tower_sees_what_it_sees_there(kind):
    loaded = fresh(kind)
    inputs, plan = loaded.adapter.plain_inputs(asked(loaded))
    with views_seen(loaded) as seen:
        loaded.answer(asked(loaded), plan, ONE)
        ours = sum(seen)
        loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert ours == sum(seen) - ours > 0


def test_what_is_too_large_to_be_held_is_made_once_for_an_answer(monkeypatch):
    loaded = fresh("deepstack_llava")
    monkeypatch.setattr(loaded.cache, "max_bytes", 1)
    with views_seen(loaded) as seen:
        loaded.answer(asked(loaded), loaded.layout.default, Sampling(max_new_tokens=3))
    assert seen == [1, 4]


def test_gains_of_rows_need_the_views_of_the_plan_alone():
    loaded = fresh("deepstack_llava")
    prompt, plan = asked(loaded), Plan.parse("base@0")
    answer = loaded.answer(prompt, plan, Sampling(max_new_tokens=2))
    gains = torch.ones(5, prompt.visual_tokens, requires_grad=True)
    with views_seen(loaded) as seen:
        found = loaded.logprob_of(prompt, answer, plan, gains)
    assert seen == []
    torch.testing.assert_close(found.detach(), torch.tensor([token.logprob for token in answer.tokens]))
    found.sum().backward()
    assert gains.grad[0].any() and not gains.grad[1:].any()
