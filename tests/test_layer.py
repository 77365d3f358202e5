"""The layer as an nn.Module: a drop-in for the one people have, and sound under what people do to modules."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune
from torch import Tensor, nn

from autoint_fast import InteractingLayer, ReferenceInteractingLayer, interacting_reference
from autoint_fast.weights import InteractingParameters
from tests.cases import BACKENDS, FUSED, MASK_SIZES, Shape, draw_mask, draw_problem
from tests.numerics import (
    Multiplications,
    as_three_dimensions,
    assert_close_to_truth,
    assert_rule,
    einsum,
    errors,
    expected_output,
    layer_of,
)
from tests.original import OriginalLayer

STATE = [f"{part}.{kind}" for part in ("w_qs", "w_ks", "w_vs", "fc_attn", "fc_res") for kind in ("weight", "bias")]


def assert_current(layer: ReferenceInteractingLayer, x: Tensor | None = None) -> None:
    """The layer, fp64, computes with the parameters that it has now."""
    x = torch.randn(3, 5, layer.emb_size, dtype=torch.float64) if x is None else x
    expected = expected_output(layer, x)
    assert errors(layer(x), expected).maximum <= 1e-12 * max(1.0, expected.max().item())


# --- construction and checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [InteractingLayer, ReferenceInteractingLayer])
@pytest.mark.parametrize("emb_size", [1, 10, 16])
def test_same_draws_as_the_layer_people_have(cls: type[ReferenceInteractingLayer], emb_size: int) -> None:
    torch.manual_seed(123)
    original = OriginalLayer(1, emb_size, 0.1)
    after = torch.rand(4)
    torch.manual_seed(123)
    ours = cls(1, emb_size, 0.1)
    assert torch.equal(torch.rand(4), after), "the generator is left elsewhere"
    assert list(ours.state_dict()) == list(original.state_dict()) == STATE
    for name, value in original.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("n_head", [1, 2, 8])
def test_parameters(n_head: int) -> None:
    torch.manual_seed(3)
    ours = InteractingLayer(n_head, 6)
    torch.manual_seed(3)
    reference = ReferenceInteractingLayer(n_head, 6)
    assert [name for name, _ in ours.named_parameters()] == STATE
    assert list(ours.buffers()) == []
    shapes = {
        "fc_attn.weight": (6, n_head * 6),
        "fc_res.weight": (6, 6),
        "fc_attn.bias": (6,),
        "fc_res.bias": (6,),
    }
    for name, value in ours.state_dict().items():
        wide = (n_head * 6, 6) if name.endswith("weight") else (n_head * 6,)
        assert tuple(value.shape) == shapes.get(name, wide)
        assert torch.equal(value, reference.state_dict()[name]), name


def test_signature() -> None:
    layer = InteractingLayer(2, 8, 0.3, backend="torch", device="cpu", dtype=torch.float64)
    assert layer.dropout == 0.3 and {p.dtype for p in layer.parameters()} == {torch.float64}
    for text in ("n_head=2", "emb_size=8", "dropout=0.3 (never applied)", "backend='torch'"):
        assert text in repr(layer)
    for wrong in (
        lambda: InteractingLayer(2, 8, 0.1, "torch"),
        lambda: layer(torch.zeros(1, 1, 8), None, True),
    ):
        with pytest.raises(TypeError):
            wrong()


def test_dropout_is_never_applied() -> None:
    x = torch.randn(3, 4, 8)
    for backend in BACKENDS:
        layer = InteractingLayer(2, 8, 0.9, backend=backend).train()
        assert torch.equal(layer(x), layer.eval()(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoints_of_the_layer_people_have(backend: str) -> None:
    original = OriginalLayer(1, 8)
    layer = InteractingLayer(1, 8, backend=backend)
    assert layer.load_state_dict(original.state_dict(), strict=True) == ([], [])
    x = torch.randn(4, 5, 8)
    torch.testing.assert_close(layer(x), original(x))
    other = OriginalLayer(1, 8)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x), original(x))


@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_of_the_reference(assign: bool) -> None:
    reference, layer = ReferenceInteractingLayer(3, 8), InteractingLayer(3, 8)
    file = io.BytesIO()
    torch.save(reference.state_dict(), file)
    file.seek(0)
    layer.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=assign)
    x = torch.randn(4, 5, 8)
    torch.testing.assert_close(layer(x), reference(x))
    reference.load_state_dict(InteractingLayer(3, 8).state_dict(), strict=True)


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a model"])
@pytest.mark.parametrize("cls", [InteractingLayer, ReferenceInteractingLayer])
def test_impossible_residual_is_refused(cls: type[ReferenceInteractingLayer], inside: bool) -> None:
    original, layer = OriginalLayer(2, 8), cls(2, 8)
    target = nn.Sequential(nn.Identity(), layer) if inside else layer
    source = nn.Sequential(nn.Identity(), original) if inside else original
    name = "1.fc_res.weight" if inside else "fc_res.weight"
    before = layer.fc_res.weight.clone()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=rf"{name}.*n_head > 1.*Linear\(emb_size, emb_size\)"):
            target.load_state_dict(source.state_dict(), strict=strict)
    assert torch.equal(layer.fc_res.weight, before)


@pytest.mark.parametrize("strict", [True, False])
def test_other_misfits_are_torchs_errors(strict: bool) -> None:
    state = InteractingLayer(2, 8).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for w_qs"):
        InteractingLayer(3, 8).load_state_dict(state, strict=strict)
    state.pop("w_ks.bias")
    if strict:
        with pytest.raises(RuntimeError, match="Missing key"):
            InteractingLayer(2, 8).load_state_dict(state)
    else:
        assert InteractingLayer(2, 8).load_state_dict(state, strict=False).missing_keys == ["w_ks.bias"]


# --- copies, dtypes, devices ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "copy", "pickle"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_copies(copied: Callable[[InteractingLayer], InteractingLayer], backend: str) -> None:
    layer = InteractingLayer(2, 8, backend=backend).double()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    layer(x).sum().backward()
    twin = copied(layer)
    assert twin.backend == backend
    assert torch.equal(twin(x), layer(x))
    assert_current(twin)


def test_a_deep_copy_is_independent() -> None:
    layer = InteractingLayer(2, 8)
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 4, 8)
    before = layer(x).detach()
    twin.w_vs.weight.data.mul_(2)
    assert torch.equal(layer(x), before) and not torch.equal(twin(x), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_to_another_dtype(dtype: torch.dtype) -> None:
    def forward(x: Tensor, p: InteractingParameters, n_head: int, mask: Tensor | None) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(STATE, p, strict=True)), (x, mask))

    layer = InteractingLayer(2, 16).to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert_rule(forward, [draw_problem(Shape(5, 7, 16, 2), dtype) for _ in range(4)])


def test_half_and_friends() -> None:
    x = torch.randn(2, 3, 8)
    for name, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)):
        layer = getattr(InteractingLayer(2, 8), name)()
        out = layer(x.to(dtype))
        assert out.dtype == dtype
        out.sum().backward()
        assert all(p.grad.dtype == dtype for p in layer.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_device(backend: str) -> None:
    torch.manual_seed(0)
    layer = InteractingLayer(2, 8, backend=backend, device="meta")
    if backend not in FUSED:  # "auto" takes the reference
        out = layer(torch.empty(3, 4, 8, device="meta"), torch.ones(3, 1, 4, dtype=torch.bool, device="meta"))
        assert out.shape == (3, 4, 8) and out.device.type == "meta"
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(InteractingLayer(2, 8).state_dict())
    assert_current(layer.double())


def test_meta_device_context_and_forward_backward() -> None:
    with torch.device("meta"):
        layer = InteractingLayer(2, 8)
        x = torch.empty(3, 4, 8, requires_grad=True)
        out, attention = layer(x, return_attention=True)
    assert attention.shape == (3, 2, 4, 4)
    out.sum().backward()
    assert x.grad.shape == x.shape and layer.w_ks.bias.grad.device.type == "meta"


def test_default_dtype_and_device_keywords() -> None:
    layer = InteractingLayer(2, 8, dtype=torch.bfloat16)
    assert layer(torch.randn(2, 3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


# --- inputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(0, 7), (3, 1), (1, 1), (0, 1), (3, 0), (0, 0)], ids=str)
def test_empty_and_single(size: tuple[int, int], backend: str) -> None:
    b, f = size
    layer = InteractingLayer(2, 8, backend=backend)
    x = torch.randn(b, f, 8, requires_grad=True)
    for mask in (None, *(torch.zeros(s(b, f), dtype=torch.bool) for s in MASK_SIZES.values())):
        out, attention = layer(x, mask, return_attention=True)
        assert out.shape == (b, f, 8) and attention.shape == (b, 2, f, f)
        out.sum().backward()
        assert x.grad.shape == x.shape
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_given_as_two_dimensions_are_per_query(backend: str) -> None:
    """B = F leaves (B, F) and (F, F) alike: two dimensions are always (F, F)."""
    problem = draw_problem(Shape(5, 5, 8, 2))
    mask = draw_mask("(F,F)", 5, 5)
    layer = layer_of(problem, backend)
    assert torch.equal(layer(problem.x, mask), layer(problem.x, mask[None].expand(5, 5, 5)))
    torch.testing.assert_close(
        layer(problem.x, mask)[0], einsum(problem.x[:1], problem.p, 2, mask)[0], rtol=1e-5, atol=1e-5
    )


def test_in_place_change_before_backward_is_noticed() -> None:
    """What the backward needs and finds changed raises, as with torch's own relu and linear."""
    layer = InteractingLayer(2, 8, backend="torch")
    x = torch.randn(3, 4, 8)
    for change in ("out", "x", "parameter"):
        given = x.clone()
        out = layer(given)
        with torch.no_grad():
            {"out": out, "x": given, "parameter": layer.w_qs.weight}[change].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_backward_twice_needs_retain_graph() -> None:
    layer = InteractingLayer(2, 8, backend="torch")
    out = layer(torch.randn(3, 4, 8)).sum()
    out.backward(retain_graph=True)
    first = layer.w_qs.weight.grad.clone()
    out.backward()
    torch.testing.assert_close(layer.w_qs.weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


def test_plain_tensor_subclass() -> None:
    class Tagged(Tensor):
        pass

    layer = InteractingLayer(2, 8)
    x = torch.randn(3, 4, 8)
    out = layer(x.as_subclass(Tagged).requires_grad_())
    assert isinstance(out, Tagged)
    torch.testing.assert_close(out.detach().as_subclass(Tensor), expected_output(layer, x))
    out.sum().backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    layer(x).sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, msg=name)


