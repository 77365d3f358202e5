"""The definition itself, against the layer people have and against loops over every number."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from autoint_fast import InteractingLayer, ReferenceInteractingLayer, interacting_reference
from autoint_fast.weights import InteractingParameters
from tests.cases import LAYOUTS, LISTED, MASK_SIZES, Shape, draw_mask, draw_problem
from tests.numerics import Problem, as_three_dimensions, einsum
from tests.original import OriginalLayer
from tests.suite import DTYPES, short


def by_hand(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Output and P (B, H, F, F), one row of one head of one sample after the other."""
    x, p, n_head, mask = problem.to(torch.float64)
    b, f, e = x.shape
    w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o, w_r, b_r = (t.numpy() for t in p)
    hidden = np.broadcast_to(np.zeros((), bool) if mask is None else mask.numpy(), (b, f, f))
    out, attention = np.zeros((b, f, e)), np.zeros((b, n_head, f, f))
    for sample, rows in enumerate(x.numpy()):
        for query in range(f):
            concatenated = np.zeros(n_head * e)
            for head in range(n_head):
                part = slice(head * e, (head + 1) * e)
                visible = [key for key in range(f) if not hidden[sample, query, key]]
                q = w_q[part] @ rows[query] + b_q[part]
                logits = [q @ (w_k[part] @ rows[key] + b_k[part]) / math.sqrt(e) for key in visible]
                powers = np.exp(np.array(logits) - max(logits, default=0.0))
                for key, power in zip(visible, powers, strict=True):
                    attention[sample, head, query, key] = power / powers.sum()
                    concatenated[part] += power / powers.sum() * (w_v[part] @ rows[key] + b_v[part])
            out[sample, query] = np.maximum(w_o @ concatenated + b_o + w_r @ rows[query] + b_r, 0.0)
    return out, attention


def assert_is_by_hand(problem: Problem) -> None:
    mask = as_three_dimensions(problem.mask)
    out, attention = interacting_reference(problem.x, problem.p, problem.n_head, mask)
    expected_out, expected_attention = by_hand(problem)
    np.testing.assert_allclose(out, expected_out, rtol=0, atol=1e-12)
    np.testing.assert_allclose(attention.transpose(0, 1), expected_attention, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [Shape(2, 5, 4, 3), Shape(3, 1, 1, 1), Shape(1, 7, 16, 2), Shape(0, 3, 2, 2)])
def test_every_number(shape: Shape) -> None:
    assert_is_by_hand(draw_problem(shape, torch.float64))


@pytest.mark.parametrize("form", MASK_SIZES)
def test_every_number_under_masks(form: str) -> None:
    assert_is_by_hand(draw_problem(Shape(3, 4, 5, 2), torch.float64, draw_mask(form, 3, 4)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str) -> None:
    problem = draw_problem(Shape(3, 4, 5, 2), torch.float64)
    assert_is_by_hand(problem._replace(x=LAYOUTS[layout](problem.x)))


def test_hidden_rows_are_the_residual() -> None:
    problem = draw_problem(Shape(2, 4, 5, 2), torch.float64, torch.ones(4, 4, dtype=torch.bool))
    residual = torch.nn.functional.linear(problem.x, problem.p.w_r, problem.p.b_r) + problem.p.b_o
    assert torch.equal(einsum(*problem), torch.relu(residual))


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_the_layer_people_have(masked: bool) -> None:
    """At one head the two are the same layer, bit for bit from the same seed, forward and backward."""
    torch.manual_seed(7)
    original = OriginalLayer(1, 16)
    torch.manual_seed(7)
    reference = ReferenceInteractingLayer(1, 16)
    assert list(original.state_dict()) == list(reference.state_dict())
    for name, value in original.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name
    original.double(), reference.double()
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    mask = (torch.rand(3, 7, 7) < 0.5) & ~torch.eye(7, dtype=torch.bool) if masked else None
    one, two = original(x, mask), reference(x, mask)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-13)
    grad = torch.randn_like(one)
    one.backward(grad), two.backward(grad)
    for (name, left), right in zip(original.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad, rtol=0, atol=1e-12, msg=name)


def test_the_layer_people_have_never_ran_with_heads() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        OriginalLayer(2, 16)(torch.randn(3, 7, 16))


@pytest.mark.parametrize("form", [None, "(B,F,F)"])
def test_differentiable_twice(form: str | None) -> None:
    shape = Shape(3, 3, 2, 2)
    mask = None if form is None else as_three_dimensions(draw_mask(form, shape.b, shape.f))
    x, p, n_head, _ = draw_problem(shape, torch.float64)
    leaves = [t.requires_grad_() for t in (x, *p)]

    def function(x: torch.Tensor, *p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return interacting_reference(x, InteractingParameters(*p), n_head, mask)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_gradient_penalty_trains() -> None:
    """What second-order users do, on backend="reference"."""
    layer = InteractingLayer(2, 8, backend="reference")
    x = torch.randn(4, 5, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert layer.w_ks.weight.grad.abs().sum() > 0 and layer.fc_res.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", LISTED[:4], ids=str)
def test_dtypes(shape: Shape, dtype: torch.dtype) -> None:
    problem = draw_problem(shape, dtype)
    out, attention = interacting_reference(problem.x, problem.p, problem.n_head)
    assert out.dtype == attention.dtype == dtype
    truth = einsum(*problem.to(torch.float64))
    assert (out - truth).abs().max() <= 64 * torch.finfo(dtype).eps * truth.abs().max()
    rows = attention.double().sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=shape.f * torch.finfo(dtype).eps)
