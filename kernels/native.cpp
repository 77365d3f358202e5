// The folded layer on CPUs, each sample in one pass: nothing of the size of the scores is ever in memory.
//
// A group of LANES samples is transposed on load, so that each lane of a vector is one sample. Then nothing is padded, the
// softmax needs no step across lanes, and every product is a block of accumulators in registers; the weights enter as
// scalars. What is left of a batch, and single requests, take the other layout: one sample, its rows in the lanes, its keys
// scalars; the same code serves both.
//
// With AUTOINT_F and the fields of a layout the shape is known to the compiler; without them one build serves every shape.
// Both add in the same order. AUTOINT_T is the dtype of x, out and their gradients: 0 float, 1 double, 2 bfloat16, 3 half.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#ifdef AUTOINT_PROFILE
#include <chrono>
#endif
#if (defined(__AVX512BF16__) && AUTOINT_T == 2) || (defined(__F16C__) && AUTOINT_T == 3)
// Compilers disagree on the builtins for bf16, and convert vectors of halves number by number.
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
// What several callers share: copies of it would only take time to compile.
#define SHARED __attribute__((noinline))

// Lanes of a and b by number.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Integers{__VA_ARGS__})
#endif

namespace {

using std::int64_t;

#if AUTOINT_T == 1
using Real = double;
using Integer = int64_t;
#else
using Real = float;
using Integer = std::int32_t;
#endif

#if AUTOINT_T < 2
using Element = Real;
#else
using Element = std::uint16_t;
#endif

constexpr int LANES = AUTOINT_LANE_BYTES / sizeof(Real);
typedef Real Vector __attribute__((vector_size(AUTOINT_LANE_BYTES)));
typedef Integer Integers __attribute__((vector_size(AUTOINT_LANE_BYTES)));

constexpr Real INF = std::numeric_limits<Real>::infinity();
constexpr Real LN2 = Real(0.693147180559945309417232121458), LOG2E = Real(1.44269504088896340735992468100);

// Accumulators of a product: ROWS x 4 of them, the operands of a step and a scalar fit the registers.
#if defined(__AVX512VL__) || defined(__aarch64__)
constexpr int ROWS = 6;
#else
constexpr int ROWS = 3;
#endif
constexpr int COLUMNS = 4;

// Fields, and a layout as in autoint_fast/weights.py: heads, embedding size, rank, output width, and what kind it is.
enum Output { MERGED, CONCATENATED, BARE };
enum Residual { NO_RESIDUAL, IDENTITY, PROJECTION };

#ifdef AUTOINT_F
struct Shape {
    static constexpr int64_t f = AUTOINT_F, h = AUTOINT_H, e = AUTOINT_E, d = AUTOINT_D, o = AUTOINT_O;
    static constexpr bool factored = AUTOINT_FACTORED, relu = AUTOINT_RELU;
    static constexpr int output = AUTOINT_OUTPUT, residual = AUTOINT_RESIDUAL;
    static constexpr int64_t head_out = output == MERGED ? o : o / h;
    explicit Shape(const int64_t*) {}
#else
struct Shape {
    int64_t f, h, e, d, o;
    bool factored, relu;
    int output, residual;
    int64_t head_out;
    explicit Shape(const int64_t* p)
        : f(p[0]), h(p[1]), e(p[2]), d(p[3]), o(p[4]), factored(p[5]), relu(p[8]), output(int(p[6])), residual(int(p[7])),
          head_out(output == MERGED ? o : o / h) {}
#endif

