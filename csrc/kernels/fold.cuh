// Device code of the grouped fold: every adapter of a model in one persistent launch.
//
// A problem is a basis U [K, Q] with the rows of all adapters that use it. Its rows are cut into
// blocks of kFoldRows, and each block is worked off in items, in the order of tickets:
//
//     along    part of T = A[:, chunk] U[chunk, 64 columns]   → workspace
//              the last chunk to arrive adds up the parts of its columns in order, and the last
//              columns to be added up multiply by C where there is one
//     remove   Ā[:, 64 channels] = A - T Uᵀ, once T is complete
//
// Both are a product of a few rows and a tile of U. A tile has 64 columns; its sum is dealt out to
// 4 warps in steps of 16, each with a ring of stages of its own, and no warp waits for another
// before its sum is done:
//
//              64 columns                                16 columns
//            ┌────────────┐                             ┌──┬──┬──┬──┬─
//         w0 │ 16 channels│   along: rows of U          │w0│w1│w2│w3│   remove: columns of U,
//         w1 ├────────────┤   are terms, its            │  │  │  │  │   64 channels of which are
//         w2 ├────────────┤   columns the tile's        │  │  │  │  │   the tile's columns
//
// The order of a sum and the places of a tile's columns are free. They are chosen so that every
// lane reads four neighbours of U: lane (g, t) holds terms 4t..4t+3 and columns 4g..4g+3.
#pragma once

#include "../host/fold_plan.h"
#include "warp.cuh"

namespace nsru {

struct FoldParams {
    const int64_t* table_gmem;
    float* workspace_gmem;
    int* counters_gmem;  // ticket | for each problem its blocks, then its blocks x tiles
    int64_t first_row, rows;
    int64_t first_item, items;
    Dtype adapter, basis;
    bool has_core;
};

// As tables.py describes it.
struct FoldProblem {
    int64_t basis, stride_k, stride_q, core;
    int64_t k, q, chunk, row, rows;
    int64_t workspace, counters;
};
static_assert(sizeof(FoldProblem) == kFoldFields * sizeof(int64_t), "fields of a problem");

// The right-hand side of a product: U or C.
struct FoldMatrix {
    int64_t gmem;
    int64_t stride_k, stride_q;
    int k, q;  // elements from here on count as zeros
    Dtype dtype;
};

// Terms of a product's sum, and the first column of its tile.
struct FoldRange {
    int start, stop, column;
};

struct FoldMemory {
    unsigned char* rings;
    int64_t* rows;  // addresses of the rows of a product's left-hand side; 0: a row of zeros
    int *ticket_slot, *signal_slot;
};

template <class T>
constexpr bool kTf32Exact = sizeof(typename T::Bits) == 2;

template <class T>
struct alignas(4 * sizeof(typename T::Bits)) Four {
    typename T::Bits bits[4];
};

template <class T>
__device__ void load_four(float (&to)[4], const void* from) {
    const Four<T> four = *static_cast<const Four<T>*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = T::widen(four.bits[i]);
}

__device__ inline float load_one(int64_t base, int64_t element, Dtype dtype) {
    switch (dtype) {
        case Dtype::kBf16:
            return Bf16::widen(reinterpret_cast<const uint16_t*>(base)[element]);
        case Dtype::kFp16:
            return Fp16::widen(reinterpret_cast<const uint16_t*>(base)[element]);
        default:
            return reinterpret_cast<const float*>(base)[element];
    }
}

// x = high + low: what the tensor core reads of x, and what that leaves.
struct Split {
    uint32_t high, low;
};

__device__ inline Split split(float x) {
    const uint32_t high = __float_as_uint(x) & 0xFFFFE000;
    return {high, __float_as_uint(x - __uint_as_float(high))};
}

// Where a stage keeps element q of U's channel k. Rows of the tile's columns (along) and rows of
// its terms (remove) lie so that what a warp reads at a time is in different banks.
template <class U, bool REMOVE>
struct BasisStage {
    static constexpr int kWord = 16 / sizeof(typename U::Bits);  // elements of 16 bytes
    static constexpr int kWidth = REMOVE ? kFoldStep : kFoldColumns;
    static constexpr int kChannels = REMOVE ? kFoldColumns : kFoldStep;
    static constexpr int kWords = kWidth / kWord;

