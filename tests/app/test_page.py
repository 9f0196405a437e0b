"""The page as a whole, without a browser: its address, its handlers, and visitors who do not see one another."""

from __future__ import annotations

import asyncio
import io
import json
from types import SimpleNamespace

import gradio as gr
import pytest
from gradio.state_holder import SessionState
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from app import page
from app.line import WAITING
from app.session import Focus, Session
from model.errors import UserError
from model.images import Limits
from model.loading import Zoo
from model.plan import Plan
from tests.app.given import HIRES, SETTINGS, SINGLE, TAPS, skipped
from tests.browser.harness import free_port


@pytest.fixture(scope="module")
def demo(zoo: Zoo) -> gr.Blocks:
    return page.build(zoo)


def at(**query: str) -> SimpleNamespace:
    return SimpleNamespace(query_params=query)


# ---- the address


def test_an_empty_address_is_the_default_model_as_trained(desk):
    session, focus, model, plan, picture, views, pills, note, box, remember, tabs, link = page.restore(desk, at())
    assert session.visitor and focus == Focus() and model == HIRES and plan == picture["trained"]
    assert views is None and "No image" in note and tabs.selected == "chat" and link == "?" and remember is False


def test_everything_comes_back(desk):
    query = {"m": TAPS, "p": "base@0,2@1*0.5", "x": "signs.png", "q": "What?", "t": "stacks"}
    _, focus, model, plan, picture, views, _, note, box, _, tabs, link = page.restore(desk, at(**query))
    assert (model, plan, box["text"], tabs.selected) == (TAPS, "base@0,2@1*0.5", "What?", "stacks")
    assert focus.example == "signs.png" and focus.question == "What?" and views["name"] == "signs.png"
    assert focus.truth == ""  # is known of the example's own question
    own = at(x="signs.png", q="what is on the orange sign?")
    assert page.restore(desk, own)[1].truth == page.restore(desk, at(x="signs.png"))[1].truth == "EAGLE"
    assert link == "?m=embedded/taps&p=base@0,2@1*0.5&x=signs.png&q=What%3F"


def test_what_an_address_gets_wrong_is_passed_over_with_a_notice(desk):
    query = {"m": "nobody/nothing", "p": "0@99", "x": "../../x", "t": "<script>"}
    _, focus, model, plan, picture, _, _, note, _, _, tabs, _ = page.restore(desk, at(**query))
    assert model == HIRES and plan == picture["trained"] and focus.images == () and tabs.selected == "chat"
    assert "not offered" in note and "layers are 0 to" in note and "no example" in note


# ---- model, plan, image


def test_another_model_comes_as_trained(desk, focus):
    plan, picture, views, pills, note, remember, link = page.choose_model(desk, TAPS, focus)
    assert picture["name"] == TAPS and plan == picture["trained"] and "m=embedded/taps" in link
    assert "float32" in pills and "in memory" in pills
    assert page.in_memory(desk, TAPS) == pills


def test_a_plan_is_checked_and_a_wrong_one_changes_only_the_note(desk, focus):
    plan, picture, note, link = page.set_plan(desk, " base@0 ,1@2*0.50", HIRES, focus)
    assert plan == picture["plan"] == "base@0,1@2*0.5" and "p=base@0,1@2*0.5" in link
    for wrong in ("base@0,base@0", "0@99", "<img src=x>", "9" * 9999):
        *rest, note, _ = page.set_plan(desk, wrong, HIRES, focus)
        assert all(map(skipped, rest)) and "dl-error" in note and "<img" not in note


def test_an_upload_comes_into_focus(desk, tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (30, 20)).save(path)
    kept, focus, views, note, link = page.choose_image(desk, str(path), HIRES, "none", Session(), Focus(question="q"))
    assert kept.visitor and desk.held(focus.images[0]).name == "photo.png" and focus.question == "q"
    assert "not part of the address" in note and link == "?p=none&q=q"


@pytest.mark.parametrize("name", ["empty.png", "text.png", "cut.png", "bomb.png", "tiny.png"])
def test_bad_files_are_one_sentence_or_converted(desk, tmp_path, name):
    path = tmp_path / name
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    data = {"empty.png": b"", "text.png": b"hello", "cut.png": buffer.getvalue()[:60]}
    if name == "bomb.png":
        Image.new("1", (20_000, 20_000)).save(path)
    elif name == "tiny.png":
        Image.new("RGB", (1, 1)).save(path)
    else:
        path.write_bytes(data[name])
    call = (desk, str(path), HIRES, "none", Session(), Focus())
    if name == "tiny.png":
        assert "enlarged" in page.choose_image(*call)[3]
    else:
        with pytest.raises(UserError, match=name):
            page.choose_image(*call)


def test_an_example_comes_with_its_question_and_truth(desk):
    focus, views, note, link = page.choose_example(desk, "signs.png", HIRES, "none", Session())
    assert focus.truth == "EAGLE" and views["name"] == "signs.png" and "x=signs.png" in link


