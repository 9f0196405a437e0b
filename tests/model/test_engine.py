"""Answers: streamed, stopped, sampled, batched, cached; scores and differentiable passes."""

import threading
import time

import numpy as np
import pytest
import torch

from model.engine import FeatureCache, Generation
from model.errors import UserError
from model.plan import Plan
from model.probe import AttentionWish, Probe
from model.types import Sampling, Token
from tests import tiny

KINDS = ("hires", "qwen")
FAMILY = pytest.mark.parametrize("kind", KINDS)
PLANS = [Plan.parse(t) for t in ("base@0,0@1,1@2,2@3", "base@0", "none", "base@0,1@2*0.5", "base@2", "0@1,2@4*-2")]


def prompt_of(kind, seed=0, text="What does the sign say?"):
    return tiny.engine(kind).prompt(tiny.ask(tiny.image(seed, (40, 32)), text))


def same(one, other):
    assert [t.id for t in one.tokens] == [t.id for t in other.tokens]
    np.testing.assert_allclose([t.logprob for t in one.tokens], [t.logprob for t in other.tokens], atol=1e-5)
    assert (one.text, one.stopped, one.plan) == (other.text, other.stopped, other.plan)


@FAMILY
def test_a_stream_gives_the_tokens_of_the_answer(kind):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    stream = engine.stream(prompt, engine.layout.default, Sampling(max_new_tokens=8))
    assert not stream.answer.tokens
    first = next(stream)
    assert stream.answer.tokens == (first,) and not stream.done
    tokens = [first, *stream]
    answer = stream.answer
    assert answer.tokens == tuple(tokens) and answer.text == "".join(t.text for t in tokens)
    assert answer.text == engine.tokenizer.decode([t.id for t in tokens], skip_special_tokens=True).rstrip("\ufffd")
    assert answer.stopped == "length" and len(tokens) == 8
    assert (answer.model, answer.device, answer.plan) == (f"tiny-{kind}", "cpu", engine.layout.default)
    assert answer.prompt_tokens == prompt.input_ids.shape[1] and answer.visual_tokens == prompt.visual_tokens
    assert 0 < answer.first_token_seconds <= answer.seconds
    for token in tokens:
        assert len(token.top) == 5 and token.top[0][1] == pytest.approx(token.logprob, abs=1e-6)
        assert [p for _, p in token.top] == sorted((p for _, p in token.top), reverse=True)
    assert answer.to_json()["answer"] == answer.text and len(answer.to_json()["tokens"]) == 8


@FAMILY
def test_an_answer_ends_at_the_end_token_which_is_no_part_of_it(kind, monkeypatch):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    whole = engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=6))
    monkeypatch.setattr(engine, "_end", frozenset({whole.tokens[3].id}))
    answer = engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=6))
    until = [t.id for t in whole.tokens].index(whole.tokens[3].id)
    assert answer.stopped == "end" and answer.tokens == whole.tokens[:until]


@FAMILY
def test_a_batch_of_plans_is_its_single_runs(kind):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    sampling = Sampling(max_new_tokens=10)
    for many, plan in zip(engine.answer_many(prompt, PLANS, sampling), PLANS, strict=True):
        same(many, engine.answer(prompt, plan, sampling))
    assert engine.answer_many(prompt, []) == []


@FAMILY
def test_the_logits_of_a_batch_of_plans_are_those_of_single_runs(kind):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    with torch.inference_mode():
        together = Generation(engine, prompt, PLANS, Sampling(), None)._prefill()
        for row, plan in zip(together, PLANS, strict=True):
            alone = Generation(engine, prompt, [plan], Sampling(), None)._prefill()[0]
            assert (row - alone).abs().max() <= 2.1e-6 * max(1, alone.abs().max())


@FAMILY
def test_rows_of_a_batch_stop_independently(kind, monkeypatch):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    sampling = Sampling(max_new_tokens=10)
    ends = {engine.answer(prompt, plan, sampling).tokens[1 + i].id for i, plan in enumerate(PLANS[:3])}
    monkeypatch.setattr(engine, "_end", frozenset(ends))
    alone = [engine.answer(prompt, plan, sampling) for plan in PLANS]
    assert len({len(answer.tokens) for answer in alone}) > 1
    for many, single in zip(engine.answer_many(prompt, PLANS, sampling), alone, strict=True):
        same(many, single)


@FAMILY
def test_cached_decode_is_recompute(kind):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    plan = Plan.parse("base@0,0@1,1@2,2@3")
    generation = Generation(engine, prompt, [plan], Sampling(max_new_tokens=8), None)
    with torch.inference_mode():
        logits = [generation._prefill()[0]]
        for _ in range(7):
            choice = int(logits[-1].argmax())
            generation.rows[0].tokens.append(Token(choice, "", 0.0, ()))
            generation._made += 1
            logits.append(generation._decode()[0])
    ids = [token.id for token in generation.rows[0].tokens]
    whole = engine.logits(prompt, plan, ids)[-8:]
    # 1.7e-6 on a CPU with AMX, 2.2e-6 on one without: one row and many are multiplied in another order
    assert (torch.stack(logits) - whole).abs().max() <= 4e-6 * max(1, whole.abs().max())


