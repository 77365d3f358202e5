"""The weights: what a layer is made of, and what its projections fold into, as one packed buffer."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LN2 = math.log(2.0)
LOG2E = 1.0 / LN2

# Which gradients a call needs, as a bit set: the engines do no work for the others.
NEED_INPUT = 1
NEED_SCORES = 2  # a, c and k
NEED_VALUES = 4  # v and m
NEED_RESIDUAL = 8  # r
NEED_BIAS = 16  # b and g
NEED_WEIGHTS = NEED_SCORES | NEED_VALUES | NEED_RESIDUAL | NEED_BIAS

# What is added to the attention's output, as in `Layout.residual`.
RESIDUALS = ("none", "identity", "projection")
NO_RESIDUAL, IDENTITY, PROJECTION = range(3)
# What becomes of the heads' outputs z_h, as in `Layout.output`.
MERGED, CONCATENATED, BARE = range(3)


class InteractingParameters(NamedTuple):
    """The tensors of one layer, each in `torch.nn.Linear` layout, None where the layer has none.

    E = embedding size, H = heads, d = width of a head, O = output width. All share one dtype and device.
    """

    w_q: Tensor  # [H*d, E]
    b_q: Tensor | None  # [H*d]
    w_k: Tensor  # [H*d, E]
    b_k: Tensor | None  # [H*d]
    w_v: Tensor | None  # [H*d, E]; without it and w_o, the heads give P_h x (O = H*E)
    b_v: Tensor | None  # [H*d]
    w_o: Tensor | None  # [O, H*d]; without, the heads are concatenated (O = H*d)
    b_o: Tensor | None  # [O]
    w_r: Tensor | None  # [O, E]
    b_r: Tensor | None  # [O]


# What kind of layer an Interaction is: its n_head, scale, residual and relu.
Kind = tuple[int, float, str, bool]


@dataclass(slots=True)
class Interaction:
    """One interacting layer, described by its tensors and its kind.

    With Q = x Wq + bq, K = x Wk + bk, V = x Wv + bv cut into heads, and P_h = softmax(scale Q_h K_h^T) over the fields
    that are not hidden,

        out = end( concat_h(P_h V_h) Wo + bo + residual ),    residual = 0, x, or x Wr + br.

    Attributes:
        parameters: its tensors; those that are None are left out of the formula.
        n_head: heads H; each is as wide as the rows of w_q over H.
        scale: of the logits.
        residual: "none", "identity" (O = E) or "projection" (by w_r).
        relu: whether `end` is relu; else it is nothing.
        dropout: of P while training, which the op does not have: `accelerate` leaves such a call to the original code.
    """

    parameters: InteractingParameters
    n_head: int
    scale: float
    residual: str
    relu: bool = True
    dropout: float = 0.0

    @property
    def kind(self) -> Kind:
        """n_head, scale, residual and relu."""
        return self.n_head, self.scale, self.residual, self.relu


class Parts(NamedTuple):
    """The folded tensors; E = embedding size, H = heads, D = rank, O = output width, O_h = that of a head.

    With P_h = 2^((x a_h + c_h) keys_h^T) normalised over the fields that are not hidden, z_h = P_h values_h, where the
    keys are x or x k_h, the values x or x v_h,

        out = end( sum or concatenation over h of z_h [m_h] + residual + b + g where the row is not fully hidden )

    where the residual is 0, x, or x r. Parts that a layout does not have are empty.
    """

    a: Tensor  # [E, H, D]  head by head in the middle, so that x a is one matmul
    c: Tensor  # [H, D]
    k: Tensor  # [E, H, D]  factored layouts
    v: Tensor  # [E, H, D]  factored layouts
    m: Tensor  # [H, D, O_h]  unless the heads are left bare
    r: Tensor  # [E, O]  with a projected residual
    b: Tensor  # [O]
    g: Tensor  # [O]


class Layout(NamedTuple):
    """How a layer is computed, and where each part of the folded weights lies in the packed buffer.

    Folded, x is the keys and the values of every head, and D = E:
        a_h = log2(e) scale Wq_h Wk_h^T, c_h = log2(e) scale bq_h Wk_h^T, m_h = Wv_h Wo_h, or Wv_h concatenated.
    Factored, each head projects its own, and D is its width d:
        a_h = log2(e) scale Wq_h, c_h = log2(e) scale bq_h, k_h = Wk_h, v_h = Wv_h, m_h = Wo_h, or none concatenated.
    In both b = bo + br, and g = sum_h bv_h Wo_h, or bv concatenated.
    """

    n_head: int
    emb_size: int
    rank: int
    out_size: int
    factored: int = 0
    output: int = MERGED
    residual: int = PROJECTION
    relu: int = 1

    @property
    def head_out(self) -> int:
        """Output columns that a head gives to: all, or its own."""
        return self.out_size if self.output == MERGED else self.out_size // self.n_head

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of the parts, in the order in which they are packed; 0 for those that are not there."""
        return _sizes(self)

    @property
    def numel(self) -> int:
        return _numel(self)

    def parts(self, packed: Tensor) -> Parts:
        """Views of `packed` (numel,)."""
        h, d = self.n_head, self.rank
        a, c, k, v, m, r, b, g = packed.split(self.sizes)
        shape = (-1, h, d)
        return Parts(
            *(a.view(shape), c.view(h, d), k.view(shape), v.view(shape)),
            *(m.view(h, -1, self.head_out), r.view(-1, self.out_size), b, g),
        )


