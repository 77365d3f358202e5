"""AutoInt's interacting layer as its Keras function has it: one Dense over the flattened outputs of the heads."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import dispatch
from .fused import Fused
from .projections import read_projections
from .validation import check_input, check_mask, check_size, describe
from .weights import BARE, NO_RESIDUAL, InteractingParameters, Interaction, Layout, folded_dtype

PROJECTIONS = ("w_qs", "w_ks", "w_vs", "fc_out", "fc_res")


class _Parameters(NamedTuple):
    w_q: Tensor  # [H*E, E]
    b_q: Tensor  # [H*E]
    w_k: Tensor  # [H*E, E]
    b_k: Tensor  # [H*E]
    w_v: Tensor  # [H*E, E]
    b_v: Tensor  # [H*E]
    w_o: Tensor  # [F*E, H*F*E]
    b_o: Tensor  # [F*E]
    w_r: Tensor  # [F*E, F*E]
    b_r: Tensor  # [F*E]


class _Dense(NamedTuple):
    """The two Dense layers before the relu: flattened heads -> (B, F*E), and flattened x -> (B, F*E).

    With the projection of the values folded in, a head is z_h = P_h x, and all of them are flattened field by field,
    as the op gives them. Else a head is P_h V_h and is flattened by itself.
    """

    heads: Tensor  # [F*E, F*H*E] folded, or [F*E, H*F*E]
    x: Tensor  # [F*E, F*E]
    bias: Tensor  # [F*E]
    value_bias: Tensor | None  # [F, F*E]  folded: to be added for each field that is not fully hidden


def _dense_of(p: _Parameters, n_head: int, folded: bool) -> _Dense:
    """The Dense layers in the parameters' dtype, but for biases in fp32 or better where folded; differentiable."""
    if not folded:
        return _Dense(p.w_o, p.w_r, p.b_o + p.b_r, None)
    dtype, size, e = folded_dtype(p.w_v.dtype), p.w_o.shape[0], p.w_v.shape[1]
    w_v, b_v = p.w_v.to(dtype).view(n_head, e, e), p.b_v.to(dtype).view(n_head, e)
    # Head by head: einsum, with the heads as a batch, would copy these weights, by far the largest, twice more.
    w_o = [w.reshape(-1, e) for w in p.w_o.to(dtype).view(size, n_head, size).unbind(1)]
    with _without_autocast(w_v.device.type):
        heads = torch.stack([(w @ w_v[h]).view(size, -1, e) for h, w in enumerate(w_o)], 2).view(size, -1)
    # No matrix product: one so long would lose digits of the gradient of b_v, which sums over fields and outputs.
    value_bias = torch.stack([(w * b_v[h]).sum(1) for h, w in enumerate(w_o)]).sum(0).view(size, -1).t()
    return _Dense(heads.to(p.w_o.dtype), p.w_r, p.b_o.to(dtype) + p.b_r.to(dtype), value_bias)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[None]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _sum_of_seen(value_bias: Tensor, mask: Tensor | None) -> Tensor:
    """The sum over the fields that are not fully hidden: (F*E,), or a row for each sample."""
    if mask is None:
        return value_bias.sum(0)
    seen = ~mask.all(-1)
    with _without_autocast(value_bias.device.type):
        return seen.expand(*seen.shape[:-1], value_bias.shape[0]).to(value_bias.dtype) @ value_bias


