// Tests of csrc/host without CUDA: exits with the number of failed checks.
#include <algorithm>
#include <cstdio>
#include <initializer_list>
#include <string>

#include "../host/fold_plan.h"
#include "../host/kext_plan.h"
#include "../host/narrow_plan.h"
#include "../host/sketch_plan.h"

namespace {

int failures = 0;

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            ++failures;                                                          \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
        }                                                                        \
    } while (0)

const void* address(uintptr_t value) { return reinterpret_cast<const void*>(value); }

// y of a 64x4096 -> 128 linear with rank 16, as forward passes it.
nsru::KextGemmArgs forward_args() {
    nsru::KextGemmArgs args{};
    args.x_gmem = address(0x1000);
    args.w_gmem = address(0x2000);
    args.p_gmem = address(0x3000);
    args.v_gmem = address(0x4000);
    args.out_gmem = reinterpret_cast<void*>(0x5000);
    args.m = 64, args.n = 128, args.k = 4096, args.r = 16;
    args.ldx = args.ldw = 4096;
    args.ldp = args.ldv = 16;
    args.ldo = 128;
    args.layout = nsru::KextLayout::kNK;
    args.config = nsru::kChooseConfig;
    args.swizzle = 1;
    return args;
}

bool refused_for(const nsru::KextGemmArgs& args, const std::string& reason) {
    const std::string got = nsru::refusal(args);
    const bool found = got.find(reason) != std::string::npos;
    if (!found) std::fprintf(stderr, "refusal is '%s', not '%s'\n", got.c_str(), reason.c_str());
    return found;
}

void test_k_tiles_cover_both_sources() {
    for (const int64_t k : {1, 63, 64, 65, 4096, 14336}) {
        for (const int64_t r : {1, 8, 16, 64, 65, 100}) {
            const nsru::KTiles tiles = nsru::split_k(k, r);
            CHECK(tiles.main * nsru::kBlockK >= k && (tiles.main - 1) * nsru::kBlockK < k);
            CHECK(tiles.tail * nsru::kBlockK >= r && (tiles.tail - 1) * nsru::kBlockK < r);
            CHECK(tiles.total() == tiles.main + tiles.tail);
        }
    }
    CHECK(nsru::split_k(4096, 16).total() == 65);
}

void test_every_k_tile_is_loaded_once_from_its_source() {
    const int main_tiles = 5, tail_tiles = 2, total = main_tiles + tail_tiles;
    for (int first = 0; first <= total; ++first) {
        for (int count = 0; count <= total - first; ++count) {
            const int main = nsru::main_share(first, count, main_tiles);
            CHECK(main >= 0 && main <= count);
            CHECK(main == 0 || first + main <= main_tiles);
            CHECK(main == count || first + main >= main_tiles);
        }
    }
}

void test_tiles_come_in_whole_clusters() {
    const nsru::KextConfig config{"", 128, 256};
    CHECK(nsru::tile_count(config, 1, 1) == 2);
    CHECK(nsru::tile_count(config, 256, 256) == 2);
    CHECK(nsru::tile_count(config, 257, 257) == 8);
    CHECK(nsru::tile_count(config, 8191, 4096) == 64 * 16);
}

void test_the_default_config_serves_sizes_that_fill_the_gpu() {
    CHECK(nsru::choose_config(8192, 4096, 132) == 0);
    CHECK(nsru::choose_config(16384, 2048, 132) == 0);
    const int small = nsru::choose_config(512, 1024, 132);
    for (const nsru::KextConfig& config : nsru::kConfigs) {
        CHECK(nsru::tile_count(config, 512, 1024) <=
              nsru::tile_count(nsru::kConfigs[small], 512, 1024));
    }
}

