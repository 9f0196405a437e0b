"""HTML that the page's parts share: words with their probability, badges, differences, cautions.

Everything that comes from a model or a visitor is escaped here, and nowhere else. Markdown characters become character
references as well, because the chat reads its messages as Markdown first. Strings in, strings out; knows nothing about
gradio.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from analysis.captions import caption
from analysis.compare import ADDED, DROPPED, diff, plan_badge
from app.desk import Example
from app.line import in_words
from model.layout import Layout
from model.plan import Plan
from model.types import Answer, Token

MAX_TIP_TOKENS = 24


@dataclass(frozen=True)
class Word:
    """A run of tokens without white space inside."""

    text: str  # with the white space before it
    first: int  # index of its first token
    tokens: tuple[Token, ...]

    @property
    def probability(self) -> float:
        """Of the whole word, given all before it."""
        return math.exp(sum(token.logprob for token in self.tokens))


def in_line(place: int, can_stop: bool = False) -> str:
    """How many are before a visitor whose request waits, and whether their stop button ends the waiting."""
    more = " Stop leaves the line." if can_stop else ""
    return f'<p class="dl-note" role="status">{in_words(place)}: the model answers others first.{more}</p>'


def words(tokens: Sequence[Token]) -> list[Word]:
    """Tokens as words: a new one begins where white space comes before visible text."""
    groups: list[list[int]] = []
    visible = False  # whether the current word has visible text yet
    for index, token in enumerate(tokens):
        head, tail = token.text[:1], token.text[-1:]
        if not groups or (visible and (head.isspace() or tokens[index - 1].text[-1:].isspace())):
            groups.append([])
            visible = False
        groups[-1].append(index)
        visible = visible or bool(token.text.strip())
        if tail.isspace() and token.text.strip():
            visible = True
    return [Word("".join(tokens[i].text for i in group), group[0], tuple(tokens[i] for i in group)) for group in groups]


def escape(text: str) -> str:
    """Text for HTML inside Markdown: everything but letters, digits and spaces as character references."""
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in text)


def percent(probability: float) -> str:
    """'84 %'; the ends are not rounded onto."""
    if 0.995 <= probability < 1:
        return "99+ %"
    if 0 < probability < 0.005:
        return "<1 %"
    return f"{probability:.0%}".replace("%", " %")


def word_spans(tokens: Sequence[Token]) -> str:
    """An answer's words, each a span with its probability as the title and a class dl-p0 … dl-p9 by tenth."""
    spans = []
    for word in words(tokens):
        lead = word.text[: len(word.text) - len(word.text.lstrip())]
        tenth = min(9, int(word.probability * 10))
        spans.append(
            f'{_blank(lead)}<span class="dl-w dl-p{tenth}" title="{escape(_tip(word))}">'
            f"{_blank(word.text[len(lead) :])}</span>"
        )
    return f'<span class="dl-words">{"".join(spans)}</span>'


def _blank(text: str) -> str:
    """Escaped, with line breaks kept."""
    return escape(text).replace("&#10;", "<br>")


def _tip(word: Word) -> str:
    lines = [f"{word.text.strip() or 'space'}: {percent(word.probability)}"]
    if len(word.tokens) > 1:
        parts = [f"{token.text.strip() or '␣'} {percent(math.exp(token.logprob))}" for token in word.tokens]
        more = " …" if len(parts) > MAX_TIP_TOKENS else ""
        lines.append(" · ".join(parts[:MAX_TIP_TOKENS]) + more)
    else:
        others = [pair for pair in word.tokens[0].top if pair[0] != word.tokens[0].text][:3]
        if others:
            lines.append("else " + ", ".join(f"{text.strip() or '␣'} {percent(math.exp(p))}" for text, p in others))
    return "\n".join(lines)


def badge(layout: Layout, plan: Plan) -> str:
    """'trained' or 'ablated', with the reason as the title."""
    kind, why = plan_badge(layout, plan)
    return f'<span class="dl-badge dl-{kind}" title="{escape(why)}">{kind}</span>'


def plan_code(plan: Plan) -> str:
    """The plan, each source in its colour."""
    if not plan:
        return '<code class="dl-plan">none</code>'
    parts = []
    for entry in plan:
        name = escape(entry.source)
        parts.append(f'<span class="dl-s" style="color:var(--source-{name}-text)">{escape(str(entry))}</span>')
    return f'<code class="dl-plan">{"<i>, </i>".join(parts)}</code>'


def footnote(layout: Layout, answer: Answer, model: str = "", more: str = "") -> str:
    """Under an answer: badge, plan, what it cost, how it ended; `more` is HTML put at its end."""
    kind, why = plan_badge(layout, answer.plan)
    facts = [milliseconds(answer.seconds)]
    if answer.vision_cached:
        facts.append("vision reused")
    if answer.stopped != "end":
        facts.append({"length": "cut at the token limit", "stopped": "stopped"}[answer.stopped])
    who = f"{escape(model)} " if model else ""
    note = f" {escape(why)}" if kind == "ablated" else ""
    return (
        f'<span class="dl-foot">{who}{badge(layout, answer.plan)}{plan_code(answer.plan)}'
        f"<span>{escape(' · '.join(facts))}{escape(' ·') if note else ''}{note}</span>{more}</span>"
    )


def milliseconds(seconds: float) -> str:
    """'38 ms', '1.9 s'."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def differing(a: str, b: str) -> str:
    """`b` with what `a` lacks marked, and what it dropped struck out."""
    out = []
    for kind, text in diff(a, b):
        tag = {DROPPED: "del", ADDED: "ins"}.get(kind)
        out.append(f"<{tag}>{_blank(text)}</{tag}>" if tag else _blank(text))
    return "".join(out)


def say(view: str, more: str = "") -> str:
    """The sentence of caution that belongs under a view."""
    return f'<p class="dl-say">{escape(caption(view))}{" " + escape(more) if more else ""}</p>'


def empty(title: str, text: str) -> str:
    """What a view shows while there is nothing to see."""
    return f'<div class="dl-empty"><b>{escape(title)}</b><p>{escape(text)}</p></div>'


def example_cards(examples: Sequence[Example]) -> str:
    """Examples as cards to click, in one row that scrolls."""
    cards = []
    for example in examples:
        alt = escape(example.caption)
        cards.append(
            f'<button type="button" class="dl-card" data-pick="{escape(example.file)}" title="{alt}">'
            f'<img alt="{alt}" src="{data_uri(example.held.image, 128, lossless=False)}">'
            f"<span>{escape(example.question)}</span></button>"
        )
    return f'<div class="dl-cards" role="group" aria-label="Examples">{"".join(cards)}</div>'


def data_uri(image: Image.Image, longest: int = 512, lossless: bool = True) -> str:
    """The image as a data URI, at most `longest` pixels a side; small ones without loss if so wished."""
    shown = image
    if max(image.size) > longest:
        shown = image.copy()
        shown.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if lossless and shown.width * shown.height <= 256 * 256:
        shown.save(buffer, "PNG")
        kind = "png"
    else:
        shown.save(buffer, "JPEG", quality=86)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