    // The first output column that head i gives to.
    int64_t column(int64_t i) const { return output == MERGED ? 0 : i * head_out; }
    // Where the keys, or values, of head i begin among those of all.
    int64_t keys(int64_t i) const { return factored ? i * f * d : 0; }
};

// --- a profile, in builds that ask for one ---------------------------------------------------------------------------

enum Phase { LOAD, PROJECT, SCORES, EXP, VALUES, GRADIENTS, STORE, PHASES };

#ifdef AUTOINT_PROFILE
std::uint64_t ticks[PHASES], last_tick;
// Attributes the time since the last mark to a phase. Not for several threads.
INLINE void mark(Phase phase) {
#if defined(__x86_64__)
    std::uint64_t now = __builtin_ia32_rdtsc();
#else
    std::uint64_t now = std::chrono::steady_clock::now().time_since_epoch().count();
#endif
    ticks[phase] += now - last_tick;
    last_tick = now;
}
#else
INLINE void mark(Phase) {}
#endif

// --- vectors ---------------------------------------------------------------------------------------------------------

INLINE Vector broadcast(Real value) { return value - Vector{}; }

INLINE Vector choose(Integers condition, Vector yes, Vector no) { return condition ? yes : no; }

#if defined(__AVX512F__) && AUTOINT_LANE_BYTES == 64
// x rounded to whole numbers, and x 2^exponent, zero where `below` is less than a bound.
#if AUTOINT_T == 1
INLINE Vector rounded(Vector x) { return __builtin_ia32_rndscalepd_mask(x, 0, x, -1, 4); }
INLINE Vector scaled(Vector x, Vector exponent, Vector below, Real bound) {
    return __builtin_ia32_scalefpd512_mask(x, exponent, Vector{}, __builtin_ia32_cmppd512_mask(below, broadcast(bound), 5, -1, 4), 4);
}
#else
INLINE Vector rounded(Vector x) { return __builtin_ia32_rndscaleps_mask(x, 0, x, -1, 4); }
INLINE Vector scaled(Vector x, Vector exponent, Vector below, Real bound) {
    return __builtin_ia32_scalefps512_mask(x, exponent, Vector{}, __builtin_ia32_cmpps512_mask(below, broadcast(bound), 5, -1, 4), 4);
}
#endif
#endif

// 2^x for x <= 0, within 2 ulp (1 where the CPU fuses products and sums); zero below the normal numbers, NaN for NaN.
INLINE Vector exp2(Vector x) {
#if AUTOINT_T == 1
    constexpr Real c[] = {0.6931471805599453, 0.24022650695910097, 0.0555041086648216, 0.009618129107606888,
        0.0013333558146416936, 0.0001540353044173605, 1.525273382983612e-05, 1.321544258792169e-06, 1.0178062445845774e-07,
        7.072585949269223e-09, 4.4549605981865186e-10};
    [[maybe_unused]] constexpr Real least = -1022, shift = 6755399441055744.0;
    [[maybe_unused]] constexpr int mantissa = 52;
#else
    constexpr Real c[] = {0.69314722539501108653f, 0.24022651084117293574f, 0.055502973141993247575f,
        0.0096180307825051537978f, 0.0013410000966100157069f, 0.00015469731977475548114f};
    [[maybe_unused]] constexpr Real least = -126, shift = 12582912.0f;
    [[maybe_unused]] constexpr int mantissa = 23;
#endif
    constexpr int degree = sizeof c / sizeof *c;
#if defined(__AVX512F__) && AUTOINT_LANE_BYTES == 64
    Vector whole = rounded(x);
#else
    // In its last bits x + shift is x rounded to a whole number, ready to be added to an exponent.
    Vector shifted = x + shift, whole = shifted - shift;
#endif
    Vector rest = x - whole;
    Vector sum = broadcast(c[degree - 1]);
#pragma GCC unroll 16
    for (int i = degree - 2; i >= 0; --i) sum = sum * rest + c[i];
    sum = sum * rest + Real(1);
#if defined(__AVX512F__) && AUTOINT_LANE_BYTES == 64
    return scaled(sum, whole, x, least);
#else
    // A product, as a NaN that is added to like a whole number may become a number.
    Vector power = (Vector)((Integers)broadcast(1) + ((Integers)shifted << mantissa));
    return choose(x < least, Vector{}, sum * power);
#endif
}

// v with lane i in the place of lane i ^ distance.
template <int distance, int... I>
INLINE Vector swapped(Vector v, std::integer_sequence<int, I...>) {
    return SHUFFLE(v, v, (I ^ distance)...);
}

// The sum of all lanes, in halves.
template <int half = LANES / 2>
INLINE Real total(Vector v) {
    Vector upper = swapped<half>(v, std::make_integer_sequence<int, LANES>{});
    v += upper;
    if constexpr (half > 1) return total<half / 2>(v);
    else return v[0];
}

template <int... I>
INLINE Vector interleave_low(Vector a, Vector b, std::integer_sequence<int, I...>) {
    return SHUFFLE(a, b, (I / 2 + I % 2 * LANES)...);
}

template <int... I>
INLINE Vector interleave_high(Vector a, Vector b, std::integer_sequence<int, I...>) {
    return SHUFFLE(a, b, (LANES / 2 + I / 2 + I % 2 * LANES)...);
}

INLINE void transpose(Vector (&v)[LANES]) {
    using Lanes = std::make_integer_sequence<int, LANES>;
#pragma GCC unroll 4
    for (int stage = 1; stage < LANES; stage *= 2) {
        Vector next[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES / 2; ++i) {
            next[2 * i] = interleave_low(v[i], v[i + LANES / 2], Lanes{});
            next[2 * i + 1] = interleave_high(v[i], v[i + LANES / 2], Lanes{});
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) v[i] = next[i];
    }
}

// --- elements of tensors ---------------------------------------------------------------------------------------------

#if AUTOINT_T == 2
typedef Element Elements __attribute__((vector_size(AUTOINT_LANE_BYTES / 2)));
INLINE Real to_real(Element t) {
    std::uint32_t bits = std::uint32_t(t) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
INLINE Element to_element(Real value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return Element((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#elif AUTOINT_T == 3
#if defined(__ARM_FP16_FORMAT_IEEE)
// GCC has _Float16 in C++ from 13 on only.
using Half = __fp16;
#else
using Half = _Float16;
#endif
INLINE Real to_real(Element t) {
    Half value;
    std::memcpy(&value, &t, 2);
    return Real(value);
}
INLINE Element to_element(Real value) {
    Half half = Half(value);
    Element t;
    std::memcpy(&t, &half, 2);
    return t;
}
#if defined(__AVX512F__) && AUTOINT_LANE_BYTES == 64
#define HALVES 1
INLINE Vector to_reals(__m256i halves) { return (Vector)_mm512_cvtph_ps(halves); }
INLINE __m256i to_halves(Vector v) { return _mm512_cvtps_ph((__m512)v, _MM_FROUND_CUR_DIRECTION); }
#elif defined(__F16C__) && AUTOINT_LANE_BYTES == 32
#define HALVES 1
INLINE Vector to_reals(__m128i halves) { return (Vector)_mm256_cvtph_ps(halves); }
INLINE __m128i to_halves(Vector v) { return _mm256_cvtps_ph((__m256)v, _MM_FROUND_CUR_DIRECTION); }
#endif
#else
INLINE Real to_real(Element t) { return t; }
#endif

INLINE Vector load(const Element* from) {
    Vector v;
#if AUTOINT_T < 2
    std::memcpy(&v, from, sizeof v);
#elif AUTOINT_T == 2
    Elements elements;
    std::memcpy(&elements, from, sizeof elements);
    v = (Vector)(__builtin_convertvector(elements, Integers) << 16);
#elif defined(HALVES)
    decltype(to_halves(v)) halves;
    std::memcpy(&halves, from, sizeof halves);
    v = to_reals(halves);
#else
    for (int i = 0; i < LANES; ++i) v[i] = to_real(from[i]);
#endif
    return v;
}

INLINE void store(Real* to, Vector v) { std::memcpy(to, &v, sizeof v); }
INLINE void store_one(Real* to, Real value) { *to = value; }
#if AUTOINT_T == 2
INLINE void store(Element* to, Vector v) {
    // As to_element, which compilers do not see in a vector.
    const Integers bits = (Integers)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Elements elements = __builtin_convertvector(v == v ? rounded : Integers{} + 0x7fc0, Elements);
    std::memcpy(to, &elements, sizeof elements);
}
#elif defined(HALVES)
INLINE void store(Element* to, Vector v) {
    const auto halves = to_halves(v);
    std::memcpy(to, &halves, sizeof halves);
}
#elif AUTOINT_T == 3
INLINE void store(Element* to, Vector v) {
    for (int i = 0; i < LANES; ++i) to[i] = to_element(v[i]);
}
#endif
#if AUTOINT_T >= 2
INLINE void store_one(Element* to, Real value) { *to = to_element(value); }
#endif

// A (B, F, N) tensor with any strides.
struct Tensor {
    const Element* data;
    int64_t sb, sf, se;

    // Whether the elements of a sample lie side by side.
    bool dense(int64_t n) const { return se == 1 && sf == n; }
};

// --- operands --------------------------------------------------------------------------------------------------------

template <class Left, class Right>
INLINE void multiply_add(Vector& sum, Left left, Right right) { sum += left * right; }

// What the products of the forward take. Where the CPU multiplies pairs, two bf16 numbers that follow each other in a sum
// take the place of one: each operand is rounded once, as in plain layers, and the sums are floats.
#if defined(__AVX512BF16__) && AUTOINT_T == 2 && AUTOINT_LANE_BYTES == 64
constexpr bool PAIRS = true;

struct Operand {
    Vector bits;
};

INLINE void multiply_add(Vector& sum, Operand left, Operand right) {
    sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left.bits, (__m512bh)right.bits);
}

// A scalar is then a pair by its bits.
INLINE void multiply_add(Vector& sum, Operand left, Real right) {
    Integer bits;
    std::memcpy(&bits, &right, sizeof bits);
    multiply_add(sum, left, Operand{(Vector)(Integers{} + bits)});
}

template <int... I>
INLINE Operand interleaved(__m512i v, std::integer_sequence<int, I...>) {
    typedef short Shorts __attribute__((vector_size(AUTOINT_LANE_BYTES)));
    return {(Vector)_mm512_permutexvar_epi16((__m512i)Shorts{(I / 2 + I % 2 * LANES)...}, v)};
}

INLINE Operand pair(Vector first, Vector second) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return interleaved((__m512i)both, std::make_integer_sequence<int, 2 * LANES>{});
}

INLINE Real pair(Real first, Real second) {
    const std::uint32_t bits = to_element(first) | std::uint32_t(to_element(second)) << 16;
    Real both;
    std::memcpy(&both, &bits, sizeof both);
    return both;
}

// Numbers [outer, n, inner] as operands of sums over n: [outer, steps(n), inner], at `to`, which may be `from`. An odd number
// goes with a zero.
template <class Number>
INLINE auto operands(const Number* from, int64_t outer, int64_t n, int64_t inner, Number* to) {
    auto* next = (decltype(pair(*from, *from))*)to;
    for (int64_t o = 0; o < outer; ++o, from += n * inner)
        for (int64_t k = 0; k < n; k += 2, next += inner) {
            const Number* row = from + k * inner;
            if (k + 1 < n)
                for (int64_t i = 0; i < inner; ++i) next[i] = pair(row[i], row[inner + i]);
            else
                for (int64_t i = 0; i < inner; ++i) next[i] = pair(row[i], Number{});
        }
    return (const std::remove_pointer_t<decltype(next)>*)to;
}
#else
constexpr bool PAIRS = false;
using Operand = Vector;

template <class Number>
INLINE const Number* operands(const Number* from, int64_t, int64_t, int64_t, Number*) { return from; }
#endif

// Operands in a sum of n products.
template <class Left>
constexpr int64_t steps(int64_t n) { return std::is_same_v<Left, Vector> ? n : (n + 1) / 2; }

// --- loops over blocks ------------------------------------------------------------------------------------------------

template <int N>
using Size = std::integral_constant<int, N>;

template <int N, class Body>
INLINE void dispatch(int64_t n, Body&& body) {
    if (n == N) body(Size<N>{});
    else if constexpr (N > 1) dispatch<N - 1>(n, body);
}

// body(size, first) for blocks of N, and one by one for the rest: smaller blocks hardly gain, and take time to compile.
template <int N, class Body>
INLINE void blocks(int64_t n, Body&& body) {
    int64_t i = 0;
    for (; i + N <= n; i += N) body(Size<N>{}, i);
    for (; i < n; ++i) body(Size<1>{}, i);
}

// body(size, first) for as few blocks of at most MOST as there can be, none much smaller than the others.
template <int MOST = ROWS, class Body>
INLINE void row_blocks(int64_t n, Body&& body) {
    int64_t count = (n + MOST - 1) / MOST, more = n % count, small = n / count;
    for (int64_t i = 0; i < count; ++i) {
        int64_t first = i * small + (i < more ? i : more);
        dispatch<MOST>(small + (i < more), [&](auto size) { body(size, first); });
    }
}

// sums[r][c] += left(r, k) right(k, c), summed over k in order. One of the two may be a scalar.
template <int R, int C, class Left, class Right>
INLINE void multiply(Vector (&sums)[R][C], int64_t n, Left left, Right right) {
#pragma GCC unroll 2
    for (int64_t k = 0; k < n; ++k) {
        decltype(left(0, k)) l[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) l[r] = left(r, k);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            auto w = right(k, c);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) multiply_add(sums[r][c], l[r], w);
        }
    }
}

// The same for many k in pieces, each a sum from zero, as the rounding of a sum grows with its length: give(piece, is_first,
// is_last).
template <int R, int C, class Left, class Right, class Give>
INLINE void multiply_long(int64_t n, Left left, Right right, Give give) {
    constexpr int64_t LONG = 32;
    for (int64_t first = 0; first < n; first += LONG) {
        Vector piece[R][C] = {};
        multiply(
            piece, n - first < LONG ? n - first : LONG, [&](int r, int64_t k) { return left(r, first + k); },
            [&](int64_t k, int c) { return right(first + k, c); });
        give(piece, first == 0, first + LONG >= n);
    }
}

template <int R, int C>
INLINE void write(const Vector (&block)[R][C], Vector* to, int64_t stride) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) to[r * stride + c] = block[r][c];
}

