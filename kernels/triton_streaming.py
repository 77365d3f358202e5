"""The forward for long samples or wide embeddings, and the backward of every shape.

A block of rows walks over blocks of keys, read from memory (the first-level cache, mostly) as often as they are needed,
so the registers in use depend on E and O alone. Widths are tuples of 16-column chunks.
"""

import triton
import triton.language as tl

from .triton_math import (
    BLOCK,
    LN2,
    MASK_NONE,
    NEG_INF,
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
from .triton_resident import store_relu


@triton.jit
def _load_chunks(pointer, rows, tile, batch, s_b, s_f, s_e, F: tl.constexpr, WIDTH: tl.constexpr, PACK: tl.constexpr):
    """Rows of a tile, as a tuple of 16-column chunks [R, 16]."""
    chunks = ()
    for e in tl.static_range(0, WIDTH, BLOCK):
        chunks = chunks + (load_rows(pointer, rows, e, tile, batch, s_b, s_f, s_e, F, WIDTH, PACK),)
    return chunks


@triton.jit
def _queries(
    x_rows,  # chunks of E [R, 16]
    weights,
    h,
    i,  # 0 to 15
    E: tl.constexpr,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
):
    """q_h = x A_h + c_h as chunks [R, 16], each ready to be the left operand of a dot."""
    n_rows: tl.constexpr = x_rows[0].shape[0]
    dtype: tl.constexpr = x_rows[0].dtype
    columns = restoring(i, REORDER)
    q = ()
    for j in tl.static_range(0, E, BLOCK):
        c = load_vector(weights + E * H * E + h * E, j, columns, E)
        q_j = tl.broadcast_to(c[None, :], (n_rows, BLOCK))
        for e in tl.static_range(len(x_rows)):
            a = load_block(weights + h * E, e * BLOCK, j, i, columns, H * E, E, E)
            q_j = dot(x_rows[e], a.to(dtype), q_j, PRECISION)
        q = q + (as_operand(q_j.to(dtype), REORDER),)
    return q


@triton.jit
def _scores(
    left,  # chunks of E [R, 16]
    x_keys,  # chunks of E [K, 16]
    start,  # [R, K]
    PRECISION: tl.constexpr,
):
    """start + left x^T. [R, K]"""
    for i in tl.static_range(len(left)):
        start = dot(left[i], tl.trans(x_keys[i]), start, PRECISION)
    return start


@triton.jit
def _weighted(
    weighting,  # [R, K], ready to be a left operand
    values,  # chunks of E [K, 16], in the order of its columns
    start,  # chunks of E [R, 16]
    PRECISION: tl.constexpr,
):
    """start + weighting x, chunk by chunk."""
    sums = ()
    for i in tl.static_range(len(values)):
        sums = sums + (dot(weighting, values[i], start[i], PRECISION),)
    return sums


@triton.jit
def _load_keys(
    x, first, tile, batch, x_sb, x_sf, x_se, F: tl.constexpr, E: tl.constexpr, KEYS: tl.constexpr,
    PACK: tl.constexpr, REORDER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The rows of a block of keys, as keys, and as values in the order `reordered`: chunks of E [K, 16]."""
    k = tl.arange(0, KEYS)
    x_keys = _load_chunks(x, first + k, tile, batch, x_sb, x_sf, x_se, F, E, PACK)
    ordered = x_keys
    if REORDER:
        ordered = _load_chunks(x, first + reordered(k, REORDER), tile, batch, x_sb, x_sf, x_se, F, E, PACK)
    values = ()
    for i in tl.static_range(len(ordered)):
        values = values + (finite(ordered[i], PACK, ACC),)
    return x_keys, values


@triton.jit
def _attend_keys(
    q,
    d_z,  # chunks of E [R, 16] in a backward, else ()
    row_max,  # [R] so far
    row_sum,
    delta,
    z,  # chunks of E [R, 16]
    first,
    rows,
    x,
    mask,
    tile,
    batch,
    x_sb,
    x_sf,
    x_se,
    m_sb,
    m_sq,
    m_sk,
    F: tl.constexpr,
    E: tl.constexpr,
    KEYS: tl.constexpr,
    FULL: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
):
    """One step of the online softmax, over the keys from `first` on."""
    acc: tl.constexpr = z[0].dtype
    keys = first + tl.arange(0, KEYS)
    x_keys, values = _load_keys(x, first, tile, batch, x_sb, x_sf, x_se, F, E, KEYS, PACK, REORDER, acc)
    s = _scores(q, x_keys, score_start(rows, keys, F, PACK, FULL, acc), PRECISION)
    ceiling = load_ceiling(mask, rows, keys, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
    s = hide(s, ceiling, rows, keys, F, PACK, MASK)
    new_max = tl.maximum(row_max, tl.max(s, 1))
    reference = row_reference(new_max, MASK)
    p = tl.exp2(s - reference[:, None])
    decay = tl.exp2(row_max - reference)
    decayed = ()
    for i in tl.static_range(len(z)):
        decayed = decayed + (z[i] * decay[:, None],)
    z = _weighted(as_operand(p.to(q[0].dtype), REORDER), values, decayed, PRECISION)
    if len(d_z) > 0:
        d_p = _scores(d_z, x_keys, tl.zeros((q[0].shape[0], KEYS), acc), PRECISION)
        if PACK > 1:
            d_p = tl.where(own_keys(rows, keys, F, PACK), d_p, 0.0)
        delta = delta * decay + tl.sum(p * d_p, 1)
    return new_max, row_sum * decay + tl.sum(p, 1), delta, z


@triton.jit
def _attend(
    q,
    d_z,
    rows,
    x,
    mask,
    tile,
    batch,
    x_sb,
    x_sf,
    x_se,
    m_sb,
    m_sq,
    m_sk,
    key_end,
    F: tl.constexpr,
    E: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
    EXACT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Over every key: what was subtracted from the scores, the rows' sums and their reciprocals, and, given dz,
    delta = sum over keys of P dP [R]; and z = P x.

    delta comes from the very dP that it is subtracted from, so a row with a single key has a gradient of exactly zero.
    Keys up to `key_end` come in blocks of KEYS; the rest, at least one, in a last block of TAIL.
    """
    n_rows: tl.constexpr = q[0].shape[0]
    row_max = tl.full((n_rows,), NEG_INF, ACC)
    row_sum = tl.zeros((n_rows,), ACC)
    delta = tl.zeros((n_rows,), ACC)
    z = ()
    for _ in tl.static_range(len(q)):
        z = z + (tl.zeros((n_rows, BLOCK), ACC),)
    for first in tl.range(0, key_end, KEYS):
        row_max, row_sum, delta, z = _attend_keys(
            q, d_z, row_max, row_sum, delta, z, first, rows, x, mask, tile, batch, x_sb, x_sf, x_se, m_sb, m_sq, m_sk,
            F, E, KEYS, True, PACK, MASK, PRECISION, REORDER,
        )  # fmt: skip
    row_max, row_sum, delta, z = _attend_keys(
        q, d_z, row_max, row_sum, delta, z, key_end, rows, x, mask, tile, batch, x_sb, x_sf, x_se, m_sb, m_sq,
        m_sk, F, E, TAIL, False, PACK, MASK, PRECISION, REORDER,
    )  # fmt: skip
    scale = row_scale(row_sum, MASK, EXACT)
    scaled = ()
    for i in tl.static_range(len(z)):
        scaled = scaled + (z[i] * scale[:, None],)
    return row_reference(row_max, MASK), row_sum, scale, delta * scale, scaled


@triton.jit
def forward_streaming(
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
    key_end,  # known at run time only, or the compiler unrolls short loops over keys, and spills
    F: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    O: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Each program walks over pairs of a sample and a block of ROWS rows."""
    dtype: tl.constexpr = x.dtype.element_ty
    acc: tl.constexpr = weights.dtype.element_ty
    row_blocks: tl.constexpr = (F + ROWS - 1) // ROWS
    residual = weights + (E + 1 + O) * H * E
    i = tl.arange(0, BLOCK)
    for t in tl.range(tl.program_id(0), batch * row_blocks, tl.num_programs(0)):
        tile = tl.cast(t // row_blocks, tl.int64)
        rows = t % row_blocks * ROWS + tl.arange(0, ROWS)
        x_rows = _load_chunks(x, rows, tile, batch, x_sb, x_sf, x_se, F, E, 1)
        y = ()
        for o in tl.static_range(0, O, BLOCK):
            b = load_vector(residual + E * O, o, i, O)
            if MASK == MASK_NONE:
                b += load_vector(residual + (E + 1) * O, o, i, O)
            y_o = tl.broadcast_to(b[None, :], (ROWS, BLOCK))
            for e in tl.static_range(len(x_rows)):
                r = load_block(residual, e * BLOCK, o, i, i, O, E, O).to(dtype)
                y_o = dot(x_rows[e], r, y_o, PRECISION)
            y = y + (y_o,)
        row_sum = tl.zeros((ROWS,), acc)
        for h in tl.range(H):
            q = _queries(x_rows, weights, h, i, E, H, PRECISION, REORDER)
            _, row_sum, _, _, z = _attend(
                q, (), rows, x, mask, tile, batch, x_sb, x_sf, x_se, m_sb, m_sq, m_sk, key_end,
                F, E, KEYS, TAIL, 1, MASK, PRECISION, REORDER, EXACT, acc,
            )  # fmt: skip
            values = weights + (E + 1) * H * E + h * E * O
            for e in tl.static_range(len(z)):
                z_e = as_operand(z[e].to(dtype), REORDER)
                added = ()
                for o in tl.static_range(len(y)):
                    m = load_block(values, e * BLOCK, o * BLOCK, reordered(i, REORDER), i, O, E, O)
                    added = added + (dot(z_e, m.to(dtype), y[o], PRECISION),)
                y = added
        for o in tl.static_range(len(y)):
            g = load_vector(residual + (E + 1) * O, o * BLOCK, i, O)
            store_relu(y[o], row_sum, g, out, rows, o * BLOCK, tile, batch, F, O, 1, MASK)


# --- the backward -----------------------------------------------------------------------------------------------
# Weight gradients: a program adds up what its samples give in a row of `partial` of its own, in a fixed order; the
# rows are added up by another launch. Input gradients: rows and keys of a block give to different rows of dx, so a
# program adds them up in fp32 in a row of `scratch` of its own, and rounds once. Both stay in the second-level cache.


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
    grad, out, rows, tile, batch, d_sb, d_sf, d_so, F: tl.constexpr, O: tl.constexpr, PACK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dy = grad where the relu let it pass, as chunks of O [R, 16]. As in torch, a NaN lets it pass."""
    d_y = ()
    for o in tl.static_range(0, O, BLOCK):
        g = load_rows(grad, rows, o, tile, batch, d_sb, d_sf, d_so, F, O, PACK)
        y = load_rows(out, rows, o, tile, batch, F * O, O, 1, F, O, PACK)
        d_y = d_y + (tl.where(y.to(ACC) <= 0.0, 0.0, g).to(g.dtype),)
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
    q,  # chunks of E [R, 16]
    q_right,  # the same, finite
    d_z,  # chunks of E [R, 16]
    d_z_right,
    d_q,  # chunks of E [R, 16], so far
    reference,  # [R]
    scale,
    delta,
    first,
    rows,
    age,
    scratch,
    x,
    mask,
    tile,
    batch,
    x_sb,
    x_sf,
    x_se,
    m_sb,
    m_sq,
    m_sk,
    F: tl.constexpr,
    E: tl.constexpr,
    KEYS: tl.constexpr,
    FULL: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
):
    """P, dP and dS over the keys from `first` on: dq += dS x, and P^T dz + dS^T q into the keys' rows of scratch."""
    dtype: tl.constexpr = q[0].dtype
    acc: tl.constexpr = d_q[0].dtype
    n_rows: tl.constexpr = q[0].shape[0]
    keys = first + tl.arange(0, KEYS)
    x_keys, values = _load_keys(x, first, tile, batch, x_sb, x_sf, x_se, F, E, KEYS, PACK, REORDER, acc)
    s = _scores(q, x_keys, score_start(rows, keys, F, PACK, FULL, acc), PRECISION)
    ceiling = load_ceiling(mask, rows, keys, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
    s = hide(s, ceiling, rows, keys, F, PACK, MASK)
    p = tl.exp2(s - reference[:, None]) * scale[:, None]
    d_p = _scores(d_z, x_keys, tl.zeros((n_rows, KEYS), acc), PRECISION)
    d_s = p * (d_p - delta[:, None]) * tl.full((1, 1), LN2, acc)
    if PACK > 1:
        # Between samples both are zero, but for rows that are NaN throughout.
        own = own_keys(rows, keys, F, PACK)
        p = tl.where(own, p, 0.0)
        d_s = tl.where(own, d_s, 0.0)
    d_q = _weighted(as_operand(d_s.to(dtype), REORDER), values, d_q, PRECISION)
    if NEED_INPUT:
        p_t = tl.trans(p.to(dtype))
        d_s_t = tl.trans(d_s.to(dtype))
        for i in tl.static_range(len(q)):
            d_x = dot(p_t, d_z_right[i], tl.zeros((KEYS, BLOCK), acc), PRECISION)
            d_x = dot(d_s_t, q_right[i], d_x, PRECISION)
            _add_block(scratch, d_x, 0, i * BLOCK, keys, tl.arange(0, BLOCK), E, age, BLOCK if PACK > 1 else F, E)
    return d_q


@triton.jit
def backward(
    grad,  # (B, F, O), any strides
    x,  # (B, F, E), any strides
    weights,  # packed, fp32 or fp64
    mask,
    out,  # (B, F, O), contiguous
    d_x,  # (B, F, E), contiguous
    partial,  # (programs, size of weights)
    scratch,  # (programs, F or 16, E)
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
    O: tl.constexpr,
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
    size: tl.constexpr = (E + 1 + O) * H * E + (E + 2) * O
    pid = tl.program_id(0)
    partial += tl.cast(pid, tl.int64) * size
    scratch += tl.cast(pid, tl.int64) * (tile_rows * E)
    residual: tl.constexpr = (E + 1 + O) * H * E
    for t in tl.range(pid, (batch + PACK - 1) // PACK, tl.num_programs(0)):
        tile = tl.cast(t, tl.int64)
        if (NEED_INPUT or NEED_SCORES) or NEED_VALUES:
            for h in tl.range(H):
                for first_row in tl.range(0, tile_rows, ROWS):
                    i = tl.arange(0, BLOCK) + (t + first_row) * nought
                    age = h + first_row
                    age_of_head = t - pid + first_row
                    rows = first_row + tl.arange(0, ROWS) + t * nought
                    x_rows = _load_chunks(x, rows, tile, batch, x_sb, x_sf, x_se, F, E, PACK)
                    d_y = _load_output_gradient(grad, out, rows, tile, batch, d_sb, d_sf, d_so, F, O, PACK, acc)
                    q = _queries(x_rows, weights, h, i, E, H, PRECISION, REORDER)
                    m_h = (E + 1) * H * E + h * E * O
                    d_z = ()
                    if NEED_INPUT or NEED_SCORES:
                        for e in tl.static_range(0, E, BLOCK):
                            d_z_e = tl.zeros((ROWS, BLOCK), acc)
                            for o in tl.static_range(len(d_y)):
                                m_t = load_transposed(weights + m_h, e, o * BLOCK, restoring(i, REORDER), i, O, E, O)
                                d_z_e = dot(d_y[o], m_t.to(dtype), d_z_e, PRECISION)
                            d_z = d_z + (as_operand(d_z_e.to(dtype), REORDER),)
                    reference, _, scale, delta, z = _attend(
                        q, d_z, rows, x, mask, tile, batch, x_sb, x_sf, x_se, m_sb, m_sq, m_sk, key_end,
                        F, E, KEYS, TAIL, PACK, MASK, PRECISION, REORDER, EXACT, acc,
                    )  # fmt: skip
                    if PACK > 1:
                        spoilt = ()
                        bad = tl.zeros((BLOCK,), acc)
                        for e in tl.static_range(len(x_rows)):
                            bad += poison(x_rows[e], PACK, acc)
                        for e in tl.static_range(len(z)):
                            spoilt = spoilt + (z[e] + bad[:, None],)
                        z = spoilt
                    if NEED_VALUES:
                        for e in tl.static_range(len(z)):
                            z_t = tl.trans(z[e].to(dtype))
                            for o in tl.static_range(len(d_y)):
                                d_m = dot(z_t, d_y[o], tl.zeros((BLOCK, BLOCK), acc), PRECISION)
                                _add_block(partial + m_h, d_m, e * BLOCK, o * BLOCK, i, i, O, age_of_head, E, O)
                    if NEED_INPUT or NEED_SCORES:
                        d_z_right = ()
                        q_right = ()
                        d_q = ()
                        for e in tl.static_range(len(q)):
                            d_z_right = d_z_right + (finite(d_z[e], PACK, acc),)
                            q_right = q_right + (finite(q[e], PACK, acc),)
                            d_q = d_q + (tl.zeros((ROWS, BLOCK), acc),)
                        for first in tl.range(0, key_end, KEYS):
                            d_q = _differentiate_keys(
                                q, q_right, d_z, d_z_right, d_q, reference, scale, delta, first, rows,
                                age, scratch, x, mask, tile, batch, x_sb, x_sf, x_se, m_sb, m_sq, m_sk,
                                F, E, KEYS, True, PACK, MASK, NEED_INPUT, PRECISION, REORDER,
                            )  # fmt: skip
                        d_q = _differentiate_keys(
                            q, q_right, d_z, d_z_right, d_q, reference, scale, delta, key_end, rows,
                            age, scratch, x, mask, tile, batch, x_sb, x_sf, x_se, m_sb, m_sq, m_sk,
                            F, E, TAIL, False, PACK, MASK, NEED_INPUT, PRECISION, REORDER,
                        )  # fmt: skip
                        if NEED_INPUT:
                            tl.debug_barrier()
                            for e in tl.static_range(len(d_q)):
                                d_x_e = tl.zeros((ROWS, BLOCK), acc)
                                for j in tl.static_range(len(d_q)):
                                    d_q_j = as_operand(d_q[j].to(dtype), REORDER)
                                    columns = reordered(i, REORDER)
                                    a_t = load_transposed(
                                        weights + h * E, e * BLOCK, j * BLOCK, i, columns, H * E, E, E
                                    )
                                    d_x_e = dot(d_q_j, a_t.to(dtype), d_x_e, PRECISION)
                                _add_block(scratch, d_x_e, 0, e * BLOCK, rows, i, E, 1, tile_rows, E)
                            tl.debug_barrier()
                        if NEED_SCORES:
                            # Loaded again rather than kept over the loops: registers are what is short.
                            x_rows = _load_chunks(x, rows, tile, batch, x_sb, x_sf, x_se, F, E, PACK)
                            for j in tl.static_range(len(d_q)):
                                _add_vector(
                                    partial + E * H * E + h * E,
                                    tl.sum(d_q[j], 0),
                                    j * BLOCK,
                                    i,
                                    age_of_head,
                                    E,
                                )
                                d_q_j = d_q[j].to(dtype)
                                for e in tl.static_range(len(x_rows)):
                                    d_a = dot(tl.trans(x_rows[e]), d_q_j, tl.zeros((BLOCK, BLOCK), acc), PRECISION)
                                    _add_block(
                                        partial + h * E,
                                        d_a,
                                        e * BLOCK,
                                        j * BLOCK,
                                        i,
                                        i,
                                        H * E,
                                        age_of_head,
                                        E,
                                        E,
                                    )
        for first_row in tl.range(0, tile_rows, ROWS):
            i = tl.arange(0, BLOCK) + (t + first_row) * nought
            age = t - pid + first_row
            rows = first_row + tl.arange(0, ROWS) + t * nought
            d_y = _load_output_gradient(grad, out, rows, tile, batch, d_sb, d_sf, d_so, F, O, PACK, acc)
            x_rows = _load_chunks(x, rows, tile, batch, x_sb, x_sf, x_se, F, E, PACK)
            for o in tl.static_range(len(d_y)):
                if NEED_BIAS:
                    d_b = tl.sum(d_y[o].to(acc), 0)
                    d_g = d_b
                    if MASK != MASK_NONE:
                        seen = _sees_a_key(mask, rows, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
                        d_g = tl.sum(tl.where(seen[:, None], d_y[o].to(acc), 0.0), 0)
                    _add_vector(partial + residual + E * O, d_b, o * BLOCK, i, age, O)
                    _add_vector(partial + residual + (E + 1) * O, d_g, o * BLOCK, i, age, O)
                if NEED_RESIDUAL:
                    for e in tl.static_range(len(x_rows)):
                        d_r = dot(tl.trans(x_rows[e]), d_y[o], tl.zeros((BLOCK, BLOCK), acc), PRECISION)
                        _add_block(partial + residual, d_r, e * BLOCK, o * BLOCK, i, i, O, age, E, O)
            if NEED_INPUT:
                for e in tl.static_range(len(x_rows)):
                    inside = (rows[:, None] < tile_rows) & (i[None, :] < E - e * BLOCK)
                    pointers = block_pointers(scratch, 0, e * BLOCK, rows, i, E)
                    d_x_e = tl.load(pointers, mask=inside, other=0.0)
                    for o in tl.static_range(len(d_y)):
                        r_t = load_transposed(weights + residual, e * BLOCK, o * BLOCK, i, i, O, E, O)
                        d_x_e = dot(d_y[o], r_t.to(dtype), d_x_e, PRECISION)
                    offsets, exists = row_offsets(rows, tile, batch, F * E, E, F, PACK)
                    tl.store(
                        d_x + offsets[:, None] + i[None, :] + e * BLOCK,
                        d_x_e.to(d_x.dtype.element_ty),
                        mask=exists[:, None] & (i[None, :] < E - e * BLOCK),
                    )
        tl.debug_barrier()
