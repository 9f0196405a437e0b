"""Limits as options: one per field, read as people write numbers.

Run: pytest tests/app/test_limits.py
"""

import argparse
from dataclasses import fields

import pytest

from app.limits import add_limits, amount, in_words, limits_from
from model.errors import UserError
from model.images import Limits


@pytest.mark.parametrize(
    "text, value",
    [("7", 7), ("20_000", 20_000), ("20,000", 20_000), ("40M", 40_000_000), ("1.5m", 1_500_000), ("2k", 2000)]
    + [("32MiB", 32 * 2**20), ("1 GiB", 2**30), (" 3 ", 3)],
)
def test_amounts_as_people_write_them(text, value):
    assert amount(text) == value


@pytest.mark.parametrize("text", ["", "M", "-3", "three", "1.2.3", "5 apples", "0x10"])
def test_what_is_no_amount(text):
    with pytest.raises(ValueError):
        amount(text)


def test_every_limit_is_an_option_whose_default_is_that_of_the_dataclass():
    parser = argparse.ArgumentParser()
    add_limits(parser)
    assert limits_from(parser.parse_args([])) == Limits()
    for limit in fields(Limits):
        changed = limits_from(parser.parse_args([f"--{limit.name.replace('_', '-')}", "17"]))
        assert getattr(changed, limit.name) == 17
        assert amount(in_words(limit.default, limit.metadata["unit"])) == limit.default, (
            "the help text says the default"
        )


def test_a_limit_of_nothing_is_refused():
    parser = argparse.ArgumentParser()
    add_limits(parser)
    with pytest.raises(UserError, match="max_images"):
        limits_from(parser.parse_args(["--max-images", "0"]))
