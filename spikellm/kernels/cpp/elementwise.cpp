// encode, fire and count of encode.py in one pass over memory.

#include <type_traits>

#include "rows.h"

namespace {

// `each(table, run, start, end)` for pieces of runs of I inputs, which lie one behind the other; `together` of them in a row have a group's table.
template <class R, class Each> void over_runs(const Code<R>& code, int64_t runs, int64_t together, int64_t I, int threads, Each each) {
    const std::vector<Table<R>> tables = tables_of(code);
    const int64_t pieces = (I + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t job = 0; job < runs * pieces; job++) {
        const int64_t run = job / pieces, start = job % pieces * PIECE;
        each(tables[run / together % code.groups], run, start, start + PIECE < I ? start + PIECE : I);
    }
}

// What n inputs of one group send.
template <class R, class K> void encode_run(const Table<R>& table, const R* from, R* to, int64_t n) {
    V<R> some[U];
    int64_t i = 0;
    for (; i + U * W<R> <= n; i += U * W<R>) {
        load_all<R, U>(some, from + i);
        encode<R, K, U>(table, some);
        store_all<R, U>(to + i, some);
    }
    for (; i < n; i += W<R>) {
        const int64_t left = n - i < W<R> ? n - i : W<R>;
        some[0] = load_some<V<R>>(from + i, left);
        encode<R, K, 1>(table, some);
        store_some(to + i, some[0], left);
    }
}

template <class R> int encode_all(const R* x, R* y, int64_t A, int64_t C, int64_t I, const Code<R>& code, int threads) {
    if (!served(code)) return 1;
    const Coder<R> encode = coder_of(code);
    over_runs(code, A * C, 1, I, threads, [&](const Table<R>& table, int64_t run, int64_t start, int64_t end) {
        encode(table, x + run * I + start, y + run * I + start, end - start);
    });
    return 0;
}

// Spikes of every wire, [T P, A, C, I]: step by step, in each population by population.
template <class R> int spikes(const R* x, int8_t* z, int64_t A, int64_t C, int64_t I, const Code<R>& code, int threads) {
    if (!served(code)) return 1;
    with_kind(code, [&](auto kind) {
        using K = decltype(kind);
        const int P = code.populations();
        over_runs(code, A * C, 1, I, threads, [&](const Table<R>& table, int64_t run, int64_t start, int64_t end) {
            const auto send = [&](const V<R>* some, int64_t i, int64_t width, auto number) {
                constexpr int many = decltype(number)::value;
                const auto in = Inputs<R, many>::template of<K::many>(table, some);
                M<R> sign[many];
#pragma GCC unroll 4
                for (int n = 0; n < many; n++) sign[n] = M<R>(some[n] < 0) - M<R>(some[n] > 0);
                fire<R, K, many>(table, in, [&](int t, int n, M<R> up, M<R> down, V<R>) {
                    const M<R> negative = sign[n] < 0, sent = sign[n] == 0 ? M<R>{} : negative ? up - down : down - up;  // masks are -1
                    int8_t* to = z + (int64_t(t) * P * A * C + run) * I + i + n * W<R>;
                    for (int p = 0; p < P; p++, to += A * C * I) {
                        const M<R> own = !K::many ? sent : in.owner[n] == p ? sent : M<R>{};
                        many > 1 ? store(to, narrowed<R>(own)) : store_some(to, narrowed<R>(own), width);
                    }
                });
            };
            V<R> some[U];
            int64_t i = start;
            for (; i + U * W<R> <= end; i += U * W<R>) {
                load_all<R, U>(some, x + run * I + i);
                send(some, i, W<R>, std::integral_constant<int, U>{});
            }
            for (; i < end; i += W<R>) {
                const int64_t width = end - i < W<R> ? end - i : W<R>;
                some[0] = load_some<V<R>>(x + run * I + i, width);
                send(some, i, width, std::integral_constant<int, 1>{});
            }
        });
    });
    return 0;
}

// Spikes of all populations at every step, summed over the last axis: x [C, N, J] -> [T, C, N].
template <class R> int count(const R* x, int64_t* counts, int64_t C, int64_t N, int64_t J, const Code<R>& code, int threads) {
    if (!served(code)) return 1;
    std::memset(counts, 0, sizeof(int64_t) * code.steps * C * N);
    with_kind(code, [&](auto kind) {
        using K = decltype(kind);
        over_runs(code, C * N, N, J, threads, [&](const Table<R>& table, int64_t run, int64_t start, int64_t end) {
            std::vector<M<R>> sums(code.steps, M<R>{});
            const auto add = [&](V<R>* some, auto number) {
                constexpr int many = decltype(number)::value;
                M<R> awake[many];
                for (int n = 0; n < many; n++) awake[n] = (some[n] < 0) | (some[n] > 0);
                fire<R, K, many>(table, Inputs<R, many>::template of<K::many>(table, some),
                              [&](int t, int n, M<R> up, M<R> down, V<R>) { sums[t] -= (up | down) & awake[n]; });
            };
            V<R> some[U];
            int64_t i = start;
            for (; i + U * W<R> <= end; i += U * W<R>) {
                load_all<R, U>(some, x + run * J + i);
                add(some, std::integral_constant<int, U>{});
            }
            for (; i < end; i += W<R>) {
                some[0] = load_some<V<R>>(x + run * J + i, end - i < W<R> ? end - i : W<R>);
                add(some, std::integral_constant<int, 1>{});
            }
            for (int t = 0; t < code.steps; t++) {
                int64_t sum = 0;
                for (int lane = 0; lane < W<R>; lane++) sum += sums[t][lane];
#pragma omp atomic
                counts[int64_t(t) * C * N + run] += sum;
            }
        });
    });
    return 0;
}

}  // namespace

template <class R> Coder<R> coder_of(const Code<R>& code) {
    Coder<R> found = nullptr;
    with_kind(code, [&](auto kind) { found = encode_run<R, decltype(kind)>; });
    return found;
}
template Coder<float> coder_of(const Code<float>&);
template Coder<double> coder_of(const Code<double>&);

extern "C" {
int encode_f32(const float* x, float* y, int64_t A, int64_t C, int64_t I, const Code<float>* code, int threads) {
    return encode_all(x, y, A, C, I, *code, threads);
}
int encode_f64(const double* x, double* y, int64_t A, int64_t C, int64_t I, const Code<double>* code, int threads) {
    return encode_all(x, y, A, C, I, *code, threads);
}
int fire_f32(const float* x, int8_t* z, int64_t A, int64_t C, int64_t I, const Code<float>* code, int threads) {
    return spikes(x, z, A, C, I, *code, threads);
}
int fire_f64(const double* x, int8_t* z, int64_t A, int64_t C, int64_t I, const Code<double>* code, int threads) {
    return spikes(x, z, A, C, I, *code, threads);
}
int count_f32(const float* x, int64_t* counts, int64_t C, int64_t N, int64_t J, const Code<float>* code, int threads) {
    return count(x, counts, C, N, J, *code, threads);
}
int count_f64(const double* x, int64_t* counts, int64_t C, int64_t N, int64_t J, const Code<double>* code, int threads) {
    return count(x, counts, C, N, J, *code, threads);
}
}
