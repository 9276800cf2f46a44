// Device code of the sketch update: one launch of persistent blocks, X read from memory once.
//
// X is cut into panels, so that two stay in L2: one whose S is being made while the other's
// products read X again. Work items in the order of their tickets:
//
//     S(0)   S(1) P(0)   S(2) P(1)   ...   S(last) P(last-1)   P(last)
//
// Both kinds cut their sum into chunks, computed side by side and added in turn; the very last turn
// of a tile adds to Y and H. An item waits for items with smaller tickets only.
//
//                   Ω [K, L]                              S [M, L]
//                 ┌──────────┐                          ┌──────────┐
//                 │   WIDTH  │ 64 ↓                     │   WIDTH  │ 32 ↓
//     X [M, K]    └──────────┘            [X ∣ S]ᵀ      └──────────┘
//     ┌────────┐  ┌──────────┐            ┌────────┐    ┌──────────┐
//     │ 64     │→ │ S        │            │ 128    │ →  │ Y ; H    │
//     └────────┘  └──────────┘            └────────┘    └──────────┘
//
// Rows beyond the edges or left out by the mask count as zeros and are not read.
#pragma once

#include "../host/sketch_plan.h"
#include "warp.cuh"

namespace nsru {

struct SketchOperands {
    const uint16_t* x_gmem;
    const uint16_t* omega_gmem;
    const uint8_t* mask_gmem;  // null: all rows
    float* y_gmem;
    float* h_gmem;
    double* trace_gmem;
    // Zeros: the ticket; tiles of S ready in each panel; turns of the tiles of S, and of [Y ; H].
    int* counters_gmem;
    double* energy_gmem;  // [row_blocks, k_chunks], shares of ‖X‖²
    uint16_t* s_gmem;     // [planes, M, width]
    // Tiles so far, as registers hold them: every chunk of a tile is held alike.
    float* s_sums_gmem;
    float* product_sums_gmem;
    int64_t ldx, ldomega;
    double limit;
};

struct SketchKernelParams : SketchOperands, SketchTiles {};

// How 8 warps share a tile [ROWS, WIDTH] of a product; kTiles of mma's tiles are a warp's.
template <int ROWS, int WIDTH, int ROW_WARPS>
struct Shares {
    static constexpr int kColumnWarps = kSketchWarps / ROW_WARPS;
    static constexpr int kRows = ROWS / ROW_WARPS, kColumns = WIDTH / kColumnWarps;
    static constexpr int kRowTiles = kRows / 16, kColumnTiles = kColumns / 8;
    static constexpr int kTiles = kRowTiles * kColumnTiles;
    static_assert(kRows % 16 == 0 && kColumns % 16 == 0, "a warp multiplies 16 by 16 at a time");
};

template <int WIDTH>
using RowsShares = Shares<kSketchRows, WIDTH, WIDTH % 64 ? 4 : 2>;
template <int WIDTH>
using ProductShares = Shares<kSketchColumns, WIDTH, 4>;

// d += a·b for 16 values of the summed index; b is read from [16, columns] at `first_word`.
template <class T, class SHARES, int WORDS>
__device__ __forceinline__ void multiply_16(float (&d)[SHARES::kTiles][4],
                                            const uint32_t (&a)[SHARES::kRowTiles][4],
                                            const uint16_t* b_smem, int first_row, int first_word) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < SHARES::kColumnTiles; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(
            b, b_smem + place<WORDS>(first_row + lane % 16, first_word + n + lane / 16));
#pragma unroll
        for (int i = 0; i < SHARES::kRowTiles; ++i) {
            mma<T>(d[i * SHARES::kColumnTiles + n], a[i], b[0], b[1]);
            mma<T>(d[i * SHARES::kColumnTiles + n + 1], a[i], b[2], b[3]);
        }
    }
}

// A tile's sum so far, each thread's own numbers in words of 16 bytes.
template <int TILES>
__device__ __forceinline__ void add_sums(float (&d)[TILES][4], const float* sums_gmem) {
    const auto* const words = reinterpret_cast<const float4*>(sums_gmem) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        const float4 sum = words[i * kSketchThreads];
        d[i][0] += sum.x, d[i][1] += sum.y, d[i][2] += sum.z, d[i][3] += sum.w;
    }
}

