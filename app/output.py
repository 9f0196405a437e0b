"""What a command gives back, and how it reaches the terminal: a table, a line of log, one JSON object.

Results go to stdout, everything else to stderr. Knows nothing about models.
"""

from __future__ import annotations

import math
import sys
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import UserError

WIDEST = 72  # characters of one cell of a table; what is longer is in --json


@dataclass(frozen=True)
class Outcome:
    """What a command found: `data` is what --json prints, `text` what a person reads, `code` the exit status."""

    data: dict[str, Any]
    text: str = ""
    code: int = 0


def printable(text: str) -> str:
    """The text without control characters but tab and newline: a picture can make a model write terminal commands."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def write_files(folder: Path | str, files: Mapping[str, bytes]) -> list[Path]:
    """Write files by name into a folder, which is made, and so are folders in names; returns their paths.

    UserError where it cannot be written.
    """
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return [folder / name for name in files]


def log(text: str) -> None:
    """One line on stderr."""
    print(printable(" ".join(text.split())), file=sys.stderr, flush=True)


def plain(value: Any) -> Any:
    """The same value as JSON can hold it: arrays become lists, NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], widest: int = WIDEST) -> str:
    """Columns aligned by spaces, numbers to the right, the last one not padded. widest: characters of one cell."""
    cells = [[_cell(value, widest) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(headers), *cells]) for i in range(len(headers))]
    right = [
        bool(rows) and all(isinstance(row[i], int | float) or row[i] is None for row in rows)
        for i in range(len(headers))
    ]

    def line(values: Sequence[str]) -> str:
        padded = [v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, [headers, *cells]))


def _cell(value: object, widest: int) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    text = f"{value:.3g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= widest else text[: widest - 1] + "…"


class ProgressLine:
    """Progress as one line on stderr that is written over; where that is no terminal a line now and then, or none.

    Callable as model.loading.Progress (fraction, text) through `fraction`, and as (done, total) through `count`.
    """

    def __init__(self, what: str = "", every: float | None = None):
        """every: seconds between lines in a file or pipe; None is silent there."""
        self.what = what
        self._on = sys.stderr.isatty()
        self._every = 0.1 if self._on else every
        self._last = -math.inf

    def fraction(self, done: float, text: str) -> None:
        """done: 0..1."""
        self._draw(f"{done:4.0%}  {text}")

    def count(self, done: int, total: int) -> None:
        """done of total."""
        self._draw(f"{self.what} {done} of {total}", force=done == total)

    def clear(self) -> None:
        """Takes the line away."""
        if self._on:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _draw(self, text: str, force: bool = False) -> None:
        now = time.monotonic()
        if self._every is None or not (force or now - self._last > self._every):
            return
        self._last = now
        if self._on:
            print(f"\r\033[K{text[:100]}", end="", file=sys.stderr, flush=True)
        else:
            log(text)
