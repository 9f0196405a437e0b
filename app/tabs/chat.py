"""Chat: questions about an image, answered while one watches, with the plan and the words' probabilities.

Handlers first, layout below. The conversation is the Session; the chatbot only shows it.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gradio as gr
from gradio import processing_utils
from gradio.utils import get_upload_folder

from app import asking, markup
from app.asking import Asked
from app.desk import Desk
from app.picture import sees, views_value
from app.session import Focus, Held, Session, Turn, new_images
from app.wiring import MODEL, bound, end, in_turn, line_of
from model.errors import UserError
from model.images import read_image
from model.types import Answer

LONGEST = 128  # tokens of an answer, unless a visitor says otherwise
ASK_FOR_IMAGE = "Ask about the image, or drop, paste or upload one"


# ---- handlers: plain values in, plain values out


def ask(
    desk: Desk,
    message: dict | None,
    model: str,
    plan: str,
    max_new_tokens: float,
    temperature: float,
    top_p: float,
    top_k: float,
    seed: float,
    remember: bool,
    session: Session,
    focus: Focus,
    progress=gr.Progress(),  # noqa: B008
) -> Iterator[tuple]:
    """Answers what is in the message box. Yields (box, chat, session, focus, views, note)."""
    session = desk.store.current(session.known())
    settings = asking.sampling(desk, max_new_tokens, temperature, top_p, top_k, seed)
    message = message or {}
    images = [hold(desk, session, path) for path in message.get("files") or ()]
    images = images or list(focus.images)
    turns = session.turns if remember else ()
    if images == next((list(turn.images) for turn in reversed(turns) if turn.images), None):
        images = []  # already in the conversation
    asked = asking.prepare(
        desk,
        model=model,
        plan=plan,
        question=message.get("text") or "",
        images=images,
        settings=settings,
        turns=turns,
        progress=progress,
    )
    yield from _answer(desk, asked, session, focus)


def ask_example(
    desk: Desk,
    name: str,
    model: str,
    plan: str,
    max_new_tokens: float,
    temperature: float,
    top_p: float,
    top_k: float,
    seed: float,
    session: Session,
    focus: Focus,
    progress=gr.Progress(),  # noqa: B008
) -> Iterator[tuple]:
    """Asks an example's own question about it. Yields what `ask` yields."""
    session = desk.store.current(session.known())
    example = desk.example(name)
    settings = asking.sampling(desk, max_new_tokens, temperature, top_p, top_k, seed)
    asked = asking.prepare(
        desk,
        model=model,
        plan=plan,
        question=example.question,
        images=[name],
        settings=settings,
        progress=progress,
    )
    yield from _answer(desk, asked, session, focus)


def resume(
    desk: Desk,
    model: str,
    plan: str,
    max_new_tokens: float,
    temperature: float,
    top_p: float,
    top_k: float,
    seed: float,
    session: Session,
    focus: Focus,
) -> Iterator[tuple]:
    """Asks what the address asked, once the page is there. Yields what `ask` yields, or nothing."""
    if asked_before(desk, focus):
        session = desk.store.current(session.known())
        settings = asking.sampling(desk, max_new_tokens, temperature, top_p, top_k, seed)
        asked = asking.prepare(
            desk, model=model, plan=plan, question=focus.question, images=focus.images, settings=settings
        )
        yield from _answer(desk, asked, session, focus)
    else:
        yield (gr.skip(),) * 6


def asked_before(desk: Desk, *values) -> bool:
    """Whether the address asked something; the last of an event's values is the focus."""
    return bool(values[-1].question and values[-1].images)


def retry(
    desk: Desk,
    model: str,
    plan: str,
    max_new_tokens: float,
    temperature: float,
    top_p: float,
    top_k: float,
    seed: float,
    remember: bool,
    session: Session,
    focus: Focus,
    event: gr.RetryData,
) -> Iterator[tuple]:
    """Asks one question of the conversation again, under the plan of now; later turns go. Yields what `ask` yields."""
    session = desk.store.current(session)
    settings = asking.sampling(desk, max_new_tokens, temperature, top_p, top_k, seed)
    index = turn_of(session, event.index)
    yield from _ask_turn(desk, session, focus, index, session.turns[index].question, model, plan, settings, remember)


def edit(
    desk: Desk,
    model: str,
    plan: str,
    max_new_tokens: float,
    temperature: float,
    top_p: float,
    top_k: float,
    seed: float,
    remember: bool,
    session: Session,
    focus: Focus,
    event: gr.EditData,
) -> Iterator[tuple]:
    """Asks an edited question in the place of the old one; later turns go. Yields what `ask` yields."""
    session = desk.store.current(session)
    settings = asking.sampling(desk, max_new_tokens, temperature, top_p, top_k, seed)
    index = turn_of(session, event.index)
    yield from _ask_turn(desk, session, focus, index, str(event.value), model, plan, settings, remember)


