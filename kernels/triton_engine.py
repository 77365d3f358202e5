"""The fused Triton kernels as an engine: CUDA, ROCm and XPU devices, and CPU tensors under Triton's interpreter.

Triton is imported on first use, with the launches.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..weights import MERGED, NEED_INPUT, NEED_WEIGHTS, InteractingParameters, Layout, folded_dtype

if TYPE_CHECKING:
    from ..dispatch import Call
    from .triton_launch import Config, Target

INSTALLED = importlib.util.find_spec("triton") is not None
# Triton decides when a kernel is first decorated, so this is not to be asked again later.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_FIELDS, MAX_WIDTH, MAX_HEADS = 512, 64, 16


def unsupported(call: Call) -> list[str]:
    """Every reason why this engine cannot run `call`."""
    reasons = []
    if not INSTALLED:
        reasons.append("triton is not installed")
    if call.device_type == "cpu":
        if not INTERPRETED:
            reasons.append("x is on the CPU, where only Triton's interpreter runs (TRITON_INTERPRET=1, slow)")
    elif call.device_type not in ("cuda", "xpu"):
        reasons.append(f"x is on {call.device_type}, which is no device of Triton's")
    elif call.device_type == "cuda" and torch.version.hip is None and _capability() < (8, 0):
        reasons.append("the GPU's compute capability is below 8.0")
    if call.dtype == torch.float64 and not INTERPRETED:
        reasons.append("fp64 runs only in Triton's interpreter")
    elif call.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        reasons.append(f"x is {call.dtype}, not fp32, bf16 or fp16")
    layout = call.layout
    if call.n_fields > MAX_FIELDS:
        reasons.append(f"{call.n_fields} fields, more than {MAX_FIELDS}")
    if call.n_fields < 1:
        reasons.append("there are no fields")
    if layout.emb_size > MAX_WIDTH:
        reasons.append(f"an embedding size of {layout.emb_size}, more than {MAX_WIDTH}")
    if layout.factored and layout.rank > MAX_WIDTH:
        reasons.append(f"heads of width {layout.rank}, more than {MAX_WIDTH}")
    if layout.head_out > MAX_WIDTH:
        what = "an output" if layout.output == MERGED else "heads' outputs"
        reasons.append(f"{what} of width {layout.head_out}, more than {MAX_WIDTH}")
    if layout.n_head > MAX_HEADS:
        reasons.append(f"{layout.n_head} heads, more than {MAX_HEADS}")
    if call.inside is not None:
        reasons.append(f"it cannot run inside {call.inside}")
    return reasons


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo, a second and more.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _target(device: torch.device) -> Target:
    from .triton_launch import Target

    if device.type == "cpu":
        return Target("cuda", 1)
    if device.type == "xpu":
        return Target("xpu", torch.xpu.get_device_properties(device).max_compute_units)
    backend = "cuda" if torch.version.hip is None else "hip"
    return Target(backend, torch.cuda.get_device_properties(device).multi_processor_count)


def _device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the tensor's device, whatever the current one is."""
    if tensor.device.type == "cuda":
        return torch.cuda.device_of(tensor)
    if tensor.device.type == "xpu":
        return torch.xpu.device_of(tensor)
    return contextlib.nullcontext()


