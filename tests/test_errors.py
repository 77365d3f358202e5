"""Every bad argument: one error that names it, what was expected and what came; nothing half-changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoint_fast import InteractingLayer, ReferenceInteractingLayer, why
from tests.cases import BACKENDS
from tests.numerics import expected_output


class Layers:
    """The ways to call a layer of width 8 with an x and a mask."""

    @staticmethod
    def ours(x: Any, mask: Any = None) -> Any:
        return InteractingLayer(2, 8)(x, mask)

    @staticmethod
    def frozen(x: Any, mask: Any = None) -> Any:
        return InteractingLayer(2, 8).eval().freeze()(x, mask)

    @staticmethod
    def named(x: Any, mask: Any = None) -> Any:
        return InteractingLayer(2, 8, backend="torch")(x, mask)

    @staticmethod
    def reference(x: Any, mask: Any = None) -> Any:
        return ReferenceInteractingLayer(2, 8)(x, mask)

    @staticmethod
    def with_attention(x: Any, mask: Any = None) -> Any:
        return InteractingLayer(2, 8)(x, mask, return_attention=True)

    @staticmethod
    def explained(x: Any, mask: Any = None) -> Any:
        return why(InteractingLayer(2, 8), x, mask)


CALLS = [getattr(Layers, name) for name in vars(Layers) if not name.startswith("_")]

X: dict[str, tuple[Callable[[], Any], type[Exception], str, str]] = {
    # what is given: how, class of the error, what the message says was expected, and came
    "a list": (lambda: [[[0.0] * 8]], TypeError, "(B, F, 8)", "list"),
    "numpy": (lambda: torch.zeros(2, 3, 8).numpy(), TypeError, "(B, F, 8)", "ndarray"),
    "None": (lambda: None, TypeError, "(B, F, 8)", "None"),
    "rank 2": (lambda: torch.zeros(3, 8), ValueError, "(B, F, 8)", "(3, 8)"),
    "rank 4": (lambda: torch.zeros(2, 2, 3, 8), ValueError, "(B, F, 8)", "(2, 2, 3, 8)"),
    "a scalar": (lambda: torch.zeros(()), ValueError, "(B, F, 8)", "()"),
    "too narrow": (lambda: torch.zeros(2, 3, 7), ValueError, "(B, F, 8)", "(2, 3, 7)"),
    "swapped": (lambda: torch.zeros(2, 8, 3), ValueError, "(B, F, 8)", "(2, 8, 3)"),
    "int64": (lambda: torch.zeros(2, 3, 8, dtype=torch.long), TypeError, "floating", "torch.int64"),
    "bool": (lambda: torch.zeros(2, 3, 8, dtype=torch.bool), TypeError, "floating", "torch.bool"),
    "complex": (
        lambda: torch.zeros(2, 3, 8, dtype=torch.complex64),
        TypeError,
        "floating",
        "torch.complex64",
    ),
    "fp64": (lambda: torch.zeros(2, 3, 8, dtype=torch.float64), TypeError, "torch.float32", "torch.float64"),
    "bf16": (
        lambda: torch.zeros(2, 3, 8, dtype=torch.bfloat16),
        TypeError,
        "torch.float32",
        "torch.bfloat16",
    ),
    "fp16": (lambda: torch.zeros(2, 3, 8, dtype=torch.float16), TypeError, "torch.float32", "torch.float16"),
    "another device": (lambda: torch.zeros(2, 3, 8, device="meta"), ValueError, "cpu", "meta"),
}

MASK: dict[str, tuple[Callable[[], Any], type[Exception], str, str]] = {
    "a list": (lambda: [[True] * 3] * 3, TypeError, "bool tensor", "list"),
    "numpy": (lambda: torch.zeros(3, 3).bool().numpy(), TypeError, "bool tensor", "ndarray"),
    "a bool": (lambda: True, TypeError, "bool tensor", "True"),
    "fp32": (lambda: torch.zeros(3, 3), TypeError, "bool tensor", "torch.float32"),
    "uint8": (lambda: torch.zeros(3, 3, dtype=torch.uint8), TypeError, "bool tensor", "torch.uint8"),
    "a scalar": (lambda: torch.tensor(False), ValueError, "1 to 3 dimensions", "()"),
    "rank 4": (lambda: torch.zeros(2, 2, 3, 3).bool(), ValueError, "1 to 3 dimensions", "(2, 2, 3, 3)"),
    "another F": (lambda: torch.zeros(4).bool(), ValueError, "(2, 3, 3)", "(4,)"),
    "another F, F": (lambda: torch.zeros(4, 4).bool(), ValueError, "(2, 3, 3)", "(4, 4)"),
    "another B": (lambda: torch.zeros(5, 3, 3).bool(), ValueError, "(2, 3, 3)", "(5, 3, 3)"),
    "by head": (lambda: torch.zeros(4, 3, 3).bool(), ValueError, "(2, 3, 3)", "(4, 3, 3)"),
    "(B, F)": (lambda: torch.zeros(2, 3).bool(), ValueError, "mask[:, None]", "(2, 3)"),
    "(B, 1)": (lambda: torch.zeros(2, 1).bool(), ValueError, "(2, 3, 3)", "(2, 1)"),
    "empty": (lambda: torch.zeros(0).bool(), ValueError, "(2, 3, 3)", "(0,)"),
    "another device": (lambda: torch.zeros(3, 3, device="meta").bool(), ValueError, "cpu", "meta"),
}

CONSTRUCTOR: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    "n_head 0": ({"n_head": 0}, ValueError, "int of at least 1", "0"),
    "n_head -1": ({"n_head": -1}, ValueError, "int of at least 1", "-1"),
    "n_head 2.0": ({"n_head": 2.0}, TypeError, "int of at least 1", "2.0"),
    "n_head True": ({"n_head": True}, TypeError, "int of at least 1", "True"),
    "n_head '2'": ({"n_head": "2"}, TypeError, "int of at least 1", "'2'"),
    "n_head None": ({"n_head": None}, TypeError, "int of at least 1", "None"),
    "n_head tensor": ({"n_head": torch.tensor(2)}, TypeError, "int of at least 1", "torch.int64"),
    "emb_size 0": ({"emb_size": 0}, ValueError, "int of at least 1", "0"),
    "emb_size -3": ({"emb_size": -3}, ValueError, "int of at least 1", "-3"),
    "emb_size 8.0": ({"emb_size": 8.0}, TypeError, "int of at least 1", "8.0"),
    "emb_size False": ({"emb_size": False}, TypeError, "int of at least 1", "False"),
    "dropout 1": ({"dropout": 1}, ValueError, "[0, 1)", "1"),
    "dropout 1.5": ({"dropout": 1.5}, ValueError, "[0, 1)", "1.5"),
    "dropout -0.1": ({"dropout": -0.1}, ValueError, "[0, 1)", "-0.1"),
    "dropout nan": ({"dropout": float("nan")}, ValueError, "[0, 1)", "nan"),
    "dropout '0.1'": ({"dropout": "0.1"}, TypeError, "[0, 1)", "'0.1'"),
    "dropout None": ({"dropout": None}, TypeError, "[0, 1)", "None"),
    "dropout True": ({"dropout": True}, TypeError, "[0, 1)", "True"),
}


def assert_message(error: BaseException, argument: str, expected: str, came: str) -> None:
    message = str(error)
    assert re.match(rf"{argument}: expected ", message), message
    said_expected, said_came = message.split("got", 1) if "got" in message else (message, message)
    assert expected in message and came in said_came, message
    assert said_expected


@pytest.mark.parametrize("given", X)
@pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
def test_bad_x(call: Callable[..., Any], given: str) -> None:
    make, error, expected, came = X[given]
    with pytest.raises(error) as caught:
        call(make())
    assert type(caught.value) is error
    assert_message(caught.value, "x", expected, came)


@pytest.mark.parametrize("given", MASK)
@pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
def test_bad_mask(call: Callable[..., Any], given: str) -> None:
    make, error, expected, came = MASK[given]
    with pytest.raises(error) as caught:
        call(torch.zeros(2, 3, 8), make())
    assert type(caught.value) is error
    assert_message(caught.value, "mask", expected, came)


@pytest.mark.parametrize("given", CONSTRUCTOR)
@pytest.mark.parametrize("cls", [InteractingLayer, ReferenceInteractingLayer])
def test_bad_constructor_arguments(cls: type[nn.Module], given: str) -> None:
    arguments, error, expected, came = CONSTRUCTOR[given]
    state = torch.get_rng_state()
    with pytest.raises(error) as caught:
        cls(**{"n_head": 2, "emb_size": 8, **arguments})
    assert type(caught.value) is error
    assert_message(caught.value, next(iter(arguments)), expected, came)
    assert torch.equal(torch.get_rng_state(), state), "numbers were drawn before the arguments were checked"


@pytest.mark.parametrize(
    ("backend", "error"),
    [("cuda", ValueError), ("Torch", ValueError), ("", ValueError), (None, TypeError), (1, TypeError)],
)
def test_bad_backend(backend: Any, error: type[Exception]) -> None:
    state = torch.get_rng_state()
    with pytest.raises(error) as caught:
        InteractingLayer(2, 8, backend=backend)
    for name in ("backend: expected", "auto", "triton", "torch", "reference", repr(backend)):
        assert name in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_hint_is_given_only_where_it_helps() -> None:
    """(B, F) gets it; what is merely wrong does not."""
    layer, x = InteractingLayer(2, 8), torch.zeros(2, 3, 8)
    layer(x, torch.zeros(2, 3).bool()[:, None])  # what the hint says works
    for size in ((2, 4), (4, 4), (3,), (2, 3, 1, 1)):
        if size == (3,):
            continue
        with pytest.raises(ValueError) as caught:
            layer(x, torch.zeros(size).bool())
        assert "[:, None]" not in str(caught.value)


def test_dtype_of_x_against_other_weights() -> None:
    for weights, given in ((torch.float64, torch.float32), (torch.bfloat16, torch.float32)):
        layer = InteractingLayer(2, 8, dtype=weights)
        with pytest.raises(TypeError, match=rf"x: expected .*{weights}.*got {given}.*autocast"):
            layer(torch.zeros(2, 3, 8, dtype=given))


def test_fp64_is_not_brought_together_by_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="x: expected"):
            InteractingLayer(2, 8)(torch.zeros(2, 3, 8, dtype=torch.float64))
        with pytest.raises(TypeError, match="x: expected"):
            InteractingLayer(2, 8, dtype=torch.float64)(torch.zeros(2, 3, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_on_two_devices(backend: str) -> None:
    layer = InteractingLayer(2, 8, backend=backend)
    layer.fc_res.to("meta")
    with pytest.raises(ValueError, match=r"fc_res.*expected.*device.*cpu.*got.*meta"):
        layer(torch.zeros(2, 3, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_changed_by_an_error(backend: str) -> None:
    layer = InteractingLayer(2, 8, backend=backend, dtype=torch.float64)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    attributes = dict(vars(layer))
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    bad: list[tuple[Any, Any]] = [(make(), None) for make, *_ in X.values() if make() is not None]
    bad += [(x, make()) for make, *_ in MASK.values()]
    for given, mask in bad:
        if isinstance(given, Tensor) and given.dtype == torch.float64 and mask is None:
            continue
        with pytest.raises((ValueError, TypeError)):
            layer(given, mask)
    assert vars(layer) == attributes and layer.training
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert all(p.grad is None for p in layer.parameters())
    torch.testing.assert_close(layer(x), expected_output(layer, x), rtol=0, atol=1e-12)


def test_why_wants_a_layer() -> None:
    with pytest.raises(TypeError, match="layer: expected a layer of autoint_fast, got Linear"):
        why(nn.Linear(8, 8), torch.zeros(2, 3, 8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", ["meta", "double"])
def test_a_bias_unlike_the_weights(backend: str, bias: str) -> None:
    layer = InteractingLayer(2, 8, backend=backend)
    old = layer.w_vs.bias
    layer.w_vs.bias = nn.Parameter(old.double() if bias == "double" else old.to(bias))
    with pytest.raises(ValueError, match=r"w_vs.bias: expected .*torch.float32 on cpu, got "):
        layer(torch.zeros(2, 3, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_call_and_a_question_leave_parametrizations_alone(backend: str) -> None:
    layer = InteractingLayer(2, 8, backend=backend)
    nn.utils.parametrizations.spectral_norm(layer.w_qs)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for bad in ("x", torch.zeros(2, 8), torch.zeros(2, 3, 9)):
        with pytest.raises((TypeError, ValueError)):
            layer(bad)
    why(layer, torch.zeros(2, 3, 8))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_relies_on_the_call_of_a_projection_is_refused(backend: str) -> None:
    layer, x = InteractingLayer(2, 8, backend=backend), torch.zeros(2, 3, 8)
    layer.w_vs.forward = lambda x: 2 * x
    with pytest.raises(TypeError, match="w_vs: expected a Linear with Linear's own forward"):
        layer(x)
    del layer.w_vs.forward
    layer.w_vs.register_full_backward_pre_hook(lambda module, grad: grad)
    with pytest.raises(RuntimeError, match="w_vs: a hook on this projection would never run"):
        layer(x)
