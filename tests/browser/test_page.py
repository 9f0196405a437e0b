"""The page in a real Chromium, with the embedded model: what a person does, and what must come of it.

Nothing here depends on what the model has learned. Each visitor is checked at the end: no request has left the machine,
no error on the console.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Locator, Page, expect

from tests.browser.harness import NARROW, Server, Visitor

EXAMPLE = "receipt.png"
expect.set_options(timeout=30_000)  # milliseconds; two busy cores


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "my sign.png"
    image = Image.new("RGB", (160, 120), "white")
    ImageDraw.Draw(image).text((40, 50), "K7PX", fill="black")
    image.save(path)
    return path


@pytest.fixture(scope="module")
def tiny_server() -> Iterator[Server]:
    """The page with random weights under the embedded names."""
    command = [sys.executable, "-m", "tests.browser.tiny_page", "--port", "{port}"]
    with Server(command=command) as running:
        yield running


def plan(page: Page) -> Locator:
    return page.locator("#dl-plan textarea")


def arrow(page: Page, source: str) -> Locator:
    return page.locator(f'.dl-arrow[data-source="{source}"]')


def answers(page: Page) -> Locator:
    """The finished answers in the chat."""
    return page.locator("#dl-chat .dl-answer")


def ready(page: Page) -> None:
    """Waits for the stack picture."""
    page.locator(".dl-arrow").first.wait_for()


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def pick(page: Page, name: str = EXAMPLE) -> None:
    """Clicks an example of the open tab."""
    page.locator(f'[data-pick="{name}"]:visible').click()


def upload(page: Page, file: Path) -> None:
    """Puts a file into the rail."""
    with page.expect_file_chooser() as chooser:
        page.locator("#dl-upload").click()
    chooser.value.set_files(file)
    expect(page.locator("#dl-note")).to_contain_text(file.name)


def test_upload_ask_edit_and_clear(visit, picture: Path) -> None:
    page = visit().page
    ready(page)
    expect(page.locator("#dl-note")).to_contain_text("No image yet")
    page.locator("#dl-box input[type=file]").set_input_files(picture)
    page.locator("#dl-box textarea").fill("What does it say?")
    page.locator("#dl-box textarea").press("Enter")
    expect(answers(page)).to_have_count(1)
    expect(page.locator("#dl-chat .dl-badge")).to_have_text("trained")
    expect(page.locator("#dl-box textarea")).to_have_value("")
    expect(page.locator("#dl-note")).to_contain_text("my sign.png")
    expect(page.locator("#dl-note")).to_contain_text("not part of the address")
    expect(page.locator(".dl-canvas image").first).to_be_visible()
    expect(page).to_have_url(re.compile(r"q=What\+does\+it\+say"))
    assert "x=" not in page.url
    word = page.locator("#dl-chat .dl-w").first
    if word.count():
        word.hover()
        expect(page.locator(".dl-tip")).to_contain_text("%")
    expect(page.get_by_role("button", name="Share")).to_have_count(0)
    page.get_by_role("button", name="Edit").first.click()
    box = page.locator("#dl-chat textarea").first
    box.fill("How many letters?")
    page.get_by_role("button", name="Submit").first.click()
    expect(page.locator("#dl-chat [data-testid=user]").last).to_contain_text("How many letters?")
    expect(answers(page)).to_have_count(1)
    page.get_by_role("button", name="Retry").first.click()
    expect(answers(page)).to_have_count(1)
    page.get_by_role("button", name="Clear").first.click()
    expect(answers(page)).to_have_count(0)


def test_what_was_drawn_too_late_is_asked_again_and_nothing_else(visit) -> None:
    """Gradio's page may draw an overtaken answer after the one of now: 11 of 50 quick switches to and fro did so."""
    visitor = visit(f"/?x={EXAMPLE}&t=stacks")
    page = visitor.page
    ready(page)
    answer, pressed = page.locator("#dl-live-answer"), page.locator(".dl-subset[aria-pressed=true]")
    live = page.evaluate("gradio_config.dependencies.find((each) => each.api_name === 'live').id")
    asks = lambda request: "queue/join" in request.url and request.post_data_json["fn_index"] == live  # noqa: E731
    asked = []
    page.on("request", lambda request: asks(request) and asked.append(request))

    def settle() -> None:
        """Until all that was asked is drawn, and has been looked at."""
        expect(answer).to_have_attribute("aria-busy", "false")
        page.evaluate("new Promise((done) => setTimeout(done, 500))")  # by the page's clock, on which its look waits

    expect(page.locator("#dl-live-more .dl-subset")).to_have_count(32)
    settle()
    arrow(page, "2").locator(".dl-hit-end").click()
    expect(pressed).to_contain_text("without 2")
    settle()
    assert len(asked) == 1  # all that is shown is of the plan of now
    page.evaluate("lens.emit('set-plan', 'base@0'); lens.emit('drawn')")
    expect(pressed).to_contain_text("base only")
    settle()
    assert len(asked) == 2  # what is shown is late, but the picture was about to ask
    page.evaluate("document.querySelector('#dl-live-answer [data-of]').dataset.of = 'another'")
    page.evaluate("lens.asked(); lens.asked(); lens.drawn(true)")
    page.wait_for_timeout(500)
    assert len(asked) == 2  # something is still to be drawn
    with page.expect_request(asks):
        page.evaluate("lens.drawn(true)")
    settle()
    assert len(asked) == 3  # once: the text is the same, so that the part stays as it is made here
    page.evaluate("lens.asked()")
    page.locator("#dl-live-stop").click()
    page.evaluate("lens.drawn(true)")
    settle()
    assert len(asked) == 3  # what was stopped in line is not asked again


