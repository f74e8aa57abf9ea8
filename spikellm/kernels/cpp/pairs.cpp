// Attention's products of trains in tiles, summed over time: temporal.py's `spike_pairs` of queries and keys, `spike_mixture` of values.
//
// Each step's spikes meet what the other side has accumulated, d X or d Y^T in 30 bits; the steps of a product lie one behind the other, so
// that a tile adds them up before it is put down.

#include "mask.h"
#include "product.h"
#include "tiles.h"

namespace {

// spikes [wires, B, heads, rows, width] with strides, the last 1
struct HeadTrain {
    const int8_t* at;
    int64_t wire, sequence, head, row;
};

// output weights [C, wires] of one table (C = 1) or one for each head
struct Weights {
    const float* at;
    int64_t tables, wires;
};

// numbers [B, heads, rows, E] with strides, the last 1
struct Numbers {
    const float* at;
    int64_t sequence, head, row;
};

// sequences, heads of queries and of keys, queries, keys, width of a head, steps; populations of queries (or of the softmax) and of keys
struct Attended {
    int64_t B, H, K, L, S, E, T, P, Q;
};

}  // namespace

#ifdef TILES
namespace {

constexpr int64_t STRIP = 64;  // queries of a job: the digits of 16 keys are read from the first cache by all of them

// Digits of a row of numbers as the left factor, [steps, DIGITS, 16, 64].
inline void put_row(int8_t* to, const float* x, int64_t n, int64_t r, float unit) {
    const __m512 scale = _mm512_set1_ps(reciprocal(unit));
    for (int64_t i = 0; i < n; i += 16) {
        const __m512i four = digits(x + i, scale);
        int8_t* at = to + i / DEPTH * DIGITS * BYTES_OF + r * 64 + i % DEPTH;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_castsi512_si128(four));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at + BYTES_OF), _mm512_extracti32x4_epi32(four, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 2 * BYTES_OF), _mm512_extracti32x4_epi32(four, 2));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 3 * BYTES_OF), _mm512_extracti32x4_epi32(four, 3));
    }
}

// Sums += a step of the left factor's digits x 64 spikes of 16 columns.
inline void add_numbers(const int8_t* left, const int8_t* spikes) {
    _tile_loadd(5, spikes, 64);
    _tile_loadd(4, left, 64);
    _tile_dpbssd(0, 4, 5);
    _tile_loadd(6, left + BYTES_OF, 64);
    _tile_dpbssd(1, 6, 5);
    _tile_loadd(4, left + 2 * BYTES_OF, 64);
    _tile_dpbssd(2, 4, 5);
    _tile_loadd(6, left + 3 * BYTES_OF, 64);
    _tile_dpbssd(3, 6, 5);
}

// sum += d spikes.
inline void accumulate(float* sum, const int8_t* spikes, float d, int64_t n) {
    for (int64_t i = 0; i < n; i++) sum[i] += d * spikes[i];
}

