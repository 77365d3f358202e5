"""The folded algebra in plain PyTorch, in batch blocks that stay in cache: any device.

Shapes: n samples of a block, F fields, E embedding size, H heads, O output width. Rows of the score matrix are
(field, head), so that one matmul serves all heads and nothing is ever permuted:

    q = x A + c        [n*F, H*E] = [n, F*H, E]
    P = softmax(q x^T) [n, F*H, F]
    z = P x            [n, F*H, E] = [n*F, H*E]
    out = relu(x R + z M + b + g)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..weights import (
    LN2,
    LOG2E,
    NEED_BIAS,
    NEED_INPUT,
    NEED_RESIDUAL,
    NEED_SCORES,
    NEED_VALUES,
    Layout,
    Parts,
    folded_dtype,
)

if TYPE_CHECKING:
    from ..dispatch import Call
    from ..reference import InteractingParameters

# Rows (samples times fields) of a block: at H = 2 its scores then fit a core's second-level cache.
BLOCK_ROWS = 2500


def unsupported(call: Call) -> list[str]:
    """Every reason why this engine cannot run `call`."""
    return ["it cannot run inside a torch.func transform (grad, vmap, jvp)"] if call.transforms else []


def fold(p: InteractingParameters, layout: Layout) -> Tensor:
    """The packed folded weights (DESIGN: A, c, M, R, b, g), in fp32 or fp64 whatever the parameters' dtype."""
    h, e, o = layout
    dtype = folded_dtype(p.w_q.dtype)
    w_q, b_q, w_k, _, w_v, b_v, w_o, b_o, w_r, b_r = (t.to(dtype) for t in p)
    scale = LOG2E / math.sqrt(e)
    packed = torch.empty(layout.numel, dtype=dtype, device=w_q.device)
    parts = layout.parts(packed)
    w_k = w_k.reshape(h, e, e)
    torch.mul(torch.bmm(w_q.reshape(h, e, e).mT, w_k).transpose(0, 1), scale, out=parts.a)
    torch.mul(torch.bmm(b_q.reshape(h, 1, e), w_k).view(h, e), scale, out=parts.c)
    torch.bmm(w_v.reshape(h, e, e).mT, w_o.reshape(o, h, e).permute(1, 2, 0), out=parts.m)
    parts.r.copy_(w_r.t())
    torch.add(b_o, b_r, out=parts.b)
    torch.mv(w_o, b_v, out=parts.g)
    return packed


