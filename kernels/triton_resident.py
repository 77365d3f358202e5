"""The forward of folded layouts with merged heads for short samples (F up to 64, E and O up to 16): x stays on chip as
keys and values of every head.

Several samples share a tile for F up to 8. A sample whose softmax needs row maxima is computed once more, by
`recompute` of the streaming kernel.
"""

import triton
import triton.language as tl

from .triton_math import (
    BLOCK,
    IDENTITY,
    LEAST_K,
    MASK_PAIRS,
    MERGED,
    PROJECTION,
    as_operand,
    left_operand,
    left_order,
    load_block,
    load_rows,
    load_vector,
    multiply,
    operands,
    quad_order,
    reordered,
    right_operand,
    to_quads,
)
from .triton_streaming import recompute, store_output
from .triton_unshifted import (
    add_keys,
    doubt_sums,
    doubt_values,
    no_doubt,
    ones_of,
    own_samples,
    scales_of_rows,
    start_scores,
    sums_of_rows,
)


@triton.jit
def _load_weight(
    pointer, rows, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Operands of a matrix (ROWS, COLUMNS), its rows in an order and its columns as quads."""
    block = load_block(pointer, 0, 0, rows, quad_order(tl.arange(0, BLOCK)), stride, ROWS, COLUMNS)
    return operands(block.to(DTYPE), PRECISION)


@triton.jit
def _load_head(
    weights, h, E: tl.constexpr, H: tl.constexpr, O: tl.constexpr, PRECISION: tl.constexpr, REORDER: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """A_h, c_h and M_h, the matrices as operands."""
    i = tl.arange(0, BLOCK)
    a = _load_weight(weights + h * E, left_order(i, REORDER), H * E, E, E, PRECISION, DTYPE)
    c = load_vector(weights + E * H * E + h * E, 0, quad_order(i), E)
    m = weights + (E + 1) * H * E + h * E * O
    return a, c, _load_weight(m, reordered(i, REORDER), O, E, O, PRECISION, DTYPE)


@triton.jit
def _attend(
    y,  # [16, 16] what the head's output is added to, as quads
    doubt,  # [16, 4]
    x_left,  # operands of [16, 16]
    rows,  # [16]
    keys,  # NB operands of [16, 16], the last perhaps [16, 8]
    values,  # the same rows in the order `reordered`
    ones,  # NB tiles [16 or 8, 8]
    starts,  # NB tiles [16, 16 or 8]
    head,
    PACK: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
    EXACT: tl.constexpr,
    LIVE: tl.constexpr,
):
    """One head for one block of rows, of which the first LIVE exist: for a half that does not, P is not computed."""
    dtype: tl.constexpr = ones[0].dtype
    a, c, m = head
    c = tl.broadcast_to(c[None, :], (BLOCK, BLOCK))
    if PRECISION == "tf32":
        # An accumulator's registers are in another order than an operand's, so that something must move them: an
        # addition does, and `fma` keeps the compiler from starting the dot with it.
        q = multiply(x_left, a, tl.zeros((BLOCK, BLOCK), y.dtype), PRECISION)
        q = tl.fma(q, tl.full((BLOCK, BLOCK), 1.0, y.dtype), c)
    else:
        q = multiply(x_left, a, c, PRECISION)
    q = operands(as_operand(q.to(dtype), REORDER), PRECISION)
    z = (tl.zeros((BLOCK, BLOCK), y.dtype),)
    sums = tl.zeros((BLOCK, 8), y.dtype)
    live = tl.arange(0, BLOCK)[:, None] < LIVE
    for k in tl.static_range(len(keys)):
        counts = own_samples(rows, rows, PACK)
        if LIVE < BLOCK:
            counts = (tl.broadcast_to(live, (BLOCK, starts[k].shape[1])),)
        z, sums, _ = add_keys(z, sums, (q,), (keys[k],), (values[k],), ones[k], starts[k], counts, PRECISION, REORDER)
    total = sums_of_rows(sums)
    if LIVE < BLOCK:
        total = tl.where(live, total, 1.0)
    doubt = doubt_sums(doubt, total, dtype)
    z = (z[0] * scales_of_rows(total, EXACT)).to(dtype)
    return multiply(operands(as_operand(z, REORDER), PRECISION), m, y, PRECISION), doubt


@triton.jit
def _forward_rows(
    doubt,
    x_rows,  # [16, 16]
    rows,  # [16]
    keys,
    values,
    ones,
    starts,  # NB tiles, () for MASK_PAIRS
    heads,
    r,
    b,
    weights,
    mask,
    outputs,
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
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
    EXACT: tl.constexpr,
    HOIST: tl.constexpr,
    LIVE: tl.constexpr,
):
    """Every head for one block of rows, and the block's output stored."""
    dtype: tl.constexpr = x_rows.dtype
    acc: tl.constexpr = b.dtype
    x_left = operands(left_operand(x_rows, REORDER), PRECISION)
    y = tl.broadcast_to(b[None, :], (BLOCK, BLOCK))
    if RESIDUAL == PROJECTION:
        y = multiply(x_left, r, y, PRECISION)
    elif RESIDUAL == IDENTITY:
        y += to_quads(x_rows).to(acc)
    if MASK == MASK_PAIRS:
        starts = ()
        for k in tl.static_range(len(keys)):
            fields = k * BLOCK + tl.arange(0, keys[k][0].shape[1])
            starts = starts + (
                start_scores(mask, rows, fields, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc),
            )  # fmt: skip
    if HOIST:
        for h in tl.static_range(H):
            y, doubt = _attend(
                y, doubt, x_left, rows, keys, values, ones, starts, heads[h], PACK, PRECISION, REORDER, EXACT, LIVE
            )
    else:
        for h in tl.range(H):
            head = _load_head(weights, h, E, H, O, PRECISION, REORDER, dtype)
            y, doubt = _attend(
                y, doubt, x_left, rows, keys, values, ones, starts, head, PACK, PRECISION, REORDER, EXACT, LIVE
            )
    doubt = doubt_values(doubt, y, dtype)
    store_output(y, outputs, rows, 0, 0, (), tile, batch, F, O, O, PACK, RELU, 4, True)
    return doubt


@triton.jit
def forward_resident(
    x,  # (B, F, E), any strides
    weights,  # packed, fp32 or fp64
    mask,  # bool, strides 0 where it broadcasts; anything where MASK is MASK_NONE
    out,  # (B, F, O), contiguous
    relu_mask,  # as for the streaming kernel
    batch,
    x_sb,
    x_sf,
    x_se,
    m_sb,
    m_sq,
    m_sk,
    key_end,  # as for the streaming kernel
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
    KEEP_RELU: tl.constexpr,
):
    """Each program walks over tiles. UNROLL: row blocks unrolled. HOIST: the heads' weights are kept on chip."""
    dtype: tl.constexpr = x.dtype.element_ty
    acc: tl.constexpr = weights.dtype.element_ty
    nb: tl.constexpr = (F + BLOCK - 1) // BLOCK
    # An eighth of a tile less of scores, where the last keys are so few.
    tail: tl.constexpr = 8 if PACK == 1 and F - (nb - 1) * BLOCK <= 8 else BLOCK
    # And of values, where a dot may be so short.
    tail_k: tl.constexpr = tail if REORDER and tail >= LEAST_K else BLOCK
    # A sixth of all exponentials at F = 39. With TF32 memory takes longer than they do.
    live: tl.constexpr = tail if PRECISION == "ieee" else BLOCK
    at_m: tl.constexpr = (E + 1) * H * E
    outputs = (out,)
    if KEEP_RELU:
        outputs = (out, relu_mask)
    i = tl.arange(0, BLOCK)
    r = ()
    if RESIDUAL == PROJECTION:
        r = _load_weight(weights + AT_R, left_order(i, REORDER), O, E, O, PRECISION, dtype)
    b = load_vector(weights + AT_B, 0, quad_order(i), O) + load_vector(weights + AT_B + O, 0, quad_order(i), O)
    ones = ()
    for k in tl.static_range(nb):
        order = k * BLOCK + reordered(tl.arange(0, tail_k if k == nb - 1 else BLOCK), REORDER)
        ones = ones + (ones_of(order, F, F + BLOCK if PACK == 1 else BLOCK // PACK, dtype),)
    heads = ()
    if HOIST:
        for h in tl.static_range(H):
            heads = heads + (_load_head(weights, h, E, H, O, PRECISION, REORDER, dtype),)
    for t in tl.range(tl.program_id(0), (batch + PACK - 1) // PACK, tl.num_programs(0)):
        tile = tl.cast(t, tl.int64)
        blocks = ()
        keys = ()
        values = ()
        starts = ()
        for k in tl.static_range(nb):
            # Blocks that differ by a number alone share the registers of their rows' addresses.
            x_from = x + tl.cast(x_sf, tl.int64) * (k * BLOCK)
            x_k = load_rows(x_from, i, 0, tile, batch, x_sb, x_sf, x_se, F - k * BLOCK, E, PACK, 4)
            blocks = blocks + (x_k,)
            v_k = x_k
            if REORDER:
                order = reordered(tl.arange(0, tail_k if k == nb - 1 else BLOCK), REORDER)
                v_k = load_rows(x_from, order, 0, tile, batch, x_sb, x_sf, x_se, F - k * BLOCK, E, PACK, 4)
            values = values + (operands(v_k, PRECISION),)
            if k == nb - 1 and tail == 8:
                x_k, _ = tl.split(tl.permute(tl.reshape(x_k, (2, 8, BLOCK)), (1, 2, 0)))
            keys = keys + (operands(right_operand(x_k, REORDER), PRECISION),)
            if MASK != MASK_PAIRS:
                fields = k * BLOCK + tl.arange(0, x_k.shape[0])
                starts = starts + (start_scores(mask, i, fields, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc),)
        doubt = no_doubt(BLOCK)
        if UNROLL:
            for k in tl.static_range(nb):
                if PRECISION == "tf32" and k > 0:
                    # Or the compiler keeps all weights in registers for all blocks, and spills.
                    tl.debug_barrier()
                doubt = _forward_rows(
                    doubt, blocks[k], k * BLOCK + i, keys, values, ones, starts, heads, r, b, weights, mask, outputs,
                    tile, batch, m_sb, m_sq, m_sk, F, E, H, O, RESIDUAL, RELU, PACK, MASK, PRECISION, REORDER, EXACT,
                    HOIST, live if k == nb - 1 else BLOCK,
                )  # fmt: skip
        else:
            for first in tl.range(0, F, BLOCK):
                x_rows = load_rows(x, first + i, 0, tile, batch, x_sb, x_sf, x_se, F, E, PACK, 4)
                doubt = _forward_rows(
                    doubt, x_rows, first + i, keys, values, ones, starts, heads, r, b, weights, mask, outputs,
                    tile, batch, m_sb, m_sq, m_sk, F, E, H, O, RESIDUAL, RELU, PACK, MASK, PRECISION, REORDER, EXACT,
                    HOIST, BLOCK,
                )  # fmt: skip
        recompute(
            doubt, x, weights, x, x, tile, x_sb, x_sf, x_se, mask, outputs, 0, key_end + (F - 1) % BLOCK + 1, tile,
            batch, x_sb, x_sf, x_se, m_sb, m_sq, m_sk, key_end, F, E, H, E, O, 0, MERGED, RESIDUAL, RELU, O, at_m, AT_R,
            AT_B, PACK, MASK, PRECISION, REORDER, EXACT, dtype,
        )  # fmt: skip
