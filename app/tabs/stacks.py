"""Stacks: every change of the picture answers the question again, beside what subsets of the stacks would say.

Handlers first, layout below. The answer comes first and alone; the strip of subsets is computed once per question.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import gradio as gr

from analysis import norms, subsets
from analysis.compare import exact
from app import asking, charts, markup
from app.asking import Asked
from app.desk import Desk
from app.picture import effect_value
from app.session import Focus, Record, Session
from app.wiring import bound, end, in_turn, introduced, line_of
from model.engine import Engine
from model.errors import UserError
from model.plan import BASE, Plan
from model.types import Answer, Sampling

EMPTY = markup.empty(
    "No question yet", "Pick an example below, or ask about your own image in Chat. Then switch stacks in the picture."
)
BUSY = '<div class="dl-panel dl-busy"><h3>Subsets of the stacks</h3><p class="dl-note">being answered …</p></div>'
MAX_NEW_TOKENS = 24  # of the answers of subsets; the question's own answer may be longer


# ---- handlers: plain values in, plain values out


def live(
    desk: Desk,
    question: str,
    plan: str,
    model: str,
    max_new_tokens: float,
    temperature: float,
    top_p: float,
    top_k: float,
    seed: float,
    session: Session,
    focus: Focus,
) -> Iterator[tuple]:
    """The current question under the plan of now: first its answer, then subsets and effects.

    Yields (question, session, focus, answer, strip, effects, bars). A plan or question that cannot be run leaves the
    views as they are; the rail says what is wrong with a plan.
    """
    record = desk.store.record(focus.record)
    question = (question or "").strip() or focus.question
    if not question or not (focus.images or record):
        yield question, gr.skip(), gr.skip(), EMPTY, "", "", None
        return
    known, kept = introduced(session)
    settings = asking.sampling(desk, max_new_tokens, temperature, top_p, top_k, seed)
    asked = _asked(desk, record, question, plan, model, settings, focus)
    of = f"{asked.engine.name} {asked.plan}"
    with desk.store.alone(known.visitor, "stacks") as stopper:
        newest = functools.partial(desk.store.newest, known.visitor, "stacks", stopper)
        if not newest():  # a later change of the picture has taken over while this waited for the one before
            yield (gr.skip(),) * 7
            return
        if record is not None and _unchanged(record, asked):  # what is there is drawn again
            now = record
            # While the focus was read, another answer may have been turned to, which this one replaces.
            turned = not desk.store.turned(known.visitor, focus.record) and asking.turned(desk, known, focus, focus)
        else:
            for answer, done in asking.stream(asked, stopper):
                if not newest():
                    yield (gr.skip(),) * 7
                    return
                if not done:
                    yield question, *[gr.skip()] * 2, _marked(of, growing(asked, answer)), *[gr.skip()] * 3
            key = asking.keep(desk, known, asked, answer)
            since, focus = focus, asking.refocused(desk, focus, key, asked)
            turned = asking.turned(desk, known, since, focus)
            now = desk.store.record(key)
        before = desk.store.record(focus.before)
        card = _marked(of, answer_card(asked.engine, now, before, focus.truth))
        fresh = before is None and len(asked.plan.sources()) > 1
        busy = (_marked(of, BUSY), "") if fresh else (gr.skip(), gr.skip())
        yield question, kept, focus if turned else gr.skip(), card, *busy, gr.skip()
    effect = now.once("effect", lambda: asked.engine.image_effect(asked.prompt, now.answer, asked.plan))
    sources = tuple(source.name for source in asked.engine.layout.sources_for(asked.plan))
    felt = effects(norms.Effect(asked.plan, sources, effect))
    try:
        run = all_subsets(asked, now, before, focus.truth)
        left, right = strip(run, asked.plan, asked.engine.layout.default, focus.truth), felt + shares(run)
    except UserError as error:
        left, right = f'<p class="dl-note">{markup.escape(str(error))}</p>', felt
    if newest():
        yield *[gr.skip()] * 4, _marked(of, left), _marked(of, right), effect_value(asked.engine, asked.plan, effect)


def _marked(of: str, content: str) -> str:
    """A part of the tab with the model and plan it is of, by which the page tells one that was drawn too late."""
    return f'<div data-of="{markup.escape(of)}">{content}</div>'


def _asked(
    desk: Desk, record: Record | None, question: str, plan: str, model: str, settings: Sampling, focus: Focus
) -> Asked:
    """The question with the conversation it stands in when it is the last one asked, else on its own."""
    if record and record.question == question and (record.images == focus.images or not record.images):
        return asking.again(desk, record, model=model, plan=plan, settings=settings)
    return asking.prepare(desk, model=model, plan=plan, question=question, images=focus.images, settings=settings)


def _unchanged(record: Record, asked: Asked) -> bool:
    now = (asked.engine.name, asked.plan, asked.question, asked.images, asked.sampling)
    return (record.answer.model, record.answer.plan, record.question, record.images, record.sampling) == now


# ---- what the tab shows


def answer_card(engine: Engine, now: Record, before: Record | None, truth: str) -> str:
    """The answer, what changed against the one before, what it cost."""
    answer = now.answer
    facts = [markup.milliseconds(answer.seconds), "vision tower reused" if answer.vision_cached else "vision tower run"]
    words = markup.word_spans(answer.tokens) if answer.tokens else "<i>(empty)</i>"
    was = ""
    if before is not None:
        same = before.answer.text == answer.text
        change = "the same answer" if same else markup.differing(before.answer.text, answer.text)
        was = (
            f'<p class="dl-was"><span>before, under {markup.plan_code(before.answer.plan)}</span>'
            f"<b>{markup.escape(before.answer.text.strip() or '(empty)')}</b>"
            f"<span>change</span><b>{change}</b></p>"
        )
    right = ""
    if truth:
        good = exact(answer.text, truth)
        right = f'<span class="dl-truth {"dl-right" if good else "dl-wrong"}">{"✓" if good else "✗"} truth: '
        right += f"{markup.escape(truth)}</span>"
    return (
        f'<div class="dl-answer-card"><p class="dl-q">{markup.escape(now.question)}</p>'
        f'<p class="dl-big dl-answer">{words}</p>{right}{was}'
        f'<span class="dl-foot">{markup.badge(engine.layout, answer.plan)}{markup.plan_code(answer.plan)}'
        f"<span>{markup.escape(' · '.join(facts))}</span></span></div>"
    )


def growing(asked: Asked, answer: Answer) -> str:
    """The card while its answer is being made."""
    return (
        f'<div class="dl-answer-card dl-busy"><p class="dl-q">{markup.escape(asked.question)}</p>'
        f'<p class="dl-big dl-answer">{markup.word_spans(answer.tokens)}</p></div>'
    )


def stop(desk: Desk, session: Session) -> None:
    """Ends the running answer within one token, a waiting question at once; what has been said stays."""
    end(desk, session, "stacks")


def everything(layout, plan: Plan) -> Plan:
    """The plan with everything on, of which the strip shows the subsets: the default one if `plan` is a part of it."""
    inside = all(entry in layout.default.entries for entry in plan if entry.source != BASE)
    return layout.default if inside and len(layout.default) >= len(plan) else plan


def all_subsets(asked: Asked, now: Record, before: Record | None, truth: str) -> subsets.SubsetRun:
    """On/off subsets of the stacks, answered in one batch; kept, and handed on while the question is the same.

    UserError where there is nothing to switch or to score.
    """
    full = everything(asked.engine.layout, asked.plan)
    if not subsets.stacks_of(full):
        raise UserError("There is a single injection here, so there are no subsets of stacks to show.")
    key = ("subsets", full, truth)
    if before is not None and key in before.memo and _same_question(before, now):
        now.memo.setdefault(key, before.memo[key])
    return now.once(key, lambda: _run(asked, full, truth))


def _run(asked: Asked, full: Plan, truth: str) -> subsets.SubsetRun:
    most = min(asked.sampling.max_new_tokens, MAX_NEW_TOKENS)
    return subsets.run(asked.engine, asked.prompt, full, Sampling(max_new_tokens=most), truth or None)


def _same_question(a: Record, b: Record) -> bool:
    return (a.question, a.images, a.answer.model) == (b.question, b.images, b.answer.model)


def strip(run: subsets.SubsetRun, plan: Plan, trained: Plan, truth: str) -> str:
    """What the model says under every subset, or the telling ones; the one of now is outlined."""
    more = "" if run.plan == trained else "Here the first is ablated as well: the plan is not that of the training."
    cost = markup.milliseconds(run.seconds)
    whole = len(run.rows) == 2 ** len(run.stacks)
    of = "Every subset at once" if whole else "Each alone, all but each, the first and the last ones"
    title = f"<h3>{of} <small>{len(run.rows)} plans, one batch, {cost}</small></h3>"
    return f'<div class="dl-panel">{title}{charts.subset_strip(run, plan, truth)}{markup.say("subsets", more)}</div>'


def effects(effect: norms.Effect) -> str:
    """How far each source is felt, layer by layer."""
    note = "<small>‖h on − h off‖ ÷ ‖h on‖ at image rows</small>"
    table = charts.effect_table(effect)
    return f'<div class="dl-panel"><h3>How far each source is felt {note}</h3>{table}{markup.say("effect")}</div>'


def shares(run: subsets.SubsetRun) -> str:
    """Which stack gave which part of the answer."""
    drawn = "" if run.error is None else f", mean of {subsets.ORDERS} orders, ± up to {run.error.max():.2f} nats"
    shown = markup.escape(run.target[:40])
    title = f"<h3>Which stack gave which part? <small>shares of “{shown}”{drawn}</small></h3>"
    return f'<div class="dl-panel">{title}{charts.shapley_bars(run)}{markup.say("shapley")}</div>'


# ---- layout and wiring


def build(desk: Desk, *, tab, picture, model, plan, settings, session, focus, bars, linked, examples) -> tuple:
    """Draws the tab and wires it. `linked`: how the address follows a question. Returns (the example cards,
    what lets the question in focus follow on an event, under a name, the box of the question)."""
    with gr.Row(elem_classes=["dl-ask-row"]):
        question = gr.Textbox(
            show_label=False, placeholder="The question; Enter asks it again", elem_id="dl-live-question",
            container=False, max_lines=3, max_length=desk.limits.max_text_chars,
        )  # fmt: skip
        halt = gr.Button("Stop", size="sm", elem_id="dl-live-stop")
    line = line_of()
    answer = gr.HTML(EMPTY, apply_default_css=False, elem_id="dl-live-answer")
    with gr.Row(elem_id="dl-live-more"):
        parts = gr.HTML(
            "", js_on_load="lens.clicks(element, props, trigger)", apply_default_css=False, elem_id="dl-live-strip"
        )
        felt = gr.HTML("", apply_default_css=False, elem_id="dl-live-effects")
    cards = examples()
    inputs = [question, plan, model, *settings, session, focus]
    outputs = [question, session, focus, answer, parts, felt, bars]
    again = {**in_turn(live, desk, outputs, line, stops="stacks"), "inputs": inputs, "show_progress": "hidden"}

    def drawn(event, name: str):
        """Tells the page when all of an event has been drawn, and whether it came to its end."""
        event.success(None, js="() => lens.drawn(true)", api_name=f"{name}_drawn")
        event.failure(None, js="() => lens.drawn(false)", api_name=f"{name}_failed")
        return event

    fresh = {"js": "(question, ...rest) => (lens.asked(), ['', ...rest])"}  # the question in focus, not the box's
    # Each change ends the answer before it, so no event waits for the one before: trigger_mode "multiple".
    drawn(picture.live(
        **again, api_name="live", trigger_mode="multiple",
        js="(question, plan, ...rest) => [question, lens.plan, ...rest]",
    ), "live")  # fmt: skip
    asked = question.submit(
        **again, api_name="ask_live", trigger_mode="multiple", js="(...values) => (lens.asked(), values)"
    )
    drawn(asked, "ask_live").success(**linked, api_name="ask_live_address")
    drawn(tab.select(**again, **fresh, api_name="open_stacks", trigger_mode="multiple"), "open_stacks")
    said = "(...values) => (lens.stopped(), values)"
    halt.click(bound(stop, desk), [session], None, js=said, api_name="stop_live", queue=False)
    return cards, lambda event, name: drawn(event.success(**again, **fresh, api_name=name), name), question
