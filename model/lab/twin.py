"""What a variant trains: the projector, the decoder, and how visual tokens enter it. Knows nothing about files."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig

from model.lab.variants import LOW, SETS, Variant, first_layer, layers_of, sets_of
from model.training.twins import Twin

MERGE = {"concat": "concat", "none": "none"}  # of the embedded models' kinds; all else projects token by token


class LabTwin(Twin):
    """The model of one variant, called and trained as the embedded models' Twin.

    features: `[n, 384, width]` as `model.lab.scenes.encode` gives them. What is learned on top starts as if it were not
    there: gates at 1, embeddings at 0.
    """

    def __init__(
        self, variant: Variant, vision: CLIPVisionConfig, vocabulary: int, features: Tensor, width: int, layers: int
    ):
        places = layers_of(variant, layers)
        start = first_layer(variant, layers)
        shape = {"crops": SETS, "sampling": variant.sampling, "start": start, "interval": variant.interval}
        merge = MERGE.get(variant.merge, "stack")
        super().__init__(merge, vision, vocabulary, features, width=width, layers=layers, **shape)
        self.model.model.vision_tower.requires_grad_(False)  # features come from the cache
        self.variant, self.places = variant, places
        self.watched, self.inspected = (layers - 2, layers - 1), layers - 1
        self.register_buffer("sets", sets_of(variant.sampling), persistent=False)
        if variant.gate != "none":
            self.gates = nn.Parameter(torch.ones(SETS, 1, width if variant.gate == "channel" else 1))
        if variant.positions:
            self.positions = nn.Parameter(torch.zeros(SETS, LOW**2, width))

    def views(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The whitened tokens of the global view `[B, 64, width]` and of the high-resolution one `[B, 256, width]`."""
        features = (features - self.centre) @ self.whiten
        first = 0 if self.variant.consistent else LOW**2
        return features[:, first : first + LOW**2], features[:, 2 * LOW**2 :]

    def inject(self, features: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Features to the image rows of the input `[B, N, d]` and what is added to them by layer."""
        low, high = self.views(features)
        merge = self.variant.merge
        if merge == "concat":
            return self.projector(torch.cat([low, *high[:, self.sets].unbind(1)], -1)), {}
        if merge == "string":
            return self.projector(high), {}
        base = self.projector(low)
        if merge == "global-string":
            return torch.cat([base, self.projector(high)], 1), {}
        if merge == "average":
            return base + self.projector(high[:, self.sets]).mean(1), {}
        if merge == "none" and self.variant.base_at:
            return torch.zeros_like(base), {self.variant.base_at: base}
        return base, self.stacks(base, high)

    def stacks(self, base: Tensor, high: Tensor) -> dict[int, Tensor]:
        """What is added before each layer, `[B, 64, d]` each."""
        if not self.places:
            return {}
        taken = [*self.places.values()]
        rows = base[:, None] if self.variant.rows == "global" else self.projector(high[:, self.sets[taken]])
        rows = rows.expand(-1, len(taken), -1, -1)
        if self.variant.gate != "none":
            rows = rows * self.gates[taken]
        if self.variant.positions:
            rows = rows + self.positions[taken]
        if self.variant.keep_some < 1:
            rows = rows * self.kept(high)[:, taken, :, None]
        return dict(zip(self.places, rows.unbind(1), strict=True))

    def kept(self, high: Tensor) -> Tensor:
        """Which rows get which set, 1 or 0 `[B, 4, 64]`: those ranked first all of them, the next the first half."""
        rank = self.relevance(high).argsort(1, descending=True).argsort(1)
        number = torch.arange(SETS, device=high.device)[None, :, None]
        share = torch.where(number < SETS // 2, self.variant.keep_some, self.variant.keep_all)
        return (rank[:, None] < share * LOW**2).to(high.dtype)

    def relevance(self, high: Tensor) -> Tensor:
        """What rows are ranked by, `[B, 64]`: the norm of their tokens in the high-resolution view, or chance."""
        if self.variant.keep_by == "random":
            return torch.rand(len(high), LOW**2, device=high.device)
        return high[:, self.sets].square().sum((1, 3))

    def counted(self) -> int:
        """Parameters that a model of this kind has beside the vision tower."""
        aside = ("heads.", "model.model.vision_tower.")
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith(aside))
