"""The page: header, the rail with the stack picture, the tabs; and how it is served.

What belongs to no single tab is here: which model, which plan, which image, the address. `build` makes the gradio app
for a Zoo of models, `launch` serves it. Knows nothing about how an answer is made.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import functools
import logging
import threading
from dataclasses import replace
from html import escape

import gradio as gr

from analysis.lab import REFERENCE
from app import asking, markup, theme
from app.asking import address
from app.desk import Desk
from app.line import AT_ONCE, WAITING
from app.picture import Carrier, StackPicture, picture_value, sees, views_value
from app.session import Focus, Held, Session
from app.tabs import chat, compare, lab, layers, stacks
from app.url import decode
from app.wiring import bound, introduced
from model.engine import Engine
from model.errors import UserError
from model.images import Limits, read_image
from model.loading import EMBEDDED, LAB, Zoo, gigabytes

NAME = "DeepStack Lens"
TABS = ("chat", "layers", "compare", "stacks", "lab")
THREADS = 40 + AT_ONCE + WAITING  # gradio gives one to each request; those that run a model or wait are not to take all

log = logging.getLogger("app.page")


# ---- handlers: plain values in, plain values out


def restore(desk: Desk, request: gr.Request, progress=gr.Progress()) -> tuple:  # noqa: B008
    """The page as its address says; what the address gets wrong is passed over, with a notice.

    Returns (session, focus, model, plan, picture, views, chips, note, box, remember, tabs, link).
    """
    place = decode(request.query_params)
    wrong = []

    def attempt(make, otherwise):
        try:
            return make()
        except UserError as error:
            wrong.append(str(error))
            return otherwise()

    engine = attempt(lambda: desk.engine(place.model, progress), lambda: desk.engine(None, progress))
    plan = attempt(lambda: desk.plan(place.plan or None, engine), lambda: engine.layout.default)
    focus = attempt(lambda: focused(desk, place.example), Focus) if place.example else Focus()
    question = place.question or focus.question
    focus = replace(focus, question=question, truth=asking.truth_of(desk, focus.example, question))
    held = desk.held(focus.images[0]) if focus.images else None
    return (
        Session().known(),
        focus,
        engine.name,
        str(plan),
        picture_value(engine, plan),
        views_value(engine, held),
        chips(desk, engine),
        notice(" ".join(wrong)) if wrong else sees(held),
        {"text": focus.question, "files": []},
        asking.remembers(engine),
        gr.Tabs(selected=place.tab if place.tab in TABS else TABS[0]),
        address(desk, engine, plan, focus),
    )


def choose_model(desk: Desk, name: str, focus: Focus, progress=gr.Progress()) -> tuple:  # noqa: B008
    """Another model, under the plan of its training. Returns (plan, picture, views, chips, note, remember, link)."""
    engine = desk.engine(name, progress)
    plan = engine.layout.default
    held = desk.held(focus.images[0]) if focus.images else None
    return (
        str(plan),
        picture_value(engine, plan),
        views_value(engine, held),
        chips(desk, engine),
        sees(held),
        asking.remembers(engine),
        address(desk, engine, plan, focus),
    )


def set_plan(desk: Desk, text: str, model: str, focus: Focus) -> tuple:
    """A plan from the picture or the text box. Returns (plan, picture, note, link); a wrong one only an error note."""
    engine = desk.engine(model)
    try:
        plan = desk.plan(text, engine)
    except UserError as error:
        return gr.skip(), gr.skip(), notice(str(error)), gr.skip()
    held = desk.held(focus.images[0]) if focus.images else None
    return str(plan), picture_value(engine, plan), sees(held), address(desk, engine, plan, focus)


def choose_image(desk: Desk, path: str, model: str, plan: str, session: Session, focus: Focus) -> tuple:
    """An uploaded image comes into focus. Returns (session, focus, views, note, link)."""
    known, kept = introduced(session)
    image, notes = read_image(path, desk.limits)
    held = Held(image, os.path.basename(path), notes)
    engine = desk.engine(model)
    focus = Focus(images=(desk.store.hold(known.visitor, held),), question=focus.question)
    desk.store.look(known.visitor, focus.images)
    return kept, focus, views_value(engine, held), sees(held), follow(desk, model, plan, focus)


def choose_example(desk: Desk, name: str, model: str, plan: str, session: Session) -> tuple:
    """An example comes into focus, with its question. Returns (focus, views, note, link)."""
    focus = focused(desk, name)
    desk.store.look(session.visitor, focus.images)
    engine = desk.engine(model)
    held = desk.held(name)
    return focus, views_value(engine, held), sees(held), follow(desk, model, plan, focus)


def compare_example(
    desk: Desk, name: str, model: str, plan: str, session: Session, question: str, truth: str, filled: tuple
) -> tuple:
    """An example comes into focus and into Compare at once: no other image is ever run with its question or judged by
    its right answer. Returns what `choose_example` returns, then what `compare.opened` does."""
    focus, *rest = choose_example(desk, name, model, plan, session)
    return focus, *rest, *compare.opened(desk, question, truth, filled, focus)


def live_example(desk: Desk, name: str, model: str, plan: str, session: Session) -> tuple:
    """An example comes into focus, and its question into the box of Stacks at once: a switch that is thrown before it
    is answered asks it, and not the one before. Returns what `choose_example` returns, then the question."""
    focus, *rest = choose_example(desk, name, model, plan, session)
    return focus, *rest, focus.question


def follow(desk: Desk, model: str, plan: str, focus: Focus):
    """The address of what is in focus under the model and plan of now; as it was, while the plan's text is not one."""
    engine = desk.engine(model)
    try:
        return address(desk, engine, desk.plan(plan, engine), focus)
    except UserError:
        return gr.skip()


