"""The resident backward: of short samples of narrow folded layouts, whose x, dx and exponentials stay on chip.

Input gradients are added up in registers. Weight gradients: as in the streaming backward. 16-bit tensors are operands
as they are, fp32 ones scaled, in one fp16 part or two.
"""

import triton
import triton.language as tl

from .triton_backward import (
    add,
    clear,
    column_halves,
    column_pairs,
    load_output_gradient,
    rows_exchanged,
    sees_a_key,
)
from .triton_halves import halves, multiply_halves, power_of_two
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
)
from .triton_unshifted import across_rows, ones_of, sums_of_rows

# Scores, in powers of two, up to which no maximum need be subtracted: their exponentials, the sums of these and the
# sums' reciprocals take up half the range of fp32's and bf16's exponents, or a third of fp16's; the rest is for
# gradients.
SAFE_SCORE = _constant(60.0)
SAFE_SCORE_FP16 = _constant(3.0)
ONES = _constant(8)  # the narrowest right operand of a dot: sums of rows come from the tensor core


# fp32 tensors: x, dy and the weights are scaled by powers of two to be fp16 operands, "fp16" or "fp16x2", each sample's
# x and dy by their own. What is computed from them is in units of these, times a known power of two that keeps it below
# 2^16, since with rows of P that sum to one
#     |q| <= 16 |x| |a| + |c|,    |dz| <= 16 |dy| |w|,    |dS| <= 8 |dz| |x|,    |dq| <= 16 |dz| |x| |x|.
# No bound is far from what can be, so "fp16x2" stays well above fp16's smallest number, 2^-24. "fp16" has bits to
# spare: what is added up is an operand as it is, but for dz, which is multiplied by 1 / sum(p) anyway. The scales
# end at 2^48: of x, dy or weights below 2^-46 or so, bits are lost.


@triton.jit
def _binades(PRECISION: tl.constexpr):
    """log2 of the largest of x, dy, a, and m and r; and what no sum of 16 products of x and a exceeds."""
    if PRECISION == "fp16x2":
        return 14, 6, 14, 12, 2.0**34
    else:
        return 2, 2, 6, 2, 2.0**14


@triton.jit
def _factors(PRECISION: tl.constexpr):
    """What makes operands of sums: dz, dS, dq."""
    if PRECISION == "fp16x2":
        return 2.0**-9, 2.0**-18, 2.0**-16
    elif PRECISION == "fp16":
        return 2.0**-6, 1.0, 1.0
    else:
        return 1.0, 1.0, 1.0


