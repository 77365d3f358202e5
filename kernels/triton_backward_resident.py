"""The resident backward: of short samples of narrow folded layouts, whose x, dx and exponentials stay on chip.

Input gradients are added up in registers. Weight gradients: as in the streaming backward.
"""

import triton
import triton.language as tl

from .triton_backward import load_output_gradient, sees_a_key
from .triton_math import (
    BARE,
    BLOCK,
    IDENTITY,
    LN2,
    MASK_KEYS,
    MASK_NONE,
    MASK_PAIRS,
    MERGED,
    NEG_INF,
    PROJECTION,
    _constant,
    block_pointers,
    dot,
    finite,
    hide,
    load_block,
    load_ceiling,
    load_rows,
    load_vector,
    own_keys,
    poison,
    row_offsets,
    row_reference,
    row_scale,
    score_start,
)

# Scores, in powers of two, up to which no maximum need be subtracted: their exponentials, the sums of these and the
# sums' reciprocals take up half the range of fp32's and bf16's exponents, or a third of fp16's; the rest is for
# gradients.
SAFE_SCORE = _constant(60.0)
SAFE_SCORE_FP16 = _constant(3.0)
ONES = _constant(8)  # the narrowest right operand of a dot: sums of rows come from the tensor core


@triton.jit
def _accumulate(pointer, block, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """pointer[rows, columns] += block [16, 16] of a row-major matrix (ROWS, COLUMNS)."""
    pointers = block_pointers(pointer, 0, 0, rows, columns, stride)
    if ROWS % BLOCK == 0 and COLUMNS % BLOCK == 0:
        tl.store(pointers, tl.load(pointers) + block)
    else:
        inside = (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS)
        tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + block, mask=inside)


@triton.jit
def _accumulate_transposed(pointer, block, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """pointer[rows, columns] += block^T."""
    pointers = pointer + (rows.to(tl.int64)[None, :] * stride + columns.to(tl.int64)[:, None])
    if ROWS % BLOCK == 0 and COLUMNS % BLOCK == 0:
        tl.store(pointers, tl.load(pointers) + block)
    else:
        inside = (rows[None, :] < ROWS) & (columns[:, None] < COLUMNS)
        tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + block, mask=inside)


@triton.jit
def _accumulate_sums(pointer, sums, i, SIZE: tl.constexpr):
    """pointer[i] += sums [16, 8], whose columns are all alike."""
    tl.store(pointer + i, tl.load(pointer + i, mask=i < SIZE, other=0.0) + tl.max(sums, 1), mask=i < SIZE)


