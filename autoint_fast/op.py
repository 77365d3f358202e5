"""The two ops, fold and interact: autograd around the engines, eager and compiled.

Eager calls go through a `torch.autograd.Function`, which costs a few microseconds; torch.compile, torch.export and
tensor subclasses see the same engines as operators of torch.library (`autoint_fast::fold`, `::interact` and their
backwards), which cost tens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    Interaction,
    Layout,
    folded_dtype,
)

SECOND_ORDER = (
    'autoint_fast: a fused engine has no second-order gradients; give the layer, or accelerate, backend="reference" '
    "to differentiate twice (gradient penalties, torch.autograd.functional.hessian)"
)

BATCHED = (
    "autoint_fast: a fused engine cannot differentiate under vmap (is_grads_batched, torch.func.vmap); give the layer, "
    'or accelerate, backend="reference" for that'
)

PROXY = torch._C._TorchDispatchModeKey.PROXY


def _as_stored(t: Tensor) -> Tensor:
    """t with its values in memory, for kernels that read them there: those of `t.conj().imag`, say, are negated."""
    return t.resolve_neg() if t.is_neg() else t


def _fold(
    p: InteractingParameters, layout: Layout, scale: float, backend: str, folding: Callable[[], Tensor] | None
) -> Tensor:
    return ENGINES[backend].fold(p, layout, scale) if folding is None else folding()


def _fold_backward(
    grad: Tensor, p: InteractingParameters, layout: Layout, scale: float, backend: str, wanted: Sequence[bool]
) -> list[Tensor | None]:
    return ENGINES[backend].fold_backward(grad.contiguous(), p, layout, scale, wanted)


def interact_constant(x: Tensor, packed: Tensor, layout: Layout, mask: Tensor | None, backend: str) -> Tensor:
    """`interact` with folded weights, where nothing is differentiated or traced."""
    return ENGINES[backend].interact(_as_stored(x), packed, mask, layout)


def _interact_differentiable(
    x: Tensor, packed: Tensor, layout: Layout, mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor | None]:
    """As `interact_constant`, and the relu mask, if the engine's backward reads one rather than the output."""
    engine, x = ENGINES[backend], _as_stored(x)
    relu_mask = engine.empty_relu_mask(x, layout) if layout.relu else None
    if relu_mask is None:
        return engine.interact(x, packed, mask, layout), None
    return engine.interact(x, packed, mask, layout, relu_mask=relu_mask), relu_mask


def _kept_of_relu(layout: Layout, out: Tensor, relu_mask: Tensor | None) -> Tensor | None:
    """What the backward asks of relu. An output that it does not ask for is the caller's to change in place."""
    return (out if relu_mask is None else relu_mask) if layout.relu else None


def _interact_backward(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    relu: Tensor | None,
    mask: Tensor | None,
    layout: Layout,
    backend: str,
    needs: int,
) -> tuple[Tensor | None, Tensor | None]:
    return ENGINES[backend].interact_backward(_as_stored(grad), _as_stored(x), packed, relu, mask, layout, needs)


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
        relu: Tensor | None,
        layout: Layout,
        scale: float,
        backend: str,
        needs: int,
        wanted: tuple[bool, ...],
        *parameters: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        d_x, d_packed = _interact_backward(grad, x, packed, relu, mask, layout, backend, needs)
        if d_packed is None:
            return d_x, *(None for _ in parameters)
        p = InteractingParameters(*parameters)  # type: ignore[arg-type]
        return d_x, *_fold_backward(d_packed, p, layout, scale, backend, wanted)


