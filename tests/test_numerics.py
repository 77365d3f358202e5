"""The rule must be able to say no."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoint_fast.weights import InteractingParameters
from tests.cases import Shape, draw_problem
from tests.numerics import (
    NAMES,
    EmulatedTF32,
    assert_close_to_truth,
    assert_rule,
    einsum,
    errors,
    finish,
    layer_forward,
    round_to_tf32,
    start,
)

SHAPE = Shape(4, 7, 16, 2)
FORWARD = layer_forward("torch")


def problems(dtype: torch.dtype = torch.float32, draws: int = 4) -> list:
    return [draw_problem(SHAPE, dtype) for _ in range(draws)]


class _Spoil(torch.autograd.Function):
    """Leaves a tensor alone and multiplies its gradient."""

    @staticmethod
    def forward(ctx: object, t: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return t.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def test_right_results_pass() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert_rule(FORWARD, problems(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_an_output_a_few_units_off_is_caught(dtype: torch.dtype) -> None:
    factor = 1 + 1e-11 if dtype == torch.float64 else 1 + 8 * torch.finfo(dtype).eps

    def off(*arguments: object) -> Tensor:
        return FORWARD(*arguments) * factor

    with pytest.raises(AssertionError, match="out: "):
        assert_rule(off, problems(dtype))


@pytest.mark.parametrize("name", ["x", *(n for n in NAMES if n != "b_k")])
def test_a_wrong_gradient_is_caught(name: str) -> None:
    def off(x: Tensor, p: InteractingParameters, n_head: int, mask: Tensor | None) -> Tensor:
        if name == "x":
            x = _Spoil.apply(x, 1 + 1e-5)
        else:
            p = p._replace(**{name: _Spoil.apply(getattr(p, name), 1 + 1e-5)})
        return FORWARD(x, p, n_head, mask)

    with pytest.raises(AssertionError, match=f"gradient of {name}: "):
        assert_rule(off, problems())


def test_one_wrong_element_is_named() -> None:
    truth = torch.randn(5, 6, dtype=torch.float64)
    plain = truth.float()
    ours = plain.clone()
    ours[3, 4] += 1e-3
    with pytest.raises(AssertionError, match=r"name: maximum error .*worst at \(3, 4\)"):
        assert_close_to_truth("name", ours, plain, truth)
    ours[3, 4] = torch.nan
    with pytest.raises(AssertionError, match=r"name: maximum error inf.*worst at \(3, 4\)"):
        assert_close_to_truth("name", ours, plain, truth)


def test_many_small_errors_are_caught() -> None:
    """Each within what the largest may be, all together too much."""
    truth = torch.randn(1000, dtype=torch.float64).clamp(-1, 1)
    plain = truth.clone().float()
    plain[0] += 1e-4
    with pytest.raises(AssertionError, match="name: RMS error"):
        assert_close_to_truth("name", plain + 5e-5, plain, truth)


def test_a_missing_gradient_is_caught() -> None:
    def off(x: Tensor, p: InteractingParameters, n_head: int, mask: Tensor | None) -> Tensor:
        return FORWARD(x, p._replace(b_k=p.b_k.detach()), n_head, mask)

    with pytest.raises(AssertionError, match="gradient of b_k: None"):
        assert_rule(off, problems())


def test_emulated_tf32() -> None:
    """TF32 operands cost three digits, forward and backward, in the plain layer and in ours."""
    problem = draw_problem(SHAPE)
    grad = torch.randn(problem.x.shape)
    truth = finish(*start(einsum, problem.to(torch.float64)), grad)
    for forward in (einsum, FORWARD):
        with EmulatedTF32():
            rough = finish(*start(forward, problem), grad)
        for got, expected in ((rough.out, truth.out), (rough.grads["w_q"], truth.grads["w_q"])):
            # A relu may flip, so a gradient may be further off.
            assert 2e-5 < errors(got, expected).rms / expected.square().mean().sqrt().item() < 0.3
        assert errors(rough.out, truth.out).maximum < 2e-2


def test_round_to_tf32() -> None:
    unit = 2.0**-10
    values = torch.tensor([1.0, 1 + unit / 2, 1 + unit / 2.01, -1 - unit / 2, torch.inf, -torch.inf, 0.0])
    expected = torch.tensor([1.0, 1 + unit, 1.0, -1 - unit, torch.inf, -torch.inf, 0.0])
    assert torch.equal(round_to_tf32(values), expected)
    assert round_to_tf32(torch.tensor(torch.nan)).isnan()
