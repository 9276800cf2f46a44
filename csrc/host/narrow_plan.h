// Pure host logic of the narrow products: tiles, splits, workspaces, what they refuse. No CUDA.
#pragma once

#include <cstdint>

#include "../narrow.h"

namespace nsru {

constexpr int kNarrowThreads = 256;
constexpr int kNarrowWarps = kNarrowThreads / 32;
constexpr int kMaxRankTiles = 8;  // of 8 columns: R beyond 64 takes several blocks
// Beyond it the parts of the rows product, 4 R bytes a row and block, move more than a second read.
constexpr int kMaxRanksTogether = 32;
constexpr int kColumnsBlock = 256;
constexpr int kColumnsRows = 32;  // rows of X in a stage
constexpr int kColumnsStages = 3;
constexpr int kColumnsBlocksTogether = 2;     // share a multiprocessor, by shared memory
constexpr int kRowsStep = 64 * kNarrowWarps;  // columns that a block takes at a time

// Tiles of 16 rows in a block of the rows product, where X has so many rows. Many read V, which
// comes from L2, less often; their accumulators set the limit.
constexpr int full_row_tiles(int rank_tiles) { return rank_tiles <= 4 ? 4 : 2; }

// Blocks of the rows product that share a multiprocessor's registers: one where the loads that a
// thread has under way need more than half of them.
constexpr int rows_blocks_together(int row_tiles, int rank_tiles) {
    return row_tiles * rank_tiles > 4 ? 1 : 2;
}

// How a product is cut. Splits share a sum; their float32 parts are added in order afterwards.
struct NarrowPlan {
    int row_tiles;            // of 16 rows, in a block of the rows product
    int rank_tiles;           // of 8 columns, in a block; a power of two
    int64_t blocks;           // along M (rows product) or C (columns product)
    int64_t ranks;            // blocks along R
    int64_t splits;           // parts of the sum
    int64_t per_split;        // columns (rows product) or rows (columns product) in a part
    int64_t parts_bytes;      // of the sum's parts; 0 for one split
    int64_t row_parts_bytes;  // of the second product's parts, one for each block along C
    int shared_bytes;
};

// 16-byte words from one row of P to the next in shared memory: an odd number, so that eight rows
// lie in different banks.
constexpr int p_chunks(int rank_tiles) { return rank_tiles | 1; }

NarrowPlan plan(const RowsProductArgs& args, int multiprocessors);
NarrowPlan plan(const ColumnsProductArgs& args, int multiprocessors);

// Throw std::invalid_argument that says why the product cannot take these arguments.
void check_args(const RowsProductArgs& args);
void check_args(const ColumnsProductArgs& args);

}  // namespace nsru
