"""What README.md must agree with: the files in the repository, the cards' numbers, the commands. Loads no model.

    python -m tests.readme      writes the table of the embedded models again, from assets/checkpoints/*/results.json

The captioned tree is written by hand; `tree()` reads it back so that a test can compare it with the files.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
PACKAGES = ("app", "analysis", "model")  # every file of these has its caption; other folders have one each
ORDER = ("hires", "hires-single", "hires-concat", "taps", "taps-single")
HEAD = (
    "| model | plan | | test scenes | fine: exact | fine: CER | coarse: exact | coarse: CER |\n"
    "|---|---|---|---|--:|--:|--:|--:|\n"
)


def results_table(checkpoints: Path = ROOT / "assets" / "checkpoints") -> str:
    """The Markdown table of all cards' results: one row per model, plan and test set; percentages with one decimal."""
    rows = []
    for name in ORDER:
        file = checkpoints / name / "results.json"
        if not file.exists():
            continue
        for result in json.loads(file.read_text(encoding="utf-8"))["results"]:
            fine, coarse = result["by_kind"]["fine"], result["by_kind"]["coarse"]
            cells = (
                f"`{name}`",
                f"`{result['plan']}`",
                result["state"],  # "trained" or "ablated"
                f"{result['n']}, {result['fonts']} fonts",
                *(f"{100 * kind[number]:.1f} %" for kind in (fine, coarse) for number in ("exact_match", "cer")),
            )
            rows.append("| " + " | ".join(cells) + " |\n")
    return HEAD + "".join(rows)


def section(text: str) -> str:
    """The part of the README between the two marks of the results."""
    return text.split(BEGIN)[1].split(END)[0].strip("\n") + "\n"


def tree(text: str) -> dict[str, str]:
    """The captioned tree, the block after "## Files", as {path: caption}; folders end with a slash."""
    block = re.search(r"^## Files$.*?^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]
    entries, folders = {}, []
    for line in block.splitlines():
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip(" "))
        name, _, caption = line.strip().partition("  ")
        folders = [(at, folder) for at, folder in folders if at < indent]
        path = "".join(folder for _, folder in folders) + name
        entries[path] = caption.strip()
        if name.endswith("/"):
            folders.append((indent, name))
    return entries


def tracked() -> list[str]:
    """Every file under version control, relative to the root."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(path for path in done.stdout.split("\0") if path)


def expected(files: list[str]) -> set[str]:
    """What the tree has to show for these files: top level and packages file by file, other folders one level deep."""
    shown = set()
    for path in files:
        top, _, inside = path.partition("/")
        if not inside or top in PACKAGES or top.startswith("."):
            shown.add(path)
        else:
            shown.add(f"{top}/{inside.partition('/')[0]}/" if "/" in inside else path)
    return {path for path in shown if not path.endswith("__init__.py")}


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{results_table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
