"""From the facts of a call to launches: pure functions, so that a launch can be compiled, counted and forced.

Nothing is tuned behind the user's back. The choices rest on warp-instructions, registers and spills of the compiled
kernels (sm_90, Triton 3.9), which tests/compiled holds to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..weights import (
    LOG2E,
    NEED_BIAS,
    NEED_INPUT,
    NEED_RESIDUAL,
    NEED_SCORES,
    NEED_VALUES,
    InteractingParameters,
    Layout,
)
from . import triton_fold, triton_resident, triton_streaming

BLOCK = 16
MASK_NONE, MASK_KEYS, MASK_PAIRS = 0, 1, 2
# A row of partial sums per program is read once more: more than this is not worth the parallelism.
PARTIAL_BYTES = 32 << 20


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `kernel[grid](*args, **options)`."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any] = field(hash=False)

    def __call__(self) -> None:
        self.kernel[self.grid](*self.args, **self.options)


@dataclass(frozen=True)
class Target:
    """What a launch needs to know of the device: "cuda", "hip" or "xpu", and its number of multiprocessors."""

    backend: str
    multiprocessors: int


@dataclass(frozen=True)
class Config:
    """How a kernel is cut to a shape.

    precision: of the dots, "ieee" (16-bit and fp64 operands), "tf32", or "tf32x4" for fp32's own accuracy.
    resident: a tile's x stays on chip (forward only), else keys are streamed.
    pack: samples that share a tile.
    unroll, hoist: resident kernels: row blocks unrolled, heads' weights kept in registers.
    rows, keys: streaming kernels: the blocks.
    programs_per_sm: programs walk over tiles; this many per multiprocessor, at most one per tile.
    maxnreg: the registers a thread may have, where the compiler's own choice spills.
    """

    precision: str
    resident: bool = False
    pack: int = 1
    unroll: bool = False
    hoist: bool = False
    rows: int = BLOCK
    keys: int = BLOCK
    num_warps: int = 1
    programs_per_sm: int = 16
    maxnreg: int | None = None

    def options(self, target: Target) -> dict[str, Any]:
        """The launch options, all but the shape."""
        # Loads are not pipelined: programs of one warp hide each other's latency, and the registers are worth more.
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": 1}
        if self.maxnreg is not None and target.backend == "cuda":
            options["maxnreg"] = self.maxnreg
        return options


def packed_samples(n_fields: int) -> int:
    """How many samples of up to 8 fields share a tile of 16 rows, each in a power of two of them."""
    return BLOCK // (1 << (n_fields - 1).bit_length()) if n_fields <= BLOCK // 2 else 1


def dot_precision(dtype: torch.dtype, target: Target, allow_tf32: bool) -> str:
    """The precision of the dots: fp32 uses TF32 only where torch's own matmuls may."""
    if dtype != torch.float32 or target.backend == "hip":
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x4"


def forward_config(n_fields: int, layout: Layout, precision: str, mask_kind: int) -> Config:
    """The forward's cut. Resident up to 64 fields of up to 16 columns; wider or longer is streamed."""
    fp32 = precision != "ieee"
    if n_fields <= 4 * BLOCK and max(layout.emb_size, layout.out_size) <= BLOCK:
        pressed = fp32 and (n_fields > (3 if precision == "tf32" else 2) * BLOCK or mask_kind != MASK_NONE)
        return Config(
            precision,
            resident=True,
            pack=packed_samples(n_fields),
            unroll=not fp32 or n_fields <= BLOCK,
            hoist=layout.n_head <= 4 and not pressed,
            maxnreg=255 if fp32 else None,
        )
    wide = max(layout.emb_size, layout.out_size) > 2 * BLOCK
    rows = 2 * BLOCK if not wide and layout.emb_size <= BLOCK else BLOCK
    return Config(precision, rows=rows, keys=BLOCK if fp32 and wide else 2 * BLOCK)


def backward_config(n_fields: int, precision: str) -> Config:
    """The backward's cut: with 16 rows there is room for every accumulator without spilling."""
    pack = packed_samples(n_fields)
    keys = 2 * BLOCK if precision == "tf32" and n_fields > 4 * BLOCK else BLOCK
    # Left to itself the compiler may settle for 168 registers and spill.
    return Config(precision, pack=pack, keys=keys, programs_per_sm=8, maxnreg=255)


def mask_arguments(mask: Tensor | None, stand_in: Tensor) -> tuple[int, tuple[Any, ...]]:
    """The kind of a 3-D mask, and (pointer, stride_b, stride_q, stride_k), 0 where it broadcasts."""
    if mask is None:
        return MASK_NONE, (stand_in, 0, 0, 0)
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    return (MASK_KEYS if strides[1] == 0 else MASK_PAIRS), (mask, *strides)


