"""The mechanics of every variant on hand-sized tensors: which token lands where, and what equals what. Those that read
text: test_texts.py.

Run: pytest tests/model/lab/test_variants.py
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.lab import scenes, sight
from model.lab.run import SIZES
from model.lab.twin import LabTwin
from model.lab.variants import (
    HIGH,
    LAST,
    LAYERS,
    LOW,
    SETS,
    TAPS,
    TEXTS,
    VARIANTS,
    landing,
    layers_of,
    placed,
    sets_of,
    variant_of,
)
from model.training import packed, tower, twins
from model.training.tokenizer import make_tokenizer

WIDTH, SEEN = 32, 32  # of the decoder and of the tower's features
DEPTH = 5  # layers of the tower
MEASURES = {"centre", "whiten"}
REFERENCE = VARIANTS["stack-2d"]


@pytest.fixture(scope="module")
def features():
    """Of three scenes: 64 global tokens, 64 of the fitted view, 256 of the high-resolution view."""
    return torch.randn(3, 2 * LOW**2 + HIGH**2, SEEN, generator=torch.manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def rows(tokenizer):
    """A question of each scene."""
    questions = twins.Questions(tokenizer)
    return questions.pad(
        [questions.turn(f"what does the {c} text say?", "A7", (3, 4)) for c in ("red", "blue", "green")]
    )


@pytest.fixture(scope="module")
def pixels():
    """Of three pictures: the global view and four tiles."""
    return torch.randint(256, (3, 1 + SETS, 64, 64, 3), generator=torch.manual_seed(0)).float()


@pytest.fixture(scope="module")
def made(features, pixels, tokenizer):
    """A twin of a variant with the reference's weights wherever both have them, those of its kind if it has taps."""
    torch.manual_seed(0)
    reader = tower.Reader(tower.config(SEEN, DEPTH)).tower
    vision = tower.config(SEEN, DEPTH)

    def build(variant):
        read = pixels if variant.pixels else features
        return LabTwin(variant, vision, len(tokenizer), read, WIDTH, LAYERS, reader).eval()

    starts = {name: build(VARIANTS[name]) for name in ("stack-2d", "none-tuned", "taps-0")}

    def make(variant):
        twin = build(variant)
        if variant.merge != "concat":
            like = "taps-0" if variant.merge in TAPS else "none-tuned" if variant.pixels else "stack-2d"
            own = {"gates", "positions"} | {name for name in twin.state_dict() if name.startswith("mergers.")}
            # each block is whitened by its own measure
            start = {n: v for n, v in starts[like].state_dict().items() if like != "taps-0" or n not in MEASURES}
            left = twin.load_state_dict(start, strict=False)
            assert not left.unexpected_keys and set(left.missing_keys) <= own | MEASURES
        return twin

    return make


def at(row: int, column: int) -> int:
    """The number of a token of the high-resolution view."""
    return row * HIGH + column


# ---- sampling


@pytest.mark.parametrize("sampling", ["2d", "grid", "1d", "1d-sequential"])
def test_every_high_resolution_token_is_in_one_set(sampling):
    sets = sets_of(sampling)
    assert sets.shape == (SETS, LOW**2)
    assert sorted(sets.flatten().tolist()) == list(range(HIGH**2))


def test_which_token_lands_where():
    """Set 1 at row 10 (second row, third column of the 8 x 8) by hand, for each sampling."""
    taken = {sampling: int(sets_of(sampling)[1, 10]) for sampling in ("2d", "grid", "1d", "1d-sequential")}
    assert taken == {
        "2d": at(2 * 1 + 0, 2 * 2 + 1),  # the upper right of the four under the global token (1, 2)
        "grid": at(1, 8 + 2),  # token (1, 2) of the upper right tile
        "1d": 4 * 10 + 1,  # row 2, column 9
        "1d-sequential": 64 + 10,  # the second quarter of the view: row 4, column 10
    }


def test_dilated_samples_lie_on_the_global_tokens_and_others_do_not():
    below = landing(VARIANTS["none"], LAYERS)[0]
    for name in ("stack-2d", "stack-grid", "stack-1d", "stack-1d-sequential"):
        where = landing(VARIANTS[name], LAYERS)[0]
        assert torch.equal(where, below) == (name == "stack-2d")
        assert torch.equal(where.bincount(), torch.full((64,), 4))


