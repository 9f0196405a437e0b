"""The mechanics of every variant on hand-sized tensors: which token lands where, and what equals what.

Run: pytest tests/model/lab/test_variants.py
"""

from dataclasses import replace

import pytest
import torch

from model.lab.twin import LabTwin
from model.lab.variants import HIGH, LAST, LOW, SETS, VARIANTS, landing, layers_of, sets_of
from model.training import packed, tower, twins
from model.training.tokenizer import make_tokenizer

LAYERS, WIDTH, SEEN = 8, 32, 32  # layers and width of the decoder, width of the tower's features
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
def made(features, tokenizer):
    """A twin of a variant with the reference's weights wherever both have them."""
    vision = tower.config(SEEN, 1)
    torch.manual_seed(0)
    start = LabTwin(REFERENCE, vision, len(tokenizer), features, WIDTH, LAYERS).eval()

    def make(variant):
        twin = LabTwin(variant, vision, len(tokenizer), features, WIDTH, LAYERS).eval()
        if variant.merge != "concat":
            left = twin.load_state_dict(start.state_dict(), strict=False)
            assert not left.unexpected_keys and set(left.missing_keys) <= {"gates", "positions"}
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
        ("start-6", {6: 0, 7: 1}),
        ("start-last", {}),
        ("interval-2", {1: 0, 3: 1, 5: 2, 7: 3}),
        ("layers-2", {1: 0, 2: 1}),
        ("none", {}),
        ("concat", {}),
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
    twin = made(VARIANTS["start-last"])
    assert twin.variant.start == LAST
    with torch.no_grad():
        assert torch.equal(twin(features, rows)[0], made(VARIANTS["none"])(features, rows)[0])


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


# ---- training


@pytest.mark.parametrize("name", ["stack-2d", "global-string", "gate-channel", "layer-positions", "budget-25"])
def test_gradients_reach_everything_but_the_tower(made, features, rows, name):
    twin = made(VARIANTS[name])
    logits, result = twin(features, rows)
    (logits.square().mean() + result.seen.square().mean()).backward()
    tower_weights = {id(p) for p in twin.model.model.vision_tower.parameters()}
    for label, parameter in twin.named_parameters():
        if not label.startswith("heads."):
            assert (parameter.grad is None) == (id(parameter) in tower_weights), label
    twin.zero_grad()


# ---- the registry


def test_variants_differ_in_their_config_alone():
    configs = [tuple(sorted(variant.config().items())) for variant in VARIANTS.values()]
    assert len(set(configs)) == len(configs)
    assert all(name == variant.name and name == name.lower() for name, variant in VARIANTS.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_passes_with_as_many_rows_as_it_says(made, features, rows, name):
    twin = made(VARIANTS[name])
    with torch.no_grad():
        logits, result = twin(features, rows)
        assert logits.isfinite().all() and isinstance(result, packed.Pass)
        assert result.seen.shape[1] == landing(VARIANTS[name], LAYERS)[2]
