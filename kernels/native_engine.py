"""The folded algebra in C++ (native.cpp), each sample in one pass, as an engine for CPUs.

One build of the source for each dtype serves every shape; compiled at the first call that takes this engine, it is
found again ever after. A shape that has been used enough to pay for it gets a build of its own, in the background,
which adds in the same order: the bits of a result depend neither on the build nor on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import struct
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..weights import NEED_INPUT, NEED_WEIGHTS, InteractingParameters, Layout, folded_dtype, operations, row_by_row
from . import native_build, torch_engine
from .native_build import Spec

if TYPE_CHECKING:
    from ..dispatch import Call

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
LANE_BYTES = {"avx512bf16": 64, "avx512": 64, "avx2": 32, "neon": 16, "plain": 16}
MAX_FIELDS, MAX_WIDTH, MAX_HEADS = 512, 128, 16
# Operations that a thread must get, or waking it costs more than it saves; and that a shape must have taken until a
# build of its own, 3 to 20 percent faster, pays for a few seconds of compiling.
THREAD_OPERATIONS, OWN_BUILD_OPERATIONS = 2e6, 3e12
# Folding with simple loops is faster than with torch's matmuls up to this width.
LOOP_WIDTH = 32
# The rows of partial sums of weight gradients: as many as this allows, and no more than 64.
PARTIAL_BYTES = 16 << 20
PHASES = ("load", "project", "scores", "exp", "values", "gradients", "store")

# The fields of a layout as the source calls them.
LAYOUT_DEFINITIONS = tuple(f"AUTOINT_{name}" for name in ("H", "E", "D", "O", "FACTORED", "OUTPUT", "RESIDUAL", "RELU"))

_SHAPE, _FORWARD, _BACKWARD = struct.Struct("9q"), struct.Struct("13q"), struct.Struct("21q")
_FOLD, _UNFOLD, _ADDRESS = struct.Struct("10qd20q"), struct.Struct("10qd31q"), struct.Struct("q")


def unsupported(call: Call) -> list[str]:
    """Every reason why this engine cannot run `call`."""
    reasons = []
    if call.device_type != "cpu":
        reasons.append(f"x is on {call.device_type}, not on the CPU")
    h, e, d = call.layout[:3]
    if call.n_fields > MAX_FIELDS:
        reasons.append(f"{call.n_fields} fields, more than {MAX_FIELDS}")
    widest = max(e, d, call.layout.head_out)
    if widest > MAX_WIDTH:
        reasons.append(f"an embedding, head or output width of {widest}, more than {MAX_WIDTH}")
    if h > MAX_HEADS:
        reasons.append(f"{h} heads, more than {MAX_HEADS}")
    if call.inside is not None:
        reasons.append(f"it cannot run inside {call.inside}")
    if call.dtype not in DTYPES:
        reasons.append(f"x is {call.dtype}, not fp32, fp64, bf16 or fp16")
    elif not reasons:
        reasons += _no_build(call.dtype)
    return reasons


def prepare(call: Call) -> bool:
    """Compiles the build for the call's dtype where there is none yet; False where that failed."""
    return _has_build(call.dtype)


def _no_build(dtype: torch.dtype) -> list[str]:
    known = _general.get(dtype)
    if known is None:
        return native_build.reasons(_spec(dtype))
    return [known] if isinstance(known, str) else []


def _has_build(dtype: torch.dtype) -> bool:
    return not isinstance(_general_build(dtype), str)


# To torch.compile these are facts, not code to look into.
_no_build._dynamo_marked_constant = True  # type: ignore[attr-defined]
_has_build._dynamo_marked_constant = True  # type: ignore[attr-defined]


# --- builds -----------------------------------------------------------------------------------------------------------


class _Library:
    """A build, loaded."""

    def __init__(self, path: Path) -> None:
        library = native_build.load(path)
        self.lanes: int = library.autoint_lanes()
        self.forward = self._function(library, "autoint_forward")
        self.backward = self._function(library, "autoint_backward")
        self.fold = self._function(library, "autoint_fold")
        self.unfold = self._function(library, "autoint_unfold")
        self.profile = self._function(library, "autoint_profile")
        self.same = self._function(library, "autoint_same")
        self.same.restype = ctypes.c_int

    @staticmethod
    def _function(library: ctypes.CDLL, name: str) -> Any:
        function = getattr(library, name, None)
        if function is not None:
            function.argtypes, function.restype = [ctypes.c_char_p], None
        return function


