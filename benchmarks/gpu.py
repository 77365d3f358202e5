"""`python -m benchmarks gpu`: what the launches of a call cost on GPUs that need not be there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import triton
from rich import box
from rich.console import Console
from rich.table import Table

from autoint_fast.weights import operations as forward_operations

from . import chips, command, contestants, gpu_figures, launches, operations, timing, traffic
from .cases import FORWARD, MODES, TRAINING, Case, Shape, parse_shape
from .chips import CHIPS, LAUNCH_SECONDS, RESOURCES, Chip
from .command import at_least
from .contestants import CONTESTANTS
from .gpu_figures import Kernel
from .installed import Unable
from .launches import PRECISIONS, TF32
from .report import number, ratio
from .traffic import Counted

PICTURE = "gpu-roofline.png"
# Against whom traffic and launches are counted.
OTHERS = ("reference", "sdpa", "sdpa-fused", "deepctr")
BATCHES = (1, 512, 4096, 65_536)
OURS = "ours"
# The pipes that the table shows, as it calls them.
PIPES = {name: name for name in ("tensor", "fma", "alu", "mufu", "shared", "global")} | {"other": "control"}


@dataclass(frozen=True)
class Modelled:
    """A call on a chip by the model, in nanoseconds per sample of a large batch.

    busy: of each resource, summed over the launches. limit: the resource that the longest launch waits for. floor: what
    the bytes that cannot be avoided take. batches: microseconds of a call by batch size, launches included. What
    programs keep in memory of their own is taken to stay in the second-level cache.
    """

    chip: str
    precision: str
    mode: str
    launches: int
    ns: float
    limit: str
    floor_ns: float
    busy: dict[str, float]
    batches: dict[int, float]

    @property
    def of_floor(self) -> float:
        return self.ns / self.floor_ns


def modelled(
    found: Sequence[Kernel], chip: Chip, shape: Shape, precision: str, mode: str, batches: Sequence[int]
) -> Modelled:
    """`found`: the launches of a call, on the chip's architecture; those of a backward count when training."""
    taking_part = [kernel for kernel in found if mode == TRAINING or not kernel.backward]
    times = [chips.seconds(kernel.work, chip) for kernel in taking_part if kernel.walks]
    busy = {name: sum(time[name] for time in times) * 1e9 for name in RESOURCES}
    ns = sum(max(time.values()) for time in times) * 1e9
    longest = max(times, key=lambda time: max(time.values()))
    floor = gpu_figures.floor(shape, precision, backward=False)
    floor += gpu_figures.floor(shape, precision, backward=True) if mode == TRAINING else 0
    calls = {batch: len(taking_part) * LAUNCH_SECONDS * 1e6 + batch * ns / 1e3 for batch in batches}
    return Modelled(
        chip.name,
        precision,
        mode,
        len(taking_part),
        ns,
        chips.limiting(longest),
        floor / chip.bandwidth * 1e9,
        busy,
        calls,
    )


@dataclass(frozen=True)
class Moved:
    """What a call moves and computes, counted, per sample; launches and bytes_fixed per call.

    bytes_fixed: weights and their gradients and, of ours, what programs keep in memory of their own (on a full grid).
    """

    name: str
    precision: str
    mode: str
    launches: int
    bytes: float
    operations: float
    bytes_fixed: float


def ours_moved(found: Sequence[Kernel], shape: Shape, precision: str, mode: str) -> Moved:
    """Of the recorded launches; operations are those of the folded form, recomputation included."""
    taking_part = [kernel for kernel in found if mode == TRAINING or not kernel.backward]
    moved = sum(kernel.read + kernel.written for kernel in taking_part if kernel.walks)
    layout = Case(shape, 1, mode, 1).layout
    useful = forward_operations(layout, shape.fields)
    useful += operations.backward(shape.fields, layout) if mode == TRAINING else 0
    fixed = sum(kernel.workspace if kernel.walks else kernel.read + kernel.written for kernel in taking_part)
    return Moved(OURS, precision, mode, len(taking_part), moved, useful, fixed)


def others_moved(shape: Shape, precision: str, mode: str) -> tuple[list[Moved], dict[str, str]]:
    """Of the layers people have, and why some are not counted."""
    rows, missing = [], {}
    case = Case(shape, 1, mode, 1, "fp32" if precision == TF32 else precision)
    for name in OTHERS:
        try:
            counted: Counted = traffic.count(CONTESTANTS[name], case)
        except Unable as error:
            missing[name] = str(error)
            continue
        per_sample = counted.bytes, counted.operations
        rows.append(Moved(name, precision, mode, counted.launches, *per_sample, counted.bytes_fixed))
    return rows, missing


