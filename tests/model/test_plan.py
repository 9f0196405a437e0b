"""Plans: text form, JSON, editing, presets, and what is refused."""

import pickle

import numpy as np
import pytest

from model.errors import UserError
from model.layout import Layout, StackSource
from model.plan import BASE, Plan, presets


def layout(n_stacks=3, n_layers=8, start=1):
    sources = [StackSource(BASE, "image embedding", None, 0, "")]
    sources += [StackSource(str(k), f"stack {k}", None, start + k, "") for k in range(n_stacks)]
    default = Plan([(BASE, 0, 1), *((str(k), start + k, 1) for k in range(n_stacks))])
    return Layout("test", tuple(sources), n_layers, 4, 64, default, "")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("base@0,0@1,1@2*0.5", "base@0,0@1,1@2*0.5"),
        (" 1 @ 2 * 0.5 , base@0 ,0@1, ", "base@0,0@1,1@2*0.5"),
        ("10@3,9@4", "9@4,10@3"),
        ("0@2,0@1", "0@1,0@2"),
        ("base@0*1.0,0@1*2", "base@0,0@1*2"),
        ("BASE@0,00@01", "base@0,0@1"),
        ("0@1*-1e-3", "0@1*-0.001"),
        ("base@0,0@1*0", "base@0"),
        ("none", "none"),
        ("NONE", "none"),
        ("", "none"),
        (" , ", "none"),
        ("base@0;0@1", "base@0,0@1"),
        ("V1@V3*0.5, v0@v02, 0@1, tap1@1, base@0", "base@0,0@1,tap1@1,v0@v2,v1@v3*0.5"),
        ("TAP10@0, tap09@2*2, 11@1, base@0", "base@0,11@1,tap9@2*2,tap10@0"),
    ],
)
def test_parse_gives_the_canonical_text_and_reads_it_back(text, canonical):
    plan = Plan.parse(text)
    assert str(plan) == canonical
    assert Plan.parse(canonical) == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base", "“base” is not an injection"),
        ("base@", "“base@” is not an injection"),
        ("base@x", "“x” is not a layer"),
        ("base@-1", "“-1” is not a layer"),
        ("base@1.5", "is not a layer"),
        ("eye@0", "“eye” is not a source"),
        ("tap@0", "“tap” is not a source"),
        ("tap-1@0", "“tap-1” is not a source"),
        ("v@v0", "“v” is not a source"),
        ("v0@3", "v0 enters the vision tower: write v0@v3"),
        ("0@v3", "0 enters the LLM, not the vision tower: write 0@3"),
        ("v0@vv3", "“vv3” is not a layer"),
        ("v0@v1,v0@v1*2", "v0@v1 is given twice"),
        ("0@1*much", "“much” is not a gain"),
        ("0@1*nan", "“nan” is not a gain"),
        ("0@1*inf", "“inf” is not a gain"),
        ("0@1*2*3", "is not an injection"),
        ("0@1,0@1*2", "0@1 is given twice"),
        ("none,base@0", "“none” is not an injection"),
        ("x" * 10_000, "…"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(text, said):
    with pytest.raises(UserError, match="(?s).*") as error:
        Plan.parse(text)
    assert said in str(error.value)
    assert len(str(error.value)) < 300


def test_a_plan_is_a_value():
    plan = Plan([("1", 2, 0.5), (BASE, 0, 1.0)])
    assert plan == Plan.parse("base@0,1@2*0.5") and hash(plan) == hash(Plan.parse("1@2*0.5,base@0"))
    with pytest.raises(AttributeError):
        plan.entries = ()
    assert not Plan() and plan and len(plan) == 2
    assert plan.sources() == (BASE, "1") and plan.at(2) == (("1", 0.5),) and plan.at(1) == ()
    assert plan.gain("1", 2) == 0.5 and plan.gain("1", 3) == 0.0
    np.testing.assert_array_equal(plan.matrix((BASE, "0", "1"), 3), [[1, 0, 0], [0, 0, 0], [0, 0, 0.5]])


def test_editing_makes_new_plans():
    plan = Plan.parse("base@0,0@1*0.5,1@2")
    assert str(plan.toggle("0", 1)) == "base@0,1@2"
    assert str(plan.toggle("2", 3)) == "base@0,0@1*0.5,1@2,2@3"
    assert str(plan.move("0", 1, 4)) == "base@0,0@4*0.5,1@2"
    assert plan.move("0", 1, 1) == plan
    assert str(plan.with_gain("1", 2, 3)) == "base@0,0@1*0.5,1@2*3"
    assert str(plan.without("0")) == "base@0,1@2"
    assert str(plan) == "base@0,0@1*0.5,1@2"
    with pytest.raises(UserError, match="not in the plan"):
        plan.move("0", 2, 3)
    with pytest.raises(UserError, match="already in the plan"):
        plan.toggle("0", 5).move("0", 1, 5)


def test_validation_lists_what_is_allowed():
    plan = Plan.parse("base@0,0@7")
    assert plan.validate(layout()) is plan
    with pytest.raises(UserError, match="layer 8, but this model's LLM layers are 0 to 7"):
        Plan.parse("0@8").validate(layout())
    with pytest.raises(UserError, match="“3”, but this model has base, 0, 1, 2"):
        Plan.parse("3@1").validate(layout())
    with pytest.raises(UserError, match="has base only, it has no stacks"):
        Plan.parse("0@1").validate(layout(n_stacks=0))


def test_presets_are_valid_and_differ():
    found = presets(layout())
    assert {label: str(plan) for label, plan in found.items()} == {
        "as trained": "base@0,0@1,1@2,2@3",
        "single injection": "base@0",
        "none": "none",
        "only 0": "base@0,0@1",
        "only 1": "base@0,1@2",
        "only 2": "base@0,2@3",
        "all but 0": "base@0,1@2,2@3",
        "all but 1": "base@0,0@1,2@3",
        "all but 2": "base@0,0@1,1@2",
        "every 2nd layer": "base@0,0@1,1@3,2@5",
        "every 3rd layer": "base@0,0@1,1@4,2@7",
        "one layer deeper": "base@0,0@2,1@3,2@4",
        "two layers deeper": "base@0,0@3,1@4,2@5",
        "reversed": "base@0,0@3,1@2,2@1",
    }
    assert list(presets(layout(n_layers=4))) == [
        *("as trained", "single injection", "none", "only 0", "only 1", "only 2"),
        *("all but 0", "all but 1", "all but 2", "reversed"),
    ]
    assert {label: str(plan) for label, plan in presets(layout(n_stacks=0)).items()} == {
        "as trained": "base@0",
        "none": "none",
    }


def tower_layout():
    """Two stacks before vision layers 2 and 3 of four, one before LLM layer 1 of eight."""
    sources = (StackSource(BASE, "base", None, 0, ""), StackSource("0", "stack 0", None, 1, ""))
    tower = tuple(StackSource(f"v{k}", f"vision stack {k}", None, 2 + k, "") for k in range(2))
    return Layout("test", sources, 8, 4, 64, Plan.parse("base@0,0@1,v0@v2,v1@v3"), "", tower=tower)


def test_vision_stacks_have_layers_of_their_own():
    layout = tower_layout()
    plan = Plan.parse("base@0,0@3,v0@v3*0.5").validate(layout)
    assert plan.at(3) == (("0", 1.0),), "what enters the tower does not enter the LLM"
    assert str(plan.tower) == "v0@v3*0.5" and str(plan.move("v0", 3, 1)) == "base@0,0@3,v0@v1*0.5"
    assert plan.to_json()[-1] == {"stack": "v0", "layer": 3, "gain": 0.5}
    assert layout.stack_names == ("0", "v0", "v1")
    assert [s.name for s in layout.sources_for(plan)] == ["base", "0", "v0", "v1"]
    assert [s.name for s in layout.rows_for(plan)] == ["base", "0"]
    with pytest.raises(UserError, match="before layer 4, but this model's vision layers are 0 to 3"):
        Plan.parse("v0@v4").validate(layout)
    with pytest.raises(UserError, match="“v2”, but this model has base, 0, v0, v1"):
        Plan.parse("v2@v0").validate(layout)
    with pytest.raises(UserError, match="v0@v1 is not in the plan"):
        plan.move("v0", 1, 2)
    found = {label: str(preset) for label, preset in presets(layout).items()}
    assert found["single injection"] == "base@0" and found["all but v0"] == "base@0,0@1,v1@v3"
    assert "one layer deeper" not in found, "v1 would leave the tower"


def test_a_layout_knows_its_sources():
    assert layout().stack_names == ("0", "1", "2")
    assert layout().source("1").label == "stack 1"
    with pytest.raises(UserError, match="this model has base, 0, 1, 2"):
        layout().source("7")
