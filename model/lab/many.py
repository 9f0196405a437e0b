"""Many runs through Ray: on this machine, or on a cluster's. Knows nothing about what a run does.

Ray starts each run in a process of its own, one CPU or one GPU each, and starts one that died again, which goes on from
its checkpoint where the work folder is still there. Ray's dashboard and its usage statistics are off.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from model.errors import UserError

REACHED = 10.0  # seconds for the first word with a cluster
RETRIES = 3  # of a run whose process dies
SAID_EVERY = 2.0  # seconds between what a run says of itself
ROOT = Path(__file__).resolve().parents[2]
# what a machine of a cluster is not sent: what it makes itself, and what no run reads
LEFT_OUT = [".git", "runs", "work", "tests", ".venv", "venv", "**/__pycache__", "assets/examples"]


class Died(Exception):
    """What came of a run whose process died again and again."""


class Board:
    """Where runs say how far they are, and from where they began; an actor of Ray's."""

    def __init__(self):
        self.shares: dict[int, tuple[float, str]] = {}
        self.first: dict[int, float] = {}

    def say(self, number: int, share: float, words: str) -> None:
        self.first.setdefault(number, share)
        self.shares[number] = (share, words)

    def all(self) -> tuple[dict[int, tuple[float, str]], dict[int, float]]:
        """By run what it said last (share, words), and the share that it said first."""
        return self.shares, self.first


def through_ray(
    work: Callable[..., Any],
    arguments: Sequence[tuple],
    address: str | None = None,
    gpu: bool = False,
    progress: Callable[[float, str], None] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Call `work(*arguments[i], progress=…)` for every i, side by side, and give (i, what it returned) as they end.

    address: of a Ray cluster; None starts Ray here. gpu: each run is given a GPU rather than a CPU. A mistake of the
    user's in a run is raised here as it is; any other ends the rest too. A run whose process died too often gives Died.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to anybody; read when ray is imported
    os.environ.setdefault("RAY_worker_niceness", "0")  # else 15: on a machine with other work a run hardly moves
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        options |= {"address": address, "runtime_env": {"working_dir": str(ROOT), "excludes": LEFT_OUT}}
    else:
        options |= {"include_dashboard": False, "object_store_memory": 100 * 2**20}
        options |= {"runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}}}
    try:
        if address:
            _reach(address)
        ray.init(**options)
    except Exception as error:  # Ray's own word for a start that took too long is a bare Exception
        words = " ".join(str(error).split())[:200]
        raise UserError(f"Ray does not start{f' at {address}' if address else ''}: {words}") from error
    try:
        yield from _collect(ray, work, arguments, gpu, progress)
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """OSError where nothing listens at host:port; Ray itself would try for five minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():  # else it is one of Ray's own words, as auto
        socket.create_connection((host, int(port)), REACHED).close()


def _collect(ray, work, arguments, gpu: bool, progress) -> Iterator[tuple[int, Any]]:
    board = ray.remote(num_cpus=0)(Board).remote()
    needs = {"num_gpus": 1} if gpu else {"num_cpus": 1}
    one = ray.remote(max_retries=RETRIES, **needs)(_one)
    waiting = {one.remote(work, given, board, i): i for i, given in enumerate(arguments)}
    done, started = set(), time.monotonic()
    while waiting:
        ended, _ = ray.wait([*waiting], timeout=SAID_EVERY)
        for reference in ended:
            number = waiting.pop(reference)
            try:
                found = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, UserError) else error from None
            except ray.exceptions.RayError as error:
                found = Died(" ".join(str(error).split())[:200])
            done.add(number)
            yield number, found
        if progress and waiting:
            said, first = ray.get(board.all.remote())
            shares = [1.0 if i in done else said.get(i, (0.0,))[0] for i in range(len(arguments))]
            # one that never said anything had nothing left to do, or has not begun
            left = time_left(
                shares, [first.get(i, share) for i, share in enumerate(shares)], time.monotonic() - started
            )
            progress(sum(shares) / len(shares), _words(shares, left, said, done))


def time_left(shares: Sequence[float], first: Sequence[float], passed: float) -> float | None:
    """How long runs take yet that have come from the shares `first`, where a checkpoint or an earlier rung of a search
    had left them, to `shares` in the time `passed`; None before any has moved."""
    gained = sum(shares) - sum(first)
    return passed * (len(shares) - sum(shares)) / gained if gained > 0 else None


def _words(shares, left: float | None, said, done) -> str:
    """How many runs are done, how long it will take yet in seconds, and what those under way say."""
    left = "" if left is None else f", {left / 60:.0f} min left"
    now = "; ".join(words for number, (_, words) in sorted(said.items()) if number not in done)
    return f"{len(done)} of {len(shares)} runs{left}; {now}"


def _one(work, given: tuple, board, number: int):
    """In a process of Ray's: one call that tells the board now and then how far it is."""
    last = 0.0

    def progress(share: float, words: str) -> None:
        nonlocal last
        if time.monotonic() - last > SAID_EVERY:
            last = time.monotonic()
            board.say.remote(number, share, words)

    return work(*given, progress=progress)
