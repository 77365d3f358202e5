"""Softmax without subtracting row maxima, and how a kernel knows afterwards that it was safe.

The maximum of a row only guards 2^s against overflow, and against a row of zeros. So P is computed as it comes, and
the sums of its rows, which are needed anyway, tell whether anything was lost: within the bounds below every P was
finite, and none that mattered was rounded to zero. Outside of them, or where a result is not finite, `doubt` says so,
and the kernel computes the sample once more, with maxima. (To bound the scores beforehand, by norms of A and x, is
looser and costs more.)

The sums come from the tensor core, as the product of P and a tile of ones: of the very numbers that weigh the values.
"""

import triton
import triton.language as tl

from .triton_math import (
    BLOCK,
    MASK_NONE,
    NEG_INF,
    _constant,
    as_operand,
    cut_off,
    load_hidden,
    multiply,
    reciprocal,
)

# Sums may be from 2^-16 to 2^40, as bits of fp32: then no P above 2^-110 of its row's sum is lost. P in fp16 is finite
# below 2^16 and loses bits below 2^-14, which in a sum of 1 or more are no more than rounding a normalised P loses.
LEAST = _constant(0x37800000)
SPAN = _constant(0x53800000 - 0x37800000)
LEAST_FP16 = _constant(0x3F800000)
SPAN_FP16 = _constant(0x47000000 - 0x3F800000)


@triton.jit
def no_doubt(ROWS: tl.constexpr):
    """What `doubt_sums` and `doubt_values` start from. [R, 4]"""
    return tl.zeros((ROWS, 4), tl.uint32)


@triton.jit
def doubt_sums(doubt, sums, DTYPE: tl.constexpr):
    """doubt [R, 4], raised beyond SPAN where a sum [R, 4] is out of bounds or NaN.

    Positive floats are ordered as their bits are, and what is below LEAST wraps around.
    """
    least: tl.constexpr = LEAST_FP16 if DTYPE.is_fp16() else LEAST
    return tl.maximum(doubt, sums.to(tl.float32).to(tl.uint32, bitcast=True) - least)


@triton.jit
def doubt_values(doubt, t, DTYPE: tl.constexpr, ALL: tl.constexpr = False):
    """doubt [R, 4], raised where a number of t [R, 16] is not finite (or enormous): in four of its columns, or in ALL.

    Four are enough where t is a product: a row of the left operand that is not finite spoils all of its columns.
    """
    r: tl.constexpr = t.shape[0]
    even, odd = tl.split(tl.reshape(tl.abs(t) + 1.0, (r, 2, 4, 2)))
    first, second = tl.split(tl.permute(even, (0, 2, 1)))
    doubt = doubt_sums(doubt, first, DTYPE)
    if ALL:
        third, fourth = tl.split(tl.permute(odd, (0, 2, 1)))
        doubt = doubt_sums(doubt_sums(doubt_sums(doubt, second, DTYPE), third, DTYPE), fourth, DTYPE)
    return doubt


@triton.jit
def certain(doubt, DTYPE: tl.constexpr):
    """Whether nothing was doubted; one number."""
    span: tl.constexpr = SPAN_FP16 if DTYPE.is_fp16() else SPAN
    return tl.max(tl.max(doubt, 1), 0) <= span


