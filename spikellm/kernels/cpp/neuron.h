// A few-spike neuron in the lanes of a vector register: the steps of encode.py's `respond`, for W inputs at once.
//
// Digits are -1, 0 and 1: a step adds or leaves out, and no product is rounded. The numbers are those of the plain form, to the last bit.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

constexpr int64_t PIECE = 4096;  // inputs that a thread takes at a time

template <class R> struct Vector;
template <> struct Vector<float> {
    typedef float V __attribute__((vector_size(BYTES)));
    typedef int32_t M __attribute__((vector_size(BYTES)));
    typedef int8_t B __attribute__((vector_size(BYTES / sizeof(float))));
};
template <> struct Vector<double> {
    typedef double V __attribute__((vector_size(BYTES)));
    typedef int64_t M __attribute__((vector_size(BYTES)));
    typedef int8_t B __attribute__((vector_size(BYTES / sizeof(double))));
};
template <class R> using V = typename Vector<R>::V;  // values
template <class R> using M = typename Vector<R>::M;  // integers of the same width; of a comparison -1 or 0
template <class R> using B = typename Vector<R>::B;  // as many bytes
template <class R> constexpr int W = BYTES / sizeof(R);

template <class X, class P> inline X load(const P* from) {
    X x;
    std::memcpy(&x, from, sizeof(X));
    return x;
}

template <class X, class P> inline void store(P* to, X x) { std::memcpy(to, &x, sizeof(X)); }

// The first n of W lanes; 0 in the others.
template <class X, class P> inline X load_some(const P* from, int64_t n) {
    X x = {};
    std::memcpy(&x, from, n * sizeof(P));
    return x;
}

template <class X, class P> inline void store_some(P* to, X x, int64_t n) { std::memcpy(to, &x, n * sizeof(P)); }

// N registers; register by register, for a copy of all of them would go through memory.
template <class R, int N> inline void load_all(V<R>* x, const R* from) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) x[n] = load<V<R>>(from + n * W<R>);
}

template <class R, int N> inline void store_all(R* to, const V<R>* x) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(to + n * W<R>, x[n]);
}

// Bytes to integers of the values' width and back: a loop, for __builtin_convertvector goes number by number (gcc 12).
template <class R> inline M<R> widened(B<R> bytes) {
    M<R> found;
    for (int i = 0; i < W<R>; i++) found[i] = bytes[i];
    return found;
}

template <class R> inline B<R> narrowed(M<R> wide) {
    B<R> found;
    for (int i = 0; i < W<R>; i++) found[i] = int8_t(wide[i]);
    return found;
}

template <class R> inline V<R> filled(R value) { return V<R>{} + value; }

// Whether any lane of a mask is set.
template <class R> inline bool some_lane(M<R> mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    typename Vector<double>::M halves = (typename Vector<double>::M)mask;
    int64_t any = 0;
    for (int i = 0; i < W<double>; i++) any |= halves[i];
    return any != 0;
#endif
}

// Half and half, not lane by lane, which would wait for every sum.
template <class R> inline R total(V<R> x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(R) == 4)
        return _mm512_reduce_add_ps((__m512)x);
    else
        return _mm512_reduce_add_pd((__m512d)x);
#else
    for (int half = W<R> / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
#endif
}

// What comes from Python: tables of C groups and P populations, see encode.py's `Rows` and `Digits`.
template <class R> struct Code {
    const R *theta, *h, *d, *v0, *cuts;
    int32_t groups, steps, sides, intervals, is_signed, max_spikes;  // max_spikes 0: no bound
    int32_t together;                                                // see rows.h
    int populations() const { return sides * intervals; }
};

// One group's rows for a register: the number of population p at a step in lane p, so that a lane finds its own by its owner's number.
template <class R> struct Table {
    std::vector<R> lanes;  // theta, h, d of each step, then v0; W numbers each
    std::vector<R> cuts;   // of each interval's lower end: one for each side
    int steps, sides, intervals, max_spikes;
    R silent = -1;  // nobody fires for |x| up to it; below 0: nobody knows

    Table() = default;

    Table(const Code<R>& code, int64_t group)
        : lanes((3 * code.steps + 1) * W<R>), cuts(2 * (code.intervals - 1)), steps(code.steps), sides(code.sides),
          intervals(code.intervals), max_spikes(code.max_spikes) {
        const int P = code.populations();
        for (int lane = 0; lane < W<R>; lane++) {
            const int64_t row = int64_t(lane < P ? lane : 0) * code.groups + group;
            for (int t = 0; t < steps; t++) {
                lanes[(3 * t + 0) * W<R> + lane] = code.theta[row * steps + t];
                lanes[(3 * t + 1) * W<R> + lane] = code.h[row * steps + t];
                lanes[(3 * t + 2) * W<R> + lane] = code.d[row * steps + t];
            }
            lanes[3 * steps * W<R> + lane] = code.v0[row];
        }
        for (int k = 0; k + 1 < intervals; k++)
            for (int side = 0; side < 2; side++)
                cuts[2 * k + side] = code.cuts[(int64_t(k) * sides + (side < sides ? side : 0)) * code.groups + group];
        silent = std::numeric_limits<R>::infinity();
        for (int p = 0; p < P; p++) {
            const int64_t row = int64_t(p) * code.groups + group;
            const R least = *std::min_element(code.theta + row * steps, code.theta + (row + 1) * steps), v0 = code.v0[row];
            const R slack = 8 * std::numeric_limits<R>::epsilon() * (std::abs(least) + std::abs(v0));  // of |x| + v0 as it is rounded
            silent = std::min(silent, code.is_signed && v0 < slack - least ? R(-1) : least - v0 - slack);
        }
    }
};