def clear(desk: Desk, session: Session) -> Iterator[tuple]:
    """An empty conversation; an answer that runs or waits is given up, and shows nothing after this. The image, the
    plan and the last answer stay in focus. Yields (chat, session, box)."""
    session = desk.store.clear(session.known())
    end(desk, session, "chat")
    with desk.store.alone(session.visitor, "chat"):
        yield [], session, idle_box()


def settled(desk: Desk, session: Session) -> tuple:
    """What a conversation that has been cleared shows, once the browser has drawn all of an answer; else nothing new.

    Gradio's page draws the states of one event in their order, but those of two events as it comes to them: an answer's
    last state may be drawn after what `clear` showed. Returns (chat, box)."""
    return (gr.skip(), gr.skip()) if session.turns else ([], idle_box())


def stop(desk: Desk, session: Session) -> None:
    """Ends this visitor's running answer within one token, a waiting question at once; what has been said stays."""
    end(desk, session, "chat")


def hold(desk: Desk, session: Session, path: str | Path) -> str:
    """Opens an uploaded file and keeps it; returns its id. UserError for what is not a picture within the limits."""
    image, notes = read_image(path, desk.limits)
    return desk.store.hold(session.visitor, Held(image, Path(path).name, notes))


def _ask_turn(desk, session, focus, index, question, model, plan, settings, remember) -> Iterator[tuple]:
    turn = session.turns[index]
    images = turn.images or focus.images
    turns = session.turns[:index] if remember else ()
    asked = asking.prepare(
        desk, model=model, plan=plan, question=question, images=images, settings=settings, turns=turns
    )
    yield from _answer(desk, asked, session.before(index), focus)


def _answer(desk: Desk, asked: Asked, session: Session, focus: Focus) -> Iterator[tuple]:
    """Streams the answer into the chat. The box is emptied when nothing can be refused any more."""
    with desk.store.alone(session.visitor, "chat") as stopper:
        if _overtaken(desk, session, stopper):
            yield (gr.skip(),) * 6
            return
        shown = asked.images or focus.images
        held = desk.held(shown[0]) if shown else None
        here = desk.store.looks(session.visitor, focus.images, shown)  # else another was chosen while this waited
        turn = Turn(asked.question, asked.images)
        now = session.answered(turn)
        yield (
            busy_box(value={"text": "", "files": []}),
            bubbles(desk, now, "…"),
            now,
            gr.skip(),
            views_value(asked.engine, held) if here else gr.skip(),
            sees(held) if here else gr.skip(),
        )
        try:
            for answer, done in asking.stream(asked, stopper):
                if _overtaken(desk, session, stopper):
                    yield (gr.skip(),) * 6
                    return
                if not done:
                    yield gr.skip(), bubbles(desk, now, markup.word_spans(answer.tokens)), *[gr.skip()] * 4
        except Exception:
            yield idle_box(), bubbles(desk, now), *[gr.skip()] * 4
            raise
        record = asking.keep(desk, session, asked, answer)
        found = asking.refocused(desk, focus, record, asked)
        session = session.answered(replace(turn, record=record))
        yield (
            idle_box(),
            bubbles(desk, session),
            session,
            found if asking.turned(desk, session, focus, found) else gr.skip(),
            gr.skip(),
            gr.skip(),
        )


def _overtaken(desk: Desk, session: Session, stopper: threading.Event) -> bool:
    """Whether a later question has taken over, or the conversation has been cleared."""
    newest = desk.store.newest(session.visitor, "chat", stopper)
    return not newest or desk.store.current(session) is not session


def busy_box(**more) -> gr.MultimodalTextbox:
    """The message box while something runs or waits: a button to stop, none to send."""
    return gr.MultimodalTextbox(submit_btn=False, stop_btn=True, **more)


def idle_box() -> gr.MultimodalTextbox:
    """The message box while nothing runs: a button to send, none to stop."""
    return gr.MultimodalTextbox(submit_btn=True, stop_btn=False)


# ---- what the chatbot shows


def bubbles(desk: Desk, session: Session, running: str = "") -> list[dict]:
    """The conversation as chat messages; `running` is the HTML of the answer that is being made."""
    messages: list[dict] = []
    for turn, images in zip(session.turns, new_images(session.turns), strict=True):
        for key in images:
            messages.append({"role": "user", "content": _picture(desk, key)})
        messages.append({"role": "user", "content": turn.question})
        record = desk.store.record(turn.record)
        if record is not None:
            messages.append({"role": "assistant", "content": _said(desk, record.answer)})
        elif turn.record:
            messages.append({"role": "assistant", "content": "<i>This answer is no longer held; ask again.</i>"})
    if running:
        messages.append({"role": "assistant", "content": running})
    return messages


def turn_of(session: Session, index: int | Sequence[int]) -> int:
    """Which turn a chat message belongs to; UserError for one that is not there."""
    at = index if isinstance(index, int) else index[0]
    start = 0
    for number, (turn, images) in enumerate(zip(session.turns, new_images(session.turns), strict=True)):
        start += len(images) + 1 + bool(turn.record)
        if at < start:
            return number
    raise UserError("This message is no longer part of the conversation; ask the question again.")