# --- with a GPU ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One call's microseconds: with x out of the second-level cache and with it there, beside the model's.

    modelled: None where no figures of this device are kept. clock: megahertz during the run, None if the driver does
    not tell.
    """

    device: str
    precision: str
    mode: str
    batch: int
    cold: float
    warm: float
    modelled: float | None
    clock: int | None

    @property
    def error(self) -> float | None:
        """By how much the cold call takes longer than modelled."""
        return None if self.modelled is None else self.cold / self.modelled - 1


def measure(
    shape: Shape, precision: str, batches: Sequence[int], models: Mapping[tuple[str, str, str], Modelled]
) -> list[Measured]:
    """On the current CUDA device. models: by chip, precision and mode.

    Other versions of a chip, with fewer multiprocessors, have no model; those with slower memory cannot be told.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    many = torch.cuda.get_device_properties(device).multi_processor_count
    words = name.replace(" ", "-").split("-")
    chip = next((known.name for known in CHIPS.values() if known.name in words and known.multiprocessors == many), "")
    # A buffer of one element flushes nothing: the call finds what the one before it left.
    clocks = timing.clock_for(str(device)), timing.CudaClock(torch.empty(1, device=device))
    rows = []
    for mode in MODES:
        for batch in batches:
            case = Case(shape, batch, mode, 1, "fp32" if precision == TF32 else precision, str(device))
            with launches.tf32(precision == TF32):
                step = contestants.set_up(CONTESTANTS["ours-triton"], case).step
                cold, warm = (
                    timing.quantiles(timing.race({OURS: step}, clock, seconds=0.5)[OURS]).p50 * 1e6 for clock in clocks
                )
            model = models.get((chip, precision, mode))
            known = model.batches.get(batch) if model else None
            rows.append(Measured(name, precision, mode, batch, cold, warm, known, _clock(device)))
    return rows


def _clock(device: torch.device) -> int | None:
    try:
        return torch.cuda.clock_rate(device)
    except (ImportError, RuntimeError, AttributeError):
        return None


# --- the command --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> int:
    """Reports what the arguments ask for; gives the exit status: 1 where a check finds something worse."""
    _add_arguments(parser)
    options = parser.parse_args(arguments)
    console, _ = command.consoles()
    if options.update:
        gpu_figures.update(options.table)
        console.print(str(options.table), style="dim", highlight=False, soft_wrap=True)
        return 0
    if options.check:
        return _check(options, parser, console)
    shape = parse_shape(f"{options.fields}x{options.emb_size}x{options.heads}")
    written: list[Path] = []
    try:
        # A forward that gradients are to follow is a kernel of its own, as it keeps what relu let pass.
        found, forwards = (
            {
                (precision, arch): gpu_figures.kernels(shape, precision, arch, training=training)
                for precision in dict.fromkeys(options.dtype)
                for arch in dict.fromkeys(options.arch)
            }
            for training in (True, False)
        )
        by_mode = {TRAINING: found, FORWARD: forwards}
    except ValueError as error:
        parser.error(str(error))
    models = [
        modelled(by_mode[mode][precision, chip.arch], chip, shape, precision, mode, options.batch)
        for precision in dict.fromkeys(options.dtype)
        for chip in CHIPS.values()
        if (precision, chip.arch) in found
        for mode in MODES
    ]
    moved, missing = [], {}
    for precision, arch in found:
        # Bytes hardly hang on the architecture; those of the last one asked for stand for all.
        if arch == options.arch[-1]:
            for mode in MODES:
                rows, why = others_moved(shape, precision, mode)
                moved += [ours_moved(by_mode[mode][precision, arch], shape, precision, mode), *rows]
                missing |= why
    measured: list[Measured] = []
    if torch.cuda.is_available():
        by_name = {(model.chip, model.precision, model.mode): model for model in models}
        for precision in dict.fromkeys(options.dtype):
            measured += measure(shape, precision, options.batch, by_name)
    _show(console, shape, found, forwards, models, moved, measured)
    for name, reason in missing.items():
        console.print(f"not counted: {name}: {reason}", highlight=False, markup=False)
    if not measured:
        console.print("not measured: torch sees no CUDA device", highlight=False)
    try:
        if options.plot and models:
            options.out.mkdir(parents=True, exist_ok=True)
            written.append(options.out / PICTURE)
            draw(shape, models, moved, written[-1])
        if options.json:
            options.json.write_text(json.dumps(_as_json(shape, by_mode, models, moved, measured), indent=1) + "\n")
            written.append(options.json)
    except OSError as error:
        parser.error(str(error))
    for path in written:
        console.print(str(path), style="dim", highlight=False, soft_wrap=True)
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is reported")
    for name, default in (("fields", 39), ("emb-size", 16), ("heads", 2)):
        what.add_argument(f"--{name}", type=at_least(1, int), default=default, metavar="N", help=f"default: {default}")
    what.add_argument(
        "--dtype",
        nargs="+",
        choices=PRECISIONS,
        default=["bf16", "fp32"],
        help="tf32: fp32 where torch may round matrix products to TF32 (default: bf16 fp32)",
    )
    what.add_argument("--arch", nargs="+", choices=tuple(chips.ARCHS), default=list(chips.ARCHS), help="default: all")
    what.add_argument(
        "--batch", nargs="+", type=at_least(1, int), default=list(BATCHES), metavar="B", help="whose time is modelled"
    )
    out = parser.add_argument_group("where the results go")
    out.add_argument("--json", type=Path, metavar="FILE", help="everything, for other programs")
    out.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="default: ./results")
    out.add_argument("--no-plot", dest="plot", action="store_false", help="leave out the picture")
    table = parser.add_argument_group("the table that CI holds kernels to").add_mutually_exclusive_group()
    table.add_argument("--check", action="store_true", help="compare with it, and exit with 1 where something is worse")
    table.add_argument("--update", action="store_true", help="write it anew")
    parser.add_argument("--table", type=Path, default=gpu_figures.TABLE, help=argparse.SUPPRESS)


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser, console: Console) -> int:
    try:
        table = gpu_figures.load(options.table)
    except ValueError as error:
        parser.error(str(error))
    found = [
        complaint
        for held in gpu_figures.HELD
        for complaint in gpu_figures.complaints(held, table, gpu_figures.current(held))
    ]
    for complaint in found:
        console.print(complaint, highlight=False, markup=False, style="red")
    if table["triton"] != triton.__version__:
        console.print(
            f"instructions not compared: the table is of Triton {table['triton']}, this is {triton.__version__}",
            highlight=False,
        )
    return 1 if found else 0


