"""Attention over keys in memory, and the forward of every layout that does not stay on chip.

A block of rows walks over blocks of keys, read from memory (the first-level cache, mostly) as often as they are needed,
so the registers in use depend on the widths alone. Widths are tuples of 16-column chunks.

Folded, the keys and values are x itself. Factored, a program first projects those of all heads of its tile into a row
of `projected` of its own, and reads them from there: they are needed once per block of rows. From then on the two forms
differ in pointers and strides only, `keys_from`, `values_from`, k_sb, k_sf, k_se, and in the tile's number there,
`key_tile`.
"""

import triton
import triton.language as tl

from .triton_math import (
    BARE,
    BLOCK,
    IDENTITY,
    MASK_NONE,
    MERGED,
    NEG_INF,
    PROJECTION,
    as_operand,
    as_operands,
    column_run,
    dot,
    finite,
    from_quads,
    hide,
    load_block,
    load_ceiling,
    load_rows,
    load_vector,
    multiply,
    operands,
    operands_of,
    own_keys,
    poison,
    quad_order,
    relu_words,
    reordered,
    restoring,
    right_operand,
    row_offsets,
    row_reference,
    row_scale,
    score_start,
)
from .triton_unshifted import (
    add_keys,
    certain,
    doubt_sums,
    doubt_values,
    doubtful_samples,
    no_doubt,
    ones_of,
    own_samples,
    scales_of_rows,
    start_scores,
    sums_of_rows,
)


@triton.jit
def _power(exponent):
    """2^exponent, for small numbers from 0 on."""
    return (1 << exponent).to(tl.float32)