def test_tokens_that_do_not_enter_are_looked_for_under_the_global_view():
    half = replace(VARIANTS["stack-grid"], count=2)  # the upper tiles
    where, below, count = landing(half, LAYERS)
    assert count == 64
    assert int(where[at(1, 10)]) == 10 and int(below[at(1, 10)]) == 5
    assert int(where[at(9, 10)]) == int(below[at(9, 10)]) == 4 * 8 + 5


# ---- where stacks enter


@pytest.mark.parametrize(
    "name, places",
    [
        ("stack-2d", {1: 0, 2: 1, 3: 2, 4: 3}),
        ("start-0", {0: 0, 1: 1, 2: 2, 3: 3}),
        ("start-4", {4: 0, 5: 1, 6: 2, 7: 3}),
        ("start-5", {5: 0, 6: 1, 7: 2}),
        ("start-6", {6: 0, 7: 1}),
        ("start-7", {7: 0}),
        ("start-last", {8: 0}),
        ("interval-2", {1: 0, 3: 1, 5: 2, 7: 3}),
        ("interval-3", {1: 0, 4: 1, 7: 2}),
        ("interval-4", {1: 0, 5: 1}),
        ("layers-2", {1: 0, 2: 1}),
        ("none", {}),
        ("concat", {}),
        ("deepstack-v-1", {}),
        ("taps-0", {}),
        ("taps-2", {1: 0, 2: 1}),
        ("taps-samples", {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 6}),
    ],
)
def test_stacks_enter_before_these_layers(name, places):
    assert layers_of(VARIANTS[name], LAYERS) == places


def test_each_stack_holds_the_projected_tokens_of_its_set(made, features):
    for name in ("stack-2d", "stack-grid", "stack-1d", "stack-1d-sequential", "interval-2"):
        twin = made(VARIANTS[name])
        base, stacks = twin.inject(features)
        low, high = twin.views(features)
        torch.testing.assert_close(base, twin.projector(low))
        for layer, k in layers_of(VARIANTS[name], LAYERS).items():
            wanted = torch.stack([twin.projector(high[:, int(token)]) for token in twin.sets[k]], 1)
            torch.testing.assert_close(stacks[layer], wanted)


# ---- what equals what


def test_an_unguided_variant_is_the_same_model_and_is_shown_nothing(made, features, rows):
    """The same answers from the same weights; no layer's attention is compared with where answers stand."""
    losses = {}
    for name in ("stack-2d", "stack-2d-unguided"):
        twin = made(VARIANTS[name])
        logits, result = twin(features, rows)
        words = torch.zeros(len(twins.WORDS), WIDTH)
        losses[name] = twins.answer_losses(twin, logits, result, rows, words)
        assert [*result.attention] == ([6, 7] if name == "stack-2d" else [])
    assert set(losses["stack-2d"]) - set(losses["stack-2d-unguided"]) == {"point"}
    torch.testing.assert_close(losses["stack-2d"]["answer"], losses["stack-2d-unguided"]["answer"])


def test_dummy_repeats_the_global_tokens(made, features):
    base, stacks = made(VARIANTS["dummy"]).inject(features)
    assert [*stacks] == [1, 2, 3, 4]
    assert all(torch.equal(rows, base) for rows in stacks.values())


@pytest.mark.parametrize("gate", ["gate", "gate-channel"])
def test_a_gate_of_zero_is_single_injection_and_of_one_the_reference(made, features, rows, gate):
    twin = made(VARIANTS[gate])
    with torch.no_grad():
        assert torch.equal(twin(features, rows)[0], made(REFERENCE)(features, rows)[0])
        twin.gates.zero_()
        assert torch.equal(twin(features, rows)[0], made(VARIANTS["none"])(features, rows)[0])


