"""AutoInt, the whole model: from ids and numbers to the logit of a click."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from . import dispatch
from .layer import InteractingLayer
from .paper import PaperInteractingLayer
from .validation import check_dropout, check_flag, check_size, describe

LAYERS = ("standard", "paper")
# As the authors draw theirs.
EMBEDDING_STD = 0.01


def _look_up(table: Tensor, ids: Tensor, numeric: Tensor | None, missing: Tensor | None) -> Tensor:
    x = nnf.embedding(ids, table)
    if numeric is not None and missing is not None:
        x[:, -numeric.shape[1] :].mul_(numeric.masked_fill(missing, 1.0).unsqueeze(2))
    return x


class _Lookup(torch.autograd.Function):
    """x[b, f] = table[ids[b, f]], in the last fields times numeric[b, n] where that is not missing.

    Written by hand, as autograd would copy x to cut it into kinds of fields, and its gradient to put it together.
    """

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, ids: Tensor, numeric: Tensor | None, missing: Tensor | None, sparse: bool
    ) -> Tensor:
        ctx.save_for_backward(table, ids, numeric, missing)
        ctx.sparse = sparse
        return _look_up(table, ids, numeric, missing)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, ids, numeric, missing = ctx.saved_tensors
        n = 0 if numeric is None else numeric.shape[1]
        categorical, rows = ids.shape[1] - n, table.shape[0]
        flat = ids[:, :categorical].reshape(-1)
        values = grad[:, :categorical].reshape(-1, table.shape[1])
        pairs = d_numeric = None
        if numeric is not None:
            present = numeric.masked_fill(missing, 0.0)
            d_x = grad[:, categorical:]
            # A numeric field has two rows of the table, one behind the other: for numbers, and for what is missing.
            weights = torch.stack([present, missing.to(present.dtype)], dim=2)
            pairs = torch.einsum("bnk,bne->nke", weights, d_x).reshape(2 * n, -1)
            if ctx.needs_input_grad[2]:
                d_numeric = (d_x * table[rows - 2 * n :: 2]).sum(2).masked_fill(missing, 0.0)
        if not ctx.needs_input_grad[0]:
            return None, None, d_numeric, None, None
        if ctx.sparse:
            if pairs is not None:
                flat = torch.cat([flat, torch.arange(rows - 2 * n, rows, device=flat.device)])
                values = torch.cat([values, pairs])
            # The ids were looked up, so they are in range.
            d_rows = torch.sparse_coo_tensor(flat.unsqueeze(0), values, table.shape, check_invariants=False)
            return d_rows, None, d_numeric, None, None
        if grad.is_cpu:
            # It sorts the ids and takes half the time of embedding's own backward; on a GPU it would add atomically.
            d_table = torch.zeros_like(table).index_add(0, flat, values)
        else:
            d_table = torch.ops.aten.embedding_dense_backward(values, flat, rows, -1, False)
        if pairs is not None:
            d_table[rows - 2 * n :] = pairs
        return d_table, None, d_numeric, None, None


class AutoInt(nn.Module):
    """AutoInt (Song et al., CIKM 2019): embeddings of all fields, interacting layers, a logit; with `mlp` AutoInt+.

    Fields stand in the order categorical, numeric. A categorical field's vector is the row of its id, where id 0 means
    missing or unseen; a numeric field's is v_m * x_m (the paper's equation 4), or, where x_m is NaN, that is missing, a
    vector learned for that. The logit is a linear function of what the last layer gives, plus that of the MLP, which
    sees the same vectors, if there is one (the paper's section 4.5).

    Args:
        cardinalities: number of ids of each categorical field, 0 among them.
        n_numeric: number of numeric fields N.
        emb_size: embedding size E.
        n_layers: number of interacting layers.
        n_head: heads of each.
        layer: "standard", an InteractingLayer whose heads are as wide as the embedding, or "paper", a
            PaperInteractingLayer.
        att_size: with layer="paper", its width over all heads (n_head * emb_size unless given).
        mlp: widths of the hidden layers of AutoInt+; none for AutoInt.
        dropout: behind each of these hidden layers, and nowhere else.
        sparse: whether the table gets sparse gradients, for torch.optim.SparseAdam, or dense ones.
        validate: whether values are checked, ids out of range and infinite numbers, which on a GPU waits for the device
            at every call. None: on a CPU only. Never while compiling or exporting. With an invalid id and without the
            check, a row of another field, or none, is looked up.
        names: of the fields, categorical ones first, for errors.
        backend: the engine of the interacting layers, as for InteractingLayer.
        device, dtype: of the parameters, as for torch.nn.Linear.

    Parameters: `embedding.weight` (sum of cardinalities + 2 N, E), the rows of all fields, one behind the other, of
    which a numeric field has v_m and the vector of what is missing; `layers`, `output`: Linear(F * width, 1); `mlp`.

    Raises TypeError or ValueError naming the argument.
    """

    offsets: Tensor
    highest: Tensor

    def __init__(
        self,
        cardinalities: Sequence[int],
        n_numeric: int = 0,
        emb_size: int = 16,
        n_layers: int = 3,
        n_head: int = 2,
        *,
        layer: str = "standard",
        att_size: int | None = None,
        mlp: Sequence[int] = (),
        dropout: float = 0.0,
        sparse: bool = False,
        validate: bool | None = None,
        names: Sequence[str] | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        cardinalities = _sizes("cardinalities", cardinalities)
        mlp = _sizes("mlp", mlp)
        if n_numeric != 0 or isinstance(n_numeric, bool):
            check_size("n_numeric", n_numeric)
        if not cardinalities and not n_numeric:
            raise ValueError("cardinalities: expected at least one field, categorical or numeric, got none")
        for name, size in (("emb_size", emb_size), ("n_layers", n_layers), ("n_head", n_head)):
            check_size(name, size)
        if layer not in LAYERS:
            raise ValueError(f"layer: expected one of {', '.join(LAYERS)}, got {layer!r}")
        if att_size is not None and layer != "paper":
            raise ValueError(f'att_size: expected None but for layer="paper", got {att_size}')
        check_dropout(dropout)
        check_flag("sparse", sparse)
        if validate is not None:
            check_flag("validate", validate)
        dispatch.check_backend(backend)
        self.cardinalities, self.n_numeric, self.emb_size = cardinalities, n_numeric, emb_size
        self.n_categorical, self.n_fields = len(cardinalities), len(cardinalities) + n_numeric
        self.validate = validate
        self.names = _names(names, self.n_categorical, n_numeric)

        # A number has a row to look up, and what is missing the next one.
        n_rows = sum(cardinalities) + 2 * n_numeric
        rows = nn.init.normal_(torch.empty(n_rows, emb_size, device=device, dtype=dtype), std=EMBEDDING_STD)
        # A module, as that is where DistributedDataParallel looks for sparse gradients; it is never called.
        self.embedding = nn.Embedding.from_pretrained(rows, freeze=False, sparse=sparse)
        self._set_ranges(self.embedding.weight.device)

        kind: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype}
        if layer == "standard":
            width = emb_size
            self.layers = nn.ModuleList(InteractingLayer(n_head, emb_size, 0.0, **kind) for _ in range(n_layers))
        else:
            width = n_head * emb_size if att_size is None else att_size
            widths = [emb_size] + [width] * (n_layers - 1)
            self.layers = nn.ModuleList(PaperInteractingLayer(e, width, n_head, **kind) for e in widths)
        self.output = nn.Linear(self.n_fields * width, 1, device=device, dtype=dtype)
        self.mlp = _mlp(self.n_fields * emb_size, mlp, dropout, device, dtype) if mlp else None

    def forward(
        self,
        categorical: Tensor,
        numeric: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        return_attention: bool = False,
    ) -> Any:
        """categorical (B, C) int64, numeric (B, N) floating -> logits (B,); F = C + N.

        numeric: NaN where missing; None without numeric fields. mask: bool, True = hidden, as the layers take it:
            (B, 1, F) to hide fields of a sample. return_attention: gives (logits, [P (B, H, F, F) of each layer]), at
            the cost of the reference layer.

        Raises TypeError for what is no tensor, ValueError naming the field for wrong widths and dtypes and, as
        `validate` says, for ids out of range and infinite numbers.
        """
        x = self.embed(categorical, numeric)
        deep = x
        attention = []
        for layer in self.layers:
            if return_attention:
                x, p = layer(x, mask, return_attention=True)
                attention.append(p)
            else:
                x = layer(x, mask)
        logits = self.output(x.flatten(1)).squeeze(1)
        if self.mlp is not None:
            logits = logits + self.mlp(deep.flatten(1)).squeeze(1)
        return (logits, attention) if return_attention else logits

    def embed(self, categorical: Tensor, numeric: Tensor | None = None) -> Tensor:
        """The vectors of the fields, (B, F, E), of what `forward` takes."""
        self._check_form(categorical, numeric)
        table = self.embedding.weight
        validate = categorical.is_cpu if self.validate is None else self.validate
        missing = None
        if numeric is None:
            ids = categorical + self.offsets
        else:
            numeric = numeric if numeric.dtype == table.dtype else numeric.to(table.dtype)
            missing = numeric.isnan()
            ids = torch.cat([categorical, missing], dim=1).add_(self.offsets)
        if validate and not torch.compiler.is_compiling():
            self._check_values(categorical, numeric, missing)
        if torch.is_grad_enabled():
            return _Lookup.apply(table, ids, numeric, missing, self.embedding.sparse)  # type: ignore[no-any-return]
        # Past autograd, which shows in the time of a call of one sample.
        return _look_up(table, ids, numeric, missing)

    def freeze(self) -> AutoInt:
        """Folds the interacting layers' weights until `unfreeze()`, `train(True)` or `load_state_dict`; gives self.

        For serving. Raises ValueError in training mode.
        """
        for layer in self.layers:
            layer.freeze()  # type: ignore[operator]
        return self

    def unfreeze(self) -> AutoInt:
        """Undoes `freeze()`; gives self."""
        for layer in self.layers:
            layer.unfreeze()  # type: ignore[operator]
        return self

    def extra_repr(self) -> str:
        return f"{self.n_categorical} categorical fields, {self.n_numeric} numeric"

    def _set_ranges(self, device: torch.device) -> None:
        """Where the fields' rows begin in the table, and the highest id of each categorical field."""
        starts = list(itertools.accumulate([*self.cardinalities, *[2] * self.n_numeric], initial=0))
        highest = torch.tensor([size - 1 for size in self.cardinalities], dtype=torch.int64, device=device)
        self.register_buffer("offsets", torch.tensor(starts[:-1], device=device), persistent=False)
        self.register_buffer("highest", highest, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> AutoInt:
        had_no_memory = self.offsets.is_meta
        super()._apply(fn, recurse)
        if had_no_memory and not self.offsets.is_meta:
            # No checkpoint has them, and `to_empty` leaves whatever was in memory.
            self._set_ranges(self.offsets.device)
        return self

    def _check_form(self, categorical: Tensor, numeric: Tensor | None) -> None:
        expected = f"a (B, {self.n_categorical}) int64 tensor"
        if not isinstance(categorical, Tensor):
            raise TypeError(f"categorical: expected {expected}, got {describe(categorical)}")
        if categorical.ndim != 2 or categorical.shape[1] != self.n_categorical or categorical.dtype != torch.int64:
            raise ValueError(f"categorical: expected {expected}, got {describe(categorical)}")
        if not self.n_numeric:
            if numeric is not None:
                raise ValueError(f"numeric: expected None, as there are no numeric fields, got {describe(numeric)}")
            return
        expected = f"a ({categorical.shape[0]}, {self.n_numeric}) floating-point tensor beside categorical"
        if numeric is not None and not isinstance(numeric, Tensor):
            raise TypeError(f"numeric: expected {expected}, got {describe(numeric)}")
        if (
            numeric is None
            or numeric.ndim != 2
            or numeric.shape[1] != self.n_numeric
            or numeric.shape[0] != categorical.shape[0]
            or not numeric.is_floating_point()
            or numeric.device != categorical.device
        ):
            raise ValueError(f"numeric: expected {expected}, got {describe(numeric)}")

    def _check_values(self, categorical: Tensor, numeric: Tensor | None, missing: Tensor | None) -> None:
        # An id's sign bit is set if it is negative, and that of its distance to the highest if it is too high.
        if categorical.numel() and (categorical | (self.highest - categorical)).amin() < 0:
            wrong = (categorical < 0) | (categorical > self.highest)
            row, field = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"categorical: expected ids from 0 to {self.cardinalities[field] - 1} in field "
                f"{self.names[field]}, got {categorical[row, field]} in row {row}"
            )
        # A finite sum is the shortest proof that no number is infinite.
        if numeric is not None and not math.isfinite(numeric.detach().nansum()) and numeric.isinf().any():
            row, field = numeric.isinf().nonzero()[0].tolist()
            raise ValueError(
                f"numeric: expected finite numbers, or NaN where missing, in field "
                f"{self.names[self.n_categorical + field]}, got {numeric[row, field]} in row {row}"
            )


def _sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise TypeError(f"{name}: expected a sequence of ints of at least 1, got {describe(sizes)}")
    for i, size in enumerate(sizes):
        check_size(f"{name}[{i}]", size)
    return tuple(sizes)


def _names(names: Sequence[str] | None, n_categorical: int, n_numeric: int) -> tuple[str, ...]:
    if names is None:
        categorical = (f"categorical[{i}]" for i in range(n_categorical))
        return (*categorical, *(f"numeric[{i}]" for i in range(n_numeric)))
    if len(names) != n_categorical + n_numeric:
        raise ValueError(f"names: expected {n_categorical + n_numeric} names of fields, got {len(names)}")
    return tuple(names)


def _mlp(
    width: int, hidden: Sequence[int], dropout: float, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Sequential:
    modules: list[nn.Module] = []
    for size in hidden:
        modules += [nn.Linear(width, size, device=device, dtype=dtype), nn.ReLU(), nn.Dropout(dropout)]
        width = size
    return nn.Sequential(*modules, nn.Linear(width, 1, device=device, dtype=dtype))
