"""The static figures of compiled launches, on kernels small enough to know what they must be.

A process that interprets kernels (TRITON_INTERPRET=1) cannot compile them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from benchmarks import offline
from benchmarks.offline import Binary, compile_launch, instructions, offline_driver, target

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
NVIDIA = [arch for arch in offline.ARCHS if arch.startswith("sm_")]


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


@triton.jit
def _chain(x, w, out, samples, heads, PRECISION: tl.constexpr):
    """Per sample, one product of [32, 16] with a [16, 16] matrix for each head."""
    rows, columns = tl.arange(0, 32)[:, None], tl.arange(0, 16)[None, :]
    for sample in tl.range(tl.program_id(0), samples, tl.num_programs(0)):
        tile = tl.load(x + sample * 512 + rows * 16 + columns)
        acc = tl.zeros((32, 16), tl.float32)
        for head in tl.range(heads):
            weight = tl.load(w + head * 256 + tl.arange(0, 16)[:, None] * 16 + columns)
            acc = tl.dot(tile, weight, acc, input_precision=PRECISION)
        tl.store(out + sample * 512 + rows * 16 + columns, acc)


@triton.jit
def _copy(x, out, stride, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i * stride))


@triton.jit
def _outer(x, out, N: tl.constexpr):
    """Holds an [N, N] tile and its reflection at once."""
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tile = tl.load(x + i * N + j)
    tl.debug_barrier()
    tl.store(out + i * N + j, tl.exp2(tile) * tl.sum(tile, 0)[None, :] + tl.sum(tile, 1)[:, None])


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def chain(
    num_warps: int = 1, dtype: torch.dtype = torch.float32, precision: str = "tf32", samples: int = 1000
) -> Launch:
    x, w, out = meta(samples, 32, 16, dtype=dtype), meta(3, 16, 16, dtype=dtype), meta(samples, 32, 16)
    # One stage: pipelining would copy some of the loads out of the loop.
    options = {"PRECISION": precision, "num_warps": num_warps, "num_stages": 1}
    return Launch(_chain, (4,), (x, w, out, samples, 3), options)


def copy(x: Tensor, stride: int = 1) -> Launch:
    return Launch(_copy, (1,), (x, meta(128), stride), {"N": 128, "num_warps": 1})


def outer(n: int = 64, **options: int) -> Launch:
    return Launch(_outer, (1,), (meta(n, n), meta(n, n)), {"N": n, "num_warps": 1, **options})


@pytest.mark.parametrize("arch", NVIDIA)
@pytest.mark.parametrize("num_warps", [1, 2])
def test_loops_and_their_dots(arch: str, num_warps: int) -> None:
    binary = compile_launch(chain(num_warps), arch)
    assert [loop.depth for loop in binary.loops] == [1, 2]
    samples, heads = binary.loops
    assert heads.parent is samples and samples.parent is binary.program
    assert samples.header <= heads.header < heads.instructions[-1].address < samples.instructions[-1].address

    # [32, 16] x [16, 16] is 2 x 2 x 2 products of 16 x 8 x 8, whichever warp has them.
    assert binary.mma == Counter({("mma.sync", "tf32"): 8 // num_warps})
    assert instructions(binary, loop=heads)["tensor"] == 8
    assert instructions(binary, trips=[3])["tensor"] == 24
    assert instructions(binary, trips=[10, 3], loop=binary.program)["tensor"] == 240

    once, twice = (instructions(binary, trips=[trips]).total() for trips in (1, 2))
    assert once == len(samples.instructions) * num_warps
    assert twice - once == len(heads.instructions) * num_warps
    stores = instructions(binary, trips=[3], key=lambda instruction: instruction.name)["STG"]
    assert stores == 32 * 16 * 4 / 16 / 32


@pytest.mark.parametrize("arch", NVIDIA)
def test_only_code_that_runs_is_counted(arch: str) -> None:
    """The code ends with a branch to itself and padding, which nothing reaches."""
    binary = compile_launch(chain(), arch)
    trap = int(re.findall(r"/\*(\w+)\*/ +BRA `\(\S+\);\s+/\*\w+\*/ +NOP;", binary.sass)[-1], 16)
    assert binary.program.instructions[-1].address == trap - 16
    assert sum(loop.depth == 1 for loop in binary.loops) == 1


def test_figures_of_a_kernel_that_fits() -> None:
    for arch in NVIDIA:
        binary = compile_launch(chain(), arch)
        assert (binary.arch, binary.name, binary.num_warps) == (arch, "_chain", 1)
        assert 16 <= binary.registers <= 255
        assert binary.stack == binary.spilled == 0
        assert 0 < binary.shared <= offline.SHARED_LIMIT[arch]
        assert instructions(binary, trips=[1, 1], loop=binary.program)["local"] == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_spills_are_seen(arch: str) -> None:
    tight, free = compile_launch(outer(maxnreg=32), arch), compile_launch(outer(), arch)
    assert tight.registers <= 32 and tight.stack > 0 and tight.spilled == tight.stack // 4
    assert instructions(tight, loop=tight.program)["local"] > 0
    assert free.spilled == 0 and instructions(free, loop=free.program)["local"] == 0


@pytest.mark.parametrize("arch", NVIDIA)
def test_vector_width_follows_the_pointers(arch: str) -> None:
    buffer = torch.empty(256)
    start = -buffer.data_ptr() // 4 % 4  # the first element on a 16-byte boundary
    aligned, misaligned = buffer[start : start + 128], buffer[start + 1 : start + 129]
    for x, bits in ((meta(128), 128), (aligned, 128), (misaligned, 32)):
        accesses = compile_launch(copy(x), arch).global_accesses
        assert accesses == Counter({("LDG", bits): 128 // bits, ("STG", 128): 1})


def test_integers_are_specialised_as_in_a_launch() -> None:
    assert compile_launch(copy(meta(256), stride=2), "sm_90").global_accesses["LDG", 128] == 0
    assert compile_launch(copy(meta(256), stride=1), "sm_90").global_accesses["LDG", 128] == 1


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [
        (torch.float32, "tf32", {("mma.sync", "tf32")}),
        (torch.float32, "ieee", set()),
        (torch.bfloat16, "ieee", {("mma.sync", "bf16")}),
        (torch.float16, "ieee", {("mma.sync", "f16")}),
    ],
)
def test_kind_of_the_dots(dtype: torch.dtype, precision: str, expected: set[tuple[str, str]]) -> None:
    for arch in ("sm_80", "sm_100"):
        binary = compile_launch(chain(dtype=dtype, precision=precision), arch)
        assert set(binary.mma) == expected
        assert binary.families == {family for family, _ in expected}
        assert (instructions(binary, trips=[3])["tensor"] > 0) == bool(expected)


def test_kinds_of_newer_dots_in_ptx() -> None:
    ptx = """
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, p, 1, 1, 0, 0;
        @%p1 tcgen05.mma.cta_group::1.kind::tf32 [ %r1 + 0 ], %rd1, %rd2, %r3, %p2;
        mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%fd1}, {%fd2}, {%fd3}, {%fd4};
        mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1}, {%r2}, {%r3}, {%r4};
    """
    binary = synthetic(ptx=ptx)
    expected = [("wgmma", "bf16"), ("tcgen05", "tf32"), ("mma.sync", "f64"), ("mma.sync", "s8")]
    assert binary.mma == Counter(expected)
    assert binary.families == {"mma.sync", "wgmma", "tcgen05"}


@pytest.mark.skipif(TRITON < (3, 5), reason="before 3.5 Triton asks for ROCm's linker")
def test_amd() -> None:
    binary = compile_launch(chain(precision="ieee"), "gfx942")
    assert 16 <= binary.registers <= 512
    assert (binary.stack, binary.spilled) == (0, 0)
    assert set(binary.mma) == {("v_mfma", "f32")}
    assert "s_endpgm" in binary.amdgcn
    with pytest.raises(ValueError, match="no ptx"):
        _ = binary.ptx
    half = compile_launch(chain(dtype=torch.bfloat16, precision="ieee"), "gfx942")
    assert {dtype for _, dtype in half.mma} == {"bf16"}


@pytest.fixture
def sentinel(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Stands for a real driver that is active before an offline compilation."""
    real = SimpleNamespace()
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", real)
    yield real


