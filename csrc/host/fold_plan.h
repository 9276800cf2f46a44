// Pure host logic of the grouped fold: tiles, shared memory, what it refuses. No CUDA.
#pragma once

#include <cstdint>

#include "../fold.h"

namespace nsru {

constexpr int kFoldFields = 11;  // int64 of the table for a problem
constexpr int kFoldThreads = 128;
constexpr int kFoldWarps = kFoldThreads / 32;
constexpr int kFoldRows = 32;     // of an adapter block; a tile of 16 where no more are left
constexpr int kFoldColumns = 64;  // of a product's tile
constexpr int kFoldStep = 16;     // terms of a product's sum in a stage
// Blocks of a multiprocessor hide each other's waiting: three on sm_90, two in the shared memory
// of sm_80.
constexpr int kFoldBlocksPerMultiprocessor = 3;
constexpr int kFoldRing = 18 * 1024;  // bytes of a warp's stages

// A warp's stage: its part of U, and up to kFoldRows rows of what is multiplied, as float32.
constexpr int fold_stage(int basis_bytes) {
    return kFoldStep * (kFoldColumns * basis_bytes + kFoldRows * 4);
}
constexpr int fold_stages(int basis_bytes) { return kFoldRing / fold_stage(basis_bytes); }

// Behind the stages: what all threads know of their item.
constexpr int kFoldShared = kFoldWarps * kFoldRing + 512;

// Values of a table that one launch carries as arguments, of which it can take 32,764 bytes.
constexpr int kTableValues = 4000;

struct FoldPlan {
    int64_t blocks;
    int shared_bytes;
};

FoldPlan plan(const FoldArgs& args, int multiprocessors);

// Throw std::invalid_argument that says why the launcher cannot take these arguments.
void check_args(const FoldArgs& args);
void check_args(const WriteTableArgs& args);

}  // namespace nsru
