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

struct SketchKernelParams {
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
    int m, k, l, width;
    int planes, l_tiles;
    int row_blocks, panel_blocks, panels;
    int k_chunk, k_chunks;
    int y_tiles, tiles;
    int m_chunk, m_chunks;
};

// Element at which a 16-byte word of a tile in shared memory lies. Eight rows of one word, which
// a fragment takes, are in different banks.
template <int WORDS>
__device__ __forceinline__ int place(int row, int word) {
    return 8 * (row * WORDS + (word ^ (WORDS % 8 ? row / 2 % 4 : row % 8)));
}

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

// Runs `multiply(stage)` for each step after what `load(stage)` started to copy STAGES - 1 steps
// ahead; `load` is called for the steps in their order.
template <int STAGES, class LOAD, class MULTIPLY>
__device__ __forceinline__ void walk(int steps, const LOAD& load, const MULTIPLY& multiply) {
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) load(step);
        close_copies();
    }
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();  // the copies of all threads; and the stage to fill next is read no more
        const int ahead = step + STAGES - 1;
        if (ahead < steps) load(ahead % STAGES);
        close_copies();
        multiply(step % STAGES);
    }
}

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

template <class T>
__device__ __forceinline__ float square_sum(uint32_t pair) {
    const float low = T::widen(static_cast<uint16_t>(pair));
    const float high = T::widen(static_cast<uint16_t>(pair >> 16));
    return low * low + high * high;
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
// first columns of Ω make ‖X‖² as well: fp32 over a step, fp64 from there.
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
    bool kept[kSketchRows / 32];
#pragma unroll
    for (int i = 0; i < kSketchRows / 32; ++i) {
        const int64_t row = first_row + copy_row + 32 * i;
        kept[i] = row < params.m && (!params.mask_gmem || params.mask_gmem[row]);
    }
    int feature = first;
    const auto load = [&](int stage) {
        uint16_t* const x = stages_smem + stage * kStage;
        const int column = feature + 8 * copy_word;
#pragma unroll
        for (int i = 0; i < kSketchRows / 32; ++i) {
            const int row = copy_row + 32 * i;
            copy_async(x + place<kXWords>(row, copy_word),
                       params.x_gmem + (first_row + row) * params.ldx + column,
                       kept[i] && column < last);
        }
#pragma unroll
        for (int i = 0; i < kSketchStepFeatures / 32; ++i) {
            const int row = copy_row + 32 * i;
#pragma unroll
            for (int word = copy_word; word < kOmegaWords; word += 8) {
                const int omega_column = first_column + 8 * word;
                copy_async(x + kXTile + place<kOmegaWords>(row, word),
                           params.omega_gmem + (feature + row) * params.ldomega + omega_column,
                           feature + row < last && omega_column < params.width);
            }
        }
        feature += kSketchStepFeatures;
    };

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row_warp = warp / Mine::kColumnWarps, column_warp = warp % Mine::kColumnWarps;
    const int warp_row = row_warp * Mine::kRows, warp_column = column_warp * Mine::kColumns;
    float s[Mine::kTiles][4] = {};
    double energy = 0.0;
    walk<kSketchStages>(steps, load, [&](int stage) {
        const uint16_t* const x = stages_smem + stage * kStage;
        float step_energy = 0.0f;
#pragma unroll
        for (int k = 0; k < kSketchStepFeatures / 16; ++k) {
            uint32_t a[Mine::kRowTiles][4];
#pragma unroll
            for (int i = 0; i < Mine::kRowTiles; ++i) {
                load_matrices(
                    a[i], x + place<kXWords>(warp_row + 16 * i + lane % 16, 2 * k + lane / 16));
            }
            // Warps of the same rows hold the same of X: each squares its share.
            if (l_tile == 0 && k % Mine::kColumnWarps == column_warp) {
#pragma unroll
                for (int i = 0; i < 4 * Mine::kRowTiles; ++i) {
                    step_energy += square_sum<T>(a[i / 4][i % 4]);
                }
            }
            multiply_16<T, Mine, kOmegaWords>(s, a, x + kXTile, 16 * k, warp_column / 8);
        }
        energy += step_energy;
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
    if (chunk > 0) {
        wait_for(turn, chunk);
        add_sums(s, sums);
    }
    if (chunk + 1 < params.k_chunks) {
        store_sums(s, sums);
        signal(turn, slot_smem);
        return;
    }
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
    // The mask of the next step, asked for a step before it is needed.
    const auto mask_of = [&](int64_t row) -> int {
        return row >= last ? 0 : params.mask_gmem ? params.mask_gmem[row] : 1;
    };
    int64_t top = first;
    int pass = 0, kept = mask_of(first + copy_row);
    const int64_t plane = static_cast<int64_t>(params.m) * params.width;
    const auto load = [&](int stage) {
        uint16_t* const left = stages_smem + stage * kStage;
        const int64_t row = top + copy_row;
        const uint16_t* const left_row =
            left_gmem + (in_y ? 0 : pass / params.planes * plane) + row * left_ld;
        const uint16_t* const s_row =
            params.s_gmem + pass % params.planes * plane + row * params.width;
#pragma unroll
        for (int word = copy_word; word < kLeftWords; word += 8) {
            const int column = left_column + 8 * word;
            copy_async(left + place<kLeftWords>(copy_row, word), left_row + column,
                       kept && column < left_columns);
        }
#pragma unroll
        for (int word = copy_word; word < kSWords; word += 8) {
            const int column = first_column + 8 * word;
            copy_async(left + kLeftTile + place<kSWords>(copy_row, word), s_row + column,
                       kept && column < params.width);
        }
        top += kSketchStepRows;
        if (top >= last) {
            top = first;
            ++pass;
        }
        kept = mask_of(top + copy_row);
    };

    const int blocks_left = params.row_blocks - panel * params.panel_blocks;
    wait_for(params.counters_gmem + 1 + panel,
             (blocks_left < params.panel_blocks ? blocks_left : params.panel_blocks) *
                 params.l_tiles);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row_warp = warp / Mine::kColumnWarps, column_warp = warp % Mine::kColumnWarps;
    const int warp_row = row_warp * Mine::kRows, warp_column = column_warp * Mine::kColumns;
    float d[Mine::kTiles][4] = {};
    walk<kSketchProductStages>(steps, load, [&](int stage) {
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
    const int turn = panel * params.m_chunks + chunk;
    if (turn > 0) {
        wait_for(turns, turn);
        add_sums(d, sums);
    }
    if (turn + 1 < params.panels * params.m_chunks) {
        store_sums(d, sums);
        signal(turns, slot_smem);
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
    const auto each = [&](const auto& use) {
#pragma unroll
        for (int i = 0; i < 4 * Mine::kTiles; ++i) {
            const int row_tile = i / 4 / Mine::kColumnTiles, n = i / 4 % Mine::kColumnTiles;
            const int row = left_column + warp_row + 16 * row_tile + g + i / 2 % 2 * 8;
            const int column = first_column + warp_column + 8 * n + 2 * t + i % 2;
            if (row < state_rows && column < params.l) {
                use(d[i / 4][i % 4], state_gmem + static_cast<int64_t>(row) * params.l + column);
            }
        }
    };
    // All loads before the first store, which they would otherwise wait for.
    each([](float& sum, const float* state) { sum += *state; });
    each([](const float& sum, float* state) { *state = sum; });
}

template <class T, int WIDTH>
__global__ void __launch_bounds__(kSketchThreads, sketch_blocks_together(WIDTH))
    sketch_update_kernel(const SketchKernelParams params) {
    auto* const scratch_smem =
        shared_memory() + sketch_shared_bytes(WIDTH) - kSketchScratchBytes;
    double* const warps_smem = reinterpret_cast<double*>(scratch_smem);
    int* const slot_smem = reinterpret_cast<int*>(warps_smem + kSketchWarps);
    const int s_items = params.k_chunks * params.panel_blocks * params.l_tiles;
    const int both = s_items + params.m_chunks * params.tiles * params.l_tiles;
    for (;;) {
        const int ticket = take_ticket(params.counters_gmem, slot_smem);
        if (ticket >= params.panels * both) break;
        const int later = ticket - s_items;  // the first panel's S comes before everything
        const int panel = later < 0 ? 0 : later / both;
        const int item = later - panel * both;
        const bool ahead = panel + 1 < params.panels;  // S of the next panel beside the products
        if (later < 0) {
            make_s_tile<T, WIDTH>(params, 0, ticket, slot_smem, warps_smem);
        } else if (ahead && item < s_items) {
            make_s_tile<T, WIDTH>(params, panel + 1, item, slot_smem, warps_smem);
        } else {
            add_product_tile<T, WIDTH>(params, panel, ahead ? item - s_items : item, slot_smem,
                                       warps_smem);
        }
    }
}

}  // namespace nsru
