"""Where rows look, by hand; sinks by their rule; and that nothing is lost on real attention."""

import numpy as np
import pytest

from analysis import attention
from model.probe import Probe
from model.types import ImageGrid, Sampling
from tests import tiny
from tests.analysis import hand


@pytest.fixture(scope="module", params=["hires", "qwen"])
def real(request):
    """(trace with attention in all layers, engine, prompt, answer), two images."""
    engine = tiny.engine(request.param)
    prompt = engine.prompt(tiny.ask(tiny.image(1, (48, 32)), tiny.image(2, (32, 48)), "What does the sign say?"))
    answer = engine.answer(prompt, engine.layout.default, Sampling(max_new_tokens=5))
    wish = attention.wish(prompt, answer, tuple(range(engine.layout.n_layers)))
    return engine.replay(prompt, answer, engine.layout.default, Probe(attention=(wish,))), engine, prompt, answer


def test_one_head_by_hand():
    look = attention.to_image(hand.attending(), row=6, layer=0, head=1)
    assert look.map.values.tolist() == [[0, 0], [0.8, 0]]
    assert (look.image_share, look.first_share, look.text_share) == pytest.approx((0.8, 0.2, 0.0))
    assert look.map.quantity == "Attention when “X” was chosen, layer 0, head 1"


def test_mean_over_heads_by_hand():
    look = attention.to_image(hand.attending(), row=5, layer=0)
    assert look.map.values == pytest.approx(np.array([[0.2, 0.4], [0, 0]]))
    assert (look.image_share, look.first_share, look.text_share) == pytest.approx((0.6, 0.35, 0.05))
    assert look.map.quantity == "Attention from “a” (position 5), layer 0, all heads"


def test_scale_is_the_same_in_all_layers():
    shown = [attention.to_image(hand.attending(), 7, layer).map.scale(fixed=True) for layer in (0, 1)]
    assert shown[0] == shown[1] == (0, pytest.approx(0.4))


def sunk(extra_rows: bool = True, only: int | None = None):
    """Twenty patches in a row; every recorded row gives patch 0 half of its attention (or only row `only` does)."""
    rows = (21, 22, 23) if extra_rows else (22, 23)
    weights = np.zeros((1, len(rows), 25))
    for q, row in enumerate(rows):
        weights[0, q, 0], weights[0, q, 1:21] = 0.3, 0.01
        weights[0, q, 1 if only in (None, row) else 2 + q] += 0.5
    return hand.trace(
        texts=("<s>", *[""] * 20, "a", "b", "X", "Y"),
        answer_start=23,
        grids=(ImageGrid(0, np.arange(1, 21), (4, 5), (50, 40)),),
        attention={0: weights},
        attention_rows=rows,
    )


def test_a_patch_that_every_row_looks_at_is_a_sink():
    look = attention.to_image(sunk(), 22, 0)
    assert (look.sinks, look.sinks_known, look.hidden) == (((0, 0),), True, False)
    assert look.sink_share == pytest.approx(0.51) and look.image_share == pytest.approx(0.7)
    assert look.map.values[0, 0] == pytest.approx(0.51)  # shown, and said so
    assert look.map.note == "1 sink patch with 51% of this row's attention, shown."


def test_a_patch_that_one_row_looks_at_is_none():
    look = attention.to_image(sunk(only=22), 22, 0)
    assert (look.sinks, look.sink_share) == ((), 0)
    assert look.map.note == "No sink patches found on this image."


def test_three_times_an_equal_share_is_not_yet_a_sink():
    weights = np.zeros((1, 3, 25))
    weights[0, :, 1:21] = 0.01
    weights[0, :, 1], weights[0, :, 2] = (
        0.03 * 19 / 17,
        0.05 * 19 / 15,
    )  # 3 and 5 times an equal share, before the other
    trace = sunk()
    found = attention.to_image(
        hand.trace(
            texts=trace.texts, answer_start=23, grids=trace.grids, attention={0: weights}, attention_rows=(21, 22, 23)
        ),
        22,
        0,
    )
    assert found.sinks == ((0, 1),)


def test_rows_inside_the_image_have_no_say_in_what_a_sink_is():
    """A patch's own row cannot see the patches after it, so it would acquit them all."""
    made = sunk()
    own = np.zeros((1, 1, 25))
    own[0, 0, 0] = 1.0
    trace = hand.trace(
        texts=made.texts,
        answer_start=23,
        grids=made.grids,
        attention={0: np.concatenate([own, made.attention[0]], axis=1)},
        attention_rows=(5, *made.attention_rows),
    )
    assert attention.to_image(trace, 22, 0).sinks == ((0, 0),)


def test_hidden_sinks_are_empty_and_still_reported():
    look = attention.to_image(sunk(), 22, 0, hide_sinks=True)
    assert np.isnan(look.map.values[0, 0]) and np.nansum(look.map.values) == pytest.approx(0.19)
    assert (look.hidden, look.sink_share) == (True, pytest.approx(0.51))
    assert look.map.scale(fixed=True) == (0, pytest.approx(0.01))
    assert look.map.note.endswith("hidden.")


