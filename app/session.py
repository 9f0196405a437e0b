"""What one visitor has: a small frozen Session and Focus of ids, and the bounded store that the ids point into.

Session and Focus live in `gr.State`, one of each per visitor. Images, answers and traces live in the Store, which keeps
the newest up to a limit; an id is 128 random bits and never leaves the server. Knows nothing about gradio, figures or
how an answer is made.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.errors import UserError
from model.prompt import Prompt
from model.types import Answer, Message, Sampling

IMAGE_BYTES = 512 * 2**20  # pixels of all visitors' images held at once
RECORDS = 512  # answers of all visitors held at once, with their traces
RECORD_BYTES = 2 * 2**30  # of their images, and of what was computed from them
PATIENCE = 60.0  # seconds that `Store.alone` waits for an answer that was told to end: a long prompt's prefill


@dataclass(frozen=True)
class Turn:
    """One question of a conversation and the answer it got."""

    question: str
    images: tuple[str, ...] = ()  # ids of the images sent with this question
    record: str = ""  # id of the answer's Record, "" while there is none


def new_images(turns: Sequence[Turn]) -> list[tuple[str, ...]]:
    """Per turn the images that came with it: none where they are those of the turn before."""
    found, last = [], ()
    for turn in turns:
        found.append(turn.images if turn.images != last else ())
        last = turn.images or last
    return found


@dataclass(frozen=True)
class Session:
    """A visitor's conversation. Written by the chat's events only."""

    visitor: str = ""
    turns: tuple[Turn, ...] = ()
    cleared: int = 0  # how often it had been cleared when these turns began

    def known(self) -> Session:
        """Itself, with a visitor's id if it had none."""
        return self if self.visitor else replace(self, visitor=new_id())

    def answered(self, turn: Turn) -> Session:
        """With one more turn."""
        return replace(self, turns=(*self.turns, turn))

    def before(self, index: int) -> Session:
        """With the turns before this one only."""
        return replace(self, turns=self.turns[:index])


@dataclass(frozen=True)
class Focus:
    """What a visitor looks at now: the current image and question, the last answer and the one before it."""

    images: tuple[str, ...] = ()
    example: str = ""  # file name, when the image is one of the examples
    question: str = ""
    truth: str = ""  # the right answer, where it is known
    record: str = ""  # the last answer
    before: str = ""  # the answer before it, to the same question

    def on(self, record: str, question: str, images: tuple[str, ...], example: str, truth: str = "") -> Focus:
        """Turned to a new answer; the one before is kept when it answered the same question about the same image."""
        same = (question, images) == (self.question, self.images)
        return Focus(images, example, question, truth, record, self.record if same else "")


@dataclass(frozen=True)
class Held:
    """An image in the store."""

    image: Image.Image  # RGB
    name: str
    notes: tuple[str, ...] = ()  # what was converted when it was opened
    example: str = ""
    files: dict[str, Path] = field(default_factory=dict, compare=False)  # what has been written of it for the browser

    @property
    def bytes(self) -> int:
        """Size of its pixels."""
        return self.image.width * self.image.height * 3


