"""What every test gets: no network, no display, one thread, one seed, an empty Hugging Face cache. Knows nothing of the
app.

The environment is set before any test module is imported, because torch, transformers and matplotlib read it once.
"""

import os
import tempfile
from pathlib import Path

import pytest

_CACHE = tempfile.mkdtemp(prefix="deepstack-lens-tests-")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one xdist worker per core: more threads only wait for one another
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HOME"] = _CACHE
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_TEMP_DIR"] = str(Path(_CACHE) / "gradio")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(_CACHE) / "inductor")

from tests import offline  # noqa: E402  (the environment comes first)

offline.guard()

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Torch draws the same numbers in a test wherever and after whatever it runs."""
    import torch

    torch.manual_seed(0)


def pytest_unconfigure(config: pytest.Config) -> None:
    import shutil

    shutil.rmtree(_CACHE, ignore_errors=True)
