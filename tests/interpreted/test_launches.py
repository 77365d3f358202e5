"""The launches themselves: how many there are, and every cut of every kernel by force."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from autoint_fast import InteractingLayer
from autoint_fast.kernels import triton_engine, triton_resident, triton_streaming
from autoint_fast.kernels.triton_launch import Config, Launch, packed_samples, reduce_launch
from autoint_fast.weights import (
    BARE,
    IDENTITY,
    MERGED,
    NEED_BIAS,
    NEED_INPUT,
    NEED_RESIDUAL,
    NEED_SCORES,
    NEED_VALUES,
    NEED_WEIGHTS,
    NO_RESIDUAL,
    PROJECTION,
    Layout,
)
from tests.honest_interpreter import overflow_checks
from tests.layouts import draw_packed, interact_plainly, relu_mask_of
from tests.numerics import EmulatedTF32, assert_close_to_truth

EVERYTHING = NEED_INPUT | NEED_WEIGHTS
PRECISIONS = {"ieee": torch.float64, "tf32": torch.float32, "tf32x4": torch.float32}
SCALED = {"fp16": torch.float32, "fp16x2": torch.float32}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels launched, in order."""
    names: list[str] = []
    launch = Launch.__call__

    def counted(self: Launch) -> None:
        names.append(self.kernel.fn.__name__)
        launch(self)

    monkeypatch.setattr(Launch, "__call__", counted)
    yield names


def test_number_of_launches(launches: list[str]) -> None:
    layer = InteractingLayer(2, 16, backend="triton")
    x = torch.randn(2, 7, 16, requires_grad=True)
    out = layer(x)
    assert launches == ["fold", "forward_scaled"]
    launches.clear()
    out.sum().backward()
    assert launches == ["backward_resident", "reduce_partial", "unfold"]
    launches.clear()
    layer.eval().freeze()
    launches.clear()
    with torch.no_grad():
        layer(x)
    assert launches == ["forward_scaled"]


def test_frozen_weights_still_give_the_gradient_of_x(launches: list[str]) -> None:
    layer = InteractingLayer(1, 8, backend="triton").eval().freeze()
    x = torch.randn(2, 3, 8, requires_grad=True)
    launches.clear()
    layer(x).sum().backward()
    assert launches == ["forward_scaled", "backward"]


class Case:
    """Folded weights, an input, a mask and a gradient, and what `interact_plainly` in fp64 makes of them."""

    def __init__(self, batch: int, fields: int, emb_size: int, n_head: int, dtype: torch.dtype, mask: str) -> None:
        self.layout = Layout(n_head, emb_size, emb_size, emb_size)
        self.packed = torch.randn(self.layout.numel, dtype=torch.float64).div_(emb_size**0.5).to(dtype)
        self.x = torch.randn(batch, fields, emb_size, dtype=dtype)
        shape = {"keys": (batch, 1, fields), "pairs": (batch, fields, fields)}.get(mask)
        self.mask = None if shape is None else torch.rand(shape) < 0.3
        if self.mask is not None:
            self.mask[0, 0] = True
        leaves = [self.x.double().requires_grad_(), self.packed.double().requires_grad_()]
        out = interact_plainly(*leaves, self.mask, self.layout)
        self.out = out.detach()
        self.relu_mask = relu_mask_of(self.out, self.layout)
        # Where the relu is all but undecided, the sign is a matter of rounding.
        self.grad = torch.randn_like(self.x) * (self.out.abs() > 1e-2)
        self.d_x, self.d_packed = torch.autograd.grad(out, leaves, self.grad.double())


def assert_near(name: str, ours: Tensor, truth: Tensor, tolerance: float) -> None:
    error = ((ours.double() - truth).abs().max() / truth.abs().max()).item()
    assert error <= tolerance, f"{name}: error {error:.2e} of the largest value"


TOLERANCE = {"ieee": 1e-12, "tf32": 4e-3, "tf32x4": 4e-6, "fp16": 4e-3, "fp16x2": 4e-6}
RESIDENT, STREAMED = ("unrolled", "looped", "hoisted"), ("streamed", "wide blocks", "shifted")


