"""One colour per source of visual rows, and the few neutral colours around them. Knows nothing about figures or pages.

Okabe and Ito's colours (https://jfly.uni-koeln.de/color/, safe for the common kinds of colour blindness), without their
black and yellow, which one of the two backgrounds swallows; the base is grey. `dark` is True or False where the
background is known, and None where a figure must be readable on both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from model.plan import BASE, TAP, VISION

BASE_GREY = "#7A828E"
# In the order of the stacks; the last three, brown, violet and olive, are ours: `hires` has nine stacks.
STACK_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#A6761D", "#8B78C6", "#7F8C2A")
MAX_NAMED = 16  # stacks that get CSS variables of their own; colours repeat after nine
MAX_TAPS = 48  # vision blocks whose untrained taps get CSS variables; all are grey like the base

LIGHT_SURFACE, DARK_SURFACE = "#FFFFFF", "#14171C"
SEQUENTIAL = "cividis"  # made for colour-blind readers; a plain ramp of lightness in print
DIVERGING = ("#0072B2", "#F3F4F6", "#D55E00")  # negative, zero, positive


@dataclass(frozen=True)
class Theme:
    """The neutral colours of a figure, as #RRGGBB (grid: rgba)."""

    dark: bool | None
    ink: str  # titles, labels
    muted: str  # axes, notes
    grid: str  # thin lines behind the data
    surface: str  # what is taken to lie behind; figures themselves are transparent


_THEMES = {
    False: Theme(False, "#1B1F24", "#5B6472", "rgba(91,100,114,0.18)", LIGHT_SURFACE),
    True: Theme(True, "#E6E9EE", "#9AA3AF", "rgba(154,163,175,0.20)", DARK_SURFACE),
    # 4.2 : 1 on white and on the dark surface alike, the best that one colour can do on both
    None: Theme(None, "#7A7E85", "#7A7E85", "rgba(122,126,133,0.28)", LIGHT_SURFACE),
}


def theme(dark: bool | None = None) -> Theme:
    """The neutral colours for a light page, a dark page, or (None) either."""
    return _THEMES[dark]


def colour(source: str, dark: bool | None = None) -> str:
    """#RRGGBB of a source ("base", "0", "v0", …) for lines and bars: at least 3 : 1 against the background.

    With `dark` None the plain colour is given, which is at least 2 : 1 on either background.
    """
    plain = _plain(source)
    return plain if dark is None else readable(plain, theme(dark).surface, 3.0)


def text_colour(source: str, dark: bool | None = None) -> str:
    """#RRGGBB of a source for words: the same hue, moved until it stands 4.5 : 1 against the background, if known."""
    return for_words(_plain(source), dark)


def for_words(hexcode: str, dark: bool | None = None) -> str:
    """Any colour, moved until words in it stand 4.5 : 1 against the background (None: as it is)."""
    return hexcode if dark is None else readable(hexcode, theme(dark).surface, 4.5)


def _plain(source: str) -> str:
    number = source.removeprefix(VISION)
    return STACK_COLOURS[int(number) % len(STACK_COLOURS)] if number.isdecimal() else BASE_GREY


def source_name(source: str) -> str:
    """What a source is called: "base", "stack 0", "vision stack 0", "untrained tap 6"."""
    if source.startswith(TAP):
        return f"untrained tap {source.removeprefix(TAP)}"
    if source.startswith(VISION):
        return f"vision stack {source.removeprefix(VISION)}"
    return f"stack {source}" if source.isdecimal() else source


def label_colour(label: str, dark: bool | None = None) -> str:
    """Colour of words that begin with a source ("base", "0", "stack 0, layer 1"); the ink for any other label."""
    found = re.match(r"(?:(?:vision )?stack )?(base|\d+)\b", label)
    return text_colour(found[1], dark) if found else theme(dark).ink


def diverging_with_alpha() -> list[tuple[float, str, float]]:
    """(place, #RRGGBB, opacity) for signed values over a picture: clear at zero; opacity grows as the root."""
    low, middle, high = DIVERGING
    shares = (1.0, 0.5, 0.25, 0.1, 0.02)
    below = [(0.5 - share / 2, low, round(share**0.5, 3)) for share in shares]
    above = [(0.5 + share / 2, high, round(share**0.5, 3)) for share in reversed(shares)]
    return [*below, (0.5, middle, 0.0), *above]


def css_variables() -> str:
    """CSS text, light and `.dark`: --source-NAME for lines, --source-NAME-text for words, --ink, --muted, --grid."""

    def block(dark: bool) -> str:
        neutral = theme(dark)
        lines = [f"--ink: {neutral.ink}", f"--muted: {neutral.muted}", f"--grid: {neutral.grid}"]
        numbered = [f"{kind}{k}" for kind in ("", VISION) for k in range(MAX_NAMED)]
        for source in (BASE, *numbered, *(f"{TAP}{block}" for block in range(MAX_TAPS))):
            lines.append(f"--source-{source}: {colour(source, dark)}")
            lines.append(f"--source-{source}-text: {text_colour(source, dark)}")
        return "".join(f"  {line};\n" for line in lines)

    return f":root {{\n{block(False)}}}\n.dark {{\n{block(True)}}}\n"


def readable(hexcode: str, surface: str, contrast: float) -> str:
    """`hexcode`, moved in steps towards black or white (whichever is away from `surface`) until the contrast is met."""
    end = 0 if _luminance(surface) > 0.18 else 255
    rgb = _rgb(hexcode)
    for step in range(101):
        mixed = tuple(round(c + (end - c) * step / 100) for c in rgb)
        candidate = "#{:02X}{:02X}{:02X}".format(*mixed)
        if contrast_ratio(candidate, surface) >= contrast:
            return candidate
    raise ValueError(f"no shade of {hexcode} stands {contrast} : 1 against {surface}")


def contrast_ratio(a: str, b: str) -> float:
    """WCAG 2 contrast of two #RRGGBB colours, 1 to 21."""
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def rgba(hexcode: str, alpha: float) -> str:
    """CSS colour of `hexcode` with an opacity between 0 and 1."""
    return "rgba({},{},{},{:g})".format(*_rgb(hexcode), alpha)


def _rgb(hexcode: str) -> tuple[int, int, int]:
    return tuple(int(hexcode[i : i + 2], 16) for i in (1, 3, 5))  # type: ignore[return-value]


def _luminance(hexcode: str) -> float:
    channels = [c / 255 for c in _rgb(hexcode)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
