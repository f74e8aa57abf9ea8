// The softmax whose exponentials are spikes, normalised after they are coded: attention.py's `coded_mixture`.

#include <cmath>
#include <type_traits>

#include "exponential.h"
#include "mask.h"

namespace {

struct Shape {
    int64_t N, H, K, L, S, P, E;  // sequences, heads of queries and of keys, queries, keys, keys of the prefix, width of a head
};

template <class R> struct Row {
    R sum, top;  // of the exponentials; the largest score that is seen, finite where none is
};

struct Whole {};  // instead of a kind of digits: exponentials are not coded

template <class R> constexpr int64_t GROUP = U * W<R>;  // keys that are coded together

// Scores of one query with S keys, which a row of the mask shows (1) or hides (0), to the coded exponentials of their multiples, in place.
// loud: of every group of keys whether any of them sends a spike, or may; the others are left out of what follows, for most keys of most
// queries have exponentials below the smallest that fires.
template <class R, class K> Row<R> code_row(const Table<R>& table, R* scores, const uint8_t* mask, int64_t S, R scaling, uint8_t* loud) {
    int64_t last = S;
    while (last > 0 && !mask[last - 1]) last--;
    // exponentials are right to 2 units in the last place, far less than this distance
    const R quiet = table.silent > 0 ? R(std::log(double(table.silent)) - 1e-5) : -std::numeric_limits<R>::infinity();
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
    V<R> sum = {}, some[U];
    const auto coded = [&]([[maybe_unused]] auto number) {
        if constexpr (!std::is_same<K, Whole>::value) encode<R, K, decltype(number)::value>(table, some);
    };
    M<R> shown[U];
    std::memset(loud, 0, (S + GROUP<R> - 1) / GROUP<R>);
    for (j = 0; j + GROUP<R> <= last; j += GROUP<R>) {
        M<R> any = {};
#pragma GCC unroll 4
        for (int n = 0; n < U; n++) {
            shown[n] = widened<R>(load<B<R>>(mask + j + n * W<R>)) != 0;
            some[n] = load<V<R>>(scores + j + n * W<R>) * scaling - largest;
            any |= shown[n] & ~M<R>(some[n] <= quiet);
        }
        if (!some_lane<R>(any)) {
            std::memset(scores + j, 0, GROUP<R> * sizeof(R));
            continue;
        }
        loud[j / GROUP<R>] = 1;
#pragma GCC unroll 4
        for (int n = 0; n < U; n++) some[n] = shown[n] ? exponential(some[n]) : V<R>{};
        coded(std::integral_constant<int, U>{});
        store_all<R, U>(scores + j, some);
#pragma GCC unroll 4
        for (int n = 0; n < U; n++) sum += some[n];
    }
    if (j < last) loud[j / GROUP<R>] = 1;
    for (; j < last; j += W<R>) {
        const int64_t n = last - j < W<R> ? last - j : W<R>;
        some[0] = load_some<V<R>>(scores + j, n) * scaling - largest;
        some[0] = widened<R>(load_some<B<R>>(mask + j, n)) != 0 ? exponential(some[0]) : V<R>{};
        coded(std::integral_constant<int, 1>{});
        store_some(scores + j, some[0], n);
        sum += some[0];
    }
    for (j = last; j < S; j++) scores[j] = 0;
    return {total<R>(sum), largest};
}

template <class R> using Coder = Row<R> (*)(const Table<R>&, R*, const uint8_t*, int64_t, R, uint8_t*);

// `code_row` for the kind of digits.
template <class R> Coder<R> coder_of(const Code<R>& code) {
    Coder<R> found = code_row<R, Whole>;
    if (code.theta) with_kind(code, [&](auto kind) { found = code_row<R, decltype(kind)>; });
    return found;
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
    if ((code.theta && !served(code)) || n.P > 64) return 1;
    const std::vector<Table<R>> tables = tables_of(code);
    const Coder<R> coded = coder_of(code);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < n.N * n.H * n.L; row++) {
        const int64_t b = row / (n.H * n.L), h = row / n.L % n.H, l = row % n.L, k = h / (n.H / n.K);
        const uint8_t* shown = mask + b * batch_stride + l * row_stride;
        std::vector<R> scores(n.S), mixed(n.E);
        std::vector<uint8_t> loud(n.S / GROUP<R> + 1);
        for (int64_t j = 0; j < n.S; j++)
            if (shown[j]) scores[j] = dot(query(b, h, l), key(b, k, j), n.E);
        const Row<R> found = coded(tables[h % tables.size()], scores.data(), shown, n.S, scaling, loud.data());
        for (int64_t j = 0; j < n.S; j++)
            if (scores[j] != 0) add(mixed.data(), value(b, k, j), scores[j], n.E);
        finish(out + ((b * n.L + l) * n.H + h) * n.E, mixed.data(), found, query(b, h, l), sink_key, sink_value, scaling, n, k);
    }
    return 0;
}

