"""A small drawing surface that remembers where every character and object is.

Coordinates and sizes are pixels of the high-resolution view (`SIDE` wide); the picture itself is drawn `scale` times
larger, as a visitor's upload would be. Knows nothing about questions or models.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from model.training import fonts

SIDE = 192  # pixels: side of the high-resolution view, three tiles of 64
PATCH = 8  # pixels: side of a vision patch
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789."
COLOURS = {
    "red": (205, 35, 35),
    "orange": (240, 135, 20),
    "yellow": (245, 220, 50),
    "green": (40, 150, 60),
    "blue": (35, 80, 200),
    "purple": (130, 50, 165),
    "black": (22, 22, 24),
    "white": (246, 246, 244),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond")
OBJECTS = (*SHAPES, "bar", "panel")


@dataclass(frozen=True)
class Glyph:
    """One drawn character: its centre, its place in its string, and the string it belongs to."""

    character: str
    x: float
    y: float
    index: int
    string: int
    colour: str


@dataclass(frozen=True)
class Thing:
    """One drawn object: kind, colour, centre and half sizes."""

    kind: str
    colour: str
    x: float
    y: float
    half_width: float
    half_height: float


def luminance(rgb) -> float:
    """Perceived brightness, 0 to 255 (ITU-R BT.601)."""
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


class Canvas:
    def __init__(self, rng: np.random.Generator, scale: int = 1, side: int = SIDE, background=None):
        self.rng, self.scale, self.side = rng, scale, side
        self.background = background if background is not None else self._pick_background()
        self.image = self._paper()
        self.draw = ImageDraw.Draw(self.image)
        self.glyphs: list[Glyph] = []
        self.things: list[Thing] = []
        self.strings = 0

    def _pick_background(self):
        base = self.rng.integers(196, 250) if self.rng.random() < 0.72 else self.rng.integers(30, 92)
        return tuple(int(np.clip(base + d, 0, 255)) for d in self.rng.integers(-9, 10, 3))

    def _paper(self) -> Image.Image:
        """Plain, shaded or coarse-grained paper."""
        size = self.side * self.scale
        kind = self.rng.random()
        if kind < 0.45:
            return Image.new("RGB", (size, size), self.background)
        low = self.rng.normal(0, 1, (4 if kind < 0.75 else 24,) * 2 + (1,)) * self.rng.uniform(2, 7)
        small = np.clip(np.asarray(self.background, float) + low, 0, 255).astype(np.uint8)
        return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)

    def shade(self, colour: str):
        """A named colour with a little variation, as RGB."""
        return tuple(
            min(255, max(0, c + d))
            for c, d in zip(COLOURS[colour], self.rng.integers(-14, 15, 3).tolist(), strict=True)
        )

    def readable_on(self, rgb, least: float = 80.0) -> list[str]:
        """Names of the colours whose brightness differs enough from `rgb` to be read on it."""
        return [name for name, value in COLOURS.items() if abs(luminance(value) - luminance(rgb)) >= least]

    def text(self, x: float, y: float, text: str, font: str, capital: float, colour: str) -> int:
        """Draw `text` with its first character's left edge at x and the top of its capitals at y; returns the
        string's number.
        """
        k, face = self.scale, fonts.face(font, capital * self.scale)
        self.draw.text((x * k, y * k - face.top), text, font=face.font, fill=self.shade(colour))
        number, pen, index = self.strings, x * k, 0
        for character in text:
            advance = face.advance(character)
            if character != " ":
                self.glyphs.append(Glyph(character, (pen + advance / 2) / k, y + capital / 2, index, number, colour))
                index += 1
            pen += advance
        self.strings += 1
        return number

    def width(self, text: str, font: str, capital: float) -> float:
        return fonts.face(font, capital * self.scale).width(text) / self.scale

    def thing(
        self, kind: str, colour: str, x: float, y: float, half_width: float, half_height: float | None = None, rgb=None
    ):
        """Draw an object centred at (x, y)."""
        half_height = half_width if half_height is None else half_height
        k, fill = self.scale, rgb or self.shade(colour)
        box = [(x - half_width) * k, (y - half_height) * k, (x + half_width) * k, (y + half_height) * k]
        if kind == "circle":
            self.draw.ellipse(box, fill=fill)
        elif kind in ("square", "bar"):
            self.draw.rectangle(box, fill=fill)
        elif kind == "panel":
            self.draw.rounded_rectangle(box, radius=float(self.rng.uniform(0, 4)) * k, fill=fill)
        else:
            corners = {"triangle": 3, "diamond": 4, "star": 10}[kind]
            points = []
            for corner in range(corners):
                radius = 0.45 if kind == "star" and corner % 2 else 1.12
                angle = 2 * math.pi * corner / corners - math.pi / 2
                points.append(
                    ((x + half_width * radius * math.cos(angle)) * k, (y + half_height * radius * math.sin(angle)) * k)
                )
            self.draw.polygon(points, fill=fill)
        self.things.append(Thing(kind, colour, x, y, half_width, half_height))

    def finish(self, most_degrees: float = 3.0) -> Image.Image:
        """Turn by a few degrees, add sensor and JPEG noise; characters and objects move along. Returns the RGB
        picture.
        """
        rng, image = self.rng, self.image
        if rng.random() < 0.35:
            degrees = float(rng.uniform(-most_degrees, most_degrees))
            image = image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=self.background)
            sine, cosine, middle = math.sin(math.radians(degrees)), math.cos(math.radians(degrees)), self.side / 2

            def turned(x, y):  # counter-clockwise, the y axis points down
                dx, dy = x - middle, y - middle
                return middle + cosine * dx + sine * dy, middle - sine * dx + cosine * dy

            self.glyphs = [Glyph(g.character, *turned(g.x, g.y), g.index, g.string, g.colour) for g in self.glyphs]
            self.things = [Thing(t.kind, t.colour, *turned(t.x, t.y), t.half_width, t.half_height) for t in self.things]
        if rng.random() < 0.3:
            noise = rng.normal(0, rng.uniform(1, 5), (*image.size[::-1], 1))
            image = Image.fromarray(np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8))
        if rng.random() < 0.4:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=int(rng.integers(60, 96)))
            image = Image.open(buffer).convert("RGB")
        return image