def test_the_gate_of_a_stack_scales_that_stack(made, features):
    twin = made(VARIANTS["gate"])
    with torch.no_grad():
        before = twin.inject(features)[1]
        twin.gates[2] = 0.5
        after = twin.inject(features)[1]
    assert {layer: torch.equal(after[layer], before[layer]) for layer in after} == {1: True, 2: True, 3: False, 4: True}
    torch.testing.assert_close(after[3], before[3] / 2)


def test_layer_positions_are_added_to_their_stack_and_row(made, features):
    twin = made(VARIANTS["layer-positions"])
    with torch.no_grad():
        before = twin.inject(features)[1]
        twin.positions[1, 5] = 1.0
        after = twin.inject(features)[1]
    changed = {layer: (after[layer] != before[layer]).any(-1).nonzero()[:, 1].unique().tolist() for layer in after}
    assert changed == {1: [], 2: [5], 3: [], 4: []}


def test_strings_hold_every_token_in_the_order_of_the_view(made, features):
    alone, stacks = made(VARIANTS["string"]).inject(features)
    both, _ = made(VARIANTS["global-string"]).inject(features)
    twin = made(REFERENCE)
    low, high = twin.views(features)
    assert alone.shape[1] == 256 and both.shape[1] == 64 + 256 and stacks == {}
    torch.testing.assert_close(alone, twin.projector(high))
    torch.testing.assert_close(both, torch.cat([twin.projector(low), alone], 1))
    where, things, count = landing(VARIANTS["global-string"], LAYERS)
    assert count == 320 and int(where[at(3, 4)]) == 64 + at(3, 4) and int(things[at(3, 4)]) == 8 + 2


def test_concat_merges_each_global_token_with_the_four_below_it(made, features):
    twin = made(VARIANTS["concat"])
    seen = []
    handle = twin.projector.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    twin.inject(features)
    handle.remove()
    low, high = twin.views(features)
    row = torch.cat([low[:, 10], *(high[:, at(2 + i, 4 + j)] for i in (0, 1) for j in (0, 1))], -1)
    assert seen[0].shape == (3, 64, 5 * SEEN)
    assert torch.equal(seen[0][:, 10], row)


def test_average_adds_the_mean_of_the_four_at_the_input(made, features):
    twin = made(VARIANTS["average"])
    base, stacks = twin.inject(features)
    alone, samples = made(REFERENCE).inject(features)
    assert stacks == {}
    torch.testing.assert_close(base, alone + sum(samples.values()) / 4)


def test_the_global_view_moved_deeper_leaves_zeros_at_the_input(made, features):
    base, stacks = made(VARIANTS["global-deeper"]).inject(features)
    assert not base.any() and [*stacks] == [4]
    assert torch.equal(stacks[4], made(VARIANTS["none"]).inject(features)[0])


def test_a_squeezed_view_has_grey_margins_and_keeps_its_width():
    """By hand: of 64 rows 48 hold the picture, 8 above and 8 below are grey. The upper half white and the lower black
    meet in the middle as before; columns in black and white keep their places."""
    halves = np.zeros((1, 64, 64, 3), np.uint8)
    halves[:, :32] = 255
    columns = np.zeros_like(halves)
    columns[:, :, ::2] = 255
    quarter = np.zeros_like(halves)
    quarter[:, :16] = 255  # of 64 rows: 12 of 48
    flat, thin, low = scenes.fitted(np.concatenate([halves, columns, quarter]))
    for view in (flat, thin, low):
        assert view.shape == (64, 64, 3) and (view[:8] == 128).all() and (view[56:] == 128).all()
    assert (flat[8:30] == 255).all() and (flat[34:56] == 0).all()
    assert (thin[8:56] == columns[0, :48]).all()
    assert (low[8:18] == 255).all() and (low[22:56] == 0).all()


def test_in_a_squeezed_view_things_are_looked_for_where_they_are():
    """A bright band over each row of high-resolution tokens, four pixels of the global view, and where it ends up."""
    _, below, _ = landing(VARIANTS["inconsistent-resize"], LAYERS)
    for row in range(16):
        view = np.zeros((1, 64, 64, 3), np.uint8)
        view[0, 4 * row : 4 * row + 4] = 255
        seen = scenes.fitted(view)[0, 8:56, :, 0].mean(1)  # between the margins
        assert below[16 * row] // 8 == (8 + seen @ np.arange(0.5, 48) / seen.sum()) // 8
    assert torch.equal(below.view(16, 16)[0], landing(VARIANTS["none"], LAYERS)[1].view(16, 16)[0] + 8)