template <int TILES>
__device__ __forceinline__ void store_sums(const float (&d)[TILES][4], float* sums_gmem) {
    auto* const words = reinterpret_cast<float4*>(sums_gmem) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        words[i * kSketchThreads] = make_float4(d[i][0], d[i][1], d[i][2], d[i][3]);
    }
}

// Adds up a tile of which each of `turns` blocks has a share, one after the other. Whether this
// block was the last, which has the sum in `d`; the others hand it on.
template <int TILES>
__device__ __forceinline__ bool add_in_turn(float (&d)[TILES][4], int turn, int turns,
                                            int* turn_gmem, float* sums_gmem, int* slot_smem) {
    if (turn > 0) {
        wait_for(turn_gmem, turn);
        add_sums(d, sums_gmem);
    }
    if (turn + 1 == turns) return true;
    store_sums(d, sums_gmem);
    signal(turn_gmem, slot_smem);
    return false;
}

// The sum over a block, to every thread, in an order that depends on nothing. `warps_smem` has a
// place for each warp.
__device__ inline double sum_over_block(double value, double* warps_smem) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, mask);
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps_smem[threadIdx.x / 32] = value;
    __syncthreads();
    double sum = 0.0;
#pragma unroll
    for (int warp = 0; warp < kSketchWarps; ++warp) sum += warps_smem[warp];
    return sum;
}

// Of a fragment's 8 numbers. Pairwise, and not of more: longer running sums of such squares came
// out up to 3e-8 low, these 1e-8.
template <class T>
__device__ __forceinline__ float square_sum(const uint32_t (&fragment)[4]) {
    float pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float low = T::widen(static_cast<uint16_t>(fragment[i]));
        const float high = T::widen(static_cast<uint16_t>(fragment[i] >> 16));
        pairs[i] = low * low + high * high;
    }
    return (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]);
}

template <class T>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
    return uint32_t{T::round(low)} | uint32_t{T::round(high)} << 16;
}

// Saturation keeps fp16 finite; NaN stays NaN.
template <class T>
__device__ __forceinline__ float saturated(float value) {
    return value > T::kLargest ? T::kLargest : value < -T::kLargest ? -T::kLargest : value;
}