// scores [B, H, L, S] = scaling sum_t d_t x_t Y_t^T + X_t-1 (d'_t y_t)^T of keys up to the last that some query of 16 may see; others: 0.
int pairs(float* scores, const HeadTrain& x, const HeadTrain& y, const Weights& d_x, const Weights& d_y, const uint8_t* mask,
          int64_t mask_sequence, int64_t mask_row, float scaling, const Attended& n, int threads) {
    const int64_t X = n.T * n.P, Y = n.T * n.Q, deep = (n.E + DEPTH - 1) / DEPTH, wide = deep * DEPTH, G = n.H / n.K;
    if (!tiles_allowed() || std::max(X, Y) * wide > MOST) return 1;
    const int64_t tiles = (n.S + SIDE - 1) / SIDE, own = d_x.tables == 1 ? 1 : G;  // of a key's head, sums in units of each query's head
    const int64_t left_bytes = X * deep * DIGITS * BYTES_OF, right_bytes = Y * deep * BYTES_OF;
    Aligned<int8_t> sums_of(n.B * n.K * own * tiles * left_bytes), fired(n.B * n.K * tiles * right_bytes);
    Aligned<float> units(n.B * n.K * own * tiles * SIDE);
    std::vector<uint8_t> sent(n.B * n.K * tiles * Y * deep);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Tiles eight;
        Sums sums;
        Aligned<float> total(wide), number(std::max(X, Y) * wide);
        Aligned<int8_t> spikes(X * STRIP * wide), digits_of(Y * deep * DIGITS * BYTES_OF);
        std::vector<uint8_t> awake(X * STRIP / SIDE * deep);
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < n.B * n.K * tiles; job++) {
            const int64_t b = job / tiles / n.K, k = job / tiles % n.K, tile = job % tiles;
            const float* d = d_y.at + (d_y.tables == 1 ? 0 : k) * Y;
            int8_t* right = fired.data() + job * right_bytes;
            std::memset(right, 0, right_bytes);
            for (int64_t j = 0; j < SIDE; j++) {
                const int64_t key = tile * SIDE + j;
                const int8_t* from = y.at + b * y.sequence + k * y.head + std::min(key, n.S - 1) * y.row;
                for (int64_t s = 0; key < n.S && s < Y; s++)
                    for (int64_t e = 0; e < n.E; e += 4)
                        std::memcpy(right + (s * deep + e / DEPTH) * BYTES_OF + e % DEPTH / 4 * 64 + j * 4, from + s * y.wire + e,
                                    std::min<int64_t>(4, n.E - e));
                for (int64_t g = 0; g < own; g++) {
                    const float* d_own = d_x.at + (d_x.tables == 1 ? 0 : k * G + g) * X;
                    std::fill_n(number.data(), X * wide, 0.0f);
                    std::fill_n(total.data(), wide, 0.0f);
                    for (int64_t t = 0; key < n.S && t < n.T; t++) {
                        for (int64_t s = t * n.Q; s < (t + 1) * n.Q; s++) accumulate(total.data(), from + s * y.wire, d[s], n.E);
                        for (int64_t s = t * n.P; s < (t + 1) * n.P; s++)
                            for (int64_t e = 0; e < n.E; e++) number.data()[s * wide + e] = scaling * d_own[s] * total.data()[e];
                    }
                    const int64_t at = (b * n.K + k) * own * tiles + g * tiles + tile;
                    float& unit = units.data()[at * SIDE + j] = unit_of(number.data(), X * wide);
                    put_column(sums_of.data() + at * left_bytes, number.data(), X * deep, j, unit);
                }
            }
            for (int64_t s = 0; s < Y * deep; s++) sent[job * Y * deep + s] = any_of(right + s * BYTES_OF, 64);
        }
        const int64_t strips = (n.L + STRIP - 1) / STRIP;
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < n.B * n.H * strips; job++) {
            const int64_t b = job / n.H % n.B, h = job % n.H, k = h / G, start = (strips - 1 - job / n.H / n.B) * STRIP;
            const int64_t some = std::min(STRIP, n.L - start), parts = (some + SIDE - 1) / SIDE;
            const int8_t* from = x.at + b * x.sequence + h * x.head + start * x.row;
            std::memset(spikes.data(), 0, X * STRIP * wide);
            for (int64_t s = 0; s < X; s++)
                for (int64_t r = 0; r < some; r++) std::memcpy(spikes.data() + (s * STRIP + r) * wide, from + s * x.wire + r * x.row, n.E);
            int64_t ends[STRIP / SIDE], end = 0;
            for (int64_t part = 0; part < parts; part++) {
                const int64_t first = start + part * SIDE, rows = std::min(SIDE, n.L - first);
                ends[part] = seen_by(mask + b * mask_sequence + first * mask_row, mask_row, rows, n.S, 0);
                end = std::max(end, ends[part]);
                for (int64_t i = 0; i < X * deep; i++)
                    awake[part * X * deep + i] = any_of(spikes.data() + (i / deep * STRIP + part * SIDE) * wide + i % deep * DEPTH, wide);
                for (int64_t r = 0; r < rows; r++) {
                    float* row = scores + ((b * n.H + h) * n.L + first + r) * n.S;
                    const int64_t done = std::min(n.S, (ends[part] + SIDE - 1) / SIDE * SIDE);
                    std::fill(row + done, row + n.S, 0.0f);
                }
            }
            const int64_t mine = (b * n.K + k) * own * tiles + (own == 1 ? 0 : h % G) * tiles;
            const auto put = [&](int64_t part, int64_t tile, __m512 column_unit, const float* row_units, bool add) {
                sums.keep();
                const __mmask16 columns = n.S - tile * SIDE < SIDE ? (1 << (n.S - tile * SIDE)) - 1 : 0xffff;
                const int64_t first = start + part * SIDE, rows = std::min(SIDE, n.L - first);
                for (int64_t r = 0; r < rows; r++) {
                    float* to = scores + ((b * n.H + h) * n.L + first + r) * n.S + tile * SIDE;
                    const __m512 sum = sums.row(r);
                    _mm512_mask_storeu_ps(to, columns, add ? _mm512_fmadd_ps(sum, _mm512_set1_ps(row_units[r]), _mm512_maskz_loadu_ps(columns, to))
                                                           : _mm512_mul_ps(sum, column_unit));
                }
            };
            for (int64_t tile = 0; tile * SIDE < end; tile++)  // the queries' spikes against the keys' sums
                for (int64_t part = 0; part < parts; part++) {
                    if (tile * SIDE >= ends[part]) continue;
                    const int8_t* right = sums_of.data() + (mine + tile) * left_bytes;
                    start_sums();
                    for (int64_t i = 0; i < X * deep; i++)
                        if (awake[part * X * deep + i])
                            add_spikes(spikes.data() + (i / deep * STRIP + part * SIDE) * wide + i % deep * DEPTH, wide,
                                       right + i * DIGITS * BYTES_OF);
                    put(part, tile, _mm512_load_ps(units.data() + (mine + tile) * SIDE), nullptr, false);
                }
            const float *d = d_x.at + (d_x.tables == 1 ? 0 : h) * X, *d_other = d_y.at + (d_y.tables == 1 ? 0 : k) * Y;
            for (int64_t part = 0; n.T > 1 && part < parts; part++) {  // the keys' spikes against the queries' sums of the step before
                float row_units[SIDE];
                for (int64_t r = 0; r < SIDE; r++) {
                    std::fill_n(total.data(), wide, 0.0f);
                    std::fill_n(number.data(), n.Q * wide, 0.0f);
                    for (int64_t t = 1; t < n.T; t++) {
                        for (int64_t s = (t - 1) * n.P; s < t * n.P; s++)
                            accumulate(total.data(), spikes.data() + (s * STRIP + part * SIDE + r) * wide, d[s], wide);
                        for (int64_t s = t * n.Q; s < (t + 1) * n.Q; s++)
                            for (int64_t e = 0; e < wide; e++) number.data()[s * wide + e] = scaling * d_other[s] * total.data()[e];
                    }
                    row_units[r] = unit_of(number.data(), Y * wide);
                    put_row(digits_of.data(), number.data(), Y * wide, r, row_units[r]);
                }
                for (int64_t tile = 0; tile * SIDE < ends[part]; tile++) {
                    const int64_t keys = (b * n.K + k) * tiles + tile;
                    start_sums();
                    for (int64_t i = n.Q * deep; i < Y * deep; i++)
                        if (sent[keys * Y * deep + i])
                            add_numbers(digits_of.data() + i * DIGITS * BYTES_OF, fired.data() + keys * right_bytes + i * BYTES_OF);
                    put(part, tile, _mm512_setzero_ps(), row_units, true);
                }
            }
        }
    }
    return 0;
}

