"""Runs through Ray: one that is killed goes on from its checkpoint, all results arrive once, a user's mistake is said.

One Ray for all of it, because it takes seconds to start. Run: pytest tests/model/lab/test_many.py
"""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from model.errors import UserError
from model.lab import cost, many, scenes
from model.lab import run as lab
from model.training import twins
from tests.model.lab.lab_sizes import job, weights

STEPS = 8


def trained(folder: Path, progress=None) -> None:
    """A run of the lab with a checkpoint every two steps. The first time it tells that it has done its fifth, it is
    killed, as the system kills what takes too much memory; all steps are noted in a file."""
    steps, before = folder / "steps", (twins.SAVE_EVERY, cost.PREFILLS, cost.STEPS)

    def within(share: float, words: str) -> None:
        with open(steps, "a") as file:
            file.write(f"{round(share * STEPS)} ")
        if steps.read_text() == "1 2 3 4 5 ":
            os.kill(os.getpid(), signal.SIGKILL)
        progress(share, words)

    twins.SAVE_EVERY, cost.PREFILLS, cost.STEPS = 2, 1, 1
    try:
        lab.run(job("gate", STEPS), folder, progress and within)
    finally:
        twins.SAVE_EVERY, cost.PREFILLS, cost.STEPS = before


def work(folder: Path, number: int, progress) -> int:
    """In a process of Ray's. Number 1 is a run of the lab that is killed once; number 3, a mistake, waits until 1 has
    ended."""
    ended = folder / f"ended {number}"
    progress(0.5, f"number {number}")
    if number == 1:
        trained(folder, progress)
    if number == 3:
        for _ in range(600):
            if (folder / "ended 1").exists():
                break
            time.sleep(0.2)
        time.sleep(2 * many.SAID_EVERY)
        raise UserError("Not like this.")
    ended.write_text("")
    return number * 10


@pytest.mark.timeout(900)  # Ray starts, in a minute or more where the machine is busy
def test_a_run_that_is_killed_goes_on_from_its_checkpoint_and_a_mistake_is_said(tmp_path, workdir):
    """It ends with the weights of an unbroken run, and trains again the one step that was lost."""
    data = Path("lab") / f"data-{scenes.tower_mark()}"
    (tmp_path / "lab").mkdir()
    (tmp_path / data).symlink_to(workdir / data)
    found, said = [], []
    arguments = [(tmp_path, number) for number in (1, 2, 3)]
    with pytest.raises(UserError, match="^Not like this.$"):
        for place, result in many.through_ray(work, arguments, progress=lambda *words: said.append(words)):
            found.append((place, result))
    assert (tmp_path / "steps").read_text().split() == [*"12345", *"5678"]
    broken = weights(job("gate", STEPS), tmp_path)
    trained(workdir)
    unbroken = weights(job("gate", STEPS), workdir)
    assert broken["step"] == unbroken["step"] == STEPS
    assert all(torch.equal(broken["twin"][name], value) for name, value in unbroken["twin"].items())
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
