"""The forward of `triton_resident` for fp32, from scaled fp16 operands.

fp16 has the 11 significant bits of TF32 at twice its rate on a tensor core, and operands in the order of accumulators,
but not its range. So x of a sample and the weights are multiplied by powers of two that bring the largest of them to
2^TOP, and results by those that undo it. PRECISION "fp16": one operand for each number, in place of TF32. "fp16x2": its
leading bits and the rest, for fp32's own accuracy.

The maxima of rows are subtracted here: P in fp16 has no room to do without, and the same fma undoes the scaling.

What this cannot do, `doubt` leaves to `recompute`: x or weights out of the range of the scales, a run of four columns
so far below the largest of its sample that it loses bits, rows that see no key, and whatever is not finite. Where keys
pad a tile, they count among the maxima, at 0: so rows of scores that are all far below that are computed once more.
"""

import triton
import triton.language as tl

from .triton_halves import halves, multiply_halves
from .triton_math import (
    BLOCK,
    IDENTITY,
    MASK_PAIRS,
    MERGED,
    NEG_INF,
    PROJECTION,
    TF32_CENTRE,
    _constant,
    cut_off,
    load_block,
    load_rows,
    load_vector,
    quad_order,
    right_operand,
    to_quads,
)
from .triton_streaming import recompute, store_output
from .triton_unshifted import (
    doubt_sums,
    no_doubt,
    ones_of,
    own_samples,
    scales_of_rows,
    start_scores,
    sums_of_rows,
    widen,
)

# What scaling makes of the exponent of the largest. fp16 ends below 2^16 and has an absolute error of 2^-25: so what is
# 2^-16 of the largest still has all its bits as "fp16x2", and what is 2^-28 as "fp16".
TOP = _constant(14)
# And of P: so the sums of up to 64 keys are within the bounds that `doubt_sums` has for fp16.
TOP_P = _constant(9)
# The exponents of numbers for which no scale, nor the product of any two, is out of fp32's range.
LEAST_X = _constant(-64)
LEAST_WEIGHT = _constant(-34)
END = _constant(64)


