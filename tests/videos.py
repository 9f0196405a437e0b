"""Short videos, made on the spot: a square that moves on a ground whose colour tells the frame."""

from __future__ import annotations

import io

import av
from PIL import Image, ImageDraw


def colour(frame: int) -> tuple[int, int, int]:
    """The ground of a frame, of up to 32."""
    return (8 * frame, 60, 248 - 8 * frame)


def video(frames: int = 23, fps: int = 8, size: tuple[int, int] = (96, 64), container: str = "mp4") -> bytes:
    """A file of so many frames of `size` (width, height)."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream("mpeg4", rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for number in range(frames):
            image = Image.new("RGB", size, colour(number))
            ImageDraw.Draw(image).rectangle((2 * number, 8, 2 * number + 12, 24), fill=(255, 255, 0))
            out.mux(stream.encode(av.VideoFrame.from_image(image)))
        out.mux(stream.encode())
    return file.getvalue()
