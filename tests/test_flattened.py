"""The Keras function's layer: its numbers against the formula and against Keras itself, and as an nn.Module."""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune as prune
from torch import Tensor, nn

from autoint_fast import FlattenedInteractingLayer, why
from autoint_fast import flattened as implementation
from benchmarks import flattened as benchmark
from benchmarks.cases import MODES
from tests.cases import BACKENDS, FUSED, LAYOUTS, MASK_SIZES, draw_mask
from tests.layers import FlattenedShape, assert_flattened, draw_flattened, draw_weights, flattened, work
from tests.numerics import as_three_dimensions, errors, judge
from tests.suite import DTYPES, NO_SECOND_ORDER, short

# Up to F*E samples the values are projected by the op, and above that the projection is folded into fc_out.
PROJECTED = (
    FlattenedShape(7, 7, 16, 2),
    FlattenedShape(5, 13, 16, 3),
    FlattenedShape(3, 39, 16, 2),
    FlattenedShape(1, 39, 16, 1),
    FlattenedShape(0, 7, 16, 2),
)
FOLDED = (FlattenedShape(113, 7, 16, 2), FlattenedShape(65, 4, 16, 3), FlattenedShape(17, 1, 16, 2))
# In fp64, where an outlier does not decide.
ODD = (
    FlattenedShape(5, 13, 3, 3),
    FlattenedShape(53, 13, 4, 3),
    FlattenedShape(79, 39, 2, 2),
    FlattenedShape(9, 1, 5, 3),
    FlattenedShape(2, 1, 1, 1),
)
SMALL, LARGE = FlattenedShape(4, 5, 6, 2), FlattenedShape(31, 5, 6, 2)
WIDER = (FlattenedShape(4, 5, 16, 2), FlattenedShape(81, 5, 16, 2))
NAMES = ("w_qs", "w_ks", "w_vs", "fc_out", "fc_res")


def small(backend: str = "auto", **how: object) -> tuple[FlattenedInteractingLayer, Tensor]:
    return draw_flattened(SMALL, torch.float64, backend=backend, **how)


def assert_current(layer: FlattenedInteractingLayer, x: Tensor, mask: Tensor | None = None) -> None:
    """The layer, fp64, computes with the parameters that it has now."""
    expected = flattened(layer, x.detach(), mask).detach()
    assert errors(layer(x, mask), expected).maximum <= 1e-12 * max(1.0, expected.max().item())


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, dtype) for shape in PROJECTED + FOLDED for dtype in (torch.float32, torch.float64)),
        *((shape, dtype) for shape in (PROJECTED[0], FOLDED[1]) for dtype in (torch.bfloat16, torch.float16)),
    ],
    ids=short,
)
@pytest.mark.parametrize("backend", FUSED)
def test_output_and_gradients(backend: str, shape: FlattenedShape, dtype: torch.dtype) -> None:
    assert_flattened(shape, dtype, backend=backend)


@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_odd_sizes(backend: str, shape: FlattenedShape) -> None:
    assert_flattened(shape, torch.float64, backend=backend)


