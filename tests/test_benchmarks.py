"""The benchmark itself: that it reads, checks, times and records what it says."""

from __future__ import annotations

import csv
import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from autoint_fast import ReferenceInteractingLayer
from benchmarks import compare, contestants, criteo, installed, machine, memory, parity, plot, report, timing
from benchmarks.__main__ import main
from benchmarks.cases import FORWARD, SHAPES, TRAINING, Case, Shape, parse_shape, threads_for
from benchmarks.contestants import CONTESTANTS, Contestant

ROOT = Path(__file__).parents[1]
TINY = Shape("tiny", 5, 8, 2)
QUICK = compare.Plan(rounds=2, memory=False)


def tiny(mode: str, batch: int = 70, **changes: object) -> Case:
    return Case(TINY, batch, mode, threads=1)._replace(**changes)  # type: ignore[arg-type]


# --- Criteo -------------------------------------------------------------------------------------------------

NUMBERS = [str(i) for i in range(13)]
HASHES = [f"{i:08x}" for i in range(26)]


def write_log(path: Path, *rows: list[str]) -> str:
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return str(path)


def test_criteo_values_and_gaps_are_read(tmp_path: Path) -> None:
    gaps = ["0", "", "-2", *NUMBERS[2:], "", "deadbeef", *HASHES[2:]]
    rows = criteo.read(write_log(tmp_path / "log.tsv", ["1", *NUMBERS, *HASHES], gaps))
    assert rows.numeric[0].tolist() == list(range(13))
    assert rows.categorical[0].tolist() == list(range(26))
    assert rows.numeric[1, 0].isnan() and rows.numeric[1, 1:3].tolist() == [-2, 2]
    assert rows.categorical[1, :3].tolist() == [-1, 0xDEADBEEF, 2]


def test_criteo_reads_no_further_than_asked(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.tsv", ["1", *NUMBERS, *HASHES], ["rubbish"])
    assert len(criteo.read(path, most=1).numeric) == 1


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (["1", *NUMBERS, *HASHES[1:]], "expected 40 tab-separated columns, got 39"),
        ([""], "expected 40 tab-separated columns, got 1"),
        (["2", *NUMBERS, *HASHES], "expected a label of 0 or 1, got '2'"),
        (["", *NUMBERS, *HASHES], "expected a label of 0 or 1, got ''"),
        (["1", "1.5", *NUMBERS[1:], *HASHES], "expected an integer or nothing in column 2, got '1.5'"),
        (["1", *NUMBERS[1:], " ", *HASHES], "expected an integer or nothing in column 14, got ' '"),
        (["1", *NUMBERS, *HASHES[1:], "xyz"], "eight hexadecimal digits or nothing in column 40, got 'xyz'"),
    ],
)
def test_a_malformed_criteo_row_is_named_by_its_line(tmp_path: Path, row: list[str], complaint: str) -> None:
    good = ["0", *NUMBERS, *HASHES]
    path = write_log(tmp_path / "log.tsv", good, good, row, good)
    with pytest.raises(criteo.CriteoError) as caught:
        criteo.read(path)
    assert str(caught.value).startswith(f"{path}, line 3: ") and complaint in str(caught.value)


def test_a_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(os.urandom(1000))
    for name in ("empty", "binary"):
        with pytest.raises(criteo.CriteoError, match=f"{name}, line 1: "):
            criteo.read(str(tmp_path / name))


def test_criteo_embedding() -> None:
    nan = float("nan")
    numeric = torch.tensor([[0.0] * 13, [3.0] * 13, [-3.0] * 13, [nan] * 13], dtype=torch.float64)
    categorical = torch.tensor([[7] * 26, [7] * 26, [9] * 26, [-1] * 26])
    x = criteo.embed(criteo.Rows(numeric, categorical), emb_size=8)
    assert x.shape == (4, 39, 8) and x.dtype == torch.float32 and x.isfinite().all()
    numbers, categories = x[:, :13], x[:, 13:]
    assert not numbers[0].any()
    torch.testing.assert_close(numbers[2], -numbers[1])
    larger = criteo.embed(criteo.Rows(torch.full((1, 13), 15.0).double(), categorical[:1]), emb_size=8)
    torch.testing.assert_close(larger[0, :13], 2 * numbers[1])  # log(1 + 15) = 2 log(1 + 3)
    assert len(numbers[3].unique(dim=0)) == 13 and not (numbers[3, :, None] == numbers[1]).all(-1).any()
    torch.testing.assert_close(categories[0], categories[1], rtol=0, atol=0)
    # 26 fields, three values in each: all vectors differ.
    assert len(categories[1:].flatten(0, 1).unique(dim=0)) == 3 * 26


