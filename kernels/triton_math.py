"""What the Triton kernels share: dots in the intended precision, orders of keys, addresses of tiles.

A tile is what a program works on at a time: one sample, or PACK samples whose fields share the 16 rows of one block.
Embedding and output widths are cut into chunks of 16 columns, so E = 40 is three chunks, not a tile of 64, and a
weight is read as blocks of (16, 16). Shapes stand in brackets; R = rows (queries), K = keys.
"""

import math
import os

import triton
import triton.language as tl

from .. import weights


def _constant(value):
    """A module constant as kernels may read it: the compiler wants a constexpr, the interpreter a plain number."""
    return value if os.environ.get("TRITON_INTERPRET") == "1" else tl.constexpr(value)


BLOCK = _constant(16)  # the side of the smallest tensor-core tile
LN2 = _constant(math.log(2.0))
TF32_CENTRE = _constant(1.0 + 0.347 / 1024.0)
# The smallest K of a dot of 32-bit operands.
LEAST_K = _constant(8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 16)
NEG_INF = _constant(float("-inf"))
INF = _constant(float("inf"))

# Masks: no mask; a mask of keys, the same for every query; a mask of (query, key) pairs.
MASK_NONE = _constant(0)
MASK_KEYS = _constant(1)
MASK_PAIRS = _constant(2)

# What becomes of the heads' outputs, and what is added to them.
MERGED = _constant(weights.MERGED)
CONCATENATED = _constant(weights.CONCATENATED)
BARE = _constant(weights.BARE)
IDENTITY = _constant(weights.IDENTITY)
PROJECTION = _constant(weights.PROJECTION)


