"""What the tests of the page share: a desk with tiny random models under the embedded names. No browser, no weights."""

from __future__ import annotations

import pytest

from app.desk import Desk
from app.session import Focus, Session
from model import loading
from model.loading import Zoo
from tests import tiny
from tests.app.given import HIRES, SINGLE, TAPS


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Tiny random models of the embedded kinds, loaded."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny.hires_folder(folder / "hires")
    tiny.hires_folder(folder / "hires-single", merge="none", seed=1)
    tiny.qwen3_vl_folder(folder / "taps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "CHECKPOINTS", folder)
        zoo = Zoo([HIRES, SINGLE, TAPS])
        for name in zoo.offered:
            zoo.get(name)
    return zoo


@pytest.fixture
def desk(zoo: Zoo) -> Desk:
    """A desk with an empty store."""
    return Desk(zoo)


@pytest.fixture
def session() -> Session:
    """A visitor who has just come."""
    return Session().known()


@pytest.fixture
def focus() -> Focus:
    """The example receipt in focus."""
    return Focus(images=("receipt.png",), example="receipt.png", question="What does the lemon cost?", truth="5.63")
