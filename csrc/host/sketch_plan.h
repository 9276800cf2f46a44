// Pure host logic of the sketch update: tiles, panels, chunks, its workspace, what it refuses.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../sketch.h"

namespace nsru {

constexpr int kSketchThreads = 256;
constexpr int kSketchWarps = kSketchThreads / 32;
// A tile of S: 64 rows of X, in steps of 64 features.
constexpr int kSketchRows = 64;
constexpr int kSketchStepFeatures = 64;
constexpr int kSketchStages = 3;
// A tile of [Y ; H]: 128 columns of [X ∣ S], in steps of 32 rows.
constexpr int kSketchColumns = 128;
constexpr int kSketchStepRows = 32;
constexpr int kSketchProductStages = 4;
constexpr int kSketchScratchBytes = 128;  // a ticket, and a double for each warp
// Columns of either tile: multiples of kSketchWidthUnit, which warps share evenly.
constexpr int kSketchWidthUnit = 32;
constexpr int kSketchMaxWidth = 192;

constexpr int sketch_shared_bytes(int tile_width) {
    const int rows_stage = 2 * kSketchStepFeatures * (kSketchRows + tile_width);
    const int products_stage = 2 * kSketchStepRows * (kSketchColumns + tile_width);
    const int rows = kSketchStages * rows_stage, products = kSketchProductStages * products_stage;
    return (rows > products ? rows : products) + kSketchScratchBytes;
}

// Blocks that share a multiprocessor: up to 64 accumulators a thread leave registers for two.
constexpr int sketch_blocks_together(int tile_width) { return tile_width <= 128 ? 2 : 1; }

// Work items are chunks of the sums that make a tile, panel by panel; see ops/sketch/README.md.
struct SketchTiles {
    int m, k, l;
    int width;  // of S in memory: L rounded up to 16 bytes
    int planes;
    int l_tiles;
    int row_blocks;    // of kSketchRows
    int panel_blocks;  // row blocks in a panel
    int panels;
    int k_chunk, k_chunks;  // features in a chunk of a tile of S; chunks
    int y_tiles, tiles;     // of kSketchColumns: of Y; of Y and H
    int m_chunk, m_chunks;  // rows in a chunk of a tile of [Y ; H]; chunks in a panel
};

struct SketchPlan : SketchTiles {
    int tile_width;  // columns of Ω in a tile
    int64_t items;
    int64_t blocks;
    int shared_bytes;
    // The workspace: counters, which start as zeros, and then the arrays at these bytes.
    size_t counters_bytes;
    size_t energy_at;
    size_t s_at;
    size_t s_sums_at;
    size_t product_sums_at;
    size_t workspace_bytes;
};

SketchPlan plan(const SketchUpdateArgs& args, int multiprocessors);

// Throws std::invalid_argument that says why the kernel cannot take these arguments.
void check_args(const SketchUpdateArgs& args);

}  // namespace nsru