void test_what_fits_is_taken() {
    CHECK(nsru::refusal(forward_args()).empty());
    nsru::KextGemmArgs args = forward_args();
    args.m = 8191, args.k = 4090, args.r = 1;  // odd sizes in padded rows
    args.ldp = args.ldv = 8;
    args.bias_gmem = address(0x6000);
    CHECK(nsru::refusal(args).empty());
    args = forward_args();  // dX: W is [K, N], V is [R, N]
    args.layout = nsru::KextLayout::kKN;
    CHECK(refused_for(args, "ldv=16 is less than the 128 columns of v"));
    args.ldw = args.ldv = 128;
    CHECK(nsru::refusal(args).empty());
}

void test_refusals_name_the_argument_and_its_value() {
    using Args = nsru::KextGemmArgs;
    const struct {
        void (*change)(Args&);
        const char* reason;
    } cases[] = {
        {[](Args& a) { a.m = 0; }, "m=0 must be between 1"},
        {[](Args& a) { a.r = -3; }, "r=-3 must be between 1"},
        {[](Args& a) { a.k = int64_t{1} << 31; }, "k=2147483648 must be between 1"},
        {[](Args& a) { a.n = 124; }, "n=124 must be a multiple of 8"},
        {[](Args& a) { a.ldx = 4095; }, "ldx=4095 is less than the 4096 columns of x"},
        {[](Args& a) { a.ldw = 4100; }, "ldw=4100: rows of w must start at multiples of 16"},
        {[](Args& a) { a.ldp = int64_t{1} << 40; }, "rows of p are too far apart"},
        {[](Args& a) { a.v_gmem = address(0x4008); }, "v must start at a multiple of 16 bytes"},
        {[](Args& a) { a.p_gmem = nullptr; }, "p is a null pointer"},
        {[](Args& a) { a.bias_gmem = address(0x6002); }, "bias must start at"},
        {[](Args& a) { a.config = 99; }, "config=99 must be -1 or below"},
        {[](Args& a) { a.swizzle = 3; }, "swizzle=3 must be 1, 2, 4 or 8"},
        {[](Args& a) { a.dtype = static_cast<nsru::Dtype>(2); }, "dtype=2"},
    };
    for (const auto& [change, reason] : cases) {
        Args args = forward_args();
        change(args);
        CHECK(refused_for(args, reason));
    }
    CHECK(nsru::describe(forward_args()).find("bf16 NK m=64 n=128 k=4096 r=16") == 0);
}

nsru::RowsProductArgs rows_args(int64_t m, int64_t c, int64_t r) {
    nsru::RowsProductArgs args{};
    args.x_gmem = address(0x1000);
    args.v_gmem = address(0x2000);
    args.out_gmem = reinterpret_cast<void*>(0x3002);  // its rows need not start at 16 bytes
    args.m = m, args.c = c, args.r = r;
    args.ldx = args.ldv = c;
    args.ldo = r;
    return args;
}

nsru::ColumnsProductArgs columns_args(int64_t m, int64_t c, int64_t r, bool with_rows) {
    nsru::ColumnsProductArgs args{};
    args.x_gmem = address(0x1000);
    args.p_gmem = address(0x2000);
    args.d_gmem = reinterpret_cast<void*>(0x3002);
    args.m = m, args.c = c, args.r = r;
    args.ldx = c;
    args.ldp = (r + 7) / 8 * 8;
    if (with_rows) {
        args.v_gmem = address(0x4002);
        args.rows_gmem = reinterpret_cast<void*>(0x5002);
        args.ldv = args.ldrows = r;
    }
    return args;
}

int64_t bytes_of_parts(int64_t parts, int64_t size) {
    return parts > 1 ? parts * size * static_cast<int64_t>(sizeof(float)) : 0;
}

