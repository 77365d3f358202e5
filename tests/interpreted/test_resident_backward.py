"""The resident backward: with its heads unrolled and in a loop, with and without subtracting the rows' maxima."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoint_fast.kernels import triton_engine
from autoint_fast.kernels.triton_launch import MASK_KEYS, MASK_NONE, MASK_PAIRS, Config, backward_config
from autoint_fast.weights import (
    BARE,
    CONCATENATED,
    IDENTITY,
    MERGED,
    NEED_INPUT,
    NEED_WEIGHTS,
    NO_RESIDUAL,
    PROJECTION,
    Layout,
)
from tests.layouts import describe, draw_packed, interact_plainly, relu_mask_of
from tests.numerics import assert_close_to_truth

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EVERYTHING = NEED_INPUT | NEED_WEIGHTS
LAYOUTS = [
    Layout(2, 16, 16, 16),
    Layout(3, 10, 10, 12, 0, CONCATENATED, PROJECTION, 0),
    Layout(2, 16, 16, 32, 0, BARE, NO_RESIDUAL),
    Layout(2, 16, 16, 16, 0, MERGED, IDENTITY),
]


class Case:
    """A call in float64, and what `interact_plainly` makes of it. `size`: of the scores' weights."""

    def __init__(self, layout: Layout, fields: int, batch: int, size: float, masked: bool = False) -> None:
        self.layout, self.x = layout, torch.randn(batch, fields, layout.emb_size, dtype=torch.float64)
        self.packed = draw_packed(layout, torch.float64)
        layout.parts(self.packed).a.mul_(size)
        self.mask = torch.rand(batch, 1, fields) < 0.3 if masked else None
        leaves = [self.x.clone().requires_grad_(), self.packed.clone().requires_grad_()]
        out = interact_plainly(*leaves, self.mask, layout)
        self.out = out.detach()
        self.relu_mask = relu_mask_of(self.out, layout)
        self.grad = torch.randn_like(self.out)
        self.truth = torch.autograd.grad(out, leaves, self.grad)

    def backward(self, config: Config) -> tuple[Tensor, Tensor]:
        return triton_engine.interact_backward(
            self.grad, self.x, self.packed, self.relu_mask, self.mask, self.layout, EVERYTHING, config
        )

    def judge(self, config: Config) -> None:
        for name, ours, truth in zip(("gradient of x", "gradient"), self.backward(config), self.truth, strict=True):
            assert_close_to_truth(name, ours, truth, truth)


@pytest.mark.parametrize("hoist", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=describe)
def test_heads_unrolled_or_not(layout: Layout, hoist: bool) -> None:
    Case(layout, 35, 2, 1.0).judge(Config("ieee", resident=True, hoist=hoist, programs_per_sm=1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [0.0, 1.0, 40.0, 1e3])
def test_scores_of_any_size(size: float, masked: bool) -> None:
    """Small enough to be taken as they are, or so large that 2^score would overflow, in one batch."""
    case = Case(LAYOUTS[0], 20, 2, size, masked)
    case.judge(Config("ieee", resident=True))


def test_large_scores_in_single_precision() -> None:
    """Where 2^score is far outside fp32 the maxima are subtracted, and the gradients are as good as plain ones."""
    case = Case(LAYOUTS[0], 20, 2, 100.0)
    x, packed, grad = (t.float() for t in (case.x, case.packed, case.grad))
    leaves = [x.clone().requires_grad_(), packed.clone().requires_grad_()]
    out = interact_plainly(*leaves, None, case.layout)
    grad[(out > 0) != (case.out > 0)] = 0
    plain = torch.autograd.grad(out, leaves, grad)
    exact = [t.clone().requires_grad_() for t in (case.x, case.packed)]
    truth = torch.autograd.grad(interact_plainly(*exact, None, case.layout), exact, grad.double())
    config = Config("ieee", resident=True)
    relu_mask = relu_mask_of(out, case.layout)
    ours = triton_engine.interact_backward(grad, x, packed, relu_mask, None, case.layout, EVERYTHING, config)
    for name, values in zip(("gradient of x", "gradient"), zip(ours, plain, truth, strict=True), strict=True):
        assert_close_to_truth(name, *values)


def test_same_bits_however_many_programs_there_were_before() -> None:
    case = Case(LAYOUTS[0], 18, 3, 1.0)
    config = Config("ieee", resident=True, hoist=True, programs_per_sm=2)
    for first, second in zip(case.backward(config), case.backward(config), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("fields", "layout", "precision", "mask", "resident"),
    [
        (39, LAYOUTS[0], "ieee", MASK_NONE, True),
        (39, LAYOUTS[0], "ieee", MASK_KEYS, True),
        (39, LAYOUTS[0], "ieee", MASK_PAIRS, False),
        (32, LAYOUTS[0], "ieee", MASK_PAIRS, True),
        (40, LAYOUTS[0], "ieee", MASK_NONE, False),
        (39, LAYOUTS[1], "ieee", MASK_NONE, False),
        (32, LAYOUTS[1], "ieee", MASK_NONE, True),
        (39, LAYOUTS[0], "tf32", MASK_KEYS, True),
        (39, LAYOUTS[0], "tf32", MASK_PAIRS, False),
        (40, LAYOUTS[0], "tf32", MASK_NONE, False),
        (39, LAYOUTS[0], "tf32x4", MASK_KEYS, True),
        (39, LAYOUTS[0], "tf32x4", MASK_PAIRS, False),
        (40, LAYOUTS[0], "tf32x4", MASK_NONE, False),
        (32, LAYOUTS[1], "tf32x4", MASK_NONE, False),
        (39, Layout(2, 16, 8, 16, 1, BARE, PROJECTION), "ieee", MASK_NONE, False),
        (39, Layout(2, 16, 16, 64, 0, CONCATENATED, PROJECTION), "ieee", MASK_NONE, False),
    ],
)
def test_choice(fields: int, layout: Layout, precision: str, mask: int, resident: bool) -> None:
    assert backward_config(fields, layout, precision, mask, precision == "ieee").resident is resident
