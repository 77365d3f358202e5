"""The interacting layers of other libraries: what each computes, and how it is called.

No library is imported: a class is known by its qualified name, and a module of it is then judged by what it holds. The
formulas are those of DeepCTR-Torch 0.3.0, torch-rechub 0.9.0, FuxiCTR 2.3.10, torchfm 0.7.0, RecBole 1.2.1,
pytorch_tabular 1.2.0 and pytorch-widedeep 1.7.0, read in their sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .fused import Fused
from .projections import has_hooks, read_projections
from .reference import ReferenceInteractingLayer, attention_probabilities
from .validation import Misfit, check_input, check_mask
from .weights import InteractingParameters, Interaction

# What a module computes, with its tensors as they are now, or in words why the op cannot say it.
Adapter = Callable[[Any], "Interaction | str"]


class Accelerated(Fused):
    """The forward of an accelerated module: the fused op where a call allows it, else what the module did before.

    The class of such a module derives from a subclass of this, which gives `adapter`, and from the class it had.
    """

    keep_attention: bool = False

    @staticmethod
    def adapter(module: Any) -> Interaction | str:
        """What the module computes, or why it cannot be said."""
        raise NotImplementedError

    @staticmethod
    def arguments(module: Any, x: Tensor) -> tuple[Tensor, ...]:
        """With what the module's forward is called to be applied to x (B, F, E)."""
        return (x,)

    def interaction(self) -> Interaction:
        described = self.adapter(self)
        if isinstance(described, str):
            raise ValueError(f"{type(self).__name__}: {described}")
        return described

    @staticmethod
    def drops(module: Any) -> bool:
        """Whether dropout of P is at work now, as far as that is known without reading a weight."""
        return False

    def describe(self, x: Tensor) -> Interaction | None:
        """What a call with x (B, F, E) computes; None where it is not for the op."""
        known = isinstance(x, Tensor) and x.ndim == 3 and not x.is_nested and x.is_floating_point()
        # Before the weights are read, as to read a parametrised one may change its state.
        if not known or self.drops(self):
            return None
        described = self.adapter(self) if self._frozen is None else self._frozen.interaction
        if isinstance(described, str) or (described.dropout and self.training):
            return None
        return described if x.shape[2] == described.parameters.w_q.shape[1] else None

    def finish(self, out: Tensor, x: Tensor, interaction: Interaction) -> Tensor:
        """What the module makes of the op's output (B, F, O)."""
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As that of the class the module had."""
        interaction = self.describe(args[0]) if len(args) == 1 and not kwargs else None
        if interaction is None:
            return self._original_forward(*args, **kwargs)
        try:
            out = self.fused(args[0], interaction=interaction)
        except Misfit:
            # As of one weight in another dtype, which autocast brings together where the weights are used.
            return self._original_forward(*args, **kwargs)
        assert isinstance(out, Tensor)
        return self.finish(out, args[0], interaction)

    def _original_forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)

    def extra_repr(self) -> str:
        frozen = ", frozen" if self._frozen is not None else ""
        return ", ".join(filter(None, (super().extra_repr(), f"accelerated, backend={self.backend!r}{frozen}")))


def _weights(layer: nn.Module, *names: str) -> list[Any] | str:
    """The weights of the projections of these names, None where there is none, or why they must be called instead."""
    weights: list[Any] = []
    for name in names:
        projection: Any = layer._modules.get(name)
        if projection is None:
            # Absent on purpose, or of another version of the library.
            weights.append(getattr(layer, name))
            continue
        try:
            weight, bias = read_projections(layer, (name,))
        except (TypeError, RuntimeError) as error:
            return str(error)
        if bias is not None:
            return f"{name}: expected no bias"
        weights.append(weight)
    return weights


def _rate(dropout: nn.Module | None) -> float | str:
    """The probability of a module that drops out, or why that cannot be said."""
    if dropout is None or type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout or has_hooks(dropout) or "forward" in vars(dropout):
        return f"a {type(dropout).__name__} of its own in the place of dropout"
    return dropout.p


def _drops(dropout: nn.Module | None) -> bool:
    return dropout is not None and dropout.training and bool(_rate(dropout))


class DeepCTR(Accelerated):
    """relu(heads + x W_Res), unscaled by default, every weight applied as x @ W.

    Like the original it keeps P (H, B, F, F) of the last call as `normalized_att_scores`, with `keep_attention`.
    """

    @staticmethod
    def adapter(module: Any) -> Interaction | str:
        w_q, w_k, w_v = module.W_Query.t(), module.W_key.t(), module.W_Value.t()
        w_r = module.W_Res.t() if module.use_res else None
        scale = 1 / math.sqrt(module.att_embedding_size) if module.scaling else 1.0
        p = InteractingParameters(w_q, None, w_k, None, w_v, None, None, None, w_r, None)
        return Interaction(p, module.head_num, scale, "projection" if module.use_res else "none")

    def finish(self, out: Tensor, x: Tensor, interaction: Interaction) -> Tensor:
        if self.keep_attention:
            self.normalized_att_scores = attention_probabilities(x, interaction, None)
        else:
            # An earlier call's, made by the original code.
            self.__dict__.pop("normalized_att_scores", None)
        return out

    def __getattr__(self, name: str) -> Any:
        if name == "normalized_att_scores":
            raise AttributeError(
                "normalized_att_scores: an accelerated layer does not keep them; call restore(model), then "
                "accelerate(model, keep_attention=True)"
            )
        return super().__getattr__(name)


class Rechub(Accelerated):
    """relu(heads + W_Res(x)), scaled, with dropout on P."""

    @staticmethod
    def adapter(module: Any) -> Interaction | str:
        weights = _weights(module, "W_Q", "W_K", "W_V", "W_Res")
        if isinstance(weights, str):
            return weights
        w_q, w_k, w_v, w_r = weights
        if not module.residual:
            w_r = None
        rate = _rate(module.dropout)
        if isinstance(rate, str):
            return rate
        p = InteractingParameters(w_q, None, w_k, None, w_v, None, None, None, w_r, None)
        residual = "none" if w_r is None else "projection"
        return Interaction(p, module.num_heads, module.scale, residual, dropout=rate)

    @staticmethod
    def drops(module: Any) -> bool:
        return _drops(module.dropout)


class FuxiCTR(Accelerated):
    """relu(heads + residual), unscaled by default; W_res(x) is added only where the width changes, else x itself.

    With a LayerNorm before relu, both follow the op.
    """

    layer_norm: nn.Module | None

    @staticmethod
    def adapter(module: Any) -> Interaction | str:
        weights = _weights(module, "W_q", "W_k", "W_v", "W_res")
        if isinstance(weights, str):
            return weights
        attention = module.dot_attention
        if has_hooks(attention) or "forward" in vars(attention):
            return "dot_attention: a hook on it, or a forward of its own, would never run"
        if type(attention).__name__ != "ScaledDotProductAttention":
            return f"dot_attention: expected FuxiCTR's ScaledDotProductAttention, got a {type(attention).__name__}"
        rate = _rate(attention.dropout)
        if isinstance(rate, str):
            return rate
        w_q, w_k, w_v, w_r = weights
        if not module.use_residual:
            w_r = None
        p = InteractingParameters(w_q, None, w_k, None, w_v, None, None, None, w_r, None)
        residual = "none" if not module.use_residual else "identity" if w_r is None else "projection"
        scale = 1 / module.scale if module.scale else 1.0
        relu = module.layer_norm is None
        return Interaction(p, module.num_heads, scale, residual, relu, rate)

    @staticmethod
    def drops(module: Any) -> bool:
        return _drops(getattr(module.dot_attention, "dropout", None))

    def finish(self, out: Tensor, x: Tensor, interaction: Interaction) -> Tensor:
        return out if self.layer_norm is None else torch.relu(self.layer_norm(out))


class MultiheadAttention(Accelerated):
    """`torch.nn.MultiheadAttention` as the AutoInt models of libraries call it: on one tensor, for its output alone.

    Gives (out, None), with `keep_attention` the weights as the original does. A query whose every key is hidden gets
    no attention, where the original gives NaN.
    """

    @staticmethod
    def adapter(module: Any) -> Interaction | str:
        if not module._qkv_same_embed_dim:
            return "keys or values of a width of their own"
        if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
            return "keys beside those of the fields (add_bias_kv, add_zero_attn)"
        w_q, w_k, w_v = module.in_proj_weight.chunk(3)
        bias = module.in_proj_bias
        b_q, b_k, b_v = (None, None, None) if bias is None else bias.chunk(3)
        out = module.out_proj
        p = InteractingParameters(w_q, b_q, w_k, b_k, w_v, b_v, out.weight, out.bias, None, None)
        scale = 1 / math.sqrt(module.head_dim)
        return Interaction(p, module.num_heads, scale, "none", relu=False, dropout=module.dropout)

    @staticmethod
    def drops(module: Any) -> bool:
        return module.training and module.dropout > 0

    @staticmethod
    def arguments(module: Any, x: Tensor) -> tuple[Tensor, ...]:
        return (x if module.batch_first else x.transpose(0, 1),) * 3

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x three times, (F, B, E) or with `batch_first` (B, F, E); bool masks, True = hidden: (B, F) and (F, F)."""
        x = query if self.batch_first or query.ndim != 3 else query.transpose(0, 1)
        masked = key_padding_mask is not None or attn_mask is not None
        mask = _joined(x, key_padding_mask, attn_mask) if masked else None
        plain = query is key and key is value and not is_causal and (mask is not None) == masked
        interaction = self.describe(x) if plain else None
        arguments = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if interaction is None:
            return self._original_forward(*arguments)  # type: ignore[no-any-return]
        keep = self.keep_attention and need_weights
        try:
            result = self.fused(x, check_mask(mask, x), keep, interaction)
        except Misfit:
            return self._original_forward(*arguments)  # type: ignore[no-any-return]
        out, weights = result if isinstance(result, tuple) else (result, None)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return out if self.batch_first else out.transpose(0, 1), weights


