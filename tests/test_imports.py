"""Imports run one way, app -> analysis -> model, and every imported library is one that requirements.txt pins."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("app", "analysis", "model")
FORBIDDEN = {
    "model": {"app", "analysis", "gradio", "plotly"},
    "analysis": {"app", "gradio"},
    "app": set(),
}
DISTRIBUTION = {"PIL": "pillow", "google": "protobuf"}  # where the import has another name than the distribution
COME_WITH = {"huggingface_hub": "transformers"}  # a library's own base, used through it and bound to its version
SOURCES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of every module the file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert imported(path) & FORBIDDEN[package] == set()
    assert "tests" not in imported(path)


def test_every_imported_library_is_pinned() -> None:
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pinned = set(re.findall(r"^([a-z0-9-]+)==", text, re.MULTILINE))
    libraries = set().union(*map(imported, SOURCES)) - set(sys.stdlib_module_names) - {*OURS, "assets"}
    assert {COME_WITH.get(name, DISTRIBUTION.get(name, name)) for name in libraries} <= pinned


def test_analysis_never_loads_a_model() -> None:
    for path in (ROOT / "analysis").rglob("*.py"):
        assert "model.loading" not in path.read_text(encoding="utf-8"), path