// Of a code without tables one that nobody reads.
template <class R> std::vector<Table<R>> tables_of(const Code<R>& code) {
    std::vector<Table<R>> tables;
    if (!code.theta) tables.emplace_back();
    for (int64_t group = 0; group < code.groups; group++) tables.emplace_back(code, group);
    return tables;
}

// Registers that are computed side by side: the next one's instructions fill the time that one waits for its own.
constexpr int U = 4;

// The number of each lane's own population.
template <class R> inline M<R> owner_of(const Table<R>& table, V<R> x, V<R> magnitude) {
    M<R> interval = {};
    const M<R> negative = x < 0;
    for (int k = 0; k + 1 < table.intervals; k++) {
        V<R> end = filled<R>(table.cuts[2 * k]);
        if (table.sides == 2) end = negative ? filled<R>(table.cuts[2 * k + 1]) : end;
        interval -= M<R>(magnitude > end);
    }
    return table.sides == 2 ? 2 * interval - negative : interval;
}

// Of the numbers of all populations, each lane's own.
template <class R, bool MANY> inline V<R> own(V<R> each, M<R> owner, [[maybe_unused]] int populations) {
    if (!MANY) return each;
#if defined(__AVX512F__)
    if constexpr (sizeof(R) == 4)
        return (V<R>)_mm512_permutexvar_ps((__m512i)owner, (__m512)each);
    else
        return (V<R>)_mm512_permutexvar_pd((__m512i)owner, (__m512d)each);
#else
    V<R> found = filled<R>(each[0]);
    for (int p = 1; p < populations; p++) found = owner == p ? filled<R>(each[p]) : found;
    return found;
#endif
}

// Kinds of digits are compiled apart.
template <bool SIGNED, bool BOUNDED, bool MANY> struct Kind {
    static constexpr bool is_signed = SIGNED, bounded = BOUNDED, many = MANY;
};

// N registers of inputs: |x|, and who codes it.
template <class R, int N> struct Inputs {
    V<R> magnitude[N];
    M<R> owner[N];

    template <bool MANY> static Inputs of(const Table<R>& table, const V<R>* x) {
        Inputs in;
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            in.magnitude[n] = x[n] < 0 ? -x[n] : x[n];
            in.owner[n] = MANY ? owner_of<R>(table, x[n], in.magnitude[n]) : M<R>{};
        }
        return in;
    }
};

// Fire for |x|: `step(t, n, up, down, d)` is told which lanes of register n send +1 and -1 (masks), and their output weights.
template <class R, class K, int N, class Step> inline void fire(const Table<R>& table, const Inputs<R, N>& in, Step step) {
    const int P = table.sides * table.intervals;
    const R* lanes = table.lanes.data();
    const V<R> start = load<V<R>>(lanes + 3 * table.steps * W<R>);
    V<R> v[N];
    M<R> fired[N] = {};
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) v[n] = in.magnitude[n] + own<R, K::many>(start, in.owner[n], P);
    for (int t = 0; t < table.steps; t++, lanes += 3 * W<R>) {
        const V<R> thetas = load<V<R>>(lanes), hs = load<V<R>>(lanes + W<R>), ds = load<V<R>>(lanes + 2 * W<R>);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            const V<R> theta = own<R, K::many>(thetas, in.owner[n], P), h = own<R, K::many>(hs, in.owner[n], P);
            M<R> up = v[n] > theta, down = {};
            if (K::is_signed) down = v[n] < -theta;
            if (K::bounded) {
                const M<R> awake = fired[n] < table.max_spikes;
                up &= awake, down &= awake;
                fired[n] -= up + down;
            }
            v[n] = up ? v[n] - h : v[n];
            if (K::is_signed) v[n] = down ? v[n] + h : v[n];
            step(t, n, up, down, own<R, K::many>(ds, in.owner[n], P));
        }
    }
}

// What the neurons make of N registers of inputs, in place.
template <class R, class K, int N> inline void encode(const Table<R>& table, V<R>* x) {
    V<R> y[N] = {};
    fire<R, K, N>(table, Inputs<R, N>::template of<K::many>(table, x), [&](int, int n, M<R> up, M<R> down, V<R> d) {
        y[n] = up ? y[n] + d : y[n];
        if (K::is_signed) y[n] = down ? y[n] - d : y[n];
    });
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        y[n] = x[n] < 0 ? -y[n] : y[n];
        x[n] = x[n] == 0 ? V<R>{} : y[n];  // an input of exactly 0 has no sign to send
    }
}

// Whether this file's arithmetic is the plain form's: a threshold below 0 would let a signed neuron send +1 and -1 in one step.
template <class R> inline bool served(const Code<R>& code) {
    if (code.populations() > W<R>) return false;
    if (!code.is_signed) return true;
    const int64_t numbers = int64_t(code.populations()) * code.groups * code.steps;
    for (int64_t i = 0; i < numbers; i++)
        if (code.theta[i] < 0) return false;
    return true;
}

// Call with the kind of digits that the code has.
template <class R, class Call> inline void with_kind(const Code<R>& code, Call call) {
    const bool many = code.populations() > 1;
    if (code.max_spikes) {
        if (many) code.is_signed ? call(Kind<true, true, true>{}) : call(Kind<false, true, true>{});
        else code.is_signed ? call(Kind<true, true, false>{}) : call(Kind<false, true, false>{});
    } else {
        if (many) code.is_signed ? call(Kind<true, false, true>{}) : call(Kind<false, false, true>{});
        else code.is_signed ? call(Kind<true, false, false>{}) : call(Kind<false, false, false>{});
    }
}
