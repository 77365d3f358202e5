"""Checks of user input: one error that names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .weights import RESIDUALS, InteractingParameters, Interaction


def describe(value: object) -> str:
    """What came, in words, for an error message."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def check_size(name: str, value: int) -> None:
    """`value` is an int of at least 1.

    Raises TypeError for another type (bool included), ValueError below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int of at least 1, got {describe(value)}")
    if value < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {value}")


def check_flag(name: str, value: bool) -> None:
    """`value` is True or False. Raises TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")


def check_dropout(value: float) -> None:
    """`value` is a number in [0, 1). Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"dropout: expected a number in [0, 1), got {describe(value)}")
    if not 0 <= value < 1:
        raise ValueError(f"dropout: expected a number in [0, 1), got {value}")


def check_input(x: Tensor, emb_size: int, n_fields: int | None = None) -> None:
    """`x` is a floating (B, F, E) tensor; `n_fields`: F, where only one will do.

    Raises TypeError for what is no tensor or no floating one, ValueError for the wrong rank or width, or other fields.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a (B, {n_fields or 'F'}, {emb_size}) tensor, got {describe(x)}")
    if x.ndim != 3 or x.shape[2] != emb_size or (n_fields is not None and x.shape[1] != n_fields):
        raise ValueError(f"x: expected the shape (B, {n_fields or 'F'}, {emb_size}), got {describe(x)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point dtype, got {describe(x)}")


class Misfit(ValueError):
    """Parameters that do not fit together."""


def check_parameters(interaction: Interaction, names: Sequence[str] = InteractingParameters._fields) -> None:
    """The tensors of `interaction` fit together: shapes as in `InteractingParameters`, one dtype and device.

    names: of the ten parameters, for the error. Raises Misfit, a ValueError.
    """
    p, h, residual = interaction.parameters, interaction.n_head, interaction.residual
    w_q, w_v, w_o, w_r = p.w_q, p.w_v, p.w_o, p.w_r
    if w_q.ndim != 2 or w_q.shape[0] % h:
        raise Misfit(f"{names[0]}: expected the shape ({h} heads * width, E), got {describe(w_q)}")
    rows, e = w_q.shape
    o = w_o.shape[0] if w_o is not None else rows if w_v is not None else h * e
    shapes = ((rows, e), (rows,), (rows, e), (rows,), (rows, e), (rows,), (o, rows), (o,), (o, e), (o,))
    dtype, device = w_q.dtype, w_q.device
    for name, t, shape in zip(names, p, shapes, strict=True):
        if t is not None and (t.shape != shape or t.dtype != dtype or t.device != device):
            expected = f"the shape {shape}, and the dtype and device of the others, {dtype} on {device}"
            raise Misfit(f"{name}: expected {expected}, got {describe(t)}")
    if residual not in RESIDUALS:
        raise Misfit(f"residual: expected one of {', '.join(RESIDUALS)}, got {residual!r}")
    if (w_r is None) == (residual == "projection") or (w_r is None and p.b_r is not None):
        raise Misfit(f"{names[8]}: expected a tensor where the residual is a projection only, got {residual!r}")
    if residual == "identity" and o != e:
        raise Misfit(f"residual: expected outputs as wide as x to add x, {e}, got {o}")
    if w_v is None and (p.b_v is not None or w_o is not None):
        raise Misfit(f"{names[4]}: expected a tensor where there is a bias or an output projection, got None")


def check_dtype(x: Tensor, weights: Tensor) -> torch.dtype:
    """The dtype the layer computes and answers in: autocast's where it applies, else x's.

    Raises ValueError where `x` is not beside its weights, TypeError where their dtypes differ and autocast does not
    bring them together.
    """
    on_cpu = x.is_cpu  # several times as fast as making a torch.device to ask
    if not (on_cpu and weights.is_cpu) and x.device != weights.device:
        raise ValueError(f"x: expected the device of the layer's weights, {weights.device}, got {describe(x)}")
    device_type = "cpu" if on_cpu else x.device.type
    double = x.dtype == torch.float64 or weights.dtype == torch.float64
    if device_type != "meta" and not double and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    if x.dtype != weights.dtype:
        raise TypeError(
            f"x: expected the dtype of the layer's weights, {weights.dtype}, got {x.dtype}; "
            "convert x or the layer, or use torch.autocast"
        )
    return x.dtype


def check_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """`mask`, True = hidden, as a view of three dimensions, each 1 or that of (B, F, F); never expanded.

    Raises TypeError for what is no bool tensor, ValueError for another shape or device.
    """
    if mask is None:
        return None
    batch, fields = x.shape[0], x.shape[1]
    expected = "a bool tensor (True = hidden) of 1 to 3 dimensions that broadcasts to (B, F, F)"
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected {expected}, got {describe(mask)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected {expected}, got {describe(mask)}")
    if mask.device != x.device:
        raise ValueError(f"mask: expected the device of x, {x.device}, got {describe(mask)}")
    if 1 <= mask.ndim <= 3:
        full = mask.reshape((1,) * (3 - mask.ndim) + tuple(mask.shape))
        rows, queries, keys = full.shape
        if (rows == 1 or rows == batch) and (queries == 1 or queries == fields) and (keys == 1 or keys == fields):
            return full
    hint = ""
    if mask.ndim == 2 and mask.shape[0] == batch and mask.shape[1] == fields:
        hint = "; two dimensions mean (F, F): a (B, F) mask of hidden fields is `mask[:, None]`"
    raise ValueError(f"mask: expected {expected}, here ({batch}, {fields}, {fields}), got {describe(mask)}{hint}")
