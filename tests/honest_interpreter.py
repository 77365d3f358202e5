"""Make Triton's interpreter honest: bf16 is computed right or not at all, and TF32 dots show their error.

Out of the box it keeps bf16 as raw 16-bit integers: casts truncate, and arithmetic and `tl.dot` use the bits.
It also ignores `input_precision`. After `install()`:

- casts to bf16 round to nearest even, as the GPU does;
- `tl.dot` multiplies bf16 and fp16 operands in fp32 and accumulates there; fp64 stays fp64;
- a dot of fp32 operands with `input_precision="tf32"` first cuts them off after 10 mantissa bits, as the tensor
  core does (Triton hands it the raw bits); "ieee" and "tf32x3" multiply them as they are;
- any other bf16 arithmetic raises; loads, stores, `where` and changes of shape only move the bits, and work.

It is also many times as fast: out of the box, every call of a device function patches the whole of the kernel
language, which takes longer than most such functions do, and all arithmetic of integers is done once more in 64 bits,
whose result nobody looks at. Here each module is patched once per launch, and overflow is looked for where a test asks
for it (`overflow_checks`).

All of it patches private classes, so `install()` first checks that they are as in Triton 3.3 to 3.9.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# The builder's operations that only move bits (fabs clears the sign: right for bf16 too), and those that
# `install` replaces.
_MOVES = (
    "load store masked_load masked_store tensor_pointer_load tensor_pointer_store atomic_load atomic_store "
    "descriptor_load descriptor_store descriptor_gather descriptor_scatter bitcast select reshape trans "
    "expand_dims broadcast cat join split splat unsplat gather fabs"
)
_REPLACED = "si_to_fp ui_to_fp fp_to_si fp_to_ui fp_ext fp_trunc fp_to_fp dot"
_WORKS = {f"create_{operation}" for operation in f"{_MOVES} {_REPLACED}".split()}


def install() -> None:
    """Patch the interpreter, once. Raises RuntimeError where it is not the interpreter this module knows."""
    if getattr(InterpreterBuilder, "_honest", False):
        return
    if reasons := _surprises():
        raise RuntimeError(f"Triton {triton.__version__} has another interpreter: {'; '.join(reasons)}")
    for name, method in inspect.getmembers(InterpreterBuilder, inspect.isfunction):
        if name.startswith("create_") and name not in _WORKS:
            setattr(InterpreterBuilder, name, _refuse_bf16(method, name.removeprefix("create_")))
    checked = interpreter.ReduceScanOpInterface.check_tensor
    interpreter.ReduceScanOpInterface.check_tensor = _refuse_bf16(checked, "reduction or scan")
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_fp_to_fp = _honest_fp_to_fp(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.get_bf16 = lambda self, value: _cast(self, self.get_fp32(value), tl.bfloat16)
    InterpreterBuilder.create_dot = _honest_dot(InterpreterBuilder.create_dot)
    interpreter._patch_lang = _once_per_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = _once_per_dtype(interpreter._get_np_dtype)
    builder = interpreter.interpreter_builder
    # Without `debug`, what is found is not reported.
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    InterpreterBuilder._honest = True


@contextlib.contextmanager
def overflow_checks() -> Iterator[None]:
    """Inside, an interpreted kernel whose int32 arithmetic overflows raises "int32 overflow detected".

    Masks do not matter, so a masked-out launch with huge strides tests addresses without the memory.
    """
    builder = interpreter.interpreter_builder
    before = builder.options
    builder.options = dataclasses.replace(before, debug=True, sanitize_overflow=True)
    try:
        yield
    finally:
        builder.options = before


def _surprises() -> list[str]:
    """What differs from the interpreter this module was written for."""
    expected = {
        "cast_impl": ["self", "src", "dst_type"],
        "create_fp_to_fp": ["self", "src", "dst_type", "rounding_mode"],
        "create_dot": ["self", "a", "b", "d", "input_precision", "max_num_imprecise_acc"],
    }
    found = []
    for name, parameters in expected.items():
        method = getattr(InterpreterBuilder, name, None)
        if method is None or list(inspect.signature(method).parameters) != parameters:
            found.append(f"{name} does not take {parameters}")
    if interpreter._get_np_dtype(tl.bfloat16) != np.uint16:
        found.append("bf16 is not kept as uint16")
    if not hasattr(getattr(interpreter, "ReduceScanOpInterface", None), "check_tensor"):
        found.append("reductions have no check_tensor")
    if not hasattr(interpreter._ir.INPUT_PRECISION, "TF32"):
        found.append("there is no INPUT_PRECISION.TF32")
    if list(inspect.signature(getattr(interpreter, "_patch_lang", len)).parameters) != ["fn"]:
        found.append("_patch_lang does not take ['fn']")
    return found


def _once_per_launch(patch_lang: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`patch_lang`, but doing nothing for a function whose module's names for the language are patched already."""
    patched: set[int] = set()

    @functools.wraps(patch_lang)
    def patch(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return None
        scope = patch_lang(fn)
        if hasattr(scope, "restore"):
            restore = scope.restore

            def restore_all() -> None:
                patched.clear()
                restore()

            scope.restore = restore_all
        patched.add(id(fn.__globals__))
        return scope

    return patch


def _once_per_dtype(get_np_dtype: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """`get_np_dtype`, which makes a table of all dtypes at every call, but remembering those of numbers."""
    of_numbers = functools.cache(get_np_dtype)

    @functools.wraps(get_np_dtype)
    def remembered(dtype: Any) -> np.dtype:
        return of_numbers(dtype.scalar) if type(dtype.scalar) is tl.dtype else get_np_dtype(dtype)

    return remembered


def _is_bf16(value: object) -> bool:
    """Whether `value`, an argument of a builder's or a reduction's method, holds bf16 numbers."""
    if isinstance(value, (tuple, list)):
        return any(_is_bf16(item) for item in value)
    return isinstance(value, (TensorHandle, tl.tensor)) and value.dtype.scalar == tl.bfloat16


def _refuse_bf16(method: Callable[..., Any], operation: str) -> Callable[..., Any]:
    """`method`, but raising for bf16 arguments, on whose raw bits it would compute."""

    @functools.wraps(method)
    def refusing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(_is_bf16(value) for value in (*args, *kwargs.values())):
            raise TypeError(f"{operation} of bfloat16 would compute on raw bits here: cast to float32 first")
        return method(self, *args, **kwargs)

    return refusing


def _widen(handle: TensorHandle) -> np.ndarray:
    """The numbers of a handle, bf16 as fp32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _narrow(data: np.ndarray) -> np.ndarray:
    """The raw bits of `data` rounded to bf16, to nearest even."""
    single = torch.from_numpy(np.array(data, dtype=np.float32))  # a copy: from_numpy wants it writable
    return single.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def _cut_to_tf32(data: np.ndarray) -> np.ndarray:
    """fp32 numbers without the last 13 of their 23 mantissa bits."""
    cut = data.view(np.uint32) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(data), cut.view(np.float32), data)


def _cast(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    """A numeric cast between any two dtypes but the 8-bit floats; to and from bf16 it goes through fp32."""
    dst = dst_type.scalar
    if src.dtype.scalar == dst:
        return TensorHandle(src.data, dst)
    with np.errstate(all="ignore"):  # what is too large becomes infinite, without a warning, on a GPU too
        data = _widen(src)
        data = _narrow(data) if dst == tl.bfloat16 else data.astype(interpreter._get_np_dtype(dst))
    return TensorHandle(data, dst)


def _honest_fp_to_fp(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def create_fp_to_fp(
        self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype, rounding_mode: Any
    ) -> TensorHandle:
        dtypes = (src.dtype.scalar, dst_type.scalar)
        rounds = rounding_mode != interpreter._ir.ROUNDING_MODE.RTZ  # truncation is right as it is
        if rounds and tl.bfloat16 in dtypes and not any(dtype.is_fp8() for dtype in dtypes):
            return _cast(self, src, dst_type)
        return original(self, src, dst_type, rounding_mode)

    return create_fp_to_fp


def _honest_dot(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def create_dot(
        self: InterpreterBuilder,
        a: TensorHandle,
        b: TensorHandle,
        d: TensorHandle,
        input_precision: Any,
        max_num_imprecise_acc: int,
    ) -> TensorHandle:
        if a.dtype.scalar not in (tl.float16, tl.bfloat16, tl.float32):
            return original(self, a, b, d, input_precision, max_num_imprecise_acc)
        left, right = _widen(a).astype(np.float32), _widen(b).astype(np.float32)
        if a.dtype.scalar == tl.float32 and input_precision == interpreter._ir.INPUT_PRECISION.TF32:
            left, right = _cut_to_tf32(left), _cut_to_tf32(right)
        return TensorHandle((np.matmul(left, right) + d.data).astype(d.data.dtype), d.dtype.scalar)

    return create_dot