def test_a_switch_answers_again(visit) -> None:
    page = visit().page
    ready(page)
    open_tab(page, "Stacks")
    expect(page.locator("#dl-live-answer")).to_contain_text("No question yet")
    pick(page)
    card = page.locator(".dl-answer-card:not(.dl-busy)")
    expect(card).to_contain_text("lemon")
    expect(card.locator(".dl-badge").first).to_have_text("trained")
    expect(page.locator(".dl-subset")).to_have_count(32)
    trained = plan(page).input_value()
    expect(arrow(page, "2").locator(".dl-line")).to_be_visible()
    arrow(page, "2").locator(".dl-hit-end").click()
    expect(card.locator(".dl-badge").first).to_have_text("ablated")
    expect(card).to_contain_text("before, under")
    expect(plan(page)).to_have_value(re.sub(r",2@\d+", "", trained))
    expect(page.locator(".dl-subset[aria-pressed=true]")).to_contain_text("without 2")
    page.locator(".dl-subset", has_text="base only").click()
    expect(plan(page)).to_have_value("base@0")
    expect(card.locator(".dl-foot .dl-plan")).to_have_text("base@0")
    expect(page.locator(".dl-effects .dl-cell.dl-enters")).to_have_count(1)
    page.get_by_role("button", name="as trained").click()
    expect(card.locator(".dl-badge").first).to_have_text("trained")