@pytest.mark.parametrize("mask", MASK_SIZES)
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_masks(backend: str, shape: FlattenedShape, mask: str) -> None:
    assert_flattened(shape, torch.float64, [mask], backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("shape", WIDER, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_masks_in_lower_precision(backend: str, shape: FlattenedShape, dtype: torch.dtype) -> None:
    assert_flattened(shape, dtype, tuple(MASK_SIZES), draws=1, backend=backend)


@pytest.mark.parametrize("mask", [None, *MASK_SIZES])
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_every_backend(backend: str, shape: FlattenedShape, mask: str | None) -> None:
    layer, x = draw_flattened(shape, torch.float64, backend=backend)
    hidden = None if mask is None else draw_mask(mask, shape.b, shape.f)
    leaves = [x.requires_grad_(), *layer.parameters()]
    expected, out = flattened(layer, x, hidden), layer(x, hidden)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(out)
    got, truth = (torch.autograd.grad(o, leaves, grad) for o in (out, expected))
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_rows_get_nothing_of_the_values(backend: str, shape: FlattenedShape) -> None:
    layer, x = draw_flattened(shape, torch.float64, backend=backend)
    expected = torch.relu(layer.fc_res(x.flatten(1)) + layer.fc_out.bias)
    for size in MASK_SIZES.values():
        mask = torch.ones(size(shape.b, shape.f), dtype=torch.bool)
        torch.testing.assert_close(layer(x, mask), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_strides(backend: str, shape: FlattenedShape, layout: str) -> None:
    assert_flattened(shape, torch.float64, arrange=LAYOUTS[layout], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_batch_does_not_decide_the_result(backend: str) -> None:
    """Around the size at which the values' projection is folded, and frozen, where it always is."""
    layer, _ = small(backend)
    x = torch.randn(31, 5, 6, dtype=torch.float64)
    for batch in (0, 1, 29, 30, 31):
        for mask in (None, draw_mask("(B,F,F)", batch, 5)):
            expected = flattened(layer, x[:batch], mask)
            for frozen in (False, True):
                layer.eval().freeze() if frozen else layer.unfreeze()
                torch.testing.assert_close(layer(x[:batch], mask), expected, rtol=0, atol=1e-12)


def test_when_the_projection_of_the_values_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that takes fewer operations, and frozen not at any call."""
    calls = []

    def recording(p: Any, n_head: int, folded: bool) -> Any:
        calls.append(folded)
        return dense_of(p, n_head, folded)

    dense_of = implementation._dense_of
    monkeypatch.setattr(implementation, "_dense_of", recording)
    layer = small("torch")[0].eval()
    for batch in (1, 30, 31, 100):
        layer(torch.randn(batch, 5, 6, dtype=torch.float64))
    assert calls == [False, False, True, True]
    layer.freeze()
    layer(torch.randn(31, 5, 6, dtype=torch.float64))
    assert calls == [False, False, True, True, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_return_attention(backend: str) -> None:
    for shape in (SMALL, LARGE):
        layer, x = draw_flattened(shape, torch.float64, backend=backend)
        mask = draw_mask("(B,F,F)", shape.b, shape.f)
        out, attention = layer(x, mask, return_attention=True)
        assert torch.equal(out, layer(x, mask))
        q, k = (w(x).unflatten(2, (2, 6)).transpose(1, 2) for w in (layer.w_qs, layer.w_ks))
        hidden = as_three_dimensions(mask)[:, None]
        p = torch.softmax((q @ k.mT / math.sqrt(6)).masked_fill(hidden, -math.inf), -1)
        expected = p.masked_fill(hidden.all(-1, keepdim=True), 0.0)
        torch.testing.assert_close(attention, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("mask", [None, "(B,F,F)"])
@pytest.mark.parametrize("shape", WIDER, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_autocast(backend: str, shape: FlattenedShape, mask: str | None, dtype: torch.dtype) -> None:
    results = []
    for _ in range(8):
        layer, x = draw_flattened(shape, backend=backend)
        hidden = None if mask is None else draw_mask(mask, shape.b, shape.f)
        x = x.to(dtype).float()
        results.append(work(layer, flattened, x, hidden, around=lambda: torch.autocast("cpu", dtype)))
    assert results[0].ours.out.dtype == dtype
    judge(results, unit=dtype)


# --- Keras --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("keras") is None, reason="Keras is not installed: pip install autoint-fast[libraries]"
)
def test_keras() -> None:
    """The function itself, of Keras's own Dense layers: output, and gradients of the input and of all ten weights."""
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.keras_worker"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip().endswith("agrees")


def keras_weights(layer: FlattenedInteractingLayer) -> list[np.ndarray]:
    """The layer's parameters as Keras holds them, which are as (in, out)."""
    return [p.detach().t().numpy() for name in NAMES for p in (getattr(layer, name).weight, getattr(layer, name).bias)]


@pytest.mark.parametrize("how", ["numpy", "read-only numpy", "tensors", "fp32"])
def test_load_keras_weights(how: str) -> None:
    source, x = small("torch")
    target, _ = small("torch")
    weights = [np.ascontiguousarray(w) for w in keras_weights(source)]
    if how == "read-only numpy":
        for w in weights:
            w.setflags(write=False)
    elif how == "tensors":
        weights = [torch.from_numpy(w).requires_grad_() for w in weights]
    elif how == "fp32":
        source.float().double()
        weights = [w.astype(np.float32) for w in weights]
    target.eval().freeze().load_keras_weights(weights)
    assert torch.equal(target(x), source(x)) and "frozen" not in repr(target)
    assert all(type(p) is nn.Parameter and p.requires_grad and p.is_leaf for p in target.parameters())
    with torch.no_grad():
        target.w_qs.weight.zero_()
    assert np.any(np.asarray(weights[0].detach() if how == "tensors" else weights[0])), "the caller's array was changed"


@pytest.mark.parametrize("index", range(10))
def test_keras_weights_that_do_not_fit_are_refused_by_name(index: int) -> None:
    names = ("Q", "K", "V", "out", "res")
    name = ("kernel", "bias")[index % 2] + f" of {names[index // 2]}"
    layer, _ = small()
    before = copy.deepcopy(layer.state_dict())
    good = keras_weights(small()[0])
    for bad in (good[index][..., :-1], good[index].T[None], good[index].astype(np.int64), "weights", None):
        with pytest.raises(ValueError, match=rf"^{name}: expected .*array of shape \({good[index].shape[0]},.*got"):
            layer.load_keras_weights([*good[:index], bad, *good[index + 1 :]])
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_other_misfits_of_keras_weights() -> None:
    layer, _ = small()
    good = keras_weights(layer)
    for bad in (good[:9], [*good, good[0]], []):
        with pytest.raises(ValueError, match=rf"weights: expected ten arrays \(kernel of Q, .*\), got {len(bad)}"):
            layer.load_keras_weights(bad)
    nn.utils.parametrizations.weight_norm(layer.fc_out)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"weights: expected a layer of plain parameters.*fc_out\.parametrizations"):
        layer.load_keras_weights(keras_weights(small()[0]))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


# --- as a module --------------------------------------------------------------------------------------------


def test_parameters() -> None:
    layer = FlattenedInteractingLayer(5, 6, 2)
    sizes = {"w_qs": (12, 6), "w_ks": (12, 6), "w_vs": (12, 6), "fc_out": (30, 60), "fc_res": (30, 30)}
    assert list(layer.state_dict()) == [f"{name}.{kind}" for name in NAMES for kind in ("weight", "bias")]
    for name, size in sizes.items():
        projection = getattr(layer, name)
        assert type(projection) is nn.Linear and projection.weight.shape == size
        bound = math.sqrt(6 / sum(size))
        assert 0.8 * bound < projection.weight.abs().max() <= bound and not projection.bias.any()


def test_signature() -> None:
    layer = FlattenedInteractingLayer(5, 6, 2, backend="torch", device="cpu", dtype=torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    for text in ("n_fields=5", "emb_size=6", "n_head=2", "backend='torch'"):
        assert text in repr(layer)
    with torch.device("meta"):
        layer = FlattenedInteractingLayer(5, 6, 2)
        for batch in (3, 40):
            out = layer(torch.empty(batch, 5, 6), torch.zeros(5, dtype=torch.bool))
            assert out.shape == (batch, 30) and out.device.type == "meta"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied: Callable[[nn.Module], FlattenedInteractingLayer], backend: str) -> None:
    layer, x = small(backend)
    for frozen in (False, True):
        with torch.no_grad():
            layer.eval().freeze() if frozen else layer(x)
            twin = copied(layer)
            assert torch.equal(twin(x), layer(x)) and ("frozen" in repr(twin)) == frozen
            twin.unfreeze().w_vs.weight.mul_(2)
            assert_current(twin, x)
            assert_current(layer, x)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", ""])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_never_stale(backend: str, name: str, grad: bool) -> None:
    layer, x = small(backend)
    many = torch.randn(31, 5, 6, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            for given in (x, many, x):
                assert_current(layer, given)
            getattr(layer, name).weight.data.mul_(1.5)
            getattr(layer, name).bias.data.add_(0.5)
        assert_current(layer, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_freeze(backend: str, shape: FlattenedShape, dtype: torch.dtype) -> None:
    layer, x = draw_flattened(shape, dtype, backend=backend)
    with pytest.raises(ValueError, match="eval mode"):
        layer.freeze()
    mask = draw_mask("(B,F,F)", shape.b, shape.f)
    assert layer.eval().freeze() is layer and "frozen" in repr(layer)
    before = [layer(x).detach(), layer(x, mask).detach()]
    for out, hidden in zip(before, (None, mask), strict=True):
        truth = flattened(copy.deepcopy(layer).double(), x.double(), hidden).detach()
        assert errors(out, truth).maximum <= 16 * torch.finfo(dtype).eps * truth.max()
    draw_weights(layer)
    x.requires_grad_()
    for out, expected in zip((layer(x), layer(x, mask)), before, strict=True):
        assert torch.equal(out, expected)
        out.sum().backward()
    assert x.grad.any() and all(p.grad is None for p in layer.parameters())
    assert not torch.equal(layer.train()(x), before[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_conversions_carry_the_frozen_state(backend: str) -> None:
    layer, x = small(backend)
    layer.float().eval().freeze().double()
    assert_current(layer, x)
    assert "frozen" in repr(layer)
    state = copy.deepcopy(layer.state_dict())
    layer.load_state_dict(state)
    assert "frozen" not in repr(layer) and layer._frozen_dense is None


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms(transform: str) -> None:
    layer, _ = small()
    x = torch.randn(31, 5, 6, dtype=torch.float64)
    mask = torch.rand(4, 5) < 0.4
    if transform == "grad":
        got = torch.func.grad(lambda x: layer(x).square().sum())(x)
        (expected,) = torch.autograd.grad(flattened(layer, x.requires_grad_(), None).square().sum(), x)
    else:
        got = torch.func.vmap(lambda mask: layer(x, mask))(mask)
        expected = torch.stack([flattened(layer, x, one) for one in mask])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_why(backend: str) -> None:
    layer, x = small(backend)
    nn.utils.parametrizations.spectral_norm(layer.fc_out)
    before = copy.deepcopy(layer.state_dict())
    assert why(layer, x).choice == (backend if backend != "auto" else why(small()[0], x).choice)
    for bad in ("x", torch.zeros(2, 6), torch.zeros(2, 5, 7), torch.zeros(2, 4, 6)):
        for call in (layer, lambda x: why(layer, x)):
            with pytest.raises((TypeError, ValueError), match=r"x: expected .*\(B, 5, 6\)"):
                call(bad)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_second_order_is_refused(backend: str, shape: FlattenedShape) -> None:
    layer, x = draw_flattened(shape, torch.float64, backend=backend)
    inputs = [x.requires_grad_(), *layer.parameters()]
    grads = torch.autograd.grad(layer(x).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=NO_SECOND_ORDER):
        sum(g.square().sum() for g in grads).backward()


@pytest.mark.parametrize("batch", [2, 7], ids=["projected", "folded"])
def test_second_order_of_the_reference(batch: int) -> None:
    layer, x = draw_flattened(FlattenedShape(batch, 3, 2, 2), torch.float64, backend="reference")
    names = [name for name, _ in layer.named_parameters()]
    mask = draw_mask("(B,F,F)", batch, 3)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, mask))

    inputs = [t.detach().requires_grad_() for t in (x, *layer.parameters())]
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_projections_that_are_more_than_a_weight(backend: str) -> None:
    layer, x = small(backend)
    evaluations = 0

    class Counting(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return 2 * weight

    nn.utils.parametrize.register_parametrization(layer.fc_out, "weight", Counting())
    prune.l1_unstructured(layer.w_vs, "weight", 0.5)
    layer.w_vs.weight_orig.data.neg_()
    evaluations = 0
    out = layer(x)
    assert evaluations == 1
    layer.w_vs(x)  # runs the hook that prunes
    torch.testing.assert_close(out, flattened(layer, x, None), rtol=0, atol=1e-12)
    layer.fc_res.register_forward_hook(lambda *_: None)
    for call in (lambda: layer(x), lambda: layer.eval().freeze()):
        with pytest.raises(RuntimeError, match="fc_res: a hook on this projection would never run"):
            call()
    assert "frozen" not in repr(layer)


# --- bad arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["n_fields", "emb_size", "n_head"])
def test_bad_constructor_arguments(argument: str) -> None:
    good = {"n_fields": 5, "emb_size": 6, "n_head": 2}
    for bad, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(error, match=f"{argument}: expected an int of at least 1, got {bad}"):
            FlattenedInteractingLayer(**{**good, argument: bad})
    with pytest.raises(ValueError, match="backend: expected one of"):
        FlattenedInteractingLayer(**good, backend="cuda")


def test_bad_calls() -> None:
    layer = FlattenedInteractingLayer(5, 6, 2, backend="torch")
    for call in (layer, FlattenedInteractingLayer(5, 6, 2, backend="torch").eval().freeze()):
        with pytest.raises(TypeError, match=r"x: expected a \(B, 5, 6\) tensor, got .*list"):
            call([[0.0] * 6])
        with pytest.raises(ValueError, match=r"x: expected the shape \(B, 5, 6\), got .*\(2, 6, 6\)"):
            call(torch.zeros(2, 6, 6))
        with pytest.raises(TypeError, match=r"x: expected the dtype of the layer's weights"):
            call(torch.zeros(2, 5, 6, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"mask: expected a bool tensor.*\(2, 5, 5\)"):
            call(torch.zeros(2, 5, 6), torch.zeros(4, dtype=torch.bool))
    layer.fc_res = nn.Linear(30, 30, bias=False)
    with pytest.raises(ValueError, match=r"fc_res\.bias: expected a tensor, got None"):
        layer(torch.zeros(2, 5, 6))


# --- the benchmark's contestants ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_unfused_layer_is_the_same_layer(mode: str) -> None:
    modules = benchmark.modules(5, 6, 2, mode, backend="torch", dtype=torch.float64)
    assert len(modules) == (2 if mode == MODES[1] else 3)
    for batch in (3, 40):
        x, draws = torch.randn(batch, 5, 6, dtype=torch.float64), []
        for module in modules.values():
            torch.manual_seed(1)
            draws.append(benchmark.step(module, x, mode)())
        for result in draws[1:]:
            torch.testing.assert_close(result, draws[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_the_benchmark_sees_wrong_numbers(mode: str) -> None:
    modules, x = benchmark.modules(5, 6, 2, mode, backend="torch"), torch.randn(40, 5, 6)
    assert benchmark.violations(modules, x, mode) == {}
    ours, changed = modules["ours"], copy.deepcopy(modules["ours"])
    with torch.no_grad():
        changed.w_vs.weight[0, 0] += 1e-3
    assert set(benchmark.violations({**modules, "ours": changed}, x, mode)) == {"ours"}
    assert benchmark.violations({**modules, "ours": ours}, x, mode) == {}
