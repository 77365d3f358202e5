"""The weights: the layer's five projections, and what they fold into, as one packed buffer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LN2 = math.log(2.0)
LOG2E = 1.0 / LN2

# Which gradients a call needs, as a bit set: the engines do no work for the others.
NEED_INPUT = 1
NEED_SCORES = 2  # A and c
NEED_VALUES = 4  # M
NEED_RESIDUAL = 8  # R
NEED_BIAS = 16  # b and g
NEED_WEIGHTS = NEED_SCORES | NEED_VALUES | NEED_RESIDUAL | NEED_BIAS


class InteractingParameters(NamedTuple):
    """The tensors of one layer, each in `torch.nn.Linear` layout; E = embedding size, H = heads."""

    w_q: Tensor  # [H*E, E]
    b_q: Tensor  # [H*E]
    w_k: Tensor  # [H*E, E]
    b_k: Tensor  # [H*E]
    w_v: Tensor  # [H*E, E]
    b_v: Tensor  # [H*E]
    w_o: Tensor  # [E, H*E]
    b_o: Tensor  # [E]
    w_r: Tensor  # [E, E]
    b_r: Tensor  # [E]


class Parts(NamedTuple):
    """The six folded tensors; E = embedding size, H = heads, O = output width.

    With P_h = 2^((x A_h + c_h) x^T) normalised over the fields that are not hidden,

        out = relu( sum_h P_h x M_h + x R + b + g where the row is not fully hidden ).
    """

    a: Tensor  # [E, H, E]  log2(e) / sqrt(E) Wq_h Wk_h^T, head by head in the middle so that x A is one matmul
    c: Tensor  # [H, E]     log2(e) / sqrt(E) bq_h Wk_h^T
    m: Tensor  # [H, E, O]  Wv_h Wo_h
    r: Tensor  # [E, O]     Wr
    b: Tensor  # [O]        bo + br
    g: Tensor  # [O]        sum_h bv_h Wo_h


class Layout(NamedTuple):
    """Where each part of the folded weights lies in the packed buffer."""

    n_head: int
    emb_size: int
    out_size: int

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """Elements of a, c, m, r, b and g, in the order in which they are packed."""
        h, e, o = self
        return e * h * e, h * e, h * e * o, e * o, o, o

    @property
    def numel(self) -> int:
        return sum(self.sizes)

    def parts(self, packed: Tensor) -> Parts:
        """Views of `packed` (numel,)."""
        h, e, o = self
        a, c, m, r, b, g = packed.split(self.sizes)
        return Parts(a.view(e, h, e), c.view(h, e), m.view(h, e, o), r.view(e, o), b, g)


def folded_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the folded weights for parameters or inputs of `dtype`: never below fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
