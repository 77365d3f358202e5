"""`python -m autoint_fast`."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import autoint_fast
from autoint_fast import __main__ as command
from autoint_fast import dispatch
from autoint_fast.weights import Layout

ROOT = Path(__file__).parent.parent


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert command.main([]) == 0
    return capsys.readouterr().out.splitlines()


def words_after(lines: list[str], start: str) -> str:
    """What stands in the first line that begins with `start`, after it."""
    line = next(line for line in lines if line.startswith(f"  {start} "))
    return line.removeprefix(f"  {start} ").strip()


def test_versions(report: list[str]) -> None:
    assert words_after(report, "autoint_fast").startswith(f"{autoint_fast.__version__} (")
    assert words_after(report, "python").startswith(platform.python_version())
    assert words_after(report, "torch") == torch.__version__
    assert words_after(report, "triton")


def test_cpu(report: list[str]) -> None:
    assert words_after(report, "cpu").startswith(command.cpu_name())
    threads = torch.get_num_threads()
    assert words_after(report, "cpu").endswith(f", {threads} thread{'s' if threads > 1 else ''}")
    assert "engines on cpu" in report


def test_every_engine_is_named(report: list[str]) -> None:
    start = report.index("engines on cpu") + 1
    named = {line.split()[0] for line in report[start:] if line.startswith("  ")}
    assert named == set(dispatch.BACKENDS)
    assert "  reference    runs every call" in report[start:]


def test_as_a_module() -> None:
    run = subprocess.run([sys.executable, "-m", "autoint_fast"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("versions\n")


def test_reader_that_stops_early() -> None:
    """As `python -m autoint_fast | head -1` may."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "autoint_fast"]
    run = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (run.returncode, run.stderr) == (1, "")


def test_info_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    default = capsys.readouterr().out
    assert command.main(["info"]) == 0
    assert capsys.readouterr().out == default


def test_version_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        command.main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"autoint_fast {autoint_fast.__version__}\n"


BUILD = ["build", "--fields", "39", "--emb-size", "16", "--heads", "2"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--nonsense"],
        ["info", "extra"],
        [""],
        ["build"],
        BUILD[:-2],
        [*BUILD, "extra"],
        [*BUILD, "0"],
        [*BUILD, "-1"],
        [*BUILD, "2.5"],
        [*BUILD, "²"],
        [*BUILD, "--dtype"],
        [*BUILD, "--dtype", "int8"],
    ],
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        command.main(arguments)
    assert raised.value.code == 2
    streams = capsys.readouterr()
    assert not streams.out and streams.err.startswith("python -m autoint_fast")
    assert streams.err.count("\n") == 1 and streams.err.endswith("\n")


# --- build ------------------------------------------------------------------------------------------------


Built = list[tuple[int, Layout, torch.dtype]]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Built:
    """What a native engine in the real one's place is asked to build; it refuses 13 fields and above."""
    calls: Built = []

    def build(n_fields: int, layout: Layout, dtype: torch.dtype) -> list[Path]:
        calls.append((n_fields, layout, dtype))
        if n_fields > 12:
            raise {13: RuntimeError, 14: PermissionError, 15: ValueError}[n_fields]("why\nnot")
        return [Path("/cache/generic.so"), Path(f"/cache/{n_fields}.so")]

    monkeypatch.setitem(sys.modules, "autoint_fast.kernels.native_engine", SimpleNamespace(build=build))
    return calls


def test_build(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["build", "--fields", "7", "--emb-size", "16", "--heads", "2"]) == 0
    assert built == [(7, Layout(2, 16, 16, 16), torch.float32)]
    streams = capsys.readouterr()
    assert re.fullmatch(r"7x16x2 in fp32: \d+\.\d s\n  /cache/generic\.so\n  /cache/7\.so\n", streams.out)
    assert not streams.err


def test_build_combinations(built: Built) -> None:
    shapes = ["--fields", "7", "12", "--emb-size", "8", "16", "--heads", "1", "2"]
    assert command.main(["build", *shapes, "--dtype", "bf16", "fp16", "fp64"]) == 0
    dtypes = (torch.bfloat16, torch.float16, torch.float64)
    assert built == [(f, Layout(h, e, e, e), d) for f in (7, 12) for e in (8, 16) for h in (1, 2) for d in dtypes]


@pytest.mark.parametrize("fields", ["13", "14", "15"])
def test_build_that_fails(fields: str, built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["build", "--fields", "7", fields, "8", "--emb-size", "16", "--heads", "2"]) == 1
    streams = capsys.readouterr()
    assert streams.out.startswith("7x16x2 in fp32: ") and streams.err == f"{fields}x16x2 in fp32: why\nnot\n"
    assert len(built) == 2


