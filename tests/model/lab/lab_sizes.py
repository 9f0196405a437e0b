"""A lab so small that all of its variants train in seconds."""

from pathlib import Path

from model.lab import run as lab
from model.lab.variants import VARIANTS

TINY = lab.Size("tiny", width=32, layers=8, scenes=5, steps=2, batch=2, validation=2, test=3)


def job(name: str, steps: int = 2) -> lab.Job:
    return lab.Job(VARIANTS[name], TINY, seed=0, steps=steps)


def weights(made: lab.Job, workdir: Path) -> dict:
    """What the run's last checkpoint holds."""
    import torch

    return torch.load(made.folder(workdir) / "last.pt", weights_only=True)