def test_the_driver_is_restored(sentinel: object) -> None:
    compile_launch(chain(), "sm_80")
    assert driver.active is sentinel
    with pytest.raises(KeyError), offline_driver("sm_90"):
        assert driver.active.get_current_target() == target("sm_90")
        with offline_driver("sm_80"):
            assert driver.active.get_current_target() == target("sm_80")
        assert driver.active.get_current_target() == target("sm_90")
        raise KeyError
    assert driver.active is sentinel


def test_a_launch_is_compiled_once_per_architecture() -> None:
    binary = compile_launch(chain(samples=1000), "sm_80")
    assert compile_launch(chain(samples=1008), "sm_80") is not compile_launch(chain(samples=1001), "sm_80")
    assert compile_launch(chain(samples=1000), "sm_80") is binary
    assert compile_launch(chain(samples=1000), "sm_90") is not binary


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="expected a name such as sm_80"):
        target("h100")
    binary = compile_launch(chain(), "sm_80")
    with pytest.raises(ValueError, match=r"one for each inner loop \(at 0x.*: depth 2, .*\), got \[\]"):
        instructions(binary)
    with pytest.raises(ValueError, match="there is no loop"):
        instructions(compile_launch(copy(meta(128)), "sm_80"))
    interpreted = SimpleNamespace(warmup=lambda *args, **options: None)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_launch(Launch(interpreted, (1,), (), {}), "sm_80")


