"""The static figures of the launches that a call makes, and the table of them that CI holds kernels to."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from autoint_fast.kernels.triton_launch import Launch

from . import chips, sass
from .cases import Shape, parse_shape
from .chips import Work
from .launches import Recorded, record, torch_dtype
from .offline import PIPES, Binary, compile_launch, pipe
from .sass import Trace

# More samples than any grid takes in one go.
MANY = 1 << 22


@dataclass(frozen=True)
class Kernel:
    """The figures of one launch on one architecture.

    They are per sample for a launch that walks over the samples (`walks`), else per launch.

    grid: programs where there are samples enough. resident_warps, limit: as in `chips.occupancy`. issued:
    warp-instructions by opcode, on the path that ordinary inputs take. ways: their total on that path, and, where data
    decides, on the one that takes the other arm everywhere. loops: on the ordinary path, those that data ends, of which
    each trip was taken to be the last. per_program: what a program issues before and after its samples.

    read, written: bytes of the tensors that have a row per sample, each byte once. asked: the same program by program,
    what several programs read counted for each; the second-level cache is taken to keep it from the first to the last.
    workspace: bytes of all other tensors, read or written, per launch of the full grid. wavefronts, conflicts, sectors,
    unknown: as in `sass.Trace`. load_bits, store_bits: the widest access per thread.
    """

    name: str
    backward: bool
    arch: str
    walks: bool
    grid: int
    num_warps: int
    registers: int
    stack: int
    shared: int
    resident_warps: int
    limit: str
    issued: dict[str, float]
    ways: list[float]
    loops: int
    per_program: float
    read: float
    written: float
    asked: float
    workspace: int
    wavefronts: float
    conflicts: float
    sectors: float
    unknown: float
    load_bits: int
    store_bits: int

    @property
    def total(self) -> float:
        """Warp-instructions."""
        return sum(self.issued.values())

    @property
    def pipes(self) -> dict[str, float]:
        """Warp-instructions by pipe, one of `offline.PIPES`."""
        counts = dict.fromkeys(PIPES, 0.0)
        for opcode, count in self.issued.items():
            counts[pipe(opcode)] += count
        return counts

    @property
    def work(self) -> Work:
        """What the model is told."""
        return Work(self.issued, self.read + self.written, self.wavefronts, self.sectors)


def floor(shape: Shape, precision: str, *, backward: bool) -> float:
    """Bytes per sample that cannot be avoided: x once in and out once; backward x, the gradients of both, and a bit per
    output that tells what relu did."""
    tile = shape.fields * shape.emb_size
    item = torch_dtype(precision).itemsize
    return 3 * tile * item + tile / 8 if backward else 2 * tile * item


def kernels(
    shape: Shape, precision: str, arch: str, multiprocessors: int | None = None, *, training: bool = True
) -> list[Kernel]:
    """The figures of each launch that a call makes, in order."""
    many = multiprocessors or chips.ARCHS[arch].multiprocessors
    recorded: dict[int, list[Recorded]] = {}

    def launches(batch: int) -> list[Recorded]:
        if batch not in recorded:
            recorded[batch] = record(shape, precision, batch, arch, many, training=training)
        return recorded[batch]

    return [_figures(launches, place, shape, many) for place in range(len(launches(MANY)))]


def _figures(launches: Callable[[int], list[Recorded]], place: int, shape: Shape, multiprocessors: int) -> Kernel:
    many = launches(MANY)[place]
    arch, grid = many.arch, math.prod(many.launch.grid)
    walks = _facts(many.launch) != _facts(launches(2 * MANY)[place].launch)
    binary = compile_launch(many.launch, arch)
    if walks:
        scale, step, ways, fixed, workspace = _per_sample(launches, place, shape, binary)
    else:
        scale, workspace, fixed = 1.0, 0, 0.0
        step, ways = _whole(binary, many.launch, grid)

    def once(counts: Counter[int]) -> float:
        """No tensor has more different bytes than it has."""
        whole = {i: many.launch.args[i].nbytes / MANY for i in counts} if walks else {}
        return sum(min(count / scale, whole.get(i, math.inf)) for i, count in counts.items())

    widths = binary.global_accesses
    occupied = chips.occupancy(arch, binary.registers, binary.shared, binary.num_warps, -(-grid // multiprocessors))
    return Kernel(
        name=many.name,
        backward=many.backward,
        arch=arch,
        walks=walks,
        grid=grid,
        num_warps=binary.num_warps,
        registers=binary.registers,
        stack=binary.stack,
        shared=binary.shared,
        resident_warps=occupied.warps,
        limit=occupied.limit,
        issued={opcode: count / scale for opcode, count in sorted(step.issued.items())},
        ways=[total / scale for total in ways],
        loops=len(step.loops),
        per_program=fixed,
        read=once(step.read),
        written=once(step.written),
        asked=(step.read.total() + step.written.total()) / scale,
        workspace=workspace,
        wavefronts=step.wavefronts / scale,
        conflicts=step.conflicts / scale,
        sectors=step.sectors / scale,
        unknown=step.unknown / scale,
        load_bits=max((bits for (name, bits) in widths if name.startswith("LD")), default=0),
        store_bits=max((bits for (name, bits) in widths if name.startswith("ST")), default=0),
    )


def _facts(launch: Launch) -> tuple[Any, ...]:
    """What a launch does with the number of samples."""
    return launch.grid, *(tuple(arg.shape) if isinstance(arg, torch.Tensor) else arg for arg in launch.args)


def _per_sample(
    launches: Callable[[int], list[Recorded]], place: int, shape: Shape, binary: Binary
) -> tuple[float, Trace, list[float], float, int]:
    """What a program does beyond its first samples: how many samples that is, what it does, its warp-instructions on
    each way through; then what it issues before and after, and the bytes that have no row per sample."""
    grid = math.prod(launches(MANY)[place].launch.grid)
    # Short samples share tiles, and a program may take several at a time. A batch that 16 divides is specialised like
    # those of everyday use.
    turns = 16 if shape.fields <= 8 else 4 if shape.fields <= 64 else 1
    batch = math.lcm(turns * grid, 16)
    less, more = (launches(size)[place].launch for size in (batch, 2 * batch))
    for launch in (less, more):
        if launch.grid != (grid,) or compile_launch(launch, binary.arch) is not binary:
            raise RuntimeError(f"{binary.name}: another launch for {batch:,} samples than for {MANY:,}")
    ways = sass.ordinary_arms(binary, less)
    steps = [sass.follow(binary, more, arms=arms) - trace for arms, trace in ways]
    first, step = ways[0][1], steps[0]
    batched = [i for i, arg in enumerate(less.args) if _has_rows(arg, batch)]
    workspace = 0
    for counts, taken in ((first.read, step.read), (first.written, step.written)):
        for argument in counts.keys() - batched:
            # The first of several arguments that share memory stands for all.
            workspace += counts[argument] * (grid if _has_rows(less.args[argument], grid) else 1)
        for argument in taken.keys() - batched:
            del taken[argument]
    fixed = first.issued.total() - step.issued.total()
    return batch / grid, step, [step.issued.total() for step in steps], fixed, workspace


def _has_rows(arg: Any, batch: int) -> bool:
    return isinstance(arg, torch.Tensor) and arg.dim() > 1 and arg.shape[0] == batch


def _whole(binary: Binary, launch: Launch, grid: int) -> tuple[Trace, list[float]]:
    """What all programs of a launch do together, and its warp-instructions on each way through."""
    ways = sass.ordinary_arms(binary, launch)
    total = Trace()
    for program in range(grid):
        total += sass.follow(binary, launch, program, ways[0][0])
    return total, [total.issued.total(), *(grid * trace.issued.total() for _, trace in ways[1:])]


# --- the table ----------------------------------------------------------------------------------------------

TABLE = Path(__file__).with_name("gpu_figures.json")
# How many more instructions per sample pass.
TOLERANCE = 0.03


class Held(NamedTuple):
    """A call whose launches CI holds to the table."""

    shape: str
    precision: str
    arch: str
    training: bool

    def __str__(self) -> str:
        mode = "training" if self.training else "forward"
        return f"{parse_shape(self.shape)}, {self.precision}, {self.arch}, {mode}"


HELD = (
    Held("criteo", "bf16", "sm_90", True),
    Held("criteo", "bf16", "sm_90", False),
    Held("criteo", "tf32", "sm_90", True),
    Held("criteo", "fp32", "sm_90", True),
    Held("movielens", "bf16", "sm_90", True),
    Held("wide", "bf16", "sm_90", True),
    Held("wide", "bf16", "sm_90", False),
    Held("criteo", "bf16", "sm_80", False),
    Held("criteo", "bf16", "sm_100", False),
)


def summary(kernel: Kernel) -> dict[str, Any]:
    """What the table keeps of a kernel; accesses: to global memory."""
    figures = {name: getattr(kernel, name) for name in ("registers", "stack", "shared", "load_bits", "store_bits")}
    figures["instructions"] = round(kernel.total, 2)
    figures["accesses"] = round(kernel.pipes["global"], 2)
    figures["bytes"] = round(kernel.read + kernel.written, 2)
    return figures


def current(held: Held) -> dict[str, dict[str, Any]]:
    """The figures of a held call as they are now, by kernel."""
    found = kernels(parse_shape(held.shape), held.precision, held.arch, training=held.training)
    return {kernel.name: summary(kernel) for kernel in found}


def update(path: Path = TABLE) -> None:
    """Writes the table anew."""
    rows = {str(held): current(held) for held in HELD}
    path.write_text(json.dumps({"triton": triton.__version__, "launches": rows}, indent=1) + "\n")


def load(path: Path = TABLE) -> dict[str, Any]:
    """The table. Raises ValueError for a file that is none."""
    try:
        table = json.loads(path.read_text())
        table["triton"], table["launches"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a table of figures: {error!r}") from None
    return table  # type: ignore[no-any-return]


def complaints(held: Held, table: Mapping[str, Any], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What has become worse than the table says.

    More spills and narrower loads or stores always count; instructions only under the Triton that the table was made
    with.
    """
    before = table["launches"].get(str(held))
    if before is None:
        return [f"{held}: not in the table"]
    found = []
    if sorted(before) != sorted(now):
        found.append(f"launches {', '.join(now)}, in the table {', '.join(before)}")
    for name, figures in now.items():
        spilled = before[name]["stack"] if name in before else 0
        if figures["stack"] > spilled:
            found.append(f"{name}: {figures['stack']} bytes of stack: registers are spilled; in the table {spilled}")
        if name not in before:
            continue
        for what in ("load", "store"):
            wide, wider = figures[f"{what}_bits"], before[name][f"{what}_bits"]
            if wide < wider:
                found.append(f"{name}: the widest {what} is of {wide} bits per thread, in the table {wider}")
        if table["triton"] != triton.__version__:
            continue
        for what in ("instructions", "accesses", "bytes"):
            new, old = figures[what], before[name][what]
            if new > old * (1 + TOLERANCE):
                more = f": {new / old - 1:+.1%}" if old else ""
                found.append(f"{name}: {new:,} {what}, in the table {old:,}{more}")
    return [f"{held}: {complaint}" for complaint in found]


def as_json(kernel: Kernel) -> dict[str, Any]:
    """Everything about a kernel."""
    return {**asdict(kernel), "instructions": kernel.total, "pipes": kernel.pipes}
