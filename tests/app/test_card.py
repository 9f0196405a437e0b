"""The card of an embedded checkpoint: what it says is what was scored."""

import json
import shutil

import pytest

from app import card
from model.loading import CHECKPOINTS, load


@pytest.fixture(scope="module")
def carded(tmp_path_factory):
    """(folder, data) of a copy of `hires`, scored on six scenes of each test set."""
    folder = tmp_path_factory.mktemp("cards") / "hires"
    shutil.copytree(CHECKPOINTS / "hires", folder)
    for made in ("README.md", "results.json", "acuity.svg", "curve.svg"):
        (folder / made).unlink()
    data = card.write(folder, load(str(folder), device="cpu"), tmp_path_factory.mktemp("scenes"), n=6)
    return folder, data


def test_the_card_tells_what_was_scored(carded):
    folder, data = carded
    assert json.loads((folder / "results.json").read_text()) == data
    assert [(r["fonts"], r["state"]) for r in data["results"]] == [
        ("train", "trained"), ("held-out", "trained"), ("train", "ablated"),
    ]  # fmt: skip
    text = (folder / "README.md").read_text()
    for result in data["results"]:
        fine, coarse = (result["by_kind"][kind] for kind in ("fine", "coarse"))
        assert fine["n"] + coarse["n"] == result["n"] == sum(t["n"] for t in result["by_topic"].values()) == 6
        shares = " | ".join(f"{100 * kind[x]:.1f} %" for kind in (fine, coarse) for x in ("exact_match", "cer"))
        assert f"| `{result['plan']}` | {result['state']} | 6, {result['fonts']} fonts | {shares} |" in text
    for topic, scores in data["results"][0]["by_topic"].items():
        assert f"| {topic} | {scores['n']} | {100 * scores['exact_match']:.1f} % |" in text
    assert all((folder / name).stat().st_size > 5000 for name in ("acuity.svg", "curve.svg"))
    recipe = json.loads((folder / "recipe.json").read_text())
    assert f"- seed: {recipe['seed']}" in text and f"python -m app train {recipe['name']}" in text


def test_the_test_pictures_are_drawn_once(carded, tmp_path):
    first, records = card.test_scenes(tmp_path, "held-out", 2)
    drawn = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    again, same = card.test_scenes(tmp_path, "held-out", 2)
    assert (again, same) == (first, records) and {file: file.stat().st_mtime_ns for file in again.iterdir()} == drawn


def test_chance_is_the_commonest_answer_of_each_topic():
    """Two of three counts are 2, one of two colours is red; one of three strings: fine 1 of 3, coarse 3 of 5."""
    said = [("count", "coarse", "2"), ("count", "coarse", "2"), ("count", "coarse", "3"),
            ("colour", "coarse", "red"), ("colour", "coarse", "blue"),
            ("sign", "fine", "K7"), ("sign", "fine", "P2"), ("sign", "fine", "XX")]  # fmt: skip
    records = [{"topic": topic, "kind": kind, "answer": answer} for topic, kind, answer in said]
    assert card.chance(records) == {"coarse": pytest.approx(3 / 5), "fine": pytest.approx(1 / 3)}