@triton.jit
def cut_off(t):
    """fp32 t without the bits that a TF32 operand does not have, as the tensor core cuts it."""
    return (t.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _leading(t):
    """fp32 t to its leading 11 bits, nearest up to a tenth of the last of them."""
    return cut_off(t * TF32_CENTRE)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. PRECISION: "ieee" (16-bit operands too), "tf32", or "tf32x4" for fp32's accuracy.

    The tensor core cuts a TF32 operand off after 10 bits of mantissa, which doubles the error of rounding and biases
    it. "tf32" therefore scales operands up by a third of their last bit first, which centres the error: its RMS is
    within 6% of rounding's, for one multiplication that infinities and NaN survive.

    "tf32x4" cuts each operand into its leading bits and the exact rest and sums all four TF32 products: without that
    of the rests, gradients miss twice the error of fp32 by a few percent, and so do outputs of a few fields. Triton's
    "tf32x3" also tests for infinities, which the layer does not need: they spread as NaN either way.
    """
    if PRECISION == "tf32":
        return tl.dot(a * TF32_CENTRE, b * TF32_CENTRE, acc, input_precision="tf32", out_dtype=acc.dtype)
    elif PRECISION == "tf32x4":
        a_high = _leading(a)
        b_high = _leading(b)
        a_rest = (a - a_high) * TF32_CENTRE
        b_rest = (b - b_high) * TF32_CENTRE
        acc = tl.dot(a_rest, b_rest, acc, input_precision="tf32", out_dtype=acc.dtype)
        acc = tl.dot(a_rest, b_high, acc, input_precision="tf32", out_dtype=acc.dtype)
        acc = tl.dot(a_high, b_rest, acc, input_precision="tf32", out_dtype=acc.dtype)
        return tl.dot(a_high, b_high, acc, input_precision="tf32", out_dtype=acc.dtype)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def operands(t, PRECISION: tl.constexpr):
    """What `multiply` takes of t: t itself, centred for "tf32", or its leading bits and the exact rest, cut once for
    every use.

    The rest has either sign, so what the tensor core cuts off it does not add up.
    """
    if PRECISION == "tf32x4":
        high = _leading(t)
        return (high, t - high)
    elif PRECISION == "tf32":
        return (t * TF32_CENTRE,)
    else:
        return (t,)


@triton.jit
def operands_of(chunks, PRECISION: tl.constexpr):
    """Of each chunk [R, 16], `operands`."""
    left = ()
    for j in tl.static_range(len(chunks)):
        left = left + (operands(chunks[j], PRECISION),)
    return left


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr, RESTS: tl.constexpr = True):
    """acc + a b of `operands`, in the precisions of `dot`.

    RESTS: with the product of the rests. Logits do without: what it adds is less than an exponent rounds.
    """
    if PRECISION == "tf32x4":
        if RESTS:
            acc = tl.dot(a[1], b[1], acc, input_precision="tf32", out_dtype=acc.dtype)
        acc = tl.dot(a[1], b[0], acc, input_precision="tf32", out_dtype=acc.dtype)
        acc = tl.dot(a[0], b[1], acc, input_precision="tf32", out_dtype=acc.dtype)
        return tl.dot(a[0], b[0], acc, input_precision="tf32", out_dtype=acc.dtype)
    else:
        return tl.dot(a[0], b[0], acc, input_precision=PRECISION, out_dtype=acc.dtype)


# An fp32 accumulator holds columns (2t, 2t+1) of every 8 in thread t, while the left operand of the next TF32 dot
# wants (t, t+4): a shuffle per element. A sum over keys does not care about their order, so `as_operand` renames
# the columns instead, and the other operand's rows are loaded in the order `reordered`; where it is the columns of
# a weight that can be chosen, loading them by `restoring` gives back the natural order after `as_operand`.


@triton.jit
def as_operand(t, REORDER: tl.constexpr):
    """t [R, C] in the order of columns in which an accumulator can be the left operand of a dot for free."""
    if REORDER:
        r: tl.constexpr = t.shape[0]
        c: tl.constexpr = t.shape[1]
        t = tl.reshape(tl.permute(tl.reshape(t, (r, c // 8, 4, 2)), (0, 1, 3, 2)), (r, c))
    return t


@triton.jit
def as_operands(chunks, REORDER: tl.constexpr):
    """Of each chunk [R, 16], `as_operand`."""
    left = ()
    for j in tl.static_range(len(chunks)):
        left = left + (as_operand(chunks[j], REORDER),)
    return left


@triton.jit
def reordered(i, REORDER: tl.constexpr):
    """The column of the accumulator that `as_operand` brings to position i."""
    if REORDER:
        i = (i // 8) * 8 + (i % 4) * 2 + (i % 8) // 4
    return i


@triton.jit
def restoring(i, REORDER: tl.constexpr):
    """What column i of an accumulator must hold so that `as_operand` leaves the natural order."""
    if REORDER:
        i = (i // 8) * 8 + (i % 2) * 4 + (i % 8) // 2
    return i


# Four threads share a row of an accumulator, and thread t holds two of every 8 columns. So if the columns of a 16-wide
# tile stand in the order below, thread t holds columns 4t to 4t+3: a load or store of its own, of 8 or 16 bytes, with
# no way through shared memory. Weights are loaded in that order; a tile of x is loaded as it is and only renamed.


@triton.jit
def quad_order(i):
    """The column that stands at position i of an accumulator."""
    return (i % 8) // 2 * 4 + i // 8 * 2 + i % 2


@triton.jit
def left_order(i, REORDER: tl.constexpr):
    """The column that `left_operand` has at position i."""
    if REORDER:
        i = i % 4 * 4 + i // 4
    return i


@triton.jit
def to_quads(t):
    """The columns of t [R, 16] in the order `quad_order`."""
    r: tl.constexpr = t.shape[0]
    return tl.reshape(tl.permute(tl.reshape(t, (r, 4, 2, 2)), (0, 2, 1, 3)), (r, 16))


@triton.jit
def from_quads(t):
    """t [R, 16], whose columns are in the order `quad_order`, as it was."""
    r: tl.constexpr = t.shape[0]
    return tl.reshape(tl.permute(tl.reshape(t, (r, 2, 4, 2)), (0, 2, 1, 3)), (r, 16))


@triton.jit
def left_operand(t, REORDER: tl.constexpr):
    """t [R, 16] as the left operand of a dot, its columns in an order in which they need not leave their threads.

    (16-bit ones do: to exchange them costs less than the copies that the compiler makes otherwise.)
    """
    r: tl.constexpr = t.shape[0]
    if REORDER:
        t = tl.reshape(tl.permute(tl.reshape(t, (r, 4, 4)), (0, 2, 1)), (r, 16))
    return t


@triton.jit
def right_operand(t, REORDER: tl.constexpr):
    """The transpose of t [R, 16], its rows in the order in which `as_operand` of an accumulator of quads has columns.

    (`tl.trans` would be sent through shared memory.)
    """
    r: tl.constexpr = t.shape[0]
    if REORDER:
        return tl.reshape(tl.permute(tl.reshape(t, (r, 4, 4)), (2, 1, 0)), (16, r))
    else:
        return tl.reshape(tl.permute(tl.reshape(t, (r, 4, 2, 2)), (2, 1, 3, 0)), (16, r))


@triton.jit
def reciprocal(t, EXACT: tl.constexpr):
    """1 / t for sums of exponentials (normal numbers, or NaN). Not EXACT: within 2^-21, a fifth of the work."""
    if EXACT:
        return 1.0 / t
    r = tl.rsqrt(t)
    return r * r


@triton.jit
def row_offsets(i, tile, batch, stride_b, stride_f, F: tl.constexpr, PACK: tl.constexpr):
    """Offsets of rows i of a tile in a (B, F, ...) tensor, and which of them exist."""
    if PACK == 1:
        return tile * stride_b + i.to(tl.int64) * stride_f, i < F
    else:
        slot: tl.constexpr = BLOCK // PACK
        sample = tile * PACK + i // slot
        field = i % slot
        return sample * stride_b + field.to(tl.int64) * stride_f, (field < F) & (sample < batch)


@triton.jit
def relu_words(O: tl.constexpr, WIDTH: tl.constexpr):
    """The words of 16 bits of a row of `relu_mask`: bit c of a word is the c-th of 16 columns of one head's WIDTH."""
    return (O // WIDTH) * ((WIDTH + BLOCK - 1) // BLOCK)


@triton.jit
def column_run(RUN: tl.constexpr):
    """0 to 15, of which a thread may access RUN at once. [16]"""
    return tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), RUN), RUN)


