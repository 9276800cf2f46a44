#include "narrow_plan.h"

#include <algorithm>
#include <limits>

#include "checks.h"

namespace nsru {
namespace {

constexpr int64_t kPartBytes = sizeof(float);

// Power of two, at most kMaxRankTiles.
int rank_tiles(int64_t r) {
    int tiles = 1;
    while (tiles < kMaxRankTiles && tiles * 8 < r) tiles *= 2;
    return tiles;
}

// A product as far as the number of splits goes by it.
struct Work {
    int64_t steps;       // of the sum that splits share
    int64_t step_bytes;  // of X, in one step of a block
    int64_t part_bytes;  // of one part of the result
    int together;        // blocks that share a multiprocessor
};

// Parts into which the steps of `blocks` blocks are cut so that the slowest multiprocessor is done
// soonest.
int64_t choose_splits(int64_t blocks, const Work& work, int multiprocessors) {
    // Model, not measured: multiprocessors read alike, in waves; every part is written once and
    // read once; a launch to add them up takes as long as a multiprocessor's 64 KiB.
    constexpr int64_t kMost = 64, kLaunchBytes = 64 * 1024;
    int64_t best = 1, least = std::numeric_limits<int64_t>::max();
    for (int64_t splits = 1; splits <= std::min(kMost, work.steps); ++splits) {
        const int64_t each = ceil_div(work.steps, splits);
        if (ceil_div(work.steps, each) != splits) continue;  // a smaller number cuts the same way
        const int64_t waves = ceil_div(blocks * splits, work.together * multiprocessors);
        int64_t cost = waves * work.together * each * work.step_bytes;
        if (splits > 1) cost += 2 * splits * work.part_bytes / multiprocessors + kLaunchBytes;
        if (cost < least) best = splits, least = cost;
    }
    return best;
}

// Cuts the sum of a product into parts of whole steps, `step` terms each.
void split_sum(NarrowPlan& out, int64_t step, const Work& work, int multiprocessors) {
    out.splits = choose_splits(out.blocks * out.ranks, work, multiprocessors);
    out.per_split = ceil_div(work.steps, out.splits) * step;
    out.parts_bytes = out.splits > 1 ? out.splits * work.part_bytes : 0;
}

}  // namespace

NarrowPlan plan(const RowsProductArgs& args, int multiprocessors) {
    NarrowPlan out{};
    out.rank_tiles = rank_tiles(args.r);
    out.row_tiles = args.m <= 16 ? 1 : full_row_tiles(out.rank_tiles);  // no tile without any rows
    const int rows = 16 * out.row_tiles;
    out.blocks = ceil_div(args.m, rows);
    out.ranks = ceil_div(args.r, 8 * out.rank_tiles);
    split_sum(out, kRowsStep,
              {ceil_div(args.c, kRowsStep), rows * kRowsStep * kElementBytes,
               kPartBytes * args.m * args.r, rows_blocks_together(out.row_tiles, out.rank_tiles)},
              multiprocessors);
    out.shared_bytes = kPartBytes * kNarrowWarps * rows * 8 * out.rank_tiles;
    return out;
}

NarrowPlan plan(const ColumnsProductArgs& args, int multiprocessors) {
    NarrowPlan out{};
    out.rank_tiles = rank_tiles(args.r);
    out.blocks = ceil_div(args.c, kColumnsBlock);
    out.ranks = ceil_div(args.r, 8 * out.rank_tiles);
    split_sum(out, kColumnsRows,
              {ceil_div(args.m, kColumnsRows), kColumnsRows * kColumnsBlock * kElementBytes,
               kPartBytes * args.c * args.r, kColumnsBlocksTogether},
              multiprocessors);
    const int stage = 2 * kColumnsRows * (kColumnsBlock + 8 * p_chunks(out.rank_tiles));
    out.shared_bytes = kColumnsStages * stage;
    if (args.v_gmem) {
        out.row_parts_bytes = out.blocks > 1 ? kPartBytes * out.blocks * args.m * args.r : 0;
        out.shared_bytes += kPartBytes * kNarrowWarps * kColumnsRows * 8 * out.rank_tiles;
    }
    return out;
}

void check_args(const RowsProductArgs& args) {
    check_short(args.dtype);
    check_sizes({{"m", args.m}, {"c", args.c}, {"r", args.r}});
    check_row_length("c", args.c, "x and v");
    check_matrices({{"x", args.x_gmem, args.c, "ldx", args.ldx, true},
                    {"v", args.v_gmem, args.c, "ldv", args.ldv, true},
                    {"out", args.out_gmem, args.r, "ldo", args.ldo, false}});
}

void check_args(const ColumnsProductArgs& args) {
    check_short(args.dtype);
    check_sizes({{"m", args.m}, {"c", args.c}, {"r", args.r}});
    check_row_length("c", args.c, "x");
    if (!args.v_gmem != !args.rows_gmem) refuse("v and rows must both be given, or neither");
    const int64_t ldd = args.rank_first ? args.c : args.r;
    check_matrices({{"x", args.x_gmem, args.c, "ldx", args.ldx, true},
                    {"p", args.p_gmem, args.r, "ldp", args.ldp, true},
                    {"d", args.d_gmem, ldd, "ldd", ldd, false}});
    if (!args.v_gmem) return;
    if (args.r > kMaxRanksTogether) {
        refuse(value("r", args.r) + " must be at most " + std::to_string(kMaxRanksTogether) +
               " for both products in one read");
    }
    check_matrices({{"v", args.v_gmem, args.r, "ldv", args.ldv, false},
                    {"rows", args.rows_gmem, args.r, "ldrows", args.ldrows, false}});
}

}  // namespace nsru
