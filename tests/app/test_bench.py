"""The bench: every figure is there and positive, and ratios are those of the seconds beside them.

Run: pytest tests/app/test_bench.py
"""

import pytest

from app import bench
from tests import tiny


@pytest.mark.parametrize("kind", ["hires", "concat"])
def test_seconds_and_ratios(kind, monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 2)
    seconds = bench.measure(tiny.engine(kind))
    assert all(value > 0 for value in seconds.values())
    found = bench.ratios(seconds)
    assert set(found) == set(bench.RATIOS)
    assert found["two_plans_over_one"] == seconds["two_plans"] / seconds["answer_cached"]
    without_plain = {name for name, value in found.items() if value is None}
    assert without_plain == ({"answer_over_plain", "traced_over_plain"} if kind == "concat" else set())


def test_ratios_by_hand():
    seconds = {"answer": 2.0, "answer_cached": 1.0, "answer_traced": 5.0, "two_plans": 1.5}
    found = bench.ratios({**seconds, "plain_generate": 4.0, "answer_same_plan": 3.0, "traced_same_plan": 6.0})
    assert found == {
        "answer_over_plain": 0.75,
        "traced_over_plain": 1.5,
        "traced_over_answer": 2.5,
        "two_plans_over_one": 1.5,
        "cached_over_not": 0.5,
    }
