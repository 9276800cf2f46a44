// Device code of the grouped projection: every adapter of a model in one persistent launch.
//
// A problem is a basis U [K, Q] with the rows of all adapters that use it. Its rows are cut into
// blocks of kProjectRows, and each block is worked off in items, in the order of tickets:
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

#include "../host/project_plan.h"
#include "warp.cuh"

namespace nsru {

struct ProjectParams {
    const int64_t* table_gmem;
    float* workspace_gmem;
    int* counters_gmem;  // ticket | for each problem its blocks, then its blocks x tiles
    int first_row, first_out, first_item;  // in the table
    int items;
    Dtype adapter, basis;
    bool has_gram_inverse;
};

// As tables.py describes it.
struct ProjectProblem {
    int64_t basis, stride_k, stride_q, core;
    int64_t k, q, chunk, row, rows;
    int64_t workspace, counters;
};
static_assert(sizeof(ProjectProblem) == kProjectFields * sizeof(int64_t), "fields of a problem");

// The right-hand side of a product: U or C.
struct ProjectMatrix {
    int64_t gmem;
    int64_t stride_k, stride_q;
    int k, q;  // elements from here on count as zeros
    Dtype dtype;
};

// Terms of a product's sum, and the first column of its tile.
struct ProjectRange {
    int start, stop, column;
};

// What a block works on, the same for all of its threads.
struct ProjectItem {
    ProjectMatrix u, core;
    ProjectRange range;
    bool is_along;
    int rows;                  // of the block
    const int64_t* row_gmem;   // addresses of the adapter's
    const int64_t* out_gmem;   // and of the output's
    int tiles, chunks, nth;    // the chunk's number
    int64_t width, part_size;  // a part of T is [all rows, width], in whole tiles
    float* parts_gmem;         // parts in order | their sum | that times C
    int *arrived_gmem, *done_gmem;
};

// A block's shared memory. What all threads know lies here: registers are for sums.
struct ProjectMemory {
    unsigned char rings[kProjectWarps][kProjectRing];
    int64_t rows[kProjectRows];  // addresses of a product's left-hand side; 0: a row of zeros
    ProjectItem item;
    int ticket, signal_slot;
};
static_assert(sizeof(ProjectMemory) <= kProjectShared, "the launcher asks for enough");

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

// x = high + low; the tensor core reads all of high and the upper 11 bits of low. Rounded, not cut:
// so what products lose has no preferred sign and does not add up.
struct Split {
    uint32_t high, low;
};

template <class T>
__device__ Split split(float x) {
    if (kTf32Exact<T>) return {__float_as_uint(x), 0};
    const uint32_t high = (__float_as_uint(x) + 0x1000) & 0xFFFFE000;
    return {high, __float_as_uint(x - __uint_as_float(high))};
}

// Where a stage keeps its part of U: channels in places, each of kWidth elements, so that what a
// warp reads at a time is in different banks. Lanes (g, t) of a warp read places 4i + t at columns
// 32·half + 4g (along), or places 32·half + 8i + g at columns 4t (remove).
template <class U, bool REMOVE>
struct BasisStage {
    static constexpr int kWord = 16 / sizeof(typename U::Bits);  // elements of 16 bytes
    static constexpr int kWidth = REMOVE ? kProjectStep : kProjectColumns;
    static constexpr int kPlaces = REMOVE ? kProjectColumns : kProjectStep;
    static constexpr int kWords = kWidth / kWord;

