"""The drop-in layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch, op
from .reference import (
    ReferenceInteractingLayer,
    attention_probabilities,
    interacting_reference,
)
from .validation import check_dtype, check_input, check_mask
from .weights import InteractingParameters, Layout


class InteractingLayer(ReferenceInteractingLayer):
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
        self._frozen: tuple[InteractingParameters, Tensor] | None = None
        self._last: tuple[InteractingParameters, Tensor] | None = None

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
        mask = check_mask(mask, x)
        frozen = self._frozen
        p = self.interacting_parameters() if frozen is None else frozen[0]
        dtype = check_dtype(x, p.w_q)
        layout = Layout(self.n_head, self.emb_size, self.emb_size)
        backend = dispatch.choose(self.backend, dispatch.describe_call(x, dtype, layout))
        if backend == "reference":
            out, attention = interacting_reference(x, p, self.n_head, mask)
            return (out, attention.transpose(0, 1)) if return_attention else out
        packed = self._last_packed(p, layout, backend) if frozen is None else frozen[1]
        out = op.interact(x if x.dtype == dtype else x.to(dtype), p, layout, mask, backend, packed)
        if not return_attention:
            return out
        return out, attention_probabilities(x, p, self.n_head, mask).transpose(0, 1)

    def _last_packed(self, p: InteractingParameters, layout: Layout, backend: str) -> Tensor | None:
        """The folded weights of the last CPU call without gradients, where the parameters are still the same."""
        if torch.is_grad_enabled() or not p.w_q.is_cpu or op.through_library(p.w_q):
            return None
        last = self._last
        # The values are compared, as `.data.mul_()` moves no version counter.
        if last is None or not dispatch.ENGINES[backend].unchanged(p, last[0], layout):
            last = self._last = self._fold_copy(p, layout, backend)
        return last[1]

    def _fold_copy(
        self, p: InteractingParameters, layout: Layout, backend: str
    ) -> tuple[InteractingParameters, Tensor]:
        """A copy of parameters, side by side in memory, and the weights folded from it."""
        # Inference tensors could not take part in a later gradient with respect to x, nor be copied.
        with torch.inference_mode(False), torch.no_grad():
            flat = torch.cat([t.detach().reshape(-1) for t in p]).split([t.numel() for t in p])
            p = InteractingParameters(*(part.view(t.shape) for part, t in zip(flat, p, strict=True)))
            return p, op.fold(p, layout, backend)

    def freeze(self) -> InteractingLayer:
        """Folds the weights once and for all until `unfreeze()`, `train(True)` or `load_state_dict`; gives self.

        For serving: a call is then one launch on a GPU. While frozen the parameters are constants: they get no
        gradients, and a change to them is not seen. `.to()` and its kin carry the frozen state along, folding anew
        from the converted parameters. Raises ValueError in training mode.
        """
        if self.training:
            raise ValueError("freeze: expected a layer in eval mode, got one in training mode; call eval() first")
        p = self.interacting_parameters()
        layout = Layout(self.n_head, self.emb_size, self.emb_size)
        call = dispatch.Call(p.w_q.device.type, p.w_q.dtype, 1, layout, inside=None)
        # A named engine that cannot run here may yet do so where the layer is moved to.
        named = self.backend in dispatch.ENGINES and not dispatch.ENGINES[self.backend].unsupported(call)
        backend = dispatch.choose(self.backend if named else "auto", call)
        self._frozen = self._fold_copy(p, layout, backend if backend in dispatch.ENGINES else "torch")
        return self

    def unfreeze(self) -> InteractingLayer:
        """Undoes `freeze()`; gives self."""
        self._frozen = None
        return self

    def train(self, mode: bool = True) -> InteractingLayer:
        if mode:
            self.unfreeze()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> InteractingLayer:
        super()._apply(fn, recurse)
        self._last = None
        if self._frozen is not None:
            self.freeze()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # For pickle and deepcopy.
        return {**self.__dict__, "_last": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unfreeze()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        frozen = ", frozen" if self._frozen is not None else ""
        return f"{super().extra_repr()}, backend={self.backend!r}{frozen}"


def why(layer: InteractingLayer, x: Tensor, mask: Tensor | None = None) -> dispatch.Why:
    """Which engine `layer(x, mask)` takes, and per engine the reasons against it.

    Gives a named tuple (choice, reasons) that prints as a small table. Raises what the call would raise for bad
    arguments.
    """
    if not isinstance(layer, InteractingLayer):
        raise TypeError(f"layer: expected an InteractingLayer, got {type(layer).__name__}")
    check_input(x, layer.emb_size)
    check_mask(mask, x)
    # Any parameter will do, while to read a parametrised weight may change its state.
    dtype = check_dtype(x, next(layer.w_qs.parameters()))
    layout = Layout(layer.n_head, layer.emb_size, layer.emb_size)
    return dispatch.explain(layer.backend, dispatch.describe_call(x, dtype, layout))