def test_an_example_comes_into_compare_and_stacks_with_its_question_at_once(desk):
    """Else what is clicked before the question follows asks the one before, of the new image."""
    chosen = (desk, "signs.png", HIRES, "none", Session())
    focus, *_, question, truth, filled, image = page.compare_example(*chosen, "before?", "42", ("before?", ("i",)))
    assert (question, truth) == (focus.question, "EAGLE") == ("What is on the orange sign?", "EAGLE")
    assert filled == (focus.question, ("signs.png",)) and "signs&#46;png" in image
    focus, *_, question = page.live_example(*chosen)
    assert (focus.images, question) == (("signs.png",), "What is on the orange sign?")


def test_a_variant_of_the_lab_goes_to_the_chat_and_into_compare(desk, focus):
    model, tabs, plan, picture, *_ = page.chat_with(desk, TAPS, focus)
    assert model == picture["name"] == TAPS and tabs.selected == "chat" and plan == picture["trained"]
    tabs, *columns = page.put_into_compare(desk, TAPS, HIRES, "none")
    assert (tabs.selected, *columns) == ("compare", HIRES, "none", TAPS, "")
    with pytest.raises(UserError, match="not offered"):
        page.put_into_compare(desk, "embedded/lab-nothing", HIRES, "")


def test_a_variant_stands_beside_the_reference_of_the_lab(desk, monkeypatch):
    monkeypatch.setattr(page.lab, "shipped", lambda desk, variant: {"stack-2d": TAPS}.get(variant, ""))
    assert page.put_into_compare(desk, HIRES, HIRES, "none")[1:] == (TAPS, "", HIRES, "")
    assert page.put_into_compare(desk, TAPS, HIRES, "none")[1:] == (HIRES, "none", TAPS, "")  # never beside itself
    gate = ("embedded/lab-gate", "none")
    assert page.put_into_compare(desk, HIRES, *gate)[1:] == (*gate, HIRES, "")
    assert page.put_into_compare(desk, TAPS, TAPS, "")[1:] == (HIRES, "", TAPS, "")  # put there a click ago
    assert page.put_into_compare(desk, SINGLE, SINGLE, "")[1:] == (TAPS, "", SINGLE, "")
    assert page.put_into_compare(desk, TAPS, TAPS, "none")[1:] == (TAPS, "none", TAPS, "")


def test_a_plan_that_is_none_keeps_nobody_from_an_image(desk, session, tmp_path):
    """Only the address needs it; an example clicked beside it was silently not taken."""
    focus, _, note, link = page.choose_example(desk, "signs.png", HIRES, "base@0,0@99", session)
    assert focus.example == "signs.png" and "576 × 576" in note and skipped(link)
    path = tmp_path / "mine.png"
    Image.new("RGB", (60, 40)).save(path)
    _, focus, _, note, link = page.choose_image(desk, str(path), HIRES, "base@", session, focus)
    assert "60 × 40" in note and skipped(link)


def test_the_address_follows_the_model_and_plan_of_now(desk, focus):
    """Not those that an answer was begun under: they may have been changed while it was made."""
    assert page.follow(desk, TAPS, "base@0", focus).startswith("?m=embedded/taps&p=base@0&x=receipt.png&q=What")
    assert skipped(page.follow(desk, TAPS, "base@", focus))


# ---- the whole app


def function(demo: gr.Blocks, api_name: str):
    return next(fn for fn in demo.fns.values() if fn.api_name == api_name)


def call(demo: gr.Blocks, api_name: str, state: SessionState, inputs: list) -> list:
    """The outputs of one event, the last ones of a stream, as the browser gets them."""
    fn = function(demo, api_name)

    async def run() -> list:
        iterator, data = None, None
        while True:
            out = await demo.process_api(fn, inputs, state=state, iterator=iterator)
            if not out["is_generating"]:  # the end of a stream has no values of its own
                return out["data"] if data is None else data
            data, iterator = out["data"], out.get("iterator")

    return asyncio.run(run())


def test_every_event_has_a_name(demo):
    names = [fn.api_name for fn in demo.fns.values()]
    assert all(isinstance(name, str) for name in names) and len(names) == len(set(names)), names


def test_after_every_answer_the_page_asks_whether_the_conversation_was_cleared_meanwhile(demo):
    """Gradio's page may draw an answer's last state after that of `clear`: 6 of 120 quick Retry-then-Clear did so."""
    for name in ("ask", "ask_example", "retry", "edit", "resume"):
        after, answer = function(demo, f"{name}_settled"), function(demo, name)
        assert (after.trigger_after, after.trigger_only_on_success) == (answer._id, False)
        assert not after.queue and {block._id for block in after.outputs} < {block._id for block in answer.outputs}


def test_a_choice_made_while_another_is_drawn_is_drawn_next(demo):
    """With gradio's own "once" it is lost: the box then names one model or score, and the page shows another."""
    names = ["choose_model", "lab_results", "mark_budget", "keep", "deal", "lab_chat", "lab_compare"]
    names += ["lab_example", "compare_example", "live_example"]
    assert {name: function(demo, name).trigger_mode for name in names} == dict.fromkeys(names, "always_last")
    assert function(demo, "ask_example").trigger_mode == "multiple"
    slider = next(block for block in demo.blocks.values() if "keep some" in str(getattr(block, "label", "")))
    for name in ("mark_budget", "keep"):  # "release" is a pointer's alone
        assert (slider._id, "input") in function(demo, name).targets


