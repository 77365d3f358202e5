"""What torch does to a call besides running it: transforms, second order, checkpointing, modes, tracing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoint_fast import InteractingLayer, interacting_reference, op, why
from autoint_fast.kernels import torch_engine
from autoint_fast.weights import InteractingParameters, Interaction, Layout
from tests.cases import BACKENDS, FUSED, Shape, draw_mask, draw_problem
from tests.numerics import errors, expected_output, layer_of
from tests.suite import NO_SECOND_ORDER


def draw_layer(backend: str = "auto") -> InteractingLayer:
    return layer_of(draw_problem(Shape(1, 1, 4, 2), torch.float64), backend)


def draw_x(*size: int) -> Tensor:
    return torch.randn(*(size or (3, 5, 4)), dtype=torch.float64)


# --- torch.func -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_func_grad(backend: str) -> None:
    layer, x = draw_layer(backend), draw_x()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    grads, grad_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    given = x.clone().requires_grad_()
    truth, _ = interacting_reference(given, layer.interacting_parameters(), 2)
    truth.square().sum().backward()
    torch.testing.assert_close(grad_x, given.grad, rtol=0, atol=1e-11)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_vmap(backend: str) -> None:
    layer, x = draw_layer(backend), draw_x(2, 3, 5, 4)
    expected = torch.stack([expected_output(layer, one) for one in x])
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected, rtol=0, atol=1e-12)
    masks = torch.stack([draw_mask("(B,F,F)", 3, 5) for _ in range(2)])
    expected = torch.stack([expected_output(layer, one, mask) for one, mask in zip(x, masks, strict=True)])
    torch.testing.assert_close(torch.func.vmap(layer)(x, masks), expected, rtol=0, atol=1e-12)


def test_ensemble_by_vmap() -> None:
    layers, x = [draw_layer() for _ in range(3)], draw_x()
    parameters, buffers = torch.func.stack_module_state(layers)

    def call(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(layers[0], (parameters, buffers), (x,))

    expected = torch.stack([expected_output(layer, x) for layer in layers])
    torch.testing.assert_close(torch.func.vmap(call)(parameters, buffers), expected, rtol=0, atol=1e-12)


def test_per_sample_gradients() -> None:
    layer, x = draw_layer(), draw_x()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(each[name].sum(0), p.grad, rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev", "hessian", "functionalize"])
def test_named_engine_under_a_transform_is_refused(transform: str) -> None:
    layer, x = draw_layer("torch"), draw_x()

    def total(x: Tensor) -> Tensor:
        return layer(x).sum()

    run: dict[str, Callable[[], object]] = {
        "grad": lambda: torch.func.grad(total)(x),
        "vmap": lambda: torch.func.vmap(layer)(x[None]),
        "jvp": lambda: torch.func.jvp(layer, (x,), (x,)),
        "jacrev": lambda: torch.func.jacrev(total)(x),
        "hessian": lambda: torch.func.hessian(total)(x),
        "functionalize": lambda: torch.func.functionalize(layer)(x),
    }
    with pytest.raises(ValueError, match=r"backend='torch'.*torch\.func"):
        run[transform]()
    torch.testing.assert_close(layer(x).detach(), expected_output(layer, x), rtol=0, atol=1e-12)


def test_auto_takes_the_reference_under_every_transform() -> None:
    layer, x = draw_layer(), draw_x()
    other = draw_layer("reference")
    other.load_state_dict(layer.state_dict())

    def twice(layer: InteractingLayer) -> tuple[Tensor, ...]:
        def total(x: Tensor) -> Tensor:
            return layer(x).square().sum()

        tangent = torch.ones_like(x)
        return (
            torch.func.hessian(total)(x),
            torch.func.jacfwd(layer)(x),
            torch.func.jvp(layer, (x,), (tangent,))[1],
            torch.func.grad(lambda x: torch.func.grad(total)(x).square().sum())(x),
        )

    for got, expected in zip(twice(layer), twice(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_why_inside_a_transform() -> None:
    layer, seen = draw_layer(), []

    def call(x: Tensor) -> Tensor:
        seen.append(why(layer, x))
        return layer(x)

    torch.func.vmap(call)(draw_x(2, 3, 5, 4))
    assert seen[0].choice == "reference" and any("torch.func" in reason for reason in seen[0].reasons["torch"])


# --- gradients of gradients, gradients in bulk, forward mode ----------------------------------------------


def test_second_order_of_a_frozen_layer_is_refused() -> None:
    layer, x = draw_layer("torch").eval().freeze(), draw_x().requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=NO_SECOND_ORDER):
        grad.square().sum().backward()


def test_first_order_with_create_graph_is_right() -> None:
    """Meta-learning code asks for create_graph everywhere and may never use it."""
    layer, x = draw_layer("torch"), draw_x().requires_grad_()
    inputs = [x, *layer.parameters()]
    grad = draw_x()
    expected = torch.autograd.grad(layer(x), inputs, grad)
    got = torch.autograd.grad(layer(x), inputs, grad, create_graph=True)
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


@pytest.mark.parametrize("leaf", ["x", "parameters"])
def test_gradients_in_bulk_are_right_or_refused(leaf: str) -> None:
    """is_grads_batched runs one backward under vmap, on a graph that was built without."""
    layer, x = draw_layer("torch"), draw_x(1, 2, 4).requires_grad_()
    inputs = [x] if leaf == "x" else list(layer.parameters())
    out = layer(x)
    basis = torch.eye(out.numel(), dtype=out.dtype).view(out.numel(), *out.shape)
    try:
        got = torch.autograd.grad(out, inputs, basis, is_grads_batched=True, retain_graph=True)
    except RuntimeError as error:
        assert 'backend="reference"' in str(error)
        return
    for row, grad in enumerate(basis):
        expected = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        for one, two in zip(got, expected, strict=True):
            torch.testing.assert_close(one[row], two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tangent_of", ["x", "parameter"])
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_is_right_or_refused(backend: str, tangent_of: str, needs_grad: bool) -> None:
    results = []
    layer, x = draw_layer(backend).requires_grad_(needs_grad), draw_x()
    reference = draw_layer("reference")
    reference.load_state_dict(layer.state_dict())
    tangent = torch.randn_like(x if tangent_of == "x" else layer.w_qs.weight)
    for which in (reference, layer):
        state = dict(which.named_parameters())
        with torch.autograd.forward_ad.dual_level():
            primal = x if tangent_of == "x" else state["w_qs.weight"].detach()
            dual = torch.autograd.forward_ad.make_dual(primal, tangent)
            given = dual if tangent_of == "x" else x
            if tangent_of == "parameter":
                state["w_qs.weight"] = dual
            try:
                out = torch.func.functional_call(which, state, (given,))
            except ValueError as error:
                assert backend in FUSED and "forward-mode" in str(error)
                return
            results.append(torch.autograd.forward_ad.unpack_dual(out).tangent)
    assert results[1] is not None, "the tangent was dropped"
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)


# --- checkpointing and modes ------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend: str, use_reentrant: bool) -> None:
    layers = nn.ModuleList([draw_layer(backend) for _ in range(2)])
    mask = draw_mask("(B,1,F)", 3, 5)
    x = draw_x()
    grads = []
    for wrap in (False, True):
        layers.zero_grad()
        h = given = x.clone().requires_grad_()
        for layer in layers:
            h = checkpoint(layer, h, mask, use_reentrant=use_reentrant) if wrap else layer(h, mask)
        h.square().sum().backward()
        grads.append([given.grad, *(p.grad.clone() for p in layers.parameters())])
    for one, two in zip(*grads, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any], backend: str) -> None:
    layer, x = draw_layer(backend), draw_x()
    expected = layer(x).detach()
    with mode():
        out = layer(x)
        assert not out.requires_grad and torch.equal(out, expected)
        assert not layer(x.clone().requires_grad_()).requires_grad
    assert layer(x).requires_grad


def test_inference_tensors_as_input() -> None:
    """Made in inference mode, used outside: fine to serve, refused by autograd's own error to train on."""
    layer = draw_layer("torch")
    with torch.inference_mode():
        x = draw_x()
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.clone()))
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensor"):
        layer(x)