    static __device__ int channel_at(int place) {
        return REMOVE ? place / 32 * 32 + place % 8 * 4 + place / 8 % 4 : place % 4 * 4 + place / 4;
    }
    static __device__ int offset(int place, int q) {
        const int word = q / kWord ^ (REMOVE ? 0 : place % 4 * 2);
        return place * kWidth + word * kWord + q % kWord;
    }
};

// Fills one warp's stage with 16 terms from `term` on.
template <class X, class U, int ROW_TILES, bool ALIGNED, bool REMOVE>
__device__ void load_stage(typename X::Bits* x_smem, typename U::Bits* u_smem,
                           const int64_t* rows_smem, const FoldMatrix& u, Dtype x_dtype,
                           const FoldRange& range, int term) {
    using Stage = BasisStage<U, REMOVE>;
    const int lane = threadIdx.x % 32;
    const int first_k = REMOVE ? range.column : term, first_q = REMOVE ? term : range.column;
    const int last_k = REMOVE ? u.k : range.stop, last_q = u.q;
    if (ALIGNED) {
        constexpr int kWord = 16 / sizeof(typename X::Bits), kWords = kFoldStep / kWord;
#pragma unroll
        for (int i = lane; i < 16 * ROW_TILES * kWords; i += 32) {
            const int64_t row = rows_smem[i / kWords];
            const int x = term + i % kWords * kWord;
            copy_async(x_smem + i * kWord, reinterpret_cast<const typename X::Bits*>(row) + x,
                       row && x < range.stop);
        }
#pragma unroll
        for (int i = lane; i < Stage::kChannels * Stage::kWords; i += 32) {
            const int place = i / Stage::kWords, word = i % Stage::kWords * Stage::kWord;
            const int k = first_k + Stage::channel_at(place), q = first_q + word;
            copy_async(u_smem + Stage::offset(place, word),
                       reinterpret_cast<const typename U::Bits*>(u.gmem) + k * u.stride_k + q,
                       k < last_k && q < last_q);
        }
    } else {
#pragma unroll 1
        for (int i = lane; i < 16 * ROW_TILES * kFoldStep; i += 32) {
            const int64_t row = rows_smem[i / kFoldStep];
            const int x = term + i % kFoldStep;
            const bool inside = row && x < range.stop;
            x_smem[i] = X::round(inside ? load_one(row, x, x_dtype) : 0.0f);
        }
#pragma unroll 1
        for (int i = lane; i < Stage::kChannels * Stage::kWidth; i += 32) {
            const int place = i / Stage::kWidth, k = first_k + Stage::channel_at(place);
            const int q = first_q + i % Stage::kWidth;
            const bool inside = k < last_k && q < last_q;
            u_smem[Stage::offset(place, i % Stage::kWidth)] = U::round(
                inside ? load_one(u.gmem, k * u.stride_k + q * u.stride_q, u.dtype) : 0.0f);
        }
    }
}

// sum += X U of one stage, by TF32 tensor cores with float32's accuracy: three products, less one
// for each operand that TF32 holds exactly. The stage's result is added outside of the tensor core,
// which would truncate at every step.
template <class X, class U, int ROW_TILES, bool REMOVE>
__device__ void multiply(float (&sum)[ROW_TILES][8][4], const typename X::Bits* x_smem,
                         const typename U::Bits* u_smem) {
    using Stage = BasisStage<U, REMOVE>;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t high[ROW_TILES][2][4], low[ROW_TILES][2][4];
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
        float x[4];
        load_four<X>(x, x_smem + (8 * i + g) * kFoldStep + 4 * t);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const Split parts = split(x[e]);
            high[i / 2][e / 2][e % 2 * 2 + i % 2] = parts.high;
            low[i / 2][e / 2][e % 2 * 2 + i % 2] = parts.low;
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float u[4][4];  // along: term, column; remove: column, term
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            load_four<U>(u[i], u_smem + (REMOVE ? Stage::offset(32 * half + 8 * i + g, 4 * t)
                                                : Stage::offset(4 * i + t, 32 * half + 4 * g)));
        }
        float tile[ROW_TILES][4][4] = {};
#pragma unroll
        for (int s = 0; s < 2; ++s) {
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const Split b0 = split(REMOVE ? u[n][2 * s] : u[2 * s][n]);
                const Split b1 = split(REMOVE ? u[n][2 * s + 1] : u[2 * s + 1][n]);
#pragma unroll
                for (int i = 0; i < ROW_TILES; ++i) {
                    if (!kTf32Exact<U>) mma_tf32(tile[i][n], high[i][s], b0.low, b1.low);
                    if (!kTf32Exact<X>) mma_tf32(tile[i][n], low[i][s], b0.high, b1.high);
                    mma_tf32(tile[i][n], high[i][s], b0.high, b1.high);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 16 * ROW_TILES; ++i) {
            sum[i / 16][4 * half + i / 4 % 4][i % 4] += tile[i / 16][i / 4 % 4][i % 4];
        }
    }
}

