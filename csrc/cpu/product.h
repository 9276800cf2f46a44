// Products of bf16 matrices for the tile unit (AMX) of x86 CPUs, with K extended by a product that
// is narrow:
//
//     out_i = scale_i · Σ_j left_j · right_ij + bias_i       [rows, width_i]
//
// where a left operand is a matrix or a narrow product scale · left_j · right, which is computed
// first and rounded to bf16, and which is also written out. Sums are float32, in the order of the
// reduction, whatever the number of threads.
#pragma once

#include <cstdint>
#include <vector>

namespace nsru::cpu {

using bf16 = uint16_t;

// Element (i, d), d the index that is summed over: data[i * stride + d], or data[d * stride + i].
struct Matrix {
    const bf16* data;
    int64_t stride;
    bool reduction_first;
};

struct Left {
    Matrix matrix;
    int64_t depth;
};

struct Term {
    int left;  // counts the left operands, then the narrow products
    Matrix right;
};

struct Output {
    void* data;  // bf16, or float32 where `wide`
    bool wide;
    int64_t stride;
    bool transposed;  // element (row, column) goes to data[column * stride + row]
    int64_t width;
    float scale;
    const bf16* bias;  // [width], or nullptr; nullptr where transposed
    std::vector<Term> terms;
};

struct Narrow {
    Output out;   // of one left operand
    float scale;  // of the operand that the product becomes
};

struct Product {
    int64_t rows;
    std::vector<Left> lefts;
    std::vector<Narrow> narrows;
    std::vector<Output> outputs;
};

// Computes products that do not read each other's results, with `threads` threads of the OpenMP
// runtime that PyTorch has loaded.
void multiply(const std::vector<Product>& products, int threads);

}  // namespace nsru::cpu
