"""A layer remembers what its last call found out of its parameters: nothing that changes meanwhile may be missed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from autoint_fast import InteractingLayer, InteractingParameters, Interaction, PaperInteractingLayer, op
from autoint_fast.reference import interaction_reference
from autoint_fast.weights import choose_layout
from tests.cases import BACKENDS, FUSED

FUSED = [name for name in FUSED if name != "triton"]


def truth(layer: PaperInteractingLayer | InteractingLayer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return interaction_reference(x, layer.interaction())[0]


def assert_current(layer: PaperInteractingLayer | InteractingLayer, x: Tensor) -> None:
    """Without gradients twice, as the second call is where something is remembered, and with them."""
    for grad in (False, False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x), truth(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shape_that_changed_in_place(backend: str) -> None:
    """At the same address, where it would be read, and its gradient written, beyond its end."""
    for name in ("w_qs", "w_ks", "w_vs", "w_res"):
        layer, x = PaperInteractingLayer(8, 16, 2, backend=backend), torch.randn(4, 5, 8)
        assert_current(layer, x)
        weight = getattr(layer, name).weight
        weight.data = weight.data[:2]
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="expected the shape"):
                layer(x)


@pytest.mark.parametrize("backend", FUSED)
def test_a_parameter_cut_short_before_the_backward(backend: str) -> None:
    layer, x = PaperInteractingLayer(8, 16, 2, backend=backend), torch.randn(4, 5, 8)
    out = layer(x)
    layer.w_vs.weight.data = layer.w_vs.weight.data[:1]
    with pytest.raises(RuntimeError):
        out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_in_place_and_back(backend: str) -> None:
    layer, x = PaperInteractingLayer(8, 8, 2, backend=backend), torch.randn(4, 5, 8)
    for _ in range(4):
        assert_current(layer, x)
        layer.w_qs.weight.data = layer.w_qs.weight.data.t()
    for _ in range(3):
        assert_current(layer, x)
        with torch.no_grad():
            layer.w_res.weight.t_()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_spread_in_place(backend: str) -> None:
    """At the same address and of the same length: as every other element of its memory, or its first throughout."""
    memory, x = torch.randn(32), torch.randn(4, 5, 8)
    for spread in (memory[::2], memory[:1].expand(16)):
        layer = InteractingLayer(2, 8, backend=backend)
        layer.w_qs.bias.data = memory[:16]
        assert_current(layer, x)
        layer.w_qs.bias.data = spread
        assert_current(layer, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_kind_of_layer_with_the_same_parameters(backend: str) -> None:
    layer, x = PaperInteractingLayer(8, 16, 2, backend=backend), torch.randn(4, 5, 8)
    for name, value in (("scale", 0.3), ("n_head", 4), ("n_head", 2), ("scale", 1.0)):
        assert_current(layer, x)
        setattr(layer, name, value)
    assert_current(layer, x)


@pytest.mark.skipif("native" not in FUSED, reason="there is no C++ compiler")
def test_memory_that_was_given_back() -> None:
    """As by what shards parameters; a bias without an address must not pass for none either."""
    for name in ("w_vs.weight", "w_vs.bias", "x"):
        layer, x = InteractingLayer(2, 8, backend="native"), torch.randn(4, 5, 8)
        layer(x)
        (x if name == "x" else layer.get_parameter(name)).untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="has no memory"):
            layer(x)


@pytest.mark.parametrize("backend", FUSED)
def test_no_parameter_is_kept_alive(backend: str) -> None:
    layer, x = InteractingLayer(2, 8, backend=backend), torch.randn(4, 5, 8)
    for grad in (False, False, True):
        with torch.set_grad_enabled(grad):
            layer(x)
    old = weakref.ref(layer.w_qs.weight)
    layer.w_qs.weight = nn.Parameter(torch.randn(16, 8))
    gc.collect()
    assert old() is None
    assert_current(layer, x)


@pytest.mark.parametrize("backend", FUSED)
def test_make_fx_of_real_tensors(backend: str) -> None:
    """Nothing but a mode tells that a call is recorded."""
    layer, x = InteractingLayer(2, 8, backend=backend).eval(), torch.randn(4, 5, 8)
    with torch.no_grad():
        layer(x)
        graph = make_fx(layer)(x)
        other = torch.randn_like(x)
        torch.testing.assert_close(graph(other), layer(other))


@pytest.mark.parametrize("backend", FUSED)
def test_a_bias_behind_concatenated_heads(backend: str) -> None:
    w_q, w_k, w_v, b_o = torch.randn(6, 8), torch.randn(6, 8), torch.randn(6, 8), torch.randn(6)
    p = InteractingParameters(w_q, None, w_k, None, w_v, None, None, b_o, None, None)
    interaction, x = Interaction(p, 2, 0.3, "none"), torch.randn(4, 5, 8)
    expected, _ = interaction_reference(x, interaction)
    plain, _ = interaction_reference(x, Interaction(p._replace(b_o=None), 2, 0.3, "none", relu=False))
    torch.testing.assert_close(expected, torch.relu(plain + b_o))
    got = op.interact(x, interaction, choose_layout(interaction, 5), None, backend)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", FUSED)
def test_x_of_another_width_after_a_call(backend: str) -> None:
    """Where the caller has not checked it, as an adapter of somebody's need not."""
    layer = InteractingLayer(2, 8, backend=backend)
    for frozen in (False, True):
        if frozen:
            layer.eval().freeze()
        for grad in (False, False, True):
            with torch.set_grad_enabled(grad):
                layer.fused(torch.randn(4, 5, 8))
                with pytest.raises(ValueError, match="x: expected the width of the layer's weights, 8, got 6"):
                    layer.fused(torch.randn(4, 5, 6))