def _joined(x: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """One mask that broadcasts to (B, F, F), True = hidden; None where the op has none such."""
    batch, fields = x.shape[:2]
    for mask, shape in ((key_padding_mask, (batch, fields)), (attn_mask, (fields, fields))):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
            return None
    if key_padding_mask is None:
        return attn_mask
    return key_padding_mask[:, None] if attn_mask is None else key_padding_mask[:, None] | attn_mask


class Reference(Accelerated):
    """This package's own reference, which becomes what `InteractingLayer` is."""

    parameter_names = ReferenceInteractingLayer.parameter_names
    emb_size: int

    @staticmethod
    def adapter(module: Any) -> Interaction | str:
        return ReferenceInteractingLayer.interaction(module)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, return_attention: bool = False) -> Any:
        check_input(x, self.emb_size)
        return self.fused(x, check_mask(mask, x), return_attention)


class Caller(NamedTuple):
    """A model that applies a stack of `nn.MultiheadAttention` to one tensor and uses the outputs alone.

    stack: the attribute that holds them. methods: those of the model whose code is what does so.
    """

    stack: str
    methods: tuple[str, ...]


LAYERS = MappingProxyType(
    {
        "deepctr_torch.layers.interaction.InteractingLayer": DeepCTR,
        "torch_rechub.basic.layers.InteractingLayer": Rechub,
        "torch.nn.modules.activation.MultiheadAttention": MultiheadAttention,
        f"{ReferenceInteractingLayer.__module__}.{ReferenceInteractingLayer.__qualname__}": Reference,
    }
)
CALLERS = MappingProxyType(
    {
        "torchfm.model.afi.AutomaticFeatureInteractionModel": Caller("self_attns", ("forward",)),
        "recbole.model.context_aware_recommender.autoint.AutoInt": Caller("self_attns", ("forward", "autoint_layer")),
        "pytorch_tabular.models.autoint.autoint.AutoIntBackbone": Caller("self_attns", ("forward",)),
        "pytorch_widedeep.models.rec.autoint.AutoInt": Caller("attention_layers", ("forward",)),
        "pytorch_widedeep.models.rec.autoint_plus.AutoIntPlus": Caller(
            "attention_layers", ("forward", "_apply_attention_layers")
        ),
    }
)