@pytest.mark.parametrize("mask", ["none", "keys"])
@pytest.mark.parametrize(
    ("kernel", "precision"),
    [(kernel, precision) for kernel in RESIDENT for precision in ("ieee", "tf32", *SCALED)]
    + [(kernel, precision) for kernel in STREAMED for precision in PRECISIONS],
)
def test_forward_cuts(kernel: str, precision: str, mask: str) -> None:
    case = Case(1, 39, 10, 2, (PRECISIONS | SCALED)[precision], mask)
    config = {
        "unrolled": Config(precision, resident=True, unroll=True),
        "looped": Config(precision, resident=True),
        "hoisted": Config(precision, resident=True, unroll=True, hoist=True),
        "streamed": Config(precision),
        "wide blocks": Config(precision, rows=32, keys=32),
        "shifted": Config(precision, shifted=True, rows=32, keys=16),
    }[kernel]
    out = triton_engine.interact(case.x, case.packed, case.mask, case.layout, config)
    assert_near("out", out, case.out, TOLERANCE[precision])


@triton.jit
def never_certain(doubt, DTYPE: tl.constexpr):
    return tl.max(tl.max(doubt.to(tl.int64), 1), 0) < 0


@triton.jit
def always_certain(doubt, DTYPE: tl.constexpr):
    return tl.max(tl.max(doubt.to(tl.int64), 1), 0) >= 0


@triton.jit
def every_sample(doubt, PACK: tl.constexpr, DTYPE: tl.constexpr):
    return tl.max(doubt.to(tl.int64), 1) >= 0


