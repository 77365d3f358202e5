"""A layer remembers what its last call found out of its parameters: nothing that changes meanwhile may be missed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from autoint_fast import (
    FlattenedInteractingLayer,
    InteractingLayer,
    InteractingParameters,
    Interaction,
    PaperInteractingLayer,
    dispatch,
    op,
)
from autoint_fast.reference import interaction_reference
from autoint_fast.weights import choose_layout
from tests.cases import BACKENDS, FUSED

FUSED = [name for name in FUSED if name != "triton"]


def truth(layer: PaperInteractingLayer | InteractingLayer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return interaction_reference(x, layer.interaction())[0]


def assert_current(layer: PaperInteractingLayer | InteractingLayer, x: Tensor) -> None:
    """Without gradients three times, as the second call is where something is remembered, and with them."""
    for grad in (False, False, False, True):
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
    for grad in (False, False, False, True):
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
        for _ in range(3):
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
        for grad in (False, False, False, True):
            with torch.set_grad_enabled(grad):
                layer.fused(torch.randn(4, 5, 8))
                with pytest.raises(ValueError, match="x: expected the width of the layer's weights, 8, got 6"):
                    layer.fused(torch.randn(4, 5, 6))


# --- a call like the last one, which is made without asking again -------------------------------------------------


def served(backend: str, *, frozen: bool = False) -> InteractingLayer:
    """A layer that has been called without gradients until nothing more is remembered of it."""
    layer = InteractingLayer(2, 8, backend=backend).eval()
    if frozen:
        layer.freeze()
    with torch.no_grad():
        for _ in range(2):
            layer(torch.randn(4, 5, 8))
    return layer


def assert_right(layer: InteractingLayer, x: Tensor, mask: Tensor | None = None) -> None:
    """Without gradients."""
    with torch.no_grad():
        expected = interaction_reference(x, layer.interaction(), mask)[0]
        torch.testing.assert_close(layer(x, mask), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with every call that finds out anew what it runs on."""
    calls: list[None] = []
    surroundings = dispatch.surroundings
    monkeypatch.setattr(dispatch, "surroundings", lambda: (calls.append(None), surroundings())[1])
    return calls


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("backend", FUSED)
def test_nothing_is_asked_again(backend: str, frozen: bool, asked: list[None]) -> None:
    layer = served(backend, frozen=frozen)
    asked.clear()
    for x in (torch.randn(4, 5, 8), torch.randn(1, 5, 8), torch.randn(0, 5, 8), torch.randn(4, 8, 10)[..., ::2].mT):
        assert_right(layer, x)
        assert_right(layer, x, torch.rand(x.shape[0], 1, 5) < 0.3)
        with torch.inference_mode():
            layer(x)
    assert not asked


