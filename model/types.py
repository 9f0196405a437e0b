"""The plain values that a request takes and gives: sampling settings, tokens, answers, views, image grids.

Knows nothing about models or tensors of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from model.errors import UserError
from model.plan import Plan

# {"role": "user" | "assistant" | "system",
#  "content": [{"type": "image", "image": PIL.Image} | {"type": "text", "text": str}, …] or a str}
Message = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; top_p 1 and top_k 0 are off; the seed belongs to the request."""

    max_new_tokens: int = 48
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if not 0.0 <= self.temperature <= 100.0:
            raise UserError(f"temperature is {self.temperature}; it must be between 0 (greedy) and 100.")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (1 is off).")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (off) or more.")

    @property
    def greedy(self) -> bool:
        """True when the most probable token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True)
class Token:
    """One answer token under the model's own distribution (before temperature, top-p and top-k)."""

    id: int
    text: str  # joined over an answer these give its text; the end token's text is ""
    logprob: float  # natural logarithm
    top: tuple[tuple[str, float], ...]  # the five most probable tokens: (text, log-probability), best first


@dataclass(frozen=True)
class Answer:
    """What one request got, and under which plan."""

    model: str
    plan: Plan
    text: str
    tokens: tuple[Token, ...]  # without the end token
    seconds: float  # the whole request, vision included
    first_token_seconds: float
    vision_seconds: float  # 0-ish when cached
    vision_cached: bool
    stopped: str  # "end" | "length" | "stopped"
    prompt_tokens: int
    visual_tokens: int
    device: str

    def to_json(self) -> dict:
        """Plain values for `--json` and records."""
        return {
            "model": self.model,
            "plan": str(self.plan),
            "answer": self.text,
            "tokens": [{"text": token.text, "logprob": token.logprob} for token in self.tokens],
            "seconds": self.seconds,
            "first_token_seconds": self.first_token_seconds,
            "vision_seconds": self.vision_seconds,
            "vision_cached": self.vision_cached,
            "stopped": self.stopped,
            "prompt_tokens": self.prompt_tokens,
            "visual_tokens": self.visual_tokens,
            "device": self.device,
        }


@dataclass(frozen=True)
class View:
    """One picture of what the model sees of an image, with the token grid over it."""

    name: str  # "global view", "high-resolution view", "what the model sees"
    image: Image.Image
    grid: tuple[int, int]  # (rows, columns) of tokens over this picture
    owners: tuple[tuple[str, ...], ...] | None = None  # source name per cell, for dilated samples


Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image; may reach beyond it


@dataclass(frozen=True, eq=False)
class Region:
    """One rectangle of visual tokens that an image takes in the sequence, and the part of the image under it."""

    grid: tuple[int, int]  # (rows, columns)
    box: Box | None = None  # None: the whole image
    name: str = ""  # "global view", "" where an image has one region only
    rows: np.ndarray | None = None  # int64 [N]: which of the image's placeholders, row-major; None: the next N


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """Where one image, or one region of it, lies in the sequence, and how its rows lie on the picture under it."""

    index: int  # which image of the prompt, from 0
    positions: np.ndarray  # int64 [N], absolute sequence positions, row-major over the grid
    grid: tuple[int, int]  # (gh, gw), gh * gw == N
    size: tuple[int, int]  # (width, height) of the picture under it, pixels
    box: Box | None = None  # the part of the image that this picture is; None: all of it
    name: str = ""  # which region, where an image has several
