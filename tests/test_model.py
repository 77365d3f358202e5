"""The whole model: against its definition, and what it says to bad input."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from autoint_fast import AutoInt, InteractingLayer, PaperInteractingLayer, accelerate
from autoint_fast.reference import interaction_reference

CARDINALITIES = [5, 3, 11]
N_NUMERIC = 2
NAN, INF = float("nan"), float("inf")
KINDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "paper": {"layer": "paper", "att_size": 12},
    "AutoInt+": {"mlp": (7, 6)},
    "one layer": {"n_layers": 1, "n_head": 1},
}


def make(dtype: torch.dtype = torch.float64, **options: Any) -> AutoInt:
    """A model whose logits all parts move, on the engine that is everywhere."""
    model = AutoInt(CARDINALITIES, N_NUMERIC, 8, **{"n_layers": 2, "backend": "torch", "dtype": dtype, **options})
    nn.init.normal_(model.embedding.weight, std=0.7)
    return model


def draw(batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Ids with 0 among them, numbers with NaN among them."""
    categorical = torch.stack([torch.randint(0, size, (batch,)) for size in CARDINALITIES], dim=1)
    numeric = torch.randn(batch, N_NUMERIC, dtype=dtype)
    numeric[torch.rand(batch, N_NUMERIC) < 0.3] = NAN
    categorical[0], numeric[0, 0] = 0, NAN
    return categorical, numeric


def definition(model: AutoInt, categorical: Tensor, numeric: Tensor, mask: Tensor | None = None) -> Tensor:
    """The model, field by field, with layers as they are defined."""
    rows = iter(model.embedding.weight.split([*CARDINALITIES, *[2] * N_NUMERIC]))
    fields = [next(rows)[categorical[:, i]] for i in range(len(CARDINALITIES))]
    for value, (vector, missing) in zip(numeric.unbind(1), rows, strict=True):
        fields.append(torch.where(value.isnan()[:, None], missing, value.nan_to_num()[:, None] * vector))
    x = deep = torch.stack(fields, dim=1)
    for layer in model.layers:
        x, _ = interaction_reference(x, layer.interaction(), mask)
    logits = nnf.linear(x.reshape(len(x), -1), model.output.weight, model.output.bias)[:, 0]
    if model.mlp is None:
        return logits
    return logits + model.mlp(deep.reshape(len(deep), -1))[:, 0]


