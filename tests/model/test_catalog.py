"""The catalogue: a row for every family with a released checkpoint, figures only where they are known.

Run: pytest tests/model/test_catalog.py
"""

from functools import cache

import pytest
import torch

from model.catalog import PARTLY, RELEASED, Described, describe_models
from model.families import families
from model.families.qwen import Qwen
from model.families.qwen2_vl import SingleQwen

UNRELEASED = {"DeepStack-L", "DeepStack-V", "DeepStack-V as released"}  # our own format; and none is known to be out


@cache
def rows() -> dict[str, Described]:
    return {row.name: row for row in describe_models() if not row.here}


def test_every_family_with_a_released_checkpoint_has_a_row():
    assert {row.family for row in rows().values()} == {family.title for family in families()} - UNRELEASED
    assert set(rows()) == set(RELEASED) | set(PARTLY)
    sizes = [row.parameters for row in rows().values()]
    known = [size for size in sizes if size is not None]
    assert sizes == sorted(known) + [None] * (len(sizes) - len(known))


def test_what_is_counted_is_what_the_name_says():
    """A wrong shape would show: parameters in billions are part of most names, sometimes rounded down to one digit."""
    for name, billions in {
        "Qwen/Qwen3-VL-2B-Thinking": 2,
        "Qwen/Qwen3-VL-30B-A3B-Instruct": 30,
        "Qwen/Qwen3.5-35B-A3B": 35,
        "ibm-granite/granite-for-docling-500m": 0.5,
        "llava-hf/llava-1.5-7b-hf": 7,
    }.items():
        row = rows()[name]
        assert row.counted and row.parameters == pytest.approx(billions * 1e9, rel=0.12), name
        assert row.bytes(torch.bfloat16) == 2 * row.parameters


def test_what_was_not_counted_says_so():
    large, granite = (
        rows()[name].to_json() for name in ("Qwen/Qwen3-VL-235B-A22B-Instruct", "ibm-granite/granite-vision-4.1-4b")
    )
    assert (large["parameters"], large["parameters_counted"], large["llm_layers"]) == (235_000_000_000, False, 94)
    assert [stack["tap"] for stack in large["stacks"]] == [8, 16, 24]
    assert granite["default_plan"] == "0@9,1@6,2@3,3@0,4@12,5@15,6@18,7@21" and granite["bytes_bfloat16"] == 8 * 10**9
    blank = rows()["nvidia/Cosmos3-Nano"].to_json()
    left = {key for key, value in blank.items() if value is not None}
    assert left == {"name", "family", "needs", "here", "parameters_counted"} and not blank["parameters_counted"]
    single = rows()["Qwen/Qwen2.5-VL-7B-Instruct"].to_json()
    assert (single["stacks"], single["default_plan"], single["llm_layers"]) == ([], "base@0", None)


def test_the_mergers_of_the_mixture_are_as_large_as_was_counted_by_hand():
    """Three per tower, each of 2 * 4h + (4h)² + 4h + 4h * o + o weights: 92.1 million of 30B-A3B's."""
    with torch.device("meta"):
        model = Qwen.unfilled(RELEASED["Qwen/Qwen3-VL-30B-A3B-Instruct"]())
    mergers = sum(parameter.numel() for parameter in model.model.visual.deepstack_merger_list.parameters())
    assert mergers == 3 * (2 * 4608 + 4608**2 + 4608 + 4608 * 2048 + 2048) and round(mergers / 1e5) == 921


def test_families_without_stacks_have_none_in_their_rows():
    single = {
        family.title for family in families() if issubclass(family, SingleQwen) or family.name.startswith("llava")
    }
    for row in rows().values():
        assert row.single == (row.family in single), row.name
