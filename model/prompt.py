"""A prompt as the model will read it: token ids, where each image lies, and the text of every position.

Knows nothing about plans: the same prompt runs under any of them. Also the guard that keeps special tokens typed by a
user plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from model.clip import clip_of
from model.errors import UserError
from model.types import ImageGrid, Message

CUT = "\ue000"  # private use: marks, inside rendered text, a place that no token may span
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, eq=False)
class Prompt:
    """One conversation, tokenised. Image positions hold the placeholder id; a plan fills their rows."""

    input_ids: torch.Tensor  # int64 [1, T], on the CPU
    images: tuple[Image.Image, ...]  # RGB
    grids: tuple[ImageGrid, ...]
    extra: dict = field(default_factory=dict)  # position_ids, next_position, image_keys and what a family adds
    texts: tuple[str, ...] = ()  # [T] decoded text of each position, "" at image rows

    @property
    def visual_tokens(self) -> int:
        """Rows taken by images."""
        return sum(len(grid.positions) for grid in self.grids)

    def picture(self, at: int) -> Image.Image:
        """What lies under grid number `at`: its image, or the part of it that the grid's box names."""
        grid = self.grids[at]
        image = self.images[grid.index]
        if grid.box is None:
            return image
        left, top, right, bottom = (round(side) for side in grid.box)
        return image.crop((left, top, right, bottom))


def guard(texts: Sequence[str], special: Iterable[str], fold_case: bool = False) -> list[str]:
    """Cuts every special-token string after its first character with `CUT`, so that it stays plain text.

    `texts` are the text parts of one message: a string that only appears once they are joined is cut too. `CUT` in the
    input is removed first, so the result without `CUT` is the text. fold_case is for templates that change case.
    """
    texts = [text.replace(CUT, "") for text in texts]
    strings = sorted({string for string in special if len(string) > 1})
    if not strings:
        return texts
    # A lookahead finds overlapping occurrences as well.
    pattern = re.compile("(?=" + "|".join(map(re.escape, strings)) + ")", re.IGNORECASE if fold_case else 0)
    joined = "".join(texts)
    cuts = [match.start() + 1 for match in pattern.finditer(joined)]
    out, start = [], 0
    for text in texts:
        inside = [cut - start for cut in cuts if start <= cut < start + len(text)]
        pieces = [text[a:b] for a, b in zip([0, *inside], [*inside, len(text)], strict=True)]
        out.append(CUT.join(pieces))
        start += len(text)
    return out


def guarded_messages(
    messages: Sequence[Message], special: Iterable[str], fold_case: bool = False
) -> tuple[list[Message], list[Image.Image]]:
    """Messages in transformers' chat format with all text guarded, and their images (RGB) in order.

    Sheets of videos are among the images, and called videos in the messages.
    A `content` that is a string becomes one text part. UserError when nothing is asked, or a part is of unknown type.
    """
    special = tuple(special)
    out: list[Message] = []
    images: list[Image.Image] = []
    for message in messages:
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"A message's role is one of {', '.join(ROLES)}, not {role!r}.")
        content = message.get("content", "")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        texts = iter(guard([str(p.get("text", "")) for p in parts if p.get("type") == "text"], special, fold_case))
        clean: list[dict] = []
        for part in parts:
            if part.get("type") == "text":
                clean.append({"type": "text", "text": next(texts)})
            elif part.get("type") == "image" and isinstance(part.get("image"), Image.Image):
                image = part["image"]
                clean.append({"type": "image" if clip_of(image) is None else "video"})
                images.append(image if image.mode == "RGB" else image.convert("RGB"))
            else:
                raise UserError(f"A message part is a text or an image, not {part.get('type')!r}.")
        out.append({"role": role, "content": clean})
    last = out[-1] if out else {"role": "", "content": []}
    asked = any(part["type"] == "text" and part["text"].strip() for part in last["content"])
    if last["role"] != "user" or not asked:
        raise UserError("There is no question: write what you want to know about the image.")
    return out, images
