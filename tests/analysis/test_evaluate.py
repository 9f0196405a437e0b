"""Scores against hand counts; images seen once; intervals against published values."""

import json

import numpy as np
import pytest

from analysis import evaluate as scoring
from model.errors import UserError
from model.plan import Plan
from model.types import Sampling
from tests import tiny

SHORT = Sampling(max_new_tokens=3)


@pytest.fixture
def folder(tmp_path):
    """Two images; five questions, three of which have the model's own answer as the truth."""
    engine = tiny.engine("hires")
    records = []
    for number in (0, 1):
        tiny.image(number).save(tmp_path / f"{number}.png")
    for i, (number, kind, height) in enumerate(
        [(0, "fine", 6.2), (1, "fine", 6.0), (0, "coarse", None), (1, "fine", 9), (0, "coarse", 9)]
    ):
        question = f"Question {i}?"
        prompt = engine.prompt(tiny.ask(tiny.image(number), question))
        said = engine.answer(prompt, engine.layout.default, SHORT).text
        truth = said if i in (0, 3, 4) else "zzzz"
        records.append(
            {"image": f"{number}.png", "question": question, "answer": truth, "kind": kind, "glyph_px": height}
        )
    return engine, records, tmp_path


def test_scores_are_the_counts(folder):
    engine, records, root = folder
    found = scoring.evaluate(engine, records, root=root, sampling=SHORT)
    assert (found["n"], found["exact_match"]) == (5, pytest.approx(0.6))
    assert found["by_kind"]["fine"]["n"] == 3 and found["by_kind"]["fine"]["exact_match"] == pytest.approx(2 / 3)
    assert found["by_topic"] == {}
    assert found["by_kind"]["coarse"]["n"] == 2 and found["by_kind"]["coarse"]["exact_match"] == 0.5
    assert found["fine_by_glyph_px"]["9"] == {"n": 1, "exact_match": 1.0, "cer": 0.0}
    assert {key: value["n"] for key, value in found["by_glyph_px"].items()} == {"6": 2, "9": 2}
    assert {key: value["n"] for key, value in found["fine_by_glyph_px"].items()} == {"6": 2, "9": 1}
    assert [wrong["question"] for wrong in found["wrong"]] == ["Question 1?", "Question 2?"]  # in their own order
    assert found["wrong"][0]["answer"] == "zzzz" and found["wrong"][0]["cer"] > 0
    assert (found["model"], found["plan"], found["images"]) == (engine.name, str(engine.layout.default), 2)
    json.dumps(found, allow_nan=False)


def test_each_image_is_seen_once_however_its_questions_are_spread(folder, monkeypatch):
    engine, records, root = folder
    encode, seen = engine.adapter.encode, []
    monkeypatch.setattr(engine.adapter, "encode", lambda image, names: seen.append(image.size) or encode(image, names))
    engine.cache.clear()
    one = sum(t.nbytes for t in encode(tiny.image(0), ["base", "0"]).values())
    monkeypatch.setattr(engine.cache, "max_bytes", one)  # questions of one image must follow one another
    scoring.evaluate(engine, records, root=root, sampling=SHORT)
    assert len(seen) == 2


def test_progress_and_the_order_of_mistakes(folder):
    engine, records, root = folder
    steps = []
    found = scoring.evaluate(engine, records, root=root, sampling=SHORT, progress=lambda *s: steps.append(s), n_wrong=1)
    assert steps == [(i, 5) for i in range(1, 6)]
    assert [wrong["question"] for wrong in found["wrong"]] == ["Question 1?"]


def test_the_plan_is_used(folder):
    engine, records, root = folder
    plan = Plan.parse("base@0")
    never = [{**record, "answer": "zzzz"} for record in records]
    found = scoring.evaluate(engine, never, plan, root, sampling=SHORT)
    assert found["plan"] == "base@0" and len(found["wrong"]) == 5
    for wrong in found["wrong"]:
        prompt = engine.prompt(tiny.ask(tiny.image(int(wrong["image"][0])), wrong["question"]))
        assert wrong["said"] == engine.answer(prompt, plan, SHORT).text
    with pytest.raises(UserError, match="layers are 0 to 5"):
        scoring.evaluate(engine, records, Plan.parse("base@9"), root)


def test_bad_records(folder):
    engine, records, root = folder
    with pytest.raises(UserError, match="no questions"):
        scoring.evaluate(engine, [], root=root)
    with pytest.raises(UserError, match="Question 2 has no answer, kind"):
        broken = {key: value for key, value in records[1].items() if key not in ("answer", "kind")}
        scoring.evaluate(engine, [records[0], broken], root=root)
    with pytest.raises(UserError):
        scoring.evaluate(engine, [{**records[0], "image": "missing.png"}], root=root)


def test_score_of_nothing():
    assert scoring.score([]) == {"n": 0, "exact_match": None, "cer": None}


@pytest.mark.parametrize(
    "hits, n, low, high",
    [(8, 10, 0.490, 0.943), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (50, 100, 0.404, 0.596), (0, 0, 0.0, 1.0)],
)
def test_wilson_against_published_values(hits, n, low, high):
    assert scoring.wilson(hits, n) == pytest.approx((low, high), abs=5e-4)


def curve(shares: list[float]) -> scoring.Acuity:
    return scoring.acuity(
        {str(h): {"n": 20, "exact_match": s, "cer": 0.0} for h, s in zip((12, 6, 8), shares, strict=True)}
    )


def test_acuity_curve_is_sorted_by_height_with_its_intervals():
    found = curve([0.95, 0.1, 0.6])
    assert found.glyph_px.tolist() == [6, 8, 12] and found.exact.tolist() == [0.1, 0.6, 0.95]
    assert (found.low < found.exact).all() and (found.exact < found.high).all()
    assert found.low[1] == pytest.approx(scoring.wilson(12, 20)[0])
    assert np.array_equal(found.n, [20, 20, 20])


def test_smallest_glyph_that_is_read():
    assert curve([0.95, 0.1, 0.6]).smallest_read() == 8
    assert curve([0.95, 0.9, 0.2]).smallest_read() == 12  # 6 px was luck: 8 px is not read
    assert curve([0.4, 0.9, 0.9]).smallest_read() is None
    assert curve([0.95, 0.1, 0.6]).smallest_read(0.9) == 12
    assert scoring.acuity({}).smallest_read() is None