def test_criteo_rows_are_the_input(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.tsv", *(["1", str(i), *NUMBERS[1:], *HASHES] for i in range(3)))
    case = Case(SHAPES["criteo"], 7, FORWARD, threads=1, criteo=path)
    x = contestants.inputs(case)
    torch.testing.assert_close(x, criteo.load(path, 16)[[0, 1, 2, 0, 1, 2, 0]], rtol=0, atol=0)
    (row,) = compare.compare(case, [CONTESTANTS["reference"]], QUICK)
    assert (row.data, row.parity) == ("log.tsv", report.OK)


# --- parity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contestant", "mode"),
    [
        pytest.param(contestant, mode, id=f"{contestant.name}-{mode}")
        for contestant in CONTESTANTS.values()
        for mode in contestant.modes
        # Compiling takes half a minute.
        if contestant.name != "compile"
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_contestant_computes_its_formula(contestant: Contestant, mode: str, dtype: str) -> None:
    case = tiny(mode, dtype=dtype)
    try:
        bout = contestants.set_up(contestant, case)
    except contestants.Unable as error:
        pytest.skip(f"{contestant.name}: {error}")
    assert parity.violation(contestant, case, bout) == ""


class Off(nn.Module):
    """The reference layer with something wrong: what `spoil` does to its input's path."""

    def __init__(self, layer: ReferenceInteractingLayer, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.spoil = layer, spoil

    def forward(self, x: Tensor) -> Tensor:
        return self.spoil(self.layer(x))


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 1.001


def last_sample_only(out: Tensor) -> Tensor:
    return torch.cat([out[:-1], out[-1:] * 1.0001])


def raises(out: Tensor) -> Tensor:
    raise RuntimeError("no kernel\nfor this")


def runs_out_of_memory(out: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def off(spoil: Callable[[Tensor], Tensor]) -> Contestant:
    return CONTESTANTS["reference"]._replace(name="off", build=lambda layer: Off(layer, spoil))


@pytest.mark.parametrize(
    ("mode", "spoil", "what"),
    [
        (FORWARD, lambda out: out * 1.0001, "out: maximum error"),
        (FORWARD, last_sample_only, "out: maximum error"),
        (FORWARD, lambda out: out * float("nan"), "out: maximum error nan"),
        (FORWARD, lambda out: out[:, :-1], "out: expected float32 (70, 5, 8), got float32 (70, 4, 8)"),
        (FORWARD, lambda out: out.double(), "out: expected float32 (70, 5, 8), got float64"),
        (TRAINING, WrongGradient.apply, "gradient of x: "),
    ],
)
def test_a_wrong_contestant_gets_no_figure(mode: str, spoil: Callable[[Tensor], Tensor], what: str) -> None:
    field = [CONTESTANTS["reference"], off(spoil), CONTESTANTS["ours-torch"]]
    rows = {row.contestant: row for row in compare.compare(tiny(mode), field, QUICK)}
    wrong, right = rows["off"], rows["ours-torch"]
    assert wrong.parity == report.FAILED and wrong.notes.startswith(what), wrong.notes
    assert wrong.p50_ms is None and wrong.x_reference is None and wrong.samples_per_s is None
    assert right.parity == report.OK and right.x_reference is not None
    assert right.x_reference == pytest.approx(rows["reference"].p50_ms / right.p50_ms)  # type: ignore[operator]
    assert rows["reference"].x_reference == 1.0


@pytest.mark.parametrize(
    ("spoil", "notes"),
    [(raises, "fails: RuntimeError: no kernel"), (runs_out_of_memory, "out of memory")],
)
def test_a_failure_is_a_result(spoil: Callable[[Tensor], Tensor], notes: str) -> None:
    rows = compare.compare(tiny(FORWARD), [off(spoil), CONTESTANTS["reference"]], QUICK)
    assert (rows[0].notes, rows[0].parity, rows[0].p50_ms) == (notes, "", None)
    assert rows[1].p50_ms is not None


def test_what_would_not_fit_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny(FORWARD, batch=600)
    large, small = (contestants.bytes_needed(CONTESTANTS[n], case) for n in ("reference", "ours-torch"))
    assert small < 0.5 * large
    monkeypatch.setattr(memory, "available", lambda device: large)
    rows = compare.compare(case, [CONTESTANTS["reference"], CONTESTANTS["ours-torch"]], QUICK)
    assert rows[0].notes.startswith("left out: needs about") and rows[0].p50_ms is None
    assert rows[1].p50_ms is not None and rows[1].x_reference is None


def test_a_large_batch_is_split_for_sdpa_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Case, "device_type", "cuda")
    monkeypatch.setattr(contestants, "MOST_BATCH_TIMES_HEADS", 32)
    seen = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(q.shape[0] * q.shape[1])
        return sdpa(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    case = tiny(TRAINING)
    bout = contestants.set_up(CONTESTANTS["sdpa"], case)
    assert bout.note == "batch split: B*H > 32"
    assert parity.violation(CONTESTANTS["sdpa"], case, bout) == ""
    assert seen == [32, 32, 32, 32, 12]


def test_a_package_is_entered_without_its_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noisy" / "inner").mkdir(parents=True)
    (tmp_path / "noisy" / "__init__.py").write_text("raise RuntimeError('it ran')")
    (tmp_path / "noisy" / "inner" / "__init__.py").write_text("")
    (tmp_path / "noisy" / "inner" / "layers.py").write_text("VALUE = 7")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(installed, "BARE", {"noisy": ("noisy",)})
    assert installed.load("noisy.inner.layers").VALUE == 7


@pytest.mark.parametrize("bare", [(), ("no_such_package",)])
def test_what_is_not_installed_says_so(bare: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "BARE", {"no_such_package": bare})
    with pytest.raises(contestants.Unable, match="not installed"):
        installed.load("no_such_package.layers")


def test_what_cannot_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(contestants.Unable, match="cannot be imported: No module named 'no_such_package'"):
        installed.load("broken_package")


# --- timing -------------------------------------------------------------------------------------------------


def test_quantiles() -> None:
    assert timing.quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    assert timing.quantiles([2.0]) == (2.0, 2.0, 2.0)
    assert timing.quantiles([1.0, 2.0, 3.0]).spread == pytest.approx(1.2 / 2.0)


def test_rounds_are_interleaved_in_changing_order() -> None:
    turns = []

    def clock(step: timing.Step, calls: int) -> float:
        turns.append((step(), calls))
        return {"a": 0.0005, "b": 0.1, "c": 1e-9}[str(turns[-1][0])]

    shares: list[float] = []
    steps: dict[str, timing.Step] = {name: functools.partial(str, name) for name in "abc"}
    samples = timing.race(steps, clock, rounds=64, progress=shares.append)
    warm_up = 3 * timing.WARM_UP_CALLS
    names = "".join(str(name) for name, _ in turns[warm_up:])
    rounds = [names[i : i + 3] for i in range(0, len(names), 3)]
    assert len(rounds) == 64 and set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert dict(turns[warm_up:]) == {"a": 4, "b": 1, "c": timing.MOST_CALLS}
    assert samples == {"a": [0.0005] * 64, "b": [0.1] * 64, "c": [1e-9] * 64}
    assert shares == [(i + 1) / 64 for i in range(64)]


def test_rounds_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock(step: timing.Step, calls: int) -> float:
        nonlocal now
        now += 0.25
        return 0.25

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    assert len(timing.race({"a": str}, clock, seconds=2.5)["a"]) == 10
    assert len(timing.race({"a": str}, clock, seconds=0.0)["a"]) == timing.LEAST_ROUNDS


class FakeCuda:
    """A device on which everything is written down and a step takes 3 ms."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.allocated, self.peak = 10 << 20, 90 << 20

    def Event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(record=lambda: self.log.append("record"))
        event.elapsed_time = lambda end: 3.0 if end is not event else 0.0
        return event

    def synchronize(self, device: str = "") -> None:
        self.log.append("synchronize")

    def memory_allocated(self, device: str) -> int:
        return self.allocated

    def reset_peak_memory_stats(self, device: str) -> None:
        self.peak = self.allocated

    def max_memory_allocated(self, device: str) -> int:
        return self.peak


def test_cuda_calls_are_timed_by_events_after_a_flush() -> None:
    cuda = FakeCuda()
    clock = timing.CudaClock(SimpleNamespace(zero_=lambda: cuda.log.append("flush")), cuda)
    assert clock(lambda: cuda.log.append("step"), 2) == pytest.approx(0.003)
    assert cuda.log == ["flush", "record", "step", "record"] * 2 + ["synchronize"]


def test_cuda_memory_is_the_growth_of_the_peak() -> None:
    cuda = FakeCuda()

    def step() -> None:
        cuda.peak = max(cuda.peak, cuda.allocated + (24 << 20))

    assert memory.peak_extra_cuda(step, "cuda", cuda) == 24.0


# --- memory -------------------------------------------------------------------------------------------------


def one_after_the_other(mib: int) -> Callable[[], object]:
    def step() -> object:
        for _ in range(3):
            torch.ones(mib << 18)
        return torch.ones(mib << 18)

    return step


def dies() -> Callable[[], object]:
    os._exit(3)


needs_proc = pytest.mark.skipif(not memory.STATUS.exists(), reason="no /proc")


@needs_proc
def test_a_known_allocation_is_measured() -> None:
    assert memory.peak_extra_cpu(functools.partial, torch.ones, 64 << 18) == pytest.approx(64, abs=2)
    assert memory.peak_extra_cpu(one_after_the_other, 32) == pytest.approx(32, abs=2)


@needs_proc
def test_a_child_that_fails_is_no_figure() -> None:
    with pytest.raises(memory.NotMeasured, match="ZeroDivisionError"):
        memory.peak_extra_cpu(functools.partial, divmod, 1, 0)
    with pytest.raises(memory.NotMeasured, match="status 3"):
        memory.peak_extra_cpu(dies)


def test_memory_that_is_there_is_told() -> None:
    free = memory.available("cpu")
    assert free is None or 1 << 20 < free < 1 << 50


# --- the results --------------------------------------------------------------------------------------------

ROW = report.Row("random", "tiny", 5, 8, 2, 70, FORWARD, "reference", "fp32", "cpu", 1, report.OK, 2, p50_ms=1.0)


def test_a_run_replaces_its_own_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    others = [
        dataclasses.replace(ROW, **{name: value})
        for name, value in [
            ("batch", 71),
            ("mode", TRAINING),
            ("contestant", "sdpa"),
            ("machine", "elsewhere"),
        ]
    ]
    report.update_csv(path, [ROW, *others])
    report.update_csv(path, [dataclasses.replace(ROW, p50_ms=2.5, notes='a "quoted", note', commit="new")])
    rows = report.read_csv(path)
    assert [row["p50_ms"] for row in rows] == ["1"] * 4 + ["2.5"]
    assert rows[-1]["notes"] == 'a "quoted", note' and rows[-1]["commit"] == "new"
    assert [row["machine"] for row in rows] == ["", "", "", "elsewhere", ""]
    assert os.listdir(path.parent) == ["results.csv"]


def test_a_file_of_an_earlier_version_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    old = {name: "1" for name in report.COLUMNS if name not in ("gflops", "sgemm_gflops")}
    path.write_text(f"{','.join(old)}\n{','.join(old.values())}\n")
    report.update_csv(path, [ROW])
    assert [(row["p50_ms"], row["gflops"]) for row in report.read_csv(path)] == [("1", ""), ("1", "")]


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(report.ResultsError, match="has no column"):
        report.update_csv(path, [ROW])
    assert path.read_text() == "a,b\n1,2\n"


def test_a_picture_for_every_machine(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    timed = dataclasses.replace(ROW, p20_ms=0.9, p80_ms=1.2, machine="one")
    larger = dataclasses.replace(timed, batch=140, contestant="somebody's")
    report.update_csv(path, [timed, larger, dataclasses.replace(timed, machine="another")])
    pictures = plot.plot_csv(path, tmp_path / "pictures")
    assert {p.name for p in pictures} == {
        "results-one-cpu-fp32-random.png",
        "results-another-cpu-fp32-random.png",
    }
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)


def test_a_busy_machine_is_noticed() -> None:
    assert machine.busy(None) == machine.busy(0.1) == ""
    assert machine.busy(1.72) == "load average 1.7"
    assert machine.unsteady([0.02, 0.1, 5.0]) == ""
    assert machine.unsteady([0.02, 0.6, 5.0]) == "rounds spread by 60%"
    rows = compare.compare(tiny(FORWARD), [CONTESTANTS["reference"]], QUICK, load=3.0)
    assert rows[0].warning.startswith("load average 3.0") and rows[0].load_average == 3.0


def test_small_batches_get_one_thread() -> None:
    assert threads_for(512, None) == 1
    assert threads_for(513, None) == torch.get_num_threads()
    assert threads_for(32, 3) == 3
    before = torch.get_num_threads()
    compare.compare(tiny(FORWARD, threads=before + 1), [CONTESTANTS["reference"]], QUICK)
    assert torch.get_num_threads() == before


def test_shapes_by_name_and_number() -> None:
    assert parse_shape("criteo") == parse_shape("39x16x2") == Shape("criteo", 39, 16, 2)
    assert parse_shape("5x8x3") == Shape("custom", 5, 8, 3)


# --- the command line ---------------------------------------------------------------------------------------


def test_the_whole_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--shapes", "5x8x2", "--batch", "20", "70", "--rounds", "2"]
    command += ["--contestants", "reference", "sdpa", "ours-torch", "ours-triton", "ours-frozen"]
    run = subprocess.run([*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    with (tmp_path / report.CSV_NAME).open(newline="") as file:
        rows = list(csv.DictReader(file))
    # Two batches, forward: all five; forward+backward: all but frozen.
    assert len(rows) == 2 * (5 + 4)
    timed = [row for row in rows if row["contestant"] != "ours-triton"]
    assert all(row["parity"] == "ok" and float(row["x_sdpa"]) > 0 for row in timed)
    assert all(row["notes"] == "needs a GPU" for row in rows if row not in timed)
    weighed = {row["batch"] for row in timed if row["peak_extra_mib"]}
    assert weighed == ({"70"} if memory.STATUS.exists() else set())
    assert rows[0]["torch"] == torch.__version__ and rows[0]["machine"] and rows[0]["processor"]
    assert "not measured: ours-triton: needs a GPU" in run.stdout
    assert (tmp_path / "results-cpu-fp32-random.png").exists()
    # Piped output is not cut to the width of a terminal.
    assert "x reference" in run.stdout and "…" not in run.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shapes", "39x16"], "argument --shapes: expected FxExH, as in 39x16x2, or one of criteo"),
        (["--batch", "0"], "argument --batch: expected a number of at least 1, got '0'"),
        (["--batch", "many"], "argument --batch: expected a number"),
        (["--seconds", "nan"], "argument --seconds: expected a number"),
        (["--mode", "sideways"], "argument --mode: invalid choice"),
        (["--contestants", "nobody"], "argument --contestants: invalid choice"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice"),
        (["--device", "abacus"], "argument --device: expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "CUDA devices, got 'cuda:99'"),
        (["--criteo", "no-such-file"], "No such file"),
        (["--criteo", __file__], f"{__file__}, line 1: expected 40 tab-separated columns"),
        (["--criteo", __file__, "--shapes", "avazu"], "its rows have 39 fields, which avazu 24x16x2 has not"),
        (["--contestants", "ours-frozen", "--mode", TRAINING], "nothing was measured"),
        (["sideways"], "unrecognized arguments: sideways"),
        (["plot", "no-such-file"], "No such file"),
        (["plot", __file__], f"{__file__}: expected a results.csv"),
    ],
)
def test_bad_arguments_get_one_line(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("python -m benchmarks") and complaint in last


def test_help_names_every_contestant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"{contestant.name:<14}{contestant.about}" in shown for contestant in CONTESTANTS.values())
    assert "plot CSV" in shown and "python -m benchmarks cpu" in shown
