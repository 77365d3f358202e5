"""The folded algebra in plain PyTorch, in batch blocks that stay in cache: any device.

Shapes: n samples of a block, F fields, E embedding size, H heads, O output width. A column of scores is a (field,
head), so that one matmul serves all heads and nothing is ever permuted; keys come first, because short rows are slow
to reduce and columns are not:

    q = x A + c              [n*F, H*E] = [n, F*H, E]
    w = 2^(x q^T)            [n, F, F*H], not normalised
    z = w^T x / sum of w     [n, F*H, E] = [n*F, H*E]
    out = relu(z M + x R + b + g)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as nnf
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
    folded_dtype,
)

if TYPE_CHECKING:
    from ..dispatch import Call
    from ..weights import InteractingParameters

# Rows (samples times fields) and scores of a block for each thread: smaller blocks pay more for calling torch than for
# the work, larger ones leave the caches.
BLOCK_ROWS, BLOCK_SCORES = 3600, 1 << 19
# Matrices narrower than this are multiplied at half the speed or less on a CPU, so E and O are padded to it.
LEAST_WIDTH = 16
# Sums of 2^score in between can be used as they are; others need the largest score of each row subtracted first.
LEAST_SUM, MOST_SUM = 2.0**-40, 2.0**40


def unsupported(call: Call) -> list[str]:
    """Every reason why this engine cannot run `call`."""
    return [] if call.inside is None else [f"it cannot run inside {call.inside}"]


def _plain_torch(function: Callable[..., Any]) -> Any:
    """Lets `function` run below autograd and without an ambient autocast, which would reach for its matmuls.

    Nothing in an engine records gradients, so that layer of torch's dispatch can be skipped, a tenth of the time of a
    small call; torch's own custom operators do the same.
    """

    @functools.wraps(function)
    def plain(first: Any, *rest: Any) -> Any:
        device_type = (first if isinstance(first, Tensor) else first.w_q).device.type
        with torch._C._AutoDispatchBelowAutograd():
            if device_type == "meta" or not torch.is_autocast_enabled(device_type):
                return function(first, *rest)
            with torch.autocast(device_type, enabled=False):
                return function(first, *rest)

    return plain


def prepare(call: Call) -> bool:
    """There is nothing to make ready."""
    return True


# --- folding ------------------------------------------------------------------------------------------------------


def _as_dtype(p: InteractingParameters, dtype: torch.dtype) -> Sequence[Tensor]:
    return p if all(t.dtype == dtype for t in p) else [t.to(dtype) for t in p]


def unchanged(p: InteractingParameters, copy: InteractingParameters, layout: Layout) -> bool:
    """Whether p still holds the values of `copy`, a copy side by side in memory, where that is faster to see than to
    fold anew; else False."""
    if p.w_q.device.type != "cpu":
        return False
    return all(t.dtype == kept.dtype and torch.equal(t, kept) for t, kept in zip(p, copy, strict=True))


@_plain_torch
def fold(p: InteractingParameters, layout: Layout) -> Tensor:
    """The packed folded weights (DESIGN: A, c, M, R, b, g), in fp32 or fp64 whatever the parameters' dtype."""
    h, e, o = layout
    w_q, b_q, w_k, _, w_v, b_v, w_o, b_o, w_r, b_r = _as_dtype(p, folded_dtype(p.w_q.dtype))
    w_qb = torch.cat((w_q, b_q.unsqueeze(1)), 1).view(h, e, e + 1)
    # A's rows, and c as one more: [H, E + 1, E]. Here and below, scaling a factor is faster than scaling the product.
    ac = torch.baddbmm(w_k.new_empty(()), w_qb.mT, w_k.reshape(h, e, e), beta=0, alpha=LOG2E / math.sqrt(e))
    m = torch.bmm(w_v.reshape(h, e, e).mT, w_o.reshape(o, h, e).permute(1, 2, 0))
    pieces = (ac.transpose(0, 1).reshape(-1), m.view(-1), w_r.t().reshape(-1), b_o + b_r, torch.mv(w_o, b_v))
    return torch.cat(pieces)


