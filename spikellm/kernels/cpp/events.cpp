// Products of spikes and weights: temporal.py's `spike_linear`, event by event, all steps in one pass over the weights.

#include <memory>

#include "events.h"
#include "product.h"

namespace {

constexpr int TILE = 2;                              // registers of output channels
constexpr int64_t CHANNELS = BYTES == 64 ? 288 : 320;  // input channels whose weights of a tile stay in the first cache (36 KB, or 20)
constexpr int64_t LISTS = 4 << 20;                   // bytes of events that are looked up together

struct Segment {
    int64_t first, size, group, room;  // channels, all of one group; where their events begin
};

template <class R, class X> int linear(const Currents<R>& to, const Train& train, const X* weight, const Product& n, int threads) {
    const int64_t S = n.T * n.P, width = TILE * W<R>, tiles = (n.O + width - 1) / width, in_group = n.I / n.groups;
    std::vector<Segment> segments;
    int64_t room = 0;
    for (int64_t group = 0; group < n.groups; group++) {
        const int64_t parts = (in_group + CHANNELS - 1) / CHANNELS, size = (in_group + parts - 1) / parts;
        for (int64_t first = 0; first < in_group; first += size) {
            segments.push_back({group * in_group + first, std::min(size, in_group - first), group, room});
            room += room_of(segments.back().size);
        }
    }
    const int64_t parts = segments.size();
    int64_t block = std::max<int64_t>(LISTS / int64_t(sizeof(uint16_t)) / (room * S), 16);
    const int64_t blocks = (n.N + block - 1) / block;
    block = (n.N + blocks - 1) / blocks;
    std::vector<Counts> counts(parts * block * S);
    std::unique_ptr<uint16_t[]> events(new uint16_t[block * S * room]);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<R> own((CHANNELS + 1) * width + BYTES / sizeof(R));
        R* rows = own.data() + (BYTES - reinterpret_cast<uintptr_t>(own.data()) % BYTES) / sizeof(R);  // no load crosses a cache line
        for (int64_t start = 0; start < n.N; start += block) {
            const int64_t some = std::min(block, n.N - start);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < some; row++)
                for (int64_t s = 0; s < S; s++) {
                    const int8_t* spikes = train.at + s / n.P * train.step + s % n.P * train.wire + (start + row) * train.row;
                    for (int64_t part = 0; part < parts; part++) {
                        const Segment& g = segments[part];
                        counts[(part * block + row) * S + s] =
                            listed(events.get() + (row * S + s) * room + g.room, uint16_t(g.size), [&](uint16_t* list, int8_t sign) {
                                return indices(list, spikes + g.first, g.size, sign, 0);
                            });
                    }
                }
#pragma omp for schedule(dynamic)
            for (int64_t tile = 0; tile < tiles; tile++) {
                const int64_t column = tile * width, columns = std::min(width, n.O - column);
                for (int64_t part = 0; part < parts; part++) {
                    const Segment& g = segments[part];
                    for (int64_t j = 0; j < columns; j++) {
                        const X* from = weight + (column + j) * n.I + g.first;
                        for (int64_t i = 0; i < g.size; i++) rows[i * width + j] = wide(from[i]);
                    }
                    for (int64_t j = columns; j < width; j++)
                        for (int64_t i = 0; i < g.size; i++) rows[i * width + j] = 0;
                    std::fill_n(rows + g.size * width, width, R(0));
                    const R* d = to.d + g.group * to.d_group;
                    V<R> bias[TILE] = {};
                    if (to.bias && part == 0)
                        for (int c = 0; c < TILE; c++) {
                            const int64_t left = std::min<int64_t>(std::max<int64_t>(columns - c * W<R>, 0), W<R>);
                            bias[c] = load_some<V<R>>(to.bias + column + c * W<R>, left);
                        }
                    for (int64_t row = 0; row < some; row++) {
                        const R scale = to.scale ? to.scale[start + row] : R(1);
                        const Counts* own_counts = counts.data() + (part * block + row) * S;
                        const uint16_t* list = events.get() + row * S * room + g.room;
                        V<R> current[TILE];
                        for (int c = 0; c < TILE; c++) current[c] = bias[c];
                        for (int64_t t = 0; t < n.T; t++) {
                            for (int64_t p = 0; p < n.P; p++, own_counts++, list += room) {
                                if (!(own_counts->plus | own_counts->minus)) continue;
                                V<R> sum[TILE];
                                gathered<R, TILE>(sum, rows, list, *own_counts);
                                const R factor = d[t * n.P + p] * scale;
                                for (int c = 0; c < TILE; c++) current[c] += factor * sum[c];
                            }
                            if (n.summed && t + 1 < n.T) continue;
                            for (int c = 0; c < TILE; c++)
                                __builtin_prefetch(to.out + ((n.summed ? 0 : t * n.N) + start + row + 2) * n.O + column + c * W<R>, 1);
                            R* out = to.out + ((n.summed ? 0 : t * n.N) + start + row) * n.O + column;
                            if (columns == width) {
                                for (int c = 0; c < TILE; c++)
                                    store(out + c * W<R>, part ? load<V<R>>(out + c * W<R>) + current[c] : current[c]);
                            } else {
                                for (int64_t j = 0; j < columns; j++) out[j] = (part ? out[j] : 0) + current[j / W<R>][j % W<R>];
                            }
                            for (int c = 0; c < TILE; c++) current[c] = V<R>{};
                        }
                    }
                }
            }
        }
    }
    return 0;
}

}  // namespace

extern "C" {
int spike_linear_f32(const Currents<float>* to, const Train* train, const void* weight, int narrow, const Product* n, int threads) {
    const auto product = [&](const auto* own) {
        return tiled_linear(*to, *train, own, *n, threads) == 0 ? 0 : linear(*to, *train, own, *n, threads);
    };
    return narrow ? product(static_cast<const uint16_t*>(weight)) : product(static_cast<const float*>(weight));
}
int spike_linear_f64(const Currents<double>* to, const Train* train, const void* weight, int, const Product* n, int threads) {
    return linear(*to, *train, static_cast<const double*>(weight), *n, threads);
}
}
