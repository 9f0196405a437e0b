"""Projections by an independent generator; what was added is explained, on arrays as awkward as real ones.

Faults of whole runs are in tests/app/test_golden.py. Run: pytest tests/analysis/test_golden.py
"""

import numpy as np
import pytest

from analysis.golden import Part, explain, signs

N, P = 300, 16
BF16 = 2.0**-7
NONE: dict = {}


def splitmix64(seed):
    """Steele, Lea and Flood's generator, one number after the other, in whole numbers."""
    state = seed
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


def test_signs_are_the_top_bits_of_splitmix64():
    numbers = splitmix64(0)
    assert [next(numbers) for _ in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    for seed in (0, 7, 2**64 - 1):
        numbers = splitmix64(seed)
        want = [[-1.0 if next(numbers) >> 63 else 1.0 for _ in range(5)] for _ in range(3)]
        assert signs(seed, 3, 5).tolist() == want


def test_projections_keep_the_size_of_rows_and_tell_them_apart():
    rows = np.random.default_rng(0).normal(size=(50, 256)).astype(np.float32)
    seen = rows @ signs(0, P, 256).T / 16
    assert np.sqrt(np.square(seen).mean()) == pytest.approx(1.0, rel=0.1)
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    assert apart[~np.eye(50, dtype=bool)].min() > 1.0


@pytest.fixture
def draw():
    return np.random.default_rng(5)


@pytest.fixture
def stacks(draw):
    """Three stacks as real ones are: rows share most of their direction, neighbours in depth resemble one another."""
    common = 3 * draw.normal(size=(1, P))
    first = common + np.cumsum(draw.normal(size=(N, P)), axis=0) / 8 + draw.normal(size=(N, P)) / 4
    second = 0.8 * first + 0.5 * draw.normal(size=(N, P))
    return {"0": first, "1": second, "2": 0.8 * second + 0.5 * draw.normal(size=(N, P))}


@pytest.fixture
def blurred(draw):
    """Rounds as bfloat16 does: (what is added as two recorded rows give it, how far rounding can move it).

    The tower's own drift is one per cent; a tenth of the rows carry activations fifty times as large as the others.
    """

    def blur(rows):
        stream = 10 * draw.normal(size=(N, P)) * np.where(np.arange(N) % 10 == 3, 50, 1)[:, None]
        drift = rows * (1 + 0.01 * draw.normal(size=rows.shape))
        error = 2.0**-8 * stream * draw.uniform(-1, 1, size=(N, P))
        return drift + error, BF16 * np.linalg.norm(stream + rows, axis=1)

    return blur


def seen(blurred, rows, stacks, expected, variants=NONE, tolerance=5e-2):
    return explain(*blurred(rows), stacks, expected, variants, tolerance)


def test_the_right_stack_is_seen_through_rounding(blurred, stacks):
    parts, left = seen(blurred, stacks["1"], stacks, {"1": 1.0})
    assert parts == (Part("1"),) and left < 0.1


def test_nothing_is_seen_as_nothing(blurred, stacks):
    assert seen(blurred, np.zeros((N, P)), stacks, {}) == ((), 0.0)
    parts, left = seen(blurred, np.zeros((N, P)), stacks, {"1": 1.0})
    assert parts == () and left < 0.1


def test_another_stack_that_resembles_the_expected_one(blurred, stacks):
    parts, _ = seen(blurred, stacks["2"], stacks, {"1": 1.0})
    assert [part.source for part in parts] == ["2"] and parts[0].gain == pytest.approx(1, abs=0.05)


def test_the_neighbouring_block_that_differs_little(draw, blurred, stacks):
    early = stacks["1"] + 0.3 * draw.normal(size=(N, P))
    parts, _ = seen(blurred, early, stacks, {"1": 1.0}, {("1", 4): early, ("1", 6): stacks["1"] - 0.4})
    assert [(part.source, part.block) for part in parts] == [("1", 4)]


def test_two_stacks_at_once(blurred, stacks):
    parts, _ = seen(blurred, stacks["0"] + stacks["2"], stacks, {"0": 1.0})
    assert [part.source for part in parts] == ["0", "2"] and all(abs(part.gain - 1) < 0.05 for part in parts)


@pytest.mark.parametrize("n, by", [(120, 1), (37, -2), (0, 1), (200, 40)])
def test_rows_shifted_among_rows_that_resemble_one_another(blurred, stacks, n, by):
    moved = np.concatenate([stacks["0"][:n], np.roll(stacks["0"][n:], by, axis=0)])
    parts, _ = seen(blurred, moved, stacks, {"0": 1.0})
    assert len(parts) == 1 and (parts[0].source, parts[0].shift) == ("0", by)
    assert abs(parts[0].start - n) <= 3  # rows under fifty times larger ones are out of sight in bfloat16


def test_a_few_rows_at_the_end(stacks):
    rows = stacks["0"].copy()
    rows[-3:] = np.roll(rows[-3:], 1, axis=0)
    parts, _ = explain(rows, np.full(N, 1e-6), stacks, {"0": 1.0}, {}, 1e-3)
    assert parts[0].start == N - 3 and parts[0].shift == 1


def test_a_blank_sky_is_not_misaligned_yet(stacks):
    rows = stacks["0"].copy()
    rows[50:60] = rows[50]
    moved = np.concatenate([rows[:50], np.roll(rows[50:], 1, axis=0)])
    moved[50] = rows[50]
    parts, _ = explain(moved, np.full(N, 1e-6), {**stacks, "0": rows}, {"0": 1.0}, {}, 1e-3)
    assert parts[0].start == 60 and parts[0].shift == 1


def test_what_is_none_of_the_stacks_stays_unexplained(draw, blurred, stacks):
    _, left = seen(blurred, 3 * draw.normal(size=(N, P)), stacks, {"0": 1.0})
    assert left > 0.5
    _, left = seen(blurred, 3 * draw.normal(size=(N, P)), stacks, {})
    assert left > 0.5
