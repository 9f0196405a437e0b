"""Waiting for another thread in a test. Knows nothing about what runs in it."""

import threading


def wait_until(condition) -> None:
    """Returns once it is so; pytest's own limit ends a test in which it never is."""
    while not condition():
        threading.Event().wait(0.001)
