"""The fonts that scenes are drawn with: which file, and how large a capital letter comes out.

Every font comes with a package in requirements.txt, so drawing needs no network and gives the same pixels everywhere.
Knows nothing about scenes or models.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

# name -> (package, file inside the package)
TRAIN = {
    "DejaVu Sans": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf"),
    "DejaVu Sans Bold": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans-Bold.ttf"),
    "DejaVu Sans Mono": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSansMono.ttf"),
    "DejaVu Serif": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSerif.ttf"),
    "STIX General": ("matplotlib", "mpl-data/fonts/ttf/STIXGeneral.ttf"),
    "STIX General Bold": ("matplotlib", "mpl-data/fonts/ttf/STIXGeneralBol.ttf"),
    "Roboto": ("font_roboto", "files/Roboto-Regular.ttf"),
    "Roboto Bold": ("font_roboto", "files/Roboto-Bold.ttf"),
    "Source Sans": ("font_source_sans_pro", "files/SourceSansPro-Regular.ttf"),
    "Source Sans Semibold": ("font_source_sans_pro", "files/SourceSansPro-Semibold.ttf"),
    "Source Serif": ("font_source_serif_pro", "files/SourceSerifPro-Regular.ttf"),
}
# never seen in training: the second test set is drawn with these alone
HELD_OUT = {
    "Manrope": ("font_manrope", "files/Manrope-Medium.ttf"),
    "Hanken Grotesk": ("font_hanken_grotesk", "files/HankenGrotesk-Medium.otf"),
    "Caladea": ("font_caladea", "files/Caladea-Regular.ttf"),
    "Caladea Bold": ("font_caladea", "files/Caladea-Bold.ttf"),
}
SETS = {"train": TRAIN, "held-out": HELD_OUT}


@cache
def path(name: str) -> str:
    """File of the font `name`; FileNotFoundError names the package to install."""
    package, inside = {**TRAIN, **HELD_OUT}[name]
    spec = find_spec(package)
    file = Path(spec.submodule_search_locations[0]) / inside if spec else Path(inside)
    if not file.exists():
        raise FileNotFoundError(
            f"font {name!r}: {inside} of the package {package!r} is not installed; see requirements.txt"
        )
    return str(file)


@cache
def capital_ratio(name: str) -> float:
    """Height of a capital H as a share of the font size."""
    left, top, right, bottom = ImageFont.truetype(path(name), 200).getbbox("H")
    return (bottom - top) / 200


class Face:
    """A font at a capital height of `capital` pixels: what to draw with, and each character's advance in pixels."""

    def __init__(self, name: str, capital: float):
        self.name, self.capital = name, capital
        self.font = ImageFont.truetype(path(name), capital / capital_ratio(name), layout_engine=ImageFont.Layout.BASIC)
        self.top = self.font.getbbox("H")[1]  # pixels from the drawing origin down to the top of a capital
        self._advances: dict[str, float] = {}

    def advance(self, character: str) -> float:
        if character not in self._advances:
            self._advances[character] = self.font.getlength(character)
        return self._advances[character]

    def width(self, text: str) -> float:
        return sum(self.advance(character) for character in text)


@lru_cache(maxsize=4096)
def face(name: str, capital: float) -> Face:
    return Face(name, capital)
