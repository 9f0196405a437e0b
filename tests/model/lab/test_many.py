"""Runs through Ray: one that dies is begun again, all results arrive once, a user's mistake is said.

One Ray for all of it, because it takes seconds to start. Run: pytest tests/model/lab/test_many.py
"""

import os
import time
from pathlib import Path

import pytest

from model.errors import UserError
from model.lab import many


def work(folder: Path, number: int, progress) -> int:
    """In a process of Ray's. Number 1 dies the first time, as a lost machine would; number 3, a mistake,
    waits until 1 has ended."""
    begun, ended = folder / f"begun {number}", folder / f"ended {number}"
    if number == 1 and not begun.exists():
        begun.write_text("")
        os._exit(1)
    progress(0.5, f"number {number}")
    if number == 3:
        for _ in range(600):
            if (folder / "ended 1").exists():
                break
            time.sleep(0.2)
        time.sleep(2 * many.SAID_EVERY)
        raise UserError("Not like this.")
    ended.write_text("")
    return number * 10


def test_a_run_that_dies_is_begun_again_and_a_mistake_is_said(tmp_path):
    found, said = [], []
    arguments = [(tmp_path, number) for number in (1, 2, 3)]
    with pytest.raises(UserError, match="^Not like this.$"):
        for place, result in many.through_ray(work, arguments, progress=lambda *words: said.append(words)):
            found.append((place, result))
    assert (tmp_path / "begun 1").exists()
    assert sorted(found) == [(0, 10), (1, 20)]
    share, words = said[-1]
    assert 2 / 3 < share < 1 and words.startswith("2 of 3 runs, ") and words.endswith("min left; number 3")


def test_the_time_left_counts_what_was_trained_since_it_began():
    """Two of four runs went on from a half and have come to three quarters in a minute: a run's half takes two."""
    assert many.time_left((0.75, 0.75), (0.5, 0.5), 60) == 60
    assert many.time_left((0.75, 0.75, 0.0, 0.0), (0.5, 0.5, 0.0, 0.0), 60) == 60 * 2.5 / 0.5
    assert many.time_left((1.0, 0.25), (1.0, 0.0), 60) == 180  # the first had ended long ago
    assert many.time_left((0.5, 0.0), (0.5, 0.0), 60) is None
    board = many.Board()
    for share in (0.5, 0.6, 0.7):
        board.say(3, share, "a run")
    assert board.all() == ({3: (0.7, "a run")}, {3: 0.5})


def test_an_address_where_no_cluster_is_gets_one_sentence():
    with pytest.raises(UserError, match="Ray does not start at 127.0.0.1:9: "):
        list(many.through_ray(work, [], address="127.0.0.1:9"))
