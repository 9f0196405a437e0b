"""Fixtures of the browser tests: one server and one Chromium for all of them, a fresh visitor for each.

    def test_something(visit):
        visitor = visit()          # or visit(size=NARROW, dark=True), visit(path="/?plan=none")
        visitor.page.get_by_role("tab", name="Chat").click()

Every visitor is checked when its test ends: no request has left 127.0.0.1, no console error, no uncaught exception. A
missing Chromium is an error of every test here, never a skip. All tests of this folder run in one xdist worker, so that
one server serves them.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.browser import chromium
from tests.browser.harness import FAILURES, FLAGS, WIDE, Server, Visitor

HERE = Path(__file__).parent
_visitors = pytest.StashKey[list[Visitor]]()


@pytest.hookimpl(tryfirst=True)  # before xdist reads the group
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.xdist_group("browser"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Leaves a screenshot of every open page when a test fails."""
    report = yield
    if report.when == "call" and report.failed:
        FAILURES.mkdir(exist_ok=True)
        for number, visitor in enumerate(item.stash.get(_visitors, [])):
            path = FAILURES / f"{item.name}-{number}.png"
            visitor.page.screenshot(path=path, full_page=True)
            report.sections.append(("screenshot", str(path)))
    return report


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The app as `python -m app` starts it, on a free port. It must not have tried to reach another machine."""
    with Server() as running:
        yield running
        assert not running.left_the_machine(), running.left_the_machine()


@pytest.fixture(scope="session")
def base_url(server: Server) -> str:
    return server.url


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium.find(), args=list(FLAGS))
        yield running
        running.close()


@pytest.fixture
def visit(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Callable[..., Visitor]]:
    """visit(path="/", size=WIDE, dark=False, url=None) -> a Visitor with its page open; two calls are two people."""
    visitors = request.node.stash.setdefault(_visitors, [])

    def _visit(path: str = "/", size: tuple[int, int] = WIDE, dark: bool = False, url: str | None = None) -> Visitor:
        visitor = Visitor(browser, url or request.getfixturevalue("base_url"), size, dark)
        visitors.append(visitor)
        visitor.open(path)
        return visitor

    yield _visit
    try:
        for visitor in visitors:
            visitor.check()
    finally:
        for visitor in visitors:
            visitor.close()