# --- tables -------------------------------------------------------------------------------------------------


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    # A title that is wider than its table would be broken.
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", min_width=len(title))
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _show(
    console: Console,
    shape: Shape,
    found: Mapping[tuple[str, str], Sequence[Kernel]],
    forwards: Mapping[tuple[str, str], Sequence[Kernel]],
    models: Sequence[Modelled],
    moved: Sequence[Moved],
    measured: Sequence[Measured],
) -> None:
    plain = {"highlight": False, "markup": False, "style": "dim"}
    for precision, group in groupby(found, key=lambda key: key[0]):
        archs = [arch for _, arch in group]
        kernels = [(arch, kernel) for arch in archs for kernel in found[precision, arch]]
        console.print(_resources_table(shape, precision, kernels))
        console.print(_instructions_table(shape, precision, kernels))
        for arch in archs:
            for k in forwards[precision, arch]:
                if k.walks and not k.backward:
                    least = f"{k.total:,.1f} warp-instructions where no gradients are to follow"
                    console.print(f"{arch} {k.name}: {least}", highlight=False, markup=False)
        for note in _notes(kernels):
            console.print(note, highlight=False, markup=False)
    for precision, rows in groupby(models, key=lambda row: row.precision):
        together = list(rows)
        console.print(_model_table(shape, precision, together))
        console.print(_calls_table(shape, precision, together))
    for chip in dict.fromkeys(row.chip for row in models):
        console.print(f"{chip}: as published, sources in benchmarks/chips.py: {CHIPS[chip].source}", **plain)
    for (precision, mode), group_ in groupby(moved, key=lambda row: (row.precision, row.mode)):
        console.print(_traffic_table(shape, precision, mode, list(group_)))
    if measured:
        console.print(_measured_table(shape, measured))


def _resources_table(shape: Shape, precision: str, kernels: Sequence[tuple[str, Kernel]]) -> Table:
    table = _table(
        f"counted: {shape}, {precision}: what a launch takes of a multiprocessor",
        ("arch", "kernel"),
        ("programs", "warps", "registers", "stack", "shared", "resident warps"),
    )
    table.add_column("limited by")
    for arch, rows in groupby(kernels, key=lambda row: row[0]):
        for place, (_, k) in enumerate(rows):
            table.add_row(
                "" if place else arch,
                k.name,
                f"{k.grid:,}",
                str(k.num_warps),
                str(k.registers),
                f"{k.stack:,}" if k.stack else "-",
                f"{k.shared:,}",
                str(k.resident_warps),
                k.limit,
                style="red" if k.stack else None,
            )
        table.add_section()
    return table


