"""The small launches around the big ones: fold the weights, unfold their gradients, add up partial sums.

Every program computes blocks of 16 x 16 in full precision ("ieee": these products are tiny and must not cost accuracy).
"""

import triton
import triton.language as tl

from .triton_math import BLOCK, block_pointers, load_block, load_transposed, load_vector


@triton.jit
def _store_block(pointer, block, top, left, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    inside = (rows[:, None] < ROWS - top) & (columns[None, :] < COLUMNS - left)
    pointers = block_pointers(pointer, top, left, rows, columns, stride)
    tl.store(pointers, block.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _store_vector(pointer, vector, first, i, SIZE: tl.constexpr):
    tl.store(pointer + first + i, vector.to(pointer.dtype.element_ty), mask=i < SIZE - first)


@triton.jit
def fold(
    w_q,  # the parameters in torch.nn.Linear's layout, contiguous, any floating dtype
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
    O: tl.constexpr,
    SCALE: tl.constexpr,  # log2(e) / sqrt(E)
):
    """One program per block of A, then per block of M, then per 16 columns of R, b and g."""
    acc: tl.constexpr = packed.dtype.element_ty
    ne: tl.constexpr = (E + BLOCK - 1) // BLOCK
    no: tl.constexpr = (O + BLOCK - 1) // BLOCK
    n_a: tl.constexpr = H * ne * ne
    n_m: tl.constexpr = H * ne * no
    pid = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    scale = tl.full((1,), SCALE, acc)
    block = tl.zeros((BLOCK, BLOCK), acc)
    if pid < n_a:
        h = pid // (ne * ne)
        e = pid // ne % ne * BLOCK
        k = pid % ne * BLOCK
        c = tl.zeros((BLOCK,), acc)
        for d in tl.range(0, E, BLOCK):
            q_t = load_transposed(w_q + h * E * E, d, e, i, i, E, E, E).to(acc)
            key = load_block(w_k + h * E * E, d, k, i, i, E, E, E).to(acc)
            block = tl.dot(q_t, key, block, input_precision="ieee", out_dtype=acc)
            c += tl.sum(load_vector(b_q + h * E, d, i, E).to(acc)[:, None] * key, 0)
        _store_block(packed + h * E, block * scale[:, None], e, k, i, i, H * E, E, E)
        if e == 0:
            _store_vector(packed + E * H * E + h * E, c * scale, k, i, E)
    elif pid < n_a + n_m:
        h = (pid - n_a) // (ne * no)
        e = (pid - n_a) // no % ne * BLOCK
        o = (pid - n_a) % no * BLOCK
        for d in tl.range(0, E, BLOCK):
            v_t = load_transposed(w_v + h * E * E, d, e, i, i, E, E, E).to(acc)
            o_t = load_transposed(w_o + h * E, o, d, i, i, H * E, O, E).to(acc)
            block = tl.dot(v_t, o_t, block, input_precision="ieee", out_dtype=acc)
        _store_block(packed + (E + 1) * H * E + h * E * O, block, e, o, i, i, O, E, O)
    else:
        o = (pid - n_a - n_m) * BLOCK
        residual = packed + (E + 1 + O) * H * E
        g = tl.zeros((BLOCK,), acc)
        for n in tl.range(0, H * E, BLOCK):
            w = load_block(w_o, o, n, i, i, H * E, O, H * E).to(acc)
            g += tl.sum(w * load_vector(b_v, n, i, H * E).to(acc)[None, :], 1)
        b = load_vector(b_o, o, i, O).to(acc) + load_vector(b_r, o, i, O).to(acc)
        _store_vector(residual + E * O, b, o, i, O)
        _store_vector(residual + (E + 1) * O, g, o, i, O)
        for e in tl.range(0, E, BLOCK):
            r = load_transposed(w_r, o, e, i, i, E, O, E)
            _store_block(residual, r, e, o, i, i, O, E, O)


@triton.jit
def unfold(
    grad,  # of the packed weights
    w_q,
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
    O: tl.constexpr,
    SCALE: tl.constexpr,  # log2(e) / sqrt(E)
    WANTED: tl.constexpr,  # bit j: the j-th of the ten parameters
):
    """One program per block of dWq, then of dWk, dWv and dWo, then per 16 rows of dWr and its biases."""
    acc: tl.constexpr = grad.dtype.element_ty
    ne: tl.constexpr = (E + BLOCK - 1) // BLOCK
    no: tl.constexpr = (O + BLOCK - 1) // BLOCK
    n_e: tl.constexpr = H * ne * ne
    n_o: tl.constexpr = H * no * ne
    pid = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    scale = tl.full((1,), SCALE, acc)
    block = tl.zeros((BLOCK, BLOCK), acc)
    d_c = grad + E * H * E
    d_m = grad + (E + 1) * H * E
    d_r = grad + (E + 1 + O) * H * E
    d_b = d_r + E * O
    d_g = d_b + O
    h = pid % n_e // (ne * ne)
    row = pid // ne % ne * BLOCK
    column = pid % ne * BLOCK
    if pid < n_e:
        if WANTED & 3:
            b = tl.zeros((BLOCK,), acc)
            for k in tl.range(0, E, BLOCK):
                key = load_block(w_k + h * E * E, row, k, i, i, E, E, E).to(acc)
                a_t = load_transposed(grad + h * E, column, k, i, i, H * E, E, E)
                block = tl.dot(key, a_t, block, input_precision="ieee", out_dtype=acc)
                b += tl.sum(key * load_vector(d_c + h * E, k, i, E)[None, :], 1)
            if WANTED & 1:
                _store_block(d_w_q + h * E * E, block * scale[:, None], row, column, i, i, E, E, E)
            if WANTED & 2:
                if column == 0:
                    _store_vector(d_b_q + h * E, b * scale, row, i, E)
    elif pid < 2 * n_e:
        if WANTED & 4:
            for e in tl.range(0, E, BLOCK):
                query = load_block(w_q + h * E * E, row, e, i, i, E, E, E).to(acc)
                a = load_block(grad + h * E, e, column, i, i, H * E, E, E)
                block = tl.dot(query, a, block, input_precision="ieee", out_dtype=acc)
            bias = load_vector(b_q + h * E, row, i, E).to(acc)
            block += bias[:, None] * load_vector(d_c + h * E, column, i, E)[None, :]
            _store_block(d_w_k + h * E * E, block * scale[:, None], row, column, i, i, E, E, E)
        if WANTED & 8:
            if column == 0:
                _store_vector(d_b_k + h * E, tl.zeros((BLOCK,), acc), row, i, E)
    elif pid < 3 * n_e:
        if WANTED & 48:
            b = tl.zeros((BLOCK,), acc)
            for o in tl.range(0, O, BLOCK):
                o_t = load_transposed(w_o + h * E, o, row, i, i, H * E, O, E).to(acc)
                m_t = load_transposed(d_m + h * E * O, column, o, i, i, O, E, O)
                block = tl.dot(o_t, m_t, block, input_precision="ieee", out_dtype=acc)
                b += tl.sum(o_t * load_vector(d_g, o, i, O)[None, :], 1)
            if WANTED & 16:
                _store_block(d_w_v + h * E * E, block, row, column, i, i, E, E, E)
            if WANTED & 32:
                if column == 0:
                    _store_vector(d_b_v + h * E, b, row, i, E)
    elif pid < 3 * n_e + n_o:
        if WANTED & 64:
            p = pid - 3 * n_e
            h = p // (no * ne)
            o = p // ne % no * BLOCK
            d = p % ne * BLOCK
            for e in tl.range(0, E, BLOCK):
                m_t = load_transposed(d_m + h * E * O, e, o, i, i, O, E, O)
                v_t = load_transposed(w_v + h * E * E, d, e, i, i, E, E, E).to(acc)
                block = tl.dot(m_t, v_t, block, input_precision="ieee", out_dtype=acc)
            bias = load_vector(b_v + h * E, d, i, E).to(acc)
            block += load_vector(d_g, o, i, O)[:, None] * bias[None, :]
            _store_block(d_w_o + h * E, block, o, d, i, i, H * E, O, E)
    else:
        o = (pid - 3 * n_e - n_o) * BLOCK
        b = load_vector(d_b, o, i, O)
        if WANTED & 128:
            _store_vector(d_b_o, b, o, i, O)
        if WANTED & 512:
            _store_vector(d_b_r, b, o, i, O)
        if WANTED & 256:
            for e in tl.range(0, E, BLOCK):
                _store_block(d_w_r, load_transposed(d_r, e, o, i, i, O, E, O), o, e, i, i, E, O, E)


@triton.jit
def reduce_partial(
    partial,  # (programs, size)
    total,  # (size,)
    programs,
    E: tl.constexpr,
    H: tl.constexpr,
    O: tl.constexpr,
    NEED_SCORES: tl.constexpr,
    NEED_VALUES: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """total = the sum over programs, in a fixed order; zero for the parts nobody needs, which were never written."""
    scores: tl.constexpr = (E + 1) * H * E
    values: tl.constexpr = scores + H * E * O
    residual: tl.constexpr = values + E * O
    size: tl.constexpr = residual + 2 * O
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    needed = column < 0
    if NEED_SCORES:
        needed = needed | (column < scores)
    if NEED_VALUES:
        needed = needed | ((column >= scores) & (column < values))
    if NEED_RESIDUAL:
        needed = needed | ((column >= values) & (column < residual))
    if NEED_BIAS:
        needed = needed | ((column >= residual) & (column < size))
    sums = tl.zeros((ROWS, COLUMNS), total.dtype.element_ty)
    for first in tl.range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row[:, None] < programs) & needed[None, :]
        sums += tl.load(partial + row.to(tl.int64)[:, None] * size + column[None, :], mask=inside, other=0.0)
    tl.store(total + column, tl.sum(sums, 0), mask=column < size)
