"""The paper's layer: its numbers against equations 5 to 8, and as an nn.Module."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.utils.prune as prune
from torch import Tensor, nn

from autoint_fast import PaperInteractingLayer, why
from tests.cases import BACKENDS, FUSED, LAYOUTS, MASK_SIZES, draw_mask
from tests.layers import PaperShape, assert_paper, draw_paper, draw_weights, paper, work
from tests.numerics import as_three_dimensions, errors, judge
from tests.suite import NO_SECOND_ORDER, short

# Heads narrower than the embedding, as wide, and wider; the paper's own two layers; fields in every number that counts.
SHAPES = (
    PaperShape(7, 7, 16, 8, 2),
    PaperShape(5, 13, 8, 48, 3),
    PaperShape(3, 39, 16, 64, 2),
    PaperShape(3, 39, 64, 64, 2),
    PaperShape(5, 13, 16, 16, 1),
    PaperShape(9, 1, 6, 10, 5),
    PaperShape(1, 39, 16, 32, 2),
    PaperShape(0, 7, 16, 8, 2),
)
NARROW, WIDE = PaperShape(4, 6, 12, 8, 2), PaperShape(8, 6, 8, 24, 2)
FORMS = ("folded", "factored")


def narrow(backend: str = "auto", **how: object) -> tuple[PaperInteractingLayer, Tensor]:
    return draw_paper(NARROW, torch.float64, backend=backend, **how)


def assert_current(layer: PaperInteractingLayer, x: Tensor, mask: Tensor | None = None) -> None:
    """The layer, fp64, computes with the parameters that it has now."""
    expected = paper(layer, x.detach(), mask).detach()
    assert errors(layer(x, mask), expected).maximum <= 1e-12 * max(1.0, expected.max().item())


# --- numbers ------------------------------------------------------------------------------------------------


def by_hand(layer: PaperInteractingLayer, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Equations 5 to 8, one field m of one head h of one sample after the other."""
    b, f, _ = x.shape
    d = layer.att_size // layer.n_head
    names = ("w_qs", "w_ks", "w_vs", "w_res")
    query, key, value, res = (getattr(layer, n).weight.detach().numpy() if hasattr(layer, n) else None for n in names)
    out = np.zeros((b, f, layer.att_size))
    for sample in range(b):
        for m in range(f):
            e_m = x[sample, m]
            for h in range(layer.n_head):
                part = slice(h * d, (h + 1) * d)
                seen = [k for k in range(f) if not hidden[sample, m, k]]
                psi = [(query[part] @ e_m) @ (key[part] @ x[sample, k]) for k in seen]
                psi = [logit / math.sqrt(d) if layer.scaling else logit for logit in psi]
                powers = np.exp(psi)
                for k, power in zip(seen, powers, strict=True):
                    out[sample, m, part] += power / powers.sum() * (value[part] @ x[sample, k])
            if layer.use_res:
                out[sample, m] += res @ e_m
    return np.maximum(out, 0.0)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("scaling", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("use_res", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=str)
def test_every_number(shape: PaperShape, use_res: bool, scaling: bool, masked: bool) -> None:
    layer, x = draw_paper(shape, torch.float64, backend="reference", use_res=use_res, scaling=scaling)
    mask = draw_mask("(B,F,F)", shape.b, shape.f) if masked else torch.zeros(shape.b, shape.f, shape.f).bool()
    expected = by_hand(layer, x.numpy(), mask.numpy())
    for out in (layer(x, mask if masked else None), paper(layer, x, mask if masked else None)):
        np.testing.assert_allclose(out.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.float64)),
        *((shape, dtype) for shape in SHAPES[:2] for dtype in (torch.bfloat16, torch.float16)),
    ],
    ids=short,
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", FUSED)
def test_output_and_gradients(backend: str, shape: PaperShape, form: str, dtype: torch.dtype) -> None:
    assert_paper(shape, dtype, form=form, backend=backend, scaling=True)


