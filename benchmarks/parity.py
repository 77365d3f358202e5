"""Whether a contestant computes what it claims to: no speed is reported for one that does not.

Truth is its formula in float64 from the very numbers it gets; plain is the formula in the dtype under test.
A contestant may err twice as much as plain, plus one rounding unit of the largest true value, in the maximum
and in the root mean square, for the output and, in training, for every gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .cases import Case
from .contestants import Bout, Contestant, reference_layer, the_layer

# Samples do not depend on one another: as many as have so many rows stand for the batch.
ROWS = 2500
# What plain errs is itself chance: it is the worst of the formula in so many orders of summation.
ROUNDINGS = 4


def violation(contestant: Contestant, case: Case, bout: Bout) -> str:
    """The first tensor of the contestant that breaks the rule, in words; "" where all keep it.

    The layer runs on the whole batch, exactly as it is timed. It is judged by samples from the first to the
    last: the gradient of all others is set to zero, so that these alone make the gradients of the weights.
    """
    count = min(case.batch, max(1, ROWS // case.shape.fields))
    samples = torch.linspace(0, case.batch - 1, count, device=bout.x.device).round().long()
    x = bout.x.detach()[samples]
    layer = reference_layer(case) if contestant.definition is the_layer else bout.module
    parameters = [p.detach() for p in layer.parameters()]
    turns = range(0, case.shape.fields, -(-case.shape.fields // ROUNDINGS))
    with torch.set_grad_enabled(case.training):
        exact = _Run(contestant, case, x.double(), [p.double() for p in parameters])
        plain = [_Run(contestant, case, x, parameters, turn) for turn in turns]
        whole = bout.module(bout.x)
    if whole.shape != bout.x.shape or whole.dtype != bout.x.dtype:
        return f"out: expected {_kind(bout.x)}, got {_kind(whole)}"
    out = whole.detach()[samples]
    if not case.training:
        return compare({"out": out}, [{"out": run.out} for run in plain], {"out": exact.out})

    # A relu that changes sides near zero changes a gradient by whole units in correct code.
    certain = torch.stack([(run.out > 0).eq(exact.out > 0) for run in plain]).all(0) & (out > 0).eq(exact.out > 0)
    draw = torch.Generator().manual_seed(2)
    grad = torch.randn(out.shape, generator=draw).to(out).masked_fill(~certain, 0.0)
    whole_grad = torch.zeros_like(whole).index_copy_(0, samples, grad)
    d_x, *d_parameters = torch.autograd.grad(whole, [bout.x, *bout.module.parameters()], whole_grad)
    return compare(
        _named(out, [d_x[samples], *contestant.arrange(d_parameters)]),
        [_named(run.out, run.differentiate(grad)) for run in plain],
        _named(exact.out, exact.differentiate(grad.double())),
    )


class _Run:
    """The definition applied to x, with its fields in turn: another order of summation, the same result."""

    def __init__(
        self, contestant: Contestant, case: Case, x: Tensor, parameters: Sequence[Tensor], turn: int = 0
    ) -> None:
        self.leaves = [t.clone().requires_grad_(case.training) for t in (x, *parameters)]
        turned = self.leaves[0].roll(turn, dims=1)
        assert contestant.definition is not None
        self.out = contestant.definition(turned, self.leaves[1:], case.shape.n_head).roll(-turn, dims=1)

    def differentiate(self, grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.out, self.leaves, grad)


def _named(out: Tensor, grads: Sequence[Tensor]) -> dict[str, Tensor]:
    """The output and the gradients by name, those of all biases as one.

    A bias of the keys moves every logit of a row alike: its gradient is rounding noise around zero, which has
    no scale of its own to be judged on.
    """
    d_x, *d_parameters = grads
    tensors = {"out": out, "gradient of x": d_x}
    tensors |= {f"gradient of parameter {i}": g for i, g in enumerate(d_parameters) if g.ndim > 1}
    biases = [g for g in d_parameters if g.ndim == 1]
    return tensors | ({"gradient of the biases": torch.cat(biases)} if biases else {})


def compare(got: Mapping[str, Tensor], plain: Sequence[Mapping[str, Tensor]], exact: Mapping[str, Tensor]) -> str:
    """The first tensor of `got` that breaks the rule, in words; "" where all keep it."""
    for name, truth in exact.items():
        if broken := _broken(got[name], [run[name] for run in plain], truth):
            return f"{name}: {broken}"
    return ""


def _broken(value: Tensor, plain: Sequence[Tensor], truth: Tensor) -> str:
    floor = torch.finfo(value.dtype).eps * truth.abs().max().item()
    for measure, of in (("maximum", torch.amax), ("RMS", lambda d: d.square().mean().sqrt())):
        error, *usual = (of((t.detach().double() - truth.detach()).abs()).item() for t in (value, *plain))
        allowed = 2 * max(usual) + floor
        # Written so that NaN is a violation.
        if not error <= allowed:
            return f"{measure} error {error:.2e}, allowed {allowed:.2e}"
    return ""


def _kind(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"
