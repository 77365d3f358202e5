"""The interacting layer as the AutoInt paper defines it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import dispatch
from .fused import Fused
from .projections import read_projections
from .validation import check_flag, check_input, check_mask, check_size
from .weights import InteractingParameters, Interaction, Layout, layout_of


class PaperInteractingLayer(Fused):
    """The interacting layer of AutoInt (Song et al., CIKM 2019), equations 5 to 8, fused.

    With Q = x Wq, K = x Wk, V = x Wv, each cut into heads of width d = att_size / n_head,

        out = relu( concat_h( softmax(scale Q_h K_h^T) V_h ) + x W_res )

    and scale = 1, as in equation 5, or 1/sqrt(d). There are no biases. The output is as wide as the attention, so
    layers stack with changing width: `PaperInteractingLayer(16, 64, 2)`, then `PaperInteractingLayer(64, 64, 2)`.

    Args:
        emb_size: width E of the input.
        att_size: width A of the attention over all heads, a multiple of n_head; the paper's d' is A / n_head.
        n_head: number of heads H.
        use_res: whether to add x W_res (equation 8).
        scaling: whether to scale the logits by 1/sqrt(d).
        backend: "auto" takes the engine expected fastest of those that support a call and ends at the reference;
            "triton", "native", "torch" or "reference" is used, or the call raises ValueError with every reason why not.
        device, dtype: of the parameters, as for `torch.nn.Linear`.

    Parameters: `w_qs`, `w_ks`, `w_vs`, and with use_res `w_res`: Linear(E, A) without bias, drawn by
    `xavier_uniform_` (Glorot's), the default of the Dense layers in the authors' own code.

    Weights are folded as in `InteractingLayer`; `freeze()` skips that. Fused engines differentiate once; for
    second-order gradients use backend="reference".

    Raises TypeError or ValueError naming the argument.
    """

    # There is no output projection.
    parameter_names = tuple(
        f"{name}.{kind}" for name in ("w_qs", "w_ks", "w_vs", "w_o", "w_res") for kind in ("weight", "bias")
    )

    def __init__(
        self,
        emb_size: int,
        att_size: int,
        n_head: int,
        use_res: bool = True,
        scaling: bool = False,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dispatch.check_backend(backend)
        check_size("emb_size", emb_size)
        check_size("att_size", att_size)
        check_size("n_head", n_head)
        if att_size % n_head:
            raise ValueError(f"att_size: expected a multiple of n_head, {n_head}, got {att_size}")
        check_flag("use_res", use_res)
        check_flag("scaling", scaling)
        super().__init__()
        self.emb_size = emb_size
        self.att_size = att_size
        self.n_head = n_head
        self.use_res = use_res
        self.scaling = scaling
        self.residual = "projection" if use_res else "none"
        self.scale = 1 / math.sqrt(att_size // n_head) if scaling else 1.0
        self.backend = backend
        self.projections = ("w_qs", "w_ks", "w_vs", "w_res") if use_res else ("w_qs", "w_ks", "w_vs")
        for name in self.projections:
            projection = nn.Linear(emb_size, att_size, bias=False, device=device, dtype=dtype)
            nn.init.xavier_uniform_(projection.weight)
            self.add_module(name, projection)

    def interaction(self) -> Interaction:
        """What the layer computes, with its tensors as they are now."""
        w_q, b_q, w_k, b_k, w_v, b_v, *residual = read_projections(self, self.projections)
        w_r, b_r = residual or (None, None)
        p = InteractingParameters(w_q, b_q, w_k, b_k, w_v, b_v, None, None, w_r, b_r)
        return Interaction(p, self.n_head, self.scale, self.residual)

    def layout(self, n_fields: int) -> Layout:
        # The weights need not be read for it.
        kind = {"merged": None, "has_values": True, "residual": self.residual, "relu": True}
        return layout_of(self.n_head, self.att_size, self.emb_size, **kind, n_fields=n_fields, form=self.form)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, F, E) -> (B, F, A); with `return_attention` also P (B, H, F, F), hidden rows zero.

        x: fp32, bf16, fp16 or fp64 like the weights; under autocast the output has autocast's dtype.
        mask: bool, True = hidden, 1 to 3 dimensions that broadcast to (B, F, F): (F, F) for all samples, (B, 1, F)
            to hide fields of a sample. A row whose every key is hidden gets no attention: relu(x W_res), or 0.
        return_attention: P is then computed as the reference does, at the reference's cost.

        Raises TypeError or ValueError naming the argument.
        """
        check_input(x, self.emb_size)
        return self.fused(x, check_mask(mask, x), return_attention)

    def extra_repr(self) -> str:
        sizes = f"emb_size={self.emb_size}, att_size={self.att_size}, n_head={self.n_head}"
        frozen = ", frozen" if self._frozen is not None else ""
        return f"{sizes}, use_res={self.use_res}, scaling={self.scaling}, backend={self.backend!r}{frozen}"
