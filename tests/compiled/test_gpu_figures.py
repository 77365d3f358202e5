"""The launches of everyday calls against the checked-in table, and that compiled code is followed as it would run.

`python -m benchmarks gpu --update` writes the table anew.
"""

from __future__ import annotations

import functools
import math
from collections import Counter

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import gpu_figures, sass
from benchmarks.cases import SHAPES, Shape
from benchmarks.chips import ARCHS
from benchmarks.gpu_figures import HELD, Held, Kernel, complaints, current, load
from benchmarks.launches import TF32, record
from benchmarks.offline import compile_launch, instructions, pipe
from tests.compiled.test_offline import Launch, _chain, meta

NVIDIA = list(ARCHS)


# --- the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", HELD, ids=str)
def test_no_launch_is_worse_than_the_table_says(held: Held) -> None:
    table = load()
    found = complaints(held, table, current(held))
    assert not found, "\n".join(found)
    if table["triton"] != triton.__version__:
        pytest.skip(f"spills and widths hold; instructions are those of Triton {table['triton']}, not compared")


# --- compiled code is followed as it would run --------------------------------------------------------------


@triton.jit
def _softmax(x, out, rows, N: tl.constexpr):
    """exp2 of rows; where one is large, its maximum is subtracted first."""
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        i = row * N + tl.arange(0, N)
        values = tl.load(x + i)
        # The kernel language has no conditional expression on what is loaded.
        if tl.sum(values * values) < 64.0:  # noqa: SIM108
            p = tl.exp2(values)
        else:
            p = tl.exp2(values - tl.max(values))
        tl.store(out + i, p / tl.sum(p))


@pytest.mark.parametrize("num_warps", [1, 2])
@pytest.mark.parametrize("arch", NVIDIA)
def test_trips_are_those_of_the_launch(arch: str, num_warps: int) -> None:
    """Counted by following the code, and by weighing its loops with the trips that the arguments make."""
    samples, heads, grid = 14, 3, 4
    x, w, out = meta(samples, 32, 16), meta(heads, 16, 16), meta(samples, 32, 16)
    options = {"PRECISION": "tf32", "num_warps": num_warps, "num_stages": 1}
    launch = Launch(_chain, (grid,), (x, w, out, samples, heads), options)
    binary = compile_launch(launch, arch)
    for program in range(grid):
        trips = len(range(program, samples, grid))
        trace = sass.follow(binary, launch, program)
        pipes = Counter[str]()
        for opcode, count in trace.issued.items():
            pipes[pipe(opcode)] += count
        weighed = instructions(binary, trips=[trips, heads], loop=binary.program)
        # The weights hold for every trip alike, though a program's first has no EXIT behind it.
        assert pipes["tensor"] == weighed["tensor"] == 8 * heads * trips
        assert pipes["global"] == weighed["global"]
        assert abs(trace.issued.total() - weighed.total()) <= 2 * num_warps
        assert trace.read[0] == trace.written[2] == trips * 32 * 16 * 4
        assert trace.read[1] == heads * 16 * 16 * 4
        assert not trace.branches and trace.unknown == 0


@pytest.mark.parametrize("arch", NVIDIA)
def test_ordinary_inputs_take_the_way_without_a_maximum(arch: str) -> None:
    launch = Launch(_softmax, (1,), (meta(2, 128), meta(2, 128), 2), {"N": 128, "num_warps": 1})
    binary = compile_launch(launch, arch)
    ways = sass.ordinary_arms(binary, launch)
    assert len(ways) == 2
    (_, ordinary), (_, exact) = ways
    assert sass.maxima(ordinary) == 0 < sass.maxima(exact)
    assert ordinary.issued.total() < exact.issued.total()
    assert ordinary.written == exact.written == {1: 2 * 128 * 4}


@functools.cache
def figures(shape: Shape, precision: str, arch: str) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in gpu_figures.kernels(shape, precision, arch, training=False)}


@pytest.mark.parametrize("arch", NVIDIA)
@pytest.mark.parametrize("name", ["criteo", "movielens"])
def test_a_forward_moves_x_once_and_out_once(name: str, arch: str) -> None:
    """Every byte that the code of a program touches, lane by lane, is one that it should."""
    shape = SHAPES[name]
    (forward,) = [kernel for kernel in figures(shape, "bf16", arch).values() if kernel.walks]
    size = shape.fields * shape.emb_size * 2
    assert (forward.read, forward.written, forward.unknown) == (size, size, 0)


def test_a_wide_forward_reads_x_from_memory_once() -> None:
    """Programs that share a sample ask for the same bytes; the second-level cache has them."""
    shape = SHAPES["wide"]
    (forward,) = [kernel for kernel in figures(shape, "bf16", "sm_90").values() if kernel.walks]
    size = shape.fields * shape.emb_size * 2
    assert (forward.read, forward.written) == (size, size)
    assert forward.asked >= forward.read + forward.written


def test_figures_do_not_hang_on_how_many_samples_were_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = figures(SHAPES["criteo"], "bf16", "sm_90")
    monkeypatch.setattr(gpu_figures, "MANY", 1 << 20)
    again = {k.name: k for k in gpu_figures.kernels(SHAPES["criteo"], "bf16", "sm_90", training=False)}
    assert {name: kernel.issued for name, kernel in again.items()} == {name: k.issued for name, k in whole.items()}


# --- the launches are the layer's ---------------------------------------------------------------------------


def test_recorded_launches() -> None:
    """Folding, the forward; then the backward, the sum of its partial results, the parameters' gradients."""
    made = record(SHAPES["criteo"], "bf16", 4096, "sm_90", 132)
    assert [entry.backward for entry in made] == [False, False, True, True, True]
    assert len(record(SHAPES["criteo"], "bf16", 4096, "sm_90", 132, training=False)) == 2
    x = made[1].launch.args[0]
    assert x.shape == (4096, 39, 16) and x.dtype == torch.bfloat16
    assert made[1].launch.grid == (math.prod(made[1].launch.grid),)
    few = record(SHAPES["criteo"], "bf16", 4096, "sm_90", 1)
    assert few[1].launch.grid[0] < made[1].launch.grid[0]


@pytest.mark.parametrize(("precision", "expected"), [("fp32", "fp16x2"), (TF32, "tf32"), ("bf16", "ieee")])
def test_torch_says_whether_tf32_is_allowed(precision: str, expected: str) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    (forward,) = [made.launch for made in record(SHAPES["criteo"], precision, 64, "sm_90", 132)[1:2]]
    assert forward.options["PRECISION"] == expected
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_what_the_engine_refuses_is_not_compiled() -> None:
    with pytest.raises(ValueError, match="custom 600x80x2: 600 fields, more than 512; an embedding size of 80"):
        record(Shape("custom", 600, 80, 2), "bf16", 64, "sm_90", 132)
