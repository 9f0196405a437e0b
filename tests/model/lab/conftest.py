"""What the lab's tests share: a work folder with the tiny lab's data, and costs measured once."""

import pytest

from model.lab import cost, scenes
from tests.model.lab.lab_sizes import TINY


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A work folder with the data of the tiny lab."""
    folder = tmp_path_factory.mktemp("lab")
    scenes.prepare(folder, TINY.scenes, TINY.validation, TINY.test, device="cpu")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(cost, "PREFILLS", 1)
    monkeypatch.setattr(cost, "STEPS", 1)
