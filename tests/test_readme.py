"""README.md tells the truth: its commands exist, its tree is the repository's, its numbers are the cards'."""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from model.loading import LAB
from tests import readme
from tests.browser.harness import Server

TEXT = readme.README.read_text(encoding="utf-8")
MAKEFILE = (readme.ROOT / "Makefile").read_text(encoding="utf-8")
SHELL_LINES = [
    line.split("  #")[0].strip()
    for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
APP_LINES = [line for line in SHELL_LINES if line.startswith("python -m app")]


@functools.cache
def app_help(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "app", *words, "--help"], cwd=readme.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_starts_with_the_two_commands() -> None:
    assert [line.split() for line in SHELL_LINES[:2]] == [["make", "run"], ["make", "test"]]
    assert TEXT.index("make run") < TEXT.index("make test") < TEXT.index("\n## ")


def test_make_targets_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(SHELL_LINES + re.findall(r"`([^`\n]+)`", TEXT))))
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    assert {"run", "test"} <= named <= targets, named - targets


def test_every_make_target_is_phony_and_explained() -> None:
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    phony = set(" ".join(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)).split())
    assert targets == phony
    listed = subprocess.run(["make", "help"], cwd=readme.ROOT, capture_output=True, text=True, check=True).stdout
    assert all(re.search(rf"make {target} ", listed) for target in targets - {"chromium"})


@pytest.mark.parametrize("line", APP_LINES)
def test_commands_and_options_exist(line: str) -> None:
    words = shlex.split(line.replace("[", "").replace("]", ""), comments=True)[3:]
    command = [words[0]] if words and re.fullmatch(r"[a-z]+", words[0]) else []
    help_text = app_help(*command)
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", help_text), (
                f"{word} is not an option of {command}"
            )


def test_every_command_is_in_the_readme() -> None:
    commands = set(re.findall(r"^  ([a-z]+) ", app_help().split("commands")[-1], re.MULTILINE))
    shown = {shlex.split(line)[3] for line in APP_LINES if len(line.split()) > 3}
    assert commands and commands <= shown, commands - shown


def test_the_tree_is_the_repository() -> None:
    shown, wanted = set(readme.tree(TEXT)), readme.expected(readme.tracked())
    folders = {path for path in shown if path.endswith("/")}
    parents = {path[: match.end()] for path in wanted for match in re.finditer("/", path)}
    assert wanted - shown == set(), "files without a line in the README's tree"
    assert shown - wanted - (folders & parents) == set(), "lines of the README's tree without a file"


def test_every_line_of_the_tree_has_a_caption() -> None:
    assert [path for path, caption in readme.tree(TEXT).items() if not caption] == []


def test_the_tree_is_read_back(tmp_path: Path) -> None:
    text = "## Files\n\n```\nMakefile  what to type\napp/      people\n  tabs/  one each\n    chat.py  talk\n```\n"
    assert readme.tree(text) == {
        "Makefile": "what to type", "app/": "people", "app/tabs/": "one each", "app/tabs/chat.py": "talk"
    }  # fmt: skip
    files = ["Makefile", "app/__init__.py", "app/tabs/chat.py", "tests/app/test_cli.py", "tests/tiny.py", ".ci/run"]
    assert readme.expected(files) == {"Makefile", "app/tabs/chat.py", "tests/app/", "tests/tiny.py", ".ci/run"}


def test_the_results_are_the_cards() -> None:
    assert readme.section(TEXT) == readme.results_table(), "run `python -m tests.readme`"


def test_every_checkpoint_has_results() -> None:
    folders = {path.parent.name for path in (readme.ROOT / "assets" / "checkpoints").glob("*/config.json")}
    folders = {name for name in folders if not name.startswith(LAB)}  # their numbers are the lab's
    assert {"hires", "hires-single"} <= folders <= set(readme.ORDER)
    for name in folders:
        assert f"| `{name}` |" in readme.results_table(), f"assets/checkpoints/{name}/results.json is missing or empty"


def test_every_shipped_variant_is_of_a_run_in_the_results() -> None:
    assets = readme.ROOT / "assets"
    records = [json.loads(line) for line in (assets / "lab" / "results.jsonl").read_text().splitlines()]
    made = {path.parent.name: json.loads(path.read_text()) for path in assets.glob(f"checkpoints/{LAB}*/recipe.json")}
    assert {"lab-dummy", "lab-string", "lab-stack-grid"} <= set(made)
    for name, recipe in made.items():
        assert recipe in records and name == f"{LAB}{recipe['variant']}", f"ship {name} again"


def test_every_checkpoint_is_small() -> None:
    for path in (readme.ROOT / "assets" / "checkpoints").glob("*/model.safetensors"):
        most = 4_000_000 if path.parent.name.startswith("lab-") else 16_000_000
        assert sum(file.stat().st_size for file in path.parent.iterdir()) <= most, path.parent.name


def test_the_results_table_follows_the_files(tmp_path: Path) -> None:
    (tmp_path / "hires").mkdir()
    kinds = {
        "fine": {"n": 1000, "exact_match": 0.8125, "cer": 0.07},
        "coarse": {"n": 1000, "exact_match": 0.96, "cer": 0.02},
    }
    result = {"plan": "base@0", "state": "ablated", "n": 2000, "fonts": "train", "by_kind": kinds}
    (tmp_path / "hires" / "results.json").write_text(json.dumps({"results": [result]}))
    row = readme.results_table(tmp_path).splitlines()[-1]
    assert row == "| `hires` | `base@0` | ablated | 2000, train fonts | 81.2 % | 7.0 % | 96.0 % | 2.0 % |"


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if not re.match(r"https?://", target):
            assert (readme.ROOT / target).exists(), target


def test_make_run_answers() -> None:
    """The first of the two commands, as typed; the environment is the one that runs the tests."""
    with Server(command=["make", "run", f"VENV={sys.prefix}", "ARGS=--port {port}"]) as server:
        with urllib.request.urlopen(server.url, timeout=30) as reply:
            assert b"DeepStack Lens" in reply.read()
