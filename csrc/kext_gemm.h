// out[M, N] = X[M, K]·W + P[M, R]·V + bias[N]: one GEMM over K and R with two operand sources.
// No torch, no CUDA header.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"
#include "place.h"

namespace nsru {

// How W and V lie in memory. kNK: W is [N, K], V is [N, R]; kKN: W is [K, N], V is [R, N].
enum class KextLayout { kNK = 0, kKN = 1 };

constexpr int kKextDtypes = 2;  // bf16 and fp16
constexpr int kKextLayouts = 2;
constexpr int kChooseConfig = -1;

// Every matrix is row-major and its leading dimension, in elements, is the distance of two rows.
// `bias` may be null.
struct KextGemmArgs {
    const void* x_gmem;
    const void* w_gmem;
    const void* p_gmem;
    const void* v_gmem;
    const void* bias_gmem;
    void* out_gmem;
    int64_t m, n, k, r;
    int64_t ldx, ldw, ldp, ldv, ldo;
    Dtype dtype;
    KextLayout layout;
    int config;   // index into kConfigs, or kChooseConfig
    int swizzle;  // tiles of N (or M) that neighbouring clusters share through L2: 1, 2, 4 or 8
    // The kernel of ours that makes P was enqueued last and nothing else read here is younger: the
    // GEMM may start on X and W while that kernel ends. Kernels that write nothing that is read
    // here may lie between; `out` is written after they have ended.
    bool after_narrow;
};

// What one compiled kernel asks of a multiprocessor.
struct KextKernel {
    const char* config;
    Dtype dtype;
    KextLayout layout;
    int stages;
    int threads;
    int shared_bytes;
};

// Every kernel in this module; needs no GPU.
std::vector<KextKernel> kext_kernels();

// Enqueues; leaves the current device as it was. Throws std::invalid_argument naming the argument
// and its value, std::runtime_error naming the CUDA call, its code and its meaning.
void launch_kext_gemm(const KextGemmArgs& args, const Place& place);

}  // namespace nsru
