"""The Triton kernels through the shared suite, at shapes for an interpreter: it takes 5 ms per program."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from tests.cases import Shape
from tests.suite import EngineSuite


class TestTritonEngine(EngineSuite):
    engine = "triton"
    draws = 3
    shapes = (
        Shape(0, 7, 16, 2),
        Shape(1, 1, 16, 2),
        Shape(3, 1, 5, 3),
        Shape(2, 2, 1, 2),
        Shape(9, 3, 5, 3),
        Shape(5, 7, 16, 2),
        Shape(3, 13, 16, 2),
        Shape(1, 22, 16, 2),
        Shape(2, 39, 16, 2),
        Shape(1, 39, 10, 1),
        Shape(1, 39, 40, 4),
        Shape(1, 100, 32, 2),
        Shape(1, 200, 16, 2),
    )
    mask_shapes = (Shape(4, 6, 8, 2), Shape(2, 39, 16, 1), Shape(3, 1, 5, 3))
    large_shape = Shape(12, 39, 16, 1)
    extreme_shape = Shape(2, 13, 16, 2)

    @contextlib.contextmanager
    def emulated_tf32(self) -> Iterator[None]:
        """The kernels follow torch's switch; the interpreter's dot then rounds its operands."""
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
