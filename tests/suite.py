"""What every engine must pass: its test file subclasses `EngineSuite` and names the engine and its shapes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from autoint_fast import InteractingLayer
from autoint_fast.dispatch import ENGINES
from autoint_fast.weights import NEED_INPUT, NEED_WEIGHTS, InteractingParameters, Layout, folded_dtype
from tests.cases import GRAD_LAYOUTS, LAYOUTS, LISTED, MASK_SIZES, ODD, Shape, draw_mask, draw_problem
from tests.numerics import (
    NAMES,
    EmulatedTF32,
    Forward,
    Problem,
    Run,
    as_three_dimensions,
    assert_close_to_truth,
    assert_rule,
    einsum,
    finish,
    judge,
    layer_forward,
    start,
    work,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_SECOND_ORDER = r'backend="reference"'


def short(value: object) -> str:
    return str(value).removeprefix("torch.")


def run(forward: Forward, problem: Problem, grad: Tensor) -> Run:
    return finish(*start(forward, problem), grad)


@pytest.mark.usefixtures("poisoned_memory")
class EngineSuite:
    """A test with an argument called `shape` runs over `shapes`, one with `mask_shape` over `mask_shapes`."""

    engine: ClassVar[str]
    shapes: ClassVar[Sequence[Shape]] = LISTED + ODD
    mask_shapes: ClassVar[Sequence[Shape]] = (Shape(4, 6, 8, 2), Shape(3, 39, 16, 2), Shape(3, 1, 5, 3))
    layout_shape: ClassVar[Shape] = Shape(3, 7, 16, 2)
    # Masks that a test takes together, where one at a time says no more.
    forms: ClassVar[Sequence[str]] = tuple(MASK_SIZES)
    # Samples enough that one near tie does not decide an RMS error.
    extreme_shape: ClassVar[Shape] = Shape(96, 13, 16, 2)
    # Problems that are judged together, and the least numbers of x in all of them: the fewer, the more luck
    # decides the largest error. fp64 needs neither.
    draws: ClassVar[int] = 8
    least_numbers: ClassVar[int] = 4096
    # A batch that an engine cuts into several pieces, if it ever cuts one.
    large_shape: ClassVar[Shape] = Shape(300, 39, 16, 2)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for argument, values in (("shape", self.shapes), ("mask_shape", self.mask_shapes)):
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values, ids=str)

    @property
    def forward(self) -> Forward:
        return layer_forward(self.engine)

    def draw(
        self,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        form: str | None = None,
        draws: int | None = None,
    ) -> list[Problem]:
        """Problems of one shape, to be judged together; `form` is one of MASK_SIZES."""
        numbers = shape.b * shape.f * shape.e
        if draws is None and (dtype == torch.float64 or numbers == 0):
            draws = 1
        if draws is None:
            draws = max(self.draws, min(64, self.least_numbers // numbers))
        masks = (None if form is None else draw_mask(form, shape.b, shape.f) for _ in range(draws))
        return [draw_problem(shape, dtype, mask) for mask in masks]

    def grad_layouts(self, x_layout: str) -> Sequence[str]:
        """The layouts of the gradient to cross `x_layout` with."""
        return tuple(GRAD_LAYOUTS)

    def emulated_tf32(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, the engine's own fp32 products take TF32 operands."""
        return EmulatedTF32()

    # --- numbers ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    def test_output_and_gradients(self, shape: Shape, dtype: torch.dtype) -> None:
        assert_rule(self.forward, self.draw(shape, dtype))

    @pytest.mark.parametrize("form", MASK_SIZES)
    def test_masks(self, form: str, mask_shape: Shape) -> None:
        assert_rule(self.forward, self.draw(mask_shape, torch.float64, form))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
    def test_masks_in_lower_precision(self, mask_shape: Shape, dtype: torch.dtype) -> None:
        problems = [q for form in self.forms for q in self.draw(mask_shape, dtype, form, draws=6)]
        assert_rule(self.forward, problems)

    @pytest.mark.parametrize("value", [False, True], ids=["nothing hidden", "all hidden"])
    def test_constant_masks(self, value: bool, mask_shape: Shape) -> None:
        masks = [torch.full(MASK_SIZES[form](mask_shape.b, mask_shape.f), value) for form in self.forms]
        problems = [draw_problem(mask_shape, mask=mask) for mask in masks for _ in range(6)]
        runs = assert_rule(self.forward, problems)
        if value:
            for (x, p, _, _), ours in zip(problems, runs, strict=True):
                torch.testing.assert_close(ours.out, torch.relu(torch.nn.functional.linear(x, p.w_r, p.b_r + p.b_o)))
                assert not any(ours.grads[name].any() for name in ("w_q", "b_q", "w_k", "w_v", "b_v", "w_o"))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
    def test_mask_strides(self, dtype: torch.dtype) -> None:
        b, f, _, _ = shape = self.layout_shape
        full, column = draw_mask("(B,F,F)", b, f), draw_mask("(B,1,F)", b, f)
        wide = torch.ones(b, 2 * f, 3 * f, dtype=torch.bool)
        wide[:, ::2, ::3] = full
        masks = [full.mT, wide[:, ::2, ::3], column.expand(b, f, f), column.mT.expand(b, f, f), full[:1].mT]
        masks += [
            full[:1].expand(b, f, f),
            full[0].t(),
            column[0, 0].expand(f, f),
            full[0, :, :1].expand(f, f),
        ]
        assert_rule(self.forward, [draw_problem(shape, dtype, mask) for mask in masks])

    @pytest.mark.parametrize("x_layout", LAYOUTS)
    def test_strides(self, x_layout: str) -> None:
        """Every layout of the input with every layout of the output's gradient."""
        draws = []
        for grad_layout in self.grad_layouts(x_layout):
            problem = draw_problem(self.layout_shape)
            problem = problem._replace(x=LAYOUTS[x_layout](problem.x))
            draws.append(work(self.forward, problem, lay_out=GRAD_LAYOUTS[grad_layout]))
        judge(draws)

    def test_negated_views(self) -> None:
        """Tensors that stand in memory with the other sign, as the imaginary part of a conjugate does."""
        problem, grad = draw_problem(Shape(3, 7, 16, 2)), torch.randn(3, 7, 16)
        expected = run(self.forward, problem, grad)
        negated = problem._replace(x=torch.complex(torch.zeros_like(problem.x), -problem.x).conj().imag)
        got = run(self.forward, negated, torch.complex(torch.zeros_like(grad), -grad).conj().imag)
        assert negated.x.is_neg()
        torch.testing.assert_close(got.out, expected.out, rtol=0, atol=0)
        torch.testing.assert_close(got.grads, expected.grads, rtol=0, atol=0)

    def test_one_field_for_all(self) -> None:
        """A stride of zero over the fields. The gradients of A and c are then rounding noise around zero."""
        problem = draw_problem(self.layout_shape, torch.float64)
        expanded = problem._replace(x=problem.x[:, :1].expand(problem.x.shape))
        grad = torch.randn(problem.x.shape, dtype=torch.float64)
        truth = run(einsum, expanded._replace(x=expanded.x.contiguous()), grad)
        ours = run(self.forward, expanded, grad)
        torch.testing.assert_close(ours.out, truth.out, rtol=0, atol=1e-12)
        for name, value in truth.grads.items():
            torch.testing.assert_close(ours.grads[name], value, rtol=0, atol=1e-12, msg=name)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=short)
    @pytest.mark.parametrize("layout", ["fields_first", "misaligned", "every_other_number", "one_sample_for_all"])
    def test_strides_of_other_dtypes(self, layout: str, dtype: torch.dtype) -> None:
        problems = [q._replace(x=LAYOUTS[layout](q.x)) for q in self.draw(self.layout_shape, dtype)]
        assert_rule(self.forward, problems, lay_out=GRAD_LAYOUTS[layout])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
    def test_strides_of_parameters(self, dtype: torch.dtype) -> None:
        problems = []
        for problem in self.draw(self.layout_shape, dtype):
            p = InteractingParameters(*(t.t().contiguous().t() if t.ndim == 2 else t for t in problem.p))
            wide = torch.full((2 * p.b_v.numel(),), math.nan, dtype=dtype)
            wide[::2] = p.b_v
            p = p._replace(b_v=wide[::2], b_o=p.b_o[:1].expand(p.b_o.shape))
            problems.append(problem._replace(p=p))
        assert_rule(self.forward, problems)

    @pytest.mark.parametrize("form", [None, "(B,F,F)", "(F,F)"])
    def test_several_pieces(self, form: str | None) -> None:
        assert_rule(self.forward, self.draw(self.large_shape, form=form, draws=1))

    def test_tf32(self, mask_shape: Shape) -> None:
        """fp32 with products of TF32 operands, where torch's switches allow them."""
        problems = [q for _ in range(4) for q in self.draw(mask_shape, form="(B,F,F)")]
        assert_rule(self.forward, problems, around_plain=EmulatedTF32, around_ours=self.emulated_tf32)

    def test_gradcheck(self) -> None:
        mask = draw_mask("(B,F,F)", 3, 4)
        x, p, n_head, _ = draw_problem(Shape(3, 4, 3, 2), torch.float64)
        leaves = [t.requires_grad_() for t in (x, *p)]
        for hidden in (None, mask):

            def function(x: Tensor, *p: Tensor, hidden: Tensor | None = hidden) -> Tensor:
                return self.forward(x, InteractingParameters(*p), n_head, hidden)

            assert torch.autograd.gradcheck(function, leaves, fast_mode=True)

    # --- properties ---------------------------------------------------------------------------------------

    def test_key_bias_moves_nothing(self) -> None:
        """Softmax is invariant to a shift of a row's logits, which is all that b_k does."""
        problem = draw_problem(self.layout_shape)
        shifted = problem._replace(p=problem.p._replace(b_k=problem.p.b_k + 1e6))
        grad = torch.randn(problem.x.shape)
        one, two = run(self.forward, problem, grad), run(self.forward, shifted, grad)
        assert torch.equal(one.out, two.out)
        assert all(torch.equal(one.grads[name], two.grads[name]) for name in one.grads)

    def test_fields_may_be_permuted(self, mask_shape: Shape) -> None:
        order = torch.randperm(mask_shape.f)
        back = order.argsort()

        def permuted(x: Tensor, p: InteractingParameters, n_head: int, mask: Tensor) -> Tensor:
            return self.forward(x[:, order], p, n_head, mask[:, order][:, :, order])[:, back]

        assert_rule(permuted, self.draw(mask_shape, form="(B,F,F)"))

    def test_backward_is_reproducible(self) -> None:
        problem = draw_problem(self.large_shape, mask=draw_mask("(B,1,F)", self.large_shape.b, self.large_shape.f))
        grad = torch.randn(problem.x.shape)
        one, two = run(self.forward, problem, grad), run(self.forward, problem, grad)
        assert torch.equal(one.out, two.out)
        for name, value in one.grads.items():
            assert torch.equal(value, two.grads[name]), f"gradient of {name} differs between two runs"

    def test_nothing_is_written_into_arguments(self) -> None:
        shape = self.layout_shape
        problem = draw_problem(shape, mask=draw_mask("(B,F,F)", shape.b, shape.f))
        grad = torch.randn(problem.x.shape)
        arguments = [problem.x, *problem.p, problem.mask, grad]
        before = [t.clone() for t in arguments]
        ours = run(self.forward, problem, grad)
        assert all(torch.equal(t, old) for t, old in zip(arguments, before, strict=True))
        given = {t.untyped_storage().data_ptr() for t in arguments}
        results = [ours.out, *ours.grads.values()]
        assert not given & {t.untyped_storage().data_ptr() for t in results}, "a result shares an argument's memory"

    def test_output_is_contiguous(self) -> None:
        problem = draw_problem(self.layout_shape)
        for layout in LAYOUTS.values():
            assert self.forward(layout(problem.x), problem.p, problem.n_head, None).is_contiguous()

    @pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
    def test_nan_and_infinity_stay_in_their_sample(self, dtype: torch.dtype, value: float, masked: bool) -> None:
        b, f, _, _ = shape = Shape(3, 7, 16, 2)
        problem = draw_problem(shape, dtype)
        if masked:
            mask = torch.zeros(b, f, f, dtype=torch.bool)
            mask[:, :, 2] = True  # the spoilt field as a key
            mask[:, 4] = True  # a row without keys
            problem = problem._replace(mask=mask)
        grad = torch.randn(problem.x.shape)
        clean = run(einsum, problem.to(torch.float64), grad)
        clean_plain = run(einsum, problem, grad)
        problem.x[1, 2, 3] = value
        plain, ours = run(einsum, problem, grad), run(self.forward, problem, grad)
        others = torch.tensor([0, 2])
        for name in ("out", "x"):
            values = (r.out if name == "out" else r.grads[name] for r in (ours, clean_plain, clean))
            assert_close_to_truth(name, *(v[others] for v in values))
        assert ours.out[1].isnan().any(), "the spoilt sample shows nothing"
        assert torch.equal(ours.out.isnan(), plain.out.isnan())
        for name in ("x", *NAMES):
            # Spread is what counts: a product cut into parts turns infinity into NaN.
            got, expected = ~ours.grads[name].isfinite(), ~plain.grads[name].isfinite()
            # Folded, b_v and b_k never meet P: a NaN in it does not reach their gradients.
            same = (got <= expected).all() if name in ("b_v", "b_k") else torch.equal(got, expected)
            assert same, f"gradient of {name}: spoilt elsewhere than in the reference"

    # --- extreme logits -----------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    def test_extreme_logits(self, dtype: torch.dtype) -> None:
        """Logits up to 1e4. A near tie turns on one rounding, so the error is that of 64 draws together; fp64 is not
        compared with another's luck, and far from its bound."""
        b, f, e, h = self.extreme_shape
        problems = []
        for problem in self.draw(self.extreme_shape, dtype, draws=16 if dtype == torch.float64 else 64):
            p = problem.p
            q = torch.nn.functional.linear(problem.x.double(), p.w_q.double(), p.b_q.double())
            k = torch.nn.functional.linear(problem.x.double(), p.w_k.double())
            q, k = (t.view(b, f, h, e) for t in (q, k))
            factor = (1e4 / (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(e)).abs().max()).sqrt()
            larger = {name: (getattr(p, name) * factor).to(dtype) for name in ("w_q", "b_q", "w_k", "b_k")}
            problems.append(problem._replace(p=p._replace(**larger)))
        runs = assert_rule(self.forward, problems, maximum=False)
        assert all(value.isfinite().all() for run in runs for value in (run.out, *run.grads.values()))

    @pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 300.0])
    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    def test_rows_of_attention_sum_to_one(self, dtype: torch.dtype, scale: float) -> None:
        """Values that are all one make the output the sum of each row of P."""
        problem = draw_problem(Shape(3, 13, 8, 2), dtype)
        problem.x[..., -1] = 1.0
        p = InteractingParameters(*(torch.zeros_like(t) for t in problem.p))
        p = p._replace(w_q=problem.p.w_q * scale, b_q=problem.p.b_q, w_k=problem.p.w_k)
        p.w_v[:, -1] = 1.0  # every V is one
        p.w_o[:, 0] = 1.0  # of the first head
        p.w_o[:, 15] = 2.0  # of the second
        out = self.forward(problem.x, p, 2, None)
        torch.testing.assert_close(out, torch.full_like(out, 3.0), rtol=4 * torch.finfo(dtype).eps, atol=0.0)

    # --- second order -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("wanted", ["x", "parameters", "both"])
    @pytest.mark.parametrize("again", ["backward", "grad"])
    def test_second_order_is_refused(self, wanted: str, again: str) -> None:
        layer = InteractingLayer(2, 4, backend=self.engine)
        layer.requires_grad_(wanted != "x")
        x = torch.randn(2, 3, 4, requires_grad=wanted != "parameters")
        inputs = [t for t in (x, *layer.parameters()) if t.requires_grad]
        grads = torch.autograd.grad(layer(x).square().sum(), inputs, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        with pytest.raises(RuntimeError, match=NO_SECOND_ORDER):
            if again == "backward":
                penalty.backward()
            else:
                torch.autograd.grad(penalty, inputs)

    def test_second_order_of_each_gradient_is_refused(self) -> None:
        """No gradient of any input slips through as if it were a constant."""
        layer = InteractingLayer(2, 4, backend=self.engine)
        inputs = [torch.randn(2, 3, 4, requires_grad=True), *layer.parameters()]
        for first in range(len(inputs)):
            if first == 4:  # b_k, whose gradient is zero whatever happens
                continue
            (grad,) = torch.autograd.grad(layer(inputs[0]).square().sum(), inputs[first], create_graph=True)
            for second in inputs:
                with pytest.raises(RuntimeError, match=NO_SECOND_ORDER):
                    torch.autograd.grad(grad.square().sum(), second, retain_graph=True, allow_unused=True)

    @pytest.mark.parametrize(
        "second",
        [
            lambda f, x: torch.autograd.functional.hessian(f, x),
            lambda f, x: torch.autograd.functional.hvp(f, x, torch.ones_like(x)),
            lambda f, x: torch.autograd.functional.jacobian(f, x, create_graph=True).sum().backward(),
        ],
        ids=["hessian", "hvp", "jacobian"],
    )
    def test_functional_second_order_is_refused(self, second: Callable[..., Any]) -> None:
        layer = InteractingLayer(1, 3, backend=self.engine)
        with pytest.raises(RuntimeError, match=NO_SECOND_ORDER):
            second(lambda x: layer(x).square().sum(), torch.randn(1, 2, 3, requires_grad=True))

    # --- which gradients ----------------------------------------------------------------------------------

    @pytest.mark.parametrize("alone", [True, False], ids=["alone", "all but"])
    @pytest.mark.parametrize("index", range(11), ids=("x", *NAMES))
    def test_gradients_of_subsets(self, index: int, alone: bool) -> None:
        shape = self.layout_shape
        problem = draw_problem(shape, torch.float64, draw_mask("(B,F,F)", shape.b, shape.f))
        grad = torch.randn(problem.x.shape)
        expected = run(einsum, problem, grad).grads
        leaves = [t.detach().requires_grad_((i == index) == alone) for i, t in enumerate((problem.x, *problem.p))]
        self.forward(leaves[0], InteractingParameters(*leaves[1:]), shape.h, problem.mask).backward(grad.double())
        for leaf, (name, truth) in zip(leaves, expected.items(), strict=True):
            if not leaf.requires_grad:
                assert leaf.grad is None
            elif name == "b_k":
                assert torch.equal(leaf.grad, torch.zeros_like(leaf))
            else:
                assert_close_to_truth(f"gradient of {name}", leaf.grad, truth, truth)

    def test_no_gradient_wanted(self) -> None:
        problem = draw_problem(self.layout_shape)
        out = self.forward(problem.x, problem.p, problem.n_head, None)
        assert not out.requires_grad
        problem.p.w_q.requires_grad_()
        with torch.no_grad():
            assert not self.forward(problem.x, problem.p, problem.n_head, None).requires_grad

    # --- the engine's own functions -----------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    def test_fold(self, shape: Shape, dtype: torch.dtype) -> None:
        """Folding is done in fp32 or better, whatever the parameters' dtype."""
        _, _, e, h = shape
        p = draw_problem(shape, dtype).p
        layout = Layout(h, e, e, e)
        packed = ENGINES[self.engine].fold(p, layout, 1 / math.sqrt(e))
        assert packed.dtype == folded_dtype(dtype) and packed.shape == (layout.numel,) and packed.is_contiguous()
        q, k, v = (w.double().view(h, e, e) for w in (p.w_q, p.w_k, p.w_v))
        o = p.w_o.double().view(e, h, e)
        scale = math.log2(math.e) / math.sqrt(e)
        expected = (
            torch.einsum("hdi,hdj->ihj", q, k) * scale,
            torch.einsum("hd,hdj->hj", p.b_q.double().view(h, e), k) * scale,
            torch.empty(0),
            torch.empty(0),
            torch.einsum("hdi,ohd->hio", v, o),
            p.w_r.double().t(),
            p.b_o.double() + p.b_r.double(),
            torch.einsum("hd,ohd->o", p.b_v.double().view(h, e), o),
        )
        for name, part, truth in zip(layout.parts(packed)._fields, layout.parts(packed), expected, strict=True):
            if truth.numel() == 0:
                assert part.numel() == 0
                continue
            tolerance = (8 * math.sqrt(h * e) * torch.finfo(packed.dtype).eps) * truth.abs().max()
            assert (part.double() - truth).abs().max() <= tolerance, f"part {name} of the folded weights"

    @pytest.mark.parametrize("needs", [0, *(1 << bit for bit in range(5)), NEED_WEIGHTS, NEED_INPUT | NEED_WEIGHTS])
    def test_backward_gives_what_is_needed(self, needs: int) -> None:
        """None for what nobody wants, zeros in the unwanted parts of the packed gradient."""
        shape = self.layout_shape
        mask = draw_mask("(B,F,F)", shape.b, shape.f)
        x, p, h, _ = draw_problem(shape)
        engine, layout = ENGINES[self.engine], Layout(h, shape.e, shape.e, shape.e)
        for hidden in (None, as_three_dimensions(mask)):
            packed = engine.fold(p, layout, 1 / math.sqrt(shape.e))
            relu_mask = engine.empty_relu_mask(x, layout)
            kept = {} if relu_mask is None else {"relu_mask": relu_mask}
            out = engine.interact(x, packed, hidden, layout, **kept)
            relu = out if relu_mask is None else relu_mask
            grad = torch.randn(out.shape)
            all_x, all_packed = engine.interact_backward(
                grad, x, packed, relu, hidden, layout, NEED_INPUT | NEED_WEIGHTS
            )
            d_x, d_packed = engine.interact_backward(grad, x, packed, relu, hidden, layout, needs)
            assert (d_x is not None) == bool(needs & NEED_INPUT)
            assert (d_packed is not None) == bool(needs & NEED_WEIGHTS)
            if d_x is not None:
                torch.testing.assert_close(d_x, all_x)
            if d_packed is None:
                continue
            bits = (2, 2, 2, 4, 4, 8, 16, 16)  # of a, c, k, v, m, r, b, g
            parts = zip(layout.parts(d_packed), layout.parts(all_packed), bits, strict=True)
            for part, full, bit in parts:
                torch.testing.assert_close(part, full if needs & bit else torch.zeros_like(full))

    def test_fold_backward_gives_what_is_wanted(self) -> None:
        p = draw_problem(self.layout_shape, torch.float64).p
        layout = Layout(self.layout_shape.h, self.layout_shape.e, self.layout_shape.e, self.layout_shape.e)
        grad = torch.randn(layout.numel, dtype=torch.float64)
        engine = ENGINES[self.engine]
        everything = engine.fold_backward(grad, p, layout, 0.25, [True] * 10)
        assert [g.shape for g in everything] == [t.shape for t in p]
        for index in range(10):
            for alone in (True, False):
                wanted = [(i == index) == alone for i in range(10)]
                grads = engine.fold_backward(grad, p, layout, 0.25, wanted)
                assert [g is not None for g in grads] == wanted
                for got, full in zip(grads, everything, strict=True):
                    assert got is None or torch.equal(got, full)
