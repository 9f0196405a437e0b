"""From what a visitor typed to an answer: one way for chat, compare and the stacks tab.

`prepare` checks everything and raises a UserError before anything has changed; `stream` makes the answer; `keep` puts
it into the store. Knows nothing about components or how an answer is shown.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from app.desk import Desk
from app.session import Focus, Record, Session, Turn, new_images
from app.url import Place, encode
from model.engine import Engine
from model.errors import UserError
from model.images import check_prompt, check_question
from model.loading import EMBEDDED
from model.need import of_answer
from model.plan import Plan
from model.prompt import Prompt
from model.types import Answer, Message, Sampling

PACE = 0.08  # seconds between two states of a streamed answer that are shown


@dataclass(frozen=True)
class Asked:
    """A question that can be answered: everything about it has been checked."""

    engine: Engine
    plan: Plan
    prompt: Prompt
    messages: list[Message]
    question: str
    images: tuple[str, ...]
    sampling: Sampling

    def under(self, plan: Plan) -> Asked:
        """The same question under another plan of the same model."""
        return replace(self, plan=plan)


def remembers(engine: Engine) -> bool:
    """Whether earlier turns are sent along by default: not to the embedded models, which learned single questions."""
    return not engine.name.startswith(f"{EMBEDDED}/")


def sampling(
    desk: Desk, max_new_tokens: float, temperature: float, top_p: float, top_k: float, seed: float
) -> Sampling:
    """The settings as numbers from the page; UserError when they are not possible or over the limits."""
    try:
        tokens, k, start = int(max_new_tokens), int(top_k), int(seed)
        heat, p = float(temperature), float(top_p)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError("A sampling setting is empty or not a number; each needs one.") from error
    if tokens > desk.limits.max_answer_tokens:
        raise UserError(
            f"{tokens:,} tokens were asked for; at most {desk.limits.max_answer_tokens:,} are made (max_answer_tokens)."
        )
    return Sampling(tokens, heat, p, k, start)


def user_message(desk: Desk, images: Sequence[str], question: str) -> Message:
    """One user message of images and text."""
    content = [{"type": "image", "image": desk.held(key).image} for key in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


def prepare(
    desk: Desk,
    *,
    model: str | None,
    plan: str | None,
    question: str,
    images: Sequence[str],
    settings: Sampling | None = None,
    turns: Sequence[Turn] = (),
    progress: Callable[[float, str], None] | None = None,
) -> Asked:
    """Checks question, images, model, plan and lengths. `turns`: earlier ones to send along."""
    question = check_question(question, desk.limits)
    engine = desk.engine(model, progress)
    chosen = desk.plan(plan, engine)
    messages: list[Message] = []
    for turn, new in zip(turns, new_images(turns), strict=True):
        record = desk.store.record(turn.record)
        if record is not None:
            messages.append(user_message(desk, new, turn.question))
            messages.append({"role": "assistant", "content": [{"type": "text", "text": record.answer.text}]})
    messages.append(user_message(desk, images, question))
    count = sum(part["type"] == "image" for message in messages for part in message["content"])
    if count > desk.limits.max_images:
        raise UserError(f"{count} images were sent; at most {desk.limits.max_images} are taken (max_images).")
    if not count and engine.name.startswith(f"{EMBEDDED}/"):
        raise UserError("There is no image yet: upload one, paste one, or pick an example.")
    return _checked(
        desk, Asked(engine, chosen, engine.prompt(messages), messages, question, tuple(images), settings or Sampling())
    )


def again(
    desk: Desk, record: Record, *, model: str | None, plan: str | None, settings: Sampling | None = None
) -> Asked:
    """The question of a record once more, with the same messages, under another model or plan."""
    engine = desk.engine(model)
    chosen = desk.plan(plan, engine)
    prompt = record.prompt if engine.name == record.answer.model else engine.prompt(record.messages)
    settings = settings or record.sampling
    return _checked(desk, Asked(engine, chosen, prompt, record.messages, record.question, record.images, settings))


def _checked(desk: Desk, asked: Asked) -> Asked:
    """Itself; UserError where it is too long, or needs more memory than it may take or there is."""
    check_prompt(asked.prompt.input_ids.shape[1], desk.limits)
    of_answer(asked.engine, asked.prompt, [asked.plan], asked.sampling.max_new_tokens).check(asked.engine)
    return asked


def stream(asked: Asked, stop: threading.Event | None = None) -> Iterator[tuple[Answer, bool]]:
    """(the answer so far, False) at most every `PACE` seconds, and (the whole answer, True) at the end."""
    with asked.engine.stream(asked.prompt, asked.plan, asked.sampling, stop) as tokens:
        shown = time.monotonic()
        for _ in tokens:
            if not tokens.done and time.monotonic() - shown >= PACE:
                shown = time.monotonic()
                yield tokens.answer, False
        yield tokens.answer, True


def keep(desk: Desk, session: Session, asked: Asked, answer: Answer) -> str:
    """Puts an answer into the store; returns its id."""
    return desk.store.keep(
        session.visitor, Record(answer, asked.prompt, asked.messages, asked.question, asked.images, asked.sampling)
    )


def example_of(desk: Desk, images: Sequence[str]) -> str:
    """The example's file name when the only image is one, else ""."""
    return images[0] if len(images) == 1 and images[0] in desk.examples else ""


def truth_of(desk: Desk, example: str, question: str) -> str:
    """An example's right answer, to its own question; "" to any other."""
    known = desk.examples.get(example)
    return known.answer if known and question.strip().lower() == known.question.lower() else ""


def refocused(desk: Desk, focus: Focus, record: str, asked: Asked) -> Focus:
    """The focus on a new answer. The images stay where the answer is one of a conversation about them."""
    images = asked.images or focus.images
    example = example_of(desk, images)
    return focus.on(record, asked.question, images, example, truth_of(desk, example, asked.question))


def turned(desk: Desk, session: Session, since: Focus, focus: Focus) -> bool:
    """Whether the page may turn to the focus of an answer that was begun with the focus `since`: not where its visitor
    has chosen another image while it was made."""
    return desk.store.turn(session.visitor, since.images, focus.images, focus.record)


def address(desk: Desk, engine: Engine, plan: Plan, focus: Focus) -> str:
    """The query string of what is in focus under this plan."""
    return encode(
        Place(
            model="" if engine.name == desk.zoo.default else engine.name,
            plan="" if plan == engine.layout.default else str(plan),
            example=focus.example,
            question=focus.question,
        )
    )
