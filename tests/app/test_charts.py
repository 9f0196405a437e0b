"""Small drawings: every value is in them, nothing of a model's text is markup."""

from __future__ import annotations

import re

import numpy as np

from analysis import subsets
from analysis.norms import Effect
from app import charts
from model.plan import Plan
from model.types import Sampling
from tests import tiny


def run(truth: str | None = "<b>") -> subsets.SubsetRun:
    engine = tiny.engine("hires")
    prompt = engine.prompt(tiny.ask(tiny.image(), "what is it?"))
    return subsets.run(engine, prompt, Plan.parse("base@0,0@1,2@3"), Sampling(max_new_tokens=3), truth)


def test_effects_have_a_cell_per_source_and_layer_and_a_ring_where_one_enters():
    values = np.array([[0.5, 0.25, 0.0], [0.0, 1.0, 0.5]])
    html = charts.effect_table(Effect(Plan.parse("base@0,0@1"), ("base", "0"), values))
    assert html.count("dl-cell") == 6 and html.count("dl-enters") == 2
    assert "--v:1.000" in html and "stack 0, input of layer 1: 1.000" in html
    assert "final output: 0.500" in html


def test_effects_of_nothing_are_drawn_empty():
    html = charts.effect_table(Effect(Plan(), ("base",), np.zeros((1, 3))))
    assert html.count("--v:0.000") == 3 and "dl-faint" in html


def test_shares_have_a_bar_per_stack_and_token_and_no_markup():
    found = run()
    html = charts.shapley_bars(found)
    assert html.count("<rect") == 2 * len(found.tokens)
    assert "<b>" not in re.sub(r'<b style="[^"]*">', "", html)


def test_the_strip_sets_plans_and_marks_the_one_of_now():
    found = run()
    html = charts.subset_strip(found, Plan.parse("base@0,2@3"), "<b>")
    assert re.findall(r'data-plan="([^"]*)"', html)[0].count("&#64;") == 3  # @ as a reference
    assert html.count("dl-subset ") + html.count('dl-subset"') == 4
    assert html.count('aria-pressed="true"') == 1 and "dl-now" in html


def test_a_right_answer_is_marked_as_such():
    found = run(truth=None)
    assert "dl-good" in charts.subset_strip(found, found.plan)
    wrong = charts.subset_strip(run(truth="something else"), found.plan, "something else")
    assert "dl-good" not in wrong


def test_top_five_show_blanks_and_the_end():
    html = charts.bar_list([("K", -0.1), (" ", -1.0), ("", -2.0), ("<", -3.0)])
    assert "&#9251;" in html and "&#40;end&#41;" in html and "&#60;" in html and "90.5%" in html