@triton.jit
def doubtful_samples(doubt, PACK: tl.constexpr, DTYPE: tl.constexpr):
    """Which rows of a packed tile are of samples that are doubted. [16]"""
    span: tl.constexpr = SPAN_FP16 if DTYPE.is_fp16() else SPAN
    samples = tl.max(tl.reshape(tl.max(doubt, 1), (PACK, BLOCK // PACK)), 1) > span
    return tl.reshape(tl.broadcast_to(samples[:, None], (PACK, BLOCK // PACK)), (BLOCK,))


@triton.jit
def ones_of(keys, F: tl.constexpr, SLOT: tl.constexpr, DTYPE: tl.constexpr):
    """1 for keys [K] that exist, 0 for those that pad a tile. [K, 8]"""
    return tl.broadcast_to(tl.where(keys % SLOT < F, 1.0, 0.0).to(DTYPE)[:, None], (keys.shape[0], 8))


@triton.jit
def widen(p):
    """p [R, 8] and 8 columns of zeros."""
    r: tl.constexpr = p.shape[0]
    return tl.reshape(tl.permute(tl.join(p, tl.zeros_like(p)), (0, 2, 1)), (r, 16))


@triton.jit
def add_keys(
    z,  # chunks of D [R, 16]
    sums,  # [R, 8], all columns alike
    q,  # chunks of D, operands of [R, 16]
    keys,  # chunks of D, operands of [16, K]
    values,  # chunks of D, operands of [K or 16, 16], in the order of the columns of `as_operand` of P
    ones,  # [K or 16, 8], in the same order
    start,  # [R, K] what the dot of scores starts from
    counts,  # (), or which P are not to be zero [R, K]
    PRECISION: tl.constexpr,
    REORDER: tl.constexpr,
    RESTS: tl.constexpr = False,
):
    """z + P values, sums + P ones, and P = 2^(start + q keys)."""
    for i in tl.static_range(len(q)):
        start = multiply(q[i], keys[i], start, PRECISION, RESTS=RESTS)
    p = tl.exp2(start)
    if len(counts) > 0:
        p = tl.where(counts[0], p, 0.0)
    operand = as_operand(p.to(ones.dtype), REORDER)
    if p.shape[1] < ones.shape[0]:
        operand = widen(operand)
    parts = (operand,)
    if PRECISION == "tf32x4":
        # Cut off, not rounded as in `operands`: sums lose the same, so what is lost on average does not matter.
        high = cut_off(operand)
        parts = (high, operand - high)
    added = ()
    for i in tl.static_range(len(z)):
        added = added + (multiply(parts, values[i], z[i], PRECISION),)
    precision: tl.constexpr = "tf32" if REORDER else PRECISION
    for i in tl.static_range(len(parts)):
        sums = tl.dot(parts[len(parts) - 1 - i], ones, sums, input_precision=precision, out_dtype=sums.dtype)
    return added, sums, p


@triton.jit
def sums_of_rows(sums):
    """sums [R, 8], all columns alike, as [R, 4]: one number for each thread that has part of a row."""
    r: tl.constexpr = sums.shape[0]
    total, _ = tl.split(tl.reshape(sums, (r, 4, 2)))
    return total


@triton.jit
def across_rows(t, COLUMNS: tl.constexpr = 16):
    """t [R, 4], as `sums_of_rows` leaves it, as [R, COLUMNS]."""
    r: tl.constexpr = t.shape[0]
    return tl.reshape(tl.broadcast_to(t[:, None, :, None], (r, COLUMNS // 8, 4, 2)), (r, COLUMNS))


@triton.jit
def scales_of_rows(total, EXACT: tl.constexpr):
    """1 / total [R, 4], as [R, 16]."""
    return across_rows(reciprocal(total, EXACT))


@triton.jit
def start_scores(
    mask, rows, keys, tile, batch, stride_b, stride_q, stride_k, F: tl.constexpr, PACK: tl.constexpr,
    MASK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What the dot of scores starts from: 0, or -inf where the user's mask hides the key. [R, K]"""
    if MASK == MASK_NONE:
        return tl.zeros((rows.shape[0], keys.shape[0]), ACC)
    else:
        hidden = load_hidden(mask, rows, keys, tile, batch, stride_b, stride_q, stride_k, F, PACK, MASK)
        start = tl.where(hidden != 0, NEG_INF, 0.0).to(ACC)
        return tl.broadcast_to(start, (rows.shape[0], keys.shape[0]))


@triton.jit
def own_samples(rows, keys, PACK: tl.constexpr):
    """As `counts` of `add_keys`: which keys of a packed tile are of the row's sample."""
    if PACK > 1:
        slot: tl.constexpr = BLOCK // PACK
        return (rows[:, None] // slot == keys[None, :] // slot,)
    else:
        return ()