def test_an_inconsistent_resize_changes_the_global_rows_only(made, features):
    base, stacks = made(VARIANTS["inconsistent-resize"]).inject(features)
    consistent, same = made(REFERENCE).inject(features)
    assert not torch.allclose(base, consistent)
    assert all(torch.equal(stacks[layer], same[layer]) for layer in same)


def test_before_the_last_layer_a_stack_changes_image_rows_only(made, features, rows):
    """start = last: text rows reach the last layer as without stacks; image rows do not."""
    with torch.no_grad():
        with_stack, alone = (
            made(variant)(features, rows) for variant in (replace(REFERENCE, start=LAYERS - 1), VARIANTS["none"])
        )
    assert torch.equal(with_stack[1].asking, alone[1].asking)
    assert not torch.allclose(with_stack[1].seen, alone[1].seen)
    assert not torch.allclose(with_stack[0], alone[0])  # the last layer's attention sees them


def test_after_the_last_layer_a_stack_changes_no_answer(made, features, rows):
    """start = L: after the last layer the image rows hold the first sample as well; bit for bit, no logit changes."""
    twin = made(VARIANTS["start-last"])
    assert twin.variant.start == LAST
    with torch.no_grad():
        (logits, late), (wanted, alone) = (each(features, rows) for each in (twin, made(VARIANTS["none"])))
        base, stacks = twin.inject(features)
        zero = {layer: torch.zeros_like(stack) for layer, stack in stacks.items()}
        without = twin.decoded(base, zero, rows, torch.float32)[1].last
    assert stacks[LAYERS].abs().mean() > 0.1 and without.shape == base.shape
    torch.testing.assert_close(late.last, without + stacks[LAYERS])
    assert torch.equal(late.seen, alone.seen) and torch.equal(logits, wanted)


# ---- budget


def test_a_budget_gives_all_stacks_to_the_rows_with_most_and_some_to_the_next(made, features):
    twin = made(VARIANTS["budget-50"])
    low, high = twin.views(features)
    strength = high[:, twin.sets].square().sum((1, 3))
    order = strength.argsort(1, descending=True)
    base, stacks = twin.inject(features)
    full = made(REFERENCE).inject(features)[1]
    for layer, k in twin.places.items():
        for scene in range(3):
            kept = order[scene, : 16 if k >= 2 else 32]
            assert torch.equal(stacks[layer][scene, kept], full[layer][scene, kept])
            assert stacks[layer][scene].any(-1).sum() == len(kept)


def test_a_random_budget_keeps_as_many_rows(made, features):
    twin = made(VARIANTS["budget-50-random"])
    counts = [int(rows.any(-1).sum()) for rows in twin.inject(features)[1].values()]
    assert counts == [3 * 32, 3 * 32, 3 * 16, 3 * 16]
    few = made(VARIANTS["budget-25-random"])
    assert [int(rows.any(-1).sum()) for rows in few.inject(features)[1].values()] == [3 * 16, 3 * 16, 3 * 8, 3 * 8]


def test_the_question_ranks_by_the_first_layers_own_attention(made, features, rows):
    """Word by word and head by head, against transformers' projections; what comes after the question has no part."""
    twin = made(VARIANTS["budget-50-question"])
    llama = twin.model.model.language_model
    base = twin.inject(features)[0]
    found = twin.attended(base, rows)
    layer, width = llama.layers[0], llama.config.head_dim
    with torch.no_grad():
        for scene in range(3):
            count = rows.ids[scene].tolist().index(twin_answer(rows, scene))
            total = torch.zeros(LOW**2)
            for word in rows.ids[scene, :count]:
                query = layer.self_attn.q_proj(layer.input_layernorm(llama.embed_tokens(word)))
                for head in range(llama.config.num_attention_heads):
                    part = slice(head * width, (head + 1) * width)
                    keys = layer.self_attn.k_proj(layer.input_layernorm(base[scene]))[:, part]
                    total += torch.softmax(keys @ query[part] / width**0.5, 0)
            torch.testing.assert_close(found[scene], total / count / llama.config.num_attention_heads)
    other = replace(rows, ids=rows.ids.where(rows.targets.roll(1, 1) == -100, 7))  # another answer
    assert not torch.equal(other.ids, rows.ids) and torch.equal(twin.attended(base, other), found)


