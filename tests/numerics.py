"""The numerical rule every engine is held to.

Truth is the layer's formula in float64, from the very numbers (weights, inputs, gradients) that the others
get; plain is the einsum layer in the dtype under test. Ours may err twice as much as plain, plus one rounding
unit of the largest true value, in the maximum and in the root mean square, for the output and for every
gradient. fp64 has no better truth: there ours agrees to 1e-12 of the largest value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autoint_fast import InteractingLayer
from autoint_fast.reference import InteractingParameters, ReferenceInteractingLayer, interacting_reference

FP64_AGREEMENT = 1e-12
NAMES = InteractingParameters._fields


class Errors(NamedTuple):
    """Maximum and root mean square of a difference, and where the maximum is."""

    maximum: float
    rms: float
    worst: tuple[int, ...]


def errors(value: Tensor, truth: Tensor) -> Errors:
    """The errors of `value` against the float64 `truth`; NaN counts as infinite."""
    difference = (value.detach().double() - truth.detach()).abs().nan_to_num(nan=torch.inf)
    if difference.numel() == 0:
        return Errors(0.0, 0.0, ())
    worst = torch.unravel_index(difference.argmax(), difference.shape)
    return Errors(difference.max().item(), difference.square().mean().sqrt().item(), tuple(int(i) for i in worst))


def assert_close_to_truth(
    name: str,
    ours: Tensor,
    plain: Tensor,
    truth: Tensor,
    *,
    unit: torch.dtype | None = None,
    maximum: bool = True,
) -> None:
    """The rule for one tensor; `unit`: the dtype whose rounding unit is the floor, if not that of `ours`."""
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    dtype = unit or ours.dtype
    scale = truth.abs().max().item() if truth.numel() else 0.0
    got, allowed = errors(ours, truth), errors(plain, truth)
    if dtype == torch.float64:
        bounds = (FP64_AGREEMENT * scale, FP64_AGREEMENT * scale)
    else:
        floor = torch.finfo(dtype).eps * scale
        bounds = (2 * allowed.maximum + floor, 2 * allowed.rms + floor)
    at = got.worst
    where = f"worst at {at}: ours {ours[at]}, plain {plain[at]}, truth {truth[at]}" if at else "scalar or empty"
    if maximum:
        assert got.maximum <= bounds[0], f"{name}: maximum error {got.maximum:.3e} > {bounds[0]:.3e}; {where}"
    assert got.rms <= bounds[1], f"{name}: RMS error {got.rms:.3e} > {bounds[1]:.3e}; {where}"


class Run(NamedTuple):
    """One forward and backward: the output, and the gradients by name ("x" and the ten parameters)."""

    out: Tensor
    grads: dict[str, Tensor | None]


class Problem(NamedTuple):
    """One call of the layer. `x` may have any strides; `mask` is None or any form the layer takes."""

    x: Tensor
    p: InteractingParameters
    n_head: int
    mask: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        return self._replace(x=self.x.to(dtype), p=InteractingParameters(*(t.to(dtype) for t in self.p)))


Forward = Callable[[Tensor, InteractingParameters, int, "Tensor | None"], Tensor]


def einsum(x: Tensor, p: InteractingParameters, n_head: int, mask: Tensor | None) -> Tensor:
    """The plain layer, as a `Forward`."""
    return interacting_reference(x, p, n_head, as_three_dimensions(mask))[0]


def as_three_dimensions(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape((1,) * (3 - mask.ndim) + tuple(mask.shape))


def start(forward: Forward, problem: Problem) -> tuple[Tensor, list[Tensor]]:
    """The output, and the leaves to differentiate by: x, then the ten parameters."""
    x = problem.x.detach().requires_grad_()
    p = InteractingParameters(*(t.detach().requires_grad_() for t in problem.p))
    return forward(x, p, problem.n_head, problem.mask), [x, *p]


def finish(out: Tensor, leaves: list[Tensor], grad: Tensor) -> Run:
    out.backward(grad.to(out.dtype))
    return Run(out.detach(), {name: leaf.grad for name, leaf in zip(("x", *NAMES), leaves, strict=True)})


@contextlib.contextmanager
def no_context() -> Iterator[None]:
    yield


class Draw(NamedTuple):
    """One problem, worked three ways."""

    truth: Run
    plain: Run
    ours: Run


def work(
    forward: Forward,
    problem: Problem,
    *,
    lay_out: Callable[[Tensor], Tensor] = torch.clone,
    plain: Forward = einsum,
    around_plain: Callable[[], contextlib.AbstractContextManager[Any]] = no_context,
    around_ours: Callable[[], contextlib.AbstractContextManager[Any]] = no_context,
) -> Draw:
    """Truth, `plain` and `forward` on one problem, forward and backward.

    The gradient of the output is drawn, then set to zero where the signs of the three outputs disagree: a
    relu that flips near zero changes a gradient by whole units in correct code. `lay_out` gives its strides.
    """
    exact, exact_leaves = start(einsum, problem.to(torch.float64))
    with around_plain():
        usual, usual_leaves = start(plain, problem)
    with around_ours():
        ours, leaves = start(forward, problem)
    assert ours.dtype == usual.dtype, f"out: dtype {ours.dtype}, expected {usual.dtype}"
    signs = [out.detach() > 0 for out in (exact, usual, ours)]
    disagree = (signs[0] != signs[1]) | (signs[0] != signs[2])
    grad = torch.randn(exact.shape, dtype=torch.float64).to(ours.dtype).masked_fill(disagree, 0.0)
    grad = lay_out(grad)
    assert not grad[disagree].any(), "draw again: the sign of an output whose gradient is fixed is uncertain"
    true_run = finish(exact, exact_leaves, grad)
    with around_plain():
        usual_run = finish(usual, usual_leaves, grad)
    with around_ours():
        our_run = finish(ours, leaves, grad)
    for (name, got), leaf in zip(our_run.grads.items(), leaves, strict=True):
        assert got is not None, f"gradient of {name}: None"
        assert got.dtype == leaf.dtype, f"gradient of {name}: dtype {got.dtype}, expected {leaf.dtype}"
    return Draw(true_run, usual_run, our_run)


def judge(draws: Sequence[Draw], *, unit: torch.dtype | None = None, maximum: bool = True) -> None:
    """Holds the output and all eleven gradients of the draws, taken together, to the rule.

    Together, because the largest of the few errors in, say, one bias's gradient says little of either layer.
    """

    def stack(which: int, name: str) -> Tensor:
        runs = [draw[which] for draw in draws]
        return torch.stack([run.out if name == "out" else run.grads[name] for run in runs])

    for name in ("out", *draws[0].ours.grads):
        truth, plain, ours = (stack(which, name) for which in range(3))
        if name == "b_k":
            # It moves all logits of a row alike, so the softmax never sees it; the truth is rounding noise.
            assert not ours.any(), f"gradient of b_k: expected exact zeros, got up to {ours.abs().max()}"
            continue
        label = name if name == "out" else f"gradient of {name}"
        assert_close_to_truth(label, ours, plain, truth, unit=unit, maximum=maximum)


def assert_rule(
    forward: Forward,
    problems: Iterable[Problem],
    *,
    unit: torch.dtype | None = None,
    maximum: bool = True,
    **how: Any,
) -> list[Run]:
    """`work` (with `how`) and `judge`: holds `forward` to the rule on problems of one shape; gives its runs.

    `unit`: the dtype of the floor, if not the output's own; `maximum`: whether the largest error counts.
    """
    draws = [work(forward, problem, **how) for problem in problems]
    judge(draws, unit=unit, maximum=maximum)
    return [draw.ours for draw in draws]


def layer_forward(backend: str) -> Forward:
    """`InteractingLayer` on `backend`, as a `Forward`."""

    def forward(x: Tensor, p: InteractingParameters, n_head: int, mask: Tensor | None) -> Tensor:
        layer = InteractingLayer(n_head, x.shape[-1], backend=backend, device="meta")
        return torch.func.functional_call(layer, dict(zip(state_names(layer), p, strict=True)), (x, mask))

    return forward


def layer_of(problem: Problem, backend: str = "auto") -> InteractingLayer:
    """A layer with the problem's parameters."""
    layer = InteractingLayer(problem.n_head, problem.x.shape[-1], backend=backend, dtype=problem.p.w_q.dtype)
    layer.load_state_dict(dict(zip(state_names(layer), problem.p, strict=True)))
    return layer