// to += block. Sums begin at zero and are added when complete, which rounds less than to go on from what is there.
template <int R, int C>
INLINE void add(const Vector (&block)[R][C], Vector* to, int64_t stride) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) to[r * stride + c] += block[r][c];
}

// --- a call ----------------------------------------------------------------------------------------------------------

struct Weights {
    const Real *a, *c, *k, *v, *m, *r, *b, *g, *end;  // as in autoint_fast/weights.py

    Weights(const Shape& s, const Real* packed)
        : a(packed), c(a + s.e * s.h * s.d), k(c + s.h * s.d), v(k + (s.factored ? s.e * s.h * s.d : 0)),
          m(v + (s.factored ? s.e * s.h * s.d : 0)), r(m + (s.output == BARE ? 0 : s.h * s.d * s.head_out)),
          b(r + (s.residual == PROJECTION ? s.e * s.o : 0)), g(b + s.o), end(g + s.o) {}

    static int64_t size(const Shape& s) {
        Weights w(s, nullptr);
        return w.end - w.a;
    }
};

// The weights with their matrices as operands; `memory` is for as many numbers.
Weights weight_operands(const Shape& s, const Weights& w, Real* memory) {
    if (!PAIRS) return w;
    std::memcpy(memory, w.a, Weights::size(s) * sizeof(Real));
    auto pack = [&](const Real* part, int64_t n, int64_t width) { operands(part, 1, n, width, memory + (part - w.a)); };
    pack(w.a, s.e, s.h * s.d);
    if (s.factored) pack(w.k, s.e, s.h * s.d), pack(w.v, s.e, s.h * s.d);
    if (s.output != BARE)
        for (int64_t h = 0; h < s.h; ++h) pack(w.m + h * s.d * s.head_out, s.d, s.head_out);
    if (s.residual == PROJECTION) pack(w.r, s.e, s.o);
    return Weights(s, memory);
}

struct Mask {
    const std::uint8_t* data;  // null without a mask
    int64_t sb, sq, sk;

    bool hidden(int64_t sample, int64_t query, int64_t key) const { return data[sample * sb + query * sq + key * sk]; }
};

struct Forward {
    Shape s;
    Tensor x;
    Weights w;
    Mask mask;
    Element* out;
    int64_t batch;
};

// Memory of a thread, kept from call to call.
struct Arena {
    void* memory = nullptr;
    std::size_t size = 0;
    ~Arena() { std::free(memory); }

    void* reserve(std::size_t wanted) {
        if (wanted > size) {
            std::free(memory);
            size = (wanted + 4095) / 4096 * 4096;
            memory = std::aligned_alloc(4096, size);
            if (!memory) std::abort();
        }
        return memory;
    }
};

thread_local Arena arena;

// Hands out pieces of an arena.
struct Pieces {
    Vector* next;
    Vector* take(int64_t n) { return std::exchange(next, next + n); }
};

// --- samples in the lanes --------------------------------------------------------------------------------------------

// tile[i] = vectors of element i of `lanes` samples, zero in the lanes that are left; read(lane, i) gives LANES elements of a
// sample from i on, element(lane, i) one.
template <class Read, class Single>
INLINE void load_tile(Vector* tile, int64_t n, int64_t lanes, bool dense, Read read, Single element) {
    if (dense && n >= LANES) {
        for (int64_t i = 0; i < n; i += LANES) {
            int64_t from = i + LANES <= n ? i : n - LANES;
            Vector v[LANES];
#pragma GCC unroll 16
            for (int lane = 0; lane < LANES; ++lane) v[lane] = lane < lanes ? read(lane, from) : Vector{};
            transpose(v);
#pragma GCC unroll 16
            for (int j = 0; j < LANES; ++j) tile[from + j] = v[j];
        }
    } else {
        for (int64_t i = 0; i < n; ++i) {
            Vector v{};
            for (int64_t lane = 0; lane < lanes; ++lane) v[lane] = element(lane, i);
            tile[i] = v;
        }
    }
}

SHARED void load_samples(Vector* tile, const Tensor& t, int64_t fields, int64_t width, int64_t first, int64_t lanes) {
    const Element* data = t.data + first * t.sb;
    load_tile(
        tile, fields * width, lanes, t.dense(width),
        [=](int64_t lane, int64_t i) { return load(data + lane * t.sb + i); },
        [=](int64_t lane, int64_t i) { return to_real(data[lane * t.sb + i / width * t.sf + i % width * t.se]); });
}

// tile[0 .. n) to out[lane * stride + ...].
template <class Number>
SHARED void store_tile(const Vector* tile, int64_t n, int64_t lanes, Number* out, int64_t stride) {
    if (n >= LANES) {
        for (int64_t i = 0; i < n; i += LANES) {
            int64_t from = i + LANES <= n ? i : n - LANES;
            Vector v[LANES];
#pragma GCC unroll 16
            for (int j = 0; j < LANES; ++j) v[j] = tile[from + j];
            transpose(v);
#pragma GCC unroll 16
            for (int lane = 0; lane < LANES; ++lane)
                if (lane < lanes) store(out + lane * stride + from, v[lane]);
        }
    } else {
        for (int64_t i = 0; i < n; ++i)
            for (int64_t lane = 0; lane < lanes; ++lane) store_one(out + lane * stride + i, tile[i][lane]);
    }
}

// What the mask hides from a block of rows, a vector of conditions for each (row, key), and which rows see nothing.
struct Hidden {
    const Integers* table = nullptr;  // null without a mask
    int64_t stride = 0;               // 0: the same for every row
    Integers empty[ROWS];

    // at(row, key, lane) for every key; `each`: rows differ, `alike`: lanes do not.
    template <class At>
    void read(int64_t rows, int64_t keys, int64_t lanes, bool each, bool alike, Vector* memory, At at) {
        Integers* to = (Integers*)memory;
        table = to;
        stride = each ? keys : 0;
        for (int64_t r = 0; r < (each ? rows : 1); ++r) {
            Integers all = ~Integers{};
            for (int64_t t = 0; t < keys; ++t) {
                Integers hidden{};
                if (alike) hidden -= Integer(at(r, t, 0));
                else
                    for (int64_t lane = 0; lane < lanes; ++lane) hidden[lane] = -Integer(at(r, t, lane));
                *to++ = hidden;
                all &= hidden;
            }
            empty[r] = all;
        }
        for (int64_t r = 1; r < rows; ++r)
            if (!each) empty[r] = empty[0];
    }

    // Of rows [row, row + n) of the samples from `first` on, one in each lane.
    void read_samples(const Shape& s, const Mask& mask, int64_t first, int64_t lanes, int64_t row, int64_t n, Vector* memory) {
        read(n, s.f, lanes, mask.sq != 0, mask.sb == 0, memory,
             [&](int64_t r, int64_t t, int64_t lane) { return mask.hidden(first + lane, row + r, t); });
    }
};

constexpr Real ZEROS[128] = {};  // as many as MAX_WIDTH of native_engine.py

