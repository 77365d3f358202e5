"""accelerate, restore and register_adapter, with stand-ins for the layers of libraries; test_libraries.py has those."""

from __future__ import annotations

import copy
import io
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import autoint_fast
from autoint_fast import (
    InteractingLayer,
    InteractingParameters,
    Interaction,
    ReferenceInteractingLayer,
    accelerate,
    libraries,
    register_adapter,
    restore,
    swap,
)
from autoint_fast.libraries import Accelerated
from benchmarks.model_zoo import MultiHeadSelfAttention
from tests.numerics import assert_close_to_truth
from tests.swapping import Stack, assert_same_numbers, run, torchfm_model

BACKENDS = ("auto", "torch", "reference")


class Toy(nn.Module):
    """Somebody's layer: two heads of 3, unscaled, no residual, with a weight of an odd layout."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.Parameter(torch.randn(3, 8, 6) / 2)
        self.calls = 0

    def forward(self, x: Tensor, power: float = 1.0) -> Tensor:
        self.calls += 1
        q, k, v = (x @ w for w in self.projections)
        heads = []
        for h in (slice(0, 3), slice(3, 6)):
            p = torch.softmax(q[..., h] @ k[..., h].mT, dim=-1) ** power
            heads.append(p @ v[..., h])
        return torch.relu(torch.cat(heads, -1))


def adapt_toy(toy: Any) -> Interaction | str:
    w_q, w_k, w_v = toy.projections.mT.unbind()
    return Interaction(InteractingParameters(w_q, None, w_k, None, w_v, None, None, None, None, None), 2, 1.0, "none")


class Standard(Toy):
    """Keeps Toy's forward."""


