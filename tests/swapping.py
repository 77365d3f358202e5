"""The rule of numerics.py for a layer of whatever library, against itself accelerated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.numerics import assert_close_to_truth

# How a layer is applied to x; by default, it is called.
Apply = Callable[[nn.Module, Tensor], Tensor]


def called(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def run(layer: nn.Module, x: Tensor, grad: Tensor | None = None, apply: Apply = called) -> dict[str, Tensor]:
    """The output and all gradients by name; the gradient of the output is `grad` or ones."""
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    out = apply(layer, leaf)
    out.backward(torch.ones_like(out) if grad is None else grad.to(out.dtype))
    assert leaf.grad is not None
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": leaf.grad, **grads}


def assert_same_numbers(plain: nn.Module, ours: nn.Module, draws: Sequence[Tensor], apply: Apply = called) -> None:
    """`ours` may err twice as much as `plain`, the same layer in the same dtype; truth is `plain` in float64.

    draws: inputs that are judged together, as the largest of the few errors in one bias's gradient says little.
    """
    exact = copy.deepcopy(plain).double()
    runs: list[tuple[dict[str, Tensor], ...]] = []
    for x in draws:
        contestants = ((exact, x.double()), (plain, x), (ours, x))
        signs = [apply(layer, y).detach() > 0 for layer, y in contestants]
        # A relu that flips near zero changes a gradient by whole units in correct code.
        grad = torch.randn(signs[0].shape).masked_fill((signs[0] != signs[1]) | (signs[0] != signs[2]), 0.0)
        runs.append(tuple(run(layer, y, grad, apply) for layer, y in contestants))
        assert runs[-1][0].keys() == runs[-1][1].keys() == runs[-1][2].keys()
    for name in runs[0][0]:
        truth, usual, got = (torch.stack([_judged(name, each[which][name]) for each in runs]) for which in range(3))
        assert_close_to_truth(name, got, usual, truth)


def _judged(name: str, t: Tensor) -> Tensor:
    """Without a bias of the keys, which the softmax never sees: its gradient is rounding noise, ours is zero."""
    if name.endswith("in_proj_bias"):
        q, _, v = t.chunk(3)
        return torch.cat((q, v))
    return torch.zeros_like(t) if name.endswith("w_ks.bias") else t


class Stack(nn.Module):
    """As torchfm's model calls its attention, and as others with `batch_first` do."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        made = (nn.MultiheadAttention(8, 2, **options) for _ in range(2))
        self.self_attns = nn.ModuleList(made)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        first = self.self_attns[0].batch_first
        term = x if first else x.transpose(0, 1)
        for attention in self.self_attns:
            term, _ = attention(term, term, term, **options)
        return term if first else term.transpose(0, 1)


# Known by its qualified name alone.
Stack.__module__, Stack.__qualname__ = "torchfm.model.afi", "AutomaticFeatureInteractionModel"


def torchfm_model(**options: Any) -> Stack:
    stack = Stack(**options)
    for p in stack.parameters():
        # Biases too count for something.
        nn.init.normal_(p, std=0.5)
    return stack