    static __device__ int channel_at(int place) {
        return REMOVE ? place / 32 * 32 + place % 8 * 4 + place / 8 % 4 : place % 4 * 4 + place / 4;
    }
    static __device__ int offset(int place, int column) {
        const int word = column / kWord ^ (REMOVE ? 0 : place % 4 * 2);
        return place * kWidth + word * kWord + column % kWord;
    }
    // The offset of more places and columns, where their bits do not meet those of the first.
    static __device__ int add(int offset, int places, int columns) {
        return (offset ^ (REMOVE ? 0 : places % 4 * 2 * kWord) ^ columns) + places * kWidth;
    }
};

// Fills one warp's stage with 16 terms from `term` on.
template <class X, class U, int ROW_TILES, bool ALIGNED, bool REMOVE>
__device__ void load_stage(typename X::Bits* x_smem, typename U::Bits* u_smem,
                           const int64_t* rows_smem, const ProjectMatrix& u, Dtype x_dtype,
                           const ProjectRange& range, int term) {
    using Stage = BasisStage<U, REMOVE>;
    const int lane = threadIdx.x % 32;
    const int first_k = REMOVE ? range.column : term, first_q = REMOVE ? term : range.column;
    const int last_k = REMOVE ? u.k : range.stop, last_q = u.q, last_x = range.stop;
    if (ALIGNED) {
        constexpr int kWord = 16 / sizeof(typename X::Bits), kWords = kProjectStep / kWord;
#pragma unroll
        for (int i = 0; i < 16 * ROW_TILES * kWords / 32; ++i) {
            const int at = lane + 32 * i, x = term + at % kWords * kWord;
            const int64_t row = rows_smem[at / kWords];
            copy_async(x_smem + at * kWord, reinterpret_cast<const typename X::Bits*>(row) + x,
                       row && x < last_x);
        }
        constexpr int kAtOnce = 32 / Stage::kWords;  // places
        const int place = lane / Stage::kWords, word = lane % Stage::kWords * Stage::kWord;
        const int k = first_k + Stage::channel_at(place), q = first_q + word;
        const int to = Stage::offset(place, word);
        const int64_t stride_k = u.stride_k;
        const auto* const from =
            reinterpret_cast<const typename U::Bits*>(u.gmem) + k * stride_k + q;
#pragma unroll
        for (int places = 0; places < Stage::kPlaces; places += kAtOnce) {
            const int more = Stage::channel_at(places);  // bits of k and of this do not meet
            copy_async(u_smem + Stage::add(to, places, 0), from + more * stride_k,
                       k + more < last_k && q < last_q);
        }
    } else {
#pragma unroll 1
        for (int i = lane; i < 16 * ROW_TILES * kProjectStep; i += 32) {
            const int64_t row = rows_smem[i / kProjectStep];
            const int x = term + i % kProjectStep;
            const bool inside = row && x < last_x;
            x_smem[i] = X::round(inside ? load_one(row, x, x_dtype) : 0.0f);
        }
#pragma unroll 1
        for (int i = lane; i < Stage::kPlaces * Stage::kWidth; i += 32) {
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
    const int at = REMOVE ? Stage::offset(g, 4 * t) : Stage::offset(t, 4 * g);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float u[4][4];  // along: term, column; remove: column, term
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            load_four<U>(u[i], u_smem + (REMOVE ? Stage::add(at, 32 * half + 8 * i, 0)
                                                : Stage::add(at, 4 * i, 32 * half)));
        }
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i) {
            uint32_t high[2][4], low[2][4];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float x[4];
                load_four<X>(x, x_smem + (16 * i + 8 * j + g) * kProjectStep + 4 * t);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const Split parts = split<X>(x[e]);
                    high[e / 2][e % 2 * 2 + j] = parts.high;
                    low[e / 2][e % 2 * 2 + j] = parts.low;
                }
            }
            float tile[4][4] = {};
#pragma unroll
            for (int s = 0; s < 2; ++s) {
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    const Split b0 = split<U>(REMOVE ? u[n][2 * s] : u[2 * s][n]);
                    const Split b1 = split<U>(REMOVE ? u[n][2 * s + 1] : u[2 * s + 1][n]);
                    if (!kTf32Exact<U>) mma_tf32(tile[n], high[s], b0.low, b1.low);
                    if (!kTf32Exact<X>) mma_tf32(tile[n], low[s], b0.high, b1.high);
                    mma_tf32(tile[n], high[s], b0.high, b1.high);
                }
            }
