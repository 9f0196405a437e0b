"""Axes of plans by hand, and a sweep's points against plans scored alone."""

import pytest

from analysis import evaluate as scoring
from analysis import figures_mpl, sweep, tables
from model.errors import UserError
from model.plan import Plan
from model.types import Sampling
from tests import tiny

SHORT = Sampling(max_new_tokens=3)


def along(kind: str, over: str) -> dict[float, str]:
    return {value: str(plan) for value, plan in sweep.plans_along(tiny.engine(kind).layout, over).items()}


def test_axes_by_hand():
    """Four stacks before layers 1 to 4 of six, and the base at the input."""
    assert along("hires", "start") == {
        0: "base@0,0@0,1@1,2@2,3@3",
        1: "base@0,0@1,1@2,2@3,3@4",
        2: "base@0,0@2,1@3,2@4,3@5",
    }
    assert along("hires", "interval") == {0: "base@0,0@1,1@1,2@1,3@1", 1: "base@0,0@1,1@2,2@3,3@4"}
    assert along("hires", "count")[2] == "base@0,0@1,1@2" and len(along("hires", "count")) == 5
    assert along("hires", "gain")[0.5] == "base@0,0@1*0.5,1@2*0.5,2@3*0.5,3@4*0.5"
    assert along("hires", "gain")[0] == "base@0" and along("hires", "gain")[1] == "base@0,0@1,1@2,2@3,3@4"
    assert along("hires", "base") == {layer: f"base@{layer},0@1,1@2,2@3,3@4" for layer in range(6)}
    assert along("hires", "alone") == {i: f"base@0,{i}@{i + 1}" for i in range(4)}
    assert along("hires", "without")[1] == "base@0,0@1,2@3,3@4"


@pytest.mark.parametrize("over", sweep.AXES)
def test_every_axis_holds_the_trained_plan_or_only_leaves_things_out(over):
    layout = tiny.engine("hires").layout
    plans = sweep.plans_along(layout, over)
    assert (layout.default in plans.values()) is (over not in ("alone", "without"))
    assert list(plans) == sorted(plans)
    for plan in plans.values():
        plan.validate(layout)


def test_what_cannot_be_swept_is_said():
    single = tiny.engine("single").layout
    with pytest.raises(UserError, match="no stacks, so there is nothing to sweep over gain"):
        sweep.plans_along(single, "gain")
    assert len(sweep.plans_along(single, "base")) == 6
    with pytest.raises(UserError, match="no axis 'depth'; there are start"):
        sweep.plans_along(single, "depth")


def test_points_are_what_each_plan_scores_alone(tmp_path):
    """Truths that only some plans give: the answer of the trained plan."""
    engine = tiny.engine("hires")
    records = []
    for number, kind in enumerate(("fine", "coarse", "fine")):
        tiny.image(number).save(tmp_path / f"{number}.png")
        prompt = engine.prompt(tiny.ask(tiny.image(number), "What?"))
        truth = engine.answer(prompt, engine.layout.default, SHORT).text
        records.append({"image": f"{number}.png", "question": "What?", "answer": truth, "kind": kind, "glyph_px": 8})
    plans = sweep.plans_along(engine.layout, "gain")
    results = scoring.evaluate_many(engine, records, list(plans.values()), tmp_path, sampling=SHORT)
    found = sweep.collect(engine.layout, "gain", plans, dict(zip(plans.values(), results, strict=True)))
    for point in found.points:
        alone = scoring.evaluate(engine, records, point.plan, tmp_path, sampling=SHORT)
        assert {key: alone[key] for key in ("n", "exact_match", "cer", "by_kind", "wrong")} == {
            key: point.result[key] for key in ("n", "exact_match", "cer", "by_kind", "wrong")
        }
        assert point.state == ("trained" if point.value == 1.0 else "ablated")
    trained = found.points[list(plans).index(1.0)]
    assert trained.exact["fine"][0] == 1.0 and 0.3 < trained.exact["fine"][1] < trained.exact["fine"][2] == 1.0
    assert min(point.result["exact_match"] for point in found.points) < 1.0  # else plans would not matter
    rows = tables.sweep(found).records()
    assert len(rows) == 2 * len(plans) and {row["kind"] for row in rows} == {"fine", "coarse"}
    assert figures_mpl.svg(figures_mpl.sweep_curve(found)).count(b"as trained")
    assert found.to_json()["points"][0]["plan"] == str(Plan.parse("base@0"))
