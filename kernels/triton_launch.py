"""From the facts of a call to launches: pure functions, so that a launch can be compiled, counted and forced.

Nothing is tuned behind the user's back. The choices rest on warp-instructions, registers and spills of the compiled
kernels (sm_90, Triton 3.9), which tests/compiled holds to.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..weights import (
    BARE,
    CONCATENATED,
    LOG2E,
    MERGED,
    NEED_BIAS,
    NEED_INPUT,
    NEED_RESIDUAL,
    NEED_SCORES,
    NEED_VALUES,
    InteractingParameters,
    Layout,
    Parts,
)
from . import triton_backward, triton_backward_resident, triton_fold, triton_resident, triton_scaled, triton_streaming

BLOCK = 16
MASK_NONE, MASK_KEYS, MASK_PAIRS = 0, 1, 2
# What resident kernels take for the precisions of fp32 tensors.
HALVES = {"tf32": "fp16", "tf32x4": "fp16x2"}
# What programs keep in memory, a row of partial sums or of projected keys and values each, is read once more: more
# than this is not worth the parallelism, and would not stay in the second-level cache.
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

    precision: of the dots, "ieee" (16-bit and fp64 operands), "tf32", or "tf32x4" for fp32's own accuracy; resident
        kernels know "fp16" as well, as accurate as TF32, and "fp16x2", which in forwards is as accurate as fp32.
    resident: a tile's x stays on chip, else keys are streamed.
    shifted: streaming forwards: row maxima are subtracted at once, not only where there is need.
    pack: samples that share a tile.
    unroll, hoist: resident kernels: row blocks unrolled (the backward's always are), heads' weights kept on chip.
    rows, keys: streaming kernels: the blocks.
    programs_per_sm: programs walk over tiles; this many per multiprocessor, at most one per tile.
    maxnreg: the registers a thread may have, where the compiler's own choice spills.
    """

    precision: str
    resident: bool = False
    shifted: bool = False
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
    """The forward's cut. Resident: folded, merged, up to 64 fields of up to 16 columns; the rest is streamed."""
    fp32 = precision != "ieee"
    pack = packed_samples(n_fields)
    widest = max(layout.emb_size, layout.rank, layout.head_out)
    if not layout.factored and layout.output == MERGED and n_fields <= 4 * BLOCK and widest <= BLOCK:
        hoist = layout.n_head <= 4
        if precision == "tf32":
            hoist = layout.n_head <= 2 and layout.emb_size == layout.out_size == BLOCK
        if precision == "tf32x4" or (precision == "tf32" and not hoist):
            return _scaled_config(n_fields, layout, precision, mask_kind)
        # Unrolled, row blocks share what they read of the weights; registers last for so many.
        most = {"ieee": (4, 4, 1), "tf32": (3, 1, 1)}[precision][mask_kind]
        return Config(
            precision,
            resident=True,
            pack=pack,
            unroll=n_fields <= most * BLOCK,
            hoist=hoist,
            # Of its own accord the compiler stops at 168, which here leaves room for half as many warps again.
            maxnreg=None if precision == "ieee" and n_fields > BLOCK and mask_kind == MASK_NONE else 255,
        )
    wide = widest > 2 * BLOCK
    narrow = not wide and max(layout.emb_size, layout.rank) <= BLOCK
    rows = 2 * BLOCK if narrow and n_fields > BLOCK else BLOCK
    # A mask of pairs takes as many registers as the scores, an operand cut in two twice its own.
    pressed = mask_kind == MASK_PAIRS or precision == "tf32x4" or (fp32 and wide)
    keys = BLOCK if pressed else 2 * BLOCK
    # Operands cut once, and what a second path needs, take more registers than several chunks leave.
    shifted = widest > BLOCK
    # Left to itself the compiler settles for fewer registers than these take, and spills.
    maxnreg = 255 if not shifted or layout.factored or layout.output != MERGED else None
    return Config(precision, shifted=shifted, pack=pack, rows=rows, keys=keys, maxnreg=maxnreg)


