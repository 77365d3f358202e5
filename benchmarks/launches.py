"""The launches that a call of the layer really makes, recorded on tensors without memory: no GPU is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from autoint_fast import InteractingLayer, op
from autoint_fast.dispatch import Call
from autoint_fast.kernels import triton_engine, triton_launch
from autoint_fast.kernels.triton_launch import Launch

from .cases import DTYPES, Shape

# fp32 tensors; torch's switch lets matrix products round to TF32.
TF32 = "tf32"
PRECISIONS = (*DTYPES, TF32)


class Recorded(NamedTuple):
    """A launch, and the architecture it is for; `backward`: whether it belongs to the backward, the weights' gradients
    included."""

    launch: Launch
    arch: str
    backward: bool

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self.launch.kernel.fn.__name__)


def torch_dtype(precision: str) -> torch.dtype:
    """Of the tensors; `precision` is one of PRECISIONS."""
    return DTYPES["fp32" if precision == TF32 else precision]


def record(
    shape: Shape, precision: str, batch: int, arch: str, multiprocessors: int, *, training: bool = True
) -> list[Recorded]:
    """The launches of one call, in order: the layer as it stands in a model, weights folded in the call.

    arch: such as "sm_90". training: with the gradients of x and of all parameters. Raises ValueError with every reason
    why the Triton engine does not run the shape.
    """
    dtype = torch_dtype(precision)
    layer = InteractingLayer(shape.n_head, shape.emb_size, backend="triton", device="meta", dtype=dtype)
    x = torch.empty(batch, shape.fields, shape.emb_size, dtype=dtype, device="meta", requires_grad=training)
    layout = layer.layout(shape.fields)
    made: list[Launch] = []
    with _instead_of_launching(made), _pretended(arch, multiprocessors), tf32(precision == TF32):
        reasons = triton_engine.unsupported(Call("cuda", dtype, shape.fields, layout, None))
        if reasons:
            raise ValueError(f"{shape}: {'; '.join(reasons)}")
        with torch.set_grad_enabled(training):
            # The layer's own forward would refuse tensors that are on no device of Triton's.
            out = op.interact(x, layer.interaction(), layout, None, "triton")
        forward = len(made)
        if training:
            torch.autograd.grad(out, [x, *layer.parameters()], torch.empty_like(out))
    return [Recorded(launch, arch, place >= forward) for place, launch in enumerate(made)]


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _instead_of_launching(made: list[Launch]) -> contextlib.AbstractContextManager[None]:
    return _replaced(triton_launch.Launch, "__call__", lambda launch: made.append(launch))


@contextlib.contextmanager
def _pretended(arch: str, multiprocessors: int) -> Iterator[None]:
    """Inside, torch and the engine see a device of this kind."""
    number = int(arch.removeprefix("sm_"))
    capability = number // 10, number % 10
    properties = SimpleNamespace(multi_processor_count=multiprocessors, major=capability[0], minor=capability[1])
    with (
        _replaced(torch.cuda, "get_device_properties", lambda device=None: properties),
        _replaced(torch.cuda, "get_device_capability", lambda device=None: capability),
        # What the engine has found out about a device it keeps; this one is asked anew.
        _replaced(triton_engine, "_target", triton_engine._target.__wrapped__),
    ):
        yield


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, torch's own matrix products of fp32 may be rounded to TF32, or may not."""
    matmul = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32" if allowed else "ieee")
    if not hasattr(matmul, name):
        name, value = "allow_tf32", allowed  # type: ignore[assignment]
    with _replaced(matmul, name, value):
        yield
