// Ā = A - (A U) Uᵀ, float32.
#pragma once

#include <cstdint>
#include <vector>

namespace nsru::cpu {

// U [K, Q], rows contiguous.
struct Basis {
    const float* data;
    int64_t k, q, stride;
};

// A and Ā [rank, K], contiguous.
struct Adapter {
    const float* a;
    float* projected;
    int64_t rank;
};

// For adapters with one basis, with `threads` threads as in product.h; the result does not depend
// on their number.
void project(const Basis& basis, const std::vector<Adapter>& adapters, int threads);

}  // namespace nsru::cpu
