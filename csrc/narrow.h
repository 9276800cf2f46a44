// The narrow product of backward, bound by reading X = dY once. No torch, no CUDA header.
//
//     D[C, R] = scaling · Xᵀ·P[M, R]          dB = s dYᵀ S
//     P'[M, R] = rows_scaling · X·V[C, R]     dS = s dY B
//
// bf16 or fp16, float32 accumulators, sums in a fixed order. X's rows start at multiples of 16
// bytes and C is a multiple of 8; R is free up to kMaxRanksTogether.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "place.h"

namespace nsru {

// Every matrix is row-major and its leading dimension, in elements, is the distance of two rows.
struct ColumnsProductArgs {
    const void* x_gmem;
    const void* p_gmem;  // [M, R], rows aligned like X's
    void* d_gmem;        // [C, R], contiguous
    const void* v_gmem;  // [C, R]
    void* rows_gmem;     // [M, R]
    int64_t m, c, r;
    int64_t ldx, ldp, ldv, ldrows;
    float scaling, rows_scaling;
    Dtype dtype;
};

// Enqueues; leaves the current device as it was. Throws std::invalid_argument naming the argument
// and its value, std::runtime_error naming the CUDA call.
void launch_columns_product(const ColumnsProductArgs& args, const Place& place);

}  // namespace nsru