@FAMILY
def test_stopping_takes_at_most_one_token(kind):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    stop = threading.Event()
    stream = engine.stream(prompt, engine.layout.default, Sampling(max_new_tokens=50), stop)
    got = [next(stream), next(stream)]
    stop.set()
    got += list(stream)
    assert len(got) == 2 and stream.answer.stopped == "stopped" and stream.done
    answers = engine.answer_many(prompt, PLANS[:2], Sampling(), stop)
    assert [a.stopped for a in answers] == ["stopped", "stopped"] and not answers[0].tokens
    with engine.stream(prompt, engine.layout.default) as stream:
        next(stream)
    assert stream.done


@FAMILY
def test_a_seed_belongs_to_the_request(kind):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    plan = engine.layout.default

    def ids(**settings):
        return [t.id for t in engine.answer(prompt, plan, Sampling(max_new_tokens=8, **settings)).tokens]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert ids(temperature=1.5, seed=1) == ids(temperature=1.5, seed=1) != ids(temperature=1.5, seed=2)
    assert ids(temperature=1.5, top_k=1, seed=9) == ids()
    assert torch.equal(torch.get_rng_state(), state)
    many = engine.answer_many(prompt, [plan, plan], Sampling(max_new_tokens=8, temperature=1.5, seed=1))
    assert [t.id for t in many[1].tokens] == ids(temperature=1.5, seed=1)


@FAMILY
def test_a_plan_the_model_cannot_run_is_refused_before_any_work(kind):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    for plan in (Plan.parse("base@0,9@1"), Plan.parse("base@77")):
        for call in (engine.stream, engine.answer, engine.logits, engine.next_tokens):
            with pytest.raises(UserError, match="this model"):
                call(prompt, plan)
        with pytest.raises(UserError, match="this model"):
            engine.image_effect(prompt, None, plan)


# Vision


