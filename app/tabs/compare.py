"""Compare: two or three columns, each a model under a plan, on one image and question; where and how they differ.

Handlers first, layout below. All columns stream in one run; what follows from the answers (differences, error rate, the
truth's probability, the first token on which two part) comes when all have ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from itertools import combinations

import gradio as gr

from analysis import compare as measure
from analysis.captions import caption
from app import asking, charts, markup
from app.asking import PACE, Asked
from app.desk import Desk
from app.session import Focus, Session
from app.wiring import bound, end, in_turn, introduced, line_of
from model.errors import UserError
from model.loading import LAB
from model.types import Answer

COLUMNS = 3
EMPTY = markup.empty(
    "Side by side", "Choose a model and a plan per column, then run the comparison. An empty plan means: as trained."
)
# Which caution belongs to a pair of embedded checkpoints under their own plans: names without "embedded/", sorted.
PAIRS = {
    ("hires", "hires-single"): "hires_vs_single",
    ("hires", "hires-concat"): "hires_vs_concat",
    ("taps", "taps-single"): "taps_vs_single",
}


# ---- handlers: plain values in, plain values out


def run(
    desk: Desk,
    question: str,
    truth: str,
    columns: float,
    model_0: str,
    plan_0: str,
    model_1: str,
    plan_1: str,
    model_2: str,
    plan_2: str,
    max_new_tokens: float,
    temperature: float,
    top_p: float,
    top_k: float,
    seed: float,
    session: Session,
    focus: Focus,
    progress=gr.Progress(),  # noqa: B008
) -> Iterator[tuple]:
    """Answers the question in every column at once. Yields (session, column 0, column 1, column 2, pairs)."""
    new, kept = introduced(session)
    settings = asking.sampling(desk, max_new_tokens, temperature, top_p, top_k, seed)
    chosen = [(model_0, plan_0), (model_1, plan_1), (model_2, plan_2)][: _count(columns)]
    asked = []
    for number, (model, plan) in enumerate(chosen):
        try:
            one = asking.prepare(
                desk,
                model=model,
                plan=plan.strip() or None,
                question=question,
                images=focus.images,
                settings=settings,
                progress=progress,
            )
        except UserError as error:
            raise UserError(f"Column {number + 1}: {error}" if plan.strip() else str(error)) from error
        asked.append(one)
    unused = [""] * (COLUMNS - len(asked))
    with desk.store.alone(new.visitor, "compare") as stopper:
        for answers in together(asked, stopper):
            yield kept, *(running(a, answer) for a, answer in zip(asked, answers, strict=True)), *unused, ""
            if not desk.store.newest(new.visitor, "compare", stopper):  # a later question has taken over
                return
        truth = truth.strip()
        rows = measured(asked, answers, truth)
        shown = [column(a, answer, row, truth) for a, answer, row in zip(asked, answers, rows, strict=True)]
        yield kept, *shown, *unused, pairs(asked, answers)


def opened(desk: Desk, question: str, truth: str, filled: tuple, focus: Focus) -> tuple:
    """The current question, if it is new, and the truth, if question or image are: what is true of one image is not of
    another. `filled`: question and images of the last time. Returns (question, truth, filled, image)."""
    now = (focus.question, focus.images)
    if filled != now:
        question, truth = question if filled[0] == focus.question else focus.question, focus.truth
    return question, truth, now, thumbnail(desk, focus)


def show_columns(columns: float) -> tuple:
    """The third column's box and answer, shown or not."""
    three = _count(columns) == COLUMNS
    return gr.Column(visible=three), gr.HTML(visible=three)


def stop(desk: Desk, session: Session) -> None:
    """Ends the running answers within one token; a question in line leaves it."""
    end(desk, session, "compare")


def together(asked: Sequence[Asked], stopper: threading.Event) -> Iterator[list[Answer]]:
    """All answers as they grow, one token of each in turn; complete at the end."""
    streams = [each.engine.stream(each.prompt, each.plan, each.sampling, stopper) for each in asked]
    try:
        shown = time.monotonic()
        while not all(stream.done for stream in streams):
            for stream in streams:
                if not stream.done:
                    next(stream, None)
            if time.monotonic() - shown >= PACE:
                shown = time.monotonic()
                yield [stream.answer for stream in streams]
        yield [stream.answer for stream in streams]
    finally:
        for stream in streams:
            stream.close()