// to [R, N] = start [N] + rows [R, K] weights, the weight (k, n) at k * k_stride + n * n_stride; without a start, to [R, N] +=.
template <int R, class Row>
SHARED void project(const Row* rows, int64_t row_stride, int64_t K, const Real* weights, int64_t k_stride, int64_t n_stride,
                    Vector* to, int64_t to_stride, int64_t N, const Real* start = nullptr) {
    blocks<COLUMNS>(N, [&](auto size, int64_t n) {
        const Real* w = weights + n * n_stride;
        multiply_long<R, size()>(
            steps<Row>(K), [&](int r, int64_t k) { return rows[r * row_stride + k]; },
            [&](int64_t k, int c) { return w[k * k_stride + c * n_stride]; },
            [&](auto& piece, bool is_first, bool) {
                if (!start || !is_first) return add(piece, to + n, to_stride);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                    for (int c = 0; c < size; ++c) piece[r][c] += start[n + c];
                write(piece, to + n, to_stride);
            });
    });
}

// q = x a_h + c_h of a block of rows. [R, D]
template <int R, class Row>
INLINE void queries(const Shape& s, const Weights& w, const Row* x_rows, int64_t h, Vector* q) {
    project<R>(x_rows, steps<Row>(s.e), s.e, w.a + h * s.d, s.h * s.d, 1, q, s.d, s.d, w.c + h * s.d);
}

// The keys, or values, of head h of a block of rows. [R, D]
template <int R, class Row>
INLINE void head_rows(const Shape& s, const Real* weights, const Row* x_rows, int64_t h, Vector* to) {
    project<R>(x_rows, steps<Row>(s.e), s.e, weights + h * s.d, s.h * s.d, 1, to, s.d, s.d, ZEROS);
}

// p = 2^(q keys^T), not normalised, keys first [F, R], and the reciprocals of its sums: 0 for rows that see no key.
// Keys are vectors, or scalars that all lanes share.
template <int R, class Row, class Key>
SHARED void attend(const Shape& s, const Key* keys, const Row* q, const Hidden& hidden, Vector* p, Vector (&scale)[R]) {
    // In memory: the registers are for the sums.
    Vector (&top)[R] = scale;
    for (int r = 0; r < R; ++r) top[r] = broadcast(-INF);
    const int64_t depth = steps<Row>(s.d);
    blocks<COLUMNS>(s.f, [&](auto size, int64_t t) {
        Vector sums[R][size()] = {};
        multiply(
            sums, depth, [&](int r, int64_t k) { return q[r * depth + k]; },
            [&](int64_t k, int c) { return keys[(t + c) * depth + k]; });
        Vector* scores = p + t * R;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Vector highest = top[r];
#pragma GCC unroll 8
            for (int c = 0; c < size; ++c) {
                Vector score = sums[r][c];
                if (hidden.table) score = choose(hidden.table[r * hidden.stride + t + c], broadcast(-INF), score);
                highest = choose(score > highest, score, highest);
                scores[c * R + r] = score;
            }
            top[r] = highest;
        }
    });
    mark(SCORES);
    Vector sums[R] = {};
    for (int r = 0; r < R; ++r)
        if (hidden.table) top[r] = choose(hidden.empty[r], Vector{}, top[r]);
    blocks<COLUMNS>(s.f, [&](auto size, int64_t t) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Vector sum{};
            for (int c = 0; c < size; ++c) {
                Vector weight = exp2(p[(t + c) * R + r] - top[r]);
                p[(t + c) * R + r] = weight;
                sum += weight;
            }
            sums[r] += sum;
        }
    });
    for (int r = 0; r < R; ++r) {
        scale[r] = Real(1) / sums[r];
        if (hidden.table) scale[r] = choose(hidden.empty[r], Vector{}, scale[r]);
    }
    mark(EXP);
}

// The rows of p^T values, each times its scale. [R, D]
template <int R, class Row, class Key>
SHARED void weigh(const Shape& s, const Key* values, const Row* p, const Vector (&scale)[R], Vector* z) {
    blocks<COLUMNS>(s.d, [&](auto size, int64_t d) {
        multiply_long<R, size()>(
            steps<Row>(s.f), [&](int r, int64_t t) { return p[t * R + r]; },
            [&](int64_t t, int c) { return values[t * s.d + d + c]; },
            [&](auto& piece, bool is_first, bool is_last) {
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                    for (int c = 0; c < size; ++c) {
                        if (!is_first) piece[r][c] += z[r * s.d + d + c];
                        if (is_last) piece[r][c] *= scale[r];
                    }
                write(piece, z + d, s.d);
            });
    });
}

// A block of rows of the layer. y: [R, O]; keys and values of all heads [H, F, D], or those that all heads share [F, E].
template <int R, class Key>
void forward_rows(const Shape& s, const Weights& w, const Vector* x, const Operand* x_rows, const Key* keys,
                  const Key* values, const Hidden& hidden, Vector* y, Pieces pieces) {
    Vector *q = pieces.take(R * s.d), *z = pieces.take(R * s.d), *p = pieces.take(R * s.f);
    for (int r = 0; r < R; ++r)
        for (int64_t o = 0; o < s.o; ++o) {
            Vector g = broadcast(w.g[o]);
            y[r * s.o + o] = w.b[o] + (hidden.table ? choose(hidden.empty[r], Vector{}, g) : g);
        }
    if (s.residual == PROJECTION) project<R>(x_rows, steps<Operand>(s.e), s.e, w.r, s.o, 1, y, s.o, s.o);
    if (s.residual == IDENTITY)
        for (int64_t i = 0; i < R * s.o; ++i) y[i] += x[i];
    for (int64_t h = 0; h < s.h; ++h) {
        queries<R>(s, w, x_rows, h, q);
        mark(PROJECT);
        Vector scale[R];
        attend(s, keys + s.keys(h), operands(q, R, s.d, 1, q), hidden, p, scale);
        weigh(s, values + s.keys(h), operands(p, 1, s.f, R, p), scale, z);
        mark(VALUES);
        Vector* y_h = y + s.column(h);
        if (s.output == BARE)
            for (int r = 0; r < R; ++r)
                for (int64_t d = 0; d < s.d; ++d) y_h[r * s.o + d] += z[r * s.d + d];
        else
            project<R>(operands(z, R, s.d, 1, z), steps<Operand>(s.d), s.d, w.m + h * s.d * s.head_out, s.head_out, 1, y_h, s.o,
                       s.head_out);
        mark(PROJECT);
    }
    // NaN stays NaN.
    if (s.relu)
        for (int64_t i = 0; i < R * s.o; ++i) y[i] = choose(y[i] < Vector{}, Vector{}, y[i]);
}

// Vectors of the keys and values of a tile, all heads, where they are not x.
int64_t factor_vectors(const Shape& s) { return s.factored ? 2 * s.h * s.f * s.d : 0; }

// Every head's keys or values, each [outer, n, inner], as operands in place.
template <class Number>
INLINE auto head_operands(const Shape& s, Number* of, int64_t outer, int64_t n, int64_t inner) {
    for (int64_t h = 1; h < s.h; ++h) operands(of + s.keys(h), outer, n, inner, of + s.keys(h));
    return operands(of, outer, n, inner, of);
}

int64_t forward_vectors(const Shape& s) {
    return (PAIRS ? 3 : 1) * s.f * s.e + s.f + factor_vectors(s) + ROWS * (2 * s.d + s.o + 2 * s.f);
}

void forward_group(const Forward& call, int64_t first, int64_t lanes) {
    const Shape& s = call.s;
    Pieces pieces{(Vector*)arena.reserve(forward_vectors(s) * sizeof(Vector))};
    Vector *x = pieces.take(s.f * s.e), *y = pieces.take(ROWS * s.o), *masks = pieces.take(ROWS * s.f);
    load_samples(x, call.x, s.f, s.e, first, lanes);
    Hidden hidden;
    if (call.mask.data && call.mask.sq == 0) hidden.read_samples(s, call.mask, first, lanes, 0, ROWS, masks);
    mark(LOAD);
    const Operand *rows = operands(x, s.f, s.e, 1, pieces.take(PAIRS ? s.f * s.e : 0)), *keys = rows, *values;
    const int64_t row_size = steps<Operand>(s.e);
    if (s.factored) {
        Vector *k = pieces.take(s.h * s.f * s.d), *v = pieces.take(s.h * s.f * s.d);
        row_blocks(s.f, [&](auto size, int64_t row) {
            for (int64_t h = 0; h < s.h; ++h) {
                head_rows<size>(s, call.w.k, rows + row * row_size, h, k + s.keys(h) + row * s.d);
                head_rows<size>(s, call.w.v, rows + row * row_size, h, v + s.keys(h) + row * s.d);
            }
        });
        keys = head_operands(s, k, s.f, s.d, 1), values = head_operands(s, v, 1, s.f, s.d);
    } else values = operands(x, 1, s.f, s.e, pieces.take(PAIRS ? s.f * s.e : 0));
    row_blocks(s.f, [&](auto size, int64_t row) {
        if (call.mask.data && call.mask.sq != 0) hidden.read_samples(s, call.mask, first, lanes, row, size, masks);
        forward_rows<size>(s, call.w, x + row * s.e, rows + row * row_size, keys, values, hidden, y, pieces);
        store_tile(y, size * s.o, lanes, call.out + (first * s.f + row) * s.o, s.f * s.o);
        mark(STORE);
    });
}

