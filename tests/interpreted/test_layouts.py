"""The Triton kernels on every kind of layout, and folding into each, at shapes for an interpreter."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from autoint_fast.kernels import triton_engine
from autoint_fast.kernels.triton_launch import Config
from autoint_fast.weights import (
    BARE,
    CONCATENATED,
    IDENTITY,
    LOG2E,
    MERGED,
    NEED_BIAS,
    NEED_INPUT,
    NEED_RESIDUAL,
    NEED_SCORES,
    NEED_VALUES,
    NEED_WEIGHTS,
    NO_RESIDUAL,
    PROJECTION,
    InteractingParameters,
    Layout,
    Parts,
    folded_dtype,
)
from tests.cases import as_columns, every_other_number, piece_of_cat
from tests.honest_interpreter import overflow_checks
from tests.layouts import describe, draw_packed, every_kind, interact_plainly, relu_mask_of
from tests.numerics import EmulatedTF32, assert_close_to_truth

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EVERYTHING = NEED_INPUT | NEED_WEIGHTS
# H, E, width of a head: aligned; wider than the embedding, both odd; O no multiple of 16; several chunks and heads.
SIZES = ((2, 16, 8), (2, 10, 16), (3, 16, 5), (4, 32, 8))
# All kinds of the first, and of the others a fourth, another one each time.
KINDS = every_kind(*SIZES[0]) + [layout for i, size in enumerate(SIZES[1:]) for layout in every_kind(*size)[i::4]]
# What libraries have: DeepCTR's, the paper's narrow and wide, one without values, multi-head attention.
DEEPCTR = Layout(2, 16, 8, 16, 1, BARE, PROJECTION)
PAPER = Layout(2, 16, 16, 64, 0, CONCATENATED, PROJECTION)
WIDE = Layout(1, 40, 20, 20, 1, BARE, PROJECTION)
VALUELESS = Layout(2, 16, 16, 32, 0, BARE, NO_RESIDUAL)
ATTENTION = Layout(2, 16, 8, 16, 1, MERGED, IDENTITY, 0)


def draw_mask(kind: str, batch: int, fields: int) -> Tensor | None:
    """True = hidden; the first row of the first sample sees nothing."""
    if kind == "none":
        return None
    mask = torch.rand(batch, fields if kind == "pairs" else 1, fields) < 0.4
    mask[0, 0] = True
    return mask


class Run:
    """The output of `interact_plainly` in one dtype, and its gradients: of x, and of the packed weights."""

    def __init__(self, x: Tensor, packed: Tensor, mask: Tensor | None, layout: Layout, emulated: bool = False) -> None:
        self.leaves = [x.detach().requires_grad_(), packed.detach().requires_grad_()]
        self.around = EmulatedTF32 if emulated else contextlib.nullcontext
        with self.around():
            self.out = interact_plainly(*self.leaves, mask, layout)

    def differentiate(self, grad: Tensor) -> None:
        with self.around():
            self.d_x, self.d_packed = torch.autograd.grad(self.out, self.leaves, grad.to(self.out.dtype))


class Case:
    """One call worked three ways: the truth in float64, plainly in its dtype, and by the kernels."""

    def __init__(
        self, layout: Layout, fields: int, batch: int, mask: str, dtype: torch.dtype = torch.float64, tf32: bool = False
    ) -> None:
        self.layout, self.mask = layout, draw_mask(mask, batch, fields)
        self.packed = draw_packed(layout, folded_dtype(dtype))
        self.x = torch.randn(batch, fields, layout.emb_size).to(dtype)
        self.truth = Run(self.x.double(), self.packed.double(), self.mask, layout)
        self.plain = Run(self.x, self.packed, self.mask, layout, tf32)
        self.forward()
        assert self.out.dtype == dtype
        self.grad = torch.randn(self.out.shape).to(dtype)
        if layout.relu:
            # A relu that flips near zero changes a gradient by whole units in correct code.
            signs = [out > 0 for out in (self.truth.out, self.plain.out, self.out)]
            self.grad[(signs[0] != signs[1]) | (signs[0] != signs[2])] = 0
        for run in (self.truth, self.plain):
            run.differentiate(self.grad)

    def forward(self, config: Config | None = None) -> None:
        self.relu_mask = None
        if self.layout.relu:
            # A word that is not written shows.
            self.relu_mask = triton_engine.empty_relu_mask(self.x, self.layout).fill_(-1)
        self.out = triton_engine.interact(self.x, self.packed, self.mask, self.layout, config, relu_mask=self.relu_mask)
        if self.layout.relu:
            assert torch.equal(self.relu_mask, relu_mask_of(self.out, self.layout))

    def backward(self, needs: int = EVERYTHING, config: Config | None = None) -> tuple[Tensor | None, Tensor | None]:
        return triton_engine.interact_backward(
            self.grad, self.x, self.packed, self.relu_mask, self.mask, self.layout, needs, config
        )

    def parts(self, packed: Tensor) -> Parts:
        return self.layout.parts(packed.detach())

    def judge(self, config: Config | None = None) -> None:
        if config is not None:
            self.forward(config)
        d_x, d_packed = self.backward(config=config)
        assert_close_to_truth("out", self.out, self.plain.out, self.truth.out.detach())
        assert_close_to_truth("gradient of x", d_x, self.plain.d_x, self.truth.d_x)
        # A maximum over a bias's few numbers says little, so it is taken over all parts; fp64 allows no luck.
        if self.x.dtype != torch.float64:
            unit = self.x.dtype
            assert_close_to_truth("gradient", d_packed, self.plain.d_packed, self.truth.d_packed, unit=unit)
            return
        for name, *three in zip(
            Parts._fields, *map(self.parts, (d_packed, self.plain.d_packed, self.truth.d_packed)), strict=True
        ):
            assert_close_to_truth(f"gradient of {name}", *three)


@pytest.mark.parametrize(("number", "layout"), list(enumerate(KINDS)), ids=[describe(layout) for layout in KINDS])
def test_every_kind(number: int, layout: Layout) -> None:
    """Packed samples and samples of a tile or more take turns, with every kind of mask."""
    fields, batch = ((7, 3), (13, 1), (2, 6), (17, 1), (4, 5))[number % 5]
    Case(layout, fields, batch, ("none", "keys", "pairs")[number % 3]).judge()


@pytest.mark.parametrize(
    ("layout", "fields", "mask"),
    [(DEEPCTR, 1, "none"), (DEEPCTR, 39, "keys"), (DEEPCTR, 70, "none"), (PAPER, 39, "none"), (WIDE, 39, "pairs")],
    ids=lambda value: describe(value) if isinstance(value, Layout) else str(value),
)
def test_one_field_and_several_blocks(layout: Layout, fields: int, mask: str) -> None:
    Case(layout, fields, 1, mask).judge()


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", [DEEPCTR, PAPER, ATTENTION], ids=describe)
def test_precisions(layout: Layout, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_engine, "allow_tf32", lambda: precision == "tf32")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    Case(layout, 18, 1, "pairs", dtype, precision == "tf32").judge()


NEEDS = {
    NEED_INPUT: (),
    NEED_SCORES: ("a", "c", "k"),
    NEED_VALUES: ("v", "m"),
    NEED_RESIDUAL: ("r",),
    NEED_BIAS: ("b", "g"),
}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, 16, 8, 8, 1, BARE, PROJECTION),
        Layout(1, 16, 16, 8, 0, CONCATENATED, PROJECTION),
        Layout(1, 16, 8, 16, 1, MERGED, IDENTITY),
        VALUELESS,
    ],
    ids=describe,
)
def test_only_what_is_needed(layout: Layout) -> None:
    """Each part alone, and all but one: the others are zero."""
    case = Case(layout, 6, 2, "keys")
    for needs in (*NEEDS, EVERYTHING - NEED_INPUT, EVERYTHING - NEED_VALUES):
        d_x, d_packed = case.backward(needs)
        assert (d_x is not None) == bool(needs & NEED_INPUT)
        if d_x is not None:
            assert_close_to_truth("gradient of x", d_x, case.plain.d_x, case.truth.d_x)
        if not needs & NEED_WEIGHTS:
            assert d_packed is None
            continue
        truth, ours = case.parts(case.truth.d_packed), case.parts(d_packed)
        for bit, names in NEEDS.items():
            for name in names:
                expected = getattr(truth, name) if needs & bit else torch.zeros_like(getattr(truth, name))
                assert_close_to_truth(f"gradient of {name}", getattr(ours, name), expected, expected)


@pytest.mark.parametrize(("rows", "keys"), [(16, 32), (32, 16), (32, 32)])
def test_cuts(rows: int, keys: int) -> None:
    layout = Layout(1, 16, 8, 16, 1, MERGED, PROJECTION)
    Case(layout, 35, 1, "pairs").judge(Config("ieee", rows=rows, keys=keys))


@pytest.mark.parametrize("layout", [DEEPCTR, PAPER, ATTENTION], ids=describe)
def test_a_program_walks_over_tiles(layout: Layout) -> None:
    Case(layout, 3, 9, "keys").judge(Config("ieee", pack=4, programs_per_sm=1))


@pytest.mark.parametrize("layout", [DEEPCTR, ATTENTION], ids=describe)
def test_strides(layout: Layout) -> None:
    case = Case(layout, 5, 4, "none")
    expected = (case.out, *case.backward())
    case.x, case.grad = as_columns(case.x), every_other_number(case.grad)
    assert torch.equal(triton_engine.interact(case.x, case.packed, None, layout), expected[0])
    case.x, case.grad = piece_of_cat(case.x), as_columns(case.grad)
    for ours, contiguous in zip(case.backward(), expected[1:], strict=True):
        assert torch.equal(ours, contiguous)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, torch.nan), (torch.float16, torch.inf)], ids=str)
@pytest.mark.parametrize("layout", [DEEPCTR, PAPER, VALUELESS, ATTENTION], ids=describe)
def test_samples_that_share_a_tile_keep_their_nan(layout: Layout, dtype: torch.dtype, value: float) -> None:
    case = Case(layout, 3, 5, "none", dtype)
    expected, _ = case.backward()
    case.x[1, 2, 0] = value
    case.out = triton_engine.interact(case.x, case.packed, None, layout)
    d_x, _ = case.backward()
    others = [0, 2, 3, 4]
    assert case.out[1].isnan().all() or layout.residual != NO_RESIDUAL
    assert case.out[1].isnan().any() and d_x[1].isnan().all()
    # The others are computed once more, with row maxima: as right as before, in other bits.
    assert_close_to_truth("out", case.out[others], case.plain.out[others], case.truth.out[others].detach())
    assert torch.equal(d_x[others], expected[others])


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32x4", 2e-6), ("tf32", 1e-3)])
def test_enormous_gradients_are_not_lost(precision: str, tolerance: float) -> None:
    """Their products with exponentials that are not normalised overflow."""
    layout = Layout(2, 16, 16, 16, 0, MERGED, PROJECTION, 0)
    packed, x, grad = draw_packed(layout), torch.randn(2, 40, 16), torch.randn(2, 40, 16)
    layout.parts(packed).a.mul_(8)
    usual, enormous = (
        triton_engine.interact_backward(g, x, packed, None, None, layout, NEED_INPUT, Config(precision))[0]
        for g in (grad, grad * 2.0**100)
    )
    torch.testing.assert_close(enormous / 2.0**100, usual, rtol=0, atol=tolerance * usual.abs().max().item())


def test_values_that_overflow_in_projection_are_not_lost() -> None:
    """From a finite x, in a tile that samples share."""
    layout = Layout(1, 16, 16, 16, 1, BARE, NO_RESIDUAL, 0)
    packed, x = draw_packed(layout), torch.randn(3, 3, 16).half()
    x[1, 1] = 60000.0
    layout.parts(packed).a.zero_()
    layout.parts(packed).v.fill_(1.0)
    out = triton_engine.interact(x, packed, None, layout)
    assert not out[1].isfinite().any() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("layout", "dimension"), [(DEEPCTR, 0), (ATTENTION, 1)])
def test_addresses_beyond_32_bits(layout: Layout, dimension: int) -> None:
    """The rows that pad a tile are never read, but their addresses are computed, with strides that overflow 32 bits."""
    strides = [16, 16, 1]
    strides[dimension] = 1 << 29
    x = torch.randn(16).as_strided((1, 1, 16), strides)
    packed = draw_packed(layout)
    with overflow_checks():
        for config in (Config("tf32x4"), Config("tf32x4", pack=16)):
            out = triton_engine.interact(x, packed, None, layout, config)
            triton_engine.interact_backward(x, x, packed, relu_mask_of(out, layout), None, layout, EVERYTHING, config)


def test_gradient_columns_beyond_32_bits() -> None:
    """A head's columns of the output's gradient begin at a 64-bit address."""
    layout = Layout(2, 8, 8, 16, 0, BARE, NO_RESIDUAL, 0)
    x, packed = torch.randn(1, 1, 8), draw_packed(layout)
    grad = torch.randn(1).as_strided((1, 1, 16), (0, 0, 0))
    out = triton_engine.interact(x, packed, None, layout)
    far = grad.as_strided((1, 1, 16), (1 << 29, 1 << 29, 0))
    with overflow_checks():
        got = triton_engine.interact_backward(far, x, packed, out, None, layout, EVERYTHING)
    for ours, near in zip(got, triton_engine.interact_backward(grad, x, packed, out, None, layout, 31), strict=True):
        assert torch.equal(ours, near)


# --- folding ------------------------------------------------------------------------------------------------------


def draw_parameters(layout: Layout, width: int, dtype: torch.dtype, biases: Sequence[str]) -> InteractingParameters:
    """What folds into `layout`, with heads of `width` and the biases that are named, where there is room for them."""
    h, e, _, o = layout[:4]
    rows = h * width
    bare = layout.output == BARE and not layout.factored

    def draw(*shape: int, there: bool = True) -> Tensor | None:
        return torch.randn(shape).div_(4).to(dtype) if there else None

    merged, projected = layout.output == MERGED, layout.residual == PROJECTION
    return InteractingParameters(
        w_q=draw(rows, e),
        b_q=draw(rows, there="b_q" in biases),
        w_k=draw(rows, e),
        b_k=draw(rows, there="b_k" in biases),
        w_v=draw(rows, e, there=not bare),
        b_v=draw(rows, there="b_v" in biases and not bare),
        w_o=draw(o, rows, there=merged),
        b_o=draw(o, there="b_o" in biases and merged),
        w_r=draw(o, e, there=projected),
        b_r=draw(o, there="b_r" in biases and projected),
    )


def fold_plainly(p: Sequence[Tensor | None], layout: Layout, scale: float) -> Tensor:
    """The definition of a layout's parts."""
    h, e, _, o = layout[:4]
    w_q, b_q, w_k, _, w_v, b_v, w_o, b_o, w_r, b_r = p
    rows, zero = w_q.shape[0], w_q.new_zeros(())
    q, k = w_q.view(h, -1, e), w_k.view(h, -1, e)
    b_q = (zero.expand(rows) if b_q is None else b_q).view(h, -1)
    v = None if w_v is None else w_v.view(h, -1, e)
    last = None if w_o is None else w_o.view(o, h, -1)
    if layout.factored:
        a, c = q.mT, b_q
        rest = [k.mT.transpose(0, 1), v.mT.transpose(0, 1)]
        rest += [] if last is None else [last.permute(1, 2, 0)]
    else:
        a, c = q.mT @ k, torch.einsum("hd,hde->he", b_q, k)
        rest = [] if v is None else [v.mT if last is None else torch.einsum("hde,ohd->heo", v, last)]
    rest += [] if w_r is None else [w_r.T]
    b = zero.expand(o) + (0 if b_o is None else b_o) + (0 if b_r is None else b_r)
    g = zero.expand(o)
    if b_v is not None:
        g = b_v if w_o is None else w_o @ b_v
    pieces = (a.transpose(0, 1) * (LOG2E * scale), c * (LOG2E * scale), *rest, b, g)
    return torch.cat([piece.reshape(-1) for piece in pieces])


