"""The layers of our own beside the drop-in: their formulas, spelled out, and the numerical rule for them."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoint_fast import FlattenedInteractingLayer, PaperInteractingLayer
from autoint_fast.fused import Fused
from tests.cases import draw_mask
from tests.numerics import Draw, Run, as_three_dimensions, judge, no_context

# (layer, x, mask) -> out: a layer's formula with its parameters as they are.
Definition = Callable[[Any, Tensor, "Tensor | None"], Tensor]


class PaperShape(NamedTuple):
    """Batch, fields, embedding size, attention width over all heads, heads."""

    b: int
    f: int
    e: int
    a: int
    h: int

    def __str__(self) -> str:
        return f"B{self.b}-F{self.f}-E{self.e}-A{self.a}-H{self.h}"


class FlattenedShape(NamedTuple):
    """Batch, fields, embedding size, heads."""

    b: int
    f: int
    e: int
    h: int

    def __str__(self) -> str:
        return f"B{self.b}-F{self.f}-E{self.e}-H{self.h}"


# --- formulas -----------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """softmax(scale q k^T) v of one head, zero for a row whose every key is hidden."""
    logits = q @ k.mT * scale
    if mask is None:
        return torch.softmax(logits, -1) @ v
    empty = mask.all(-1, keepdim=True)
    p = torch.softmax(logits.masked_fill(mask & ~empty, -math.inf), -1)
    return p.masked_fill(empty, 0.0) @ v


def paper(layer: PaperInteractingLayer, x: Tensor, mask: Tensor | None) -> Tensor:
    """Equations 5 to 8."""
    mask = as_three_dimensions(mask)
    d = layer.att_size // layer.n_head
    scale = 1 / math.sqrt(d) if layer.scaling else 1.0
    heads = [
        attend(*(x @ w.weight[i : i + d].t() for w in (layer.w_qs, layer.w_ks, layer.w_vs)), scale, mask)
        for i in range(0, layer.att_size, d)
    ]
    out = torch.cat(heads, -1)
    return torch.relu(out + x @ layer.w_res.weight.t() if layer.use_res else out)


def flattened(layer: FlattenedInteractingLayer, x: Tensor, mask: Tensor | None) -> Tensor:
    """The Keras function."""
    mask = as_three_dimensions(mask)
    e = layer.emb_size
    q, k, v = (nn.functional.linear(x, w.weight, w.bias) for w in (layer.w_qs, layer.w_ks, layer.w_vs))
    heads = [
        attend(q[..., i : i + e], k[..., i : i + e], v[..., i : i + e], 1 / math.sqrt(e), mask).flatten(1)
        for i in range(0, layer.n_head * e, e)
    ]
    out = nn.functional.linear(torch.cat(heads, -1), layer.fc_out.weight, layer.fc_out.bias)
    return torch.relu(out + nn.functional.linear(x.flatten(1), layer.fc_res.weight, layer.fc_res.bias))


# --- what is drawn ------------------------------------------------------------------------------------------


def draw_weights(layer: nn.Module) -> None:
    """Weights that keep every intermediate near 1, and biases that count.

    Logits too: where they are larger, a near tie of two of them decides the largest error of either layer.
    """
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0.0, 0.5 if p.ndim == 1 else 1 / math.sqrt(p.shape[1]))
        if isinstance(layer, PaperInteractingLayer) and not layer.scaling:
            for w in (layer.w_qs, layer.w_ks):
                w.weight.div_((layer.att_size // layer.n_head) ** 0.25)


def draw_paper(
    shape: PaperShape, dtype: torch.dtype = torch.float32, **how: Any
) -> tuple[PaperInteractingLayer, Tensor]:
    """A layer (`how`: its arguments) and an input."""
    b, f, e, a, h = shape
    layer = PaperInteractingLayer(e, a, h, dtype=dtype, **how)
    draw_weights(layer)
    return layer, torch.randn(b, f, e).to(dtype)


def draw_flattened(
    shape: FlattenedShape, dtype: torch.dtype = torch.float32, **how: Any
) -> tuple[FlattenedInteractingLayer, Tensor]:
    """A layer (`how`: its arguments) and an input."""
    b, f, e, h = shape
    layer = FlattenedInteractingLayer(f, e, h, dtype=dtype, **how)
    draw_weights(layer)
    return layer, torch.randn(b, f, e).to(dtype)


# --- the rule -----------------------------------------------------------------------------------------------


def work(
    layer: Fused,
    plain: Definition,
    x: Tensor,
    mask: Tensor | None = None,
    *,
    lay_out: Callable[[Tensor], Tensor] = torch.clone,
    around: Callable[[], contextlib.AbstractContextManager[Any]] = no_context,
) -> Draw:
    """Truth, `plain` and the layer on one input, forward and backward, as `tests.numerics.work` does it."""
    exact_layer, usual_layer = copy.deepcopy(layer).double(), copy.deepcopy(layer)
    leaves = [t.detach().requires_grad_() for t in (x.double(), x, x)]
    exact = plain(exact_layer, leaves[0], mask)
    with around():
        usual = plain(usual_layer, leaves[1], mask)
        ours = layer(leaves[2], mask)
    assert ours.dtype == usual.dtype, f"out: dtype {ours.dtype}, expected {usual.dtype}"
    signs = [out.detach() > 0 for out in (exact, usual, ours)]
    disagree = (signs[0] != signs[1]) | (signs[0] != signs[2])
    grad = lay_out(torch.randn(exact.shape, dtype=torch.float64).to(ours.dtype).masked_fill(disagree, 0.0))
    layer.zero_grad()
    runs = []
    for module, leaf, out in zip((exact_layer, usual_layer, layer), leaves, (exact, usual, ours), strict=True):
        out.backward(grad.to(out.dtype))
        grads = {"x": leaf.grad, **{name: p.grad for name, p in module.named_parameters()}}
        # The name by which `judge` knows that the true gradient is zero.
        runs.append(Run(out.detach(), {"b_k" if name == "w_ks.bias" else name: g for name, g in grads.items()}))
    for name, got in runs[2].grads.items():
        assert got is not None and got.dtype == runs[1].grads[name].dtype, f"gradient of {name}"
    return Draw(*runs)


def draws_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """How many problems to judge together, by the reasoning of `tests.suite.EngineSuite.draw`."""
    numbers = shape[0] * shape[1] * shape[2]
    return 1 if dtype == torch.float64 or numbers == 0 else max(8, min(64, 4096 // numbers))


def assert_paper(
    shape: PaperShape,
    dtype: torch.dtype,
    forms: Sequence[str | None] = (None,),
    draws: int | None = None,
    form: str = "auto",
    arrange: Callable[[Tensor], Tensor] = lambda x: x,
    **how: Any,
) -> None:
    """Holds the layer (`how`: its arguments) to the rule, with masks of `forms`, its weights in `form`."""
    results = []
    for mask_form in forms:
        for _ in range(draws or draws_of(shape, dtype)):
            layer, x = draw_paper(shape, dtype, **how)
            layer.form = form
            mask = None if mask_form is None else draw_mask(mask_form, shape.b, shape.f)
            results.append(work(layer, paper, arrange(x), mask))
    judge(results)


def assert_flattened(
    shape: FlattenedShape,
    dtype: torch.dtype,
    forms: Sequence[str | None] = (None,),
    draws: int | None = None,
    arrange: Callable[[Tensor], Tensor] = lambda x: x,
    **how: Any,
) -> None:
    """Holds the layer (`how`: its arguments) to the rule, with masks of `forms`."""
    results = []
    for mask_form in forms:
        for _ in range(draws or draws_of(shape, dtype)):
            layer, x = draw_flattened(shape, dtype, **how)
            mask = None if mask_form is None else draw_mask(mask_form, shape.b, shape.f)
            results.append(work(layer, flattened, arrange(x), mask))
    judge(results)