def test_nothing_is_reported_to_anyone_and_the_queue_is_bounded(demo):
    assert not demo.analytics_enabled
    assert demo._queue.max_size == WAITING


def test_no_picture_or_answer_is_in_the_page_that_everyone_gets(demo):
    config = json.dumps(demo.get_config_file(), default=str)
    assert len(config) < 1_500_000 and "/work" not in config


def test_two_visitors_do_not_see_one_another(demo, zoo):
    plans = {"a": "base@0", "b": "none"}
    states = {name: SessionState(demo) for name in plans}
    inputs = {name: ["signs.png", HIRES, plan, *SETTINGS, None, None] for name, plan in plans.items()}
    for name in plans:
        call(demo, "ask_example", states[name], inputs[name])
    chats = {name: call(demo, "clear", states[name], [None])[0] for name in plans}
    assert chats == {"a": [], "b": []}
    found = {}
    for name, state in states.items():
        focus = next(value for value in state.state_data.values() if isinstance(value, Focus))
        found[name] = focus
    assert found["a"].record != found["b"].record and found["a"].record and found["b"].record


def test_at_the_same_time_each_gets_what_each_would_get_alone(demo, zoo):
    """Two streams interleaved step by step, each under its own plan."""
    engine = zoo.get(HIRES)
    fn = function(demo, "ask")
    plans = ["base@0,0@1,1@2,2@3,3@4", "base@0", "none"]

    async def run() -> list[str]:
        states = [SessionState(demo) for _ in plans]
        iterators, running, chats = [None] * len(plans), set(range(len(plans))), [None] * len(plans)
        focus_id = next(c._id for c in demo.blocks.values() if isinstance(c, gr.State) and isinstance(c.value, Focus))
        for state in states:
            state.blocks_config.blocks[focus_id] = demo.blocks[focus_id]
            state[focus_id] = Focus(images=("receipt.png",))
        while running:
            for i in sorted(running):
                message = {"text": "What is it?", "files": []}
                inputs = [message, HIRES, plans[i], *SETTINGS, False, None, None]
                out = await demo.process_api(fn, inputs, state=states[i], iterator=iterators[i])
                iterators[i] = out.get("iterator")
                if not out["is_generating"]:
                    running.discard(i)
                    chats[i] = next(v for v in states[i].state_data.values() if isinstance(v, Session))
        return [session.turns[0].record for session in chats]

    keys = asyncio.run(run())
    desk = next(cell.cell_contents for cell in fn.fn.__closure__ if type(cell.cell_contents).__name__ == "Desk")
    for key, plan in zip(keys, plans, strict=True):
        record = desk.store.record(key)
        assert record.answer.text == engine.answer(record.prompt, Plan.parse(plan), record.sampling).text
    assert len({desk.store.record(key).answer.text for key in keys}) > 1


def test_limits_reach_the_page(zoo):
    demo = page.build(zoo, Limits(max_answer_tokens=10, max_text_chars=77))
    longest = next(block for block in demo.blocks.values() if getattr(block, "label", "") == "Longest answer")
    question = next(block for block in demo.blocks.values() if getattr(block, "label", "") == "Question")
    assert (longest.maximum, longest.value, question.max_length) == (10, 10, 77)


def test_the_api_tells_mistakes_in_a_sentence_and_goes_on(zoo, tmp_path):
    """A real server and gradio's own client: a bad plan, a bad file, then a question that works."""
    port = free_port()
    running = page.launch(zoo, port=port, block=False)
    try:
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        bad = tmp_path / "broken.png"
        bad.write_bytes(b"\x89PNG broken")
        ask = {"message": {"text": "What?", "files": []}, "model": HIRES}
        with pytest.raises(AppError, match="layers are 0 to"):
            client.predict("signs.png", HIRES, "0@99", *SETTINGS, api_name="/ask_example")
        with pytest.raises(AppError, match="not in the list of choices"):
            client.predict("signs.png", "/etc/passwd", "none", *SETTINGS, api_name="/ask_example")
        with pytest.raises(AppError, match=r"broken\.png"):
            message = {"text": "What?", "files": [handle_file(bad)]}
            client.predict(message, HIRES, "none", *SETTINGS, False, api_name="/ask")
        box, bubbles, *_ = client.predict("signs.png", HIRES, "none", *SETTINGS, api_name="/ask_example")
        assert [bubble["role"] for bubble in bubbles] == ["user", "user", "assistant"]
        bubbles = client.predict(ask["message"], HIRES, "none", *SETTINGS, False, api_name="/ask")[1]
        assert len(bubbles) == 5
        with pytest.raises(Exception, match="(?i)not allowed|forbidden|InvalidPath|403|upload"):
            sneaky = {"text": "x", "files": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}
            client.predict(sneaky, HIRES, "none", *SETTINGS, False, api_name="/ask")
    finally:
        running.close(verbose=False)
