"""Every kind of layer, on the engines of the CPU: forms, outputs, residuals and ends, forward and backward."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from autoint_fast import InteractingLayer, interacting_reference, op
from autoint_fast.dispatch import ENGINES
from autoint_fast.reference import interaction_reference
from autoint_fast.validation import check_parameters
from autoint_fast.weights import (
    BARE,
    CONCATENATED,
    MERGED,
    NEED_INPUT,
    NEED_WEIGHTS,
    InteractingParameters,
    Interaction,
    Layout,
    Parts,
    choose_layout,
    folded_dtype,
    operations,
)
from tests.cases import FUSED
from tests.layouts import describe, draw_packed, every_kind, interact_plainly
from tests.numerics import assert_close_to_truth
from tests.suite import DTYPES, short

ENGINES_OF_THE_CPU = [name for name in FUSED if name != "triton"]
# Heads as wide as the embedding, narrower and wider; widths that fill no vector.
SIZES = ((2, 16, 16), (2, 16, 8), (3, 10, 16), (3, 9, 5))
LAYOUTS = [
    *itertools.chain.from_iterable(every_kind(*sizes) for sizes in SIZES),
    *(layout for layout in every_kind(2, 10, 7, merged_size=12) if layout.output == MERGED),
]
CALLS = ((1, 1, None), (3, 7, "keys"), (2, 39, None), (19, 13, "pairs"))
EVERYTHING = NEED_INPUT | NEED_WEIGHTS


def draw_mask(kind: str | None, batch: int, fields: int) -> Tensor | None:
    if kind is None:
        return None
    mask = torch.rand(batch, 1 if kind == "keys" else fields, fields) < 0.4
    mask[0] = True
    return mask


def results(x: Tensor, packed: Tensor, mask: Tensor | None, layout: Layout, grad: Tensor) -> Iterator[Tensor]:
    """Output and gradients of the plain spelling."""
    x, packed = x.clone().requires_grad_(), packed.to(x.dtype).clone().requires_grad_()
    out = interact_plainly(x, packed, mask, layout)
    yield out.detach()
    yield from torch.autograd.grad(out, (x, packed), grad.to(x.dtype), materialize_grads=True)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("layout", LAYOUTS, ids=describe)
@pytest.mark.parametrize("engine", ENGINES_OF_THE_CPU)
def test_every_layout(engine: str, layout: Layout) -> None:
    for batch, fields, kind in CALLS:
        x, packed = torch.randn(batch, fields, layout.emb_size).double(), draw_packed(layout, torch.float64)
        mask = draw_mask(kind, batch, fields)
        grad = torch.randn(batch, fields, layout.out_size).double()
        truth, *expected = results(x, packed, mask, layout, grad)
        out = ENGINES[engine].interact(x, packed, mask, layout)
        torch.testing.assert_close(out, truth, rtol=0, atol=1e-13 * truth.abs().max())
        kept = out if layout.relu else None
        d_x, d_packed = ENGINES[engine].interact_backward(grad, x, packed, kept, mask, layout, EVERYTHING)
        assert d_x is not None and d_packed is not None
        pairs = zip(
            ("x", *Parts._fields), *((t, *layout.parts(w)) for t, w in ((d_x, d_packed), expected)), strict=True
        )
        for name, got, exact in pairs:
            scale = exact.abs().max() if exact.numel() else 0
            torch.testing.assert_close(got, exact, rtol=0, atol=max(1e-13 * scale, 1e-14), msg=name)


@pytest.mark.parametrize("engine", ENGINES_OF_THE_CPU)
@pytest.mark.parametrize("needs", [0, *(1 << bit for bit in range(5)), NEED_WEIGHTS])
def test_backward_gives_what_is_needed(engine: str, needs: int) -> None:
    for layout in every_kind(2, 12, 6):
        x, packed = torch.randn(3, 7, 12), draw_packed(layout)
        mask = draw_mask("keys", 3, 7)
        out = ENGINES[engine].interact(x, packed, mask, layout) if layout.relu else None
        grad = torch.randn(3, 7, layout.out_size)
        all_x, all_packed = ENGINES[engine].interact_backward(grad, x, packed, out, mask, layout, EVERYTHING)
        d_x, d_packed = ENGINES[engine].interact_backward(grad, x, packed, out, mask, layout, needs)
        assert (d_x is not None) == bool(needs & NEED_INPUT), describe(layout)
        assert (d_packed is not None) == bool(needs & NEED_WEIGHTS), describe(layout)
        assert all_x is not None and all_packed is not None
        if d_x is not None:
            torch.testing.assert_close(d_x, all_x)
        if d_packed is None:
            continue
        bits = (2, 2, 2, 4, 4, 8, 16, 16)  # of a, c, k, v, m, r, b, g
        for part, full, bit in zip(layout.parts(d_packed), layout.parts(all_packed), bits, strict=True):
            torch.testing.assert_close(part, full if needs & bit else torch.zeros_like(full), msg=describe(layout))


# --- from parameters ----------------------------------------------------------------------------------------------


def draw_interaction(
    heads: int, emb: int, width: int, merged: int | None, biases: bool, residual: str, dtype: torch.dtype
) -> Interaction:
    rows = heads * width
    out = merged or rows

    def draw(*shape: int) -> Tensor:
        return (
            torch.randn(*shape, dtype=dtype) / math.sqrt(shape[-1])
            if len(shape) > 1
            else torch.randn(*shape, dtype=dtype)
        )

    def bias(size: int, there: bool = True) -> Tensor | None:
        return draw(size) if biases and there else None

    projected = residual == "projection"
    p = InteractingParameters(
        *(draw(rows, emb), bias(rows), draw(rows, emb), bias(rows), draw(rows, emb), bias(rows)),
        *(None if merged is None else draw(merged, rows), bias(out, merged is not None)),
        *(draw(out, emb) if projected else None, bias(out, projected)),
    )
    return Interaction(p, heads, 0.4, residual, relu=False)


KINDS = [
    *itertools.product(
        [(2, 16, 8, None), (3, 10, 16, None), (2, 12, 6, 12), (3, 8, 5, 8)], [False, True], ["none", "projection"]
    ),
    *itertools.product([(2, 16, 8, None), (2, 12, 6, 12)], [False, True], ["identity"]),
]


def leaves_of(interaction: Interaction, dtype: torch.dtype, transposed: bool) -> list[Tensor | None]:
    """The parameters as leaves, matrices transposed in memory where asked for."""
    leaves: list[Tensor | None] = []
    for t in interaction.parameters:
        if t is not None:
            t = t.to(dtype)
            t = (t.mT.contiguous().mT if transposed and t.ndim == 2 else t.clone()).requires_grad_()
        leaves.append(t)
    return leaves


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("sizes", "biases", "residual"), KINDS)
@pytest.mark.parametrize("form", ["folded", "factored"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("engine", ENGINES_OF_THE_CPU)
def test_from_parameters(
    engine: str, dtype: torch.dtype, form: str, sizes: tuple[int, int, int, int | None], biases: bool, residual: str
) -> None:
    """Both forms compute what the definition says, with the gradient of every parameter."""
    everything: list[list[list[Tensor]]] = []
    # Together: the largest of a few errors says little.
    for trial in range(2 if dtype == torch.float64 else 12):
        interaction = draw_interaction(*sizes, biases, residual, dtype)
        x, mask = torch.randn(5, 13, sizes[1], dtype=dtype), draw_mask((None, "keys", "pairs")[trial % 3], 5, 13)
        grad = None
        runs = []
        for run_dtype, fused in ((torch.float64, False), (dtype, False), (dtype, True)):
            leaves = leaves_of(interaction, run_dtype, transposed=trial % 2 == 1)
            described = dataclasses.replace(interaction, parameters=InteractingParameters(*leaves))
            check_parameters(described)
            given = x.to(run_dtype).requires_grad_()
            if fused:
                out = op.interact(given, described, choose_layout(described, 13, form), mask, engine)
            else:
                out, _ = interaction_reference(given, described, mask)
            grad = torch.randn(out.shape).to(dtype) if grad is None else grad
            inputs = [given, *(t for t in leaves if t is not None)]
            gradients = torch.autograd.grad(out, inputs, grad.to(run_dtype), materialize_grads=True)
            runs.append([out.detach(), *gradients])
        everything.append(runs)
    names = ["out", "x", *(n for n, t in zip(InteractingParameters._fields, leaves, strict=True) if t is not None)]
    for i, name in enumerate(names):
        truth, plain, ours = (torch.stack([runs[which][i] for runs in everything]) for which in range(3))
        if name == "b_k":
            assert not ours.any()
        else:
            assert_close_to_truth(name, ours, plain, truth)


@pytest.mark.parametrize("engine", ENGINES_OF_THE_CPU)
def test_heads_of_the_input_itself(engine: str) -> None:
    p = InteractingParameters(*(None for _ in range(10)))._replace(w_q=torch.randn(20, 8), w_k=torch.randn(20, 8))
    interaction = Interaction(p, 2, 0.1, "none", relu=False)
    x, mask = torch.randn(3, 7, 8), draw_mask("keys", 3, 7)
    layout = choose_layout(interaction, 7)
    assert layout.output == BARE and layout.out_size == 16
    out = op.interact(x, interaction, layout, mask, engine)
    torch.testing.assert_close(out, interaction_reference(x, interaction, mask)[0], rtol=1e-5, atol=1e-5)


def test_output_without_relu_may_change_in_place() -> None:
    """Its gradient does not ask for it, as that of a plain matrix product does not."""
    interaction = draw_interaction(2, 8, 4, 8, True, "none", torch.float64)
    leaf = interaction.parameters.w_q.requires_grad_()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    out = op.interact(x, interaction, choose_layout(interaction, 5), None, "torch")
    out.relu_().sum().backward()
    expected = torch.autograd.grad(interaction_reference(x, interaction)[0].relu().sum(), leaf)[0]
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=1e-11)


# --- the choice of a form -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=describe)
def test_operations_are_counted(layout: Layout) -> None:
    x, packed = torch.randn(1, 7, layout.emb_size), draw_packed(layout)
    with FlopCounterMode(display=False) as counter:
        interact_plainly(x, packed, None, layout)
    assert operations(layout, 7) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("heads", "emb", "width", "merged", "folded", "factored"),
    [(2, 16, 16, 16, 137, 177), (2, 16, 32, None, 157, 314), (2, 64, 32, None, 869, 674), (4, 64, 16, None, 789, 337)],
    ids=["this layer", "paper, layer 1", "paper, layer 2", "DeepCTR, E=64"],
)
def test_the_form_of_fewer_operations(
    heads: int, emb: int, width: int, merged: int | None, folded: int, factored: int
) -> None:
    interaction = draw_interaction(heads, emb, width, merged, False, "none", torch.float32)
    both = [choose_layout(interaction, 39, form) for form in ("folded", "factored")]
    assert [round(operations(layout, 39) / heads / 1000) for layout in both] == [folded, factored]
    assert choose_layout(interaction, 39) == both[0 if folded < factored else 1]
    assert both[0].output == (CONCATENATED if merged is None else MERGED)
    assert both[1].output == (BARE if merged is None else MERGED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_q": torch.zeros(7, 8)}, r"w_q: expected the shape \(2 heads"),
        ({"w_k": torch.zeros(8, 7)}, r"w_k: expected the shape \(8, 8\)"),
        ({"b_v": torch.zeros(9)}, "b_v: expected"),
        ({"w_v": torch.zeros(8, 8, dtype=torch.float64)}, "w_v: expected .*torch.float32 on cpu, got a torch.float64"),
        ({"w_r": None, "b_r": None}, "w_r: expected a tensor where the residual is a projection"),
        ({"w_v": None}, "w_v: expected a tensor"),
    ],
)
def test_parameters_that_do_not_fit(change: dict[str, Tensor | None], message: str) -> None:
    interaction = draw_interaction(2, 8, 4, 8, True, "projection", torch.float32)
    check_parameters(interaction)
    interaction.parameters = interaction.parameters._replace(**change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        check_parameters(interaction)


def test_the_plain_layer_is_one_of_them() -> None:
    interaction = draw_interaction(2, 8, 8, 8, True, "projection", torch.float64)
    interaction.scale, interaction.relu = 1 / math.sqrt(8), True
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    expected, _ = interacting_reference(x, interaction.parameters, 2)
    torch.testing.assert_close(interaction_reference(x, interaction)[0], expected, rtol=0, atol=0)
    assert choose_layout(interaction, 5) == Layout(2, 8, 8, 8)
    assert folded_dtype(torch.bfloat16) == torch.float32


def test_a_form_there_is_none_of() -> None:
    layer = InteractingLayer(2, 8, backend="torch")
    layer.form = "fold"
    with pytest.raises(ValueError, match="form: expected one of auto, folded, factored, got 'fold'"):
        layer(torch.randn(2, 5, 8))