# --- triton -----------------------------------------------------------------------------------------------


def test_triton_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert command.triton_version() == "not installed"


def test_triton_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "triton.py").write_text("raise OSError('libtriton.so:\\n  wrong ELF class')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert command.triton_version() == "cannot be imported: OSError: libtriton.so: wrong ELF class"


def test_triton_interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.3.0"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.triton_version() == "3.3.0, interpreting (TRITON_INTERPRET=1)"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert command.triton_version() == "3.3.0"


# --- devices ----------------------------------------------------------------------------------------------


def pretend(
    monkeypatch: pytest.MonkeyPatch, cuda: int = 0, xpu: int = 0, built_for: Mapping[str, str] | None = None
) -> None:
    """As on a machine with so many devices and a torch built for these versions of what drives them."""
    properties = SimpleNamespace(name="A device", major=9, minor=0, gcnArchName="gfx942", total_memory=80 * 2**30)
    for kind, count in (("cuda", cuda), ("xpu", xpu)):
        module = getattr(torch, kind)
        monkeypatch.setattr(module, "is_available", lambda count=count: count > 0)
        monkeypatch.setattr(module, "device_count", lambda count=count: count)
        monkeypatch.setattr(module, "get_device_properties", lambda i: properties)
    for kind in ("cuda", "hip", "xpu"):
        monkeypatch.setattr(torch.version, kind, (built_for or {}).get(kind), raising=False)


def test_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=2, built_for={"cuda": "12.6"})
    assert [tuple(device) for device in command.devices()[1:]] == [
        ("cuda", f"cuda:{i}", "A device, CUDA 12.6, compute capability 9.0, 80 GiB") for i in (0, 1)
    ]


def test_rocm_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=1, built_for={"hip": "6.3"})
    assert command.devices()[1] == ("cuda", "cuda:0", "A device, ROCm 6.3, gfx942, 80 GiB")


def test_xpu_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, xpu=1)
    assert command.devices()[1:] == [("xpu", "xpu:0", "A device, 80 GiB")]


def test_why_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert command.why_no_gpu() == "none: this build of torch is for the CPU only"
    assert any(line.endswith(command.why_no_gpu()) for line in command.report_lines())
    pretend(monkeypatch, built_for={"hip": "6.3"})
    assert command.why_no_gpu().startswith("none: this build of torch is for ROCm 6.3 and finds no device")


# --- engines ----------------------------------------------------------------------------------------------


class Picky:
    """An engine that runs fp32 and bf16 on GPUs, and no more than 100 fields."""

    def unsupported(self, call: dispatch.Call) -> list[str]:
        reasons = []
        if call.device_type == "cpu":
            reasons.append("no CPU")
        if call.dtype not in (torch.float32, torch.bfloat16):
            reasons.append(f"no {call.dtype}")
        if call.n_fields > 100:
            reasons.append("too many fields")
        return reasons


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "ENGINES", {"picky": Picky()})
    monkeypatch.setattr(dispatch, "preference", lambda call: ("picky",))


@pytest.mark.usefixtures("picky")
def test_reasons_of_an_engine() -> None:
    assert list(command.engine_lines("cuda")) == [
        "  auto         takes picky for MovieLens, Criteo in float32, bfloat16",
        "  auto         takes reference for MovieLens, Criteo in float16, float64; wide",
        "  picky        runs MovieLens, Criteo in float32, bfloat16",
        "  picky        does not run MovieLens, Criteo in float16: no torch.float16",
        "  picky        does not run MovieLens, Criteo in float64: no torch.float64",
        "  picky        does not run wide in float32, bfloat16: too many fields",
        "  picky        does not run wide in float16: no torch.float16; too many fields",
        "  picky        does not run wide in float64: no torch.float64; too many fields",
        "  reference    runs every call",
    ]


@pytest.mark.usefixtures("picky")
def test_every_kind_of_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=2, xpu=1)
    lines = list(command.report_lines())
    assert [line for line in lines if line.startswith("engines on")] == [
        "engines on cpu",
        "engines on cuda",
        "engines on xpu",
    ]
    assert not any("  gpu  " in line for line in lines)


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        (command.TYPICAL, "every call"),
        ([call for call in command.TYPICAL if call.dtype == torch.float64], "float64"),
        ([call for call in command.TYPICAL if call.shape == "wide"], "wide"),
        ([command.Typical("Criteo", torch.float16)], "Criteo in float16"),
    ],
)
def test_calls_in_words(calls: list[command.Typical], words: str) -> None:
    assert command.describe(calls) == words
