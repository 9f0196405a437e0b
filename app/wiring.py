"""From a plain function to a gradio handler: its first argument bound, a user's mistake shown as one sentence.

A handler is a module-level function `handler(desk, *values)` of plain values, so that tests call it as it is. `bound`
gives gradio the same function without `desk`, and turns a UserError into the page's error message. Whatever else goes
wrong is logged in full and told to the visitor without its insides. Knows nothing about what the handlers do.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr

from app.session import Session
from model.errors import UserError

log = logging.getLogger("app.page")

# Every event that runs a model. The engine lets one pass at a time onto the device; between two tokens another
# visitor's pass may run, so a switch of a stack need not wait for the end of somebody's long answer.
MODEL = {"concurrency_id": "model", "concurrency_limit": 4}
SECONDS = 20  # that an error message stays


@contextmanager
def told() -> Iterator[None]:
    """Errors as the page shows them: the sentence of a UserError, or a general one for a fault of ours."""
    try:
        yield
    except gr.Error:
        raise
    except UserError as error:
        raise gr.Error(escape(str(error), quote=False), duration=SECONDS, print_exception=False) from error
    except Exception as error:
        log.exception("a handler failed")
        raise gr.Error(
            f"This went wrong inside the app ({type(error).__name__}); nothing you entered is lost. The log has more.",
            duration=SECONDS,
            print_exception=False,
        ) from error


def introduced(session: Session) -> tuple[Session, Any]:
    """(the session with a visitor's id, what an event gives back for it).

    Only the chat's events write the conversation. All others leave it alone, so that two events that end at once cannot
    undo one another; they only hand out the id that a client without a page (the API) starts without.
    """
    known = session.known()
    return known, gr.skip() if session.visitor else known


def bound(fn: Callable, desk: Any) -> Callable:
    """`fn` without its first argument, as gradio wants it: names, annotations and defaults kept, errors told."""
    signature = inspect.signature(fn)
    first, *rest = signature.parameters.values()

    if inspect.isgeneratorfunction(fn):

        @functools.wraps(fn)
        def call(*args):
            with told():
                yield from fn(desk, *args)

    else:

        @functools.wraps(fn)
        def call(*args):
            with told():
                return fn(desk, *args)

    del call.__wrapped__  # gradio would look through it and count `desk` as an input
    hints = inspect.get_annotations(fn, eval_str=True)
    call.__annotations__ = {name: hint for name, hint in hints.items() if name not in (first.name, "return")}
    call.__signature__ = signature.replace(
        parameters=[p.replace(annotation=hints.get(p.name, p.annotation)) for p in rest],
        return_annotation=inspect.Signature.empty,
    )
    return call