def test_the_picture_by_keyboard_pointer_and_text(visit) -> None:
    page = visit(path="/?p=base@0,0@1,1@2").page
    ready(page)
    expect(plan(page)).to_have_value("base@0,0@1,1@2")
    expect(arrow(page, "1")).to_have_attribute("aria-checked", "true")
    expect(arrow(page, "3")).to_have_attribute("aria-checked", "false")
    arrow(page, "1").focus()
    for key, expected in (
        ("Enter", "base@0,0@1"),
        (" ", "base@0,0@1,1@2"),
        ("ArrowUp", "base@0,0@1,1@3"),
        ("ArrowDown", "base@0,0@1,1@2"),
        ("-", "base@0,0@1,1@2*0.9"),
        ("+", "base@0,0@1,1@2"),
    ):
        page.keyboard.press(key)
        expect(plan(page)).to_have_value(expected)
        assert page.evaluate("document.activeElement.dataset.source") == "1", "the arrow keeps the focus"
    end = arrow(page, "0").locator(".dl-hit-end").bounding_box()
    above = page.locator(".dl-layer-name", has_text="layer 5").bounding_box()
    page.mouse.move(end["x"] + end["width"] / 2, end["y"] + end["height"] / 2)
    page.mouse.down()
    page.mouse.move(end["x"], above["y"] + 22, steps=5)
    page.mouse.up()
    expect(plan(page)).to_have_value("base@0,0@5,1@2")
    arrow(page, "1").locator(".dl-hit-end").hover()
    page.mouse.wheel(0, 100)
    expect(plan(page)).to_have_value("base@0,0@5,1@2*0.9")
    plan(page).fill("base@0,0@99")
    plan(page).press("Enter")
    expect(page.locator("#dl-note [role=alert]")).to_contain_text("layers are 0 to")
    expect(plan(page)).to_have_value("base@0,0@99")  # nothing typed is lost
    plan(page).fill("single injection")
    plan(page).press("Enter")
    expect(plan(page)).to_have_value("base@0")
    expect(page.locator("#dl-note [role=alert]")).to_have_count(0)
    expect(arrow(page, "0")).to_have_attribute("aria-checked", "false")


def test_the_address_brings_everything_back(visit) -> None:
    visitor = visit(path="/?p=base@0,2@5*0.5&x=signs.png&q=What+is+it%3F&t=stacks")
    page = visitor.page
    card = page.locator(".dl-answer-card:not(.dl-busy)")
    expect(card).to_contain_text("What is it?")
    expect(plan(page)).to_have_value("base@0,2@5*0.5")
    expect(page.get_by_role("tab", name="Stacks")).to_have_attribute("aria-selected", "true")
    arrow(page, "2").focus()
    page.keyboard.press("ArrowDown")
    expect(plan(page)).to_have_value("base@0,2@4*0.5")
    expect(page).to_have_url(re.compile(r"p=base@0,2@4\*0\.5.*x=signs\.png.*t=stacks"))
    address = page.url
    said = card.locator(".dl-words").first
    expect(card.locator(".dl-foot .dl-plan")).to_have_text("base@0, 2@4*0.5")
    text = said.inner_text() if said.count() else ""
    other = visit(path=address.removeprefix(visitor.page.evaluate("location.origin"))).page
    again = other.locator(".dl-answer-card:not(.dl-busy)")
    expect(again.locator(".dl-foot .dl-plan")).to_have_text("base@0, 2@4*0.5")
    if text:
        expect(again.locator(".dl-words").first).to_have_text(text)
    open_tab(other, "Chat")
    expect(answers(other)).to_have_count(1)


def test_layers_link_words_tokens_and_layers(visit) -> None:
    page = visit(path=f"/?x={EXAMPLE}").page
    expect(answers(page)).to_have_count(1)
    open_tab(page, "Layers")
    for name in ("norms", "effect", "ratio", "attention"):
        expect(page.locator(f"#dl-{name}-plot .js-plotly-plot")).to_have_count(1)
    canvas = page.locator(".dl-map").first
    if page.locator(".dl-said .dl-word").count():
        word = page.locator(".dl-said .dl-word").first
        expect(word).to_have_attribute("aria-pressed", "true")
        readout = page.locator(".dl-readout")
        expect(readout).to_contain_text("of its attention")
        before = readout.inner_text()
        page.get_by_label("Layer", exact=True).focus()
        page.keyboard.press("ArrowLeft")
        expect(readout).not_to_have_text(before)
        canvas.click(position={"x": 20, "y": 20})
        expect(readout).to_contain_text("row 0, column 0")
        page.keyboard.press("Escape")
        expect(page.locator(".dl-pinned")).to_have_count(0)
        expect(word).to_have_attribute("aria-pressed", "false")
    page.get_by_role("button", name="What is injected").click()
    expect(page.locator(".dl-map")).to_have_count(10)
    page.locator("#dl-look-body").get_by_label("csv").check()
    expect(page.locator("#dl-file")).to_be_hidden()
    with page.expect_download() as started:
        page.get_by_role("button", name="Download", exact=True).click()
    table = Path(started.value.path()).read_text(encoding="utf-8")
    assert len(list(csv.reader(io.StringIO(table)))) > 10 * 64
    assert started.value.suggested_filename.endswith(".csv")


