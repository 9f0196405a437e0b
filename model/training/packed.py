"""A training pass of a decoder over scenes with many questions each, computing every token once.

All questions of a scene share its prefix (leading tokens, image rows, closing tokens) and do not see each other; only
real tokens go through the matrices. Same weights and same numbers as transformers' Llama and Qwen3-VL text models with
the stacks added before each layer (tests compare them). Knows nothing about scenes or files.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Rows:
    """Questions of B scenes, R for each, padded to L. All `[B * R, L]` long: token ids, targets (-100 where not
    scored), `cells` (visual token that shows the target, -1 where unknown); `length` `[B * R]`; `asked` `[B * R, W]`
    in 0, 1: the place words of each question."""

    ids: torch.Tensor
    targets: torch.Tensor
    cells: torch.Tensor
    length: torch.Tensor
    asked: torch.Tensor

    def to(self, device) -> Rows:
        return Rows(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass
class Pass:
    """What one pass leaves: for the S scored positions, the final normed states `[S, d]`, targets and cells `[S]`, the
    row each is in `[S]`, its state at the inspected layer's input `[S, d]`, and by watched layer the attention of head
    0 to the image rows `[S, N]`; the image rows at the inspected layer's input `[B, N, d]`, and, if something is added
    after the last layer, after that."""

    seen: torch.Tensor
    last: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    cells: torch.Tensor | None = None
    row: torch.Tensor | None = None
    asking: torch.Tensor | None = None
    attention: dict[int, torch.Tensor] | None = None


def linear(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """x `[T, k]` times the transposes of weights `[n, k]`, side by side: `[T, sum of n]`."""
    return x @ torch.cat(weights).to(x.dtype).T


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of `[..., heads, width]` as in transformers' Llama (halves, not pairs).

    The first half of `sin` has its sign turned."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rms_norm(x: torch.Tensor, norm: nn.Module, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.weight


def forward(
    llama,
    lead_ids: torch.Tensor,
    base: torch.Tensor,
    stacks: dict[int, torch.Tensor],
    rows: Rows | None,
    watch: tuple[int, ...] = (),
    inspect: int = 0,
    closing_ids: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Pass:
    """Run the decoder `llama` (LlamaModel or Qwen3VLTextModel).

    lead_ids `[A]`; base `[B, N, d]` the image rows of the input; stacks layer -> `[B, N, d]` added before that layer,
    after the last one under the number of layers;
    rows: the questions, or None to stop at the input of layer `inspect`, with the image rows alone.
    closing_ids `[C]` the tokens between the image rows and the questions. places: rotary positions of the prefix,
    `[A + N + C]` or, for time, row and column, `[3, A + N + C]`; questions go on after the largest. Default 0, 1, ...
    dtype: what layers compute in; the residual stream is float32.
    """
    config = llama.config
    heads, width, eps = config.num_attention_heads, config.head_dim, config.rms_norm_eps
    batch, seen, d = base.shape
    device = base.device
    first = len(lead_ids)
    prefix = first + seen + (0 if closing_ids is None else len(closing_ids))
    places = (torch.arange(prefix) if places is None else places).to(device)
    lead, *closing = (
        llama.embed_tokens(ids)[None].expand(batch, -1, -1) for ids in (lead_ids, closing_ids) if ids is not None
    )
    hidden = torch.cat([lead, base.float(), *closing], 1).flatten(0, 1)
    positions = torch.cat([places] * batch, -1)  # [T] or [3, T]
    split = batch * prefix
    image_rows = (
        torch.arange(batch, device=device)[:, None] * prefix + first + torch.arange(seen, device=device)[None]
    ).flatten()
    result, attention = None, {}
    if rows is not None:
        count, longest = rows.ids.shape
        valid = torch.arange(longest, device=device)[None] < rows.length[:, None]  # [N, L]
        flat = valid.flatten().nonzero()[:, 0]  # [M] places of real tokens in the padded table
        hidden = torch.cat([hidden, llama.embed_tokens(rows.ids.flatten()[flat])])
        after = (int(places.max()) + 1 + flat % longest).expand(*places.shape[:-1], -1)
        positions = torch.cat([positions, after], -1)
        causal = torch.full((longest, longest), float("-inf"), device=device, dtype=dtype).triu(1)
        scored = (rows.targets.flatten()[flat] != -100).nonzero()[:, 0]
        scored_table = flat[scored]  # places in the padded table
    cos, sin = llama.rotary_emb(hidden[None], positions.unsqueeze(-2))
    cos, sin = cos[0][:, None].to(dtype), sin[0][:, None].to(dtype)  # [T, 1, width]
    sin = torch.cat([-sin[..., : width // 2], sin[..., width // 2 :]], -1)
    scale = width**-0.5

    def table(x):  # real tokens `[M, ...]` at their places in the padded table
        return x.new_zeros(count * longest, *x.shape[1:]).index_copy(0, flat, x).unflatten(0, (count, longest))

    def added(x, number):  # the stream with the stack of this layer, if it has one
        if number not in stacks:
            return x
        return x.index_add(0, image_rows, stacks[number].flatten(0, 1).to(x.dtype))

    for number, layer in enumerate(llama.layers):
        hidden = added(hidden, number)
        if number == inspect:
            result = Pass(hidden[image_rows].view(batch, seen, d))
            if rows is None:
                return result
            result.asking, result.attention = hidden[split:].index_select(0, scored), attention
        att, mlp = layer.self_attn, layer.mlp
        x = rms_norm(hidden, layer.input_layernorm, eps).to(dtype)
        joined = linear(x, att.q_proj.weight, att.k_proj.weight, att.v_proj.weight)
        q, k, v = joined.view(len(x), 3, heads, width).unbind(1)
        if hasattr(att, "q_norm"):
            q, k = att.q_norm(q).to(dtype), att.k_norm(k).to(dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        qp, kp, vp = (t[:split].view(batch, prefix, heads, width).transpose(1, 2) for t in (q, k, v))
        # float32: the fused kernel's way back is eight times slower in bfloat16 on CPUs
        out = F.scaled_dot_product_attention(qp.float(), kp.float(), vp.float(), is_causal=True)
        out = out.transpose(1, 2).reshape(split, d).to(dtype)
        if rows is not None:
            qr, kr, vr = (table(t[split:]) for t in (q, k, v))
            qb = qr.view(batch, -1, heads, width).transpose(1, 2)  # [B, h, R L, w]
            to_prefix = (qb @ kp.transpose(-1, -2)) * scale  # [B, h, R L, P]
            own_q, own_k, own_v = (t.transpose(1, 2) for t in (qr, kr, vr))
            to_own = (own_q @ own_k.transpose(-1, -2)) * scale + causal  # [N, h, L, L]
            to_own = to_own.view(batch, -1, heads, longest, longest).transpose(1, 2).reshape(batch, heads, -1, longest)
            share = torch.softmax(torch.cat([to_prefix, to_own], -1), -1)
            own_share = share[..., prefix:].view(batch, heads, -1, longest, longest).transpose(1, 2)
            from_own = (own_share.reshape(count, heads, longest, longest) @ own_v).view(
                batch, -1, heads, longest, width
            )
            from_own = from_own.transpose(1, 2).reshape(batch, heads, -1, width)
            from_prefix = share[..., :prefix] @ vp  # [B, h, R L, w]
            out_rows = (from_prefix + from_own).transpose(1, 2).reshape(-1, d).index_select(0, flat)
            out = torch.cat([out, out_rows])
            if number in watch:
                attention[number] = share[:, 0, :, first : first + seen].reshape(-1, seen)[scored_table].float()
        hidden = hidden + linear(out, att.o_proj.weight)
        x = rms_norm(hidden, layer.post_attention_layernorm, eps).to(dtype)
        gate, up = linear(x, mlp.gate_proj.weight, mlp.up_proj.weight).chunk(2, -1)
        hidden = hidden + linear(F.silu(gate) * up, mlp.down_proj.weight)
    if len(llama.layers) in stacks:
        hidden = added(hidden, len(llama.layers))
        result.last = hidden[:split].view(batch, prefix, d)[:, first : first + seen]
    result.hidden = llama.norm(hidden[split:].index_select(0, scored))
    result.targets, result.cells = rows.targets.flatten()[scored_table], rows.cells.flatten()[scored_table]
    result.row = scored_table // longest
    return result


class Heads(nn.Module):
    """Training-only heads on what the decoder holds at one layer's input; thrown away afterwards.

    contents: which character has which place in its string, per image row. words: which question words point at an
    image row, and which were asked at an answer's position, both in the words' own embeddings: a row that holds the
    text on the red sign, and the answer to a question about it, are drawn towards the embedding of "red", so that the
    two come to look alike before attention has to find that out from answers alone.
    """

    def __init__(self, d: int, slots: int, classes: int):
        super().__init__()
        self.slots = slots
        self.norm, self.contents = nn.LayerNorm(d), nn.Linear(d, slots * classes)
        self.seen, self.asked = nn.Linear(d, d), nn.Linear(d, d)
        self.bias = nn.Parameter(torch.tensor([-3.0, -3.0]))  # few words point at a row

    def contents_loss(self, rows: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """rows `[B, N, d]`, truth `[B, N, slots]` with 0 for nothing. Empty slots count a twentieth."""
        logits = self.contents(self.norm(rows)).unflatten(-1, (self.slots, -1)).flatten(0, 2)
        target = truth.flatten().long()
        filled = target > 0
        keep = filled | (torch.rand(target.shape, device=target.device) < 0.05)
        each = F.cross_entropy(logits[keep], target[keep], reduction="none")
        return each.sum() / filled.sum().clamp(min=1)

    def words_loss(self, states: torch.Tensor, words: torch.Tensor, truth: torch.Tensor, asked: bool) -> torch.Tensor:
        """states `[..., d]` of image rows, or of answers' positions if `asked`; words' embeddings `[W, d]`; truth
        `[..., W]` in 0, 1. Per pointing word; absences count a fifth.
        """
        head = self.asked if asked else self.seen
        logits = head(self.norm(states)) @ words.T / words.shape[1] ** 0.5 + self.bias[int(asked)]
        each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        return (each * (0.2 + 0.8 * truth)).sum() / truth.sum().clamp(min=1)
