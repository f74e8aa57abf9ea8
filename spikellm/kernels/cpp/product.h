// A product of spikes and weights, as temporal.py's `spike_linear` defines it: who reads what.

#pragma once

#include "neuron.h"

// spikes [T, P, N, I] with strides, the last 1
struct Train {
    const int8_t* at;
    int64_t step, wire, row;
};

// d [C, ..] of T steps and P populations, `d_group` apart; factors of rows and biases may be missing
template <class R> struct Currents {
    R* out;  // [T, N, O], or their sum over time [N, O]
    const R *d, *scale, *bias;
    int64_t d_group;
};

struct Product {
    int64_t N, I, O, T, P, groups, summed;
};

inline float wide(float x) { return x; }
inline double wide(double x) { return x; }
inline float wide(uint16_t bits) {  // bfloat16
    const uint32_t whole = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &whole, sizeof(x));
    return x;
}

// tiles.cpp: by a processor's matrix unit; 1 where there is none.
int tiled_linear(const Currents<float>& to, const Train& train, const float* weight, const Product& n, int threads);
int tiled_linear(const Currents<float>& to, const Train& train, const uint16_t* weight, const Product& n, int threads);