class Watching(Tensor):
    """A tensor that sees which operators it is given to."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def has_seen(cls, name: str) -> bool:
        seen, cls.seen = cls.seen, []
        return any(name in function for function in seen)


def _swap(layer: InteractingLayer) -> None:
    layer.w_ks.weight = nn.Parameter(torch.randn(16, 8))


CHANGES: dict[str, Callable[[InteractingLayer], object]] = {
    "values": lambda layer: layer.w_qs.weight.data.mul_(2.0),
    "one number": lambda layer: layer.fc_res.bias.data[7:].add_(1.0),
    "storage": lambda layer: setattr(layer.w_vs.weight, "data", torch.randn(16, 8)),
    "strides": lambda layer: setattr(layer.fc_res.weight, "data", layer.fc_res.weight.data.t()),
    "a parameter": _swap,
    "no bias": lambda layer: setattr(layer.w_qs, "bias", None),
    "load_state_dict": lambda layer: layer.load_state_dict(InteractingLayer(2, 8).state_dict()),
    "heads": lambda layer: setattr(layer, "n_head", 4),
    "scale": lambda layer: setattr(layer, "scale", 0.1),
    "engine": lambda layer: setattr(layer, "backend", "torch" if layer.backend == "native" else "auto"),
    "form": lambda layer: setattr(layer, "form", "factored"),
    "frozen": lambda layer: layer.freeze(),
    "a tensor for a parameter": lambda layer: nn.utils.parametrize.register_parametrization(
        layer.w_qs, "weight", nn.Softplus()
    ),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("backend", FUSED)
def test_what_changes_is_asked_again(backend: str, change: str, asked: list[None]) -> None:
    layer, x = served(backend), torch.randn(3, 5, 8)
    asked.clear()
    CHANGES[change](layer)
    assert_right(layer, x)
    assert asked
    for _ in range(2):
        assert_right(layer, x)


@pytest.mark.parametrize("backend", FUSED)
def test_a_hook_that_came(backend: str) -> None:
    layer = served(backend)
    layer.w_vs.register_forward_hook(lambda *_: None)
    with torch.no_grad(), pytest.raises(RuntimeError, match="w_vs: a hook on this projection would never run"):
        layer(torch.randn(4, 5, 8))


@pytest.mark.parametrize("backend", FUSED)
def test_bits_that_are_read_as_other_numbers(backend: str) -> None:
    layer = served(backend)
    weight = layer.w_qs.weight.requires_grad_(False)
    weight.data = weight.data.view(torch.int32)
    with torch.no_grad(), pytest.raises(ValueError, match="the dtype and device of the others"):
        layer(torch.randn(4, 5, 8))


@pytest.mark.parametrize("backend", FUSED)
def test_parameters_lent_for_a_call(backend: str) -> None:
    layer, other, x = served(backend), InteractingLayer(2, 8, backend=backend), torch.randn(4, 5, 8)
    with torch.no_grad():
        got = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
        torch.testing.assert_close(got, other(x))
    assert_right(layer, x)


@pytest.mark.parametrize("backend", FUSED)
def test_tensors_of_another_class(backend: str) -> None:
    """In the same place."""
    layer, x = served(backend), torch.randn(4, 5, 8)
    watching = {name: p.detach().as_subclass(Watching) for name, p in layer.named_parameters()}
    with torch.no_grad():
        torch.func.functional_call(layer, watching, (x,))
        assert Watching.has_seen("autoint_fast.interact")
        layer = served(backend)
        layer(x.as_subclass(Watching))
        assert Watching.has_seen("autoint_fast.interact")


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("backend", FUSED)
def test_another_kind_of_x(backend: str, frozen: bool) -> None:
    x = torch.randn(3, 5, 8)
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    for other in (torch.randn(3, 6, 8), nn.Parameter(x), negated):
        layer = served(backend, frozen=frozen)
        assert_right(layer, other)
    layer = served(backend, frozen=frozen)
    with torch.no_grad():
        out, attention = layer(x, return_attention=True)
        assert torch.equal(out, layer(x)) and attention.shape == (3, 2, 5, 5)
        with pytest.raises(ValueError, match="x: expected the shape"):
            layer(torch.randn(3, 5, 6))
        with pytest.raises(ValueError, match="x: expected the width"):
            layer.fused(torch.randn(3, 5, 6))
        with pytest.raises(TypeError, match="x: expected the dtype"):
            layer(x.double())
        with pytest.raises(ValueError, match="x: expected the device"):
            layer(x.to("meta"))


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_other_surroundings(backend: str, frozen: bool) -> None:
    """Of which only the process's state tells, or what is wrapped in a plain tensor."""
    layer, x, step = served(backend, frozen=frozen), torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    reference = InteractingLayer(2, 8, backend="reference")
    reference.load_state_dict(layer.state_dict())
    close: Any = {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        expected = reference(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    layer.backend = "auto"
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        traced = torch.jit.trace(layer, x, check_trace=False)
        torch.testing.assert_close(traced(step), reference(step), **close)
        torch.testing.assert_close(torch.func.vmap(lambda one: layer(one[None])[0])(x), expected, **close)
        with forward_ad.dual_level():
            got, slope = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, step)))
            _, expected_slope = forward_ad.unpack_dual(reference(forward_ad.make_dual(x, step)))
        torch.testing.assert_close(got, expected, **close)
        torch.testing.assert_close(slope, expected_slope, **close)
    given = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(layer(given).sum(), given)
    (expected_grad,) = torch.autograd.grad(reference(given).sum(), given)
    torch.testing.assert_close(grad, expected_grad, **close)


@pytest.mark.parametrize("backend", FUSED)
def test_compiled_after_it_served(backend: str) -> None:
    layer, x = served(backend), torch.randn(3, 5, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("backend", FUSED)
def test_weights_that_change_under_several_threads(backend: str) -> None:
    """When they have come to rest, no thread may have left behind what it has folded of others."""
    layer, x, going_on = served(backend), torch.randn(2, 5, 8), True

    def serve() -> None:
        with torch.no_grad():
            while going_on:
                layer(x)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        layer.w_qs.weight.data.add_(0.01)
    going_on = False
    for thread in threads:
        thread.join()
    assert_right(layer, x)


def test_the_parts_of_an_interaction() -> None:
    for layer in (InteractingLayer(2, 8), PaperInteractingLayer(8, 16, 2), FlattenedInteractingLayer(5, 8, 2)):
        tensors, kind = layer._described()
        interaction = layer.interaction()
        assert all(t is given for t, given in zip(tensors, interaction.parameters, strict=True))
        assert Interaction(interaction.parameters, *kind) == interaction
