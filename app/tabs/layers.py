"""Layers: for the last answer, how long the rows are, what enters where, what that moves, and where attention goes.

Handlers first, layout below. One replay per answer, made when somebody looks; the linked view of words, patches and
layers is assets/js/look.js, the charts are plotly, what can be taken away is matplotlib and CSV.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import gradio as gr
import numpy as np
from gradio import processing_utils
from gradio.utils import get_upload_folder

from analysis import attention, figures, figures_mpl, norms, tables
from analysis.grids import GridMap
from analysis.palette import source_name
from app import asking, looking, markup
from app.desk import Desk
from app.looking import Seen
from app.picture import Carrier, effect_value
from app.session import Focus, Record, Session
from app.wiring import in_turn, introduced, line_of
from model.engine import Engine
from model.errors import UserError

FIGURES = {
    "the map as shown": "map",
    "norms by layer": "norms",
    "ratio and cosine": "ratio",
    "effect by layer": "effect",
    "attention by layer": "attention",
    "the answer's tokens": "tokens",
}
KINDS = ("png", "svg", "csv")
NOTHING = markup.empty(
    "Nothing to look at yet",
    "Ask something in Chat or Stacks; this tab then shows what happened inside.",
)


# ---- handlers: plain values in, plain values out


def look(desk: Desk, dark: bool, plan: str, model: str, drawn: str, focus: Focus) -> tuple:
    """The last answer's views. Returns (drawn, head, body, view, norms, ratio, effect, attention, bars)."""
    record = desk.store.record(focus.record)
    if record is None:
        return "", NOTHING, gr.Column(visible=False), None, None, None, None, None, None
    engine = desk.engine(record.answer.model)
    head = heading(desk, record, plan, model)
    if drawn == f"{focus.record} {dark}":
        return drawn, head, *([gr.skip()] * 7)
    try:
        seen = looking.see(engine, record)
    except UserError as error:
        return "", head + markup.empty("No image here", str(error)), gr.Column(visible=False), *([None] * 6)
    flow = None if seen.flow is None else figures.attention_by_layer(seen.flow, seen.trace.n_layers, dark)
    return (
        f"{focus.record} {dark}",
        head,
        gr.Column(visible=True),
        looking.look_value(engine, record, seen, focus.record),
        figures.norms_by_layer(seen.summary, dark),
        figures.ratio_and_cosine(seen.summary, dark),
        figures.effect_heatmap(seen.effect, dark),
        flow,
        effect_value(engine, record.answer.plan, seen.effect.values),
    )


def answered(desk: Desk, *values) -> bool:
    """Whether there is an answer to look into; the last of an event's values is the focus."""
    return desk.store.record(values[-1].record) is not None


def answer_again(desk: Desk, dark: bool, plan: str, model: str, session: Session, focus: Focus) -> tuple:
    """The last question once more, under the model and plan of now. Returns (session, focus, *what `look` returns)."""
    record = desk.store.record(focus.record)
    if record is None:
        raise UserError("There is no question yet: ask one in Chat or Stacks first.")
    known, kept = introduced(session)
    asked = asking.again(desk, record, model=model, plan=plan)
    answer = asked.engine.answer(asked.prompt, asked.plan, asked.sampling)
    found = asking.refocused(desk, focus, asking.keep(desk, known, asked, answer), asked)
    turned = asking.turned(desk, known, focus, found)
    return kept, found if turned else gr.skip(), *look(desk, dark, plan, model, "", found)


def heads(desk: Desk, layer: float, focus: Focus) -> dict:
    """The attention of every head of one layer, for a model too large to send them all at once."""
    record = desk.store.record(focus.record)
    if record is None:
        raise UserError("This answer is no longer held; ask the question again.")
    seen = looking.see(desk.engine(record.answer.model), record)
    return {"id": focus.record, "layer": int(layer), "data": looking.heads_of(seen.trace, int(layer))}


def download(desk: Desk, what: str, kind: str, shown: str, focus: Focus) -> str:
    """A figure or table of the last answer as a file; returns its path. `shown`: the linked view's state as JSON."""
    record = desk.store.record(focus.record)
    if record is None:
        raise UserError("There is nothing to take away yet: ask a question first.")
    if what not in FIGURES or kind not in KINDS:
        raise UserError(f"There is no “{what}” as {kind}; choose one of {', '.join(FIGURES)}, as {', '.join(KINDS)}.")
    engine = desk.engine(record.answer.model)
    data = taken(engine, record, looking.see(engine, record), FIGURES[what], kind, shown)
    name = f"deepstack-lens-{FIGURES[what]}.{kind}"
    return processing_utils.save_bytes_to_cache(data, name, cache_dir=get_upload_folder())


# ---- files to take away


