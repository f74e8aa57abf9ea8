// What stands before neurons: RMSNorm, SiLU, and the Hadamard transform as sums and differences alone; then the neurons, row by row.

#include <cmath>

#include "exponential.h"
#include "rows.h"

namespace {

// y = weight x / sqrt(mean(x^2) + eps) of N rows.
template <class R> int norm(const R* x, R* y, const R* weight, double eps, int64_t N, int64_t D, const Code<R>& code, int threads) {
    return coded_rows(y, N, D, code, threads, [=](int64_t row, R* to) {
        const R* from = x + row * D;
        V<R> sums[U] = {};
        int64_t i = 0;
        for (; i + U * W<R> <= D; i += U * W<R>)
#pragma GCC unroll 4
            for (int n = 0; n < U; n++) {
                const V<R> some = load<V<R>>(from + i + n * W<R>);
                sums[n] += some * some;
            }
        R square = total<R>((sums[0] + sums[1]) + (sums[2] + sums[3]));
        for (; i < D; i++) square += from[i] * from[i];
        const R scale = 1 / std::sqrt(square / D + R(eps));
        for (i = 0; i + W<R> <= D; i += W<R>) store(to + i, load<V<R>>(weight + i) * (load<V<R>>(from + i) * scale));
        for (; i < D; i++) to[i] = weight[i] * (from[i] * scale);
    });
}

// x / (1 + e^-x), from e^-|x|, which no x lets overflow.
template <class R> inline V<R> silu(V<R> x) {
    const V<R> small = exponential(x < 0 ? x : -x);
    return x * (x < 0 ? small : filled<R>(1)) / (1 + small);
}

template <class R> int silu(const R* x, R* y, int64_t N, int64_t D, const Code<R>& code, int threads) {
    return coded_rows(y, N, D, code, threads, [=](int64_t row, R* to) {
        const R* from = x + row * D;
        for (int64_t i = 0; i < D; i += W<R>) {
            const int64_t n = D - i < W<R> ? D - i : W<R>;
            if (n == W<R>) store(to + i, silu<R>(load<V<R>>(from + i)));
            else store_some(to + i, silu<R>(load_some<V<R>>(from + i, n)), n);
        }
    });
}

// Lane i of lane i ^ H.
template <class R, int H> inline V<R> exchanged(V<R> x) {
#if defined(__clang__)
    V<R> y;
    for (int i = 0; i < W<R>; i++) y[i] = x[i ^ H];
    return y;
#else
    M<R> from;
    for (int i = 0; i < W<R>; i++) from[i] = i ^ H;
    return __builtin_shuffle(x, from);
#endif
}

// The transform of order W in a register: its H-th butterflies and all wider ones.
template <class R, int H> inline V<R> butterflies(V<R> x) {
    if constexpr (H < W<R>) {
        V<R> sign;
        for (int i = 0; i < W<R>; i++) sign[i] = i & H ? -1 : 1;
        return butterflies<R, 2 * H>(exchanged<R, H>(x) + sign * x);
    } else {
        return x;
    }
}

// x H of Sylvester's matrix of order n, a power of two and W at least, in place.
template <class R> void sylvester(R* x, int64_t n) {
    for (int64_t i = 0; i < n; i += W<R>) store(x + i, butterflies<R, 1>(load<V<R>>(x + i)));
    for (int64_t h = W<R>; h < n; h *= 2)
        for (int64_t i = 0; i < n; i += 2 * h)
            for (int64_t j = i; j < i + h; j += W<R>) {
                const V<R> a = load<V<R>>(x + j), b = load<V<R>>(x + j + h);
                store(x + j, a + b);
                store(x + j + h, a - b);
            }
}

// Rows p .. p + 3 of H^T X, J registers wide from column j on: 4 J sums in registers, for which X is read once.
template <class R, int J> inline void four_rows(const R* x, R* y, const R* left, int64_t P, int64_t n, int64_t p, int64_t j, R scale) {
    V<R> sums[4][J] = {};
    for (int64_t q = 0; q < P; q++) {
        V<R> some[J];
        load_all<R, J>(some, x + q * n + j);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
            for (int k = 0; k < J; k++) sums[i][k] += left[q * P + p + i] * some[k];
    }
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < J; k++) store(y + (p + i) * n + j + k * W<R>, scale * sums[i][k]);
}

// N rows of P x n numbers X: H^T X S / sqrt(P n), with H of order P and entries +-1, and S Sylvester's of order n.
template <class R> int hadamard(const R* x, R* y, const R* left, int64_t N, int64_t P, int64_t n, const Code<R>& code, int threads) {
    if (n < W<R> || n & (n - 1) || (P > 1 && P % 4)) return 1;
    const R scale = R(1 / std::sqrt(double(P) * double(n)));
    return coded_rows(y, N, P * n, code, threads, [=](int64_t row, R* to) {
        static thread_local std::vector<R> own;
        own.assign(x + row * P * n, x + (row + 1) * P * n);
        for (int64_t p = 0; p < P; p++) sylvester(own.data() + p * n, n);
        if (P == 1)
            for (int64_t j = 0; j < n; j += W<R>) store(to + j, scale * load<V<R>>(own.data() + j));
        for (int64_t p = 0; p + 4 <= P; p += 4) {
            int64_t j = 0;
            for (; j + 4 * W<R> <= n; j += 4 * W<R>) four_rows<R, 4>(own.data(), to, left, P, n, p, j, scale);
            if (j + 2 * W<R> <= n) four_rows<R, 2>(own.data(), to, left, P, n, p, j, scale), j += 2 * W<R>;
            for (; j < n; j += W<R>) four_rows<R, 1>(own.data(), to, left, P, n, p, j, scale);
        }
    });
}

}  // namespace

extern "C" {
int norm_f32(const float* x, float* y, const float* weight, double eps, int64_t N, int64_t D, const Code<float>* code, int threads) {
    return norm(x, y, weight, eps, N, D, *code, threads);
}
int norm_f64(const double* x, double* y, const double* weight, double eps, int64_t N, int64_t D, const Code<double>* code, int threads) {
    return norm(x, y, weight, eps, N, D, *code, threads);
}
int silu_f32(const float* x, float* y, int64_t N, int64_t D, const Code<float>* code, int threads) { return silu(x, y, N, D, *code, threads); }
int silu_f64(const double* x, double* y, int64_t N, int64_t D, const Code<double>* code, int threads) { return silu(x, y, N, D, *code, threads); }
int hadamard_f32(const float* x, float* y, const float* left, int64_t N, int64_t P, int64_t n, const Code<float>* code, int threads) {
    return hadamard(x, y, left, N, P, n, *code, threads);
}
int hadamard_f64(const double* x, double* y, const double* left, int64_t N, int64_t P, int64_t n, const Code<double>* code, int threads) {
    return hadamard(x, y, left, N, P, n, *code, threads);
}
}
