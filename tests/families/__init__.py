"""One entry per model family: how a tiny checkpoint of it is written, and how transformers alone runs it.

To add a family, add a module here with `ENTRIES = {"its kind": Entry(...)}`; tests/model/families/test_every_family.py
then holds it to the truths that all families share. An entry never uses the code under test.
"""

from __future__ import annotations

import atexit
import importlib
import pkgutil
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model import loading
from model.engine import Engine


def _forward(plain: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """[T, V] of transformers' own forward."""
    return plain(**inputs).logits[0]


@dataclass(frozen=True)
class Entry:
    """One family for the shared tests."""

    family: str  # its name in the registry
    write: Callable[..., object]  # writes a folder in the released format at a path, tiny and random
    model_class: type[PreTrainedModel]  # of transformers
    inputs: Callable[[Path, list[dict]], dict[str, Tensor]]  # a conversation as the released processor gives it
    default: str  # the default plan
    pad_token: str  # of the tokenizer, for a left-padded batch
    files: tuple[str, ...] = ("config.json", "tokenizer.json", "preprocessor_config.json")  # of a released folder
    # Switches the stacks of a plain model off by the family's own means, and the plan that is; None without stacks.
    off: Callable[[PreTrainedModel], None] | None = None
    off_plan: str = "base@0"
    own_plan: str = ""  # what transformers' own forward runs, where that is not the default plan
    # The tower of several images run one by one, as the engine does: run jointly its last bits differ.
    forward: Callable[[PreTrainedModel, dict[str, Tensor]], Tensor] = _forward
    rounding: float = 1.0  # how much more than the others its tiny model magnifies the last bits
    decoder: Callable[[PreTrainedModel], nn.Module] = lambda plain: plain.model.language_model

    @property
    def plan(self) -> str:
        """The plan that transformers' own forward runs."""
        return self.own_plan or self.default


def _entries() -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for module in pkgutil.iter_modules(__path__):
        for kind, entry in importlib.import_module(f"{__name__}.{module.name}").ENTRIES.items():
            assert kind not in found, f"the kind {kind} has two entries"
            found[kind] = entry
    return found


ENTRIES: dict[str, Entry] = _entries()


@cache
def folder(kind: str) -> Path:
    """One folder per kind and test process, written on first use."""
    path = Path(tempfile.mkdtemp(prefix=f"tiny-{kind}-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    ENTRIES[kind].write(path)
    return path


@cache
def engine(kind: str) -> Engine:
    """A cached engine, through the path that a user's folder takes."""
    return loading.load(str(folder(kind)), device="cpu", dtype="float32")


def plain(kind: str, **options: object) -> PreTrainedModel:
    """The same folder in plain transformers, new at each call, never touched by us."""
    return ENTRIES[kind].model_class.from_pretrained(folder(kind), dtype=torch.float32, **options).eval()