# --- never stale ------------------------------------------------------------------------------------------


def _step(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    layer(torch.randn(4, 5, 8, dtype=torch.float64)).square().sum().backward()
    optimizer.step()


def _load(layer: nn.Module) -> None:
    layer.load_state_dict(InteractingLayer(2, 8).state_dict())


def _replace_data(layer: InteractingLayer) -> None:
    layer.w_vs.weight.data = torch.randn(16, 8, dtype=torch.float64)


def _ema(layer: nn.Module) -> None:
    for p in layer.parameters():
        p.data.mul_(0.7)


def _in_place(layer: nn.Module) -> None:
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1)


def _new_parameter(layer: InteractingLayer) -> None:
    layer.fc_attn.weight = nn.Parameter(torch.randn(8, 16, dtype=torch.float64))


def _new_module(layer: InteractingLayer) -> None:
    layer.w_qs = nn.Linear(8, 16, dtype=torch.float64)


def _vector(layer: nn.Module) -> None:
    flat = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(torch.randn_like(flat), layer.parameters())


CHANGES: dict[str, Callable[[InteractingLayer], None]] = {
    "sgd": lambda layer: _step(layer, torch.optim.SGD(layer.parameters(), 0.1)),
    "sgd foreach": lambda layer: _step(layer, torch.optim.SGD(layer.parameters(), 0.1, foreach=True)),
    "adam fused": lambda layer: _step(layer, torch.optim.Adam(layer.parameters(), 0.1, fused=True)),
    "load_state_dict": _load,
    "data replaced": _replace_data,
    "data.mul_": _ema,
    "in place": _in_place,
    "new parameter": _new_parameter,
    "new module": _new_module,
    "vector_to_parameters": _vector,
}


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_never_stale(change: str, mode: str, backend: str) -> None:
    layer = InteractingLayer(2, 8, backend=backend, dtype=torch.float64).train(mode == "train")
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    for _ in range(2):
        with context():
            before = layer(x).detach()
            assert_current(layer, x)
        CHANGES[change](layer)
        with context():
            assert not torch.allclose(layer(x), before), "the change changed nothing"
            assert_current(layer, x)