// A tile of X Ω over one chunk of K; the last chunk's block rounds the sum to S. Blocks of the
// first columns of Ω make ‖X‖² as well: fp32 over 8 numbers, fp64 from there.
template <class T, int WIDTH>
__device__ __forceinline__ void make_s_tile(const SketchKernelParams& params, int panel, int item,
                                            int* slot_smem, double* warps_smem) {
    using Mine = RowsShares<WIDTH>;
    constexpr int kXWords = kSketchStepFeatures / 8, kOmegaWords = WIDTH / 8;
    constexpr int kXTile = kSketchRows * kSketchStepFeatures;
    constexpr int kStage = kXTile + kSketchStepFeatures * WIDTH;
    const int chunk = item / (params.panel_blocks * params.l_tiles);
    const int block = panel * params.panel_blocks + item / params.l_tiles % params.panel_blocks;
    const int l_tile = item % params.l_tiles;
    if (block >= params.row_blocks) return;  // the last panel may lack some
    const int first_column = l_tile * WIDTH;
    const int64_t first_row = static_cast<int64_t>(block) * kSketchRows;
    const int first = chunk * params.k_chunk;
    const int last = params.k - first < params.k_chunk ? params.k : first + params.k_chunk;
    const int steps = (last - first + kSketchStepFeatures - 1) / kSketchStepFeatures;

    uint16_t* const stages_smem = reinterpret_cast<uint16_t*>(shared_memory());
    // Eight threads copy a row of either tile, 128 bytes at a time.
    const int copy_row = threadIdx.x / 8, copy_word = threadIdx.x % 8;
    constexpr int kRowsEach = 2;  // of either tile, 32 apart
    static_assert(kSketchRows == 64 && kSketchStepFeatures == 64, "256 threads copy 32 rows");
    const uint16_t* x_next[kRowsEach];
    const uint16_t* omega_next[kRowsEach];
    bool kept[kRowsEach];
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
        const int64_t row = first_row + copy_row + 32 * i, feature = first + copy_row + 32 * i;
        kept[i] = row < params.m && (!params.mask_gmem || params.mask_gmem[row]);
        x_next[i] = params.x_gmem + row * params.ldx + first + 8 * copy_word;
        omega_next[i] = params.omega_gmem + feature * params.ldomega + first_column + 8 * copy_word;
    }
    int features_left = last - first;
    const auto load = [&](int, int stage) {
        uint16_t* const x = stages_smem + stage * kStage;
#pragma unroll
        for (int i = 0; i < kRowsEach; ++i) {
            const int row = copy_row + 32 * i;
            copy_async(x + place<kXWords>(row, copy_word), x_next[i],
                       kept[i] && 8 * copy_word < features_left);
            x_next[i] += kSketchStepFeatures;
#pragma unroll
            for (int j = 0; j < kOmegaWords; j += 8) {
                const int word = j + copy_word;
                if (word >= kOmegaWords) break;
                copy_async(x + kXTile + place<kOmegaWords>(row, word), omega_next[i] + 8 * j,
                           row < features_left && first_column + 8 * word < params.width);
            }
            omega_next[i] += kSketchStepFeatures * params.ldomega;
        }
        features_left -= kSketchStepFeatures;
    };

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row_warp = warp / Mine::kColumnWarps, column_warp = warp % Mine::kColumnWarps;
    const int warp_row = row_warp * Mine::kRows, warp_column = column_warp * Mine::kColumns;
    float s[Mine::kTiles][4] = {};
    double energy = 0.0;
    walk<kSketchStages>(steps, load, [&](int, int stage) {
        const uint16_t* const x = stages_smem + stage * kStage;
#pragma unroll
        for (int k = 0; k < kSketchStepFeatures / 16; ++k) {
            uint32_t a[Mine::kRowTiles][4];
#pragma unroll
            for (int i = 0; i < Mine::kRowTiles; ++i) {
                load_matrices(a[i],
                              x + place<kXWords>(warp_row + 16 * i + lane % 16, 2 * k + lane / 16));
            }
            // Warps of the same rows hold the same of X: each squares its share.
            if (k % Mine::kColumnWarps == column_warp) {
#pragma unroll
                for (int i = 0; i < Mine::kRowTiles; ++i) energy += square_sum<T>(a[i]);
            }
            multiply_16<T, Mine, kOmegaWords>(s, a, x + kXTile, 16 * k, warp_column / 8);
        }
    });

    if (l_tile == 0) {
        energy = sum_over_block(energy, warps_smem);
        if (threadIdx.x == 0) {
            params.energy_gmem[static_cast<int64_t>(block) * params.k_chunks + chunk] = energy;
        }
    }
    const int64_t tile = static_cast<int64_t>(block) * params.l_tiles + l_tile;
    int* const ready = params.counters_gmem + 1 + panel;
    int* const turn = params.counters_gmem + 1 + params.panels + tile;
    float* const sums = params.s_sums_gmem + tile * (kSketchRows * WIDTH);
    if (!add_in_turn(s, chunk, params.k_chunks, turn, sums, slot_smem)) return;
#pragma unroll
    for (int i = 0; i < 2 * Mine::kTiles; ++i) {
        const int row_tile = i / 2 / Mine::kColumnTiles, n = i / 2 % Mine::kColumnTiles;
        const int64_t row = first_row + warp_row + 16 * row_tile + g + i % 2 * 8;
        const int column = first_column + warp_column + 8 * n + 2 * t;
        if (row >= params.m || column >= params.width) continue;
        const float low = saturated<T>(s[i / 2][i % 2 * 2]);
        const float high = saturated<T>(s[i / 2][i % 2 * 2 + 1]);
        const uint32_t pair = round_pair<T>(low, high);
        uint16_t* const out = params.s_gmem + row * params.width + column;
        *reinterpret_cast<uint32_t*>(out) = pair;
        if (params.planes == 2) {
            const float low_rest = low - T::widen(static_cast<uint16_t>(pair));
            const float high_rest = high - T::widen(static_cast<uint16_t>(pair >> 16));
            uint16_t* const rest = out + static_cast<int64_t>(params.m) * params.width;
            *reinterpret_cast<uint32_t*>(rest) = round_pair<T>(low_rest, high_rest);
        }
    }
    signal(ready, slot_smem);
}

