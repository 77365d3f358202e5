"""The interacting layer as its definition: einops and einsum, any device, dtype and order of derivative.

Everything else in this package is judged by what stands here; it is never the fast path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn

from .projections import read_projections
from .validation import check_dropout, check_dtype, check_input, check_mask, check_parameters, check_size
from .weights import InteractingParameters, Interaction


def _heads(x: Tensor, weight: Tensor, bias: Tensor | None, n_head: int) -> Tensor:
    """A projection of x (B, F, E), cut into heads: (H, B, F, d)."""
    return rearrange(nnf.linear(x, weight, bias), "b f (h d) -> h b f d", h=n_head)


def attention_probabilities(x: Tensor, interaction: Interaction, mask: Tensor | None) -> Tensor:
    """P_h = softmax(scale Q_h K_h^T) over the fields that are not hidden.

    x (B, F, E); mask None or bool, True = hidden, broadcasting to (B, F, F). Gives (H, B, F, F). A row whose
    every key is hidden is zero, as in `scaled_dot_product_attention`.
    """
    p, n_head = interaction.parameters, interaction.n_head
    q, k = _heads(x, p.w_q, p.b_q, n_head), _heads(x, p.w_k, p.b_k, n_head)
    logits = torch.einsum("hbqd,hbkd->hbqk", q, k) * interaction.scale
    if mask is None:
        return torch.softmax(logits, dim=-1)
    # An all-hidden row keeps finite logits until after the softmax: -inf throughout would make its gradient NaN.
    empty = mask.all(dim=-1, keepdim=True)
    logits = logits.masked_fill(mask & ~empty, -math.inf)
    return torch.softmax(logits, dim=-1).masked_fill(empty, 0.0)


def interaction_reference(x: Tensor, interaction: Interaction, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """end( concat_h(P_h V_h) Wo + bo + residual ) as `Interaction` says, and P (H, B, F, F).

    AutoInt (Song et al., CIKM 2019), equations 5 to 8, and what libraries have made of them.
    x (B, F, E) -> (B, F, O), any floating dtype.
    """
    p = interaction.parameters
    attention = attention_probabilities(x, interaction, mask)
    v = x.expand(interaction.n_head, *x.shape) if p.w_v is None else _heads(x, p.w_v, p.b_v, interaction.n_head)
    heads = torch.einsum("hbqk,hbkd->hbqd", attention.to(v.dtype), v)
    out = rearrange(heads, "h b f d -> b f (h d)")
    if p.w_o is not None:
        out = nnf.linear(out, p.w_o, p.b_o)
    elif p.b_o is not None:
        out = out + p.b_o
    if interaction.residual == "projection":
        assert p.w_r is not None
        out = out + nnf.linear(x, p.w_r, p.b_r)
    elif interaction.residual == "identity":
        out = out + x
    return torch.relu(out) if interaction.relu else out, attention


def interacting_reference(
    x: Tensor, p: InteractingParameters, n_head: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """relu( concat_h(P_h V_h) Wo + bo + x Wr + br ) with logits over sqrt(d), and P (H, B, F, F).

    x (B, F, E) -> (B, F, E), any floating dtype.
    """
    scale = 1 / math.sqrt(p.w_q.shape[0] // n_head)
    return interaction_reference(x, Interaction(p, n_head, scale, "projection"), mask)


PROJECTIONS = ("w_qs", "w_ks", "w_vs", "fc_attn", "fc_res")


class ReferenceInteractingLayer(nn.Module):
    """AutoInt's interacting layer in plain PyTorch: the definition, and the last resort.

    Args:
        n_head: number of heads H; each is as wide as the embedding.
        emb_size: embedding size E.
        dropout: accepted for the signature's sake and, as in the layer people have, never applied.
        device, dtype: of the parameters, as for `torch.nn.Linear`.

    Parameters: `w_qs`, `w_ks`, `w_vs`: Linear(E, H*E); `fc_attn`: Linear(H*E, E); `fc_res`: Linear(E, E).
    `fc_res` is often declared Linear(H*E, E), which runs for H=1 only; at H=1 the two are the same.

    Raises TypeError or ValueError naming the argument.
    """

    parameter_names: Sequence[str] = tuple(f"{name}.{kind}" for name in PROJECTIONS for kind in ("weight", "bias"))

    def __init__(
        self,
        n_head: int,
        emb_size: int,
        dropout: float = 0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("n_head", n_head)
        check_size("emb_size", emb_size)
        check_dropout(dropout)
        self.n_head = n_head
        self.emb_size = emb_size
        self.dropout = dropout
        self.scale = 1 / math.sqrt(emb_size)
        width = n_head * emb_size
        # The order of the random draws is part of the contract: a seed gives the weights it always gave.
        self.w_qs = nn.Linear(emb_size, width, device=device, dtype=dtype)
        self.w_ks = nn.Linear(emb_size, width, device=device, dtype=dtype)
        self.w_vs = nn.Linear(emb_size, width, device=device, dtype=dtype)
        for projection in (self.w_qs, self.w_ks, self.w_vs):
            nn.init.normal_(projection.weight, mean=0.0, std=math.sqrt(2.0 / (emb_size + emb_size)))
        self.fc_attn = nn.Linear(width, emb_size, device=device, dtype=dtype)
        nn.init.xavier_normal_(self.fc_attn.weight)
        self.fc_res = nn.Linear(emb_size, emb_size, device=device, dtype=dtype)
        nn.init.xavier_normal_(self.fc_res.weight)

    def interacting_parameters(self) -> InteractingParameters:
        """The layer's tensors, read now, so that parametrisations and swapped parameters count."""
        return InteractingParameters(*read_projections(self, PROJECTIONS))

    def interaction(self) -> Interaction:
        """What the layer computes, with its tensors as they are now."""
        return Interaction(self.interacting_parameters(), self.n_head, self.scale, "projection")

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, F, E) -> (B, F, E); with `return_attention` also P (B, H, F, F).

        `mask`: bool, True = hidden, 1 to 3 dimensions broadcasting to (B, F, F). A row whose every key is hidden
        gets no attention: relu(bo + x Wr + br). Raises TypeError or ValueError naming the argument.
        """
        check_input(x, self.emb_size)
        mask = check_mask(mask, x)
        interaction = self.interaction()
        check_parameters(interaction, self.parameter_names)
        check_dtype(x, interaction.parameters.w_q)
        out, attention = interaction_reference(x, interaction, mask)
        return (out, attention.transpose(0, 1)) if return_attention else out

    def extra_repr(self) -> str:
        return f"n_head={self.n_head}, emb_size={self.emb_size}, dropout={self.dropout} (never applied)"

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):  # type: ignore[no-untyped-def]
        weight = state_dict.get(prefix + "fc_res.weight")
        impossible = (self.emb_size, self.n_head * self.emb_size)
        if self.n_head > 1 and isinstance(weight, Tensor) and tuple(weight.shape) == impossible:
            errors.append(
                f"{prefix}fc_res.weight has the shape {impossible} of a Linear(n_head*emb_size, emb_size). Applied to "
                f"x of width {self.emb_size}, as the layer is defined, such a layer never ran with n_head > 1, so "
                f"this checkpoint holds no trained residual; this layer's fc_res is Linear(emb_size, emb_size)."
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
