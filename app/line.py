"""The line before the models: a few requests run at once, the others wait in the order in which they came.

Gradio has a queue of its own, but shows places in it only where its progress bar is shown, and as "queue: 2/3". Here a
request knows its place and can say it. Knows nothing about gradio or models.
"""

from __future__ import annotations

import threading

from model.errors import UserError

AT_ONCE = 4  # that run: the engine lets one pass at a time onto the device, so they take turns token by token
WAITING = 64  # that may wait; one more is told to try again


class Line:
    """First come, first served. Thread-safe."""

    def __init__(self, at_once: int = AT_ONCE, waiting: int = WAITING):
        self.at_once, self.waiting = at_once, waiting
        self._tickets: list[Ticket] = []  # those who run, then those who wait
        self._moved = threading.Condition()

    def enter(self) -> Ticket:
        """A place at the end of the line; UserError when it is too long."""
        with self._moved:
            if len(self._tickets) >= self.at_once + self.waiting:
                raise UserError(f"{self.waiting} requests are waiting for the model already; try again in a while.")
            ticket = Ticket(self)
            self._tickets.append(ticket)
            return ticket

    def __len__(self) -> int:
        """How many run or wait."""
        return len(self._tickets)


class Ticket:
    """One request's place; to be left, however the request ends."""

    def __init__(self, line: Line):
        self._line = line

    @property
    def place(self) -> int:
        """0 when its turn has come, else how many turns have to come before: 1 is the next."""
        return max(0, self._line._tickets.index(self) - self._line.at_once + 1)

    def wait(self, place: int, seconds: float) -> int:
        """Its place as soon as that is another than `place`, or after some seconds."""
        with self._line._moved:
            self._line._moved.wait_for(lambda: self.place != place, seconds)
            return self.place

    def leave(self) -> None:
        """Everybody behind moves up."""
        with self._line._moved:
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
