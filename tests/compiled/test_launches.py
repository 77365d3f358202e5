"""The launches the layer really makes, compiled for GPUs that need not be there, and what their machine code says."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
from pathlib import Path

import pytest
import torch
import triton
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
    forward_programs,
    mask_arguments,
    projected_size,
    reduce_launch,
    scratch_size,
    unfold_launch,
)
from autoint_fast.weights import (
    BARE,
    CONCATENATED,
    MERGED,
    NEED_BIAS,
    NEED_INPUT,
    NEED_WEIGHTS,
    NO_RESIDUAL,
    PROJECTION,
    InteractingParameters,
    Layout,
)
from benchmarks import offline
from benchmarks.offline import SHARED_LIMIT, Binary, compile_launch
from tests.layouts import describe

# F, and the plain layer's E and H; or F and any layout.
Shape = tuple[int, int, int] | tuple[int, Layout]
CRITEO: Shape = (39, 16, 2)
NARROW = [CRITEO, (24, 16, 2), (13, 16, 2), (7, 16, 2), (64, 16, 2), (200, 16, 2)]
OTHERS = [
    # Cut into blocks like 24 and 200 fields.
    (22, 16, 2),
    (100, 16, 2),
    (300, 16, 2),
    (39, 10, 2),
    (200, 10, 2),
    (39, 40, 2),
    (39, 16, 1),
    (39, 16, 4),
    (64, 32, 4),
    (200, 64, 4),
]
# DeepCTR's, the paper's as it is folded and as it is wide, multi-head attention.
DEEPCTR = Layout(2, 16, 8, 16, 1, BARE, PROJECTION)
PAPER = Layout(2, 16, 16, 64, 0, CONCATENATED, PROJECTION)
WIDE = Layout(2, 64, 32, 64, 1, BARE, PROJECTION)
ATTENTION = Layout(2, 16, 8, 16, 1, MERGED, NO_RESIDUAL, 0)
PRECISIONS = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}
MMA = {"bf16": {"bf16"}, "fp16": {"f16"}}
BATCH = 4096


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def target_of(arch: str) -> Target:
    return Target("hip" if arch.startswith("gfx") else "cuda", 132)


def mask_of(kind: str, fields: int) -> Tensor | None:
    shapes = {"keys": (BATCH, 1, fields), "pairs": (BATCH, fields, fields)}
    return meta(*shapes[kind], dtype=torch.bool) if kind in shapes else None


def layout_of(shape: Shape) -> Layout:
    if isinstance(shape[1], Layout):
        return shape[1]
    _, emb_size, n_head = shape
    return Layout(n_head, emb_size, emb_size, emb_size)


def relu_mask_of(shape: Shape) -> Tensor:
    return triton_engine.empty_relu_mask(meta(BATCH, shape[0], 1), layout_of(shape))


def forward(
    shape: Shape, precision: str, arch: str, mask: str = "none", training: bool = True
) -> tuple[Launch, Config]:
    fields, layout, target = shape[0], layout_of(shape), target_of(arch)
    dtype, allow_tf32 = PRECISIONS[precision]
    x, hidden = meta(BATCH, fields, layout.emb_size, dtype=dtype), mask_of(mask, fields)
    out = meta(BATCH, fields, layout.out_size, dtype=dtype)
    dots = dot_precision(dtype, target, allow_tf32)
    config = forward_config(fields, layout, dots, mask_arguments(hidden, x)[0])
    programs = forward_programs(BATCH, fields, layout, config, target)
    projected = meta(programs, projected_size(fields, layout, config), dtype=dtype) if layout.factored else x
    relu_mask = relu_mask_of(shape) if training and layout.relu else None
    launch = forward_launch(x, meta(layout.numel), hidden, out, relu_mask, projected, layout, config, target)
    assert launch.grid == (programs,)
    return launch, config


def backward(shape: Shape, precision: str, arch: str, mask: str = "none", needs: int = -1) -> Launch:
    fields, layout, target = shape[0], layout_of(shape), target_of(arch)
    dtype, allow_tf32 = PRECISIONS[precision]
    x, hidden, packed = meta(BATCH, fields, layout.emb_size, dtype=dtype), mask_of(mask, fields), meta(layout.numel)
    out = meta(BATCH, fields, layout.out_size, dtype=dtype)
    dots = dot_precision(dtype, target, allow_tf32)
    config = backward_config(fields, layout, dots, mask_arguments(hidden, x)[0], dtype.itemsize == 2)
    programs = backward_programs(BATCH, fields, layout, config, target)
    partial, scratch = meta(programs, layout.numel), meta(programs, scratch_size(fields, layout, config))
    projected = meta(programs, projected_size(fields, layout, config), dtype=dtype) if layout.factored else x
    tensors = (out, x, packed, relu_mask_of(shape), hidden, x, partial, scratch, projected)
    return backward_launch(*tensors, layout, needs, config, target)


def launch_of(direction: str, shape: Shape, precision: str, arch: str, mask: str = "none") -> Launch:
    """direction: "forward" (as in training, which keeps relu's mask), "inference" or "backward"."""
    if direction != "backward":
        return forward(shape, precision, arch, mask, direction == "forward")[0]
    return backward(shape, precision, arch, mask)


@functools.cache
def compiled(direction: str, shape: Shape, precision: str, arch: str, mask: str = "none") -> Binary:
    return compile_launch(launch_of(direction, shape, precision, arch, mask), arch)


# Bytes of stack of the backward at Criteo's shape, on other architectures than sm_90 or with a mask: it takes every
# register there is, and here and there a few more.
SPILLED = {("backward", "fp32"): 8, ("backward", "bf16"): 8}
SPILLED_WITH_MASK = {("backward", "fp32", "keys"): 24, ("backward", "fp32", "pairs"): 16}


def assert_sound(binary: Binary, arch: str, precision: str, most_stack: int = 0) -> None:
    """Nothing (or no more) spilled, the intended multiplications and no others, and shared memory to spare."""
    assert binary.shared <= SHARED_LIMIT[arch]
    if not arch.startswith("sm_"):
        return
    scaled = binary.name == "forward_scaled"
    assert binary.stack <= most_stack, f"{binary.registers} registers and {binary.stack} bytes of stack"
    assert binary.families == {"mma.sync"}
    multiplied = {dtype for _, dtype in binary.mma}
    if precision not in MMA:
        # Of fp32 tensors the relu mask is added up in fp16, exactly. Resident kernels make fp16 operands of them, and
        # what is doubted of the forward is multiplied as TF32 once more.
        assert "f16" in multiplied if scaled else "tf32" in multiplied or binary.name == "backward_resident"
        assert multiplied <= {"f16", "tf32"}
    else:
        assert multiplied == MMA[precision]


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("shape", NARROW, ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_hopper(direction: str, shape: Shape, precision: str) -> None:
    assert_sound(compiled(direction, shape, precision, "sm_90"), "sm_90", precision)


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("shape", [CRITEO, (7, 16, 2), (200, 16, 2)], ids=str)
def test_inference(shape: Shape, precision: str) -> None:
    assert_sound(compiled("inference", shape, precision, "sm_90"), "sm_90", precision)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_half_precision(direction: str) -> None:
    assert_sound(compiled(direction, CRITEO, "fp16", "sm_90"), "sm_90", "fp16")


def lowered(launch: Launch, arch: str) -> Binary:
    """What `launch` compiles to for an architecture before sm_90, from what the compiler has made of blocks for sm_90:
    it makes the same of them, but for the name, and takes up to nine tenths of its time for that."""
    blocks = compile_launch(launch, "sm_90").asm["ttgir"].replace('"cuda:90"', f'"cuda:{arch.removeprefix("sm_")}"')
    options = {name: launch.options[name] for name in ("num_warps", "num_stages", "maxnreg") if name in launch.options}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "blocks.ttgir")
        file.write_text(blocks)
        return offline.read_binary(triton.compile(str(file), target=offline.target(arch), options=options), arch)


# Code for sm_86 and sm_89 differs from that for sm_80 in the last steps alone, so each direction and precision is
# compiled for one of them.
ARCHITECTURES = [
    *itertools.product(("sm_80", "sm_100", "gfx942"), ("forward", "backward"), ("bf16", "tf32", "fp32")),
    ("sm_86", "forward", "tf32"),
    ("sm_86", "backward", "bf16"),
    ("sm_86", "backward", "fp32"),
    ("sm_89", "forward", "bf16"),
    ("sm_89", "forward", "fp32"),
    ("sm_89", "backward", "tf32"),
]
QUICKLY_COMPARED = [("sm_80", "forward", "bf16"), ("sm_80", "backward", "tf32")]


@pytest.mark.parametrize(("arch", "direction", "precision"), ARCHITECTURES)
def test_other_architectures(arch: str, direction: str, precision: str) -> None:
    if arch.startswith("sm_8"):
        binary = lowered(launch_of(direction, CRITEO, precision, arch), arch)
    else:
        binary = compiled(direction, CRITEO, precision, arch)
    assert_sound(binary, arch, precision, SPILLED.get((direction, precision), 0))


@pytest.mark.parametrize(
    ("arch", "direction", "precision"),
    [
        pytest.param(*case, marks=() if case in QUICKLY_COMPARED else pytest.mark.slow)
        for case in ARCHITECTURES
        if case[0].startswith("sm_8")
    ],
)
def test_blocks_are_those_of_hopper(arch: str, direction: str, precision: str) -> None:
    """Compiled from the beginning, it is the same code. (Notes on lines name files, other ones where the compiler's
    cache holds what another folder's sources came to.)"""
    whole = compiled(direction, CRITEO, precision, arch)
    parts = lowered(launch_of(direction, CRITEO, precision, arch), arch)
    code, expected = (offline.binary_tool("cuobjdump", "--dump-sass", b.asm["cubin"]) for b in (parts, whole))
    assert code.count("HMMA") > 0 and code == expected


@pytest.mark.parametrize("mask", ["keys", "pairs"])
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_masks(direction: str, precision: str, mask: str) -> None:
    most_stack = SPILLED_WITH_MASK.get((direction, precision, mask), 0)
    assert_sound(compiled(direction, CRITEO, precision, "sm_90", mask), "sm_90", precision, most_stack)


# Bytes of stack at shapes that the checked-in table does not hold: wide rows have more addresses and operands than
# there are registers.
SPILLED_ELSEWHERE = {
    ("backward", (39, 16, 1), "fp32"): 72,
    ("backward", (39, 16, 4), "fp32"): 40,
    ("backward", (100, 16, 2), "tf32"): 8,
    ("backward", (39, 40, 2), "bf16"): 72,
    ("backward", (39, 40, 2), "tf32"): 104,
    ("forward", (39, 40, 2), "fp32"): 288,
    ("backward", (39, 40, 2), "fp32"): 672,
    ("backward", (64, 32, 4), "fp32"): 232,
    ("forward", (200, 64, 4), "bf16"): 72,
    ("backward", (200, 64, 4), "bf16"): 64,
    ("forward", (200, 64, 4), "tf32"): 136,
    ("backward", (200, 64, 4), "tf32"): 240,
}


def assert_loops_over_keys_do_not_spill(binary: Binary) -> None:
    innermost = [loop for loop in binary.loops if loop.depth == max(inner.depth for inner in binary.loops)]
    assert not any(i.pipe == "local" for loop in innermost for i in loop.instructions)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "precision"),
    # E = 64 in full fp32 takes minutes to compile.
    [case for case in itertools.product(OTHERS, ("bf16", "tf32", "fp32")) if case != ((200, 64, 4), "fp32")],
    ids=str,
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_other_shapes(direction: str, shape: Shape, precision: str) -> None:
    binary = compiled(direction, shape, precision, "sm_90")
    assert_sound(binary, "sm_90", precision, SPILLED_ELSEWHERE.get((direction, shape, precision), 0))
    if binary.name == "backward" and precision == "bf16":
        assert_loops_over_keys_do_not_spill(binary)