def test_layer_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer, x = draw_layer(), draw_x()
        torch.testing.assert_close(layer(x), expected_output(layer, x), rtol=0, atol=1e-12)
        layer.eval().freeze()
        torch.testing.assert_close(layer(x), expected_output(layer, x), rtol=0, atol=1e-12)


def test_anomaly_mode() -> None:
    layer, x = draw_layer("torch"), draw_x().requires_grad_()
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("ignore")
        layer(x, draw_mask("(B,F,F)", 3, 5)).sum().backward()
    assert x.grad.isfinite().all()


def test_saved_tensors_on_the_cpu_hook() -> None:
    """Offloading hooks replace what the backward saved by equal tensors."""
    layer, x = draw_layer("torch"), draw_x()
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        layer(x).square().sum().backward()
    assert all(torch.equal(p.grad, value) for p, value in zip(layer.parameters(), expected, strict=True))


def test_tensor_hooks() -> None:
    layer, x = draw_layer("torch"), draw_x().requires_grad_()
    seen: list[str] = []
    x.register_hook(lambda grad: seen.append("x"))
    layer.w_ks.bias.register_post_accumulate_grad_hook(lambda p: seen.append("b_k"))
    out = layer(x)
    out.register_hook(lambda grad: grad * 0)
    out.sum().backward()
    assert sorted(seen) == ["b_k", "x"] and not x.grad.any()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("batch", [torch_engine.BLOCK_ROWS // 5, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_torchscript_trace_is_right_for_other_batches_or_refused(backend: str, batch: int, grad: bool) -> None:
    """A trace records one call's operations; a loop over the batch must not be baked in."""
    layer = draw_layer(backend).eval()
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            traced = torch.jit.trace(layer, draw_x(batch, 5, 4), check_trace=False)
        except ValueError as error:
            assert backend in FUSED and "torch.jit.trace" in str(error)
            return
        for other in (batch, 1, 3 * batch):
            x = draw_x(other, 5, 4)
            assert errors(traced(x), expected_output(layer, x)).maximum <= 1e-12


def test_parameters_as_plain_tensors() -> None:
    """The op's own signature, as another layer would call it: nothing but tensors."""
    x, p, n_head, _ = draw_problem(Shape(3, 5, 4, 2), torch.float64)
    interaction = Interaction(InteractingParameters(*p), n_head, 0.5, "projection")
    out = op.interact(x, interaction, Layout(n_head, 4, 4, 4), None, "torch")
    expected, _ = interacting_reference(x, InteractingParameters(*p), n_head)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
