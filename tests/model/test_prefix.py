"""Key-value caches taken up again: the same answers as from nothing, in fewer positions, and never across a change."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from model.plan import Plan
from model.prefix import PrefixCache
from model.types import Sampling
from tests import tiny

SHORT = Sampling(max_new_tokens=5)
TOLERANCE = 5e-6  # nats, float32: rows of a shorter pass are added up in another order


class Fresh:
    """An engine of its own that takes up every beginning, and how many positions its passes read."""

    def __init__(self, kind: str):
        self.engine = tiny.build(tiny.folder(kind))
        self.engine.shortest_prefix = 1
        self.read: list[int] = []
        self.engine.adapter.decoder.layers[0].register_forward_pre_hook(
            lambda module, args: self.read.append(args[0].shape[1])
        )

    def answers(self, messages, plans):
        """Answers of one batch, and how many positions the prefill read."""
        self.read.clear()
        found = self.engine.answer_many(self.engine.prompt(messages), plans, SHORT)
        return found, self.read[0]


def same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.text == theirs.text
        assert [t.logprob for t in ours.tokens] == pytest.approx([t.logprob for t in theirs.tokens], abs=TOLERANCE)


def from_nothing(kind, messages, plans):
    engine = tiny.engine(kind)
    return engine.answer_many(engine.prompt(messages), plans, SHORT)


@pytest.fixture(params=["hires", "qwen"])
def kind(request):
    return request.param


def turns(said: str, image=None):
    """A second question after `said` was answered to the first."""
    first = tiny.ask(image or tiny.image(1), "Read the sign.")
    return [
        *first,
        {"role": "assistant", "content": [{"type": "text", "text": said}]},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]


def test_a_retry_reads_one_position(kind):
    fresh, messages = Fresh(kind), tiny.ask(tiny.image(1), "Read the sign.")
    plan = fresh.engine.layout.default
    first, length = fresh.answers(messages, [plan])
    assert length == fresh.engine.prompt(messages).input_ids.shape[1]
    again, read = fresh.answers(messages, [plan])
    assert read == 1
    same(again, first)
    same(again, from_nothing(kind, messages, [plan]))


def test_the_next_turn_reads_what_is_new(kind):
    fresh = Fresh(kind)
    plan = fresh.engine.layout.default
    first, length = fresh.answers(tiny.ask(tiny.image(1), "Read the sign."), [plan])
    messages = turns(first[0].text)
    second, read = fresh.answers(messages, [plan])
    assert read <= fresh.engine.prompt(messages).input_ids.shape[1] - length + 1
    same(second, from_nothing(kind, messages, [plan]))
    third, read = fresh.answers(messages, [plan])  # the longer of the two that are held
    assert read == 1
    same(third, second)


def test_another_plan_shares_what_precedes_the_image(kind):
    fresh, messages = Fresh(kind), tiny.ask(tiny.image(1), "Read the sign.")
    fresh.answers(messages, [fresh.engine.layout.default])
    prompt = fresh.engine.prompt(messages)
    image = int(prompt.grids[0].positions.min())
    plans = [Plan.parse("base@0"), fresh.engine.layout.default, Plan.parse("base@0,0@1*3")]
    found, read = fresh.answers(messages, plans)
    assert 0 < image and read == prompt.input_ids.shape[1] - image
    same(found, from_nothing(kind, messages, plans))
    alone, read = fresh.answers(messages, plans[:1])
    assert read == prompt.input_ids.shape[1] - image, "a batch holds nothing"
    same(alone, from_nothing(kind, messages, plans[:1]))


def test_another_image_is_read_anew(kind):
    fresh = Fresh(kind)
    plan = fresh.engine.layout.default
    fresh.answers(tiny.ask(tiny.image(1), "Read the sign."), [plan])
    messages = tiny.ask(tiny.image(2), "Read the sign.")
    prompt = fresh.engine.prompt(messages)
    found, read = fresh.answers(messages, [plan])
    assert read == prompt.input_ids.shape[1] - int(prompt.grids[0].positions.min())
    same(found, from_nothing(kind, messages, [plan]))


def test_the_first_of_two_images_is_shared(kind):
    """The cut lies between the images: injections of the second enter at their own rows."""
    fresh = Fresh(kind)
    plan = fresh.engine.layout.default

    def both(second):
        parts = [{"type": "image", "image": tiny.image(1)}, {"type": "image", "image": second}]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": "Which?"}]}]

    fresh.answers(both(tiny.image(2)), [plan])
    messages = both(tiny.image(3))
    prompt = fresh.engine.prompt(messages)
    found, read = fresh.answers(messages, [plan])
    assert read == prompt.input_ids.shape[1] - int(prompt.grids[1].positions.min())
    same(found, from_nothing(kind, messages, [plan]))
    assert found[0].tokens[0].logprob != from_nothing(kind, both(tiny.image(2)), [plan])[0].tokens[0].logprob


def test_short_prompts_are_computed_again_to_the_same_bits():
    engine, messages = tiny.build(tiny.folder("hires")), tiny.ask(tiny.image(1), "Read the sign.")
    prompt = engine.prompt(messages)
    assert prompt.input_ids.shape[1] < engine.shortest_prefix
    first, again = (engine.answer(prompt, engine.layout.default, SHORT) for _ in range(2))
    assert [t.logprob for t in first.tokens] == [t.logprob for t in again.tokens]
    assert len(engine.prefixes) == 0


def test_a_stopped_answer_is_taken_up_as_far_as_it_got(kind):
    fresh, messages = Fresh(kind), tiny.ask(tiny.image(1), "Read the sign.")
    plan = fresh.engine.layout.default
    with fresh.engine.stream(fresh.engine.prompt(messages), plan, SHORT) as stream:
        next(stream), next(stream)
    found, read = fresh.answers(messages, [plan])
    assert read == 1
    same(found, from_nothing(kind, messages, [plan]))


def test_a_pass_that_failed_leaves_nothing_to_take_up(kind):
    """It fails in the second layer, when the first has a position more already."""
    fresh, messages = Fresh(kind), tiny.ask(tiny.image(1), "Read the sign.")
    plan = fresh.engine.layout.default
    stream = fresh.engine.stream(fresh.engine.prompt(messages), plan, SHORT)
    next(stream), next(stream)

    def fail(module, args):
        raise RuntimeError("the second layer fails")

    hook = fresh.engine.adapter.decoder.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="second layer"):
        next(stream)
    hook.remove()
    assert len(fresh.engine.prefixes) == 0
    found, _ = fresh.answers(messages, [plan])
    same(found, from_nothing(kind, messages, [plan]))


def filled(length: int, value: float = 1.0) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.full((1, 1, length, 2), float(value)), torch.full((1, 1, length, 2), -float(value)), layer)
    return cache


def test_the_oldest_makes_room_and_what_is_too_large_is_not_held():
    """Two layers of keys and values, [1, 1, 4, 2] float32 each: 128 bytes an entry."""
    held, plan = PrefixCache(300), Plan.parse("base@0")
    for start in (10, 20):
        held.keep(filled(4, start), range(start, start + 4), plan)
    assert (len(held), held.bytes) == (2, 256)
    taken = DynamicCache()
    taken.layers = filled(1).layers
    assert held.take_up(taken, [10, 11, 12, 99, 98], [plan]) == 3
    assert taken.layers[0].keys.shape == (1, 1, 3, 2) and taken.layers[1].values.unique().tolist() == [-10.0]
    held.keep(filled(4, 30), range(30, 34), plan)  # 20.. was used least recently
    assert held.take_up(taken, [20, 21, 22], [plan]) == 0 and held.take_up(taken, [10, 11, 12], [plan]) == 2
    held.keep(filled(40), range(40), plan)
    assert (len(held), held.bytes) == (2, 256)
    held.keep(filled(5, 40), [10, 11, 12, 13, 14], plan)  # begins as the first one does, which is of no more use
    assert (len(held), held.bytes) == (2, 128 + 160)
    held.clear()
    assert (len(held), held.bytes) == (0, 0)


def test_what_cannot_be_cut_is_not_held():
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(4)]
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    held = PrefixCache(10_000)
    held.keep(cache, range(3), Plan.parse("base@0"))
    assert len(held) == 0