def measured(asked: Sequence[Asked], answers: Sequence[Answer], truth: str) -> list[dict]:
    """One row of numbers per column; the truth's are None without a truth."""
    scores = [each.engine.score(each.prompt, each.plan, truth) if truth else None for each in asked]
    labels = [str(number + 1) for number in range(len(asked))]
    return measure.rows(answers, labels, truth or None, scores)


def default_columns(desk: Desk) -> list[tuple[str, str]]:
    """(model, plan) per column: the default model, its trained single-injection twin, and itself ablated to base@0."""
    first = desk.zoo.default
    twin = f"{first}-single"
    alone = (first, "base@0")
    second = (twin, "") if twin in desk.zoo.offered else (first, "none")
    return [(first, ""), second, alone]


def _count(columns: float) -> int:
    try:
        return min(COLUMNS, max(2, int(columns)))
    except (TypeError, ValueError) as error:
        raise UserError("The number of columns is 2 or 3.") from error


# ---- what the tab shows


def running(asked: Asked, answer: Answer) -> str:
    """A column while its answer is made."""
    return _column(asked, f'<p class="dl-big dl-answer">{markup.word_spans(answer.tokens)}</p>', busy=not answer.tokens)


def column(asked: Asked, answer: Answer, row: dict, truth: str) -> str:
    """A finished column: answer, difference to the truth, numbers."""
    words = markup.word_spans(answer.tokens) if answer.tokens else "<i>(empty)</i>"
    parts = [f'<p class="dl-big dl-answer">{words}</p>']
    if truth:
        good = row["exact"]
        mark = "exact" if good else markup.differing(truth, answer.text.strip())
        parts.append(
            f'<p class="dl-truth {"dl-right" if good else "dl-wrong"}">{"✓" if good else "✗"} '
            f"<span>against the truth: {mark}</span></p>"
        )
    facts = [("time", markup.milliseconds(answer.seconds)), ("tokens", str(row["tokens"]))]
    facts.append(("visual tokens", str(row["visual_tokens"])))
    facts.append(("log p (answer)", f"{row['logprob_answer']:.2f}"))
    if truth:
        facts += [("CER", f"{row['cer']:.0%}"), ("log p (truth)", f"{row['logprob_truth']:.2f}")]
    parts.append(
        '<dl class="dl-facts">' + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts) + "</dl>"
    )
    return _column(asked, "".join(parts))


def _column(asked: Asked, inside: str, busy: bool = False) -> str:
    layout = asked.engine.layout
    kind, why = measure.plan_badge(layout, asked.plan)
    what = markup.escape(asked.engine.trained if kind == "trained" else why)
    return (
        f'<div class="dl-column{" dl-busy" if busy else ""}"><div class="dl-foot">{markup.badge(layout, asked.plan)}'
        f"<b>{markup.escape(asked.engine.name)}</b>{markup.plan_code(asked.plan)}<span>{what}</span></div>{inside}</div>"
    )


def pairs(asked: Sequence[Asked], answers: Sequence[Answer]) -> str:
    """Every pair of columns: what the pair shows and does not, the difference, the first token on which they part."""
    cards = []
    for i, j in combinations(range(len(asked)), 2):
        a, b = answers[i], answers[j]
        same = a.text == b.text
        change = "the same text" if same else markup.differing(a.text, b.text)
        cards.append(
            f'<div class="dl-panel dl-pair"><h3>{i + 1} → {j + 1} <small>{markup.escape(_called(asked[i], asked[j]))}'
            f'</small></h3><p class="dl-change">{change}</p>{"" if same else _parting(asked, answers, i, j)}'
            f'<p class="dl-say">{markup.escape(caption(pair_view(asked[i], asked[j])))}</p></div>'
        )
    return f'<div class="dl-pairs">{"".join(cards)}</div>{markup.say("divergence")}'


def pair_view(a: Asked, b: Asked) -> str:
    """The name of the sentence that belongs to two columns."""
    if a.engine.name == b.engine.name:
        return "trained_vs_ablated" if a.engine.layout.default in (a.plan, b.plan) else "compare"
    both_trained = all(each.plan == each.engine.layout.default for each in (a, b))
    names = tuple(sorted(each.engine.name.removeprefix("embedded/") for each in (a, b)))
    if both_trained and all(name.startswith(LAB) for name in names):
        return "lab_pair"
    return PAIRS.get(names, "compare") if both_trained else "compare"


