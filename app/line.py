"""The line before the models: a few requests run at once, the others wait in the order in which they came.

Gradio has a queue of its own, but shows places in it only where its progress bar is shown, and as "queue: 2/3". Here a
request knows its place and can say it. Knows nothing about gradio or models.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable

from model.errors import UserError

AT_ONCE = 16  # that run: they share the steps of their decoding, or take turns token by token where a model cannot
WAITING = 64  # that may wait; one more is told to try again


class Line:
    """First come, first served. Thread-safe."""

    def __init__(self, at_once: int = AT_ONCE, waiting: int = WAITING):
        self.at_once, self.waiting = at_once, waiting
        self._tickets: list[Ticket] = []  # those who run, then those who wait
        self._moved = threading.Condition()

    def enter(self, who: Hashable | None = None) -> Ticket:
        """A place at the end of the line; UserError when it is too long.

        `who` is one visitor in one place of the page: what waits for them leaves the line for the new request.
        """
        with self._moved:
            self._give_up(who)
            if len(self._tickets) >= self.at_once + self.waiting:
                raise UserError(f"{self.waiting} requests are waiting for the model already; try again in a while.")
            ticket = Ticket(self, who)
            self._tickets.append(ticket)
            return ticket

    def give_up(self, who: Hashable) -> None:
        """Takes out of the line what waits for them; what runs is not touched."""
        with self._moved:
            self._give_up(who)

    def _give_up(self, who: Hashable | None) -> None:
        for ticket in [each for each in self._tickets if who is not None and each.who == who and not each.begun]:
            ticket._go()

    def __len__(self) -> int:
        """How many run or wait."""
        return len(self._tickets)


class Ticket:
    """One request's place; to be left, however the request ends."""

    def __init__(self, line: Line, who: Hashable | None = None):
        self._line, self.who = line, who
        self.begun = False
        self.gone = False

    @property
    def place(self) -> int:
        """0 when its turn has come or it has gone, else how many turns have to come before: 1 is the next."""
        return 0 if self.gone else max(0, self._line._tickets.index(self) - self._line.at_once + 1)

    def wait(self, place: int, seconds: float) -> int:
        """Its place as soon as that is another than `place`, or after some seconds."""
        with self._line._moved:
            self._line._moved.wait_for(lambda: self.place != place, seconds)
            return self.place

    def begin(self) -> bool:
        """Whether it may run, its turn having come; False where it was given up while it waited."""
        with self._line._moved:
            self.begun = not self.gone
            return self.begun

    def leave(self) -> None:
        """Everybody behind moves up."""
        with self._line._moved:
            self._go()

    def _go(self) -> None:
        if not self.gone:
            self.gone = True
            self._line._tickets.remove(self)
            self._line._moved.notify_all()

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *error) -> None:
        self.leave()


def in_words(place: int) -> str:
    """1 -> '1st in line', 12 -> '12th in line'."""
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending} in line"
