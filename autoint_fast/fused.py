"""What every layer on the fused op shares: the choice of an engine, folded weights that last, freezing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch, op
from .reference import attention_probabilities, interaction_reference
from .validation import check_dtype, check_input, check_mask, check_parameters
from .weights import InteractingParameters, Interaction, Layout, choose_layout


class _Folded:
    """A copy of a layer's parameters, and the weights folded from it, in each form when it is first asked for."""

    def __init__(self, interaction: Interaction) -> None:
        self.given = interaction.parameters
        # Inference tensors could not take part in a later gradient with respect to x, nor be copied.
        with torch.inference_mode(False), torch.no_grad():
            present = [t.detach().reshape(-1) for t in self.given if t is not None]
            # Side by side in memory, so that they can be compared in one go.
            copies = iter(torch.cat(present).split([t.numel() for t in present]))
            p = InteractingParameters(*(None if t is None else next(copies).view(t.shape) for t in self.given))
        self.interaction = Interaction(p, interaction.n_head, interaction.scale, interaction.residual, interaction.relu)
        self.packed: list[Tensor | None] = [None, None]
        self.backend: str | None = None
        self.still_same: Callable[[InteractingParameters], bool] = lambda p: False

    def weights(self, layout: Layout, backend: str) -> Tensor:
        """The folded weights in the form of `layout`."""
        packed = self.packed[layout.factored]
        if packed is None:
            with torch.inference_mode(False):
                packed = self.packed[layout.factored] = op.fold(self.interaction, layout, backend)
        return packed

    def watch(self, backend: str) -> None:
        """Lets `still_same` compare parameters by an engine's means."""
        self.backend = backend
        self.still_same = dispatch.ENGINES[backend].comparison(self.interaction.parameters, self.given)


def _same_memory(given: Tensor | None, kept: Tensor | None) -> bool:
    """Whether a parameter is the one that was kept, or just such a view of the same one: a transposed weight, say."""
    if given is kept or given is None or kept is None or torch.compiler.is_compiling():
        return given is kept
    # A view's base stays when `.data` moves, its address does not. What has no memory of its own has no such base.
    of_same = given._base is not None and given._base is kept._base
    return of_same and given.data_ptr() == kept.data_ptr() and given.stride() == kept.stride()


class Fused(nn.Module):
    """A layer whose forward is the fused op.

    A subclass gives `interaction`, and calls `fused` with x and a mask.

    Attributes:
        backend: "auto", or the name of the engine to use.
        form: "auto", or "folded" or "factored" to force the form of the weights.
    """

    backend: str = "auto"
    form: str = "auto"
    # The ten parameters as errors name them.
    parameter_names: Sequence[str] = InteractingParameters._fields
    _frozen: _Folded | None = None
    _last: _Folded | None = None

    def interaction(self) -> Interaction:
        """What the layer computes, with its tensors as they are now."""
        raise NotImplementedError

    def layout(self, n_fields: int) -> Layout:
        """How the layer is computed on samples of so many fields."""
        return choose_layout(self.interaction(), n_fields, self.form)

    def fused(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_attention: bool = False,
        interaction: Interaction | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, F, E), any mask -> (B, F, O), with `return_attention` also P (B, H, F, F).

        interaction: what `self.interaction()` gives now, for a caller who has it already.
        Raises TypeError or ValueError naming the argument.
        """
        frozen, last = self._frozen, self._last
        if frozen is not None:
            interaction = frozen.interaction
        else:
            interaction = interaction or self.interaction()
            # Of the very memory that was checked before, only the values can be others.
            if last is None or not all(map(_same_memory, interaction.parameters, last.given)):
                last = None
                check_parameters(interaction, self.parameter_names)
        p = interaction.parameters
        check_input(x, p.w_q.shape[1])
        mask = check_mask(mask, x)
        dtype = check_dtype(x, p.w_q)
        layout = choose_layout(interaction, x.shape[1], self.form)
        backend = dispatch.choose(self.backend, dispatch.describe_call(x, dtype, layout))
        if backend == "reference":
            out, attention = interaction_reference(x, interaction, mask)
            return (out, attention.transpose(0, 1)) if return_attention else out
        packed = None
        if frozen is not None:
            packed = frozen.weights(layout, backend)
        elif not torch.is_grad_enabled() and p.w_q.is_cpu and not op.through_library(p.w_q):
            # The values are compared, as `.data.mul_()` moves no version counter.
            if last is None or last.backend != backend or not last.still_same(p):
                check_parameters(interaction, self.parameter_names)
                last = self._last = _Folded(interaction)
                last.watch(backend)
            packed = last.weights(layout, backend)
        out = op.interact(x if x.dtype == dtype else x.to(dtype), interaction, layout, mask, backend, packed)
        if not return_attention:
            return out
        return out, attention_probabilities(x, interaction, mask).transpose(0, 1)

    def freeze(self) -> Fused:
        """Folds the weights once and for all until `unfreeze()`, `train(True)` or `load_state_dict`; gives self.

        For serving: a call is then one launch on a GPU. While frozen the parameters are constants: they get no
        gradients, and a change to them is not seen. `.to()` and its kin carry the frozen state along, folding anew
        from the converted parameters. Raises ValueError in training mode.
        """
        if self.training:
            raise ValueError("freeze: expected a layer in eval mode, got one in training mode; call eval() first")
        interaction = self.interaction()
        check_parameters(interaction, self.parameter_names)
        frozen = _Folded(interaction)
        w_q = interaction.parameters.w_q
        # Which form is the faster one depends on the number of fields, and one of these two numbers favours each.
        for n_fields in (1, 1 << 20):
            layout = choose_layout(interaction, n_fields, self.form)
            call = dispatch.Call(w_q.device.type, w_q.dtype, 1, layout, inside=None)
            # A named engine that cannot run here may yet do so where the layer is moved to.
            named = self.backend in dispatch.ENGINES and not dispatch.ENGINES[self.backend].unsupported(call)
            backend = dispatch.choose(self.backend if named else "auto", call)
            frozen.weights(layout, backend if backend in dispatch.ENGINES else "torch")
        self._frozen = frozen
        return self

    def unfreeze(self) -> Fused:
        """Undoes `freeze()`; gives self."""
        self._frozen = None
        return self

    def train(self, mode: bool = True) -> Fused:
        if mode:
            self.unfreeze()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Fused:
        super()._apply(fn, recurse)
        self._last = None
        if self._frozen is not None:
            self.freeze()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # For pickle and deepcopy. Before Python 3.11 an object has no such method of its own.
        inherited = getattr(super(), "__getstate__", None)
        return {**(inherited() if inherited else self.__dict__), "_last": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unfreeze()
        super()._load_from_state_dict(*args, **kwargs)


def why(layer: Fused, x: Tensor, mask: Tensor | None = None) -> dispatch.Why:
    """Which engine `layer(x, mask)` takes, and per engine the reasons against it.

    Gives a named tuple (choice, reasons) that prints as a small table. Raises what the call would raise for bad
    arguments.
    """
    if not isinstance(layer, Fused):
        raise TypeError(f"layer: expected a layer of autoint_fast, got {type(layer).__name__}")
    layout = layer.layout(x.shape[1] if isinstance(x, Tensor) and x.ndim == 3 else 1)
    check_input(x, layout.emb_size)
    check_mask(mask, x)
    # Any parameter will do, while to read a parametrised weight may change its state.
    dtype = check_dtype(x, next(layer.parameters()))
    return dispatch.explain(layer.backend, dispatch.describe_call(x, dtype, layout))
