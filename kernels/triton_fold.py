"""The small launches around the big ones: fold the weights, unfold their gradients, add up partial sums.

Every program computes blocks of 16 x 16 in full precision ("ieee": these products are tiny and must not cost accuracy).
"""

import triton
import triton.language as tl

from .triton_math import (
    BARE,
    BLOCK,
    CONCATENATED,
    MERGED,
    PROJECTION,
    block_pointers,
    load_block,
    load_transposed,
    load_vector,
)


@triton.jit
def _store_block(pointer, block, top, left, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    inside = (rows[:, None] < ROWS - top) & (columns[None, :] < COLUMNS - left)
    pointers = block_pointers(pointer, top, left, rows, columns, stride)
    tl.store(pointers, block.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _store_vector(pointer, vector, first, i, SIZE: tl.constexpr):
    tl.store(pointer + first + i, vector.to(pointer.dtype.element_ty), mask=i < SIZE - first)


@triton.jit
def _store_transposed(
    packed, weight, top, left, scale, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr
):
    """packed[top:, left:] = scale * weight[left:, top:]^T, a block of each: (ROWS, COLUMNS) and rows of WIDTH."""
    i = tl.arange(0, BLOCK)
    block = load_transposed(weight, left, top, i, i, WIDTH, COLUMNS, ROWS).to(packed.dtype.element_ty)
    _store_block(packed, block * scale[:, None], top, left, i, i, stride, ROWS, COLUMNS)


@triton.jit
def _load_bias(bias, first, i, SIZE: tl.constexpr, THERE: tl.constexpr, ACC: tl.constexpr):
    """bias[first + i], zero outside of SIZE or where there is none. [16]"""
    if THERE:
        return load_vector(bias, first, i, SIZE).to(ACC)
    else:
        return tl.zeros((BLOCK,), ACC)


@triton.jit
def fold(
    w_q,  # the parameters in torch.nn.Linear's layout, contiguous, any floating dtype; anything for those not in THERE
    b_q,
    w_k,
    w_v,
    b_v,
    w_o,
    b_o,
    w_r,
    b_r,
    packed,  # fp32 or fp64
    E: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    O: tl.constexpr,
    FACTORED: tl.constexpr,
    OUTPUT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HEAD_OUT: tl.constexpr,
    AT_M: tl.constexpr,
    AT_R: tl.constexpr,
    AT_B: tl.constexpr,
    WIDTH: tl.constexpr,  # of a head
    SCALE: tl.constexpr,  # log2(e) times that of the logits
    THERE: tl.constexpr,  # bit j: the j-th of the ten parameters
):
    """One program per block of A (and of K and V), then per block of M, then per 16 columns of R, b and g."""
    acc: tl.constexpr = packed.dtype.element_ty
    ne: tl.constexpr = (E + BLOCK - 1) // BLOCK
    nd: tl.constexpr = (D + BLOCK - 1) // BLOCK
    no: tl.constexpr = (HEAD_OUT + BLOCK - 1) // BLOCK
    n_a: tl.constexpr = H * ne * nd
    n_m: tl.constexpr = 0 if OUTPUT == BARE else H * nd * no
    at_k: tl.constexpr = (E + 1) * H * D
    pid = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    scale = tl.full((1,), SCALE, acc)
    one = tl.full((1,), 1.0, acc)
    block = tl.zeros((BLOCK, BLOCK), acc)
    if pid < n_a:
        h = pid // (ne * nd)
        e = pid // nd % ne * BLOCK
        k = pid % nd * BLOCK
        of_head = h * WIDTH * E
        if FACTORED:
            _store_transposed(packed + h * D, w_q + of_head, e, k, scale, H * D, E, D, E)
            _store_transposed(packed + at_k + h * D, w_k + of_head, e, k, one, H * D, E, D, E)
            _store_transposed(packed + at_k + E * H * D + h * D, w_v + of_head, e, k, one, H * D, E, D, E)
            if e == 0:
                c = _load_bias(b_q + h * D, k, i, D, THERE & 2, acc)
                _store_vector(packed + E * H * D + h * D, c * scale, k, i, D)
        else:
            c = tl.zeros((BLOCK,), acc)
            for d in tl.range(0, WIDTH, BLOCK):
                q_t = load_transposed(w_q + of_head, d, e, i, i, E, WIDTH, E).to(acc)
                key = load_block(w_k + of_head, d, k, i, i, E, WIDTH, E).to(acc)
                block = tl.dot(q_t, key, block, input_precision="ieee", out_dtype=acc)
                c += tl.sum(_load_bias(b_q + h * WIDTH, d, i, WIDTH, THERE & 2, acc)[:, None] * key, 0)
            _store_block(packed + h * D, block * scale[:, None], e, k, i, i, H * D, E, D)
            if e == 0:
                _store_vector(packed + E * H * D + h * D, c * scale, k, i, D)
    elif pid < n_a + n_m:
        h = (pid - n_a) // (nd * no)
        e = (pid - n_a) // no % nd * BLOCK
        o = (pid - n_a) % no * BLOCK
        m = packed + AT_M + h * D * HEAD_OUT
        if OUTPUT == CONCATENATED:
            _store_transposed(m, w_v + h * WIDTH * E, e, o, one, HEAD_OUT, D, HEAD_OUT, E)
        elif FACTORED:
            _store_transposed(m, w_o + h * WIDTH, e, o, one, HEAD_OUT, D, HEAD_OUT, H * WIDTH)
        else:
            for d in tl.range(0, WIDTH, BLOCK):
                v_t = load_transposed(w_v + h * WIDTH * E, d, e, i, i, E, WIDTH, E).to(acc)
                o_t = load_transposed(w_o + h * WIDTH, o, d, i, i, H * WIDTH, O, WIDTH).to(acc)
                block = tl.dot(v_t, o_t, block, input_precision="ieee", out_dtype=acc)
            _store_block(m, block, e, o, i, i, O, D, O)
    else:
        o = (pid - n_a - n_m) * BLOCK
        if OUTPUT == MERGED:
            g = tl.zeros((BLOCK,), acc)
            if THERE & 32:
                for n in tl.range(0, H * WIDTH, BLOCK):
                    w = load_block(w_o, o, n, i, i, H * WIDTH, O, H * WIDTH).to(acc)
                    g += tl.sum(w * load_vector(b_v, n, i, H * WIDTH).to(acc)[None, :], 1)
        else:
            g = _load_bias(b_v, o, i, O, THERE & 32, acc)
        b = _load_bias(b_o, o, i, O, THERE & 128, acc) + _load_bias(b_r, o, i, O, THERE & 512, acc)
        _store_vector(packed + AT_B, b, o, i, O)
        _store_vector(packed + AT_B + O, g, o, i, O)
        if RESIDUAL == PROJECTION:
            for e in tl.range(0, E, BLOCK):
                _store_transposed(packed + AT_R, w_r, e, o, one, O, E, O, E)


@triton.jit
def unfold(
    grad,  # of the packed weights
    w_q,  # the parameters; anything for those not in THERE
    b_q,
    w_k,
    w_v,
    b_v,
    w_o,
    d_w_q,  # what is to be written, like the parameters; not touched where WANTED lacks its bit
    d_b_q,
    d_w_k,
    d_b_k,
    d_w_v,
    d_b_v,
    d_w_o,
    d_b_o,
    d_w_r,
    d_b_r,
    E: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    O: tl.constexpr,
    FACTORED: tl.constexpr,
    OUTPUT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HEAD_OUT: tl.constexpr,
    AT_M: tl.constexpr,
    AT_R: tl.constexpr,
    AT_B: tl.constexpr,
    WIDTH: tl.constexpr,  # of a head
    SCALE: tl.constexpr,  # log2(e) times that of the logits
    THERE: tl.constexpr,  # bit j: the j-th of the ten parameters
    WANTED: tl.constexpr,  # the same, for the gradients
):
    """One program per block of dWq, then of dWk, dWv and dWo, then per 16 rows of dWr and its biases."""
    acc: tl.constexpr = grad.dtype.element_ty
    ne: tl.constexpr = (E + BLOCK - 1) // BLOCK
    nw: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    no: tl.constexpr = (O + BLOCK - 1) // BLOCK
    n_e: tl.constexpr = H * nw * ne
    n_o: tl.constexpr = H * no * nw if OUTPUT == MERGED else 0
    pid = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    scale = tl.full((1,), SCALE, acc)
    one = tl.full((1,), 1.0, acc)
    block = tl.zeros((BLOCK, BLOCK), acc)
    d_c = grad + E * H * D
    d_k = grad + (E + 1) * H * D
    d_v = d_k + E * H * D
    d_m = grad + AT_M
    d_b = grad + AT_B
    d_g = d_b + O
    h = pid % n_e // (nw * ne)
    row = pid // ne % nw * BLOCK
    column = pid % ne * BLOCK
    of_head = h * WIDTH * E
    if pid < n_e:
        if FACTORED:
            if WANTED & 1:
                _store_transposed(d_w_q + of_head, grad + h * D, row, column, scale, E, WIDTH, E, H * D)
            if WANTED & 2:
                if column == 0:
                    _store_vector(d_b_q + h * D, load_vector(d_c + h * D, row, i, D) * scale, row, i, D)
        elif WANTED & 3:
            b = tl.zeros((BLOCK,), acc)
            for k in tl.range(0, E, BLOCK):
                key = load_block(w_k + of_head, row, k, i, i, E, WIDTH, E).to(acc)
                a_t = load_transposed(grad + h * E, column, k, i, i, H * E, E, E)
                block = tl.dot(key, a_t, block, input_precision="ieee", out_dtype=acc)
                b += tl.sum(key * load_vector(d_c + h * E, k, i, E)[None, :], 1)
            if WANTED & 1:
                _store_block(d_w_q + of_head, block * scale[:, None], row, column, i, i, E, WIDTH, E)
            if WANTED & 2:
                if column == 0:
                    _store_vector(d_b_q + h * WIDTH, b * scale, row, i, WIDTH)
    elif pid < 2 * n_e:
        if WANTED & 4:
            if FACTORED:
                _store_transposed(d_w_k + of_head, d_k + h * D, row, column, one, E, WIDTH, E, H * D)
            else:
                for e in tl.range(0, E, BLOCK):
                    query = load_block(w_q + of_head, row, e, i, i, E, WIDTH, E).to(acc)
                    a = load_block(grad + h * E, e, column, i, i, H * E, E, E)
                    block = tl.dot(query, a, block, input_precision="ieee", out_dtype=acc)
                bias = _load_bias(b_q + h * WIDTH, row, i, WIDTH, THERE & 2, acc)
                block += bias[:, None] * load_vector(d_c + h * E, column, i, E)[None, :]
                _store_block(d_w_k + of_head, block * scale[:, None], row, column, i, i, E, WIDTH, E)
        if WANTED & 8:
            if column == 0:
                _store_vector(d_b_k + h * WIDTH, tl.zeros((BLOCK,), acc), row, i, WIDTH)
    elif pid < 3 * n_e:
        if WANTED & 16:
            if FACTORED:
                _store_transposed(d_w_v + of_head, d_v + h * D, row, column, one, E, WIDTH, E, H * D)
            elif OUTPUT == CONCATENATED:
                d_m_h = d_m + h * D * HEAD_OUT
                _store_transposed(d_w_v + of_head, d_m_h, row, column, one, E, WIDTH, E, HEAD_OUT)
        if OUTPUT == MERGED:
            if WANTED & 48:
                b = tl.zeros((BLOCK,), acc)
                for o in tl.range(0, O, BLOCK):
                    o_t = load_transposed(w_o + h * WIDTH, o, row, i, i, H * WIDTH, O, WIDTH).to(acc)
                    if not FACTORED:
                        m_t = load_transposed(d_m + h * E * O, column, o, i, i, O, E, O)
                        block = tl.dot(o_t, m_t, block, input_precision="ieee", out_dtype=acc)
                    b += tl.sum(o_t * load_vector(d_g, o, i, O)[None, :], 1)
                if (not FACTORED) and (WANTED & 16) != 0:
                    _store_block(d_w_v + of_head, block, row, column, i, i, E, WIDTH, E)
                if WANTED & 32:
                    if column == 0:
                        _store_vector(d_b_v + h * WIDTH, b, row, i, WIDTH)
        elif WANTED & 32:
            if column == 0:
                _store_vector(d_b_v + h * WIDTH, load_vector(d_g + h * WIDTH, row, i, WIDTH), row, i, WIDTH)
    elif pid < 3 * n_e + n_o:
        if WANTED & 64:
            p = pid - 3 * n_e
            h = p // (no * nw)
            o = p // nw % no * BLOCK
            d = p % nw * BLOCK
            if FACTORED:
                block = load_transposed(d_m + h * D * O, d, o, i, i, O, D, O)
            else:
                for e in tl.range(0, E, BLOCK):
                    m_t = load_transposed(d_m + h * E * O, e, o, i, i, O, E, O)
                    v_t = load_transposed(w_v + h * WIDTH * E, d, e, i, i, E, WIDTH, E).to(acc)
                    block = tl.dot(m_t, v_t, block, input_precision="ieee", out_dtype=acc)
            bias = _load_bias(b_v + h * WIDTH, d, i, WIDTH, THERE & 32, acc)
            block += load_vector(d_g, o, i, O)[:, None] * bias[None, :]
            _store_block(d_w_o + h * WIDTH, block, o, d, i, i, H * WIDTH, O, WIDTH)
    else:
        o = (pid - 3 * n_e - n_o) * BLOCK
        b = load_vector(d_b, o, i, O)
        if WANTED & 128:
            _store_vector(d_b_o, b, o, i, O)
        if WANTED & 512:
            _store_vector(d_b_r, b, o, i, O)
        if RESIDUAL == PROJECTION:
            if WANTED & 256:
                for e in tl.range(0, E, BLOCK):
                    _store_transposed(d_w_r, grad + AT_R, o, e, one, E, O, E, O)


@triton.jit
def reduce_partial(
    partial,  # (programs, size)
    total,  # (size,)
    programs,
    AT_V: tl.constexpr,
    AT_R: tl.constexpr,
    AT_B: tl.constexpr,
    SIZE: tl.constexpr,
    NEED_SCORES: tl.constexpr,
    NEED_VALUES: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """total = the sum over programs, in a fixed order; zero for the parts nobody needs, which were never written."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    needed = column < 0
    if NEED_SCORES:
        needed = needed | (column < AT_V)
    if NEED_VALUES:
        needed = needed | ((column >= AT_V) & (column < AT_R))
    if NEED_RESIDUAL:
        needed = needed | ((column >= AT_R) & (column < AT_B))
    if NEED_BIAS:
        needed = needed | ((column >= AT_B) & (column < SIZE))
    sums = tl.zeros((ROWS, COLUMNS), total.dtype.element_ty)
    for first in tl.range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row[:, None] < programs) & needed[None, :]
        sums += tl.load(partial + row.to(tl.int64)[:, None] * SIZE + column[None, :], mask=inside, other=0.0)
    tl.store(total + column, tl.sum(sums, 0), mask=column < SIZE)
