"""Handlers as gradio gets them: the desk bound, special arguments kept, errors told in one sentence."""

from __future__ import annotations

import inspect

import gradio as gr
import pytest
from gradio.helpers import special_args

from app.session import Session
from app.wiring import bound, introduced
from model.errors import UserError


def plain(desk, a: int, b: str = "x") -> str:
    """Says it."""
    return f"{desk}{a}{b}"


def stream(desk, a: int):
    yield desk, a
    raise UserError("no <b>")


def asks(desk, name: str, request: gr.Request, progress=gr.Progress()) -> tuple:  # noqa: B008
    return desk, name, request


def edits(desk, event: gr.EditData):
    return event


def test_the_desk_is_bound_and_the_rest_is_as_it_was():
    call = bound(plain, "D")
    assert call(1, "y") == "D1y"
    assert list(inspect.signature(call).parameters) == ["a", "b"]
    assert (call.__name__, call.__doc__) == ("plain", "Says it.")


def test_gradio_finds_request_progress_and_event_data():
    values, progress, event, _ = special_args(bound(asks, "D"), ["name"], request="the request")
    assert values[:2] == ["name", "the request"] and progress == 2 and event is None
    assert special_args(bound(edits, "D"), [])[2] == 0


def test_a_generator_stays_one_and_its_errors_are_told():
    call = bound(stream, "D")
    assert inspect.isgeneratorfunction(call)
    steps = call(1)
    assert next(steps) == ("D", 1)
    with pytest.raises(gr.Error, match="no &lt;b&gt;"):
        next(steps)


def test_other_errors_keep_their_insides_to_the_log(caplog):
    def broken(desk):
        raise RuntimeError("secret /path")

    with pytest.raises(gr.Error) as found:
        bound(broken, "D")()
    assert "secret" not in found.value.message and "RuntimeError" in found.value.message
    assert "secret /path" in caplog.text


def test_no_memory_outside_a_pass_is_a_sentence_too():
    with pytest.raises(gr.Error, match="not enough memory"):
        bound(lambda desk: bytearray(2**62), "D")()


def test_a_gradio_error_passes_as_it_is():
    def refuses(desk):
        raise gr.Error("mine")

    with pytest.raises(gr.Error, match="mine"):
        bound(refuses, "D")()


def test_only_a_client_without_an_id_is_given_one():
    known, kept = introduced(Session())
    assert known.visitor and kept is known
    known, kept = introduced(Session("me"))
    assert known == Session("me") and kept == gr.skip()
