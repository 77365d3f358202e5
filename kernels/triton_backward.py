"""The backward of every layout: resident for short samples of narrow folded layouts, whose x stays on chip, else
streaming.

Weight gradients: a program adds up what its samples give in a row of `partial` of its own, in a fixed order; the
rows are added up by another launch. Input gradients: rows and keys of a block give to different rows of dx. Resident,
they are added up in registers. Streaming, a program adds them up in fp32 in a row of `scratch` of its own, and rounds
once; factored, it first adds up there what a head's keys and values are due, and takes it back through the projections
once. Partial sums and scratch stay in the second-level cache.
"""

import triton
import triton.language as tl

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
    as_operand,
    block_pointers,
    dot,
    finite,
    hide,
    load_block,
    load_ceiling,
    load_rows,
    load_transposed,
    load_vector,
    own_keys,
    poison,
    reordered,
    restoring,
    row_offsets,
    row_reference,
    row_scale,
    score_start,
)
from .triton_streaming import attend, load_chunks, load_keys, project_keys, queries, scores, weighted

# Scores, in powers of two, up to which no maximum need be subtracted: their exponentials, the sums of these and the
# sums' reciprocals take up half the range of fp32's and bf16's exponents, or a third of fp16's; the rest is for
# gradients.
SAFE_SCORE = _constant(60.0)
SAFE_SCORE_FP16 = _constant(3.0)
ONES = _constant(8)  # the narrowest right operand of a dot: sums of rows come from the tensor core