// --- one sample, its rows in the lanes -------------------------------------------------------------------------------

// Vectors of rows at a time: enough to keep the arithmetic busy, as keys come as scalars.
constexpr int FEW_ROWS = 3;

constexpr int64_t vectors(int64_t n) { return (n + LANES - 1) / LANES; }

int64_t forward_one_vectors(const Shape& s) {
    return ROWS * ((PAIRS ? 2 : 1) * s.e + 3 * s.d + s.o + 2 * s.f) + (PAIRS ? 2 : 1) * vectors(s.f * s.e)
        + vectors(factor_vectors(s));
}

void forward_one(const Forward& call, int64_t sample) {
    const Shape& s = call.s;
    Pieces pieces{(Vector*)arena.reserve(forward_one_vectors(s) * sizeof(Vector))};
    Vector *x_rows = pieces.take(ROWS * s.e), *y = pieces.take(ROWS * s.o), *masks = pieces.take(ROWS * s.f);
    const Element* x = call.x.data + sample * call.x.sb;
    // Rows as if each were a sample of one field.
    const Tensor rows{x, call.x.sf, s.e, call.x.se};
    auto count = [&](int64_t first) { return s.f - first < LANES ? s.f - first : LANES; };
    Vector* memory = pieces.take(PAIRS ? ROWS * s.e : 0);
    auto load_rows = [&](int64_t n, int64_t block) {
        for (int64_t r = 0; r < n; ++r)
            load_samples(x_rows + r * s.e, rows, 1, s.e, (block + r) * LANES, count((block + r) * LANES));
        return operands(x_rows, n, s.e, 1, memory);
    };
    const Real *keys, *values;
    if (s.factored) {
        Real *k = (Real*)pieces.take(vectors(factor_vectors(s))), *v = k + s.h * s.f * s.d;
        row_blocks<FEW_ROWS>(vectors(s.f), [&](auto size, int64_t block) {
            const Operand* rows = load_rows(size, block);
            auto project_rows = [&](const Real* weights, Real* to) {
                Vector* projected = pieces.next;
                for (int64_t h = 0; h < s.h; ++h) {
                    head_rows<size>(s, weights, rows, h, projected);
                    for (int r = 0; r < size; ++r) {
                        const int64_t row = (block + r) * LANES;
                        store_tile(projected + r * s.d, s.d, count(row), to + s.keys(h) + row * s.d, s.d);
                    }
                }
            };
            project_rows(call.w.k, k);
            project_rows(call.w.v, v);
        });
        keys = head_operands(s, k, s.f, s.d, 1), values = head_operands(s, v, 1, s.f, s.d);
    } else if (std::is_same_v<Element, Real> && call.x.dense(s.e)) {
        keys = values = (const Real*)x;
    } else {
        Real* fields = (Real*)pieces.take(vectors(s.f * s.e));
        for (int64_t f = 0; f < s.f; ++f)
            for (int64_t e = 0; e < s.e; ++e) fields[f * s.e + e] = to_real(x[f * call.x.sf + e * call.x.se]);
        values = operands(fields, 1, s.f, s.e, (Real*)pieces.take(PAIRS ? vectors(s.f * s.e) : 0));
        keys = operands(fields, s.f, s.e, 1, fields);
    }
    row_blocks<FEW_ROWS>(vectors(s.f), [&](auto size, int64_t block) {
        const Operand* rows = load_rows(size, block);
        Hidden hidden;
        if (call.mask.data)
            hidden.read(size, s.f, LANES, call.mask.sq != 0, call.mask.sq == 0, masks,
                        [&](int64_t r, int64_t t, int64_t lane) {
                            const int64_t row = (block + r) * LANES + lane;
                            return row < s.f && call.mask.hidden(sample, row, t);
                        });
        mark(LOAD);
        forward_rows<size>(s, call.w, x_rows, rows, keys, values, hidden, y, pieces);
        for (int r = 0; r < size; ++r) {
            const int64_t row = (block + r) * LANES;
            store_tile(y + r * s.o, s.o, count(row), call.out + (sample * s.f + row) * s.o, s.o);
        }
        mark(STORE);
    });
}

// --- the backward, samples in the lanes ------------------------------------------------------------------------------

enum Need { INPUT = 1, SCORES_WEIGHTS = 2, VALUES_WEIGHTS = 4, RESIDUAL = 8, BIAS = 16 };

struct Backward {
    Shape s;
    Tensor x, grad;
    Weights w;
    Mask mask;
    const Element* out;
    Element* d_x;
    Real* partial;  // [chunks, size of the weights]
    int64_t batch, needs;
};

// to[M, N] += a^T b over all fields. a: [F, ...] from column 0 on, M of them used; b likewise.
INLINE void outer(int64_t fields, const Vector* a, int64_t m, int64_t a_stride, const Vector* b, int64_t n,
                  int64_t b_stride, Vector* to, int64_t stride) {
    blocks<COLUMNS>(m, [&](auto rows, int64_t i) {
        blocks<COLUMNS>(n, [&](auto columns, int64_t j) {
            multiply_long<rows(), columns()>(
                fields, [&](int r, int64_t f) { return a[f * a_stride + i + r]; },
                [&](int64_t f, int c) { return b[f * b_stride + j + c]; },
                [&](const auto& piece, bool, bool) { add(piece, to + i * stride + j, stride); });
        });
    });
}

// What a thread works with: tiles of a group of samples, and its sums of weight gradients, lane by lane. Keys and values,
// and their gradients, are those of a head, or x and d_x. Blocks of rows give to `recent` tiles, whose sums go on when they
// get long.
struct Tiles {
    Vector *x, *d_y, *d_x, *z, *d_q, *sums;
    Vector *keys, *values, *d_keys, *d_values, *recent_keys, *recent_values;
};

int64_t backward_vectors(const Shape& s) {
    return s.f * (3 * s.e + s.o + 1 + 2 * s.d + (s.factored ? 6 * s.d : 0)) + Weights::size(s) + ROWS * (2 * s.d + 3 * s.f);
}

// to[i] += the sum of column i of a matrix.
INLINE void add_rows(const Vector* from, int64_t rows, int64_t width, Vector* to) {
    for (int64_t i = 0; i < width; ++i) {
        Vector total{};
        blocks<8>(rows, [&](auto size, int64_t first) {
            Vector sum{};
            for (int r = 0; r < size; ++r) sum += from[(first + r) * width + i];
            total += sum;
        });
        to[i] += total;
    }
}

// to [F, D] += p^T rows [R, D], and where there are two, that of both.
template <int R>
INLINE void give(const Shape& s, Vector* to, const Vector* p, const Vector* rows, const Vector* also_p = nullptr,
                 const Vector* also_rows = nullptr) {
    blocks<COLUMNS>(s.f, [&](auto keys, int64_t t) {
        blocks<COLUMNS>(s.d, [&](auto columns, int64_t d) {
            Vector sums[keys()][columns()] = {};
            multiply(
                sums, R, [&](int i, int64_t r) { return p[(t + i) * R + r]; },
                [&](int64_t r, int c) { return rows[r * s.d + d + c]; });
            if (also_p)
                multiply(
                    sums, R, [&](int i, int64_t r) { return also_p[(t + i) * R + r]; },
                    [&](int64_t r, int c) { return also_rows[r * s.d + d + c]; });
            add(sums, to + t * s.d + d, s.d);
        });
    });
}

