"""fp32 numbers as operands of 16 bits: scaled by a power of two into fp16's range, whole or in two parts.

fp16 has as many significant bits as TF32; two parts have fp32's, but for one or two. What fp16 lacks is range, which
the scale of a sample, or of a weight, makes up for.
"""

import triton
import triton.language as tl


@triton.jit
def power_of_two(top, EXPONENT: tl.constexpr, MOST: tl.constexpr = 48):
    """The power of two that brings top, fp32 and not negative, into [2^EXPONENT, 2^(EXPONENT + 1)), and its inverse.

    2^MOST where top is zero or too small; of infinity or NaN it is one of the smallest. Both are normal numbers, and so
    are products of two for numbers up to 2^48. EXPONENT is at least 2.
    """
    exponent = tl.maximum(top.to(tl.int32, bitcast=True) >> 23, 127 + EXPONENT - MOST)
    scale = ((254 + EXPONENT - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, ((exponent - EXPONENT) << 23).to(tl.float32, bitcast=True)


@triton.jit
def halves(t, PRECISION: tl.constexpr):
    """fp32 t, within fp16's range, as what `multiply_halves` takes: rounded for "fp16", with what that leaves for
    "fp16x2"."""
    high = t.to(tl.float16)
    if PRECISION == "fp16x2":
        return (high, (t - high.to(tl.float32)).to(tl.float16))
    else:
        return (high,)


@triton.jit
def multiply_halves(a, b, acc, RESTS: tl.constexpr = True):
    """acc + a b, of the sums of their parts, smallest products first. RESTS: with the product of the rests."""
    for i in tl.static_range(len(a) - 1, -1, -1):
        for j in tl.static_range(len(b) - 1, -1, -1):
            if RESTS or i == 0 or j == 0:
                acc = tl.dot(a[i], b[j], acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc
