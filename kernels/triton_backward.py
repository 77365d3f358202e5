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
    as_operands,
    block_pointers,
    column_run,
    dot,
    finite,
    from_quads,
    hide,
    load_ceiling,
    load_rows,
    load_transposed,
    multiply,
    operands,
    operands_of,
    own_keys,
    quad_order,
    relu_words,
    reordered,
    right_operand,
    row_offsets,
    row_scale,
    score_start,
    to_quads,
)
from .triton_streaming import attend, attend_unshifted, load_chunks, project_keys, queries, weighted
from .triton_unshifted import across_rows, certain, doubt_values, no_doubt


@triton.jit
def padded(WIDTH: tl.constexpr):
    """The columns of a row of scratch: a multiple of 16."""
    return (WIDTH + BLOCK - 1) // BLOCK * BLOCK


@triton.jit
def clear(pointer, SIZE: tl.constexpr):
    """pointer[:SIZE] = 0."""
    for first in tl.range(0, SIZE, 128):
        at = first + tl.arange(0, 128)
        tl.store(pointer + at, tl.zeros((128,), pointer.dtype.element_ty), mask=at < SIZE)


@triton.jit
def add(pointers, t, inside, MASKED: tl.constexpr):
    """What stands at `pointers` += t."""
    if MASKED:
        tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + t, mask=inside)
    else:
        tl.store(pointers, tl.load(pointers) + t)


@triton.jit
def column_halves(t):
    """Columns 0 to 7 and 8 to 15 of t [R, 16]: of each a thread has a pair as the tensor core leaves it."""
    r: tl.constexpr = t.shape[0]
    return tl.split(tl.permute(tl.reshape(t, (r, 2, 8)), (0, 2, 1)))


@triton.jit
def column_pairs():
    """0 to 7, of which a thread may access two at once, as it has them of one of `column_halves`. [8]"""
    return tl.max_contiguous(tl.multiple_of(tl.arange(0, 8), 2), 2)