def _scaled_config(n_fields: int, layout: Layout, precision: str, mask_kind: int) -> Config:
    """The resident forward's cut with fp16 operands, where those of TF32 are more instructions: for all of fp32's
    accuracy, and where their weights would have to be loaded for every block of rows."""
    # Beyond, registers do not last: for unrolled blocks, and for weights in two parts.
    most = {MASK_NONE: 48, MASK_KEYS: 40, MASK_PAIRS: BLOCK}[mask_kind]
    full = layout.emb_size == layout.out_size == BLOCK
    spare = precision == "tf32" or (full and (mask_kind == MASK_NONE or n_fields <= 2 * BLOCK))
    return Config(
        HALVES[precision],
        resident=True,
        pack=packed_samples(n_fields),
        unroll=n_fields <= most,
        hoist=layout.n_head <= 2 and spare,
        maxnreg=255,
    )


def backward_config(n_fields: int, layout: Layout, precision: str, mask_kind: int, half: bool) -> Config:
    """The backward's cut; `half`: of tensors of 16 bits. Resident: folded, up to 39 fields where registers last, or all
    but last; in 16 bits of up to 16 columns, fp32 tensors of 16. The rest is streamed, in blocks of 16 rows or 32."""
    pack = packed_samples(n_fields)
    h, e, _, _, factored, output, *_ = layout
    if precision == "ieee" and not factored and max(e, layout.head_out) <= BLOCK:
        aligned = e == layout.head_out == BLOCK
        # Unaligned rows, a mask of pairs, and one of keys beside the addresses of many heads take registers.
        if mask_kind == MASK_PAIRS:
            most = 2 * BLOCK if aligned else BLOCK
        else:
            most = 39 if aligned and (mask_kind == MASK_NONE or h <= 2) else 2 * BLOCK
        if n_fields <= most:
            hoist = aligned and h <= 2 and mask_kind == MASK_NONE and output != CONCATENATED
            return Config(precision, resident=True, pack=pack, hoist=hoist, programs_per_sm=8, maxnreg=255)
    aligned = not factored and e == layout.head_out == BLOCK
    if precision in HALVES and aligned and n_fields <= 39 and mask_kind != MASK_PAIRS:
        # Operands in two parts spill a few registers beyond 32 fields where the heads are many or keys are masked: a
        # quarter of the streaming kernel's work all the same.
        return Config(HALVES[precision], resident=True, pack=pack, programs_per_sm=8, maxnreg=255)
    narrow = not factored and max(e, layout.head_out) <= BLOCK
    # Twice the rows halve how often keys and their gradients are fetched; only operands of 16 bits leave room for them.
    rows = 2 * BLOCK if half and narrow and pack == 1 and mask_kind != MASK_PAIRS else BLOCK
    # TF32 has room for twice the keys, but not beside the addresses of unaligned or wide rows.
    long = aligned and n_fields > 4 * BLOCK and mask_kind != MASK_PAIRS
    keys = 2 * BLOCK if precision == "tf32" and long else BLOCK
    # Left to itself the compiler may settle for 168 registers and spill.
    return Config(precision, pack=pack, rows=rows, keys=keys, programs_per_sm=8, maxnreg=255)


def mask_arguments(mask: Tensor | None, stand_in: Tensor) -> tuple[int, tuple[Any, ...]]:
    """The kind of a 3-D mask, and (pointer, stride_b, stride_q, stride_k), 0 where it broadcasts."""
    if mask is None:
        return MASK_NONE, (stand_in, 0, 0, 0)
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    return (MASK_KEYS if strides[1] == 0 else MASK_PAIRS), (mask, *strides)


