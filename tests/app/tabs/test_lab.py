"""The Lab tab's handlers: empty, broken and full results files, choices, files to take away, what ships."""

from __future__ import annotations

import csv
import html
import io
from dataclasses import replace

import numpy as np
import pytest

from analysis import lab as reading
from app.session import Focus
from app.tabs import lab
from model.errors import UserError
from tests import lab as made
from tests.app.given import HIRES, SINGLE, skipped
from tests.lab import line

CHOICES = ("", "fine", "AVG", "context", None)  # setting, metric, bench, cost, curves


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Where the tab reads; nothing is there yet."""
    path = tmp_path / "assets" / "lab" / "results.jsonl"
    monkeypatch.setattr(reading, "RESULTS", path)
    monkeypatch.setattr(reading, "SEARCHES", path.with_name("search.jsonl"))
    return path


def test_without_results_the_commands_stand_there(desk, results):
    head, body, *rest = lab.results(desk, False, *CHOICES)
    assert "No results yet" in head and "app lab run stack-2d none dummy" in head.replace("&#45;", "-")
    assert body.visible is False and rest[2] == "" and rest[3:] == [None] * 6 + ["", ""]
    made.write(results, [])
    assert lab.results(desk, False, *CHOICES)[0] == head
    with pytest.raises(UserError, match="no results yet; run python -m app lab run stack-2d"):
        lab.take(desk, "variants", "png", *CHOICES)


def test_a_broken_line_is_said_on_the_page(desk, results):
    made.write(results, [line("none")])
    results.write_text(results.read_text() + "<img src=x>\n")
    head, body, setting, *_ = lab.results(desk, False, *CHOICES)
    assert 'role="alert"' in head and "line 2" in head and "<img" not in head
    assert body.visible is False and skipped(setting)


def test_all_views_of_a_full_file(desk, results):
    made.write(results)
    head, body, setting, curves, table, *plots, at_budget, searched = lab.results(desk, True, *CHOICES)
    assert (
        searched == ""
        and body.visible
        and setting.value == "2,000 steps on cpu"
        and len(plots) == 6
        and all(p.data for p in plots)
    )
    assert "<b>5</b> agree with the paper in sign, <b>1</b> disagree, <b>2</b> cannot decide" in head
    told = html.unescape(head)
    assert "between seeds 1.0 points (standard deviation of 15 variants run more than once;" in told
    assert "✗ contradicted</span>" in told and "stack-2d above none: holds, +50.0 points" in told
    assert "stack-2d above layers-1: not run" in told
    assert "37.5 % of the stack rows enter" in (said := html.unescape(at_budget)) and "norm budget-50 45.0 %" in said
    assert curves.value == ["stack-2d", "none", "dummy", "string", "concat"]
    for variant in made.MADE_UP:
        seeds = "0" if variant == "gate" else "0,1,2"
        assert lab.code(f"python -m app lab run {variant} --seeds {seeds} --steps 2000 --device cpu --again") in table
    assert (
        "49.1 (-2.0)" in table
        and "3 seeds × 300 codes: 10.0, 11.0, 9.0" in table
        and reading.CANNOT_SAY["sampling"][:20] in table
    )
    assert "global-string" in head.replace("&#45;", "-")  # of the paper, without a run of ours


def test_text_variants_stand_in_the_table_and_in_a_figure_of_their_own(desk, results):
    made.write(results)
    table, variants, *_, recall, cost, _, _ = lab.results(desk, False, *CHOICES)[4:]
    assert "against text-truncated" in table.replace("&#45;", "-") and "+71.0" in table
    assert "text-full" not in variants.to_json() and "text-full" not in cost.to_json()
    assert len(recall.data) == 3 and list(recall.data[1].x) == [*range(1, 9)] and recall.data[1].y[7] > 90
    made.write(results, [line("text-full"), line("text-truncated")])
    *_, table, variants, axes, acuity, budget, recall, cost, _, _ = lab.results(desk, False, *CHOICES)
    assert recall.data and "+71.0" in table and [variants, axes, acuity, budget, cost] == [None] * 5
    with pytest.raises(UserError, match="nothing to draw for “variants”"):
        lab.take(desk, "variants", "png", *CHOICES)


def test_a_search_is_told_with_its_rungs_and_what_came_of_it(desk, results):
    runs = [line("stack-2d"), line("stack-2d", seed=1), line("start-2-interval-1-count-3", 0.8, group="where")]
    made.write(results, runs)
    made.write(results.with_name("search.jsonl"), [made.search()])
    *_, table, _, _, _, _, _, _, _, told = lab.results(desk, False, *CHOICES)
    told, table = html.unescape(told), html.unescape(table)
    assert "beats the rule of thumb stack-2d: +19.5 points" in told and "4,000 of 5,000 training steps" in told
    assert told.count("<tr>") == 3 + 4 + 2 + 1 and told.count("kept</td>") == 2 + 1 + 1
    assert "python -m app lab search --seeds 0 --budget 5000 --steps 2000" in told
    assert "3 stacks from layer 2 on" in table
    tried = {"start": 1, "interval": 1, "count": 1, "characters": 1.0, "exact_match": 1.0}
    rungs = [{"step": 9, "ranking": [{"variant": "<i>", **tried}]}]
    made.write(results.with_name("search.jsonl"), [made.search() | {"winner": "<b>", "rungs": rungs}])
    told = lab.results(desk, False, *CHOICES)[-1]
    assert "Not compared yet" in told and "<b>" not in told and "<i>" not in told


def test_choices_change_what_is_shown(desk, results):
    made.write(results, [*(line(name) for name in made.MADE_UP), line("none", steps=9), line("stack-2d", steps=9)])
    wide = lab.results(desk, False, "9 steps on cpu", "coarse", "DocVQA", "step_seconds", ["none", "gone"])
    assert wide[2].value == "9 steps on cpu" and wide[3].value == ["none"]
    assert "31.7 (-7.0)" in wide[4] and "90.0" in wide[4] and "time of a training step" in wide[10].to_json()
    assert wide[6] is not None and len(wide[7].data) == 1
    for choices, words in (
        (("7 steps", *CHOICES[1:]), "no runs of “7 steps”"),
        (("", "beauty", "AVG", "context", None), "no metric “beauty”"),
        (("", "fine", "AVG", "luck", None), "no cost “luck”"),
    ):
        told, *rest = lab.results(desk, False, *choices)
        assert words in html.unescape(told) and all(skipped(value) for value in rest) and len(rest) == 12
    figure, told = lab.mark(desk, 50, False, "7 steps", "fine", "AVG")
    assert skipped(figure) and "no runs of “7 steps”" in html.unescape(told)


def test_without_the_reference_nothing_is_compared(desk, results):
    made.write(results, [line("none")])
    head, _, _, _, table, variants, axes, *_ = lab.results(desk, False, *CHOICES)
    assert (
        "has not been run at this setting" in head
        and "lab run stack-2d --seeds 0 --steps 2000 --device cpu" in head.replace("&#45;", "-")
    )
    assert variants.data and axes is None


def test_names_from_the_file_are_escaped(desk, results):
    made.write(results, [line("stack-2d"), line("<script>", 0.5, group="<i>")])
    out = lab.results(desk, False, *CHOICES)
    assert "<script>" not in out[4] and "<i>" not in out[4] and "<script>" not in out[5].to_json()


def test_a_variant_is_offered_where_its_checkpoint_ships(desk, results, monkeypatch):
    made.write(results, [line("stack-2d"), line("none")])
    assert "data-go" not in lab.results(desk, False, *CHOICES)[4]
    monkeypatch.setattr(desk.zoo, "offered", (*desk.zoo.offered, "embedded/lab-none"))
    table = lab.results(desk, False, *CHOICES)[4]
    assert (
        table.count("data-go=") == 2
        and table.count("to ask it, once run: <code title=") == table.count("data-copy=") == 1
    )
    assert lab.shipped(desk, "none") == "embedded/lab-none" and lab.shipped(desk, "stack-2d") == ""
    made.write(results, [line("stack-2d"), line("budget-50")])
    assert lab.results(desk, False, *CHOICES)[4].count(">numbers only<") == 1


def test_links_lead_to_what_there_is(desk, results):
    made.write(results)
    made.write(results.with_name("search.jsonl"), [made.search()])
    head = lab.results(desk, False, *CHOICES)[0]
    assert all(f'href="#{place}"' in head for place in lab.PLACES)
    results.with_name("search.jsonl").unlink()
    made.write(results, [line("stack-2d")])
    head = lab.results(desk, False, *CHOICES)[0]
    there = {place for place in lab.PLACES if f'href="#{place}"' in head}
    hidden = {"dl-lab-axes", "dl-lab-budget", "dl-lab-recall", "dl-lab-search"}
    assert there == {*lab.PLACES} - hidden


def test_files_to_take_away(desk, results):
    made.write(results)
    for what in lab.FIGURES:
        with open(lab.take(desk, what, "svg", *CHOICES), encoding="utf-8") as file:
            assert "<svg" in file.read()
    with open(lab.take(desk, "variants", "csv", *CHOICES), encoding="utf-8") as file:
        rows = list(csv.DictReader(io.StringIO(file.read())))
    assert len(rows) == len(made.MADE_UP) and rows[1]["paper_score"] == "49.1"
    with open(lab.take(desk, "recall", "csv", *CHOICES), encoding="utf-8") as file:
        assert len([*csv.DictReader(io.StringIO(file.read()))]) == 3 * 8
    for wrong in (("soul", "png"), ("cost", "exe")):
        with pytest.raises(UserError, match="There is no “"):
            lab.take(desk, *wrong, *CHOICES)


def test_numbers_with_prefixes():
    assert [lab.si(value) for value in (1.5e9, 2e6, 3210, 7)] == ["1.5 G", "2 M", "3.21 k", "7 "]


def test_the_picture_follows_the_image_in_focus(desk, focus):
    assert lab.deal(desk, HIRES, Focus()) is None
    assert lab.deal(desk, HIRES, focus)["name"] == "receipt.png"
    gone = Focus(images=("dropped",))
    assert lab.deal(desk, HIRES, gone) == {"lacks": "This image is no longer held here; upload it again."}


def test_the_sliders_budget_stands_on_the_curve(desk, results):
    """20 % of the rows keep some stacks: 15 % of all stack rows, between none and budget-25."""
    assert lab.mark(desk, 50, False, "", "fine", "AVG") == (None, "")
    made.write(results)
    figure, said = lab.mark(desk, 20, False, "", "fine", "AVG")
    assert figure.layout.shapes[0].x0 == pytest.approx(15)
    assert "15.0 % of the stack rows enter" in html.unescape(said)
    assert "by norm none 10.0 % to budget-25 30.0 %" in html.unescape(said)
    made.write(results, [line("none"), line("stack-2d")])
    figure, said = lab.mark(desk, 100, False, "", "fine", "AVG")
    assert figure is None and "No budget variant has been run" in html.unescape(said)


def test_learned_gates_and_what_a_row_is_compared_with_are_told(desk, results):
    config = {"config": {"llm_layers": 8}}
    lines = [line("stack-2d"), line("gate", gates=[1.904, 2.1]), line("start-6", 0.3, group="where", **config)]
    made.write(results, lines)
    table = html.unescape(lab.results(desk, False, *CHOICES)[4])
    assert "learned, seed 0: 1.90, 2.10" in table and "against layers-2: not run" in table
    made.write(results, [*lines, line("layers-2")])
    assert "-10.0" in html.unescape(lab.results(desk, False, *CHOICES)[4])


def test_what_a_budget_keeps_is_shown_on_the_image(desk, focus):
    """Of 16 rows: 4 keep all four stacks, 4 the first two; a question that is not there is asked for."""
    for ranking in ("norm", "question"):
        lacks, figure, _ = lab.keep(desk, ranking, 50, False, HIRES, focus)
        values = np.array([trace.z for trace in figure.data if trace.type == "heatmap"][0], float)
        counts = {n: int((values == n).sum()) for n in (2, 4)}
        assert lacks == "" and counts == {2: 4, 4: 4} and np.isnan(values).sum() == 8
    assert "No image yet" in lab.keep(desk, "norm", 50, False, HIRES, Focus())[0]
    assert "No question yet" in lab.keep(desk, "question", 50, False, HIRES, replace(focus, question=" "))[0]
    assert lab.keep(desk, "norm", 50, False, HIRES, replace(focus, question=""))[1] is not None
    said, figure, _ = lab.keep(desk, "norm", 50, False, SINGLE, focus)
    assert "adds no stacks" in said and figure is None
    for ranking, fits in (("norm", True), ("question", False)):
        *_, of = lab.keep(desk, ranking, 50, False, HIRES, focus)
        assert skipped(lab.unkeep(desk, of, HIRES, focus)[1])
        assert skipped(lab.unkeep(desk, of, HIRES, replace(focus, question="What?"))[1]) is fits
        assert lab.unkeep(desk, of, HIRES, replace(focus, images=("signs.png",))) == ("", None, ())
        assert lab.unkeep(desk, of, SINGLE, focus) == ("", None, ())
    for wrong in (("luck", 50), ("norm", 0), ("norm", 101)):
        with pytest.raises(UserError, match="A budget is ranked norm or question, above 0 to 100 %"):
            lab.keep(desk, *wrong, False, HIRES, focus)
