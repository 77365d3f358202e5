"""`freeze()`: folded once, for serving; when it holds, when it is dropped, what it changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from autoint_fast import InteractingLayer
from autoint_fast.weights import Layout
from tests.cases import BACKENDS, Shape, draw_mask, draw_problem
from tests.numerics import Multiplications, errors, expected_output, layer_of


def fresh(dtype: torch.dtype = torch.float64, backend: str = "auto") -> InteractingLayer:
    problem = draw_problem(Shape(1, 1, 8, 2), dtype)
    return layer_of(problem, backend).eval()


def draw_x(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 5, 8, dtype=dtype)


def is_frozen(layer: InteractingLayer) -> bool:
    """Whether the layer does not see a change of its weights. Leaves the weights as they were."""
    x = draw_x(layer.fc_res.bias.dtype)
    with torch.no_grad():
        before = layer(x)
        layer.fc_res.bias.data.add_(3.0)
        after = layer(x)
        layer.fc_res.bias.data.sub_(3.0)
    frozen = torch.equal(before, after)
    assert frozen == ("frozen" in repr(layer))
    return frozen


def assert_current(layer: InteractingLayer) -> None:
    x = draw_x(layer.fc_res.bias.dtype)
    expected = expected_output(layer, x)
    unit = 1e-13 if x.dtype == torch.float64 else torch.finfo(x.dtype).eps
    assert errors(layer(x), expected).maximum <= 32 * unit * max(1.0, expected.max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_numbers(backend: str) -> None:
    layer = fresh(backend=backend)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer.unfreeze().to(dtype)
        x = draw_x(dtype)
        for mask in (None, draw_mask("(B,F,F)", 3, 5)):
            before = layer.unfreeze()(x, mask)
            assert torch.equal(layer.freeze()(x, mask), before)


def test_gives_the_layer_itself() -> None:
    layer = fresh()
    assert layer.freeze() is layer and layer.unfreeze() is layer and layer.unfreeze() is layer


def test_refused_in_training_mode() -> None:
    layer = fresh().train()
    with pytest.raises(ValueError, match=r"freeze: .*eval mode.*training mode.*eval\(\)"):
        layer.freeze()
    assert not is_frozen(layer.eval())


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_constants(backend: str) -> None:
    """On every path a frozen layer may take: no change is seen, no parameter gets a gradient."""
    layer = fresh(backend=backend).freeze()
    assert is_frozen(layer)
    x = draw_x().requires_grad_()
    expected = expected_output(layer, x)
    layer(x).sum().backward()
    assert all(p.grad is None for p in layer.parameters())
    layer.w_qs.weight.data.zero_()
    torch.testing.assert_close(layer(x).detach(), expected, rtol=0, atol=1e-12)
    assert not layer(x.detach()).requires_grad


def test_gradient_of_the_input() -> None:
    layer = fresh(backend="torch")
    x = draw_x().requires_grad_()
    grad = draw_x()
    (expected,) = torch.autograd.grad(layer(x), x, grad)
    (got,) = torch.autograd.grad(layer.freeze()(x), x, grad)
    assert torch.equal(got, expected)


def test_attention_is_that_of_the_frozen_weights() -> None:
    layer = fresh().freeze()
    x = draw_x()
    out, attention = layer(x, return_attention=True)
    layer.w_qs.weight.data.zero_()
    again, attention_again = layer(x, return_attention=True)
    assert torch.equal(again, out)
    assert torch.equal(attention_again, attention), "the output is of the frozen weights, P of others"


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_see_the_frozen_weights(transform: str) -> None:
    layer = fresh().freeze()
    x = draw_x()
    run = {
        "vmap": lambda: torch.func.vmap(lambda one: layer(one[None])[0])(x),
        "grad": lambda: torch.func.grad(lambda x: layer(x).sum())(x),
    }[transform]
    before = run()
    layer.w_vs.weight.data.zero_()
    torch.testing.assert_close(run(), before)


def test_folding_is_skipped() -> None:
    layer, x = fresh(torch.float32, "torch"), draw_x(torch.float32)
    counts = []
    for freeze in (False, True):
        if freeze:
            layer.freeze()
        with torch.no_grad(), Multiplications() as counter:
            layer(x)
        counts.append(counter.count)
    layout = Layout(2, 8, 8, 8)
    assert counts[0] - counts[1] >= (sum(layout.sizes[:5])) * 8 - layout.sizes[1] * 8


# --- what carries the frozen state ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_to_carries_it(dtype: torch.dtype) -> None:
    layer = fresh(torch.float32).freeze()
    assert layer.to(dtype) is layer
    assert_current(layer)
    assert is_frozen(layer)


def test_to_folds_anew_from_the_converted_parameters() -> None:
    """Not a conversion of what was folded: fp64 then has all its digits."""
    layer = fresh(torch.float32).freeze().double()
    assert_current(layer)
    for convert in (nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double):
        convert(layer)
        assert_current(layer)
        assert is_frozen(layer)


def test_to_through_a_model() -> None:
    model = nn.Sequential(nn.Identity(), fresh(torch.float32).freeze())
    model.double()
    assert_current(model[1])
    assert is_frozen(model[1])


def test_to_meta_and_back() -> None:
    layer = fresh().freeze()
    state = copy.deepcopy(layer.state_dict())
    layer.to("meta")
    assert layer(draw_x().to("meta")).device.type == "meta"
    layer.to_empty(device="cpu")
    layer.load_state_dict(state)
    assert_current(layer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a model"])
def test_copies_carry_it(copied: Callable[[nn.Module], nn.Module], inside: bool) -> None:
    layer = fresh().freeze()
    twin = copied(nn.Sequential(layer))[0] if inside else copied(layer)
    assert is_frozen(twin)
    assert_current(twin)
    twin.unfreeze()
    assert is_frozen(layer) and not is_frozen(twin)


def test_it_is_not_in_the_state_dict() -> None:
    layer = fresh()
    names = list(layer.state_dict())
    assert list(layer.freeze().state_dict()) == names
    assert list(layer.buffers()) == []


@pytest.mark.parametrize("call", [lambda m: m.eval(), lambda m: m.train(False), lambda m: m.requires_grad_(False)])
def test_eval_keeps_it(call: Callable[[nn.Module], nn.Module]) -> None:
    layer = fresh().freeze()
    call(nn.Sequential(layer))
    call(layer)
    assert is_frozen(layer)


# --- what drops it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a model"])
@pytest.mark.parametrize(
    "drop",
    [
        lambda m: m.train(),
        lambda m: m.train(True),
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
        lambda m: m.load_state_dict({}, strict=False),
    ],
    ids=["train", "train(True)", "load_state_dict", "load and assign", "load nothing"],
)
def test_dropped(drop: Callable[[nn.Module], object], inside: bool) -> None:
    layer = fresh().freeze()
    drop(nn.Sequential(layer) if inside else layer)
    assert not is_frozen(layer)


def test_other_weights_loaded_into_a_frozen_layer_are_used() -> None:
    layer, other = fresh().freeze(), fresh()
    nn.Sequential(layer).load_state_dict(nn.Sequential(other).state_dict())
    x = draw_x()
    torch.testing.assert_close(layer(x), other(x), rtol=0, atol=1e-12)


def test_unfreeze_sees_what_happened_meanwhile() -> None:
    layer = fresh().freeze()
    for p in layer.parameters():
        p.data.mul_(0.5)
    layer.unfreeze()
    assert_current(layer)
    for p in layer.parameters():
        p.data.mul_(0.5)
    assert_current(layer)


def test_freeze_again_folds_again() -> None:
    layer = fresh().freeze()
    for p in layer.parameters():
        p.data.mul_(0.5)
    layer.freeze()
    assert_current(layer)


def test_training_after_serving() -> None:
    layer = fresh().freeze()
    layer(draw_x())
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(draw_x()).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    optimizer.step()
    assert_current(layer)


# --- together with the rest -------------------------------------------------------------------------------


def test_with_parametrized_weights() -> None:
    layer = fresh()
    nn.utils.parametrizations.weight_norm(layer.w_vs)
    layer.freeze()
    assert_current(layer)
    layer.w_vs.parametrizations.weight.original0.data.mul_(2.0)
    layer.unfreeze()
    assert_current(layer)
    assert parametrize.is_parametrized(layer.w_vs)


def test_frozen_in_inference_mode_then_used_with_gradients() -> None:
    layer = fresh()
    with torch.inference_mode():
        layer.freeze()
        layer(draw_x())
    x = draw_x().requires_grad_()
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_under_autocast() -> None:
    layer, x = fresh(torch.float32), draw_x(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        layer.freeze()
        after = layer(x)
    assert before.dtype == after.dtype == torch.bfloat16 and torch.equal(before, after)


def test_an_impossible_checkpoint_leaves_the_weights() -> None:
    layer = fresh().freeze()
    state = layer.state_dict()
    state["fc_res.weight"] = torch.randn(8, 16)
    before = layer.fc_res.weight.clone()
    with pytest.raises(RuntimeError, match="n_head > 1"):
        layer.load_state_dict(state)
    assert torch.equal(layer.fc_res.weight, before)
    layer.unfreeze()
    assert_current(layer)