def _dots(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    exact = dtype == torch.float64 or (dtype == torch.float32 and config.precision not in ("tf32", "fp16"))
    return {"PRECISION": config.precision, "REORDER": config.precision != "ieee", "EXACT": exact}


def _key_blocks(n_fields: int, keys: int) -> tuple[int, dict[str, int]]:
    """Where the full blocks of `keys` keys end, and the blocks: the rest, at least one key, is in one of TAIL."""
    rest = (n_fields - 1) % keys + 1
    return n_fields - rest, {"KEYS": keys, "TAIL": max(BLOCK, 1 << (rest - 1).bit_length())}


def _sizes(layout: Layout) -> dict[str, Any]:
    """What every kernel is told of the packed weights."""
    starts = _starts(layout)
    h, e, _, o = layout[:4]
    return {"E": e, "H": h, "O": o, "RESIDUAL": layout.residual, "AT_R": starts.r, "AT_B": starts.b}


def _form(layout: Layout) -> dict[str, Any]:
    """What those are told besides that serve every layout."""
    form = {"D": layout.rank, "FACTORED": layout.factored, "OUTPUT": layout.output, "HEAD_OUT": layout.head_out}
    return {**form, "AT_M": _starts(layout).m}


def _starts(layout: Layout) -> Parts:
    """Where the parts begin in the packed buffer."""
    return Parts(*itertools.accumulate(layout.sizes[:-1], initial=0))


def _parameters(p: InteractingParameters) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The parameters with a stand-in for those that are not there, and what folding is told of them."""
    there = sum(1 << j for j, t in enumerate(p) if t is not None)
    return tuple(p.w_q if t is None else t for t in p), {"THERE": there}


def fold_launch(p: InteractingParameters, packed: Tensor, layout: Layout, scale: float) -> Launch:
    """The parameters, contiguous, into `packed`."""
    h, e, d, o = layout[:4]
    (w_q, b_q, w_k, _, *rest), there = _parameters(p)
    blocks = h * _blocks(e) * _blocks(d) + _blocks(o)
    if layout.output != BARE:
        blocks += h * _blocks(d) * _blocks(layout.head_out)
    options = {**_sizes(layout), **_form(layout), "WIDTH": w_q.shape[0] // h, "SCALE": LOG2E * scale, **there}
    return Launch(triton_fold.fold, (blocks,), (w_q, b_q, w_k, *rest, packed), {**options, "num_warps": 1})


def unfold_launch(
    grad: Tensor, p: InteractingParameters, grads: Sequence[Tensor | None], layout: Layout, scale: float
) -> Launch:
    """The gradient of the packed weights into those of the parameters that are there."""
    h, e, _, o = layout[:4]
    (w_q, b_q, w_k, _, w_v, b_v, w_o, *_), there = _parameters(p)
    width = w_q.shape[0] // h
    wanted = sum(1 << j for j, g in enumerate(grads) if g is not None)
    outputs = tuple(grad if g is None else g for g in grads)
    args = (grad, w_q, b_q, w_k, w_v, b_v, w_o, *outputs)
    blocks = 3 * h * _blocks(width) * _blocks(e) + _blocks(o)
    if layout.output == MERGED:
        blocks += h * _blocks(o) * _blocks(width)
    options = {**_sizes(layout), **_form(layout), "WIDTH": width, "SCALE": LOG2E * scale, **there, "WANTED": wanted}
    return Launch(triton_fold.unfold, (blocks,), args, {**options, "num_warps": 1})


def _blocks(width: int) -> int:
    return -(-width // BLOCK)


def _tile_rows(n_fields: int, config: Config) -> int:
    return n_fields if config.pack == 1 else BLOCK


def projected_size(n_fields: int, layout: Layout, config: Config) -> int:
    """Elements of a tile's projected keys and values, which a program keeps in memory of its own."""
    return config.pack * n_fields * 2 * layout.n_head * layout.rank * layout.factored


def scratch_size(n_fields: int, layout: Layout, config: Config) -> int:
    """Elements of the gradients of a tile's x, and of a head's projected keys and values; 0 where they stay on chip."""
    if config.resident:
        return 0
    blocks = _blocks(layout.emb_size) + 2 * _blocks(layout.rank) * layout.factored
    return _tile_rows(n_fields, config) * blocks * BLOCK


def _affordable(programs: int, elements: int, target: Target) -> int:
    """At most `programs`, where each keeps so many elements."""
    return min(programs, max(PARTIAL_BYTES // (4 * elements), target.multiprocessors))


def forward_programs(batch: int, n_fields: int, layout: Layout, config: Config, target: Target) -> int:
    """How many programs share the forward."""
    tiles = -(-batch // config.pack)
    if not config.resident and not layout.factored:
        tiles *= -(-_tile_rows(n_fields, config) // config.rows)
    programs = min(tiles, target.multiprocessors * config.programs_per_sm)
    kept = projected_size(n_fields, layout, config)
    return _affordable(programs, kept, target) if kept else programs


def forward_launch(
    x: Tensor,
    packed: Tensor,
    mask: Tensor | None,
    out: Tensor,
    relu_mask: Tensor | None,
    projected: Tensor,
    layout: Layout,
    config: Config,
    target: Target,
) -> Launch:
    """x (B, F, E) -> out (B, F, O), contiguous, and what relu let pass, if that is to be kept.

    `projected`: (programs, projected_size), or anything where folded.
    """
    batch, fields, _ = x.shape
    mask_kind, (mask_tensor, *mask_strides) = mask_arguments(mask, x)
    cut = {"F": fields, "PACK": config.pack, "MASK": mask_kind, "RELU": layout.relu, **_dots(config, x.dtype)}
    cut["KEEP_RELU"] = relu_mask is not None
    outputs = (out, out if relu_mask is None else relu_mask)
    args = (batch, *x.stride(), *mask_strides)
    key_end, blocks = _key_blocks(fields, BLOCK if config.resident else config.keys)
    if config.resident:
        cut |= {"UNROLL": config.unroll, "HOIST": config.hoist}
        kernel = triton_resident.forward_resident
        if config.precision in ("fp16", "fp16x2"):
            kernel = triton_scaled.forward_scaled
            del cut["REORDER"], cut["EXACT"]
        args = (x, packed, mask_tensor, *outputs, *args, key_end)
    else:
        cut |= {"ROWS": config.rows, "SHIFTED": config.shifted, **blocks, **_form(layout)}
        kernel = triton_streaming.forward_streaming
        args = (x, packed, mask_tensor, *outputs, projected, *args, key_end)
    grid = (forward_programs(batch, fields, layout, config, target),)
    return Launch(kernel, grid, args, {**_sizes(layout), **cut, **config.options(target)})


def backward_programs(batch: int, n_fields: int, layout: Layout, config: Config, target: Target) -> int:
    """How many programs share the backward, each with a row of partial sums of its own."""
    wanted = target.multiprocessors * config.programs_per_sm
    kept = layout.numel + projected_size(n_fields, layout, config)
    return min(-(-batch // config.pack), _affordable(wanted, kept, target))


def backward_launch(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    relu_mask: Tensor,
    mask: Tensor | None,
    d_x: Tensor,
    partial: Tensor,
    scratch: Tensor,
    projected: Tensor,
    layout: Layout,
    needs: int,
    config: Config,
    target: Target,
) -> Launch:
    """dx (B, F, E), contiguous, and a row of partial sums per program. `relu_mask`: anything without relu."""
    batch, fields, _ = x.shape
    mask_kind, (mask_tensor, *mask_strides) = mask_arguments(mask, x)
    form = _form(layout)
    dots = _dots(config, x.dtype)
    cut: dict[str, Any] = {"F": fields, "MASK": mask_kind, "PACK": config.pack}
    tensors = (grad, x, packed, mask_tensor, relu_mask, d_x, partial)
    args = (batch, *grad.stride(), *x.stride(), *mask_strides)
    if config.resident:
        kernel = triton_backward_resident.backward_resident
        del form["FACTORED"], dots["REORDER"]
        cut["HOIST"] = config.hoist
    else:
        kernel = triton_backward.backward
        key_end, blocks = _key_blocks(fields, config.keys)
        cut |= {"ROWS": config.rows, **blocks}
        tensors, args = (*tensors, scratch, projected), (*args, key_end)
    options = {
        **{**_sizes(layout), **form, "RELU": layout.relu, **cut, **dots},
        **{"NEED_INPUT": bool(needs & NEED_INPUT), **_needed_parts(needs)},
        **config.options(target),
    }
    return Launch(kernel, (partial.shape[0],), (*tensors, *args, 0), options)


def reduce_launch(partial: Tensor, total: Tensor, layout: Layout, needs: int) -> Launch:
    """The rows of `partial` added up, the parts nobody needs zero."""
    starts = _starts(layout)
    options = {"AT_V": starts.v, "AT_R": starts.r, "AT_B": starts.b, "SIZE": layout.numel, **_needed_parts(needs)}
    # It waits for memory and little else: a sector of many rows at once, by programs enough for every multiprocessor.
    columns = 8
    options |= {"ROWS": 512, "COLUMNS": columns, "num_warps": 4}
    grid = (-(-layout.numel // columns),)
    return Launch(triton_fold.reduce_partial, grid, (partial, total, partial.shape[0]), options)


def _needed_parts(needs: int) -> dict[str, bool]:
    return {
        "NEED_SCORES": bool(needs & NEED_SCORES),
        "NEED_VALUES": bool(needs & NEED_VALUES),
        "NEED_RESIDUAL": bool(needs & NEED_RESIDUAL),
        "NEED_BIAS": bool(needs & NEED_BIAS),
    }
