"""The forward of folded layouts with merged heads for short samples (F up to 64, E and O up to 16): x stays on chip as
keys and values of every head.

Several samples share a tile for F up to 8.
"""

import triton
import triton.language as tl

from .triton_math import (
    BLOCK,
    IDENTITY,
    MASK_NONE,
    MASK_PAIRS,
    PROJECTION,
    as_operand,
    dot,
    finite,
    hide,
    load_block,
    load_ceiling,
    load_rows,
    load_vector,
    poison,
    reordered,
    restoring,
    row_offsets,
    row_reference,
    row_scale,
    score_start,
)


@triton.jit
def _load_head(
    weights, h, E: tl.constexpr, H: tl.constexpr, O: tl.constexpr, REORDER: tl.constexpr, DTYPE: tl.constexpr
):
    """A_h [16, 16], c_h [16] and M_h [16, 16], in orders that fit `as_operand` of q and of z."""
    i = tl.arange(0, BLOCK)
    restored = restoring(i, REORDER)
    a = load_block(weights + h * E, 0, 0, i, restored, H * E, E, E)
    c = load_vector(weights + E * H * E + h * E, 0, restored, E)
    m = load_block(weights + (E + 1) * H * E + h * E * O, 0, 0, reordered(i, REORDER), i, O, E, O)
    return a.to(DTYPE), c, m.to(DTYPE)


