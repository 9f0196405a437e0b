"""What the Layers tab sends to the browser is what the trace holds, packed."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from app import asking, looking
from app.session import Record
from model.errors import UserError
from model.plan import Plan
from model.types import Sampling
from tests.app.given import HIRES


@pytest.fixture
def record(desk, session) -> Record:
    asked = asking.prepare(
        desk, model=HIRES, plan="base@0,1@2", question="What?", images=["receipt.png"], settings=Sampling(6)
    )
    answer = asked.engine.answer(asked.prompt, asked.plan, asked.sampling)
    return desk.store.record(asking.keep(desk, session, asked, answer))


def unpack(text: str, dtype: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


def test_an_answer_is_replayed_once(desk, record):
    engine = desk.engine(HIRES)
    seen = looking.see(engine, record)
    assert looking.see(engine, record) is seen
    assert seen.trace.plan == Plan.parse("base@0,1@2")
    np.testing.assert_allclose(
        seen.trace.logprobs, [token.logprob for token in record.answer.tokens], rtol=0, atol=1e-4
    )


def test_maps_and_attention_arrive_as_they_were_recorded(desk, record):
    engine = desk.engine(HIRES)
    seen = looking.see(engine, record)
    value = json.loads(json.dumps(looking.look_value(engine, record, seen, "key")))
    trace, positions = seen.trace, seen.trace.image_positions
    kinds = {kind["key"]: kind for kind in value["kinds"]}
    assert list(kinds) == ["residual", "injected base@0", "injected 1@2", "ratio", "cosine"]
    n = len(positions)
    residual = unpack(kinds["residual"]["data"], "<f4", trace.n_layers + 1, n)
    np.testing.assert_array_equal(residual, trace.residual_rms[:, positions])
    injected = unpack(kinds["injected 1@2"]["data"], "<f4", 1, n)
    np.testing.assert_array_equal(injected[0], trace.injected_rms["1", 2])
    assert kinds["ratio"]["layers"] == [0, 2] and kinds["cosine"]["diverging"]
    attention = value["attention"]
    rows = attention["asked"] + attention["tokens"]
    mean = unpack(attention["mean"], "<f2", trace.n_layers, rows, n)
    np.testing.assert_allclose(mean[3], trace.attention[3].mean(0)[:, positions], rtol=1e-3, atol=1e-6)
    heads = unpack(attention["byLayer"]["3"], "<f2", attention["heads"], rows, n)
    np.testing.assert_allclose(heads, trace.attention[3][:, :, positions], rtol=1e-3, atol=1e-6)
    assert looking.heads_of(trace, 3) == attention["byLayer"]["3"]
    assert "".join(word["text"] for word in value["words"]) == record.answer.text
    assert sorted(i for word in value["words"] for i in word["tokens"]) == list(range(len(record.answer.tokens)))


def test_heads_too_large_to_send_at_once_are_fetched_by_layer(desk, record, monkeypatch):
    engine = desk.engine(HIRES)
    seen = looking.see(engine, record)
    monkeypatch.setattr(looking, "HEADS_BYTES", 10)
    assert looking.look_value(engine, record, seen, "key")["attention"]["byLayer"] == {}
    with pytest.raises(UserError, match="no attention rows of layer 99; there are of 0, 1"):
        looking.heads_of(seen.trace, 99)


def test_attention_stays_within_its_memory(desk, record, monkeypatch):
    engine = desk.engine(HIRES)
    monkeypatch.setattr(looking, "ATTENTION_BYTES", 1)
    seen = looking.see(engine, record)
    assert seen.tokens == 1 < len(record.answer.tokens)
    words = looking.look_value(engine, record, seen, "key")["words"]
    assert sum(len(word["tokens"]) for word in words) == 1


def test_an_answer_without_an_image_is_a_sentence(desk, record):
    engine = desk.engine(HIRES)
    prompt = engine.prompt([{"role": "user", "content": "no image"}])
    blind = Record(record.answer, prompt, [], "no image", (), record.sampling)
    with pytest.raises(UserError, match="without an image"):
        looking.see(engine, blind)


def test_the_ramp_runs_from_dark_to_light():
    colours = looking.ramp("cividis")
    assert len(colours) == 17 and all(len(colour) == 7 for colour in colours)
    assert colours[0] < colours[-1]