// A tile of [X ∣ S]ᵀ S over one chunk of a panel; S is the sum of its planes in both factors. The
// very last chunk's block adds the tile to Y or H, unless ‖X‖² says that the batch is bad.
template <class T, int WIDTH>
__device__ __forceinline__ void add_product_tile(const SketchKernelParams& params, int panel,
                                                 int item, int* slot_smem, double* warps_smem) {
    using Mine = ProductShares<WIDTH>;
    constexpr int kLeftWords = kSketchColumns / 8, kSWords = WIDTH / 8;
    constexpr int kLeftTile = kSketchStepRows * kSketchColumns;
    constexpr int kStage = kLeftTile + kSketchStepRows * WIDTH;
    const int chunk = item / (params.tiles * params.l_tiles);
    const int tile = item / params.l_tiles % params.tiles, l_tile = item % params.l_tiles;
    const bool in_y = tile < params.y_tiles;
    const int left_column = kSketchColumns * (in_y ? tile : tile - params.y_tiles);
    const int left_columns = in_y ? params.k : params.width;
    const int64_t left_ld = in_y ? params.ldx : params.width;
    const uint16_t* const left_gmem = in_y ? params.x_gmem : params.s_gmem;
    const int first_column = l_tile * WIDTH;

    const int64_t panel_rows = static_cast<int64_t>(params.panel_blocks) * kSketchRows;
    const int64_t panel_last = (panel + 1) * panel_rows;
    const int64_t first = panel * panel_rows + static_cast<int64_t>(chunk) * params.m_chunk;
    int64_t last = first + params.m_chunk;
    if (last > panel_last) last = panel_last;
    if (last > params.m) last = params.m;
    const int passes = in_y ? params.planes : params.planes * params.planes;
    // The last panel may lack rows for some chunks; those only take their turns.
    const int steps =
        last <= first ? 0 : passes * static_cast<int>((last - first - 1) / kSketchStepRows + 1);

    uint16_t* const stages_smem = reinterpret_cast<uint16_t*>(shared_memory());
    const int copy_row = threadIdx.x / 8, copy_word = threadIdx.x % 8;
    const int64_t plane = static_cast<int64_t>(params.m) * params.width;
    const uint16_t* left_next;
    const uint16_t* s_next;
    int64_t row;
    int pass = 0, kept;
    // The mask is asked for a step before it is needed.
    const auto ask_mask = [&] {
        kept = row >= last ? 0 : params.mask_gmem ? params.mask_gmem[row] : 1;
    };
    const auto begin_pass = [&] {
        row = first + copy_row;
        left_next = left_gmem + (in_y ? 0 : pass / params.planes * plane) + row * left_ld +
                    left_column + 8 * copy_word;
        s_next = params.s_gmem + pass % params.planes * plane + row * params.width + first_column +
                 8 * copy_word;
        ask_mask();
    };
    begin_pass();
    const auto load = [&](int, int stage) {
        uint16_t* const left = stages_smem + stage * kStage;
#pragma unroll
        for (int j = 0; j < kLeftWords; j += 8) {
            const int word = j + copy_word;
            copy_async(left + place<kLeftWords>(copy_row, word), left_next + 8 * j,
                       kept && left_column + 8 * word < left_columns);
        }
#pragma unroll
        for (int j = 0; j < kSWords; j += 8) {
            const int word = j + copy_word;
            if (word >= kSWords) break;
            copy_async(left + kLeftTile + place<kSWords>(copy_row, word), s_next + 8 * j,
                       kept && first_column + 8 * word < params.width);
        }
        row += kSketchStepRows;
        if (row - copy_row < last) {
            left_next += kSketchStepRows * left_ld;
            s_next += static_cast<int64_t>(kSketchStepRows) * params.width;
            ask_mask();
        } else {
            ++pass;
            begin_pass();
        }
    };

    const int blocks_left = params.row_blocks - panel * params.panel_blocks;
    wait_for(
        params.counters_gmem + 1 + panel,
        (blocks_left < params.panel_blocks ? blocks_left : params.panel_blocks) * params.l_tiles);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row_warp = warp / Mine::kColumnWarps, column_warp = warp % Mine::kColumnWarps;
    const int warp_row = row_warp * Mine::kRows, warp_column = column_warp * Mine::kColumns;
    float d[Mine::kTiles][4] = {};
    walk<kSketchProductStages>(steps, load, [&](int, int stage) {
        const uint16_t* const left = stages_smem + stage * kStage;
#pragma unroll
        for (int row = 0; row < kSketchStepRows; row += 16) {
            uint32_t a[Mine::kRowTiles][4];  // the left factor transposed
#pragma unroll
            for (int i = 0; i < Mine::kRowTiles; ++i) {
                load_matrices_transposed(
                    a[i], left + place<kLeftWords>(row + lane / 16 * 8 + lane % 8,
                                                   warp_row / 8 + 2 * i + lane / 8 % 2));
            }
            multiply_16<T, Mine, kSWords>(d, a, left + kLeftTile, row, warp_column / 8);
        }
    });

    const int64_t product_tile = static_cast<int64_t>(tile) * params.l_tiles + l_tile;
    int* const turns = params.counters_gmem + 1 + params.panels +
                       static_cast<int64_t>(params.row_blocks) * params.l_tiles + product_tile;
    float* const sums = params.product_sums_gmem + product_tile * (kSketchColumns * WIDTH);
    if (!add_in_turn(d, panel * params.m_chunks + chunk, params.panels * params.m_chunks, turns,
                     sums, slot_smem)) {
        return;
    }
    // This turn comes after the products of every panel, hence after every share of the trace.
    double trace = 0.0;
    for (int64_t i = threadIdx.x; i < static_cast<int64_t>(params.row_blocks) * params.k_chunks;
         i += kSketchThreads) {
        trace += params.energy_gmem[i];
    }
    trace = sum_over_block(trace, warps_smem);
    if (product_tile == 0 && threadIdx.x == 0) *params.trace_gmem = trace;
    if (!(trace < params.limit)) return;
    float* const state_gmem = in_y ? params.y_gmem : params.h_gmem;
    const int state_rows = in_y ? params.k : params.l;
    const int columns = params.l - (first_column + warp_column + 2 * t);  // from this thread's on
#pragma unroll
    for (int i = 0; i < 2 * Mine::kRowTiles; ++i) {
        const int row = left_column + warp_row + 16 * (i / 2) + g + i % 2 * 8;
        if (row >= state_rows) continue;
        float* const state = state_gmem + static_cast<int64_t>(row + 1) * params.l - columns;
        const auto each = [&](const auto& use) {
#pragma unroll
            for (int n = 0; n < 2 * Mine::kColumnTiles; ++n) {
                const int column = n / 2 * 8 + n % 2;
                if (column < columns) {
                    use(d[i / 2 * Mine::kColumnTiles + n / 2][i % 2 * 2 + n % 2], state + column);
                }
            }
        };
        // All loads of a row before its first store, which they would otherwise wait for.
        each([](float& sum, const float* at) { sum += *at; });
        each([](float& sum, float* at) { *at = sum; });
    }
}