def expected_output(layer: ReferenceInteractingLayer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What `layer(x, mask)` should give with its parameters as they are now."""
    p = InteractingParameters(*(t.detach() for t in layer.interacting_parameters()))
    return einsum(x.detach(), p, layer.n_head, mask)


def state_names(layer: ReferenceInteractingLayer) -> list[str]:
    """The names of the ten parameters in a state_dict, in the order of `InteractingParameters`."""
    return [name for name, _ in layer.named_parameters()]


def round_to_tf32(value: Tensor) -> Tensor:
    """fp32 with 10 mantissa bits, to nearest, ties away from zero, as `cvt.rna.tf32.f32` rounds."""
    if value.dtype != torch.float32:
        return value
    rounded = ((value.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value)


# Where the two factors of each operator that multiplies matrices stand among its arguments.
MATRIX_PRODUCTS: dict[Any, tuple[int, int]] = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.bmm.default: (0, 1),
    torch.ops.aten.mv.default: (0, 1),
    torch.ops.aten.dot.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.addmm_.default: (1, 2),
    torch.ops.aten.addmv.default: (1, 2),
    torch.ops.aten.addmv_.default: (1, 2),
    torch.ops.aten.baddbmm.default: (1, 2),
    torch.ops.aten.baddbmm_.default: (1, 2),
    torch.ops.aten.mm.out: (0, 1),
    torch.ops.aten.bmm.out: (0, 1),
    torch.ops.aten.mv.out: (0, 1),
    torch.ops.aten.addmm.out: (1, 2),
    torch.ops.aten.baddbmm.out: (1, 2),
}


class EmulatedTF32(TorchDispatchMode):
    """Inside, every matrix product of fp32 tensors rounds its two factors to TF32, forward and backward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = MATRIX_PRODUCTS.get(func, ())
        args = tuple(round_to_tf32(a) if i in factors else a for i, a in enumerate(args))
        return func(*args, **(kwargs or {}))


class Multiplications(TorchDispatchMode):
    """Counts those in matrix products, in-place ones too (which torch's FlopCounterMode leaves out)."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MATRIX_PRODUCTS:
            left, right = (args[i] for i in MATRIX_PRODUCTS[func])
            self.count += left.numel() * (right.shape[-1] if right.ndim > 1 else 1)
        return func(*args, **(kwargs or {}))