@pytest.mark.parametrize("name", STATE)
def test_never_stale_in_any_parameter(name: str) -> None:
    layer = InteractingLayer(2, 8, dtype=torch.float64).eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        before = layer(x)
        dict(layer.named_parameters())[name].data.mul_(3.0)
        after = layer(x)
    assert_current(layer, x)
    assert torch.equal(after, before) == (name == "w_ks.bias")


def test_averaged_model() -> None:
    layer = InteractingLayer(2, 8).double()
    average = torch.optim.swa_utils.AveragedModel(layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        _step(layer, torch.optim.SGD(layer.parameters(), 0.1))
        average.update_parameters(layer)
        assert_current(average.module)


# --- weights that are not plain parameters ----------------------------------------------------------------


def _grads(layer: nn.Module, x: Tensor, out: Tensor, grad: Tensor) -> dict[str, Tensor]:
    leaves = {"x": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)
    return {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(leaves, grads, strict=True)}


def assert_as_reference(layer: InteractingLayer, mask: Tensor | None = None) -> None:
    """Output and gradients of every leaf behind the weights, against autograd through the definition."""
    x = torch.randn(3, 5, layer.emb_size, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, layer.emb_size, dtype=torch.float64)
    ours = layer(x, mask)
    truth, _ = interacting_reference(x, layer.interacting_parameters(), layer.n_head, as_three_dimensions(mask))
    assert_close_to_truth("out", ours, truth, truth.detach())
    got, expected = _grads(layer, x, ours, grad), _grads(layer, x, truth, grad)
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        assert errors(got[name], value).maximum <= 1e-12 * largest, f"gradient of {name}"


class Squared(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * weight.abs()


@pytest.mark.parametrize("part", ["w_qs", "w_ks", "w_vs", "fc_attn", "fc_res"])
def test_parametrized_weights(part: str) -> None:
    layer = InteractingLayer(2, 4, backend="torch", dtype=torch.float64)
    nn.utils.parametrizations.weight_norm(getattr(layer, part))
    parametrize.register_parametrization(getattr(layer, part), "bias", Squared())
    for _ in range(2):
        assert_as_reference(layer)
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(torch.randn_like(p))
    parametrize.remove_parametrizations(getattr(layer, part), "weight")
    assert_as_reference(layer)


def test_parametrization_is_computed_once_per_weight_and_call() -> None:
    """Spectral norm's power iteration moves with every evaluation."""
    calls = 0

    class Counting(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return weight

    layer = InteractingLayer(2, 4)
    parametrize.register_parametrization(layer.w_qs, "weight", Counting())
    calls = 0
    layer(torch.randn(2, 3, 4)).sum().backward()
    assert calls == 1


def test_tied_weights() -> None:
    layer = InteractingLayer(2, 4, backend="torch", dtype=torch.float64)
    layer.w_ks.weight = layer.w_qs.weight
    layer.w_ks.bias = layer.w_vs.bias
    layer.fc_res.bias = layer.fc_attn.bias
    assert len(list(layer.parameters())) == 7
    assert_as_reference(layer)
    # Two layers that are one.
    shared = InteractingLayer(2, 4, backend="torch", dtype=torch.float64)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    shared(shared(x)).sum().backward()
    got = {name: p.grad.clone() for name, p in shared.named_parameters()}
    shared.zero_grad()
    p = shared.interacting_parameters()
    interacting_reference(interacting_reference(x, p, 2)[0], p, 2)[0].sum().backward()
    for name, parameter in shared.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=0, atol=1e-12, msg=name)


def test_functional_call() -> None:
    layer = InteractingLayer(2, 4, backend="torch", dtype=torch.float64)
    other = {name: torch.randn_like(p, requires_grad=True) for name, p in layer.named_parameters()}
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    out = torch.func.functional_call(layer, other, (x,))
    truth, _ = interacting_reference(x, InteractingParameters(*other.values()), 2)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-12)
    grads = torch.autograd.grad(out.sum(), list(other.values()))
    for got, expected in zip(grads, torch.autograd.grad(truth.sum(), list(other.values())), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert all(p.grad is None for p in layer.parameters())


def _prune(layer: InteractingLayer) -> Tensor:
    prune.l1_unstructured(layer.w_qs, "weight", 0.5)
    return layer.w_qs.weight_orig


def _spectral_norm(layer: InteractingLayer) -> Tensor:
    nn.utils.spectral_norm(layer.w_qs)
    return layer.w_qs.weight_orig


@pytest.mark.parametrize("rewrite", [_prune, _spectral_norm], ids=["prune", "spectral_norm"])
def test_weights_that_a_hook_computes(rewrite: Callable[[InteractingLayer], Tensor]) -> None:
    """Pruning and hook-based norms compute a weight in a hook of the projection's own forward.

    The layer never calls that forward, so such a weight is refused, or brought up to date, but never stale.
    """
    layer = InteractingLayer(2, 8).eval()
    original = rewrite(layer)
    x = torch.randn(3, 5, 8)
    try:
        with torch.no_grad():
            layer(x)
            original.neg_()
            out = layer(x)
    except RuntimeError as error:
        assert "w_qs" in str(error) and "hook" in str(error)
        return
    layer.w_qs(x)  # runs the hook
    torch.testing.assert_close(out, expected_output(layer, x))


def test_hooks_on_projections_run_or_are_refused() -> None:
    """A hook that never fires would be a silent difference from the layer people have."""
    layer = InteractingLayer(2, 8)
    fired: list[str] = []
    layer.w_qs.register_forward_hook(lambda *_: fired.append("w_qs"))
    try:
        layer(torch.randn(3, 5, 8))
    except RuntimeError as error:
        assert "w_qs" in str(error) and "hook" in str(error)
        return
    assert fired == ["w_qs"]


def test_projection_with_a_forward_of_its_own_runs_or_is_refused() -> None:
    """Adapters replace a projection by one that computes more than x W + b."""

    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer = InteractingLayer(2, 8, dtype=torch.float64)
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        doubled.w_vs.weight.mul_(2), doubled.w_vs.bias.mul_(2)
    layer.w_vs = Adapted(8, 16, dtype=torch.float64)
    layer.load_state_dict(doubled.state_dict())
    with torch.no_grad():
        layer.w_vs.weight.div_(2), layer.w_vs.bias.div_(2)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    try:
        out = layer(x)
    except (RuntimeError, TypeError) as error:
        assert "w_vs" in str(error) and "Linear" in str(error)
        return
    torch.testing.assert_close(out, doubled(x))


def test_hooks_on_the_layer() -> None:
    layer = InteractingLayer(2, 8)
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer(torch.randn(3, 5, 8, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"]


# --- return_attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, "(B,1,F)", "(B,F,F)", "(F,F)"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_return_attention(backend: str, form: str | None) -> None:
    mask = None if form is None else draw_mask(form, 3, 5)
    problem = draw_problem(Shape(3, 5, 4, 2), torch.float64, mask)
    layer = layer_of(problem, backend)
    x = problem.x.requires_grad_()
    out, attention = layer(x, mask, return_attention=True)
    assert torch.equal(out, layer(x, mask)) and out.dtype == attention.dtype == torch.float64
    truth, expected = interacting_reference(x, layer.interacting_parameters(), 2, as_three_dimensions(mask))
    expected = expected.transpose(0, 1)
    torch.testing.assert_close(attention, expected, rtol=0, atol=1e-13)
    assert attention.shape == (3, 2, 5, 5)
    if mask is not None:
        empty = mask.all(-1).broadcast_to(3, 5)
        assert not attention.transpose(1, 2)[empty].any()
        hidden = mask.broadcast_to(3, 5, 5)[:, None].expand(3, 2, 5, 5)
        assert not attention[hidden].any()
    grad, grad_attention = torch.randn_like(out), torch.randn_like(attention)
    leaves = [x, *layer.parameters()]
    got = torch.autograd.grad([out, attention], leaves, [grad, grad_attention])
    expected_grads = torch.autograd.grad([truth, expected], leaves, [grad, grad_attention])
    for one, two in zip(got, expected_grads, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-11)


def test_attention_costs_nothing_unless_asked_for() -> None:
    b, f, e, h = 4, 9, 16, 2
    layer = InteractingLayer(h, e, backend="torch").eval()
    x = torch.randn(b, f, e)
    counts = []
    with torch.no_grad():
        for _ in range(2):  # what a layer keeps of its last calls is not what is counted
            layer(x)
        for asked in (False, True):
            with Multiplications() as counter:
                layer(x, return_attention=asked)
            counts.append(counter.count)
    folding = h * (e + 1) * e * e + h * e * e * e + h * e * e  # A and c, M, g
    assert counts[0] <= b * f * h * e * (2 * e + 2 * f) + b * f * e * e + folding
    assert counts[1] >= counts[0] + b * f * h * e * (2 * e + f)  # Q, K and the scores


# --- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_training_follows_the_reference(backend: str) -> None:
    """The same losses as the reference's over steps of Adam, w_ks.bias and weight decay included."""
    losses = []
    for which in (backend, "reference"):
        torch.manual_seed(5)
        model = nn.Sequential(
            InteractingLayer(2, 8, backend=which),
            InteractingLayer(1, 8, backend=which),
            nn.Flatten(),
            nn.Linear(40, 1),
        ).double()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        x, y = torch.randn(64, 5, 8, dtype=torch.float64), torch.rand(64, 1, dtype=torch.float64).round()
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.7 * losses[0][0]
    ours, truth = (torch.tensor(run, dtype=torch.float64) for run in losses)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-9)


def test_freezing_parameters() -> None:
    """requires_grad_(False) on any subset, alone and with an input that wants its gradient."""
    layer = InteractingLayer(2, 4, backend="torch", dtype=torch.float64)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    for frozen in (STATE, STATE[:4], STATE[4:], ["w_ks.weight"], ["fc_res.weight", "fc_res.bias"]):
        layer.zero_grad(set_to_none=True)
        layer.requires_grad_(True)
        for name in frozen:
            layer.get_parameter(name).requires_grad_(False)
        given = x.clone().requires_grad_()
        layer(given).sum().backward()
        truth_x = x.clone().requires_grad_()
        leaves = [truth_x, *(p for p in layer.parameters() if p.requires_grad)]
        truth, _ = interacting_reference(truth_x, layer.interacting_parameters(), 2)
        expected = torch.autograd.grad(truth.sum(), leaves)
        torch.testing.assert_close(given.grad, expected[0], rtol=0, atol=1e-12)
        trained = [p for p in layer.parameters() if p.requires_grad]
        for p, value in zip(trained, expected[1:], strict=True):
            torch.testing.assert_close(p.grad, value, rtol=0, atol=1e-12)
        assert all(layer.get_parameter(name).grad is None for name in frozen)


# --- what comes out is the caller's -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [3, 2000])
def test_output_can_be_changed_in_place(backend: str, batch: int) -> None:
    layer, x = InteractingLayer(2, 16, backend=backend), torch.randn(batch, 5, 16)
    layer(x)[:, 0] = 0
    with torch.no_grad():
        out = layer(x)
    out.mul_(torch.ones(1, requires_grad=True)).sum().backward()
    with torch.no_grad():
        layer(x).detach_()


def test_a_first_call_under_another_default_device() -> None:
    layer, x = InteractingLayer(3, 9), torch.randn(2, 5, 9)
    with torch.device("meta"):
        inside = layer(x)
    assert torch.equal(layer(x), inside) and inside.device.type == "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hidden_field_may_hold_anything_finite(backend: str) -> None:
    """Its score with itself overflows to NaN, which the mask hides."""
    layer, x = InteractingLayer(2, 16, backend=backend), torch.randn(2, 5, 16)
    x[0, 3] = 1e21 * torch.randn(16)
    x.requires_grad_()
    mask = torch.zeros(2, 1, 5, dtype=torch.bool)
    mask[0, 0, 3] = True
    out = layer(x, mask)
    assert out[:, [0, 1, 2, 4]].isfinite().all()
    out[:, [0, 1, 2, 4]].sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