def taken(engine: Engine, record: Record, seen: Seen, what: str, kind: str, shown: str) -> bytes:
    """The bytes of one figure (png, svg) or table (csv). UserError for what this answer does not have."""
    if what == "map":
        maps, picture, fixed = as_shown(record, seen, shown)
        if kind == "csv":
            return "\r\n".join(tables.grid(each).csv() for each in maps.values()).encode()
        if len(maps) == 1:
            figure = figures_mpl.image_map(next(iter(maps.values())), picture, fixed=fixed)
        else:
            figure = figures_mpl.map_row(maps, picture, title="What is injected, RMS by visual token", fixed=fixed)
    elif what == "attention" and seen.flow is None:
        raise UserError("The answer is empty, so there are no rows whose attention could be shown.")
    elif kind == "csv":
        rows = {
            "norms": lambda: tables.norms(seen.summary),
            "ratio": lambda: tables.norms(seen.summary),
            "effect": lambda: tables.effect(seen.effect),
            "attention": lambda: tables.flow(seen.flow),
            "tokens": lambda: tables.tokens(record.answer),
        }
        return rows[what]().csv().encode()
    elif what == "tokens":
        raise UserError("The answer's tokens are a table: take them away as CSV.")
    else:
        figure = {
            "norms": lambda: figures_mpl.norms_by_layer(seen.summary),
            "ratio": lambda: figures_mpl.ratio_and_cosine(seen.summary),
            "effect": lambda: figures_mpl.effect_heatmap(seen.effect),
            "attention": lambda: figures_mpl.attention_by_layer(seen.flow, seen.trace.n_layers),
        }[what]()
    return figures_mpl.png(figure) if kind == "png" else figures_mpl.svg(figure)


@dataclass(frozen=True)
class Shown:
    """The linked view's state, checked: what the browser sends is not trusted."""

    mode: str
    layer: int
    head: int | None
    fixed: bool
    hide: bool
    image: int
    tokens: tuple[int, ...]  # the pinned word's
    asked: int | None  # or which recorded question row is pinned