@triton.jit
def _load_output_tiles(
    grad, out, first, zero, tile, batch, d_sb, d_sf, d_so, F: tl.constexpr, O: tl.constexpr, HEAD_OUT: tl.constexpr,
    NB: tl.constexpr, PACK: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dy of a head, or of all, as tiles [16, 16]."""
    d_y = ()
    for k in tl.static_range(NB):
        rows = k * BLOCK + tl.arange(0, BLOCK)
        d_y = d_y + load_output_gradient(
            grad, out, rows, first, zero, tile, batch, d_sb, d_sf, d_so, F, O, HEAD_OUT, PACK, RELU, ACC
        )
    return d_y


@triton.jit
def _load_head(
    weights, h, E: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HEAD_OUT: tl.constexpr, AT_M: tl.constexpr,
    OUTPUT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """a_h [16, 16], c_h [16], m_h [16, 16] (a_h where there is none), and the largest |x|^2 at which scores are safe.

    No score exceeds |x|^2 |a_h| + |x| |c_h|, with Frobenius' norm of a_h.
    """
    i = tl.arange(0, BLOCK)
    a = load_block(weights + h * D, 0, 0, i, i, H * D, E, D)
    c = load_vector(weights + E * H * D + h * D, 0, i, D)
    m = a
    if OUTPUT != BARE:
        m = load_block(weights + AT_M + h * D * HEAD_OUT, 0, 0, i, i, HEAD_OUT, D, HEAD_OUT)
    safe = SAFE_SCORE
    if DTYPE.is_fp16():
        safe = SAFE_SCORE_FP16
    c_squared = tl.sum(c * c)
    root = tl.sqrt(c_squared) + tl.sqrt(c_squared + 4.0 * safe * tl.sqrt(tl.sum(a * a)))
    return a.to(DTYPE), c, m.to(DTYPE), 4.0 * safe * safe / (root * root)


@triton.jit
def _less_maximum(scores, MASK: tl.constexpr):
    """Tiles of scores [R, K] less their rows' maxima."""
    top = scores[0]
    for k in tl.static_range(1, len(scores)):
        top = tl.maximum(top, scores[k])
    reference = row_reference(tl.max(top, 1), MASK)[:, None]
    less = ()
    for k in tl.static_range(len(scores)):
        less = less + (scores[k] - reference,)
    return less


@triton.jit
def _differentiate_columns(
    d_x,  # tiles of the sample's rows [16, 16]
    x_tiles,
    first_out,
    ceilings,
    grad,
    out,
    partial,
    weights,
    mask,
    zero,
    tile,
    batch,
    d_sb,
    d_sf,
    d_so,
    m_sb,
    m_sq,
    m_sk,
    F: tl.constexpr,
    E: tl.constexpr,
    O: tl.constexpr,
    HEAD_OUT: tl.constexpr,
    AT_R: tl.constexpr,
    AT_B: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dy of the output's columns from `first_out` on, as tiles, and dx with their projected residual; adds to dr, db
    and dg."""
    dtype: tl.constexpr = x_tiles[0].dtype
    acc: tl.constexpr = weights.dtype.element_ty
    i = tl.arange(0, BLOCK)
    ones = tl.full((BLOCK, ONES), 1.0, dtype)
    d_y = _load_output_tiles(
        grad, out, first_out, zero, tile, batch, d_sb, d_sf, d_so, F, O, HEAD_OUT, len(d_x), PACK, RELU, acc
    )
    if NEED_INPUT and RESIDUAL == PROJECTION:
        r_t = tl.trans(load_block(weights + AT_R + first_out, 0, 0, i, i, O, E, HEAD_OUT).to(dtype))
        added = ()
        for k in tl.static_range(len(d_x)):
            added = added + (dot(d_y[k], r_t, d_x[k], PRECISION),)
        d_x = added
    if NEED_RESIDUAL and RESIDUAL == PROJECTION:
        d_r = tl.zeros((BLOCK, BLOCK), acc)
        for k in tl.static_range(len(d_y)):
            d_r = dot(tl.trans(x_tiles[k]), d_y[k], d_r, PRECISION)
        _accumulate(partial + AT_R + first_out, d_r, i, i, O, E, HEAD_OUT)
    if NEED_BIAS:
        d_b = tl.zeros((BLOCK, ONES), acc)
        d_g = d_b
        if MASK == MASK_KEYS and PACK == 1:
            top = tl.full((1, BLOCK), NEG_INF, acc)
            for k in tl.static_range(len(ceilings)):
                top = tl.maximum(top, tl.where((k * BLOCK + i < F)[None, :], ceilings[k], NEG_INF))
            sees = tl.max(top, 1) > NEG_INF
        for k in tl.static_range(len(d_y)):
            d_b = dot(tl.trans(d_y[k]), ones, d_b, PRECISION)
            if MASK != MASK_NONE:
                rows = k * BLOCK + i
                if MASK == MASK_KEYS and PACK == 1:
                    seen = tl.broadcast_to(sees, (BLOCK,))
                else:
                    seen = sees_a_key(mask, rows, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
                d_g = dot(tl.trans(tl.where(seen[:, None], d_y[k], 0.0).to(dtype)), ones, d_g, PRECISION)
        if MASK == MASK_NONE:
            d_g = d_b
        _accumulate_sums(partial + AT_B + first_out, d_b, i, HEAD_OUT)
        _accumulate_sums(partial + AT_B + O + first_out, d_g, i, HEAD_OUT)
    return d_y, d_x


@triton.jit
def _differentiate_head(
    d_x,  # tiles of the sample's rows [16, 16]
    x_tiles,
    values,  # the same, finite
    d_y,
    ceilings,  # tiles [1, 16] for MASK_KEYS
    bad,  # [16]
    head,
    longest,  # the largest |x|^2
    h,
    partial,
    mask,
    tile,
    batch,
    m_sb,
    m_sq,
    m_sk,
    F: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    OUTPUT: tl.constexpr,
    HEAD_OUT: tl.constexpr,
    AT_M: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    HOIST: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    NEED_SCORES: tl.constexpr,
    NEED_VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Every block of rows of one head: adds to dx, da, dc and dm.

    The exponentials p are never normalised: dz / sum(p), row by row, is what they are multiplied by. Products that sum
    over rows take p and dS transposed, which the tensor core leaves by rows: they go through shared memory once.
    """
    a, c, m, longest_safe = head
    dtype: tl.constexpr = a.dtype
    acc: tl.constexpr = c.dtype
    nb: tl.constexpr = len(x_tiles)
    through_head: tl.constexpr = NEED_INPUT or NEED_SCORES
    into_values: tl.constexpr = NEED_VALUES and OUTPUT != BARE
    i = tl.arange(0, BLOCK)
    nothing = tl.zeros((BLOCK, BLOCK), acc)
    ones = tl.full((BLOCK, ONES), 1.0, dtype)
    identity = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(dtype)
    d_a_t = nothing
    d_c = tl.zeros((BLOCK, ONES), acc)
    d_m = nothing
    for r in tl.static_range(nb):
        if not HOIST:
            # What a block of rows needs is not to be fetched during the one before: registers are what is short.
            tl.debug_barrier()
        rows = r * BLOCK + i
        q = dot(x_tiles[r], a, tl.broadcast_to(c[None, :], (BLOCK, BLOCK)), PRECISION).to(dtype)
        scores = ()
        for k in tl.static_range(nb):
            keys = k * BLOCK + i
            s = score_start(rows, keys, F, PACK, (k + 1) * BLOCK <= F, acc)
            s = dot(q, tl.trans(x_tiles[k]), s, PRECISION)
            if MASK == MASK_PAIRS:
                ceiling = load_ceiling(mask, rows, keys, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
                scores = scores + (hide(s, ceiling, rows, keys, F, PACK, MASK),)
            else:
                scores = scores + (hide(s, ceilings[k], rows, keys, F, PACK, MASK),)
        if PACK > 1:
            # Whatever a sample holds, the others' gradients keep their bits.
            scores = _less_maximum(scores, MASK)
        else:
            if not longest <= longest_safe:
                scores = _less_maximum(scores, MASK)
        p = ()
        p_right = ()
        total = tl.zeros((BLOCK, ONES), acc)
        z = nothing
        for k in tl.static_range(nb):
            p_k = tl.exp2(scores[k])
            if PACK > 1:
                # Between samples there is nothing, but in rows that are NaN throughout.
                p_k = tl.where(own_keys(rows, k * BLOCK + i, F, PACK), p_k, 0.0)
            p = p + (p_k,)
            p_right = p_right + (p_k.to(dtype),)
            total = dot(p_right[k], ones, total, PRECISION)
            z = dot(p_right[k], values[k], z, PRECISION)
        scale = row_scale(tl.max(total, 1), MASK, EXACT)[:, None]
        z *= scale
        if PACK > 1:
            z += bad[:, None]
        if into_values:
            d_m = dot(tl.trans(z.to(dtype)), d_y[r], d_m, PRECISION)
        if through_head:
            if OUTPUT == BARE:
                d_z = d_y[r].to(acc) * scale
            else:
                d_z = dot(d_y[r], tl.trans(m), nothing, PRECISION) * scale
            if NEED_INPUT:
                d_z_right = finite(d_z.to(dtype), PACK, acc)
                added = ()
                for k in tl.static_range(nb):
                    added = added + (dot(tl.trans(p_right[k]), d_z_right, d_x[k], PRECISION),)
                d_x = added
            d_z = (d_z * LN2).to(dtype)
            # delta must come from the very dz that it is compared with: the product rounds as the others do.
            delta = tl.sum(dot(d_z, identity, nothing, PRECISION) * z, 1)[:, None]
            d_q = nothing
            d_s = ()
            for k in tl.static_range(nb):
                if F == 1:
                    d_s_k = p[k] * 0.0  # the softmax of one key is constant
                else:
                    d_s_k = p[k] * (dot(d_z, tl.trans(x_tiles[k]), nothing, PRECISION) - delta)
                if PACK > 1:
                    d_s_k = tl.where(own_keys(rows, k * BLOCK + i, F, PACK), d_s_k, 0.0)
                d_s = d_s + (d_s_k.to(dtype),)
                d_q = dot(d_s[k], values[k], d_q, PRECISION)
            d_q = d_q.to(dtype)
            if NEED_INPUT:
                q_right = finite(q, PACK, acc)
                added = ()
                for k in tl.static_range(nb):
                    d_x_k = dot(tl.trans(d_s[k]), q_right, d_x[k], PRECISION)
                    if k == r:
                        d_x_k = dot(d_q, tl.trans(a), d_x_k, PRECISION)
                    added = added + (d_x_k,)
                d_x = added
            if NEED_SCORES:
                d_q_t = tl.trans(d_q)
                d_a_t = dot(d_q_t, x_tiles[r], d_a_t, PRECISION)
                d_c = dot(d_q_t, ones, d_c, PRECISION)
    if NEED_SCORES:
        _accumulate_transposed(partial + h * D, d_a_t, i, i, H * D, E, D)
        _accumulate_sums(partial + E * H * D + h * D, d_c, i, D)
    if into_values:
        _accumulate(partial + AT_M + h * D * HEAD_OUT, d_m, i, i, HEAD_OUT, D, HEAD_OUT)
    return d_x


@triton.jit
def backward_resident(
    grad,  # (B, F, O), any strides
    x,  # (B, F, E), any strides
    weights,  # packed, fp32 or fp64
    mask,
    out,  # (B, F, O), contiguous
    d_x,  # (B, F, E), contiguous
    partial,  # (programs, size of weights)
    batch,
    d_sb,
    d_sf,
    d_so,
    x_sb,
    x_sf,
    x_se,
    m_sb,
    m_sq,
    m_sk,
    nought,  # 0: what is compared with it is compared once, not again in every layout that it is needed in
    F: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    O: tl.constexpr,
    OUTPUT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    HEAD_OUT: tl.constexpr,
    AT_M: tl.constexpr,
    AT_R: tl.constexpr,
    AT_B: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    NEED_SCORES: tl.constexpr,
    NEED_VALUES: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    HOIST: tl.constexpr,
):
    """Each program walks over tiles. HOIST: heads unrolled, their weights loaded once per program."""
    dtype: tl.constexpr = x.dtype.element_ty
    acc: tl.constexpr = weights.dtype.element_ty
    nb: tl.constexpr = (F + BLOCK - 1) // BLOCK
    size: tl.constexpr = AT_B + 2 * O
    through_heads: tl.constexpr = NEED_INPUT or NEED_SCORES or (NEED_VALUES and OUTPUT != BARE)
    i = tl.arange(0, BLOCK)
    zero = tl.cast(nought, acc)
    pid = tl.program_id(0)
    partial += tl.cast(pid, tl.int64) * size
    for first in tl.range(0, size, 128):
        at = first + tl.arange(0, 128)
        tl.store(partial + at, tl.zeros((128,), acc), mask=at < size)
    tl.debug_barrier()
    heads = ()
    if HOIST:
        for h in tl.static_range(H):
            heads = heads + (_load_head(weights, h, E, H, D, HEAD_OUT, AT_M, OUTPUT, dtype),)
    for t in tl.range(pid, (batch + PACK - 1) // PACK, tl.num_programs(0)):
        tile = tl.cast(t, tl.int64)
        x_tiles = ()
        values = ()
        ceilings = ()
        d_x_tiles = ()
        longest = tl.zeros((BLOCK,), acc)  # the largest |x|^2
        for k in tl.static_range(nb):
            rows = k * BLOCK + i
            x_k = load_rows(x, rows, 0, tile, batch, x_sb, x_sf, x_se, F, E, PACK)
            x_tiles = x_tiles + (x_k,)
            values = values + (finite(x_k, PACK, acc),)
            if MASK != MASK_PAIRS:
                ceiling = load_ceiling(mask, i, rows, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
                ceilings = ceilings + (ceiling,)
            d_x_tiles = d_x_tiles + (tl.zeros((BLOCK, BLOCK), acc),)
            longest = tl.maximum(longest, tl.sum(x_k.to(acc) * x_k.to(acc), 1))
        bad = poison(x_tiles[0], PACK, acc)
        longest = tl.max(longest, 0)
        d_y = ()
        if NEED_INPUT and RESIDUAL == IDENTITY:
            d_y = _load_output_tiles(grad, out, 0, zero, tile, batch, d_sb, d_sf, d_so, F, O, E, nb, PACK, RELU, acc)
            added = ()
            for k in tl.static_range(nb):
                added = added + (d_y[k].to(acc),)
            d_x_tiles = added
        if OUTPUT == MERGED:
            d_y, d_x_tiles = _differentiate_columns(
                d_x_tiles, x_tiles, 0, ceilings, grad, out, partial, weights, mask, zero, tile, batch, d_sb, d_sf, d_so,
                m_sb, m_sq, m_sk, F, E, O, HEAD_OUT, AT_R, AT_B, RESIDUAL, RELU, PACK, MASK, NEED_INPUT, NEED_RESIDUAL,
                NEED_BIAS, PRECISION,
            )  # fmt: skip
        if HOIST:
            for h in tl.static_range(H):
                d_y_h = d_y
                if OUTPUT != MERGED:
                    d_y_h, d_x_tiles = _differentiate_columns(
                        d_x_tiles, x_tiles, h * HEAD_OUT, ceilings, grad, out, partial, weights, mask, zero, tile,
                        batch, d_sb, d_sf, d_so, m_sb, m_sq, m_sk, F, E, O, HEAD_OUT, AT_R, AT_B, RESIDUAL, RELU, PACK,
                        MASK, NEED_INPUT, NEED_RESIDUAL, NEED_BIAS, PRECISION,
                    )  # fmt: skip
                if through_heads:
                    d_x_tiles = _differentiate_head(
                        d_x_tiles, x_tiles, values, d_y_h, ceilings, bad, heads[h], longest, h, partial, mask, tile,
                        batch, m_sb, m_sq, m_sk, F, E, H, D, OUTPUT, HEAD_OUT, AT_M, PACK, MASK, HOIST, NEED_INPUT,
                        NEED_SCORES, NEED_VALUES, PRECISION, EXACT,
                    )  # fmt: skip
        elif through_heads or OUTPUT != MERGED:
            for h in tl.range(H):
                d_y_h = d_y
                if OUTPUT != MERGED:
                    d_y_h, d_x_tiles = _differentiate_columns(
                        d_x_tiles, x_tiles, h * HEAD_OUT, ceilings, grad, out, partial, weights, mask, zero, tile,
                        batch, d_sb, d_sf, d_so, m_sb, m_sq, m_sk, F, E, O, HEAD_OUT, AT_R, AT_B, RESIDUAL, RELU, PACK,
                        MASK, NEED_INPUT, NEED_RESIDUAL, NEED_BIAS, PRECISION,
                    )  # fmt: skip
                if through_heads:
                    head = _load_head(weights, h, E, H, D, HEAD_OUT, AT_M, OUTPUT, dtype)
                    d_x_tiles = _differentiate_head(
                        d_x_tiles, x_tiles, values, d_y_h, ceilings, bad, head, longest, h, partial, mask, tile,
                        batch, m_sb, m_sq, m_sk, F, E, H, D, OUTPUT, HEAD_OUT, AT_M, PACK, MASK, HOIST, NEED_INPUT,
                        NEED_SCORES, NEED_VALUES, PRECISION, EXACT,
                    )  # fmt: skip
        if NEED_INPUT:
            for k in tl.static_range(nb):
                offsets, exists = row_offsets(k * BLOCK + i, tile, batch, F * E, E, F, PACK)
                inside = exists[:, None]
                if E % BLOCK != 0:
                    inside = inside & (i[None, :] < E)
                tl.store(d_x + offsets[:, None] + i[None, :], d_x_tiles[k].to(dtype), mask=inside)
