"""What training in bfloat16 must keep: logits near those in float32, and gradients that point the same way."""

import torch
from torch.nn import functional as F


def same_way(twin, features: torch.Tensor, rows) -> None:
    """Bfloat16 has 8 bits, 0.4 % of a number; through a few layers a few per cent of what a logit spreads over."""
    passes = []
    for dtype in (torch.float32, torch.bfloat16):
        twin.zero_grad()
        logits, result = twin(features, rows, dtype)
        loss = F.cross_entropy(logits.float(), result.targets) - sum(
            torch.log(attention + 1e-6).mean() for attention in result.attention.values()
        )
        loss.backward()
        layers = twin.model.model.language_model.layers
        passes.append((logits.detach(), {name: p.grad for name, p in layers.named_parameters()}))
    (exact, wanted), (near, found) = passes
    assert not torch.equal(exact, near), "nothing was computed in bfloat16"
    assert (near - exact).abs().max() < 0.05 * exact.std()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), wanted[name].flatten(), 0) > 0.99, name
