"""Which engine runs a call: one list of reasons serves the choice, the error and `why`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from .kernels import native_engine, torch_engine, triton_engine
from .weights import InteractingParameters, Layout


class Call(NamedTuple):
    """What the choice of an engine may depend on.

    The batch size is not part of it, so that torch.compile and torch.export keep the batch dynamic.
    """

    device_type: str
    dtype: torch.dtype
    n_fields: int
    layout: Layout
    inside: str | None  # what runs the call other than plain eager or compiled code, in words


class Engine(Protocol):
    """What every engine module provides; shapes and contracts as in `kernels.torch_engine`."""

    def unsupported(self, call: Call) -> list[str]: ...

    def prepare(self, call: Call) -> bool: ...

    def comparison(self, copy: InteractingParameters, given: InteractingParameters) -> Callable[[], bool]: ...

    def folding(self, p: InteractingParameters, layout: Layout, scale: float) -> Callable[[], Tensor] | None: ...

    def fold(self, p: InteractingParameters, layout: Layout, scale: float) -> Tensor: ...

    def fold_backward(
        self, grad: Tensor, p: InteractingParameters, layout: Layout, scale: float, wanted: Sequence[bool]
    ) -> list[Tensor | None]: ...

    def empty_relu_mask(self, x: Tensor, layout: Layout) -> Tensor | None: ...

    def interacting(
        self, packed: Tensor, layout: Layout, n_fields: int, dtype: torch.dtype
    ) -> Callable[[Tensor, Tensor | None], Tensor]: ...

    def interact(
        self, x: Tensor, packed: Tensor, mask: Tensor | None, layout: Layout, *, relu_mask: Tensor = ...
    ) -> Tensor: ...

    def interact_backward(
        self,
        grad: Tensor,
        x: Tensor,
        packed: Tensor,
        relu: Tensor | None,
        mask: Tensor | None,
        layout: Layout,
        needs: int,
    ) -> tuple[Tensor | None, Tensor | None]: ...


# A dict, not a MappingProxyType, which Dynamo refuses once the compiled code has changed any dict.
ENGINES: Mapping[str, Engine] = {
    "triton": cast(Engine, triton_engine),
    "native": cast(Engine, native_engine),
    "torch": cast(Engine, torch_engine),
}
BACKENDS = ("auto", *ENGINES, "reference")


def check_backend(backend: str) -> None:
    """Raises TypeError for what is no string, ValueError for an unknown name."""
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def surroundings() -> str | None:
    """What runs this code other than plain eager or compiled code, in words: `Call.inside`."""
    if torch.compiler.is_compiling():
        # The rest is then Dynamo's business, not visible state.
        return None
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform (grad, vmap, jvp)"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return "torch.jit.trace" if torch.jit.is_tracing() else None


def is_plain(x: Tensor) -> bool:
    """Whether a call with x is eager code that nothing differentiates, records, transforms or casts."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or type(x) is not Tensor
        or x.is_neg()
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def preference(call: Call) -> tuple[str, ...]:
    """The engines by expected speed, fastest first; the reference is always the last resort."""
    if call.device_type in ("cuda", "xpu"):
        return ("triton", "torch")
    if call.device_type == "meta":
        return ()
    return ("native", "torch")


def choose(backend: str, call: Call) -> str:
    """The engine that runs `call`: a name of ENGINES, or "reference".

    Raises ValueError with every reason where an explicitly named engine cannot run it.
    """
    if backend == "auto":
        # A loop, not next() with a default, which Dynamo of torch 2.7 does not trace.
        for name in preference(call):
            if not ENGINES[name].unsupported(call) and ENGINES[name].prepare(call):
                return name
        return "reference"
    if backend == "reference":
        return backend
    engine = ENGINES[backend]
    reasons = engine.unsupported(call)
    if not reasons and not engine.prepare(call):
        reasons = engine.unsupported(call)
    if reasons:
        raise ValueError(f"backend={backend!r} cannot run this call: " + "; ".join(reasons))
    return backend


class Why(NamedTuple):
    """The answer of `why`: the engine chosen, and per engine the reasons against it (none: it could run)."""

    choice: str
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"this call runs on: {self.choice}"]
        lines += [f"  {name}: {'; '.join(why) if why else 'could run it'}" for name, why in self.reasons.items()]
        return "\n".join(lines)


def explain(backend: str, call: Call) -> Why:
    """The engine that `choose` would give, with the reasons against every one; prepares nothing."""
    reasons: dict[str, list[str]] = {name: ENGINES[name].unsupported(call) for name in ENGINES}
    reasons["reference"] = []
    if backend == "auto":
        backend = next((name for name in preference(call) if not reasons[name]), "reference")
    return Why("nothing (it raises)" if reasons[backend] else backend, reasons)