@triton.jit
def _add_block(pointer, block, top, left, rows, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """pointer[top + rows, left:left + 16] += block [R, 16]. The rows and columns of pointer are ROWS and COLUMNS."""
    columns = column_pairs()
    masked: tl.constexpr = ROWS % BLOCK != 0 or COLUMNS % BLOCK != 0
    halves = column_halves(block)
    for half in tl.static_range(2):
        pointers = block_pointers(pointer, top, left + half * 8, rows, columns, stride)
        inside = (rows[:, None] < ROWS - top) & (columns[None, :] < COLUMNS - left - half * 8)
        add(pointers, halves[half], inside, masked)


@triton.jit
def _add_vector(pointer, vector, first, i, SIZE: tl.constexpr):
    """pointer[first + i] += vector [16]."""
    add(pointer + i + first, vector, i < SIZE - first, True)
    # Threads that load may be others than those that store.
    tl.debug_barrier()


# A sum over rows, as of P^T dz, takes its left operand transposed. The compiler sends a transpose through shared memory
# by two instructions, STSM and LDSM, where two bits of rows and columns change between a thread's registers and its
# lane; where one does, by a dozen of shuffles. So rows are exchanged first, in both operands: a sum may have them in
# any order.


@triton.jit
def rows_exchanged(t, BIT: tl.constexpr = 1):
    """t [R, C], of every 16 rows the bits 3 and BIT, 1 or 2, of their numbers exchanged.

    Here BIT = 1 takes the fewest registers; rows that are loaded in this order come in fours, and take 2.
    """
    r: tl.constexpr = t.shape[0]
    c: tl.constexpr = t.shape[1]
    low: tl.constexpr = 2**BIT
    return tl.reshape(tl.permute(tl.reshape(t, (r // BLOCK, 2, 4 // low, 2, low, c)), (0, 3, 2, 1, 4, 5)), (r, c))


@triton.jit
def _plus_products(total, lefts, rights, PRECISION: tl.constexpr):
    """total [R, C] + the products of lefts [R, K] and rights [K, C]."""
    # With fp32's accuracy, one addition rounds at the size of the total, not each of the products.
    products = total
    if PRECISION == "tf32x4":
        products = tl.zeros_like(total)
    for k in tl.static_range(len(lefts)):
        products = dot(lefts[k], rights[k], products, PRECISION)
    if PRECISION == "tf32x4":
        products += total
    return products


@triton.jit
def _add_products(
    pointer, lefts, rights, rows, left, stride, ROWS: tl.constexpr, THERE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pointer[rows, left:left + 16] of scratch += the products of lefts [R, K] and rights, two halves [K, 8] each.

    THERE: all of the rows exist.
    """
    columns = column_pairs()
    for half in tl.static_range(2):
        pointers = block_pointers(pointer, 0, left + half * 8, rows, columns, stride)
        inside = rows[:, None] < ROWS
        if THERE:
            before = tl.load(pointers)
        else:
            before = tl.load(pointers, mask=inside, other=0.0)
        rights_half = ()
        for k in tl.static_range(len(rights)):
            rights_half = rights_half + (rights[k][half],)
        total = _plus_products(before, lefts, rights_half, PRECISION)
        if THERE:
            tl.store(pointers, total)
        else:
            tl.store(pointers, total, mask=inside)


@triton.jit
def load_output_gradient(
    grad, relu_mask, rows, first, zero, tile, batch, d_sb, d_sf, d_so, F: tl.constexpr, O: tl.constexpr,
    WIDTH: tl.constexpr, HEAD_OUT: tl.constexpr, PACK: tl.constexpr, RELU: tl.constexpr,
    RUN: tl.constexpr = 16,
):  # fmt: skip
    """dy = grad where the relu let it pass (as in torch, a NaN does), its columns from `first` on as chunks of WIDTH
    [R, 16]: of a head's own HEAD_OUT, or all."""
    words: tl.constexpr = relu_words(O, HEAD_OUT)
    of_head: tl.constexpr = (HEAD_OUT + BLOCK - 1) // BLOCK
    run: tl.constexpr = min(RUN, 128 // grad.dtype.element_ty.primitive_bitwidth)
    i = tl.arange(0, BLOCK)
    d_y = ()
    for o in tl.static_range(0, WIDTH, BLOCK):
        columns = grad + tl.cast(first, tl.int64) * d_so
        g = load_rows(columns, rows, o, tile, batch, d_sb, d_sf, d_so, F, WIDTH, PACK, RUN)
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
def _right_halves(t, PACK: tl.constexpr, ACC: tl.constexpr):
    """Chunks [R, 16] as `_add_products` takes them with left operands that are transposes of `rows_exchanged`."""
    right = ()
    for j in tl.static_range(len(t)):
        right = right + (column_halves(rows_exchanged(finite(t[j], PACK, ACC))),)
    return right


@triton.jit
def _differentiate_keys(
    q,  # chunks of D, `operands` of [R, 16]
    d_z,
    q_right,  # chunks of D, `_right_halves`; without log2(e)
    d_z_right,
    d_q,  # chunks of D [R, 16], so far
    shift,  # [R, 4]
    scale,  # [R, 4]
    delta,  # [R]
    first,
    rows,
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
    THERE: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    NEED_SCORES: tl.constexpr,
    NEED_VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
):
    """P = scale 2^(scores + shift) and dS = P (dP - delta) over KEYS keys from `first` on, of which THERE exist:
    dq += dS keys; and what the keys, dS^T q, and the values, P^T dz, are due, into their rows of scratch: of dx, or
    factored of dkeys and dvalues. In 16 bits P is without the scale, which dz and delta have."""
    dtype: tl.constexpr = keys_from.dtype.element_ty
    acc: tl.constexpr = d_q[0].dtype
    n_rows: tl.constexpr = d_q[0].shape[0]
    tile_rows: tl.constexpr = BLOCK if PACK > 1 else F
    k = tl.arange(0, KEYS)
    skipped = tl.cast(first, tl.int64) * k_sf
    keys = load_chunks(keys_from + skipped, k, key_tile, batch, k_sb, k_sf, k_se, THERE, D, PACK, 4)
    ordered = keys
    values = keys
    if REORDER:
        order = reordered(k, REORDER)
        ordered = load_chunks(keys_from + skipped, order, key_tile, batch, k_sb, k_sf, k_se, THERE, D, PACK, 4)
    if FACTORED:
        values = load_chunks(values_from + skipped, k, key_tile, batch, k_sb, k_sf, k_se, THERE, D, PACK, 4)
    # Products start from what is added to them; not in fp32, where each would be rounded at the size of that.
    s = tl.zeros((n_rows, KEYS), acc)
    d_p = tl.zeros((n_rows, KEYS), acc)
    if PRECISION == "ieee":
        s = across_rows(shift, KEYS)
        d_p -= delta[:, None]
    if THERE < KEYS and PACK == 1:
        s = tl.where((k < THERE)[None, :], s, NEG_INF)
    clean = ()
    for j in tl.static_range(len(q)):
        s = multiply(q[j], operands(right_operand(keys[j], REORDER), PRECISION), s, PRECISION)
        d_p = multiply(d_z[j], operands(right_operand(values[j], REORDER), PRECISION), d_p, PRECISION)
        clean = clean + (finite(ordered[j], PACK, acc),)
    fields = first + k
    ceiling = load_ceiling(mask, rows, fields, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
    if PRECISION != "ieee":
        s += across_rows(shift, KEYS)
    p = tl.exp2(hide(s, ceiling, rows, fields, F, PACK, MASK))
    if PRECISION != "ieee":
        p *= across_rows(scale, KEYS)
        d_p -= delta[:, None]
        if F == 1:
            p = tl.where(p > 0.0, 1.0, p)
    if F == 1:
        d_s = p * 0.0  # the softmax of one key is constant
    else:
        d_s = p * d_p
    if PACK > 1:
        # Between samples both are zero, but for rows that are NaN throughout.
        own = own_keys(rows, fields, F, PACK)
        p = tl.where(own, p, 0.0)
        d_s = tl.where(own, d_s, 0.0)
    p = p.to(dtype)
    d_s = d_s.to(dtype)
    d_q = weighted(as_operand(d_s, REORDER), clean, d_q, PRECISION)
    p_t = tl.trans(rows_exchanged(p))
    d_s_t = tl.trans(rows_exchanged(d_s))
    exist: tl.constexpr = THERE == KEYS
    for j in tl.static_range(len(q)):
        if FACTORED:
            d_keys = scratch + tile_rows * padded(E)
            if NEED_INPUT or NEED_SCORES:
                _add_products(
                    d_keys, (d_s_t,), (q_right[j],), fields, j * BLOCK, padded(D), tile_rows, exist, PRECISION
                )
            if NEED_INPUT or NEED_VALUES:
                d_values = d_keys + tile_rows * padded(D)
                _add_products(
                    d_values, (p_t,), (d_z_right[j],), fields, j * BLOCK, padded(D), tile_rows, exist, PRECISION
                )
        elif NEED_INPUT:
            _add_products(
                scratch, (p_t, d_s_t), (d_z_right[j], q_right[j]), fields, j * BLOCK, padded(E), tile_rows, exist,
                PRECISION,
            )  # fmt: skip
    return d_q


@triton.jit
def _binade(t):
    """log2 of the power of two that is at or below t, positive normal numbers of fp32."""
    return ((t.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)


@triton.jit
def _attend_shifted(
    q, d_z, rows, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, tile, batch, m_sb, m_sq, m_sk, key_end,
    F: tl.constexpr, D: tl.constexpr, FACTORED: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr,
    PACK: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, REORDER: tl.constexpr, EXACT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """What `attend` subtracts from the scores and the rows' sums [R, 4], delta [R] and z."""
    n_rows: tl.constexpr = q[0].shape[0]
    row_max, row_sum, _, delta, z = attend(
        q, d_z, rows, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, tile, batch, m_sb, m_sq, m_sk,
        key_end, F, D, FACTORED, KEYS, TAIL, PACK, MASK, PRECISION, REORDER, EXACT, ACC, 4, True,
    )  # fmt: skip
    return tl.broadcast_to(row_max[:, None], (n_rows, 4)), tl.broadcast_to(row_sum[:, None], (n_rows, 4)), delta, z


@triton.jit
def _softmax(
    q,  # chunks of D [R, 16], columns in `quad_order`, `as_operands`
    d_z,  # the same, or ()
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
):
    """`shift` and `scale` of P = scale 2^(scores + shift) [R, 4], in 16 bits with a scale from 1/2 to 1; given dz,
    delta = sum over keys of P dP [R]; and z = P values. The scale is 0 where every key is hidden."""
    n_rows: tl.constexpr = q[0].shape[0]
    dtype: tl.constexpr = q[0].dtype
    if PACK > 1:
        # Whatever a sample holds, packed ones' gradients keep their bits.
        reference, total, delta, z = _attend_shifted(
            q, d_z, rows, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, tile, batch,
            m_sb, m_sq, m_sk, key_end, F, D, FACTORED, KEYS, TAIL, PACK, MASK, PRECISION, REORDER, EXACT, ACC,
        )  # fmt: skip
    else:
        z, total, delta, doubt = attend_unshifted(
            q, d_z, no_doubt(n_rows), rows, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, tile,
            batch, m_sb, m_sq, m_sk, key_end, F, D, FACTORED, KEYS, TAIL, PACK, MASK, PRECISION, REORDER, EXACT, ACC, 4,
        )  # fmt: skip
        for j in tl.static_range(len(z)):
            doubt = doubt_values(doubt, z[j], dtype, True)
        reference = tl.zeros((n_rows, 4), ACC)
        if not certain(doubt, dtype):
            reference, total, delta, z = _attend_shifted(
                q, d_z, rows, keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, tile, batch,
                m_sb, m_sq, m_sk, key_end, F, D, FACTORED, KEYS, TAIL, PACK, MASK, PRECISION, REORDER, EXACT, ACC,
            )  # fmt: skip
    if dtype == tl.float16 or dtype == tl.bfloat16:
        # Of operands of 16 bits neither P nor scale dz may be far from what they are of.
        binade = _binade(total)
        total *= tl.exp2(-binade)
        reference += binade
    return -reference, row_scale(total, MASK, EXACT), delta, z


@triton.jit
def _values_gradient(
    d_y, weights, first, columns, i, D: tl.constexpr, HEAD_OUT: tl.constexpr, OUTPUT: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dz of a head, whose m begins at `first`: chunks of D [R, 16], their columns in `quad_order`, as `columns` are."""
    d_z = ()
    for e in tl.static_range(0, D, BLOCK):
        if OUTPUT == BARE:
            d_z_e = to_quads(d_y[e // BLOCK]).to(ACC)
        else:
            d_z_e = tl.zeros((d_y[0].shape[0], BLOCK), ACC)
            for o in tl.static_range(len(d_y)):
                m_t = load_transposed(weights + first, e, o * BLOCK, columns, i, HEAD_OUT, D, HEAD_OUT)
                d_z_e = dot(d_y[o], m_t.to(d_y[o].dtype), d_z_e, PRECISION)
        d_z = d_z + (d_z_e,)
    return d_z


@triton.jit
def _differentiate_projection(
    x,
    d_rows,  # where the gradients of a head's keys or values stand in scratch, (tile rows, padded(D))
    d_x,  # where to add them as gradients of x, (tile rows, padded(E))
    weights,  # of the head's projection, (E, D) with rows H*D apart
    d_weights,
    rows,
    i,
    quads,  # the same in `quad_order`
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
        inside = tl.broadcast_to(rows[:, None] < tile_rows, (BLOCK, BLOCK))
        d_y_j = tl.load(block_pointers(d_rows, 0, j, rows, i, padded(D)), mask=inside, other=0.0)
        d_y = d_y + (from_quads(d_y_j.to(dtype)),)
    for e in tl.static_range(0, E, BLOCK):
        if NEED_WEIGHTS:
            x_t = tl.trans(load_rows(x, rows, e, tile, batch, x_sb, x_sf, x_se, F, E, PACK, 4))
            for j in tl.static_range(len(d_y)):
                d_w = dot(x_t, d_y[j], tl.zeros((BLOCK, BLOCK), acc), PRECISION)
                _add_block(d_weights, d_w, e, j * BLOCK, i, H * D, E, D)
        if NEED_INPUT:
            d_x_e = tl.zeros((BLOCK, BLOCK), acc)
            for j in tl.static_range(len(d_y)):
                w_t = load_transposed(weights, e, j * BLOCK, quads, i, H * D, E, D)
                d_x_e = dot(d_y[j], w_t.to(dtype), d_x_e, PRECISION)
            _add_block(d_x, d_x_e, 0, e, rows, padded(E), tile_rows, padded(E))


@triton.jit
def backward(
    grad,  # (B, F, O), any strides
    x,  # (B, F, E), any strides
    weights,  # packed, fp32 or fp64
    mask,
    relu_mask,  # int16 (B, F, relu_words), contiguous, of the forward
    d_x,  # (B, F, E), contiguous
    partial,  # (programs, size of weights)
    scratch,  # (programs, F or 16, padded(E)), factored then (2, F or 16, padded(D)); columns stand in `quad_order`
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
    scratch += tl.cast(pid, tl.int64) * (tile_rows * (padded(E) + 2 * padded(D) * FACTORED))
    if FACTORED:
        projected += tl.cast(pid, tl.int64) * (PACK * F * 2 * H * D)
    clear(partial, size)
    tl.debug_barrier()
    for t in tl.range(pid, (batch + PACK - 1) // PACK, tl.num_programs(0)):
        tile = tl.cast(t, tl.int64)
        if NEED_INPUT:
            clear(scratch, tile_rows * padded(E))
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
                    clear(scratch + tile_rows * padded(E), tile_rows * 2 * padded(D))
                tl.debug_barrier()
                for first_row in tl.range(0, tile_rows, ROWS):
                    turn = t + first_row
                    if FACTORED or OUTPUT != MERGED:
                        # The others have registers to spare for addresses that all heads share.
                        turn += h
                    i = tl.arange(0, BLOCK) + turn * nought
                    quads = quad_order(tl.arange(0, BLOCK)) + turn * nought
                    rows = first_row + tl.arange(0, ROWS) + turn * nought
                    x_rows = load_chunks(x, rows, tile, batch, x_sb, x_sf, x_se, F, E, PACK, 4)
                    d_y = load_output_gradient(
                        grad, relu_mask, rows, first_out, 0, tile, batch, d_sb, d_sf, d_so, F, O, HEAD_OUT, HEAD_OUT,
                        PACK, RELU, 4,
                    )  # fmt: skip
                    q = queries(x_rows, weights, h, i, quads, E, H, D, PRECISION)
                    # In 16 bits dz is scaled instead of P, and delta comes from the very dz that it is compared with.
                    # For fp32's accuracy P must be 1 where there is a single key, and rows of dS sum to zero.
                    unscaled = ()
                    if through_heads and PRECISION != "ieee":
                        unscaled = _values_gradient(d_y, weights, m_h, quads, i, D, HEAD_OUT, OUTPUT, acc, PRECISION)
                    shift, scale, delta, z = _softmax(
                        as_operands(q, REORDER), as_operands(unscaled, REORDER), rows, keys_from, values_from, key_tile,
                        k_sb, k_sf, k_se, mask, tile, batch, m_sb, m_sq, m_sk, key_end, F, D, FACTORED, KEYS, TAIL,
                        PACK, MASK, PRECISION, REORDER, EXACT, acc,
                    )  # fmt: skip
                    if into_values:
                        for e in tl.static_range(len(z)):
                            z_t = tl.trans(z[e].to(dtype))
                            for o in tl.static_range(len(d_y)):
                                d_m = dot(z_t, d_y[o], tl.zeros((BLOCK, BLOCK), acc), PRECISION)
                                _add_block(partial + m_h, d_m, e * BLOCK, o * BLOCK, i, HEAD_OUT, D, HEAD_OUT)
                    if through_heads:
                        d_z = unscaled
                        if PRECISION == "ieee":
                            unscaled = _values_gradient(
                                d_y, weights, m_h, quads, i, D, HEAD_OUT, OUTPUT, acc, PRECISION
                            )
                            for e in tl.static_range(len(z)):
                                d_z_e = (unscaled[e] * across_rows(scale)).to(dtype)
                                d_z = d_z + (d_z_e,)
                                delta += tl.sum(from_quads(d_z_e).to(acc) * z[e], 1)
                        d_q = ()
                        natural = ()
                        for j in tl.static_range(len(q)):
                            d_q = d_q + (tl.zeros((ROWS, BLOCK), acc),)
                            natural = natural + ((q[j].to(acc) * LN2).to(dtype),)
                        q_left = operands_of(as_operands(q, REORDER), PRECISION)
                        d_z_left = operands_of(as_operands(d_z, REORDER), PRECISION)
                        q_right = _right_halves(natural, PACK, acc)
                        d_z_right = _right_halves(d_z, PACK, acc)
                        for first in tl.range(0, key_end, KEYS):
                            d_q = _differentiate_keys(
                                q_left, d_z_left, q_right, d_z_right, d_q, shift, scale, delta, first, rows, scratch,
                                keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, tile, batch,
                                m_sb, m_sq, m_sk, F, E, D, FACTORED, KEYS, KEYS, PACK, MASK, NEED_INPUT, NEED_SCORES,
                                NEED_VALUES, PRECISION, REORDER,
                            )  # fmt: skip
                        d_q = _differentiate_keys(
                            q_left, d_z_left, q_right, d_z_right, d_q, shift, scale, delta, key_end, rows, scratch,
                            keys_from, values_from, key_tile, k_sb, k_sf, k_se, mask, tile, batch,
                            m_sb, m_sq, m_sk, F, E, D, FACTORED, TAIL, (F - 1) % KEYS + 1, PACK, MASK, NEED_INPUT,
                            NEED_SCORES, NEED_VALUES, PRECISION, REORDER,
                        )  # fmt: skip
                        scaled = ()
                        for j in tl.static_range(len(d_q)):
                            scaled = scaled + (d_q[j] * LN2,)
                        d_q = scaled
                        if NEED_INPUT:
                            tl.debug_barrier()
                            rounded = ()
                            for j in tl.static_range(len(d_q)):
                                rounded = rounded + (d_q[j].to(dtype),)
                            lefts = as_operands(rounded, REORDER)
                            for e in tl.static_range(len(x_rows)):
                                rights = ()
                                for j in tl.static_range(len(d_q)):
                                    columns = reordered(tl.arange(0, BLOCK), REORDER) + turn * nought
                                    a_t = load_transposed(
                                        weights + h * D, e * BLOCK, j * BLOCK, quads, columns, H * D, E, D
                                    )
                                    rights = rights + (column_halves(a_t.to(dtype)),)
                                _add_products(
                                    scratch, lefts, rights, rows, e * BLOCK, padded(E), tile_rows, False, PRECISION
                                )
                            tl.debug_barrier()
                        if NEED_SCORES:
                            # Loaded again rather than kept over the loops: registers are what is short.
                            x_rows = load_chunks(x, rows, tile, batch, x_sb, x_sf, x_se, F, E, PACK, 4)
                            d_c = partial + E * H * D + h * D
                            for j in tl.static_range(len(d_q)):
                                _add_vector(d_c, tl.sum(d_q[j], 0), j * BLOCK, i, D)
                                d_q_j = d_q[j].to(dtype)
                                for e in tl.static_range(len(x_rows)):
                                    d_a = dot(tl.trans(x_rows[e]), d_q_j, tl.zeros((BLOCK, BLOCK), acc), PRECISION)
                                    _add_block(partial + h * D, d_a, e * BLOCK, j * BLOCK, i, H * D, E, D)
                if FACTORED:
                    tl.debug_barrier()
                    for first_row in tl.range(0, tile_rows, BLOCK):
                        i = tl.arange(0, BLOCK) + (t + h + first_row) * nought
                        quads = quad_order(tl.arange(0, BLOCK)) + (t + h + first_row) * nought
                        rows = first_row + i
                        at = at_k + h * D
                        if NEED_INPUT or NEED_SCORES:
                            _differentiate_projection(
                                x, scratch + tile_rows * padded(E), scratch, weights + at, partial + at, rows, i,
                                quads, tile, batch, x_sb, x_sf, x_se, F, E, H, D, PACK, NEED_INPUT, NEED_SCORES,
                                PRECISION,
                            )  # fmt: skip
                        at += E * H * D
                        if NEED_INPUT or NEED_VALUES:
                            _differentiate_projection(
                                x, scratch + tile_rows * (padded(E) + padded(D)), scratch, weights + at, partial + at,
                                rows, i, quads, tile, batch, x_sb, x_sf, x_se, F, E, H, D, PACK, NEED_INPUT,
                                NEED_VALUES, PRECISION,
                            )  # fmt: skip
                    tl.debug_barrier()
        for first_row in tl.range(0, tile_rows, ROWS):
            i = tl.arange(0, BLOCK) + (t + first_row) * nought
            quads = quad_order(tl.arange(0, BLOCK)) + (t + first_row) * nought
            rows = first_row + tl.arange(0, ROWS) + t * nought
            x_rows = load_chunks(x, rows, tile, batch, x_sb, x_sf, x_se, F, E, PACK, 4)
            d_x_rows = ()
            if NEED_INPUT:
                for e in tl.static_range(len(x_rows)):
                    inside = tl.broadcast_to(rows[:, None] < tile_rows, (ROWS, BLOCK))
                    pointers = block_pointers(scratch, 0, e * BLOCK, rows, i, padded(E))
                    d_x_rows = d_x_rows + (tl.load(pointers, mask=inside, other=0.0),)
            for h in tl.range(slices):
                first_out = h * HEAD_OUT
                d_y = load_output_gradient(
                    grad, relu_mask, rows, first_out, 0, tile, batch, d_sb, d_sf, d_so, F, O, HEAD_OUT, HEAD_OUT, PACK,
                    RELU, 4,
                )  # fmt: skip
                for o in tl.static_range(len(d_y)):
                    if NEED_BIAS:
                        d_b = tl.sum(d_y[o].to(acc), 0)
                        d_g = d_b
                        if MASK != MASK_NONE:
                            seen = sees_a_key(mask, rows, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
                            d_g = tl.sum(tl.where(seen[:, None], d_y[o].to(acc), 0.0), 0)
                        _add_vector(partial + AT_B + first_out, d_b, o * BLOCK, i, HEAD_OUT)
                        _add_vector(partial + AT_B + O + first_out, d_g, o * BLOCK, i, HEAD_OUT)
                    if NEED_RESIDUAL and RESIDUAL == PROJECTION:
                        for e in tl.static_range(len(x_rows)):
                            d_r = dot(tl.trans(x_rows[e]), d_y[o], tl.zeros((BLOCK, BLOCK), acc), PRECISION)
                            d_r_h = partial + AT_R + first_out
                            _add_block(d_r_h, d_r, e * BLOCK, o * BLOCK, i, O, E, HEAD_OUT)
                if NEED_INPUT and RESIDUAL == PROJECTION:
                    added = ()
                    for e in tl.static_range(len(x_rows)):
                        rights = ()
                        for o in tl.static_range(len(d_y)):
                            r_h = weights + AT_R + first_out
                            r_t = load_transposed(r_h, e * BLOCK, o * BLOCK, quads, i, O, E, HEAD_OUT)
                            rights = rights + (r_t.to(dtype),)
                        added = added + (_plus_products(d_x_rows[e], d_y, rights, PRECISION),)
                    d_x_rows = added
            if NEED_INPUT:
                if RESIDUAL == IDENTITY:
                    d_y = load_output_gradient(
                        grad, relu_mask, rows, 0, 0, tile, batch, d_sb, d_sf, d_so, F, O, E, HEAD_OUT, PACK, RELU, 4
                    )
                    added = ()
                    for e in tl.static_range(len(x_rows)):
                        added = added + (d_x_rows[e] + to_quads(d_y[e]).to(acc),)
                    d_x_rows = added
                offsets, exists = row_offsets(rows, tile, batch, F * E, E, F, PACK)
                for e in tl.static_range(len(x_rows)):
                    tl.store(
                        d_x + offsets[:, None] + (column_run(4))[None, :] + e * BLOCK,
                        from_quads(d_x_rows[e].to(d_x.dtype.element_ty)),
                        mask=exists[:, None] & (i[None, :] < E - e * BLOCK),
                    )
        tl.debug_barrier()