template <int R>
void backward_rows(const Backward& call, int64_t first, int64_t lanes, int64_t row, int64_t h, const Tiles& tiles,
                   Hidden& hidden, Pieces pieces) {
    const Shape& s = call.s;
    const Weights& w = call.w;
    const Vector *x_rows = tiles.x + row * s.e, *d_y = tiles.d_y + row * s.o + s.column(h);
    const bool scores = call.needs & (INPUT | SCORES_WEIGHTS);
    const bool values = call.needs & INPUT || (s.factored && call.needs & VALUES_WEIGHTS);
    if (call.mask.data && call.mask.sq != 0)
        hidden.read_samples(s, call.mask, first, lanes, row, R, pieces.take(R * s.f));
    Vector *q = pieces.take(R * s.d), *d_z = pieces.take(R * s.d);
    Vector *p = pieces.take(R * s.f), *d_s = pieces.take(R * s.f), *d_q = tiles.d_q + row * s.d;
    Vector scale[R];
    queries<R>(s, w, x_rows, h, q);
    mark(PROJECT);
    attend(s, tiles.keys, q, hidden, p, scale);
    if (call.needs & VALUES_WEIGHTS && s.output != BARE) weigh(s, tiles.values, p, scale, tiles.z + row * s.d);
    mark(VALUES);
    if (!scores && !values) return;
    // p is not normalised, so dz is scaled instead; dP and delta follow.
    if (s.output == BARE)
        for (int r = 0; r < R; ++r)
            for (int64_t d = 0; d < s.d; ++d) d_z[r * s.d + d] = d_y[r * s.o + d];
    else project<R>(d_y, s.o, s.head_out, w.m + h * s.d * s.head_out, 1, s.head_out, d_z, s.d, s.d, ZEROS);
    for (int r = 0; r < R; ++r)
        for (int64_t d = 0; d < s.d; ++d) d_z[r * s.d + d] *= scale[r];
    if (scores) {
        Vector delta[R] = {};
        blocks<COLUMNS>(s.f, [&](auto size, int64_t t) {
            Vector sums[R][size()] = {};
            multiply(
                sums, s.d, [&](int r, int64_t k) { return d_z[r * s.d + k]; },
                [&](int64_t k, int c) { return tiles.values[(t + c) * s.d + k]; });
            for (int r = 0; r < R; ++r) {
                Vector sum{};
                for (int c = 0; c < size; ++c) {
                    d_s[(t + c) * R + r] = sums[r][c];
                    sum += p[(t + c) * R + r] * sums[r][c];
                }
                delta[r] += sum;
            }
        });
        for (int r = 0; r < R; ++r) {
            delta[r] *= scale[r];
            // Or some builds fuse this with the subtraction below, and others, which then round otherwise, do not.
            asm("" : "+m"(delta[r]));
        }
        for (int64_t t = 0; t < s.f; ++t)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) d_s[t * R + r] = p[t * R + r] * ((d_s[t * R + r] - delta[r]) * LN2);
        Vector one[R];
        for (int r = 0; r < R; ++r) one[r] = broadcast(1);
        weigh(s, tiles.keys, d_s, one, d_q);
        if (call.needs & INPUT)
            project<R>(d_q, s.d, s.d, w.a + h * s.d, 1, s.h * s.d, tiles.d_x + row * s.e, s.e, s.e);
    }
    if (!s.factored) {
        if (values) give<R>(s, tiles.recent_keys, p, d_z, d_s, q);
    } else {
        if (scores) give<R>(s, tiles.recent_keys, d_s, q);
        if (values) give<R>(s, tiles.recent_values, p, d_z);
    }
    mark(GRADIENTS);
}

// What the gradients of a head's keys or values give to those of its projection and of x.
void pass_to_projection(const Backward& call, const Tiles& tiles, const Real* weights, const Vector* gradients, bool needed,
                        Vector* sums, int64_t h) {
    const Shape& s = call.s;
    if (needed) outer(s.f, tiles.x, s.e, s.e, gradients, s.d, s.d, sums + h * s.d, s.h * s.d);
    if (call.needs & INPUT)
        row_blocks(s.f, [&](auto size, int64_t row) {
            project<size>(gradients + row * s.d, s.d, s.d, weights + h * s.d, 1, s.h * s.d, tiles.d_x + row * s.e, s.e, s.e);
        });
}

void backward_group(const Backward& call, int64_t first, int64_t lanes, const Tiles& tiles, Pieces pieces) {
    const Shape& s = call.s;
    const Weights& w = call.w;
    load_samples(tiles.x, call.x, s.f, s.e, first, lanes);
    const Element *grad = call.grad.data + first * call.grad.sb, *out = call.out + first * s.f * s.o;
    const int64_t out_stride = s.f * s.o;
    if (s.relu)
        // As in torch's relu, a NaN output lets its gradient pass.
        load_tile(
            tiles.d_y, s.f * s.o, lanes, call.grad.dense(s.o),
            [&](int64_t lane, int64_t i) {
                return choose(load(out + lane * out_stride + i) <= Vector{}, Vector{}, load(grad + lane * call.grad.sb + i));
            },
            [&](int64_t lane, int64_t i) {
                bool passed = !(to_real(out[lane * out_stride + i]) <= 0);
                int64_t at = lane * call.grad.sb + i / s.o * call.grad.sf + i % s.o * call.grad.se;
                return passed ? to_real(grad[at]) : Real(0);
            });
    else load_samples(tiles.d_y, call.grad, s.f, s.o, first, lanes);
    Hidden hidden;
    if (call.mask.data && call.mask.sq == 0) hidden.read_samples(s, call.mask, first, lanes, 0, ROWS, pieces.take(s.f));
    Weights at(s, nullptr);
    auto sums_of = [&](const Real* part) { return tiles.sums + (part - at.a); };
    mark(LOAD);
    if (call.needs & BIAS) {
        Vector *d_b = sums_of(at.b), *d_g = sums_of(at.g);
        add_rows(tiles.d_y, s.f, s.o, d_b);
        if (call.mask.data)
            row_blocks(s.f, [&](auto size, int64_t row) {
                Pieces rest = pieces;
                if (call.mask.sq != 0) hidden.read_samples(s, call.mask, first, lanes, row, size, rest.take(size * s.f));
                for (int64_t o = 0; o < s.o; ++o) {
                    Vector sum{};
                    for (int r = 0; r < size; ++r)
                        sum += choose(hidden.empty[r], Vector{}, tiles.d_y[(row + r) * s.o + o]);
                    d_g[o] += sum;
                }
            });
    }
    if (call.needs & RESIDUAL && s.residual == PROJECTION)
        outer(s.f, tiles.x, s.e, s.e, tiles.d_y, s.o, s.o, sums_of(at.r), s.o);
    const int64_t size = s.f * s.d * sizeof(Vector);
    if (call.needs & INPUT) {
        if (s.residual == IDENTITY) std::memcpy((void*)tiles.d_x, (const void*)tiles.d_y, s.f * s.e * sizeof(Vector));
        else std::memset((void*)tiles.d_x, 0, s.f * s.e * sizeof(Vector));
        if (s.residual == PROJECTION)
            row_blocks(s.f, [&](auto size, int64_t row) {
                project<size>(tiles.d_y + row * s.o, s.o, s.o, w.r, 1, s.o, tiles.d_x + row * s.e, s.e, s.e);
            });
    }
    mark(PROJECT);
    constexpr int LONG = 8;
    int recent = 0;
    auto pass_on = [&] {
        for (int64_t i = 0; recent && i < s.f * s.d; ++i) {
            tiles.d_keys[i] += std::exchange(tiles.recent_keys[i], Vector{});
            if (s.factored) tiles.d_values[i] += std::exchange(tiles.recent_values[i], Vector{});
        }
        recent = 0;
    };
    std::memset((void*)tiles.recent_keys, 0, size);
    if (s.factored) std::memset((void*)tiles.recent_values, 0, size);
    if (call.needs & (INPUT | SCORES_WEIGHTS | VALUES_WEIGHTS))
        for (int64_t h = 0; h < s.h; ++h) {
            if (s.factored) {
                row_blocks(s.f, [&](auto size, int64_t row) {
                    head_rows<size>(s, w.k, tiles.x + row * s.e, h, tiles.keys + row * s.d);
                    head_rows<size>(s, w.v, tiles.x + row * s.e, h, tiles.values + row * s.d);
                });
                std::memset((void*)tiles.d_keys, 0, size);
                std::memset((void*)tiles.d_values, 0, size);
            }
            row_blocks(s.f, [&](auto size, int64_t row) {
                backward_rows<size>(call, first, lanes, row, h, tiles, hidden, pieces);
                if ((call.needs & INPUT || s.factored) && ++recent == LONG) pass_on();
            });
            if (call.needs & VALUES_WEIGHTS && s.output != BARE)
                outer(s.f, tiles.z, s.d, s.d, tiles.d_y + s.column(h), s.head_out, s.o,
                      sums_of(at.m) + h * s.d * s.head_out, s.head_out);
            if (call.needs & SCORES_WEIGHTS) {
                outer(s.f, tiles.x, s.e, s.e, tiles.d_q, s.d, s.d, sums_of(at.a) + h * s.d, s.h * s.d);
                add_rows(tiles.d_q, s.f, s.d, sums_of(at.c) + h * s.d);
            }
            if (s.factored) {
                pass_on();
                if (call.needs & (INPUT | SCORES_WEIGHTS))
                    pass_to_projection(call, tiles, w.k, tiles.d_keys, call.needs & SCORES_WEIGHTS, sums_of(at.k), h);
                if (call.needs & (INPUT | VALUES_WEIGHTS))
                    pass_to_projection(call, tiles, w.v, tiles.d_values, call.needs & VALUES_WEIGHTS, sums_of(at.v), h);
            }
            mark(PROJECT);
        }
    if (call.needs & INPUT) {
        pass_on();
        store_tile(tiles.d_x, s.f * s.e, lanes, call.d_x + first * s.f * s.e, s.f * s.e);
    }
    mark(STORE);
}