def _dots(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    exact = dtype == torch.float64 or (dtype == torch.float32 and config.precision != "tf32")
    return {"PRECISION": config.precision, "REORDER": config.precision != "ieee", "EXACT": exact}


def _key_blocks(n_fields: int, keys: int) -> tuple[int, dict[str, int]]:
    """Where the full blocks of `keys` keys end, and the blocks: the rest, at least one key, is in one of TAIL."""
    rest = (n_fields - 1) % keys + 1
    return n_fields - rest, {"KEYS": keys, "TAIL": max(BLOCK, 1 << (rest - 1).bit_length())}


def fold_launch(p: InteractingParameters, packed: Tensor, layout: Layout) -> Launch:
    """The ten parameters, contiguous, into `packed`."""
    h, e, o = layout
    ne, no = -(-e // BLOCK), -(-o // BLOCK)
    args = (p.w_q, p.b_q, p.w_k, p.w_v, p.b_v, p.w_o, p.b_o, p.w_r, p.b_r, packed)
    options = {"E": e, "H": h, "O": o, "SCALE": LOG2E / math.sqrt(e), "num_warps": 1}
    return Launch(triton_fold.fold, (h * ne * (ne + no) + no,), args, options)


def unfold_launch(grad: Tensor, p: InteractingParameters, grads: Sequence[Tensor | None], layout: Layout) -> Launch:
    """The gradient of the packed weights into those of the parameters that are there."""
    h, e, o = layout
    ne, no = -(-e // BLOCK), -(-o // BLOCK)
    wanted = sum(1 << j for j, g in enumerate(grads) if g is not None)
    outputs = tuple(grad if g is None else g for g in grads)
    args = (grad, p.w_q, p.b_q, p.w_k, p.w_v, p.b_v, p.w_o, *outputs)
    options = {"E": e, "H": h, "O": o, "SCALE": LOG2E / math.sqrt(e), "WANTED": wanted, "num_warps": 1}
    return Launch(triton_fold.unfold, (h * ne * (3 * ne + no) + no,), args, options)


def forward_launch(
    x: Tensor,
    packed: Tensor,
    mask: Tensor | None,
    out: Tensor,
    layout: Layout,
    config: Config,
    target: Target,
) -> Launch:
    """x (B, F, E) -> out (B, F, O), contiguous."""
    h, e, o = layout
    batch, fields, _ = x.shape
    mask_kind, (mask_tensor, *mask_strides) = mask_arguments(mask, x)
    shape = {"F": fields, "E": e, "H": h, "O": o, "MASK": mask_kind, **_dots(config, x.dtype)}
    args = (x, packed, mask_tensor, out, batch, *x.stride(), *mask_strides)
    if config.resident:
        tiles = -(-batch // config.pack)
        cut = {"PACK": config.pack, "UNROLL": config.unroll, "HOIST": config.hoist}
        kernel = triton_resident.forward_resident
    else:
        tiles = batch * -(-fields // config.rows)
        key_end, blocks = _key_blocks(fields, config.keys)
        args += (key_end,)
        cut = {"ROWS": config.rows, **blocks}
        kernel = triton_streaming.forward_streaming
    grid = (min(tiles, target.multiprocessors * config.programs_per_sm),)
    return Launch(kernel, grid, args, {**shape, **cut, **config.options(target)})


def backward_programs(batch: int, layout: Layout, config: Config, target: Target) -> int:
    """How many programs share the backward, each with a row of partial sums of its own."""
    rows = max(1, PARTIAL_BYTES // (4 * layout.numel))
    wanted = min(target.multiprocessors * config.programs_per_sm, max(rows, target.multiprocessors))
    return min(-(-batch // config.pack), wanted)


def backward_launch(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    out: Tensor,
    mask: Tensor | None,
    d_x: Tensor,
    partial: Tensor,
    scratch: Tensor,
    layout: Layout,
    needs: int,
    config: Config,
    target: Target,
) -> Launch:
    """dx (B, F, E), contiguous, and a row of partial sums per program."""
    h, e, o = layout
    batch, fields, _ = x.shape
    mask_kind, (mask_tensor, *mask_strides) = mask_arguments(mask, x)
    key_end, blocks = _key_blocks(fields, config.keys)
    options = {
        **{"F": fields, "E": e, "H": h, "O": o, "MASK": mask_kind, "PACK": config.pack, "ROWS": config.rows},
        **{**blocks, **_dots(config, x.dtype)},
        **{"NEED_INPUT": bool(needs & NEED_INPUT), **_needed_parts(needs)},
        **config.options(target),
    }
    tensors = (grad, x, packed, mask_tensor, out, d_x, partial, scratch)
    args = (*tensors, batch, *grad.stride(), *x.stride(), *mask_strides, key_end, 0)
    return Launch(triton_streaming.backward, (partial.shape[0],), args, options)


def reduce_launch(partial: Tensor, total: Tensor, layout: Layout, needs: int) -> Launch:
    """The rows of `partial` added up, the parts nobody needs zero."""
    h, e, o = layout
    options = {"E": e, "H": h, "O": o, **_needed_parts(needs), "ROWS": 32, "COLUMNS": 64, "num_warps": 4}
    return Launch(triton_fold.reduce_partial, (-(-layout.numel // 64),), (partial, total, partial.shape[0]), options)


def _needed_parts(needs: int) -> dict[str, bool]:
    return {
        "NEED_SCORES": bool(needs & NEED_SCORES),
        "NEED_VALUES": bool(needs & NEED_VALUES),
        "NEED_RESIDUAL": bool(needs & NEED_RESIDUAL),
        "NEED_BIAS": bool(needs & NEED_BIAS),
    }
