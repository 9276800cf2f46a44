#include "narrow_plan.h"

#include <algorithm>
#include <limits>

#include "matrix.h"

namespace nsru {
namespace {

constexpr int64_t kPartBytes = sizeof(float);

std::string refusal(const char* x_name, Dtype dtype, int64_t m, int64_t c, int64_t r) {
    if (dtype != Dtype::kBf16 && dtype != Dtype::kFp16) return "dtype must be bf16 or fp16";
    if (const auto reason = size_refusal({{"m", m}, {"c", c}, {"r", r}}); !reason.empty()) {
        return reason;
    }
    if (c % kAlignedElements) {
        return value("c", c) + " must be a multiple of 8: rows of " + x_name +
               " are read in words of 16 bytes";
    }
    return "";
}

}  // namespace

int rank_tiles(int64_t r) {
    int tiles = 1;
    while (tiles < kMaxRankTiles && tiles * 8 < r) tiles *= 2;
    return tiles;
}

int64_t choose_splits(const NarrowWork& work, int multiprocessors) {
    // Model, not measured: multiprocessors read alike, in waves; every part is written once and
    // read once; a launch to add them up takes as long as a multiprocessor's 64 KiB.
    constexpr int64_t kMost = 64, kLaunchBytes = 64 * 1024;
    int64_t best = 1, least = std::numeric_limits<int64_t>::max();
    for (int64_t splits = 1; splits <= std::min(kMost, work.steps); ++splits) {
        const int64_t each = ceil_div(work.steps, splits);
        if (ceil_div(work.steps, each) != splits) continue;  // a smaller number cuts the same way
        const int64_t waves = ceil_div(work.blocks * splits, work.together * multiprocessors);
        int64_t cost = waves * work.together * each * work.step_bytes;
        if (splits > 1) cost += 2 * splits * work.part_bytes / multiprocessors + kLaunchBytes;
        if (cost < least) best = splits, least = cost;
    }
    return best;
}

NarrowPlan plan(const RowsProductArgs& args, int multiprocessors) {
    NarrowPlan out{};
    out.rank_tiles = rank_tiles(args.r);
    // Many rows read V, which comes from L2, less often; their accumulators set the limit. With few
    // rows no tile is without any.
    out.row_tiles = args.m <= 16 ? 1 : out.rank_tiles <= 4 ? 4 : 2;
    out.blocks = ceil_div(args.m, 16 * out.row_tiles);
    out.ranks = ceil_div(args.r, 8 * out.rank_tiles);
    const int64_t steps = ceil_div(args.c, kRowsStep), part_bytes = kPartBytes * args.m * args.r;
    const int64_t splits = choose_splits(
        {out.blocks * out.ranks, steps, 16 * out.row_tiles * kRowsStep * kElementBytes, part_bytes,
         rows_blocks_together(out.row_tiles, out.rank_tiles)},
        multiprocessors);
    out.per_split = ceil_div(steps, splits) * kRowsStep;
    out.splits = splits;
    out.parts_bytes = splits > 1 ? splits * part_bytes : 0;
    out.shared_bytes = kPartBytes * kNarrowWarps * 16 * out.row_tiles * 8 * out.rank_tiles;
    return out;
}

NarrowPlan plan(const ColumnsProductArgs& args, int multiprocessors) {
    NarrowPlan out{};
    out.rank_tiles = rank_tiles(args.r);
    out.blocks = ceil_div(args.c, kColumnsBlock);
    out.ranks = ceil_div(args.r, 8 * out.rank_tiles);
    const int64_t steps = ceil_div(args.m, kColumnsRows), part_bytes = kPartBytes * args.c * args.r;
    const int64_t splits =
        choose_splits({out.blocks * out.ranks, steps, kColumnsRows * kColumnsBlock * kElementBytes,
                       part_bytes, kColumnsBlocksTogether},
                      multiprocessors);
    out.per_split = ceil_div(steps, splits) * kColumnsRows;
    out.splits = splits;
    out.parts_bytes = splits > 1 ? splits * part_bytes : 0;
    const int stage = 2 * kColumnsRows * (kColumnsBlock + 8 * p_chunks(out.rank_tiles));
    out.shared_bytes = kColumnsStages * stage;
    if (args.v_gmem) {
        out.row_parts_bytes = out.blocks > 1 ? kPartBytes * out.blocks * args.m * args.r : 0;
        out.shared_bytes += kPartBytes * kNarrowWarps * kColumnsRows * 8 * out.rank_tiles;
    }
    return out;
}

std::string refusal(const RowsProductArgs& args) {
    if (auto reason = refusal("x and v", args.dtype, args.m, args.c, args.r); !reason.empty()) {
        return reason;
    }
    return first_refusal({{"x", args.x_gmem, args.c, "ldx", args.ldx, true},
                          {"v", args.v_gmem, args.c, "ldv", args.ldv, true},
                          {"out", args.out_gmem, args.r, "ldo", args.ldo, false}});
}

std::string refusal(const ColumnsProductArgs& args) {
    if (auto reason = refusal("x", args.dtype, args.m, args.c, args.r); !reason.empty()) {
        return reason;
    }
    if (!args.v_gmem != !args.rows_gmem) return "v and rows must both be given, or neither";
    const int64_t ldd = args.rank_first ? args.c : args.r;
    std::string reason = first_refusal({{"x", args.x_gmem, args.c, "ldx", args.ldx, true},
                                        {"p", args.p_gmem, args.r, "ldp", args.ldp, true},
                                        {"d", args.d_gmem, ldd, "ldd", ldd, false}});
    if (reason.empty() && args.v_gmem) {
        if (args.r > kMaxRanksTogether) {
            return value("r", args.r) + " must be at most " + std::to_string(kMaxRanksTogether) +
                   " for both products in one read";
        }
        reason = first_refusal({{"v", args.v_gmem, args.r, "ldv", args.ldv, false},
                                {"rows", args.rows_gmem, args.r, "ldrows", args.ldrows, false}});
    }
    return reason;
}

}  // namespace nsru