def test_compare_runs_side_by_side(visit) -> None:
    page = visit().page
    ready(page)
    open_tab(page, "Compare")
    pick(page)
    expect(page.get_by_label("Truth, if it is known")).to_have_value("5.63")
    page.get_by_role("button", name="Run the comparison").click()
    expect(page.locator(".dl-pair")).to_have_count(3)
    badges = page.locator(".dl-column .dl-badge")
    expect(badges).to_have_text(["trained", "trained", "ablated"])
    expect(page.locator("#dl-column-0")).to_contain_text("log p (truth)")
    expect(page.locator(".dl-pair .dl-say").first).not_to_be_empty()


def test_two_visitors_at_once_get_what_each_gets_alone(visit) -> None:
    plans = ("base@0,0@1,1@2,2@3,3@4,4@5,5@6,6@7,7@8,8@9", "none")

    def said(visitors: list[Visitor]) -> list[str]:
        for visitor in visitors:
            pick(visitor.page, "shapes.png")
        for visitor in visitors:
            expect(answers(visitor.page)).to_have_count(1)
        found = []
        for visitor in visitors:
            answer = answers(visitor.page).first.inner_text()
            shown = visitor.page.locator("#dl-chat .dl-plan").first.inner_text().replace(" ", "")
            found.append(f"{shown}: {answer}")
            visitor.page.get_by_role("button", name="Clear").first.click()
            expect(answers(visitor.page)).to_have_count(0)  # so that what is read next is a new one
        return found

    visitors = [visit(path=f"/?p={each}") for each in plans]
    for visitor in visitors:
        ready(visitor.page)
    alone = [said([visitor])[0] for visitor in visitors]
    assert alone[0] != alone[1]
    assert said(visitors) == alone


def answering(page) -> None:
    """Asks for a long answer, and returns while it streams: random weights never end one by themselves."""
    ready(page)
    page.locator("#dl-sampling button").first.click()
    page.get_by_label("number input for Longest answer").fill("1000")
    page.keyboard.press("Tab")
    pick(page)
    expect(page.locator("#dl-chat .dl-words")).not_to_be_empty()


def test_stop_keeps_what_has_been_said(visit, tiny_server: Server) -> None:
    page = visit(url=tiny_server.url).page
    answering(page)
    page.locator("#dl-box .stop-button").click()
    expect(answers(page)).to_have_count(1)
    expect(page.locator("#dl-chat .dl-foot")).to_contain_text("stopped")
    expect(page.locator("#dl-box .submit-button")).to_be_visible()


def test_what_is_chosen_during_an_answer_stays_chosen(visit, tiny_server: Server, picture: Path) -> None:
    """Image and model of now are in focus and in the address when the answer to an earlier question ends."""
    page = visit(url=tiny_server.url).page
    answering(page)
    upload(page, picture)
    page.locator("#dl-model input").click()
    page.get_by_role("option", name="embedded/hires-concat", exact=True).click()
    expect(page).to_have_url(re.compile("m=embedded/hires-concat"))
    page.locator("#dl-box .stop-button").click()
    expect(answers(page)).to_have_count(1)
    page.wait_for_timeout(500)  # the address has followed the answer
    assert "m=embedded/hires-concat" in page.url and "x=" not in page.url
    open_tab(page, "Compare")
    expect(page.locator("#dl-compare-image img")).to_have_attribute("alt", picture.name)
    open_tab(page, "Chat")
    page.get_by_label("number input for Longest answer").fill("1000")
    page.keyboard.press("Tab")
    pick(page)
    expect(page.locator("#dl-chat .dl-words").last).not_to_be_empty()
    page.get_by_role("button", name="Clear").first.click()
    expect(page.locator("#dl-box .submit-button")).to_be_visible()
    page.wait_for_timeout(1000)
    expect(answers(page)).to_have_count(0)