def allow_tf32() -> bool:
    """Whether torch's own switches let fp32 matmuls use TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


def _contiguous(p: InteractingParameters) -> InteractingParameters:
    return InteractingParameters(*(None if t is None else t.contiguous() for t in p))


def fold(p: InteractingParameters, layout: Layout, scale: float) -> Tensor:
    """As `torch_engine.fold`, in one launch."""
    from .triton_launch import fold_launch

    packed = torch.empty(layout.numel, dtype=folded_dtype(p.w_q.dtype), device=p.w_q.device)
    with _device(packed):
        fold_launch(_contiguous(p), packed, layout, scale)()
    return packed


def fold_backward(
    grad: Tensor, p: InteractingParameters, layout: Layout, scale: float, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """As `torch_engine.fold_backward`, in one launch."""
    from .triton_launch import unfold_launch

    grads = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if want and t is not None else None
        for t, want in zip(p, wanted, strict=True)
    ]
    if any(wanted):
        with _device(grad):
            unfold_launch(grad, _contiguous(p), grads, layout, scale)()
    return grads


def empty_relu_mask(x: Tensor, layout: Layout) -> Tensor | None:
    """As `torch_engine.empty_relu_mask`: a bit per output, in words of 16 bits, at least one for each head that has
    columns of its own. int16 (B, F, words)"""
    heads = 1 if layout.output == MERGED else layout.n_head
    return x.new_empty(*x.shape[:2], heads * -(-layout.head_out // 16), dtype=torch.int16)


def interacting(
    packed: Tensor, layout: Layout, n_fields: int, dtype: torch.dtype
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """As `torch_engine.interacting`."""
    return lambda x, mask: interact(x, packed, mask, layout)


def interact(
    x: Tensor,
    packed: Tensor,
    mask: Tensor | None,
    layout: Layout,
    config: Config | None = None,
    *,
    relu_mask: Tensor | None = None,
) -> Tensor:
    """As `torch_engine.interact`, in one launch.

    config: forces a cut other than the shape's own. relu_mask: of `empty_relu_mask`, filled in place.
    """
    from .triton_launch import (
        dot_precision,
        forward_config,
        forward_launch,
        forward_programs,
        mask_arguments,
        projected_size,
    )

    batch, fields, _ = x.shape
    out = torch.empty(batch, fields, layout.out_size, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    target = _target(x.device)
    if config is None:
        precision = dot_precision(x.dtype, target, allow_tf32())
        config = forward_config(fields, layout, precision, mask_arguments(mask, x)[0])
    projected = x
    if layout.factored:
        programs = forward_programs(batch, fields, layout, config, target)
        projected = x.new_empty(programs, projected_size(fields, layout, config))
    with _device(x):
        forward_launch(x, packed, mask, out, relu_mask, projected, layout, config, target)()
    return out


def prepare(call: Call) -> bool:
    """There is nothing to make ready."""
    return True


def folding(p: InteractingParameters, layout: Layout, scale: float) -> Callable[[], Tensor] | None:
    """As `torch_engine.folding`."""
    return None


def comparison(copy: InteractingParameters, given: InteractingParameters) -> Callable[[], bool]:
    """As `torch_engine.comparison`: one launch folds, while to compare would be to wait for the device."""
    return lambda: False


def interact_backward(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    relu: Tensor | None,
    mask: Tensor | None,
    layout: Layout,
    needs: int,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """As `torch_engine.interact_backward`, in one launch and a reduction; the same bits at every run."""
    from .triton_launch import (
        backward_config,
        backward_launch,
        backward_programs,
        dot_precision,
        mask_arguments,
        projected_size,
        reduce_launch,
        scratch_size,
    )

    batch, fields, _ = x.shape
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs & NEED_INPUT else None
    if grad.numel() == 0:
        return d_x, torch.zeros_like(packed) if needs & NEED_WEIGHTS else None
    target = _target(x.device)
    if config is None:
        precision = dot_precision(x.dtype, target, allow_tf32())
        config = backward_config(fields, layout, precision, mask_arguments(mask, x)[0], x.dtype.itemsize == 2)
    programs = backward_programs(batch, fields, layout, config, target)
    partial = packed.new_empty(programs, layout.numel)
    scratch, projected = packed, x
    if layout.factored or needs & NEED_INPUT:
        scratch = packed.new_empty(programs, scratch_size(fields, layout, config))
    if layout.factored:
        projected = x.new_empty(programs, projected_size(fields, layout, config))
    with _device(x):
        backward_launch(
            grad,
            x,
            packed,
            grad if relu is None else relu,  # without relu it is not read
            mask,
            x if d_x is None else d_x,
            partial,
            scratch,
            projected,
            layout,
            needs,
            config,
            target,
        )()
        if not needs & NEED_WEIGHTS:
            return d_x, None
        d_packed = torch.empty_like(packed)
        reduce_launch(partial, d_packed, layout, needs)()
    return d_x, d_packed