@triton.jit
def _store_relu_mask(
    stopped, relu_mask, offsets, exists, QUADS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The outputs whose gradient relu does not let pass, `stopped` [R, 16], as the zero bits of a word of each row.

    The tensor core adds up the others, exactly: no thread has all of a row. DTYPE: of its operands, 16 bits.
    """
    # 2^c is 2 to what the thread adds to c, one number for all of its registers, times 2 to what the register adds, a
    # constant.
    i = tl.arange(0, BLOCK)
    thread = i % 8 // 2
    if QUADS:
        of_thread = thread * 4
        of_register = i // 8 * 2 + i % 2
    else:
        of_thread = thread * 2
        of_register = i // 8 * 8 + i % 2
    passed = tl.where(stopped, 0.0, _power(of_register)[None, :]).to(DTYPE)
    powers = tl.broadcast_to(_power(of_thread).to(DTYPE)[:, None], (BLOCK, 8))
    # On top of 2^23 an fp32 number ends in the bits of an integer.
    bits = tl.dot(passed, powers, tl.full((stopped.shape[0], 8), 8388608.0, tl.float32), out_dtype=tl.float32)
    words = sums_of_rows(bits).to(tl.int32, bitcast=True).to(tl.int16)
    copy = tl.arange(0, 4)[None, :]
    tl.store(relu_mask + offsets[:, None] + copy * 0, words, mask=exists[:, None] & (copy == 0))


@triton.jit
def store_output(
    y, outputs, rows, head, first, wanted, tile, batch, F: tl.constexpr, O: tl.constexpr, WIDTH: tl.constexpr,
    PACK: tl.constexpr, RELU: tl.constexpr, RUN: tl.constexpr, QUADS: tl.constexpr = False,
):  # fmt: skip
    """y [R, 16] or its relu into a contiguous (B, F, O), from column `first` on of a head's WIDTH; NaN stays NaN.

    outputs: the tensor, and `relu_mask` where it is kept. wanted: (), or of which rows [R]. A thread writes RUN columns
    at most. QUADS: the columns of y are in that order.
    """
    out = outputs[0]
    dtype: tl.constexpr = out.dtype.element_ty
    offsets, exists = row_offsets(rows, tile, batch, F * O, O, F, PACK)
    if len(wanted) > 0:
        exists = exists & wanted[0]
    if RELU:
        stopped = y <= 0.0
        y = tl.where(stopped, 0.0, y)
        if len(outputs) > 1:
            words: tl.constexpr = relu_words(O, WIDTH)
            if words * BLOCK == O:
                at = offsets // BLOCK
            else:
                at, _ = row_offsets(rows, tile, batch, F * words, words, F, PACK)
            relu_mask = outputs[1] + head * (words * WIDTH // O) + first // BLOCK
            half: tl.constexpr = tl.bfloat16 if dtype.is_bf16() else tl.float16
            _store_relu_mask(stopped, relu_mask, at, exists, QUADS, half)
    y = y.to(dtype)
    if QUADS:
        y = from_quads(y)
    o = first + column_run(RUN)
    inside = exists[:, None]
    if WIDTH % BLOCK != 0:
        inside = inside & (o[None, :] < WIDTH)
    tl.store(out + head * WIDTH + offsets[:, None] + o[None, :], y, mask=inside)


@triton.jit
def load_chunks(
    pointer, rows, tile, batch, s_b, s_f, s_e, F: tl.constexpr, WIDTH: tl.constexpr, PACK: tl.constexpr,
    RUN: tl.constexpr = 16,
):  # fmt: skip
    """Rows of a tile, as a tuple of 16-column chunks [R, 16]."""
    chunks = ()
    for e in tl.static_range(0, WIDTH, BLOCK):
        chunks = chunks + (load_rows(pointer, rows, e, tile, batch, s_b, s_f, s_e, F, WIDTH, PACK, RUN),)
    return chunks


@triton.jit
def project_keys(
    x, weights, projected, i, tile, batch, x_sb, x_sf, x_se, F: tl.constexpr, E: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, PACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys x k and values x v of all heads of a tile into `projected` (PACK, F, 2, H, D), to be read from there."""
    dtype: tl.constexpr = x.dtype.element_ty
    for first in tl.range(0, BLOCK if PACK > 1 else F, BLOCK):
        x_rows = load_chunks(x, first + i, tile, batch, x_sb, x_sf, x_se, F, E, PACK)
        offsets, exists = row_offsets(first + i, 0, PACK, F * 2 * H * D, 2 * H * D, F, PACK)
        for part in tl.static_range(2):
            for column in tl.range(0, H * D, BLOCK):
                y = tl.zeros((BLOCK, BLOCK), weights.dtype.element_ty)
                for e in tl.static_range(len(x_rows)):
                    of_part = weights + (E + 1 + part * E) * H * D
                    w = load_block(of_part, e * BLOCK, column, i, i, H * D, E, H * D)
                    y = dot(x_rows[e], w.to(dtype), y, PRECISION)
                pointers = projected + offsets[:, None] + (i[None, :] + part * H * D + column)
                tl.store(pointers, y.to(dtype), mask=exists[:, None] & (i[None, :] < H * D - column))
    tl.debug_barrier()


@triton.jit
def queries(
    x_rows,  # chunks of E [R, 16]
    weights,
    h,
    i,  # 0 to 15
    columns,  # the same in the order that the columns of q are to have
    E: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q_h = x A_h + c_h as chunks of D [R, 16]."""
    n_rows: tl.constexpr = x_rows[0].shape[0]
    dtype: tl.constexpr = x_rows[0].dtype
    q = ()
    for j in tl.static_range(0, D, BLOCK):
        c = load_vector(weights + E * H * D + h * D, j, columns, D)
        q_j = tl.broadcast_to(c[None, :], (n_rows, BLOCK))
        for e in tl.static_range(len(x_rows)):
            a = load_block(weights + h * D, e * BLOCK, j, i, columns, H * D, E, D)
            q_j = dot(x_rows[e], a.to(dtype), q_j, PRECISION)
        q = q + (q_j.to(dtype),)
    return q


@triton.jit
def scores(
    left,  # chunks of D [R, 16]; as QUADS, their columns in the order of `right_operand`
    right,  # chunks of D [K, 16]
    start,  # [R, K]
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
    QUADS: tl.constexpr,
):
    """start + left right^T, rounded as wherever P or dP is computed, or delta is not of them. [R, K]"""
    for i in tl.static_range(len(left)):
        if QUADS:
            right_t = right_operand(right[i], REORDER)
        else:
            right_t = tl.trans(right[i])
        start = multiply(operands(left[i], PRECISION), operands(right_t, PRECISION), start, PRECISION)
    return start


@triton.jit
def weighted(
    weighting,  # [R, K], ready to be a left operand
    ordered,  # chunks of D [K, 16], in the order of its columns
    start,  # chunks of D [R, 16]
    PRECISION: tl.constexpr,
):
    """start + weighting ordered, chunk by chunk."""
    sums = ()
    for i in tl.static_range(len(ordered)):
        sums = sums + (dot(weighting, ordered[i], start[i], PRECISION),)
    return sums


@triton.jit
def load_keys(
    pointer, first, tile, batch, s_b, s_f, s_e, F: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
    PACK: tl.constexpr, REORDER: tl.constexpr, ACC: tl.constexpr, RUN: tl.constexpr = 16,
):  # fmt: skip
    """The rows of a block of keys or values, and the same, finite, in the order `reordered`: chunks of D [K, 16]."""
    k = tl.arange(0, KEYS)
    natural = load_chunks(pointer, first + k, tile, batch, s_b, s_f, s_e, F, D, PACK, RUN)
    ordered = natural
    if REORDER:
        order = first + reordered(k, REORDER)
        ordered = load_chunks(pointer, order, tile, batch, s_b, s_f, s_e, F, D, PACK, RUN)
    clean = ()
    for i in tl.static_range(len(ordered)):
        clean = clean + (finite(ordered[i], PACK, ACC),)
    return natural, clean


@triton.jit
def _attend_keys(
    q,
    d_z,  # chunks of D [R, 16] in a backward, else ()
    row_max,  # [R] so far
    row_sum,
    delta,
    z,  # chunks of D [R, 16]
    first,
    rows,
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
    D: tl.constexpr,
    FACTORED: tl.constexpr,
    KEYS: tl.constexpr,
    FULL: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
    RUN: tl.constexpr,
    QUADS: tl.constexpr,
):
    """One step of the online softmax, over the keys from `first` on."""
    acc: tl.constexpr = z[0].dtype
    fields = first + tl.arange(0, KEYS)
    keys, ordered = load_keys(keys_from, first, key_tile, batch, k_sb, k_sf, k_se, F, D, KEYS, PACK, REORDER, acc, RUN)
    values = keys
    if FACTORED:
        values, ordered = load_keys(
            values_from, first, key_tile, batch, k_sb, k_sf, k_se, F, D, KEYS, PACK, REORDER, acc, RUN
        )
    s = scores(q, keys, score_start(rows, fields, F, PACK, FULL, acc), PRECISION, REORDER, QUADS)
    ceiling = load_ceiling(mask, rows, fields, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
    s = hide(s, ceiling, rows, fields, F, PACK, MASK)
    new_max = tl.maximum(row_max, tl.max(s, 1))
    reference = row_reference(new_max, MASK)
    p = tl.exp2(s - reference[:, None])
    decay = tl.exp2(row_max - reference)
    decayed = ()
    for i in tl.static_range(len(z)):
        decayed = decayed + (z[i] * decay[:, None],)
    z = weighted(as_operand(p.to(q[0].dtype), REORDER), ordered, decayed, PRECISION)
    if len(d_z) > 0:
        d_p = scores(d_z, values, tl.zeros((q[0].shape[0], KEYS), acc), PRECISION, REORDER, QUADS)
        if PACK > 1:
            d_p = tl.where(own_keys(rows, fields, F, PACK), d_p, 0.0)
        delta = delta * decay + tl.sum(p * d_p, 1)
    return new_max, row_sum * decay + tl.sum(p, 1), delta, z


@triton.jit
def attend(
    q,
    d_z,
    rows,
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
    key_end,
    F: tl.constexpr,
    D: tl.constexpr,
    FACTORED: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
    EXACT: tl.constexpr,
    ACC: tl.constexpr,
    RUN: tl.constexpr,
    QUADS: tl.constexpr,
):
    """Over every key: what was subtracted from the scores, the rows' sums and their reciprocals, and, given dz,
    delta = sum over keys of P dP [R]; and z = P values.

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
            q, d_z, row_max, row_sum, delta, z, first, rows, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask,
            tile, batch, m_sb, m_sq, m_sk, F, D, FACTORED, KEYS, True, PACK, MASK, PRECISION, REORDER, RUN, QUADS,
        )  # fmt: skip
    row_max, row_sum, delta, z = _attend_keys(
        q, d_z, row_max, row_sum, delta, z, key_end, rows, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask,
        tile, batch, m_sb, m_sq, m_sk, F, D, FACTORED, TAIL, False, PACK, MASK, PRECISION, REORDER, RUN, QUADS,
    )  # fmt: skip
    scale = row_scale(row_sum, MASK, EXACT)
    scaled = ()
    for i in tl.static_range(len(z)):
        scaled = scaled + (z[i] * scale[:, None],)
    if PACK > 1:
        own_values = load_chunks(values_from, rows, key_tile, batch, k_sb, k_sf, k_se, F, D, PACK, RUN)
        bad = tl.zeros((BLOCK,), ACC)
        for i in tl.static_range(len(own_values)):
            bad += poison(own_values[i], PACK, ACC)
        spoilt = ()
        for i in tl.static_range(len(scaled)):
            spoilt = spoilt + (scaled[i] + bad[:, None],)
        scaled = spoilt
    return row_reference(row_max, MASK), row_sum, scale, delta * scale, scaled


@triton.jit
def _attend_keys_unshifted(
    z,  # chunks of D [R, 16]
    sums,  # [R, 8]
    running,  # of a backward that wants delta, the sums of P and of P dP [R]; else ()
    q,  # chunks of D, operands of [R, 16]
    d_z,  # the same in a backward that wants delta, of samples that are not packed; else ()
    first,
    rows,
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
    D: tl.constexpr,
    FACTORED: tl.constexpr,
    KEYS: tl.constexpr,
    THERE: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
    RUN: tl.constexpr,
):
    """One step over the keys from `first` on, of which THERE exist; packed, of each sample's."""
    k = tl.arange(0, KEYS)
    order = reordered(k, REORDER)
    # Rows of the block and a number for all of it: of the addresses only the number is new in each step.
    skipped = tl.cast(first, tl.int64) * k_sf
    natural = load_chunks(keys_from + skipped, k, key_tile, batch, k_sb, k_sf, k_se, THERE, D, PACK, RUN)
    ordered = natural
    if FACTORED or REORDER:
        ordered = load_chunks(values_from + skipped, order, key_tile, batch, k_sb, k_sf, k_se, THERE, D, PACK, RUN)
    in_order = natural
    if FACTORED and len(d_z) > 0:
        in_order = load_chunks(values_from + skipped, k, key_tile, batch, k_sb, k_sf, k_se, THERE, D, PACK, RUN)
    keys = ()
    values = ()
    for i in tl.static_range(len(natural)):
        keys = keys + (operands(right_operand(natural[i], REORDER), PRECISION),)
        values = values + (operands(ordered[i], PRECISION),)
    start = start_scores(mask, rows, first + k, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, sums.dtype)
    ones = ones_of(order, THERE, KEYS if PACK == 1 else BLOCK // PACK, natural[0].dtype)
    counts = own_samples(rows, k, PACK)
    z, sums, p = add_keys(z, sums, q, keys, values, ones, start, counts, PRECISION, REORDER, len(d_z) > 0)
    if len(d_z) > 0:
        d_p = tl.zeros((rows.shape[0], KEYS), sums.dtype)
        for i in tl.static_range(len(natural)):
            d_p = multiply(d_z[i], operands(right_operand(in_order[i], REORDER), PRECISION), d_p, PRECISION)
        if THERE < KEYS:
            p = tl.where((k < THERE)[None, :], p, 0.0)
        running = (running[0] + tl.sum(p, 1), running[1] + tl.sum(p * d_p, 1))
    return z, sums, running


@triton.jit
def attend_unshifted(
    q,  # chunks of D [R, 16], their columns in the order of `right_operand`
    d_z,  # the same in a backward that wants delta, else ()
    doubt,  # [R, 4]
    rows,
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
    key_end,
    F: tl.constexpr,
    D: tl.constexpr,
    FACTORED: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
    EXACT: tl.constexpr,
    ACC: tl.constexpr,
    RUN: tl.constexpr,
):
    """As `attend`, without row maxima: z, the rows' sums [R, 4], delta [R], given dz, and doubt of all of it but z."""
    n_rows: tl.constexpr = q[0].shape[0]
    dtype: tl.constexpr = q[0].dtype
    left = operands_of(q, PRECISION)
    d_z_left = operands_of(d_z, PRECISION)
    z = ()
    for _ in tl.static_range(len(q)):
        z = z + (tl.zeros((n_rows, BLOCK), ACC),)
    sums = tl.zeros((n_rows, 8), ACC)
    running = ()
    if len(d_z) > 0:
        running = (tl.zeros((n_rows,), ACC), tl.zeros((n_rows,), ACC))
    for first in tl.range(0, key_end, KEYS):
        z, sums, running = _attend_keys_unshifted(
            z, sums, running, left, d_z_left, first, rows, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask,
            tile, batch, m_sb, m_sq, m_sk, F, D, FACTORED, KEYS, KEYS, PACK, MASK, PRECISION, REORDER, RUN,
        )  # fmt: skip
    z, sums, running = _attend_keys_unshifted(
        z, sums, running, left, d_z_left, key_end, rows, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, tile,
        batch, m_sb, m_sq, m_sk, F, D, FACTORED, TAIL, (F - 1) % KEYS + 1, PACK, MASK, PRECISION, REORDER, RUN,
    )  # fmt: skip
    total = sums_of_rows(sums)
    doubt = doubt_sums(doubt, total, dtype)
    scale = scales_of_rows(total, EXACT)
    scaled = ()
    for i in tl.static_range(len(z)):
        scaled = scaled + (z[i] * scale,)
    delta = tl.zeros((n_rows,), ACC)
    if len(d_z) > 0:
        # What the tensor core adds up lacks the last bits of P. A row of dS sums to zero only if these count.
        total = tl.broadcast_to(running[0][:, None], (n_rows, 4))
        delta = running[1] / running[0]
        # Products with P as it comes may overflow where those with P normalised do not.
        enormous = tl.broadcast_to((tl.abs(running[1]) + 1.0)[:, None], (n_rows, 4))
        doubt = doubt_sums(doubt, enormous, dtype)
    return scaled, total, delta, doubt


@triton.jit
def _start_output(
    x, x_rows, weights, rows, tile, batch, x_sb, x_sf, x_se, first, F: tl.constexpr, E: tl.constexpr,
    O: tl.constexpr, RESIDUAL: tl.constexpr, HEAD_OUT: tl.constexpr, AT_R: tl.constexpr, AT_B: tl.constexpr,
    PACK: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """All but the heads of the output's columns from `first` on, chunks of HEAD_OUT [R, 16]; g only without a mask."""
    i = tl.arange(0, BLOCK)
    n_rows: tl.constexpr = x_rows[0].shape[0]
    y = ()
    for o in tl.static_range(0, HEAD_OUT, BLOCK):
        b = load_vector(weights + AT_B + first, o, i, HEAD_OUT)
        if MASK == MASK_NONE:
            b += load_vector(weights + AT_B + O + first, o, i, HEAD_OUT)
        y_o = tl.broadcast_to(b[None, :], (n_rows, BLOCK))
        if RESIDUAL == PROJECTION:
            for e in tl.static_range(len(x_rows)):
                r = load_block(weights + AT_R + first, e * BLOCK, o, i, i, O, E, HEAD_OUT)
                y_o = dot(x_rows[e], r.to(x_rows[e].dtype), y_o, PRECISION)
        elif RESIDUAL == IDENTITY:
            columns = x + tl.cast(first, tl.int64) * x_se
            x_o = load_rows(columns, rows, o, tile, batch, x_sb, x_sf, x_se, F, HEAD_OUT, PACK, RUN)
            y_o += x_o.to(y_o.dtype)
        y = y + (y_o,)
    return y


@triton.jit
def _add_head(
    y,  # chunks of HEAD_OUT [R, 16]
    doubt,  # [R, 4]
    x_rows,
    h,
    rows,
    weights,
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
    key_end,
    F: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    FACTORED: tl.constexpr,
    OUTPUT: tl.constexpr,
    HEAD_OUT: tl.constexpr,
    AT_M: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
    EXACT: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    SHIFTED: tl.constexpr,
    RUN: tl.constexpr,
):
    """y + z_h m_h, or y + z_h, the rows' sums of exponentials (0: every key hidden), and doubt of all of it."""
    dtype: tl.constexpr = x_rows[0].dtype
    i = tl.arange(0, BLOCK)
    if FACTORED:
        keys_from += h * D
        values_from += h * D
    columns = restoring(i, REORDER) if SHIFTED else quad_order(i)
    q = as_operands(queries(x_rows, weights, h, i, columns, E, H, D, PRECISION), REORDER)
    if SHIFTED:
        _, row_sum, _, _, z = attend(
            q, (), rows, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, tile, batch, m_sb, m_sq, m_sk,
            key_end, F, D, FACTORED, KEYS, TAIL, PACK, MASK, PRECISION, REORDER, EXACT, y[0].dtype, RUN, False,
        )  # fmt: skip
    else:
        row_sum = tl.full((rows.shape[0],), 1.0, y[0].dtype)
        z, _, _, doubt = attend_unshifted(
            q, (), doubt, rows, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, tile, batch, m_sb, m_sq, m_sk,
            key_end, F, D, FACTORED, KEYS, TAIL, PACK, MASK, PRECISION, REORDER, EXACT, y[0].dtype, RUN,
        )  # fmt: skip
    if OUTPUT == BARE:
        added = ()
        for o in tl.static_range(len(y)):
            added = added + (y[o] + z[o],)
        y = added
    else:
        m_h = weights + AT_M + h * D * HEAD_OUT
        for e in tl.static_range(len(z)):
            z_e = as_operand(z[e].to(dtype), REORDER)
            added = ()
            for o in tl.static_range(len(y)):
                m = load_block(m_h, e * BLOCK, o * BLOCK, reordered(i, REORDER), i, HEAD_OUT, D, HEAD_OUT)
                added = added + (dot(z_e, m.to(dtype), y[o], PRECISION),)
            y = added
    if not SHIFTED:
        for o in tl.static_range(len(y) if OUTPUT == BARE else 1):
            doubt = doubt_values(doubt, y[o], dtype, OUTPUT == BARE)
    return y, row_sum, doubt


@triton.jit
def _store_columns(
    y, row_sum, weights, outputs, rows, head, wanted, tile, batch, F: tl.constexpr, O: tl.constexpr,
    HEAD_OUT: tl.constexpr, AT_B: tl.constexpr, PACK: tl.constexpr, MASK: tl.constexpr, RELU: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """A head's columns of the output, or all, finished and stored; with a mask, rows with a key to see still lack g."""
    i = tl.arange(0, BLOCK)
    for o in tl.static_range(len(y)):
        y_o = y[o]
        if MASK != MASK_NONE:
            g = load_vector(weights + AT_B + O + head * HEAD_OUT, o * BLOCK, i, HEAD_OUT)
            y_o += tl.where((row_sum == 0.0)[:, None], 0.0, g[None, :])
        store_output(y_o, outputs, rows, head, o * BLOCK, wanted, tile, batch, F, O, HEAD_OUT, PACK, RELU, RUN)


@triton.jit
def forward_rows(
    x,
    weights,
    keys_from,
    values_from,
    key_tile,
    k_sb,
    k_sf,
    k_se,
    mask,
    outputs,
    rows,
    wanted,  # (), or which rows to store [R]
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
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
    EXACT: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    SHIFTED: tl.constexpr,
    RUN: tl.constexpr,
):
    """Every head for one block of rows, stored at the end, or head by head where each has columns of its own.

    Not SHIFTED by the maxima of the rows, it gives the doubt there is of the result. [R, 4]
    """
    doubt = no_doubt(rows.shape[0])
    x_rows = load_chunks(x, rows, tile, batch, x_sb, x_sf, x_se, F, E, PACK, RUN)
    if OUTPUT == MERGED:
        y = _start_output(
            x, x_rows, weights, rows, tile, batch, x_sb, x_sf, x_se, 0,
            F, E, O, RESIDUAL, HEAD_OUT, AT_R, AT_B, PACK, MASK, PRECISION, RUN,
        )  # fmt: skip
        row_sum = tl.zeros((rows.shape[0],), y[0].dtype)
        for h in tl.range(H):
            y, row_sum, doubt = _add_head(
                y, doubt, x_rows, h, rows, weights, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, tile,
                batch, m_sb, m_sq, m_sk, key_end, F, E, H, D, FACTORED, OUTPUT, HEAD_OUT, AT_M, PACK, MASK, PRECISION,
                REORDER, EXACT, KEYS, TAIL, SHIFTED, RUN,
            )  # fmt: skip
        _store_columns(
            y, row_sum, weights, outputs, rows, 0, wanted, tile, batch, F, O, HEAD_OUT, AT_B, PACK, MASK, RELU, RUN
        )
    else:
        for h in tl.range(H):
            first = h * HEAD_OUT
            y = _start_output(
                x, x_rows, weights, rows, tile, batch, x_sb, x_sf, x_se, first,
                F, E, O, RESIDUAL, HEAD_OUT, AT_R, AT_B, PACK, MASK, PRECISION, RUN,
            )  # fmt: skip
            y, row_sum, doubt = _add_head(
                y, doubt, x_rows, h, rows, weights, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, tile,
                batch, m_sb, m_sq, m_sk, key_end, F, E, H, D, FACTORED, OUTPUT, HEAD_OUT, AT_M, PACK, MASK, PRECISION,
                REORDER, EXACT, KEYS, TAIL, SHIFTED, RUN,
            )  # fmt: skip
            _store_columns(
                y, row_sum, weights, outputs, rows, h, wanted, tile, batch, F, O, HEAD_OUT, AT_B, PACK, MASK, RELU, RUN
            )
    return doubt


@triton.jit
def recompute(
    doubt, x, weights, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, outputs, first, end, tile, batch,
    x_sb, x_sf, x_se, m_sb, m_sq, m_sk, key_end, F: tl.constexpr, E: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    O: tl.constexpr, FACTORED: tl.constexpr, OUTPUT: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    HEAD_OUT: tl.constexpr, AT_M: tl.constexpr, AT_R: tl.constexpr, AT_B: tl.constexpr, PACK: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr, REORDER: tl.constexpr, EXACT: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Where there is doubt, the rows from `first` to `end`, shifted by their maxima, in blocks of 16 rows and keys.

    Of packed samples it stores those that are doubted. (What is not finite spoils a whole tile, which then is.)
    key_end: where the full blocks of 16 keys end. P: the type of the exponentials that are doubted.
    """
    wanted = ()
    if PACK > 1:
        wanted = (doubtful_samples(doubt, PACK, P),)
    for row in tl.range(first, tl.where(certain(doubt, P), first, end), BLOCK):
        # What is stored here was stored before, perhaps by other threads.
        tl.debug_barrier()
        forward_rows(
            x, weights, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, outputs, row + tl.arange(0, BLOCK),
            wanted, tile, batch, x_sb, x_sf, x_se, m_sb, m_sq, m_sk, key_end, F, E, H, D, O, FACTORED, OUTPUT,
            RESIDUAL, RELU, HEAD_OUT, AT_M, AT_R, AT_B, PACK, MASK, PRECISION, REORDER, EXACT, BLOCK, BLOCK, True, 4,
        )  # fmt: skip


@triton.jit
def _forward_block(
    x, weights, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, outputs, first, tile, batch, x_sb, x_sf, x_se,
    m_sb, m_sq, m_sk, key_end, F: tl.constexpr, E: tl.constexpr, H: tl.constexpr, D: tl.constexpr, O: tl.constexpr,
    FACTORED: tl.constexpr, OUTPUT: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, HEAD_OUT: tl.constexpr,
    AT_M: tl.constexpr, AT_R: tl.constexpr, AT_B: tl.constexpr, PACK: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr, REORDER: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    TAIL: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """ROWS rows from `first` on; not SHIFTED, then once more, shifted and 16 at a time, where there was doubt."""
    run: tl.constexpr = 16 if SHIFTED else 4
    doubt = forward_rows(
        x, weights, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, outputs, first + tl.arange(0, ROWS),
        (), tile, batch, x_sb, x_sf, x_se, m_sb, m_sq, m_sk, key_end, F, E, H, D, O, FACTORED, OUTPUT, RESIDUAL, RELU,
        HEAD_OUT, AT_M, AT_R, AT_B, PACK, MASK, PRECISION, REORDER, EXACT, KEYS, TAIL, SHIFTED, run,
    )  # fmt: skip
    if not SHIFTED:
        recompute(
            doubt, x, weights, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, outputs, first, first + ROWS,
            tile, batch, x_sb, x_sf, x_se, m_sb, m_sq, m_sk, key_end + (F - 1) % KEYS - (F - 1) % BLOCK, F, E, H, D,
            O, FACTORED, OUTPUT, RESIDUAL, RELU, HEAD_OUT, AT_M, AT_R, AT_B, PACK, MASK, PRECISION, REORDER, EXACT,
            x.dtype.element_ty,
        )  # fmt: skip


@triton.jit
def forward_streaming(
    x,  # (B, F, E), any strides
    weights,  # packed, fp32 or fp64
    mask,  # bool, strides 0 where it broadcasts; anything where MASK is MASK_NONE
    out,  # (B, F, O), contiguous
    relu_mask,  # int16 (B, F, relu_words), contiguous
    projected,  # (programs, PACK, F, 2, H, D); anything where folded
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
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    SHIFTED: tl.constexpr,
    KEEP_RELU: tl.constexpr,
):
    """Each program walks over pairs of a tile and a block of ROWS rows; factored, over tiles."""
    tile_rows: tl.constexpr = BLOCK if PACK > 1 else F
    row_blocks: tl.constexpr = (tile_rows + ROWS - 1) // ROWS
    tiles = (batch + PACK - 1) // PACK
    outputs = (out,)
    if KEEP_RELU:
        outputs = (out, relu_mask)
    if FACTORED:
        k_sf: tl.constexpr = 2 * H * D
        projected += tl.cast(tl.program_id(0), tl.int64) * (PACK * F * k_sf)
        for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            tile = tl.cast(t, tl.int64)
            i = tl.arange(0, BLOCK)
            project_keys(x, weights, projected, i, tile, batch, x_sb, x_sf, x_se, F, E, H, D, PACK, PRECISION)
            for first in tl.range(0, tile_rows, ROWS):
                _forward_block(
                    x, weights, projected, projected + H * D, tile * 0, F * k_sf, k_sf, 1, mask, outputs, first, tile,
                    batch, x_sb, x_sf, x_se, m_sb, m_sq, m_sk, key_end, F, E, H, D, O, FACTORED, OUTPUT, RESIDUAL, RELU,
                    HEAD_OUT, AT_M, AT_R, AT_B, PACK, MASK, PRECISION, REORDER, EXACT, ROWS, KEYS, TAIL, SHIFTED,
                )  # fmt: skip
            tl.debug_barrier()
    else:
        for t in tl.range(tl.program_id(0), tiles * row_blocks, tl.num_programs(0)):
            tile = tl.cast(t // row_blocks, tl.int64)
            _forward_block(
                x, weights, x, x, tile, x_sb, x_sf, x_se, mask, outputs, t % row_blocks * ROWS, tile, batch,
                x_sb, x_sf, x_se, m_sb, m_sq, m_sk, key_end, F, E, H, D, O, FACTORED, OUTPUT, RESIDUAL, RELU,
                HEAD_OUT, AT_M, AT_R, AT_B, PACK, MASK, PRECISION, REORDER, EXACT, ROWS, KEYS, TAIL, SHIFTED,
            )  # fmt: skip