@triton.jit
def load_rows(
    pointer,
    i,
    first,
    tile,
    batch,
    stride_b,
    stride_f,
    stride_e,
    F: tl.constexpr,
    WIDTH: tl.constexpr,
    PACK: tl.constexpr,
    RUN: tl.constexpr = 16,
):
    """Rows i and 16 columns from `first` on of a tile of a (B, F, WIDTH) tensor, zero where there is none. [R, 16]

    A thread reads RUN columns at most.
    """
    e = column_run(RUN)
    offsets, exists = row_offsets(i, tile, batch, stride_b, stride_f, F, PACK)
    inside = exists[:, None]
    if WIDTH % BLOCK != 0:
        inside = inside & (e[None, :] < WIDTH - first)
    pointers = pointer + (offsets[:, None] + e[None, :].to(tl.int64) * stride_e) + first * stride_e
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def block_pointers(pointer, top, left, rows, columns, stride):
    """Pointers to pointer[top + rows, left + columns] of a row-major matrix, rows and columns [16], top and left known.

    The known part comes last, in 64 bits: so every block of a matrix shares one set of addresses and differs in the
    immediate offset of its loads. Folded into rows and columns, it would cost registers per block.
    """
    return pointer + (rows.to(tl.int64)[:, None] * stride + columns.to(tl.int64)[None, :]) + (top * stride + left)