def twin_answer(rows, scene) -> int:
    """The token that opens the answer: the first that is scored at."""
    return int(rows.ids[scene, int((rows.targets[scene] != -100).nonzero()[0])])


def test_each_question_keeps_its_own_rows_and_is_answered_as_if_alone(made, features, tokenizer):
    """Two questions of each scene in one pass are each what they are by themselves, in logits and in what is kept."""
    twin = made(VARIANTS["budget-50-question"])
    questions = twins.Questions(tokenizer)
    asked = [[f"what does the {c} text say?", f"read the {c} text at the top"] for c in ("red", "blue", "green")]
    with torch.no_grad():
        both = questions.pad([questions.turn(text, "A7", (3, 4)) for scene in asked for text in scene])
        logits, result = twin(features, both)
        base, stacks = twin.inject(features, both)
        assert base.shape[0] == 3 and result.seen.shape == (3, LOW**2, WIDTH)
        full = made(REFERENCE).inject(features)[1]
        for number in range(2):
            one = questions.pad([questions.turn(scene[number], "A7", (3, 4)) for scene in asked])
            alone, single = twin(features, one)
            torch.testing.assert_close(logits.view(3, 2, 3, -1)[:, number].flatten(0, 1), alone, atol=2e-5, rtol=0)
            order = twin.attended(base, one).argsort(1, descending=True)
            for layer, k in twin.places.items():
                for scene in range(3):
                    rows, kept = stacks[layer][2 * scene + number], order[scene, : 16 if k >= 2 else 32]
                    assert torch.equal(rows[kept], full[layer][scene, kept])
                    assert rows.any(-1).sum() == len(kept)
            if number == 0:
                torch.testing.assert_close(result.seen, single.seen, atol=2e-5, rtol=0)
    kept = stacks[1].any(-1).view(3, 2, -1)
    assert (kept[:, 0] != kept[:, 1]).any(), "the words of a question change nothing"


def test_while_nothing_is_asked_the_question_budget_is_drawn_by_chance(made, features):
    twin = made(VARIANTS["budget-25-question"])
    counts = [int(rows.any(-1).sum()) for rows in twin.inject(features)[1].values()]
    assert counts == [3 * 16, 3 * 16, 3 * 8, 3 * 8]
    assert twin(features, None)[1].seen.shape == (3, LOW**2, WIDTH)


# ---- the tower


def entering(twin, pixels):
    """What enters each tower layer for the global view `[3, 65, width]`."""
    seen, handles = [], []
    for layer in twin.model.model.vision_tower.encoder.layers:
        handles.append(layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0])))
    with torch.no_grad():
        twin.see(pixels)
    for handle in handles:
        handle.remove()
    return seen[-DEPTH:]


@pytest.mark.parametrize("start", range(DEPTH))
def test_stacks_enter_the_tower_as_in_deepstack_vs_code(made, pixels, start):
    """The global view and its tiles run as one batch, as the released code does: up to the start layer together, then
    the four dilated samples are added to the global view's patches before layers start, start + 1 ... ."""
    twin = made(VARIANTS[f"deepstack-v-{start}"])
    own = twin.model.model.vision_tower
    with torch.no_grad():
        hidden = own.pre_layrnorm(own.embeddings(tower.normalised(pixels.flatten(0, 1))))
        for layer in own.encoder.layers[:start]:
            hidden = layer(hidden, None)
        views = hidden.unflatten(0, (3, 1 + SETS))
        low, tiles = views[:, 0], views[:, 1:, 1:].unflatten(1, (2, 2)).unflatten(3, (8, 8))
        mosaic = tiles.transpose(2, 3).reshape(3, HIGH, HIGH, SEEN)
        for number in range(start, DEPTH):
            if number - start < SETS:
                i, j = divmod(number - start, 2)
                low[:, 1:] += mosaic[:, i::2, j::2].flatten(1, 2)
            torch.testing.assert_close(entering(twin, pixels)[number], low, atol=1e-4, rtol=1e-4)
            low = own.encoder.layers[number](low, None)
        torch.testing.assert_close(twin.see(pixels), low[:, 1:], atol=1e-4, rtol=1e-4)