@pytest.mark.parametrize("mask", ["none", "keys", "pairs"])
@pytest.mark.parametrize(
    ("fields", "precision"),
    [(7, "fp16x2"), (39, "fp16x2"), (39, "tf32x4"), (7, "fp16"), (39, "fp16"), (7, "tf32"), (39, "tf32")],
)
def test_with_and_without_doubt(fields: int, precision: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the same output, each by force."""
    case = Case(1, fields, 16, 2, torch.float32, "none")
    case.mask = None if mask == "none" else torch.rand(1, fields if mask == "pairs" else 1, fields) < 0.3
    truth = interact_plainly(case.x.double(), case.packed.double(), case.mask, case.layout)
    config = Config(precision, resident=precision != "tf32x4", pack=packed_samples(fields), unroll=True)
    monkeypatch.setattr(triton_streaming, "doubtful_samples", every_sample)
    outs = []
    for certain in (always_certain, never_certain):
        monkeypatch.setattr(triton_streaming, "certain", certain)
        outs.append(triton_engine.interact(case.x, case.packed, case.mask, case.layout, config))
        assert_near("out", outs[-1], truth, TOLERANCE[precision])
    assert not torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fields", [3, 20, 70])
@pytest.mark.parametrize("kind", ["overflow", "underflow", "nothing to see"])
def test_samples_that_need_row_maxima(fields: int, kind: str, dtype: torch.dtype) -> None:
    """Logits far out, or of one sign; the samples around it come out in the same bits as without it."""
    layout = Layout(1, 16, 16, 16)
    packed, x = draw_packed(layout), torch.randn(3, fields, 16).to(dtype)
    mask = None
    if kind == "overflow":
        x[1] *= 30
    elif kind == "underflow":
        x[1, :, 0] = 10.0
        layout.parts(packed).c[0, 0] = -20.0
        x[0::2, :, 0] = 0.0
    else:
        mask = torch.zeros(3, 1, fields, dtype=torch.bool)
        mask[1] = True
    out = triton_engine.interact(x, packed, mask, layout)
    plain = interact_plainly(x, packed.to(dtype), mask, layout)
    assert_close_to_truth("out", out, plain, interact_plainly(x.double(), packed.double(), mask, layout))
    x[1] = torch.randn(fields, 16).to(dtype) / 4
    x[1, :, 0] = 0.0
    if mask is not None:
        mask[1] = False
    assert torch.equal(triton_engine.interact(x, packed, mask, layout)[0::2], out[0::2])


@pytest.mark.parametrize("least", [8, 16])
@pytest.mark.parametrize("fields", [5, 39])
def test_last_keys_of_eight(fields: int, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a dot over keys may be as short as the last of them, and where Triton is too old for that."""
    monkeypatch.setattr(triton_resident, "LEAST_K", least)
    case = Case(1, fields, 16, 1, torch.float32, "none")
    out = triton_engine.interact(case.x, case.packed, None, case.layout, Config("tf32", resident=True, unroll=True))
    assert_near("out", out, case.out, TOLERANCE["tf32"])


@pytest.mark.parametrize("output", [MERGED, BARE])
@pytest.mark.parametrize("fields", [3, 20, 70])
def test_values_that_overflow_without_row_maxima(fields: int, output: int) -> None:
    """Sums of P within their bounds, but not those of P and values: 2^30 times 1e30."""
    layout = Layout(1, 16, 16, 16, 0, output, NO_RESIDUAL)
    packed, x = draw_packed(layout), torch.rand(3, fields, 16)
    layout.parts(packed).a.zero_()
    layout.parts(packed).c.zero_()[0, 0] = 30.0
    x[1, :, 0] = 1.0
    x[1, :, 5] = 1e30
    out, plain = triton_engine.interact(x, packed, None, layout), interact_plainly(x, packed, None, layout)
    assert_close_to_truth("out", out, plain, interact_plainly(x.double(), packed.double(), None, layout))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rows", "keys"), [(16, 16), (16, 32), (32, 32)])
def test_backward_cuts(rows: int, keys: int, precision: str) -> None:
    case = Case(1, 35, 10, 1, PRECISIONS[precision], "pairs")
    config = Config(precision, rows=rows, keys=keys)
    d_x, d_packed = triton_engine.interact_backward(
        case.grad, case.x, case.packed, case.relu_mask, case.mask, case.layout, EVERYTHING, config
    )
    assert_near("gradient of x", d_x, case.d_x, TOLERANCE[precision])
    assert_near("gradient of the weights", d_packed, case.d_packed, TOLERANCE[precision])


@pytest.mark.parametrize("needs", [NEED_WEIGHTS, NEED_SCORES, NEED_VALUES, NEED_RESIDUAL, NEED_BIAS])
@pytest.mark.parametrize("programs", [1, 512, 700])
def test_reduction(programs: int, needs: int) -> None:
    """In the tiles that it has on a GPU: one that is not full, one that is, and more than one."""
    layout = Layout(2, 5, 5, 5)
    needed = torch.zeros(layout.numel, dtype=torch.bool)
    parts_of = {NEED_SCORES: ("a", "c", "k"), NEED_VALUES: ("v", "m"), NEED_RESIDUAL: ("r",), NEED_BIAS: ("b", "g")}
    for bit, names in parts_of.items():
        for name in names:
            getattr(layout.parts(needed), name).fill_(bool(needs & bit))
    partial = torch.randn(programs, layout.numel, dtype=torch.float64).where(needed, torch.nan)
    total = torch.full_like(partial[0], torch.nan)
    reduce_launch(partial, total, layout, needs)()
    assert_near("sum", total, partial.sum(0).where(needed, 0.0), TOLERANCE["ieee"])


@pytest.mark.parametrize(("fields", "mask"), [(1, "none"), (2, "keys"), (3, "pairs"), (7, "keys"), (8, "none")])
def test_packed_samples(fields: int, mask: str) -> None:
    """Samples that share a tile, in a batch that does not fill the last one, and one sample a tile all the same."""
    case = Case(packed_samples(fields) + 1, fields, 16, 2, torch.float64, mask)
    for pack in (packed_samples(fields), 1):
        config = Config("ieee", resident=True, pack=pack, unroll=True)
        out = triton_engine.interact(case.x, case.packed, case.mask, case.layout, config)
        assert_near("out", out, case.out, TOLERANCE["ieee"])
        d_x, d_packed = triton_engine.interact_backward(
            case.grad,
            case.x,
            case.packed,
            case.relu_mask,
            case.mask,
            case.layout,
            EVERYTHING,
            Config("ieee", pack=pack),
        )
        assert_near("gradient of x", d_x, case.d_x, TOLERANCE["ieee"])
        assert_near("gradient of the weights", d_packed, case.d_packed, TOLERANCE["ieee"])


@pytest.mark.parametrize("dimension", [0, 1])
def test_addresses_beyond_32_bits(dimension: int) -> None:
    """The rows that pad a tile are never read, but their addresses are computed, with strides that overflow 32 bits."""
    strides = [16, 16, 1]
    strides[dimension] = 1 << 29
    x = torch.randn(16).as_strided((1, 1, 16), strides)
    case = Case(1, 1, 16, 1, torch.float32, "none")
    with overflow_checks():
        for config in (
            Config("tf32", resident=True, pack=16, unroll=True),
            Config("fp16x2", resident=True, pack=16, unroll=True),
            Config("tf32x4"),
        ):
            triton_engine.interact(x, case.packed, None, case.layout, config)
        triton_engine.interact_backward(
            x, x, case.packed, case.relu_mask, None, case.layout, EVERYTHING, Config("tf32x4", pack=16)
        )


@pytest.mark.parametrize("fields", [7, 39])
@pytest.mark.parametrize(
    ("dtype", "top", "gap", "value"),
    [
        (torch.float16, -2.0, 24.0, 100.0),
        (torch.float16, -1.9, 22.0, 8.0),
        (torch.bfloat16, -39.0, 100.0, 1e28),
        (torch.float32, -39.0, 100.0, 1e28),
        (torch.float32, -39.0, 109.0, 1.0),
    ],
)
def test_values_of_keys_that_hardly_count(
    dtype: torch.dtype, top: float, gap: float, value: float, fields: int
) -> None:
    """One key has all the attention and nothing to give, so what the others add to the output is all there is."""
    layout = Layout(1, 16, 16, 16, 0, MERGED, NO_RESIDUAL, 0)
    packed = torch.zeros(layout.numel)
    parts = layout.parts(packed)
    parts.c[0, 0] = 1.0
    parts.m[0, 1, :] = 1.0
    x = torch.zeros(1, fields, 16)
    x[:, :, 0], x[:, 0, 0], x[:, 1:, 1] = top - gap, top, value
    x = x.to(dtype)
    truth = interact_plainly(x.double(), packed.double(), None, layout)
    out = triton_engine.interact(x, packed, None, layout)
    assert_close_to_truth("out", out, interact_plainly(x, packed, None, layout), truth)


@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("residual", [NO_RESIDUAL, IDENTITY, PROJECTION])
@pytest.mark.parametrize("fields", [7, 39, 70])
def test_tf32_of_numbers_that_lose_nothing(
    fields: int, residual: int, weights_too: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As embeddings that come from bf16: what others are scaled up for is not cut off them."""
    monkeypatch.setattr(triton_engine, "allow_tf32", lambda: True)
    layout = Layout(2, 16, 16, 16, 0, MERGED, residual)
    x, packed = torch.randn(1, fields, 16).bfloat16().float(), draw_packed(layout).float()
    if weights_too:
        packed = packed.bfloat16().float()
    with EmulatedTF32():
        plain = interact_plainly(x, packed, None, layout)
    truth = interact_plainly(x.double(), packed.double(), None, layout)
    assert_close_to_truth("out", triton_engine.interact(x, packed, None, layout), plain, truth)


@pytest.mark.parametrize("batch", [0, 3])
def test_opcheck(batch: int) -> None:
    """Of an engine whose backward reads a relu mask, the operator's second result."""
    layout = Layout(2, 16, 16, 16)
    leaf = torch.randn(batch, 5, 16).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    packed = draw_packed(layout).requires_grad_()
    ops = torch.ops.autoint_fast
    torch.library.opcheck(ops.interact.default, (leaf, packed, None, list(layout), "triton", EVERYTHING))
    out, relu_mask = ops.interact(leaf.detach(), packed.detach(), None, list(layout), "triton", EVERYTHING)
    assert torch.equal(relu_mask, relu_mask_of(out, layout))
    given = (torch.randn_like(out), leaf.detach(), packed.detach(), relu_mask, None, list(layout), "triton", EVERYTHING)
    torch.library.opcheck(ops.interact_backward.default, given)