class Forgetful(Toy):
    """Pickled without what it can do without."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "calls": -1}


class Doubled(Toy):
    def forward(self, x: Tensor, power: float = 1.0) -> Tensor:
        return 2 * super().forward(x, power)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(libraries, "_registered", {})
    register_adapter(Toy, adapt_toy)
    yield


def children(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(module)) for name, module in model.named_modules()}


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def model_of_all() -> nn.Module:
    """A layer of every kind that needs no library."""
    return nn.ModuleDict(
        {
            "toy": Toy(),
            "own": ReferenceInteractingLayer(2, 8),
            "fuxictr": MultiHeadSelfAttention(8, 12, 3, use_scale=True),
            "normed": MultiHeadSelfAttention(8, 8, 2, layer_norm=True),
            "torchfm": torchfm_model(),
        }
    )


class OtherStack(Stack):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward(x, **options)


# --- numbers --------------------------------------------------------------------------------------------------

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "registered": Toy,
    "own": lambda: ReferenceInteractingLayer(2, 8),
    "own, one head": lambda: ReferenceInteractingLayer(1, 8),
    "fuxictr": lambda: MultiHeadSelfAttention(8, 12, 3, use_scale=True),
    "fuxictr, wider": lambda: MultiHeadSelfAttention(8, 40, 2),
    "fuxictr, identity": lambda: MultiHeadSelfAttention(8, 8, 2),
    "fuxictr, no residual": lambda: MultiHeadSelfAttention(8, 8, 2, use_residual=False),
    "fuxictr, norm": lambda: MultiHeadSelfAttention(8, 8, 2, layer_norm=True),
    "fuxictr, norm, wider": lambda: MultiHeadSelfAttention(8, 12, 1, layer_norm=True),
    "mha": torchfm_model,
    "mha, batch first": lambda: torchfm_model(batch_first=True),
    "mha, no bias": lambda: torchfm_model(bias=False),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAKERS)
def test_numbers(name: str, backend: str) -> None:
    layer = MAKERS[name]()
    plain = copy.deepcopy(layer)
    report = accelerate(layer, backend=backend)
    assert report.replaced and not report.left, report
    assert_same_numbers(plain, layer, [torch.randn(16, 7, 8) for _ in range(8)])


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_gradients_of_weights_are_long_sums(backend: str) -> None:
    """Over the fields of all samples, with heads narrower than any vector of a CPU."""
    plain = MultiHeadSelfAttention(16, 16, 2)
    ours = copy.deepcopy(plain)
    accelerate(ours, backend=backend)
    assert_same_numbers(plain, ours, [torch.randn(64, 39, 16) for _ in range(4)])


@pytest.mark.parametrize("name", MAKERS)
def test_under_autocast(name: str) -> None:
    layer = MAKERS[name]()
    x = torch.randn(64, 5, 8)
    truth = copy.deepcopy(layer).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        accelerate(layer, backend="torch")
        got = layer(x)
    assert got.dtype == expected.dtype
    assert_close_to_truth("out", got, expected, truth, unit=torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("name", MAKERS)
def test_dtypes_and_serving(name: str, backend: str) -> None:
    """Without gradients, with weights that change in between, in low precision, frozen."""
    layer = MAKERS[name]().eval()
    plain = copy.deepcopy(layer)
    accelerate(layer, backend=backend)
    x = torch.randn(6, 5, 8)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(layer(x), plain(x))
            for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
                p.data.mul_(0.9), q.data.mul_(0.9)
        for p in layer.parameters():
            # Other memory behind the same parameter.
            p.data = p.data.clone() * 0.5
        for q in plain.parameters():
            q.mul_(0.5)
        torch.testing.assert_close(layer(x), plain(x))
        frozen = [m.freeze() for m in layer.modules() if isinstance(m, Accelerated)]
        assert frozen and "frozen" in repr(layer)
        torch.testing.assert_close(layer(x), plain(x))
        layer.train()
        low, usual = layer.bfloat16()(x.bfloat16()), plain.bfloat16()(x.bfloat16())
    torch.testing.assert_close(low, usual, rtol=0.05, atol=0.05)


def test_serving_folds_once() -> None:
    """Though the transposed weights are other views at every call."""
    layer = Toy()
    accelerate(layer, backend="torch")
    for surroundings in (torch.no_grad, torch.inference_mode):
        with surroundings():
            layer(torch.randn(2, 5, 8))
            kept = layer._last
            layer(torch.randn(2, 5, 8))
        assert kept is not None and layer._last is kept


# --- the model stays the model --------------------------------------------------------------------------------


def test_everything_stays_and_comes_back() -> None:
    model = model_of_all()
    seen: list[object] = []
    model["toy"].register_forward_hook(lambda module, args, out: seen.append(module))
    optimizer = torch.optim.Adam(model.parameters())
    before, names, kinds = children(model), list(model.state_dict()), classes(model)
    parameters = dict(model.named_parameters())
    report = accelerate(model, backend="torch")
    assert [r.name for r in report.replaced] == [
        *("toy", "own", "fuxictr", "normed", "torchfm.self_attns.0", "torchfm.self_attns.1")
    ]
    assert model["toy"].calls == 0 and not model["toy"].projections.grad
    assert list(model.state_dict()) == names and dict(model.named_parameters()) == parameters
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds, strict=True))
    assert all(type(m).__name__ == kind.__name__ for m, kind in zip(model.modules(), kinds, strict=True))
    assert "accelerated, backend='torch'" in repr(model)
    x = torch.randn(3, 5, 8)
    loss = sum(module(x).square().mean() for module in model.values())
    loss.backward()
    optimizer.step()
    assert seen == [model["toy"]] and model["toy"].calls == 0
    assert all(p.grad is not None for p in model.parameters())
    model.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = [module(x) for module in model.values()]
    restore(model)
    assert classes(model) == kinds
    after = children(model)
    assert after.keys() == before.keys()
    for name, state in after.items():
        assert state.keys() == before[name].keys()
        assert all(state[key] is before[name][key] for key in state), name
    for out, module in zip(expected, model.values(), strict=True):
        torch.testing.assert_close(module(x), out)
    assert model["toy"].calls == 1


def test_twice_changes_nothing() -> None:
    model = model_of_all()
    accelerate(model, backend="torch")
    before, kinds = children(model), classes(model)
    report = accelerate(model, backend="reference", keep_attention=True)
    assert not report.replaced and len(report.left) == 6
    assert all("accelerated already, backend='torch'" in left.reason for left in report.left)
    assert children(model) == before and classes(model) == kinds
    restore(model)
    restore(model)
    assert not any(isinstance(module, Accelerated) for module in model.modules())


def test_the_model_itself() -> None:
    layer = Toy()
    report = accelerate(layer, backend="torch")
    assert isinstance(layer, Accelerated) and report.replaced[0].name == ""
    assert "(the model)" in str(report)
    restore(layer)
    assert type(layer) is Toy


def test_a_shared_module_is_taken_once() -> None:
    toy = Toy()
    model = nn.Sequential(toy, nn.Linear(6, 8), toy)
    assert [r.name for r in accelerate(model, backend="torch").replaced] == ["0"]
    assert model[0] is model[2]


def test_tied_weights() -> None:
    model = nn.ModuleList([Toy(), Toy()])
    model[1].projections = model[0].projections
    plain = copy.deepcopy(model)
    accelerate(model, backend="torch")
    x = torch.randn(3, 5, 8)
    for m in (plain, model):
        (m[0](x) + m[1](x)).sum().backward()
    assert model[1].projections is model[0].projections and len(list(model.parameters())) == 1
    torch.testing.assert_close(model[0].projections.grad, plain[0].projections.grad)


def test_state_dict_into_a_frozen_layer() -> None:
    layer, other = Toy().eval(), Toy().eval()
    accelerate(layer, backend="torch")
    layer.freeze()
    layer.load_state_dict(other.state_dict())
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(layer(x), other(x))


def save_and_load(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load], ids=["deepcopy", "pickle", "save"]
)
def test_copies(again: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.ModuleDict({"toy": Toy(), "own": ReferenceInteractingLayer(2, 8), "fuxictr": MultiHeadSelfAttention(8)})
    before = children(model)
    x = torch.randn(3, 5, 8)
    expected = [module(x) for module in model.values()]
    accelerate(model, backend="torch")
    with torch.no_grad():
        # There is something to leave behind.
        [module(x) for module in model.values()]
    twin = again(model)
    assert classes(twin) == classes(model) and twin["toy"].backend == "torch"
    for module, out in zip(twin.values(), expected, strict=True):
        torch.testing.assert_close(module(x), out)
    restore(twin)
    assert [type(module) for module in twin.values()] == [Toy, ReferenceInteractingLayer, MultiHeadSelfAttention]
    assert isinstance(model["toy"], Accelerated)
    for name, state in children(twin).items():
        assert state.keys() == before[name].keys() - {"calls"} | ({"calls"} & before[name].keys())
    for module, out in zip(twin.values(), expected, strict=True):
        torch.testing.assert_close(module(x), out, rtol=0, atol=0)


def test_a_state_of_the_class_s_own_is_kept() -> None:
    layer, x = Forgetful(), torch.randn(3, 5, 8)
    accelerate(layer, backend="torch")
    with torch.no_grad():
        layer(x)
    twin = pickle.loads(pickle.dumps(layer))
    assert twin.calls == -1 and twin._last is None
    torch.testing.assert_close(twin(x), layer(x))


def test_the_class_is_importable() -> None:
    layer = Toy()
    accelerate(layer, backend="torch")
    cls = type(layer)
    assert pickle.loads(pickle.dumps(cls)) is cls and cls.__name__ == "Toy"
    other = Toy()
    accelerate(other, backend="torch")
    assert type(other) is cls
    with pytest.raises(AttributeError, match="no attribute 'anything'"):
        autoint_fast.accelerated.anything  # noqa: B018


def test_unpickling_needs_the_adapter() -> None:
    layer = Toy()
    accelerate(layer, backend="torch")
    pickled = pickle.dumps(layer)
    libraries._registered.clear()
    with pytest.raises(LookupError, match="call register_adapter first"):
        pickle.loads(pickled)


def _in_child(layer: nn.Module, x: Tensor, queue: Any) -> None:
    queue.put((isinstance(layer, Accelerated), layer(x).tolist()))


def test_in_a_spawned_process() -> None:
    layer = MultiHeadSelfAttention(8, 8, 2)
    accelerate(layer, backend="torch")
    x = torch.randn(2, 3, 8)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(layer, x, queue))
    child.start()
    taken, out = queue.get(timeout=120)
    child.join()
    assert taken
    torch.testing.assert_close(torch.tensor(out), layer(x).detach())


def test_a_class_that_is_gone_is_not_kept() -> None:
    class Passing(Toy):
        pass

    layer = Passing()
    accelerate(layer, backend="torch")
    gone = weakref.ref(type(layer))
    restore(layer)
    assert gone() is not None
    del Passing, layer
    import gc

    gc.collect()
    assert gone() is None


# --- hooks, parametrizations, pruning -------------------------------------------------------------------------


class Halved(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / 2


@pytest.mark.parametrize("first", ["parametrize", "accelerate"])
@pytest.mark.parametrize("removed", ["restore", "parametrization"])
def test_parametrizations(first: str, removed: str) -> None:
    layer, plain = Toy(), Toy()
    plain.load_state_dict({"projections": layer.projections.detach() / 2})
    x = torch.randn(3, 5, 8)
    if first == "accelerate":
        accelerate(layer, backend="torch")
    parametrize.register_parametrization(layer, "projections", Halved())
    if first == "parametrize":
        assert accelerate(layer, backend="torch").replaced
    assert isinstance(layer, Accelerated) and parametrize.is_parametrized(layer)
    torch.testing.assert_close(layer(x), plain(x))
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), plain(x))
    for how in (removed, {"restore": "parametrization", "parametrization": "restore"}[removed]):
        if how == "restore":
            restore(layer)
            assert not isinstance(layer, Accelerated)
            # A copy has the same class, until one of the two changes.
            assert isinstance(twin, Accelerated)
        else:
            parametrize.remove_parametrizations(layer, "projections")
        torch.testing.assert_close(layer(x), plain(x))
    assert type(layer) is Toy and layer.calls == (2 if removed == "restore" else 1)


@pytest.mark.parametrize("where", ["W_q", "dot_attention"])
def test_a_hook_inside_takes_the_original(where: str) -> None:
    layer = MultiHeadSelfAttention(8, 8, 2)
    accelerate(layer, backend="torch")
    calls: list[object] = []
    handle = getattr(layer, where).register_forward_hook(lambda *args: calls.append(args))
    x = torch.randn(3, 5, 8)
    hooked = layer(x)
    assert len(calls) == 1
    report = accelerate(nn.Sequential(copy.deepcopy(layer)))
    assert not report.replaced
    handle.remove()
    torch.testing.assert_close(layer(x), hooked)
    assert len(calls) == 1


def test_a_pruned_projection_and_one_with_a_parametrization() -> None:
    layer, plain = MultiHeadSelfAttention(8, 8, 2), MultiHeadSelfAttention(8, 8, 2)
    plain.load_state_dict(layer.state_dict())
    accelerate(layer, backend="torch")
    x = torch.randn(3, 5, 8)
    for m in (layer, plain):
        prune.l1_unstructured(m.W_q, "weight", amount=0.5)
        parametrize.register_parametrization(m.W_k, "weight", Halved())
    torch.testing.assert_close(layer(x), plain(x))
    for m in (layer, plain):
        # What the optimizer changes is not what the projection last computed.
        m.W_q.weight_orig.data.mul_(2)
    torch.testing.assert_close(layer(x), plain(x))


# --- calls that are left to the original code -----------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [lambda: MultiHeadSelfAttention(8, 8, 2, dropout_rate=0.5), lambda: torchfm_model(dropout=0.5)],
    ids=["fuxictr", "mha"],
)
def test_dropout_is_applied_while_training_only(make: Callable[[], nn.Module]) -> None:
    layer = make()
    plain = copy.deepcopy(layer)
    report = accelerate(layer, backend="torch")
    assert all(r.notes == "dropout 0.5: fused in eval mode only" for r in report.replaced)
    x = torch.randn(3, 5, 8)
    outs = []
    for m in (layer, plain):
        torch.manual_seed(1)
        outs.append(m(x))
    assert torch.equal(*outs) and not torch.equal(outs[0], layer(x))
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


def test_further_arguments_take_the_original() -> None:
    layer, x = Toy(), torch.randn(3, 5, 8)
    expected = layer(x, 2.0)
    accelerate(layer, backend="torch")
    layer(x)
    assert layer.calls == 1
    assert torch.equal(layer(x, 2.0), expected) and torch.equal(layer(x, power=2.0), expected)
    assert layer.calls == 3


@pytest.mark.parametrize("x", [torch.zeros(5, 8), torch.zeros(2, 3, 7), torch.zeros(2, 2, 3, 8)], ids=lambda x: x.shape)
def test_other_inputs_take_the_original(x: Tensor) -> None:
    layer = Toy()
    accelerate(layer, backend="torch")
    if x.shape[-1] == 8:
        assert torch.equal(layer(x), torch.zeros(*x.shape[:-1], 6))
    else:
        with pytest.raises(RuntimeError, match=r"cannot be multiplied|size"):
            layer(x)
    assert layer.calls == 1


def test_transforms_take_what_they_need() -> None:
    layer, plain = Toy(), Toy()
    plain.load_state_dict(layer.state_dict())
    accelerate(layer)
    x = torch.randn(2, 3, 5, 8)
    with torch.no_grad():
        layer(x[0])
    torch.testing.assert_close(torch.func.vmap(layer)(x), plain(x))
    torch.testing.assert_close(
        torch.func.grad(lambda x: layer(x).sum())(x[0]), torch.func.grad(lambda x: plain(x).sum())(x[0])
    )


# --- nn.MultiheadAttention ------------------------------------------------------------------------------------

PADDING = torch.tensor([[False, False, True, False, True], [False] * 5, [True, False, False, False, False]])
PAIRS = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"need_weights": False},
        {"key_padding_mask": PADDING},
        {"attn_mask": PAIRS},
        {"key_padding_mask": PADDING[1:2].expand(3, 5), "attn_mask": PAIRS},
        {"attn_mask": torch.zeros(5, 5).masked_fill(PAIRS, -math.inf)},
        {"attn_mask": torch.randn(5, 5)},
        {"attn_mask": PAIRS.expand(6, 5, 5)},
        {"key_padding_mask": torch.randn(3, 5)},
        {"attn_mask": PAIRS, "is_causal": True, "need_weights": False},
    ],
)
def test_masks_of_multihead_attention(batch_first: bool, options: dict[str, Any]) -> None:
    layer = torchfm_model(batch_first=batch_first)
    x = torch.randn(3, 5, 8)
    expected = layer(x, **options)
    accelerate(layer, backend="torch")
    torch.testing.assert_close(layer(x, **options), expected)


def test_weights_of_multihead_attention() -> None:
    stack = torchfm_model(batch_first=True)
    attention = stack.self_attns[0]
    x = torch.randn(3, 5, 8)
    masks = {"key_padding_mask": PADDING}
    out, average = attention(x, x, x, **masks)
    _, each = attention(x, x, x, average_attn_weights=False, **masks)
    accelerate(stack, backend="torch")
    assert attention(x, x, x, **masks)[1] is None
    restore(stack)
    accelerate(stack, backend="torch", keep_attention=True)
    ours, weights = attention(x, x, x, **masks)
    torch.testing.assert_close(ours, out), torch.testing.assert_close(weights, average)
    torch.testing.assert_close(attention(x, x, x, average_attn_weights=False, **masks)[1], each)
    assert attention(x, x, x, need_weights=False)[1] is None


def test_a_row_without_keys_gets_no_attention() -> None:
    stack = torchfm_model(batch_first=True)
    attention = stack.self_attns[0]
    accelerate(stack, backend="torch")
    x = torch.randn(1, 5, 8)
    out, _ = attention(x, x, x, key_padding_mask=torch.ones(1, 5, dtype=torch.bool))
    torch.testing.assert_close(out, attention.out_proj.bias.expand(1, 5, 8))


def test_three_tensors_take_the_original() -> None:
    stack = torchfm_model(batch_first=True)
    attention, x, y = stack.self_attns[0], torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    expected = attention(x, y, y)
    unbatched = attention(x[0], x[0], x[0])
    accelerate(stack, backend="torch")
    for ours, theirs in ((attention(x, y, y), expected), (attention(x[0], x[0], x[0]), unbatched)):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(nn.MultiheadAttention(8, 2)), "nothing is known of the code that calls it"),
        (OtherStack, "OtherStack has a forward of its own, which calls it"),
        (lambda: torchfm_model(kdim=4, vdim=4), "keys or values of a width of their own"),
        (lambda: torchfm_model(add_bias_kv=True), "keys beside those of the fields"),
        (lambda: torchfm_model(add_zero_attn=True), "keys beside those of the fields"),
    ],
)
def test_multihead_attention_that_is_left_alone(make: Callable[[], nn.Module], reason: str) -> None:
    model = make()
    report = accelerate(model)
    assert not report.replaced and report.left and all(reason in left.reason for left in report.left)
    assert not any(isinstance(module, Accelerated) for module in model.modules())


# --- what is left alone, and errors ---------------------------------------------------------------------------


def test_a_subclass_is_taken_unless_it_has_a_forward() -> None:
    model = nn.ModuleDict({"standard": Standard(), "doubled": Doubled(), "patched": Toy()})
    model["patched"].forward = lambda x: x
    report = accelerate(model, backend="torch")
    assert [r.name for r in report.replaced] == ["standard"]
    assert [(left.name, left.reason) for left in report.left] == [
        ("doubled", "Doubled has a forward of its own"),
        ("patched", "Toy has a forward of its own"),
    ]
    assert type(model["doubled"]) is Doubled


def test_a_fused_layer_is_no_business_of_accelerate() -> None:
    report = accelerate(InteractingLayer(2, 8))
    assert str(report) == "no interacting layer found"


def test_the_reference_becomes_the_layer() -> None:
    layer, x, mask = ReferenceInteractingLayer(2, 8), torch.randn(3, 5, 8), PAIRS
    expected = layer(x, mask, return_attention=True)
    accelerate(layer, backend="torch")
    for ours, theirs in zip(layer(x, mask=mask, return_attention=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert autoint_fast.why(layer, x, mask).choice == "torch"
    with pytest.raises(ValueError, match=r"x: expected the shape \(B, F, 8\)"):
        layer(x[0])


def test_wrong_descriptions_are_found_out() -> None:
    """An adapter that says anything else than what the module computes."""
    layer = Toy()
    wrong: dict[str, list[Callable[[InteractingParameters], Interaction | str]]] = {
        "other numbers": [
            lambda p: Interaction(p, 2, 0.5, "none"),
            lambda p: Interaction(p, 3, 1.0, "none"),
            lambda p: Interaction(p, 2, 1.0, "none", relu=False),
            lambda p: Interaction(p._replace(w_q=p.w_k, w_k=p.w_v), 2, 1.0, "none"),
        ],
        "residual: expected": [
            lambda p: Interaction(p, 2, 1.0, "identity"),
            lambda p: Interaction(p, 2, 1.0, "some"),
        ],
        "w_k: expected the shape": [lambda p: Interaction(p._replace(w_k=p.w_k.t()), 2, 1.0, "none")],
        "what the adapter says a": [lambda p: Interaction(p._replace(w_v=None), 2, 1.0, "none")],
        "no such layer": [lambda p: "no such layer"],
    }
    for reason, descriptions in wrong.items():
        for say in descriptions:
            register_adapter(Toy, lambda module, say=say: say(adapt_toy(module).parameters))
            before = dict(vars(layer))
            report = accelerate(layer, backend="torch")
            assert not report.replaced and reason in report.left[0].reason, (report, reason)
            assert type(layer) is Toy and vars(layer) == before


def test_a_name_of_ours_on_the_module_keeps_it_as_it_is() -> None:
    layer = Toy()
    layer.backend = "theirs"
    report = accelerate(layer)
    assert "its attribute backend" in report.left[0].reason and layer.backend == "theirs"


def test_another_version_of_a_library() -> None:
    layer = MultiHeadSelfAttention(8)
    del layer.use_residual
    assert "has no attribute 'use_residual'" in accelerate(layer).left[0].reason


@pytest.mark.parametrize("where", ["adapter", "class", "report"])
def test_a_failure_midway_leaves_the_model_as_it_was(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([ReferenceInteractingLayer(2, 8), Toy()])
    before, kinds = children(model), classes(model)

    def fail(*args: object) -> Any:
        if where == "class" and not isinstance(args[0], Toy):
            return change(*args)
        if where == "report" and args[0] == "0":
            return replaced(*args)
        raise KeyError("midway")

    change, replaced = swap.change_class, swap._replaced
    if where == "adapter":
        register_adapter(Toy, fail)
    elif where == "class":
        monkeypatch.setattr(swap, "change_class", fail)
    else:
        monkeypatch.setattr(swap, "_replaced", fail)
    with pytest.raises(KeyError, match="midway"):
        accelerate(model, backend="torch")
    assert children(model) == before and classes(model) == kinds


def test_the_check_leaves_no_trace() -> None:
    """Neither in the module nor in the random numbers, and it sees past training mode and autocast."""
    model = nn.Sequential(MultiHeadSelfAttention(8, 8, 2, dropout_rate=0.5), Toy())
    model[1].eval()
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert len(accelerate(model, backend="torch").replaced) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].training and model[0].dot_attention.dropout.training and not model[1].training


def test_under_another_default_device() -> None:
    layer = Toy()
    with torch.device("meta"):
        assert accelerate(layer, backend="torch").replaced


def test_on_the_meta_device() -> None:
    layer = MultiHeadSelfAttention(8, 8, 2).to("meta")
    report = accelerate(layer)
    assert report.replaced and layer(torch.empty(2, 3, 8, device="meta")).shape == (2, 3, 8)


def test_the_report() -> None:
    model = nn.ModuleDict({"a": MultiHeadSelfAttention(64, 64, 4, dropout_rate=0.1), "b": Doubled(), "c": Toy()})
    assert str(accelerate(model, backend="torch")).splitlines() == [
        "module  class                   now                       notes",
        "a       MultiHeadSelfAttention  torch, factored, rank 16  dropout 0.1: fused in eval mode only",
        "c       Toy                     torch, factored, rank 3",
        "b       Toy                     left alone                Doubled has a forward of its own",
    ]


def test_a_backend_that_cannot_run_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Toy()
    monkeypatch.setattr(autoint_fast.dispatch.ENGINES["torch"], "unsupported", lambda call: ["too hot"])
    (replaced,) = accelerate(layer, backend="torch").replaced
    assert replaced.engine == "nothing (it raises)" and replaced.notes == "torch: too hot"
    with pytest.raises(ValueError, match="too hot"):
        layer(torch.zeros(2, 3, 8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: accelerate("model"), TypeError, "model: expected a torch.nn.Module, got 'model'"),
        (lambda: accelerate(Toy(), backend="tritn"), ValueError, "backend: expected one of auto,"),
        (lambda: accelerate(Toy(), keep_attention="yes"), TypeError, "keep_attention: expected a bool, got 'yes'"),
        (lambda: restore(None), TypeError, "model: expected a torch.nn.Module, got None"),
        (lambda: register_adapter(Toy(), adapt_toy), TypeError, "cls: expected a subclass of torch.nn.Module"),
        (lambda: register_adapter(dict, adapt_toy), TypeError, "cls: expected a subclass of torch.nn.Module"),
        (lambda: register_adapter(InteractingLayer, adapt_toy), TypeError, "cls: expected a class that autoint_fast"),
        (lambda: register_adapter(Toy, "adapter"), TypeError, "adapter: expected a function of a module"),
    ],
)
def test_bad_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_an_adapter_that_gives_neither() -> None:
    register_adapter(Toy, lambda module: None)
    with pytest.raises(TypeError, match="adapter of Toy: expected an Interaction or a reason why not, got None"):
        accelerate(Toy())


# --- torch.compile --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["registered", "own", "fuxictr, norm", "mha", "mha, batch first"])
def test_compiled(name: str) -> None:
    """In one graph, after an eager call without gradients has left something behind."""
    torch._dynamo.reset()
    # In float64, as gradients of a hundred have rounding errors in fp32 that no such tolerance can tell from others.
    layer = MAKERS[name]().double()
    x = torch.randn(6, 5, 8).double()
    expected = run(layer, x)
    accelerate(layer, backend="torch")
    with torch.no_grad():
        layer(x)
    got = run(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close(got["out"], expected["out"])
    torch.testing.assert_close(got["x"], expected["x"], rtol=1e-4, atol=1e-5)
