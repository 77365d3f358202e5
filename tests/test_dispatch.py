"""The choice of an engine: one list of reasons for the choice, the error and `why`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from autoint_fast import InteractingLayer, dispatch, why
from autoint_fast.dispatch import Call
from autoint_fast.weights import Layout
from tests.numerics import expected_output

LAYOUT = Layout(2, 16, 16, 16)


def call(device: str = "cpu", inside: str | None = None) -> Call:
    return dispatch.Call("meta", torch.float32, 39, LAYOUT, dispatch.surroundings())._replace(
        device_type=device, inside=inside
    )


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[str, SimpleNamespace]:
    """Engines whose reasons a test sets, in place of the real ones."""
    fakes = {}
    for name in ("triton", "native", "torch"):
        fake = SimpleNamespace(reasons=[], prepare=lambda call: True)
        fake.unsupported = lambda call, fake=fake: list(fake.reasons)
        fakes[name] = fake
    monkeypatch.setattr(dispatch, "ENGINES", fakes)
    return fakes


def test_auto_takes_the_fastest_that_can(engines: dict[str, SimpleNamespace]) -> None:
    assert dispatch.choose("auto", call("cuda")) == "triton"
    engines["triton"].reasons = ["no"]
    assert dispatch.choose("auto", call("cuda")) == "torch"
    engines["torch"].reasons = ["no"]
    assert dispatch.choose("auto", call("cuda")) == "reference"


def test_auto_on_a_cpu_never_takes_the_gpu_engine(engines: dict[str, SimpleNamespace]) -> None:
    for inside in (None, "torch.jit.trace"):
        assert dispatch.choose("auto", call("cpu", inside)) == "native"
    engines["native"].reasons = ["no"]
    assert dispatch.choose("auto", call("cpu")) == "torch"
    engines["torch"].reasons = ["no"]
    assert dispatch.choose("auto", call("cpu")) == "reference"


def test_an_engine_that_cannot_be_made_ready_is_passed_over(engines: dict[str, SimpleNamespace]) -> None:
    """What a first call needs may fail, as compiling does; the engine then has a reason."""

    def fail(call: Call) -> bool:
        engines["native"].reasons = ["it cannot be compiled"]
        return False

    engines["native"].prepare = fail
    assert dispatch.choose("auto", call()) == "torch"
    engines["native"].reasons = []
    with pytest.raises(ValueError, match=r"backend='native'.*it cannot be compiled"):
        dispatch.choose("native", call())


def test_auto_on_meta_is_the_reference() -> None:
    assert dispatch.choose("auto", call("meta")) == "reference"


def test_a_named_engine_is_used_or_raises_with_every_reason(engines: dict[str, SimpleNamespace]) -> None:
    for name, fake in engines.items():
        assert dispatch.choose(name, call()) == name
        fake.reasons = ["the first reason", "the second reason"]
        with pytest.raises(ValueError, match=f"backend='{name}'.*the first reason.*the second reason"):
            dispatch.choose(name, call())
    assert dispatch.choose("reference", call()) == "reference"


def test_choice_is_pure() -> None:
    """The same call gives the same choice; the batch is no part of it, so compiled code keeps it dynamic."""
    assert all(dispatch.choose("auto", call()) == dispatch.choose("auto", call()) for _ in range(3))
    assert call() == call() and hash(call()) == hash(call())
    assert "batch" not in dispatch.Call._fields


def test_why_agrees_with_the_call(engines: dict[str, SimpleNamespace]) -> None:
    engines["triton"].reasons = ["x is on a CPU", "something else"]
    for backend in ("auto", "torch", "reference", "triton"):
        answer = why(InteractingLayer(2, 16, backend=backend), torch.zeros(2, 39, 16))
        assert list(answer.reasons) == ["triton", "native", "torch", "reference"]
        assert answer.reasons["triton"] == engines["triton"].reasons
        assert answer.reasons["torch"] == answer.reasons["reference"] == []
        text = str(answer)
        assert "x is on a CPU; something else" in text and "torch" in text
        if backend == "triton":
            assert "raises" in answer.choice
        else:
            assert answer.choice == dispatch.choose(backend, call()) and answer.choice in text


def test_why_runs_nothing(monkeypatch: pytest.MonkeyPatch, engines: dict[str, SimpleNamespace]) -> None:
    layer = InteractingLayer(2, 16)
    x = torch.zeros(2, 3, 16, requires_grad=True)
    answer = why(layer, x, torch.zeros(2, 1, 3, dtype=torch.bool))  # the fakes cannot run anything
    assert answer.choice in ("native", "torch", "reference") and x.grad is None


def test_the_layer_runs_what_why_says(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    real = dispatch.ENGINES["torch"]
    monkeypatch.setattr(dispatch, "preference", lambda call: ("torch",))
    spy = SimpleNamespace(
        unsupported=real.unsupported,
        prepare=real.prepare,
        comparison=real.comparison,
        folding=real.folding,
        interacting=real.interacting,
        fold=real.fold,
        interact=lambda *arguments: (ran.append("torch"), real.interact(*arguments))[1],
    )
    engines = {**dispatch.ENGINES, "torch": spy}
    monkeypatch.setattr(dispatch, "ENGINES", engines)
    monkeypatch.setattr("autoint_fast.op.ENGINES", engines)
    x = torch.randn(2, 3, 16)
    for backend in ("auto", "torch", "reference"):
        layer = InteractingLayer(2, 16, backend=backend)
        ran.clear()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected_output(layer, x), rtol=1e-4, atol=1e-5)
        assert (ran or ["reference"]) == [why(layer, x).choice]


def test_triton_on_cpu_tensors_needs_the_interpreter() -> None:
    """In a process that does not interpret, the reasons say so, in `why` and in the error."""
    layer = InteractingLayer(2, 16, backend="triton")
    x = torch.zeros(2, 3, 16)
    answer = why(layer, x)
    assert "raises" in answer.choice and answer.reasons["triton"]
    with pytest.raises(ValueError) as caught:
        layer(x)
    assert all(reason in str(caught.value) for reason in answer.reasons["triton"])
    assert why(InteractingLayer(2, 16), x).choice in ("native", "torch")


def test_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dispatch.choose("auto", call())
    for name in ("AUTOINT_FAST_BACKEND", "AUTOINT_FAST_ENGINE", "AUTOINT_BACKEND"):
        monkeypatch.setenv(name, "reference")
    assert dispatch.choose("auto", call()) == before
