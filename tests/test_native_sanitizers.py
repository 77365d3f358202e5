"""native.cpp under the compiler's sanitizers: a program that hands it memory of exactly the size that it may touch.

Tensors come with slack behind them, and the arena of a thread is rounded up to pages: in a Python process, a read
beyond the end of either would mostly go unnoticed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from autoint_fast.kernels import native_build, native_engine

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="libraries are built on Linux and macOS"),
    pytest.mark.skipif(native_build.compiler() is None, reason="there is no C++ compiler"),
]

# What the program puts in the place of the arena's memory: as much as was asked for, all of it NaN.
EXACT = {"(wanted + 4095) / 4096 * 4096": "wanted", "std::aligned_alloc(4096, size)": "exactly(size)"}

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <cstring>

static void* exactly(std::size_t size) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, size)) std::abort();
    std::memset(memory, 0xff, size);
    return memory;
}

#include "native.cpp"

#include <initializer_list>
#include <memory>
#include <thread>
#include <vector>

static void fail(const char* what) {
    std::printf("wrong: %s\n", what);
    std::fflush(stdout);
    std::abort();
}

static double draw() {
    static std::uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return double(state >> 11) / double(1ull << 52) - 1;
}

// n elements on the heap, all NaN, with nothing behind them; `skew` of them in front, to be off any alignment.
template <class T>
struct Exact {
    T* memory;
    T* data;
    int64_t n;
    explicit Exact(int64_t n, int64_t skew = 0)
        : memory((T*)std::malloc((n + skew) * sizeof(T))), data(memory + skew), n(n) {
        std::memset((void*)memory, 0xff, (n + skew) * sizeof(T));
    }
    Exact(const Exact&) = delete;
    ~Exact() { std::free(memory); }
};

static bool is_finite(Real value) { return value - value == 0; }

template <class T>
static bool same(const Exact<T>& a, const Exact<T>& b) {
    return a.n == b.n && !std::memcmp(a.data, b.data, a.n * sizeof(T));
}

static const char* const LAYOUTS[] = {"contiguous", "every other number", "transposed", "padded fields", "fields first",
                                      "one sample", "one number", "one field"};

// The strides of a (B, F, N) tensor.
static void lay_out(int layout, int64_t B, int64_t F, int64_t N, int64_t* strides) {
    const int64_t all[][3] = {{F * N, N, 1}, {2 * F * N, 2 * N, 2}, {F * N, 1, F}, {F * (N + 3), N + 3, 1},
                              {N, B * N, 1}, {0, N, 1},             {0, 0, 0},     {N, 0, 1}};
    std::memcpy(strides, all[layout], sizeof all[layout]);
}

// The same numbers contiguously and in a layout.
struct Both {
    Exact<Element> dense, strided;
    int64_t strides[3];

    static int64_t extent(int layout, int64_t B, int64_t F, int64_t N) {
        int64_t s[3];
        lay_out(layout, B, F, N, s);
        return (B - 1) * s[0] + (F - 1) * s[1] + (N - 1) * s[2] + 1;
    }

    Both(int layout, int64_t skew, int64_t B, int64_t F, int64_t N)
        : dense(B * F * N), strided(extent(layout, B, F, N), skew) {
        lay_out(layout, B, F, N, strides);
        for (int64_t b = 0; b < B; ++b)
            for (int64_t f = 0; f < F; ++f)
                for (int64_t n = 0; n < N; ++n)
                    store_one(strided.data + b * strides[0] + f * strides[1] + n * strides[2], Real(draw()));
        for (int64_t b = 0; b < B; ++b)
            for (int64_t f = 0; f < F; ++f)
                for (int64_t n = 0; n < N; ++n)
                    dense.data[(b * F + f) * N + n] = strided.data[b * strides[0] + f * strides[1] + n * strides[2]];
    }
};

// Runs a team in threads of its own. What they share, a sanitizer of threads sees.
static void in_threads(void (*work)(void*), void* self, unsigned n, unsigned) {
    std::vector<std::thread> threads;
    for (unsigned i = 1; i < n; ++i) threads.emplace_back(work, self);
    work(self);
    for (auto& thread : threads) thread.join();
}

// In a thread of its own, whose arena is as large as this call asks for.
static void call(void (*function)(const int64_t*), const std::vector<int64_t>& p) {
    std::unique_ptr<int64_t[]> exact(new int64_t[p.size()]);
    std::memcpy(exact.get(), p.data(), p.size() * sizeof(int64_t));
    std::thread(function, exact.get()).join();
}

struct Case {
    int64_t F, E, D, O, H, B;
    int factored, output, residual, relu, x_layout, grad_layout, mask, needs, skew, threads;

    // Where a shape begins.
    std::vector<int64_t> shape() const { return {F, H, E, D, O, factored, output, residual, relu}; }
};

// The kind of layout that is number `turn` of all there are, with heads of a width, and merged ones of O outputs.
static Case of_kind(int turn, int64_t F, int64_t E, int64_t width, int64_t O, int64_t H) {
    Case c{F, E, 0, 0, H, 0, turn % 2, 0, turn / 2 % 3, turn / 6 % 2, 0, 0, 0, 0, 0, 1};
    c.output = c.factored ? turn / 12 % 2 * BARE : turn / 12 % 3;
    c.D = c.factored ? width : E;
    c.O = c.output == MERGED ? O : c.output == BARE ? H * c.D : H * width;
    // x can only be added to what is as wide.
    if (c.residual == IDENTITY && c.output == MERGED) c.O = E;
    if (c.residual == IDENTITY && c.O != E) c.residual = PROJECTION;
    return c;
}

static void run(const Case& c) {
    std::printf("F=%d E=%d D=%d O=%d H=%d B=%d ", int(c.F), int(c.E), int(c.D), int(c.O), int(c.H), int(c.B));
    std::printf("factored %d output %d residual %d relu %d ", c.factored, c.output, c.residual, c.relu);
    std::printf("x: %s grad: %s mask %d needs %d skew %d threads %d\n", LAYOUTS[c.x_layout], LAYOUTS[c.grad_layout],
                c.mask, c.needs, c.skew, c.threads);
    std::fflush(stdout);
    const int64_t F = c.F, E = c.E, O = c.O, B = c.B, size = Weights::size(Shape(c.shape().data()));
    Both x(c.x_layout, c.skew, B, F, E), grad(c.grad_layout, c.skew, B, F, O);
    Exact<Real> weights(size, c.skew);
    for (int64_t i = 0; i < size; ++i) weights.data[i] = Real(draw());
    const int64_t mask_strides[][3] = {{0, 0, 0}, {F, 0, 1}, {0, F, 1}, {F * F, F, 1},
                                       {F, 1, 0}, {0, 0, 1}, {0, 0, 0}, {F * F, 1, F}};
    const int64_t* ms = mask_strides[c.mask];
    Exact<std::uint8_t> mask((B - 1) * ms[0] + (F - 1) * (ms[1] + ms[2]) + 1, c.skew);
    for (int64_t i = 0; i < mask.n; ++i) mask.data[i] = c.mask == 6 || draw() < 0 || i < F;
    Exact<Element> out(B * F * O, c.skew), other_out(B * F * O);
    Exact<Element> d_x(B * F * E, c.skew), other_d_x(B * F * E);
    Exact<Real> d_weights(size, c.skew), other_d_weights(size);
    for (bool dense : {false, true}) {
        const int64_t parallel = c.threads > 1 && !dense ? (int64_t)in_threads : 0;
        std::vector<int64_t> p = c.shape();
        for (int64_t n : {B, int64_t(c.threads), parallel}) p.push_back(n);
        const int64_t strides[] = {F * E, E, 1};
        p.push_back((int64_t)(dense ? x.dense.data : x.strided.data));
        for (int i = 0; i < 3; ++i) p.push_back(dense ? strides[i] : x.strides[i]);
        p.push_back((int64_t)weights.data);
        p.push_back(c.mask ? (int64_t)mask.data : 0);
        for (int i = 0; i < 3; ++i) p.push_back(ms[i]);
        Element* to = dense ? other_out.data : out.data;
        p.push_back((int64_t)to);
        call(autoint_forward, p);
        for (int64_t i = 0; i < B * F * O; ++i)
            if (!is_finite(to_real(to[i]))) fail("an output is not finite");
        if (!c.relu) p.back() = 0;
        const int64_t grad_strides[] = {F * O, O, 1};
        p.push_back((int64_t)(dense ? grad.dense.data : grad.strided.data));
        for (int i = 0; i < 3; ++i) p.push_back(dense ? grad_strides[i] : grad.strides[i]);
        p.push_back(c.needs & INPUT ? (int64_t)(dense ? other_d_x.data : d_x.data) : 0);
        p.push_back(c.needs & ~INPUT ? (int64_t)(dense ? other_d_weights.data : d_weights.data) : 0);
        p.push_back(c.needs);
        p.push_back(1 + c.skew);
        call(autoint_backward, p);
    }
    if (!same(out, other_out)) fail("the output depends on the layout or on the threads");
    if (!same(d_x, other_d_x)) fail("the gradient of x depends on the layout or on the threads");
    if (!same(d_weights, other_d_weights)) fail("the gradients of the weights depend on the layout or on the threads");
    for (int64_t i = 0; i < d_x.n && c.needs & INPUT; ++i)
        if (!is_finite(to_real(d_x.data[i]))) fail("a gradient of x is not finite");
    for (int64_t i = 0; i < size && c.needs & ~INPUT; ++i)
        if (!is_finite(d_weights.data[i])) fail("a gradient of the weights is not finite");
}

#if AUTOINT_T < 2
static void run_fold(const Case& c, int64_t width, bool biases, bool transposed, int64_t skew) {
    std::printf("fold E=%d D=%d O=%d H=%d ", int(c.E), int(c.D), int(c.O), int(c.H));
    std::printf("factored %d output %d residual %d ", c.factored, c.output, c.residual);
    std::printf("width %d biases %d transposed %d\n", int(width), biases, transposed);
    std::fflush(stdout);
    const int64_t size = Weights::size(Shape(c.shape().data())), rows = c.H * width;
    const bool values = c.factored || c.output != BARE, merged = c.output == MERGED;
    const bool residual = c.residual == PROJECTION;
    const int64_t shapes[][2] = {{rows, c.E}, {rows, 1}, {rows, c.E}, {rows, 1}, {rows, c.E},
                                 {rows, 1},   {c.O, rows}, {c.O, 1}, {c.O, c.E}, {c.O, 1}};
    const bool there[] = {true, biases, true, biases, values, values && biases, merged, merged && biases, residual,
                          residual && biases};
    std::vector<std::unique_ptr<Exact<Real>>> numbers, grads;
    std::vector<int64_t> p = c.shape(), same = {0, 0}, addresses, strides;
    int64_t all = 0, scale;
    const double half = 0.5;
    std::memcpy(&scale, &half, sizeof scale);
    p.push_back(width), p.push_back(scale);
    for (int i = 0; i < 10; ++i) {
        const int64_t n = there[i] ? shapes[i][0] * shapes[i][1] : 0;
        numbers.emplace_back(new Exact<Real>(n, skew));
        grads.emplace_back(new Exact<Real>(n, skew));
        for (int64_t j = 0; j < n; ++j) numbers.back()->data[j] = Real(draw());
        p.push_back(n ? (int64_t)numbers.back()->data : 0);
        if (i % 2 == 0) {
            strides.push_back(transposed ? 1 : shapes[i][1]);
            strides.push_back(transposed ? shapes[i][0] : 1);
        }
        if (n) same.push_back(n * sizeof(Real)), addresses.push_back((int64_t)numbers.back()->data);
        all += n;
    }
    Exact<Real> packed(size, skew), copied(all, skew);
    p.insert(p.end(), strides.begin(), strides.end());
    p.push_back((int64_t)packed.data);
    call(autoint_fold, p);
    for (int64_t i = 0; i < size; ++i)
        if (!is_finite(packed.data[i])) fail("a folded weight is not finite");
    for (int without = -1; without < 10; ++without) {
        std::vector<int64_t> q = p;
        for (int i = 0; i < 10; ++i) q.push_back(i == without || !there[i] ? 0 : (int64_t)grads[i]->data);
        call(autoint_unfold, q);
    }
    for (auto& grad : grads)
        for (int64_t n = 0; n < grad->n; ++n)
            if (!is_finite(grad->data[n])) fail("a gradient of a parameter is not finite");
    int64_t at = 0;
    for (auto& given : numbers) {
        std::memcpy(copied.data + at, given->data, given->n * sizeof(Real));
        at += given->n;
    }
    same[0] = addresses.size(), same[1] = (int64_t)copied.data;
    same.insert(same.end(), addresses.begin(), addresses.end());
    if (!autoint_same(same.data())) fail("a copy differs");
    for (int64_t i : {int64_t(0), all / 2, all - 1}) {
        const Real kept = copied.data[i];
        copied.data[i] += 1;
        if (autoint_same(same.data())) fail("a difference is not seen");
        copied.data[i] = kept;
    }
}
#endif

int main() {
    if (THREADS > 1) {
        for (int mask = 0; mask < 8; ++mask)
            for (int64_t B : {2, 17, 100}) {
                Case c = of_kind(mask + int(B), 7, 10, 7, 10, 2);
                c.B = B, c.mask = mask, c.needs = 31, c.skew = mask % 2, c.threads = THREADS;
                run(c);
            }
        return 0;
    }
    const int64_t batches[] = {1, 2, 9, 15, 16, 17, 33, 3};
    int turn = 0;
    for (int64_t F : {1, 2, 5, 7, 13, 39})
        for (int64_t E : {1, 3, 10, 16, 17})
            for (int64_t H : {1, 2, 3})
                for (int i = 0; i < (F < 39 ? 4 : 1); ++i, ++turn) {
                    const int64_t B = F < 39 ? batches[(2 * turn + turn / 4) % 8] : batches[turn % 8];
                    const int needs = turn % 3 ? 31 : turn / 3 % 32;
                    const int64_t O = turn % 11 ? E : E + 2, width = turn % 5 ? E / 2 + 1 : E + 3;
                    // Every third is the plain layer.
                    Case c = of_kind(turn % 3 ? turn / 3 * 5 + turn % 3 : 10, F, E, turn % 3 ? width : E, O, H);
                    c.B = B, c.x_layout = turn % 6, c.grad_layout = (turn + turn / 8) % 8;
                    c.mask = turn % 4 ? turn % 9 % 8 : 0, c.needs = needs ? needs : 31, c.skew = turn / 2 % 2;
                    run(c);
                }
#if AUTOINT_T < 2
    for (int64_t E : {1, 3, 10, 16, 32})
        for (int64_t H : {1, 3})
            for (int kind = 0; kind < 36; ++kind) {
                const int64_t width = kind % 4 ? E : E / 2 + 1;
                Case c = of_kind(kind, 1, E, width, H == 1 ? E : E + 1, H);
                run_fold(c, width, kind % 3, kind % 5 == 0, H == 3);
            }
#endif
    for (int64_t n = 1; n < 40; ++n) {
        Exact<Real> from(n, n % 2), to(n, n % 2);
        for (int64_t i = 0; i < n; ++i) from.data[i] = Real(-20 - 20 * draw());
        autoint_exp2(from.data, to.data, n);
        for (int64_t i = 0; i < n; ++i)
            if (!is_finite(to.data[i])) fail("a power of two is not finite");
    }
    std::puts("done");
}
"""