// Rows and registers of a tile of a product: its sums, a row of the right factor and a number of the left one fill the registers there are.
constexpr int ROWS = BYTES == 64 ? 6 : 4, REGISTERS = BYTES == 64 ? 4 : 2;
constexpr int64_t STRETCH = 128;  // keys whose values stay in the first cache while they meet all queries of a block
constexpr int64_t ROOM = 1 << 20;  // bytes of a block's scores: they stay in the second cache

// y = x m, or y += x m, of ROWS rows and C registers of columns: x [ROWS, n], m [n, ..], y [ROWS, ..], with strides between rows.
template <class R, int C, bool ADD> inline void tile(R* y, int64_t y_row, const R* x, int64_t x_row, const R* m, int64_t m_row, int64_t n) {
    V<R> sums[ROWS][C];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) sums[r][c] = ADD ? load<V<R>>(y + r * y_row + c * W<R>) : V<R>{};
    for (int64_t i = 0; i < n; i++) {
        V<R> some[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) some[c] = load<V<R>>(m + i * m_row + c * W<R>);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const V<R> weight = filled<R>(x[r * x_row + i]);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sums[r][c] += weight * some[c];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) store(y + r * y_row + c * W<R>, sums[r][c]);
}

// y += x m of up to REGISTERS registers.
template <class R> inline void add_tile(int registers, R* y, int64_t y_row, const R* x, int64_t x_row, const R* m, int64_t m_row, int64_t n) {
    if (registers == 1) tile<R, 1, true>(y, y_row, x, x_row, m, m_row, n);
    else if (registers == 2) tile<R, 2, true>(y, y_row, x, x_row, m, m_row, n);
    else if (registers == 3) tile<R, 3, true>(y, y_row, x, x_row, m, m_row, n);
    else tile<R, 4, true>(y, y_row, x, x_row, m, m_row, n);
}

inline int64_t rounded(int64_t number, int64_t unit) { return (number + unit - 1) / unit * unit; }

// Many queries: a block of them, of all heads that share keys, meets the keys that it sees; scores stay with its thread.
template <class R>
int mix(R* out, Heads<R> query, Heads<R> key, Heads<R> value, Heads<R> sink_key, Heads<R> sink_value, const uint8_t* mask,
        int64_t batch_stride, int64_t row_stride, R scaling, Shape n, const Code<R>& code, int threads) {
    if ((code.theta && !served(code)) || n.P > 64) return 1;
    const std::vector<Table<R>> tables = tables_of(code);
    const Coder<R> coded = coder_of(code);
    const int64_t G = n.H / n.K, panel = REGISTERS * W<R>, width = rounded(n.S, panel) + W<R>, padded = rounded(n.E, W<R>);
    int64_t block = ROOM / int64_t(sizeof(R)) / (G * width);
    block = block < 4 ? 4 : block > 64 ? 64 : block;
    const int64_t panels = width / panel, blocks = (n.L + block - 1) / block, rows = rounded(G * block, ROWS), groups = n.S / GROUP<R> + 1;
    // keys in panels of columns [S / panel, E, panel], values in rows of whole registers [S, padded]
    std::vector<R> keys(n.N * n.K * width * n.E), values(n.N * n.K * n.S * padded);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t part = 0; part < n.N * n.K * panels; part++) {
            const int64_t head = part / panels, first = part % panels * panel, b = head / n.K, k = head % n.K;
            R* to = keys.data() + head * width * n.E + first * n.E;
            for (int64_t j = 0; j < panel && first + j < n.S; j++) {
                const R *from = key(b, k, first + j), *read = value(b, k, first + j);
                for (int64_t e = 0; e < n.E; e++) to[e * panel + j] = from[e];
                std::memcpy(values.data() + (head * n.S + first + j) * padded, read, n.E * sizeof(R));
            }
        }
        std::vector<R> queries(rows * n.E), scores(rows * width), mixed(rows * padded);
        std::vector<Row<R>> found(rows);
        std::vector<uint8_t> loud(rows * groups);
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < n.N * n.K * blocks; job++) {
            const int64_t start = (blocks - 1 - job / (n.N * n.K)) * block, head = job % (n.N * n.K), b = head / n.K, k = head % n.K;
            const int64_t some = start + block < n.L ? block : n.L - start, used = rounded(G * some, ROWS);
            const int64_t end = seen_by(mask + b * batch_stride + start * row_stride, row_stride, some, n.S, 1);
            for (int64_t row = 0; row < G * some; row++)
                std::memcpy(queries.data() + row * n.E, query(b, k * G + row / some, start + row % some), n.E * sizeof(R));
            std::memset(mixed.data(), 0, used * padded * sizeof(R));
            for (int64_t j = 0; j < end; j += panel)
                for (int64_t row = 0; row < used; row += ROWS)
                    tile<R, REGISTERS, false>(scores.data() + row * width + j, width, queries.data() + row * n.E, n.E,
                                              keys.data() + head * width * n.E + j * n.E, panel, n.E);
            for (int64_t row = 0; row < G * some; row++)
                found[row] = coded(tables[(k * G + row / some) % tables.size()], scores.data() + row * width,
                                   mask + b * batch_stride + (start + row % some) * row_stride, end, scaling, loud.data() + row * groups);
            for (int64_t j = 0; j < end; j += STRETCH)
                for (int64_t row = 0; row < used; row += ROWS)
                    for (int64_t i = j; i < end && i < j + STRETCH; i += GROUP<R>) {
                        bool any = false;
                        for (int r = 0; r < ROWS; r++) any |= loud[(row + r) * groups + i / GROUP<R>];
                        if (!any) continue;
                        for (int64_t e = 0; e < padded; e += panel)
                            add_tile<R>(int((padded - e < panel ? padded - e : panel) / W<R>), mixed.data() + row * padded + e, padded,
                                        scores.data() + row * width + i, width, values.data() + (head * n.S + i) * padded + e, padded,
                                        i + GROUP<R> < end ? GROUP<R> : end - i);
                    }
            for (int64_t row = 0; row < G * some; row++) {
                const int64_t h = k * G + row / some, l = start + row % some;
                finish(out + ((b * n.L + l) * n.H + h) * n.E, mixed.data() + row * padded, found[row], query(b, h, l), sink_key, sink_value,
                       scaling, n, k);
            }
        }
    }
    return 0;
}

