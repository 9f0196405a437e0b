"""A lock that is given in the order in which it was asked for.

Python's own locks may be taken again at once by the thread that has just let go, so that a long answer could keep the
device from all others. Knows nothing about models.
"""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """First come, first served; the thread that holds it may take it again (as an RLock)."""

    def __init__(self):
        self._guard = threading.Lock()  # of the three below, held for a moment only
        self._owner: int | None = None  # thread id
        self._depth = 0
        self._waiting: deque[tuple[int, threading.Lock]] = deque()  # thread id, a locked lock that opens when it is due

    def __len__(self) -> int:
        """How many threads wait."""
        return len(self._waiting)

    def acquire(self, blocking: bool = True) -> bool:
        """True once it is held; without `blocking` False where that would mean to wait."""
        me = threading.get_ident()
        with self._guard:
            if self._owner in (None, me):
                self._owner, self._depth = me, self._depth + 1
                return True
            if not blocking:
                return False
            turn = (me, threading.Lock())
            turn[1].acquire()
            self._waiting.append(turn)
        try:
            turn[1].acquire()  # whoever lets go hands over: owner and depth are set already
        except BaseException:  # Ctrl-C in the main thread
            with self._guard:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                    raise
            self.release()
            raise
        return True

    def release(self) -> None:
        """Lets go; the thread that has waited longest holds it at once."""
        with self._guard:
            if self._owner != threading.get_ident():
                raise RuntimeError("this thread does not hold the lock")
            self._depth -= 1
            if self._depth:
                return
            self._owner = None
            if self._waiting:
                self._owner, due = self._waiting.popleft()
                self._depth = 1
                due.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error) -> None:
        self.release()