@triton.jit
def load_block(pointer, top, left, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """pointer[top + rows, left + columns] of a matrix (ROWS, COLUMNS), zero outside of it. [16, 16]"""
    pointers = block_pointers(pointer, top, left, rows, columns, stride)
    if ROWS % BLOCK == 0 and COLUMNS % BLOCK == 0:
        return tl.load(pointers)
    else:
        inside = (rows[:, None] < ROWS - top) & (columns[None, :] < COLUMNS - left)
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_transposed(pointer, top, left, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The transpose of what `load_block` gives."""
    pointers = pointer + (rows.to(tl.int64)[None, :] * stride + columns.to(tl.int64)[:, None]) + (top * stride + left)
    if ROWS % BLOCK == 0 and COLUMNS % BLOCK == 0:
        return tl.load(pointers)
    else:
        inside = (rows[None, :] < ROWS - top) & (columns[:, None] < COLUMNS - left)
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_vector(pointer, first, i, SIZE: tl.constexpr):
    """pointer[first + i], zero outside of SIZE. [16]"""
    if SIZE % BLOCK == 0:
        return tl.load(pointer + i + first)
    else:
        return tl.load(pointer + i + first, mask=i < SIZE - first, other=0.0)


@triton.jit
def own_keys(rows, keys, F: tl.constexpr, PACK: tl.constexpr):
    """Which keys of a packed tile exist and belong to the row's sample. [R, K]"""
    slot: tl.constexpr = BLOCK // PACK
    return (rows[:, None] // slot == keys[None, :] // slot) & (keys[None, :] % slot < F)


@triton.jit
def score_start(rows, keys, F: tl.constexpr, PACK: tl.constexpr, FULL: tl.constexpr, ACC: tl.constexpr):
    """What a dot of scores starts from: 0, or -inf for keys that do not exist. [R, K]. FULL: all are known to exist."""
    if PACK > 1 or FULL:
        return tl.zeros((rows.shape[0], keys.shape[0]), ACC)
    else:
        row = tl.where(keys < F, 0.0, NEG_INF).to(ACC)
        return tl.broadcast_to(row[None, :], (rows.shape[0], keys.shape[0]))


@triton.jit
def hide(scores, ceiling, rows, keys, F: tl.constexpr, PACK: tl.constexpr, MASK: tl.constexpr):
    """Scores [R, K] with -inf for other samples' keys and where `load_ceiling` says so, whatever stood there.

    A NaN that is not hidden still ends as NaN: it becomes inf here, and inf - inf in the softmax.
    """
    if PACK > 1:
        scores = tl.where(own_keys(rows, keys, F, PACK), scores, NEG_INF)
    if MASK != MASK_NONE:
        scores = tl.minimum(scores, ceiling)
    return scores


@triton.jit
def load_hidden(
    mask, rows, keys, tile, batch, stride_b, stride_q, stride_k, F: tl.constexpr, PACK: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """The user's mask, not zero where the key is hidden: [1, K] for MASK_KEYS, [R, K] for MASK_PAIRS; for MASK_NONE
    nothing of use."""
    if MASK == MASK_NONE:
        return tl.zeros((1, 1), tl.int8)
    elif MASK == MASK_KEYS:
        offsets, exists = row_offsets(keys, tile, batch, stride_b, stride_k, F, PACK)
        return tl.load(mask + offsets, mask=exists, other=0)[None, :]
    else:
        offsets, exists = row_offsets(rows, tile, batch, stride_b, stride_q, F, PACK)
        if PACK == 1:
            field = keys
        else:
            field = keys % (BLOCK // PACK)
        offsets = offsets[:, None] + field[None, :].to(tl.int64) * stride_k
        return tl.load(mask + offsets, mask=exists[:, None] & (field[None, :] < F), other=0)


@triton.jit
def load_ceiling(
    mask, rows, keys, tile, batch, stride_b, stride_q, stride_k, F: tl.constexpr, PACK: tl.constexpr,
    MASK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The user's mask as the most a score may be: -inf where the key is hidden, else inf. As `load_hidden`."""
    hidden = load_hidden(mask, rows, keys, tile, batch, stride_b, stride_q, stride_k, F, PACK, MASK)
    return tl.where(hidden != 0, NEG_INF, INF).to(ACC)


@triton.jit
def row_reference(row_max, MASK: tl.constexpr):
    """What to subtract from a row of scores: its maximum, or 0 where every key is hidden. [R]"""
    if MASK != MASK_NONE:
        row_max = tl.where(row_max == NEG_INF, 0.0, row_max)
    return row_max


@triton.jit
def row_scale(row_sum, MASK: tl.constexpr, EXACT: tl.constexpr):
    """1 / row_sum, and 0 where every key is hidden. [R]"""
    if MASK != MASK_NONE:
        empty = row_sum == 0.0
        return tl.where(empty, 0.0, reciprocal(tl.where(empty, 1.0, row_sum), EXACT))
    return reciprocal(row_sum, EXACT)


# Packed samples share dots, in which 0 * NaN would cross from one sample to the next. So where a dot sums over rows
# or keys of all of them, its right operand is made finite.


@triton.jit
def finite(t, PACK: tl.constexpr, ACC: tl.constexpr):
    """t with zeros for what is not finite, where samples are packed."""
    if PACK > 1:
        t = tl.where(t.to(ACC) * 0.0 == 0.0, t, 0.0)
    return t


@triton.jit
def poison(t, PACK: tl.constexpr, ACC: tl.constexpr):
    """NaN for the rows of every sample that has something in t [16, C] that is not finite, else 0. [16]"""
    if PACK > 1:
        rows = tl.sum(t.to(ACC) * 0.0, 1)
        samples = tl.sum(tl.reshape(rows, (PACK, BLOCK // PACK)), 1)
        return tl.reshape(tl.broadcast_to(samples[:, None], (PACK, BLOCK // PACK)), (BLOCK,))
    else:
        return tl.zeros((BLOCK,), ACC)