def gradients(logits: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    (logits * torch.linspace(-1, 1, len(logits), dtype=logits.dtype)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return {name: grad.to_dense() for name, grad in grads.items()}


@pytest.mark.parametrize("batch", (1, 2, 33))
@pytest.mark.parametrize("sparse", (False, True), ids=("dense", "sparse"))
@pytest.mark.parametrize("kind", KINDS)
def test_definition(kind: str, sparse: bool, batch: int) -> None:
    model = make(sparse=sparse, **KINDS[kind])
    categorical, numeric = draw(batch)
    logits, expected = model(categorical, numeric), definition(model, categorical, numeric)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    got = gradients(logits, model)
    assert model.embedding.weight.grad.is_sparse == sparse
    for name, grad in gradients(expected, model).items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=1e-12, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(model(categorical, numeric), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(33, 1, 5), (5, 5), (33, 5, 5)], ids=str)
def test_mask(shape: tuple[int, ...]) -> None:
    model = make()
    categorical, numeric = draw(33)
    mask = torch.rand(shape) < 0.4
    expected = definition(model, categorical, numeric, mask)
    torch.testing.assert_close(model(categorical, numeric, mask), expected, rtol=0, atol=1e-12)
    # Twice, so that a mask that is ignored cannot pass.
    assert not torch.allclose(expected, definition(model, categorical, numeric))


def test_categorical_fields_only_and_numeric_ones_only() -> None:
    categorical, numeric = draw(6)
    only = AutoInt(CARDINALITIES, emb_size=8, dtype=torch.float64)
    assert torch.equal(only.embed(categorical)[:, 1], only.embedding.weight[5:8][categorical[:, 1]])
    assert only(categorical).shape == (6,)
    numbers = AutoInt([], 2, 8, dtype=torch.float64)
    assert numbers(categorical[:, :0], numeric).shape == (6,)
    gradients(numbers(categorical[:, :0], numeric), numbers)


def test_missing_numbers_have_a_vector_of_their_own() -> None:
    model = make()
    categorical, _ = draw(3)
    x = model.embed(categorical, torch.tensor([[NAN, 2.0], [0.0, NAN], [3.0, -1.0]], dtype=torch.float64))
    first, first_missing, second, second_missing = model.embedding.weight[-4:]
    expected = torch.stack(
        [first_missing, 2 * second, 0 * first, second_missing, 3 * first, -second],
    ).view(3, 2, 8)
    assert torch.equal(x[:, 3:], expected)


def test_gradient_of_the_numbers() -> None:
    model = make()
    categorical, numeric = draw(9)
    numeric.requires_grad_()
    (got,) = torch.autograd.grad(model(categorical, numeric).sum(), numeric)
    (expected,) = torch.autograd.grad(definition(model, categorical, numeric).sum(), numeric)
    assert not got[numeric.isnan()].any()
    torch.testing.assert_close(got, expected.nan_to_num(), rtol=0, atol=1e-12)


def test_second_derivative_on_the_reference() -> None:
    model = make(backend="reference", n_layers=1)
    categorical, numeric = draw(3)
    present = numeric.nan_to_num()

    def function(numbers: Tensor, table: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"embedding.weight": table}, (categorical, numbers)).sigmoid()

    inputs = (present.requires_grad_(), model.embedding.weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_dropout_is_the_mlps_alone() -> None:
    categorical, numeric = draw(9)
    plain = make(dropout=0.5)
    assert torch.equal(plain(categorical, numeric), plain.eval()(categorical, numeric))
    model = make(dropout=0.5, mlp=(50,))
    assert not torch.equal(model(categorical, numeric), model(categorical, numeric))
    assert torch.equal(model.eval()(categorical, numeric), model(categorical, numeric))


def test_attention() -> None:
    model = make(n_layers=2)
    categorical, numeric = draw(4)
    logits, attention = model(categorical, numeric, return_attention=True)
    torch.testing.assert_close(logits, model(categorical, numeric), rtol=0, atol=1e-12)
    assert [p.shape for p in attention] == [(4, 2, 5, 5)] * 2
    for p in attention:
        torch.testing.assert_close(p.sum(-1), torch.ones(4, 2, 5, dtype=torch.float64))


def test_layers_are_the_packages_own_and_take_the_engine() -> None:
    assert all(type(layer) is InteractingLayer and layer.backend == "torch" for layer in make().layers)
    paper = make(layer="paper", att_size=12, n_layers=3)
    assert all(type(layer) is PaperInteractingLayer for layer in paper.layers)
    assert [(layer.emb_size, layer.att_size) for layer in paper.layers] == [(8, 12), (12, 12), (12, 12)]
    assert make(layer="paper").layers[0].att_size == 16


def test_nothing_is_left_to_accelerate() -> None:
    model = make()
    categorical, numeric = draw(4)
    expected = model(categorical, numeric)
    assert not accelerate(model).replaced
    assert torch.equal(model(categorical, numeric), expected)


def test_off_the_cpu_no_value_is_read_back() -> None:
    """It would keep a GPU waiting; a meta tensor has no values to read."""
    model = AutoInt(CARDINALITIES, 2, 8, mlp=(3,), device="meta")
    categorical, numeric = torch.zeros(4, 3, dtype=torch.int64, device="meta"), torch.zeros(4, 2, device="meta")
    model(categorical, numeric).sum().backward()
    with torch.no_grad():
        assert model(categorical, numeric).shape == (4,)
    model.validate = True
    with pytest.raises(RuntimeError, match="meta"):
        model(categorical, numeric)


def test_empty_batch() -> None:
    model = make(mlp=(3,))
    logits = model(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.float64))
    assert logits.shape == (0,)
    assert not any(grad.any() for grad in gradients(logits, model).values())


@pytest.mark.parametrize("backend", ("auto", "torch", "native"))
def test_fp32_and_frozen(backend: str) -> None:
    model = make(torch.float32, backend=backend, mlp=(6,)).eval()
    categorical, numeric = draw(33, torch.float32)
    exact = copy.deepcopy(model).double()
    expected = definition(exact, categorical, numeric.double())
    plain = definition(model, categorical, numeric)
    bound = 2 * (plain - expected).abs().max() + torch.finfo(torch.float32).eps * expected.abs().max()
    with torch.no_grad():
        assert (model(categorical, numeric) - expected).abs().max() <= bound
        assert (model.freeze()(categorical, numeric) - expected).abs().max() <= bound
        # A frozen layer sees no change to its weights.
        model.layers[0].fc_res.weight.zero_()
        assert (model(categorical, numeric) - expected).abs().max() <= bound
        assert (model.unfreeze()(categorical, numeric) - expected).abs().max() > bound