@FAMILY
def test_the_tower_runs_once_per_image_whatever_the_plans(kind, monkeypatch):
    engine = tiny.engine(kind)
    engine.cache.clear()
    runs = []
    real = engine.adapter.encode

    def slow(image, names):
        runs.append(image)
        time.sleep(0.02)
        return real(image, names)

    monkeypatch.setattr(engine.adapter, "encode", slow)
    prompt = prompt_of(kind, 11)
    assert not engine.answer(prompt, PLANS[0], Sampling(max_new_tokens=1)).vision_cached
    again = prompt_of(kind, 11, "Another question?")  # another image object with the same pixels
    assert engine.answer(again, PLANS[1], Sampling(max_new_tokens=1)).vision_cached
    assert len(runs) == 1
    threads = [threading.Thread(target=engine.see, args=(prompt_of(kind, 12),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 2


@FAMILY
def test_an_images_features_do_not_depend_on_the_others(kind):
    engine = tiny.engine(kind)
    images = [tiny.image(seed, size) for seed, size in ((1, (40, 32)), (2, (64, 16)), (3, (16, 64)))]
    engine.cache.clear()
    joint = engine.see(engine.prompt(tiny.ask(*images, "x"))).features
    start = 0
    for image in images:
        engine.cache.clear()
        alone = engine.see(engine.prompt(tiny.ask(image, "x"))).features
        n = len(alone["base"])
        for name, rows in alone.items():
            assert torch.equal(rows, joint[name][start : start + n])
        start += n
    assert start == len(joint["base"])


@FAMILY
def test_features_seen_by_an_answer_can_be_differentiated_through(kind):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    engine.cache.clear()
    engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=1))
    gain = torch.ones((), requires_grad=True)
    (engine.see(prompt).features["base"] * gain).sum().backward()
    assert gain.grad != 0


def test_the_cache_forgets_the_least_recently_used_beyond_its_bytes():
    cache = FeatureCache(max_bytes=100)
    rows = {"base": torch.zeros(10)}  # 40 bytes
    cache.add("a", rows)
    cache.add("b", rows)
    assert cache.get("a") == rows
    cache.add("c", rows)
    assert cache.get("b") == {} and cache.get("a") == rows and cache.get("c") == rows
    assert cache.bytes == 80 and len(cache) == 2
    cache.add("huge", {"base": torch.zeros(100)})
    assert cache.get("huge") == {} and len(cache) == 2
    cache.clear()
    assert cache.bytes == len(cache) == 0


def test_the_cache_completes_what_it_holds_of_an_image():
    cache = FeatureCache(max_bytes=100)
    first, second = {"base": torch.zeros(10)}, {"0": torch.ones(5)}  # 40 and 20 bytes
    cache.add("a", first)
    cache.add("b", {"base": torch.zeros(5)})
    cache.add("a", second)
    assert cache.get("a") == first | second and (cache.bytes, len(cache)) == (80, 2)
    cache.add("a", {"1": torch.ones(10)})  # the other image goes, not this one
    assert set(cache.get("a")) == {"base", "0", "1"} and cache.get("b") == {} and cache.bytes == 100
    cache.add("a", {"2": torch.ones(1)})  # with which this image alone would be over the limit
    assert "2" not in cache.get("a") and cache.bytes == 100
    cache.add("a", {"base": torch.ones(10)})
    assert cache.get("a")["base"] is first["base"] and cache.bytes == 100


# Scores and differentiable passes


@FAMILY
def test_the_score_of_an_answer_is_its_own_log_probabilities(kind):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    plan = Plan.parse("base@0,0@1")
    tokens = engine.score(prompt, plan, "It says OPEN.")
    assert "".join(token.text for token in tokens) == "It says OPEN."
    ids = [token.id for token in tokens]
    logits = engine.logits(prompt, plan, ids).log_softmax(-1)
    at = prompt.input_ids.shape[1] - 1
    want = [float(logits[at + i, token]) for i, token in enumerate(ids)]
    np.testing.assert_allclose([t.logprob for t in tokens], want, atol=1e-6)
    assert engine.score(prompt, plan, "") == ()
    special = {"qwen": "<|im_end|>", "hires": "</s>"}[kind]
    with pytest.raises(UserError, match="and its answer take"):
        engine.score(prompt, plan, "OPEN " * 5000)
    assert engine.tokenizer.convert_tokens_to_ids(special) not in [t.id for t in engine.score(prompt, plan, special)]
    following = engine.next_tokens(prompt, plan, tokens[:2], top=3)
    assert len(following) == 3 and following[0][1] == pytest.approx(float(logits[at + 2].max()), abs=1e-5)
    assert engine.next_tokens(prompt, plan, ids[:2], top=3) == following


@FAMILY
def test_log_probability_as_a_function_of_row_gains(kind):
    engine, prompt = tiny.engine(kind), prompt_of(kind)
    plan = engine.layout.default
    answer = engine.answer(prompt, plan, Sampling(max_new_tokens=4))
    gains = torch.ones(len(engine.layout.sources), prompt.visual_tokens, requires_grad=True)
    logprobs = engine.logprob_of(prompt, answer, plan, gains)
    np.testing.assert_allclose(logprobs.detach(), [t.logprob for t in answer.tokens], atol=1e-5)
    (gradient,) = torch.autograd.grad(logprobs.sum(), gains)
    assert gradient.shape == gains.shape and (gradient.abs().sum(1) > 0).all()
    # The gradient is the slope that finite differences see.
    step = 1e-3
    nudged = gains.detach().clone()
    nudged[1] += step
    with torch.no_grad():
        slope = (engine.logprob_of(prompt, answer, plan, nudged).sum() - logprobs.sum().detach()) / step
    assert slope == pytest.approx(float(gradient[1].sum()), rel=0.05, abs=0.01)
    nothing = engine.logprob_of(prompt, answer, plan, torch.zeros_like(gains))
    blind = engine.logits(prompt, Plan(), answer).log_softmax(-1)[prompt.input_ids.shape[1] - 1 : -1]
    want = [float(row[t.id]) for row, t in zip(blind, answer.tokens, strict=True)]
    np.testing.assert_allclose(nothing.detach(), want, atol=1e-6)
    batch = engine.logprob_of(prompt, answer, plan, torch.stack([gains, gains * 0.5, gains * 0]).detach())
    assert batch.shape == (3, len(answer.tokens))
    np.testing.assert_allclose(batch[[0, 2]], torch.stack([logprobs, nothing]).detach(), atol=1e-5)


@FAMILY
def test_bfloat16_runs_near_float32(kind):
    half, full = tiny.build(tiny.folder(kind), dtype=torch.bfloat16), tiny.engine(kind)
    prompt = prompt_of(kind)
    assert half.dtype == torch.bfloat16 and half.see(prompt).features["base"].dtype == torch.bfloat16
    plan = half.layout.default
    one, other = half.logits(prompt, plan).float(), full.logits(prompt, plan)
    assert torch.cosine_similarity(one, other, dim=-1).min() > 0.95
    answer = half.answer(prompt, plan, Sampling(max_new_tokens=3))
    trace = half.replay(prompt, answer, plan, Probe(attention=(AttentionWish((0,), (2,)),), hidden=(1,)))
    assert trace.residual_rms.dtype == trace.attention[0].dtype == trace.hidden[1].dtype == np.float32
    assert np.isfinite(trace.residual_rms).all()
    assert len(half.answer_many(prompt, PLANS, Sampling(max_new_tokens=2))) == len(PLANS)


def test_a_model_says_what_it_holds():
    engine = tiny.engine("qwen")
    engine.forget()
    weights = sum(p.numel() * 4 for p in engine.model.parameters())
    assert weights <= engine.memory_bytes < weights + 10_000  # tied embeddings once, plus small buffers
    engine.see(prompt_of("qwen"))
    assert engine.memory_bytes > weights + 2000
    assert not any(p.requires_grad for p in engine.model.parameters()) and not engine.model.training
