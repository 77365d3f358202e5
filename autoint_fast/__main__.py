"""`python -m autoint_fast`: what is installed, what devices there are, and which engine runs what on them; `build`
compiles for the native engine ahead of use; the other commands go from a click log to a trained model."""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, NoReturn

import einops
import torch

from . import dispatch
from .commands import add_commands
from .version import __version__
from .weights import Layout

# Calls that show what an engine can do: fields, embedding size, heads, each in every dtype below.
SHAPES = MappingProxyType({"MovieLens": (7, 16, 2), "Criteo": (39, 16, 2), "wide": (200, 64, 8)})
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The same by the names that the command line knows them by.
DTYPE_NAMES = MappingProxyType(dict(zip(("fp32", "bf16", "fp16", "fp64"), DTYPES, strict=True)))


class Typical(NamedTuple):
    """One call: a name in SHAPES and one of DTYPES."""

    shape: str
    dtype: torch.dtype


class Device(NamedTuple):
    """A device that torch could run the layer on."""

    type: str
    name: str
    description: str


TYPICAL = tuple(Typical(shape, dtype) for shape in SHAPES for dtype in DTYPES)


def one_line(error: Exception) -> str:
    """What an exception says, without its line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def triton_version() -> str:
    """Triton's version, or why it is of no use."""
    try:
        version: str = importlib.import_module("triton").__version__
    except Exception as error:  # A broken install raises whatever it likes.
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        return "not installed" if missing else f"cannot be imported: {one_line(error)}"
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    return f"{version}, interpreting (TRITON_INTERPRET=1)" if interpreting else version


def versions() -> dict[str, str]:
    """Versions by package, in the order in which they are shown."""
    return {
        "autoint_fast": f"{__version__} ({Path(__file__).parent})",
        "python": f"{platform.python_version()} ({platform.platform()})",
        "torch": torch.__version__,
        "triton": triton_version(),
        "einops": einops.__version__,
    }