def _picture(desk: Desk, key: str) -> dict | str:
    """An image as a file for the chat; its markup would be text that an edit shows."""
    try:
        held = desk.held(key)
    except UserError:
        return "(an image that is no longer held)"
    path = held.files.get("chat")
    if path is None or not path.exists():
        small = held.image.copy()
        small.thumbnail((320, 320))
        buffer = io.BytesIO()
        small.save(buffer, "PNG")
        name = f"{Path(held.name).stem[:60]}.png"
        path = Path(processing_utils.save_bytes_to_cache(buffer.getvalue(), name, cache_dir=get_upload_folder()))
        held.files["chat"] = path
    return {"path": str(path), "alt_text": "; ".join((held.name, *held.notes))}


def _said(desk: Desk, answer: Answer) -> str:
    words = markup.word_spans(answer.tokens) if answer.tokens else "<i>(the model ended at once, without a word)</i>"
    layout = desk.engine(answer.model).layout
    copy = '<button type="button" class="dl-copy">copy</button>'
    return f'<span class="dl-answer">{words}</span>{markup.footnote(layout, answer, more=copy)}'


# ---- layout and wiring


@dataclass(frozen=True)
class Chat:
    """The components that other parts of the page need."""

    box: gr.MultimodalTextbox
    remember: gr.Checkbox
    settings: list  # sampling, in the order of `asking.sampling`
    resume: dict  # how to ask what the address asked
    settle: dict  # what comes after every event that answers


def build(desk: Desk, *, model, plan, session, focus, views, note, linked, examples, picked) -> Chat:
    """Draws the tab and wires it. The arguments are the page's own components; `linked`: how the address follows."""
    chat = gr.Chatbot(
        elem_id="dl-chat",
        show_label=False,
        height="clamp(260px, 50vh, 720px)",
        buttons=[],
        editable="user",
        feedback_options=None,
        layout="bubble",
        group_consecutive_messages=False,
        placeholder="**Ask about an image.** Pick an example below, or add your own image and a question.",
        allow_tags=False,
    )
    line = line_of()
    box = gr.MultimodalTextbox(
        elem_id="dl-box",
        show_label=False,
        placeholder=ASK_FOR_IMAGE,
        file_types=["image", "video"],
        file_count="multiple",
        sources=["upload"],
        submit_btn=True,
        stop_btn=False,
        max_plain_text_length=desk.limits.max_text_chars,
        html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
    )
    cards = examples()
    most = desk.limits.max_answer_tokens
    with gr.Accordion("Sampling and memory", open=False, elem_id="dl-sampling"):
        with gr.Row():
            temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0 is greedy")
            top_p = gr.Slider(0.05, 1, value=1, step=0.01, label="Top-p", info="1 is off")
            top_k = gr.Slider(0, 100, value=0, step=1, label="Top-k", info="0 is off")
        with gr.Row():
            tokens = gr.Slider(1, most, value=min(LONGEST, most), step=1, label="Longest answer", info="tokens")
            seed = gr.Number(value=0, precision=0, label="Seed", info="of sampling; the same seed, the same answer")
            remember = gr.Checkbox(
                value=False, label="Send earlier turns along", info="The embedded models learned single questions"
            )
    settings = [tokens, temperature, top_p, top_k, seed]
    shown = [box, chat, session, focus, views, note]

    def turn(fn, name: str, when=None) -> dict:
        return {
            **in_turn(fn, desk, shown, line, when, "chat", (busy_box, idle_box)),
            "api_name": name,
            "show_progress": "hidden",
        }

    inputs = [model, plan, *settings, remember, session, focus]
    events = [
        box.submit(inputs=[box, *inputs], **turn(ask, "ask")),
        cards.pick(
            inputs=[picked, model, plan, *settings, session, focus], js="(name, ...rest) => [lens.picked, ...rest]",
            trigger_mode="multiple", **turn(ask_example, "ask_example"),  # another example ends the answer before it
        ),
        chat.retry(inputs=inputs, **turn(retry, "retry")),
        chat.edit(inputs=inputs, **turn(edit, "edit")),
    ]  # fmt: skip
    settle = {
        "fn": bound(settled, desk), "inputs": [session], "outputs": [chat, box], "show_progress": "hidden",
        "queue": False,
    }  # fmt: skip
    for event, name in zip(events, ("ask", "ask_example", "retry", "edit"), strict=True):
        event.success(**linked, api_name=f"{name}_address")
        event.then(**settle, api_name=f"{name}_settled")
    chat.clear(
        bound(clear, desk), [session], [chat, session, box], api_name="clear", show_progress="hidden",
        trigger_mode="multiple", **MODEL,  # in the order in which it and the questions came
    )  # fmt: skip
    box.stop(bound(stop, desk), [session], None, api_name="stop", queue=False)
    again = {"inputs": [model, plan, *settings, session, focus], **turn(resume, "resume", asked_before)}
    return Chat(box, remember, settings, again, settle)
