"""accelerate on the real thing: the layers and the models of other libraries, as far as they are installed.

`python tests/install_libraries.py` installs them. Rows are drawn like those of a Criteo log, or are those of the log
that AUTOINT_FAST_CRITEO names.
"""

from __future__ import annotations

import copy
import functools
import io
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from autoint_fast import accelerate, restore
from autoint_fast.libraries import Accelerated
from benchmarks import criteo, installed
from benchmarks.families import LAYERS, InModel, Make
from tests.swapping import assert_same_numbers

BACKENDS = ("auto", "torch")
ROWS, BATCH, STEPS, EMB_SIZE = 512, 128, 30, 16


def load(name: str) -> Any:
    """A module of a library; conftest.py sums up what was not there."""
    try:
        return installed.load(name)
    except installed.Unable as error:
        skip(error)


def skip(error: installed.Unable) -> NoReturn:
    pytest.skip(f"library {error.package}: {error}")


# --- layers ---------------------------------------------------------------------------------------------------


class LayerCase(NamedTuple):
    layer: str
    options: dict[str, Any]
    emb_size: int = 16
    n_head: int = 2

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.layer}-E{self.emb_size}-H{self.n_head}-{options}"

    def build(self) -> nn.Module:
        make: Make = functools.partial(LAYERS[self.layer][1], **self.options)
        try:
            layer = make(self.emb_size, self.n_head)
        except installed.Unable as error:
            skip(error)
        for parameter in layer.parameters():
            # Large enough for every term of the formula to count.
            nn.init.normal_(parameter, std=(2 * self.emb_size) ** -0.5)
        return layer


