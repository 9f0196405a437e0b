"""The page with tiny random models in the place of the embedded ones: starts in seconds and needs no trained weights.

    python -m tests.browser.tiny_page --port 7861

A token takes at least 20 ms, as on a real model: somebody can watch an answer, and stop it. The Lab shows made-up
results (tests/lab.py), one of whose variants ships. For work on the page itself
and for tests that are about the page, not about what a model has learned.
"""

import functools
import sys
import tempfile
import time
from pathlib import Path

from transformers import LlamaModel

from analysis import lab as results
from app import cli
from model import loading
from tests import lab, tiny


def write(folder: Path) -> None:
    """Every embedded name as a tiny random model of the same class."""
    tiny.hires_folder(folder / "hires")
    tiny.hires_folder(folder / "hires-single", merge="none")
    tiny.hires_folder(folder / "hires-concat", merge="concat")
    tiny.qwen3_vl_folder(folder / "taps")
    tiny.qwen3_vl_folder(folder / "taps-single", taps=())
    tiny.hires_folder(folder / "lab-stack-2d", seed=2)


def slow_down(seconds: float) -> None:
    """Every pass of a Llama decoder takes at least so long."""
    forward = LlamaModel.forward

    @functools.wraps(forward)
    def slowly(*args, **kwargs):
        time.sleep(seconds)
        return forward(*args, **kwargs)

    LlamaModel.forward = slowly


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
        loading.CHECKPOINTS = Path(temporary)
        results.RESULTS = lab.write(Path(temporary) / "lab" / "results.jsonl")
        results.SEARCHES = lab.write(Path(temporary) / "lab" / "search.jsonl", [lab.search()])
        slow_down(0.02)
        sys.exit(cli.main())
