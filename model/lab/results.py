"""The file of the lab's results: one JSON object per finished run, a line each.

Every number that is shown of the lab comes from this file. Knows nothing about what a run is or does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from model.errors import UserError

RESULTS = Path(__file__).resolve().parents[2] / "assets" / "lab" / "results.jsonl"
SEARCHES = RESULTS.with_name("search.jsonl")  # of finished searches, written and read in the same way
AGAIN = "Take the line out, or run it again."


def lines(path: Path = RESULTS) -> Iterator[tuple[int, dict]]:
    """(line number from 1, record) of each run in a file of results, none where there is no file. UserError with file
    and number for a line that is no JSON object, and for a file that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{short(path)} cannot be read: {error}.") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{short(path)}, line {number}, is no finished run: it is no JSON. {AGAIN}") from error
        if not isinstance(record, dict):
            raise UserError(f"{short(path)}, line {number}, is no finished run: it is no JSON object. {AGAIN}")
        yield number, record


def packed(right: Sequence[bool]) -> str:
    """Which questions were answered right, as a line holds it: hexadecimal, four questions a digit, the first one the
    highest bit of the first digit."""
    return np.packbits(np.array(right, bool)).tobytes().hex()


def unpacked(text: str, n: int) -> np.ndarray:
    """What `packed` made of n questions (bool `[n]`). ValueError for a text of another length, or no such text."""
    right = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)).astype(bool)
    if len(right) != -(-n // 8) * 8:
        raise ValueError(f"it tells of {len(right)} questions, not of {n}")
    return right[:n]


def key_of(record: dict) -> str:
    """The same for two records of runs that are to give the same."""
    return json.dumps(
        [record.get(word) for word in ("variant", "seed", "steps", "device", "precision", "config")], sort_keys=True
    )


def write(record: dict, path: Path = RESULTS) -> None:
    """Add a record to the file, in place of the one of the same run if there is one. Several processes may do this at
    once: each waits for a lock beside the file, and whoever reads finds a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        kept = [earlier for _, earlier in lines(path) if key_of(earlier) != key_of(record)]
        new = path.with_suffix(".new")
        new.write_text("".join(json.dumps(line) + "\n" for line in [*kept, record]), encoding="utf-8")
        new.replace(path)


def short(path: Path) -> str:
    """A path as people know it: from the folder assets on, else the whole."""
    parts = path.parts
    return "/".join(parts[parts.index("assets") :]) if "assets" in parts else str(path)
