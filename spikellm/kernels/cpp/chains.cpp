// Least costs of codes of several intervals: chains.py's `chained_plain` and `worth_plain` without a matrix of running sums.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

struct Costs {
    const float *errors, *spikes;  // [N, M, Q]
    const double* price;           // [N]
    int64_t N, M, Q;
};

constexpr int SIDE = 8;  // tables that are followed side by side: each waits for its own minimum

// `each(q, m, before edge q with table m taking over where it is best)` for all edges of one group's tables m .. m + count - 1.
template <int COUNT, class Each> inline void follow(const Costs& c, int64_t n, int64_t m, const double* before, Each each) {
    const float *errors = c.errors + (n * c.M + m) * c.Q, *spikes = c.spikes + (n * c.M + m) * c.Q;
    const double price = c.price[n];
    double own[COUNT] = {}, low[COUNT];
    for (int i = 0; i < COUNT; i++) low[i] = before[0], each(0, i, before[0]);
    for (int64_t q = 0; q < c.Q; q++)
        for (int i = 0; i < COUNT; i++) {
            own[i] += double(errors[i * c.Q + q]) + price * double(spikes[i * c.Q + q]);
            low[i] = std::min(low[i], before[q + 1] - own[i]);
            each(q + 1, i, low[i] + own[i]);
        }
}

template <class Each> inline void follow_all(const Costs& c, int64_t n, const double* before, Each each) {
    int64_t m = 0;
    for (; m + SIDE <= c.M; m += SIDE) follow<SIDE>(c, n, m, before, [&](int64_t q, int i, double cost) { each(q, m + i, cost); });
    for (; m < c.M; m++) follow<1>(c, n, m, before, [&](int64_t q, int i, double cost) { each(q, m + i, cost); });
}

}  // namespace

extern "C" {
// out [N, Q + 1]
void chained(double* out, const double* before, const Costs* costs, int threads) {
    const Costs& c = *costs;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t n = 0; n < c.N; n++) {
        double* to = out + n * (c.Q + 1);
        std::fill(to, to + c.Q + 1, std::numeric_limits<double>::infinity());
        follow_all(c, n, before + n * (c.Q + 1), [&](int64_t q, int64_t, double cost) { to[q] = std::min(to[q], cost); });
    }
}

// out [N, M]
void worth(double* out, const double* before, const double* behind, const Costs* costs, int threads) {
    const Costs& c = *costs;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t n = 0; n < c.N; n++) {
        double* to = out + n * c.M;
        const double* rest = behind + n * (c.Q + 1);
        std::fill(to, to + c.M, std::numeric_limits<double>::infinity());
        follow_all(c, n, before + n * (c.Q + 1), [&](int64_t q, int64_t m, double cost) { to[m] = std::min(to[m], cost + rest[q]); });
    }
}
}
