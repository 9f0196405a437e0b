"""The harness itself: it notices what it is there to notice. Uses a page of its own instead of the app."""

import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser import chromium
from tests.browser.harness import NARROW, Server, Visitor

GOOD = "<link rel=icon href='data:,'><div class='gradio-container'>good</div>"
BAD = """<link rel=icon href='data:,'><div class='gradio-container'>bad</div>
<img src='http://example.invalid/pixel.png'>
<script>console.error('first'); setTimeout(() => { throw Error('second') }, 0)</script>"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "index.html").write_text(GOOD)
    (folder / "bad.html").write_text(BAD)
    (folder / "wide.html").write_text("<div class='gradio-container' style='width: 500px'>wide</div>")
    command = [sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1", "--directory", str(folder)]
    with Server(command=command) as running:
        yield running


def test_a_good_page_passes(visit, files: Server) -> None:
    visitor = visit(url=files.url)
    assert visitor.page.inner_text("body") == "good"
    visitor.check()
    assert files.url + "/" in visitor.requests


def test_foreign_requests_and_errors_are_noticed(browser: Browser, files: Server) -> None:
    visitor = Visitor(browser, files.url)
    try:
        visitor.open("/bad.html")
        visitor.page.wait_for_timeout(300)
        assert visitor.foreign_requests() == ["http://example.invalid/pixel.png"]
        assert any("first" in error for error in visitor.errors)
        assert any("second" in error for error in visitor.errors)
        with pytest.raises(AssertionError, match="left the machine"):
            visitor.check()
        visitor.requests.clear()
        with pytest.raises(AssertionError, match="console"):
            visitor.check()
        visitor.allowed += ["first", "second", "NAME_NOT_RESOLVED"]
        visitor.check()
    finally:
        visitor.close()


def test_overflow_is_measured(browser: Browser, files: Server) -> None:
    visitor = Visitor(browser, files.url, size=NARROW)
    try:
        visitor.open("/wide.html")
        assert visitor.overflow() > 90
        visitor.open("/")
        assert visitor.overflow() == 0
    finally:
        visitor.close()


def test_colour_scheme(browser: Browser, files: Server) -> None:
    for dark in (False, True):
        visitor = Visitor(browser, files.url, dark=dark)
        try:
            visitor.open()
            assert visitor.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is dark
        finally:
            visitor.close()


def test_a_server_that_ends_shows_its_log() -> None:
    with pytest.raises(RuntimeError, match="out of milk"):
        Server(command=[sys.executable, "-c", "import sys; sys.exit('out of milk')"]).__enter__()


def test_named_chromium_must_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMIUM", "/no/such/browser")
    with pytest.raises(chromium.NoChromium, match="CHROMIUM=/no/such/browser is not a browser that runs"):
        chromium.find()


def test_a_placeholder_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, script in {"chromium": "exit 1", "google-chrome": "echo 1.0"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert chromium.find() == tmp_path / "google-chrome"


def test_chromium_command_says_what_it_found() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.browser.chromium"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.removeprefix("Chromium: ").strip()).exists()