template <class T, int WIDTH>
__global__ void __launch_bounds__(kSketchThreads, sketch_blocks_together(WIDTH))
    sketch_update_kernel(const SketchKernelParams params) {
    auto* const scratch_smem = shared_memory() + sketch_shared_bytes(WIDTH) - kSketchScratchBytes;
    double* const warps_smem = reinterpret_cast<double*>(scratch_smem);
    int* const slot_smem = reinterpret_cast<int*>(warps_smem + kSketchWarps);
    const int s_items = params.k_chunks * params.panel_blocks * params.l_tiles;
    const int both = s_items + params.m_chunks * params.tiles * params.l_tiles;
    for (;;) {
        const int ticket = take_ticket(params.counters_gmem, slot_smem);
        if (ticket >= params.panels * both) break;
        const bool at_start = ticket < s_items;  // the first panel's S comes before everything
        const int panel = at_start ? -1 : (ticket - s_items) / both;
        const int item = at_start ? ticket : ticket - s_items - panel * both;
        const bool ahead = panel + 1 < params.panels;  // S of the next panel beside the products
        if (ahead && item < s_items) {
            make_s_tile<T, WIDTH>(params, panel + 1, item, slot_smem, warps_smem);
        } else {
            add_product_tile<T, WIDTH>(params, panel, ahead ? item - s_items : item, slot_smem,
                                       warps_smem);
        }
    }
}

}  // namespace nsru
