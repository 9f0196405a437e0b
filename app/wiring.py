"""From a plain function to a gradio handler: its first argument bound, a user's mistake shown as one sentence.

A handler is a module-level function `handler(desk, *values)` of plain values, so that tests call it as it is. `bound`
gives gradio the same function without `desk`, and turns a UserError into the page's error message. Whatever else goes
wrong is logged in full and told to the visitor without its insides. Knows nothing about what the handlers do.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from html import escape
from typing import Any

import gradio as gr

from app import markup
from app.session import Session
from model.errors import UserError, is_out_of_memory

log = logging.getLogger("app.page")

# Every event that runs a model comes in at once and waits in the desk's own line, where it can be told its place.
MODEL = {"concurrency_id": "model", "concurrency_limit": None}
PULSE = 1.0  # seconds after which a request that waits looks whether its page is still open
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
        if is_out_of_memory(error):
            sentence = (
                "There was not enough memory for this. Use a smaller image, a shorter conversation or fewer plans."
            )
            raise gr.Error(sentence, duration=SECONDS, print_exception=False) from error
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
    if inspect.isgeneratorfunction(fn):

        def call(*args):
            with told():
                yield from fn(desk, *args)

    else:

        def call(*args):
            with told():
                return fn(desk, *args)

    return _signed(call, fn)


def in_turn(
    fn: Callable,
    desk: Any,
    outputs: Sequence[Any],
    line: gr.HTML,
    when: Callable[..., bool] | None = None,
    stops: str = "",
    boxes: tuple[Callable[[], Any], Callable[[], Any]] = (gr.skip, gr.skip),
) -> dict[str, Any]:
    """What an event that runs a model takes: `fn` bound and waiting in the desk's line, its outputs and `line` behind.

    While it waits, `line` says the place and nothing else changes; it is empty again before `fn` begins. `when(desk,
    *values)` says whether this request needs the model at all; else it does not wait. `stops`: the place of the page
    whose stop button ends it; then `boxes` make what the first output shows while it waits, and afterwards.
    """
    others = [gr.skip()] * (len(outputs) - 1)

    def call(*args):
        wanted = when is None or when(desk, *args)
        visitor = next((value.visitor for value in args if isinstance(value, Session)), "")
        who = (visitor, stops) if visitor and stops else None
        with told(), desk.line.enter(who) if wanted else nullcontext() as ticket:
            place = ticket.place if ticket else 0
            if place:
                waiting, idle = boxes
                while place:
                    yield waiting(), *others, markup.in_line(place, can_stop=who is not None)
                    place = ticket.wait(place, PULSE)
                yield idle(), *others, ""
            if ticket and not ticket.begin():
                return
            made = fn(desk, *args)
            if not inspect.isgenerator(made):
                yield *(made if len(outputs) > 1 else (made,)), gr.skip()
                return
            with closing(made):
                for values in made:
                    yield *values, gr.skip()

    return {"fn": _signed(call, fn), "outputs": [*outputs, line], **MODEL}


def end(desk: Any, session: Session, place: str) -> None:
    """Ends what runs for this visitor in this place of the page within one token, and what waits in line at once."""
    desk.line.give_up((session.visitor, place))
    desk.store.stop(session.visitor, place)


def line_of() -> gr.HTML:
    """Where a tab says how many are before its visitor."""
    return gr.HTML("", apply_default_css=False, elem_classes=["dl-waiting"])


def _signed(call: Callable, fn: Callable) -> Callable:
    """`call` under the name and with the arguments of `fn`, less the first."""
    signature = inspect.signature(fn)
    first, *rest = signature.parameters.values()
    functools.update_wrapper(call, fn)
    del call.__wrapped__  # gradio would look through it and count `desk` as an input
    hints = inspect.get_annotations(fn, eval_str=True)
    call.__annotations__ = {name: hint for name, hint in hints.items() if name not in (first.name, "return")}
    call.__signature__ = signature.replace(
        parameters=[p.replace(annotation=hints.get(p.name, p.annotation)) for p in rest],
        return_annotation=inspect.Signature.empty,
    )
    return call
