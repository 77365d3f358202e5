"""What every layer on the fused op shares: the choice of an engine, folded weights that last, freezing."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch, op
from .reference import attention_probabilities, interaction_reference
from .validation import check_dtype, check_input, check_mask, check_parameters
from .weights import InteractingParameters, Interaction, Layout, choose_layout, row_by_row


def _same_view(given: Tensor | None, kept: Tensor | None) -> bool:
    """Whether a parameter is the one that was kept, or just such a view of the same one: a transposed weight, say."""
    if given is kept or given is None or kept is None:
        return given is kept
    # A view's base stays when `.data` moves, its address does not. What has no memory of its own has no such base.
    of_same = given._base is not None and given._base is kept._base
    return of_same and given.data_ptr() == kept.data_ptr() and given.stride() == kept.stride()


def _choose(
    interaction: Interaction,
    device_type: str,
    n_fields: int,
    dtype: torch.dtype,
    backend: str,
    form: str,
    inside: str | None,
) -> tuple[Layout, str]:
    """The layout and the engine for a call."""
    layout = choose_layout(interaction, n_fields, form)
    return layout, dispatch.choose(backend, dispatch.Call(device_type, dtype, n_fields, layout, inside))


class _Known:
    """A layer's parameters at some call: what they were found to be, so that it need not be found out again."""

    def __init__(self, interaction: Interaction) -> None:
        self.given = interaction.parameters
        self.interaction = interaction
        self.present = [t for t in self.given if t is not None]
        self.addresses = tuple(map(Tensor.data_ptr, self.present))
        # The last call's, and the layout and the engine for it.
        self.chosen: tuple[tuple[Any, ...], tuple[Layout, str]] | None = None
        # The weights folded in each form, when first asked for, and by what they are compared to the parameters.
        self.packed: list[Tensor | None] = [None, None]
        self.still_same: Callable[[], bool] | None = None

    def holds(self, p: InteractingParameters) -> bool:
        """Whether p are these tensors, in the same memory: then only their values can be others."""
        same = all(map(operator.is_, p, self.given)) or all(map(_same_view, p, self.given))
        return same and tuple(map(Tensor.data_ptr, self.present)) == self.addresses

    def may_recur(self) -> bool:
        """Whether the next call may come with these tensors: not with what a parametrisation has just computed."""
        return all(t.is_leaf or (t._base is not None and t._base.is_leaf) for t in self.present)

    def choose(self, n_fields: int, dtype: torch.dtype, backend: str, form: str) -> tuple[Layout, str]:
        """The layout and the engine for a call."""
        asked = (n_fields, dtype, backend, form)
        chosen = self.chosen
        if chosen is None or chosen[0] != asked:
            choice = _choose(self.interaction, self.given.w_q.device.type, *asked, inside=None)
            # At once, as another thread may ask for something else.
            self.chosen = chosen = asked, choice
        return chosen[1]

    def copied(self) -> _Known:
        """The same of a copy of the parameters."""
        # Inference tensors could not take part in a later gradient with respect to x, nor be copied.
        with torch.inference_mode(False), torch.no_grad():
            # Side by side in memory, so that they can be compared in one go.
            flat = torch.cat([row_by_row(t.detach()).reshape(-1) for t in self.present])
            pieces = iter(flat.split([t.numel() for t in self.present]))
            p = InteractingParameters(*(None if t is None else _laid_out(next(pieces), t) for t in self.given))  # type: ignore[arg-type]
        return _Known(dataclasses.replace(self.interaction, parameters=p))

    def weights(self, layout: Layout, backend: str) -> Tensor:
        """The folded weights in the form of `layout`."""
        packed = self.packed[layout.factored]
        if packed is None:
            with torch.inference_mode(False):
                packed = self.packed[layout.factored] = op.fold(self.interaction, layout, backend)
        return packed

    def current_weights(self, layout: Layout, backend: str) -> Tensor:
        """The same, folded anew where the values of the parameters have changed."""
        packed = self.packed[layout.factored]
        # The values are compared, as `.data.mul_()` moves no version counter.
        if packed is None or self.still_same is None or not self.still_same():
            copy = self.copied()
            self.packed = [None, None]
            packed = self.packed[layout.factored] = copy.weights(layout, backend)
            self.still_same = dispatch.ENGINES[backend].comparison(copy.given, self.given)
        return packed


def _laid_out(piece: Tensor, like: Tensor) -> Tensor:
    """The numbers of `row_by_row(like)` in its shape."""
    stored = row_by_row(like)
    return piece.view(stored.shape) if stored is like else piece.view(stored.shape).mT


class Fused(nn.Module):
    """A layer whose forward is the fused op.

    A subclass gives `interaction`, checks what it is called with, and calls `fused`.

    Attributes:
        backend: "auto", or the name of the engine to use.
        form: "auto", or "folded" or "factored" to force the form of the weights.
        n_fields: the number of fields that x must have, if only one will do.
    """

    backend: str = "auto"
    form: str = "auto"
    n_fields: int | None = None
    # The ten parameters as errors name them.
    parameter_names: Sequence[str] = InteractingParameters._fields
    _frozen: _Known | None = None
    _last: _Known | None = None

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
        """x (B, F, E) -> (B, F, O), with `return_attention` also P (B, H, F, F).

        x, mask: as `check_input` and `check_mask` leave them. interaction: where the caller has read it already.
        Raises TypeError or ValueError naming the argument.
        """
        frozen = self._frozen
        if frozen is not None:
            interaction = frozen.interaction
        elif interaction is None:
            interaction = self.interaction()
        p = interaction.parameters
        inside = dispatch.surroundings()
        known, is_new = frozen, False
        if inside is not None or op.through_library(x, p.w_q):
            known = None
        elif frozen is None:
            known = self._last
            if known is None or not known.holds(p):
                check_parameters(interaction, self.parameter_names)
                known, is_new = _Known(interaction), True
        if known is None and frozen is None:
            check_parameters(interaction, self.parameter_names)
        if x.shape[2] != p.w_q.shape[1]:
            raise ValueError(f"x: expected the width of the layer's weights, {p.w_q.shape[1]}, got {x.shape[2]}")
        dtype = check_dtype(x, p.w_q)
        if is_new and known is not None:
            self._last = known if known.may_recur() else None
        if known is not None:
            layout, backend = known.choose(x.shape[1], dtype, self.backend, self.form)
        else:
            device_type = x.device.type
            layout, backend = _choose(interaction, device_type, x.shape[1], dtype, self.backend, self.form, inside)
        if backend == "reference":
            out, attention = interaction_reference(x, interaction, mask)
            return (out, attention.transpose(0, 1)) if return_attention else out
        packed = None
        if frozen is not None:
            packed = frozen.weights(layout, backend)
        elif known is not None and not is_new and p.w_q.is_cpu and not torch.is_grad_enabled():
            packed = known.current_weights(layout, backend)
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
        frozen = _Known(interaction).copied()
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
    check_input(x, layout.emb_size, layer.n_fields)
    check_mask(mask, x)
    # Any parameter will do, while to read a parametrised weight may change its state.
    dtype = check_dtype(x, next(layer.parameters()))
    return dispatch.explain(
        layer.backend, dispatch.Call(x.device.type, dtype, x.shape[1], layout, dispatch.surroundings())
    )
