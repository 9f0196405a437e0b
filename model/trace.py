"""What one replayed pass left behind: CPU arrays with named axes, frozen. Knows nothing about how they are drawn.

Axes: L LLM layers, T sequence positions (prompt + answer), N rows of all images of the prompt in order, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.plan import Plan
from model.types import ImageGrid


@dataclass(frozen=True, eq=False)
class Trace:
    """One teacher-forced pass over prompt + answer under one plan.

    RMS of a row is sqrt(mean(x^2)) over d. Norms are empty arrays when the probe did not ask for them.
    """

    model: str
    plan: Plan
    texts: tuple[str, ...]  # [T], "" at image rows
    answer_start: int  # position of the first answer token
    grids: tuple[ImageGrid, ...]
    residual_rms: np.ndarray  # float32 [L+1, T]: input of layer l AFTER injection; last: output before the norm
    before_rms: np.ndarray  # float32 [L, T]: input of layer l before injection
    injected_rms: dict[tuple[str, int], np.ndarray]  # (source, layer) -> float32 [N], gain included
    # float32 [L, N]: |all injected before layer l| / |residual before|; 0 where nothing is injected, inf where the
    # residual before is zero (the base before layer 0)
    ratio: np.ndarray
    cosine: np.ndarray  # float32 [L, N]: injected against the residual before; NaN where either is zero
    attention: dict[int, np.ndarray]  # layer -> float32 [heads, Q, T], zero where causally masked
    attention_rows: tuple[int, ...]  # [Q] query positions, the same for every layer
    hidden: dict[int, np.ndarray]  # layer -> float32 [rows, d]
    hidden_positions: np.ndarray  # int64 [rows]: which positions `hidden` holds
    logprobs: np.ndarray  # float32 [answer tokens]
    seconds: float

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.ratio)

    @property
    def image_positions(self) -> np.ndarray:
        """int64 [N]: sequence positions of all image rows, images in order."""
        if not self.grids:
            return np.zeros(0, dtype=np.int64)
        return np.concatenate([grid.positions for grid in self.grids])

    @property
    def text_positions(self) -> np.ndarray:
        """int64: all other positions."""
        return np.setdiff1d(np.arange(len(self.texts)), self.image_positions)

    def map(self, values: np.ndarray, image_index: int = 0) -> np.ndarray:
        """Values over all image rows [..., N] -> this image's own grid [..., gh, gw]."""
        values = np.asarray(values)
        start = sum(len(grid.positions) for grid in self.grids[:image_index])
        grid = self.grids[image_index]
        return values[..., start : start + len(grid.positions)].reshape(*values.shape[:-1], *grid.grid)

    def to_json(self) -> dict:
        """Plain values: per layer the mean RMS at image and text rows, what was injected, ratio, cosine."""
        image, text = self.image_positions, self.text_positions
        layers = []
        for layer in range(len(self.residual_rms)):
            row = {
                "layer": layer,
                "residual_rms_image": _mean(self.residual_rms[layer, image]),
                "residual_rms_text": _mean(self.residual_rms[layer, text]),
            }
            if layer < len(self.before_rms):
                row["before_rms_image"] = _mean(self.before_rms[layer, image])
                row["ratio"] = _mean(self.ratio[layer])
                row["cosine"] = _mean(self.cosine[layer])
                row["injected"] = [
                    {"stack": e.source, "gain": e.gain, "rms": _mean(self.injected_rms[(e.source, layer)])}
                    for e in self.plan
                    if e.layer == layer and (e.source, layer) in self.injected_rms
                ]
            layers.append(row)
        return {
            "model": self.model,
            "plan": str(self.plan),
            "positions": len(self.texts),
            "answer_start": self.answer_start,
            "images": [{"grid": list(g.grid), "size": list(g.size), "tokens": len(g.positions)} for g in self.grids],
            "layers": layers,
            "logprobs": [float(value) for value in self.logprobs],
            "seconds": self.seconds,
        }


def _mean(values: np.ndarray) -> float | None:
    """Mean of the finite values, None if there are none."""
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else None
