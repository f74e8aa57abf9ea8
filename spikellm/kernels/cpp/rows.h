// Rows that are made, and coded while they lie in the first cache.

#pragma once

#include "neuron.h"

// Codes n inputs of one group, also in place.
template <class R> using Coder = void (*)(const Table<R>& table, const R* from, R* to, int64_t n);

// Of the kind of digits that a code has; compiled once, in elementwise.cpp.
template <class R> Coder<R> coder_of(const Code<R>& code);

// N rows y of D numbers, each by `make(row, to)`. The groups of the code are equal parts of a row, or rows: so many together are of one.
// A code without steps leaves rows as they are.
template <class R, class Make> int coded_rows(R* y, int64_t N, int64_t D, const Code<R>& code, int threads, Make make) {
    const bool coded = code.steps > 0;
    if (coded && (!served(code) || (!code.together && D % code.groups))) return 1;
    const std::vector<Table<R>> tables = coded ? tables_of(code) : std::vector<Table<R>>();
    const Coder<R> encode = coded ? coder_of(code) : nullptr;
    const int64_t part = coded && !code.together ? D / code.groups : D;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < N; row++) {
        R* to = y + row * D;
        make(row, to);
        if (code.together) encode(tables[row / code.together % code.groups], to, to, D);
        else
            for (size_t group = 0; group < tables.size(); group++) encode(tables[group], to + group * part, to + group * part, part);
    }
    return 0;
}
