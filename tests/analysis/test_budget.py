"""A budget on hand-sized tensors: who is ranked first, and what is kept."""

import numpy as np

from analysis import budget
from model.lab.variants import VARIANTS
from tests.analysis import hand


def test_the_longest_rows_are_ranked_first_over_all_stacks():
    stacks = np.zeros((2, 3, 2))
    stacks[0, 0], stacks[1, 0], stacks[0, 2] = (3, 4), (0, 1), (5, 5)
    assert budget.by_norm(stacks).tolist() == [26, 0, 50]


def test_the_question_ranks_by_the_attention_of_its_rows():
    """Two heads: 0.4 of every row on patch 0; 0.8 of one row each on patches 1, 2, 3."""
    np.testing.assert_allclose(budget.by_question(hand.attending(), 0), [0.4 / 2, *[0.8 / 6] * 3])


def test_some_rows_keep_the_first_half_and_half_of_these_all():
    relevance = np.array([0.1, 0.9, 0.5, 0.8, 0.2, 0.7, 0.3, 0.4])
    assert budget.kept(relevance, 4, 0.5).tolist() == [0, 4, 2, 4, 0, 2, 0, 0]
    assert budget.kept(relevance, 9, 1.0).tolist() == [4, 9, 9, 9, 4, 9, 4, 4]
    assert budget.kept(np.ones(4), 4, 0.5).tolist() == [4, 2, 0, 0]  # ties: the first ones


def test_the_map_is_empty_where_nothing_is_kept():
    grid = hand.trace().grids[0]
    counts = np.arange(len(grid.positions))
    shown = budget.kept_map(counts, 4, grid)
    assert np.isnan(shown.values.flat[0]) and shown.values.flat[1] == 1 and shown.scale() == (0, 4)
    assert shown.values.shape == grid.grid and shown.unit == "of 4"
    assert shown.note == "A row without colour keeps none."


def test_the_share_that_enters_is_that_of_the_labs_variants_and_of_what_is_kept():
    names = [name for name, variant in VARIANTS.items() if variant.group == "budget"]
    for variant in (VARIANTS[name] for name in names):
        share = budget.entering(variant.keep_some)
        assert share == (variant.keep_all + variant.keep_some) / 2
        assert budget.kept(np.arange(64.0), 4, variant.keep_some).mean() / 4 == share
    assert len(names) >= 5
