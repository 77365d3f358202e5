"""Every kind of layout an engine must serve, and what it computes, in plain differentiable PyTorch."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as nnf
from torch import Tensor

from autoint_fast.weights import (
    BARE,
    CONCATENATED,
    IDENTITY,
    LN2,
    MERGED,
    NO_RESIDUAL,
    PROJECTION,
    Layout,
)

NAMES = {
    "output": {MERGED: "merged", CONCATENATED: "concatenated", BARE: "bare"},
    "residual": {NO_RESIDUAL: "none", IDENTITY: "identity", PROJECTION: "projection"},
}


def make_layout(
    n_head: int,
    emb_size: int,
    head_size: int,
    factored: bool,
    output: int,
    residual: int,
    relu: bool,
    merged_size: int = 0,
) -> Layout:
    """A layout of heads of one width; `merged_size`: O where the heads are merged, 0 for E."""
    rank = head_size if factored else emb_size
    if residual == IDENTITY or output == MERGED:
        out_size = emb_size if residual == IDENTITY else merged_size or emb_size
    if output == CONCATENATED:
        out_size = n_head * head_size
    elif output == BARE:
        out_size = n_head * rank
    return Layout(n_head, emb_size, rank, out_size, int(factored), output, residual, int(relu))


def every_kind(n_head: int, emb_size: int, head_size: int, merged_size: int = 0) -> list[Layout]:
    """All combinations of form, output, residual and end that exist at these sizes."""
    layouts = []
    outputs, residuals = (MERGED, CONCATENATED, BARE), (NO_RESIDUAL, IDENTITY, PROJECTION)
    for factored, output, residual, relu in itertools.product((False, True), outputs, residuals, (False, True)):
        if factored and output == CONCATENATED:
            continue
        width = n_head * (head_size if factored or output == CONCATENATED else emb_size)
        if residual == IDENTITY and output != MERGED and width != emb_size:
            continue
        layouts.append(make_layout(n_head, emb_size, head_size, factored, output, residual, relu, merged_size))
    return layouts


def describe(layout: Layout) -> str:
    """For the ids of tests."""
    h, e, d, o, factored, output, residual, relu = layout
    form = "factored" if factored else "folded"
    kind = f"{form}-{NAMES['output'][output]}-{NAMES['residual'][residual]}-{'relu' if relu else 'linear'}"
    return f"{kind}-H{h}E{e}D{d}O{o}"


def draw_packed(layout: Layout, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random packed weights, of sizes that keep every intermediate near 1."""
    h, e, d = layout[:3]
    scales = (
        1 / math.sqrt(e * d),
        0.3,
        1 / math.sqrt(e),
        1 / math.sqrt(e),
        1 / math.sqrt(h * d),
        1 / math.sqrt(e),
        0.5,
        0.5,
    )
    return torch.cat([torch.randn(n) * s for n, s in zip(layout.sizes, scales, strict=True)]).to(dtype)


def interact_plainly(x: Tensor, packed: Tensor, mask: Tensor | None, layout: Layout) -> Tensor:
    """What `interact` of an engine computes: x (B, F, E), mask of 3 dimensions or None -> (B, F, O) in x's dtype."""
    h = layout.n_head
    a, c, k, v, m, r, b, g = (part.to(x.dtype) for part in layout.parts(packed))
    q = torch.einsum("bfe,ehd->bhfd", x, a) + c[:, None, :]
    keys = torch.einsum("bfe,ehd->bhfd", x, k) if layout.factored else x[:, None].expand(-1, h, -1, -1)
    values = torch.einsum("bfe,ehd->bhfd", x, v) if layout.factored else x[:, None].expand(-1, h, -1, -1)
    logits = q @ keys.mT * LN2
    seen = torch.ones((), dtype=x.dtype)
    if mask is not None:
        empty = mask.all(-1, keepdim=True)
        logits = logits.masked_fill((mask & ~empty)[:, None], -math.inf)
        p = torch.softmax(logits, -1).masked_fill(empty[:, None], 0.0)
        seen = (~empty).to(x.dtype)
    else:
        p = torch.softmax(logits, -1)
    z = p @ values
    if layout.output == MERGED:
        y = torch.einsum("bhfd,hdo->bfo", z, m)
    else:
        if layout.output == CONCATENATED:
            z = torch.einsum("bhfd,hdo->bhfo", z, m)
        y = z.transpose(1, 2).flatten(2)
    if layout.residual == PROJECTION:
        y = y + x @ r
    elif layout.residual == IDENTITY:
        y = y + x
    y = y + b + g * seen
    return nnf.relu(y) if layout.relu else y


def relu_mask_of(out: Tensor, layout: Layout) -> Tensor | None:
    """The relu mask (B, F, words) of the Triton engine for an output (B, F, O): bit c of a word says whether relu let
    pass the c-th of 16 columns of one head, or of all heads where they share theirs; without relu None."""
    if not layout.relu:
        return None
    heads = 1 if layout.output == MERGED else layout.n_head
    passed = (~(out <= 0)).unflatten(-1, (heads, layout.head_out))
    words = nnf.pad(passed, (0, -layout.head_out % 16)).unflatten(-1, (-1, 16)).flatten(-3, -2)
    return (words.int() << torch.arange(16)).sum(-1).to(torch.int16)