def _spec(dtype: torch.dtype, n_fields: int | None = None, layout: Layout | None = None, profile: bool = False) -> Spec:
    isa = _isa(dtype)
    definitions = {"AUTOINT_T": DTYPES[dtype]}
    if n_fields is not None and layout is not None:
        definitions["AUTOINT_F"] = n_fields
        definitions |= dict(zip(LAYOUT_DEFINITIONS, layout, strict=True))
    if profile:
        definitions["AUTOINT_PROFILE"] = 1
    return Spec(isa, LANE_BYTES[isa], tuple(definitions.items()))


def _isa(dtype: torch.dtype) -> str:
    best, *others = native_build.isas()
    # To other dtypes it is of no use, and to old compilers unknown.
    wanted = best != "avx512bf16" or (dtype == torch.bfloat16 and native_build.takes(best))
    return best if wanted else others[0]


_lock = threading.RLock()
# By dtype, the build that serves every shape, or why there is none.
_general: dict[torch.dtype, _Library | str] = {}


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()


# In a child, a lock that another thread of the parent held would never be released.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def _general_build(dtype: torch.dtype) -> _Library | str:
    """The build that serves every shape, compiled at the first call, or why there is none."""
    known = _general.get(dtype)
    if known is None:
        with _lock:
            known = _general.get(dtype)
            if known is None:
                try:
                    known = _Library(native_build.build(_spec(dtype)))
                except (RuntimeError, OSError) as error:
                    known = f"it cannot be compiled: {error}"
                _general[dtype] = known
    return known


def _library(dtype: torch.dtype) -> _Library:
    library = _general_build(dtype)
    if isinstance(library, str):
        raise RuntimeError(f"backend='native': {library}")
    return library


class _Shape:
    """The build that serves a shape: the general one, until its own is there."""

    def __init__(self, n_fields: int, layout: Layout, dtype: torch.dtype) -> None:
        self.spec = _spec(dtype, n_fields, layout)
        self.argument = _SHAPE.pack(n_fields, *layout)
        self.operations = operations(layout, n_fields)
        self.out_size = layout.out_size
        self.taken = 0.0
        self.building: native_build.Building | None = None
        self.settled, self.library = False, _library(dtype)
        self.settle()

    def settle(self) -> None:
        """Takes the shape's own build, if it is there."""
        own = native_build.find(self.spec)
        if own is not None:
            self.settled, self.library = True, _Library(own)

    def forward(self, packed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """As `interact`."""
        batch, fields, _ = x.shape
        out = x.new_empty(batch, fields, self.out_size)
        if not (batch and fields):
            return out
        operations = batch * self.operations
        # One by one, as to build a tuple of what comes in tuples shows in the time of a call of one sample.
        sb, sf, se = x.stride()
        masked, mb, mq, mk = _mask_arguments(mask)
        threads, address = _threads(operations), _address(x)
        numbers = _FORWARD.pack(
            batch, threads, _parallel(), address, sb, sf, se, packed.data_ptr(), masked, mb, mq, mk, out.data_ptr()
        )
        self.library.forward(self.argument + numbers)
        if not self.settled:
            self.count(operations)
        return out

    def count(self, operations: float) -> None:
        """Notes work done; starts a build once there was enough of it, and takes it when it is there."""
        self.taken += operations
        if self.taken < OWN_BUILD_OPERATIONS or not _lock.acquire(blocking=False):
            return
        try:
            if self.building is None:
                self.building = native_build.start(self.spec)
            elif self.building.done():
                self.settled = True
                self.library = _Library(self.building.finish())
        except (RuntimeError, OSError) as error:
            self.settled = True
            warnings.warn(f"autoint_fast: this shape keeps the general build: {error}", stacklevel=2)
        finally:
            _lock.release()


_shapes: dict[tuple[int, Layout, torch.dtype], _Shape] = {}


def _shape(n_fields: int, layout: Layout, dtype: torch.dtype) -> _Shape:
    key = (n_fields, layout, dtype)
    shape = _shapes.get(key)
    if shape is None:
        with _lock:
            shape = _shapes.setdefault(key, _Shape(*key))
    return shape


def build(n_fields: int, layout: Layout, dtype: torch.dtype) -> list[Path]:
    """The builds that calls of a shape use: the general one of the dtype and the shape's own, compiled where missing.

    Fills the cache ahead, and settles which build the shape takes in this process. Raises RuntimeError where that
    cannot be compiled.
    """
    paths = [native_build.build(_spec(dtype)), native_build.build(_spec(dtype, n_fields, layout))]
    with _lock:
        shape = _shapes.get((n_fields, layout, dtype))
        if shape is not None:
            shape.settle()
    return paths


def forget() -> None:
    """Forgets every build that is loaded, as for another cache folder, compiler or instruction set."""
    with _lock:
        _general.clear()
        _shapes.clear()


# --- calls ------------------------------------------------------------------------------------------------------------


@functools.cache
def _parallel() -> int:
    """The address of GCC's entry into the OpenMP library that torch has loaded; 0: one thread must do."""
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(torch_library)).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def _threads(operations: float) -> int:
    if operations < THREAD_OPERATIONS:
        return 1
    return min(torch.get_num_threads(), 1 + int(operations / THREAD_OPERATIONS))


