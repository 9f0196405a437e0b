"""Norms by hand, and two identities that a real trace must obey."""

import numpy as np
import pytest

from analysis import norms
from model.probe import Probe
from model.types import Sampling
from tests import tiny
from tests.analysis import hand


@pytest.fixture(scope="module", params=["hires", "qwen"])
def seen(request):
    """(engine, prompt, answer) of a tiny model and a picture."""
    engine = tiny.engine(request.param)
    prompt = engine.prompt(tiny.ask(tiny.image(3, (48, 32)), "What does the sign say?"))
    return engine, prompt, engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=4))


def test_summary_by_hand():
    found = norms.summarise(hand.trace())
    assert found.residual_image == pytest.approx([1.5, (3 + 8**0.5 + 5 + 6) / 4, 15])
    assert found.residual_text == pytest.approx([0.5, 0.5, 0.5])
    assert found.before_image == pytest.approx([0, 2.5])
    assert found.injected == {("base", 0): 1.5, ("0", 1): 2.0}
    assert found.ratio[1] == pytest.approx((2 + 1 + 2 / 3 + 1 / 2) / 4)
    assert found.cosine[1] == pytest.approx(0.75)
    assert np.isnan(found.ratio[0]) and np.isnan(found.cosine[0])  # nothing lies under the base
    assert found.residual_image_low[2] == pytest.approx(10) and found.residual_image_high[2] == pytest.approx(24)
    assert (found.n_layers, found.sources()) == (2, ("base", "0"))


def test_summary_without_an_image():
    trace = hand.trace(
        grids=(), injected_rms={}, ratio=np.zeros((2, 0)), cosine=np.zeros((2, 0)), texts=("a",) * 9, plan=hand.PLAN
    )
    found = norms.summarise(trace)
    assert np.isnan(found.residual_image).all() and np.isfinite(found.residual_text).all()


def test_a_layer_without_injection_has_no_ratio():
    only_base = {("base", 0): np.ones(4)}
    found = norms.summarise(hand.trace(injected_rms=only_base, ratio=np.zeros((2, 4)), cosine=np.full((2, 4), np.nan)))
    assert np.isnan(found.ratio[1]) and np.isnan(found.cosine[1])  # not zero: there is nothing to compare


def test_no_norms_no_summary():
    with pytest.raises(ValueError, match="no norms"):
        norms.summarise(hand.trace(residual_rms=np.zeros((0, 9))))


def test_maps_by_hand():
    trace = hand.trace()
    shown = norms.norm_map(trace, "residual", 2)
    assert shown.values.tolist() == [[10, 10], [10, 30]]
    assert (shown.size, shown.unit, shown.limits) == ((40, 20), "RMS", (0, 30))
    assert norms.norm_map(trace, "before", 1).values.tolist() == [[1, 2], [3, 4]]
    assert norms.norm_map(trace, "injected", 1, "0").values.tolist() == [[2, 2], [2, 2]]
    assert norms.norm_map(trace, "ratio", 1).values == pytest.approx(np.array([[2, 1], [2 / 3, 0.5]]))
    cosine = norms.norm_map(trace, "cosine", 1)
    assert cosine.values.tolist() == [[1, 0], [1, 1]] and cosine.diverging and cosine.limits == (-1, 1)


def test_a_place_without_injection_is_empty_and_says_why():
    trace = hand.trace()
    nowhere = norms.norm_map(trace, "injected", 0, "0")
    assert np.isnan(nowhere.values).all() and nowhere.note == "Nothing is injected here."
    first = norms.norm_map(trace, "ratio", 0)
    assert np.isnan(first.values).all() and "residual before it is zero" in first.note
    assert np.isfinite(first.limits).all()


@pytest.mark.parametrize(
    "kind, layer, source, words",
    [("ratio", 2, None, "no layer 2"), ("sideways", 0, None, "no map"), ("injected", 1, None, "needs a source")],
)
def test_maps_refuse_what_does_not_exist(kind, layer, source, words):
    with pytest.raises(ValueError, match=words):
        norms.norm_map(hand.trace(), kind, layer, source)


def test_ripple_by_hand():
    h = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    off = np.array([[3.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    positions = np.arange(1, 5)
    on, without = (hand.trace(hidden=dict.fromkeys(range(3), x), hidden_positions=positions) for x in (h, off))
    found = norms.ripple(on, without)
    assert found == pytest.approx(np.tile([0.8, 0, 0, 1], (3, 1)))
    shown = norms.ripple_map(on, found, 2, "0")
    assert shown.values == pytest.approx(np.array([[0.8, 0], [0, 1]])) and "final output" in shown.quantity


def test_ripple_needs_all_layers():
    with pytest.raises(ValueError, match="hidden states of every layer"):
        norms.ripple(hand.trace(), hand.trace())


def test_ripple_agrees_with_the_engine(seen):
    """Rows moved, put back together, are the engine's own effect, which comes from another pass."""
    engine, prompt, answer = seen
    plan = engine.layout.default
    effect = norms.effect(engine, prompt, answer, plan)
    assert effect.sources == tuple(source.name for source in engine.layout.sources)
    for i, source in enumerate(effect.sources):
        on, moved = norms.ripple_of(engine, prompt, answer, plan, source)
        length = on.residual_rms[:, on.image_positions]  # x sqrt(d), which cancels
        whole = np.sqrt(((moved * length) ** 2).sum(-1) / (length**2).sum(-1))
        assert whole == pytest.approx(effect.values[i], abs=2e-5)


def test_lengths_obey_the_law_of_cosines(seen):
    """|after|^2 = |before|^2 + |injected|^2 + 2 cos |before| |injected|, for every row and layer with an injection."""
    engine, prompt, answer = seen
    trace = engine.replay(prompt, answer, engine.layout.default, Probe())
    image = trace.image_positions
    for layer in sorted({layer for _, layer in trace.injected_rms} - {0}):
        before, after = trace.before_rms[layer, image], trace.residual_rms[layer, image]
        (added,) = (rms for (_, at), rms in trace.injected_rms.items() if at == layer)
        expected = before**2 + added**2 + 2 * trace.cosine[layer] * before * added
        assert after**2 == pytest.approx(expected, rel=1e-4)
        assert trace.ratio[layer] == pytest.approx(added / before, rel=1e-4)