void test_narrow_plans_cover_everything_once() {
    for (const int64_t m : {1, 16, 17, 63, 8192}) {
        for (const int64_t c : {8, 512, 520, 4096, 14336}) {
            for (const int64_t r : {1, 8, 9, 16, 64, 65, 200}) {
                const nsru::NarrowPlan rows = nsru::plan(rows_args(m, c, r), 132);
                CHECK(rows.blocks * 16 * rows.row_tiles >= m);
                CHECK((rows.blocks - 1) * 16 * rows.row_tiles < m);
                CHECK(rows.splits * rows.per_split >= c && (rows.splits - 1) * rows.per_split < c);
                CHECK(rows.per_split % nsru::kRowsStep == 0);
                CHECK(rows.parts_bytes == bytes_of_parts(rows.splits, m * r));
                const nsru::NarrowPlan columns = nsru::plan(columns_args(m, c, r, false), 132);
                CHECK(columns.blocks * nsru::kColumnsBlock >= c);
                CHECK(columns.splits * columns.per_split >= m);
                CHECK((columns.splits - 1) * columns.per_split < m);
                CHECK(columns.parts_bytes == bytes_of_parts(columns.splits, c * r));
                CHECK(columns.row_parts_bytes == 0);
                for (const nsru::NarrowPlan& plan : {rows, columns}) {
                    CHECK(plan.ranks * 8 * plan.rank_tiles >= r);
                    CHECK((plan.ranks - 1) * 8 * plan.rank_tiles < r);
                    CHECK(plan.shared_bytes <= 99 * 1024);  // of sm_86 and sm_89
                }
            }
        }
    }
    for (const int64_t r : {1, 16, 32}) {
        const nsru::NarrowPlan plan = nsru::plan(columns_args(8192, 4096, r, true), 132);
        CHECK(plan.row_parts_bytes == bytes_of_parts(4096 / 256, 8192 * r));
        CHECK(plan.shared_bytes <= 99 * 1024);
    }
    CHECK(nsru::plan(columns_args(8192, 256, 16, true), 132).row_parts_bytes == 0);
}

void test_sums_are_split_where_multiprocessors_would_idle() {
    const auto rows = [](int64_t m, int64_t c = 4096) {
        return nsru::plan(rows_args(m, c, 16), 132).splits;
    };
    CHECK(rows(132 * 64) == 1);     // one full wave
    CHECK(rows(132 * 64 + 1) > 1);  // a second wave for one row
    CHECK(rows(66 * 64) == 2);      // half a wave
    CHECK(rows(16) == 8);           // a block for each step
    CHECK(rows(16, 512) == 1);      // there is but one
    const auto columns = [](int64_t m) {
        return nsru::plan(columns_args(m, 4096, 16, false), 132).splits;  // of 16 blocks
    };
    CHECK(columns(8192) == 16);  // 256 blocks, two on nearly every multiprocessor
    CHECK(columns(32) == 1);
    CHECK(columns(1000) > 1);
}

void test_narrow_products_refuse_what_they_cannot_read() {
    const auto refused = [](const auto& args, const std::string& reason) {
        const std::string got = nsru::refusal(args);
        const bool found = reason.empty() ? got.empty() : got.find(reason) != std::string::npos;
        if (!found) std::fprintf(stderr, "'%s', not '%s'\n", got.c_str(), reason.c_str());
        return found;
    };
    CHECK(refused(rows_args(7, 64, 3), ""));
    CHECK(refused(rows_args(7, 60, 3), "c=60 must be a multiple of 8"));
    CHECK(refused(rows_args(0, 64, 3), "m=0 must be between 1 and"));
    auto rows = rows_args(7, 64, 3);
    rows.v_gmem = address(0x2008);
    CHECK(refused(rows, "v must start at a multiple of 16 bytes"));
    rows = rows_args(7, 64, 3);
    rows.dtype = nsru::Dtype::kFp32;
    CHECK(refused(rows, "dtype must be bf16 or fp16"));
    rows = rows_args(7, 64, 3);
    rows.ldo = 2;
    CHECK(refused(rows, "ldo=2 is less than the 3 columns of out"));
    rows = rows_args(7, 64, 3);
    rows.out_gmem = reinterpret_cast<void*>(0x3001);
    CHECK(refused(rows, "out must start at a multiple of 2 bytes"));
    CHECK(refused(columns_args(7, 64, 3, true), ""));
    CHECK(refused(columns_args(7, 64, 40, false), ""));
    CHECK(refused(columns_args(7, 64, 40, true), "r=40 must be at most 32"));
    auto columns = columns_args(7, 64, 3, false);
    columns.ldp = 3;
    CHECK(refused(columns, "ldp=3: rows of p must start at multiples of 16 bytes"));
    columns.v_gmem = address(0x2000);
    CHECK(refused(columns, "v and rows must both be given"));
}

