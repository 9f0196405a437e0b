"""What a variant of the group "text" trains: the decoder alone, and how the tokens of a long text enter it. Knows
nothing about files."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from model.lab.variants import Variant, entering, layers_of, watched
from model.training import dataset, packed, twins
from model.training.canvas import CHARACTERS

SPREAD = 0.5  # of the embeddings at first


class TextTwin(nn.Module):
    """The model of one variant, called and trained as twins.Twin is, on texts `[n, 256]` of token ids for features.

    A token's row is its embedding, wherever it enters: the decoder that reads the question reads the text, and nothing
    is learned that text-full does not have.
    """

    lead = twins.Twin.lead

    def __init__(self, variant: Variant, vocabulary: int, width: int, layers: int):
        super().__init__()
        text = twins.configuration(None, "none", vocabulary, width, layers).text_config
        self.variant, self.model = variant, LlamaForCausalLM(text)
        nn.init.normal_(self.language.embed_tokens.weight, std=SPREAD)
        self.heads = packed.Heads(width, dataset.CONTENTS, len(CHARACTERS) + 1)
        self.watched, self.inspected = watched(variant, layers), layers - 1
        self.places = [*layers_of(variant, layers)]
        self.register_buffer("taken", entering(variant, layers), persistent=False)

    @property
    def language(self) -> nn.Module:
        """The decoder's layers and embeddings."""
        return self.model.model

    def inject(self, texts: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Texts to the rows of the input `[n, N, d]` and what is added to them by layer."""
        base, *stacks = self.language.embed_tokens(texts.long()[:, self.taken]).unbind(1)
        return base, dict(zip(self.places, stacks, strict=True))

    def forward(self, texts: Tensor, rows: packed.Rows | None, dtype: torch.dtype = torch.float32):
        """Logits `[S, vocabulary]` at scored positions (None without rows) and the pass, layers computed in `dtype`."""
        base, stacks = self.inject(texts)
        lead = torch.tensor(self.lead, device=base.device)
        result = packed.forward(self.language, lead, base, stacks, rows, self.watched, self.inspected, dtype=dtype)
        return None if rows is None else self.model.lm_head(result.hidden), result

    def see(self, texts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The texts: there is no tower, and nothing to be done before the decoder."""
        return texts

    def whitened(self, texts: Tensor) -> Tensor:
        """The texts, as `see`."""
        return texts

    def look(self) -> None:
        """What a tower does: nothing."""

    def counted(self) -> int:
        """Parameters that a model of this kind has."""
        return sum(p.numel() for p in self.model.parameters())
