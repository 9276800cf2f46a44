#include "narrow_plan.h"

#include <algorithm>

#include "matrix.h"

namespace nsru {
namespace {

constexpr size_t kPartBytes = sizeof(float);

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

int64_t choose_splits(int64_t blocks, int64_t steps, int multiprocessors) {
    // From half a block for each multiprocessor on, adding parts costs more than idle ones.
    if (2 * blocks >= multiprocessors) return 1;
    return std::max<int64_t>(1, std::min(ceil_div(2 * multiprocessors, blocks), steps));
}

NarrowPlan plan(const RowsProductArgs& args, int multiprocessors) {
    NarrowPlan out{};
    out.rank_tiles = rank_tiles(args.r);
    // 32 or 64 accumulators a thread, and with few rows no tiles without any.
    out.row_tiles = args.m <= 16 ? 1 : out.rank_tiles <= 2 ? 4 : 2;
    out.blocks = ceil_div(args.m, 16 * out.row_tiles);
    out.ranks = ceil_div(args.r, 8 * out.rank_tiles);
    const int64_t steps = ceil_div(args.c, kRowsStep);
    const int64_t splits = choose_splits(out.blocks * out.ranks, steps, multiprocessors);
    out.per_split = ceil_div(steps, splits) * kRowsStep;
    out.splits = ceil_div(args.c, out.per_split);
    out.parts_bytes = out.splits > 1 ? kPartBytes * out.splits * args.m * args.r : 0;
    out.shared_bytes = kPartBytes * kNarrowWarps * 16 * out.row_tiles * 8 * out.rank_tiles;
    return out;
}

NarrowPlan plan(const ColumnsProductArgs& args, int multiprocessors) {
    NarrowPlan out{};
    out.rank_tiles = rank_tiles(args.r);
    out.blocks = ceil_div(args.c, kColumnsBlock);
    out.ranks = ceil_div(args.r, 8 * out.rank_tiles);
    const int64_t steps = ceil_div(args.m, kColumnsRows);
    // A step is 16 KiB of X: parts of fewer than four cost as much as they save.
    const int64_t splits =
        choose_splits(out.blocks * out.ranks, std::max<int64_t>(1, steps / 4), multiprocessors);
    out.per_split = ceil_div(steps, splits) * kColumnsRows;
    out.splits = ceil_div(args.m, out.per_split);
    out.parts_bytes = out.splits > 1 ? kPartBytes * out.splits * args.c * args.r : 0;
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
