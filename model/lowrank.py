"""Low-rank changes of a module's matrices: what training adds to weights that stay where they are.

LoRA's (Hu et al. 2021, arXiv:2106.09685) with scale 1: each linear layer's weight `[out, in]` becomes weight + up @
down, up `[out, rank]` starting at zero, so that nothing has changed before the first step. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Change(nn.Module):
    """What is added to one matrix."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) * weight.shape[1] ** -0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def begin(module: nn.Module, rank: int) -> list[nn.Parameter]:
    """Give every linear layer inside `module` a change of this rank; returns their parameters. All other weights of the
    module need no gradient from now on."""
    module.requires_grad_(False)
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    changes = [Change(layer.weight, rank) for layer in layers]
    for layer, change in zip(layers, changes, strict=True):
        parametrize.register_parametrization(layer, "weight", change)
    return [parameter for change in changes for parameter in change.parameters()]


def changes(module: nn.Module) -> dict[str, Tensor]:
    """What `begin` put into `module`: "LAYER.weight.up" and "….down" of each changed matrix, contiguous."""
    return {
        f"{name}.weight.{part}": getattr(layer.parametrizations.weight[0], part).detach().contiguous()
        for name, layer in module.named_modules()
        if parametrize.is_parametrized(layer, "weight")
        for part in ("up", "down")
    }


def merge(module: nn.Module) -> None:
    """Leave `module` with the changed matrices as its plain weights."""
    for layer in [*module.modules()]:
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")


def changed(weights: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's state with what `changes` gave added, in the state's own precision. KeyError for a change of a matrix
    that is not there."""
    out = dict(weights)
    for name in found:
        if name.endswith(".up"):
            matrix = name.removesuffix(".up")
            out[matrix] = out[matrix] + found[name].to(out[matrix]) @ found[f"{matrix}.down"].to(out[matrix])
    return out
