"""Set-up: requirements are exact, the Makefile explains itself when it can not go on, .ci/run ends as the tests did."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def requirements(name: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_are_exact_sorted_and_installed(name: str) -> None:
    lines = [line for line in requirements(name) if line != "-r requirements.txt"]
    assert lines == sorted(lines, key=lambda line: line.split("==")[0])
    for line in lines:
        package, version = re.fullmatch(r"([a-z0-9-]+)==([0-9][\w.]*)", line).groups()
        assert metadata.version(package).partition("+")[0] == version, f"the environment is not {name}"


def test_the_versions_that_were_promised() -> None:
    pinned = dict(line.split("==") for line in requirements("requirements.txt"))
    assert pinned["torch"] == "2.13.0"
    assert pinned["transformers"].startswith("5.23.")
    assert pinned["gradio"].startswith("6.") and int(pinned["gradio"].split(".")[1]) >= 31
    assert "torchvision" not in pinned
    assert "-r requirements.txt" in requirements("requirements-dev.txt")


def test_pyproject_holds_settings_of_ruff_and_pytest_only() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(settings) == {"tool"} and set(settings["tool"]) == {"ruff", "pytest"}


def programs(folder: Path, *names: str) -> str:
    """A PATH with nothing but the named programs of this machine."""
    for name in names:
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


def script(path: Path, text: str) -> None:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def test_no_python_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    path = programs(tmp_path / "bin", "make", "sh", "rm", "touch")
    script(tmp_path / "bin" / "python3", "exit 1")  # too old, or without venv: the check fails
    done = subprocess.run(
        ["make", "run", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: no Python 3.11 or newer with the modules venv and ensurepip was found" in done.stderr
    assert "make run PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_pip_is_asked_only_when_requirements_changed(tmp_path: Path) -> None:
    """With an environment whose stamp is newer than the requirements, `make run` starts the app and nothing else."""
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "python", 'echo "python $*"\n')
    run = ["make", "--silent", "run", f"VENV={tmp_path}", "ARGS=--port 1"]

    def said() -> list[str]:
        return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

    first = said()
    assert any("pip" in line and "install -r requirements.txt" in line for line in first)
    assert first[-1] == "python -m app --port 1"
    assert said() == ["python -m app --port 1"]
    os.utime(tmp_path / "installed-run", (0, 0))
    assert len(said()) > 1


@pytest.mark.parametrize("ci", ["", "true"])
def test_pip_takes_the_options_it_is_given(tmp_path: Path, ci: str) -> None:
    """Under CI=true pip once got an option in a place where it takes none, and CI could not install."""
    command = ["make", "--dry-run", "run", f"VENV={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"CI": ci}, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if " -m pip " in line)
    words = line.split(" install ")[0].split()[1:]
    asked = subprocess.run([sys.executable, *words, "install", "--help"], capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr


@pytest.mark.parametrize(
    ("make", "status", "last"),
    [
        ("echo '===== 3 passed in 1.25s ====='", 0, "===== 3 passed in 1.25s ====="),
        ("echo '== 1 failed, 2 passed in 61.00s (0:01:01) =='; echo 'make: Error 1' >&2; exit 2", 2,
         "== 1 failed, 2 passed in 61.00s (0:01:01) =="),
        ("echo 'error: no Chromium' >&2; exit 2", 2,
         "make test ended with status 2 before pytest closed: see the lines above"),
    ],
)  # fmt: skip
def test_ci_run_ends_with_pytests_closing_line(tmp_path: Path, make: str, status: int, last: str) -> None:
    script(tmp_path / "make", f'test "$CI" = true && test "$1" = test || exit 9\n{make}\n')
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / ".ci" / "run"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert done.stdout.splitlines()[-1] == last
