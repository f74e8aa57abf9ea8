// Products of spikes and numbers in the tiles of AMX: 16 x 16 sums of 64 products of bytes in 16 cycles.
//
// A spike is a byte as it is. A number is four: a column's numbers are integers of 30 bits in units of a power of two, and these are
// digits to base 256 between -128 and 127. Sums are exact until they are put together: no number loses more than 2^-30 of its column's
// largest, less than float32 loses over a sum.

#pragma once

#include "neuron.h"

#if defined(__AMX_INT8__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__linux__)
#define TILES 1
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t SIDE = 16, DEPTH = 64, BYTES_OF = 1024;  // rows and columns of a tile of sums, inputs that it adds at a time, their bytes
constexpr int DIGITS = 4;
constexpr int64_t MOST = 32768;  // inputs: sums of digits stay within 31 bits when two of them are put together

// Linux gives tiles to those who ask, once for a process.
inline bool tiles_allowed() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
    return allowed;
}

// While it lives its thread has eight whole tiles.
struct Tiles {
    struct alignas(64) Shapes {
        uint8_t palette = 1, start = 0, none[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    };
    Tiles() {
        Shapes shapes;
        for (int i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = 16;
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }
};

template <class T> struct Aligned {
    std::vector<T> own;
    explicit Aligned(int64_t n) : own(n + 64 / sizeof(T)) {}
    T* data() { return own.data() + (64 - reinterpret_cast<uintptr_t>(own.data()) % 64) % 64 / sizeof(T); }
};

// The unit of up to n numbers (a multiple of 16), 2^-30 of a power of two that none exceeds; 0 where there are only zeros.
inline float unit_of(const float* x, int64_t n) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
    const float largest = _mm512_reduce_max_ps(most);
    return largest < 0x1p-90f ? 0 : std::ldexp(1.0f, std::ilogb(largest) - 29);
}

// Digit d of each of 16 numbers in bytes 16 d and on.
inline __m512i digits(const float* x, __m512 scale) {
    const __m512i bias = _mm512_set1_epi32(0x00808080);  // a digit of 128 and more becomes negative, and the next one is one more
    const __m512i whole = _mm512_xor_si512(_mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), scale)), bias), bias);
    const __m512i order = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    const __m512i lanes = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return _mm512_permutexvar_epi32(lanes, _mm512_shuffle_epi8(whole, order));
}

inline float reciprocal(float unit) { return unit == 0 ? 0 : 1 / unit; }

// Column j of a tile of the right factor, [steps, DIGITS, 16, 16, 4] bytes: four inputs of a column lie in a row.
inline void put_column(int8_t* to, const float* x, int64_t steps, int64_t j, float unit) {
    const __m512 scale = _mm512_set1_ps(reciprocal(unit));
    alignas(64) int32_t four[16];
    for (int64_t i = 0; i < steps * DEPTH; i += 16) {
        _mm512_store_si512(four, digits(x + i, scale));
        int8_t* tile = to + i / DEPTH * DIGITS * BYTES_OF + i % DEPTH / 4 * 64 + j * 4;
        for (int d = 0; d < DIGITS; d++)
            for (int k = 0; k < 4; k++) std::memcpy(tile + d * BYTES_OF + k * 64, four + d * 4 + k, 4);
    }
}

struct Sums {
    alignas(64) int32_t digit[DIGITS][SIDE * SIDE];

    // Row r of the sums, in units.
    __m512 row(int64_t r) const {
        const auto part = [&](int d) { return _mm512_load_si512(digit[d] + r * SIDE); };
        const __m512i low = _mm512_add_epi32(part(0), _mm512_slli_epi32(part(1), 8));
        const __m512i high = _mm512_add_epi32(part(2), _mm512_slli_epi32(part(3), 8));
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(65536.0f), _mm512_cvtepi32_ps(low));
    }

    void keep() {
        _tile_stored(0, digit[0], 64);
        _tile_stored(1, digit[1], 64);
        _tile_stored(2, digit[2], 64);
        _tile_stored(3, digit[3], 64);
    }
};

inline void start_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Sums += 16 rows of 64 spikes x a step of the right factor's digits.
inline void add_spikes(const int8_t* spikes, int64_t stride, const int8_t* right) {
    _tile_loadd(4, spikes, stride);
    _tile_loadd(5, right, 64);
    _tile_dpbssd(0, 4, 5);
    _tile_loadd(6, right + BYTES_OF, 64);
    _tile_dpbssd(1, 4, 6);
    _tile_loadd(5, right + 2 * BYTES_OF, 64);
    _tile_dpbssd(2, 4, 5);
    _tile_loadd(6, right + 3 * BYTES_OF, 64);
    _tile_dpbssd(3, 4, 6);
}

// Whether any of 16 rows of 64 bytes is not 0.
inline bool any_of(const int8_t* bytes, int64_t stride) {
    __m512i any = _mm512_setzero_si512();
    for (int r = 0; r < SIDE; r++) any = _mm512_or_si512(any, _mm512_loadu_si512(bytes + r * stride));
    return _mm512_test_epi64_mask(any, any) != 0;
}

}  // namespace
#endif
