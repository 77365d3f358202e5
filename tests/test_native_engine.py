"""The C++ engine: the shared suite on every instruction set that runs here, and what only a compiled engine can get
wrong."""

from __future__ import annotations

import contextlib
import ctypes
import math
import shutil
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import mpmath
import pytest
import torch
from torch import Tensor

from autoint_fast import InteractingLayer, why
from autoint_fast.kernels import native_build, native_engine, torch_engine
from autoint_fast.kernels.native_build import Spec
from autoint_fast.weights import NEED_INPUT, NEED_WEIGHTS, InteractingParameters, Layout, folded_dtype
from tests.cases import GRAD_LAYOUTS, LAYOUTS, LISTED, ODD, Shape, draw_mask, draw_problem, misaligned
from tests.numerics import (
    NAMES,
    Problem,
    Run,
    as_three_dimensions,
    assert_close_to_truth,
    assert_rule,
    errors,
    layer_forward,
)
from tests.suite import DTYPES, EngineSuite, run, short

pytestmark = pytest.mark.skipif(native_build.compiler() is None, reason="there is no C++ compiler")

FORWARD = layer_forward("native")
EVERYTHING = NEED_INPUT | NEED_WEIGHTS
# A group of samples in the lanes and a rest that is taken one by one, whatever the number of lanes.
BATCH = 37


class Work(NamedTuple):
    """What the engine's own functions are called with."""

    x: Tensor
    packed: Tensor
    mask: Tensor | None
    grad: Tensor
    layout: Layout

    def run(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The output, the gradients of x and of the packed weights."""
        out = native_engine.interact(self.x, self.packed, self.mask, self.layout)
        grads = native_engine.interact_backward(self.grad, self.x, self.packed, out, self.mask, self.layout, EVERYTHING)
        return out, *grads


def draw_work(shape: Shape, dtype: torch.dtype = torch.float32, form: str | None = None) -> Work:
    b, f, e, h = shape
    x, p, _, mask = draw_problem(shape, dtype, None if form is None else draw_mask(form, b, f))
    layout = Layout(h, e, e, e)
    wide = InteractingParameters(*(t.to(folded_dtype(dtype)) for t in p))
    packed = torch_engine.fold(wide, layout, 1 / math.sqrt(e))
    return Work(x, packed, as_three_dimensions(mask), torch.randn(b, f, e).to(dtype), layout)


def assert_same_bits(got: Sequence[Tensor | None], expected: Sequence[Tensor | None], where: str) -> None:
    for name, one, two in zip(("out", "x", "the packed weights"), got, expected, strict=True):
        assert one is not None and two is not None
        assert torch.equal(one, two), f"{where}: {name} differs in {(one != two).sum()} of {one.numel()} places"


def build_all(specs: Sequence[Spec]) -> list[Path]:
    """Their entries, two compilers at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(native_build.build, specs))


@contextlib.contextmanager
def general_builds() -> Iterator[None]:
    """Inside, no shape finds a build of its own, which this machine's cache may well hold."""
    find = native_build.find

    def find_general(spec: Spec, extra: tuple[str, ...] = ()) -> Path | None:
        return None if any(name == "AUTOINT_F" for name, _ in spec.definitions) else find(spec, extra)

    with pytest.MonkeyPatch.context() as patch:
        native_engine.forget()
        patch.setattr(native_build, "find", find_general)
        yield
    native_engine.forget()


@pytest.fixture
def general() -> Iterator[None]:
    with general_builds():
        yield


@pytest.fixture
def afresh() -> Iterator[None]:
    """Builds that a test loads are not those of other tests."""
    native_engine.forget()
    yield
    native_engine.forget()


# --- the suite ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="class")
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """The one that the class names, for all of its tests."""
    isa, lane_bytes = request.cls.isa, request.cls.lane_bytes
    if isa not in (None, *native_build.isas()):
        pytest.skip(f"this CPU does not run {isa}")
    with general_builds(), pytest.MonkeyPatch.context() as patch:
        if isa is not None:
            # Pairs are for bf16 alone.
            others = "avx512" if isa == "avx512bf16" else isa
            patch.setattr(native_engine, "_isa", lambda dtype: isa if dtype == torch.bfloat16 else others)
            patch.setitem(native_engine.LANE_BYTES, isa, lane_bytes or native_engine.LANE_BYTES[isa])
        build_all([native_engine._spec(dtype) for dtype in native_engine.DTYPES])
        yield