@pytest.mark.parametrize("use_res", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("scaling", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_options(backend: str, shape: PaperShape, scaling: bool, use_res: bool) -> None:
    for dtype in (torch.float32, torch.float64):
        assert_paper(shape, dtype, backend=backend, scaling=scaling, use_res=use_res)


@pytest.mark.parametrize("mask", MASK_SIZES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend: str, shape: PaperShape, form: str, mask: str) -> None:
    assert_paper(shape, torch.float64, [mask], form=form, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", FUSED)
def test_masks_in_lower_precision(backend: str, form: str, dtype: torch.dtype) -> None:
    for shape in (NARROW, WIDE):
        assert_paper(shape, dtype, tuple(MASK_SIZES), draws=1, form=form, backend=backend, scaling=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_rows_are_the_residual(backend: str) -> None:
    hidden = torch.ones(6, 6, dtype=torch.bool)
    for use_res in (False, True):
        layer, x = narrow(backend, use_res=use_res)
        expected = torch.relu(layer.w_res(x)) if use_res else torch.zeros(4, 6, 8, dtype=torch.float64)
        torch.testing.assert_close(layer(x, hidden), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", FUSED)
def test_strides(backend: str, form: str, layout: str) -> None:
    results = []
    for grad_layout in LAYOUTS:
        layer, x = draw_paper(NARROW, torch.float64, backend=backend)
        layer.form = form
        results.append(work(layer, paper, LAYOUTS[layout](x), lay_out=LAYOUTS[grad_layout]))
    judge(results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stacked_with_changing_width(backend: str) -> None:
    sizes = ((10, 24), (24, 6), (6, 6))
    layers = [PaperInteractingLayer(e, a, 2, backend=backend, dtype=torch.float64) for e, a in sizes]
    x = torch.randn(3, 7, 10, dtype=torch.float64)
    expected = x
    for layer in layers:
        expected = paper(layer, expected, None)
    out = nn.Sequential(*layers)(x)
    assert out.shape == (3, 7, 6)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_return_attention(backend: str) -> None:
    layer, x = narrow(backend, scaling=True)
    mask = draw_mask("(B,F,F)", 4, 6)
    out, attention = layer(x, mask, return_attention=True)
    assert torch.equal(out, layer(x, mask))
    q, k = (w(x).unflatten(2, (2, 4)).transpose(1, 2) for w in (layer.w_qs, layer.w_ks))
    hidden = as_three_dimensions(mask)[:, None]
    logits = (q @ k.mT / 2).masked_fill(hidden, -math.inf)
    expected = torch.softmax(logits, -1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    torch.testing.assert_close(attention, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", FUSED)
def test_autocast(backend: str, form: str, dtype: torch.dtype) -> None:
    results = []
    for _ in range(16):
        layer, x = draw_paper(NARROW, backend=backend, scaling=True)
        layer.form = form
        results.append(work(layer, paper, x.to(dtype).float(), around=lambda: torch.autocast("cpu", dtype)))
    assert results[0].ours.out.dtype == dtype
    judge(results, unit=dtype)


# --- forms --------------------------------------------------------------------------------------------------


def test_form_by_operation_count() -> None:
    """The examples of narrow and wide heads: layers 1 and 2 of the paper."""
    first, second = PaperInteractingLayer(16, 64, 2), PaperInteractingLayer(64, 64, 2)
    assert not first.layout(39).factored and second.layout(39).factored
    for layer in (first, second):
        for form in FORMS:
            layer.form = form
            assert layer.layout(39).factored == (form == "factored")


# --- as a module --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_res", [False, True])
def test_parameters(use_res: bool) -> None:
    layer = PaperInteractingLayer(16, 40, 2, use_res)
    names = ["w_qs.weight", "w_ks.weight", "w_vs.weight", *(["w_res.weight"] if use_res else [])]
    assert [name for name, _ in layer.named_parameters()] == list(layer.state_dict()) == names
    assert all(p.shape == (40, 16) for p in layer.parameters())
    assert all(type(m) is nn.Linear and m.bias is None for m in layer.children())


def test_initial_weights_are_glorots() -> None:
    layer = PaperInteractingLayer(64, 192, 2)
    bound = math.sqrt(6 / (64 + 192))
    for p in layer.parameters():
        assert 0.99 * bound < p.abs().max() <= bound
        assert abs(p.std().item() - bound / math.sqrt(3)) < 0.02 * bound


def test_signature() -> None:
    layer = PaperInteractingLayer(8, 12, 3, False, True, backend="torch", device="cpu", dtype=torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    for text in ("emb_size=8", "att_size=12", "n_head=3", "use_res=False", "scaling=True", "backend='torch'"):
        assert text in repr(layer)
    with pytest.raises(TypeError):
        PaperInteractingLayer(8, 12, 3, False, True, "torch")
    with torch.device("meta"):
        assert PaperInteractingLayer(8, 12, 3)(torch.empty(2, 5, 8)).shape == (2, 5, 12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied: Callable[[nn.Module], PaperInteractingLayer], backend: str) -> None:
    layer, x = narrow(backend, scaling=True)
    for frozen in (False, True):
        with torch.no_grad():
            layer.eval().freeze() if frozen else layer(x)
            twin = copied(layer)
            assert torch.equal(twin(x), layer(x)) and ("frozen" in repr(twin)) == frozen
            twin.unfreeze().w_vs.weight.mul_(2)
            assert_current(twin, x)
            assert_current(layer, x)


def test_state_dict() -> None:
    layer, x = narrow("torch")
    other, _ = narrow("torch")
    other.eval().freeze().load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and "frozen" not in repr(other)
    with pytest.raises(RuntimeError, match=r"Missing key.*w_res"):
        layer.load_state_dict(PaperInteractingLayer(12, 8, 2, use_res=False).state_dict())


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", ""])
@pytest.mark.parametrize("name", ["w_qs", "w_ks", "w_vs", "w_res"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_never_stale(backend: str, name: str, grad: bool) -> None:
    layer, x = narrow(backend)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            assert_current(layer, x)
            getattr(layer, name).weight.data.mul_(1.5)
        assert_current(layer, x)


@pytest.mark.parametrize("form", ["auto", *FORMS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_freeze(backend: str, form: str) -> None:
    for shape in (NARROW, WIDE):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            layer, x = draw_paper(shape, dtype, backend=backend)
            layer.form = form
            with pytest.raises(ValueError, match="eval mode"):
                layer.freeze()
            mask, layer = draw_mask("(B,F,F)", shape.b, shape.f), layer.eval()
            expected = [layer(x), layer(x, mask)]
            layer.freeze()
            draw_weights(layer)
            x.requires_grad_()
            for out, before in zip((layer(x), layer(x, mask)), expected, strict=True):
                assert torch.equal(out, before)
                out.sum().backward()
            assert x.grad.any() and all(p.grad is None for p in layer.parameters())
            assert not torch.equal(layer.train()(x), expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_why(backend: str) -> None:
    layer, x = narrow(backend)
    nn.utils.parametrizations.spectral_norm(layer.w_qs)
    before = copy.deepcopy(layer.state_dict())
    assert why(layer, x).choice == (backend if backend != "auto" else why(narrow()[0], x).choice)
    for bad in ("x", torch.zeros(2, 12), torch.zeros(2, 3, 9)):
        with pytest.raises((TypeError, ValueError)):
            layer(bad)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("backend", FUSED)
def test_second_order_is_refused(backend: str) -> None:
    for form in FORMS:
        layer, x = narrow(backend)
        layer.form = form
        inputs = [x.requires_grad_(), *layer.parameters()]
        grads = torch.autograd.grad(layer(x).square().sum(), inputs, create_graph=True)
        with pytest.raises(RuntimeError, match=NO_SECOND_ORDER):
            sum(g.square().sum() for g in grads).backward()


def test_second_order_of_the_reference() -> None:
    layer, x = draw_paper(PaperShape(2, 3, 3, 4, 2), torch.float64, backend="reference")
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = [t.detach().requires_grad_() for t in (x, *layer.parameters())]
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_projections_that_are_more_than_a_weight(backend: str) -> None:
    layer, x = narrow(backend)
    nn.utils.parametrizations.weight_norm(layer.w_qs)
    prune.l1_unstructured(layer.w_res, "weight", 0.5)
    layer.w_res.weight_orig.data.neg_()
    layer.w_vs = nn.Linear(12, 8, dtype=torch.float64)
    with torch.no_grad():
        out = layer(x)
        layer.w_res(x)  # runs the hook that prunes
        expected = paper(layer, x, None)
        layer.w_vs.bias.zero_()
        without_bias = layer(x)
    torch.testing.assert_close(without_bias, paper(layer, x, None), rtol=0, atol=1e-12)
    assert not torch.allclose(out, expected), "the bias of a projection that was swapped in has no effect"
    layer.w_ks.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="w_ks: a hook on this projection would never run"):
        layer(x)


# --- bad arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((8, 12, 5), ValueError, "att_size: expected a multiple of n_head, 5, got 12"),
        ((8, 1, 2), ValueError, "att_size: expected a multiple"),
        ((0, 12, 2), ValueError, "emb_size: expected an int of at least 1, got 0"),
        ((8, 0, 2), ValueError, "att_size: expected an int of at least 1, got 0"),
        ((8, 12, 0), ValueError, "n_head: expected an int of at least 1, got 0"),
        ((8.0, 12, 2), TypeError, "emb_size: expected an int"),
        ((8, 12, True), TypeError, "n_head: expected an int"),
        ((8, 12, 2, 1), TypeError, "use_res: expected True or False, got 1"),
        ((8, 12, 2, True, None), TypeError, "scaling: expected True or False, got None"),
    ],
    ids=str,
)
def test_bad_constructor_arguments(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PaperInteractingLayer(*arguments)


def test_bad_calls() -> None:
    layer = PaperInteractingLayer(8, 12, 2, backend="torch")
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match="backend: expected one of"):
        PaperInteractingLayer(8, 12, 2, backend="cuda")
    with pytest.raises(TypeError, match=r"x: expected a \(B, F, 8\) tensor, got .*list"):
        layer([[0.0] * 8])
    with pytest.raises(ValueError, match=r"x: expected the shape \(B, F, 8\), got .*\(2, 3, 12\)"):
        layer(torch.zeros(2, 3, 12))
    with pytest.raises(TypeError, match=r"x: expected the dtype of the layer's weights"):
        layer(x.double())
    with pytest.raises(TypeError, match="mask: expected a bool tensor"):
        layer(x, torch.zeros(3, 3))
    layer.w_ks = nn.Linear(8, 6, bias=False)
    with pytest.raises(ValueError, match=r"w_ks.weight: expected .*\(12, 8\)"):
        layer(x)
