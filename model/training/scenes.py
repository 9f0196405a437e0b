"""Scenes with exact answers: signs, labels, cards, receipts, tables, bar charts, eye charts, notices, corners, shapes.

A scene is a picture, where everything on it is, and questions with their answers. `fine` questions need glyphs of 8 to
10 pixels in the high-resolution view (a third of that in the global view); `coarse` ones need colours, shapes, counts
and heights only. Knows nothing about models.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from model.training import fonts, strings
from model.training.canvas import COLOURS, SHAPES, SIDE, Canvas, Glyph, Thing
from model.training.pages import GLYPHS

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
NONE = "there is none"
UNKNOWN = "i can not answer that"

# free wording: each kind of question is asked in several ways
WORDING: dict[str, tuple[str, ...]] = {
    "sign": (
        "what does the {c} sign say?",
        "read the {c} sign",
        "what is written on the {c} sign?",
        "text on the {c} sign?",
        "what is on the {c} sign?",
    ),
    "only_sign": ("what does the sign say?", "read the sign", "what is written on the sign?", "text on the sign?"),
    "place": (
        "what is written at the {p}?",
        "what is the text at the {p}?",
        "read the text at the {p}",
        "what does it say at the {p}?",
        "text at the {p}?",
    ),
    "label": (
        "what is written next to the {c} {s}?",
        "what is the label of the {c} {s}?",
        "read the text next to the {c} {s}",
        "label of the {c} {s}?",
    ),
    "field": ("what is the {f}?", "what does the {f} field say?", "read the {f}", "which {f} is given?", "{f}?"),
    "item": ("how much is the {i}?", "what does the {i} cost?", "what is the price of the {i}?", "price of {i}?"),
    "total": ("what is the total?", "how much is the total?", "read the total", "total?"),
    "line": (
        "what is the {n} line?",
        "read the {n} line",
        "what does the {n} line say?",
        "{n} line?",
        "what is written on the {n} line?",
    ),
    "cell": (
        "what is in row {r} column {k}?",
        "read row {r} column {k}",
        "what does row {r} column {k} say?",
        "row {r} column {k}?",
        "read the cell in row {r} and column {k}",
    ),
    "bar": (
        "what is the label under the {c} bar?",
        "what is written under the {c} bar?",
        "read the label of the {c} bar",
        "name of the {c} bar?",
    ),
    "ink": (
        "what does the {c} text say?",
        "read the {c} text",
        "what is written in {c}?",
        "read the line in {c}",
        "{c} text?",
    ),
    "count_signs": ("how many signs are there?", "how many signs do you see?", "count the signs"),
    "count_bars": ("how many bars are there?", "how many bars does the chart have?", "count the bars"),
    "count_shape": ("how many {s}s are there?", "how many {s}s do you see?", "count the {s}s"),
    "count_all": ("how many shapes are there?", "how many shapes do you see?", "count the shapes"),
    "shape_colour": ("what colour is the {s}?", "which colour does the {s} have?", "what is the colour of the {s}?"),
    "colour_shape": ("what shape is {c}?", "which shape is {c}?", "what is the {c} shape?"),
    "exists": ("is there a {c} {s}?", "do you see a {c} {s}?", "can you see a {c} {s}?"),
    "tallest": (
        "which bar is the tallest?",
        "what colour is the tallest bar?",
        "which bar is the highest?",
        "tallest bar?",
    ),
    "shortest": (
        "which bar is the shortest?",
        "what colour is the shortest bar?",
        "which bar is the lowest?",
        "shortest bar?",
    ),
    "taller": ("is the {c} bar taller than the {d} bar?", "is the {c} bar higher than the {d} bar?"),
    "picture": (
        "what kind of picture is this?",
        "what is this?",
        "what do you see?",
        "what does the picture show?",
        "describe the picture",
    ),
}
OUT_OF_SCOPE = (
    "what is the meaning of life?|who are you?|tell me a joke|what is the capital of france?|write a poem|"
    "how old is the tree?|is it raining?|sing a song|"
    "why is the sky blue?|what time is it now?|who painted this?|translate this to german|how are you?|hello|"
    "thank you|what is two plus two?|"
    "is the man happy?|how many people are in the photo?|what breed is the dog?|where was this taken?|asdf|"
    "qwerty|help me|summarize the news"
).split("|")
FILLER = (
    "the a is of what who where dog cat house man woman tree car sky happy big "
    "small my your how why when blah zzz foo bar run walk song photo news weather love think"
).split()


@dataclass(frozen=True)
class Question:
    """A question with its exact answer. `string` is the number of the drawn string that is read, `thing` the object
    that is looked at.
    """

    topic: str
    question: str
    answer: str
    kind: str  # "fine" | "coarse"
    glyph_px: float | None = None
    font: str | None = None
    string: int | None = None
    thing: int | None = None
    words: tuple[tuple[str, object], ...] = ()  # what fills the gaps of the wording

    def reworded(self, rng: np.random.Generator) -> str:
        """The same question in another wording of its topic."""
        wording = WORDING[self.topic]
        return wording[int(rng.integers(len(wording)))].format(**dict(self.words))


@dataclass
class Scene:
    name: str
    image: Image.Image
    glyphs: list[Glyph]
    things: list[Thing]
    questions: list[Question] = field(default_factory=list)


class Builder:
    """One scene while it is drawn: a canvas, one font, and the questions so far."""

    def __init__(self, rng: np.random.Generator, font_set: str, glyphs: dict[int, float], side: int = SIDE):
        self.rng, self.sizes = rng, list(glyphs)
        self.canvas = Canvas(rng, scale=int(rng.choice([1, 2, 3], p=[0.35, 0.4, 0.25])), side=side)
        self.font = str(rng.choice(list(fonts.SETS[font_set])))
        self.capital = float(rng.choice(self.sizes, p=list(glyphs.values())))
        self.questions: list[Question] = []
        self.texts: dict[int, tuple[str, float]] = {}

    def pick(self, choices):
        return choices[int(self.rng.integers(len(choices)))]

    def some(self, choices, count):
        return [choices[i] for i in self.rng.permutation(len(choices))[:count]]

    def write(self, x, y, text, colour, capital=None) -> int:
        """Text with its left edge at x, shifted so that it stays on the paper."""
        capital = capital or self.capital
        x = max(2.0, min(x, self.canvas.side - 2 - self.canvas.width(text, self.font, capital)))
        number = self.canvas.text(x, y, text, self.font, capital, colour)
        self.texts[number] = (text, capital)
        return number

    def ink(self, rgb=None) -> str:
        return self.pick(self.canvas.readable_on(rgb or self.canvas.background))

    def inks(self, count) -> list[str]:
        return self.some(self.canvas.readable_on(self.canvas.background, least=62), count)

    def colours(self, count) -> list[str]:
        """Object colours that stand out from the paper."""
        paper = np.array(self.canvas.background)
        return self.some([c for c, rgb in COLOURS.items() if np.abs(np.array(rgb) - paper).max() > 60], count)

    def ask(self, topic, answer, kind, string=None, thing=None, **words):
        question = self.pick(WORDING[topic]).format(**words)
        if string is None:
            self.questions.append(Question(topic, question, answer, kind, thing=thing, words=tuple(words.items())))
        else:
            self.questions.append(
                Question(
                    topic, question, answer, kind, self.texts[string][1], self.font, string, words=tuple(words.items())
                )
            )

    def read(self, topic, string, **words):
        self.ask(topic, self.texts[string][0], "fine", string=string, **words)

    def text(self, longest: int = 6) -> str:
        while True:
            text = strings.anything(self.rng)
            if len(text) <= longest:
                return text


def _signs(b: Builder):
    """Coloured panels with a text on each."""
    count = int(b.rng.integers(1, 5))
    centres = {
        1: [(96, 96)],
        2: [(96, 54), (96, 138)],
        3: [(96, 33), (96, 96), (96, 159)],
        4: [(48, 54), (144, 54), (48, 138), (144, 138)],
    }[count]
    colours = b.colours(count)
    for colour, (x, y) in zip(colours, centres, strict=True):
        text, rgb = b.text(), b.canvas.shade(colour)
        width = b.canvas.width(text, b.font, b.capital)
        half = min(45.0 if count == 4 else 90.0, width / 2 + float(b.rng.uniform(6, 14)))
        x, y = (
            x + float(b.rng.uniform(-1, 1)) * max(0.0, (46 if count == 4 else 90) - half) * 0.8,
            y + float(b.rng.uniform(-12, 12)),
        )
        b.canvas.thing("panel", colour, x, y, half, b.capital / 2 + float(b.rng.uniform(5, 13)), rgb=rgb)
        string = b.write(x - width / 2, y - b.capital / 2, text, b.ink(rgb))
        b.read("sign", string, c=colour)
        if count == 1:
            b.read("only_sign", string)
    b.ask("count_signs", str(count), "coarse")
    absent = [c for c in COLOURS if c not in colours]
    b.ask("sign", NONE, "coarse", c=b.pick(absent))


def _labels(b: Builder):
    """Shapes with a text beside each."""
    count = int(b.rng.integers(2, 6))
    rows = b.rng.permutation(6)[:count]
    shapes, colours = [b.pick(SHAPES) for _ in range(count)], b.colours(count)
    ink = b.ink()
    for shape, colour, row in zip(shapes, colours, rows, strict=True):
        y, half = 18 + 31 * float(row), float(b.rng.uniform(9, 13))
        x = float(b.rng.uniform(16, 100))
        thing = len(b.canvas.things)
        b.canvas.thing(shape, colour, x, y, half)
        string = b.write(x + half + float(b.rng.uniform(4, 9)), y - b.capital / 2, b.text(), ink)
        b.read("label", string, c=colour, s=shape)
        if shapes.count(shape) == 1:
            b.ask("shape_colour", colour, "coarse", thing=thing, s=shape)
        b.ask("colour_shape", shape, "coarse", thing=thing, c=colour)
    b.ask("exists", "yes", "coarse", c=colours[0], s=shapes[0])
    b.ask("exists", "no", "coarse", c=b.pick([c for c in COLOURS if c not in colours]), s=b.pick(SHAPES))


def _card(b: Builder):
    """Labelled fields, as on a ticket or a badge."""
    count = int(b.rng.integers(3, 6))
    ink, y = b.ink(), float(b.rng.uniform(9, 24))
    x, gap = float(b.rng.uniform(6, 30)), float(b.rng.uniform(20, 32))
    for name in b.some(strings.FIELDS, count):
        value = (
            strings.price(b.rng)
            if name == "PRICE"
            else strings.number(b.rng)
            if name in ("GATE", "ROOM", "SEAT")
            else b.text()
        )
        b.write(x, y, name, ink)
        start = max(72.0, x + b.canvas.width(name, b.font, b.capital) + 9)
        string = b.write(start, y, value, ink)
        b.read("field", string, f=name.lower())
        y += gap


def _receipt(b: Builder):
    """Items with prices and a total."""
    count = int(b.rng.integers(3, 6))
    ink, y, gap = b.ink(), float(b.rng.uniform(6, 16)), float(b.rng.uniform(20, 27))
    left, right = float(b.rng.uniform(6, 26)), float(b.rng.uniform(150, 184))
    lines = []
    head = b.write(float(b.rng.uniform(45, 80)), y, b.text(), ink)
    b.read("line", head, n="first")
    for item in b.some(strings.ITEMS, count):
        y += gap
        b.write(left, y, item, ink)
        value = strings.price(b.rng)
        lines.append(b.write(right - b.canvas.width(value, b.font, b.capital), y, value, ink))
        b.read("item", lines[-1], i=item.lower())
    if count < 5:
        y += gap
        b.write(left, y, "TOTAL", ink)
        value = strings.price(b.rng)
        total = b.write(right - b.canvas.width(value, b.font, b.capital), y, value, ink)
        b.read("total", total)


def _table(b: Builder):
    """Rows and columns of short strings with ruled lines."""
    rows, columns = int(b.rng.integers(2, 6)), int(b.rng.integers(2, 4))
    ink, width, height = b.ink(), 180 / columns, 180 / max(rows, 3)
    line = b.canvas.shade(b.ink())
    k = b.canvas.scale
    for r in range(rows + 1):
        b.canvas.draw.line([6 * k, (6 + r * height) * k, 186 * k, (6 + r * height) * k], fill=line, width=k)
    for c in range(columns + 1):
        b.canvas.draw.line(
            [(6 + c * width) * k, 6 * k, (6 + c * width) * k, (6 + rows * height) * k], fill=line, width=k
        )
    for r in range(rows):
        for c in range(columns):
            longest = 3 if columns == 3 else 5
            text = (
                strings.number(b.rng, 2, longest) if b.rng.random() < 0.5 else strings.code(b.rng, 2, min(4, longest))
            )
            x = 6 + c * width + max(2.5, (width - b.canvas.width(text, b.font, b.capital)) / 2)
            string = b.write(x, 6 + r * height + height / 2 - b.capital / 2, text, ink)
            b.read("cell", string, r=r + 1, k=c + 1)


def _bars(b: Builder):
    """A bar chart with a name under each bar."""
    count = int(b.rng.integers(2, 6))
    colours, heights = b.colours(count), b.some([21, 39, 57, 75, 93, 111, 129], count)
    ink, width = b.ink(), 186 / count
    first = len(b.canvas.things)
    for i, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        x = 3 + width * (i + 0.5)
        b.canvas.thing("bar", colour, x, 164 - height / 2, width * 0.3, height / 2)
        longest = 3 if count > 3 else 4
        text = strings.code(b.rng, 2, longest) if b.rng.random() < 0.6 else strings.number(b.rng, 2, longest)
        string = b.write(x - b.canvas.width(text, b.font, b.capital) / 2, 170, text, ink)
        b.read("bar", string, c=colour)
    tall, short = int(np.argmax(heights)), int(np.argmin(heights))
    b.ask("tallest", colours[tall], "coarse", thing=first + tall)
    b.ask("shortest", colours[short], "coarse", thing=first + short)
    i, j = b.some(range(count), 2)
    b.ask("taller", "yes" if heights[i] > heights[j] else "no", "coarse", c=colours[i], d=colours[j])
    b.ask("count_bars", str(count), "coarse")


def _eye_chart(b: Builder):
    """Lines of random capitals, smaller and smaller."""
    y, ink = float(b.rng.uniform(10, 30)), b.ink()
    sizes = sorted((b.pick(b.sizes) for _ in range(int(b.rng.integers(3, 6)))), reverse=True)
    gap = float(b.rng.uniform(26, 34))
    for row, size in enumerate(sizes):
        text = strings.code(b.rng, 3, 4)
        width = b.canvas.width(text, b.font, size)
        string = b.write(96 - width / 2 + float(b.rng.uniform(-16, 16)), y, text, ink, capital=float(size))
        b.read("line", string, n=ORDINALS[row])
        if row == len(sizes) - 1:
            b.read("line", string, n="last")
        y += gap + float(b.rng.uniform(-2, 2))


def _notice(b: Builder):
    """Lines of text in different colours."""
    count = int(b.rng.integers(2, 6))
    colours = b.inks(count)
    count = len(colours)
    y, gap = float(b.rng.uniform(8, 24)), float(b.rng.uniform(24, 34))
    for row, colour in enumerate(colours):
        string = b.write(float(b.rng.uniform(4, 120)), y, b.text(), colour)
        b.read("ink", string, c=colour)
        b.read("line", string, n=ORDINALS[row])
        if row == count - 1 and count > 1:
            b.read("line", string, n="last")
        y += gap
    b.ask("ink", NONE, "coarse", c=b.pick([c for c in COLOURS if c not in colours]))


def _corners(b: Builder):
    """Texts at named places."""
    places = {
        "top left": (6, 14),
        "top right": (188, 14),
        "bottom left": (6, 166),
        "bottom right": (188, 166),
        "middle": (96, 91),
    }
    ink = b.ink()
    for place in b.some(list(places), int(b.rng.integers(3, 6))):
        x, y = places[place]
        text = b.text()
        width = b.canvas.width(text, b.font, b.capital)
        x = x - width if place.endswith("right") else x - width / 2 if place == "middle" else x
        string = b.write(x + float(b.rng.uniform(-12, 12)), y + float(b.rng.uniform(-9, 9)), text, ink)
        b.read("place", string, p=place)


def _shapes(b: Builder):
    """Coloured shapes without any text."""
    count = int(b.rng.integers(1, 7))
    cells = b.rng.permutation(9)[:count]
    few = b.some(SHAPES, int(b.rng.integers(1, 4)))
    shapes, colours = [b.pick(few) for _ in range(count)], b.colours(count)
    count = len(colours)
    shapes = shapes[:count]
    for i, (shape, colour, cell) in enumerate(zip(shapes, colours, cells[:count], strict=True)):
        x, y = 33 + 63 * (cell % 3) + float(b.rng.uniform(-8, 8)), 33 + 63 * (cell // 3) + float(b.rng.uniform(-8, 8))
        b.canvas.thing(shape, colour, x, y, float(b.rng.uniform(12, 21)))
        if shapes.count(shape) == 1:
            b.ask("shape_colour", colour, "coarse", thing=i, s=shape)
        b.ask("colour_shape", shape, "coarse", thing=i, c=colour)
    b.ask("count_all", str(count), "coarse")
    b.ask("count_shape", str(shapes.count(few[0])), "coarse", s=few[0])
    b.ask("exists", "yes", "coarse", c=colours[0], s=shapes[0])
    b.ask("exists", "no", "coarse", c=b.pick([c for c in COLOURS if c not in colours]), s=b.pick(SHAPES))


SCENES: dict[str, tuple[Callable[[Builder], None], float]] = {
    "signs": (_signs, 0.14),
    "labels": (_labels, 0.12),
    "card": (_card, 0.11),
    "receipt": (_receipt, 0.11),
    "table": (_table, 0.1),
    "bar chart": (_bars, 0.12),
    "eye chart": (_eye_chart, 0.06),
    "notice": (_notice, 0.1),
    "corners": (_corners, 0.06),
    "shapes": (_shapes, 0.08),
}


def make_scene(
    rng: np.random.Generator, font_set: str = "train", name: str | None = None, glyphs: dict[int, float] = GLYPHS
) -> Scene:
    """One scene with all of its questions; `glyphs` are capital heights, pixels, and their shares."""
    names = list(SCENES)
    name = name or str(rng.choice(names, p=[SCENES[n][1] for n in names]))
    builder = Builder(rng, font_set, glyphs)
    SCENES[name][0](builder)
    builder.ask("picture", name, "coarse")
    image = builder.canvas.finish()
    return Scene(name, image, builder.canvas.glyphs, builder.canvas.things, builder.questions)


def restyle(question: str, rng: np.random.Generator) -> str:
    """The same question as people type it: with or without a mark, capitals, a polite word."""
    draw = rng.random()
    if draw < 0.1:
        question = question.rstrip("?")
    elif draw < 0.2:
        question = (
            f"please {question}"
            if not question.startswith(("what", "which", "how", "is"))
            else f"{question[:-1]}, please?"
            if question.endswith("?")
            else question
        )
    style = rng.random()
    return question.upper() if style < 0.12 else question[:1].upper() + question[1:] if style < 0.6 else question


def out_of_scope(rng: np.random.Generator) -> str:
    """A question that no scene answers."""
    if rng.random() < 0.6:
        return str(rng.choice(OUT_OF_SCOPE))
    return " ".join(rng.choice(FILLER, rng.integers(1, 7))) + ("?" if rng.random() < 0.5 else "")


def write_scenes(out: Path, n: int, seed: int, fonts: str = "train", progress=None) -> Path:
    """Write `n` scenes to `out` as PNG, and one question of each to `out/answers.jsonl`, fine and coarse in turn as
    far as scenes allow.

    Keys: image (relative to `out`), question, answer, kind (fine | coarse), glyph_px (capital height in pixels of the
    high-resolution view, null for coarse), font, and scene, topic. Returns the path of answers.jsonl.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / "answers.jsonl"
    with open(file, "w", encoding="utf-8") as lines:
        for i in range(n):
            rng = np.random.default_rng([seed, i])
            wanted = "fine" if i % 2 == 0 else "coarse"
            while True:
                scene = make_scene(rng, fonts)
                choices = [
                    q for q in scene.questions if q.kind == wanted and (q.topic != "picture" or rng.random() < 0.15)
                ]
                if choices:
                    break
            question = choices[int(rng.integers(len(choices)))]
            name = f"{i:05d}.png"
            scene.image.save(out / name)
            record = {
                "image": name,
                "question": restyle(question.question, rng),
                "answer": question.answer,
                "kind": question.kind,
                "glyph_px": question.glyph_px,
                "font": question.font,
                "scene": scene.name,
                "topic": question.topic,
            }
            lines.write(json.dumps(record) + "\n")
            if progress:
                progress(i + 1, n)
    return file