@pytest.mark.usefixtures("instruction_set")
class GeneralSuite(EngineSuite):
    engine = "native"
    isa: ClassVar[str | None] = None  # None: the best there is
    lane_bytes: ClassVar[int | None] = None  # None: the instruction set's own


class TestNativeEngine(GeneralSuite):
    """Half of the shapes again with a batch that fills the lanes."""

    shapes = LISTED + ODD + (Shape(BATCH, 39, 16, 2), Shape(BATCH, 7, 10, 2), Shape(BATCH, 2, 17, 3))


class ForcedSuite(GeneralSuite):
    shapes = (Shape(19, 7, 10, 2), Shape(2, 33, 17, 3), Shape(1, 1, 16, 2), Shape(0, 7, 16, 2))
    mask_shapes = (Shape(7, 6, 8, 2),)
    large_shape = Shape(70, 39, 16, 2)
    extreme_shape = Shape(32, 13, 16, 2)


class TestAVX512BF16(ForcedSuite):
    isa = "avx512bf16"


class TestAVX512(ForcedSuite):
    isa = "avx512"


@pytest.mark.slow
class TestAVX512WithHalfVectors(ForcedSuite):
    isa, lane_bytes = "avx512", 32


class TestAVX2(ForcedSuite):
    isa = "avx2"


class TestNEON(ForcedSuite):
    isa = "neon"


class TestPlain(ForcedSuite):
    isa = "plain"


def test_every_instruction_set_has_a_suite() -> None:
    assert {suite.isa for suite in ForcedSuite.__subclasses__()} == set(native_build.FLAGS)