nsru::SketchUpdateArgs sketch_args(int64_t m, int64_t k, int64_t l) {
    nsru::SketchUpdateArgs args{};
    args.x_gmem = address(0x1000);
    args.omega_gmem = address(0x2000);
    args.y_gmem = reinterpret_cast<float*>(0x3004);
    args.h_gmem = reinterpret_cast<float*>(0x4004);
    args.trace_gmem = reinterpret_cast<double*>(0x5008);
    args.m = m, args.k = k, args.l = l;
    args.ldx = k;
    args.ldomega = (l + 7) / 8 * 8;
    args.panel_bytes = 16 << 20;
    return args;
}

void test_sketch_plans_cover_everything_once() {
    for (const int64_t m : {1, 63, 64, 65, 8192, 100000}) {
        for (const int64_t k : {8, 64, 520, 4096, 14336}) {
            for (const int64_t l : {1, 8, 33, 128, 184, 192, 193, 576}) {
                nsru::SketchUpdateArgs args = sketch_args(m, k, l);
                args.split = l % 2;
                const nsru::SketchPlan plan = nsru::plan(args, 132);
                CHECK(plan.tile_width % nsru::kSketchWidthUnit == 0);
                CHECK(plan.tile_width <= nsru::kSketchMaxWidth);
                CHECK(plan.l_tiles * plan.tile_width >= l);
                CHECK((plan.l_tiles - 1) * plan.tile_width < l);
                CHECK(plan.row_blocks * nsru::kSketchRows >= m);
                CHECK((plan.row_blocks - 1) * nsru::kSketchRows < m);
                CHECK(plan.panels * plan.panel_blocks >= plan.row_blocks);
                CHECK((plan.panels - 1) * plan.panel_blocks < plan.row_blocks);
                CHECK(plan.panel_blocks == 1 ||
                      2 * k * nsru::kSketchRows * plan.panel_blocks <= args.panel_bytes);
                CHECK(plan.k_chunk % nsru::kSketchStepFeatures == 0);
                CHECK(plan.k_chunks * plan.k_chunk >= k && (plan.k_chunks - 1) * plan.k_chunk < k);
                const int64_t panel_rows =
                    std::min<int64_t>(m, plan.panel_blocks * nsru::kSketchRows);
                CHECK(plan.m_chunk % nsru::kSketchStepRows == 0);
                CHECK(plan.m_chunks * plan.m_chunk >= panel_rows);
                CHECK((plan.m_chunks - 1) * plan.m_chunk < panel_rows);
                CHECK(plan.y_tiles * nsru::kSketchColumns >= k);
                CHECK((plan.tiles - plan.y_tiles) * nsru::kSketchColumns >= plan.width);
                CHECK(plan.width >= l && plan.width % 8 == 0 && plan.planes == 1 + l % 2);
                CHECK(plan.blocks >= 1 && plan.blocks <= plan.items && plan.blocks <= 264);
                CHECK(plan.shared_bytes <= 99 * 1024);  // of sm_86 and sm_89
                // Arrays of the workspace follow each other, aligned.
                const size_t ends[] = {plan.counters_bytes, plan.energy_at, plan.s_at,
                                       plan.s_sums_at, plan.product_sums_at};
                for (const size_t end : ends) CHECK(end % 16 == 0 && end <= plan.workspace_bytes);
                CHECK(plan.s_at - plan.energy_at >= size_t{8} * plan.row_blocks * plan.k_chunks);
                CHECK(plan.s_sums_at - plan.s_at >= size_t{2} * plan.planes * m * plan.width);
                CHECK((plan.product_sums_at > plan.s_sums_at) == (plan.k_chunks > 1));
                CHECK((plan.workspace_bytes > plan.product_sums_at) ==
                      (plan.panels * plan.m_chunks > 1));
            }
        }
    }
}

