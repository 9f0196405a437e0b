"""Qwen2.5-VL: Qwen2-VL with a tower of windowed attention, without stacks.

Traps: `fullatt_block_indexes` in its config (7, 15, 23, 31) looks like taps. It names the blocks of the tower that see
the whole image rather than a window; nothing is tapped there. The frames of a video lie as far apart in position as in
time: `tokens_per_second` positions a second, rounded down.
"""

from __future__ import annotations

from model.clip import Clip
from model.families.qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    """`Qwen2_5_VLForConditionalGeneration`."""

    name = "qwen2_5_vl"
    title = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
    model_class = "Qwen2_5_VLForConditionalGeneration"

    def _timing(self, clip: Clip) -> dict[str, float]:
        return {"second_per_grid_ts": self.processor.temporal_patch_size / clip.fps}
