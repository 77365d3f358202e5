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

# Samples do not depend on one another: these stand for the batch, and truth is not needed for all of it.
SAMPLES = 64


def violation(contestant: Contestant, case: Case, bout: Bout) -> str:
    """The first tensor of the contestant that breaks the rule, in words; "" where all keep it.

    The layer runs on the whole batch, exactly as it is timed. It is judged by samples from the first to the
    last: the gradient of all others is set to zero, so that these alone make the gradients of the weights.
    """
    samples = torch.linspace(0, case.batch - 1, min(case.batch, SAMPLES), device=bout.x.device).round().long()
    x = bout.x.detach()[samples]
    layer = reference_layer(case) if contestant.definition is the_layer else bout.module
    parameters = [p.detach() for p in layer.parameters()]
    with torch.set_grad_enabled(case.training):
        exact, exact_leaves = _define(contestant, x.double(), [p.double() for p in parameters], case)
        plain, plain_leaves = _define(contestant, x, parameters, case)
        whole = bout.module(bout.x)
    if whole.shape != bout.x.shape or whole.dtype != bout.x.dtype:
        return f"out: expected {_kind(bout.x)}, got {_kind(whole)}"
    out = whole.detach()[samples]
    if not case.training:
        return _compare({"out": out}, {"out": plain}, {"out": exact})

    # A relu that changes sides near zero changes a gradient by whole units in correct code.
    certain = (exact > 0).eq(plain > 0) & (exact > 0).eq(out > 0)
    draw = torch.Generator().manual_seed(2)
    grad = torch.randn(out.shape, generator=draw).to(out).masked_fill(~certain, 0.0)
    whole_grad = torch.zeros_like(whole).index_copy_(0, samples, grad)
    d_x, *d_parameters = torch.autograd.grad(whole, [bout.x, *bout.module.parameters()], whole_grad)
    return _compare(
        _named(out, [d_x[samples], *contestant.arrange(d_parameters)]),
        _named(plain, torch.autograd.grad(plain, plain_leaves, grad)),
        _named(exact, torch.autograd.grad(exact, exact_leaves, grad.double())),
    )


def _define(
    contestant: Contestant, x: Tensor, parameters: Sequence[Tensor], case: Case
) -> tuple[Tensor, list[Tensor]]:
    """The definition's output, and what to differentiate it by."""
    leaves = [t.clone().requires_grad_(case.training) for t in (x, *parameters)]
    return contestant.definition(leaves[0], leaves[1:], case.shape.n_head), leaves


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


def _compare(got: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> str:
    for name, truth in exact.items():
        if broken := _broken(got[name], plain[name], truth):
            return f"{name}: {broken}"
    return ""


def _broken(value: Tensor, plain: Tensor, truth: Tensor) -> str:
    floor = torch.finfo(value.dtype).eps * truth.abs().max().item()
    for measure, of in (("maximum", torch.amax), ("RMS", lambda d: d.square().mean().sqrt())):
        error, usual = (of((t.detach().double() - truth.detach()).abs()).item() for t in (value, plain))
        # Written so that NaN is a violation.
        if not error <= 2 * usual + floor:
            return f"{measure} error {error:.2e}, allowed {2 * usual + floor:.2e}"
    return ""


def _kind(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"
