"""Starts the real server and watches real pages: the part of the browser tests that is not a test.

Knows nothing about what the page shows. A Visitor is one browser context (its own storage, size and colour scheme) with
one page; it keeps every request, every console error and every uncaught exception, and `check()` fails on any that
should not be there.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page

from tests import offline

ROOT = Path(__file__).resolve().parents[2]
WIDE = (1400, 900)  # CSS pixels
NARROW = (400, 850)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)
FAILURES = Path(__file__).parent / "failures"  # screenshots of failed tests, ignored by git


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server in a process of its own, from its start until `stop()`; also a context manager.

    command: what to run, with "{port}" where the port goes. Default: `python -m app --port {port} *args`, under the
    guard that refuses connections leaving the machine.
    """

    def __init__(self, *args: str, command: Sequence[str] | None = None, env: dict[str, str] | None = None):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        default = [sys.executable, "-m", "tests.offline", "app", "--port", "{port}", *args]
        self.command = [part.replace("{port}", str(self.port)) for part in (command or default)]
        self._log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, seconds: float = 120) -> float:
        """Wait until the page answers; returns the seconds it took. RuntimeError with the log if it does not."""
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.command} ended with {self.process.returncode}:\n{self.log()[-4000:]}")
            try:
                with urllib.request.urlopen(self.url, timeout=30) as reply:
                    if reply.status == 200:
                        return time.monotonic() - start
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise RuntimeError(f"{self.command} did not answer on {self.url} in {seconds} s:\n{self.log()[-4000:]}")

    def log(self) -> str:
        """All that the server has printed so far."""
        return os.pread(self._log.fileno(), 1 << 24, 0).decode(errors="replace")

    def left_the_machine(self) -> list[str]:
        """The server's own attempts to reach another machine."""
        return [line for line in self.log().splitlines() if offline.MARK in line]

    def stop(self) -> None:
        """End the server and all it has started: politely, after ten seconds by force."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)

    def __enter__(self) -> "Server":
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._log.close()


class Visitor:
    """One person at the page. Attributes: page, requests (URLs), errors (console errors and uncaught exceptions).

    `allowed`: regular expressions for errors that a test provokes on purpose.
    """

    def __init__(self, browser: Browser, base_url: str, size: tuple[int, int] = WIDE, dark: bool = False):
        self.context = browser.new_context(
            base_url=base_url,
            viewport={"width": size[0], "height": size[1]},
            color_scheme="dark" if dark else "light",
            locale="en-GB",
            accept_downloads=True,
            permissions=["clipboard-read", "clipboard-write"],
        )
        self.context.set_default_timeout(60_000)  # milliseconds; the test machine has two cores
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.allowed: list[str] = [r"/gradio_api/mcp/schema\)$"]  # gradio's page asks whether there is an MCP server
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.context.on("page", self._watch)
        self.page: Page = self.context.new_page()

    def _watch(self, page: Page) -> None:
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        page.on("websocket", lambda websocket: self.requests.append(websocket.url))

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location.get('url', '')})")

    def open(self, path: str = "/") -> Page:
        """Go to the path and wait until the app has drawn itself."""
        self.page.goto(path)
        self.page.wait_for_selector(".gradio-container", state="visible")
        return self.page

    def foreign_requests(self) -> list[str]:
        """Requests to anywhere but 127.0.0.1 (data: and blob: never leave the page)."""
        return [
            url
            for url in self.requests
            if urlsplit(url).scheme not in ("data", "blob", "about") and urlsplit(url).hostname != "127.0.0.1"
        ]

    def unexpected_errors(self) -> list[str]:
        """Errors that no pattern in `allowed` matches."""
        return [error for error in self.errors if not any(re.search(pattern, error) for pattern in self.allowed)]

    def overflow(self) -> int:
        """By how many CSS pixels the page is wider than its window: 0 when nothing has to be scrolled sideways."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def check(self) -> None:
        """AssertionError if a request left the machine or the console shows an error."""
        assert not self.foreign_requests(), f"requests left the machine: {self.foreign_requests()}"
        assert not self.unexpected_errors(), f"errors on the console: {self.unexpected_errors()}"

    def close(self) -> None:
        self.context.close()
