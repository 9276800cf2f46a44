// The narrow products around the GEMM, each bound by reading X once. No torch, no CUDA header.
//
//     rows      P[M, R] = scaling · X[M, C]·V[R, C]ᵀ      S = x Āᵀ, dS = dY B
//     columns   D[C, R] = scaling · Xᵀ·P[M, R]            dB = s dYᵀ S, dĀᵀ = s xᵀ dS; on request,
//               P'[M, R] = rows_scaling · X·V[C, R]       from the same read of X, dS as well
//
// bf16 or fp16, float32 accumulators, sums in a fixed order. X's rows start at multiples of 16
// bytes and C is a multiple of 8; R is free.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "place.h"

namespace nsru {

// Every matrix is row-major and its leading dimension, in elements, is the distance of two rows.
struct RowsProductArgs {
    const void* x_gmem;
    const void* v_gmem;  // [R, C], rows aligned like X's
    void* out_gmem;
    int64_t m, c, r;
    int64_t ldx, ldv, ldo;
    float scaling;
    Dtype dtype;
};

struct ColumnsProductArgs {
    const void* x_gmem;
    const void* p_gmem;  // [M, R], rows aligned like X's
    void* d_gmem;        // [C, R], or [R, C] where rank_first; contiguous
    const void* v_gmem;  // [C, R], or null: no second product
    void* rows_gmem;     // [M, R]; null where V is
    int64_t m, c, r;
    int64_t ldx, ldp, ldv, ldrows;
    float scaling, rows_scaling;
    bool rank_first;
    Dtype dtype;
};

// Enqueue; leave the current device as it was. Throw std::invalid_argument naming the argument and
// its value, std::runtime_error naming the CUDA call.
void launch_rows_product(const RowsProductArgs& args, const Place& place);
void launch_columns_product(const ColumnsProductArgs& args, const Place& place);

}  // namespace nsru