// The groups of a chunk one after the other, and its sums into a row of `partial`.
void backward_chunk(const Backward& call, int64_t chunk, int64_t groups_per_chunk) {
    const Shape& s = call.s;
    Pieces pieces{(Vector*)arena.reserve(backward_vectors(s) * sizeof(Vector))};
    Tiles tiles;
    tiles.x = pieces.take(s.f * s.e), tiles.d_y = pieces.take(s.f * s.o), tiles.d_x = pieces.take(s.f * s.e);
    tiles.recent_keys = pieces.take(s.f * s.d);
    tiles.z = pieces.take(s.f * s.d), tiles.d_q = pieces.take(s.f * s.d), tiles.sums = pieces.take(Weights::size(s));
    if (s.factored) {
        tiles.keys = pieces.take(s.f * s.d), tiles.values = pieces.take(s.f * s.d);
        tiles.d_keys = pieces.take(s.f * s.d), tiles.d_values = pieces.take(s.f * s.d);
        tiles.recent_values = pieces.take(s.f * s.d);
    } else {
        tiles.keys = tiles.values = tiles.x, tiles.d_keys = tiles.d_values = tiles.d_x;
        tiles.recent_values = tiles.recent_keys;
    }
    std::memset((void*)tiles.sums, 0, Weights::size(s) * sizeof(Vector));
    const int64_t begin = chunk * groups_per_chunk * LANES;
    for (int64_t first = begin; first < call.batch && first < begin + groups_per_chunk * LANES; first += LANES)
        backward_group(call, first, call.batch - first < LANES ? call.batch - first : LANES, tiles, pieces);
    for (int64_t i = 0; i < Weights::size(s); ++i) call.partial[chunk * Weights::size(s) + i] = total(tiles.sums[i]);
}

// --- folding, for parameters in the dtype of the folded weights -------------------------------------------------------

struct Matrix {
    const Real* data;
    int64_t row, column;  // strides

    Matrix transposed() const { return {data, column, row}; }
    Matrix from_row(int64_t i) const { return {data + i * row, row, column}; }
    Matrix from_column(int64_t i) const { return {data + i * column, row, column}; }
};

// to [M, N] (+)= scale a^T b. a: [K, M], b: [K, N].
void product(int64_t K, int64_t M, int64_t N, Matrix a, Matrix b, Real scale, Real* to, int64_t to_row, bool more = false) {
    Vector* panel = (Vector*)arena.reserve(K * sizeof(Vector));
    for (int64_t n = 0; n < N; n += LANES) {
        const int64_t width = N - n < LANES ? N - n : LANES;
        for (int64_t k = 0; k < K; ++k) {
            const Real* row = b.data + k * b.row + n * b.column;
            Vector v{};
            if (b.column == 1 && width == LANES) std::memcpy(&v, row, sizeof v);
            else
                for (int64_t i = 0; i < width; ++i) v[i] = row[i * b.column];
            panel[k] = v * scale;
        }
        blocks<COLUMNS>(M, [&](auto size, int64_t m) {
            Vector sums[size()][1] = {};
            multiply(
                sums, K, [&](int r, int64_t k) { return a.data[k * a.row + (m + r) * a.column]; },
                [&](int64_t k, int) { return panel[k]; });
            for (int r = 0; r < size; ++r) {
                Real* row = to + (m + r) * to_row + n;
                for (int64_t i = 0; i < width; ++i) row[i] = more ? row[i] + sums[r][0][i] : sums[r][0][i];
            }
        });
    }
}

// to [M, N] = scale from
void copy(int64_t M, int64_t N, Matrix from, Real scale, Real* to, int64_t to_row) {
    for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < N; ++n) to[m * to_row + n] = scale * from.data[m * from.row + n * from.column];
}

// to [N] = scale from, or zeros from nothing.
void copy(int64_t N, const Real* from, Real scale, Real* to) {
    for (int64_t n = 0; n < N; ++n) to[n] = from ? scale * from[n] : Real(0);
}

// The parameters as they come from Python: addresses, 0 where there is none, and strides of the matrices.
struct Parameters {
    int64_t width;  // of a head
    Real scale;
    Matrix q, k, v, o, r;
    const Real *b_q, *b_v, *b_o, *b_r;

    // p: width, the bits of the scale as a double, w_q b_q w_k b_k w_v b_v w_o b_o w_r b_r, strides of the five matrices
    Parameters(const int64_t* p) : width(p[0]) {
        double given;
        std::memcpy(&given, p + 1, sizeof given);
        scale = Real(given * LOG2E);
        auto at = [&](int i) { return (const Real*)p[2 + i]; };
        auto matrix = [&](int i) { return Matrix{at(2 * i), p[12 + 2 * i], p[13 + 2 * i]}; };
        q = matrix(0), k = matrix(1), v = matrix(2), o = matrix(3), r = matrix(4);
        b_q = at(1), b_v = at(5), b_o = at(7), b_r = at(9);
    }
};

// --- threads ---------------------------------------------------------------------------------------------------------

// GCC's entry into OpenMP, which torch's own library for it provides: its threads are used, and no others started.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

template <class Body>
struct Team {
    const Body& body;
    int64_t n;
    std::atomic<int64_t> next{0};

    static void work(void* self) {
        Team& team = *(Team*)self;
        for (int64_t i; (i = team.next.fetch_add(1, std::memory_order_relaxed)) < team.n;) team.body(i);
    }
};

// body(i) for i < n, in any order.
template <class Body>
void for_each(int64_t n, Parallel parallel, int64_t threads, const Body& body) {
    threads = threads < n ? threads : n;
    Team<Body> team{body, n};
    if (threads > 1 && parallel) parallel(Team<Body>::work, &team, unsigned(threads), 0);
    else Team<Body>::work(&team);
}

}  // namespace

// --- what Python calls: one array of 64-bit numbers ------------------------------------------------------------------

#define EXPORT extern "C" __attribute__((visibility("default")))

// Up to so many samples at the end of a batch are taken one by one: a group costs what it costs when full.
constexpr int64_t FEW = LANES * 3 / 4;

// 0-8 F and the layout, 9 batch, 10 threads, 11 parallel, 12 x, 13-15 its strides, 16 weights, 17 mask, 18-20 its strides,
// 21 out
EXPORT void autoint_forward(const int64_t* p) {
    Shape s(p);
    static thread_local Arena pairs;
    Real* memory = (Real*)pairs.reserve(PAIRS ? Weights::size(s) * sizeof(Real) : 0);
    Forward call{s, {(const Element*)p[12], p[13], p[14], p[15]}, weight_operands(s, Weights(s, (const Real*)p[16]), memory),
                 {(const std::uint8_t*)p[17], p[18], p[19], p[20]}, (Element*)p[21], p[9]};
    const int64_t groups = (call.batch + LANES - 1) / LANES;
    for_each(groups, (Parallel)p[11], p[10], [&](int64_t group) {
        const int64_t first = group * LANES, samples = call.batch - first < LANES ? call.batch - first : LANES;
        if (samples > FEW) forward_group(call, first, samples);
        else
            for (int64_t i = 0; i < samples; ++i) forward_one(call, first + i);
    });
}

