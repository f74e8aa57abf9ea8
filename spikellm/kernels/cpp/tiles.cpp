// `spike_linear` in tiles: the weights' digits are made once a call, for some columns at a time.

#include "product.h"
#include "tiles.h"

#ifdef TILES
namespace {

constexpr int64_t BLOCK = 32;       // rows whose currents of all steps are made together
constexpr int64_t KEPT = 16 << 20;  // bytes of digits at a time, of 256 columns at least

template <class X> int linear(const Currents<float>& to, const Train& train, const X* weight, const Product& n, int threads) {
    const int64_t S = n.T * n.P, in_group = n.I / n.groups, steps = (in_group + DEPTH - 1) / DEPTH, all = n.groups * steps;
    if (!tiles_allowed() || in_group > MOST) return 1;
    const int64_t tile_bytes = all * DIGITS * BYTES_OF, blocks = (n.N + BLOCK - 1) / BLOCK;
    const int64_t width = std::min(std::max<int64_t>(KEPT / tile_bytes, 16), (n.O + SIDE - 1) / SIDE) * SIDE;
    const bool whole = in_group % DEPTH == 0;  // else groups are copied, each filled up with zeros
    Aligned<int8_t> right(width / SIDE * tile_bytes);
    Aligned<float> units(width * n.groups);  // [tiles, groups, 16]
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Tiles tiles;
        Aligned<float> column(steps * DEPTH);
        Aligned<int8_t> copies(S * BLOCK * all * DEPTH);
        std::vector<uint8_t> awake(S * BLOCK / SIDE * all);
        Sums sums;
        for (int64_t first = 0; first < n.O; first += width) {
            const int64_t end = std::min(first + width, n.O);
#pragma omp for schedule(static)
            for (int64_t tile = first; tile < end; tile += SIDE) {
                int8_t* own = right.data() + (tile - first) / SIDE * tile_bytes;
                float* unit = units.data() + (tile - first) * n.groups;
                for (int64_t j = 0; j < SIDE; j++)
                    for (int64_t g = 0; g < n.groups; g++) {
                        std::fill_n(column.data() + in_group / 16 * 16, steps * DEPTH - in_group / 16 * 16, 0.0f);
                        if (tile + j < end)
                            for (int64_t i = 0; i < in_group; i++) column.data()[i] = wide(weight[(tile + j) * n.I + g * in_group + i]);
                        else
                            std::fill_n(column.data(), in_group, 0.0f);
                        unit[g * SIDE + j] = unit_of(column.data(), steps * DEPTH);
                        put_column(own + g * steps * DIGITS * BYTES_OF, column.data(), steps, j, unit[g * SIDE + j]);
                    }
            }
#pragma omp for schedule(dynamic)
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t start = block * BLOCK, some = std::min(BLOCK, n.N - start), parts = (some + SIDE - 1) / SIDE;
                Train from = {train.at + start * train.row, train.step, train.wire, train.row};
                if (!whole || some % SIDE) {
                    const int64_t row_bytes = all * DEPTH;
                    std::memset(copies.data(), 0, S * BLOCK * row_bytes);
                    for (int64_t s = 0; s < S; s++)
                        for (int64_t r = 0; r < some; r++)
                            for (int64_t g = 0; g < n.groups; g++)
                                std::memcpy(copies.data() + (s * BLOCK + r) * row_bytes + g * steps * DEPTH,
                                            from.at + s / n.P * from.step + s % n.P * from.wire + r * from.row + g * in_group, in_group);
                    from = {copies.data(), n.P * BLOCK * row_bytes, BLOCK * row_bytes, row_bytes};
                }
                const auto spikes = [&](int64_t s, int64_t part) {
                    return from.at + s / n.P * from.step + s % n.P * from.wire + part * SIDE * from.row;
                };
                for (int64_t s = 0; s < S; s++)
                    for (int64_t part = 0; part < parts; part++)
                        for (int64_t k = 0; k < all; k++)
                            awake[(s * parts + part) * all + k] = any_of(spikes(s, part) + k * DEPTH, from.row);
                for (int64_t tile = first; tile < end; tile += SIDE) {
                    const int8_t* own = right.data() + (tile - first) / SIDE * tile_bytes;
                    const float* unit = units.data() + (tile - first) * n.groups;
                    const __mmask16 columns = end - tile < SIDE ? (1 << (end - tile)) - 1 : 0xffff;
                    const __m512 bias = to.bias ? _mm512_maskz_loadu_ps(columns, to.bias + tile) : _mm512_setzero_ps();
                    for (int64_t part = 0; part < parts; part++) {
                        const int64_t rows = std::min(SIDE, some - part * SIDE);
                        __m512 current[SIDE];
                        for (auto& row : current) row = bias;
                        for (int64_t t = 0; t < n.T; t++) {
                            for (int64_t s = t * n.P; s < (t + 1) * n.P; s++)
                                for (int64_t g = 0; g < n.groups; g++) {
                                    const uint8_t* any = awake.data() + (s * parts + part) * all + g * steps;
                                    const int8_t* left = spikes(s, part) + g * steps * DEPTH;
                                    bool silent = true;
                                    start_sums();
                                    for (int64_t k = 0; k < steps; k++) {
                                        if (!any[k]) continue;
                                        silent = false;
                                        add_spikes(left + k * DEPTH, from.row, own + (g * steps + k) * DIGITS * BYTES_OF);
                                    }
                                    if (silent) continue;
                                    sums.keep();
                                    const __m512 weight = _mm512_mul_ps(_mm512_load_ps(unit + g * SIDE), _mm512_set1_ps(to.d[g * to.d_group + s]));
                                    for (int64_t r = 0; r < SIDE; r++) {
                                        __m512 sum = sums.row(r);
                                        if (to.scale && r < rows) sum = _mm512_mul_ps(sum, _mm512_set1_ps(to.scale[start + part * SIDE + r]));
                                        current[r] = _mm512_fmadd_ps(sum, weight, current[r]);
                                    }
                                }
                            if (n.summed && t + 1 < n.T) continue;
                            float* out = to.out + ((n.summed ? 0 : t * n.N) + start + part * SIDE) * n.O + tile;
                            for (int64_t r = 0; r < rows; r++) _mm512_mask_storeu_ps(out + r * n.O, columns, current[r]);
                            for (auto& row : current) row = _mm512_setzero_ps();
                        }
                    }
                }
            }
        }
    }
    return 0;
}

}  // namespace

int tiled_linear(const Currents<float>& to, const Train& train, const float* weight, const Product& n, int threads) {
    return linear(to, train, weight, n, threads);
}
int tiled_linear(const Currents<float>& to, const Train& train, const uint16_t* weight, const Product& n, int threads) {
    return linear(to, train, weight, n, threads);
}
#else
int tiled_linear(const Currents<float>&, const Train&, const float*, const Product&, int) { return 1; }
int tiled_linear(const Currents<float>&, const Train&, const uint16_t*, const Product&, int) { return 1; }
#endif