STACKS = tuple(name for name, (_, make) in LAYERS.items() if getattr(make, "func", None) is InModel)
LAYER_CASES = (
    LayerCase("deepctr", {}),
    LayerCase("deepctr", {}, 64, 4),
    LayerCase("deepctr", {}, 7, 1),
    LayerCase("deepctr", {"use_res": False}),
    LayerCase("deepctr", {"scaling": True}),
    LayerCase("deepctr", {"use_res": False, "scaling": True}, 12, 3),
    LayerCase("rechub", {}),
    LayerCase("rechub", {}, 64, 4),
    LayerCase("rechub", {"residual": False}),
    *(LayerCase(name, {}) for name in STACKS),
    *(LayerCase(name, {}, 64, 4) for name in STACKS),
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_numbers(case: LayerCase, backend: str) -> None:
    """The output and every gradient, against the library's own layer in float64."""
    plain = case.build()
    ours = copy.deepcopy(plain)
    report = accelerate(ours, backend=backend)
    assert len(report.replaced) == 1 and not report.left, report
    assert_same_numbers(plain, ours, [torch.randn(8, 13, case.emb_size) for _ in range(8)])


@pytest.mark.parametrize("name", STACKS)
def test_masks(name: str) -> None:
    """Of the libraries' layers only nn.MultiheadAttention takes any."""
    plain = LayerCase(name, {}).build()
    ours = copy.deepcopy(plain)
    accelerate(ours, backend="torch")
    x = torch.randn(3, 5, 16)
    hidden = torch.rand(3, 5) < 0.4
    hidden[:, 2] = False
    assert isinstance(plain, InModel) and isinstance(ours, InModel)
    q = x if plain.batch_first else x.transpose(0, 1)
    for masks in ({"key_padding_mask": hidden}, {"attn_mask": torch.eye(5, dtype=torch.bool)}):
        torch.testing.assert_close(ours.attention(q, q, q, **masks)[0], plain.attention(q, q, q, **masks)[0])


def test_normalized_att_scores() -> None:
    """DeepCTR-Torch's users read them to explain predictions: same shape, values and gradients."""
    layer = LayerCase("deepctr", {}).build()
    x = torch.randn(3, 5, 16)
    layer(x)
    expected = layer.normalized_att_scores
    (gradient,) = torch.autograd.grad(expected.square().sum(), layer.W_Query)
    accelerate(layer, backend="torch", keep_attention=True)
    layer(x)
    kept = layer.normalized_att_scores
    assert kept.shape == (2, 3, 5, 5)
    torch.testing.assert_close(kept, expected)
    torch.testing.assert_close(torch.autograd.grad(kept.square().sum(), layer.W_Query)[0], gradient)


def test_normalized_att_scores_that_are_not_kept() -> None:
    layer = LayerCase("deepctr", {}).build()
    x = torch.randn(3, 5, 16)
    layer(x)
    accelerate(layer, backend="torch")
    layer(x)
    with pytest.raises(AttributeError, match="accelerate\\(model, keep_attention=True\\)"):
        layer.normalized_att_scores  # noqa: B018
    assert not hasattr(layer, "normalized_att_scores")
    with pytest.raises(AttributeError, match="has no attribute 'anything'"):
        layer.anything  # noqa: B018
    restore(layer)
    layer(x)
    assert layer.normalized_att_scores.shape == (2, 3, 5, 5)


def test_compiled_with_normalized_att_scores() -> None:
    torch._dynamo.reset()
    layer = LayerCase("deepctr", {}).build()
    x = torch.randn(3, 5, 16)
    expected = layer(x)
    for keep in (False, True):
        accelerate(layer, backend="torch", keep_attention=keep)
        out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(out, expected)
        assert hasattr(layer, "normalized_att_scores") == keep
        restore(layer)


def test_dropout_of_rechub() -> None:
    layer = LayerCase("rechub", {"dropout": 0.5}).build()
    plain = copy.deepcopy(layer)
    (replaced,) = accelerate(layer, backend="torch").replaced
    assert replaced.notes == "dropout 0.5: fused in eval mode only"
    x = torch.randn(3, 5, 16)
    outs = []
    for m in (layer, plain):
        torch.manual_seed(1)
        outs.append(m(x))
    assert torch.equal(*outs)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


# --- whole models ---------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """N rows: the category of each of the 39 fields, counted per field, and whether there was a click."""

    ids: Tensor  # [N, 39] int64
    sizes: list[int]
    clicks: Tensor  # [N]


@functools.lru_cache(maxsize=1)
def rows() -> Rows:
    draw = torch.Generator().manual_seed(0)
    if log := os.environ.get("AUTOINT_FAST_CRITEO"):
        numeric, categorical = criteo.read(log, ROWS)
        with open(log, encoding="ascii") as file:
            clicks = torch.tensor([float(file.readline()[0]) for _ in range(ROWS)])
    else:
        numeric = torch.randn(ROWS, 13, generator=draw, dtype=torch.float64).exp().mul(4).floor()
        numeric[torch.rand(ROWS, 13, generator=draw) < 0.2] = torch.nan
        categorical = torch.rand(ROWS, 26, generator=draw).mul(6).exp().long()
        clicks = ((categorical[:, :4].sum(1) + numeric.nan_to_num()[:, :2].sum(1)).long() % 4 == 0).float()
    # Numbers by their order of magnitude, as whoever has embeddings only does it.
    magnitudes = numeric.abs().log1p().nan_to_num(-1).mul(2).floor().long()
    columns = torch.cat((magnitudes, categorical), 1).unbind(1)
    vocabularies, ids = zip(*(column.unique(return_inverse=True) for column in columns), strict=True)
    return Rows(torch.stack(ids, 1), [len(vocabulary) for vocabulary in vocabularies], clicks)


class Subject(NamedTuple):
    """A model, and how to get the logits (N,) of rows from it."""

    model: nn.Module
    logits: Callable[[nn.Module, Tensor], Tensor]


def deepctr(sizes: list[int], layers: int = 2) -> Subject:
    inputs = load("deepctr_torch.inputs")
    columns = [inputs.SparseFeat(f"C{i}", size, EMB_SIZE) for i, size in enumerate(sizes)]
    model = load("deepctr_torch.models.autoint").AutoInt(columns, columns, layers, dnn_hidden_units=(16,))
    for table in model.embedding_dict.values():
        # The library's own deviation, 1e-4, leaves the attention nothing to do in so few steps.
        nn.init.normal_(table.weight, std=0.1)
    return Subject(model, lambda model, ids: model(ids.float())[:, 0].logit())


def rechub(sizes: list[int]) -> Subject:
    features = load("torch_rechub.basic.features")
    columns = [features.SparseFeature(f"C{i}", size, EMB_SIZE) for i, size in enumerate(sizes)]
    model = load("torch_rechub.models.ranking.autoint").AutoInt(columns, [], num_layers=2)
    for table in model.sparse_embedding.embed_dict.values():
        nn.init.normal_(table.weight, std=0.1)
    return Subject(model, lambda model, ids: model({f"C{i}": ids[:, i] for i in range(ids.shape[1])}).logit())


def torchfm(sizes: list[int]) -> Subject:
    build = load("torchfm.model.afi").AutomaticFeatureInteractionModel
    model = build(sizes, EMB_SIZE, 32, num_heads=2, num_layers=2, mlp_dims=(16,), dropouts=(0.0, 0.0))
    return Subject(model, lambda model, ids: model(ids).logit())


def recbole(sizes: list[int]) -> Subject:
    enum = load("recbole.utils").FeatureType
    names = [f"C{i}" for i in range(len(sizes))]
    settings = {
        "LABEL_FIELD": "label",
        "embedding_size": EMB_SIZE,
        "attention_size": 32,
        "dropout_probs": [0.0, 0.0, 0.0],
        "n_layers": 2,
        "num_heads": 2,
        "mlp_hidden_size": [16],
        "has_residual": True,
        "device": "cpu",
        "double_tower": None,
        "numerical_features": [],
    }
    dataset = SimpleNamespace(
        fields=lambda source: names,
        field2type=dict.fromkeys(names, enum.TOKEN),
        num=dict(zip(names, sizes, strict=True)).get,
    )
    model = load("recbole.model.context_aware_recommender.autoint").AutoInt(settings, dataset)
    return Subject(model, lambda model, ids: model(dict(zip(names, ids.unbind(1), strict=True))))


def tabular(sizes: list[int]) -> Subject:
    models, configs = load("pytorch_tabular.models.autoint"), load("pytorch_tabular.config")
    conf = load("omegaconf").OmegaConf
    parts = (
        models.AutoIntConfig(task="classification", embedding_dim=EMB_SIZE, attn_embed_dim=32, num_attn_blocks=2),
        configs.OptimizerConfig(),
    )
    known = configs.InferredConfig(
        categorical_dim=len(sizes),
        continuous_dim=0,
        output_dim=1,
        output_cardinality=[2],
        categorical_cardinality=sizes,
    )
    config = conf.merge(*(conf.to_container(conf.structured(part)) for part in parts))
    model = models.AutoIntModel(config, inferred_config=conf.structured(known))

    def logits(model: nn.Module, ids: Tensor) -> Tensor:
        return model({"categorical": ids, "continuous": ids.new_zeros(len(ids), 0)})["logits"][:, 0]

    return Subject(model, logits)


def widedeep(sizes: list[int], name: str = "autoint.AutoInt", **options: Any) -> Subject:
    module, _, name = name.partition(".")
    build = getattr(load(f"pytorch_widedeep.models.rec.{module}"), name)
    names = [f"C{i}" for i in range(len(sizes))]
    columns = {name: i for i, name in enumerate(names)}
    table = build(
        column_idx=columns,
        input_dim=EMB_SIZE,
        num_heads=2,
        # Zero is kept for what was never seen.
        cat_embed_input=[(name, size) for name, size in zip(names, sizes, strict=True)],
        **options,
    )
    model = load("pytorch_widedeep.models.wide_deep").WideDeep(deeptabular=table)
    return Subject(model, lambda model, ids: model({"deeptabular": ids + 1})[:, 0])


MODELS: dict[str, Callable[[list[int]], Subject]] = {
    "deepctr_torch": deepctr,
    "torch_rechub": rechub,
    "torchfm": torchfm,
    "recbole": recbole,
    "pytorch_tabular": tabular,
    "pytorch_widedeep": widedeep,
    "pytorch_widedeep plus": functools.partial(
        widedeep, name="autoint_plus.AutoIntPlus", mlp_hidden_dims=[16], mlp_dropout=0.0
    ),
}
# Under autocast a second layer of DeepCTR-Torch raises: tensordot wants the weights in the dtype of its input.
UNDER_AUTOCAST = {**MODELS, "deepctr_torch": functools.partial(deepctr, layers=1)}


def losses(subject: Subject, autocast: bool) -> list[float]:
    """Of `STEPS` optimizer steps."""
    model, found = subject.model.train(), []
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    ids, _, clicks = rows()
    for step in range(STEPS):
        batch = torch.arange(step * BATCH, (step + 1) * BATCH) % len(ids)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = subject.logits(model, ids[batch])
        loss = nnf.binary_cross_entropy_with_logits(logits.float(), clicks[batch])
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_training(name: str, backend: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = (UNDER_AUTOCAST if autocast else MODELS)[name](rows().sizes)
    ours = copy.deepcopy(subject.model)
    report = accelerate(ours, backend=backend)
    assert len(report.replaced) in (1, 2) and not report.left, report
    expected = losses(subject, autocast)
    assert expected[-1] < expected[0]

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a call that was left to the original code")

    monkeypatch.setattr(Accelerated, "_original_forward", refuse)
    got = losses(subject._replace(model=ours), autocast)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=2e-2 if autocast else 1e-4, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_restored(name: str) -> None:
    """The state of either model is the other's, and a copy that is pickled can be restored."""
    model, logits = MODELS[name](rows().sizes)
    ids = rows().ids[:8]
    with torch.no_grad():
        expected = logits(model.eval(), ids)
        twin = copy.deepcopy(model)
        accelerate(model, backend="torch")
        twin.load_state_dict(model.state_dict())
        model.load_state_dict(twin.state_dict())
        layers = [module for module in model.modules() if isinstance(module, Accelerated)]
        file = io.BytesIO()
        torch.save(layers, file)
        file.seek(0)
        assert all(isinstance(module, Accelerated) for module in torch.load(file, weights_only=False))
        torch.testing.assert_close(logits(model, ids), expected)
        again = copy.deepcopy(model)
        restore(again)
        assert torch.equal(logits(again, ids), logits(twin, ids))
    assert [type(module) for module in again.modules()] == [type(module) for module in twin.modules()]