def test_autocast() -> None:
    model = make(torch.float32)
    categorical, numeric = draw(9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(categorical, numeric)
        loss = nnf.binary_cross_entropy_with_logits(logits, torch.ones(9, dtype=logits.dtype))
    loss.backward()
    assert model.embedding.weight.grad.dtype == torch.float32 and model.embedding.weight.grad.any()


def test_numbers_of_another_precision() -> None:
    model = make(torch.float32)
    categorical, numeric = draw(9)
    assert torch.equal(model(categorical, numeric), model(categorical, numeric.float()))


@pytest.mark.parametrize("sparse", (False, True), ids=("dense", "sparse"))
def test_a_step_of_adam(sparse: bool) -> None:
    """Sparse gradients with SparseAdam move the rows of the batch as dense ones with Adam do, at the first step."""
    model = make(sparse=sparse)
    categorical, numeric = draw(9)
    before = model.embedding.weight.detach().clone()
    optimizer = (torch.optim.SparseAdam if sparse else torch.optim.Adam)([model.embedding.weight], lr=0.1)
    model(categorical, numeric).sum().backward()
    optimizer.step()
    moved = (model.embedding.weight - before).abs().amax(1) > 0.09
    used = torch.zeros(len(before), dtype=torch.bool)
    used[(categorical + torch.tensor([0, 5, 8])).flatten()] = True
    used[[19, 21]] = ~numeric.isnan().all(0)
    used[[20, 22]] = numeric.isnan().any(0)
    assert torch.equal(moved, used)


def test_same_loss_curve_as_the_einsum_model() -> None:
    """Same seed, same data, 200 steps, with a validation loss at every tenth."""
    torch.manual_seed(1)
    sizes, rows, batch = [50, 20, 300, 7], 8192, 256
    categorical = torch.stack([torch.randint(0, size, (rows,)) for size in sizes], dim=1)
    numeric = torch.randn(rows, 3)
    numeric[torch.rand(rows, 3) < 0.2] = NAN
    effect = torch.randn(sizes[0])[categorical[:, 0]] * torch.randn(sizes[3])[categorical[:, 3]]
    label = torch.bernoulli((effect + numeric[:, 0].nan_to_num()).sigmoid())
    curves = {}
    for backend in ("auto", "reference"):
        torch.manual_seed(2)
        model = AutoInt(sizes, 3, backend=backend)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        curve = []
        for step in range(200):
            at = torch.arange(step * batch, (step + 1) * batch) % 6144
            optimizer.zero_grad()
            nnf.binary_cross_entropy_with_logits(model(categorical[at], numeric[at]), label[at]).backward()
            optimizer.step()
            if step % 10 == 9:
                with torch.no_grad():
                    logits = model(categorical[6144:], numeric[6144:])
                    curve.append(nnf.binary_cross_entropy_with_logits(logits, label[6144:]).item())
        curves[backend] = torch.tensor(curve)
    # It has learned something, or the curves would agree for nothing.
    assert curves["auto"][-1] < curves["auto"][0] - 0.02
    assert (curves["auto"] - curves["reference"]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind: str) -> None:
    torch.compiler.reset()
    model = make(**KINDS[kind])
    categorical, numeric = draw(9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, expected = compiled(categorical, numeric), model(categorical, numeric)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    want = gradients(expected, model)
    for name, grad in gradients(got, model).items():
        torch.testing.assert_close(grad, want[name], rtol=0, atol=1e-12, msg=name)


def test_export_with_a_dynamic_batch() -> None:
    model = make().eval()
    batch = torch.export.Dim("batch", min=1)
    categorical, numeric = draw(9)
    program = torch.export.export(model, (categorical, numeric), dynamic_shapes=({0: batch}, {0: batch}))
    for rows in (1, 33):
        arguments = draw(rows)
        torch.testing.assert_close(program.module()(*arguments), model(*arguments), rtol=0, atol=1e-12)


def test_state_dict_round_trip() -> None:
    model, other = make(mlp=(4,)), make(mlp=(4,))
    other.load_state_dict(model.state_dict())
    arguments = draw(5)
    assert torch.equal(other(*arguments), model(*arguments))
    assert not any("offsets" in name or "highest" in name for name in model.state_dict())


# --- bad input --------------------------------------------------------------------------------------------------------

NAMES = ("site", "device", "ad", "age", "visits")
IDS, NUMBERS = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 2)


def changed(t: Tensor, at: tuple[int, int], value: float) -> Tensor:
    t = t.clone()
    t[at] = value
    return t


BAD_CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": (([[0, 0, 0]], NUMBERS), TypeError, r"categorical: .*\(B, 3\) int64"),
    "int32": ((IDS.int(), NUMBERS), ValueError, r"categorical: .*int64 tensor, got a torch.int32"),
    "too wide": ((torch.zeros(4, 4, dtype=torch.int64), NUMBERS), ValueError, r"categorical: .*\(4, 4\)"),
    "one row": ((IDS[0], NUMBERS), ValueError, r"categorical: .*\(3,\)"),
    "no numbers": ((IDS,), ValueError, r"numeric: .*\(4, 2\) floating-point.*None"),
    "numbers in a list": ((IDS, [[0.0]]), TypeError, r"numeric: .*list"),
    "whole numbers": ((IDS, NUMBERS.long()), ValueError, r"numeric: .*floating-point.*torch.int64"),
    "too few numbers": ((IDS, NUMBERS[:, :1]), ValueError, r"numeric: .*\(4, 1\)"),
    "other rows": ((IDS, NUMBERS[:3]), ValueError, r"numeric: .*\(4, 2\).*\(3, 2\)"),
    "too high": ((changed(IDS, (2, 1), 3), NUMBERS), ValueError, r"ids from 0 to 2 in field device, got 3 in row 2"),
    "negative": ((changed(IDS, (1, 2), -1), NUMBERS), ValueError, r"from 0 to 10 in field ad, got -1 in row 1"),
    "lowest": ((changed(IDS, (1, 2), -(2**63)), NUMBERS), ValueError, r"field ad, got -9223372036854775808 in"),
    "highest": ((changed(IDS, (3, 0), 2**63 - 1), NUMBERS), ValueError, r"field site, got 9223372036854775807 in"),
    "infinite": ((IDS, changed(NUMBERS, (3, 1), INF)), ValueError, r"finite.* field visits, got inf in row 3"),
    "minus infinite": ((IDS, changed(NUMBERS, (0, 0), -INF)), ValueError, r"finite.* field age, got -inf in row 0"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("grad", (False, True), ids=("serving", "training"))
def test_bad_call(case: str, grad: bool) -> None:
    arguments, error, message = BAD_CALLS[case]
    model = AutoInt(CARDINALITIES, 2, 8, names=NAMES)
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        model(*arguments)


def test_both_infinities_and_numbers_whose_sum_overflows() -> None:
    model = AutoInt(CARDINALITIES, 2, 8)
    numbers = changed(changed(NUMBERS, (0, 0), INF), (1, 0), -INF)
    with pytest.raises(ValueError, match=r"field numeric\[0\], got inf in row 0"):
        model(IDS, numbers)
    model.embed(IDS, torch.full((4, 2), 3e38))


def test_numbers_without_numeric_fields() -> None:
    with pytest.raises(ValueError, match="numeric: expected None"):
        AutoInt(CARDINALITIES)(IDS, NUMBERS)


def test_validation_can_be_left_out() -> None:
    model = AutoInt(CARDINALITIES, 2, 8, validate=False)
    model(changed(IDS, (2, 1), 3), changed(NUMBERS, (3, 1), INF))
    with pytest.raises(ValueError, match="field"):
        AutoInt(CARDINALITIES, 2, 8, validate=True)(changed(IDS, (2, 1), 3), NUMBERS)


BAD_ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no fields": (([],), {}, ValueError, "cardinalities"),
    "cardinality 0": (([3, 0],), {}, ValueError, r"cardinalities\[1\]"),
    "no sequence": ((3,), {}, TypeError, "cardinalities"),
    "fraction": (([2.5],), {}, TypeError, r"cardinalities\[0\]"),
    "negative numeric": (([3], -1), {}, ValueError, "n_numeric"),
    "emb_size": (([3], 0, 0), {}, ValueError, "emb_size"),
    "n_layers": (([3], 0, 8, 0), {}, ValueError, "n_layers"),
    "n_head": (([3], 0, 8, 1, True), {}, TypeError, "n_head"),
    "layer": (([3],), {"layer": "other"}, ValueError, "layer: .*standard, paper"),
    "att_size": (([3],), {"att_size": 8}, ValueError, "att_size"),
    "att_size of the heads": (([3],), {"att_size": 9, "layer": "paper"}, ValueError, "att_size"),
    "mlp": (([3],), {"mlp": (4, 0)}, ValueError, r"mlp\[1\]"),
    "dropout": (([3],), {"dropout": 1.0}, ValueError, "dropout"),
    "sparse": (([3],), {"sparse": 1}, TypeError, "sparse"),
    "validate": (([3],), {"validate": "no"}, TypeError, "validate"),
    "names": (([3],), {"names": ["a", "b"]}, ValueError, "names: expected 1"),
    "backend": (([3],), {"backend": "fast"}, ValueError, "backend"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument(case: str) -> None:
    positional, named, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=re.compile(f"^{message}")):
        AutoInt(*positional, **named)


def test_made_without_memory_first() -> None:
    model = AutoInt([5, 7], 2, emb_size=8, n_layers=1)
    later = AutoInt([5, 7], 2, emb_size=8, n_layers=1, device="meta").to_empty(device="cpu")
    later.load_state_dict(model.state_dict())
    inputs = torch.tensor([[4, 6], [0, 1]]), torch.randn(2, 2)
    torch.testing.assert_close(later(*inputs), model(*inputs), rtol=0, atol=0)
