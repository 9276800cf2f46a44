// Device code of the narrow product: a tall X [M, C] against a few columns, bound by reading X.
//
//     columns_kernel   X through shared memory in 3 stages: 32 rows x 256 columns at a time
//     sum_parts_kernel adds the float32 parts of what several blocks summed, in order
//
// Rows and ranks beyond the edges count as zeros and are not read.
#pragma once

#include "../host/narrow_plan.h"
#include "warp.cuh"

namespace nsru {

// A result whose sum several blocks may share: out = scaling · Σ parts.
struct Sum {
    float* parts_gmem;  // [parts, size]; null for one part, which is written to out at once
    uint16_t* out_gmem;
    int64_t size;
    int parts;
    int row_length;  // of out, whose rows are ldo apart
    int64_t ldo;
    float scaling;

    // An element of one part, which has these places in the part and in out.
    template <class T>
    __device__ __forceinline__ void store(int part, int64_t in_part, int64_t in_out,
                                          float value) const {
        if (parts_gmem) {
            parts_gmem[part * size + in_part] = value;
        } else {
            out_gmem[in_out] = T::round(scaling * value);
        }
    }
};

// Element (row, rank) of a tile in shared memory, of which every warp has a share.
template <int ROWS, int RANKS>
__device__ __forceinline__ float& share(float* warps_smem, int row, int rank) {
    return warps_smem[(threadIdx.x / 32 * ROWS + row) * RANKS + rank];
}

// Adds up all warps' shares of a tile, whose first row is `first_row` of a result.
template <class T, int ROWS, int RANKS>
__device__ __forceinline__ void store_shares(const float* warps_smem, const Sum& result, int part,
                                             int64_t first_row, int64_t last_row) {
    for (int i = threadIdx.x; i < ROWS * RANKS; i += kNarrowThreads) {
        const int64_t row = first_row + i / RANKS;
        const int rank = i % RANKS;
        if (row >= last_row || rank >= result.row_length) continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kNarrowWarps; ++w) sum += warps_smem[w * ROWS * RANKS + i];
        result.store<T>(part, row * result.row_length + rank, row * result.ldo + rank, sum);
    }
}

struct ColumnsKernelParams {
    const uint16_t* x_gmem;
    const uint16_t* p_gmem;
    const uint16_t* v_gmem;
    Sum d;     // in one part for each split
    Sum rows;  // in one part for each block along C
    int m, c, r;
    int64_t ldx, ldp, ldv;
    int per_split;
};