def fold_backward(
    grad: Tensor, p: InteractingParameters, layout: Layout, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the ten parameters from that of the packed weights; None where not `wanted`.

    b_k moves every logit of a row alike, so its gradient is exactly zero.
    """
    h, e, o = layout
    w_q, b_q, w_k, b_k, w_v, b_v, w_o, _, _, _ = (t.to(grad.dtype) for t in p)
    d_a, d_c, d_m, d_r, d_b, d_g = layout.parts(grad)
    scale = LOG2E / math.sqrt(e)
    w_q, w_k, w_v = (w.reshape(h, e, e) for w in (w_q, w_k, w_v))
    w_o = w_o.reshape(o, h, e).transpose(0, 1)  # [H, O, D]
    want_q, want_bq, want_k, want_bk, want_v, want_bv, want_o, want_bo, want_r, want_br = wanted
    grads: list[Tensor | None] = [None] * len(p)
    if want_q:
        grads[0] = torch.bmm(w_k, d_a.permute(1, 2, 0)).mul_(scale).view(h * e, e)
    if want_bq:
        grads[1] = torch.bmm(w_k, d_c.unsqueeze(2)).mul_(scale).view(h * e)
    if want_k:
        d_k = torch.bmm(w_q, d_a.transpose(0, 1))
        grads[2] = d_k.baddbmm_(b_q.reshape(h, e, 1), d_c.unsqueeze(1)).mul_(scale).view(h * e, e)
    if want_bk:
        grads[3] = torch.zeros_like(b_k)
    if want_v:
        grads[4] = torch.bmm(w_o.mT, d_m.mT).view(h * e, e)
    if want_bv:
        grads[5] = torch.matmul(d_g, w_o).view(h * e)
    if want_o:
        d_o = torch.bmm(d_m.mT, w_v.mT)
        d_o.baddbmm_(d_g.view(1, o, 1).expand(h, o, 1), b_v.reshape(h, 1, e))
        grads[6] = d_o.transpose(0, 1).reshape(o, h * e)
    if want_bo:
        grads[7] = d_b.clone()
    if want_r:
        grads[8] = d_r.t().contiguous()
    if want_br:
        grads[9] = d_b.clone()
    return [None if g is None else g.to(t.dtype) for g, t in zip(grads, p, strict=True)]


class _Masked(NamedTuple):
    """A block's mask: `hidden` (n or 1, F or 1, 1, F or 1) and `empty`, its rows without a single key."""

    hidden: Tensor
    empty: Tensor


class _Block(NamedTuple):
    rows: slice  # of the batch
    x: Tensor  # [n, F, E] in the dtype of the weights
    mask: _Masked | None


def _blocks(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Iterator[_Block]:
    batch, fields, _ = x.shape
    size = max(1, BLOCK_ROWS // fields)
    for start in range(0, batch, size):
        rows = slice(start, min(start + size, batch))
        masked = None
        if mask is not None:
            hidden = (mask if mask.shape[0] == 1 else mask[rows]).unsqueeze(2)
            masked = _Masked(hidden, hidden.all(dim=-1, keepdim=True))
        yield _Block(rows, x[rows].to(dtype).contiguous(), masked)


def _attend(block: _Block, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """q [n, F*H, E], P [n, F*H, F] and z [n, F*H, E] of one block."""
    x, mask = block.x, block.mask
    n, f, e = x.shape
    h = parts.c.shape[0]
    q = torch.addmm(parts.c.view(-1), x.view(n * f, e), parts.a.view(e, h * e)).view(n, f * h, e)
    # A is folded for exp2; alpha takes the logits back to the base of torch.softmax.
    logits = torch.baddbmm(x.new_empty(()), q, x.mT, beta=0, alpha=LN2)
    if mask is None:
        p = torch.softmax(logits, dim=-1)
    else:
        logits.view(n, f, h, f).masked_fill_(mask.hidden, -math.inf)
        p = torch.softmax(logits, dim=-1)
        p.view(n, f, h, f).masked_fill_(mask.empty, 0.0)
    return q, p, torch.bmm(p, x)


def interact(x: Tensor, packed: Tensor, mask: Tensor | None, layout: Layout) -> Tensor:
    """x (B, F, E), packed folded weights, mask of 3 dimensions or None -> (B, F, O) in x's dtype."""
    h, e, o = layout
    batch, fields, _ = x.shape
    parts = layout.parts(packed)
    bias = parts.b + parts.g if mask is None else parts.b
    out = x.new_empty(batch, fields, o)
    for block in _blocks(x, mask, packed.dtype):
        _, _, z = _attend(block, parts)
        y = torch.addmm(bias, block.x.view(-1, e), parts.r)
        y.addmm_(z.view(-1, h * e), parts.m.view(h * e, o))
        y = y.view(-1, fields, o)
        if block.mask is not None:
            y += parts.g.masked_fill(block.mask.empty.squeeze(2), 0.0)
        torch.relu_(y)
        out[block.rows] = y
    return out


def interact_backward(
    grad: Tensor, x: Tensor, packed: Tensor, out: Tensor, mask: Tensor | None, layout: Layout, needs: int
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the packed weights; P is recomputed block by block.

    None where `needs` asks for nothing; parts of the packed gradient that are not needed are zero.
    """
    h, e, o = layout
    parts = layout.parts(packed)
    m, r, a = parts.m.view(h * e, o), parts.r, parts.a.view(e, h * e)
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs & NEED_INPUT else None
    d_packed = torch.zeros_like(packed) if needs & ~NEED_INPUT else None
    if d_packed is not None:
        d = layout.parts(d_packed)
        d_a, d_m = d.a.view(e, h * e), d.m.view(h * e, o)
    for block in _blocks(x, mask, packed.dtype):
        n, f, _ = block.x.shape
        x_rows = block.x.view(n * f, e)
        # As in torch's relu, a NaN output lets its gradient pass.
        d_y = grad[block.rows].to(packed.dtype).masked_fill(out[block.rows] <= 0, 0.0)
        if needs & NEED_BIAS:
            d.b.add_(d_y.sum((0, 1)))
            if block.mask is not None:
                d.g.add_(d_y.masked_fill(block.mask.empty.squeeze(2), 0.0).sum((0, 1)))
        d_y = d_y.view(n * f, o)
        if needs & NEED_RESIDUAL:
            d.r.addmm_(x_rows.t(), d_y)
        if not needs & (NEED_INPUT | NEED_SCORES | NEED_VALUES):
            continue
        q, p, z = _attend(block, parts)
        if needs & NEED_VALUES:
            d_m.addmm_(z.view(n * f, h * e).t(), d_y)
        if not needs & (NEED_INPUT | NEED_SCORES):
            continue
        d_z = torch.mm(d_y, m.t()).view(n, f * h, e)
        d_s = torch._softmax_backward_data(torch.bmm(d_z, block.x.mT), p, -1, p.dtype)
        d_q = torch.baddbmm(d_s.new_empty(()), d_s, block.x, beta=0, alpha=LN2)
        if needs & NEED_SCORES:
            d_a.addmm_(x_rows.t(), d_q.view(n * f, h * e))
            d.c.add_(d_q.view(n * f, h, e).sum(0))
        if d_x is not None:
            d_rows = torch.mm(d_y, r.t()).addmm_(d_q.view(n * f, h * e), a.t()).view(n, f, e)
            d_rows.baddbmm_(p.mT, d_z).baddbmm_(d_s.mT, q, alpha=LN2)
            d_x[block.rows] = d_rows
    if needs & NEED_BIAS and mask is None:
        d.g.copy_(d.b)
    return d_x, d_packed