@pytest.mark.parametrize("known", [True, False], ids=["new compiler", "old compiler"])
def test_pairs_are_for_bf16(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And for compilers that know them."""
    monkeypatch.setattr(native_build, "isas", lambda: ("avx512bf16", "avx512", "avx2", "plain"))
    monkeypatch.setattr(native_build, "takes", lambda isa: known)
    pairs = [dtype for dtype in DTYPES if native_engine._isa(dtype) == "avx512bf16"]
    assert pairs == ([torch.bfloat16] if known else [])
    assert {native_engine._isa(dtype) for dtype in DTYPES if dtype not in pairs} == {"avx512"}


# --- builds of a shape's own ----------------------------------------------------------------------------------

# Not among the shapes of other tests, which are to find the general build.
OWN = {
    (7, Layout(3, 10, 10, 10), torch.float32): None,
    (39, Layout(3, 16, 16, 16), torch.float32): None,
    (13, Layout(1, 16, 16, 16), torch.float64): None,
    (39, Layout(3, 10, 10, 10), torch.bfloat16): None,
    (13, Layout(3, 16, 16, 16), torch.float16): None,
}


@pytest.fixture(scope="module")
def own_builds() -> None:
    build_all([native_engine._spec(dtype, fields, layout) for fields, layout, dtype in OWN])


@pytest.mark.usefixtures("poisoned_memory", "own_builds", "afresh")
@pytest.mark.parametrize(
    ("fields", "layout", "dtype"), OWN, ids=[f"F{f}-E{layout.emb_size}-{short(d)}" for f, layout, d in OWN]
)
def test_own_build_gives_the_same_bits(fields: int, layout: Layout, dtype: torch.dtype) -> None:
    shape = Shape(BATCH, fields, layout.emb_size, layout.n_head)
    works = {form: draw_work(shape, dtype, form) for form in (None, "(B,1,F)", "(F,F)", "(B,F,F)", "(B,F,1)")}
    with general_builds():
        expected = {form: work.run() for form, work in works.items()}
        assert not native_engine._shape(fields, layout, dtype).settled
    native_engine.build(fields, layout, dtype)
    assert native_engine._shape(fields, layout, dtype).settled
    for form, work in works.items():
        assert_same_bits(work.run(), expected[form], f"mask {form}")


def test_build_settles_a_shape_that_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, afresh: None) -> None:
    """The build made by hand serves the next call of a process that has used the general one."""
    fields, layout, dtype = key = next(iter(OWN))
    paths = [native_build.build(native_engine._spec(dtype)), native_build.build(native_engine._spec(*reorder(key)))]
    cache = private_copy(tmp_path, paths[:1], monkeypatch)
    work = draw_work(Shape(3, fields, layout.emb_size, layout.n_head))
    expected = work.run()
    assert not native_engine._shape(*key).settled
    shutil.copy2(paths[1], cache)
    assert {path.parent for path in native_engine.build(*key)} == {cache}
    assert_same_bits(work.run(), expected, "after build")
    assert native_engine._shape(*key).settled


def reorder(key: tuple[int, Layout, torch.dtype]) -> tuple[torch.dtype, int, Layout]:
    return key[2], key[0], key[1]


def private_copy(tmp_path: Path, entries: Sequence[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another cache folder, with these entries."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    for entry in entries:
        shutil.copy2(entry, cache)
    monkeypatch.setenv("AUTOINT_FAST_CACHE", str(cache))
    native_engine.forget()
    return cache


# --- a shape's own build in the background -----------------------------------------------------------------------

BACKGROUND = (5, Layout(2, 4, 4, 4), torch.float32)


@pytest.fixture
def little_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, afresh: None) -> Work:
    """A shape whose own build pays after one call, in a cache that holds the general build alone."""
    private_copy(tmp_path, [native_build.build(native_engine._spec(torch.float32))], monkeypatch)
    fields, (h, e, *_), _ = BACKGROUND
    work = draw_work(Shape(BATCH, fields, e, h))
    work.run()
    assert not native_engine._shape(*BACKGROUND).settled
    monkeypatch.setattr(native_engine, "OWN_BUILD_OPERATIONS", 1.0)
    return work


def test_own_build_in_the_background(little_used: Work) -> None:
    """Calls go on with the general build while the compiler works, and the bits stay when they change over."""
    shape = native_engine._shape(*BACKGROUND)
    general, expected = shape.library, little_used.run()
    assert shape.building is not None and not shape.settled
    meanwhile, deadline = 0, time.monotonic() + 120
    while not shape.settled:
        assert_same_bits(little_used.run(), expected, "while compiling")
        meanwhile += 1
        assert time.monotonic() < deadline, "the build does not come"
    assert meanwhile > 10, "calls have waited for the compiler"
    assert shape.library is not general
    assert_same_bits(little_used.run(), expected, "from its own build")


def test_own_build_begun_by_several_threads_at_once(little_used: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them starts the compiler, and none waits for it."""
    started: list[native_build.Building] = []
    start = native_build.start

    def note(spec: Spec) -> native_build.Building:
        started.append(start(spec))
        return started[-1]

    monkeypatch.setattr(native_build, "start", note)
    expected = little_used.run()
    barrier = threading.Barrier(4)

    def work(_: int) -> None:
        barrier.wait()
        for _ in range(50):
            assert_same_bits(little_used.run(), expected, "in a thread")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(started) == 1
    started[0].cancel()


@pytest.mark.parametrize("answers", [False, True], ids=["no compiler", "failing compiler"])
def test_own_build_that_fails(
    answers: bool, little_used: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning, and the general build goes on serving."""
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit {int(not answers)}\necho out of order >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    shape = native_engine._shape(*BACKGROUND)
    general = shape.library
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected, deadline = little_used.run(), time.monotonic() + 60
        while not shape.settled:
            assert_same_bits(little_used.run(), expected, "while compiling")
            assert time.monotonic() < deadline, "the failure is not noticed"
        for _ in range(5):
            assert_same_bits(little_used.run(), expected, "after the failure")
    assert shape.library is general
    assert len(caught) == 1, [str(warning.message) for warning in caught]
    assert ("out of order" if answers else "C++ compiler") in str(caught[0].message)


# --- threads ----------------------------------------------------------------------------------------------------


class Teams:
    """GCC's entry into OpenMP, with a note of the threads that each team had."""

    WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.seen: list[set[int]] = []
        self.real = self.ENTRY(native_engine._parallel())
        self.callback = self.ENTRY(self._enter)
        self.address = ctypes.cast(self.callback, ctypes.c_void_p).value

    def _enter(self, function: int, data: int, threads: int, flags: int) -> None:
        work, seen = self.WORK(function), set[int]()

        def member(data: int) -> None:
            seen.add(threading.get_native_id())
            work(data)

        callback = self.WORK(member)
        self.real(ctypes.cast(callback, ctypes.c_void_p), data, threads, flags)
        self.asked.append(threads)
        self.seen.append(seen)


@pytest.fixture
def teams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Teams]:
    if not native_engine._parallel():
        pytest.skip("torch's OpenMP has no entry for code that GCC compiles: the engine uses one thread")
    teams, before = Teams(), torch.get_num_threads()
    monkeypatch.setattr(native_engine, "_parallel", lambda: teams.address)
    yield teams
    torch.set_num_threads(before)


@pytest.mark.usefixtures("poisoned_memory", "general")
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("form", [None, "(B,1,F)", "(F,F)", "(B,F,F)"])
def test_number_of_threads_moves_no_bit(
    form: str | None, dtype: torch.dtype, teams: Teams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_engine, "THREAD_OPERATIONS", 1.0)
    shape = Shape(300, 7, 10, 2)
    problem = draw_problem(shape, dtype, None if form is None else draw_mask(form, shape.b, shape.f))
    grad = torch.randn(problem.x.shape)
    runs: dict[int, Run] = {}
    for threads in (1, 2, 3, 7, 2, 1):
        torch.set_num_threads(threads)
        teams.asked.clear()
        teams.seen.clear()
        got = run(FORWARD, problem, grad)
        assert teams.asked == ([threads] * 2 if threads > 1 else []), "forward and backward in so many threads"
        assert all(len(seen) == threads for seen in teams.seen)
        expected = runs.setdefault(threads, got)
        for other in (expected, runs[1]):
            assert torch.equal(got.out, other.out), f"{threads} threads"
            for name in ("x", *NAMES):
                one, two = got.grads[name], other.grads[name]
                assert one is not None and two is not None
                assert torch.equal(one, two), f"{threads} threads: gradient of {name}"


def test_no_thread_is_woken_for_little_work(teams: Teams) -> None:
    torch.set_num_threads(3)
    run(FORWARD, draw_problem(Shape(4, 7, 16, 2)), torch.randn(4, 7, 16))
    assert not teams.asked
    run(FORWARD, draw_problem(Shape(2000, 7, 16, 2)), torch.randn(2000, 7, 16))
    assert teams.asked == [3, 3]


@pytest.mark.usefixtures("general")
def test_calls_from_several_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a team of its own, and with the arena of another shape before."""
    monkeypatch.setattr(native_engine, "THREAD_OPERATIONS", 1.0)
    works = [draw_work(Shape(BATCH + 16 * i, 3 + 5 * i, 4 + 3 * i, 2), form="(B,F,F)") for i in range(4)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = [work.run() for work in works]
        barrier = threading.Barrier(4)

        def work(first: int) -> None:
            torch.set_num_threads(2)
            barrier.wait()
            for i in range(first, first + 40):
                assert_same_bits(works[i % 4].run(), expected[i % 4], f"shape {i % 4}")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        torch.set_num_threads(before)


# --- exp2 -------------------------------------------------------------------------------------------------------

ULPS = 2.0


@pytest.fixture(params=[isa for isa in native_build.isas() if isa != "avx512bf16"])
def exp2(request: pytest.FixtureRequest) -> Any:
    """2^x of a tensor by the library, for one instruction set after the other."""

    def function(x: Tensor) -> Tensor:
        spec = Spec(
            request.param, native_engine.LANE_BYTES[request.param], (("AUTOINT_T", native_engine.DTYPES[x.dtype]),)
        )
        call = native_build.load(native_build.build(spec)).autoint_exp2
        call.argtypes, call.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
        to = torch.full_like(x, math.inf)
        call(x.data_ptr(), to.data_ptr(), x.numel())
        return to

    return function


def test_exp2_of_floats(exp2: Any) -> None:
    """Numbers of every exponent, every 499th float, and all of those beside the ends of the range."""
    first, last = torch.tensor([-0.0, -126.0]).view(torch.int32).tolist()
    bits = torch.cat(
        (
            torch.arange(first, last, 499, dtype=torch.int32),
            torch.randint(first, last + 1, (1_000_000,), dtype=torch.int32),
            torch.arange(first, first + 100_000, dtype=torch.int32),
            torch.arange(last - 100_000, last + 1, dtype=torch.int32),
        )
    )
    # And those around whole numbers and halves, where the polynomial's argument changes its sign.
    near = (torch.arange(-252, 1).float() / 2).view(torch.int32)[:, None] + torch.arange(-200, 201, dtype=torch.int32)
    x = torch.cat((bits.view(torch.float32), near.view(-1).view(torch.float32), -torch.rand(1_000_000) * 126))
    x = x[(x >= -126) & (x <= 0)]
    truth = torch.exp2(x.double())
    unit = torch.exp2(truth.log2().floor() - 23)
    error = ((exp2(x).double() - truth) / unit).abs()
    assert error.max() <= ULPS, f"{error.max():.3f} ulp at {x[error.argmax()].item()!r}"


def test_exp2_of_doubles(exp2: Any) -> None:
    x = torch.cat(
        (
            -torch.rand(10_000, dtype=torch.float64) * 1022,
            -torch.rand(5_000, dtype=torch.float64),
            -torch.exp2(-torch.rand(5_000, dtype=torch.float64) * 1074),
            torch.arange(-2044, 1, dtype=torch.float64) / 2,
            torch.nextafter(torch.arange(-2043, 1, dtype=torch.float64) / 2, torch.tensor(-math.inf).double()),
            -1022 + torch.rand(1_000, dtype=torch.float64) * 1e-9,
        )
    )
    got = exp2(x)
    with mpmath.workprec(120):
        worst = max(
            (abs((mpmath.mpf(y) - mpmath.mpf(2) ** mpmath.mpf(at)) / math.ulp(y)), at)
            for y, at in zip(got.tolist(), x.tolist(), strict=True)
        )
    assert worst[0] <= ULPS, f"{float(worst[0]):.3f} ulp at {worst[1]!r}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_exp2_at_the_ends(dtype: torch.dtype, exp2: Any) -> None:
    least = -126 if dtype == torch.float32 else -1022
    whole = torch.arange(least, 1, dtype=dtype)
    assert torch.equal(exp2(whole), torch.exp2(whole.double()).to(dtype)), "powers of two are exact"
    assert exp2(torch.tensor([0.0, -0.0], dtype=dtype)).tolist() == [1.0, 1.0]
    below = torch.nextafter(whole[:1], whole[:1] - 1)
    nothing = torch.cat((below, below - 0.5, below * 2, below * 1e6, torch.tensor([-3e38, -math.inf], dtype=dtype)))
    assert exp2(nothing).tolist() == [0.0] * nothing.numel(), "zero below the normal numbers"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_exp2_of_every_kind_of_nan(dtype: torch.dtype, exp2: Any) -> None:
    """Of either sign and with any payload, as R's NA has one."""
    integer, mantissa = (torch.int32, 23) if dtype == torch.float32 else (torch.int64, 52)
    payloads = torch.cat((torch.arange(0, 5000), torch.randint(0, 1 << mantissa - 1, (5000,)))).to(integer)
    quiet = torch.tensor(math.nan, dtype=dtype).view(integer) | payloads
    negative = quiet | torch.iinfo(integer).min
    x = torch.cat((quiet, negative)).view(dtype)
    assert x.isnan().all()
    got = exp2(x)
    assert got.isnan().all(), f"a number for {(~got.isnan()).sum()} of {x.numel()} kinds of NaN"


# --- batches and layouts ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned_memory", "general")
@pytest.mark.parametrize("shape", [Shape(0, 7, 10, 2), Shape(0, 3, 5, 1), Shape(0, 9, 16, 1)], ids=str)
@pytest.mark.parametrize("form", [None, "(B,1,F)", "(B,F,F)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_every_size_of_batch(dtype: torch.dtype, form: str | None, shape: Shape) -> None:
    """Whole groups, rests of every size, and what is taken one by one, against the torch engine."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for batch in range(41):
        work = draw_work(shape._replace(b=batch), dtype, form)
        x, packed, grad = (t.double() for t in (work.x, work.packed, work.grad))
        got = work.run()
        # Where fp32 and fp64 disagree on a sign, a gradient would be another; there are no such outputs here.
        out = torch_engine.interact(x, packed, work.mask, work.layout)
        grads = torch_engine.interact_backward(grad, x, packed, out, work.mask, work.layout, EVERYTHING)
        for name, ours, truth in zip(("out", "x", "weights"), got, (out, *grads), strict=True):
            assert ours is not None and truth is not None and ours.dtype == dtype
            scale = max(1.0, truth.abs().max().item() if truth.numel() else 0.0)
            worst = errors(ours, truth).maximum
            assert worst <= tolerance * scale, f"batch {batch}, {name}: {worst} of {scale}"


@pytest.mark.usefixtures("poisoned_memory", "general")
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_samples_do_not_see_their_neighbours(value: float, dtype: torch.dtype) -> None:
    """One spoilt sample, at any place of a group, leaves every bit of the others as it was."""
    work = draw_work(Shape(BATCH, 7, 10, 2), dtype, "(B,F,F)")
    out, d_x, _ = work.run()
    assert d_x is not None
    for sample in range(BATCH):
        spoilt = work._replace(x=work.x.clone(), grad=work.grad.clone())
        spoilt.x[sample] = value
        spoilt.grad[sample] = value
        got, got_d_x, _ = spoilt.run()
        others = torch.arange(BATCH) != sample
        assert got_d_x is not None
        assert torch.equal(got[others], out[others]), f"sample {sample} shows in the output of another"
        assert torch.equal(got_d_x[others], d_x[others]), f"sample {sample} shows in the gradient of another"


@pytest.mark.usefixtures("poisoned_memory", "general")
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("width", [16, 10, 1])
def test_layouts_move_no_bit(width: int, dtype: torch.dtype) -> None:
    """Strides and alignment of input, gradient and mask, with lanes that are full and with single samples."""
    shape = Shape(BATCH, 7, width, 2)
    dense = draw_work(shape, dtype, "(B,F,F)")
    assert dense.mask is not None
    for x_layout, lay_out in LAYOUTS.items():
        for grad_layout, lay_out_grad in GRAD_LAYOUTS.items():
            work = dense._replace(x=lay_out(dense.x), grad=lay_out_grad(dense.grad), mask=dense.mask.mT.clone().mT)
            copy = work._replace(x=work.x.contiguous(), grad=work.grad.contiguous(), mask=dense.mask)
            assert_same_bits(work.run(), copy.run(), f"x {x_layout}, gradient {grad_layout}")


@pytest.mark.usefixtures("poisoned_memory", "general")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("batch", [3, BATCH])
def test_halves_off_any_alignment(batch: int, dtype: torch.dtype) -> None:
    for layout in ("misaligned", "every_other_number", "piece_of_cat", "as_columns"):
        problems = [draw_problem(Shape(batch, 7, 16, 2), dtype) for _ in range(8)]
        problems = [q._replace(x=LAYOUTS[layout](q.x)) for q in problems]
        if layout == "misaligned":
            problems = [q._replace(p=InteractingParameters(*map(misaligned, q.p))) for q in problems]
        assert_rule(FORWARD, problems, lay_out=GRAD_LAYOUTS[layout])


@pytest.mark.usefixtures("poisoned_memory", "general")
@pytest.mark.parametrize("form", ["(F,)", "(F,F)", "(F,1)", "(1,1)", "(B,F,F)", "(B,1,F)", "(B,F,1)", "(B,1,1)"])
def test_masks_of_full_lanes(form: str) -> None:
    """The suite's masks are of few samples, which are taken one by one."""
    assert_rule(FORWARD, [draw_problem(Shape(BATCH, 7, 10, 2), torch.float64, draw_mask(form, BATCH, 7))])


# --- limits -------------------------------------------------------------------------------------------------------

F, E, H = native_engine.MAX_FIELDS, native_engine.MAX_WIDTH, native_engine.MAX_HEADS


def test_limits_are_those_promised() -> None:
    assert (F, E, H) == (512, 128, 16)


@pytest.mark.usefixtures("poisoned_memory", "general")
def test_the_largest_shape() -> None:
    mask = torch.rand(1, 1, F) < 0.1
    assert_rule(FORWARD, [draw_problem(Shape(1, F, E, H), torch.float32, mask)], maximum=False)


@pytest.mark.usefixtures("poisoned_memory", "general")
@pytest.mark.parametrize("shape", [Shape(9, F, 3, 1), Shape(9, 2, E, 1), Shape(9, 2, 3, H)], ids=str)
def test_each_limit_in_full_lanes(shape: Shape) -> None:
    assert_rule(FORWARD, [draw_problem(shape, torch.float64, draw_mask("(B,F,F)", shape.b, shape.f))])


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (Shape(1, F + 1, 16, 2), "513 fields, more than 512"),
        (Shape(1, 3, E + 1, 1), "width of 129, more than 128"),
        (Shape(1, 3, 4, H + 1), "17 heads, more than 16"),
    ],
    ids=str,
)
def test_beyond_the_limits(shape: Shape, reason: str) -> None:
    x = torch.randn(shape.b, shape.f, shape.e)
    layer = InteractingLayer(shape.h, shape.e)
    answer = why(layer, x)
    assert answer.choice == "torch" and len(answer.reasons["native"]) == 1 and reason in answer.reasons["native"][0]
    reference = InteractingLayer(shape.h, shape.e, backend="reference")
    reference.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), reference(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=f"backend='native'.*{reason}"):
        InteractingLayer(shape.h, shape.e, backend="native")(x)


