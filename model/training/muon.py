"""Muon: momentum whose matrix updates are made orthogonal. Source: Jordan et al. 2024, Newton-Schulz coefficients
theirs.

torch.optim.Muon takes one matrix after another and always iterates in bfloat16, which CPUs without bfloat16 units run
several times slower than float32; here matrices of one shape go together, in the precision that the machine is fast in.
"""

from __future__ import annotations

from collections import defaultdict

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic Newton-Schulz, Jordan et al. 2024


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix of each of `matrices` `[..., m, n]`, approximately."""
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For two-dimensional weights only; `lr` is the step's root-mean-square per row, as in Jordan's scaling.

    dtype: what the Newton-Schulz iteration is computed in.
    """

    def __init__(
        self,
        params,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for shape, weights in by_shape.items():
                ahead = []
                for weight in weights:
                    state = self.state[weight]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(weight)
                    buffer = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                    ahead.append(weight.grad.lerp(buffer, group["momentum"]))
                updates = orthogonal(torch.stack(ahead).to(self.dtype)).to(weights[0].dtype)
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, list(updates.unbind()), alpha=-scale)
