"""What a training run is made with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..model import AutoInt
from ..validation import check_flag, check_size

if TYPE_CHECKING:
    from ..clicklog.schema import Schema


@dataclasses.dataclass(frozen=True)
class Settings:
    """The model and how it is trained. Raises TypeError or ValueError naming the setting.

    Attributes:
        emb_size, n_layers, n_head, layer, att_size, mlp, dropout, sparse, backend: as for `AutoInt`.
        epochs: the most passes over the training rows.
        batch_size: rows of a step, over all processes.
        learning_rate: of Adam, and with sparse gradients of the table's SparseAdam.
        patience: evaluations without a lower validation logloss after which training stops.
        evaluate_every: steps between evaluations, beside the one at the end of each epoch; None: only those.
        checkpoint_every: steps between checkpoints, beside the one at each evaluation.
        amp: whether to compute in bf16 by autocast; weights and optimizer stay fp32.
        compile: whether to run the model through torch.compile.
        seed: of the initial weights, the order of rows and the dropout.
    """

    emb_size: int = 16
    n_layers: int = 3
    n_head: int = 2
    layer: str = "standard"
    att_size: int | None = None
    mlp: Sequence[int] = ()
    dropout: float = 0.0
    sparse: bool = False
    backend: str = "auto"
    epochs: int = 10
    batch_size: int = 4096
    learning_rate: float = 1e-3
    patience: int = 1
    evaluate_every: int | None = None
    checkpoint_every: int = 1000
    amp: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp", tuple(self.mlp))
        for name in ("epochs", "batch_size", "patience", "checkpoint_every"):
            check_size(name, getattr(self, name))
        if self.evaluate_every is not None:
            check_size("evaluate_every", self.evaluate_every)
        for name in ("amp", "compile"):
            check_flag(name, getattr(self, name))
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a number above zero, got {self.learning_rate}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed: expected an int from 0 to 2**32 - 1, got {self.seed!r}")
        # The model's own checks, before any row is read.
        AutoInt([1], **self._model_options(), device="meta")

    def model(self, schema: Schema, device: torch.device | str = "cpu") -> AutoInt:
        """A model for the fields of `schema`, its weights drawn on the CPU, so that they are the same on any device."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            model = AutoInt(
                schema.cardinalities, len(schema.numeric), names=schema.fields, device="cpu", **self._model_options()
            )
        return model.to(device)

    def _model_options(self) -> dict[str, Any]:
        names = ("emb_size", "n_layers", "n_head", "layer", "att_size", "mlp", "dropout", "sparse", "backend")
        return {name: getattr(self, name) for name in names}
