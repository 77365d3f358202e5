"""`python -m benchmarks cpu`: what it counts, that the native engine takes part, and what it prints and records."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from autoint_fast import dispatch
from autoint_fast.kernels import torch_engine
from autoint_fast.weights import LN2, NEED_INPUT, NEED_WEIGHTS, Layout
from benchmarks import compare, contestants, cpu, operations, parity, timing
from benchmarks.__main__ import main
from benchmarks.cases import FORWARD, SHAPES, TRAINING, Case, Shape
from benchmarks.contestants import CONTESTANTS, Unable

TINY = Case(Shape("tiny", 5, 8, 2), 70, FORWARD, threads=1)
OURS = ("ours-native", "ours-auto", "ours-frozen")


# --- operations ---------------------------------------------------------------------------------------------


def forward_by_hand(x: Tensor, packed: Tensor, layout: Layout) -> Tensor:
    """One sample's output."""
    w = layout.parts(packed)
    y = x @ w.r + w.b + w.g
    for h in range(layout.n_head):
        q = x @ w.a[:, h] + w.c[h]
        p = torch.softmax((q @ x.T) * LN2, dim=1)
        y = y + (p @ x) @ w.m[h]
    return y.relu()


def backward_by_hand(grad: Tensor, x: Tensor, packed: Tensor, out: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the packed weights, from x and the output alone."""
    w, d = layout.parts(packed), layout.parts(torch.zeros_like(packed))
    d_y = grad * (out > 0)
    d.r.copy_(x.T @ d_y)
    d.b.copy_(d_y.sum(0))
    d.g.copy_(d_y.sum(0))
    d_x = d_y @ w.r.T
    for h in range(layout.n_head):
        q = x @ w.a[:, h] + w.c[h]
        p = torch.softmax((q @ x.T) * LN2, dim=1)
        d.m[h] = (p @ x).T @ d_y
        d_z = d_y @ w.m[h].T
        d_p = d_z @ x.T
        d_s = p * (d_p - (d_p * p).sum(1, keepdim=True)) * LN2
        d_q = d_s @ x
        d.a[:, h] = x.T @ d_q
        d.c[h] = d_q.sum(0)
        d_x = d_x + p.T @ d_z + d_s.T @ q + d_q @ w.a[:, h].T
    return d_x, torch.cat([part.reshape(-1) for part in d])


@pytest.mark.parametrize(
    ("fields", "layout"), [(39, Layout(2, 16, 16, 16)), (7, Layout(3, 20, 20, 17)), (4, Layout(1, 16, 16, 24))]
)
def test_operations_are_those_of_the_folded_form(fields: int, layout: Layout) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(fields, layout.emb_size, generator=draw, dtype=torch.float64)
    packed = torch.randn(layout.numel, generator=draw, dtype=torch.float64) / 4
    with FlopCounterMode(display=False) as counter:
        out = forward_by_hand(x, packed, layout)
    assert operations.operations(layout, fields) == counter.get_total_flops()
    grad = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        d_x, d_packed = backward_by_hand(grad, x, packed, out, layout)
    assert operations.backward(fields, layout) == counter.get_total_flops()

    # What was counted is the layer, and nothing of it is missing.
    torch.testing.assert_close(out, torch_engine.interact(x[None], packed, None, layout)[0])
    expected = torch_engine.interact_backward(
        grad[None], x[None], packed, out[None], None, layout, NEED_INPUT | NEED_WEIGHTS
    )
    assert expected[0] is not None
    torch.testing.assert_close((d_x, d_packed), (expected[0][0], expected[1]))


def test_operations_at_criteo() -> None:
    case = Case(SHAPES["criteo"], 10, FORWARD, threads=1)
    assert operations.count(case) == 10 * 294_528
    assert operations.count(case._replace(mode=TRAINING)) == 10 * 1_118_208


# --- the native engine takes part ---------------------------------------------------------------------------

Build = tuple[int, Layout, torch.dtype]


class Native(SimpleNamespace):
    """A native engine: the PyTorch engine, with a note of what was built."""

    def __init__(self, *, compiler: bool = True) -> None:
        names = ("unsupported", "prepare", "comparison", "folding", "fold", "fold_backward", "interact")
        names += ("interacting", "empty_relu_mask", "interact_backward")
        super().__init__(**{name: getattr(torch_engine, name) for name in names})
        self.compiler, self.built = compiler, list[Build]()

    def build(self, n_fields: int, layout: Layout, dtype: torch.dtype) -> None:
        if not self.compiler:
            raise RuntimeError("no C++ compiler")
        self.built.append((n_fields, layout, dtype))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Native], Native]:
    """Makes an engine the native one."""

    def put(engine: Native) -> Native:
        monkeypatch.setitem(dispatch.ENGINES, "native", engine)  # type: ignore[arg-type]
        monkeypatch.setattr(dispatch, "BACKENDS", ("auto", *dispatch.ENGINES, "reference"))
        monkeypatch.setattr(dispatch, "preference", lambda call: ("native", "torch"))
        return engine

    return put


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(dispatch.ENGINES, "native", raising=False)  # type: ignore[arg-type]
    monkeypatch.setattr(dispatch, "preference", lambda call: ("torch",))


@pytest.mark.parametrize("name", OURS)
def test_the_shape_is_built_before_it_is_timed(name: str, install: Callable[[Native], Native]) -> None:
    engine = install(Native())
    bout = contestants.set_up(CONTESTANTS[name], TINY)
    assert engine.built == [(5, Layout(2, 8, 8, 8), torch.float32)]
    assert bout.note == ("" if name == "ours-native" else "takes native")
    assert parity.violation(CONTESTANTS[name], TINY, bout) == ""


def test_nothing_is_built_for_other_engines(install: Callable[[Native], Native]) -> None:
    engine = install(Native())
    contestants.set_up(CONTESTANTS["ours-torch"], TINY)
    engine.unsupported = lambda call: ["too wide"]
    assert contestants.set_up(CONTESTANTS["ours-auto"], TINY).note == "takes torch"
    with pytest.raises(Unable, match="too wide"):
        contestants.set_up(CONTESTANTS["ours-native"], TINY)
    assert engine.built == []


def test_without_a_compiler_only_the_native_contestant_is_left_out(install: Callable[[Native], Native]) -> None:
    install(Native(compiler=False))
    rows = compare.compare(TINY, [CONTESTANTS[name] for name in OURS], compare.Plan(rounds=2, memory=False))
    assert [row.notes for row in rows] == ["no C++ compiler", *["takes native: no C++ compiler"] * 2]
    assert [row.p50_ms is None for row in rows] == [True, False, False]


@pytest.mark.usefixtures("without_native")
def test_a_missing_engine_is_left_out_by_name() -> None:
    with pytest.raises(Unable, match="not available"):
        contestants.set_up(CONTESTANTS["ours-native"], TINY)


# --- the table ----------------------------------------------------------------------------------------------

MILLISECONDS = {"reference": 8.0, "sdpa": 6.0, "sdpa-fused": 5.0, "ours-torch": 2.0, "ours-native": 0.5, "sgemm": 1.0}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases, and everybody takes the time that is written above."""

    def race(steps: Mapping[str, timing.Step], *args: object, **options: object) -> dict[str, list[float]]:
        return {name: [MILLISECONDS[name] / 1e3] * 5 for name in steps}

    monkeypatch.setattr(timing, "race", race)
    monkeypatch.setattr(operations, "SGEMM_SIZE", 256)
    monkeypatch.setattr(cpu, "CASES", (("movielens", 1, FORWARD), ("movielens", 600, TRAINING)))


def lines_of(text: str) -> list[list[str]]:
    """The lines of the table's cases, cell by cell."""
    return [line.split() for line in text.splitlines() if " x 7x16x2" in line]


@pytest.mark.usefixtures("quick")
def test_the_table(install: Callable[[Native], Native], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = install(Native())
    asked = []

    def profile(*arguments: object) -> dict[str, float]:
        asked.append((arguments, torch.get_num_threads()))
        return {"scores": 0.625, "exp": 0.375} if FORWARD in arguments else {"scores": 0.5, "weights": 0.5}

    engine.profile = profile
    assert main(["cpu", "--threads", "2", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    serving, training = lines_of(shown)
    assert serving[:3] == ["1", "x", "7x16x2"] and serving[3:5] == [FORWARD, "2"]
    assert " ".join(serving[5:15]) == "8,000 us 5,000 us 2,000 us 500 us 16.00 10.00"
    assert " ".join(training[5:13]) == "8.00 ms 5.00 ms 2.00 ms 0.500 ms"
    # A step of half a millisecond, against a product of 2 * 256^3 operations in one.
    useful = 600 * (operations.operations(Layout(2, 16, 16, 16), 7) + operations.backward(7, Layout(2, 16, 16, 16)))
    assert training[15] == f"{useful / 0.5e-3 / 1e9:.0f}"
    assert training[16] == f"{useful / 0.5e-3 / (2 * 256**3 / 1e-3):.0%}"
    assert "sgemm, 256 square by torch in the same rounds: 33.6 GFLOP/s on 2 threads" in shown

    assert asked == [
        ((7, Layout(2, 16, 16, 16), torch.float32, 1, FORWARD), 2),
        ((7, Layout(2, 16, 16, 16), torch.float32, 600, TRAINING), 2),
    ]
    phases = shown[shown.index("where the native engine's time goes") :].splitlines()
    assert phases[2].split() == ["case", "scores", "exp", "weights"]
    assert phases[4].split()[-2:] == ["62%", "38%"] and phases[5].split()[-2:] == ["50%", "50%"]

    with (tmp_path / cpu.CSV_NAME).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 5 and all(row["parity"] == "ok" and row["machine"] for row in rows)
    assert all(float(row["sgemm_gflops"]) == pytest.approx(33.5544) for row in rows)
    assert float(rows[-1]["gflops"]) == pytest.approx(useful / 0.5e-3 / 1e9, rel=1e-5)


@pytest.mark.usefixtures("quick", "without_native")
def test_the_table_without_a_native_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cpu", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "right of the times: ours-torch" in shown and "time goes" not in shown
    assert "not measured: ours-native: not available" in shown
    assert "4.00 2.50" in " ".join(lines_of(shown)[0])


@pytest.mark.usefixtures("quick")
def test_wrong_numbers_fail_the_run(
    install: Callable[[Native], Native], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = install(Native())
    engine.interact = lambda *arguments: torch_engine.interact(*arguments) * 1.001
    assert main(["cpu", "--shapes", "7x16x2", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "WRONG" in lines_of(shown)[0] and "ours-native: out:" in shown


def test_the_product_of_matrices_takes_part_in_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "SGEMM_SIZE", 64)
    plan = compare.Plan(rounds=2, memory=False, sgemm=True)
    (row,) = compare.compare(TINY, [CONTESTANTS["reference"]], plan)
    assert row.p50_ms and row.gflops == pytest.approx(operations.count(TINY) / row.p50_ms / 1e6)
    assert row.sgemm_gflops and row.sgemm_gflops > 0
    (row,) = compare.compare(TINY, [CONTESTANTS["reference"]], plan._replace(sgemm=False))
    assert row.sgemm_gflops is None and row.contestant == "reference"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shapes", "avazu"], "argument --shapes: the table has no line for avazu 24x16x2"),
        (["--threads", "0"], "argument --threads: expected a number of at least 1, got '0'"),
        (["--out", __file__], "File exists"),
    ],
)
def test_bad_arguments_get_one_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["cpu", *arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == ""
    assert captured.err.startswith("python -m benchmarks cpu: error: ") and complaint in captured.err


def test_every_line_has_a_shape() -> None:
    sizes = {(batch, *SHAPES[name][1:]) for name, batch, _ in cpu.CASES}
    assert {size[1:] for size in sizes} == {(39, 16, 2), (7, 16, 2), (200, 16, 2), (39, 64, 4)}
    assert len(sizes) == 6 and len(cpu.CASES) == 8