// As above (21 out: null without relu), then 22 grad, 23-25 its strides, 26 d_x, 27 d_weights, 28 needs, 29 groups per chunk
EXPORT void autoint_backward(const int64_t* p) {
    Shape s(p);
    const int64_t size = Weights::size(s), groups = (p[9] + LANES - 1) / LANES, per_chunk = p[29];
    const int64_t chunks = (groups + per_chunk - 1) / per_chunk;
    static thread_local Arena sums;
    Backward call{s, {(const Element*)p[12], p[13], p[14], p[15]}, {(const Element*)p[22], p[23], p[24], p[25]},
                  Weights(s, (const Real*)p[16]), {(const std::uint8_t*)p[17], p[18], p[19], p[20]},
                  (const Element*)p[21], (Element*)p[26], (Real*)sums.reserve(chunks * size * sizeof(Real)), p[9], p[28]};
    for_each(chunks, (Parallel)p[11], p[10], [&](int64_t chunk) { backward_chunk(call, chunk, per_chunk); });
    if (!(call.needs & ~INPUT)) return;
    Real* d_weights = (Real*)p[27];
    for (int64_t i = 0; i < size; ++i) {
        Real sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += call.partial[chunk * size + i];
        d_weights[i] = sum;
    }
    // Without a mask the two biases enter as one.
    if (!call.mask.data) std::memcpy(d_weights + size - s.o, d_weights + size - 2 * s.o, s.o * sizeof(Real));
}

#if AUTOINT_T < 2
// 0-8 F and the layout, 9-30 the parameters, 31 the weights
EXPORT void autoint_fold(const int64_t* p) {
    Shape s(p);
    const Parameters given(p + 9);
    const int64_t width = given.width;
    Weights w(s, (const Real*)p[31]);
    auto to = [](const Real* part) { return const_cast<Real*>(part); };
    for (int64_t h = 0; h < s.h; ++h) {
        const Matrix q = given.q.from_row(h * width), k = given.k.from_row(h * width), v = given.v.from_row(h * width);
        const Matrix o = given.o.from_column(h * width).transposed();
        const Real* b_q = given.b_q ? given.b_q + h * width : nullptr;
        Real *c = to(w.c) + h * s.d, *m = to(w.m) + h * s.d * s.head_out;
        if (s.factored) {
            copy(s.e, s.d, q.transposed(), given.scale, to(w.a) + h * s.d, s.h * s.d);
            copy(s.d, b_q, given.scale, c);
            copy(s.e, s.d, k.transposed(), 1, to(w.k) + h * s.d, s.h * s.d);
            copy(s.e, s.d, v.transposed(), 1, to(w.v) + h * s.d, s.h * s.d);
            if (s.output == MERGED) copy(s.d, s.o, o, 1, m, s.o);
        } else {
            product(width, s.e, s.e, q, k, given.scale, to(w.a) + h * s.e, s.h * s.e);
            if (b_q) product(width, 1, s.e, {b_q, 1, 0}, k, given.scale, c, s.e);
            else copy(s.e, nullptr, 0, c);
            if (s.output == MERGED) product(width, s.e, s.o, v, o, 1, m, s.o);
            if (s.output == CONCATENATED) copy(s.e, width, v.transposed(), 1, m, width);
        }
    }
    if (s.residual == PROJECTION) copy(s.e, s.o, given.r.transposed(), 1, to(w.r), s.o);
    copy(s.o, given.b_o, 1, to(w.b));
    for (int64_t i = 0; given.b_r && i < s.o; ++i) to(w.b)[i] += given.b_r[i];
    if (given.b_v && s.output == MERGED)
        product(s.h * width, 1, s.o, {given.b_v, 1, 0}, given.o.transposed(), 1, to(w.g), s.o);
    else copy(s.o, given.b_v, 1, to(w.g));
}

// As above up to 30, 31 the gradient of the weights, then those of w_q b_q w_k b_k w_v b_v w_o b_o w_r b_r, contiguous, 0
// where not wanted
EXPORT void autoint_unfold(const int64_t* p) {
    Shape s(p);
    const Parameters given(p + 9);
    const int64_t width = given.width, rows = s.h * width;
    Weights d(s, (const Real*)p[31]);
    auto to = [&](int i) { return (Real*)p[32 + i]; };
    for (int64_t h = 0; h < s.h; ++h) {
        const int64_t row = h * width;
        const Matrix q = given.q.from_row(row), k = given.k.from_row(row), v = given.v.from_row(row);
        const Matrix o = given.o.from_column(row).transposed();
        const Matrix d_a{d.a + h * s.d, s.h * s.d, 1}, d_m{d.m + h * s.d * s.head_out, s.head_out, 1};
        const Real *b_q = given.b_q + row, *d_c = d.c + h * s.d;
        auto head = [&](int i, int64_t step) { return to(i) + row * step; };
        if (s.factored) {
            if (to(0)) copy(width, s.e, d_a.transposed(), given.scale, head(0, s.e), s.e);
            if (to(1)) copy(width, d_c, given.scale, head(1, 1));
            if (to(2)) copy(width, s.e, Matrix{d.k + h * s.d, 1, s.h * s.d}, 1, head(2, s.e), s.e);
            if (to(4)) copy(width, s.e, Matrix{d.v + h * s.d, 1, s.h * s.d}, 1, head(4, s.e), s.e);
            if (to(6)) copy(s.o, width, d_m.transposed(), 1, to(6) + row, rows);
        } else {
            if (to(0)) product(s.e, width, s.e, k.transposed(), d_a.transposed(), given.scale, head(0, s.e), s.e);
            if (to(1)) product(s.e, 1, width, {d_c, 1, 0}, k.transposed(), given.scale, head(1, 1), width);
            if (to(2)) product(s.e, width, s.e, q.transposed(), d_a, given.scale, head(2, s.e), s.e);
            if (to(2) && given.b_q)
                product(1, width, s.e, {b_q, 0, 1}, {d_c, 0, 1}, given.scale, head(2, s.e), s.e, true);
            if (to(4) && s.output == MERGED) product(s.o, width, s.e, o.transposed(), d_m.transposed(), 1, head(4, s.e), s.e);
            if (to(4) && s.output == CONCATENATED) copy(width, s.e, d_m.transposed(), 1, head(4, s.e), s.e);
            if (to(6)) product(s.e, s.o, width, d_m, v.transposed(), 1, to(6) + row, rows);
        }
        if (to(6) && given.b_v) product(1, s.o, width, {d.g, 0, 1}, {given.b_v + row, 0, 1}, 1, to(6) + row, rows, true);
    }
    if (to(3)) copy(rows, nullptr, 0, to(3));
    if (to(5) && s.output == MERGED) product(s.o, 1, rows, {d.g, 1, 0}, given.o, 1, to(5), rows);
    if (to(5) && s.output != MERGED) copy(rows, d.g, 1, to(5));
    if (to(7)) copy(s.o, d.b, 1, to(7));
    if (to(8)) copy(s.o, s.e, Matrix{d.r, 1, s.o}, 1, to(8), s.e);
    if (to(9)) copy(s.o, d.b, 1, to(9));
}
#endif

// Whether n tensors hold the bytes of a copy, in which they lie side by side: n, the copy, n sizes in bytes, n addresses
EXPORT int autoint_same(const int64_t* p) {
    const int64_t n = p[0], *sizes = p + 2, *tensors = sizes + n;
    const char* copy = (const char*)p[1];
    for (int64_t i = 0; i < n; copy += sizes[i++])
        if (std::memcmp(copy, (const void*)tensors[i], sizes[i])) return 0;
    return 1;
}

// Samples in a vector.
EXPORT int64_t autoint_lanes() { return LANES; }

// to[i] = 2^from[i] for the tests.
EXPORT void autoint_exp2(const void* from, void* to, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        Vector v{};
        const int64_t count = n - i < LANES ? n - i : LANES;
        std::memcpy(&v, (const Real*)from + i, count * sizeof(Real));
        v = exp2(v);
        std::memcpy((Real*)to + i, &v, count * sizeof(Real));
    }
}

#ifdef AUTOINT_PROFILE
// The ticks of each phase since the last call. Time between two calls counts for the first phase of the second.
EXPORT void autoint_profile(std::uint64_t* to) {
    mark(LOAD);
    for (int i = 0; i < PHASES; ++i) to[i] = std::exchange(ticks[i], 0);
}
#endif