// Where the keys end that some query of a block sees, at least 1; masks of N sequences, L queries and S keys.
void visible(int64_t* ends, const uint8_t* mask, int64_t batch_stride, int64_t row_stride, int64_t N, int64_t L, int64_t S, int64_t block) {
    for (int64_t start = 0; start < L; start += block) {
        int64_t end = 1;
        const int64_t some = start + block < L ? block : L - start;
        for (int64_t b = 0; b < N; b++) end = seen_by(mask + b * batch_stride + start * row_stride, row_stride, some, S, end);
        *ends++ = end;
    }
}

// Scores [rows, S] to the exponentials of their distances to the largest that is seen, and that one; a row of each sequence's mask has `heads`.
template <class R>
int exponentials(R* scores, R* tops, const uint8_t* mask, int64_t batch_stride, int64_t row_stride, int64_t N, int64_t H, int64_t L, int64_t S,
                 int threads) {
    const Table<R> none{};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<uint8_t> loud(S / GROUP<R> + 1);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < N * H * L; row++)
            tops[row] = code_row<R, Whole>(none, scores + row * S, mask + row / L / H * batch_stride + row % L * row_stride, S, R(1), loud.data()).top;
    }
    return 0;
}

}  // namespace

extern "C" {
int exponentials_f32(float* scores, float* tops, const uint8_t* mask, int64_t batch_stride, int64_t row_stride, int64_t N, int64_t H, int64_t L,
                     int64_t S, int threads) {
    return exponentials(scores, tops, mask, batch_stride, row_stride, N, H, L, S, threads);
}
int exponentials_f64(double* scores, double* tops, const uint8_t* mask, int64_t batch_stride, int64_t row_stride, int64_t N, int64_t H, int64_t L,
                     int64_t S, int threads) {
    return exponentials(scores, tops, mask, batch_stride, row_stride, N, H, L, S, threads);
}
int mix_f32(float* out, const Heads<float>* heads, const uint8_t* mask, int64_t batch_stride, int64_t row_stride, double scaling,
            const Shape* shape, const Code<float>* code, int threads) {
    return mix(out, heads[0], heads[1], heads[2], heads[3], heads[4], mask, batch_stride, row_stride, float(scaling), *shape, *code, threads);
}
int mix_f64(double* out, const Heads<double>* heads, const uint8_t* mask, int64_t batch_stride, int64_t row_stride, double scaling,
            const Shape* shape, const Code<double>* code, int threads) {
    return mix(out, heads[0], heads[1], heads[2], heads[3], heads[4], mask, batch_stride, row_stride, scaling, *shape, *code, threads);
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