def _address(t: Tensor) -> int:
    """Of a tensor that is not empty; raises RuntimeError where its memory was given back."""
    address = t.data_ptr()
    if not address:
        raise RuntimeError(f"backend='native': a tensor of shape {tuple(t.shape)} has no memory: its storage is empty")
    return address


def _mask_arguments(mask: Tensor | None) -> tuple[int, int, int, int]:
    if mask is None:
        return 0, 0, 0, 0
    strides = (0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    return mask.data_ptr(), *strides


class _Comparison:
    def __init__(self, copy: InteractingParameters, given: InteractingParameters) -> None:
        # Its memory is what is compared with.
        self.kept = [t for t in copy if t is not None]
        stored = [row_by_row(t) for t in given if t is not None]
        self.possible = all(t.is_contiguous() and not t.is_neg() for t in stored)
        sizes = [t.numel() * t.element_size() for t in stored]
        numbers = [len(stored), self.kept[0].data_ptr(), *sizes, *map(Tensor.data_ptr, stored)]
        self.argument = struct.pack(f"{len(numbers)}q", *numbers)
        self.same = _library(copy.w_q.dtype).same

    def __call__(self) -> bool:
        return self.possible and bool(self.same(self.argument))


def comparison(copy: InteractingParameters, given: InteractingParameters) -> Callable[[], bool]:
    """As `torch_engine.comparison`, byte by byte."""
    return _Comparison(copy, given)


def _fold_arguments(p: InteractingParameters, layout: Layout, scale: float) -> tuple[Any, ...] | None:
    """What the library's folding takes; None where torch's must do."""
    w_q, b_q, w_k, _, w_v, b_v, w_o, b_o, w_r, b_r = p
    if w_q.shape[1] > LOOP_WIDTH:
        return None
    nothing = (0, 0)
    strides = [nothing if w is None else w.stride() for w in (w_q, w_k, w_v, w_o, w_r)]
    for b in (b_q, b_v, b_o, b_r):
        if b is not None and not b.is_contiguous():
            return None
    rows, e, o = w_q.shape[0], layout.emb_size, layout.out_size
    sizes = (rows * e, rows, rows * e, rows, rows * e, rows, o * rows, o, o * e, o)
    addresses = []
    for t, size in zip(p, sizes, strict=True):
        address = 0
        if t is not None:
            address = _address(t)
            # Of what was cut short since the forward, torch says what is wrong.
            if t.numel() != size or t.is_neg():
                return None
        addresses.append(address)
    return (1, *layout, rows // layout.n_head, scale, *addresses, *itertools.chain(*strides))


def folding(p: InteractingParameters, layout: Layout, scale: float) -> Callable[[], Tensor] | None:
    """As `torch_engine.folding`."""
    dtype = p.w_q.dtype
    arguments = _fold_arguments(p, layout, scale) if dtype in (torch.float32, torch.float64) else None
    if arguments is None:
        return None
    numel, argument, library = layout.numel, _FOLD.pack(*arguments), _library(dtype)

    def fold() -> Tensor:
        packed = torch.empty(numel, dtype=dtype, device="cpu")
        library.fold(argument + _ADDRESS.pack(packed.data_ptr()))
        return packed

    return fold


def fold(p: InteractingParameters, layout: Layout, scale: float) -> Tensor:
    """As `torch_engine.fold`."""
    prepared = folding(p, layout, scale)
    return torch_engine.fold(p, layout, scale) if prepared is None else prepared()


def fold_backward(
    grad: Tensor, p: InteractingParameters, layout: Layout, scale: float, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """As `torch_engine.fold_backward`."""
    arguments = _fold_arguments(p, layout, scale) if p.w_q.dtype == grad.dtype else None
    if arguments is None:
        return torch_engine.fold_backward(grad, p, layout, scale, wanted)
    grads = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and want else None
        for t, want in zip(p, wanted, strict=True)
    ]
    pointers = [0 if g is None else g.data_ptr() for g in grads]
    _library(grad.dtype).unfold(_UNFOLD.pack(*arguments, grad.data_ptr(), *pointers))
    return grads


def empty_relu_mask(x: Tensor, layout: Layout) -> Tensor | None:
    """As `torch_engine.empty_relu_mask`."""
    return None


def interacting(
    packed: Tensor, layout: Layout, n_fields: int, dtype: torch.dtype
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """As `torch_engine.interacting`."""
    return functools.partial(_shape(n_fields, layout, dtype).forward, packed)


def interact(x: Tensor, packed: Tensor, mask: Tensor | None, layout: Layout) -> Tensor:
    """As `torch_engine.interact`."""
    return _shape(x.shape[1], layout, x.dtype).forward(packed, x, mask)


def interact_backward(
    grad: Tensor, x: Tensor, packed: Tensor, out: Tensor | None, mask: Tensor | None, layout: Layout, needs: int
) -> tuple[Tensor | None, Tensor | None]:
    """As `torch_engine.interact_backward`; the same bits whatever the number of threads."""
    batch, fields, _ = x.shape
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs & NEED_INPUT else None
    if grad.numel() == 0:
        return d_x, torch.zeros_like(packed) if needs & NEED_WEIGHTS else None
    d_packed = torch.empty_like(packed) if needs & NEED_WEIGHTS else None
    out = None if out is None else out.contiguous()
    shape = _shape(fields, layout, x.dtype)
    operations = 4 * batch * shape.operations
    groups = -(-batch // shape.library.lanes)
    chunks = max(4, min(64, PARTIAL_BYTES // (layout.numel * packed.element_size())))
    shape.library.backward(
        shape.argument
        + _BACKWARD.pack(
            *(batch, _threads(operations), _parallel()),
            *(_address(x), *x.stride(), packed.data_ptr(), *_mask_arguments(mask)),
            *(
                0 if out is None else out.data_ptr(),
                grad.data_ptr(),
                *grad.stride(),
                0 if d_x is None else d_x.data_ptr(),
            ),
            *(0 if d_packed is None else d_packed.data_ptr(), needs, -(-groups // chunks)),
        )
    )
    if not shape.settled:
        shape.count(operations)
    return d_x, d_packed


def profile(n_fields: int, layout: Layout, dtype: torch.dtype, batch: int, mode: str) -> dict[str, float]:
    """Shares of one thread's time by phase: {"scores": 0.3, ...}, of "forward" or "forward+backward".

    Measured on random numbers with a build of its own, which reads the clock between the phases. Raises RuntimeError
    where that cannot be compiled.
    """
    library = _Library(native_build.build(_spec(dtype, profile=True)))
    e = layout.emb_size
    packed = torch.randn(layout.numel, dtype=folded_dtype(dtype)) / e
    x, out = torch.randn(batch, n_fields, e).to(dtype), torch.empty(batch, n_fields, layout.out_size, dtype=dtype)
    grad, d_x, d_packed = torch.randn_like(out), torch.empty_like(x), torch.empty_like(packed)
    shape = _SHAPE.pack(n_fields, *layout)
    first = (batch, 1, 0, x.data_ptr(), *x.stride(), packed.data_ptr(), 0, 0, 0, 0, out.data_ptr())
    last = (grad.data_ptr(), *grad.stride(), d_x.data_ptr(), d_packed.data_ptr(), NEED_INPUT | NEED_WEIGHTS, 1)
    ticks = (ctypes.c_uint64 * len(PHASES))()
    address = ctypes.cast(ctypes.pointer(ticks), ctypes.c_char_p)
    library.forward(shape + _FORWARD.pack(*first))
    library.profile(address)
    for _ in range(max(3, 4096 // max(batch, 1))):
        library.forward(shape + _FORWARD.pack(*first))
        if mode != "forward":
            library.backward(shape + _BACKWARD.pack(*first, *last))
    library.profile(address)
    return {phase: count / sum(ticks) for phase, count in zip(PHASES, ticks, strict=True)}
