"""The engine in plain PyTorch: the shared suite, its blocks, the work it skips, and random calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoint_fast.kernels import torch_engine
from autoint_fast.weights import InteractingParameters
from tests.cases import GRAD_LAYOUTS, LAYOUTS, Shape, draw_mask, draw_problem
from tests.numerics import (
    NAMES,
    Multiplications,
    Problem,
    assert_rule,
    einsum,
    errors,
    finish,
    layer_forward,
    start,
)
from tests.suite import EngineSuite

FORWARD = layer_forward("torch")


class TestTorchEngine(EngineSuite):
    engine = "torch"


# --- blocks -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("off", [-1, 0, 1])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("fields", [1, 7, 39, 200])
def test_block_boundaries(fields: int, blocks: int, off: int) -> None:
    """A sample fewer, as many, and one more than fill the blocks."""
    batch = blocks * (torch_engine.BLOCK_ROWS * torch.get_num_threads() // fields) + off
    mask = draw_mask("(B,1,F)", batch, fields) if off else None
    assert_rule(FORWARD, [draw_problem(Shape(batch, fields, 4, 2), torch.float64, mask)])


@pytest.mark.usefixtures("poisoned_memory")
def test_one_sample_larger_than_a_block() -> None:
    fields = torch_engine.BLOCK_ROWS + 1
    assert_rule(FORWARD, [draw_problem(Shape(2, fields, 2, 1), torch.float64)])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [Shape(70_000, 2, 2, 1), Shape(17_000, 3, 2, 4)], ids=str)
def test_batch_times_heads_beyond_65535(shape: Shape) -> None:
    assert_rule(FORWARD, [draw_problem(shape, torch.float64, draw_mask("(B,1,F)", shape.b, shape.f))])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("threads", [2, 3])
def test_several_threads_inside(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_rule(FORWARD, [draw_problem(Shape(200, 39, 16, 2))])
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shifted", [False, True])
def test_both_ways_of_softmax(shifted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the largest score of each row subtracted, whatever the scores call for."""
    looked: list[bool] = []

    def must_shift(x: Tensor, mask: Tensor | None) -> bool:
        looked.append(shifted)
        return shifted

    monkeypatch.setattr(torch_engine, "_must_shift", must_shift)
    for dtype in (torch.float32, torch.float64):
        assert_rule(FORWARD, [draw_problem(Shape(5, 13, 16, 2), dtype) for _ in range(8)])
    assert looked


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("scale", [3.0, 10.0, 20.0])
def test_a_block_that_needs_the_shift_among_others(scale: float) -> None:
    """One sample of a block has large scores, or large negative ones throughout; so have all of another."""
    shape = Shape(3 * (torch_engine.BLOCK_ROWS * torch.get_num_threads() // 13), 13, 16, 2)
    problem = draw_problem(shape, torch.float64)
    problem.x[5] *= scale
    problem.x[-shape.b // 3 :] *= scale
    assert_rule(FORWARD, [problem])


@pytest.mark.usefixtures("poisoned_memory")
def test_a_nan_does_not_hide_another_samples_large_scores() -> None:
    """A NaN among the sums of a block is neither too large nor too small to compare."""
    problem = draw_problem(Shape(4, 13, 16, 2), torch.float64)
    problem.x[3] *= 20.0
    expected = einsum(*problem)
    problem.x[1, 2, 3] = torch.nan
    ours = FORWARD(*problem)
    assert ours[1].isnan().all()
    for sample in (0, 2, 3):
        torch.testing.assert_close(ours[sample], expected[sample], rtol=1e-10, atol=1e-10)


# --- work not done ----------------------------------------------------------------------------------------


def work_of(problem: Problem, wanted: set[str]) -> int:
    """Multiplications in matrix products of a backward that wants the gradients of `wanted`."""
    leaves = [
        t.detach().requires_grad_(name in wanted)
        for name, t in zip(("x", *NAMES), (problem.x, *problem.p), strict=True)
    ]
    out = FORWARD(leaves[0], InteractingParameters(*leaves[1:]), problem.n_head, problem.mask)
    with Multiplications() as counter:
        out.backward(torch.ones_like(out))
    return counter.count


def test_no_work_for_unwanted_gradients() -> None:
    """Each frozen part saves at least the products that only its gradient needs."""
    b, f, e, h = shape = Shape(64, 39, 16, 2)
    problem = draw_problem(shape)
    everything = {"x", *NAMES}
    full = work_of(problem, everything)
    narrow = b * f * e * e  # one product of the rows with an E x E matrix
    for frozen, saved in (
        ({"w_r"}, narrow),
        ({"w_v", "w_o"}, h * narrow),
        ({"w_q", "b_q", "w_k"}, h * narrow),
        ({"x"}, narrow),
    ):
        less = work_of(problem, everything - frozen)
        assert less <= full - saved, f"without {frozen}: {less} of {full} multiplications, {saved} should be saved"


def test_no_attention_for_gradients_that_do_not_pass_it() -> None:
    b, f, e, h = shape = Shape(64, 39, 16, 2)
    problem = draw_problem(shape)
    folding = 4 * h * e * e * e  # at most four products of two E x E matrices for each head
    assert work_of(problem, {"b_k"}) == 0
    assert work_of(problem, {"b_o", "b_r"}) == 0
    assert work_of(problem, {"b_v"}) <= folding
    assert work_of(problem, {"w_r", "b_r"}) <= b * f * e * e + e * e
    forward = b * f * h * e * (2 * e + 2 * f)  # q, scores, P x, and the gradient of M
    assert work_of(problem, {"w_v"}) <= forward + folding
    assert work_of(problem, {"w_o"}) <= forward + folding


def test_saved_for_backward_is_input_and_output() -> None:
    """The backward recomputes everything else: no attention, no projections are kept."""
    shape = Shape(32, 39, 16, 2)
    problem = draw_problem(shape)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        start(FORWARD, problem)
    parameters = sum(t.nbytes for t in problem.p)
    assert sum(kept.values()) <= 2 * problem.x.nbytes + 2 * parameters


class LargestBool(TorchDispatchMode):
    """The number of elements of the largest bool tensor that any operation makes in memory of its own."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.dtype == torch.bool:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("form", ["(F,)", "(F,F)", "(B,1,F)", "(B,F,1)", "(1,F,F)"])
def test_mask_is_not_expanded(form: str) -> None:
    b, f, _, _ = shape = Shape(64, 39, 16, 2)
    problem = draw_problem(shape, mask=draw_mask(form, b, f))
    with LargestBool() as mode:
        finish(*start(FORWARD, problem), torch.ones_like(problem.x))
    # The signs of the output, one block at a time, are bool too.
    assert 0 < mode.largest <= max(problem.mask.numel(), problem.x.numel()) < b * f * f


# --- random calls -----------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any shape, any strides of x, any mask with any of its dimensions expanded, fp64."""
    shape = Shape(draw(st.integers(0, 9)), draw(st.integers(1, 12)), draw(st.integers(1, 9)), draw(st.integers(1, 4)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    problem = draw_problem(shape, torch.float64)
    x = problem.x
    if draw(st.booleans()):
        x = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)
    order = draw(st.permutations(range(3)))
    if draw(st.booleans()):
        x = x.permute(order).contiguous().permute([order.index(i) for i in range(3)])
    mask = None
    if draw(st.booleans()):
        size = tuple(n if draw(st.booleans()) else 1 for n in (shape.b, shape.f, shape.f))
        mask = torch.rand(size) < draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
        if draw(st.booleans()):
            mask = mask.expand(shape.b, shape.f, shape.f)
        while mask.shape[0] == 1 and mask.ndim > 1 and draw(st.booleans()):
            mask = mask[0]
    return problem._replace(x=x, mask=mask)


@given(problem=problems(), grad_layout=st.sampled_from(sorted(GRAD_LAYOUTS)))
def test_random_calls(problem: Problem, grad_layout: str) -> None:
    """Outputs and gradients are those of the definition to 1e-12 of the largest number around."""
    grad = GRAD_LAYOUTS[grad_layout](torch.randn(problem.x.shape, dtype=torch.float64))
    truth, ours = (finish(*start(forward, problem), grad) for forward in (einsum, FORWARD))
    largest = max([1.0, truth.out.max().item() if truth.out.numel() else 0.0])
    assert errors(ours.out, truth.out).maximum <= 1e-12 * largest
    largest = max([1.0, *(g.abs().max().item() for g in truth.grads.values() if g.numel())])
    for name, value in truth.grads.items():
        worst = errors(ours.grads[name], value)
        assert worst.maximum <= 1e-12 * largest, f"gradient of {name}: {worst}"
