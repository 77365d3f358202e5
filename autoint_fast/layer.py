"""The drop-in layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .fused import Fused
from .projections import read_projections
from .reference import PROJECTIONS, ReferenceInteractingLayer
from .validation import check_input, check_mask
from .weights import Kind, Layout, layout_of


class InteractingLayer(ReferenceInteractingLayer, Fused):
    """AutoInt's interacting layer, fused: same arguments, parameters, draws and state_dict as the reference.

    Args:
        n_head: number of heads H; each is as wide as the embedding.
        emb_size: embedding size E.
        dropout: accepted for the signature's sake and, as in the layer people have, never applied.
        backend: "auto" takes the engine expected fastest of those that support a call and ends at the reference;
            "triton", "native", "torch" or "reference" is used, or the call raises ValueError with every reason why not.
        device, dtype: of the parameters, as for `torch.nn.Linear`.

    The weights are folded at every call (on a GPU: one small launch; on a CPU without gradients only where they have
    changed, which is proved by comparing them), so nothing can be stale; `freeze()` skips that.
    Fused engines differentiate once; for second-order gradients use backend="reference".

    Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self,
        n_head: int,
        emb_size: int,
        dropout: float = 0.1,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dispatch.check_backend(backend)
        super().__init__(n_head, emb_size, dropout, device=device, dtype=dtype)
        self.backend = backend

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, F, E) -> (B, F, E); with `return_attention` also P (B, H, F, F), hidden rows zero.

        x: fp32, bf16, fp16 or fp64 like the weights; under autocast the output has autocast's dtype.
        mask: bool, True = hidden, 1 to 3 dimensions that broadcast to (B, F, F): (F, F) for all samples, (B, 1, F)
            to hide fields of a sample. A row whose every key is hidden gets no attention: relu(bo + x Wr + br).
        return_attention: P is then computed as the reference does, at the reference's cost.

        Raises TypeError or ValueError naming the argument.
        """
        check_input(x, self.emb_size)
        return self.fused(x, check_mask(mask, x), return_attention)

    def _described(self) -> tuple[Sequence[Tensor | None], Kind]:
        return read_projections(self, PROJECTIONS), (self.n_head, self.scale, "projection", True)

    def layout(self, n_fields: int) -> Layout:
        # The weights need not be read for it.
        h, e = self.n_head, self.emb_size
        kind = {"merged": e, "has_values": True, "residual": "projection", "relu": True}
        return layout_of(h, h * e, e, **kind, n_fields=n_fields, form=self.form)

    def extra_repr(self) -> str:
        frozen = ", frozen" if self._frozen is not None else ""
        return f"{super().extra_repr()}, backend={self.backend!r}{frozen}"