def in_memory(desk: Desk, model: str) -> str:
    """The chips anew, after a comparison may have loaded models."""
    return chips(desk, desk.engine(model))


def chat_with(desk: Desk, name: str, focus: Focus) -> tuple:
    """A model of the Lab, as trained, in the chat. Returns (model, tabs, *what `choose_model` returns)."""
    return desk.engine(name).name, gr.Tabs(selected="chat"), *choose_model(desk, name, focus)


def put_into_compare(desk: Desk, name: str, first: str, plan: str) -> tuple:
    """A model of the Lab, as trained, as the second column of Compare, beside the lab's reference unless it is that
    itself or another model of the Lab is there; never beside itself, as trained. Returns (tabs, first model, first
    plan, second model, second plan)."""
    reference = lab.shipped(desk, REFERENCE)
    itself = first == name and not plan.strip()
    if reference not in ("", name) and (itself or not first.startswith(f"{EMBEDDED}/{LAB}")):
        first, plan = desk.engine(reference).name, ""
    elif itself:
        first = desk.zoo.default
    return gr.Tabs(selected="compare"), first, plan, desk.engine(name).name, ""


def focused(desk: Desk, name: str) -> Focus:
    """The focus on an example; UserError for one that there is not."""
    example = desk.example(name)
    return Focus(images=(name,), example=name, question=example.question, truth=example.answer)


# ---- what the page says of the model


def chips(desk: Desk, engine: Engine) -> str:
    """What the checkpoint is, where it runs and why, what is held in memory; the reasons are titles."""
    dtype = str(engine.dtype).removeprefix("torch.")
    device = "CPU" if engine.device.type == "cpu" else str(engine.device)
    loaded = desk.zoo.loaded()
    each = "\n".join(f"{name}: {gigabytes(size)} on {where}" for name, size, where in loaded)
    texts = [
        (engine.trained, engine.note),
        (f"{device} · {dtype}", "\n".join(engine.reasons)),
        (f"{gigabytes(sum(size for _, size, _ in loaded))} in memory", each),
    ]
    spans = "".join(
        f'<span class="dl-pill dl-tipped" tabindex="0" title="{escape(why)}">{escape(text)}</span>'
        for text, why in texts
        if text
    )
    return f'<div class="dl-chips">{spans}</div>'


def notice(text: str) -> str:
    """An error beside the plan."""
    return f'<p class="dl-error" role="alert">{escape(text)}</p>'


# ---- layout and wiring