@dataclass
class Record:
    """One answer with all that is needed to look into it or to ask again, and what has been computed from it."""

    answer: Answer
    prompt: Prompt
    messages: list[Message]
    question: str
    images: tuple[str, ...]
    sampling: Sampling
    memo: dict[Any, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    grown: Callable[[], None] = lambda: None  # told when the memo has become larger; the store's

    @property
    def bytes(self) -> int:
        """Size of its images' pixels and of the arrays in its memo."""
        parts = (part for message in self.messages for part in message["content"] if part["type"] == "image")
        pixels = sum(part["image"].width * part["image"].height * 3 for part in parts)
        return pixels + sum(_array_bytes(value) for value in list(self.memo.values()))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, made on the first call with this key and kept."""
        with self.lock:
            if key not in self.memo:
                self.memo[key] = make()
                self.grown()
            return self.memo[key]


def _array_bytes(value: Any) -> int:
    """Of all arrays in a value of dataclasses, dicts and sequences."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if is_dataclass(value):
        return sum(_array_bytes(getattr(value, each.name)) for each in fields(value))
    if isinstance(value, dict):
        return sum(map(_array_bytes, value.values()))
    return sum(map(_array_bytes, value)) if isinstance(value, list | tuple) else 0


class Store:
    """Images and records of all visitors, least recently used out first. Thread-safe."""

    def __init__(self, image_bytes: int = IMAGE_BYTES, records: int = RECORDS, record_bytes: int = RECORD_BYTES):
        self._image_bytes, self._max_records, self._record_bytes = image_bytes, records, record_bytes
        self._images: OrderedDict[str, tuple[str, Held]] = OrderedDict()  # id -> (visitor, image)
        self._records: OrderedDict[str, tuple[str, Record]] = OrderedDict()
        self._stops: dict[tuple[str, str], threading.Event] = {}  # (visitor, place) -> ends what runs there
        self._ends: dict[tuple[str, str], threading.Event] = {}  # (visitor, place) -> set when it has ended
        self._cleared: dict[str, int] = {}  # visitor -> how often the conversation has been cleared
        self._looks: dict[str, tuple[str, ...]] = {}  # visitor -> ids of the images looked at now
        self._turned: dict[str, str] = {}  # visitor -> id of the answer that the page was turned to last
        self._lock = threading.Lock()

    def hold(self, visitor: str, held: Held) -> str:
        """Keeps an image and returns its id."""
        key = new_id()
        with self._lock:
            self._images[key] = (visitor, held)
            total = sum(item.bytes for _, item in self._images.values())
            while total > self._image_bytes and len(self._images) > 1:
                total -= self._images.popitem(last=False)[1][1].bytes
        return key

    def image(self, key: str) -> Held:
        """The image of this id; UserError when it has been dropped."""
        with self._lock:
            if key not in self._images:
                raise UserError("This image is no longer held here; upload it again.")
            self._images.move_to_end(key)
            return self._images[key][1]

    def look(self, visitor: str, images: tuple[str, ...]) -> None:
        """What this visitor has just chosen to look at."""
        if visitor:
            with self._lock:
                self._looks[visitor] = images

    def looks(self, visitor: str, *images: tuple[str, ...]) -> bool:
        """Whether the visitor looks at one of these, as far as is known, and has not chosen others meanwhile."""
        with self._lock:
            return self._looks.get(visitor, images[0]) in images

    def turn(self, visitor: str, since: tuple[str, ...], images: tuple[str, ...], record: str) -> bool:
        """Turns to an answer and its images; False where others than those it began with have been chosen meanwhile:
        they stay."""
        with self._lock:
            if self._looks.get(visitor, since) not in (since, images):
                return False
            self._looks[visitor] = images
            self._turned[visitor] = record
            return True

    def turned(self, visitor: str, record: str) -> bool:
        """Whether this is the answer that the visitor's page was turned to last, as far as is known."""
        with self._lock:
            return self._turned.get(visitor, record) == record

    def keep(self, visitor: str, record: Record) -> str:
        """Keeps an answer and returns its id."""
        key = new_id()
        with self._lock:
            self._records[key] = (visitor, record)
        record.grown = self._trim
        self._trim()
        return key

    def _trim(self) -> None:
        """Lets the least recently used records go that are too many or too large; one is always held."""
        with self._lock:
            total = sum(record.bytes for _, record in self._records.values())
            while len(self._records) > 1 and (len(self._records) > self._max_records or total > self._record_bytes):
                total -= self._records.popitem(last=False)[1][1].bytes

    def record(self, key: str) -> Record | None:
        """The answer of this id, None when there is none or it has been dropped."""
        with self._lock:
            if key not in self._records:
                return None
            self._records.move_to_end(key)
            return self._records[key][1]

    @contextmanager
    def alone(self, visitor: str, place: str) -> Iterator[threading.Event]:
        """The event that ends the answer which starts now. What still runs for this visitor in this place is told to
        end, and has ended when this begins: a generator inside has handed on its last values by then, so that none of
        them can come after those of the next. What begins may have been overtaken while it waited (`newest`).
        """
        key, stop, ended = (visitor, place), threading.Event(), threading.Event()
        with self._lock:
            running, before = self._stops.get(key), self._ends.get(key)
            self._stops[key], self._ends[key] = stop, ended
        if running is not None:
            running.set()
        try:
            if before is not None:
                before.wait(PATIENCE)
            yield stop
        finally:
            ended.set()

    def clear(self, session: Session) -> Session:
        """An empty conversation; what belongs to the one before is no longer `current`."""
        with self._lock:
            count = self._cleared[session.visitor] = self._cleared.get(session.visitor, 0) + 1
        return replace(session, turns=(), cleared=count)

    def current(self, session: Session) -> Session:
        """Itself, or the empty conversation of now if it has been cleared since it was read."""
        with self._lock:
            count = self._cleared.get(session.visitor, 0)
        return session if session.cleared == count else replace(session, turns=(), cleared=count)

    def stop(self, visitor: str, place: str) -> None:
        """Ends what runs for this visitor in this place, within one token."""
        with self._lock:
            if (visitor, place) in self._stops:
                self._stops[visitor, place].set()

    def newest(self, visitor: str, place: str, event: threading.Event) -> bool:
        """Whether no later answer has started there since `alone` gave this event."""
        with self._lock:
            return self._stops.get((visitor, place)) is event

    def forget(self, session: Session) -> None:
        """Drops all that a visitor has; called when the session ends."""
        with self._lock:
            for items in (self._images, self._records):
                for key in [key for key, (visitor, _) in items.items() if visitor == session.visitor]:
                    del items[key]
            for key in [key for key in self._stops if key[0] == session.visitor]:
                self._stops.pop(key).set()
            for key in [key for key in self._ends if key[0] == session.visitor]:
                del self._ends[key]
            self._cleared.pop(session.visitor, None)
            self._looks.pop(session.visitor, None)
            self._turned.pop(session.visitor, None)

    def __len__(self) -> int:
        return len(self._images) + len(self._records)


def new_id() -> str:
    """128 random bits as text."""
    return secrets.token_urlsafe(16)
