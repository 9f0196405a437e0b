"""The limits of one request as command-line options, made from the fields of `model.images.Limits`, and nowhere else.

Knows nothing about what the limits are used for.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import fields

from model.images import Limits

SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def amount(text: str) -> int:
    """'40M' -> 40000000, '32MiB' -> 33554432, '20_000' -> 20000. ValueError otherwise, as argparse wants it."""
    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not match or match[2] not in SUFFIXES:
        raise ValueError(text)
    return round(float(match[1].replace("_", "").replace(",", "")) * SUFFIXES[match[2]])


def in_words(value: int, unit: str) -> str:
    """A value as `amount` reads it, short: 40M, 32MiB, 16GiB, 20000."""
    if unit == "bytes" and value % 2**30 == 0:
        return f"{value // 2**30}GiB"
    if unit == "bytes" and value % 2**20 == 0:
        return f"{value // 2**20}MiB"
    return f"{value // 10**6}M" if value % 10**6 == 0 else str(value)


def add_limits(parser: argparse.ArgumentParser) -> None:
    """One option per limit, with its default in the help text."""
    group = parser.add_argument_group("limits of one request (40M, 32MiB and 20_000 are understood)")
    for limit in fields(Limits):
        help, unit = limit.metadata["help"], limit.metadata["unit"]
        group.add_argument(
            "--" + limit.name.replace("_", "-"),
            type=amount,
            default=limit.default,
            metavar=unit.upper(),
            help=f"{help} (default {in_words(limit.default, unit)})",
        )


def limits_from(options: argparse.Namespace) -> Limits:
    """The limits that were asked for; UserError for one that makes no sense."""
    return Limits(**{limit.name: getattr(options, limit.name) for limit in fields(Limits)})
