"""The two ops, fold and interact: autograd around the engines, eager and compiled.

Eager calls go through a `torch.autograd.Function`, which costs a few microseconds; torch.compile, torch.export and
tensor subclasses see the same engines as operators of torch.library (`autoint_fast::fold`, `::interact` and their
backwards), which cost tens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .dispatch import ENGINES
from .weights import (
    NEED_BIAS,
    NEED_INPUT,
    NEED_RESIDUAL,
    NEED_SCORES,
    NEED_VALUES,
    NEED_WEIGHTS,
    InteractingParameters,
    Layout,
    folded_dtype,
)

SECOND_ORDER = (
    'autoint_fast: a fused engine has no second-order gradients; build the layer with backend="reference" '
    "to differentiate twice (gradient penalties, torch.autograd.functional.hessian)"
)

BATCHED = (
    "autoint_fast: a fused engine cannot differentiate under vmap (is_grads_batched, torch.func.vmap); build the layer "
    'with backend="reference" for that'
)


def _layout_of(p: InteractingParameters, n_head: int) -> Layout:
    return Layout(n_head, p.w_q.shape[1], p.w_o.shape[0])


def _as_stored(t: Tensor) -> Tensor:
    """t with its values in memory, for kernels that read them there: those of `t.conj().imag`, say, are negated."""
    return t.resolve_neg() if t.is_neg() else t


def _fold(p: InteractingParameters, layout: Layout, backend: str) -> Tensor:
    return ENGINES[backend].fold(p, layout)


def _fold_backward(
    grad: Tensor, p: InteractingParameters, layout: Layout, backend: str, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    return ENGINES[backend].fold_backward(grad.contiguous(), p, layout, wanted)


def _interact(x: Tensor, packed: Tensor, mask: Tensor | None, layout: Layout, backend: str) -> Tensor:
    return ENGINES[backend].interact(_as_stored(x), packed, mask, layout)


def _interact_backward(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    out: Tensor,
    mask: Tensor | None,
    layout: Layout,
    backend: str,
    needs: int,
) -> tuple[Tensor | None, Tensor | None]:
    return ENGINES[backend].interact_backward(_as_stored(grad), _as_stored(x), packed, out, mask, layout, needs)


# --- eager: autograd.Function -----------------------------------------------------------------------------------


class _Once(torch.autograd.Function):
    """A backward as a function of its own, so that under create_graph its result is tied to every input, and
    differentiating it again raises. (`once_differentiable` lets a path by way of the saved tensors through.)"""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(SECOND_ORDER)


class _InteractBackward(_Once):
    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        x: Tensor,
        packed: Tensor,
        mask: Tensor | None,
        out: Tensor,
        layout: Layout,
        backend: str,
        needs: int,
        wanted: tuple[bool, ...],
        *parameters: Tensor,
    ) -> tuple[Tensor | None, ...]:
        d_x, d_packed = _interact_backward(grad, x, packed, out, mask, layout, backend, needs)
        if d_packed is None:
            return d_x, *(None for _ in parameters)
        return d_x, *_fold_backward(d_packed, InteractingParameters(*parameters), layout, backend, wanted)


class _Interact(torch.autograd.Function):
    """Folding and interacting as one node: two would cost a small batch as much again as the folding."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor | None,
        mask: Tensor | None,
        layout: Layout,
        backend: str,
        needs: int,
        *parameters: Tensor,
    ) -> Tensor:
        if packed is None:
            packed = _fold(InteractingParameters(*parameters), layout, backend)
        out = _interact(x, packed, mask, layout, backend)
        ctx.save_for_backward(x, packed, mask, out, *parameters)
        ctx.layout, ctx.backend, ctx.needs = layout, backend, needs
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad):
            raise RuntimeError(BATCHED)
        x, packed, mask, out, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[-len(parameters) :]
        run = _InteractBackward.apply if torch.is_grad_enabled() else partial(_InteractBackward.forward, None)
        d_x, *d_parameters = run(grad, x, packed, mask, out, ctx.layout, ctx.backend, ctx.needs, wanted, *parameters)
        return d_x, None, None, None, None, None, *d_parameters


# --- compiled: torch.library ------------------------------------------------------------------------------------
# A custom op returns tensors, never None, so a gradient nobody needs is an empty tensor there.


@torch.library.custom_op("autoint_fast::fold", mutates_args=())
def _fold_op(parameters: list[Tensor], n_head: int, backend: str) -> Tensor:
    p = InteractingParameters(*parameters)
    return _fold(p, _layout_of(p, n_head), backend)


@_fold_op.register_fake
def _(parameters: list[Tensor], n_head: int, backend: str) -> Tensor:
    p = InteractingParameters(*parameters)
    return p.w_q.new_empty(_layout_of(p, n_head).numel, dtype=folded_dtype(p.w_q.dtype))


@torch.library.custom_op("autoint_fast::fold_backward", mutates_args=())
def _fold_backward_op(
    grad: Tensor, parameters: list[Tensor], n_head: int, backend: str, wanted: list[bool]
) -> list[Tensor]:
    p = InteractingParameters(*parameters)
    grads = _fold_backward(grad, p, _layout_of(p, n_head), backend, tuple(wanted))
    return [t.new_empty(0) if g is None else g for g, t in zip(grads, p, strict=True)]


