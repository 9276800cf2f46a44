// Both passes of projected linears that read the same x, as products; one linear is a group of one.
//
//     forward    S_i = x Ā_iᵀ          y_i = [x ∣ s_i S_i]·[W_i ∣ B_i]ᵀ + b_i
//     backward   dS_i = s_i dY_i B_i   dX = [dY_1 ∣ dY_2 ∣ … ∣ dS]·[W_1 ; W_2 ; … ; Ā]
//                dĀ = dSᵀ x            dB_i = s_i dY_iᵀ S_i
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "product.h"

namespace nsru::cpu {

// Rows or columns are contiguous, or there is one of them. dĀ and dB are float32, all else is bf16.
struct Tensor {
    void* data;
    int64_t rows, columns, row_stride, column_stride;
};
using Maybe = std::optional<Tensor>;

struct Member {
    Tensor w, b;  // [N, K], [N, R]
    float scaling;
    const bf16* bias;  // [N], or nullptr
    Maybe y;           // [M, N]; forward only
    Maybe dy, db;      // backward only: where y was used; where dB is wanted
};

// x [M, K], Ā [ΣR, K], S and dS [M, ΣR].
void forward(const Tensor& x, const Tensor& a, const Tensor& s, const std::vector<Member>& members,
             int threads);

// dS is written where dX or dĀ is; columns of a missing dY are left as they are.
void backward(const Tensor& x, const Tensor& a, const Tensor& s, const Tensor& ds, const Maybe& dx,
              const Maybe& da, const std::vector<Member>& members, int threads);

}  // namespace nsru::cpu
