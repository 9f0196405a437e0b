"""Finds the Chromium that the browser tests drive, and installs one where there is none. Knows nothing about the app.

    python -m tests.browser.chromium             prints its path
    python -m tests.browser.chromium --install   the same, after installing one if need be: Debian's package when this
                                                 is root on a system with apt-get, else Playwright's own

Order of the search: $CHROMIUM, then chromium, chromium-browser, google-chrome and google-chrome-stable on the PATH,
then Chrome's place on macOS, then the one Playwright has installed. A candidate counts when `--version` runs.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
HELP = (
    "Install Chromium or Google Chrome (Debian: apt-get install chromium), or name one that is there: "
    "CHROMIUM=/path/to/chromium make test"
)


class NoChromium(RuntimeError):
    """No browser was found; the message says what to do."""


def _runs(path: str | Path) -> bool:
    """Whether `path --version` works: Ubuntu's chromium-browser may be a placeholder that prints advice."""
    try:
        done = subprocess.run([str(path), "--version"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _playwrights_own() -> Path:
    """Where Playwright's own Chromium is, or would be."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        return Path(playwright.chromium.executable_path)


def find() -> Path:
    """The Chromium to use; NoChromium if there is none, or if $CHROMIUM names one that does not run."""
    if named := os.environ.get("CHROMIUM"):
        path = shutil.which(named)
        if path is None or not _runs(path):
            raise NoChromium(f"CHROMIUM={named} is not a browser that runs. {HELP}")
        return Path(path)
    for candidate in (*map(shutil.which, NAMES), MAC):
        if candidate and _runs(candidate):
            return Path(candidate)
    own = _playwrights_own()
    if _runs(own):
        return own
    raise NoChromium(f"no Chromium was found. {HELP}")


def install() -> Path:
    """Find a Chromium or install one, and return its path; NoChromium if neither way gave one that runs."""
    try:
        return find()
    except NoChromium:
        if os.environ.get("CHROMIUM"):
            raise
    commands = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        commands.insert(0, ["apt-get", "install", "-y", "--no-install-recommends", "chromium"])
        commands.insert(0, ["apt-get", "update"])
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    failed = []
    for command in commands:
        print("No Chromium was found:", " ".join(command), file=sys.stderr, flush=True)
        if subprocess.run(command, env=env, stdout=sys.stderr, check=False).returncode:
            failed.append(" ".join(command))
            continue
        try:
            return find()
        except NoChromium:
            continue
    raise NoChromium(
        f"no Chromium was found, and none could be installed (failed: {'; '.join(failed) or 'nothing'}). {HELP}"
    )


if __name__ == "__main__":
    try:
        print("Chromium:", install() if "--install" in sys.argv[1:] else find())
    except NoChromium as error:
        sys.exit(f"error: {error}")