class Registered(Accelerated):
    """What accelerates the classes given to `register_adapter`."""


_registered: dict[type, type[Accelerated]] = {}


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def register_adapter(cls: type[nn.Module], adapter: Adapter) -> None:
    """Lets `accelerate` take modules of the class `cls`, and of its subclasses that keep its forward.

    adapter: given such a module, what it computes as an `Interaction`, or a reason why it cannot be said, as a string.
        It is asked at every call, so that it reads the tensors the module has then, as views where it can. A call that
        has anything but one positional argument x (B, F, E), and in training one with `Interaction.dropout`, is left
        to the class's own forward.

    A process that unpickles an accelerated module must have registered the adapter: best where the class is defined.
    Raises TypeError for what is no class of modules or cannot be called.
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"cls: expected a subclass of torch.nn.Module, got {cls!r}")
    if issubclass(cls, Fused):
        raise TypeError(f"cls: expected a class that autoint_fast has not made faster yet, got {cls.__name__}")
    if not callable(adapter):
        raise TypeError(f"adapter: expected a function of a module, got {adapter!r}")
    if cls in _registered:
        # The class of what is accelerated already stays the one that pickle finds.
        _registered[cls].adapter = staticmethod(adapter)  # type: ignore[assignment]
    else:
        _registered[cls] = type("Registered", (Registered,), {"adapter": staticmethod(adapter)})


def find(cls: type) -> tuple[type, type[Accelerated]] | None:
    """The nearest base of `cls` for which there is an adapter, and what accelerates it."""
    for base in cls.__mro__:
        family = _registered.get(base) or LAYERS.get(qualified_name(base))
        if family is None and base.__qualname__ == "MultiHeadSelfAttention":
            # FuxiCTR's scripts put its model zoo's folders on the path, under whatever name.
            folders = base.__module__.split(".")
            family = FuxiCTR if folders[0] == "fuxictr" or "model_zoo" in folders or folders[-1] == "AutoInt" else None
        if family is not None:
            return base, family
    return None
