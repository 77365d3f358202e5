"""Reading the weights of a layer's projections, which are never called themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def read_projections(layer: nn.Module, names: Sequence[str]) -> list[Any]:
    """Weight and bias of each Linear of `layer` in `names`, None for a bias that is not there.

    They are read now, so that parametrisations and swapped parameters count. What relies on the call of a Linear is
    done here or refused: raises TypeError for a forward of its own, RuntimeError for hooks.
    """
    tensors: list[Any] = []
    compiling = torch.compiler.is_compiling()
    modules: Any = layer._modules
    for name in names:
        projection = modules[name]
        state = projection.__dict__
        own = state["_parameters"]
        if (
            compiling
            or type(projection) is not nn.Linear
            or len(own) != 2
            or state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        ):
            prepare_projection(name, projection)
            tensors += (projection.weight, projection.bias)
        else:
            # Past nn.Module's attribute look-up, which shows in the time of a call of one sample.
            tensors += (own["weight"], own["bias"])
    return tensors


def has_hooks(module: nn.Module) -> bool:
    """Whether anything runs when the module is called beside its forward."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(map(bool, hooks))


def prepare_projection(name: str, projection: nn.Module) -> None:
    """Runs the hooks that compute a weight; raises TypeError or RuntimeError for what else relies on a call."""
    if getattr(type(projection), "forward", None) is not nn.Linear.forward or "forward" in vars(projection):
        raise TypeError(f"{name}: expected a Linear with Linear's own forward, got a {type(projection).__name__}")
    for hook in projection._forward_pre_hooks.values():
        # Pruning and the older weight and spectral norms compute the weight in a hook before the call.
        if not (hasattr(hook, "apply_mask") or hasattr(hook, "compute_weight")):
            raise RuntimeError(f"{name}: a forward pre-hook on this projection would never run; put it on the layer")
        hook(projection, ())
    if projection._forward_hooks or projection._backward_hooks or projection._backward_pre_hooks:
        raise RuntimeError(f"{name}: a hook on this projection would never run; put it on the layer")