def cpu_name() -> str:
    """The processor's name, as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def devices() -> list[Device]:
    """The CPU, then every CUDA, ROCm and XPU device that torch finds."""
    threads = torch.get_num_threads()
    vectors = torch.backends.cpu.get_cpu_capability()
    found = [Device("cpu", "cpu", f"{cpu_name()}, {vectors}, {threads} thread{'s' if threads > 1 else ''}")]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            level = (
                f"ROCm {torch.version.hip}, {device.gcnArchName}"
                if torch.version.hip
                else f"CUDA {torch.version.cuda}, compute capability {device.major}.{device.minor}"
            )
            memory = f"{device.total_memory / 2**30:.0f} GiB"
            found.append(Device("cuda", f"cuda:{i}", f"{device.name}, {level}, {memory}"))
    if torch.xpu.is_available():
        for i in range(torch.xpu.device_count()):
            xpu = torch.xpu.get_device_properties(i)
            found.append(Device("xpu", f"xpu:{i}", f"{xpu.name}, {xpu.total_memory / 2**30:.0f} GiB"))
    return found


def why_no_gpu() -> str:
    """Why torch lists no device but the CPU."""
    kinds = {
        "CUDA": torch.version.cuda,
        "ROCm": torch.version.hip,
        "XPU": getattr(torch.version, "xpu", None),
    }
    built = " and ".join(f"{kind} {version}" for kind, version in kinds.items() if version)
    if not built:
        return "none: this build of torch is for the CPU only"
    return f"none: this build of torch is for {built} and finds no device that it can use"


def describe(calls: Sequence[Typical]) -> str:
    """Typical calls in words: names of shapes and dtypes, a part left out where it is all of them."""
    dtypes_of: dict[str, tuple[torch.dtype, ...]] = {}
    for shape, dtype in calls:
        dtypes_of[shape] = (*dtypes_of.get(shape, ()), dtype)
    shapes_with: dict[tuple[torch.dtype, ...], list[str]] = {}
    for shape, dtypes in dtypes_of.items():
        shapes_with.setdefault(dtypes, []).append(shape)
    parts = []
    for dtypes, shapes in shapes_with.items():
        names = ", ".join(shapes) if len(shapes) < len(SHAPES) else ""
        kinds = ", ".join(str(d).removeprefix("torch.") for d in dtypes) if len(dtypes) < len(DTYPES) else ""
        parts.append(" in ".join(part for part in (names, kinds) if part) or "every call")
    return "; ".join(parts)


def grouped(said: Mapping[Typical, str]) -> dict[str, list[Typical]]:
    """The typical calls by what was said of them."""
    calls: dict[str, list[Typical]] = {}
    for typical, words in said.items():
        calls.setdefault(words, []).append(typical)
    return calls


def engine_lines(device_type: str) -> Iterator[str]:
    """What "auto" takes on a kind of device, and per engine what it could run and why not the rest."""
    whys = {}
    for typical in TYPICAL:
        fields, emb_size, n_head = SHAPES[typical.shape]
        layout = Layout(n_head, emb_size, emb_size, emb_size)
        call = dispatch.Call(device_type, typical.dtype, fields, layout, inside=None)
        whys[typical] = dispatch.explain("auto", call)
    for choice, calls in grouped({typical: why.choice for typical, why in whys.items()}).items():
        yield f"  {'auto':<13}takes {choice} for {describe(calls)}"
    for engine in (*dispatch.ENGINES, "reference"):
        verdicts = grouped({typical: "; ".join(why.reasons[engine]) for typical, why in whys.items()})
        for reasons, calls in sorted(verdicts.items(), key=lambda verdict: verdict[0] != ""):
            if not reasons:
                verdict = f"runs {describe(calls)}"
            elif len(calls) == len(TYPICAL):
                verdict = f"runs nothing: {reasons}"
            else:
                verdict = f"does not run {describe(calls)}: {reasons}"
            yield f"  {engine:<13}{verdict}"


def report_lines() -> Iterator[str]:
    """The whole report."""
    yield "versions"
    for package, version in versions().items():
        yield f"  {package:<13}{version}"
    yield "devices"
    found = devices()
    for device in found:
        yield f"  {device.name:<13}{device.description}"
    kinds = list(dict.fromkeys(device.type for device in found))
    if kinds == ["cpu"]:
        yield f"  {'gpu':<13}{why_no_gpu()}"
    shapes = ", ".join(f"{name} (F={f}, E={e}, H={h})" for name, (f, e, h) in SHAPES.items())
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    yield f"typical calls: {shapes}, each in {dtypes}"
    for kind in kinds:
        yield f"engines on {kind}"
        yield from engine_lines(kind)


def show_info(arguments: argparse.Namespace) -> int:
    """The command `info`."""
    print("\n".join(report_lines()))
    return 0


def build_ahead(arguments: argparse.Namespace) -> int:
    """The command `build`."""
    # The report shall do without it.
    from .kernels.native_engine import build

    for fields, emb_size, heads, dtype in itertools.product(
        arguments.fields, arguments.emb_size, arguments.heads, arguments.dtype
    ):
        shape = f"{fields}x{emb_size}x{heads} in {dtype}"
        start = time.perf_counter()
        try:
            paths = build(fields, Layout(heads, emb_size, emb_size, emb_size), DTYPE_NAMES[dtype])
        # A folder that others can write is a PermissionError, a shape that it does not run a ValueError.
        except (RuntimeError, OSError, ValueError) as error:
            print(f"{shape}: {error}", file=sys.stderr)
            return 1
        print(f"{shape}: {time.perf_counter() - start:.1f} s", *paths, sep="\n  ", flush=True)
    return 0


def positive(word: str) -> int:
    """A whole number above zero; raises ArgumentTypeError for anything else."""
    if not (word.isascii() and word.isdigit() and int(word)):
        raise argparse.ArgumentTypeError(f"expected a whole number above zero, got {word!r}")
    return int(word)


class Parser(argparse.ArgumentParser):
    """One that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line; each command sets `run`, a function from its arguments to the exit status."""
    parser = Parser("python -m autoint_fast", description="AutoInt's interacting layer, fused.")
    parser.add_argument("--version", action="version", version=f"autoint_fast {__version__}")
    parser.set_defaults(run=show_info)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    summary = "versions, devices, and what each engine could run here (the default)"
    commands.add_parser("info", help=summary, description=f"Shows {summary}.")
    summary = "compiles the native engine's code for shapes ahead of their use, as into a container image"
    build = commands.add_parser(
        "build",
        help=summary,
        description=f"It {summary}: every combination of what is given. AUTOINT_FAST_CACHE names the folder.",
    )
    build.add_argument("--fields", type=positive, nargs="+", required=True, metavar="F", help="numbers of fields")
    build.add_argument("--emb-size", type=positive, nargs="+", required=True, metavar="E", help="embedding sizes")
    build.add_argument("--heads", type=positive, nargs="+", required=True, metavar="H", help="numbers of heads")
    build.add_argument("--dtype", choices=DTYPE_NAMES, nargs="+", default=["fp32"], help="of the input (fp32)")
    build.set_defaults(run=build_ahead)
    add_commands(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line, without the program's name; gives the exit status, 2 for bad arguments."""
    parsed = build_parser().parse_args(arguments)
    try:
        status = int(parsed.run(parsed))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, `head` perhaps, has seen enough; the flush at exit shall not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
