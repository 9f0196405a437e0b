"""A video as one picture: its frames side by side on a sheet, and when and where each of them is.

All that holds, shows or compares pictures takes a sheet as the picture that it is. Only the reader of files
(model/images.py) and families that read videos know what lies on it. Knows nothing about files and models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

KEY = "clip"  # of a sheet's `info`


@dataclass(frozen=True)
class Clip:
    """What lies on a sheet."""

    size: tuple[int, int]  # (width, height) of each frame, pixels
    columns: int  # frames beside each other; even, so that two that go together lie in one row
    seconds: tuple[float, ...]  # of each frame, from the beginning of the video
    fps: float  # frames on the sheet for each second of the video

    def to_json(self) -> dict:
        """Plain values, for a record."""
        return {"size": list(self.size), "columns": self.columns, "seconds": list(self.seconds), "fps": self.fps}

    @classmethod
    def from_json(cls, data: dict) -> Clip:
        """The inverse of `to_json`; KeyError, TypeError or ValueError for anything else."""
        width, height = map(int, data["size"])
        clip = cls((width, height), int(data["columns"]), tuple(map(float, data["seconds"])), float(data["fps"]))
        if min(width, height, clip.columns, clip.fps) <= 0 or not clip.seconds:
            raise ValueError("frames without a size, a number or a rate")
        return clip

    @property
    def sheet_size(self) -> tuple[int, int]:
        """(width, height) of the sheet, pixels."""
        width, height = self.size
        return width * self.columns, height * math.ceil(len(self.seconds) / self.columns)

    def box(self, frame: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a frame on the sheet, pixels."""
        width, height = self.size
        row, column = divmod(frame, self.columns)
        return width * column, height * row, width * (column + 1), height * (row + 1)


def sampled(total: int, fps: float, most: int, wanted_fps: float = 2.0, least: int = 4) -> np.ndarray:
    """Which of `total` frames are looked at, as Qwen3-VL's video processor has it: two a second, at least four.

    fps: of the video; most: however long it is.
    """
    count = min(max(int(total / fps * wanted_fps), least), most, total)
    return np.linspace(0, total - 1, count).round().astype(int)


def sheet(frames: Sequence[Image.Image], seconds: Sequence[float], fps: float) -> Image.Image:
    """The sheet of frames of one size, RGB. fps: of these frames, over the whole video."""
    width, height = frames[0].size
    columns = max(2, 2 * round(math.sqrt(len(frames) * height / width) / 2))
    clip = Clip((width, height), columns, tuple(map(float, seconds)), float(fps))
    image = Image.new("RGB", clip.sheet_size)
    for number, frame in enumerate(frames):
        image.paste(frame, clip.box(number)[:2])
    return marked(image, clip)


def marked(image: Image.Image, clip: Clip) -> Image.Image:
    """The same picture, known from now on to be the sheet of this clip."""
    image.info[KEY] = clip
    return image


def clip_of(image: Image.Image) -> Clip | None:
    """What lies on this picture, None where it is not a sheet (any more)."""
    clip = image.info.get(KEY)
    return clip if clip is not None and image.size == clip.sheet_size else None


def frames_of(image: Image.Image) -> list[Image.Image]:
    """The frames of a sheet, in order."""
    clip = image.info[KEY]
    return [image.crop(clip.box(number)) for number in range(len(clip.seconds))]