def test_bad_uploads_are_one_message_and_the_next_request_works(visit, tmp_path: Path, picture: Path) -> None:
    bad = tmp_path / "broken.png"
    bad.write_bytes(picture.read_bytes()[:80])
    visitor = visit()
    page = visitor.page
    ready(page)
    with page.expect_file_chooser() as chooser:
        page.locator("#dl-upload").click()
    chooser.value.set_files(bad)  # whose name the rail never shows
    message = page.locator(".toast-body")
    expect(message).to_contain_text("broken.png")
    message.get_by_test_id("toast-close").click()
    expect(message).to_have_count(0)
    page.locator("#dl-box input[type=file]").set_input_files(bad)
    page.locator("#dl-box textarea").fill("What is it?")
    page.locator("#dl-box textarea").press("Enter")
    expect(message).to_contain_text("broken.png")
    expect(page.locator("#dl-chat .error:visible")).to_have_count(0)
    expect(page.locator("#dl-box textarea")).to_have_value("What is it?")  # nothing typed is lost
    pick(page)
    expect(answers(page)).to_have_count(1)


@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_window_shows_everything_without_scrolling_sideways(visit, dark: bool) -> None:
    visitor = visit(path=f"/?x={EXAMPLE}", size=NARROW, dark=dark)
    page = visitor.page
    expect(answers(page)).to_have_count(1)
    expect(page.locator(".dl-canvas")).to_be_hidden()
    bar = page.locator(".dl-rail-bar")
    bar.click()
    expect(bar).to_have_attribute("aria-expanded", "true")
    expect(page.locator(".dl-canvas")).to_be_visible()
    assert visitor.overflow() == 0
    bar.click()
    for name, what in (("Layers", ".dl-map"), ("Stacks", ".dl-subset"), ("Compare", "#dl-compare-run")):
        open_tab(page, name)
        page.locator(what).first.wait_for()
        assert visitor.overflow() == 0, name
        cut = "cards => cards.filter(card => card.scrollWidth > card.clientWidth).length"
        assert page.locator(".dl-subset").evaluate_all(cut) == 0, "the dots of all stacks"
    bare = visit(path="/?t=compare", size=NARROW, dark=dark).page
    expect(bare.locator("#dl-compare-image")).to_contain_text("No image yet")
    box = bare.locator("#dl-compare-question textarea").first.bounding_box()
    assert box["width"] > 150 and box["x"] + box["width"] < NARROW[0], (
        "the question beside what there is instead of an image"
    )
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is not dark


