// Pure host logic of the narrow product: tiles, splits, workspaces, what it refuses. No CUDA.
#pragma once

#include <cstdint>

#include "../narrow.h"

namespace nsru {

constexpr int kNarrowThreads = 256;
constexpr int kNarrowWarps = kNarrowThreads / 32;
// Beyond it the parts of P', 4 R bytes a row and block, move more than a second read.
constexpr int kMaxRanksTogether = 32;
constexpr int kColumnsBlock = 256;
constexpr int kColumnsRows = 32;  // rows of X in a stage
constexpr int kColumnsStages = 3;
constexpr int kColumnsBlocksTogether = 2;  // share a multiprocessor, by shared memory

// How the product is cut. Splits share a sum; their float32 parts are added in order afterwards.
struct NarrowPlan {
    int rank_tiles;           // of 8 columns; a power of two
    int64_t blocks;           // along C
    int64_t splits;           // parts of D's sum
    int64_t per_split;        // rows in a part
    int64_t parts_bytes;      // of D's parts; 0 for one split
    int64_t row_parts_bytes;  // of the parts of P', one for each block along C; 0 for one block
    int shared_bytes;
};

// 16-byte words from one row of P to the next in shared memory: an odd number, so that eight rows
// lie in different banks.
constexpr int p_chunks(int rank_tiles) { return rank_tiles | 1; }

NarrowPlan plan(const ColumnsProductArgs& args, int multiprocessors);

// Throws std::invalid_argument that says why the product cannot take these arguments.
void check_args(const ColumnsProductArgs& args);

}  // namespace nsru