void test_a_panel_of_the_sketch_has_work_for_every_multiprocessor() {
    const nsru::SketchPlan plan = nsru::plan(sketch_args(8192, 4096, 128), 132);
    CHECK(plan.panels == 4 && plan.panel_blocks == 32 && plan.l_tiles == 1);
    CHECK(plan.k_chunks * plan.panel_blocks == 128 && plan.m_chunks * plan.tiles == 132);
    CHECK(plan.items == 4 * (128 + 132) && plan.blocks == 264);
    CHECK(nsru::plan(sketch_args(8192, 4096, 184), 132).blocks == 132);
    CHECK(nsru::plan(sketch_args(8192, 4096, 192), 132).l_tiles == 1);
    CHECK(nsru::plan(sketch_args(8192, 4096, 200), 132).tile_width == 128);
    CHECK(nsru::plan(sketch_args(1, 8, 1), 132).blocks == 3);
}

void test_the_sketch_refuses_what_it_cannot_read() {
    using Args = nsru::SketchUpdateArgs;
    CHECK(nsru::refusal(sketch_args(7, 64, 3)).empty());
    CHECK(nsru::refusal(sketch_args(int64_t{1} << 24, 16384, 576)).empty());
    const struct {
        void (*change)(Args&);
        const char* reason;
    } cases[] = {
        {[](Args& a) { a.dtype = nsru::Dtype::kFp32; }, "dtype must be bf16 or fp16"},
        {[](Args& a) { a.m = 0; }, "m=0 must be between 1 and"},
        {[](Args& a) { a.k = 60; }, "k=60 must be a multiple of 8"},
        {[](Args& a) { a.l = -1; }, "l=-1 must be between 1 and"},
        {[](Args& a) { a.panel_bytes = 0; }, "panel_bytes=0 must be positive"},
        {[](Args& a) { a.ldx = 56; }, "ldx=56 is less than the 64 columns of x"},
        {[](Args& a) { a.ldx = 68; }, "ldx=68: rows of x must start at multiples of 16 bytes"},
        {[](Args& a) { a.x_gmem = address(0x1008); }, "x must start at a multiple of 16 bytes"},
        {[](Args& a) { a.ldomega = 3; }, "ldomega=3 is less than the 8 columns of omega"},
        {[](Args& a) { a.omega_gmem = nullptr; }, "omega is a null pointer"},
        {[](Args& a) { a.y_gmem = nullptr; }, "y is a null pointer"},
        {[](Args& a) { a.h_gmem = nullptr; }, "h is a null pointer"},
        {[](Args& a) { a.trace_gmem = nullptr; }, "trace is a null pointer"},
        {[](Args& a) { a.m = a.k = a.l = a.ldx = a.ldomega = int64_t{1} << 30; },
         "m=1073741824, k=1073741824, l=1073741824 and panel_bytes=16777216 make more than"},
    };
    for (const auto& [change, reason] : cases) {
        Args args = sketch_args(7, 64, 3);
        change(args);
        const std::string got = nsru::refusal(args);
        if (got.find(reason) == std::string::npos) {
            ++failures;
            std::fprintf(stderr, "refusal is '%s', not '%s'\n", got.c_str(), reason);
        }
    }
}