def test_a_patch_of_the_high_resolution_view_lands_on_the_global_patch_over_it(made, pixels):
    """Row 3, column 10: in the upper right tile, of set 2 (lower left of its four), over the global patch (1, 5)."""
    twin = made(VARIANTS["deepstack-v-0"])
    other = pixels.clone()
    other[:, 2, 8 * 3 : 8 * 4, 8 * 2 : 8 * 3] = 0
    before, after = entering(twin, pixels), entering(twin, other)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    changed = (before[2] != after[2]).any(-1)
    assert changed.nonzero()[:, 1].unique().tolist() == [1 + 8 * 1 + 5]
    where, _, count = landing(VARIANTS["deepstack-v-0"], LAYERS)
    assert count == 64 and int(where[at(3, 10)]) == 8 * 1 + 5


def test_stacks_of_zeros_and_stacks_after_the_towers_end_are_its_control(made, pixels, rows):
    alone = made(VARIANTS["none-tuned"])
    late = made(replace(VARIANTS["deepstack-v-0"], tower_start=DEPTH))
    views = tower.normalised(pixels[:, 0])
    own = alone.model.model.vision_tower
    with torch.no_grad():
        assert torch.equal(late(pixels, rows)[0], alone(pixels, rows)[0])
        zeros = {layer: torch.zeros(3, LOW**2, SEEN) for layer in range(DEPTH)}
        assert torch.equal(sight.states(own, views, zeros)[-1], sight.states(own, views)[-1])
        early = made(VARIANTS["deepstack-v-4"])
        assert not torch.allclose(early(pixels, rows)[0], alone(pixels, rows)[0])


def test_the_towers_states_are_transformers_own(made, pixels):
    own = made(VARIANTS["none-tuned"]).model.model.vision_tower
    views = tower.normalised(pixels[:, 0])
    with torch.no_grad():
        wanted = own(views, output_hidden_states=True).hidden_states
        found = sight.states(own, views)
    assert len(found) == len(wanted) == DEPTH + 1
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(
    "name, blocks",
    [
        ("taps-0", (-1,)),
        ("taps-1", (-1, 1)),
        ("taps-3", (-1, 1, 2, 3)),
        ("taps-3-last", (-1, -1, -1, -1)),
        ("taps-samples", (-1, 3, 2, 1, -1, -1, -1, -1)),
    ],
)
def test_each_row_holds_the_four_tokens_under_it_of_its_block(made, pixels, name, blocks):
    """By hand: row (1, 2) of each stack is its own projector's of tokens (2, 4), (2, 5), (3, 4), (3, 5) of its block,
    or of one of them where it is a sample."""
    variant = VARIANTS[name]
    assert variant.blocks == blocks
    twin = made(variant)
    own = twin.model.model.vision_tower
    with torch.no_grad():
        after = own(tower.normalised(pixels[0, 1:]), output_hidden_states=True).hidden_states[1:]
        base, stacks = twin.inject(twin.see(pixels))
        order = [*dict.fromkeys(blocks)]
        for number, block in enumerate(blocks):
            tokens = after[block][0, 1:].unflatten(0, (8, 8))[2:4, 4:6].flatten(0, 1)  # all in the upper left tile
            n = order.index(block)
            white = (tokens - twin.centre[n]) @ twin.whiten[n]
            if number == 0:
                torch.testing.assert_close(base[0, 10], twin.projector(white.flatten()), atol=1e-4, rtol=1e-4)
            else:
                sample = number - 1 - variant.taps
                read = white.flatten() if sample < 0 else white[sample]
                wanted = twin.mergers[number - 1](read)
                torch.testing.assert_close(stacks[number][0, 10], wanted, atol=1e-4, rtol=1e-4)
    assert [*stacks] == [*range(1, len(blocks))] and base.shape[1] == LOW**2
    where, below, count = landing(variant, LAYERS)
    assert count == LOW**2 and torch.equal(where, below) and where[[at(2, 4), at(3, 5)]].tolist() == [10, 10]