def synthetic(sass: str = "", ptx: str = "") -> Binary:
    """A binary of this code; the instructions get their addresses from the numbers of their lines."""
    binary = Binary("sm_90", "k", 1, 32, 0, 0, 0, {"ptx": ptx})
    lines = [line.strip() for line in sass.strip().splitlines()]
    code = [line if line.endswith(":") else f"/*{n:04x}*/ {line} ;" for n, line in enumerate(lines)]
    vars(binary)["sass"] = "\n".join(["", ".text.k:", *code, "//-------- .text.other --------", ""])
    return binary


def test_control_flow() -> None:
    """Two loops; the first has a block that may be skipped, a cold copy for diverged warps, a loop inside."""
    binary = synthetic("""
        S2R R0, SR_TID.X
        .L_outer:
        FFMA R1, R1, R1, R1
        @P0 BRA `(.L_skip)
        MUFU.EX2 R1, R1
        CALL.REL.NOINC `($k$division)
        .L_skip:
        BRA.DIV UR4, `(.L_cold)
        SHFL.IDX PT, R1, R1, RZ, 0x1f
        .L_warm:
        HMMA.1688.F32.TF32 R4, R4, R8, R4
        .L_inner:
        @!P1 LDG.E.64.CONSTANT R2, [R2.64]
        BRA.U UP0, `(.L_inner)
        @P2 EXIT
        @P3 BRA `(.L_outer)
        .L_second:
        STG.E.U16 [R2.64], R1
        @P4 BRA `(.L_second)
        @P5 CALL.REL.NOINC `(.L_end)
        BRA `(.L_outer2)
        .L_end:
        EXIT
        .L_outer2:
        EXIT
        .L_cold:
        WARPSYNC.COLLECTIVE R3, `(.L_cold)
        BRA `(.L_warm)
        $k$division:
        MUFU.RCP R1, R1
        RET.REL.NODEC R6 `(k)
        .L_trap:
        BRA `(.L_trap)
        NOP
    """)
    assert [loop.depth for loop in binary.loops] == [1, 2, 1]
    outer, inner, second = binary.loops
    assert inner.within(outer) and not inner.within(second) and outer.within(binary.program)
    assert [instruction.name for instruction in inner.instructions] == ["LDG", "BRA"]
    assert instructions(binary, trips=[5]) == Counter(
        {"fma": 1, "mufu": 1, "shared": 1, "tensor": 1, "global": 5, "other": 1 + 1 + 1 + 5 + 1 + 1}
    )
    assert instructions(binary, loop=second) == Counter({"global": 1, "other": 1})
    assert binary.global_accesses == Counter({("LDG", 64): 1, ("STG", 16): 1})
    assert [i.guard for i in inner.instructions] == ["!P1", ""]
    assert instructions(binary, trips=[1, 1, 1], loop=binary.program, key=lambda i: i.name)["EXIT"] == 3


def test_loops_that_cannot_be_read_raise() -> None:
    two_entries = """
        @P0 BRA `(.L_middle)
        .L_top:
        FADD R0, R0, R0
        .L_middle:
        FADD R1, R1, R1
        @P1 BRA `(.L_top)
        EXIT
    """
    with pytest.raises(ValueError, match="second entry"):
        _ = synthetic(two_entries).loops
    with pytest.raises(ValueError, match="target is computed"):
        _ = synthetic("BRX R2 -0x10\nEXIT").loops