// mixed [B, H, L, E] = sum_t d_t x_t V and, behind it, totals [B, H, L] = sum_t d_t x_t 1; x of P populations.
int mixture(float* mixed, float* totals, const HeadTrain& x, const Numbers& value, const Weights& d_x, const Attended& n, int threads) {
    const int64_t X = n.T * n.P, deep = (n.S + DEPTH - 1) / DEPTH, G = n.H / n.K, tiles = (n.E + SIDE - 1) / SIDE;
    if (!tiles_allowed() || n.S > MOST) return 1;
    const int64_t tile_bytes = deep * DIGITS * BYTES_OF, strips = (n.L + SIDE - 1) / SIDE;
    Aligned<int8_t> right(n.B * n.K * tiles * tile_bytes);
    Aligned<float> units(n.B * n.K * tiles * SIDE);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Tiles eight;
        Sums sums;
        Aligned<float> column(deep * DEPTH);
        Aligned<int8_t> spikes(X * SIDE * deep * DEPTH);
        std::vector<uint8_t> awake(X * deep);
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < n.B * n.K * tiles; job++) {
            const float* from = value.at + job / tiles / n.K * value.sequence + job / tiles % n.K * value.head + job % tiles * SIDE;
            for (int64_t j = 0; j < SIDE; j++) {
                const bool there = job % tiles * SIDE + j < n.E;
                std::fill_n(column.data(), deep * DEPTH, 0.0f);
                for (int64_t i = 0; there && i < n.S; i++) column.data()[i] = from[i * value.row + j];
                const float unit = units.data()[job * SIDE + j] = unit_of(column.data(), deep * DEPTH);
                put_column(right.data() + job * tile_bytes, column.data(), deep, j, unit);
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < n.B * n.H * strips; job++) {
            const int64_t b = job / n.H % n.B, h = job % n.H, start = (strips - 1 - job / n.H / n.B) * SIDE, rows = std::min(SIDE, n.L - start);
            const int8_t* from = x.at + b * x.sequence + h * x.head + start * x.row;
            int64_t wire = x.wire, row = x.row;
            if (n.S % DEPTH || rows < SIDE) {
                row = deep * DEPTH, wire = SIDE * row;
                std::memset(spikes.data(), 0, X * wire);
                for (int64_t s = 0; s < X; s++)
                    for (int64_t r = 0; r < rows; r++) std::memcpy(spikes.data() + s * wire + r * row, from + s * x.wire + r * x.row, n.S);
                from = spikes.data();
            }
            const float* d = d_x.at + (d_x.tables == 1 ? 0 : h) * X;
            float total[SIDE] = {};
            for (int64_t s = 0; s < X; s++)
                for (int64_t k = 0; k < deep; k++)
                    if ((awake[s * deep + k] = any_of(from + s * wire + k * DEPTH, row)))
                        for (int64_t r = 0; r < rows; r++)
                            total[r] += d[s] * _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(
                                            _mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_loadu_si512(from + s * wire + r * row + k * DEPTH)));
            const int64_t first = (b * n.H + h) * n.L + start;
            std::copy_n(total, rows, totals + first);
            for (int64_t tile = 0; tile < tiles; tile++) {
                const int64_t mine = (b * n.K + h / G) * tiles + tile;
                const __mmask16 columns = n.E - tile * SIDE < SIDE ? (1 << (n.E - tile * SIDE)) - 1 : 0xffff;
                __m512 current[SIDE];
                for (auto& each : current) each = _mm512_setzero_ps();
                for (int64_t s = 0; s < X; s++) {
                    bool silent = true;
                    start_sums();
                    for (int64_t k = 0; k < deep; k++) {
                        if (!awake[s * deep + k]) continue;
                        silent = false;
                        add_spikes(from + s * wire + k * DEPTH, row, right.data() + mine * tile_bytes + k * DIGITS * BYTES_OF);
                    }
                    if (silent) continue;
                    sums.keep();
                    const __m512 weight = _mm512_mul_ps(_mm512_load_ps(units.data() + mine * SIDE), _mm512_set1_ps(d[s]));
                    for (int64_t r = 0; r < SIDE; r++) current[r] = _mm512_fmadd_ps(sums.row(r), weight, current[r]);
                }
                for (int64_t r = 0; r < rows; r++) _mm512_mask_storeu_ps(mixed + (first + r) * n.E + tile * SIDE, columns, current[r]);
            }
        }
    }
    return 0;
}

}  // namespace
#else
namespace {
int pairs(float*, const HeadTrain&, const HeadTrain&, const Weights&, const Weights&, const uint8_t*, int64_t, int64_t, float, const Attended&, int) {
    return 1;
}
int mixture(float*, float*, const HeadTrain&, const Numbers&, const Weights&, const Attended&, int) { return 1; }
}  // namespace
#endif

extern "C" {
int spike_pairs_f32(float* scores, const HeadTrain* trains, const Weights* weights, const uint8_t* mask, int64_t mask_sequence, int64_t mask_row,
                    double scaling, const Attended* n, int threads) {
    return pairs(scores, trains[0], trains[1], weights[0], weights[1], mask, mask_sequence, mask_row, float(scaling), *n, threads);
}
int spike_mixture_f32(float* mixed, float* totals, const HeadTrain* x, const Numbers* value, const Weights* weights, const Attended* n, int threads) {
    return mixture(mixed, totals, *x, *value, *weights, *n, threads);
}
}