@pytest.mark.parametrize("name", ["taps-3", "taps-3-last", "taps-samples"])
def test_mergers_of_zeros_leave_the_input_alone(made, pixels, rows, name):
    twin = made(VARIANTS[name])
    with torch.no_grad():
        before = twin(pixels, rows)[0]
        for merger in twin.mergers:
            merger.linear_2.weight.zero_()
            merger.linear_2.bias.zero_()
        alone = made(VARIANTS["taps-0"])(pixels, rows)[0]
        torch.testing.assert_close(twin(pixels, rows)[0], alone, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(before, alone, atol=1e-2)


def test_what_was_seen_goes_on_as_the_pixels_do(made, pixels, rows):
    for name in ("deepstack-v-1", "taps-1"):
        twin = made(VARIANTS[name])
        with torch.no_grad():
            assert torch.equal(twin(twin.see(pixels), rows)[0], twin(pixels, rows)[0])


# ---- training


TRAINED = ["stack-2d", "global-string", "gate-channel", "layer-positions", "budget-25", "budget-50-question"]
TRAINED += ["none-tuned", "deepstack-v-2", "taps-3", "taps-samples"]


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_reach_everything_and_the_tower_where_it_is_tuned(made, features, pixels, rows, name):
    variant = VARIANTS[name]
    twin = made(variant)
    logits, result = twin(pixels if variant.pixels else features, rows)
    (logits.square().mean() + result.seen.square().mean()).backward()
    for label, parameter in twin.named_parameters():
        if not label.startswith("heads.") and "post_layernorm" not in label:  # of the pooled token, which none reads
            reached = "vision_tower" not in label or label.endswith((".up", ".down"))  # of the tower its changes alone
            assert (parameter.grad is not None) == reached, label
    twin.zero_grad()


# ---- the registry


def test_variants_differ_in_their_config_alone():
    configs = [tuple(sorted(variant.config().items())) for variant in VARIANTS.values()]
    assert len(set(configs)) == len(configs)
    assert all(name == variant.name and name == name.lower() for name, variant in VARIANTS.items())


def test_words_say_which_stacks_find_no_layer():
    """Of every variant of the registry and of placements, in a decoder and a tower as deep as every size's."""
    assert {size.layers for size in SIZES.values()} == {LAYERS}
    ordinals = ("second", "third", "fourth")
    for variant in VARIANTS.values():
        enter, deep = layers_of(variant, LAYERS), variant.merge == "stack" and variant.start != LAST
        left = variant.count - len(enter) if deep else 0  # start-last says itself what it adds
        if variant.tower_start is not None:
            left = max(0, variant.tower_start + SETS - DEPTH)
        assert ("left out" in variant.words) == (left > 0), variant.name
        first = next((word for word in ordinals if f"the {word}" in variant.words), None)
        assert not left or first == ordinals[SETS - left - 1], variant.name
    words = "3 stacks from layer 2 on, every 2 layers; 1 of the 4 would come after the last layer and is left out"
    assert variant_of("start-2-interval-2-count-4").words == words
    assert variant_of("start-2-interval-2-count-3").words == "3 stacks from layer 2 on, every 2 layers"
    assert variant_of("start-7-interval-1-count-1").words == "one stack from layer 7 on"
    assert placed(5, 1, 4) is VARIANTS["start-5"] and placed(LAYERS, 1, 4) is None


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.merge not in TEXTS])
def test_every_variant_passes_with_as_many_rows_as_it_says(made, features, pixels, rows, name):
    twin = made(VARIANTS[name])
    with torch.no_grad():
        logits, result = twin(pixels if VARIANTS[name].pixels else features, rows)
        assert logits.isfinite().all() and isinstance(result, packed.Pass)
        assert result.seen.shape[1] == landing(VARIANTS[name], LAYERS)[2]
