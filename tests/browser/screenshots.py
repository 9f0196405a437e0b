"""Pictures of the page in a real Chromium, for people to look at: every tab, wide and narrow, light and dark.

    python -m tests.browser.screenshots --out DIR                  starts the app itself
    python -m tests.browser.screenshots --out DIR --url URL        takes a running one
    python -m tests.browser.screenshots --readme                   writes assets/screenshot.png

Each picture is preceded by what a person would do: pick an example, switch a stack, run a comparison.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.browser import chromium
from tests.browser.harness import FLAGS, NARROW, ROOT, WIDE, Server, Visitor

EXAMPLE = "receipt.png"


def tab(page: Page, name: str) -> None:
    """Opens a tab."""
    page.get_by_role("tab", name=name).click()


def settle(page: Page, seconds: float = 1.5) -> None:
    """Waits until nothing is being computed or faded in."""
    page.wait_for_timeout(seconds * 1000)


def ask(page: Page) -> None:
    """Picks the example, which asks its question."""
    page.locator(f'[data-pick="{EXAMPLE}"]').first.click()
    page.locator("#dl-chat .dl-foot").last.wait_for()
    settle(page)


def open_rail(page: Page) -> None:
    """Shows the rail on a narrow window."""
    bar = page.locator(".dl-rail-bar")
    if bar.is_visible():
        bar.click()


def shots(visitor: Visitor, out: Path, name: str, only: set[str]) -> None:
    """All pictures of one window."""
    page = visitor.page

    def shot(what: str, full: bool = True) -> None:
        if not only or what in only:
            page.screenshot(path=out / f"{name}-{what}.png", full_page=full)

    settle(page, 3)
    shot("empty")
    ask(page)
    shot("chat")
    open_rail(page)
    settle(page, 0.5)
    shot("rail")
    open_rail(page)
    tab(page, "Layers")
    page.locator(".dl-map").first.wait_for()
    settle(page, 2)
    shot("layers")
    page.get_by_role("button", name="What is injected").click()
    settle(page, 0.5)
    shot("injected")
    tab(page, "Compare")
    settle(page)
    shot("compare-empty")
    page.get_by_role("button", name="Run the comparison").click()
    page.locator(".dl-pair").first.wait_for()
    settle(page)
    shot("compare")
    tab(page, "Stacks")
    page.locator(".dl-subset").first.wait_for()
    settle(page)
    open_rail(page)
    page.locator('.dl-arrow[data-source="2"] .dl-hit-end').click()
    settle(page)
    open_rail(page)
    shot("stacks")
    tab(page, "Lab")
    settle(page, 3)
    shot("lab")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="names of pictures, joined by commas")
    parser.add_argument("--windows", default="wide,wide-dark,narrow,narrow-dark")
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    windows = {
        "wide": (WIDE, False),
        "wide-dark": (WIDE, True),
        "narrow": (NARROW, False),
        "narrow-dark": (NARROW, True),
    }
    with Server() if options.url is None else nullcontext() as server, sync_playwright() as playwright:
        url = options.url or server.url
        browser = playwright.chromium.launch(executable_path=chromium.find(), args=list(FLAGS))
        if options.readme:
            readme(browser, url)
        else:
            options.out.mkdir(parents=True, exist_ok=True)
            for name in options.windows.split(","):
                visitor = Visitor(browser, url, *windows[name])
                visitor.open("/")
                try:
                    shots(visitor, options.out, name, set(filter(None, options.only.split(","))))
                finally:
                    print(name, visitor.foreign_requests(), visitor.unexpected_errors(), "overflow", visitor.overflow())
                    visitor.close()
        browser.close()


def readme(browser, url: str) -> None:
    """The picture at the top of the README."""
    visitor = Visitor(browser, url, WIDE)
    visitor.open("/")
    page = visitor.page
    settle(page, 3)
    tab(page, "Stacks")
    page.locator(f'[data-pick="{EXAMPLE}"]:visible').click()
    page.locator(".dl-subset").first.wait_for()
    settle(page)
    page.locator('.dl-arrow[data-source="1"] .dl-hit-end').click()
    settle(page, 3)
    page.mouse.move(900, 20)
    settle(page, 0.5)
    page.screenshot(path=ROOT / "assets" / "screenshot.png")
    visitor.close()


if __name__ == "__main__":
    main()