def _instructions_table(shape: Shape, precision: str, kernels: Sequence[tuple[str, Kernel]]) -> Table:
    table = _table(
        f"counted: {shape}, {precision}: warp-instructions and bytes per sample (* per launch)",
        ("arch", "kernel"),
        ("all", *PIPES.values(), "read", "written", "x floor", "bank conflicts"),
    )
    for arch, rows in groupby(kernels, key=lambda row: row[0]):
        for place, (_, k) in enumerate(rows):
            floor = gpu_figures.floor(shape, precision, backward=k.backward)
            table.add_row(
                "" if place else arch,
                k.name + ("" if k.walks else " *"),
                f"{k.total:,.0f}",
                *(f"{k.pipes[name]:,.0f}" for name in PIPES),
                f"{k.read:,.0f}",
                f"{k.written:,.0f}",
                ratio((k.read + k.written) / floor) if k.walks else "",
                f"{k.conflicts:,.0f} of {k.wavefronts:,.0f}",
            )
        table.add_section()
    return table


def _notes(kernels: Sequence[tuple[str, Kernel]]) -> Iterator[str]:
    """What the numbers of the table leave open."""
    for arch, k in kernels:
        if len(k.ways) > 1:
            which = f"counted is the way of ordinary inputs, the other takes {k.ways[1]:,.0f}"
            yield f"{arch} {k.name}: data decides; {which}"
        if k.loops:
            yield f"{arch} {k.name}: {k.loops} loops that data ends, counted with one trip each"
        if k.unknown:
            yield f"{arch} {k.name}: {k.unknown:,.1f} accesses at addresses from data, taken as without conflict"


def _model_table(shape: Shape, precision: str, rows: Sequence[Modelled]) -> Table:
    table = _table(
        f"modelled: {shape}, {precision}: nanoseconds per sample at best, and how long each resource is busy",
        ("chip", "mode"),
        ("ns",),
    )
    table.add_column("limited by")
    for name in ("x floor", *RESOURCES):
        table.add_column(name, justify="right", no_wrap=True)
    for chip, group in groupby(rows, key=lambda row: row.chip):
        for place, row in enumerate(group):
            table.add_row(
                "" if place else chip,
                row.mode,
                number(row.ns),
                row.limit,
                ratio(row.of_floor),
                *(number(row.busy[name]) for name in RESOURCES),
            )
        table.add_section()
    return table


def _calls_table(shape: Shape, precision: str, rows: Sequence[Modelled]) -> Table:
    table = _table(
        f"modelled: {shape}, {precision}: microseconds of a call",
        ("chip", "mode"),
        ("launches", *(f"B = {batch:,}" for batch in rows[0].batches)),
    )
    for chip, group in groupby(rows, key=lambda row: row.chip):
        for place, row in enumerate(group):
            times = (number(time) for time in row.batches.values())
            table.add_row("" if place else chip, row.mode, str(row.launches), *times)
        table.add_section()
    return table


def _traffic_table(shape: Shape, precision: str, mode: str, rows: Sequence[Moved]) -> Table:
    ours = rows[0]
    table = _table(
        f"counted: {shape}, {precision}, {mode}: traffic per sample",
        ("layer",),
        ("launches", "bytes", "x ours", "kFLOP", "FLOP per byte", "bytes per call"),
    )
    for row in rows:
        table.add_row(
            row.name,
            str(row.launches),
            f"{row.bytes:,.0f}",
            ratio(row.bytes / ours.bytes),
            f"{row.operations / 1e3:,.0f}",
            number(row.operations / row.bytes),
            f"{row.bytes_fixed:,.0f}",
            style="bold green" if row.name == OURS else None,
        )
    return table


def _measured_table(shape: Shape, rows: Sequence[Measured]) -> Table:
    table = _table(
        f"measured beside modelled: {shape}, {rows[0].device}, microseconds of a call",
        ("dtype", "mode"),
        ("B", "cold L2", "warm L2", "modelled", "error", "MHz"),
    )
    for row in rows:
        table.add_row(
            row.precision,
            row.mode,
            f"{row.batch:,}",
            number(row.cold),
            number(row.warm),
            number(row.modelled) or "-",
            f"{row.error:+.0%}" if row.error is not None else "-",
            str(row.clock or "-"),
        )
    return table