class FlattenedInteractingLayer(Fused):
    """AutoInt's interacting layer as the Keras function `interacting_layer(x, head_num)`, fused: (B, F, E) -> (B, F*E).

    With Q = x Wq + bq, K = x Wk + bk, V = x Wv + bv, each cut into heads as wide as the embedding,

        out = relu( concat_h( flatten(P_h V_h) ) Wo + bo  +  flatten(x) Wr + br ),
        P_h = softmax(Q_h K_h^T / sqrt(E)),

    where a head is flattened field by field: number e of field f of head h meets row h*F*E + f*E + e of Wo.

    Args:
        n_fields: number of fields F.
        emb_size: embedding size E.
        n_head: number of heads H; each is as wide as the embedding.
        backend: "auto" takes the engine expected fastest of those that support a call and ends at the reference;
            "triton", "native", "torch" or "reference" is used, or the call raises ValueError with every reason why not.
        device, dtype: of the parameters, as for `torch.nn.Linear`.

    Parameters: `w_qs`, `w_ks`, `w_vs`: Linear(E, H*E); `fc_out`: Linear(H*F*E, F*E); `fc_res`: Linear(F*E, F*E). They
    start as those of Keras's Dense do: weights drawn by `xavier_uniform_` (Glorot's), biases zero.

    The projection of the values is folded into `fc_out` where that takes fewer operations: for more than F*E samples,
    and in a layer that is frozen (`freeze()`), which then folds nothing per call. While compiling, only the latter.
    Fused engines differentiate once; for second-order gradients use backend="reference".

    Raises TypeError or ValueError naming the argument.
    """

    parameter_names = tuple(f"{name}.{kind}" for name in PROJECTIONS for kind in ("weight", "bias"))
    _frozen_dense: _Dense | None = None

    def __init__(
        self,
        n_fields: int,
        emb_size: int,
        n_head: int,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dispatch.check_backend(backend)
        check_size("n_fields", n_fields)
        check_size("emb_size", emb_size)
        check_size("n_head", n_head)
        super().__init__()
        self.n_fields = n_fields
        self.emb_size = emb_size
        self.n_head = n_head
        self.backend = backend
        width, size = n_head * emb_size, n_fields * emb_size
        self.w_qs = nn.Linear(emb_size, width, device=device, dtype=dtype)
        self.w_ks = nn.Linear(emb_size, width, device=device, dtype=dtype)
        self.w_vs = nn.Linear(emb_size, width, device=device, dtype=dtype)
        self.fc_out = nn.Linear(n_head * size, size, device=device, dtype=dtype)
        self.fc_res = nn.Linear(size, size, device=device, dtype=dtype)
        for name in PROJECTIONS:
            projection = getattr(self, name)
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    @property
    def _n_fields(self) -> int:  # type: ignore[override]
        return self.n_fields

    def _read(self) -> _Parameters:
        tensors = read_projections(self, PROJECTIONS)
        for name, t in zip(self.parameter_names, tensors, strict=True):
            if t is None:
                raise ValueError(f"{name}: expected a tensor, got None")
        return _Parameters(*tensors)

    def _attention(self, p: _Parameters, folded: bool) -> Interaction:
        """P_h x side by side where the projection of the values is folded into fc_out, else P_h V_h."""
        w_v, b_v = (None, None) if folded else (p.w_v, p.b_v)
        parameters = InteractingParameters(p.w_q, p.b_q, p.w_k, p.b_k, w_v, b_v, None, None, None, None)
        return Interaction(parameters, self.n_head, 1 / math.sqrt(self.emb_size), "none", relu=False)

    def interaction(self) -> Interaction:
        """The attention, P_h x for each head, with its tensors as they are now."""
        return self._attention(self._read(), folded=True)

    def layout(self, n_fields: int) -> Layout:
        # The weights need not be read for it.
        width = self.n_head * self.emb_size
        return Layout(self.n_head, self.emb_size, self.emb_size, width, output=BARE, residual=NO_RESIDUAL, relu=0)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, F, E) -> (B, F*E); with `return_attention` also P (B, H, F, F), hidden rows zero.

        x: fp32, bf16, fp16 or fp64 like the weights; under autocast the output has autocast's dtype.
        mask: bool, True = hidden, 1 to 3 dimensions that broadcast to (B, F, F): (F, F) for all samples, (B, 1, F)
            to hide fields of a sample. A row whose every key is hidden gets no attention: its P_h V_h is zero.
        return_attention: P is then computed as the reference does, at the reference's cost.

        Raises TypeError or ValueError naming the argument.
        """
        check_input(x, self.emb_size, self.n_fields)
        mask = check_mask(mask, x)
        dense, interaction = self._frozen_dense, None
        if dense is None:
            p = self._read()
            # Compiled code has to serve batches of every size.
            folded = not torch.compiler.is_compiling() and x.shape[0] > self.n_fields * self.emb_size
            dense, interaction = _dense_of(p, self.n_head, folded), self._attention(p, folded)
        result = self.fused(x, mask, return_attention, interaction)
        heads, attention = result if isinstance(result, tuple) else (result, None)
        bias = dense.bias
        if dense.value_bias is None:
            heads = heads.unflatten(2, (self.n_head, self.emb_size)).transpose(1, 2)
        else:
            bias = (bias + _sum_of_seen(dense.value_bias, mask)).to(heads.dtype)
        out = torch.addmm(bias, heads.flatten(1), dense.heads.t())
        # Two products one after the other: to join their factors for a single one would cost more.
        out = torch.addmm(out, x.flatten(1), dense.x.t()).relu_()
        return out if attention is None else (out, attention)

    def load_keras_weights(self, weights: Sequence[Any]) -> None:
        """Loads what the Dense layers of the Keras function hold, in the order in which it creates them.

        weights: ten arrays (numpy's, or tensors), kernel and bias of Q, K, V, out and res, with the shapes
            (E, H*E), (H*E,), thrice, (H*F*E, F*E), (F*E,), (F*E, F*E), (F*E,). Fetch them layer by layer, as in
            `[w for dense in (q, k, v, out, res) for w in dense.get_weights()]`: `model.get_weights()` may list K before
            Q, with the same shapes, and no check can notice.

        Raises ValueError naming the array for a wrong number of them, a wrong shape or what is no array of numbers;
        the layer is then as it was.
        """
        weights = list(weights)
        names = [f"{kind} of {name}" for name in ("Q", "K", "V", "out", "res") for kind in ("kernel", "bias")]
        if len(weights) != len(names):
            raise ValueError(f"weights: expected ten arrays ({', '.join(names)}), got {len(weights)}")
        width, size = self.n_head * self.emb_size, self.n_fields * self.emb_size
        kernels = [(self.emb_size, width)] * 3 + [(self.n_head * size, size), (size, size)]
        shapes = [shape for kernel in kernels for shape in (kernel, kernel[1:])]
        state = {}
        for parameter, name, given, shape in zip(self.parameter_names, names, weights, shapes, strict=True):
            try:
                # From an array that cannot be written to, as_tensor would warn.
                t = given.detach() if isinstance(given, Tensor) else torch.tensor(given)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{name}: expected an array of shape {shape}, got {describe(given)}") from error
            if t.shape != shape or not t.is_floating_point():
                raise ValueError(f"{name}: expected a floating-point array of shape {shape}, got {describe(t)}")
            state[parameter] = t.t()
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"weights: expected a layer of plain parameters, got {', '.join(self.state_dict())}")
        self.load_state_dict(state)

    def freeze(self) -> FlattenedInteractingLayer:
        super().freeze()
        with torch.inference_mode(False), torch.no_grad():
            folded = _dense_of(self._read(), self.n_head, folded=True)
            # A parameter itself would show its changes.
            self._frozen_dense = folded._replace(x=folded.x.detach().clone())
        return self

    def unfreeze(self) -> FlattenedInteractingLayer:
        self._frozen_dense = None
        super().unfreeze()
        return self

    def extra_repr(self) -> str:
        frozen = ", frozen" if self._frozen is not None else ""
        sizes = f"n_fields={self.n_fields}, emb_size={self.emb_size}, n_head={self.n_head}"
        return f"{sizes}, backend={self.backend!r}{frozen}"