// This thread's share of a tile: 4 columns of each of 2·ROW_TILES rows.
template <int ROW_TILES>
struct Share {
    float values[2 * ROW_TILES][4];

    static __device__ int row(int i) { return threadIdx.x / 16 + 8 * i; }
    static __device__ int column() { return threadIdx.x % 16 * 4; }

    // Of the tile at `gmem`, whose rows are `width` apart.
    __device__ void store(float* gmem, int64_t width, int rows) const {
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; ++i) {
            if (row(i) < rows) {
                *reinterpret_cast<float4*>(gmem + row(i) * width + column()) =
                    make_float4(values[i][0], values[i][1], values[i][2], values[i][3]);
            }
        }
    }

    // The sum of `parts` such tiles, part_size apart, always in the same order.
    __device__ void add_up(const float* gmem, int64_t width, int rows, int parts,
                           int64_t part_size) {
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; ++i) {
            const float* const from = gmem + row(i) * width + column();
            float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
            for (int part = 0; part < (row(i) < rows ? parts : 0); ++part) {
                const float4 more = *reinterpret_cast<const float4*>(from + part * part_size);
                total = make_float4(total.x + more.x, total.y + more.y, total.z + more.z,
                                    total.w + more.w);
            }
            values[i][0] = total.x, values[i][1] = total.y;
            values[i][2] = total.z, values[i][3] = total.w;
        }
    }
};

// A tile of X U (along) or X Uᵀ (remove), X being memory.rows.
template <class X, class U, int ROW_TILES, bool ALIGNED, bool REMOVE>
__device__ Share<ROW_TILES> product(const FoldMemory& memory, const FoldMatrix& u, Dtype x_dtype,
                                    const FoldRange& range) {
    constexpr int kBytes = sizeof(typename U::Bits), kStages = fold_stages(kBytes);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    unsigned char* const ring = memory.rings + warp * kFoldRing;
    const auto u_stage = [&](int step) {
        return reinterpret_cast<typename U::Bits*>(ring + step % kStages * fold_stage(kBytes));
    };
    const auto x_stage = [&](int step) {
        return reinterpret_cast<typename X::Bits*>(u_stage(step) + kFoldStep * kFoldColumns);
    };
    const auto load = [&](int step) {
        const int term = range.start + (step * kFoldWarps + warp) * kFoldStep;
        if (term < range.stop) {
            load_stage<X, U, ROW_TILES, ALIGNED, REMOVE>(x_stage(step), u_stage(step), memory.rows,
                                                         u, x_dtype, range, term);
        }
        close_copies();
    };

    __syncthreads();  // addresses of rows are there, and the rings are read no more
    for (int step = 0; step < kStages - 1; ++step) load(step);
    float sum[ROW_TILES][8][4] = {};
    for (int step = 0; range.start + (step * kFoldWarps + warp) * kFoldStep < range.stop; ++step) {
        wait_for_copies<kStages - 2>();
        __syncwarp();  // the copies of all lanes; and the stage to fill next is read no more
        load(step + kStages - 1);
        multiply<X, U, ROW_TILES, REMOVE>(sum, x_stage(step), u_stage(step));
    }

    // An odd number of 16-byte words, so that eight rows lie in different banks.
    constexpr int kWidth = kFoldColumns + 4, kSize = 16 * ROW_TILES * kWidth;
    static_assert(kFoldWarps * kSize * 4 <= kFoldWarps * kFoldRing, "sums fit into the rings");
    float* const sums_smem = reinterpret_cast<float*>(memory.rings);
    wait_for_copies<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8 * ROW_TILES; ++i) {  // a row tile, half of it, half the columns, 2t or 2t+1
        const int tile = i / 8, row = 16 * tile + i / 4 % 2 * 8 + g, half = i / 2 % 2, e = i % 2;
        const auto value = [&](int n) { return sum[tile][4 * half + n][i / 4 % 2 * 2 + e]; };
        *reinterpret_cast<float4*>(sums_smem + warp * kSize + row * kWidth + 32 * half + 8 * t +
                                   4 * e) = make_float4(value(0), value(1), value(2), value(3));
    }
    __syncthreads();
    Share<ROW_TILES> share;
    share.add_up(sums_smem, kWidth, 16 * ROW_TILES, kFoldWarps, kSize);
    return share;
}