@triton.jit
def _add_block(pointer, block, top, left, rows, columns, stride, age, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """pointer[top + rows, left + columns] += block [R, 16]; at age 0 what stood there counts as zero."""
    inside = (rows[:, None] < ROWS - top) & (columns[None, :] < COLUMNS - left)
    pointers = block_pointers(pointer, top, left, rows, columns, stride)
    old = tl.load(pointers, mask=inside & (tl.full((1, 1), 0, tl.int32) + age != 0), other=0.0)
    tl.store(pointers, old + block, mask=inside)


@triton.jit
def _add_vector(pointer, vector, first, i, age, SIZE: tl.constexpr):
    """pointer[first + i] += vector [16]."""
    inside = i < SIZE - first
    old = tl.load(pointer + i + first, mask=inside & (tl.full((1,), 0, tl.int32) + age != 0), other=0.0)
    tl.store(pointer + i + first, old + vector, mask=inside)


@triton.jit
def _load_output_gradient(
    grad, out, rows, first, zero, tile, batch, d_sb, d_sf, d_so, F: tl.constexpr, O: tl.constexpr,
    WIDTH: tl.constexpr, PACK: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dy = grad where the relu let it pass, its columns from `first` on as chunks of WIDTH [R, 16].

    As in torch, a NaN lets it pass.
    """
    d_y = ()
    for o in tl.static_range(0, WIDTH, BLOCK):
        columns = grad + tl.cast(first, tl.int64) * d_so
        g = load_rows(columns, rows, o, tile, batch, d_sb, d_sf, d_so, F, WIDTH, PACK)
        if RELU:
            y = load_rows(out + first, rows, o, tile, batch, F * O, O, 1, F, WIDTH, PACK)
            g = tl.where(y.to(ACC) <= zero, 0.0, g).to(g.dtype)
        d_y = d_y + (g,)
    return d_y


@triton.jit
def _sees_a_key(
    mask, rows, tile, batch, m_sb, m_sq, m_sk, F: tl.constexpr, PACK: tl.constexpr, MASK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Whether the mask leaves the row any key. [R]"""
    top = tl.full((rows.shape[0],), NEG_INF, ACC)
    for first in tl.range(0, F, BLOCK):
        keys = first + tl.arange(0, BLOCK)
        ceiling = load_ceiling(mask, rows, keys, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, ACC)
        s = hide(score_start(rows, keys, F, PACK, False, ACC), ceiling, rows, keys, F, PACK, MASK)
        top = tl.maximum(top, tl.max(s, 1))
    return top > NEG_INF


@triton.jit
def _differentiate_keys(
    q,  # chunks of D [R, 16]
    q_right,  # the same, finite
    d_z,  # chunks of D [R, 16]
    d_z_right,
    d_q,  # chunks of D [R, 16], so far
    reference,  # [R]
    scale,
    delta,
    first,
    rows,
    age,
    scratch,
    keys_from,
    values_from,
    key_tile,
    k_sb,
    k_sf,
    k_se,
    mask,
    tile,
    batch,
    m_sb,
    m_sq,
    m_sk,
    F: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    FACTORED: tl.constexpr,
    KEYS: tl.constexpr,
    FULL: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    NEED_SCORES: tl.constexpr,
    NEED_VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
):
    """P, dP and dS over the keys from `first` on: dq += dS keys; and what the keys, dS^T q, and the values, P^T dz, are
    due, into their rows of scratch: of dx, or factored of dkeys and dvalues."""
    dtype: tl.constexpr = q[0].dtype
    acc: tl.constexpr = d_q[0].dtype
    n_rows: tl.constexpr = q[0].shape[0]
    tile_rows: tl.constexpr = BLOCK if PACK > 1 else F
    fields = first + tl.arange(0, KEYS)
    keys, ordered = load_keys(keys_from, first, key_tile, batch, k_sb, k_sf, k_se, F, D, KEYS, PACK, REORDER, acc)
    values = keys
    if FACTORED:
        values = load_chunks(values_from, fields, key_tile, batch, k_sb, k_sf, k_se, F, D, PACK)
    s = scores(q, keys, score_start(rows, fields, F, PACK, FULL, acc), PRECISION)
    ceiling = load_ceiling(mask, rows, fields, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
    s = hide(s, ceiling, rows, fields, F, PACK, MASK)
    p = tl.exp2(s - reference[:, None]) * scale[:, None]
    d_p = scores(d_z, values, tl.zeros((n_rows, KEYS), acc), PRECISION)
    d_s = p * (d_p - delta[:, None]) * tl.full((1, 1), LN2, acc)
    if PACK > 1:
        # Between samples both are zero, but for rows that are NaN throughout.
        own = own_keys(rows, fields, F, PACK)
        p = tl.where(own, p, 0.0)
        d_s = tl.where(own, d_s, 0.0)
    d_q = weighted(as_operand(d_s.to(dtype), REORDER), ordered, d_q, PRECISION)
    p_t = tl.trans(p.to(dtype))
    d_s_t = tl.trans(d_s.to(dtype))
    i = tl.arange(0, BLOCK)
    nothing = tl.zeros((KEYS, BLOCK), acc)
    for j in tl.static_range(len(q)):
        if FACTORED:
            if NEED_INPUT or NEED_SCORES:
                d_k = dot(d_s_t, q_right[j], nothing, PRECISION)
                _add_block(scratch + tile_rows * E, d_k, 0, j * BLOCK, fields, i, D, age, tile_rows, D)
            if NEED_INPUT or NEED_VALUES:
                d_v = dot(p_t, d_z_right[j], nothing, PRECISION)
                _add_block(scratch + tile_rows * (E + D), d_v, 0, j * BLOCK, fields, i, D, age, tile_rows, D)
        elif NEED_INPUT:
            d_x = dot(p_t, d_z_right[j], nothing, PRECISION)
            d_x = dot(d_s_t, q_right[j], d_x, PRECISION)
            _add_block(scratch, d_x, 0, j * BLOCK, fields, i, E, age, tile_rows, E)
    return d_q


@triton.jit
def _differentiate_projection(
    x,
    d_rows,  # where the gradients of a head's keys or values stand, (tile rows, D)
    d_x,  # where to add them as gradients of x, (tile rows, E)
    weights,  # of the head's projection, (E, D) with rows H*D apart
    d_weights,
    rows,
    i,
    age,
    tile,
    batch,
    x_sb,
    x_sf,
    x_se,
    F: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    PACK: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From y = x w and dy, for a block of rows: dx += dy w^T, dw += x^T dy."""
    dtype: tl.constexpr = x.dtype.element_ty
    acc: tl.constexpr = d_x.dtype.element_ty
    tile_rows: tl.constexpr = BLOCK if PACK > 1 else F
    d_y = ()
    for j in tl.static_range(0, D, BLOCK):
        inside = (rows[:, None] < tile_rows) & (i[None, :] < D - j)
        d_y_j = tl.load(block_pointers(d_rows, 0, j, rows, i, D), mask=inside, other=0.0)
        d_y = d_y + (d_y_j.to(dtype),)
    for e in tl.static_range(0, E, BLOCK):
        if NEED_WEIGHTS:
            x_t = tl.trans(load_rows(x, rows, e, tile, batch, x_sb, x_sf, x_se, F, E, PACK))
            for j in tl.static_range(len(d_y)):
                d_w = dot(x_t, d_y[j], tl.zeros((BLOCK, BLOCK), acc), PRECISION)
                _add_block(d_weights, d_w, e, j * BLOCK, i, i, H * D, age, E, D)
        if NEED_INPUT:
            d_x_e = tl.zeros((BLOCK, BLOCK), acc)
            for j in tl.static_range(len(d_y)):
                w_t = load_transposed(weights, e, j * BLOCK, i, i, H * D, E, D)
                d_x_e = dot(d_y[j], w_t.to(dtype), d_x_e, PRECISION)
            _add_block(d_x, d_x_e, 0, e, rows, i, E, 1, tile_rows, E)


@triton.jit
def backward(
    grad,  # (B, F, O), any strides
    x,  # (B, F, E), any strides
    weights,  # packed, fp32 or fp64
    mask,
    out,  # (B, F, O), contiguous
    d_x,  # (B, F, E), contiguous
    partial,  # (programs, size of weights)
    scratch,  # (programs, F or 16, E), factored (programs, F or 16, E + 2 D)
    projected,  # (programs, PACK, F, 2, H, D); anything where folded
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
    key_end,
    nought,  # 0: ties addresses to a loop, or the compiler computes all of them ahead, and spills
    F: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    O: tl.constexpr,
    FACTORED: tl.constexpr,
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
    REORDER: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Each program walks over tiles: per head and block of rows, forward again, then back through it.

    No more programs than tiles, so that each writes its row of `partial`.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    acc: tl.constexpr = weights.dtype.element_ty
    tile_rows: tl.constexpr = BLOCK if PACK > 1 else F
    size: tl.constexpr = AT_B + 2 * O
    at_k: tl.constexpr = (E + 1) * H * D
    slices: tl.constexpr = 1 if OUTPUT == MERGED else H
    # Whether anybody wants what lies behind the heads' outputs, and, of folded weights, what lies in front of them.
    through_heads: tl.constexpr = (NEED_INPUT or NEED_SCORES) or (NEED_VALUES and FACTORED)
    into_values: tl.constexpr = NEED_VALUES and OUTPUT != BARE
    pid = tl.program_id(0)
    partial += tl.cast(pid, tl.int64) * size
    scratch += tl.cast(pid, tl.int64) * (tile_rows * (E + 2 * D * FACTORED))
    if FACTORED:
        projected += tl.cast(pid, tl.int64) * (PACK * F * 2 * H * D)
    for t in tl.range(pid, (batch + PACK - 1) // PACK, tl.num_programs(0)):
        tile = tl.cast(t, tl.int64)
        if through_heads or into_values:
            if FACTORED:
                i = tl.arange(0, BLOCK) + t * nought
                project_keys(x, weights, projected, i, tile, batch, x_sb, x_sf, x_se, F, E, H, D, PACK, PRECISION)
            for h in tl.range(H):
                m_h = AT_M + h * D * HEAD_OUT
                first_out = 0
                if OUTPUT != MERGED:
                    first_out = h * HEAD_OUT
                keys_from = x
                values_from = x
                key_tile = tile
                k_sb = x_sb
                k_sf = x_sf
                k_se = x_se
                if FACTORED:
                    keys_from = projected + h * D
                    values_from = projected + (H + h) * D
                    key_tile = tile * 0
                    k_sb = F * 2 * H * D
                    k_sf = 2 * H * D
                    k_se = 1
                for first_row in tl.range(0, tile_rows, ROWS):
                    turn = t + first_row
                    if FACTORED or OUTPUT != MERGED:
                        # The others have registers to spare for addresses that all heads share.
                        turn += h
                    i = tl.arange(0, BLOCK) + turn * nought
                    age_of_keys = first_row
                    age_of_rows = h
                    if not FACTORED:
                        age_of_keys = h + first_row
                        age_of_rows = 1
                    age_of_head = t - pid + first_row
                    rows = first_row + tl.arange(0, ROWS) + turn * nought
                    x_rows = load_chunks(x, rows, tile, batch, x_sb, x_sf, x_se, F, E, PACK)
                    d_y = _load_output_gradient(
                        grad, out, rows, first_out, 0.0, tile, batch, d_sb, d_sf, d_so, F, O, HEAD_OUT, PACK, RELU, acc
                    )
                    q = queries(x_rows, weights, h, i, E, H, D, PRECISION, REORDER)
                    d_z = ()
                    if through_heads:
                        if OUTPUT == BARE:
                            d_z = d_y
                        else:
                            for e in tl.static_range(0, D, BLOCK):
                                d_z_e = tl.zeros((ROWS, BLOCK), acc)
                                for o in tl.static_range(len(d_y)):
                                    m_t = load_transposed(
                                        weights + m_h, e, o * BLOCK, restoring(i, REORDER), i, HEAD_OUT, D, HEAD_OUT
                                    )
                                    d_z_e = dot(d_y[o], m_t.to(dtype), d_z_e, PRECISION)
                                d_z = d_z + (as_operand(d_z_e.to(dtype), REORDER),)
                    reference, _, scale, delta, z = attend(
                        q, d_z, rows, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, tile, batch,
                        m_sb, m_sq, m_sk, key_end, F, D, FACTORED, KEYS, TAIL, PACK, MASK, PRECISION, REORDER, EXACT,
                        acc,
                    )  # fmt: skip
                    if into_values:
                        for e in tl.static_range(len(z)):
                            z_t = tl.trans(z[e].to(dtype))
                            for o in tl.static_range(len(d_y)):
                                d_m = dot(z_t, d_y[o], tl.zeros((BLOCK, BLOCK), acc), PRECISION)
                                _add_block(
                                    partial + m_h, d_m, e * BLOCK, o * BLOCK, i, i, HEAD_OUT, age_of_head, D, HEAD_OUT
                                )
                    if through_heads:
                        d_z_right = ()
                        q_right = ()
                        d_q = ()
                        for e in tl.static_range(len(q)):
                            d_z_right = d_z_right + (finite(d_z[e], PACK, acc),)
                            q_right = q_right + (finite(q[e], PACK, acc),)
                            d_q = d_q + (tl.zeros((ROWS, BLOCK), acc),)
                        for first in tl.range(0, key_end, KEYS):
                            d_q = _differentiate_keys(
                                q, q_right, d_z, d_z_right, d_q, reference, scale, delta, first, rows, age_of_keys,
                                scratch, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, tile, batch,
                                m_sb, m_sq, m_sk, F, E, D, FACTORED, KEYS, True, PACK, MASK, NEED_INPUT, NEED_SCORES,
                                NEED_VALUES, PRECISION, REORDER,
                            )  # fmt: skip
                        d_q = _differentiate_keys(
                            q, q_right, d_z, d_z_right, d_q, reference, scale, delta, key_end, rows, age_of_keys,
                            scratch, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, tile, batch,
                            m_sb, m_sq, m_sk, F, E, D, FACTORED, TAIL, False, PACK, MASK, NEED_INPUT, NEED_SCORES,
                            NEED_VALUES, PRECISION, REORDER,
                        )  # fmt: skip
                        if NEED_INPUT:
                            tl.debug_barrier()
                            for e in tl.static_range(len(x_rows)):
                                d_x_e = tl.zeros((ROWS, BLOCK), acc)
                                for j in tl.static_range(len(d_q)):
                                    d_q_j = as_operand(d_q[j].to(dtype), REORDER)
                                    columns = reordered(i, REORDER)
                                    a_t = load_transposed(
                                        weights + h * D, e * BLOCK, j * BLOCK, i, columns, H * D, E, D
                                    )
                                    d_x_e = dot(d_q_j, a_t.to(dtype), d_x_e, PRECISION)
                                _add_block(scratch, d_x_e, 0, e * BLOCK, rows, i, E, age_of_rows, tile_rows, E)
                            tl.debug_barrier()
                        if NEED_SCORES:
                            # Loaded again rather than kept over the loops: registers are what is short.
                            x_rows = load_chunks(x, rows, tile, batch, x_sb, x_sf, x_se, F, E, PACK)
                            d_c = partial + E * H * D + h * D
                            for j in tl.static_range(len(d_q)):
                                _add_vector(d_c, tl.sum(d_q[j], 0), j * BLOCK, i, age_of_head, D)
                                d_q_j = d_q[j].to(dtype)
                                for e in tl.static_range(len(x_rows)):
                                    d_a = dot(tl.trans(x_rows[e]), d_q_j, tl.zeros((BLOCK, BLOCK), acc), PRECISION)
                                    _add_block(
                                        partial + h * D, d_a, e * BLOCK, j * BLOCK, i, i, H * D, age_of_head, E, D
                                    )
                if FACTORED:
                    tl.debug_barrier()
                    for first_row in tl.range(0, tile_rows, BLOCK):
                        i = tl.arange(0, BLOCK) + (t + h + first_row) * nought
                        rows = first_row + i
                        age = t - pid + first_row
                        at = at_k + h * D
                        if NEED_INPUT or NEED_SCORES:
                            _differentiate_projection(
                                x, scratch + tile_rows * E, scratch, weights + at, partial + at, rows, i, age, tile,
                                batch, x_sb, x_sf, x_se, F, E, H, D, PACK, NEED_INPUT, NEED_SCORES, PRECISION,
                            )  # fmt: skip
                        at += E * H * D
                        if NEED_INPUT or NEED_VALUES:
                            _differentiate_projection(
                                x, scratch + tile_rows * (E + D), scratch, weights + at, partial + at, rows, i, age,
                                tile, batch, x_sb, x_sf, x_se, F, E, H, D, PACK, NEED_INPUT, NEED_VALUES, PRECISION,
                            )  # fmt: skip
                    tl.debug_barrier()
        for first_row in tl.range(0, tile_rows, ROWS):
            i = tl.arange(0, BLOCK) + (t + first_row) * nought
            age = t - pid + first_row
            rows = first_row + tl.arange(0, ROWS) + t * nought
            x_rows = load_chunks(x, rows, tile, batch, x_sb, x_sf, x_se, F, E, PACK)
            d_x_rows = ()
            if NEED_INPUT:
                for e in tl.static_range(len(x_rows)):
                    inside = (rows[:, None] < tile_rows) & (i[None, :] < E - e * BLOCK)
                    pointers = block_pointers(scratch, 0, e * BLOCK, rows, i, E)
                    d_x_rows = d_x_rows + (tl.load(pointers, mask=inside, other=0.0),)
            for h in tl.range(slices):
                first_out = h * HEAD_OUT
                d_y = _load_output_gradient(
                    grad, out, rows, first_out, 0.0, tile, batch, d_sb, d_sf, d_so, F, O, HEAD_OUT, PACK, RELU, acc
                )
                for o in tl.static_range(len(d_y)):
                    if NEED_BIAS:
                        d_b = tl.sum(d_y[o].to(acc), 0)
                        d_g = d_b
                        if MASK != MASK_NONE:
                            seen = _sees_a_key(mask, rows, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
                            d_g = tl.sum(tl.where(seen[:, None], d_y[o].to(acc), 0.0), 0)
                        _add_vector(partial + AT_B + first_out, d_b, o * BLOCK, i, age, HEAD_OUT)
                        _add_vector(partial + AT_B + O + first_out, d_g, o * BLOCK, i, age, HEAD_OUT)
                    if NEED_RESIDUAL and RESIDUAL == PROJECTION:
                        for e in tl.static_range(len(x_rows)):
                            d_r = dot(tl.trans(x_rows[e]), d_y[o], tl.zeros((BLOCK, BLOCK), acc), PRECISION)
                            d_r_h = partial + AT_R + first_out
                            _add_block(d_r_h, d_r, e * BLOCK, o * BLOCK, i, i, O, age, E, HEAD_OUT)
                if NEED_INPUT and RESIDUAL == PROJECTION:
                    added = ()
                    for e in tl.static_range(len(x_rows)):
                        d_x_e = d_x_rows[e]
                        for o in tl.static_range(len(d_y)):
                            r_h = weights + AT_R + first_out
                            r_t = load_transposed(r_h, e * BLOCK, o * BLOCK, i, i, O, E, HEAD_OUT)
                            d_x_e = dot(d_y[o], r_t.to(dtype), d_x_e, PRECISION)
                        added = added + (d_x_e,)
                    d_x_rows = added
            if NEED_INPUT:
                if RESIDUAL == IDENTITY:
                    d_y = _load_output_gradient(
                        grad, out, rows, 0, 0.0, tile, batch, d_sb, d_sf, d_so, F, O, E, PACK, RELU, acc
                    )
                    added = ()
                    for e in tl.static_range(len(x_rows)):
                        added = added + (d_x_rows[e] + d_y[e].to(acc),)
                    d_x_rows = added
                offsets, exists = row_offsets(rows, tile, batch, F * E, E, F, PACK)
                for e in tl.static_range(len(x_rows)):
                    tl.store(
                        d_x + offsets[:, None] + i[None, :] + e * BLOCK,
                        d_x_rows[e].to(d_x.dtype.element_ty),
                        mask=exists[:, None] & (i[None, :] < E - e * BLOCK),
                    )
        tl.debug_barrier()


# --- resident -----------------------------------------------------------------------------------------------------


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
        d_y = d_y + _load_output_gradient(
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
                    seen = _sees_a_key(mask, rows, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
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
