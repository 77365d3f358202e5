"""The folded algebra in plain PyTorch, in batch blocks that stay in cache: any device.

Shapes: n samples of a block, F fields, E embedding size, H heads, D rank, O output width. Keys come first in the
scores, because short rows are slow to reduce and columns are not. Folded, a column of scores is a (field, head), so
that one matmul serves all heads and nothing is ever permuted:

    q = x a + c              [n*F, H*E] = [n, F*H, E]
    w = 2^(x q^T)            [n, F, F*H], not normalised
    z = w^T x / sum of w     [n, F*H, E] = [n*F, H*E]
    out = end(z m + residual + b + g)

Factored, a head has keys and values of its own, and the heads come first of all:

    q, k, v = x a + c, x k, x v     [H, n*F, D] = [H*n, F, D]
    w = 2^(k q^T)                   [H*n, F, F]
    z = w^T v / sum of w            [H*n, F, D]
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
    BARE,
    CONCATENATED,
    IDENTITY,
    LN2,
    LOG2E,
    MERGED,
    NEED_BIAS,
    NEED_INPUT,
    NEED_RESIDUAL,
    NEED_SCORES,
    NEED_VALUES,
    PROJECTION,
    InteractingParameters,
    Layout,
    Parts,
    folded_dtype,
)

if TYPE_CHECKING:
    from ..dispatch import Call

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


def comparison(copy: InteractingParameters, given: InteractingParameters) -> Callable[[], bool]:
    """A function that tells whether `given` still hold the values of `copy`, which lie side by side in memory.

    It is only asked while they lie where they lay, in the same shape.
    """
    pairs = [(t.detach(), kept) for t, kept in zip(given, copy, strict=True) if t is not None and kept is not None]
    return lambda: all(torch.equal(t, kept) for t, kept in pairs)


def folding(p: InteractingParameters, layout: Layout, scale: float) -> Callable[[], Tensor] | None:
    """`fold` as a function of no arguments, good for as long as the parameters lie where they lie.

    None where it would be no faster.
    """
    return None


def _as_dtype(p: InteractingParameters, dtype: torch.dtype) -> InteractingParameters:
    if all(t is None or t.dtype == dtype for t in p):
        return p
    return InteractingParameters(*(None if t is None else t.to(dtype) for t in p))  # type: ignore[arg-type]


def _or_zeros(t: Tensor | None, like: Tensor, size: int) -> Tensor:
    return like.new_zeros(size) if t is None else t


def _head_weights(p: InteractingParameters, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w_q with b_q as one more column [H, d, E + 1], w_k and w_v [H, d, E], w_o [H, d, O]; empty for None."""
    h, e = layout.n_head, layout.emb_size
    rows = p.w_q.shape[0]
    w_qb = torch.cat((p.w_q, _or_zeros(p.b_q, p.w_q, rows).unsqueeze(1)), 1).view(h, -1, e + 1)
    w_v = p.w_q.new_empty(0) if p.w_v is None else p.w_v.reshape(h, -1, e)
    w_o = p.w_q.new_empty(0) if p.w_o is None else p.w_o.reshape(layout.out_size, h, -1).permute(1, 2, 0)
    return w_qb, p.w_k.reshape(h, -1, e), w_v, w_o


