"""A trained model as a program for PyTorch and for ONNX runtimes, without this package."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from .. import op
from ..files import make_folder, move_durably
from ..fused import Fused
from ..model import AutoInt
from ..weights import CONCATENATED, IDENTITY, LN2, MERGED, PROJECTION, choose_layout
from .run import Run

PROGRAM_FILE, ONNX_FILE = "model.pt2", "model.onnx"
# Of the graphs' batch, to trace them; any other runs as well.
EXAMPLE_ROWS = 2
# An ONNX file cannot have 2 GiB; a larger table goes into a file of its own beside it, model.onnx.data.
MOST_BYTES_WITHIN = 3 << 29


class FoldedLayer(nn.Module):
    """An interacting layer on folded weights in plain PyTorch: x (B, F, E) -> (B, F, O)."""

    def __init__(self, layer: Fused, n_fields: int) -> None:
        super().__init__()
        interaction = layer.interaction()
        self.layout = choose_layout(interaction, n_fields)
        parts = self.layout.parts(op.fold(interaction, self.layout, "torch"))
        h, e, d, o = self.layout[:4]
        # The parts are made for powers of two; softmax has those of e.
        self.register_buffer("a", (parts.a * LN2).reshape(e, h * d))
        self.register_buffer("c", (parts.c * LN2).reshape(h * d))
        self.register_buffer("k", parts.k.reshape(e, -1).clone())
        self.register_buffer("v", parts.v.reshape(e, -1).clone())
        # Heads that are added up are one product; those that stand side by side are one each.
        self.register_buffer(
            "m", parts.m.reshape(h * d, o).clone() if self.layout.output == MERGED else parts.m.clone()
        )
        self.register_buffer("r", parts.r.clone())
        self.register_buffer("b", parts.b + parts.g)

    def _heads(self, t: Tensor) -> Tensor:
        """(B, F, H*D) -> (B, H, F, D)"""
        return t.unflatten(2, (self.layout.n_head, self.layout.rank)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        layout = self.layout
        queries = self._heads(x @ self.a + self.c)
        keys = self._heads(x @ self.k) if layout.factored else x.unsqueeze(1)
        values = self._heads(x @ self.v) if layout.factored else x.unsqueeze(1)
        z = torch.softmax(queries @ keys.transpose(2, 3), dim=-1) @ values  # [B, H, F, D]
        if layout.output == CONCATENATED:
            z = z @ self.m
        out = z.transpose(1, 2).flatten(2)
        if layout.output == MERGED:
            out = out @ self.m
        if layout.residual == PROJECTION:
            out = out + x @ self.r
        elif layout.residual == IDENTITY:
            out = out + x
        out = out + self.b
        return torch.relu(out) if layout.relu else out


class FoldedAutoInt(nn.Module):
    """AutoInt on folded weights in plain PyTorch, for serving; what it is called with is not checked."""

    def __init__(self, model: AutoInt) -> None:
        super().__init__()
        self.n_numeric, self.n_categorical = model.n_numeric, model.n_categorical
        with torch.no_grad():
            rows = sum(model.cardinalities)
            self.register_buffer("offsets", model.offsets[: model.n_categorical].clone())
            self.register_buffer("table", model.embedding.weight[:rows].clone())
            self.register_buffer("vectors", model.embedding.weight[rows::2].clone())
            self.register_buffer("missing", model.embedding.weight[rows + 1 :: 2].clone())
            self.layers = nn.Sequential(*(FoldedLayer(layer, model.n_fields) for layer in model.layers))
        self.output, self.mlp = model.output, model.mlp

    def forward(self, categorical: Tensor, numeric: Tensor | None = None) -> Tensor:
        """categorical (B, C) int64, numeric (B, N) float32 with NaN where missing -> logits (B,)."""
        fields = []
        if self.n_categorical:
            fields.append(nnf.embedding(categorical + self.offsets, self.table))
        if self.n_numeric:
            assert numeric is not None
            unknown = numeric.isnan()
            numbers = torch.where(unknown, torch.zeros_like(numeric), numeric).unsqueeze(2) * self.vectors
            fields.append(torch.where(unknown.unsqueeze(2), self.missing, numbers))
        x = torch.cat(fields, dim=1)
        logits = self.output(self.layers(x).flatten(1))
        if self.mlp is not None:
            logits = logits + self.mlp(x.flatten(1))
        return logits.squeeze(1)


class Exported(NamedTuple):
    """Where the two are."""

    program: Path
    onnx: Path


def export_model(model: AutoInt, out: Path) -> Exported:
    """Writes `model.pt2`, a torch.export program, and `model.onnx` into a folder.

    Inputs `categorical` (B, C) int64 and, with numeric fields, `numeric` (B, N) float32, NaN where missing; output
    `logit` (B,). B is free. Weights are folded; ids are not checked.
    """
    plain = FoldedAutoInt(model).cpu().eval()
    arguments: dict[str, Tensor] = {"categorical": torch.zeros(EXAMPLE_ROWS, model.n_categorical, dtype=torch.int64)}
    if model.n_numeric:
        arguments["numeric"] = torch.zeros(EXAMPLE_ROWS, model.n_numeric, dtype=model.embedding.weight.dtype)
    dynamic = {name: {0: torch.export.Dim("batch", min=1)} for name in arguments}
    # Both writers name files themselves; so they write beside, and what is whole takes its place.
    with torch.no_grad(), _quiet(), tempfile.TemporaryDirectory(prefix=".export-", dir=out) as aside:
        program = torch.export.export(plain, (), arguments, dynamic_shapes=dynamic)
        # By way of memory: with a full disk, torch's own writing ends the process.
        saved = io.BytesIO()
        torch.export.save(program, saved)
        Path(aside, PROGRAM_FILE).write_bytes(saved.getbuffer())
        torch.onnx.export(
            program,
            (),
            Path(aside, ONNX_FILE),
            kwargs=arguments,
            dynamo=True,
            input_names=list(arguments),
            output_names=["logit"],
            external_data=plain.table.nbytes > MOST_BYTES_WITHIN,
            verbose=False,
        )
        for made in sorted(Path(aside).iterdir(), key=lambda path: path.name == ONNX_FILE):
            move_durably(made, out / made.name)
    return Exported(out / PROGRAM_FILE, out / ONNX_FILE)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of itself: libraries that no model here needs, names of axes, what is deprecated."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.|copyreg")
            yield
    finally:
        logging.disable(before)


def export(run: str | os.PathLike[str], out: str | os.PathLike[str], *, force: bool = False) -> Exported:
    """A run's best model as `export_model` writes it, into the folder `out`.

    Raises FileExistsError for a folder that is not empty, unless with `force`; OSError.
    """
    model = Run.open(Path(run)).model()
    folder = Path(out)
    make_folder(folder, force)
    return export_model(model.unfreeze(), folder)  # type: ignore[arg-type]
