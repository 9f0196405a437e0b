"""The parts of an answer: every ratio is there, is that of its parts, and what decoding reads is counted right."""

import pytest
import torch

from app import passes
from app.peak import peak_of
from tests import families, tiny


@pytest.fixture
def small(monkeypatch):
    for name, value in {"ROUNDS": 1, "TOKENS": 4, "COPIED": {"cpu": 2**20}}.items():
        monkeypatch.setattr(passes, name, value)


@pytest.mark.parametrize("kind", ["hires", "concat", "qwen"])
def test_every_figure_is_there(kind, small):
    engine = tiny.engine(kind)
    attention, hooks = (
        engine.adapter.decoder.config._attn_implementation,
        len(engine.adapter.decoder.layers[0]._forward_hooks),
    )
    found = passes.measure(engine)
    absent = {name for name, value in found.items() if value is None}
    assert absent == {"compiled_over_plain"} | ({"decode_over_plain", "peak_over_plain"} if kind == "concat" else set())
    assert all(value > 0 for value in found.values() if value is not None)
    assert set(passes.FIGURES) < set(found)
    text = passes.in_words(found, engine.reasons[-1])
    assert all(words in text for words, _ in passes.FIGURES.values()) and "plain decoding: compiling" in text
    assert engine.adapter.decoder.config._attn_implementation == attention
    assert len(engine.adapter.decoder.layers[0]._forward_hooks) == hooks


def test_compiled_decoding_has_its_row(small):
    engine = tiny.build(tiny.folder("qwen"))
    engine.decode_by("compiled", lambda program, inputs: program.forward)
    compiled = engine.compiled
    found = passes.measure(engine)
    assert found["compiled_over_plain"] > 0 and engine.compiled is compiled
    assert "compiled decoding: asked for" in passes.in_words(found, engine.reasons[-1])


def test_what_a_step_reads_is_counted_by_hand():
    """Llama, 64 wide, float32: its layers, the last norm, the head; keys and values of two heads 16 wide."""
    engine = tiny.engine("hires")
    text = engine.adapter.decoder.config
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96 + 2 * 64
    weights = 6 * layer + 64 + 64 * text.vocab_size
    assert passes.step_bytes(engine, 0) == 4 * weights
    assert passes.step_bytes(engine, 10) - passes.step_bytes(engine, 0) == 10 * 6 * 2 * 2 * 16 * 4


def test_of_a_mixture_one_token_reads_its_own_experts():
    engine = families.engine("qwen3_vl_moe")
    text, every = engine.adapter.decoder.config, 0
    for name, tensor in engine.adapter.decoder.named_parameters():
        every += tensor.nelement() * 4 if ".experts." in name else 0
    whole = sum(t.nelement() * 4 for t in [*engine.adapter.decoder.parameters(), *engine.adapter.lm_head.parameters()])
    whole -= engine.adapter.embed.weight.nelement() * 4
    used = every * text.num_experts_per_tok / text.num_experts
    assert 0 < used < every and passes.step_bytes(engine, 0) == pytest.approx(whole - every + used)


def test_the_peak_is_what_is_alive_at_once():
    def work():
        one = torch.zeros(1000)
        two = one + 1
        del one
        return two + torch.zeros(3000)[:1000]

    assert peak_of(work, torch.device("cpu")) == 4 * (1000 + 3000 + 1000)
