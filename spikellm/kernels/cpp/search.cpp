// What candidates of the search make of a density in points: points.py's `segment_sums`.

#include <type_traits>

#include "neuron.h"

namespace {

// Rows of N groups with M candidates each, of one population; x > 0.
template <class R> struct Candidates {
    const R *theta, *h, *d, *v0;
    int64_t N, M, T, Q, points;  // points of each of Q segments
    int32_t is_signed, max_spikes;
};

// N registers of points: the values y and the numbers of spikes. BELOW: a threshold is below 0, where a signed neuron sends +1 and -1 at
// once, that is nothing; elsewhere one comparison of |v| tells whether it fires, and the sign of v which way.
template <class R, bool SIGNED, bool BOUNDED, bool BELOW, int N>
inline void respond(const V<R>* x, R v0, const R* theta, const R* h, const R* d, int64_t T, int max_spikes, V<R>* y, M<R>* spikes) {
    using Integer = std::decay_t<decltype(M<R>{}[0])>;
    const M<R> sign = M<R>{} + std::numeric_limits<Integer>::min();
    V<R> v[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) v[n] = x[n] + v0;
    for (int64_t t = 0; t < T; t++) {
        const V<R> thetas = filled<R>(theta[t]), hs = filled<R>(h[t]), ds = filled<R>(d[t]);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            const M<R> negative = SIGNED ? (M<R>)v[n] & sign : M<R>{};
            M<R> fires = SIGNED ? (V<R>)((M<R>)v[n] & ~sign) > thetas : v[n] > thetas;
            if (SIGNED && BELOW) fires = (v[n] > thetas) ^ (v[n] < -thetas);
            if (BOUNDED) fires &= spikes[n] < max_spikes;
            const V<R> change = (V<R>)((M<R>)hs ^ negative), value = (V<R>)((M<R>)ds ^ negative);
            v[n] = fires ? v[n] - change : v[n];
            y[n] = fires ? y[n] + value : y[n];
            spikes[n] = fires ? spikes[n] + 1 : spikes[n];
        }
    }
}

template <class R, bool SIGNED, bool BOUNDED>
void sums(R* out, const R* x, const R* weight, const R* share, const Candidates<R>& c, int threads) {
    const int64_t width = c.Q * c.points, padded = (width + W<R> - 1) / W<R> * W<R>, part = c.N * c.M * c.Q;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<R> square(padded), off(padded), count(padded);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < c.N * c.M; row++) {
            const int64_t group = row / c.M * width;
            const R *theta = c.theta + row * c.T, *h = c.h + row * c.T, *d = c.d + row * c.T;
            const auto keep = [&](int64_t i, V<R> at, V<R> w, V<R> s, V<R> y, M<R> fired) {
                const V<R> error = y - at;
                store(square.data() + i, w * (error * error));
                store(off.data() + i, w * error);
                store(count.data() + i, s * __builtin_convertvector(fired, V<R>));
            };
            bool below = false;
            for (int64_t t = 0; t < c.T; t++) below |= SIGNED && theta[t] < 0;
            const auto all = [&](auto some) {
                constexpr bool BELOW = decltype(some)::value;
                int64_t i = 0;
                for (; i + U * W<R> <= width; i += U * W<R>) {
                    V<R> at[U], y[U] = {};
                    M<R> fired[U] = {};
                    load_all<R, U>(at, x + group + i);
                    respond<R, SIGNED, BOUNDED, BELOW, U>(at, c.v0[row], theta, h, d, c.T, c.max_spikes, y, fired);
#pragma GCC unroll 4
                    for (int n = 0; n < U; n++) {
                        const int64_t j = i + n * W<R>;
                        keep(j, at[n], load<V<R>>(weight + group + j), load<V<R>>(share + group + j), y[n], fired[n]);
                    }
                }
                for (; i < width; i += W<R>) {
                    const int64_t n = width - i < W<R> ? width - i : W<R>;
                    const V<R> at = load_some<V<R>>(x + group + i, n);
                    V<R> y = {};
                    M<R> fired = {};
                    respond<R, SIGNED, BOUNDED, BELOW, 1>(&at, c.v0[row], theta, h, d, c.T, c.max_spikes, &y, &fired);
                    keep(i, at, load_some<V<R>>(weight + group + i, n), load_some<V<R>>(share + group + i, n), y, fired);
                }
            };
            below ? all(std::true_type{}) : all(std::false_type{});
            R* to = out + row * c.Q;
            for (const R* from : {square.data(), off.data(), count.data()}) {
                for (int64_t q = 0; q < c.Q; q++, from += c.points) {
                    V<R> many = {};
                    R sum = 0;
                    int64_t i = 0;
                    for (; i + W<R> <= c.points; i += W<R>) many += load<V<R>>(from + i);
                    for (; i < c.points; i++) sum += from[i];
                    to[q] = c.points >= W<R> ? sum + total<R>(many) : sum;
                }
                to += part;
            }
        }
    }
}