@_plain_torch
def fold(p: InteractingParameters, layout: Layout, scale: float) -> Tensor:
    """The packed folded weights, in fp32 or fp64 whatever the parameters' dtype. `scale`: of the logits."""
    p = _as_dtype(p, folded_dtype(p.w_q.dtype))
    o = layout.out_size
    w_qb, w_k, w_v, w_o = _head_weights(p, layout)
    m = r = p.w_q.new_empty(0)
    if layout.factored:
        a_and_c = (w_qb * (LOG2E * scale)).permute(2, 0, 1).reshape(-1)
        pieces = [a_and_c, w_k.permute(2, 0, 1).reshape(-1), w_v.permute(2, 0, 1).reshape(-1)]
        if layout.output == MERGED:
            m = w_o
    else:
        # a's rows, and c as one more: [H, E + 1, E]. Here and below, scaling a factor is faster than the product.
        ac = torch.baddbmm(w_k.new_empty(()), w_qb.mT, w_k, beta=0, alpha=LOG2E * scale)
        pieces = [ac.transpose(0, 1).reshape(-1)]
        if layout.output == MERGED:
            m = torch.bmm(w_v.mT, w_o)
        elif layout.output == CONCATENATED:
            m = w_v.mT
    if layout.residual == PROJECTION:
        assert p.w_r is not None
        r = p.w_r.t()
    g = _or_zeros(p.b_v, p.w_q, o) if p.w_o is None or p.b_v is None else torch.mv(p.w_o, p.b_v)
    b = _or_zeros(p.b_o, p.w_q, o) if p.b_r is None else p.b_r if p.b_o is None else p.b_o + p.b_r
    return torch.cat((*pieces, m.reshape(-1), r.reshape(-1), b, g))