// One problem of 3 rows in 2 items.
nsru::FoldArgs fold_args() {
    nsru::FoldArgs args{};
    args.table_gmem = reinterpret_cast<const int64_t*>(0x1008);
    args.table_size = 11 + 2 * 3 + 2;
    args.problems = 1, args.rows = 3, args.items = 2;
    args.counters_gmem = reinterpret_cast<int*>(0x2004);
    args.counters_size = 3;
    args.workspace_gmem = reinterpret_cast<void*>(0x3000);
    args.workspace_bytes = 2 * 3 * 64 * 4;
    return args;
}

void test_fold_blocks_share_a_multiprocessor() {
    constexpr int kReserved = 1024;  // by the system, for each block
    CHECK(3 * (nsru::kFoldShared + kReserved) <= 228 * 1024);
    CHECK(2 * (nsru::kFoldShared + kReserved) <= 164 * 1024);
    for (const int bytes : {2, 4}) {
        CHECK(nsru::fold_stages(bytes) >= 3);
        CHECK(nsru::fold_stages(bytes) * nsru::fold_stage(bytes) <= nsru::kFoldRing);
    }
    CHECK(sizeof(int64_t) * nsru::kTableValues + 16 <= 32764);
}

void test_the_fold_refuses_what_does_not_fit_together() {
    using Args = nsru::FoldArgs;
    CHECK(nsru::refusal(fold_args()).empty());
    const struct {
        void (*change)(Args&);
        const char* reason;
    } cases[] = {
        {[](Args& a) { a.adapter = static_cast<nsru::Dtype>(3); }, "adapter must be bf16, fp16"},
        {[](Args& a) { a.basis = static_cast<nsru::Dtype>(-1); }, "basis must be bf16, fp16"},
        {[](Args& a) { a.problems = 0; }, "problems=0 must be between 1 and"},
        {[](Args& a) { a.rows = int64_t{1} << 31; }, "rows=2147483648 must be between 1 and"},
        {[](Args& a) { a.items = -1; }, "items=-1 must be between 1 and"},
        {[](Args& a) { a.table_size = 20; }, "table_size=20 must be 19: 11 values a problem"},
        {[](Args& a) { a.table_gmem = nullptr; }, "table is a null pointer"},
        {[](Args& a) { a.counters_gmem = nullptr; }, "counters is a null pointer"},
        {[](Args& a) { a.counters_size = 2; }, "counters_size=2 is less than 3"},
        {[](Args& a) { a.workspace_gmem = nullptr; }, "workspace is a null pointer"},
        {[](Args& a) { a.workspace_gmem = reinterpret_cast<void*>(8); }, "workspace must start at"},
        {[](Args& a) { a.workspace_bytes = 1535; }, "workspace_bytes=1535 is less than 1536"},
    };
    for (const auto& [change, reason] : cases) {
        Args args = fold_args();
        change(args);
        CHECK(nsru::refusal(args).find(reason) == 0);
    }
    int64_t value = 0;
    CHECK(nsru::refusal(nsru::WriteTableArgs{&value, 1, &value, 0, nullptr}).empty());
    CHECK(nsru::refusal(nsru::WriteTableArgs{&value, 0, &value, 0, nullptr}).find("size=0") == 0);
    CHECK(nsru::refusal(nsru::WriteTableArgs{nullptr, 1, &value, 0, nullptr}).find("values") == 0);
}

}  // namespace

int main() {
    test_k_tiles_cover_both_sources();
    test_every_k_tile_is_loaded_once_from_its_source();
    test_tiles_come_in_whole_clusters();
    test_the_default_config_serves_sizes_that_fill_the_gpu();
    test_what_fits_is_taken();
    test_refusals_name_the_argument_and_its_value();
    test_narrow_plans_cover_everything_once();
    test_sums_are_split_where_multiprocessors_would_idle();
    test_narrow_products_refuse_what_they_cannot_read();
    test_sketch_plans_cover_everything_once();
    test_a_panel_of_the_sketch_has_work_for_every_multiprocessor();
    test_the_sketch_refuses_what_it_cannot_read();
    test_fold_blocks_share_a_multiprocessor();
    test_the_fold_refuses_what_does_not_fit_together();
    return failures;
}
