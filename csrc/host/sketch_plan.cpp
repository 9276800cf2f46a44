#include "sketch_plan.h"

#include <algorithm>

#include "checks.h"

namespace nsru {
namespace {

// Blocks that hand a tile on in turn: a wait each, so no more than these. Assumed, not measured.
constexpr int64_t kMaxKChunks = 8;
constexpr int64_t kMaxMChunks = 4;

struct Chunks {
    int size, count;
};

// Cuts a sum of `terms` into chunks of whole steps that give every multiprocessor one of the tiles'
// chunks, up to `most`.
Chunks cut_sum(int64_t terms, int step, int64_t tiles, int64_t most, int64_t multiprocessors) {
    const int64_t wanted = std::clamp<int64_t>(multiprocessors / tiles, 1, most);
    const int64_t size = round_up(ceil_div(terms, wanted), step);
    return {static_cast<int>(size), static_cast<int>(ceil_div(terms, size))};
}

int tile_width(const SketchUpdateArgs& args) {
    const int64_t l_tiles = ceil_div(args.l, kSketchMaxWidth);
    return static_cast<int>(round_up(ceil_div(args.l, l_tiles), kSketchWidthUnit));
}

// Sizes that pass check_sizes fit 32 bits here.
SketchTiles cut(const SketchUpdateArgs& args, int64_t multiprocessors) {
    const auto number = [](int64_t n) { return static_cast<int>(n); };
    SketchTiles out{};
    out.m = number(args.m), out.k = number(args.k), out.l = number(args.l);
    out.width = number(round_up(args.l, kAlignedElements));
    out.planes = args.split ? 2 : 1;
    out.l_tiles = number(ceil_div(args.l, kSketchMaxWidth));
    out.row_blocks = number(ceil_div(args.m, kSketchRows));
    const int64_t fit = args.panel_bytes / (kElementBytes * kSketchRows * args.k);
    out.panel_blocks = number(std::clamp<int64_t>(fit, 1, out.row_blocks));
    out.panels = number(ceil_div(out.row_blocks, out.panel_blocks));
    const auto [k_chunk, k_chunks] =
        cut_sum(args.k, kSketchStepFeatures, int64_t{out.panel_blocks} * out.l_tiles, kMaxKChunks,
                multiprocessors);
    out.k_chunk = k_chunk, out.k_chunks = k_chunks;
    out.y_tiles = number(ceil_div(args.k, kSketchColumns));
    out.tiles = out.y_tiles + number(ceil_div(out.width, kSketchColumns));
    const int64_t panel_rows = std::min(int64_t{out.panel_blocks} * kSketchRows, args.m);
    const auto [m_chunk, m_chunks] =
        cut_sum(panel_rows, kSketchStepRows, int64_t{out.tiles} * out.l_tiles, kMaxMChunks,
                multiprocessors);
    out.m_chunk = m_chunk, out.m_chunks = m_chunks;
    return out;
}

// A double, for what must be refused fits no integer.
double item_count(const SketchTiles& tiles) {
    const double s_items = double{1} * tiles.k_chunks * tiles.panel_blocks;
    const double product_items = double{1} * tiles.m_chunks * tiles.tiles;
    return (s_items + product_items) * tiles.panels * tiles.l_tiles;
}

}  // namespace

SketchPlan plan(const SketchUpdateArgs& args, int multiprocessors) {
    SketchPlan out{};
    static_cast<SketchTiles&>(out) = cut(args, multiprocessors);
    out.tile_width = tile_width(args);
    out.items = static_cast<int64_t>(item_count(out));
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
    const int64_t s_tiles = int64_t{out.row_blocks} * out.l_tiles;
    const int64_t product_tiles = int64_t{out.tiles} * out.l_tiles;
    // The ticket; tiles of S ready in each panel; turns of the tiles of S, and of [Y ; H].
    take(1 + out.panels + s_tiles + product_tiles, sizeof(int));
    out.counters_bytes = end;
    out.energy_at = take(int64_t{out.row_blocks} * out.k_chunks, sizeof(double));
    out.s_at = take(out.planes * args.m * out.width, kElementBytes);
    out.s_sums_at =
        take(out.k_chunks > 1 ? s_tiles * kSketchRows * out.tile_width : 0, sizeof(float));
    const bool summed = int64_t{out.panels} * out.m_chunks > 1;
    out.product_sums_at =
        take(summed ? product_tiles * kSketchColumns * out.tile_width : 0, sizeof(float));
    out.workspace_bytes = end;
    return out;
}

void check_args(const SketchUpdateArgs& args) {
    check_short(args.dtype);
    check_sizes({{"m", args.m}, {"k", args.k}, {"l", args.l}});
    check_row_length("k", args.k, "x");
    if (args.panel_bytes < 1) refuse(value("panel_bytes", args.panel_bytes) + " must be positive");
    const int64_t width = round_up(args.l, kAlignedElements);
    check_matrices({{"x", args.x_gmem, args.k, "ldx", args.ldx, true},
                    {"omega", args.omega_gmem, width, "ldomega", args.ldomega, true}});
    check_address("y", args.y_gmem, sizeof(float));
    check_address("h", args.h_gmem, sizeof(float));
    check_address("trace", args.trace_gmem, sizeof(double));
    // The cut with the most items: as many chunks as are ever taken.
    if (item_count(cut(args, kSizeLimit)) > static_cast<double>(kSizeLimit)) {
        refuse(value("m", args.m) + ", " + value("k", args.k) + ", " + value("l", args.l) +
               " and " + value("panel_bytes", args.panel_bytes) + " make more than " +
               std::to_string(kSizeLimit) + " work items");
    }
}

}  // namespace nsru