class Variant(NamedTuple):
    sanitizers: str
    isa: str
    lane_bytes: int
    dtype: int
    optimisation: str = "-O0"  # compiled in half of the time, and nothing is optimised away before it is looked at
    threads: int = 1
    compiler: tuple[str, ...] = ()  # by default the one that builds the engine

    def __str__(self) -> str:
        dtype = {number: str(dtype).removeprefix("torch.") for dtype, number in native_engine.DTYPES.items()}[
            self.dtype
        ]
        return f"{self.sanitizers}-{self.isa}-{self.lane_bytes}-{dtype}{self.optimisation}"

    def compile(self, folder: Path) -> Path:
        """The program; raises CalledProcessError, with what the compiler said, where it cannot be compiled."""
        folder.mkdir()
        source = native_build.SOURCE.read_text()
        for rounded, exact in EXACT.items():
            assert source.count(rounded) == 1, f"{rounded} is not in native.cpp: correct EXACT"
            source = source.replace(rounded, exact)
        (folder / "native.cpp").write_text(source)
        (folder / "main.cpp").write_text(PROGRAM)
        common = [flag for flag in native_build.COMMON_FLAGS if flag not in ("-O3", "-fPIC", "-shared")]
        macros = [f"-DAUTOINT_LANE_BYTES={self.lane_bytes}", f"-DAUTOINT_T={self.dtype}", f"-DTHREADS={self.threads}"]
        compile_with(
            [*common, *native_build.FLAGS[self.isa], *macros, self.optimisation, "-g1", "-w"],
            self.sanitizers,
            folder / "main.cpp",
            self.compiler,
        )
        return folder / "main"