def _called(a: Asked, b: Asked) -> str:
    if a.engine.name == b.engine.name:
        return f"{a.engine.name}: {a.plan} and {b.plan}"
    return f"{a.engine.name} and {b.engine.name}"


def _parting(asked: Sequence[Asked], answers: Sequence[Answer], i: int, j: int) -> str:
    """The first token on which two answers part, with both sides' five most probable ones."""
    found = measure.first_divergence(answers[i], answers[j])
    if found is None:
        return ""
    sides = []
    for at, side in zip((i, j), found.sides, strict=True):
        top = side.top
        if side.token is None:  # this answer had ended: what it thought of there has to be asked for
            tokens = answers[at].tokens[: side.index]
            top = asked[at].engine.next_tokens(asked[at].prompt, asked[at].plan, tokens)
        sides.append(f"<div><b>{at + 1}</b>{charts.bar_list(top)}</div>")
    shared = f"after “{markup.escape(found.prefix[-40:])}”" if found.prefix.strip() else "at the first token"
    where = f'<p class="dl-note">They part {shared}. The five most probable there:</p>'
    return f'{where}<div class="dl-sides">{"".join(sides)}</div>'


def thumbnail(desk: Desk, focus: Focus) -> str:
    """The image in focus, small; in words why it cannot be shown."""
    if not focus.images:
        return '<p class="dl-note">No image yet: upload one in the rail, or pick an example.</p>'
    try:
        held = desk.held(focus.images[0])
    except UserError as error:
        return f'<p class="dl-error" role="alert">{markup.escape(str(error))}</p>'
    name = markup.escape(held.name)
    return f'<img class="dl-thumb" alt="{name}" title="{name}" src="{markup.data_uri(held.image, 160)}">'


# ---- layout and wiring


def build(desk: Desk, *, tab, settings, session, focus, examples, loaded) -> tuple:
    """Draws the tab and wires it. Returns (the example cards, what fills in the current question, models and plans
    of the first two columns)."""
    filled = gr.State(("", ()))
    with gr.Row(elem_classes=["dl-top"]):
        image = gr.HTML(thumbnail(desk, Focus()), apply_default_css=False, elem_id="dl-compare-image")
        with gr.Column(min_width=200, elem_id="dl-compare-question"):
            question = gr.Textbox(label="Question", max_lines=3, max_length=desk.limits.max_text_chars)
            truth = gr.Textbox(label="Truth, if it is known", max_lines=3, max_length=desk.limits.max_text_chars)
    columns, boxes = [], []
    with gr.Row(elem_classes=["dl-columns"], equal_height=True):
        for number, (name, text) in enumerate(default_columns(desk)):
            with gr.Column(min_width=180) as box:
                model = gr.Dropdown(list(desk.zoo.offered), value=name, label=f"{number + 1} · model", filterable=False)
                plan = gr.Textbox(value=text, label="plan", placeholder="as trained", elem_classes=["dl-mono"])
            columns += [model, plan]
            boxes.append(box)
    with gr.Row(elem_classes=["dl-actions"]):
        count = gr.Radio([2, 3], value=COLUMNS, label="Columns", show_label=False, container=False)
        start = gr.Button("Run the comparison", variant="primary", size="sm", elem_id="dl-compare-run")
        halt = gr.Button("Stop", size="sm", elem_id="dl-compare-stop")
    line = line_of()
    with gr.Row(elem_classes=["dl-columns"], equal_height=True):
        answers = [gr.HTML("", apply_default_css=False, elem_id=f"dl-column-{number}") for number in range(COLUMNS)]
    below = gr.HTML(EMPTY, apply_default_css=False, elem_id="dl-pairs")
    cards = examples()

    inputs = [question, truth, count, *columns, *settings, session, focus]
    outputs = [session, *answers, below]
    turn = {**in_turn(run, desk, outputs, line, stops="compare"), "show_progress": "full", "show_progress_on": [below]}
    for trigger, name in ((start.click, "compare"), (question.submit, "compare_question")):
        trigger(inputs=inputs, api_name=name, **turn).then(**loaded, api_name=f"{name}_memory")
    halt.click(bound(stop, desk), [session], None, api_name="stop_compare", queue=False)
    count.change(show_columns, [count], [boxes[2], answers[2]], api_name="columns", queue=False, show_progress="hidden")
    fill = (bound(opened, desk), [question, truth, filled, focus], [question, truth, filled, image])
    tab.select(*fill, api_name="open_compare", queue=False, show_progress="hidden")
    return cards, fill, columns[:4]
