// Events: the indices of the inputs that spike, and sums of the rows that they point to. Nothing is done for an input that is silent.

#pragma once

#include "neuron.h"

constexpr int QUAD = 4;  // rows that are added to sums of their own: an addition waits four cycles for the one before

// Where events of up to n inputs end: both lists are filled up to whole quads.
inline int64_t room_of(int64_t n) { return n + 2 * (QUAD - 1) + 32; }  // and a register's indices may be written behind the last

struct Counts {
    uint16_t plus, minus;  // quads of +1 and, behind them, of -1
};

// Indices of the inputs that are `sign`, `first` and upwards.
inline uint16_t* indices(uint16_t* to, const int8_t* spikes, int64_t n, int8_t sign, int first) {
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__)
    __m512i at = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    at = _mm512_add_epi16(at, _mm512_set1_epi16(int16_t(first)));
    for (int64_t i = 0; i < n; i += 64) {
        const uint64_t some = n - i < 64 ? (uint64_t(1) << (n - i)) - 1 : ~uint64_t(0);
        const __m512i bytes = _mm512_maskz_loadu_epi8(some, spikes + i);
        const uint64_t hit = _mm512_mask_cmpeq_epi8_mask(some, bytes, _mm512_set1_epi8(sign));
        for (int half = 0; half < 2; half++) {
            const uint32_t own = uint32_t(hit >> (32 * half));
            if (own) _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(own, at));
            to += __builtin_popcount(own);
            at = _mm512_add_epi16(at, _mm512_set1_epi16(32));
        }
    }
#else
    for (int64_t i = 0; i < n; i += 8) {
        uint64_t eight = 0;
        const int64_t some = n - i < 8 ? n - i : 8;
        std::memcpy(&eight, spikes + i, some);
        if (!eight) continue;
        for (int64_t j = 0; j < some; j++) {
            *to = uint16_t(first + i + j);
            to += spikes[i + j] == sign;
        }
    }
#endif
    return to;
}

inline uint16_t* filled_up(uint16_t* to, int64_t& number, uint16_t none) {
    while (number % QUAD) *to++ = none, number++;
    return to;
}

// Events of several trains in a row, of one sign after the other, as one list of quads; `none` is the index of a row of zeros.
template <class Each> inline Counts listed(uint16_t* to, uint16_t none, Each each) {
    int64_t number[2];
    for (int minus = 0; minus < 2; minus++) {
        uint16_t* start = to;
        to = each(to, int8_t(minus ? -1 : 1));
        number[minus] = to - start;
        to = filled_up(to, number[minus], none);
    }
    return {uint16_t(number[0] / QUAD), uint16_t(number[1] / QUAD)};
}

// The sum of rows [.., C registers] that events point to, those of -1 taken away.
template <class R, int C> inline void gathered(V<R>* sum, const R* rows, const uint16_t* events, Counts counts) {
    V<R> parts[QUAD][C] = {};
    for (int n = 0; n < counts.plus; n++, events += QUAD)
#pragma GCC unroll 4
        for (int q = 0; q < QUAD; q++)
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) parts[q][c] += load<V<R>>(rows + int64_t(events[q]) * (C * W<R>) + c * W<R>);
    for (int n = 0; n < counts.minus; n++, events += QUAD)
#pragma GCC unroll 4
        for (int q = 0; q < QUAD; q++)
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) parts[q][c] -= load<V<R>>(rows + int64_t(events[q]) * (C * W<R>) + c * W<R>);
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) sum[c] = (parts[0][c] + parts[1][c]) + (parts[2][c] + parts[3][c]);
}