#pragma unroll
            for (int e = 0; e < 16; ++e) sum[i][4 * half + e / 4][e % 4] += tile[e / 4][e % 4];
        }
        __syncwarp();  // else what both halves read stays in registers, too many of them
    }
}

// total = the sum of `parts` times 4 neighbours, part_size apart, always in the same order.
__device__ inline void add_parts(float (&total)[4], const float* from, int parts,
                                 int64_t part_size) {
#pragma unroll
    for (int e = 0; e < 4; ++e) total[e] = 0.0f;
#pragma unroll 4
    for (int part = 0; part < parts; ++part) {
        const float4 more = *reinterpret_cast<const float4*>(from + part * part_size);
        total[0] += more.x, total[1] += more.y, total[2] += more.z, total[3] += more.w;
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
            if (row(i) < rows) {
                add_parts(values[i], gmem + row(i) * width + column(), parts, part_size);
            }
        }
    }
};

// A tile of X U (along) or X Uᵀ (remove) over a range of terms, X being memory.rows.
template <class X, class U, int ROW_TILES, bool ALIGNED, bool REMOVE>
__device__ Share<ROW_TILES> product(ProjectMemory& memory, const ProjectMatrix& u, Dtype x_dtype,
                                    const ProjectRange& range) {
    constexpr int kBytes = sizeof(typename U::Bits), kStages = project_stages(kBytes);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    unsigned char* const ring = memory.rings[warp];
    const auto u_stage = [&](int step) {
        return reinterpret_cast<typename U::Bits*>(ring + step % kStages * project_stage(kBytes));
    };
    const auto x_stage = [&](int step) {
        return reinterpret_cast<typename X::Bits*>(u_stage(step) + kProjectStep * kProjectColumns);
    };
    const auto load = [&](int step) {
        const int term = range.start + (step * kProjectWarps + warp) * kProjectStep;
        if (term < range.stop) {
            load_stage<X, U, ROW_TILES, ALIGNED, REMOVE>(x_stage(step), u_stage(step), memory.rows,
                                                         u, x_dtype, range, term);
        }
        close_copies();
    };

    __syncthreads();  // addresses of rows are there, and the rings are read no more
    for (int step = 0; step < kStages - 1; ++step) load(step);
    float sum[ROW_TILES][8][4] = {};
    for (int step = 0; range.start + (step * kProjectWarps + warp) * kProjectStep < range.stop;
         ++step) {
        wait_for_copies<kStages - 2>();
        __syncwarp();  // the copies of all lanes; and the stage to fill next is read no more
        load(step + kStages - 1);
        multiply<X, U, ROW_TILES, REMOVE>(sum, x_stage(step), u_stage(step));
    }

    // An odd number of 16-byte words, so that eight rows lie in different banks.
    constexpr int kWidth = kProjectColumns + 4, kSize = 16 * ROW_TILES * kWidth;
    static_assert(kProjectWarps * kSize * 4 <= kProjectWarps * kProjectRing,
                  "sums fit into the rings");
    float* const sums_smem = reinterpret_cast<float*>(memory.rings);
    wait_for_copies<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8 * ROW_TILES; ++i) {
        // What mma numbers as columns 2t and 2t+1 of tile n are columns 8t + n and 8t+4 + n.
        const int tile = i / 8, lower = i / 4 % 2, half = i / 2 % 2, e = i % 2;
        const auto value = [&](int n) { return sum[tile][4 * half + n][2 * lower + e]; };
        const int row = 16 * tile + 8 * lower + g, column = 32 * half + 8 * t + 4 * e;
        *reinterpret_cast<float4*>(sums_smem + warp * kSize + row * kWidth + column) =
            make_float4(value(0), value(1), value(2), value(3));
    }
    __syncthreads();
    Share<ROW_TILES> share;
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
        const float* const from = sums_smem + share.row(i) * kWidth + share.column();
        add_parts(share.values[i], from, kProjectWarps, kSize);
    }
    return share;
}

