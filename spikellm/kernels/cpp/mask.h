// Masks of attention: a row of bytes for each query, 1 where it may see a key.

#pragma once

#include <cstdint>

// Behind the last of S keys that any of some queries may see, `least` at least.
inline int64_t seen_by(const uint8_t* mask, int64_t row_stride, int64_t rows, int64_t S, int64_t least) {
    int64_t end = least;
    for (int64_t row = 0; row < rows; row++) {
        int64_t last = S;
        while (last > end && !mask[row * row_stride + last - 1]) last--;
        end = last;
    }
    return end;
}