@triton.jit
def _magnitude(t):
    """The bits of |t|, ordered as |t| is, NaN above all."""
    return t.to(tl.uint32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _largest(t):
    """The largest of `_magnitude` of t [16, 16]."""
    return tl.max(_magnitude(t))


@triton.jit
def _less_one(magnitude):
    """magnitude - 1, and the most there is for 0: so that zeros are never the least."""
    return (magnitude.to(tl.int32, bitcast=True) - 1).to(tl.uint32, bitcast=True)


@triton.jit
def _exponent(magnitude, LEAST: tl.constexpr):
    """That of the leading bit, LEAST if it is less."""
    return tl.maximum((magnitude >> 23).to(tl.int32) - 127, LEAST)


@triton.jit
def _bits(EXPONENT: tl.constexpr):
    """Those of 2^EXPONENT."""
    return tl.full((), (127 + EXPONENT) << 23, tl.uint32)


@triton.jit
def _power(e):
    """2^e, 0 below fp32's normal numbers and infinity above."""
    return ((tl.minimum(tl.maximum(e, -127), 128) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(t, scale, PRECISION: tl.constexpr):
    """`halves` of t * scale. (Leading bits that a mask gives need not be made of packed halves again.)"""
    scale = tl.broadcast_to(scale, t.shape)
    if PRECISION == "fp16x2":
        high = cut_off(t * (scale * TF32_CENTRE))
        return (high.to(tl.float16), tl.fma(t, scale, -high).to(tl.float16))
    else:
        return halves(t * scale, PRECISION)


@triton.jit
def _weights_of_p(p, PRECISION: tl.constexpr):
    """`halves` of P. Its leading bits are cut off, not rounded: its sums lose the same."""
    if PRECISION == "fp16x2":
        high = cut_off(p)
        return (high.to(tl.float16), (p - high).to(tl.float16))
    else:
        return halves(p, PRECISION)


@triton.jit
def _load_weight(pointer, rows, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A matrix (ROWS, COLUMNS), its rows in an order and its columns as quads. [16, 16]"""
    return load_block(pointer, 0, 0, rows, quad_order(tl.arange(0, BLOCK)), stride, ROWS, COLUMNS)


@triton.jit
def _load_head(weights, h, E: tl.constexpr, H: tl.constexpr, O: tl.constexpr):
    """A_h, its rows as quads too, c_h and M_h."""
    i = tl.arange(0, BLOCK)
    a = _load_weight(weights + h * E, quad_order(i), H * E, E, E)
    c = load_vector(weights + E * H * E + h * E, 0, quad_order(i), E)
    return a, c, _load_weight(weights + (E + 1) * H * E + h * E * O, i, O, E, O)


@triton.jit
def _scaled_head(
    weights, h, scale_a, scale_m, E: tl.constexpr, H: tl.constexpr, O: tl.constexpr, PRECISION: tl.constexpr
):
    """As `_load_head`, the matrices as operands."""
    a, c, m = _load_head(weights, h, E, H, O)
    return _scaled(a, scale_a, PRECISION), c, _scaled(m, scale_m, PRECISION)


@triton.jit
def _of_samples(t, PACK: tl.constexpr):
    """The largest of t [16, 4], a number; of packed samples that of each row's own. [16, 1]"""
    if PACK == 1:
        return tl.max(t)
    else:
        samples = tl.max(tl.reshape(tl.max(t, 1), (PACK, BLOCK // PACK)), 1)
        return tl.reshape(tl.broadcast_to(samples[:, None], (PACK, BLOCK // PACK)), (BLOCK, 1))


@triton.jit
def _row_maxima(scores):
    """The largest of each row of tiles [16, 16], the last perhaps [16, 8]. [16, 1]"""
    top = scores[0]
    for k in tl.static_range(1, len(scores)):
        if scores[k].shape[1] < BLOCK:
            left, right = tl.split(tl.permute(tl.reshape(top, (BLOCK, 2, BLOCK // 2)), (0, 2, 1)))
            top = tl.maximum(left, right)
        top = tl.maximum(top, scores[k])
    return tl.max(top, 1)[:, None]


@triton.jit
def _attend(
    y,  # [16, 16] what the head's output is added to, as quads
    doubt,  # [16, 4]
    x_left,  # operands of [16, 16], as quads
    rows,  # [16]
    keys,  # NB operands of [16, 16], the last perhaps [16, 8]
    values,  # NB operands of [16, 16]
    ones,  # NB tiles [16, 8]
    starts,  # NB tiles [16, 16 or 8]
    head,
    scales,  # of q, of c as it is added to that, and of the scores, which undoes both
    PACK: tl.constexpr,
    PRECISION: tl.constexpr,
    LIVE: tl.constexpr,
):
    """One head for one block of rows, of which the first LIVE exist: for a half that does not, P is not computed."""
    a, c, m = head
    scale_q, scale_c, scale_s = scales
    q = multiply_halves(x_left, a, tl.zeros((BLOCK, BLOCK), tl.float32), RESTS=False)
    c = tl.broadcast_to(c[None, :] * scale_c, (BLOCK, BLOCK))
    q = halves(tl.fma(q, tl.broadcast_to(scale_q, (BLOCK, BLOCK)), c), PRECISION)
    scores = ()
    for k in tl.static_range(len(keys)):
        score = multiply_halves(q, keys[k], starts[k], RESTS=False)
        if PACK > 1:
            score = tl.where(own_samples(rows, rows, PACK)[0], score, NEG_INF)
        scores = scores + (score,)
    shift = TOP_P - _row_maxima(scores) * scale_s
    live = tl.arange(0, BLOCK)[:, None] < LIVE
    z = tl.zeros((BLOCK, BLOCK), tl.float32)
    sums = tl.zeros((BLOCK, 8), tl.float32)
    for k in tl.static_range(len(keys)):
        score = scores[k]
        p = tl.exp2(tl.fma(score, tl.broadcast_to(scale_s, score.shape), tl.broadcast_to(shift, score.shape)))
        if LIVE < BLOCK:
            p = tl.where(live, p, 0.0)
        p = _weights_of_p(p, PRECISION)
        if score.shape[1] < BLOCK:
            wide = ()
            for j in tl.static_range(len(p)):
                wide = wide + (widen(p[j]),)
            p = wide
        z = multiply_halves(p, values[k], z)
        for j in tl.static_range(len(p)):
            sums = tl.dot(p[len(p) - 1 - j], ones[k], sums, out_dtype=tl.float32)
    total = sums_of_rows(sums)
    if LIVE < BLOCK:
        total = tl.where(live, total, 1.0)
    doubt = doubt_sums(doubt, total, tl.float16)
    z = _scaled(z, scales_of_rows(total, PRECISION == "fp16x2"), PRECISION)
    return multiply_halves(z, m, y), doubt


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
    scale_a,
    scale_m,
    scale_x,
    scales,
    scale_y,
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
    HOIST: tl.constexpr,
    LIVE: tl.constexpr,
):
    """Every head for one block of rows, and the block's output stored."""
    x_quads = to_quads(x_rows)
    x_left = _scaled(x_quads, scale_x, PRECISION)
    y = tl.zeros((BLOCK, BLOCK), tl.float32)
    if RESIDUAL == PROJECTION:
        y = multiply_halves(x_left, r, y)
    elif RESIDUAL == IDENTITY:
        y = x_quads * (scale_x * scale_m)
    if MASK == MASK_PAIRS:
        starts = ()
        for k in tl.static_range(len(keys)):
            fields = k * BLOCK + tl.arange(0, keys[k][0].shape[1])
            starts = starts + (
                start_scores(mask, rows, fields, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, tl.float32),
            )  # fmt: skip
    if HOIST:
        for h in tl.static_range(H):
            y, doubt = _attend(
                y, doubt, x_left, rows, keys, values, ones, starts, heads[h], scales, PACK, PRECISION, LIVE
            )  # fmt: skip
    else:
        for h in tl.range(H):
            head = _scaled_head(weights, h, scale_a, scale_m, E, H, O, PRECISION)
            y, doubt = _attend(y, doubt, x_left, rows, keys, values, ones, starts, head, scales, PACK, PRECISION, LIVE)
    y = tl.fma(y, tl.broadcast_to(scale_y, (BLOCK, BLOCK)), tl.broadcast_to(b[None, :], (BLOCK, BLOCK)))
    store_output(y, outputs, rows, 0, 0, (), tile, batch, F, O, O, PACK, RELU, 4, True)
    return doubt


@triton.jit
def forward_scaled(
    x,  # (B, F, E), any strides
    weights,  # packed
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
    UNROLL: tl.constexpr,
    HOIST: tl.constexpr,
    KEEP_RELU: tl.constexpr,
):
    """As `forward_resident`."""
    nb: tl.constexpr = (F + BLOCK - 1) // BLOCK
    tail: tl.constexpr = 8 if PACK == 1 and F - (nb - 1) * BLOCK <= 8 else BLOCK
    at_m: tl.constexpr = (E + 1) * H * E
    exact: tl.constexpr = "tf32x4" if PRECISION == "fp16x2" else "tf32"
    # How far below the largest of its sample a run of columns may be.
    span: tl.constexpr = 18 if PRECISION == "fp16x2" else 28
    outputs = (out,)
    if KEEP_RELU:
        outputs = (out, relu_mask)
    i = tl.arange(0, BLOCK)
    b = load_vector(weights + AT_B, 0, quad_order(i), O) + load_vector(weights + AT_B + O, 0, quad_order(i), O)
    largest_a = _bits(-127)
    largest_c = _bits(-127)
    largest_m = _bits(-127)
    if RESIDUAL == PROJECTION:
        r = _load_weight(weights + AT_R, quad_order(i), O, E, O)
        largest_m = _largest(r)
    for h in tl.range(H):
        a, c, m = _load_head(weights, h, E, H, O)
        largest_a = tl.maximum(largest_a, _largest(a))
        largest_c = tl.maximum(largest_c, _largest(c))
        largest_m = tl.maximum(largest_m, _largest(m))
    exponent_a = _exponent(largest_a, LEAST_WEIGHT)
    exponent_c = _exponent(largest_c, LEAST_WEIGHT)
    exponent_m = _exponent(largest_m, LEAST_WEIGHT)
    scale_a = _power(TOP - exponent_a)
    scale_m = _power(TOP - exponent_m)
    least = tl.minimum(_less_one(largest_a), _less_one(largest_m))
    most = tl.maximum(tl.maximum(largest_a, largest_c), largest_m)
    end = tl.where((least < _bits(LEAST_WEIGHT)) | (most >= _bits(END)), 0, _bits(END))
    if RESIDUAL == PROJECTION:
        r = _scaled(r, scale_m, PRECISION)
    else:
        r = ()
    ones = ()
    for k in tl.static_range(nb):
        ones = ones + (ones_of(k * BLOCK + i, F, F + BLOCK if PACK == 1 else BLOCK // PACK, tl.float16),)
    heads = ()
    if HOIST:
        for h in tl.static_range(H):
            heads = heads + (_scaled_head(weights, h, scale_a, scale_m, E, H, O, PRECISION),)
    for t in tl.range(tl.program_id(0), (batch + PACK - 1) // PACK, tl.num_programs(0)):
        tile = tl.cast(t, tl.int64)
        loaded = ()
        top = tl.zeros((BLOCK, 4), tl.uint32)
        bottom = top
        for k in tl.static_range(nb):
            # Blocks that differ by a number alone share the registers of their rows' addresses.
            x_from = x + tl.cast(x_sf, tl.int64) * (k * BLOCK)
            x_k = load_rows(x_from, i, 0, tile, batch, x_sb, x_sf, x_se, F - k * BLOCK, E, PACK, 4)
            loaded = loaded + (x_k,)
            runs = tl.max(tl.reshape(_magnitude(x_k), (BLOCK, 4, 4)), 2)
            top = tl.maximum(top, runs)
            bottom = tl.maximum(bottom, ~_less_one(runs))
        largest = _of_samples(top, PACK)
        doubtful = ~_of_samples(bottom, PACK) < tl.maximum(largest, _bits(LEAST_X + span)) - (span << 23)
        # Packed samples share dots, so what is not finite spoils them all.
        doubtful = doubtful | (tl.max(top) >= end)
        doubt = tl.maximum(no_doubt(BLOCK), tl.where(doubtful, 0xFFFFFFFF, 0).to(tl.uint32))
        exponent_x = _exponent(largest, LEAST_X)
        # x A is below 2^(2 TOP + 6), and so are q and c together made to be below 2^(TOP + 1).
        exponent_q = tl.minimum(TOP - 6 - exponent_x - exponent_a, TOP - 1 - exponent_c)
        scale_x = _power(TOP - exponent_x)
        scales = (
            _power(exponent_q + exponent_x + exponent_a - 2 * TOP),
            _power(exponent_q),
            _power(exponent_x - TOP - exponent_q),
        )
        scale_y = _power(exponent_x + exponent_m - 2 * TOP)
        keys = ()
        values = ()
        starts = ()
        for k in tl.static_range(nb):
            parts = _scaled(loaded[k], scale_x, PRECISION)
            values = values + (parts,)
            of_key = ()
            for j in tl.static_range(len(parts)):
                part = parts[j]
                if k == nb - 1 and tail == 8:
                    part, _ = tl.split(tl.permute(tl.reshape(part, (2, 8, BLOCK)), (1, 2, 0)))
                of_key = of_key + (right_operand(part, False),)
            keys = keys + (of_key,)
            if MASK != MASK_PAIRS:
                fields = k * BLOCK + tl.arange(0, of_key[0].shape[1])
                starts = starts + (
                    start_scores(mask, i, fields, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, tl.float32),
                )  # fmt: skip
        if UNROLL:
            for k in tl.static_range(nb):
                # The registers of a key are not where those of a left operand must be, so x is loaded anew rather than
                # moved for every dot, and not all weights are kept in registers for all blocks.
                tl.debug_barrier()
                x_from = x + tl.cast(x_sf, tl.int64) * (k * BLOCK)
                x_rows = load_rows(x_from, i, 0, tile, batch, x_sb, x_sf, x_se, F - k * BLOCK, E, PACK, 4)
                doubt = _forward_rows(
                    doubt, x_rows, k * BLOCK + i, keys, values, ones, starts, heads, r, b, weights, scale_a, scale_m,
                    scale_x, scales, scale_y, mask, outputs, tile, batch, m_sb, m_sq, m_sk, F, E, H, O, RESIDUAL, RELU,
                    PACK, MASK, PRECISION, HOIST, tail if k == nb - 1 else BLOCK,
                )  # fmt: skip
        else:
            for first in tl.range(0, F, BLOCK):
                x_rows = load_rows(x, first + i, 0, tile, batch, x_sb, x_sf, x_se, F, E, PACK, 4)
                doubt = _forward_rows(
                    doubt, x_rows, first + i, keys, values, ones, starts, heads, r, b, weights, scale_a, scale_m,
                    scale_x, scales, scale_y, mask, outputs, tile, batch, m_sb, m_sq, m_sk, F, E, H, O, RESIDUAL, RELU,
                    PACK, MASK, PRECISION, HOIST, BLOCK,
                )  # fmt: skip
        recompute(
            doubt, x, weights, x, x, tile, x_sb, x_sf, x_se, mask, outputs, 0, key_end + (F - 1) % BLOCK + 1, tile,
            batch, x_sb, x_sf, x_se, m_sb, m_sq, m_sk, key_end, F, E, H, E, O, 0, MERGED, RESIDUAL, RELU, O, at_m, AT_R,
            AT_B, PACK, MASK, exact, True, PRECISION == "fp16x2", tl.float16,
        )  # fmt: skip