// What the table says about the item with this number.
__device__ inline ProjectItem item_of(const ProjectParams& params, int ticket) {
    const int64_t number = params.table_gmem[params.first_item + ticket];
    const ProjectProblem problem =
        reinterpret_cast<const ProjectProblem*>(params.table_gmem)[number >> 32];
    ProjectItem item;
    const int k = static_cast<int>(problem.k), q = static_cast<int>(problem.q);
    const int chunk = static_cast<int>(problem.chunk);
    item.u = {problem.basis, problem.stride_k, problem.stride_q, k, q, params.basis};
    item.core = {problem.core, q, 1, q, q, Dtype::kFp32};
    item.tiles = (q + kProjectColumns - 1) / kProjectColumns;
    item.chunks = (k + chunk - 1) / chunk;
    item.width = static_cast<int64_t>(item.tiles) * kProjectColumns;
    item.part_size = problem.rows * item.width;

    const int blocks = static_cast<int>((problem.rows + kProjectRows - 1) / kProjectRows);
    const int block = static_cast<int>(number & 0xFFFFFFFF) % blocks;
    const int index = static_cast<int>(number & 0xFFFFFFFF) / blocks;
    const int64_t first = static_cast<int64_t>(block) * kProjectRows;
    item.rows =
        static_cast<int>(problem.rows - first < kProjectRows ? problem.rows - first : kProjectRows);
    item.row_gmem = params.table_gmem + params.first_row + problem.row + first;
    item.out_gmem = params.table_gmem + params.first_out + problem.row + first;
    item.parts_gmem = params.workspace_gmem + problem.workspace + first * item.width;

    item.is_along = index < item.tiles * item.chunks;
    const int tile = index % item.tiles;
    item.nth = index / item.tiles;
    if (item.is_along) {
        const int start = item.nth * chunk;
        item.range = {start, start + chunk < k ? start + chunk : k, tile * kProjectColumns};
    } else {
        item.range = {0, q, (index - item.tiles * item.chunks) * kProjectColumns};
    }
    int* const counters_gmem = params.counters_gmem + problem.counters;
    item.done_gmem = counters_gmem + block;
    item.arrived_gmem = counters_gmem + blocks + block * item.tiles + tile;
    return item;
}

// This block's rows of a part of T.
__device__ inline float* part_of(const ProjectItem& item, int part) {
    return item.parts_gmem + part * item.part_size;
}

// Makes them the left-hand side of a product.
template <int ROW_TILES>
__device__ void set_rows(ProjectMemory& memory, int part) {
    const ProjectItem& item = memory.item;
    const int i = threadIdx.x;
    if (i < 16 * ROW_TILES) {
        const float* const row_gmem = part_of(item, part) + i * item.width;
        memory.rows[i] = i < item.rows ? reinterpret_cast<int64_t>(row_gmem) : 0;
    }
}

// Part of T; who comes last completes it.
template <class A, class U, int ROW_TILES, bool ALIGNED>
__device__ void add_along(const ProjectParams& params, ProjectMemory& memory) {
    const ProjectItem& item = memory.item;
    const int i = threadIdx.x;
    if (i < 16 * ROW_TILES) memory.rows[i] = i < item.rows ? item.row_gmem[i] : 0;
    const Share<ROW_TILES> part =
        product<A, U, ROW_TILES, ALIGNED, false>(memory, item.u, params.adapter, item.range);
    const int next = ask_for_ticket(params.counters_gmem);
    part.store(part_of(item, item.nth) + item.range.column, item.width, item.rows);
    const int arrived = signal(item.arrived_gmem, &memory.signal_slot);
    if (i == 0) memory.ticket = next;
    if (arrived != item.chunks - 1) return;

    wait_for(item.arrived_gmem, item.chunks);  // only to see what the others stored
    const int column = item.range.column;
    Share<ROW_TILES> total;
    total.add_up(part_of(item, 0) + column, item.width, item.rows, item.chunks, item.part_size);
    total.store(part_of(item, item.chunks) + column, item.width, item.rows);
    const int summed = signal(item.done_gmem, &memory.signal_slot);
    if (!params.has_gram_inverse || summed != item.tiles - 1) return;

    wait_for(item.done_gmem, item.tiles);
    set_rows<ROW_TILES>(memory, item.chunks);
    for (int at = 0; at < item.core.q; at += kProjectColumns) {
        const Share<ROW_TILES> times_core = product<Fp32, Fp32, ROW_TILES, ALIGNED, false>(
            memory, item.core, Dtype::kFp32, {0, item.core.q, at});
        times_core.store(part_of(item, item.chunks + 1) + at, item.width, item.rows);
    }
    signal(item.done_gmem, &memory.signal_slot);
}