// One item of a problem, in a tile of 16·ROW_TILES rows.
template <class A, class U, int ROW_TILES, bool ALIGNED>
__device__ void work_off(const FoldParams& params, const FoldProblem& problem, int block, int index,
                         const FoldMemory& memory) {
    const int k = static_cast<int>(problem.k), q = static_cast<int>(problem.q);
    const int chunk = static_cast<int>(problem.chunk);
    const int tiles = (q + kFoldColumns - 1) / kFoldColumns, chunks = (k + chunk - 1) / chunk;
    const int blocks = static_cast<int>((problem.rows + kFoldRows - 1) / kFoldRows);
    const int64_t first = static_cast<int64_t>(block) * kFoldRows;
    const int left = static_cast<int>(problem.rows - first);
    const int rows = left < 16 * ROW_TILES ? left : 16 * ROW_TILES;
    const int64_t* const row_gmem = params.table_gmem + params.first_row + problem.row + first;

    // Parts of T in order, their sum, and that times C: each [rows, width], in whole tiles.
    const int64_t width = static_cast<int64_t>(tiles) * kFoldColumns;
    const int64_t part_size = problem.rows * width;
    float* const parts_gmem = params.workspace_gmem + problem.workspace + first * width;
    float* const sum_gmem = parts_gmem + chunks * part_size;
    int* const done_gmem = params.counters_gmem + problem.counters + block;

    const int i = threadIdx.x;
    const auto set_rows = [&](int64_t address) {
        if (i < 16 * ROW_TILES) memory.rows[i] = i < rows ? address : 0;
    };
    const auto row_of = [&](const float* gmem) {
        return reinterpret_cast<int64_t>(gmem + i * width);
    };
    const FoldMatrix u{problem.basis, problem.stride_k, problem.stride_q, k, q, params.basis};
    if (index < tiles * chunks) {
        const int tile = index % tiles, nth = index / tiles, column = tile * kFoldColumns;
        const int start = nth * chunk, stop = start + chunk < k ? start + chunk : k;
        set_rows(i < rows ? row_gmem[i] : 0);
        product<A, U, ROW_TILES, ALIGNED, false>(memory, u, params.adapter, {start, stop, column})
            .store(parts_gmem + nth * part_size + column, width, rows);
        int* const arrived_gmem =
            params.counters_gmem + problem.counters + blocks + block * tiles + tile;
        if (signal(arrived_gmem, memory.signal_slot) != chunks - 1) return;
        wait_for(arrived_gmem, chunks);  // only to see what the others stored
        Share<ROW_TILES> total;
        total.add_up(parts_gmem + column, width, rows, chunks, part_size);
        total.store(sum_gmem + column, width, rows);
        if (signal(done_gmem, memory.signal_slot) != tiles - 1 || !params.has_core) return;
        wait_for(done_gmem, tiles);
        set_rows(row_of(sum_gmem));
        const FoldMatrix core{problem.core, q, 1, q, q, Dtype::kFp32};
        for (int at = 0; at < q; at += kFoldColumns) {
            product<Fp32, Fp32, ROW_TILES, ALIGNED, false>(memory, core, Dtype::kFp32, {0, q, at})
                .store(sum_gmem + part_size + at, width, rows);
        }
        signal(done_gmem, memory.signal_slot);
    } else {
        const int column = (index - tiles * chunks) * kFoldColumns;
        wait_for(done_gmem, tiles + params.has_core);
        set_rows(row_of(sum_gmem + params.has_core * part_size));
        const Share<ROW_TILES> taken = product<Fp32, U, ROW_TILES, ALIGNED, true>(
            memory, u, Dtype::kFp32, {0, q, column});
        const int at = column + taken.column();
#pragma unroll
        for (int j = 0; j < 2 * ROW_TILES; ++j) {
            if (taken.row(j) >= rows || at >= k) continue;
            const int64_t from = row_gmem[taken.row(j)];
            float* const to = reinterpret_cast<float*>(row_gmem[params.rows + taken.row(j)]) + at;
            if (ALIGNED) {
                float a[4];
                load_four<A>(a, reinterpret_cast<const typename A::Bits*>(from) + at);
                *reinterpret_cast<float4*>(to) =
                    make_float4(a[0] - taken.values[j][0], a[1] - taken.values[j][1],
                                a[2] - taken.values[j][2], a[3] - taken.values[j][3]);
            } else {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (at + e >= k) continue;
                    to[e] = load_one(from, at + e, params.adapter) - taken.values[j][e];
                }
            }
        }
    }
}

