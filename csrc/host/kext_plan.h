// Pure host logic of the K-extended GEMM: configs, tile counts, what TMA can describe. No CUDA.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "../kext_gemm.h"

namespace nsru {

constexpr int kBlockK = 64;   // 128 bytes of 16-bit elements: TMA's widest swizzle
constexpr int kStepK = 16;    // what one wgmma takes of a tile
constexpr int kClusterM = 2;  // two blocks of a cluster share each tile of W by multicast

struct KextConfig {
    const char* name;
    int block_m;
    int block_n;
    bool pingpong;
};

// The first is the default; on an H200 the other won nearly everywhere, as plan tables say.
constexpr std::array<KextConfig, 2> kConfigs = {{
    {"128x256x64_2x1_cooperative", 128, 256, false},
    {"128x128x64_2x1_pingpong", 128, 128, true},
}};

// How many tiles of kBlockK the GEMM takes from each source.
struct KTiles {
    int64_t main;
    int64_t tail;
    int64_t total() const { return main + tail; }
};

KTiles split_k(int64_t k, int64_t r);

// Steps of the last tile of P that hold anything; the others would multiply zeros.
constexpr int last_steps(int64_t r) { return static_cast<int>((r - 1) % kBlockK) / kStepK + 1; }

// How many of the `count` k tiles from `first` on come from the main source; the tail has the rest.
// Also called by the producer warp.
constexpr int main_share(int first, int count, int main_tiles) {
    const int left = main_tiles - first;
    return left < 0 ? 0 : left < count ? left : count;
}

// Output tiles, rounded up to whole clusters as the persistent kernel schedules them.
int64_t tile_count(const KextConfig& config, int64_t m, int64_t n);

// Index of the first config that gives every multiprocessor a tile; else of the one with most.
int choose_config(int64_t m, int64_t n, int multiprocessors);

// Throws std::invalid_argument that says why the GEMM cannot take these arguments. Looks at
// addresses as numbers only.
void check_args(const KextGemmArgs& args);

// Sizes and settings for messages.
std::string describe(const KextGemmArgs& args);

}  // namespace nsru