def _as_json(
    shape: Shape,
    by_mode: Mapping[str, Mapping[tuple[str, str], Sequence[Kernel]]],
    models: Sequence[Modelled],
    moved: Sequence[Moved],
    measured: Sequence[Measured],
) -> dict[str, Any]:
    return {
        "shape": shape._asdict(),
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "counted": [
            {"precision": precision, "mode": mode, **gpu_figures.as_json(kernel)}
            for mode, found in by_mode.items()
            for (precision, _), kernels in found.items()
            for kernel in kernels
        ],
        "modelled": [{**asdict(row), "of_floor": row.of_floor} for row in models],
        "traffic": [asdict(row) for row in moved],
        "measured": [{**asdict(row), "error": row.error} for row in measured],
    }


# --- the picture --------------------------------------------------------------------------------------------


def draw(shape: Shape, models: Sequence[Modelled], moved: Sequence[Moved], target: Path) -> None:
    """A roofline per chip: operations per byte against operations per second, ours as modelled, others at most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(model.chip for model in models))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    grid = {"squeeze": False, "sharex": True, "sharey": True, "layout": "constrained"}
    figure, axes = pyplot.subplots(rows, columns, figsize=(1.8 + 3.8 * columns, 0.8 + 3.7 * rows), **grid)
    for spare in axes.flat[len(names) :]:
        spare.set_axis_off()
    colour = {name: pyplot.get_cmap("Set1")(i) for i, name in enumerate((OURS, *OTHERS))}
    intensities = [row.operations / row.bytes for row in moved]
    low, high = min(intensities) / 3, max(intensities) * 12
    for panel, name in zip(axes.flat, names, strict=False):
        chip = CHIPS[name]
        steps = [low * (high / low) ** (i / 200) for i in range(201)]
        for label, peak, dashes in (
            ("tensor, 16 bits", chip.half * chip.mma, "-"),
            ("tensor, TF32", chip.tf32 * chip.mma, "--"),
            ("fp32", chips.ARCHS[chip.arch].fp32_lanes * 2 * chip.multiprocessors * chip.clock, ":"),
        ):
            roof = [min(chip.bandwidth * x, peak) / 1e12 for x in steps]
            panel.plot(steps, roof, dashes, color="0.35", linewidth=1.1, label=label)
        for row in moved:
            intensity = row.operations / row.bytes
            style = {"marker": "o" if row.mode == FORWARD else "s", "color": colour[row.name], "markersize": 7}
            if row.name != OURS:
                # No more than memory allows.
                panel.plot(intensity, chip.bandwidth * intensity / 1e12, **style, fillstyle="none", linestyle="")
                continue
            model = next(m for m in models if (m.chip, m.precision, m.mode) == (name, row.precision, row.mode))
            speed = row.operations / model.ns / 1e3
            panel.plot(intensity, speed, **style, linestyle="")
            above = 4 if row.mode == FORWARD else -10
            beside = {"fontsize": 7, "xytext": (5, above), "textcoords": "offset points"}
            panel.annotate(f"{row.precision}, {model.limit}", (intensity, speed), **beside)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlim(low, high)
        panel.set_title(f"{name}, {chip.bandwidth / 1e12:.3g} TB/s", fontsize=9)
        panel.grid(alpha=0.3, which="both", linewidth=0.4)
    figure.supxlabel("operations per byte of memory traffic", fontsize=9)
    figure.supylabel("TFLOP/s", fontsize=9)
    lines = {line.get_label(): line for line in axes[0][0].get_lines() if not str(line.get_label()).startswith("_")}
    present = [name for name in (OURS, *OTHERS) if any(row.name == name for row in moved)]
    marks = {
        name: pyplot.Line2D(
            [], [], color=colour[name], marker="o", linestyle="", fillstyle="full" if name == OURS else "none"
        )
        for name in present
    }
    marks |= {
        mode: pyplot.Line2D([], [], color="0.5", marker=marker, linestyle="")
        for mode, marker in ((FORWARD, "o"), (TRAINING, "s"))
    }
    legend = {**lines, **marks}
    figure.legend(legend.values(), legend.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(
        f"{shape}: traffic and operations counted, speed modelled\n"
        "filled: ours, at best; hollow: others, no more than memory allows",
        fontsize=10,
    )
    figure.savefig(target, dpi=130)
    pyplot.close(figure)
