"""What accelerate makes of descriptions that leave something out, and of modules that others have a hand in."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoint_fast import InteractingParameters, Interaction, accelerate, libraries, register_adapter, restore
from autoint_fast.libraries import Accelerated
from benchmarks.model_zoo import MultiHeadSelfAttention
from tests.swapping import torchfm_model


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_registered", {})


class Plain(nn.Module):
    """Somebody's layer without biases, of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(self.q(x) @ self.k(x).mT, -1)
        return torch.relu(p @ self.v(x)), p

    def forward(self, x: Tensor) -> Any:
        return self.attend(x)[0]


def describe_plain(module: Any) -> Interaction:
    p = InteractingParameters(module.q.weight, None, module.k.weight, None, module.v.weight, *(None,) * 5)
    return Interaction(p, 1, 1.0, "none")


class WithWeights(Plain):
    def forward(self, x: Tensor) -> Any:
        return self.attend(x)


class WithForgottenBias(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        nn.init.zeros_(self.q.bias)


class WithDropout(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        return self.dropout(self.attend(x)[0])


class Gated(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.gate * self.attend(x)[0])


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (WithWeights, "no tensor"),
        (WithForgottenBias, "other numbers"),
        (WithDropout, "has a Dropout"),
        (Gated, "other numbers"),
    ],
)
def test_descriptions_that_leave_something_out(cls: type[nn.Module], reason: str) -> None:
    register_adapter(cls, describe_plain)
    layer, x = cls(), torch.randn(2, 5, 8)
    before = dict(vars(layer))
    report = accelerate(layer)
    assert not report.replaced and reason in report.left[0].reason, report
    assert type(layer) is cls and vars(layer) == before
    layer(x)


def test_registered_again() -> None:
    register_adapter(Plain, describe_plain)
    layer = Plain()
    assert accelerate(layer).replaced
    register_adapter(Plain, lambda module: describe_plain(module))
    copied = pickle.loads(pickle.dumps(layer))
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(copied(x), layer(x))


@pytest.mark.parametrize("value", [torch.nan, 3e38])
def test_weights_that_are_no_numbers(value: float) -> None:
    """As of a model whose checkpoint is yet to be loaded."""
    layer = MultiHeadSelfAttention(8, 12, 2)
    nn.init.constant_(layer.W_q.weight, value)
    assert accelerate(layer).replaced
    nn.init.normal_(layer.W_q.weight)
    plain, x = copy.deepcopy(layer), torch.randn(2, 5, 8)
    restore(plain)
    torch.testing.assert_close(layer(x), plain(x))


def test_dropout_is_the_module_that_drops() -> None:
    layer, x = MultiHeadSelfAttention(8, 8, 2, dropout_rate=0.5).eval(), torch.randn(4, 5, 8)
    accelerate(layer)
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)
    layer.dot_attention.dropout.train()
    assert not torch.equal(layer(x), layer(x))
    layer.dot_attention.dropout = nn.Identity()
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)


def test_attention_of_its_own_is_called() -> None:
    layer, x = MultiHeadSelfAttention(8, 8, 2), torch.randn(4, 5, 8)
    accelerate(layer)
    seen: list[Tensor] = []
    forward = layer.dot_attention.forward
    layer.dot_attention.forward = lambda *given: (seen.append(given[0]), forward(*given))[1]
    layer(x)
    assert len(seen) == 1


def test_a_class_derived_since_is_not_undone() -> None:
    model = nn.Sequential(MultiHeadSelfAttention(8, 8, 2), MultiHeadSelfAttention(8, 8, 2))
    accelerate(model)
    kinds = [type(module) for module in model]
    model[1].__class__ = type("Sharded", (type(model[1]),), {})
    with pytest.raises(TypeError, match="model: 1 has a Sharded derived"):
        restore(model)
    assert type(model[0]) is kinds[0] and isinstance(model[1], Accelerated)
    model[1].__class__ = kinds[1]
    restore(model)
    assert not isinstance(model[0], Accelerated) and not isinstance(model[1], Accelerated)


def test_weights_that_change_when_read() -> None:
    layer, x = MultiHeadSelfAttention(8, 8, 2, dropout_rate=0.3), torch.randn(4, 5, 8)
    nn.utils.parametrizations.spectral_norm(layer.W_q)
    twin = copy.deepcopy(layer)
    accelerate(layer)
    for name, value in twin.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    layer(x), twin(x)  # with dropout, by the original code, which reads them once
    for name, value in twin.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


def test_attention_that_others_call_too_is_left_alone() -> None:
    model = torchfm_model()
    outer = nn.ModuleDict(
        {"model": model, "attention": next(m for m in model.modules() if type(m) is nn.MultiheadAttention)}
    )
    report = accelerate(outer)
    assert any("has it too" in left.reason for left in report.left)


def test_a_model_without_its_stack() -> None:
    model = torchfm_model()
    del model.self_attns
    accelerate(nn.Sequential(MultiHeadSelfAttention(8, 8, 2), model))