def test_too_few_rows_to_call_anything_a_sink():
    look = attention.to_image(sunk(extra_rows=False), 22, 0, hide_sinks=True)
    assert (look.sinks, look.sinks_known) == ((), False)
    assert "fewer than 3" in look.map.note and np.isfinite(look.map.values).all()


def test_a_first_position_that_is_a_patch_is_not_counted_twice():
    made = hand.attending()
    grid = ImageGrid(0, np.arange(0, 4), (2, 2), (40, 20))
    moved = hand.trace(grids=(grid,), attention=made.attention, attention_rows=made.attention_rows)
    look = attention.to_image(moved, 7, 0)
    assert look.first_share == 0
    assert look.image_share + look.text_share == pytest.approx(1)


def test_flow_by_hand():
    flow = attention.by_layer(hand.attending())  # rows 6 and 7 decide the answer
    assert (flow.layers, flow.rows) == ((0, 1), (6, 7))
    assert flow.image == pytest.approx([0.6, 0]) and flow.first == pytest.approx([0.35, 1])
    assert flow.text == pytest.approx([0.05, 0])
    assert flow.image_low == pytest.approx([0.4, 0]) and flow.image_high == pytest.approx([0.8, 0])
    assert attention.by_layer(hand.attending(), rows=(5,)).image == pytest.approx([0.6, 0])


def test_heads_and_readers_by_hand():
    assert attention.heads_to_image(hand.attending(), 6, 0) == pytest.approx([0.4, 0.8])
    found = attention.readers(hand.attending(), 0, (1, 0), head=1)
    assert found == [(5, "a", 0.0), (6, "b", pytest.approx(0.8)), (7, "X", 0.0)]


def test_difference_of_two_looks():
    a, b = (attention.to_image(hand.attending(), row, 0, head=1) for row in (5, 6))
    shown = attention.difference(a, b)
    assert shown.values == pytest.approx(np.array([[0, 0.8], [-0.8, 0]])) and shown.diverging
    assert shown.scale() == pytest.approx((-0.8, 0.8))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda t: attention.to_image(t, 4, 0), "row 4 was not recorded"),
        (lambda t: attention.to_image(t, 6, 5), "layer 5 was not recorded; recorded: 0, 1"),
        (lambda t: attention.to_image(t, 6, 0, head=2), "no head 2"),
        (lambda t: attention.to_image(t, 6, 0, image=1), "no image 1"),
        (lambda t: attention.readers(t, 0, (2, 0)), "no patch"),
        (lambda t: attention.query_row(t, 2), "no answer token 2"),
        (lambda t: attention.by_layer(hand.trace()), "no attention"),
    ],
)
def test_what_was_not_recorded_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(hand.attending())


def test_the_row_that_decides_a_token_is_the_one_before_it():
    assert [attention.query_row(hand.attending(), token) for token in (0, 1)] == [6, 7]


def test_wish_covers_the_answer_and_enough_text_to_tell_sinks(real):
    trace, engine, prompt, answer = real
    start = prompt.input_ids.shape[1]
    deciding = {start - 1 + i for i in range(len(answer.tokens))}
    assert deciding <= set(trace.attention_rows)
    before = set(trace.attention_rows) - deciding
    assert len(before | {start - 1}) >= attention.SINK_ROWS
    assert min(before) > max(grid.positions.max() for grid in prompt.grids)


def test_nothing_is_lost(real):
    """Shares sum to one, maps of all images to the image share, heads to their mean."""
    trace, engine, *_ = real
    for layer in range(engine.layout.n_layers):
        for row in trace.attention_rows:
            looks = [attention.to_image(trace, row, layer, image=i) for i in (0, 1)]
            one = looks[0]
            assert one.image_share + one.first_share + one.text_share == pytest.approx(1, abs=1e-5)
            assert sum(look.map.values.sum() for look in looks) == pytest.approx(one.image_share, abs=1e-6)
        heads = [attention.to_image(trace, row, layer, head=h).map.values for h in range(4)]
        assert np.mean(heads, axis=0) == pytest.approx(one.map.values, abs=1e-6)
        assert attention.heads_to_image(trace, row, layer).mean() == pytest.approx(one.image_share, abs=1e-6)


def test_flow_is_the_mean_of_its_looks(real):
    trace, engine, *_ = real
    flow = attention.by_layer(trace)
    for i, layer in enumerate(flow.layers):
        looks = [attention.to_image(trace, row, layer) for row in flow.rows]
        assert flow.image[i] == pytest.approx(np.mean([look.image_share for look in looks]), abs=1e-6)
        assert flow.sinks[i] == pytest.approx(np.mean([look.sink_share for look in looks]), abs=1e-6)
    assert flow.image + flow.first + flow.text == pytest.approx(np.ones(len(flow.layers)), abs=1e-5)
    assert (flow.image_low <= flow.image).all() and (flow.image <= flow.image_high).all()