// Ā for 64 channels.
template <class A, class U, int ROW_TILES, bool ALIGNED>
__device__ void remove(const ProjectParams& params, ProjectMemory& memory) {
    const ProjectItem& item = memory.item;
    const int i = threadIdx.x;
    wait_for(item.done_gmem, item.tiles + params.has_gram_inverse);
    set_rows<ROW_TILES>(memory, item.chunks + params.has_gram_inverse);
    const Share<ROW_TILES> taken =
        product<Fp32, U, ROW_TILES, ALIGNED, true>(memory, item.u, Dtype::kFp32, item.range);
    const int next = ask_for_ticket(params.counters_gmem);
    const int column = item.range.column + taken.column();
#pragma unroll
    for (int j = 0; j < 2 * ROW_TILES; ++j) {
        const int row = taken.row(j);
        if (row >= item.rows || column >= item.u.k) continue;
        const int64_t a_gmem = item.row_gmem[row];
        float* const out_gmem = reinterpret_cast<float*>(item.out_gmem[row]) + column;
        if (ALIGNED) {
            float a[4];
            load_four<A>(a, reinterpret_cast<const typename A::Bits*>(a_gmem) + column);
            *reinterpret_cast<float4*>(out_gmem) =
                make_float4(a[0] - taken.values[j][0], a[1] - taken.values[j][1],
                            a[2] - taken.values[j][2], a[3] - taken.values[j][3]);
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (column + e >= item.u.k) continue;
                out_gmem[e] = load_one(a_gmem, column + e, params.adapter) - taken.values[j][e];
            }
        }
    }
    if (i == 0) memory.ticket = next;
}

template <class A, class U, int ROW_TILES, bool ALIGNED>
__device__ void work_off(const ProjectParams& params, ProjectMemory& memory) {
    if (memory.item.is_along) {
        add_along<A, U, ROW_TILES, ALIGNED>(params, memory);
    } else {
        remove<A, U, ROW_TILES, ALIGNED>(params, memory);
    }
}

// Not ALIGNED: A and U are Fp32, and elements of other types are widened as they are loaded.
template <class A, class U, bool ALIGNED>
__global__ void __launch_bounds__(kProjectThreads, kProjectBlocksPerMultiprocessor)
    project_kernel(const ProjectParams params) {
    ProjectMemory& memory = *reinterpret_cast<ProjectMemory*>(shared_memory());
    // A ticket is asked for before the item at hand is done. Whoever holds the smallest unfinished
    // one is still at work on it, so that waiting cannot deadlock.
    if (threadIdx.x == 0) memory.ticket = ask_for_ticket(params.counters_gmem);
    while (true) {
        __syncthreads();
        if (threadIdx.x == 0 && memory.ticket < params.items) {
            memory.item = item_of(params, memory.ticket);
        }
        __syncthreads();
        if (memory.ticket >= params.items) return;
        if (memory.item.rows <= 16) {
            work_off<A, U, 1, ALIGNED>(params, memory);
        } else {
            work_off<A, U, 2, ALIGNED>(params, memory);
        }
    }
}

struct WriteTableParams {
    int64_t* table_gmem;
    int size;
    int64_t values[kTableValues];
};

__global__ void __launch_bounds__(kProjectThreads)
    write_table_kernel(const WriteTableParams params) {
    for (int i = threadIdx.x; i < params.size; i += kProjectThreads) {
        params.table_gmem[i] = params.values[i];
    }
}

}  // namespace nsru
