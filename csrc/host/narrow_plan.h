// Pure host logic of the narrow products: tiles, splits, workspaces, what they refuse. No CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

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

// Power of two, at most kMaxRankTiles.
int rank_tiles(int64_t r);

// 16-byte words from one row of P to the next in shared memory: an odd number, so that eight rows
// lie in different banks.
constexpr int p_chunks(int rank_tiles) { return rank_tiles | 1; }

// A product as far as the number of splits goes by it.
struct NarrowWork {
    int64_t blocks;      // for one split
    int64_t steps;       // of the sum that splits share
    int64_t step_bytes;  // of X, in one step of a block
    int64_t part_bytes;  // of one part of the result
    int together;        // blocks that share a multiprocessor
};

// Parts into which the steps are cut so that the slowest multiprocessor is done soonest.
int64_t choose_splits(const NarrowWork& work, int multiprocessors);

NarrowPlan plan(const RowsProductArgs& args, int multiprocessors);
NarrowPlan plan(const ColumnsProductArgs& args, int multiprocessors);

// Why the product cannot take these arguments, with their values; "" where it can.
std::string refusal(const RowsProductArgs& args);
std::string refusal(const ColumnsProductArgs& args);

}  // namespace nsru