@_plain_torch
def fold_backward(
    grad: Tensor, p: InteractingParameters, layout: Layout, scale: float, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the ten parameters from that of the packed weights; None where not `wanted`.

    b_k moves every logit of a row alike, so its gradient is exactly zero.
    """
    given, p = p, _as_dtype(p, grad.dtype)
    e, o = layout.emb_size, layout.out_size
    d = layout.parts(grad)
    w_qb, w_k, w_v, w_o = _head_weights(p, layout)
    blank, scale = grad.new_empty(()), LOG2E * scale
    rows = p.w_q.shape[0]
    want_q, want_bq, want_k, want_bk, want_v, want_bv, want_o, want_bo, want_r, want_br = wanted
    grads: list[Tensor | None] = [None] * len(p)

    def own(part: Tensor, *shape: int) -> Tensor:
        # An operator must not return a part of what it was given.
        return part.clone(memory_format=torch.contiguous_format).view(shape)

    if layout.factored:
        if want_q:
            grads[0] = own(d.a.permute(1, 2, 0), rows, e).mul_(scale)
        if want_bq:
            grads[1] = own(d.c, rows).mul_(scale)
        if want_k:
            grads[2] = own(d.k.permute(1, 2, 0), rows, e)
        if want_v:
            grads[4] = own(d.v.permute(1, 2, 0), rows, e)
        if want_o:
            grads[6] = own(d.m.permute(2, 0, 1), o, rows)
    else:
        if want_q:
            grads[0] = torch.baddbmm(blank, w_k, d.a.permute(1, 2, 0), beta=0, alpha=scale).view(rows, e)
        if want_bq:
            grads[1] = torch.baddbmm(blank, w_k, d.c.unsqueeze(2), beta=0, alpha=scale).view(rows)
        if want_k:
            d_ac = torch.cat((d.a, d.c.unsqueeze(0)))
            grads[2] = torch.baddbmm(blank, w_qb, d_ac.transpose(0, 1), beta=0, alpha=scale).view(rows, e)
        if want_v:
            grads[4] = own(d.m.mT, rows, e) if p.w_o is None else torch.bmm(w_o, d.m.mT).view(rows, e)
        if want_o:
            grads[6] = own(torch.bmm(d.m.mT, w_v.mT).transpose(0, 1), o, rows)
    if want_bk:
        grads[3] = grad.new_zeros(rows)
    if want_bv:
        grads[5] = own(d.g, rows) if p.w_o is None else torch.mv(p.w_o.t(), d.g)
    if want_o and p.b_v is not None:
        assert grads[6] is not None
        grads[6].addr_(d.g, p.b_v)
    if want_bo:
        grads[7] = own(d.b, o)
    if want_r:
        grads[8] = own(d.r.t(), o, e)
    if want_br:
        grads[9] = own(d.b, o)
    return [None if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, given, strict=True)]


# --- the width of the computation -----------------------------------------------------------------------------------


def _width(layout: Layout, device: torch.device) -> Layout:
    """The layout to compute in: more zeros where a CPU multiplies wider matrices faster.

    Heads that are not merged keep their output columns, and so does x where it is added to these.
    """
    if device.type != "cpu":
        return layout
    merged = layout.output == MERGED
    e = layout.emb_size if layout.residual == IDENTITY and not merged else max(layout.emb_size, LEAST_WIDTH)
    rank = max(layout.rank, LEAST_WIDTH) if layout.factored else e
    return layout._replace(
        emb_size=e, rank=rank, out_size=max(layout.out_size, LEAST_WIDTH) if merged else layout.out_size
    )


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
    """A contiguous t (.., .., N) with zeros up to (.., .., width)."""
    return t.contiguous() if t.shape[2] == width else nnf.pad(t, (0, width - t.shape[2]))


# --- attention, block by block --------------------------------------------------------------------------------------


class _Mask(NamedTuple):
    """A block's mask, keys first as the scores are; a column is a (field, head) where weights are folded."""

    ceiling: Tensor  # [n or 1, F or 1, columns or 1]: minus infinity where hidden, else infinity
    empty: Tensor  # [n or 1, 1, columns or 1], bool: not a single key
    empty_rows: Tensor  # [n or 1, F or 1, 1], bool: the same, for the rows of the output


class _Block(NamedTuple):
    rows: slice  # of the batch
    x: Tensor  # [n, F, E] in the dtype of the weights
    mask: _Mask | None
    work: Sequence[Tensor | None]  # [n, F, F*H], the same memory for every block: fresh pages cost too much


class _Operands(NamedTuple):
    """Of the attention of one block: [n, F*H, E] and twice x, or [H*n, F, D] thrice."""

    q: Tensor
    k: Tensor
    v: Tensor


class _Attention(NamedTuple):
    """Of one block: P^T is `w` times `scale`."""

    w: Tensor  # [n, F, F*H] or [H*n, F, F]
    scale: Tensor  # [n, 1, F*H] or [H*n, 1, F]


def _keys_first(mask: Tensor, layout: Layout, dtype: torch.dtype) -> _Mask:
    hidden = mask.mT
    if hidden.shape[2] > 1 and not layout.factored:
        hidden = hidden.repeat_interleave(layout.n_head, dim=2)
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
            block_mask = _keys_first(mask[rows], width, dtype)
        buffers = [None if t is None else t[: rows.stop - start] for t in work]
        yield _Block(rows, _padded(x[rows].to(dtype), width.emb_size), block_mask, buffers)


class _Projections:
    """What x is multiplied by to give the queries and, factored, the keys and values of all heads.

    Factored, a head is at the columns of one product for all: it is copied to rows of its own, in memory that all
    blocks share, and its gradients back.
    """

    def __init__(self, weights: Parts, layout: Layout) -> None:
        self.layout = layout
        parts = (weights.a, weights.k, weights.v) if layout.factored else (weights.a,)
        self.matrix = torch.cat([t.view(layout.emb_size, -1) for t in parts], 1)  # [E, H*D] or [E, 3*H*D]
        self.bias = nnf.pad(weights.c.view(-1), (0, self.matrix.shape[1] - weights.c.numel()))
        self.work: Tensor | None = None

    def _memory(self, n_rows: int) -> Tensor:
        """As columns and as rows of heads."""
        size = n_rows * self.matrix.shape[1]
        if self.work is None or self.work.shape[1] < size:
            self.work = self.matrix.new_empty(2, size)
        return self.work[:, :size]

    def operands(self, x: Tensor) -> _Operands:
        n, f, e = x.shape
        h, d = self.layout.n_head, self.layout.rank
        rows = x.view(n * f, e)
        if not self.layout.factored:
            return _Operands(torch.addmm(self.bias, rows, self.matrix).view(n, f * h, d), x, x)
        columns, heads = self._memory(n * f)
        torch.addmm(self.bias, rows, self.matrix, out=columns.view(n * f, -1))
        by_head = heads.view(3 * h, n * f, d).copy_(columns.view(n * f, 3 * h, d).transpose(0, 1))
        return _Operands(*by_head.view(3, h * n, f, d))

    def gradients(self, d_q: Tensor, d_k: Tensor | None, d_v: Tensor | None) -> Tensor:
        """The gradients of what `operands` has given last as [n*F, H*D] or [n*F, 3*H*D]."""
        h, d = self.layout.n_head, self.layout.rank
        if d_k is None or d_v is None:
            return d_q.view(-1, h * d)
        columns = self._memory(d_q.numel() // (h * d))[0].view(-1, 3, h, d)
        for i, t in enumerate((d_q, d_k, d_v)):
            columns[:, i].copy_(t.view(h, -1, d).transpose(0, 1))
        return columns.view(columns.shape[0], -1)


def _attend(block: _Block, operands: _Operands, shift: bool) -> _Attention:
    """`shift`: subtract the largest score of each row, as softmax does; without, only a block that needs it does."""
    q, k, _ = operands
    mask, work = block.mask, block.work[0]
    if work is not None:
        work = work.view(q.shape[0], k.shape[1], q.shape[1])
    scores = torch.bmm(k, q.mT, out=work)
    # Heads, where they come first, share a mask: [H or 1, n, F, columns].
    every_head = scores.view(-1, *block.x.shape[:2], q.shape[1])
    if mask is not None:
        torch.minimum(every_head, mask.ceiling, out=every_head)
    if shift:
        largest = every_head.amax(2, keepdim=True)
        if mask is not None and (q.device.type != "cpu" or largest.isnan().any()):
            # The score of a hidden field may be NaN, which survives the minimum.
            every_head.masked_fill_(mask.ceiling < 0, -math.inf)
            largest = every_head.amax(2, keepdim=True)
        if mask is not None:
            # Minus infinity from minus infinity would be NaN.
            largest.masked_fill_(mask.empty, 0.0)
        every_head -= largest
    w = scores.exp2_()
    sums = w.sum(1, keepdim=True)
    if mask is not None:
        sums.view(-1, block.x.shape[0], 1, q.shape[1]).masked_fill_(mask.empty, 1.0)
    if not shift:
        least, most = torch.aminmax(sums)
        # False for NaN too.
        if not LEAST_SUM < least.item() <= most.item() < MOST_SUM:
            return _attend(block, operands, shift=True)
    return _Attention(w, sums.reciprocal_())


def _must_shift(x: Tensor, mask: Tensor | None) -> bool:
    """Whether the largest score of each row has to be subtracted in any case.

    A row with one key must have P = 1 exactly, or rounding would pass for a gradient of its score. And on other devices
    than a CPU, looking at the sums means waiting for them.
    """
    return mask is not None or x.shape[1] <= 1 or x.device.type != "cpu"


# --- between heads and outputs --------------------------------------------------------------------------------------


def _by_head(t: Tensor, layout: Layout) -> Tensor:
    """z or its gradient as [H, n*F, D]."""
    h, d = layout.n_head, layout.rank
    return t.view(h, -1, d) if layout.factored else t.view(-1, h, d).transpose(0, 1)


def _outputs_by_head(y: Tensor, layout: Layout) -> Tensor:
    """What each head gives to of y [n*F, O]: [H, n*F, O_h]."""
    h = layout.n_head
    return y.expand(h, *y.shape) if layout.output == MERGED else y.view(-1, h, layout.head_out).transpose(0, 1)


def _add_outputs(y: Tensor, z: Tensor, weights: Parts, layout: Layout) -> None:
    """y [n*F, O] += the heads' outputs."""
    if layout.output == MERGED and not layout.factored:
        y.addmm_(z.view(y.shape[0], -1), weights.m.view(-1, layout.out_size))
        return
    by_head = _by_head(z, layout)
    if layout.output == BARE:
        _outputs_by_head(y, layout).add_(by_head[..., : layout.head_out])
        return
    for y_h, z_h, m_h in zip(_outputs_by_head(y, layout), by_head, weights.m, strict=True):
        y_h.addmm_(z_h, m_h)


def _output_gradients(d_y: Tensor, weights: Parts, layout: Layout, scale: Tensor) -> Tensor:
    """The gradient of z, in its shape, times `scale` [.., 1]."""
    shape = (scale.shape[0], scale.shape[1], layout.rank)
    if layout.output == MERGED and not layout.factored:
        return torch.mm(d_y, weights.m.view(-1, layout.out_size).t()).view(shape).mul_(scale)
    d_z = _outputs_by_head(d_y, layout)
    d_z = _padded(d_z, layout.rank) if layout.output == BARE else torch.bmm(d_z, weights.m.mT)
    return (d_z if layout.factored else d_z.transpose(0, 1)).reshape(shape) * scale


def empty_relu_mask(x: Tensor, layout: Layout) -> Tensor | None:
    """Where `interact` of an engine whose backward does not read the output is to leave which of its numbers relu let
    pass, in a form of its own; None for the other engines. To be asked for of layouts with relu."""
    return None


def interacting(
    packed: Tensor, layout: Layout, n_fields: int, dtype: torch.dtype
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """`interact` as a function of x and the mask, for x of so many fields and of this dtype."""
    return lambda x, mask: interact(x, packed, mask, layout)


@_plain_torch
def interact(x: Tensor, packed: Tensor, mask: Tensor | None, layout: Layout) -> Tensor:
    """x (B, F, E), packed folded weights, mask of 3 dimensions or None -> (B, F, O) in x's dtype."""
    batch, fields, _ = x.shape
    width = _width(layout, x.device)
    weights = width.parts(_widened(packed, layout, width))
    bias = weights.b + weights.g if mask is None else weights.b
    shift = _must_shift(x, mask)
    projections = _Projections(weights, width)
    out = x.new_empty(batch, fields, layout.out_size)
    in_place = width.out_size == layout.out_size and packed.dtype == x.dtype
    for block in _blocks(x, mask, width, packed.dtype, n_buffers=1):
        operands = projections.operands(block.x)
        w, scale = _attend(block, operands, shift)
        z = torch.bmm(w.mT, operands.v).mul_(scale.mT)
        rows = block.x.view(-1, width.emb_size)
        y = out[block.rows] if in_place else block.x.new_empty(*block.x.shape[:2], width.out_size)
        flat = y.view(-1, width.out_size)
        if width.residual == PROJECTION:
            torch.addmm(bias, rows, weights.r, out=flat)
        elif width.residual == IDENTITY:
            torch.add(rows, bias, out=flat)
        else:
            flat.copy_(bias)
        _add_outputs(flat, z, weights, width)
        if block.mask is not None:
            y += weights.g.masked_fill(block.mask.empty_rows, 0.0)
        if width.relu:
            y.relu_()
        if not in_place:
            out[block.rows] = y[:, :, : layout.out_size]
    return out


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left [M, rows] right [rows, N], a long sum, by the narrower matrix on the left.

    With a narrow one on the right, and in batches, a CPU takes such sums number by number, at several times the
    rounding error.
    """
    return torch.mm(left, right) if left.shape[0] <= right.shape[1] else torch.mm(right.t(), left.t()).t()


@_plain_torch
def interact_backward(
    grad: Tensor, x: Tensor, packed: Tensor, out: Tensor | None, mask: Tensor | None, layout: Layout, needs: int
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the packed weights; P is recomputed block by block.

    out: of the forward, or for an engine that has one its relu mask; None without relu. Gives None where `needs` asks
    for nothing; parts of the packed gradient that are not needed are zero.
    """
    width = _width(layout, x.device)
    weights = width.parts(_widened(packed, layout, width))
    shift = _must_shift(x, mask)
    projections = _Projections(weights, width)
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs & NEED_INPUT else None
    in_place = width.emb_size == layout.emb_size and packed.dtype == x.dtype
    d_packed = packed.new_zeros(width.numel)
    d = width.parts(d_packed)
    d_projections, n_columns = torch.zeros_like(projections.matrix), width.n_head * width.rank
    for block in _blocks(x, mask, width, packed.dtype, n_buffers=2):
        n, f, e = block.x.shape
        rows = block.x.view(n * f, e)
        d_y = grad[block.rows]
        if out is not None:
            # As in torch's relu, a NaN output lets its gradient pass.
            d_y = torch.ops.aten.threshold_backward.default(d_y, out[block.rows], 0)
        d_y = _padded(d_y.to(packed.dtype), width.out_size)
        if needs & NEED_BIAS and block.mask is not None:
            d.g.add_(d_y.masked_fill(block.mask.empty_rows, 0.0).sum((0, 1)))
        d_y = d_y.view(n * f, -1)
        if needs & NEED_BIAS:
            d.b.add_(d_y.sum(0))
        if needs & NEED_RESIDUAL and width.residual == PROJECTION:
            d.r.addmm_(rows.t(), d_y)
        if not needs & (NEED_INPUT | NEED_SCORES | NEED_VALUES):
            continue
        operands = projections.operands(block.x)
        q, k, v = operands
        w, scale = _attend(block, operands, shift)
        if needs & NEED_VALUES and width.output != BARE:
            z = torch.bmm(w.mT, v).mul_(scale.mT)
            if width.output == MERGED and not width.factored:
                d.m.view(-1, width.out_size).addmm_(z.view(n * f, -1).t(), d_y)
            else:
                for d_m, z_h, d_y_h in zip(d.m, _by_head(z, width), _outputs_by_head(d_y, width), strict=True):
                    d_m.add_(_product(z_h.t(), d_y_h))
        if not needs & (NEED_INPUT | NEED_SCORES) and not (needs & NEED_VALUES and width.factored):
            continue
        d_z = _output_gradients(d_y, weights, width, scale.mT)
        work = None if block.work[1] is None else block.work[1].view(w.shape)
        d_scores = torch.bmm(v, d_z.mT, out=work).mul_(w)
        delta = d_scores.sum(1, keepdim=True).mul_(scale)
        d_scores.addcmul_(w, delta, value=-1)
        # So far by natural exponents; those of q and k are to the base of 2.
        d_q, d_k, d_v = torch.bmm(d_scores.mT, k).mul_(LN2), None, None
        if width.factored:
            d_k, d_v = torch.bmm(d_scores, q).mul_(LN2), torch.bmm(w, d_z)
        d_rows = None
        if d_x is not None:
            d_rows = (d_x[block.rows] if in_place else torch.empty_like(block.x)).view(n * f, e)
            if width.residual == PROJECTION:
                torch.mm(d_y, weights.r.t(), out=d_rows)
            elif width.residual == IDENTITY:
                d_rows.copy_(d_y)
            else:
                d_rows.zero_()
            if not width.factored:
                d_rows.view(n, f, e).baddbmm_(w, d_z).baddbmm_(d_scores, q, alpha=LN2)
        # In the memory of the operands, which are done with.
        d_columns = projections.gradients(d_q, d_k, d_v)
        if d_rows is not None:
            # Part by part, and added when complete: shorter sums round less.
            parts = (t.split(n_columns, 1) for t in (d_columns, projections.matrix))
            for d_part, part in zip(*parts, strict=True):
                d_rows.add_(torch.mm(d_part, part.t()))
        if needs & NEED_SCORES or (needs & NEED_VALUES and width.factored):
            d_projections.add_(_product(rows.t(), d_columns))
        if needs & NEED_SCORES:
            d.c.view(-1).add_(d_columns[:, :n_columns].sum(0))
        if d_x is not None and d_rows is not None and not in_place:
            d_x[block.rows] = d_rows.view(n, f, e)[:, :, : layout.emb_size]
    wanted = ((d.a, NEED_SCORES), (d.k, NEED_SCORES), (d.v, NEED_VALUES))
    for (d_part, needed), d_columns in zip(wanted, d_projections.split(n_columns, 1), strict=False):
        if needs & needed:
            d_part.copy_(d_columns.view(d_part.shape))
    if not needs & ~NEED_INPUT:
        return d_x, None
    if needs & NEED_BIAS and mask is None:
        d.g.copy_(d.b)
    return d_x, d_packed if width == layout else d_packed[_positions(layout, width)]
