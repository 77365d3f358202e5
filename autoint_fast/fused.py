"""What every layer on the fused op shares: the choice of an engine, folded weights that last, freezing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch, op
from .reference import attention_probabilities, interaction_reference
from .validation import check_dtype, check_input, check_mask, check_parameters
from .weights import InteractingParameters, Interaction, Kind, Layout, choose_layout, row_by_row


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


class _Folded:
    """The weights folded from parameters that stay as they are, in each form when it is first asked for."""

    def __init__(self, interaction: Interaction) -> None:
        # Of a copy, side by side in memory, so that it can be compared with in one go. Inference tensors could not take
        # part in a later gradient with respect to x, nor be copied.
        with torch.inference_mode(False), torch.no_grad():
            present = [t for t in interaction.parameters if t is not None]
            flat = torch.cat([row_by_row(t.detach()).reshape(-1) for t in present])
            pieces = iter(flat.split([t.numel() for t in present]))
            tensors = [None if t is None else _laid_out(next(pieces), t) for t in interaction.parameters]
        p = InteractingParameters(*tensors)  # type: ignore[arg-type]
        self.interaction = dataclasses.replace(interaction, parameters=p)
        self.packed: list[Tensor | None] = [None, None]

    def weights(self, layout: Layout, backend: str) -> Tensor:
        """In the form of `layout`."""
        packed = self.packed[layout.factored]
        if packed is None:
            with torch.inference_mode(False):
                packed = self.packed[layout.factored] = op.fold(self.interaction, layout, backend)
        return packed


def _laid_out(piece: Tensor, like: Tensor) -> Tensor:
    """The numbers of `row_by_row(like)` in its shape."""
    stored = row_by_row(like)
    return piece.view(stored.shape) if stored is like else piece.view(stored.shape).mT


class _LastCall:
    """What a layer's last call found out about its parameters, so that the next need not find it out again.

    It keeps no parameter alive but those of a frozen layer, which are constant.
    """

    def __init__(self, interaction: Interaction, is_constant: bool) -> None:
        self.constant = interaction.parameters if is_constant else None
        self.seen = _seen(interaction.parameters, interaction.kind)
        # What `choose` was asked, and its answer; the folded weights, and what tells whether they still hold; what the
        # last call that `is_plain` was asked, the same of its weights, and what gave its output. Each is replaced as a
        # whole, as another thread may be asking for something else.
        self.chosen: tuple[tuple[Any, ...], tuple[Layout, str, Callable[[], Tensor] | None]] | None = None
        self.folded: tuple[_Folded, Callable[[], bool]] | None = None
        self.ran: tuple[tuple[Any, ...], Callable[[], bool], Callable[[Tensor, Tensor | None], Tensor]] | None = None

    def holds(self, tensors: Sequence[Tensor | None], kind: Kind) -> bool:
        """Whether the layer is what it was, and its parameters lie where they lay: then only values can differ."""
        return tensors is self.constant or self.seen == _seen(tensors, kind)

    def again(
        self, x: Tensor, backend: str, form: str, tensors: Sequence[Tensor | None], kind: Kind
    ) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        """What gives the output for x and a mask where a call that `is_plain` asks what the last such call asked."""
        if self.ran is None or not self.holds(tensors, kind):
            return None
        asked, weights_hold, run = self.ran
        _, n_fields, width = x.shape
        return run if asked == (n_fields, width, x.dtype, x.device, backend, form) and weights_hold() else None

    def choose(
        self, interaction: Interaction, n_fields: int, dtype: torch.dtype, backend: str, form: str
    ) -> tuple[Layout, str, Callable[[], Tensor] | None]:
        """The layout and the engine for a call, and a shorter way to fold, if there is one."""
        asked = (n_fields, dtype, backend, form)
        chosen = self.chosen
        if chosen is None or chosen[0] != asked:
            p = interaction.parameters
            layout, engine = _choose(interaction, p.w_q.device.type, *asked, inside=None)
            known = dispatch.ENGINES.get(engine)
            folding = None if known is None else known.folding(p, layout, interaction.scale)
            self.chosen = chosen = asked, (layout, engine, folding)
        return chosen[1]

    def weights(self, interaction: Interaction, layout: Layout, backend: str) -> tuple[Tensor, Callable[[], bool]]:
        """The folded weights, anew where the values of the parameters have changed, and what tells if they hold."""
        folded = self.folded
        # The values are compared, as `.data.mul_()` moves no version counter.
        if folded is None or not folded[1]():
            copy = _Folded(interaction)
            comparison = dispatch.ENGINES[backend].comparison(copy.interaction.parameters, interaction.parameters)
            self.folded = folded = copy, comparison
        return folded[0].weights(layout, backend), folded[1]


def _always() -> bool:
    return True


def _seen(tensors: Sequence[Any], kind: Kind) -> tuple[Any, ...]:
    """What a layer is but for the values of its parameters; their dtype is one, as `check_parameters` has seen."""
    # Of a contiguous tensor that fits a layer of this width, the number of elements tells the shape, which is slower.
    places = [
        t if t is None else (t.data_ptr(), t.numel(), t.is_contiguous() or (t.shape, t.stride())) for t in tensors
    ]
    return kind, type(tensors[0]), tensors[0].dtype, places


class Fused(nn.Module):
    """A layer whose forward is the fused op.

    A subclass gives `interaction`, checks what it is called with, and calls `fused`.

    Attributes:
        backend: "auto", or the name of the engine to use.
        form: "auto", or "folded" or "factored" to force the form of the weights.
    """

    backend: str = "auto"
    form: str = "auto"
    # The number of fields that x must have, if only one will do.
    _n_fields: int | None = None
    # The ten parameters as errors name them.
    parameter_names: Sequence[str] = InteractingParameters._fields
    _frozen: _Folded | None = None
    _last: _LastCall | None = None

    def interaction(self) -> Interaction:
        """What the layer computes, with its tensors as they are now."""
        raise NotImplementedError

    def _described(self) -> tuple[Sequence[Tensor | None], Kind]:
        """What `interaction` puts together, which takes time that a call like the last one need not spend."""
        interaction = self.interaction()
        return interaction.parameters, interaction.kind

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
        tensors, kind = self._described() if interaction is None else (interaction.parameters, interaction.kind)
        plain = not return_attention and dispatch.is_plain(x)
        last = self._last if plain else None
        if last is not None:
            run = last.again(x, self.backend, self.form, tensors, kind)
            if run is not None:
                return run(x, mask)
        if interaction is None:
            interaction = Interaction(InteractingParameters(*tensors), *kind)  # type: ignore[arg-type]
        p = interaction.parameters
        inside = dispatch.surroundings()
        last, is_new = None, False
        if inside is None and not op.through_library(x, p.w_q):
            last = self._last
            if last is None or not last.holds(tensors, kind):
                last, is_new = _LastCall(interaction, frozen is not None), True
        if (last is None or is_new) and frozen is None:
            check_parameters(interaction, self.parameter_names)
        dtype = check_dtype(x, p.w_q)
        if is_new:
            self._last = last
        folding = None
        _, n_fields, width = x.shape
        if last is not None:
            layout, backend, folding = last.choose(interaction, n_fields, dtype, self.backend, self.form)
        else:
            device_type = x.device.type
            layout, backend = _choose(interaction, device_type, n_fields, dtype, self.backend, self.form, inside)
        if width != layout.emb_size:
            raise ValueError(f"x: expected the width of the layer's weights, {layout.emb_size}, got {width}")
        if backend == "reference":
            out, attention = interaction_reference(x, interaction, mask)
            return (out, attention.transpose(0, 1)) if return_attention else out
        x = x if x.dtype == dtype else x.to(dtype)
        packed = None
        if frozen is not None:
            packed, weights_hold = frozen.weights(layout, backend), _always
        elif last is not None and not is_new and p.w_q.is_cpu and not torch.is_grad_enabled():
            packed, weights_hold = last.weights(interaction, layout, backend)
        if packed is None or last is None or torch.is_grad_enabled():
            out = op.interact(x, interaction, layout, mask, backend, packed, folding)
        else:
            out = op.interact_constant(x, packed, layout, mask, backend)
            if plain:
                asked = (n_fields, width, dtype, x.device, self.backend, self.form)
                last.ran = asked, weights_hold, dispatch.ENGINES[backend].interacting(packed, layout, n_fields, dtype)
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
    check_input(x, layout.emb_size, layer._n_fields)
    check_mask(mask, x)
    # Any parameter will do, while to read a parametrised weight may change its state.
    dtype = check_dtype(x, next(layer.parameters()))
    return dispatch.explain(
        layer.backend, dispatch.Call(x.device.type, dtype, x.shape[1], layout, dispatch.surroundings())
    )