@functools.lru_cache(maxsize=1024)
def _sizes(layout: Layout) -> tuple[int, ...]:
    h, e, d, o, factored, output, residual, _ = layout
    projection = e * h * d
    return (
        projection,
        h * d,
        projection if factored else 0,
        projection if factored else 0,
        0 if output == BARE else h * d * layout.head_out,
        e * o if residual == PROJECTION else 0,
        o,
        o,
    )


@functools.lru_cache(maxsize=1024)
def _numel(layout: Layout) -> int:
    return sum(_sizes(layout))


FORMS = ("auto", "folded", "factored")


def choose_layout(interaction: Interaction, n_fields: int, form: str = "auto") -> Layout:
    """How to compute a layer on samples of so many fields.

    form: "auto" folds where that takes fewer operations; "folded" and "factored" force it. (Even where narrow heads
    do not fill a tile, and folding would be as fast, their own logits are the ones that round least.) Raises
    ValueError for another.
    """
    p = interaction.parameters
    merged = None if p.w_o is None else p.w_o.shape[0]
    kind = (p.w_v is not None, interaction.residual, interaction.relu)
    sizes = (*p.w_q.shape, merged)
    # Dynamo warns of a cache that it looks through, and a symbolic number cannot be looked up in one.
    if torch.compiler.is_compiling() or isinstance(n_fields, torch.SymInt) or isinstance(sizes[1], torch.SymInt):
        fixed = (None if size is None else int(size) for size in sizes)
        return layout_of.__wrapped__(interaction.n_head, *fixed, *kind, n_fields, form)
    return layout_of(interaction.n_head, *sizes, *kind, n_fields, form)


@functools.lru_cache(maxsize=1024)
def layout_of(
    h: int,
    rows: int,
    e: int,
    merged: int | None,
    has_values: bool,
    residual: str,
    relu: bool,
    n_fields: int,
    form: str,
) -> Layout:
    """`choose_layout` by what it asks of a layer: heads, the shape of w_q, the rows of w_o, whether there is a w_v."""
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    end = (RESIDUALS.index(residual), int(relu))
    # Of concatenated heads only folding leaves something to multiply by: the projection of their values.
    output = MERGED if merged is not None else CONCATENATED if has_values else BARE
    folded = Layout(h, e, e, merged or (rows if has_values else h * e), 0, output, *end)
    factored = Layout(h, e, rows // h, merged or rows, 1, BARE if merged is None else MERGED, *end)
    if not has_values or form == "folded":
        return folded
    if form == "factored" or operations(factored, n_fields) < operations(folded, n_fields):
        return factored
    return folded


def operations(layout: Layout, n_fields: int) -> int:
    """Those of one sample's forward in products of matrices, two for every multiplication and its addition.

    A head takes 2 F E^2 + 4 F^2 E + 2 F E O_h folded, and 6 F E d + 4 F^2 d + 2 F d O_h factored, where the last term
    is there only with an output projection; a projected residual takes 2 F E O.
    """
    h, e, d, o, factored, output, residual, _ = layout
    projections = (3 if factored else 1) * e * d + (0 if output == BARE else d * layout.head_out)
    return 2 * n_fields * (h * (projections + 2 * n_fields * d) + (e * o if residual == PROJECTION else 0))


def folded_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the folded weights for parameters or inputs of `dtype`: never below fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_by_row(t: Tensor) -> Tensor:
    """A parameter, or its transpose where that is what lies in memory row by row."""
    return t.mT if t.ndim == 2 and not t.is_contiguous() and t.mT.is_contiguous() else t
