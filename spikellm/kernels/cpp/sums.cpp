// Sums over time in one pass: temporal.py's `integrate`, of currents as they come or with an output weight of each wire and channel.

#include "neuron.h"

namespace {

template <class R> int integrate(R* y, const R* x, const R* weights, int64_t S, int64_t N, int64_t I, int threads) {
    const int64_t width = weights ? I : PIECE, pieces = (N * I + width - 1) / width;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t start = piece * width, end = start + width < N * I ? start + width : N * I;
        for (int64_t i = start; i < end; i += W<R>) {
            const int64_t n = end - i < W<R> ? end - i : W<R>;
            V<R> sum = {};
            for (int64_t s = 0; s < S; s++) {
                const R* from = x + s * N * I + i;
                const V<R> some = n == W<R> ? load<V<R>>(from) : load_some<V<R>>(from, n);
                if (!weights) {
                    sum += some;
                    continue;
                }
                const R* weight = weights + s * I + i - start;
                sum += some * (n == W<R> ? load<V<R>>(weight) : load_some<V<R>>(weight, n));
            }
            n == W<R> ? store(y + i, sum) : store_some(y + i, sum, n);
        }
    }
    return 0;
}

}  // namespace

extern "C" {
int integrate_f32(float* y, const float* x, const float* weights, int64_t S, int64_t N, int64_t I, int threads) {
    return integrate(y, x, weights, S, N, I, threads);
}
int integrate_f64(double* y, const double* x, const double* weights, int64_t S, int64_t N, int64_t I, int threads) {
    return integrate(y, x, weights, S, N, I, threads);
}
}