def test_every_reason_is_named() -> None:
    x = torch.randn(1, F + 1, E + 1)
    assert len(why(InteractingLayer(H + 1, E + 1), x).reasons["native"]) == 3


# --- folding ------------------------------------------------------------------------------------------------------


def folded(engine: Any, problem: Problem, grad: Tensor) -> list[Tensor]:
    """The packed weights, and the gradients of the ten parameters."""
    layout = Layout(problem.n_head, problem.x.shape[2], problem.x.shape[2], problem.x.shape[2])
    return [engine.fold(problem.p, layout, 0.3), *engine.fold_backward(grad, problem.p, layout, 0.3, [True] * 10)]


class Elsewhere(Exception):
    """The torch engine was called."""


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise Elsewhere

    monkeypatch.setattr(native_engine, "torch_engine", type("Refusing", (), {"fold": refuse, "fold_backward": refuse}))


@pytest.mark.usefixtures("poisoned_memory", "general")
@pytest.mark.parametrize("width", [1, 3, 10, 16, 31, 32])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_the_library_folds(heads: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch)
    for dtype in (torch.float64, torch.float32):
        # Problems together: of few numbers, luck decides the largest error.
        problems = [draw_problem(Shape(1, 1, width, heads), dtype) for _ in range(1 if dtype == torch.float64 else 16)]
        numel = Layout(heads, width, width, width).numel
        grads = [torch.randn(numel, dtype=dtype) for _ in problems]
        ours, plain, truth = [], [], []
        for problem, grad in zip(problems, grads, strict=True):
            ours.append(folded(native_engine, problem, grad))
            plain.append(folded(torch_engine, problem, grad))
            truth.append(folded(torch_engine, problem.to(torch.float64), grad.double()))
        for i, name in enumerate(("packed", *NAMES)):
            got, usual, exact = (torch.stack([tensors[i] for tensors in runs]) for runs in (ours, plain, truth))
            if dtype == torch.float64:
                scale = max(1e-300, exact.abs().max().item())
                torch.testing.assert_close(got, exact, rtol=0, atol=1e-13 * scale, msg=name)
            else:
                assert_close_to_truth(name, got, usual, exact)


@pytest.mark.parametrize("what", ["width 33", "bf16", "negated parameter"])
def test_torch_folds_the_rest(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    width = 33 if what == "width 33" else 16
    problem = draw_problem(Shape(1, 1, width, 2), torch.bfloat16 if what == "bf16" else torch.float32)
    if what == "negated parameter":
        negated = torch.complex(torch.zeros_like(problem.p.b_r), -problem.p.b_r).conj().imag
        problem = problem._replace(p=problem.p._replace(b_r=negated))
    grad = torch.randn(Layout(2, width, width, width).numel)
    ours, expected = folded(native_engine, problem, grad), folded(torch_engine, problem, grad)
    for name, one, two in zip(("packed", *NAMES), ours, expected, strict=True):
        assert torch.equal(one, two), name
    forbid(monkeypatch)
    layout = Layout(2, width, width, width)
    with pytest.raises(Elsewhere):
        native_engine.fold(problem.p, layout, 0.3)
    with pytest.raises(Elsewhere):
        native_engine.fold_backward(grad, problem.p, layout, 0.3, [True] * 10)
