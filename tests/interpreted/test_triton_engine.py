"""The Triton kernels through the shared suite, at shapes for an interpreter: it takes 5 ms per program."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from tests.cases import GRAD_LAYOUTS, LAYOUTS, Shape
from tests.suite import EngineSuite


class TestTritonEngine(EngineSuite):
    engine = "triton"
    draws = 1
    least_numbers = 128
    forms = ("(F,F)", "(B,1,F)", "(B,F,F)")
    shapes = (
        Shape(0, 7, 16, 2),
        Shape(3, 1, 5, 3),
        Shape(9, 3, 5, 1),
        Shape(5, 7, 16, 2),
        Shape(3, 13, 16, 2),
        Shape(2, 39, 16, 2),
        Shape(1, 39, 40, 2),
        Shape(1, 100, 20, 1),
    )
    mask_shapes = (Shape(3, 6, 8, 2), Shape(1, 39, 16, 1), Shape(3, 1, 5, 1))
    large_shape = Shape(5, 39, 16, 1)
    extreme_shape = Shape(2, 13, 16, 2)

    def grad_layouts(self, x_layout: str) -> Sequence[str]:
        """Three of twelve, others for each layout of x."""
        names = tuple(GRAD_LAYOUTS)
        return [names[(tuple(LAYOUTS).index(x_layout) + step) % len(names)] for step in (0, 4, 8)]

    @contextlib.contextmanager
    def emulated_tf32(self) -> Iterator[None]:
        """The kernels follow torch's switch; the interpreter's dot then rounds its operands."""
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