def build(zoo: Zoo, limits: Limits | None = None) -> gr.Blocks:
    """The gradio app. No model is loaded before the first visitor comes, or `launch` warms the default one up."""
    desk = Desk(zoo, limits or Limits())
    with gr.Blocks(title=NAME, analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as demo:
        quiet = {"show_progress": "hidden", "queue": False}
        session = gr.State(Session(), delete_callback=desk.store.forget)
        focus = gr.State(Focus())
        picked = gr.Textbox(visible=False, label="example")
        dark = gr.Checkbox(visible=False, label="dark")
        views, bars, link = Carrier("views"), Carrier("effect"), Carrier("link")
        model, pills = _header(zoo)
        with gr.Row(elem_id="dl-main"):
            with gr.Column(elem_id="dl-rail", min_width=0):
                picture, plan, note, upload = _rail()
            with gr.Column(elem_id="dl-side", min_width=0), gr.Tabs(elem_id="dl-tabs") as tabs:
                cards, codes = (functools.partial(_example_cards, desk, first) for first in ("", "lab"))
                shared = {"session": session, "focus": focus}
                linked = {"fn": bound(follow, desk), "inputs": [model, plan, focus], "outputs": [link], **quiet}
                with gr.Tab("Chat", id="chat"):
                    talk = chat.build(
                        desk, model=model, plan=plan, views=views, note=note, linked=linked, examples=cards,
                        picked=picked, **shared,
                    )  # fmt: skip
                with gr.Tab("Layers", id="layers") as tab:
                    reopen = layers.build(desk, tab=tab, model=model, plan=plan, dark=dark, bars=bars, **shared)
                memory = {"fn": bound(in_memory, desk), "inputs": [model], "outputs": [pills], **quiet}
                with gr.Tab("Compare", id="compare") as tab:
                    compare_cards, fill, columns = compare.build(
                        desk, tab=tab, settings=talk.settings, examples=cards, loaded=memory, **shared
                    )
                with gr.Tab("Stacks", id="stacks") as tab:
                    live_cards, answered_live, live_question = stacks.build(
                        desk,
                        tab=tab,
                        picture=picture,
                        model=model,
                        plan=plan,
                        settings=talk.settings,
                        bars=bars,
                        linked=linked,
                        examples=cards,
                        **shared,
                    )
                with gr.Tab("Lab", id="lab") as tab:
                    lab_table, lab_cards = lab.build(desk, tab=tab, model=model, focus=focus, dark=dark, examples=codes)

        restored = [session, focus, model, plan, picture, views, pills, note, talk.box, talk.remember, tabs, link]
        opened = demo.load(bound(restore, desk), None, restored, api_name="restore", show_progress_on=[picture])
        resumed = opened.success(**talk.resume)
        resumed.success(**reopen, api_name="reopen_layers")
        resumed.then(**talk.settle, api_name="resume_settled")
        demo.load(None, None, [dark], js="() => document.body.classList.contains('dark')", api_name="is_dark")
        model.input(
            bound(choose_model, desk), [model, focus], [plan, picture, views, pills, note, talk.remember, link],
            api_name="choose_model", show_progress="full", show_progress_on=[picture], trigger_mode="always_last",
        ).failure(None, None, [model], js="() => lens.model", api_name="keep_model")  # fmt: skip
        planned = ([plan, model, focus], [plan, picture, note, link])
        picture.plan(
            bound(set_plan, desk), *planned, api_name="set_plan", trigger_mode="always_last",
            js="(plan, ...rest) => [lens.plan, ...rest]", **quiet,
        )  # fmt: skip
        plan.submit(bound(set_plan, desk), *planned, api_name="type_plan", **quiet)
        plan.blur(bound(set_plan, desk), *planned, api_name="leave_plan", **quiet)
        upload.upload(
            bound(choose_image, desk), [upload, model, plan, session, focus], [session, focus, views, note, link],
            api_name="choose_image", show_progress="hidden",
        ).success(*fill, js="(...values) => (lens.emit('image'), values)", api_name="fill_image", **quiet)  # fmt: skip
        pick = ([picked, model, plan, session], [focus, views, note, link])
        newest = {"js": "(name, ...rest) => [lens.picked, ...rest]", "trigger_mode": "always_last"}
        _, (*boxes, _), filling = fill
        compare_cards.pick(
            bound(compare_example, desk), [*pick[0], *boxes], [*pick[1], *filling], api_name="compare_example",
            **newest, **quiet,
        )  # fmt: skip
        lab_cards.pick(bound(choose_example, desk), *pick, api_name="lab_example", **newest, **quiet)
        lab_table.chat(
            bound(chat_with, desk), [picked, focus],
            [model, tabs, plan, picture, views, pills, note, talk.remember, link],
            api_name="lab_chat", show_progress="minimal", **newest,
        )  # fmt: skip
        lab_table.compare(
            bound(put_into_compare, desk), [picked, *columns[:2]], [tabs, *columns],
            api_name="lab_compare", show_progress="minimal", **newest,
        )  # opening the tab fills in the question  # fmt: skip
        picked_live = live_cards.pick(
            bound(live_example, desk), pick[0], [*pick[1], live_question], api_name="live_example", **newest, **quiet,
        )  # fmt: skip
        answered_live(picked_live, "live_example_answer")
    demo.queue(max_size=WAITING, default_concurrency_limit=8)
    return demo


def _header(zoo: Zoo) -> tuple[gr.Dropdown, gr.HTML]:
    with gr.Row(elem_id="dl-header"):
        gr.HTML(f"<h1>{NAME}</h1>", apply_default_css=False, elem_id="dl-name")
        model = gr.Dropdown(
            list(zoo.offered), value=zoo.default, label="Model", show_label=False, container=False, filterable=False,
            interactive=True, elem_id="dl-model",
        )  # fmt: skip
        pills = gr.HTML("", apply_default_css=False, elem_id="dl-chips")
        gr.HTML(
            '<button type="button" class="dl-copy-link" title="The address holds model, plan, example and question, '
            'but no uploaded image">copy link</button>',
            apply_default_css=False,
            elem_id="dl-link",
        )
    return model, pills


def _rail() -> tuple[StackPicture, gr.Textbox, gr.HTML, gr.UploadButton]:
    gr.HTML(
        '<button type="button" class="dl-rail-bar" aria-expanded="false" aria-controls="dl-rail">'
        "Stack picture and plan <code></code></button>",
        apply_default_css=False,
        elem_id="dl-rail-toggle",
    )
    picture = StackPicture(elem_id="dl-picture")
    plan = gr.Textbox(
        label="Plan", elem_id="dl-plan", lines=1, max_lines=3, max_length=2000,
        placeholder="base@0,0@1,1@2*0.5 or none", info="stack@layer*gain, joined by commas; Enter applies it",
    )  # fmt: skip
    note = gr.HTML(sees(None), apply_default_css=False, elem_id="dl-note")
    upload = gr.UploadButton("Upload an image", file_types=["image", "video"], size="sm", elem_id="dl-upload")
    return picture, plan, note, upload


def _example_cards(desk: Desk, first: str = "") -> gr.HTML:
    return gr.HTML(
        markup.example_cards(sorted(desk.examples.values(), key=lambda example: example.scene != first)),
        js_on_load="lens.clicks(element, props, trigger) // tells 'pick'",
        apply_default_css=False,
        elem_classes=["dl-examples"],
    )


def launch(
    zoo: Zoo, limits: Limits | None = None, *, host: str = "127.0.0.1", port: int = 7860, block: bool = True
) -> gr.Blocks:
    """Serves the page until it is stopped (`block`), or returns at once with it running."""
    limits = limits or Limits()
    demo = build(zoo, limits)
    threading.Thread(target=_warm, args=(zoo,), daemon=True).start()
    demo.launch(
        server_name=host,
        server_port=port,
        theme=theme.theme(),
        head=theme.head(),
        quiet=True,
        share=False,
        inbrowser=False,
        show_error=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        allowed_paths=[],
        max_file_size=limits.max_bytes,
        max_threads=THREADS,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        favicon_path=str(theme.ASSETS / "favicon.svg"),
        prevent_thread_lock=not block,
    )
    return demo


def _warm(zoo: Zoo) -> None:
    """Loads the default model before the first visitor asks for it; what is wrong with it is said to whoever asks."""
    try:
        zoo.get(zoo.default)
    except Exception:
        log.exception("%s could not be loaded", zoo.default)
