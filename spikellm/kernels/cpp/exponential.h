// e^x for x <= 0, within 2 units in the last place: 2^n times the Taylor series of e^r, |r| <= ln(2) / 2; 0 where a number would have none.

#pragma once

#include "neuron.h"

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
