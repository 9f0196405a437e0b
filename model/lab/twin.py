"""What a variant trains: the projector, the decoder, and how visual tokens enter it; with some the tower, too. Knows
nothing about files."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from model import lowrank
from model.lab import sight
from model.lab.variants import LOW, SETS, TAPS, Variant, first_layer, layers_of, sets_of, watched
from model.training import packed
from model.training.tower import normalised
from model.training.twins import Twin, begin

MERGE = {"concat": "concat", "none": "none"}  # of the embedded models' kinds; all else projects token by token
MERGE |= dict.fromkeys(TAPS, "concat")  # the four tokens under a row side by side
RANK = 8  # of what training adds to each matrix of a tuned tower: what can be stored beside a decoder in 4 MB
PIXELS = 5  # axes of what a variant that reads pixels is given


class LabTwin(Twin):
    """The model of one variant, called and trained as the embedded models' Twin.

    features: `[n, 384, width]` as `model.lab.scenes.encode` gives them; for a variant that reads pixels `[n, 5, 64, 64,
    3]` as `model.lab.scenes.views_of` does, and `tower` the weights that its tower starts from. What is learned on top
    starts as if it were not there: gates at 1, embeddings at 0.
    """

    def __init__(
        self,
        variant: Variant,
        vision: CLIPVisionConfig,
        vocabulary: int,
        features: Tensor,
        width: int,
        layers: int,
        tower: CLIPVisionModel | None = None,
    ):
        places = layers_of(variant, layers)
        start = first_layer(variant, layers)
        crops = SETS - 1 if variant.merge in TAPS else SETS  # beside the first that is merged
        shape = {"crops": crops, "sampling": variant.sampling, "start": start, "interval": variant.interval}
        merge = MERGE.get(variant.merge, "stack")
        if variant.pixels:
            with torch.no_grad():
                features = sight.see(tower, variant, features)
        super().__init__(merge, vision, vocabulary, features, width=width, layers=layers, **shape)
        own = self.model.model.vision_tower.requires_grad_(False)
        own.set_attn_implementation("eager")  # fastest to train
        if variant.pixels:
            own.load_state_dict(tower.state_dict())
        self.changes = lowrank.begin(own, RANK) if variant.tuned else []
        if variant.merge in TAPS:
            made = [self.whitening(block) for block in features.unbind(1)]
            self.centre = torch.stack([centre for centre, _ in made])[:, None]
            self.whiten = torch.stack([whiten for _, whiten in made])
            self.mergers = nn.ModuleList(self._merger(k < variant.taps) for k in range(variant.count))
        self.variant, self.places = variant, places
        self.watched, self.inspected = watched(variant, layers), layers - 1
        self.register_buffer("sets", sets_of(variant.sampling), persistent=False)
        if variant.gate != "none":
            self.gates = nn.Parameter(torch.ones(SETS, 1, width if variant.gate == "channel" else 1))
        if variant.positions:
            self.positions = nn.Parameter(torch.zeros(SETS, LOW**2, width))

    def _merger(self, merged: bool) -> nn.Module:
        """A projector like the first one, of four tokens side by side if `merged`, else of one."""
        like = copy(self.model.config)
        like.vision_feature_layer = self.model.config.vision_feature_layer if merged else -1
        made = type(self.projector)(like)
        begin(made)
        return made

    def forward(self, read: Tensor, rows: packed.Rows | None, dtype: torch.dtype = torch.float32):
        """As a Twin's; read: features, or for a variant that reads pixels those or what `see` makes of them.

        Where the question decides which rows keep their stacks, the questions of a scene cannot share its image rows:
        each has a copy, and the pass keeps those of a scene's first question.
        """
        features = self.see(read, dtype)
        if self.variant.keep_by != "question" or rows is None:
            return super().forward(features, rows, dtype)
        each = len(rows.ids) // len(features)
        base, stacks = self.inject(features, rows)
        logits, result = self.decoded(base.repeat_interleave(each, 0), stacks, rows, dtype)
        result.seen = result.seen[::each]
        return logits, result

    def see(self, read: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the tower makes of pixels, its matrices multiplied in `dtype` where it is tuned, else in float32 as the
        cache's features were made; all else is given back as it is."""
        if read.ndim != PIXELS:
            return read
        learning = self.variant.tuned and torch.is_grad_enabled()
        mixed = self.variant.tuned and dtype != torch.float32
        with torch.set_grad_enabled(learning), torch.autocast(read.device.type, dtype, enabled=mixed):
            return sight.see(self.model.model.vision_tower, self.variant, read).float()

    def whitened(self, features: Tensor) -> Tensor:
        """What the tower gave, in directions of like size; with taps each block by its own measure."""
        return (features - self.centre) @ self.whiten

    @torch.no_grad()
    def look(self) -> None:
        """What the tower does for an empty image: as `see` does, or for the views whose features this variant reads
        from the cache."""
        tower, variant = self.model.model.vision_tower, self.variant
        side = tower.config.image_size
        views = torch.zeros(1 + SETS, side, side, 3, device=tower.device)
        if variant.pixels:
            sight.see(tower, variant, views[None])
        else:
            low = variant.merge != "string"
            high = variant.merge != "none" and variant.rows == "high"
            sight.states(tower, normalised(views[: low + SETS * high]))

    def views(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The whitened tokens of the global view `[B, 64, width]` and of the high-resolution one `[B, 256, width]`; of
        a variant that tunes the tower the global view's alone."""
        features = self.whitened(features)
        first = 0 if self.variant.consistent else LOW**2
        return features[:, first : first + LOW**2], features[:, 2 * LOW**2 :]

    def inject(self, features: Tensor, asked: packed.Rows | None = None) -> tuple[Tensor, dict[int, Tensor]]:
        """Features to the image rows of the input `[B, N, d]` and what is added to them by layer.

        asked: R questions of each scene, where they decide what is added: then `[B * R, N, d]` is."""
        merge = self.variant.merge
        if merge in TAPS:
            return self.merged(features)
        low, high = self.views(features)
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
        return base, self.stacks(base, high, asked)

    def merged(self, features: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Of a variant with taps: blocks `[B, blocks, 256, width]` to the input's image rows and the stacks by layer,
        four tokens merged into each row; a sample's stack holds one of the four."""
        variant = self.variant
        order = [*dict.fromkeys(variant.blocks)]
        dealt = self.whitened(features)[:, :, self.sets]  # [B, blocks, 4, 64, width]
        base, *taken = (dealt[:, order.index(block)] for block in variant.blocks)
        stacks = {}
        for layer, k in self.places.items():
            rows = torch.cat(taken[k].unbind(1), -1) if k < variant.taps else taken[k][:, k - variant.taps]
            stacks[layer] = self.mergers[k](rows)
        return self.projector(torch.cat(base.unbind(1), -1)), stacks

    def stacks(self, base: Tensor, high: Tensor, asked: packed.Rows | None = None) -> dict[int, Tensor]:
        """What is added before each layer, `[B, 64, d]` each, or `[B * R, 64, d]`."""
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
            kept = self.kept(self.relevance(base, high, asked))[:, taken, :, None]
            rows = rows.repeat_interleave(len(kept) // len(rows), 0) * kept
        return dict(zip(self.places, rows.unbind(1), strict=True))

    def kept(self, relevance: Tensor) -> Tensor:
        """Which rows get which set, 1 or 0 `[B, 4, 64]`: those ranked first all of them, the next the first half."""
        rank = relevance.argsort(1, descending=True).argsort(1)
        number = torch.arange(SETS, device=relevance.device)[None, :, None]
        share = torch.where(number < SETS // 2, self.variant.keep_some, self.variant.keep_all)
        return (rank[:, None] < share * LOW**2).to(relevance.dtype)

    def relevance(self, base: Tensor, high: Tensor, asked: packed.Rows | None) -> Tensor:
        """What rows are ranked by, `[B, 64]`: the norm of their tokens in the high-resolution view, chance, or
        `[B * R, 64]` the question; while nothing is asked, chance in place of the question."""
        if self.variant.keep_by == "norm":
            return high[:, self.sets].square().sum((1, 3))
        if self.variant.keep_by == "question" and asked is not None:
            return self.attended(base, asked)
        return torch.rand(len(high), LOW**2, device=high.device)

    @torch.no_grad()
    def attended(self, base: Tensor, asked: packed.Rows) -> Tensor:
        """How much each question attends to the global tokens, `[B * R, 64]`: the first layer's own queries of its
        words and keys of the image rows, which hold no stack yet; positions left out, softmax over the image rows, mean
        over words and heads. Its words are what stands before its first answer: nothing of an answer is used, and a
        second question gets the rows that the first one kept, as in a chat that goes on from its cache."""
        llama = self.language
        layer, heads = llama.layers[0], llama.config.num_attention_heads
        words = layer.self_attn.q_proj(layer.input_layernorm(llama.embed_tokens(asked.ids)))
        keys = layer.self_attn.k_proj(layer.input_layernorm(base))
        words = words.view(len(base), -1, heads, llama.config.head_dim).transpose(1, 2)  # [B, h, R L, w]
        keys = keys.view(len(base), -1, heads, llama.config.head_dim).transpose(1, 2)
        share = torch.softmax(words @ keys.transpose(-1, -2) * llama.config.head_dim**-0.5, -1).mean(1)
        share = share.view(*asked.ids.shape, -1)  # [B R, L, 64]
        question = (asked.targets != -100).cumsum(1) == 0  # the first scored position reads what opens the answer
        return (share * question[..., None]).sum(1) / question.sum(1, keepdim=True)

    def counted(self) -> int:
        """Parameters that a model of this kind has beside the vision tower."""
        aside = ("heads.", "model.model.vision_tower.")
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith(aside))