@triton.jit
def _operand(t, scale, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """t as an operand of dots: the parts of t * scale, or t itself in 16 bits."""
    if PRECISION == "ieee":
        return (t.to(DTYPE),)
    else:
        return halves(t * scale, PRECISION)


@triton.jit
def _transposed(parts):
    """The transposes of parts [16, 16]: for a product, the right operand that a thread has of it.

    `tl.trans` would be sent through shared memory. After this it brings a product there as it is, with fewer
    instructions than the shuffles that make it a right operand else.
    """
    turned = ()
    for k in tl.static_range(len(parts)):
        t = tl.permute(tl.reshape(parts[k], (BLOCK, 2, 8)), (1, 2, 0))
        turned = turned + (tl.reshape(t, (BLOCK, BLOCK)),)
    return turned


# fp32 tensors: x, dy and weights stand in shared memory, and blocks of rows load them from there: registers are what is
# short. The compiler sends an operand there where it sends the transpose of `rows_exchanged`; else it keeps it. So rows
# are loaded in that order, which costs nothing. Of products, those of a sum over rows are exchanged, in both operands;
# or, where the other operand is x or dy, the columns, which are then those of the sum.


@triton.jit
def _exchanged(i):
    """i from 0 to 15, its bits 2 and 3 exchanged; its own inverse."""
    return i % 4 + i // 8 * 4 + i // 4 % 2 * 8


@triton.jit
def _loading_order(PRECISION: tl.constexpr):
    """The order in which 16 rows of a tensor are loaded: `_rows_exchanged` restores the natural one."""
    i = tl.arange(0, BLOCK)
    if PRECISION != "ieee":
        i = _exchanged(i)
    return i


@triton.jit
def _rows_exchanged(parts, PRECISION: tl.constexpr):
    """`rows_exchanged` parts of fp32 tensors."""
    if PRECISION == "ieee":
        return parts
    exchanged = ()
    for k in tl.static_range(len(parts)):
        exchanged = exchanged + (rows_exchanged(parts[k], 2),)
    return exchanged


@triton.jit
def _columns_exchanged(parts, PRECISION: tl.constexpr):
    """Parts [16, 16] of fp32 tensors, their columns in the order `_exchanged`."""
    if PRECISION == "ieee":
        return parts
    exchanged = ()
    for k in tl.static_range(len(parts)):
        t = tl.permute(tl.reshape(parts[k], (BLOCK, 2, 2, 4)), (0, 2, 1, 3))
        exchanged = exchanged + (tl.reshape(t, (BLOCK, BLOCK)),)
    return exchanged


@triton.jit
def _product(
    a, b, acc, TURN_A: tl.constexpr = False, TURN_B: tl.constexpr = False, RESTS: tl.constexpr = False
):  # fmt: skip
    """acc + a b of operands, or of their transposes. RESTS: as for `multiply_halves`."""
    left, right = a, b
    if TURN_A:
        left = ()
        for k in tl.static_range(len(a)):
            left = left + (tl.trans(a[k]),)
    if TURN_B:
        right = ()
        for k in tl.static_range(len(b)):
            right = right + (tl.trans(b[k]),)
    return multiply_halves(left, right, acc, RESTS)


@triton.jit
def _finite(parts, PACK: tl.constexpr, ACC: tl.constexpr):
    """`finite` parts."""
    clean = ()
    for k in tl.static_range(len(parts)):
        clean = clean + (finite(parts[k], PACK, ACC),)
    return clean


@triton.jit
def _sum_of(parts, ACC: tl.constexpr):
    """The sum of the parts."""
    t = parts[0].to(ACC)
    for k in tl.static_range(1, len(parts)):
        t += parts[k].to(ACC)
    return t


@triton.jit
def _largest(pointer, START: tl.constexpr, END: tl.constexpr, ACC: tl.constexpr):
    """The largest |pointer[i]| for START <= i < END."""
    top = tl.zeros((128,), ACC)
    for first in tl.range(START, END, 128):
        at = first + tl.arange(0, 128)
        top = tl.maximum(top, tl.abs(tl.load(pointer + at, mask=at < END, other=0.0)))
    return tl.max(top, 0)


@triton.jit
def _largest_of_samples(tiles, PACK: tl.constexpr):
    """The largest |t| in the tiles of a sample; in those of packed samples, of each [16, 1]."""
    top = tl.abs(tiles[0])
    for k in tl.static_range(1, len(tiles)):
        top = tl.maximum(top, tl.abs(tiles[k]))
    top = tl.max(top, 1)
    if PACK == 1:
        return tl.max(top, 0)
    else:
        samples = tl.max(tl.reshape(top, (PACK, BLOCK // PACK)), 1)
        return tl.reshape(tl.broadcast_to(samples[:, None], (PACK, BLOCK // PACK)), (BLOCK, 1))


@triton.jit
def _inverse(scale, PRECISION: tl.constexpr):
    """1 / scale, a power of two."""
    if PRECISION == "ieee":
        return 1.0
    else:
        return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _common(unit, PACK: tl.constexpr, PRECISION: tl.constexpr):
    """What brings rows in units of their own, powers of two, into one, and that."""
    if PACK == 1 or PRECISION == "ieee":
        return 1.0, unit
    else:
        largest = tl.max(unit)
        return unit * _inverse(largest, PRECISION), largest


@triton.jit
def _accumulate(
    pointer, block, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWS_EXCHANGED: tl.constexpr = False,
    COLUMNS_EXCHANGED: tl.constexpr = False,
):  # fmt: skip
    """pointer[:ROWS, :COLUMNS] += block [16, 16] of a row-major matrix. EXCHANGED: in the order `_exchanged`.

    In pairs of columns, which are a load and a store of the thread that has them, with no way through shared memory.
    """
    i = tl.arange(0, BLOCK)
    if ROWS_EXCHANGED:
        i = _exchanged(i)
    halves = column_halves(block)
    masked: tl.constexpr = ROWS % BLOCK != 0 or COLUMNS % BLOCK != 0
    half: tl.constexpr = 4 if COLUMNS_EXCHANGED else 8
    for k in tl.static_range(2):
        j = column_pairs()
        if COLUMNS_EXCHANGED:
            j = tl.max_contiguous(tl.multiple_of(_exchanged(tl.arange(0, 8)), 2), 2)
        pointers = block_pointers(pointer, 0, k * half, i, j, stride)
        add(pointers, halves[k], (i[:, None] < ROWS) & (j[None, :] < COLUMNS - k * half), masked)


@triton.jit
def _accumulate_sums(pointer, sums, SIZE: tl.constexpr, EXCHANGED: tl.constexpr = False):
    """pointer[:SIZE] += sums [16, 8], whose columns are all alike. Each of a row's four threads, of one warp, does the
    same. EXCHANGED: in the order `_exchanged`."""
    i = tl.arange(0, BLOCK)
    if EXCHANGED:
        i = _exchanged(i)
    i = tl.max_contiguous(i, 1)
    pointers = block_pointers(pointer, 0, 0, i, tl.arange(0, 4) * 0, 1)
    inside = tl.broadcast_to(i[:, None] < SIZE, (BLOCK, 4))
    add(pointers, sums_of_rows(sums), inside, SIZE % BLOCK != 0)


@triton.jit
def _accumulate_vector(pointer, vector, SIZE: tl.constexpr):
    """pointer[:SIZE] += vector [16]."""
    i = tl.arange(0, BLOCK)
    add(pointer + i, vector, i < SIZE, SIZE % BLOCK != 0)


@triton.jit
def _load_output_tiles(
    grad, relu_mask, first, nought, tile, batch, d_sb, d_sf, d_so, F: tl.constexpr, O: tl.constexpr,
    WIDTH: tl.constexpr, HEAD_OUT: tl.constexpr, NB: tl.constexpr, PACK: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dy of a head, or of all, as tiles [16, 16]."""
    d_y = ()
    for k in tl.static_range(NB):
        rows = k * BLOCK + _loading_order(PRECISION)
        d_y_k = load_output_gradient(
            grad, relu_mask, rows, first, nought, tile, batch, d_sb, d_sf, d_so, F, O, WIDTH, HEAD_OUT, PACK, RELU
        )
        d_y = d_y + _rows_exchanged(d_y_k, PRECISION)
    return d_y


@triton.jit
def _load_head(
    weights, h, a_scale, w_scale, E: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HEAD_OUT: tl.constexpr,
    AT_M: tl.constexpr, OUTPUT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a_h [16, 16], c_h [16], both without log2(e) too (or as they are, where units can do without it), m_h [16, 16]
    (a_h where there is none), and the largest |x|^2 at which scores are safe.

    No score exceeds |x|^2 |a_h| + |x| |c_h|, with Frobenius' norm of a_h.
    """
    i = tl.arange(0, BLOCK)
    order = _loading_order(PRECISION)
    a = _rows_exchanged((load_block(weights + h * D, 0, 0, order, i, H * D, E, D),), PRECISION)[0]
    c = load_vector(weights + E * H * D + h * D, 0, i, D)
    m = a
    if OUTPUT != BARE:
        m = load_block(weights + AT_M + h * D * HEAD_OUT, 0, 0, order, i, HEAD_OUT, D, HEAD_OUT)
        m = _rows_exchanged((m,), PRECISION)[0]
    safe = SAFE_SCORE
    if DTYPE.is_fp16():
        safe = SAFE_SCORE_FP16
    c_squared = tl.sum(c * c)
    root = tl.sqrt(c_squared) + tl.sqrt(c_squared + 4.0 * safe * tl.sqrt(tl.sum(a * a)))
    longest_safe = 4.0 * safe * safe / (root * root)
    a_operand = _operand(a, a_scale, DTYPE, PRECISION)
    if PRECISION == "ieee":
        natural = ((a * LN2).to(DTYPE),)
        natural_c = c * LN2
    else:
        natural, natural_c = a_operand, c
    return a_operand, c, natural, natural_c, _operand(m, w_scale, DTYPE, PRECISION), longest_safe


@triton.jit
def _known(t, nought, ROWS: tl.constexpr, COLUMNS: tl.constexpr = 16):
    """t [16, 16] in its first ROWS and COLUMNS, else `nought`, which is a result that is known to be zero there.

    (A zero that the compiler knows of it would move into place for each dot anew.)
    """
    if ROWS < BLOCK:
        t = tl.where((tl.arange(0, BLOCK) < ROWS)[:, None], t, nought)
    if COLUMNS < BLOCK:
        t = tl.where((tl.arange(0, BLOCK) < COLUMNS)[None, :], t, nought)
    return t


@triton.jit
def _diagonals(t):
    """The larger of the blocks [8, 8] on the diagonal of t [16, 16]."""
    upper, lower = tl.split(tl.permute(tl.reshape(t, (2, 8, BLOCK)), (1, 2, 0)))
    first, _ = column_halves(upper)
    _, second = column_halves(lower)
    return tl.maximum(first, second)


@triton.jit
def _less_maximum(scores, unit, F: tl.constexpr, PACK: tl.constexpr, MASK: tl.constexpr):
    """Tiles of scores [R, K] in a unit, less their rows' maxima, -inf for keys that do not exist."""
    if F % BLOCK != 0 and PACK == 1:
        exist = ()
        for k in tl.static_range(len(scores)):
            keys = k * BLOCK + tl.arange(0, BLOCK)
            exist = exist + (tl.where((keys < F)[None, :], scores[k], NEG_INF),)
        scores = exist
    largest = scores[0]
    for k in tl.static_range(1, len(scores)):
        largest = tl.maximum(largest, scores[k])
    reference = row_reference(tl.max(largest, 1), MASK)[:, None] * unit
    less = ()
    for k in tl.static_range(len(scores)):
        less = less + (scores[k] * unit - reference,)
    return less


@triton.jit
def _add_rows(total, t, PRECISION: tl.constexpr):
    """total + t [16, 16], to be added up over rows: by the tensor core [16, 8], all columns alike, or in fp32, all of
    whose bits count in a sum, as it is."""
    if PRECISION == "ieee":
        return _product((t,), (tl.full((BLOCK, ONES), 1.0, t.dtype),), total, True)
    else:
        return total + t


@triton.jit
def _output_operands(d_y, units, PACK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Tiles of dy as operands, and the same as factors of weight gradients."""
    x_unit, (y_scale, y_unit), _, _ = units
    factor, _ = _common(x_unit * y_unit, PACK, PRECISION)
    tiles = ()
    factors = ()
    for k in tl.static_range(len(d_y)):
        tiles = tiles + (_operand(d_y[k], y_scale, DTYPE, PRECISION),)
        factors = factors + (_operand(d_y[k], y_scale * factor, DTYPE, PRECISION),)
    return tiles, factors


@triton.jit
def _differentiate_residual(
    d_x,  # tiles of the sample's rows [16, 16]
    x_tiles,
    d_y,  # as operands
    d_y_factors,  # the same, as factors of weight gradients
    first_out,
    units,
    partial,
    weights,
    E: tl.constexpr,
    O: tl.constexpr,
    HEAD_OUT: tl.constexpr,
    AT_R: tl.constexpr,
    PACK: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds to dx and dr what dy of the output's columns from `first_out` on gives through their projected residual."""
    x_unit, (_, y_unit), (w_scale, _), _ = units
    dtype: tl.constexpr = x_tiles[0][0].dtype
    acc: tl.constexpr = weights.dtype.element_ty
    i = tl.arange(0, BLOCK)
    if NEED_INPUT:
        into_z, _, _ = _factors(PRECISION)
        r = load_block(weights + AT_R + first_out, 0, 0, _loading_order(PRECISION), i, O, E, HEAD_OUT)
        r = _operand(_rows_exchanged((r,), PRECISION)[0], w_scale * into_z, dtype, PRECISION)
        added = ()
        for k in tl.static_range(len(d_x)):
            added = added + (_product(d_y[k], r, d_x[k], False, True, True),)
        d_x = added
    if NEED_RESIDUAL:
        d_r = tl.zeros((BLOCK, BLOCK), acc)
        for k in tl.static_range(len(d_y)):
            d_r = _product(x_tiles[k], d_y_factors[k], d_r, True)
        _, unit = _common(x_unit * y_unit, PACK, PRECISION)
        _accumulate(partial + AT_R + first_out, d_r * unit, O, E, HEAD_OUT)
    return d_x


@triton.jit
def _differentiate_bias(
    d_y,
    first_out,
    ceilings,
    partial,
    mask,
    tile,
    batch,
    m_sb,
    m_sq,
    m_sk,
    F: tl.constexpr,
    O: tl.constexpr,
    HEAD_OUT: tl.constexpr,
    AT_B: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds to db and dg what dy of the output's columns from `first_out` on, in tiles, gives."""
    scaled: tl.constexpr = PRECISION != "ieee"
    acc: tl.constexpr = partial.dtype.element_ty
    i = tl.arange(0, BLOCK)
    if MASK == MASK_KEYS and PACK == 1:
        top = tl.full((1, BLOCK), NEG_INF, acc)
        for k in tl.static_range(len(ceilings)):
            top = tl.maximum(top, tl.where((k * BLOCK + i < F)[None, :], ceilings[k], NEG_INF))
        sees = tl.max(top, 1) > NEG_INF
    d_b = tl.zeros((BLOCK, BLOCK if scaled else ONES), acc)
    d_g = d_b
    for k in tl.static_range(len(d_y)):
        d_b = _add_rows(d_b, d_y[k], PRECISION)
        if MASK != MASK_NONE:
            rows = k * BLOCK + i
            if MASK == MASK_KEYS and PACK == 1:
                seen = tl.broadcast_to(sees, (BLOCK,))
            else:
                seen = sees_a_key(mask, rows, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
            d_g = _add_rows(d_g, tl.where(seen[:, None], d_y[k], 0.0).to(d_y[k].dtype), PRECISION)
    if MASK == MASK_NONE:
        d_g = d_b
    if scaled:
        _accumulate_vector(partial + AT_B + first_out, tl.sum(d_b, 0), HEAD_OUT)
        _accumulate_vector(partial + AT_B + O + first_out, tl.sum(d_g, 0), HEAD_OUT)
    else:
        _accumulate_sums(partial + AT_B + first_out, d_b, HEAD_OUT)
        _accumulate_sums(partial + AT_B + O + first_out, d_g, HEAD_OUT)


@triton.jit
def _differentiate_columns(
    d_x,  # tiles of the sample's rows [16, 16]
    x_tiles,
    first_out,
    ceilings,
    units,
    partial,
    weights,
    grad,
    relu_mask,
    mask,
    nought,
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
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    RELU: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Loads dy of a head's own columns of the output, from `first_out` on, and adds what it gives past the head.
    Returns dx, and dy as `_output_operands`."""
    d_y = _load_output_tiles(
        grad, relu_mask, first_out, nought, tile, batch, d_sb, d_sf, d_so, F, O, HEAD_OUT, HEAD_OUT, len(x_tiles), PACK,
        RELU, PRECISION,
    )  # fmt: skip
    tiles, factors = _output_operands(d_y, units, PACK, x_tiles[0][0].dtype, PRECISION)
    if NEED_BIAS:
        _differentiate_bias(
            d_y, first_out, ceilings, partial, mask, tile, batch, m_sb, m_sq, m_sk, F, O, HEAD_OUT, AT_B, PACK, MASK,
            PRECISION,
        )  # fmt: skip
    if RESIDUAL == PROJECTION:
        d_x = _differentiate_residual(
            d_x, x_tiles, tiles, factors, first_out, units, partial, weights, E, O, HEAD_OUT, AT_R, PACK, NEED_INPUT,
            NEED_RESIDUAL, PRECISION,
        )  # fmt: skip
    return d_x, tiles, factors


@triton.jit
def _after(t, other, nought):
    """t, not before `other` is there; both fp32, nought 0, which the compiler does not know."""
    bits = t.to(tl.int32, bitcast=True) | (other.to(tl.int32, bitcast=True) & nought)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _differentiate_head(
    d_x,  # tiles of the sample's rows [16, 16]
    x_tiles,
    values,  # x_tiles, finite
    ones,  # tiles [16, 8], 1 for keys that exist
    d_y,
    d_y_factors,  # the same, as factors of weight gradients
    ceilings,  # tiles [1, 16] for MASK_KEYS
    bad,  # [16]
    units,
    head,
    longest,  # the largest |x|^2
    h,
    nought,
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
    a, c, natural_a, natural_c, m, longest_safe = head
    x_unit, (_, y_unit), (w_scale, d_z_unit), (c_scale, q_scale, q_unit) = units
    scaled: tl.constexpr = PRECISION != "ieee"
    dtype: tl.constexpr = a[0].dtype
    acc: tl.constexpr = c.dtype
    nb: tl.constexpr = len(x_tiles)
    # Of the last block's rows and columns: the others do not exist.
    LAST: tl.constexpr = 8 if PACK == 1 and F - (nb - 1) * BLOCK <= 8 else BLOCK
    through_head: tl.constexpr = NEED_INPUT or NEED_SCORES
    into_values: tl.constexpr = NEED_VALUES and OUTPUT != BARE
    i = tl.arange(0, BLOCK)
    nothing = tl.zeros((BLOCK, BLOCK), acc)
    ones_right = (tl.full((BLOCK, ONES), 1.0, dtype),)
    into_z, into_s, into_q = _factors(PRECISION)
    score_unit = q_unit * x_unit
    if scaled:
        score_unit = tl.maximum(score_unit, 2.0**-120)  # not zero, by which -inf is multiplied
    key_factor = score_unit * (LN2 / into_s)
    query_factor = key_factor * q_scale * (1.0 / into_q)
    d_q_unit = d_z_unit * x_unit * x_unit * (1.0 / (into_z * into_s * into_q))
    d_a_factor, d_a_unit = _common(d_q_unit * x_unit, PACK, PRECISION)
    d_c_factor, d_c_unit = _common(d_q_unit, PACK, PRECISION)
    _, d_m_unit = _common(x_unit * y_unit, PACK, PRECISION)
    d_a = nothing
    d_c = tl.zeros((BLOCK, ONES), acc)
    d_m = nothing
    for r in tl.static_range(nb):
        if not HOIST:
            # What a block of rows needs is not to be fetched during the one before: registers are what is short.
            tl.debug_barrier()
        rows = r * BLOCK + i
        start = _known(tl.broadcast_to(c[None, :] * c_scale, (BLOCK, BLOCK)), nothing, LAST if r == nb - 1 else BLOCK)
        if scaled and r > 0 and NEED_INPUT:
            # Blocks of rows that overlap would take more registers than there are.
            for k in tl.static_range(nb):
                start = _after(start, d_x[k], nought)
        q = _product(x_tiles[r], a, start, RESTS=True)
        q = _operand(_known(q * q_scale, q, LAST if r == nb - 1 else BLOCK), 1.0, dtype, PRECISION)
        plain = ()
        scores = ()
        for k in tl.static_range(nb):
            keys = k * BLOCK + i
            s = _product(q, x_tiles[k], nothing, False, True, True)
            plain = plain + (s,)
            if MASK == MASK_PAIRS:
                ceiling = load_ceiling(mask, rows, keys, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
                scores = scores + (hide(s, ceiling, rows, keys, F, PACK, MASK),)
            else:
                scores = scores + (hide(s, ceilings[k], rows, keys, F, PACK, MASK),)
        if PACK > 1 or scaled:
            # Whatever a sample holds, packed ones' gradients keep their bits.
            scores = _less_maximum(scores, score_unit, F, PACK, MASK)
        else:
            if not longest <= longest_safe:
                scores = _less_maximum(scores, 1.0, F, PACK, MASK)
        if scaled:
            tl.debug_barrier()
        p = ()
        p_right = ()
        total = tl.zeros((BLOCK, ONES), acc)
        z = nothing
        for k in tl.static_range(nb):
            p_k = _known(tl.exp2(scores[k]), plain[k], LAST if r == nb - 1 else BLOCK, LAST if k == nb - 1 else BLOCK)
            if PACK > 1:
                # Between samples there is nothing, but in rows that are NaN throughout.
                p_k = tl.where(own_keys(rows, k * BLOCK + i, F, PACK), p_k, 0.0)
            p = p + (p_k,)
            p_right = p_right + (_operand(p_k, 1.0, dtype, PRECISION),)
            total = _product(p_right[k], (ones[k],), total)
            z = _product(p_right[k], values[k], z)
        scale = across_rows(row_scale(_known(sums_of_rows(total), 1.0, LAST if r == nb - 1 else BLOCK), MASK, EXACT))
        z = _known(z * scale, z, LAST if r == nb - 1 else BLOCK)
        if PACK > 1:
            z += bad[:, None]
        if scaled:
            tl.debug_barrier()
        if into_values:
            z_tile = _columns_exchanged(_operand(z, 1.0, dtype, PRECISION), PRECISION)
            d_m = _product(z_tile, d_y_factors[r], d_m, True)
        if through_head:
            if OUTPUT == BARE:
                d_z = _sum_of(d_y[r], acc) * w_scale
            else:
                d_z = _product(d_y[r], m, nothing, False, True, True)
            d_z = _known(d_z * (scale * into_z), d_z, LAST if r == nb - 1 else BLOCK)
            d_z_tile = _operand(d_z, 1.0, dtype, PRECISION)
            if NEED_INPUT:
                d_z_right = _rows_exchanged(_finite(d_z_tile, PACK, acc), PRECISION)
                added = ()
                for k in tl.static_range(nb):
                    left = _rows_exchanged(p_right[k], PRECISION)
                    added = added + (_product(left, d_z_right, d_x[k], True),)
                d_x = added
            if scaled:
                tl.debug_barrier()
            d_p = ()
            for k in tl.static_range(nb):
                d_p = d_p + (_product(d_z_tile, x_tiles[k], nothing, False, True),)
            if scaled:
                # Of what it is subtracted from, so that a row of dS sums to zero.
                weighted = tl.zeros((BLOCK, BLOCK), acc)
                for k in tl.static_range(nb):
                    product = p[k] * d_p[k]
                    if PACK > 1:
                        product = tl.where(own_keys(rows, k * BLOCK + i, F, PACK), product, 0.0)
                    weighted += product
                delta = tl.sum(weighted, 1)[:, None] * (scale * into_s)
            else:
                # delta must come from the very dz that it is compared with.
                delta = tl.sum(d_z_tile[0].to(acc) * z, 1)[:, None]
            d_q = nothing
            d_s = ()
            for k in tl.static_range(nb):
                if F == 1:
                    d_s_k = p[k] * 0.0  # the softmax of one key is constant
                else:
                    d_s_k = _known(
                        p[k] * (d_p[k] * into_s - delta),
                        d_p[k],
                        LAST if r == nb - 1 else BLOCK,
                        LAST if k == nb - 1 else BLOCK,
                    )
                if PACK > 1:
                    d_s_k = tl.where(own_keys(rows, k * BLOCK + i, F, PACK), d_s_k, 0.0)
                d_s = d_s + (_operand(d_s_k, 1.0, dtype, PRECISION),)
                d_q = _product(d_s[k], values[k], d_q)
            d_q = _known(d_q * into_q, d_q, LAST if r == nb - 1 else BLOCK)
            d_q_tile = _operand(d_q, 1.0, dtype, PRECISION)
            if NEED_SCORES:
                d_a_tile = _operand(d_q, d_a_factor, dtype, PRECISION)
                d_c_tile = _operand(d_q, d_c_factor, dtype, PRECISION)
                if scaled:
                    d_a_tile = _columns_exchanged(d_a_tile, PRECISION)
                    d_c_tile = _columns_exchanged(d_c_tile, PRECISION)
                    d_a = _product(x_tiles[r], d_a_tile, d_a, True)
                else:
                    d_a = _product(x_tiles[r], _transposed(d_a_tile), d_a, True, True)
                d_c = _product(d_c_tile, ones_right, d_c, True)
            if scaled:
                tl.debug_barrier()
            if NEED_INPUT:
                if scaled:
                    q_right = _rows_exchanged(_finite(q, PACK, acc), PRECISION)
                else:
                    # Transposed from the start: it is a right operand then, and loses log2(e) without a multiplication.
                    start = tl.broadcast_to(natural_c[:, None], (BLOCK, BLOCK))
                    start = _known(start, nothing, BLOCK, LAST if r == nb - 1 else BLOCK)
                    q_t = _product(natural_a, x_tiles[r], start, True, True)
                    q_right = _transposed(_finite((q_t.to(dtype),), PACK, acc))
                added = ()
                for k in tl.static_range(nb):
                    d_x_k = d_x[k]
                    left = _rows_exchanged(d_s[k], PRECISION)
                    if scaled:
                        d_x_k += _product(left, q_right, nothing, True) * key_factor
                    else:
                        d_x_k = _product(left, q_right, d_x_k, True)
                    if k == r and scaled:
                        d_x_k += _product(d_q_tile, natural_a, nothing, False, True) * query_factor
                    elif k == r:
                        d_x_k = _product(d_q_tile, natural_a, d_x_k, False, True)
                    added = added + (d_x_k,)
                d_x = added
    if NEED_SCORES:
        if scaled:
            d_a *= d_a_unit * LN2
            d_c *= d_c_unit * LN2
        else:
            d_a *= LN2
            d_c *= LN2
        _accumulate(partial + h * D, d_a, H * D, E, D, False, scaled)
        _accumulate_sums(partial + E * H * D + h * D, d_c, D, scaled)
    if into_values:
        _accumulate(partial + AT_M + h * D * HEAD_OUT, d_m * d_m_unit, HEAD_OUT, D, HEAD_OUT, scaled)
    return d_x


@triton.jit
def backward_resident(
    grad,  # (B, F, O), any strides
    x,  # (B, F, E), any strides
    weights,  # packed, fp32 or fp64
    mask,
    relu_mask,  # as for the streaming kernel
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
    scaled: tl.constexpr = PRECISION != "ieee"
    operand_dtype: tl.constexpr = tl.float16 if PRECISION != "ieee" else dtype
    nb: tl.constexpr = (F + BLOCK - 1) // BLOCK
    size: tl.constexpr = AT_B + 2 * O
    through_heads: tl.constexpr = NEED_INPUT or NEED_SCORES or (NEED_VALUES and OUTPUT != BARE)
    i = tl.arange(0, BLOCK)
    nothing = tl.zeros((BLOCK, BLOCK), acc)
    pid = tl.program_id(0)
    partial += tl.cast(pid, tl.int64) * size
    clear(partial, size)
    tl.debug_barrier()
    x_top, y_top, a_top, w_top, most_q = _binades(PRECISION)
    into_z, _, _ = _factors(PRECISION)
    a_scale, w_scale, largest_c = 1.0, 1.0, 0.0
    if scaled:
        a_scale, _ = power_of_two(_largest(weights, 0, E * H * D, acc), a_top)
        largest_c = _largest(weights, E * H * D, E * H * D + H * D, acc)
        largest = _largest(weights, AT_M, AT_B, acc)
        if OUTPUT == BARE:
            largest = tl.maximum(largest, 1.0)
        w_scale, _ = power_of_two(largest, w_top)
    ones = ()
    for k in tl.static_range(nb):
        # For packed samples, whose P between samples is zero, all.
        keys = k * BLOCK + i if (k + 1) * BLOCK > F else i  # full tiles share one
        ones = ones + (ones_of(keys, F if PACK == 1 else BLOCK, nb * BLOCK, operand_dtype),)
    heads = ()
    if HOIST:
        for h in tl.static_range(H):
            head = _load_head(weights, h, a_scale, w_scale, E, H, D, HEAD_OUT, AT_M, OUTPUT, operand_dtype, PRECISION)
            heads = heads + (head,)
    for t in tl.range(pid, (batch + PACK - 1) // PACK, tl.num_programs(0)):
        tile = tl.cast(t, tl.int64)
        part = partial
        folded = weights
        if scaled:
            # Addresses are computed for each tile: kept, they would take more registers than there are.
            unknown_zero = tl.cast(nought, tl.int64) * tile
            part += unknown_zero
            folded += unknown_zero
        x_row, d_row = x_sf, d_sf
        if PRECISION == "fp16x2":
            x_row += unknown_zero
            d_row += unknown_zero
        raw = ()
        x_tiles = ()
        values = ()
        ceilings = ()
        longest = tl.zeros((8, 8), acc)
        for k in tl.static_range(nb):
            rows = k * BLOCK + i
            loaded = k * BLOCK + _loading_order(PRECISION)
            x_k = load_rows(x, loaded, 0, tile, batch, x_sb, x_row, x_se, F, E, PACK)
            raw = raw + _rows_exchanged((x_k,), PRECISION)
            if MASK != MASK_PAIRS:
                ceiling = load_ceiling(mask, i, rows, tile, batch, m_sb, m_sq, m_sk, F, PACK, MASK, acc)
                ceilings = ceilings + (ceiling,)
        bad = poison(raw[0], PACK, acc)
        x_scale, x_unit = 1.0, 1.0
        if scaled:
            x_scale, x_unit = power_of_two(_largest_of_samples(raw, PACK), x_top)
        for k in tl.static_range(nb):
            x_k = _operand(raw[k], x_scale, operand_dtype, PRECISION)
            values = values + (_finite(x_k, PACK, acc),)
            x_tiles = x_tiles + (x_k,)
            if not scaled:
                longest = tl.maximum(longest, _diagonals(_product(x_k, x_k, nothing, False, True)))
        longest = tl.max(tl.max(longest, 1), 0)  # |x|^2: no product of two rows is larger
        WIDTH: tl.constexpr = E if RESIDUAL == IDENTITY else HEAD_OUT
        d_y = ()
        if OUTPUT == MERGED or RESIDUAL == IDENTITY:
            d_y = _load_output_tiles(
                grad, relu_mask, 0, nought, tile, batch, d_sb, d_row, d_so, F, O, WIDTH, HEAD_OUT, nb, PACK, RELU,
                PRECISION,
            )  # fmt: skip
        y_scale, y_unit = 1.0, 1.0
        if scaled:
            if OUTPUT == MERGED or RESIDUAL == IDENTITY:
                largest_y = _largest_of_samples(d_y, PACK)
            else:
                largest_y = tl.zeros_like(_largest_of_samples(raw, PACK))
                for h in tl.range(H):
                    d_y_h = _load_output_tiles(
                        grad, relu_mask, h * HEAD_OUT, nought, tile, batch, d_sb, d_row, d_so, F, O, HEAD_OUT, HEAD_OUT,
                        nb, PACK, RELU, PRECISION,
                    )  # fmt: skip
                    largest_y = tl.maximum(largest_y, _largest_of_samples(d_y_h, PACK))
            y_scale, y_unit = power_of_two(largest_y, y_top)
        c_scale = x_scale * a_scale
        q_scale, q_unit = 1.0, 1.0
        if scaled:
            q_scale, q_unit = power_of_two(largest_c * c_scale + most_q, 14)
            q_unit *= _inverse(c_scale, PRECISION)
        d_z_unit = _inverse(y_scale * w_scale, PRECISION)
        units = (x_unit, (y_scale, y_unit), (w_scale, d_z_unit), (c_scale, q_scale, q_unit))
        d_x_unit = d_z_unit * (1.0 / into_z)
        d_x_tiles = ()
        for k in tl.static_range(nb):
            if NEED_INPUT and RESIDUAL == IDENTITY:
                d_x_tiles = d_x_tiles + (d_y[k].to(acc) * (y_scale * w_scale * into_z),)
            else:
                d_x_tiles = d_x_tiles + (nothing,)
        d_y_tiles = ()
        d_y_factors = ()
        if OUTPUT == MERGED:
            d_y_tiles, d_y_factors = _output_operands(d_y, units, PACK, operand_dtype, PRECISION)
            if NEED_BIAS:
                _differentiate_bias(
                    d_y, 0, ceilings, part, mask, tile, batch, m_sb, m_sq, m_sk, F, O, HEAD_OUT, AT_B, PACK, MASK,
                    PRECISION,
                )  # fmt: skip
        if OUTPUT == MERGED and RESIDUAL == PROJECTION:
            # In a branch, which is always taken: else the heads' dots would share what these load, and keep it.
            if PRECISION != "fp16x2" or nb <= 2 or nought == 0:
                d_x_tiles = _differentiate_residual(
                    d_x_tiles, x_tiles, d_y_tiles, d_y_factors, 0, units, part, folded, E, O, HEAD_OUT, AT_R, PACK,
                    NEED_INPUT, NEED_RESIDUAL, PRECISION,
                )  # fmt: skip
        if HOIST:
            for h in tl.static_range(H):
                tiles_h, factors_h = d_y_tiles, d_y_factors
                if OUTPUT != MERGED:
                    d_x_tiles, tiles_h, factors_h = _differentiate_columns(
                        d_x_tiles, x_tiles, h * HEAD_OUT, ceilings, units, part, folded, grad, relu_mask, mask, nought,
                        tile, batch, d_sb, d_row, d_so, m_sb, m_sq, m_sk, F, E, O, HEAD_OUT, AT_R, AT_B, RESIDUAL, PACK,
                        MASK, RELU, NEED_INPUT, NEED_RESIDUAL, NEED_BIAS, PRECISION,
                    )  # fmt: skip
                if through_heads:
                    d_x_tiles = _differentiate_head(
                        d_x_tiles, x_tiles, values, ones, tiles_h, factors_h, ceilings, bad, units, heads[h],
                        longest, h, nought, part, mask, tile, batch, m_sb, m_sq, m_sk, F, E, H, D, OUTPUT, HEAD_OUT,
                        AT_M, PACK, MASK, HOIST, NEED_INPUT, NEED_SCORES, NEED_VALUES, PRECISION, EXACT,
                    )  # fmt: skip
        elif through_heads or OUTPUT != MERGED:
            for h in tl.range(H):
                tiles_h, factors_h = d_y_tiles, d_y_factors
                if OUTPUT != MERGED:
                    d_x_tiles, tiles_h, factors_h = _differentiate_columns(
                        d_x_tiles, x_tiles, h * HEAD_OUT, ceilings, units, part, folded, grad, relu_mask, mask, nought,
                        tile, batch, d_sb, d_row, d_so, m_sb, m_sq, m_sk, F, E, O, HEAD_OUT, AT_R, AT_B, RESIDUAL, PACK,
                        MASK, RELU, NEED_INPUT, NEED_RESIDUAL, NEED_BIAS, PRECISION,
                    )  # fmt: skip
                if through_heads:
                    head = _load_head(
                        folded, h, a_scale, w_scale, E, H, D, HEAD_OUT, AT_M, OUTPUT, operand_dtype, PRECISION
                    )
                    d_x_tiles = _differentiate_head(
                        d_x_tiles, x_tiles, values, ones, tiles_h, factors_h, ceilings, bad, units, head, longest,
                        h, nought, part, mask, tile, batch, m_sb, m_sq, m_sk, F, E, H, D, OUTPUT, HEAD_OUT, AT_M, PACK,
                        MASK, HOIST, NEED_INPUT, NEED_SCORES, NEED_VALUES, PRECISION, EXACT,
                    )  # fmt: skip
        if NEED_INPUT:
            for k in tl.static_range(nb):
                offsets, exists = row_offsets(k * BLOCK + i, tile, batch, F * E, E, F, PACK)
                d_x_k = d_x_tiles[k] * d_x_unit
                if scaled:
                    # In pairs of columns, as in `_accumulate`.
                    parts = column_halves(d_x_k)
                    for half in tl.static_range(2):
                        j = column_pairs()
                        inside = exists[:, None]
                        if E % BLOCK != 0:
                            inside = inside & (j[None, :] < E - half * 8)
                        tl.store(d_x + offsets[:, None] + j[None, :] + half * 8, parts[half], mask=inside)
                else:
                    inside = exists[:, None]
                    if E % BLOCK != 0:
                        inside = inside & (i[None, :] < E)
                    tl.store(d_x + offsets[:, None] + i[None, :], d_x_k.to(dtype), mask=inside)