@_plain_torch
def fold_backward(
    grad: Tensor, p: InteractingParameters, layout: Layout, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the ten parameters from that of the packed weights; None where not `wanted`.

    b_k moves every logit of a row alike, so its gradient is exactly zero.
    """
    h, e, o = layout
    w_q, b_q, w_k, b_k, w_v, b_v, w_o, _, _, _ = _as_dtype(p, grad.dtype)
    d_a, d_c, d_m, d_r, d_b, d_g = grad.split_with_sizes(layout.sizes)
    d_ac = grad[: d_a.numel() + d_c.numel()].view(e + 1, h, e)
    blank, scale = grad.new_empty(()), LOG2E / math.sqrt(e)
    d_m = d_m.view(h, e, o)
    want_q, want_bq, want_k, want_bk, want_v, want_bv, want_o, want_bo, want_r, want_br = wanted
    grads: list[Tensor | None] = [None] * len(p)
    if want_q:
        grads[0] = torch.baddbmm(blank, w_k.reshape(h, e, e), d_ac[:e].permute(1, 2, 0), beta=0, alpha=scale).view(
            h * e, e
        )
    if want_bq:
        grads[1] = torch.baddbmm(blank, w_k.reshape(h, e, e), d_ac[e].unsqueeze(2), beta=0, alpha=scale).view(h * e)
    if want_k:
        w_qb = torch.cat((w_q, b_q.unsqueeze(1)), 1).view(h, e, e + 1)
        grads[2] = torch.baddbmm(blank, w_qb, d_ac.transpose(0, 1), beta=0, alpha=scale).view(h * e, e)
    if want_bk:
        grads[3] = torch.zeros_like(b_k)
    if want_v:
        grads[4] = torch.bmm(w_o.reshape(o, h, e).permute(1, 2, 0), d_m.mT).view(h * e, e)
    if want_bv:
        grads[5] = torch.mv(w_o.t(), d_g)
    if want_o:
        d_o = torch.bmm(d_m.mT, w_v.reshape(h, e, e).mT)
        grads[6] = d_o.transpose(0, 1).reshape(o, h * e).addr_(d_g, b_v)
    if want_bo:
        grads[7] = d_b.clone()
    if want_r:
        # A copy even where E or O is 1: an operator must not return a view of what it was given.
        grads[8] = d_r.view(e, o).t().clone(memory_format=torch.contiguous_format)
    if want_br:
        grads[9] = d_b.clone()
    return [None if g is None else g.to(t.dtype) for g, t in zip(grads, p, strict=True)]


# --- the width of the computation -----------------------------------------------------------------------------------


class _Weights(NamedTuple):
    """The folded weights as matrices, at the width of the computation."""

    a: Tensor  # [E, H*E]
    c: Tensor  # [H*E]
    m: Tensor  # [H*E, O]
    r: Tensor  # [E, O]
    b: Tensor  # [O]
    g: Tensor  # [O]


def _matrices(packed: Tensor, layout: Layout) -> _Weights:
    """Views of `packed` (layout.numel,)."""
    _, e, o = layout
    a, c, m, r, b, g = packed.split_with_sizes(layout.sizes)
    return _Weights(a.view(e, -1), c, m.view(-1, o), r.view(e, o), b, g)


def _width(layout: Layout, device: torch.device) -> Layout:
    """The layout to compute in: more zeros where a CPU multiplies wider matrices faster."""
    h, e, o = layout
    if device.type != "cpu" or min(e, o) >= LEAST_WIDTH:
        return layout
    return Layout(h, max(e, LEAST_WIDTH), max(o, LEAST_WIDTH))


@functools.lru_cache(maxsize=64)
def _positions(narrow: Layout, wide: Layout) -> Tensor:
    """Where each element of weights packed as `narrow` lies in weights packed as `wide`."""
    every = wide.parts(torch.arange(wide.numel, device="cpu"))
    sizes = narrow.parts(torch.empty(narrow.numel, device="cpu"))
    pieces = (part[tuple(map(slice, size.shape))] for part, size in zip(every, sizes, strict=True))
    return torch.cat([piece.reshape(-1) for piece in pieces])


def _widened(packed: Tensor, narrow: Layout, wide: Layout) -> Tensor:
    """Weights packed as `narrow` in the layout `wide`, zeros in between."""
    if narrow == wide:
        return packed
    return packed.new_zeros(wide.numel).index_copy_(0, _positions(narrow, wide), packed)


def _padded(t: Tensor, width: int) -> Tensor:
    """A contiguous t (n, F, N) with zeros up to (n, F, width)."""
    return t.contiguous() if t.shape[2] == width else nnf.pad(t, (0, width - t.shape[2]))


# --- attention, block by block --------------------------------------------------------------------------------------


class _Mask(NamedTuple):
    """A block's mask, keys first as the scores are."""

    ceiling: Tensor  # [n or 1, F or 1, F*H or 1]: minus infinity where hidden, else infinity
    empty: Tensor  # [n or 1, 1, F*H or 1], bool: not a single key
    empty_rows: Tensor  # [n or 1, F or 1, 1], bool: the same, for the rows of the output


class _Block(NamedTuple):
    rows: slice  # of the batch
    x: Tensor  # [n, F, E] in the dtype of the weights
    mask: _Mask | None
    work: Sequence[Tensor | None]  # [n, F, F*H], the same memory for every block: fresh pages cost too much


class _Attention(NamedTuple):
    """Of one block: P^T is `w` times `scale`."""

    q: Tensor  # [n, F*H, E]
    w: Tensor  # [n, F, F*H]
    scale: Tensor  # [n, 1, F*H]


def _keys_first(mask: Tensor, n_head: int, dtype: torch.dtype) -> _Mask:
    hidden = mask.mT
    if hidden.shape[2] > 1:
        hidden = hidden.repeat_interleave(n_head, dim=2)
    # Scores cut off at a ceiling: masked_fill and where take several times as long.
    ceiling = hidden.to(dtype).mul_(-2).add_(1).mul_(math.inf)
    return _Mask(ceiling, hidden.all(1, keepdim=True), mask.all(2, keepdim=True))


def _blocks(x: Tensor, mask: Tensor | None, width: Layout, dtype: torch.dtype, n_buffers: int) -> Iterator[_Block]:
    batch, fields, _ = x.shape
    rows_at_once = min(BLOCK_ROWS, BLOCK_SCORES // max(fields * width.n_head, 1)) * torch.get_num_threads()
    size = min(batch, max(1, rows_at_once // max(fields, 1)))
    work: list[Tensor | None] = [None] * n_buffers
    if size < batch:
        work = [x.new_empty(size, fields, fields * width.n_head, dtype=dtype) for _ in work]
    block_mask = None
    for start in range(0, batch if fields else 0, size or 1):
        rows = slice(start, min(start + size, batch))
        if mask is not None and (block_mask is None or mask.shape[0] > 1):
            block_mask = _keys_first(mask[rows], width.n_head, dtype)
        buffers = [None if t is None else t[: rows.stop - start] for t in work]
        yield _Block(rows, _padded(x[rows].to(dtype), width.emb_size), block_mask, buffers)


def _attend(block: _Block, weights: _Weights, shift: bool) -> _Attention:
    """`shift`: subtract the largest score of each row, as softmax does; without, only a block that needs it does."""
    x, mask = block.x, block.mask
    n, f, e = x.shape
    q = torch.addmm(weights.c, x.view(n * f, e), weights.a).view(n, -1, e)
    scores = torch.bmm(x, q.mT, out=block.work[0])
    if mask is not None:
        torch.minimum(scores, mask.ceiling, out=scores)
    if shift:
        largest = scores.amax(1, keepdim=True)
        if mask is not None and (x.device.type != "cpu" or largest.isnan().any()):
            # The score of a hidden field may be NaN, which survives the minimum.
            scores.masked_fill_(mask.ceiling < 0, -math.inf)
            largest = scores.amax(1, keepdim=True)
        if mask is not None:
            # Minus infinity from minus infinity would be NaN.
            largest.masked_fill_(mask.empty, 0.0)
        scores -= largest
    w = scores.exp2_()
    sums = w.sum(1, keepdim=True)
    if mask is not None:
        sums.masked_fill_(mask.empty, 1.0)
    if not shift:
        least, most = torch.aminmax(sums)
        # False for NaN too.
        if not LEAST_SUM < least.item() <= most.item() < MOST_SUM:
            return _attend(block, weights, shift=True)
    return _Attention(q, w, sums.reciprocal_())


def _must_shift(x: Tensor, mask: Tensor | None) -> bool:
    """Whether the largest score of each row has to be subtracted in any case.

    A row with one key must have P = 1 exactly, or rounding would pass for a gradient of its score. And on other devices
    than a CPU, looking at the sums means waiting for them.
    """
    return mask is not None or x.shape[1] <= 1 or x.device.type != "cpu"


@_plain_torch
def interact(x: Tensor, packed: Tensor, mask: Tensor | None, layout: Layout) -> Tensor:
    """x (B, F, E), packed folded weights, mask of 3 dimensions or None -> (B, F, O) in x's dtype."""
    batch, fields, _ = x.shape
    width = _width(layout, x.device)
    weights = _matrices(_widened(packed, layout, width), width)
    bias = weights.b + weights.g if mask is None else weights.b
    shift = _must_shift(x, mask)
    out = x.new_empty(batch, fields, layout.out_size)
    in_place = width == layout and packed.dtype == x.dtype
    for block in _blocks(x, mask, width, packed.dtype, n_buffers=1):
        _, w, scale = _attend(block, weights, shift)
        z = torch.bmm(w.mT, block.x).mul_(scale.mT)
        rows = block.x.view(-1, width.emb_size)
        y = out[block.rows] if in_place else block.x.new_empty(*block.x.shape[:2], width.out_size)
        flat = y.view(-1, width.out_size)
        torch.addmm(bias, rows, weights.r, out=flat).addmm_(z.view(rows.shape[0], -1), weights.m)
        if block.mask is not None:
            y += weights.g.masked_fill(block.mask.empty_rows, 0.0)
        y.relu_()
        if not in_place:
            out[block.rows] = y[:, :, : layout.out_size]
    return out


@_plain_torch
def interact_backward(
    grad: Tensor, x: Tensor, packed: Tensor, out: Tensor, mask: Tensor | None, layout: Layout, needs: int
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the packed weights; P is recomputed block by block.

    None where `needs` asks for nothing; parts of the packed gradient that are not needed are zero.
    """
    width = _width(layout, x.device)
    weights = _matrices(_widened(packed, layout, width), width)
    to_z, to_q, to_x = weights.m.t(), weights.a.t(), weights.r.t()
    shift = _must_shift(x, mask)
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs & NEED_INPUT else None
    in_place = width == layout and packed.dtype == x.dtype
    d_packed = packed.new_zeros(width.numel)
    d = _matrices(d_packed, width)
    for block in _blocks(x, mask, width, packed.dtype, n_buffers=2):
        n, f, e = block.x.shape
        rows = block.x.view(n * f, e)
        # As in torch's relu, a NaN output lets its gradient pass.
        d_y = torch.ops.aten.threshold_backward.default(grad[block.rows], out[block.rows], 0)
        d_y = _padded(d_y.to(packed.dtype), width.out_size)
        if needs & NEED_BIAS and block.mask is not None:
            d.g.add_(d_y.masked_fill(block.mask.empty_rows, 0.0).sum((0, 1)))
        d_y = d_y.view(n * f, -1)
        if needs & NEED_BIAS:
            d.b.add_(d_y.sum(0))
        if needs & NEED_RESIDUAL:
            d.r.addmm_(rows.t(), d_y)
        if not needs & (NEED_INPUT | NEED_SCORES | NEED_VALUES):
            continue
        q, w, scale = _attend(block, weights, shift)
        if needs & NEED_VALUES:
            z = torch.bmm(w.mT, block.x).mul_(scale.mT)
            d.m.addmm_(z.view(n * f, -1).t(), d_y)
        if not needs & (NEED_INPUT | NEED_SCORES):
            continue
        d_z = torch.mm(d_y, to_z).view(q.shape).mul_(scale.mT)
        d_scores = torch.bmm(block.x, d_z.mT, out=block.work[1]).mul_(w)
        delta = d_scores.sum(1, keepdim=True).mul_(scale)
        d_scores.addcmul_(w, delta, value=-1)
        d_q = torch.bmm(d_scores.mT, block.x).view(n * f, -1)
        # So far by natural exponents; those of q are to the base of 2.
        if needs & NEED_SCORES:
            d.a.addmm_(rows.t(), d_q, alpha=LN2)
            d.c.add_(d_q.sum(0), alpha=LN2)
        if d_x is not None:
            d_rows = d_x[block.rows] if in_place else torch.empty_like(block.x)
            torch.mm(d_y, to_x, out=d_rows.view(n * f, e)).addmm_(d_q, to_q, alpha=LN2)
            d_rows.baddbmm_(w, d_z).baddbmm_(d_scores, q, alpha=LN2)
            if not in_place:
                d_x[block.rows] = d_rows[:, :, : layout.emb_size]
    if not needs & ~NEED_INPUT:
        return d_x, None
    if needs & NEED_BIAS and mask is None:
        d.g.copy_(d.b)
    return d_x, d_packed if width == layout else d_packed[_positions(layout, width)]