// Not ALIGNED: A and U are Fp32, and elements of other types are widened as they are loaded.
template <class A, class U, bool ALIGNED>
__global__ void __launch_bounds__(kFoldThreads, kFoldBlocksPerMultiprocessor)
    fold_kernel(const FoldParams params) {
    unsigned char* const rings = shared_memory();
    int64_t* const rows_smem = reinterpret_cast<int64_t*>(rings + kFoldWarps * kFoldRing);
    int* const slots_smem = reinterpret_cast<int*>(rows_smem + kFoldRows);
    const FoldMemory memory{rings, rows_smem, slots_smem, slots_smem + 1};

    // A ticket is asked for one item ahead. Whoever holds the smallest unfinished one is still at
    // work on it, so that waiting cannot deadlock.
    int ticket = share_ticket(ask_for_ticket(params.counters_gmem), memory.ticket_slot);
    while (ticket < params.items) {
        const int next = ask_for_ticket(params.counters_gmem);
        const int64_t item = params.table_gmem[params.first_item + ticket];
        const FoldProblem& problem =
            reinterpret_cast<const FoldProblem*>(params.table_gmem)[item >> 32];
        const int blocks = static_cast<int>((problem.rows + kFoldRows - 1) / kFoldRows);
        const int index = static_cast<int>(item & 0xFFFFFFFF), block = index % blocks;
        if (problem.rows - static_cast<int64_t>(block) * kFoldRows <= 16) {
            work_off<A, U, 1, ALIGNED>(params, problem, block, index / blocks, memory);
        } else {
            work_off<A, U, 2, ALIGNED>(params, problem, block, index / blocks, memory);
        }
        ticket = share_ticket(next, memory.ticket_slot);
    }
}

struct WriteTableParams {
    int64_t* table_gmem;
    int size;
    int64_t values[kTableValues];
};

template <int THREADS>
__global__ void __launch_bounds__(THREADS) write_table_kernel(const WriteTableParams params) {
    for (int i = threadIdx.x; i < params.size; i += THREADS) {
        params.table_gmem[i] = params.values[i];
    }
}

}  // namespace nsru