FOLDINGS = [
    (layout, layout.emb_size if layout.output == BARE and not layout.factored else size[2])
    for size in SIZES[1:3]
    for layout in every_kind(*size, merged_size=20)
    if layout.relu and (size is SIZES[1] or layout.residual == PROJECTION)
]


@pytest.mark.parametrize("biases", [("b_k", "b_v", "b_r"), ("b_q", "b_o")], ids=str)
@pytest.mark.parametrize(("layout", "width"), FOLDINGS, ids=lambda value: str(value)[6:] if value else "")
def test_folding(layout: Layout, width: int, biases: Sequence[str]) -> None:
    p = draw_parameters(layout, width, torch.float64, biases)
    leaves = [None if t is None else t.requires_grad_() for t in p]
    truth = fold_plainly(leaves, layout, 0.3)
    with torch.no_grad():
        packed = triton_engine.fold(p, layout, 0.3)
    assert_close_to_truth("packed", packed, packed, truth.detach())
    grad = torch.randn_like(packed)
    there = [t is not None for t in p]
    given = iter(torch.autograd.grad(truth, [t for t in leaves if t is not None], grad, allow_unused=True))
    expected = [next(given) if has else None for has in there]
    for odd in range(2):
        wanted = [has and i % 2 == odd for i, has in enumerate(there)]
        with torch.no_grad():
            grads = triton_engine.fold_backward(grad, p, layout, 0.3, wanted)
        for name, ours, theirs, want in zip(p._fields, grads, expected, wanted, strict=True):
            assert (ours is not None) == want, name
            if want and name == "b_k":
                assert not ours.any()
            elif want:
                assert_close_to_truth(f"gradient of {name}", ours, ours, theirs)


