"""Qwen3-VL: the family that the others of its class are measured by.

Trap: "after layer k" hides the injection *between* two layers, so a recorded output of layer k lacks stack k and the
input of layer k+1 has it. The taps differ by size (5, 11, 17 of 24 blocks; 8, 16, 24 of 27), the class defaults do not.
"""

from __future__ import annotations

from model.families.qwen import Qwen


class Qwen3VL(Qwen):
    """`Qwen3VLForConditionalGeneration`."""

    name = "qwen3_vl"
    title = "Qwen3-VL"
    model_types = ("qwen3_vl",)
    model_class = "Qwen3VLForConditionalGeneration"
    takes_video = True
