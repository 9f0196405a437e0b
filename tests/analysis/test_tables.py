"""Tables keep what the views show, and survive a round trip through CSV."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from analysis import attention, compare, norms, tables
from analysis.attribution import CausalCheck
from analysis.evaluate import acuity
from tests.analysis import drawn, hand


def read(table: tables.Table) -> list[dict]:
    return list(csv.DictReader(io.StringIO(table.csv())))


def test_csv_quotes_and_leaves_unknowns_empty():
    table = tables.Table(("text", "value"), (('say "hi",\nthen go', 1.5), ("ß", float("nan")), ("", None)))
    assert table.csv().startswith("text,value\r\n")
    assert read(table) == [
        {"text": 'say "hi",\nthen go', "value": "1.5"},
        {"text": "ß", "value": ""},
        {"text": "", "value": ""},
    ]
    assert table.records()[0] == {"text": 'say "hi",\nthen go', "value": 1.5}


def test_numbers_are_written_in_full():
    value = 0.1234567890123456
    assert float(read(tables.Table(("x",), ((value,),)))[0]["x"]) == value


def test_norms():
    rows = read(tables.norms(norms.summarise(hand.trace())))
    assert [row["layer"] for row in rows] == ["0", "1", "output"]
    assert float(rows[1]["before_rms_image"]) == 2.5 and rows[2]["before_rms_image"] == ""
    assert (rows[0]["injected_rms_base"], rows[0]["injected_rms_0"]) == ("1.5", "")
    assert (rows[0]["cosine"], rows[1]["cosine"]) == ("", "0.75")


def test_grid_gives_each_token_its_box_in_pixels():
    rows = read(tables.grid(norms.norm_map(hand.trace(), "before", 1)))
    assert rows[1] == {
        **{"image": "0", "row": "0", "column": "1"},
        **{"left": "20.0", "top": "0.0", "right": "40.0", "bottom": "10.0", "RMS": "2.0"},
    }
    assert len(rows) == 4


def test_attention():
    rows = read(tables.flow(attention.by_layer(hand.attending())))
    assert [row["layer"] for row in rows] == ["0", "1"]
    assert float(rows[0]["image_highest_head"]) == pytest.approx(0.8)
    found = tables.readers(attention.readers(hand.attending(), 0, (0, 0), head=0)).records()
    assert found[0] == {"position": 5, "text": "a", "share_of_attention": pytest.approx(0.4)}


def test_effect_subsets_and_shapley():
    effect = norms.Effect(hand.PLAN, ("base", "0"), np.array([[1.0, 0.5], [0.0, 0.25]]))
    assert tables.effect(effect).rows == (
        ("base", 0, 1.0),
        ("base", "output", 0.5),
        ("0", 0, 0.0),
        ("0", "output", 0.25),
    )
    run = hand.subset_run()
    rows = tables.subsets(run).records()
    assert len(rows) == 4 and rows[0]["label"] == "all 2" and rows[0]["stack_1"] is True
    assert rows[-1]["plan"] == "base@0" and rows[-1]["match"] is False
    (first, second) = tables.shapley(run).records()
    gained = first["logprob_stacks_on"] - first["logprob_stacks_off"]
    assert first["shapley_0"] + first["shapley_1"] == pytest.approx(gained) and second["token"] == "7"
    assert "error_0" not in first
    sampled = tables.shapley(replace(run, error=np.array([[0.1, 0.2], [0.3, 0.4]]))).records()
    assert [[row["error_0"], row["error_1"]] for row in sampled] == [[0.1, 0.3], [0.2, 0.4]]
    assert [row["shapley_1"] for row in sampled] == [first["shapley_1"], second["shapley_1"]]


def test_attribution():
    rows = tables.attribution(drawn.attribution()).records()
    assert rows[2] == {"image": 0, "row": 1, "column": 0, "nats_base": 3.0, "nats_0": 0.0} and len(rows) == 4
    found = tables.causal(CausalCheck(2, 1.5, np.array([0.1, 0.2])))
    assert found.rows == (("marked", 1.5), ("random", 0.1), ("random", 0.2))


def test_answers():
    table = tables.comparison(compare.rows([hand.answer("K7"), hand.answer("K8")], ["a", "b"], "K7"))
    assert [row["exact"] for row in read(table)] == ["True", "False"]
    rows = tables.tokens(hand.answer("K7")).records()
    assert rows[0] == {
        "token": "K",
        "logprob": -0.5,
        "top1": "K",
        "top1_logprob": -0.5,
        "top2": "?",
        "top2_logprob": -3,
    }
    assert tables.comparison([]).csv() == "\r\n"


def test_acuity():
    rows = tables.acuity({"hires": acuity({"8": {"n": 10, "exact_match": 0.8, "cer": 0.1}})}).records()
    assert rows == [
        {"model": "hires", "glyph_px": 8.0, "n": 10, "exact_match": 0.8}
        | {"low_95": pytest.approx(0.490, abs=1e-3), "high_95": pytest.approx(0.943, abs=1e-3)}
    ]
