"""The page with tiny random models in the place of the embedded ones: starts in seconds and needs no trained weights.

    python -m tests.browser.tiny_page --port 7861

For work on the page itself and for tests that are about the page, not about what a model has learned.
"""

import sys
import tempfile
from pathlib import Path

from app import cli
from model import loading
from tests import tiny


def write(folder: Path) -> None:
    """Every embedded name as a tiny random model of the same class."""
    tiny.hires_folder(folder / "hires")
    tiny.hires_folder(folder / "hires-single", merge="none")
    tiny.hires_folder(folder / "hires-concat", merge="concat")
    tiny.qwen3_vl_folder(folder / "taps")
    tiny.qwen3_vl_folder(folder / "taps-single", taps=())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
        loading.CHECKPOINTS = Path(temporary)
        sys.exit(cli.main())