def test_long_unaligned_samples() -> None:
    """Their addresses leave no room for twice the keys."""
    assert_sound(compiled("backward", (200, 10, 2), "tf32", "sm_90"), "sm_90", "tf32")


@pytest.mark.parametrize(
    ("direction", "shape", "precision", "mask"),
    [
        ("forward", (39, DEEPCTR), "bf16", "none"),
        ("forward", (39, DEEPCTR), "tf32", "none"),
        ("forward", (39, DEEPCTR), "fp32", "keys"),
        ("forward", (7, DEEPCTR), "fp32", "none"),
        ("backward", (39, DEEPCTR), "bf16", "pairs"),
        ("backward", (39, DEEPCTR), "tf32", "none"),
        ("backward", (39, DEEPCTR), "fp32", "none"),
        ("backward", (7, DEEPCTR), "fp32", "none"),
        ("forward", (39, PAPER), "bf16", "pairs"),
        ("backward", (39, PAPER), "fp32", "none"),
        ("backward", (7, PAPER), "fp32", "none"),
        ("forward", (39, WIDE), "fp32", "none"),
        ("backward", (39, WIDE), "bf16", "none"),
        ("forward", (39, ATTENTION), "tf32", "none"),
        ("backward", (39, ATTENTION), "bf16", "none"),
        ("backward", (39, ATTENTION), "fp32", "none"),
    ],
    ids=lambda value: f"{value[0]}-{describe(value[1])}" if isinstance(value, tuple) else value,
)
def test_other_layouts(direction: str, shape: Shape, precision: str, mask: str) -> None:
    # Of what a row keeps of wide factored layouts, addresses are spilled.
    most_stack = 40 if (direction, shape[1], precision) == ("forward", WIDE, "fp32") else 0
    assert_sound(compiled(direction, shape, precision, "sm_90", mask), "sm_90", precision, most_stack)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["none", "keys", "pairs"])
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("layout", [DEEPCTR, PAPER, ATTENTION], ids=describe)
@pytest.mark.parametrize("fields", [7, 39, 100])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_all_of_other_layouts(direction: str, fields: int, layout: Layout, precision: str, mask: str) -> None:
    """Beside a mask the backward in full fp32 is short of up to eight registers, but not in a loop over keys."""
    most_stack = 32 if direction == "backward" and fields > 7 and mask != "none" and precision == "fp32" else 0
    binary = compiled(direction, (fields, layout), precision, "sm_90", mask)
    assert_sound(binary, "sm_90", precision, most_stack)
    if binary.name == "backward" and fields > 7:
        assert_loops_over_keys_do_not_spill(binary)


