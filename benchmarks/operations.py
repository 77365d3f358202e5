"""What a layer has to compute, and how fast torch multiplies plain matrices beside it.

Counted are the products of matrices, two operations for every multiplication and its addition, per sample with F
fields, embeddings of E, H heads and an output of width O. For folded weights and merged heads, others likewise:

    forward     q = x A, s = q x^T, z = P x, y = z M               H (2FE² + 2F²E + 2F²E + 2FEO)
                x R                                                2FEO

    backward    q, s and z once more: only x and out were kept     H (2FE² + 2F²E + 2F²E)
                dz = dy M^T, dP = dz x^T, dq = ds x                H (2FEO + 2F²E + 2F²E)
                dx = P^T dz + ds^T q + dq A^T                      H (2F²E + 2F²E + 2FE²)
                dA = x^T dq, dM = z^T dy                           H (2FE² + 2FEO)
                dR = x^T dy, dx = dy R^T                           2FEO + 2FEO

At Criteo's 39 fields, 16 and 2 heads that is 295 kFLOP forward and 1.12 MFLOP with the backward. Folding, which the
batch shares, and what is done number by number (exp, sums, relu) cost time but count for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from autoint_fast.weights import BARE, PROJECTION, Layout, operations

from .cases import Case

# Large enough to be multiplied at the machine's full rate, small enough for a turn in every round.
SGEMM_SIZE = 2048


def backward(fields: int, layout: Layout) -> int:
    """Operations of one sample's backward, with what it computes once more."""
    h, e, d, o = layout[:4]
    projections = (3 if layout.factored else 1) * 2 * fields * e * d
    scores = 2 * fields**2 * d
    outputs = 0 if layout.output == BARE else 2 * fields * d * layout.head_out
    once_more = projections + scores + (scores if outputs else 0)
    residual = 2 * fields * e * o if layout.residual == PROJECTION else 0
    return h * (once_more + 4 * scores + 2 * projections + 2 * outputs) + 2 * residual


def count(case: Case) -> int:
    """Operations of one call of the case."""
    of_sample = operations(case.layout, case.shape.fields)
    if case.training:
        of_sample += backward(case.shape.fields, case.layout)
    return case.batch * of_sample


def sgemm() -> Callable[[], object]:
    """A product of two square matrices in fp32, as a step to time."""
    a = torch.randn(SGEMM_SIZE, SGEMM_SIZE, generator=torch.Generator().manual_seed(3))
    return functools.partial(torch.mm, a, a, out=torch.empty_like(a))


def sgemm_count() -> int:
    """Operations of that product."""
    return 2 * SGEMM_SIZE**3
