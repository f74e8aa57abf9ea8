// Histograms of |x| for calibration: histogram.py's `tally_plain` in one pass over memory.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Layout {
    int64_t A, C, J, K;    // sizes: outer, groups, rows, numbers of a row
    int64_t sides, bins;   // histograms of a group, bins of each
    int64_t shift, first;  // a float32's bits without the last `shift` are its bin's number plus `first`
};

template <class R> struct Strided {
    const R* at;
    int64_t a, c, j, k;
    const R* row(int64_t outer, int64_t group, int64_t number) const { return at ? at + outer * a + group * c + number * j : at; }
};

struct Bin {
    int64_t count;
    double weight;
};

// Rows of one group whose numbers are counted by themselves and added in their order: sums do not depend on the number of threads.
constexpr int64_t PARTS = 8, SOME = 1 << 15;

struct Part {
    std::vector<Bin> bins;      // one more than there are, for what is counted nowhere
    int32_t peaks[2] = {0, 0};  // bits of the largest |x| of each side; those of NaN and infinity are larger than a number's
};

// The bins of up to AT_ONCE numbers, in vectors; each number's own is then sought in memory.
constexpr int64_t AT_ONCE = 256;

template <bool MASKED>
void find_bins(int32_t* found, int32_t* peaks, const float* x, const uint8_t* shown, int64_t step, int64_t number, const Layout& n) {
    const int32_t shift = int32_t(n.shift), first = int32_t(n.first), bins = int32_t(n.bins), nowhere = int32_t(n.sides * n.bins);
    const int32_t two = n.sides == 2 ? -1 : 0;
    int32_t above = peaks[0], below = peaks[1];
    for (int64_t k = 0; k < number; k++) {
        int32_t bits;
        std::memcpy(&bits, x + k, sizeof(bits));
        bits &= 0x7fffffff;
        // masks, for a choice by branches would be guessed wrong half of the time
        const int32_t negative = -int32_t(x[k] < 0) & two, counts = MASKED ? -int32_t(shown[k * step] != 0) : -1;
        const int32_t up = bits & counts & ~negative, down = bits & counts & negative;
        above = up > above ? up : above, below = down > below ? down : below;
        int32_t bin = (bits >> shift) - first;
        bin = bin < 0 ? 0 : bin;
        const int32_t counted = counts & -int32_t(bin < bins);  // too large: the peak tells
        found[k] = (counted & (bin + (negative & bins))) | (~counted & nowhere);
    }
    peaks[0] = above, peaks[1] = below;
}

template <class R> void count(Part& part, const float* x, const R* weight, int64_t weight_step, const uint8_t* shown, int64_t shown_step, const Layout& n) {
    int32_t found[AT_ONCE];
    Bin* bins = part.bins.data();
    for (int64_t start = 0; start < n.K; start += AT_ONCE) {
        const int64_t number = n.K - start < AT_ONCE ? n.K - start : AT_ONCE;
        if (shown) find_bins<true>(found, part.peaks, x + start, shown + start * shown_step, shown_step, number, n);
        else find_bins<false>(found, part.peaks, x + start, nullptr, 0, number, n);
        for (int64_t k = 0; k < number; k++) bins[found[k]].count++;
        if (!weight) continue;
        const R* own = weight + start * weight_step;
        if (weight_step)
            for (int64_t k = 0; k < number; k++) bins[found[k]].weight += double(own[k * weight_step]);
        else
            for (int64_t k = 0; k < number; k++) bins[found[k]].weight += double(own[0]);
    }
}

template <class R>
void tally(int64_t* counts, double* weights, float* peaks, Strided<float> x, Strided<R> weight, Strided<uint8_t> shown, const Layout& n,
           int threads) {
    const int64_t rows = n.A * n.J;
    int64_t parts = rows * n.K / SOME;
    parts = parts < 1 ? 1 : parts > PARTS ? PARTS : parts;
    parts = parts > rows ? rows : parts;
    std::vector<Part> found(n.C * parts);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t job = 0; job < n.C * parts; job++) {
        const int64_t group = job / parts, from = job % parts * rows / parts, to = (job % parts + 1) * rows / parts;
        Part& part = found[job];
        part.bins.assign(n.sides * n.bins + 1, Bin{0, 0});
        for (int64_t row = from; row < to; row++) {
            const int64_t a = row / n.J, j = row % n.J;
            const float* at = x.row(a, group, j);
            const R* w = weight.row(a, group, j);
            const uint8_t* s = shown.row(a, group, j);
            count(part, at, w, weight.k, s, shown.k, n);
        }
    }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t group = 0; group < n.C; group++)
        for (int64_t side = 0; side < n.sides; side++) {
            const int64_t row = side * n.C + group;
            for (int64_t number = 0; number < parts; number++) {
                const Part& part = found[group * parts + number];
                int32_t most;
                std::memcpy(&most, peaks + row, sizeof(most));
                if (part.peaks[side] > most) std::memcpy(peaks + row, &part.peaks[side], sizeof(most));
                for (int64_t bin = 0; bin < n.bins; bin++) {
                    const Bin& own = part.bins[side * n.bins + bin];
                    if (!own.count) continue;
                    counts[row * n.bins + bin] += own.count;
                    if (weights) weights[row * n.bins + bin] += own.weight;
                }
            }
        }
}

}  // namespace

extern "C" {
void tally_f32(int64_t* counts, double* weights, float* peaks, const Strided<float>* x, const Strided<float>* weight,
               const Strided<uint8_t>* shown, const Layout* layout, int threads) {
    tally(counts, weights, peaks, *x, *weight, *shown, *layout, threads);
}
void tally_f64(int64_t* counts, double* weights, float* peaks, const Strided<float>* x, const Strided<double>* weight,
               const Strided<uint8_t>* shown, const Layout* layout, int threads) {
    tally(counts, weights, peaks, *x, *weight, *shown, *layout, threads);
}
}
