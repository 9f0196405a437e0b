"""A training pass of a decoder over scenes with many questions each, computing every token once.

All questions of a scene share its prefix (leading tokens, image rows, closing tokens) and do not see each other; only
real tokens go through the matrices. Same weights and same numbers as transformers' Llama and Qwen3-VL text models with
the stacks added before each layer (tests compare them). Knows nothing about scenes or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Rows:
    """Questions of B scenes, R for each, padded to L. All `[B * R, L]` long: token ids, targets (-100 where not
    scored), `cells` (visual token that shows the target, -1 where unknown); `length` `[B * R]`."""

    ids: torch.Tensor
    targets: torch.Tensor
    cells: torch.Tensor
    length: torch.Tensor

    def to(self, device) -> Rows:
        return Rows(self.ids.to(device), self.targets.to(device), self.cells.to(device), self.length.to(device))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of `[..., heads, width]` as in transformers' Llama (halves, not pairs)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def enter(hidden, norm, eps: float, q_weight, k_weight, v_weight, cos, sin, heads: int, q_norm=None, k_norm=None):
    """First half of a layer up to attention, over all tokens `[T, d]`: rotated queries and keys, values, each
    `[T, heads, width]`. q_norm, k_norm: modules that normalise each head's queries and keys, where there are any.
    """
    x = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * norm
    q, k, v = ((x @ w.T).unflatten(-1, (heads, -1)) for w in (q_weight, k_weight, v_weight))
    if q_norm is not None:
        q, k = q_norm(q), k_norm(k)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def leave(hidden, attended, o_weight, norm, eps: float, gate_weight, up_weight, down_weight):
    """Second half of a layer: attention's output `[T, d]` into the stream, then the gated MLP (SiLU)."""
    hidden = hidden + attended @ o_weight.T
    x = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * norm
    return hidden + (F.silu(x @ gate_weight.T) * (x @ up_weight.T)) @ down_weight.T


