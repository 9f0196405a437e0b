"""What IBM's Granite families share: a decoder that scales its embeddings and its logits.

Trap: the decoder multiplies its input embeddings by `embedding_multiplier` (12.0 in the released checkpoints), and with
them whatever was put into them; what is added later is not multiplied. The head's logits are divided by
`logits_scaling`.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.families.released import Released


class Granite(Released):
    """A family on Granite's text decoder."""

    @property
    def lm_head(self) -> nn.Module:
        return DividedHead(super().lm_head, self.model.config.text_config.logits_scaling)


class DividedHead(nn.Module):
    """Hidden states -> logits divided by the model's own scaling."""

    def __init__(self, head: nn.Module, scaling: float):
        super().__init__()
        self.head, self.scaling = head, scaling

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden) / self.scaling