@triton.jit
def _attend(
    x_rows,  # [16, 16]
    y,  # [16, 16] what the head's output is added to
    rows,  # [16]
    keys_x,  # NB tiles [16, 16]
    values,  # the same rows in the order `reordered`
    ceilings,  # NB tiles [1 or 16, 16]
    bad,  # [16]
    a,
    c,
    m,
    F: tl.constexpr,
    NB: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One head for one block of rows; gives y and the rows' sums of exponentials (0: every key hidden)."""
    dtype: tl.constexpr = x_rows.dtype
    acc: tl.constexpr = y.dtype
    q = dot(x_rows, a, tl.broadcast_to(c[None, :], (BLOCK, BLOCK)), PRECISION)
    q = as_operand(q.to(dtype), REORDER)
    scores = ()
    for k in tl.static_range(NB):
        keys = k * BLOCK + tl.arange(0, BLOCK)
        s = score_start(rows, keys, F, PACK, (k + 1) * BLOCK <= F, acc)
        s = dot(q, tl.trans(keys_x[k]), s, PRECISION)
        scores = scores + (hide(s, ceilings[k], rows, keys, F, PACK, MASK),)
    top = scores[0]
    for k in tl.static_range(1, NB):
        top = tl.maximum(top, scores[k])
    reference = row_reference(tl.max(top, 1), MASK)[:, None]
    total = tl.zeros((BLOCK, BLOCK), acc)
    z = tl.zeros((BLOCK, BLOCK), acc)
    for k in tl.static_range(NB):
        p = tl.exp2(scores[k] - reference)
        total += p
        z = dot(as_operand(p.to(dtype), REORDER), values[k], z, PRECISION)
    row_sum = tl.sum(total, 1)
    z = z * row_scale(row_sum, MASK, EXACT)[:, None]
    if PACK > 1:
        z += bad[:, None]
    return dot(as_operand(z.to(dtype), REORDER), m, y, PRECISION), row_sum


@triton.jit
def _forward_rows(
    x_rows,
    rows,
    keys_x,
    values,
    ceilings,  # NB tiles [1, 16] for MASK_KEYS
    bad,
    heads,
    r,
    b,
    g,
    weights,
    mask,
    out,
    tile,
    batch,
    m_sb,
    m_sq,
    m_sk,
    F: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    O: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    NB: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
    EXACT: tl.constexpr,
    HOIST: tl.constexpr,
):
    """Every head for one block of rows, and the block's output stored."""
    y = tl.broadcast_to(b[None, :], (BLOCK, BLOCK))
    if RESIDUAL == PROJECTION:
        y = dot(x_rows, r, y, PRECISION)
    elif RESIDUAL == IDENTITY:
        y += x_rows.to(y.dtype)
    row_sum = tl.zeros((BLOCK,), y.dtype)
    if MASK == MASK_PAIRS:
        ceilings = ()
        for k in tl.static_range(NB):
            keys = k * BLOCK + tl.arange(0, BLOCK)
            ceiling = load_ceiling(mask, rows, keys, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, y.dtype)
            ceilings = ceilings + (ceiling,)
    if HOIST:
        for h in tl.static_range(H):
            a, c, m = heads[h]
            y, row_sum = _attend(
                x_rows, y, rows, keys_x, values, ceilings, bad, a, c, m,
                F, NB, PACK, MASK, PRECISION, REORDER, EXACT,
            )  # fmt: skip
    else:
        for h in tl.range(H):
            a, c, m = _load_head(weights, h, E, H, O, REORDER, x_rows.dtype)
            y, row_sum = _attend(
                x_rows, y, rows, keys_x, values, ceilings, bad, a, c, m,
                F, NB, PACK, MASK, PRECISION, REORDER, EXACT,
            )  # fmt: skip
    store_output(y, row_sum, g, out, rows, 0, tile, batch, F, O, O, PACK, MASK, RELU)


@triton.jit
def store_output(
    y, row_sum, g, out, rows, first, tile, batch, F: tl.constexpr, O: tl.constexpr, WIDTH: tl.constexpr,
    PACK: tl.constexpr, MASK: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """y [R, 16] or its relu into WIDTH columns of a contiguous (B, F, O), from their column `first` on; NaN stays NaN.

    With a mask, g [16] is first added to the rows with a key to see.
    """
    if MASK != MASK_NONE:
        y += tl.where((row_sum == 0.0)[:, None], 0.0, g[None, :])
    o = first + tl.arange(0, BLOCK)
    offsets, exists = row_offsets(rows, tile, batch, F * O, O, F, PACK)
    inside = exists[:, None]
    if WIDTH % BLOCK != 0:
        inside = inside & (o[None, :] < WIDTH)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)
    tl.store(out + offsets[:, None] + o[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def forward_resident(
    x,  # (B, F, E), any strides
    weights,  # packed, fp32 or fp64
    mask,  # bool, strides 0 where it broadcasts; anything where MASK is MASK_NONE
    out,  # (B, F, O), contiguous
    batch,
    x_sb,
    x_sf,
    x_se,
    m_sb,
    m_sq,
    m_sk,
    F: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    O: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    AT_R: tl.constexpr,
    AT_B: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
    EXACT: tl.constexpr,
    UNROLL: tl.constexpr,
    HOIST: tl.constexpr,
):
    """Each program walks over tiles. UNROLL: row blocks unrolled. HOIST: the heads' weights stay in registers."""
    dtype: tl.constexpr = x.dtype.element_ty
    acc: tl.constexpr = weights.dtype.element_ty
    nb: tl.constexpr = (F + BLOCK - 1) // BLOCK
    i = tl.arange(0, BLOCK)
    r = ()
    if RESIDUAL == PROJECTION:
        r = load_block(weights + AT_R, 0, 0, i, i, O, E, O).to(dtype)
    b = load_vector(weights + AT_B, 0, i, O)
    g = load_vector(weights + AT_B + O, 0, i, O)
    if MASK == MASK_NONE:
        b += g
    heads = ()
    if HOIST:
        for h in tl.static_range(H):
            heads = heads + (_load_head(weights, h, E, H, O, REORDER, dtype),)
    for t in tl.range(tl.program_id(0), (batch + PACK - 1) // PACK, tl.num_programs(0)):
        tile = tl.cast(t, tl.int64)
        keys_x = ()
        values = ()
        ceilings = ()
        for k in tl.static_range(nb):
            x_k = load_rows(x, k * BLOCK + i, 0, tile, batch, x_sb, x_sf, x_se, F, E, PACK)
            v_k = x_k
            if REORDER:
                v = k * BLOCK + reordered(i, REORDER)
                v_k = load_rows(x, v, 0, tile, batch, x_sb, x_sf, x_se, F, E, PACK)
            keys_x = keys_x + (x_k,)
            values = values + (finite(v_k, PACK, acc),)
            if MASK != MASK_PAIRS:
                ceiling = load_ceiling(mask, i, k * BLOCK + i, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
                ceilings = ceilings + (ceiling,)
        bad = poison(keys_x[0], PACK, acc)
        if UNROLL:
            for k in tl.static_range(nb):
                _forward_rows(
                    keys_x[k], k * BLOCK + i, keys_x, values, ceilings, bad, heads, r, b, g, weights, mask, out,
                    tile, batch, m_sb, m_sq, m_sk, F, E, H, O, RESIDUAL, RELU, nb, PACK, MASK, PRECISION, REORDER,
                    EXACT, HOIST,
                )  # fmt: skip
        else:
            for first in tl.range(0, F, BLOCK):
                x_rows = load_rows(x, first + i, 0, tile, batch, x_sb, x_sf, x_se, F, E, PACK)
                _forward_rows(
                    x_rows, first + i, keys_x, values, ceilings, bad, heads, r, b, g, weights, mask, out,
                    tile, batch, m_sb, m_sq, m_sk, F, E, H, O, RESIDUAL, RELU, nb, PACK, MASK, PRECISION, REORDER,
                    EXACT, HOIST,
                )  # fmt: skip