def forward(
    llama,
    lead_ids: torch.Tensor,
    base: torch.Tensor,
    stacks: dict[int, torch.Tensor],
    rows: Rows,
    watch: tuple[int, ...] = (),
    inspect: int | None = None,
    closing_ids: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
):
    """Run the decoder `llama` (LlamaModel or Qwen3VLTextModel).

    lead_ids `[A]`; base `[B, N, d]` the image rows of the input; stacks layer -> `[B, N, d]` added before that layer;
    closing_ids `[C]` the tokens between the image rows and the questions. places: rotary positions of the prefix,
    `[A + N + C]` or, for time, row and column, `[3, A + N + C]`; questions go on after the largest. Default 0, 1, ...
    Returns hidden states at scored positions `[S, d]` after the final norm, the scored targets `[S]`, for each watched
    layer the attention of head 0 from the scored positions to the image rows `[S, N]`, the scored cells `[S]`, and the
    image rows at the input of layer `inspect` `[B, N, d]`.
    """
    config = llama.config
    heads, width = config.num_attention_heads, config.head_dim
    batch, seen, d = base.shape
    device = base.device
    first = len(lead_ids)
    prefix = first + seen + (0 if closing_ids is None else len(closing_ids))
    places = torch.arange(prefix) if places is None else places
    asked = int(places.max()) + 1  # position of a question's first token
    places = places.to(device)
    count, longest = rows.ids.shape
    valid = torch.arange(longest, device=device)[None] < rows.length[:, None]  # [N, L]
    flat = valid.flatten().nonzero()[:, 0]  # [M] places of real tokens in the padded table
    back = torch.zeros(count * longest, dtype=torch.long, device=device)
    back[flat] = torch.arange(len(flat), device=device)

    lead, *closing = (
        llama.embed_tokens(ids)[None].expand(batch, -1, -1) for ids in (lead_ids, closing_ids) if ids is not None
    )
    shared = torch.cat([lead, base, *closing], 1).flatten(0, 1)
    hidden = torch.cat([shared, llama.embed_tokens(rows.ids.flatten()[flat])])
    after = (asked + flat % longest).expand(*places.shape[:-1], -1)
    positions = torch.cat([torch.cat([places] * batch, -1), after], -1)  # [T] or [3, T]
    cos, sin = llama.rotary_emb(hidden[None], positions.unsqueeze(-2))
    cos, sin = cos[0][:, None], sin[0][:, None]  # [T, 1, width]
    split = batch * prefix
    causal = torch.full((longest, longest), float("-inf"), device=device).triu(1)
    image_rows = (
        torch.arange(batch, device=device)[:, None] * prefix + first + torch.arange(seen, device=device)[None]
    ).flatten()
    scored = (rows.targets.flatten()[flat] != -100).nonzero()[:, 0]
    scored_table = flat[scored]  # places in the padded table
    attention_out, seen_rows = {}, None
    scale = width**-0.5

    for number, layer in enumerate(llama.layers):
        if number in stacks:
            hidden = hidden.index_add(0, image_rows, stacks[number].flatten(0, 1).to(hidden.dtype))
        if number == inspect:
            seen_rows = hidden[image_rows].view(batch, seen, d)
        att, mlp, eps = layer.self_attn, layer.mlp, config.rms_norm_eps
        q, k, v = enter(
            hidden,
            layer.input_layernorm.weight,
            eps,
            att.q_proj.weight,
            att.k_proj.weight,
            att.v_proj.weight,
            cos,
            sin,
            heads,
            getattr(att, "q_norm", None),
            getattr(att, "k_norm", None),
        )
        qp, kp, vp = (t[:split].view(batch, prefix, heads, width).transpose(1, 2) for t in (q, k, v))
        out_prefix = F.scaled_dot_product_attention(qp, kp, vp, is_causal=True).transpose(1, 2).reshape(split, d)
        qr, kr, vr = (t[split:][back].view(count, longest, heads, width) for t in (q, k, v))
        qb = qr.view(batch, -1, heads, width).transpose(1, 2)  # [B, h, R L, w]
        to_prefix = (qb @ kp.transpose(-1, -2)) * scale  # [B, h, R L, P]
        own_q, own_k, own_v = (t.transpose(1, 2) for t in (qr, kr, vr))
        to_own = (own_q @ own_k.transpose(-1, -2)) * scale + causal  # [N, h, L, L]
        to_own_b = to_own.view(batch, -1, heads, longest, longest).transpose(1, 2).reshape(batch, heads, -1, longest)
        share = torch.softmax(torch.cat([to_prefix, to_own_b], -1), -1)
        from_prefix = share[..., :prefix] @ vp  # [B, h, R L, w]
        own_share = (
            share[..., prefix:]
            .reshape(batch, heads, -1, longest, longest)
            .transpose(1, 2)
            .reshape(count, heads, longest, longest)
        )
        from_own = (
            (own_share @ own_v).view(batch, -1, heads, longest, width).transpose(1, 2).reshape(batch, heads, -1, width)
        )
        out_rows = (from_prefix + from_own).transpose(1, 2).reshape(-1, d)[flat]
        if number in watch:
            attention_out[number] = share[:, 0, :, first : first + seen].reshape(-1, seen)[scored_table]
        attended, norm = torch.cat([out_prefix, out_rows]), layer.post_attention_layernorm.weight
        hidden = leave(
            hidden,
            attended,
            att.o_proj.weight,
            norm,
            eps,
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.down_proj.weight,
        )
    final = llama.norm(hidden[split:][scored])
    return final, rows.targets.flatten()[scored_table], attention_out, rows.cells.flatten()[scored_table], seen_rows


class Contents(nn.Module):
    """Training-only head: which character has which place in its string, per image row. Thrown away afterwards."""

    def __init__(self, d: int, slots: int, classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.out = nn.Linear(d, slots * classes)
        self.slots = slots

    def loss(self, rows: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """rows `[B, N, d]`, truth `[B, N, slots]` with 0 for nothing. Empty slots count a twentieth."""
        logits = self.out(self.norm(rows)).unflatten(-1, (self.slots, -1)).flatten(0, 2)
        target = truth.flatten().long()
        filled = target > 0
        keep = filled | (torch.rand(target.shape, device=target.device) < 0.05)
        each = F.cross_entropy(logits[keep], target[keep], reduction="none")
        return each.sum() / filled.sum().clamp(min=1)


class Grounding(nn.Module):
    """Training-only head: which question words point at an image row, in the words' own embeddings.

    A row that holds the text on the red sign is drawn towards the embedding of "red", so that a question's word and the
    row it asks for come to look alike before attention has to find that out from answers alone.
    """

    def __init__(self, d: int):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.out = nn.Linear(d, d)
        self.bias = nn.Parameter(torch.tensor(-3.0))  # few words point at a row

    def loss(self, rows: torch.Tensor, words: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """rows `[B, N, d]`, words' embeddings `[W, d]`, truth `[B, N, W]` in 0, 1.

        Per pointing word; absences count a fifth.
        """
        logits = self.out(self.norm(rows)) @ words.T / words.shape[1] ** 0.5 + self.bias
        each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        return (each * (0.2 + 0.8 * truth)).sum() / truth.sum().clamp(min=1)
