// The sketch update in one launch that reads X from memory once. No torch, no CUDA header.
//
//     S = round(X Ω)     Y += Xᵀ S     H += Sᵀ S     trace = ‖X‖²     over the rows that a mask
//     keeps
//
// bf16 or fp16, float32 accumulators, sums in a fixed order. X's rows start at multiples of 16
// bytes and K is a multiple of 8; M and L are free.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "place.h"

namespace nsru {

// Every matrix is row-major and its leading dimension, in elements, is the distance of two rows.
struct SketchUpdateArgs {
    const void* x_gmem;      // [M, K]
    const void* omega_gmem;  // [K, L rounded up to a multiple of 8], rows aligned like X's
    const void* mask_gmem;   // bool [M], or null: all rows
    float* y_gmem;           // [K, L], contiguous
    float* h_gmem;           // [L, L], contiguous
    double* trace_gmem;      // []
    int64_t m, k, l;
    int64_t ldx, ldomega;
    bool split;           // S is the sum of two 16-bit numbers
    double limit;         // Y and H stay as they are unless the trace is below it
    int64_t panel_bytes;  // of X; two panels should fit in L2
    Dtype dtype;
};

// Enqueues; leaves the current device as it was. Throws std::invalid_argument naming the argument
// and its value, std::runtime_error naming the CUDA call.
void launch_sketch_update(const SketchUpdateArgs& args, const Place& place);

}  // namespace nsru
