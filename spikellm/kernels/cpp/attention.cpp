// The softmax whose exponentials are spikes, normalised after they are coded: attention.py's `coded_mixture`.

#include <cmath>

#include "neuron.h"

namespace {

struct Shape {
    int64_t N, H, K, L, S, P, E;  // sequences, heads of queries and of keys, queries, keys, keys of the prefix, width of a head
};

// e^x for x <= 0, within 2 units in the last place: 2^n times the Taylor series of e^r, |r| <= ln(2) / 2; 0 where a float would have none.
inline V<float> exponential(V<float> x) {
    const V<float> shifter = filled<float>(12582912.0f);  // 1.5 * 2^23: its last bit is a unit
    const M<float> none = x < -103.9f;
    x = x < -87.0f ? filled<float>(-87.0f) : x;
    const V<float> shifted = x * 1.44269504f + shifter, n = shifted - shifter;
    const V<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V<float> y = filled<float>(1.0f / 5040);
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = y * r + c;
    const M<float> power = ((M<float>)shifted - (M<float>)shifter + 127) << 23;
    y *= (V<float>)power;
    return none ? V<float>{} : y;
}

inline V<double> exponential(V<double> x) {
    const V<double> shifter = filled<double>(6755399441055744.0);  // 1.5 * 2^52
    const M<double> none = x < -745.1;
    x = x < -708.0 ? filled<double>(-708.0) : x;
    const V<double> shifted = x * 1.4426950408889634 + shifter, n = shifted - shifter;
    const V<double> r = (x - n * 6.93147180369123816490e-1) - n * 1.90821492927058770002e-10;
    V<double> y = filled<double>(1.0 / 87178291200);
    for (double c : {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
                     1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
        y = y * r + c;
    const M<double> power = ((M<double>)shifted - (M<double>)shifter + 1023) << 52;
    y *= (V<double>)power;
    return none ? V<double>{} : y;
}

template <class R> struct Row {
    R sum, top;  // of the exponentials; the largest score that is seen, finite where none is
};

// Scores of one query with S keys, which a row of the mask shows (1) or hides (0), to the coded exponentials of their multiples, in place.
template <class R, class K> Row<R> code_row(const Table<R>& table, R* scores, const uint8_t* mask, int64_t S, R scaling) {
    int64_t last = S;
    while (last > 0 && !mask[last - 1]) last--;
    const R none = sizeof(R) == 4 ? R(-3.4028234663852886e38) : R(-1.7976931348623157e308);
    V<R> top = filled<R>(none);
    const auto look = [&](V<R> s, B<R> shown) {
        s = widened<R>(shown) != 0 ? s : filled<R>(none);
        top = s > top ? s : top;
    };
    int64_t j = 0;
    for (; j + W<R> <= last; j += W<R>) look(load<V<R>>(scores + j), load<B<R>>(mask + j));
    if (j < last) look(load_some<V<R>>(scores + j, last - j), load_some<B<R>>(mask + j, last - j));
    R largest = none;
    for (int lane = 0; lane < W<R>; lane++) largest = top[lane] > largest ? top[lane] : largest;
    largest = largest == none ? none : largest * scaling;
    V<R> sum = {};
    const auto exponentials = [&](V<R> s, B<R> shown) {
        return widened<R>(shown) != 0 ? exponential(s * scaling - largest) : V<R>{};
    };
    V<R> some[U];
    for (j = 0; j + U * W<R> <= last; j += U * W<R>) {
#pragma GCC unroll 4
        for (int n = 0; n < U; n++) some[n] = exponentials(load<V<R>>(scores + j + n * W<R>), load<B<R>>(mask + j + n * W<R>));
        encode<R, K, U>(table, some);
        store_all<R, U>(scores + j, some);
#pragma GCC unroll 4
        for (int n = 0; n < U; n++) sum += some[n];
    }
    for (; j < last; j += W<R>) {
        const int64_t n = last - j < W<R> ? last - j : W<R>;
        some[0] = exponentials(load_some<V<R>>(scores + j, n), load_some<B<R>>(mask + j, n));
        encode<R, K, 1>(table, some);
        store_some(scores + j, some[0], n);
        sum += some[0];
    }
    for (j = last; j < S; j++) scores[j] = 0;
    return {total<R>(sum), largest};
}

template <class R> using Coder = Row<R> (*)(const Table<R>&, R*, const uint8_t*, int64_t, R);

// `code_row` for the kind of digits.
template <class R> Coder<R> coder_of(const Code<R>& code) {
    Coder<R> found = nullptr;
    with_kind(code, [&](auto kind) { found = code_row<R, decltype(kind)>; });
    return found;
}

template <class R>
int code_scores(R* scores, R* sums, R* tops, const uint8_t* mask, int64_t batch_stride, int64_t row_stride, R scaling, Shape n,
                const Code<R>& code, int threads) {
    if (!served(code)) return 1;
    const std::vector<Table<R>> tables = tables_of(code);
    const Coder<R> coded = coder_of(code);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < n.N * n.H * n.L; row++) {
        const int64_t b = row / (n.H * n.L), h = row / n.L % n.H, l = row % n.L;
        const uint8_t* shown = mask + b * batch_stride + l * row_stride;
        const Row<R> found = coded(tables[h % code.groups], scores + row * n.S, shown, n.S, scaling);
        sums[row] = found.sum, tops[row] = found.top;
    }
    return 0;
}

// Queries, keys and values of attention, of E numbers each; strides in numbers, of sequences, heads and tokens.
template <class R> struct Heads {
    const R* at;
    int64_t sequence, head, token;
    const R* operator()(int64_t b, int64_t h, int64_t l) const { return at + b * sequence + h * head + l * token; }
};

template <class R> inline R dot(const R* x, const R* y, int64_t E) {
    V<R> sum = {};
    int64_t e = 0;
    for (; e + W<R> <= E; e += W<R>) sum += load<V<R>>(x + e) * load<V<R>>(y + e);
    R rest = total<R>(sum);
    for (; e < E; e++) rest += x[e] * y[e];
    return rest;
}

template <class R> inline void add(R* sum, const R* x, R weight, int64_t E) {
    int64_t e = 0;
    for (; e + W<R> <= E; e += W<R>) store(sum + e, load<V<R>>(sum + e) + weight * load<V<R>>(x + e));
    for (; e < E; e++) sum[e] += weight * x[e];
}

// Everything about a query but its keys: the prefix's part of the mixture and of the sum, then their quotient.
template <class R>
inline void finish(R* out, R* mixed, Row<R> row, const R* query, Heads<R> sink_key, Heads<R> sink_value, R scaling, Shape n, int64_t k) {
    R sinks[64], most = row.top;
    for (int64_t p = 0; p < n.P; p++) {
        sinks[p] = scaling * dot(query, sink_key(0, k, p), n.E);
        most = sinks[p] > most ? sinks[p] : most;
    }
    const R share = std::exp(row.top - most);
    R sum = row.sum * share;
    for (int64_t p = 0; p < n.P; p++) sum += sinks[p] = std::exp(sinks[p] - most);
    const R scale = 1 / (sum == 0 ? R(1) : sum);  // no spike was sent, and there is no prefix: nothing is mixed
    for (int64_t e = 0; e < n.E; e++) out[e] = mixed[e] * (share * scale);
    for (int64_t p = 0; p < n.P; p++) add(out, sink_value(0, k, p), sinks[p] * scale, n.E);
}

// A few queries and many keys: scores, exponentials, spikes and the mixture of values of a head without leaving its thread.
template <class R>
int attend(R* out, Heads<R> query, Heads<R> key, Heads<R> value, Heads<R> sink_key, Heads<R> sink_value, const uint8_t* mask,
           int64_t batch_stride, int64_t row_stride, R scaling, Shape n, const Code<R>& code, int threads) {
    if (!served(code) || n.P > 64) return 1;
    const std::vector<Table<R>> tables = tables_of(code);
    const Coder<R> coded = coder_of(code);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < n.N * n.H * n.L; row++) {
        const int64_t b = row / (n.H * n.L), h = row / n.L % n.H, l = row % n.L, k = h / (n.H / n.K);
        const uint8_t* shown = mask + b * batch_stride + l * row_stride;
        std::vector<R> scores(n.S), mixed(n.E);
        for (int64_t j = 0; j < n.S; j++)
            if (shown[j]) scores[j] = dot(query(b, h, l), key(b, k, j), n.E);
        const Row<R> found = coded(tables[h % code.groups], scores.data(), shown, n.S, scaling);
        for (int64_t j = 0; j < n.S; j++)
            if (scores[j] != 0) add(mixed.data(), value(b, k, j), scores[j], n.E);
        finish(out + ((b * n.L + l) * n.H + h) * n.E, mixed.data(), found, query(b, h, l), sink_key, sink_value, scaling, n, k);
    }
    return 0;
}

// Mixtures [N, H, L, E] of coded exponentials, whose sums and largest scores are known, to heads' outputs [N, L, H, E].
template <class R>
int finish_all(R* out, R* mixed, const R* sums, const R* tops, Heads<R> query, Heads<R> sink_key, Heads<R> sink_value, R scaling, Shape n,
               int threads) {
    if (n.P > 64) return 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < n.N * n.H * n.L; row++) {
        const int64_t b = row / (n.H * n.L), h = row / n.L % n.H, l = row % n.L;
        finish(out + ((b * n.L + l) * n.H + h) * n.E, mixed + row * n.E, Row<R>{sums[row], tops[row]}, query(b, h, l), sink_key, sink_value,
               scaling, n, h / (n.H / n.K));
    }
    return 0;
}