def compile_with(flags: list[str], sanitizers: str, source: Path, compiler: tuple[str, ...] = ()) -> None:
    made_by = native_build.compiler()
    assert made_by is not None
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"] if sanitizers else []
    command = [*(compiler or made_by.command), *flags, *sanitize, "-pthread", str(source), "-o"]
    subprocess.run([*command, str(source.with_suffix(""))], check=True, capture_output=True, text=True)


def run(program: Path, through: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    command = [*through, str(program)]
    return subprocess.run(command, env={**os.environ, **options}, capture_output=True, text=True, timeout=600)


BEST = native_build.isas()[0]
MEMORY = "address,undefined"
USUAL = (
    Variant(MEMORY, BEST, native_engine.LANE_BYTES[BEST], 0),
    Variant(MEMORY, "plain", 16, 1),
    Variant(MEMORY, BEST, native_engine.LANE_BYTES[BEST], 2),
    Variant("thread", "plain", 16, 0, threads=3),
)
EVERY = tuple(
    Variant(MEMORY, isa, native_engine.LANE_BYTES[isa], dtype, "-O1")
    for isa in native_build.isas()
    for dtype in native_engine.DTYPES.values()
)


def require(sanitizers: str, folder: Path) -> None:
    """Skips where the compiler or the system lacks the sanitizers."""
    empty = folder / "empty.cpp"
    empty.write_text("int main() { return 0; }")
    try:
        compile_with([], sanitizers, empty)
        result = run(empty.with_suffix(""))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the compiler has no -fsanitize={sanitizers}: {error.stderr.strip()}")
    if result.returncode:
        pytest.skip(f"nothing runs here with -fsanitize={sanitizers}: {result.stderr.strip()}")


def check(program: Path, through: tuple[str, ...] = ()) -> None:
    result = run(program, through)
    last = result.stdout.splitlines()[-2:]
    assert result.returncode == 0, f"ended with {result.returncode} in {last}:\n{result.stderr[:6000]}"


@pytest.mark.parametrize("variant", USUAL, ids=str)
def test_odd_shapes(variant: Variant, tmp_path: Path) -> None:
    """Odd shapes, strides and masks, forward and backward: every access in bounds, all that is read was written."""
    require(variant.sanitizers, tmp_path)
    try:
        program = variant.compile(tmp_path / "program")
    except subprocess.CalledProcessError as error:
        pytest.fail(f"does not compile:\n{error.stderr[-6000:]}", pytrace=False)
    check(program)


@pytest.mark.slow
@pytest.mark.parametrize("variant", EVERY, ids=str)
def test_odd_shapes_optimised(variant: Variant, tmp_path: Path) -> None:
    """The same for every instruction set and dtype, with what the optimiser makes of it."""
    require(variant.sanitizers, tmp_path)
    check(variant.compile(tmp_path / "optimised"))


ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which(ARM_COMPILER) or not shutil.which(ARM_EMULATOR), reason=f"needs {ARM_COMPILER} and {ARM_EMULATOR}"
)
@pytest.mark.parametrize("dtype", native_engine.DTYPES.values(), ids=map(str, native_engine.DTYPES))
def test_odd_shapes_on_an_emulated_arm(dtype: int, tmp_path: Path) -> None:
    """The same in NEON, without sanitizers: nothing is read that was not written, nothing depends on strides."""
    variant = Variant("", "neon", 16, dtype, "-O1", compiler=(ARM_COMPILER, "-static"))
    check(variant.compile(tmp_path / "arm"), (ARM_EMULATOR,))