class _Interact(torch.autograd.Function):
    """Folding and interacting as one node: two would cost a small batch as much again as the folding."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor | None,
        folding: Callable[[], Tensor] | None,
        mask: Tensor | None,
        layout: Layout,
        scale: float,
        backend: str,
        needs: int,
        *parameters: Tensor | None,
    ) -> Tensor:
        if packed is None:
            p = InteractingParameters(*parameters)  # type: ignore[arg-type]
            packed = _fold(p, layout, scale, backend, folding)
        out, relu_mask = _interact_differentiable(x, packed, layout, mask, backend)
        ctx.save_for_backward(x, packed, mask, _kept_of_relu(layout, out, relu_mask), *parameters)
        ctx.call = (layout, scale, backend, needs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad):
            raise RuntimeError(BATCHED)
        x, packed, mask, relu, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[-len(parameters) :]
        run = _InteractBackward.apply if torch.is_grad_enabled() else partial(_InteractBackward.forward, None)
        d_x, *d_parameters = run(grad, x, packed, mask, relu, *ctx.call, wanted, *parameters)
        return d_x, None, None, None, None, None, None, None, *d_parameters


# --- compiled: torch.library ------------------------------------------------------------------------------------
# A custom op returns tensors, never None, so a gradient nobody needs, and a relu mask that is not kept, is an empty
# tensor there. It takes the parameters that are there as a list, and a layout as a list of numbers.


def _listed(p: InteractingParameters) -> tuple[list[Tensor], int]:
    """The tensors that are there, and which they are: bit j for the j-th of the ten."""
    return [t for t in p if t is not None], sum(1 << j for j, t in enumerate(p) if t is not None)


def _named(tensors: Sequence[Any], present: int) -> list[Any]:
    """What `_listed` gave, or something of each, in its place among the ten; None in the others."""
    remaining = iter(tensors)
    return [next(remaining) if present >> j & 1 else None for j in range(len(InteractingParameters._fields))]


@torch.library.custom_op("autoint_fast::fold", mutates_args=())
def _fold_op(parameters: list[Tensor], present: int, layout: list[int], scale: float, backend: str) -> Tensor:
    return ENGINES[backend].fold(InteractingParameters(*_named(parameters, present)), Layout(*layout), scale)


@_fold_op.register_fake
def _(parameters: list[Tensor], present: int, layout: list[int], scale: float, backend: str) -> Tensor:
    return parameters[0].new_empty(Layout(*layout).numel, dtype=folded_dtype(parameters[0].dtype))


@torch.library.custom_op("autoint_fast::fold_backward", mutates_args=())
def _fold_backward_op(
    grad: Tensor,
    parameters: list[Tensor],
    present: int,
    layout: list[int],
    scale: float,
    backend: str,
    wanted: list[bool],
) -> list[Tensor]:
    p = InteractingParameters(*_named(parameters, present))
    want = [bool(w) for w in _named(wanted, present)]
    grads = _fold_backward(grad, p, Layout(*layout), scale, backend, want)
    return [t.new_empty(0) if g is None else g for g, t in zip(grads, p, strict=True) if t is not None]


@_fold_backward_op.register_fake
def _(
    grad: Tensor,
    parameters: list[Tensor],
    present: int,
    layout: list[int],
    scale: float,
    backend: str,
    wanted: list[bool],
) -> list[Tensor]:
    return [t.new_empty(t.shape if want else (0,)) for t, want in zip(parameters, wanted, strict=True)]


def _fold_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    parameters, *ctx.call = inputs
    ctx.wanted = [t.requires_grad for t in parameters]
    ctx.save_for_backward(*parameters)


def _fold_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = torch.ops.autoint_fast.fold_backward(grad, list(ctx.saved_tensors), *ctx.call, ctx.wanted)
    return [g if want else None for g, want in zip(grads, ctx.wanted, strict=True)], None, None, None, None


_fold_op.register_autograd(_fold_autograd, setup_context=_fold_setup)


@torch.library.custom_op("autoint_fast::interact", mutates_args=())
def _interact_op(
    x: Tensor, packed: Tensor, mask: Tensor | None, layout: list[int], backend: str, needs: int
) -> tuple[Tensor, Tensor]:
    if needs:
        out, relu_mask = _interact_differentiable(x, packed, Layout(*layout), mask, backend)
    else:
        out, relu_mask = interact_constant(x, packed, Layout(*layout), mask, backend), None
    return out, x.new_empty(0, dtype=torch.int16) if relu_mask is None else relu_mask


@_interact_op.register_fake
def _(
    x: Tensor, packed: Tensor, mask: Tensor | None, layout: list[int], backend: str, needs: int
) -> tuple[Tensor, Tensor]:
    wanted = Layout(*layout)
    relu_mask = ENGINES[backend].empty_relu_mask(x, wanted) if needs and wanted.relu else None
    out = x.new_empty(x.shape[0], x.shape[1], wanted.out_size)
    return out, x.new_empty(0, dtype=torch.int16) if relu_mask is None else relu_mask


@torch.library.custom_op("autoint_fast::interact_backward", mutates_args=())
def _interact_backward_op(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    relu: Tensor | None,
    mask: Tensor | None,
    layout: list[int],
    backend: str,
    needs: int,
) -> tuple[Tensor, Tensor]:
    d_x, d_packed = _interact_backward(grad, x, packed, relu, mask, Layout(*layout), backend, needs)
    return x.new_empty(0) if d_x is None else d_x, packed.new_empty(0) if d_packed is None else d_packed


@_interact_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    relu: Tensor | None,
    mask: Tensor | None,
    layout: list[int],
    backend: str,
    needs: int,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs & NEED_INPUT else (0,)),
        packed.new_empty(packed.shape if needs & NEED_WEIGHTS else (0,)),
    )


def _interact_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, packed, mask, *ctx.call = inputs
    layout, _, ctx.needs = ctx.call
    out, relu_mask = output
    relu = _kept_of_relu(Layout(*layout), out, relu_mask if relu_mask.ndim == 3 else None)
    ctx.save_for_backward(x, packed, mask, relu)


def _interact_autograd(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, packed, mask, relu = ctx.saved_tensors
    d_x, d_packed = torch.ops.autoint_fast.interact_backward(grad, x, packed, relu, mask, *ctx.call)
    return (
        d_x if ctx.needs & NEED_INPUT else None,
        d_packed if ctx.needs & NEED_WEIGHTS else None,
        *(None,) * 4,
    )


_interact_op.register_autograd(_interact_autograd, setup_context=_interact_setup)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(SECOND_ORDER)


_fold_backward_op.register_autograd(_refuse)
_interact_backward_op.register_autograd(_refuse)


# --- the entry points -------------------------------------------------------------------------------------------


def through_library(*tensors: Tensor) -> bool:
    """Whether a call must be visible as an operator: while compiling or exporting, and for tensor subclasses."""
    for t in tensors:
        # Faster than a generator: this is asked at every call.
        if type(t) is not Tensor and type(t) is not Parameter:
            return True
    # make_fx of real tensors is seen by nothing else.
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(PROXY) is not None


def _needs(p: InteractingParameters) -> int:
    """The folded parts whose gradients the parameters ask for."""

    asked = [t is not None and t.requires_grad for t in p]
    w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o, w_r, b_r = asked
    needs = 0
    if w_q or b_q or w_k:
        needs |= NEED_SCORES
    if w_v or w_o:
        needs |= NEED_VALUES
    if w_r:
        needs |= NEED_RESIDUAL
    # b_k has a gradient of zeros, which costs nothing but has to come from somewhere.
    if b_k or b_v or b_o or b_r or (w_o and p.b_v is not None):
        needs |= NEED_BIAS
    return needs


def fold(interaction: Interaction, layout: Layout, backend: str) -> Tensor:
    """The packed folded weights (Layout.numel,) of a layer as constants, on the engine named `backend`.

    fp64 for fp64 parameters, fp32 for all others.
    """
    with torch.no_grad():
        return ENGINES[backend].fold(interaction.parameters, layout, interaction.scale)


def interact(
    x: Tensor,
    interaction: Interaction,
    layout: Layout,
    mask: Tensor | None,
    backend: str,
    packed: Tensor | None = None,
    folding: Callable[[], Tensor] | None = None,
) -> Tensor:
    """An interacting layer on the engine named `backend`, in the form of `layout` (`weights.choose_layout`).

    x (B, F, E) fp32, bf16, fp16 or fp64; mask None or bool (1 or B, 1 or F, 1 or F), True = hidden. packed: what `fold`
    gives; without it the parameters are folded in the call, by `folding`, if it is what the engine's own has given.
    Gives (B, F, O) in x's dtype; differentiable once with respect to x and the parameters. RuntimeError when
    differentiated twice.
    """
    p, scale = interaction.parameters, interaction.scale
    needs = _needs(p) | (NEED_INPUT if x.requires_grad else 0) if torch.is_grad_enabled() else 0
    if through_library(x, p.w_q):
        if packed is None:
            packed = torch.ops.autoint_fast.fold(*_listed(p), list(layout), scale, backend)
        out, _ = torch.ops.autoint_fast.interact(x, packed, mask, list(layout), backend, needs)
        return out
    if needs:
        return _Interact.apply(x, packed, folding, mask, layout, scale, backend, needs, *p)
    if packed is None:
        packed = _fold(p, layout, scale, backend, folding)
    return interact_constant(x, packed, layout, mask, backend)
