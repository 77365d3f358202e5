"""The launches the layer really makes, compiled for GPUs that need not be there, and what their machine code says."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from autoint_fast.kernels import triton_engine
from autoint_fast.kernels.triton_launch import (
    Config,
    Launch,
    Target,
    backward_config,
    backward_launch,
    backward_programs,
    dot_precision,
    fold_launch,
    forward_config,
    forward_launch,
    mask_arguments,
    reduce_launch,
    unfold_launch,
)
from autoint_fast.reference import InteractingParameters, ReferenceInteractingLayer
from autoint_fast.weights import NEED_BIAS, NEED_INPUT, NEED_WEIGHTS, Layout
from benchmarks.offline import SHARED_LIMIT, Binary, compile_launch, instructions

CRITEO = (39, 16, 2)
NARROW = [
    CRITEO,
    (24, 16, 2),
    (22, 16, 2),
    (13, 16, 2),
    (7, 16, 2),
    (64, 16, 2),
    (100, 16, 2),
    (200, 16, 2),
    (300, 16, 2),
]
OTHERS = [
    (39, 10, 2),
    (39, 40, 2),
    (39, 16, 1),
    (39, 16, 4),
    (64, 32, 4),
    (100, 64, 8),
    (200, 64, 4),
    (300, 64, 8),
]
PRECISIONS = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}
MMA = {"bf16": {"bf16"}, "fp16": {"f16"}, "tf32": {"tf32"}, "fp32": {"tf32"}}
BATCH = 4096


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def target_of(arch: str) -> Target:
    return Target("hip" if arch.startswith("gfx") else "cuda", 132)


def mask_of(kind: str, fields: int) -> Tensor | None:
    shapes = {"keys": (BATCH, 1, fields), "pairs": (BATCH, fields, fields)}
    return meta(*shapes[kind], dtype=torch.bool) if kind in shapes else None


def forward(shape: tuple[int, int, int], precision: str, arch: str, mask: str = "none") -> tuple[Launch, Config]:
    fields, emb_size, n_head = shape
    dtype, allow_tf32 = PRECISIONS[precision]
    layout, target = Layout(n_head, emb_size, emb_size, emb_size), target_of(arch)
    x, hidden = meta(BATCH, fields, emb_size, dtype=dtype), mask_of(mask, fields)
    dots = dot_precision(dtype, target, allow_tf32)
    config = forward_config(fields, layout, dots, mask_arguments(hidden, x)[0])
    launch = forward_launch(x, meta(layout.numel), hidden, torch.empty_like(x), layout, config, target)
    return launch, config


def backward(shape: tuple[int, int, int], precision: str, arch: str, mask: str = "none", needs: int = -1) -> Launch:
    fields, emb_size, n_head = shape
    dtype, allow_tf32 = PRECISIONS[precision]
    layout, target = Layout(n_head, emb_size, emb_size, emb_size), target_of(arch)
    x, hidden, packed = meta(BATCH, fields, emb_size, dtype=dtype), mask_of(mask, fields), meta(layout.numel)
    config = backward_config(fields, dot_precision(dtype, target, allow_tf32))
    programs = backward_programs(BATCH, layout, config, target)
    partial, scratch = meta(programs, layout.numel), meta(programs, max(fields, 16), emb_size)
    return backward_launch(x, x, packed, x, hidden, x, partial, scratch, layout, needs, config, target)


@functools.cache
def compiled(direction: str, shape: tuple[int, int, int], precision: str, arch: str, mask: str = "none") -> Binary:
    if direction == "forward":
        return compile_launch(forward(shape, precision, arch, mask)[0], arch)
    return compile_launch(backward(shape, precision, arch, mask), arch)


def assert_sound(binary: Binary, arch: str, precision: str) -> None:
    """Nothing spilled, the intended multiplications and no others, and shared memory to spare."""
    assert binary.shared <= SHARED_LIMIT[arch]
    if not arch.startswith("sm_"):
        return
    assert binary.stack == 0, f"{binary.registers} registers and {binary.stack} bytes of stack"
    assert binary.families == {"mma.sync"}
    assert {dtype for _, dtype in binary.mma} == MMA[precision]


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("shape", NARROW, ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_hopper(direction: str, shape: tuple[int, int, int], precision: str) -> None:
    assert_sound(compiled(direction, shape, precision, "sm_90"), "sm_90", precision)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_half_precision(direction: str) -> None:
    assert_sound(compiled(direction, CRITEO, "fp16", "sm_90"), "sm_90", "fp16")


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_100", "gfx942"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_other_architectures(direction: str, arch: str, precision: str) -> None:
    assert_sound(compiled(direction, CRITEO, precision, arch), arch, precision)


@pytest.mark.parametrize("mask", ["keys", "pairs"])
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_masks(direction: str, precision: str, mask: str) -> None:
    assert_sound(compiled(direction, CRITEO, precision, "sm_90", mask), "sm_90", precision)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("shape", OTHERS, ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_other_shapes(direction: str, shape: tuple[int, int, int], precision: str) -> None:
    assert_sound(compiled(direction, shape, precision, "sm_90"), "sm_90", precision)


@pytest.mark.parametrize(("precision", "most"), [("bf16", 1300), ("tf32", 2200)])
def test_warp_instructions_per_sample(precision: str, most: int) -> None:
    launch, config = forward(CRITEO, precision, "sm_90")
    binary = compile_launch(launch, "sm_90")
    row_blocks = [] if config.unroll else [3]
    assert 500 < instructions(binary, row_blocks).total() <= most


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_loads_of_x_are_vectorised_where_aligned(direction: str, precision: str) -> None:
    """16 bytes at a time, through registers (LDG) or straight into shared memory (LDGSTS)."""
    accesses = compiled(direction, CRITEO, precision, "sm_90").global_accesses
    assert any(name.startswith("LDG") and bits == 128 for name, bits in accesses)
    widest_store = max(bits for name, bits in accesses if name.startswith("STG"))
    assert widest_store == 128


def test_unaligned_loads_are_not_assumed_aligned() -> None:
    launch, _ = forward(CRITEO, "bf16", "sm_90")
    x = torch.empty(BATCH * 39 * 16 + 1, dtype=torch.bfloat16)[1:].view(BATCH, 39, 16)
    shifted = dataclasses.replace(launch, args=(x, *launch.args[1:]))
    accesses = compile_launch(shifted, "sm_90").global_accesses
    assert all(bits <= 32 for (name, bits) in accesses if name == "LDGSTS")
    assert ("LDG", 16) in accesses


@pytest.mark.parametrize("needs", [NEED_INPUT, NEED_WEIGHTS, NEED_BIAS])
def test_gradients_not_needed_cost_nothing(needs: int) -> None:
    """Each part leaves the machine code when nobody wants it."""
    part = compile_launch(backward(CRITEO, "bf16", "sm_90", needs=needs), "sm_90")
    everything = compiled("backward", CRITEO, "bf16", "sm_90")
    assert part.stack == 0
    assert len(part.program.instructions) < len(everything.program.instructions)
    if needs == NEED_BIAS:
        assert not part.mma


@pytest.mark.parametrize("shape", [CRITEO, (39, 10, 3), (39, 64, 8)], ids=str)
def test_small_launches(shape: tuple[int, int, int]) -> None:
    """Folding, unfolding and the reduction: no spill, and no TF32, which would cost the weights their accuracy."""
    _, emb_size, n_head = shape
    layout = Layout(n_head, emb_size, emb_size, emb_size)
    layer = ReferenceInteractingLayer(n_head, emb_size, device="meta")
    p = InteractingParameters(*(t.detach() for t in layer.interacting_parameters()))
    packed, partial = meta(layout.numel), meta(1000, layout.numel)
    launches = (
        fold_launch(p, packed, layout),
        unfold_launch(packed, p, list(p), layout),
        reduce_launch(partial, packed, layout, NEED_WEIGHTS),
    )
    for launch in launches:
        binary = compile_launch(launch, "sm_90")
        assert binary.stack == 0 and not binary.mma


def test_engine_refuses_what_kernels_do_not_take() -> None:
    assert triton_engine.INTERPRETED is False
