#include "narrow_plan.h"

#include <algorithm>
#include <limits>

#include "checks.h"

namespace nsru {
namespace {

constexpr int64_t kPartBytes = sizeof(float);

// Parts into which the `steps` steps of `blocks` blocks are cut so that the slowest multiprocessor
// is done soonest.
int64_t choose_splits(int64_t blocks, int64_t steps, int64_t part_bytes, int multiprocessors) {
    // Model, not measured: multiprocessors read alike, in waves; every part is written once and
    // read once; a launch to add them up takes as long as a multiprocessor's 64 KiB.
    constexpr int64_t kMost = 64, kLaunchBytes = 64 * 1024;
    constexpr int64_t kStepBytes = kColumnsRows * kColumnsBlock * kElementBytes;
    int64_t best = 1, least = std::numeric_limits<int64_t>::max();
    for (int64_t splits = 1; splits <= std::min(kMost, steps); ++splits) {
        const int64_t each = ceil_div(steps, splits);
        if (ceil_div(steps, each) != splits) continue;  // a smaller number cuts the same way
        const int64_t waves = ceil_div(blocks * splits, kColumnsBlocksTogether * multiprocessors);
        int64_t cost = waves * kColumnsBlocksTogether * each * kStepBytes;
        if (splits > 1) cost += 2 * splits * part_bytes / multiprocessors + kLaunchBytes;
        if (cost < least) best = splits, least = cost;
    }
    return best;
}

}  // namespace

NarrowPlan plan(const ColumnsProductArgs& args, int multiprocessors) {
    NarrowPlan out{};
    out.rank_tiles = 1;
    while (8 * out.rank_tiles < args.r) out.rank_tiles *= 2;
    out.blocks = ceil_div(args.c, kColumnsBlock);
    const int64_t steps = ceil_div(args.m, kColumnsRows), part_bytes = kPartBytes * args.c * args.r;
    out.splits = choose_splits(out.blocks, steps, part_bytes, multiprocessors);
    out.per_split = ceil_div(steps, out.splits) * kColumnsRows;
    out.parts_bytes = out.splits > 1 ? out.splits * part_bytes : 0;
    out.row_parts_bytes = out.blocks > 1 ? kPartBytes * out.blocks * args.m * args.r : 0;
    const int stage = 2 * kColumnsRows * (kColumnsBlock + 8 * p_chunks(out.rank_tiles));
    out.shared_bytes =
        kColumnsStages * stage + kPartBytes * kNarrowWarps * kColumnsRows * 8 * out.rank_tiles;
    return out;
}

void check_args(const ColumnsProductArgs& args) {
    check_short(args.dtype);
    check_sizes({{"m", args.m}, {"c", args.c}, {"r", args.r}});
    check_row_length("c", args.c, "x");
    if (args.r > kMaxRanksTogether) {
        refuse(value("r", args.r) + " must be at most " + std::to_string(kMaxRanksTogether));
    }
    check_matrices({{"x", args.x_gmem, args.c, "ldx", args.ldx, true},
                    {"p", args.p_gmem, args.r, "ldp", args.ldp, true},
                    {"d", args.d_gmem, args.r, "ldd", args.r, false},
                    {"v", args.v_gmem, args.r, "ldv", args.ldv, false},
                    {"rows", args.rows_gmem, args.r, "ldrows", args.ldrows, false}});
}

}  // namespace nsru