@pytest.mark.slow
def test_wide_factored_layouts_spill_addresses_only() -> None:
    """In full fp32 the backward of E = 64 keeps more addresses than there are registers; no loop over keys spills."""
    binary = compiled("backward", (39, WIDE), "fp32", "sm_90")
    assert_sound(binary, "sm_90", "fp32", most_stack=200)
    assert_loops_over_keys_do_not_spill(binary)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_loads_of_x_are_vectorised_where_aligned(direction: str, precision: str) -> None:
    """16 bytes at a time, through registers (LDG) or straight into shared memory (LDGSTS); in the forward four columns,
    which with three neighbours fill a row."""
    accesses = compiled(direction, CRITEO, precision, "sm_90").global_accesses
    widest = 64 if direction == "forward" and precision == "bf16" else 128
    assert any(name.startswith("LDG") and bits >= widest for name, bits in accesses)
    stores = {bits for name, bits in accesses if name.startswith("STG")}
    # Beside the words of the relu mask.
    assert stores - {16} == {widest} if direction == "forward" else max(stores) == widest


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
        # The sums over rows of db, and nothing else.
        assert sum(part.mma.values()) == 3


def parameters_of(layout: Layout, width: int) -> InteractingParameters:
    rows, e, o = layout.n_head * width, layout.emb_size, layout.out_size
    projections = (meta(rows, e), meta(rows), meta(rows, e), meta(rows), meta(rows, e), meta(rows))
    last = (meta(o, rows), meta(o)) if layout.output == MERGED else (None, None)
    return InteractingParameters(*projections, *last, meta(o, e), meta(o))


@pytest.mark.parametrize(
    ("shape", "width"),
    [(CRITEO, 16), ((39, 10, 3), 10), ((39, 64, 8), 64), ((39, PAPER), 32), ((39, WIDE), 32)],
    ids=str,
)
def test_small_launches(shape: Shape, width: int) -> None:
    """Folding, unfolding and the reduction: no spill, and no TF32, which would cost the weights their accuracy."""
    layout = layout_of(shape)
    p = parameters_of(layout, width)
    packed, partial = meta(layout.numel), meta(1000, layout.numel)
    launches = (
        fold_launch(p, packed, layout, 0.25),
        unfold_launch(packed, p, list(p), layout, 0.25),
        reduce_launch(partial, packed, layout, NEED_WEIGHTS),
    )
    for launch in launches:
        binary = compile_launch(launch, "sm_90")
        assert binary.stack == 0 and not binary.mma


def test_engine_refuses_what_kernels_do_not_take() -> None:
    assert triton_engine.INTERPRETED is False
