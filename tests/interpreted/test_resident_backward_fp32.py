"""The resident backward of fp32 tensors, whose operands are fp16 numbers scaled by powers of two."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from autoint_fast.kernels import triton_engine
from autoint_fast.kernels.triton_launch import Config, packed_samples
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
    Parts,
)
from tests.layouts import describe, draw_packed, interact_plainly, relu_mask_of
from tests.numerics import EmulatedTF32, assert_close_to_truth

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EVERYTHING = NEED_INPUT | NEED_WEIGHTS
USUAL = Layout(2, 16, 16, 16)


class Case:
    """Draws of a call, their gradients by `interact_plainly` in float64 and in fp32 (TF32 for "fp16"), and by the
    kernel. `x_size`, `grad_size`: what x and dy are multiplied by, the former perhaps field by field."""

    def __init__(
        self,
        layout: Layout,
        fields: int,
        batch: int,
        mask: str,
        precision: str,
        x_size: float | Tensor = 1.0,
        grad_size: float = 1.0,
        score_size: float = 1.0,
        hoist: bool = False,
    ) -> None:
        self.layout, self.precision = layout, precision
        self.x = torch.randn(batch, fields, layout.emb_size) * x_size
        self.packed = draw_packed(layout)
        layout.parts(self.packed).a.mul_(score_size)
        layout.parts(self.packed).c.mul_(score_size**0.5)
        self.mask = None
        if mask != "none":
            self.mask = torch.rand(batch, fields if mask == "pairs" else 1, fields) < 0.4
            self.mask[0, 0] = True
        self.config = Config(
            precision, resident=True, hoist=hoist, pack=packed_samples(fields), programs_per_sm=1, maxnreg=255
        )
        exact, exact_leaves = self._start(torch.float64)
        with self._around():
            plain, plain_leaves = self._start(torch.float32)
        self.relu_mask = relu_mask_of(plain.detach(), layout)
        self.grad = torch.randn(plain.shape) * grad_size
        self.grad[(exact > 0) != (plain > 0)] = 0
        self.truth = torch.autograd.grad(exact, exact_leaves, self.grad.double())
        with self._around():
            self.plain = torch.autograd.grad(plain, plain_leaves, self.grad)
        self.ours = self.backward()

    def _around(self) -> contextlib.AbstractContextManager[object]:
        return EmulatedTF32() if self.precision == "fp16" else contextlib.nullcontext()

    def _start(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        leaves = [t.to(dtype).clone().requires_grad_() for t in (self.x, self.packed)]
        return interact_plainly(*leaves, self.mask, self.layout), leaves

    def backward(self) -> tuple[Tensor, Tensor]:
        return triton_engine.interact_backward(
            self.grad, self.x, self.packed, self.relu_mask, self.mask, self.layout, EVERYTHING, self.config
        )


def judge(layout: Layout, cases: list[Case]) -> None:
    """The rule, draws taken together. A maximum over a bias's few numbers says little: it is taken over all parts."""
    for i, name in enumerate(("gradient of x", "gradient")):
        assert_close_to_truth(
            name, *(torch.stack([getattr(case, run)[i] for case in cases]) for run in ("ours", "plain", "truth"))
        )
    three = [[layout.parts(getattr(case, name)[1]) for case in cases] for name in ("ours", "plain", "truth")]
    for k, name in enumerate(Parts._fields):
        if three[0][0][k].numel():
            tensors = (torch.stack([parts[k] for parts in run]) for run in three)
            assert_close_to_truth(f"gradient of {name}", *tensors, maximum=False)


@pytest.mark.parametrize("precision", ["fp16", "fp16x2"])
@pytest.mark.parametrize(
    ("layout", "fields", "batch", "mask", "hoist"),
    [
        (USUAL, 39, 1, "none", True),
        (USUAL, 39, 1, "keys", False),
        (USUAL, 13, 2, "pairs", False),
        (USUAL, 7, 5, "none", False),
        (USUAL, 7, 5, "pairs", True),
        (USUAL, 1, 18, "none", False),
        (Layout(1, 16, 16, 16), 20, 1, "keys", True),
        (Layout(4, 10, 10, 10), 20, 1, "pairs", False),
        (Layout(3, 10, 10, 12, 0, CONCATENATED, PROJECTION, 0), 18, 2, "none", False),
        (Layout(2, 16, 16, 32, 0, BARE, NO_RESIDUAL), 18, 1, "none", False),
        (Layout(2, 16, 16, 16, 0, MERGED, IDENTITY), 18, 1, "none", True),
        (Layout(1, 16, 16, 16, 0, BARE, IDENTITY), 7, 3, "none", False),
    ],
    ids=lambda value: describe(value) if isinstance(value, Layout) else str(value),
)
def test_every_kind(layout: Layout, fields: int, batch: int, mask: str, hoist: bool, precision: str) -> None:
    judge(layout, [Case(layout, fields, batch, mask, precision, hoist=hoist) for _ in range(4)])


ONE_LARGE = torch.ones(20, 1).index_fill_(0, torch.tensor([3]), 1e4)


@pytest.mark.parametrize("precision", ["fp16", "fp16x2"])
@pytest.mark.parametrize(
    ("x_size", "grad_size", "score_size"),
    [
        (1e-6, 1.0, 1.0),
        (1e6, 1.0, 1e-12),
        (1e-4 * ONE_LARGE, 1.0, 1.0),
        (1.0, 1e-9, 1.0),
        (1.0, 1e6, 1.0),
        (1e-2, 1e-6, 1.0),
        (1.0, 1.0, 0.0),
        (1.0, 1.0, 5.0),
    ],
    ids=["small x", "large x", "mixed x", "small dy", "large dy", "both small", "no scores", "sharp"],
)
def test_sizes(x_size: float | Tensor, grad_size: float, score_size: float, precision: str) -> None:
    judge(USUAL, [Case(USUAL, 20, 1, "none", precision, x_size, grad_size, score_size) for _ in range(8)])


@pytest.mark.parametrize("precision", ["fp16", "fp16x2"])
def test_zeros_give_zeros(precision: str) -> None:
    case = Case(USUAL, 20, 2, "none", precision)
    case.grad.zero_()
    assert not any(t.any() for t in case.backward())
    case = Case(USUAL, 20, 1, "none", precision, x_size=0.0)
    judge(USUAL, [case])


@pytest.mark.parametrize("precision", ["fp16", "fp16x2"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("of", ["x", "grad"])
@pytest.mark.parametrize("fields", [3, 20])
def test_samples_do_not_touch_each_other(fields: int, of: str, value: float, precision: str) -> None:
    """Not even where they share a tile: the others' gradients keep their bits."""
    case = Case(Layout(2, 16, 16, 16, 0, MERGED, PROJECTION, 0), fields, 5, "none", precision)
    getattr(case, of)[1, 2, 0] = value
    d_x, _ = case.backward()
    others = [0, 2, 3, 4]
    assert torch.equal(d_x[others], case.ours[0][others])
    if value != 1e30:
        assert not d_x[1].isfinite().all()
        assert of == "grad" or d_x[1].isnan().all()
