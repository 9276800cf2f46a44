// Pure host logic of the grouped projection: tiles, shared memory, what it refuses. No CUDA.
#pragma once

#include <cstdint>

#include "../project.h"

namespace nsru {

constexpr int kProjectFields = 11;  // int64 of the table for a problem
constexpr int kProjectThreads = 128;
constexpr int kProjectWarps = kProjectThreads / 32;
constexpr int kProjectRows = 32;     // of an adapter block; a tile of 16 where no more are left
constexpr int kProjectColumns = 64;  // of a product's tile
constexpr int kProjectStep = 16;     // terms of a product's sum in a stage
// Blocks of a multiprocessor hide each other's waiting: three on sm_90, two in the shared memory
// of sm_80.
constexpr int kProjectBlocksPerMultiprocessor = 3;
constexpr int kProjectRing = 18 * 1024;  // bytes of a warp's stages

// A warp's stage: its part of U, and up to kProjectRows rows of what is multiplied, as float32.
constexpr int project_stage(int basis_bytes) {
    return kProjectStep * (kProjectColumns * basis_bytes + kProjectRows * 4);
}
constexpr int project_stages(int basis_bytes) { return kProjectRing / project_stage(basis_bytes); }

// Behind the stages: what all threads know of their item.
constexpr int kProjectShared = kProjectWarps * kProjectRing + 512;

// Values of a table that one launch carries as arguments, of which it can take 32,764 bytes.
constexpr int kTableValues = 4000;

struct ProjectPlan {
    int64_t blocks;
    int shared_bytes;
};

ProjectPlan plan(const ProjectArgs& args, int multiprocessors);

// Throw std::invalid_argument that says why the launcher cannot take these arguments.
void check_args(const ProjectArgs& args);
void check_args(const WriteTableArgs& args);

}  // namespace nsru
