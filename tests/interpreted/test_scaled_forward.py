"""fp32 from scaled fp16 operands: numbers of every size, and what is computed once more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from autoint_fast.kernels import triton_engine, triton_streaming
from autoint_fast.kernels.triton_launch import Config, packed_samples
from autoint_fast.weights import Layout, Parts
from tests.layouts import draw_packed, interact_plainly
from tests.numerics import EmulatedTF32, assert_close_to_truth, no_context

LAYOUT = Layout(2, 16, 16, 16)
Change = Callable[[Tensor], object]


@triton.jit
def always_certain(doubt, DTYPE: tl.constexpr):
    return tl.max(tl.max(doubt.to(tl.int64), 1), 0) >= 0


@triton.jit
def no_sample(doubt, PACK: tl.constexpr, DTYPE: tl.constexpr):
    return tl.max(doubt.to(tl.int64), 1) < 0


def interact(x: Tensor, packed: Tensor, precision: str) -> Tensor:
    config = Config(precision, resident=True, pack=packed_samples(x.shape[1]), unroll=True, hoist=True)
    return triton_engine.interact(x, packed, None, LAYOUT, config)


def judge(x: Tensor, packed: Tensor, precision: str) -> None:
    with EmulatedTF32() if precision == "fp16" else no_context():
        plain = interact_plainly(x, packed, None, LAYOUT)
    truth = interact_plainly(x.double(), packed.double(), None, LAYOUT)
    assert_close_to_truth("out", interact(x, packed, precision), plain, truth)


def redone(x: Tensor, packed: Tensor, precision: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Which samples' outputs have not the bits of the scaled operands."""
    out = interact(x, packed, precision)
    with monkeypatch.context() as patch:
        patch.setattr(triton_streaming, "certain", always_certain)
        patch.setattr(triton_streaming, "doubtful_samples", no_sample)
        kept = interact(x, packed, precision)
    return [not torch.equal(mine, other) for mine, other in zip(out, kept, strict=True)]


INPUTS: dict[str, tuple[Change, bool | None]] = {
    # What becomes of the second of three samples, and whether fp16 pairs cannot have it. (None: they cannot, but that
    # does not show in an output of biases.)
    "nothing": (lambda x: x, False),
    "sharp": (lambda x: x.mul_(2.5), False),
    "zero": (lambda x: x.zero_(), False),
    "small": (lambda x: x.mul_(1e-12), False),
    "large": (lambda x: x.mul_(1e6), False),
    "a small column": (lambda x: x[:, 2].mul_(1e-6), False),
    "a large column": (lambda x: x[:, 2].mul_(1e6), True),
    "a large field": (lambda x: x[0].mul_(1e6), True),
    "a small field": (lambda x: x[0].mul_(1e-6), True),
    "tiny": (lambda x: x.mul_(1e-30), None),
    "subnormal": (lambda x: x.mul_(1e-41), None),
}


@pytest.mark.parametrize(("fields", "precision"), [(7, "fp16x2"), (20, "fp16x2"), (20, "fp16")])
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_of_every_size(kind: str, fields: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, doubtful = INPUTS[kind]
    x, packed = torch.randn(3, fields, 16), draw_packed(LAYOUT).float()
    change(x[1])
    judge(x, packed, precision)
    judge(x[1:2], packed, precision)
    if precision == "fp16x2" and doubtful is not None:
        assert redone(x, packed, precision, monkeypatch) == [False, doubtful, False]


WEIGHTS: dict[str, tuple[Callable[[Parts], object], bool]] = {
    "no scores": (lambda parts: parts.a.zero_(), False),
    "sharp": (lambda parts: parts.a.mul_(5), False),
    "even": (lambda parts: parts.a.mul_(1e-8), False),
    "large c": (lambda parts: parts.c.mul_(1e3), False),
    "no c": (lambda parts: parts.c.zero_(), False),
    "no values": (lambda parts: parts.m.zero_(), False),
    "small values": (lambda parts: parts.m.mul_(1e-6), False),
    "one head's small": (lambda parts: parts.m[0].mul_(1e-6), False),
    "large residual": (lambda parts: parts.r.mul_(1e6), False),
    "tiny": (lambda parts: parts.a.mul_(1e-20), True),
    "huge": (lambda parts: parts.m.mul_(1e25), True),
}


@pytest.mark.parametrize("precision", ["fp16", "fp16x2"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_of_every_size(kind: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, doubtful = WEIGHTS[kind]
    x, packed = torch.randn(3, 13, 16), draw_packed(LAYOUT).float()
    change(LAYOUT.parts(packed))
    judge(x, packed, precision)
    assert redone(x, packed, precision, monkeypatch) == [doubtful] * 3


@pytest.mark.parametrize("precision", ["fp16", "fp16x2"])
@pytest.mark.parametrize("part", ["a", "c", "m", "r"])
def test_weights_that_are_no_numbers(part: str, precision: str) -> None:
    """NaN where the plain layer has it, and numbers elsewhere."""
    x, packed = torch.randn(2, 7, 16), draw_packed(LAYOUT).float()
    getattr(LAYOUT.parts(packed), part).view(-1)[3] = torch.nan
    plain, out = interact_plainly(x, packed, None, LAYOUT), interact(x, packed, precision)
    assert torch.equal(out.isnan(), plain.isnan())
    assert torch.allclose(out[plain.isfinite()], plain[plain.isfinite()], rtol=0.0, atol=2e-2)
