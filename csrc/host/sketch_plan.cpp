#include "sketch_plan.h"

#include <algorithm>

#include "matrix.h"

namespace nsru {
namespace {

// Blocks that hand a tile on in turn: a wait each, so no more than these. Assumed, not measured.
constexpr int64_t kMaxKChunks = 8;
constexpr int64_t kMaxMChunks = 4;

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// What the sizes decide, in types that hold it: what does not fit the kernel's 32 bits is refused.
struct Cut {
    int64_t l_tiles, tile_width;
    int64_t row_blocks, panel_blocks, panels;
    int64_t k_chunk, k_chunks;
    int64_t y_tiles, tiles;
    int64_t m_chunk, m_chunks;
    double items;
};

Cut cut(const SketchUpdateArgs& args, int64_t multiprocessors) {
    Cut out{};
    const int64_t width = round_up(args.l, kAlignedElements);
    out.l_tiles = ceil_div(args.l, kSketchMaxWidth);
    out.tile_width = round_up(ceil_div(args.l, out.l_tiles), kSketchWidthUnit);
    out.row_blocks = ceil_div(args.m, kSketchRows);
    const int64_t fit = args.panel_bytes / (kElementBytes * kSketchRows * args.k);
    out.panel_blocks = std::clamp<int64_t>(fit, 1, out.row_blocks);
    out.panels = ceil_div(out.row_blocks, out.panel_blocks);

    const auto chunks_for = [=](int64_t tiles, int64_t most) {
        return std::clamp<int64_t>(multiprocessors / tiles, 1, most);
    };
    out.k_chunks = chunks_for(out.panel_blocks * out.l_tiles, kMaxKChunks);
    out.k_chunk = round_up(ceil_div(args.k, out.k_chunks), kSketchStepFeatures);
    out.k_chunks = ceil_div(args.k, out.k_chunk);

    out.y_tiles = ceil_div(args.k, kSketchColumns);
    out.tiles = out.y_tiles + ceil_div(width, kSketchColumns);
    const int64_t panel_rows = std::min(out.panel_blocks * kSketchRows, args.m);
    out.m_chunks = chunks_for(out.tiles * out.l_tiles, kMaxMChunks);
    out.m_chunk = round_up(ceil_div(panel_rows, out.m_chunks), kSketchStepRows);
    out.m_chunks = ceil_div(panel_rows, out.m_chunk);

    out.items = static_cast<double>(out.panels * out.l_tiles) *
                static_cast<double>(out.k_chunks * out.panel_blocks + out.m_chunks * out.tiles);
    return out;
}

}  // namespace

SketchPlan plan(const SketchUpdateArgs& args, int multiprocessors) {
    const Cut from = cut(args, multiprocessors);
    SketchPlan out{};
    out.tile_width = static_cast<int>(from.tile_width);
    out.l_tiles = static_cast<int>(from.l_tiles);
    out.width = static_cast<int>(round_up(args.l, kAlignedElements));
    out.planes = args.split ? 2 : 1;
    out.row_blocks = static_cast<int>(from.row_blocks);
    out.panel_blocks = static_cast<int>(from.panel_blocks);
    out.panels = static_cast<int>(from.panels);
    out.k_chunk = static_cast<int>(from.k_chunk);
    out.k_chunks = static_cast<int>(from.k_chunks);
    out.y_tiles = static_cast<int>(from.y_tiles);
    out.tiles = static_cast<int>(from.tiles);
    out.m_chunk = static_cast<int>(from.m_chunk);
    out.m_chunks = static_cast<int>(from.m_chunks);
    out.items = static_cast<int64_t>(from.items);
    // Blocks beyond those that are resident would find no tickets left.
    out.blocks = std::min<int64_t>(
        out.items, int64_t{sketch_blocks_together(out.tile_width)} * multiprocessors);
    out.shared_bytes = sketch_shared_bytes(out.tile_width);

    size_t end = 0;
    const auto take = [&end](int64_t count, size_t bytes) {
        const size_t at = end;
        end += round_up(static_cast<int64_t>(bytes) * count, kAlignment);
        return at;
    };
    const int64_t s_tiles = from.row_blocks * from.l_tiles;
    const int64_t product_tiles = from.tiles * from.l_tiles;
    // The ticket; tiles of S ready in each panel; turns of the tiles of S, and of [Y ; H].
    take(1 + from.panels + s_tiles + product_tiles, sizeof(int));
    out.counters_bytes = end;
    out.energy_at = take(from.row_blocks * from.k_chunks, sizeof(double));
    out.s_at = take(out.planes * args.m * out.width, kElementBytes);
    out.s_sums_at =
        take(from.k_chunks > 1 ? s_tiles * kSketchRows * from.tile_width : 0, sizeof(float));
    const bool summed = from.panels * from.m_chunks > 1;
    out.product_sums_at =
        take(summed ? product_tiles * kSketchColumns * from.tile_width : 0, sizeof(float));
    out.workspace_bytes = end;
    return out;
}

std::string refusal(const SketchUpdateArgs& args) {
    if (args.dtype != Dtype::kBf16 && args.dtype != Dtype::kFp16) {
        return "dtype must be bf16 or fp16";
    }
    std::string reason = size_refusal({{"m", args.m}, {"k", args.k}, {"l", args.l}});
    if (!reason.empty()) return reason;
    if (args.k % kAlignedElements) {
        return value("k", args.k) +
               " must be a multiple of 8: rows of x are read in words of 16 bytes";
    }
    if (args.panel_bytes < 1) return value("panel_bytes", args.panel_bytes) + " must be positive";
    reason =
        first_reason({first_refusal({{"x", args.x_gmem, args.k, "ldx", args.ldx, true},
                                     {"omega", args.omega_gmem, round_up(args.l, kAlignedElements),
                                      "ldomega", args.ldomega, true}}),
                      address_refusal("y", args.y_gmem, sizeof(float)),
                      address_refusal("h", args.h_gmem, sizeof(float)),
                      address_refusal("trace", args.trace_gmem, sizeof(double))});
    if (!reason.empty()) return reason;
    // The cut with the most items: as many chunks as are ever taken.
    if (cut(args, kSizeLimit).items > static_cast<double>(kSizeLimit)) {
        return value("m", args.m) + ", " + value("k", args.k) + ", " + value("l", args.l) +
               " and " + value("panel_bytes", args.panel_bytes) + " make more than " +
               std::to_string(kSizeLimit) + " work items";
    }
    return "";
}

}  // namespace nsru
