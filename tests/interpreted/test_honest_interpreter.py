"""The patched interpreter, against torch. TRITON_INTERPRET=1 must be set before this module is imported."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from tests.honest_interpreter import install, overflow_checks

install()

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
N = 16


@triton.jit
def _copy(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def _cast_up_and_down(x, out, DTYPE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(DTYPE).to(tl.float32))


@triton.jit
def _dot(a, b, c, out, DTYPE: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    left, right, acc = tl.load(a + at), tl.load(b + at), tl.load(c + at)
    tl.store(out + at, tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=DTYPE))


@triton.jit
def _move(x, y, out, N: tl.constexpr):
    # [N, N] -> [N, N/8, 4, 2] -> [N, N/8, 2, 4] -> [N, N], transposed, one row filled, one column broadcast
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tile = tl.permute(tl.reshape(tl.load(x + at), (N, N // 8, 4, 2)), (0, 1, 3, 2))
    tile = tl.trans(tl.reshape(tile, (N, N)))
    tile = tl.where(tl.arange(0, N)[:, None] == 3, tl.full((N, N), 0.1, tl.bfloat16), tile)
    column = tl.broadcast_to(tl.load(y + tl.arange(0, N))[:, None], (N, N))
    tl.store(out + at, tl.where(tl.arange(0, N)[None, :] == 5, column, tile))


@triton.jit
def _absolute(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.abs(tl.load(x + i)))


@triton.jit
def _arithmetic(x, out, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    if OP == "add":
        v = v + v
    elif OP == "mul by a number":
        v = v * 2.0
    elif OP == "negate":
        v = -v
    elif OP == "compare":
        v = tl.where(v > 0, v, 0.0)
    elif OP == "fma":
        v = tl.fma(v, v, v)
    elif OP == "sum":
        v = tl.where(i == 0, tl.sum(v, 0), v)
    elif OP == "scan":
        v = tl.associative_scan(v, 0, tl.standard._sum_combine)
    elif OP == "atomic":
        tl.atomic_add(out + i, v)
    tl.store(out + i, v)


@triton.jit
def _doubled(v):
    return v + v


@triton.jit
def _device_calls(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    for _ in tl.static_range(5):
        v = _doubled(v)
    tl.store(out + i, v)


@triton.jit
def _strided_store(out, stride, WIDE: tl.constexpr):
    i = tl.arange(0, 16) + 1
    if WIDE:
        i = i.to(tl.int64)
    tl.store(out + i * stride, 0.0, mask=i < 0)


def run(kernel: InterpretedFunction, *args: object, **constants: object) -> None:
    kernel[(1,)](*args, N=N, **constants)


def patterns(dtype: torch.dtype) -> Tensor:
    """16 numbers that are hard to round: ties, overflow, subnormals, zeros, infinities, NaN."""
    tie = 1 + 2.0**-8
    rare = [tie, tie + 2.0**-7, tie + 2.0**-20, -tie, 3.4e38, -3.4e38, 1e-40, -1e-45, 65504.0, 1e-8]
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 0.1]
    return torch.tensor(rare + special, dtype=torch.float64).to(dtype)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def same_bits(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.isnan() | got.signbit(), expected.isnan() | expected.signbit())


def test_kernels_are_interpreted() -> None:
    assert isinstance(_dot, InterpretedFunction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int32], ids=str)
def test_casts_to_bf16_round_to_nearest_even(dtype: torch.dtype) -> None:
    integers = torch.arange(N, dtype=torch.int32) * 65 - 500
    x = integers if dtype == torch.int32 else patterns(dtype)
    out = torch.empty(N, dtype=torch.bfloat16)
    run(_copy, x, out)
    same_bits(out, x.float().bfloat16())
    rounded = torch.empty(N)
    run(_cast_up_and_down, x, rounded, DTYPE=tl.bfloat16)
    same_bits(rounded, x.float().bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_casts_from_bf16(dtype: torch.dtype) -> None:
    x = patterns(torch.bfloat16)
    out = torch.empty(N, dtype=dtype)
    run(_copy, x, out)
    same_bits(out, x.to(dtype))


def test_cast_from_bf16_to_integers() -> None:
    x = (random(N) * 1000).bfloat16()
    out = torch.empty(N, dtype=torch.int32)
    run(_copy, x, out)
    assert torch.equal(out, x.to(torch.int32))


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_dot_accumulates_in_fp32(dtype: torch.dtype, precision: str) -> None:
    a, b, c = random(3, N, N, dtype=dtype).unbind()
    c = c.float() + 2.0**-12
    out = torch.empty(N, N)
    run(_dot, a, b, c, out, DTYPE=tl.float32, PRECISION=precision)
    expected = a.double() @ b.double() + c.double()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4e-6)


@pytest.mark.skipif(TRITON < (3, 5), reason="tl.dot refuses fp64 before Triton 3.5")
def test_fp64_dot() -> None:
    a, b, c = random(3, N, N, dtype=torch.float64).unbind()
    out = torch.empty(N, N, dtype=torch.float64)
    run(_dot, a, b, c, out, DTYPE=tl.float64, PRECISION="ieee")
    torch.testing.assert_close(out, a @ b + c, rtol=0, atol=1e-14)


def test_ieee_dot_is_fp32_and_tf32_dot_is_not() -> None:
    a, b, c = random(3, N, N).unbind()
    errors = {}
    for precision in ("ieee", "tf32"):
        out = torch.empty(N, N)
        run(_dot, a, b, c, out, DTYPE=tl.float32, PRECISION=precision)
        errors[precision] = (out.double() - (a.double() @ b.double() + c.double())).abs().max().item()
    assert errors["ieee"] < 4e-6
    assert 2e-4 < errors["tf32"] < 2e-2


@pytest.mark.parametrize("operand", ["left", "right"])
def test_tf32_cuts_each_operand_after_ten_mantissa_bits(operand: str) -> None:
    ulp = 2.0**-10
    pairs = [
        (1 + 0.49 * ulp, 1.0),
        (1 + 0.99 * ulp, 1.0),
        (1 + ulp, 1 + ulp),
        (1 + 1.5 * ulp, 1 + ulp),
        (-1 - 0.5 * ulp, -1.0),  # towards zero
        (2 - 0.25 * ulp, 2 - ulp),
        (2.0**-120 * (1 + 1.6 * ulp), 2.0**-120 * (1 + ulp)),
        (0.0, 0.0),
    ]
    eye = torch.eye(N)
    x = torch.diag(torch.tensor([before for before, _ in pairs] * 2))
    args = (x, eye) if operand == "left" else (eye, x)
    out = torch.empty(N, N)
    run(_dot, *args, torch.zeros(N, N), out, DTYPE=tl.float32, PRECISION="tf32")
    same_bits(out.diag(), torch.tensor([after for _, after in pairs] * 2))


def test_tf32_keeps_infinities_and_nan() -> None:
    x = torch.zeros(N, N)
    x[0, 0], x[1, 1] = float("inf"), -float("inf")
    x[2, 2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    out = torch.empty(N, N)
    run(_dot, x, torch.ones(N, N), torch.zeros(N, N), out, DTYPE=tl.float32, PRECISION="tf32")
    assert out[0, 0] == float("inf") and out[1, 0] == -float("inf") and out[2, 0].isnan()
    assert torch.equal(out[3:], torch.zeros(N - 3, N))


def test_bits_of_bf16_move() -> None:
    x, y = random(N, N, dtype=torch.bfloat16), patterns(torch.bfloat16)
    out = torch.empty(N, N, dtype=torch.bfloat16)
    run(_move, x, y, out)
    expected = x.view(N, N // 8, 4, 2).transpose(2, 3).reshape(N, N).t().clone()
    expected[3] = 0.1
    expected[:, 5] = y
    same_bits(out, expected)


def test_absolute_value_of_bf16() -> None:
    out = torch.empty(N, dtype=torch.bfloat16)
    run(_absolute, patterns(torch.bfloat16), out)
    same_bits(out, patterns(torch.bfloat16).abs())


OPERATIONS = {
    "add": lambda x: x + x,
    "mul by a number": lambda x: x * 2,
    "negate": lambda x: -x,
    "compare": lambda x: x.relu(),
    "fma": lambda x: x * x + x,
    "sum": lambda x: torch.cat([x.sum(0, keepdim=True), x[1:]]),
    "scan": lambda x: x.cumsum(0),
    "atomic": lambda x: x,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_other_bf16_arithmetic_raises_or_is_promoted(operation: str) -> None:
    """Some versions of Triton promote some operations to fp32 themselves: those must then be right."""
    x = random(N, dtype=torch.bfloat16)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-7)):
        out = torch.zeros(N, dtype=dtype)
        try:
            run(_arithmetic, x.to(dtype), out, OP=operation)
        except Exception as error:
            assert dtype == torch.bfloat16
            assert re.search("of bfloat16 would compute on raw bits|does not support bf16", str(error))
        else:
            expected = OPERATIONS[operation](x.float())
            torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


def test_int32_overflow_is_found_only_inside() -> None:
    out, stride = torch.zeros(1), 2**28
    _strided_store[(1,)](out, stride, WIDE=False)
    with overflow_checks():
        _strided_store[(1,)](out, stride, WIDE=True)
        with pytest.raises(Exception, match="int32 overflow detected"):
            _strided_store[(1,)](out, stride, WIDE=False)
    _strided_store[(1,)](out, stride, WIDE=False)


def test_a_module_is_patched_once_per_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    patched: list[object] = []
    patch = interpreter._patch_builtin

    def noted(package: object, *rest: object) -> None:
        patched.append(package)
        patch(package, *rest)

    monkeypatch.setattr(interpreter, "_patch_builtin", noted)
    for _ in range(2):
        x, out = random(N), torch.empty(N)
        patched.clear()
        run(_device_calls, x, out)
        assert torch.equal(out, 32 * x)
        assert patched.count(tl) <= 1


def test_install_twice_changes_nothing() -> None:
    before = dict(vars(InterpreterBuilder))
    install()
    assert dict(vars(InterpreterBuilder)) == before