@_fold_backward_op.register_fake
def _(grad: Tensor, parameters: list[Tensor], n_head: int, backend: str, wanted: list[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape if want else (0,)) for t, want in zip(parameters, wanted, strict=True)]


def _fold_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    parameters, ctx.n_head, ctx.backend = inputs
    ctx.wanted = [t.requires_grad for t in parameters]
    ctx.save_for_backward(*parameters)


def _fold_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = torch.ops.autoint_fast.fold_backward(grad, list(ctx.saved_tensors), ctx.n_head, ctx.backend, ctx.wanted)
    return [g if want else None for g, want in zip(grads, ctx.wanted, strict=True)], None, None


_fold_op.register_autograd(_fold_autograd, setup_context=_fold_setup)


@torch.library.custom_op("autoint_fast::interact", mutates_args=())
def _interact_op(
    x: Tensor, packed: Tensor, mask: Tensor | None, n_head: int, out_size: int, backend: str, needs: int
) -> Tensor:
    return _interact(x, packed, mask, Layout(n_head, x.shape[2], out_size), backend)


@_interact_op.register_fake
def _(x: Tensor, packed: Tensor, mask: Tensor | None, n_head: int, out_size: int, backend: str, needs: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], out_size)


@torch.library.custom_op("autoint_fast::interact_backward", mutates_args=())
def _interact_backward_op(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    out: Tensor,
    mask: Tensor | None,
    n_head: int,
    backend: str,
    needs: int,
) -> tuple[Tensor, Tensor]:
    layout = Layout(n_head, x.shape[2], out.shape[2])
    d_x, d_packed = _interact_backward(grad, x, packed, out, mask, layout, backend, needs)
    return x.new_empty(0) if d_x is None else d_x, packed.new_empty(0) if d_packed is None else d_packed


@_interact_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    out: Tensor,
    mask: Tensor | None,
    n_head: int,
    backend: str,
    needs: int,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs & NEED_INPUT else (0,)),
        packed.new_empty(packed.shape if needs & NEED_WEIGHTS else (0,)),
    )


def _interact_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, mask, ctx.n_head, _, ctx.backend, ctx.needs = inputs
    ctx.save_for_backward(x, packed, mask, output)


def _interact_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, mask, out = ctx.saved_tensors
    d_x, d_packed = torch.ops.autoint_fast.interact_backward(
        grad, x, packed, out, mask, ctx.n_head, ctx.backend, ctx.needs
    )
    return (
        d_x if ctx.needs & NEED_INPUT else None,
        d_packed if ctx.needs & NEED_WEIGHTS else None,
        *(None,) * 5,
    )


_interact_op.register_autograd(_interact_autograd, setup_context=_interact_setup)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(SECOND_ORDER)


_fold_backward_op.register_autograd(_refuse)
_interact_backward_op.register_autograd(_refuse)


# --- the entry points -------------------------------------------------------------------------------------------


def through_library(*tensors: Tensor) -> bool:
    """Whether a call must be visible as an operator: while compiling or exporting, and for tensor subclasses."""
    return torch.compiler.is_compiling() or any(type(t) is not Tensor and type(t) is not Parameter for t in tensors)


def _needs(p: InteractingParameters) -> int:
    """The folded parts whose gradients the parameters ask for."""
    needs = 0
    if p.w_q.requires_grad or p.b_q.requires_grad or p.w_k.requires_grad:
        needs |= NEED_SCORES
    if p.w_v.requires_grad or p.w_o.requires_grad:
        needs |= NEED_VALUES
    if p.w_r.requires_grad:
        needs |= NEED_RESIDUAL
    # b_k has a gradient of zeros, which costs nothing but has to come from somewhere.
    if any(t.requires_grad for t in (p.b_k, p.b_v, p.w_o, p.b_o, p.b_r)):
        needs |= NEED_BIAS
    return needs


def fold(p: InteractingParameters, layout: Layout, backend: str) -> Tensor:
    """The packed folded weights (Layout.numel,) of a layer as constants, on the engine named `backend`.

    fp64 for fp64 parameters, fp32 for all others.
    """
    with torch.no_grad():
        return _fold(p, layout, backend)


def interact(
    x: Tensor,
    p: InteractingParameters,
    layout: Layout,
    mask: Tensor | None,
    backend: str,
    packed: Tensor | None = None,
) -> Tensor:
    """The interacting layer on the engine named `backend`.

    x (B, F, E) fp32, bf16, fp16 or fp64; mask None or bool (1 or B, 1 or F, 1 or F), True = hidden. `packed`: what
    `fold` gives for p; without it p is folded in the call. Gives (B, F, O) in x's dtype; differentiable once with
    respect to x and p. RuntimeError when differentiated twice.
    """
    needs = _needs(p) | (NEED_INPUT if x.requires_grad else 0) if torch.is_grad_enabled() else 0
    if through_library(x, p.w_q):
        if packed is None:
            packed = torch.ops.autoint_fast.fold(list(p), layout.n_head, backend)
        return torch.ops.autoint_fast.interact(x, packed, mask, layout.n_head, layout.out_size, backend, needs)
    if needs:
        return _Interact.apply(x, packed, mask, layout, backend, needs, *p)
    if packed is None:
        packed = _fold(p, layout, backend)
    return _interact(x, packed, mask, layout, backend)