def parse_shown(text: str, seen: Seen) -> Shown:
    """UserError for anything that is not a state of this answer's view."""
    trace = seen.trace
    try:
        state = json.loads(text)
        head = state["head"]
        shown = Shown(
            mode=str(state["mode"]),
            layer=int(state["layer"]),
            head=None if head == "mean" else int(head),
            fixed=bool(state["fixed"]),
            hide=bool(state["hide"]),
            image=int(state["image"]),
            tokens=tuple(int(token) for token in state["tokens"])[: seen.tokens],
            asked=None if state.get("asked") is None else int(state["asked"]),
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError("The view's state cannot be read; open the Layers tab and choose a map first.") from error
    last = trace.n_layers if shown.mode == "residual" else trace.n_layers - 1
    within = (
        shown.mode in ("attention", *norms.KINDS)
        and 0 <= shown.layer <= last
        and 0 <= shown.image < len(trace.grids)
        and all(0 <= token < seen.tokens for token in shown.tokens)
        and (shown.asked is None or 0 <= shown.asked < len(trace.attention_rows))
    )
    if not within:
        raise UserError("This map does not belong to the last answer; open the Layers tab again.")
    return shown


def as_shown(record: Record, seen: Seen, text: str) -> tuple[dict[str, GridMap], object, bool]:
    """(maps by label, the picture below them, whether the scale is fixed) of the linked view's state."""
    shown = parse_shown(text, seen)
    trace, picture = seen.trace, record.prompt.picture(shown.image)
    if shown.mode == "injected":
        maps = {
            f"{source_name(source)}, layer {layer}": norms.norm_map(trace, "injected", layer, source, shown.image)
            for source, layer in trace.injected_rms
        }
        if not maps:
            raise UserError("The plan is none: nothing was injected.")
        return maps, picture, shown.fixed
    if shown.mode != "attention":
        return {shown.mode: norms.norm_map(trace, shown.mode, shown.layer, image=shown.image)}, picture, shown.fixed
    if not seen.tokens:
        raise UserError("The answer is empty, so there are no rows whose attention could be shown.")
    if shown.asked is not None:
        rows = (trace.attention_rows[shown.asked],)
    else:
        rows = tuple(attention.query_row(trace, token) for token in shown.tokens or range(seen.tokens))
    looks = [
        attention.to_image(trace, row, shown.layer, shown.head, shown.image, hide_sinks=shown.hide) for row in rows
    ]
    values = np.mean([each.map.values for each in looks], axis=0)
    first = looks[0].map
    which = "mean over heads" if shown.head is None else f"head {shown.head}"
    said = "".join(trace.texts[row + 1] for row in rows).strip() if shown.asked is None else trace.texts[rows[0]]
    quantity = f"Attention of “{said[:40]}”, layer {shown.layer}, {which}"
    both = GridMap(values, quantity, first.unit, first.size, first.image, first.limits, note=first.note)
    return {"attention": both}, picture, shown.fixed


def heading(desk: Desk, record: Record, plan: str, model: str) -> str:
    """Which answer this is, and (shown while it is so) that the picture says something else by now."""
    engine = desk.engine(record.answer.model)
    words = markup.word_spans(record.answer.tokens) if record.answer.tokens else "<i>(an empty answer)</i>"
    stale = '<p class="dl-note">The picture has changed since: “Answer again” asks under the plan it shows now.</p>'
    now = "" if (plan, model) == (str(record.answer.plan), record.answer.model) else " dl-stale"
    given = markup.escape(f"{record.answer.model} {record.answer.plan}")
    return (
        f'<div class="dl-asked-card{now}" data-answered="{given}"><p class="dl-q">{markup.escape(record.question)}</p>'
        f'<span class="dl-answer">{words}</span>'
        f"{markup.footnote(engine.layout, record.answer, model=engine.name)}{stale}</div>"
    )


# ---- layout and wiring


class LookView(gr.HTML):
    """The linked view of words, patches and layers. Value: `looking.look_value`."""

    def __init__(self, **more):
        super().__init__(
            html_template='<div class="dl-look"></div>',
            js_on_load="lens.look(element, props, trigger, watch) // asks for 'heads'",
            apply_default_css=False,
            **more,
        )

    def api_info(self) -> dict:
        return {"type": {}, "description": "maps and attention of one answer"}


def build(desk: Desk, *, tab, model, plan, session, focus, dark, bars) -> dict:
    """Draws the tab and wires it. Returns how an event elsewhere can have it redrawn."""
    drawn = gr.State("")
    with gr.Row(elem_classes=["dl-top"]):
        head = gr.HTML(NOTHING, apply_default_css=False, elem_id="dl-look-head")
        again = gr.Button("Answer again", size="sm", elem_id="dl-again", scale=0, min_width=120)
    line = line_of()
    with gr.Column(visible=False, elem_id="dl-look-body") as body:
        with gr.Column(elem_classes=["dl-panel"]):
            view = LookView(elem_id="dl-look")
        with gr.Row(elem_classes=["dl-plots"]):
            with gr.Column(elem_classes=["dl-panel"]):
                norms_plot = gr.Plot(show_label=False, container=False, elem_id="dl-norms-plot")
                gr.HTML(markup.say("norms"), apply_default_css=False)
            with gr.Column(elem_classes=["dl-panel"]):
                effect_plot = gr.Plot(show_label=False, container=False, elem_id="dl-effect-plot")
                gr.HTML(markup.say("effect"), apply_default_css=False)
        with gr.Row(elem_classes=["dl-plots"]):
            with gr.Column(elem_classes=["dl-panel"]):
                ratio_plot = gr.Plot(show_label=False, container=False, elem_id="dl-ratio-plot")
                gr.HTML(markup.say("ratio"), apply_default_css=False)
            with gr.Column(elem_classes=["dl-panel"]):
                flow_plot = gr.Plot(show_label=False, container=False, elem_id="dl-attention-plot")
                gr.HTML(markup.say("attention_layers"), apply_default_css=False)
        with gr.Row(elem_classes=["dl-take"]):
            what = gr.Dropdown(list(FIGURES), value="the map as shown", label="Take away", scale=2, filterable=False)
            kind = gr.Radio(list(KINDS), value="png", label="as", scale=2)
            take = gr.Button("Download", size="sm", scale=1)
            file = gr.DownloadButton("file", elem_id="dl-file", elem_classes=["dl-fetch"])
    fetched = Carrier("heads")
    wanted = gr.Number(visible=False, label="layer")
    shown = gr.Textbox(visible=False, label="view")

    views = [drawn, head, body, view, norms_plot, ratio_plot, effect_plot, flow_plot, bars]
    common = {"show_progress": "minimal", "show_progress_on": [head]}
    inputs = [dark, plan, model]
    looked = {**in_turn(look, desk, views, line, answered), "inputs": [*inputs, drawn, focus], **common}
    tab.select(**looked, api_name="look")
    again.click(
        **in_turn(answer_again, desk, [session, focus, *views], line), inputs=[*inputs, session, focus],
        api_name="answer_again", **common,
    )  # fmt: skip
    view.heads(
        **in_turn(heads, desk, [fetched], line), inputs=[wanted, focus], api_name="heads",
        js="(layer, focus) => [lens.wanted, focus]", show_progress="hidden",
    )  # fmt: skip
    take.click(
        **in_turn(download, desk, [file], line), inputs=[what, kind, shown, focus], api_name="download",
        js="(what, kind, shown, focus) => [what, kind, lens.looking || '', focus]", **common,
    ).success(None, js="() => document.querySelector('#dl-file').click()", api_name="download_start")  # fmt: skip
    return looked