// D = scaling · Xᵀ P for 256 columns, up to 8·RANK_TILES ranks and one split of the rows, and
// rows_scaling · X V over those columns. A warp owns 32 columns and walks down the rows:
//
//               256 columns                  P
//            ┌────┬────┬─ ─┬────┐          ┌────┐
//    32 rows │ w0 │ w1 │   │ w7 │  stage   │    │     D: [32 columns, R] stays in registers
//            └────┴────┴─ ─┴────┘          └────┘     X V: 8 warps add up in shared memory
template <class T, int RANK_TILES>
__global__ void __launch_bounds__(kNarrowThreads) columns_kernel(const ColumnsKernelParams params) {
    constexpr int kRanks = 8 * RANK_TILES, kPRow = 8 * p_chunks(RANK_TILES);
    constexpr int kXTile = kColumnsRows * kColumnsBlock, kPTile = kColumnsRows * kPRow;
    constexpr int kXWords = kColumnsBlock / 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first_column = blockIdx.x * kColumnsBlock;
    const int64_t first = static_cast<int64_t>(blockIdx.y) * params.per_split;
    const int64_t last = first + params.per_split < params.m ? first + params.per_split : params.m;
    const int steps = static_cast<int>((last - first + kColumnsRows - 1) / kColumnsRows);
    let_dependents_launch();

    uint16_t* const x_smem = reinterpret_cast<uint16_t*>(shared_memory());
    uint16_t* const p_smem = x_smem + kColumnsStages * kXTile;
    float* const warps_smem = reinterpret_cast<float*>(p_smem + kColumnsStages * kPTile);

    const auto load = [&](int step, int stage) {
        uint16_t* const x = x_smem + stage * kXTile;
        uint16_t* const p = p_smem + stage * kPTile;
        const int64_t top = first + static_cast<int64_t>(step) * kColumnsRows;
#pragma unroll
        for (int i = 0; i < kColumnsRows * kColumnsBlock / 8 / kNarrowThreads; ++i) {
            const int row = warp + i * kNarrowWarps, column = first_column + 8 * lane;
            copy_async(x + place<kXWords>(row, lane),
                       params.x_gmem + (top + row) * params.ldx + column,
                       top + row < last && column < params.c);
        }
        for (int i = threadIdx.x; i < kColumnsRows * RANK_TILES; i += kNarrowThreads) {
            const int row = i / RANK_TILES, word = i % RANK_TILES;
            const int rank = 8 * word;
            copy_async(p + row * kPRow + 8 * word, params.p_gmem + (top + row) * params.ldp + rank,
                       top + row < last && rank < params.r);
        }
    };

    uint32_t v[2][RANK_TILES][2] = {};  // of this warp's 32 columns, for the whole walk
#pragma unroll
    for (int i = 0; i < 8 * RANK_TILES; ++i) {
        const int k = i / (4 * RANK_TILES), n = i / 4 % RANK_TILES, e = i % 4;
        const int column = first_column + 32 * warp + 16 * k + 2 * t + e / 2 * 8 + e % 2;
        const int rank = 8 * n + g;
        if (column < params.c && rank < params.r) {
            v[k][n][e / 2] |= uint32_t{params.v_gmem[column * params.ldv + rank]} << 16 * (e % 2);
        }
    }

    float d[2][RANK_TILES][4] = {};
    walk<kColumnsStages>(steps, load, [&](int step, int stage) {
        const uint16_t* const x = x_smem + stage * kXTile;
        const uint16_t* const p = p_smem + stage * kPTile;
#pragma unroll
        for (int rows = 0; rows < kColumnsRows; rows += 16) {
            uint32_t b[(RANK_TILES + 1) / 2][4];  // two tiles of 8 ranks each
#pragma unroll
            for (int n = 0; n < (RANK_TILES + 1) / 2; ++n) {
                // For a single tile of ranks the second pair of matrices repeats the first.
                const int word = RANK_TILES == 1 ? 0 : 2 * n + lane / 16;
                load_matrices_transposed(b[n], p + (rows + lane % 16) * kPRow + 8 * word);
            }
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int word = 4 * warp + 2 * k;
                uint32_t a[4];  // Xᵀ: 16 columns by 16 rows
                load_matrices_transposed(
                    a, x + place<kXWords>(rows + lane / 16 * 8 + lane % 8, word + lane / 8 % 2));
#pragma unroll
                for (int n = 0; n < RANK_TILES; ++n) {
                    mma<T>(d[k][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
                }
            }
            float sum[RANK_TILES][4] = {};
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                uint32_t a[4];  // X: 16 rows by 16 columns
                load_matrices(a,
                              x + place<kXWords>(rows + lane % 16, 4 * warp + 2 * k + lane / 16));
#pragma unroll
                for (int n = 0; n < RANK_TILES; ++n) mma<T>(sum[n], a, v[k][n][0], v[k][n][1]);
            }
#pragma unroll
            for (int n = 0; n < RANK_TILES; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int row = rows + g + e / 2 * 8, rank = 8 * n + 2 * t + e % 2;
                    share<kColumnsRows, kRanks>(warps_smem, row, rank) = sum[n][e];
                }
            }
        }
        __syncthreads();
        const int64_t top = first + static_cast<int64_t>(step) * kColumnsRows;
        store_shares<T, kColumnsRows, kRanks>(warps_smem, params.rows, blockIdx.x, top, last);
    });

#pragma unroll
    for (int i = 0; i < 8 * RANK_TILES; ++i) {
        const int k = i / (4 * RANK_TILES), n = i / 4 % RANK_TILES, e = i % 4;
        const int64_t column = first_column + 32 * warp + 16 * k + g + e / 2 * 8;
        const int rank = 8 * n + 2 * t + e % 2;
        if (column >= params.c || rank >= params.r) continue;
        const int64_t at = column * params.r + rank;
        params.d.store<T>(blockIdx.y, at, at, d[k][n][e]);
    }
}

struct SumParams {
    Sum first, second;
};

// blockIdx.y chooses the sum: both of a backward pass take one launch.
template <class T>
__global__ void __launch_bounds__(kNarrowThreads) sum_parts_kernel(const SumParams params) {
    let_dependents_launch();
    const Sum sum = blockIdx.y ? params.second : params.first;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kNarrowThreads + threadIdx.x;
    if (!sum.parts_gmem || i >= sum.size) return;
    float total = 0.0f;
#pragma unroll 4
    for (int part = 0; part < sum.parts; ++part) total += sum.parts_gmem[part * sum.size + i];
    sum.out_gmem[i / sum.row_length * sum.ldo + i % sum.row_length] = T::round(sum.scaling * total);
}

}  // namespace nsru