def test_the_lab_beside_the_paper_and_step_by_step(visit, tiny_server: Server) -> None:
    """Made-up results of tests/lab.py, by pointer and by keyboard, also where it is narrow."""
    visitor = visit(url=tiny_server.url, path=f"/?x={EXAMPLE}&t=lab", size=NARROW)
    page = visitor.page
    expect(page.locator("#dl-lab-head")).to_contain_text("agree with the paper in sign")
    expect(page.locator("#dl-lab-variants .js-plotly-plot")).to_have_count(1)
    rows = page.locator(".dl-lab-table th[scope=row]")
    expect(rows).to_have_count(19)
    expect(page.locator("#dl-lab-recall .js-plotly-plot")).to_have_count(1)
    expect(page.locator("#dl-lab-search")).to_contain_text("Not compared yet")
    expect(page.locator(".dl-lab-again", has_text="lab run none --seeds 0,1,2 --steps 2000")).to_have_count(1)
    slider = page.get_by_label("Sets dealt")
    expect(slider).to_have_value("4")
    slider.focus()
    for left in (3, 2, 1):
        page.keyboard.press("ArrowLeft")
        expect(page.locator(".dl-deal-cells")).to_have_count(left)
    expect(page.locator(".dl-deal-row").last).to_contain_text("32 rows")
    expect(page.locator(".dl-deal-row").first).to_contain_text("16 rows")
    readout = page.locator("#dl-deal .dl-readout")
    expect(readout).to_contain_text("row 2, column 2 has got the tokens at (row, column) (4, 4)")
    page.locator(".dl-deal-places").focus()
    page.keyboard.press("ArrowUp")
    expect(readout).to_contain_text("row 1, column 2 has got the tokens at (row, column) (2, 4)")
    page.get_by_role("button", name="grid", exact=True).click()
    expect(readout).to_contain_text("row 1, column 2 has got the tokens at (row, column) (1, 2)")
    page.keyboard.press("Escape")
    expect(readout).to_contain_text("Choose a place")
    assert visitor.overflow() == 0
    page.get_by_role("button", name="put into Compare").click()
    expect(page.get_by_role("tab", name="Compare")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_label("2 · model")).to_have_value("embedded/lab-stack-2d")
    page.wait_for_timeout(1000)  # whatever else fills in the question has done so
    expect(page.locator("#dl-compare-question textarea").first).not_to_have_value("")
    open_tab(page, "Lab")
    page.get_by_role("button", name="chat with it").click()
    expect(page.get_by_role("tab", name="Chat")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#dl-model input")).to_have_value("embedded/lab-stack-2d")


def test_the_lab_in_a_hurry_by_keyboard_and_with_odd_pictures(visit, tiny_server: Server, tmp_path: Path) -> None:
    page = visit(url=tiny_server.url, path=f"/?x={EXAMPLE}&t=lab").page
    expect(page.locator("#dl-lab-variants .js-plotly-plot")).to_have_count(1)
    runs = page.get_by_label("Runs", exact=True)
    there = runs.input_value()
    runs.fill("none of these")
    page.keyboard.press("Enter")
    expect(page.locator("#dl-lab-head [role=alert]")).to_contain_text("There are no runs of “none of these”")
    runs.fill(there)
    page.keyboard.press("Enter")
    expect(page.locator("#dl-lab-head")).to_contain_text("agree with the paper in sign")
    bench = page.get_by_label("The paper's benchmark")
    for name in ("DocVQA", "GQA", "SEED"):  # faster than they are drawn
        bench.click()
        page.get_by_role("option", name=name, exact=True).click()
    expect(page.locator(".dl-lab-table thead")).to_contain_text("Paper, SEED")
    expect(bench).to_have_value("SEED")
    page.locator(".dl-lab-nav").get_by_role("link", name="how tokens are dealt out").click()
    expect(page.locator("#dl-deal")).to_be_in_viewport()
    expect(page).to_have_url(re.compile(f"x={EXAMPLE}.*t=lab$"))  # the page is the same still
    page.get_by_role("tab", name="Lab").scroll_into_view_if_needed()
    page.get_by_role("button", name="Show on the image").click()
    expect(page.locator("#dl-lab-kept .js-plotly-plot")).to_have_count(1)
    tall, wide = tmp_path / "tall.png", tmp_path / "wide.png"
    Image.new("RGB", (60, 180), "white").save(tall)
    Image.new("RGB", (1900, 20), "white").save(wide)
    upload(page, tall)
    expect(page.locator("#dl-lab-kept .js-plotly-plot")).to_have_count(0)  # of another image
    expect(page.locator(".dl-deal-places")).to_have_attribute("viewBox", "0 0 320 960")
    page.locator(".dl-deal-places image").click(position={"x": 4, "y": 4})
    expect(page.locator("#dl-deal .dl-readout")).to_contain_text("row 0, column 0 has got")
    upload(page, wide)
    expect(page.locator(".dl-deal-places")).to_have_attribute("viewBox", "0 0 320 64")
    page.locator("#dl-lab-keep input[type=range]").focus()
    expect(page.locator("#dl-lab-at-budget")).to_contain_text("37.5 %")
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#dl-lab-at-budget")).to_contain_text("22.5 %")
