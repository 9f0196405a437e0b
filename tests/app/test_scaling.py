"""Tables of the bench: every row is there, ratios are those of the figures beside them, what has no room says so."""

import json
import math

import pytest

from app import bench, scaling
from app.cli import main
from app.output import Outcome
from model import shapes
from model.need import of_answer
from tests import tiny


@pytest.fixture
def small(monkeypatch):
    """A run that takes seconds."""
    sizes = {"CLIENTS": (1, 3), "VISUAL": (4, 64), "PLANS": (1, 2), "TOKENS": 4, "ROUNDS": 1}
    for name, value in sizes.items():
        monkeypatch.setattr(scaling, name, value)
    monkeypatch.setattr(bench, "ROUNDS", 1)


@pytest.mark.parametrize("kind", ["hires", "qwen"])
def test_every_row_is_there(kind, small):
    engine = tiny.engine(kind)
    end = engine._end
    rows = scaling.measure(engine)
    assert engine._end == end
    assert [row["clients"] for row in rows["clients"]] == [1, 3]
    for row in rows["clients"]:
        assert row["same_answers"] == row["clients"] and row["last_first_token_seconds"] > 0
        assert row["ratio"] == row["tokens_per_second_at_once"] / row["tokens_per_second_alone"]
    for row in rows["images"]:
        assert not row["refused"] and row["visual_tokens"] > 0 and row["estimated_bytes"] > 0
        assert row["decode_tokens_per_second"] > 0 and row["peak_bytes"] is None
    assert [row["plans"] for row in rows["plans"]] == [1, 2] and rows["plans"][0]["over_one"] == 1
    text = scaling.tables(rows, "")
    assert "3 of 3" in text and "decode one by one" not in text
    assert "one by one: some layers" in scaling.tables(rows, "some layers have a sliding window")


def test_what_has_no_room_is_a_row_with_the_reason(small, monkeypatch):
    engine = tiny.engine("qwen")
    prompt = scaling._prompt(engine, scaling.pictures(engine, 4), "What does the sign say?")
    monkeypatch.setattr(engine, "max_memory", of_answer(engine, prompt, [engine.layout.default], 4).bytes)
    rows = {"clients": [], "images": scaling.images(engine), "plans": scaling.plans(engine)}
    assert [bool(row["refused"]) for row in rows["images"]] == [False, True]
    assert "max_memory" in rows["images"][1]["refused"] and "fewer plans" in rows["plans"][1]["refused"]
    text = scaling.tables(rows, "")
    assert f"64: {rows['images'][1]['refused']}" in text and f"2: {rows['plans'][1]['refused']}" in text


def test_pictures_take_about_as_many_visual_tokens_as_wanted():
    grows, fixed = shapes.build("tiny", device="cpu"), tiny.engine("hires")
    for engine in (grows, fixed):
        for wanted in (256, 512, 1024, 2048, 4096):
            found = scaling.pictures(engine, wanted)
            taken = sum(math.prod(r.grid) for image in found for r in engine.adapter.regions(image))
            assert taken == wanted and (len(found) == 1 or engine is fixed)
    assert len({image.tobytes() for image in scaling.pictures(fixed, 256)}) == 16


def test_random_weights_from_the_command_line(small, capsys, monkeypatch):
    monkeypatch.setattr(bench, "page_start", lambda options: pytest.fail("there is no page for random weights"))
    seen, run = [], bench.run
    monkeypatch.setattr(bench, "run", lambda options: seen.append(run(options)) or seen[0])
    assert main(["bench", "--random-weights", "tiny", "--json", "--device", "cpu"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["random_weights"] is True and data["model"] == "tiny with random weights"
    assert [row["clients"] for row in data["scaling"]["clients"]] == [1, 3] and data["seconds"]["page_start"] is None
    (outcome,) = seen
    assert isinstance(outcome, Outcome) and outcome.text.startswith("Random weights in the true shape")
    assert "answers are not" in outcome.text and "clients" in outcome.text
    assert main(["bench", "--random-weights", "nothing"]) == 2
    assert "no shape “nothing”" in capsys.readouterr().err


def test_some_tables_alone(small, capsys):
    command = ["bench", "--random-weights", "tiny", "--json", "--device", "cpu", "--only", "plans", "--only", "images"]
    assert main(command) == 0
    data = json.loads(capsys.readouterr().out)
    assert {"clients", "plans", "images"} & set(data["scaling"]) == {"plans", "images"}
    assert not {"seconds", "ratios", "parts"} & set(data) and "plain decoding" in data["how"][-1]
    assert main([*command[:-1], "everything"]) == 2
    assert "clients" in capsys.readouterr().err
    assert bench.TABLES == ("answer", "parts", "clients", "images", "plans")