// Where the keys end that some query of a block sees, at least 1; masks of N sequences, L queries and S keys.
void visible(int64_t* ends, const uint8_t* mask, int64_t batch_stride, int64_t row_stride, int64_t N, int64_t L, int64_t S, int64_t block) {
    for (int64_t start = 0; start < L; start += block) {
        int64_t end = 1;
        for (int64_t b = 0; b < N; b++)
            for (int64_t l = start; l < L && l < start + block; l++) {
                const uint8_t* row = mask + b * batch_stride + l * row_stride;
                int64_t last = S;
                while (last > end && !row[last - 1]) last--;
                end = last > end ? last : end;
            }
        *ends++ = end;
    }
}

}  // namespace

extern "C" {
int code_scores_f32(float* scores, float* sums, float* tops, const uint8_t* mask, int64_t batch_stride, int64_t row_stride, double scaling,
                    const Shape* shape, const Code<float>* code, int threads) {
    return code_scores(scores, sums, tops, mask, batch_stride, row_stride, float(scaling), *shape, *code, threads);
}
int finish_f32(float* out, float* mixed, const float* sums, const float* tops, const Heads<float>* heads, double scaling, const Shape* shape, int threads) {
    return finish_all(out, mixed, sums, tops, heads[0], heads[3], heads[4], float(scaling), *shape, threads);
}
int code_scores_f64(double* scores, double* sums, double* tops, const uint8_t* mask, int64_t batch_stride, int64_t row_stride, double scaling,
                    const Shape* shape, const Code<double>* code, int threads) {
    return code_scores(scores, sums, tops, mask, batch_stride, row_stride, double(scaling), *shape, *code, threads);
}
int finish_f64(double* out, double* mixed, const double* sums, const double* tops, const Heads<double>* heads, double scaling, const Shape* shape, int threads) {
    return finish_all(out, mixed, sums, tops, heads[0], heads[3], heads[4], double(scaling), *shape, threads);
}
int attend_f32(float* out, const Heads<float>* heads, const uint8_t* mask, int64_t batch_stride, int64_t row_stride, double scaling,
               const Shape* shape, const Code<float>* code, int threads) {
    return attend(out, heads[0], heads[1], heads[2], heads[3], heads[4], mask, batch_stride, row_stride, float(scaling), *shape, *code, threads);
}
int attend_f64(double* out, const Heads<double>* heads, const uint8_t* mask, int64_t batch_stride, int64_t row_stride, double scaling,
               const Shape* shape, const Code<double>* code, int threads) {
    return attend(out, heads[0], heads[1], heads[2], heads[3], heads[4], mask, batch_stride, row_stride, scaling, *shape, *code, threads);
}
void visible_ends(int64_t* ends, const uint8_t* mask, int64_t batch_stride, int64_t row_stride, int64_t N, int64_t L, int64_t S, int64_t block) {
    visible(ends, mask, batch_stride, row_stride, N, L, S, block);
}
}
