"""Models as programs of their own: same numbers, any batch, this package not needed."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoint_fast import AutoInt
from autoint_fast.training import Settings, export, train
from autoint_fast.training.run import Run
from tests.clicks import prepared

onnxruntime = pytest.importorskip("onnxruntime")

CARDINALITIES = [5, 3, 11]
KINDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "paper, folded": {"layer": "paper", "att_size": 32, "n_layers": 1},
    "paper, factored": {"layer": "paper", "emb_size": 32, "att_size": 16},
    "AutoInt+": {"mlp": (7, 6), "dropout": 0.5},
    "no numeric fields": {"n_numeric": 0},
    "numeric fields only": {"cardinalities": []},
}
PARITY = 1e-5


def make(**options: Any) -> AutoInt:
    model = AutoInt(**{"cardinalities": CARDINALITIES, "n_numeric": 2, "emb_size": 8, "backend": "torch", **options})
    nn.init.normal_(model.embedding.weight, std=0.7)
    return model.eval()


def draw(model: AutoInt, batch: int) -> dict[str, Tensor]:
    ids = [torch.randint(0, size, (batch,)) for size in model.cardinalities]
    arguments = {"categorical": torch.stack(ids, 1) if ids else torch.zeros(batch, 0, dtype=torch.int64)}
    if model.n_numeric:
        numeric = torch.randn(batch, model.n_numeric)
        numeric[torch.rand(numeric.shape) < 0.3] = torch.nan
        arguments["numeric"] = numeric
    return arguments


@pytest.mark.parametrize("kind", KINDS)
def test_folded_in_plain_pytorch(kind: str) -> None:
    """In float64, where nothing but the algebra counts."""
    from autoint_fast.training.export import FoldedAutoInt

    model = make(dtype=torch.float64, **KINDS[kind])
    forms = {layer.layout(model.n_fields).factored for layer in model.layers}
    assert forms == {int(kind == "paper, factored")}
    arguments = {name: t.double() if t.is_floating_point() else t for name, t in draw(model, 33).items()}
    with torch.no_grad():
        torch.testing.assert_close(FoldedAutoInt(model)(**arguments), model(**arguments), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_parity_in_both_runtimes_at_any_batch(kind: str, tmp_path: Path) -> None:
    from autoint_fast.training.export import export_model

    model = make(**KINDS[kind])
    written = export_model(model, tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(written)
    program = torch.export.load(written.program).module()
    session = onnxruntime.InferenceSession(written.onnx)
    for batch in (1, 2, 33, 1000):
        arguments = draw(model, batch)
        with torch.no_grad():
            expected = model(**arguments)
        assert (program(**arguments) - expected).abs().max() <= PARITY
        (logits,) = session.run(["logit"], {name: t.numpy() for name, t in arguments.items()})
        np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=PARITY)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    from autoint_fast.training.export import export_model

    model = make().train()
    before = copy.deepcopy(model.state_dict())
    export_model(model, tmp_path)
    assert model.training and all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    model(**draw(model, 3)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_layers_of_every_kind(tmp_path: Path) -> None:
    """Those that `AutoInt` does not build, but an `Interaction` can describe."""
    from autoint_fast import InteractingParameters, Interaction
    from autoint_fast.fused import Fused
    from autoint_fast.reference import interaction_reference
    from autoint_fast.training.export import FoldedLayer

    class Layer(Fused):
        def __init__(self, interaction: Interaction) -> None:
            super().__init__()
            self.given = interaction

        def interaction(self) -> Interaction:
            return self.given

    e, h, d, o = 6, 2, 3, 5
    shapes = ((h * d, e), (h * d,), (h * d, e), (h * d,), (h * d, e), (h * d,), (o, h * d), (o,), (o, e), (o,))
    full = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    concatenated = [*full[:6], None, None, torch.randn(h * d, e, dtype=torch.float64), None]
    x = torch.randn(4, 7, e, dtype=torch.float64)
    for parameters, residual, relu in (
        (full, "projection", True),
        ([*full[:8], None, None], "none", False),
        (concatenated, "projection", True),
        ([*full[:4], *[None] * 6], "none", True),
        ([*full[:6], torch.randn(e, h * d, dtype=torch.float64), None, None, None], "identity", True),
    ):
        interaction = Interaction(InteractingParameters(*parameters), h, 0.4, residual, relu)
        expected, _ = interaction_reference(x, interaction)
        for fields in (1, 1000):
            got = FoldedLayer(Layer(interaction), fields)(x)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


WITHOUT = """
import sys
for name in ("autoint_fast", "onnxscript", "einops", "triton"):
    sys.modules[name] = None
import torch
program, onnx, arguments = sys.argv[1:]
inputs = torch.load(arguments)
expected = inputs.pop("expected")
error = (torch.export.load(program).module()(**inputs) - expected).abs().max()
assert error < 1e-5, error
import onnxruntime
(logits,) = onnxruntime.InferenceSession(onnx).run(None, {name: t.numpy() for name, t in inputs.items()})
assert abs(logits - expected.numpy()).max() < 1e-5
"""


def test_a_trained_run_exported_runs_without_this_package(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    train(data, tmp_path / "run", Settings(n_layers=2, backend="torch", batch_size=200, epochs=1))
    written = export(tmp_path / "run", tmp_path / "out")
    model = Run.open(tmp_path / "run").model()
    arguments = draw(model, 9)
    with torch.no_grad():
        torch.save({**arguments, "expected": model(**arguments)}, tmp_path / "arguments.pt")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *written, tmp_path / "arguments.pt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(FileExistsError, match="--force"):
        export(tmp_path / "run", tmp_path / "out")
    export(tmp_path / "run", tmp_path / "out", force=True)
    assert sorted((tmp_path / "out").iterdir()) == sorted(written)


def test_a_table_too_large_for_an_onnx_file_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    module = importlib.import_module("autoint_fast.training.export")
    monkeypatch.setattr(module, "MOST_BYTES_WITHIN", 0)
    model = make()
    written = module.export_model(model, tmp_path)
    assert (tmp_path / "model.onnx.data").stat().st_size > model.embedding.weight[:19].nbytes
    arguments = draw(model, 3)
    (logits,) = onnxruntime.InferenceSession(written.onnx).run(None, {k: t.numpy() for k, t in arguments.items()})
    np.testing.assert_allclose(logits, model(**arguments).detach().numpy(), rtol=0, atol=PARITY)