template <class R> int segment_sums(R* out, const R* x, const R* weight, const R* share, const Candidates<R>& c, int threads) {
    if (c.is_signed) c.max_spikes ? sums<R, true, true>(out, x, weight, share, c, threads) : sums<R, true, false>(out, x, weight, share, c, threads);
    else c.max_spikes ? sums<R, false, true>(out, x, weight, share, c, threads) : sums<R, false, false>(out, x, weight, share, c, threads);
    return 0;
}

// Sums of weight (y - x)^2, weight (y - x) and share * spikes over the points x > 0 of each group: out [3, C].
template <class R>
int code_sums(R* out, const R* x, const R* weight, const R* share, int64_t C, int64_t points, const Code<R>& code, int threads) {
    if (!served(code)) return 1;
    const std::vector<Table<R>> tables = tables_of(code);
    with_kind(code, [&](auto kind) {
        using K = decltype(kind);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int64_t c = 0; c < C; c++) {
            V<R> squares = {}, offs = {}, counts = {};
            const auto add = [&](const V<R>* at, const V<R>* w, const V<R>* s, auto number) {
                constexpr int N = decltype(number)::value;
                V<R> y[N] = {};
                M<R> fired[N] = {};
                fire<R, K, N>(tables[c], Inputs<R, N>::template of<K::many>(tables[c], at), [&](int, int n, M<R> up, M<R> down, V<R> d) {
                    y[n] = up ? y[n] + d : y[n];
                    fired[n] = up ? fired[n] + 1 : fired[n];
                    if (K::is_signed) {
                        y[n] = down ? y[n] - d : y[n];
                        fired[n] = down ? fired[n] + 1 : fired[n];
                    }
                });
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) {
                    const V<R> error = y[n] - at[n];
                    squares += w[n] * (error * error), offs += w[n] * error;
                    counts += s[n] * __builtin_convertvector(fired[n], V<R>);
                }
            };
            const R *xs = x + c * points, *ws = weight + c * points, *ss = share + c * points;
            V<R> at[U], w[U], s[U];
            int64_t i = 0;
            for (; i + U * W<R> <= points; i += U * W<R>) {
                load_all<R, U>(at, xs + i), load_all<R, U>(w, ws + i), load_all<R, U>(s, ss + i);
                add(at, w, s, std::integral_constant<int, U>{});
            }
            for (; i < points; i += W<R>) {  // lanes behind the last point weigh 0
                const int64_t n = points - i < W<R> ? points - i : W<R>;
                at[0] = load_some<V<R>>(xs + i, n), w[0] = load_some<V<R>>(ws + i, n), s[0] = load_some<V<R>>(ss + i, n);
                add(at, w, s, std::integral_constant<int, 1>{});
            }
            out[c] = total<R>(squares), out[C + c] = total<R>(offs), out[2 * C + c] = total<R>(counts);
        }
    });
    return 0;
}

}  // namespace

extern "C" {
int segment_sums_f32(float* out, const float* x, const float* weight, const float* share, const Candidates<float>* c, int threads) {
    return segment_sums(out, x, weight, share, *c, threads);
}
int code_sums_f32(float* out, const float* x, const float* weight, const float* share, int64_t C, int64_t points, const Code<float>* code,
                  int threads) {
    return code_sums(out, x, weight, share, C, points, *code, threads);
}
int code_sums_f64(double* out, const double* x, const double* weight, const double* share, int64_t C, int64_t points, const Code<double>* code,
                  int threads) {
    return code_sums(out, x, weight, share, C, points, *code, threads);
}
int segment_sums_f64(double* out, const double* x, const double* weight, const double* share, const Candidates<double>* c, int threads) {
    return segment_sums(out, x, weight, share, *c, threads);
}
}
