"""What the tests feed the layer: shapes, masks of every form, strides of every kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from autoint_fast.kernels import native_build
from autoint_fast.weights import InteractingParameters
from tests.numerics import Problem

# What runs on CPU tensors without Triton's interpreter. Where there is no compiler, test_native_engine.py says so.
FUSED = ("native", "torch") if native_build.compiler() else ("torch",)
BACKENDS = ("auto", *FUSED, "reference")


class Shape(NamedTuple):
    """Batch, fields, embedding size, heads."""

    b: int
    f: int
    e: int
    h: int

    def __str__(self) -> str:
        return f"B{self.b}-F{self.f}-E{self.e}-H{self.h}"


# The tables people train on, at a few samples each; batches are odd so that no block comes out even.
LISTED = (
    Shape(5, 39, 16, 2),
    Shape(3, 39, 10, 2),
    Shape(3, 39, 40, 2),
    Shape(3, 39, 16, 1),
    Shape(3, 39, 16, 4),
    Shape(4, 22, 16, 2),
    Shape(3, 24, 16, 2),
    Shape(7, 13, 16, 2),
    Shape(9, 7, 16, 2),
    Shape(2, 64, 16, 2),
    Shape(2, 100, 32, 4),
    Shape(1, 200, 64, 8),
    Shape(1, 300, 16, 2),
)
ODD = (
    Shape(0, 7, 16, 2),
    Shape(1, 1, 16, 2),
    Shape(3, 1, 5, 3),
    Shape(2, 2, 1, 2),
    Shape(17, 3, 5, 3),
    Shape(1, 39, 16, 2),
    Shape(2, 33, 17, 3),
    Shape(2, 65, 16, 1),
    Shape(2, 8, 8, 16),
)


def draw_problem(shape: Shape, dtype: torch.dtype = torch.float32, mask: Tensor | None = None) -> Problem:
    """A layer away from its initial values (biases count too) and an input; all numbers are of `dtype`."""
    b, f, e, h = shape

    def draw(*size: int, scale: float) -> Tensor:
        return (torch.randn(*size) * scale).to(dtype)

    wide, narrow = 1 / math.sqrt(e), 1 / math.sqrt(h * e)
    p = InteractingParameters(
        w_q=draw(h * e, e, scale=wide),
        b_q=draw(h * e, scale=0.5),
        w_k=draw(h * e, e, scale=wide),
        b_k=draw(h * e, scale=0.5),
        w_v=draw(h * e, e, scale=wide),
        b_v=draw(h * e, scale=0.5),
        w_o=draw(e, h * e, scale=narrow),
        b_o=draw(e, scale=0.5),
        w_r=draw(e, e, scale=wide),
        b_r=draw(e, scale=0.5),
    )
    return Problem(draw(b, f, e, scale=1.0), p, h, mask)


# --- masks: every form that broadcasts to (B, F, F) -------------------------------------------------------

MASK_SIZES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "(F,)": lambda b, f: (f,),
    "(1,)": lambda b, f: (1,),
    "(F,F)": lambda b, f: (f, f),
    "(1,F)": lambda b, f: (1, f),
    "(F,1)": lambda b, f: (f, 1),
    "(1,1)": lambda b, f: (1, 1),
    "(B,F,F)": lambda b, f: (b, f, f),
    "(B,1,F)": lambda b, f: (b, 1, f),
    "(B,F,1)": lambda b, f: (b, f, 1),
    "(B,1,1)": lambda b, f: (b, 1, 1),
    "(1,F,F)": lambda b, f: (1, f, f),
    "(1,1,F)": lambda b, f: (1, 1, f),
    "(1,F,1)": lambda b, f: (1, f, 1),
    "(1,1,1)": lambda b, f: (1, 1, 1),
}


def draw_mask(form: str, b: int, f: int) -> Tensor:
    """A mask of one of the `MASK_SIZES`, True = hidden; larger ones hide some rows and a whole sample."""
    mask = torch.rand(MASK_SIZES[form](b, f)) < 0.4
    if mask.ndim == 3 and mask.shape[0] > 2:
        mask[1] = True
    if mask.ndim >= 2 and mask.shape[-2] > 2:
        mask[..., 2, :] = True
    if mask.numel():
        mask.view(-1)[-1] = False
    return mask


# --- strides ----------------------------------------------------------------------------------------------
# Each takes a contiguous (B, F, N) tensor and gives one of its shape, and of its values unless it overlaps.


def as_columns(t: Tensor) -> Tensor:
    """Embedding slowest."""
    return t.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def fields_first(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def every_other_field(t: Tensor) -> Tensor:
    b, f, n = t.shape
    wide = t.new_full((b, 2 * f, n), torch.nan)
    wide[:, ::2] = t
    return wide[:, ::2]


def every_other_number(t: Tensor) -> Tensor:
    b, f, n = t.shape
    wide = t.new_full((b, f, 2 * n), torch.nan)
    wide[..., 1::2] = t
    return wide[..., 1::2]


def misaligned(t: Tensor) -> Tensor:
    """Contiguous, one element off any 16-byte boundary."""
    flat = t.new_full((t.numel() + 1,), torch.nan)
    flat[1:] = t.reshape(-1)
    return flat[1:].view(t.shape)


def piece_of_cat(t: Tensor) -> Tensor:
    """As the gradient of one of the pieces of `torch.cat(..., dim=-1)` comes."""
    b, f, _ = t.shape
    return torch.cat((t.new_full((b, f, 3), torch.nan), t, t.new_full((b, f, 2), torch.nan)), dim=-1)[..., 3:-2]


def one_sample_for_all(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def one_field_for_all(t: Tensor) -> Tensor:
    return t[:, :1].expand(t.shape)


def one_number_for_all(t: Tensor) -> Tensor:
    """As the gradient of `.sum()` comes: no stride at all."""
    return t.new_ones(()).expand(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "as_columns": as_columns,
    "fields_first": fields_first,
    "transposed": transposed,
    "every_other_field": every_other_field,
    "every_other_number": every_other_number,
    "misaligned": misaligned,
    "piece_of_cat": piece_of_cat,
    "one_sample_for_all": one_sample_for_all,
}
# Strides of zero for gradients only, where sums make them: with such an input, attention has nothing to do.
GRAD_LAYOUTS = {**LAYOUTS, "one_field_for_all": one_field_for_all, "sum": one_number_for_all}