def test_folding_of_half_precision_and_strided_parameters() -> None:
    """Folded in fp32; gradients come in the parameters' dtype."""
    layout = Layout(2, 16, 8, 16, 1, MERGED, PROJECTION)
    p = draw_parameters(layout, 8, torch.bfloat16, InteractingParameters._fields)
    p = p._replace(w_q=p.w_q.T.contiguous().T, w_r=p.w_r.T.contiguous().T)
    packed = triton_engine.fold(p, layout, 0.25)
    assert packed.dtype == torch.float32
    truth = fold_plainly([t.double() for t in p], layout, 0.25)
    assert (packed - truth).abs().max() < 1e-6
    grads = triton_engine.fold_backward(torch.randn_like(packed), p, layout, 0.25, [True] * 10)
    assert all(g.dtype == torch.bfloat16 and g.is_contiguous() and not g.isnan().any() for g in grads)


# --- what it refuses ----------------------------------------------------------------------------------------------


LIMITS = {
    "an embedding size of 65": Layout(1, 65, 8, 8, 1, MERGED),
    "heads of width 65": Layout(1, 16, 65, 16, 1, MERGED),
    "an output of width 65": Layout(1, 16, 16, 65),
    "heads' outputs of width 65": Layout(2, 16, 16, 130, 0, CONCATENATED),
    "17 heads": Layout(17, 8, 8, 8),
}


@pytest.mark.parametrize(("reason", "layout"), LIMITS.items(), ids=[name.replace(" ", "-") for name in LIMITS])
def test_limits(reason: str, layout: Layout) -> None:
    from autoint_fast.dispatch import Call

    reasons = triton_engine.unsupported(Call("cpu", torch.float32, 7, layout, None))
    assert len(reasons) == 1 and reasons[0].startswith(reason), reasons


def test_within_the_limits() -> None:
    from autoint_fast.dispatch import Call

    for layout, fields in itertools.product((Layout(16, 64, 64, 1024, 1, BARE), Layout(16, 64, 64, 64)), (1, 512)):
        assert not triton_engine.unsupported(Call("cpu", torch.float32, fields, layout, None))
