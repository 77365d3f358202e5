"""The streaming backward of every layout; short samples of narrow ones have a resident one of their own.

Weight gradients: a program adds up what its samples give in a row of `partial` of its own, in a fixed order; the
rows are added up by another launch. Input gradients: rows and keys of a block give to different rows of dx, which a
program adds up in fp32 in a row of `scratch` of its own, and rounds once; factored, it first adds up there what a
head's keys and values are due, and takes it back through the projections once. Partial sums and scratch stay in the
second-level cache.
"""

import triton
import triton.language as tl

from .triton_math import (
    BARE,
    BLOCK,
    IDENTITY,
    LN2,
    MASK_NONE,
    MERGED,
    NEG_INF,
    PROJECTION,
    as_operand,
    block_pointers,
    dot,
    finite,
    hide,
    load_ceiling,
    load_rows,
    load_transposed,
    own_keys,
    relu_words,
    reordered,
    restoring,
    row_offsets,
    score_start,
)
from .triton_streaming import attend, load_chunks, load_keys, project_keys, queries, scores, weighted


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
def load_output_gradient(
    grad, relu_mask, rows, first, zero, tile, batch, d_sb, d_sf, d_so, F: tl.constexpr, O: tl.constexpr,
    WIDTH: tl.constexpr, HEAD_OUT: tl.constexpr, PACK: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """dy = grad where the relu let it pass (as in torch, a NaN does), its columns from `first` on as chunks of WIDTH
    [R, 16]: of a head's own HEAD_OUT, or all."""
    words: tl.constexpr = relu_words(O, HEAD_OUT)
    of_head: tl.constexpr = (HEAD_OUT + BLOCK - 1) // BLOCK
    run: tl.constexpr = 128 // grad.dtype.element_ty.primitive_bitwidth
    i = tl.arange(0, BLOCK)
    d_y = ()
    for o in tl.static_range(0, WIDTH, BLOCK):
        columns = grad + tl.cast(first, tl.int64) * d_so
        g = load_rows(columns, rows, o, tile, batch, d_sb, d_sf, d_so, F, WIDTH, PACK)
        if RELU:
            offsets, exists = row_offsets(rows, tile, batch, F * words, words, F, PACK)
            if WIDTH == HEAD_OUT:
                word = first // HEAD_OUT * of_head + o // BLOCK
                bits = tl.load(relu_mask + word + offsets, mask=exists, other=0).to(tl.int32)
                # A thread has so many neighbours: their bits are then tested by number.
                runs = bits[:, None] >> (tl.arange(0, BLOCK // run) * run)[None, :]
                passed = (runs[:, :, None] >> tl.arange(0, run)[None, None, :]) & 1
                passed = tl.reshape(passed, (rows.shape[0], BLOCK))
            else:
                column = o + i
                word = column // HEAD_OUT * of_head + column % HEAD_OUT // BLOCK
                inside = exists[:, None] & (column < WIDTH)[None, :]
                bits = tl.load(relu_mask + offsets[:, None] + word[None, :], mask=inside, other=0)
                passed = (bits.to(tl.int32) >> (column % HEAD_OUT % BLOCK)[None, :]) & 1
            g = tl.where(passed == zero, 0.0, g).to(g.dtype)
        d_y = d_y + (g,)
    return d_y


@triton.jit
def sees_a_key(
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
    relu_mask,  # int16 (B, F, relu_words), contiguous, of the forward
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
                    d_y = load_output_gradient(
                        grad, relu_mask, rows, first_out, 0, tile, batch, d_sb, d_sf, d_so, F, O, HEAD_OUT, HEAD_OUT,
                        PACK, RELU,
                    )  # fmt: skip
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
                d_y = load_output_gradient(
                    grad, relu_mask, rows, first_out, 0, tile, batch, d_sb, d_sf, d_so, F, O, HEAD_OUT, HEAD_OUT, PACK,
                    RELU,
                )  # fmt: skip
                for o in tl.static_range(len(d_y)):
                    if NEED_BIAS:
                        d_b = tl.sum(d_y[o].to(acc), 0)
                        d_g = d_b
                        if MASK != MASK_NONE:
                            seen = sees_a_key(mask, rows, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
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
                    d_y = load_output_gradient(
                        grad, relu_mask, rows, 0, 0, tile, batch, d_sb, d_sf, d_so, F, O, E, HEAD_OUT, PACK, RELU
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
