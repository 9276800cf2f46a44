// Tests of csrc/host without CUDA: exits with the number of failed checks.
#include <cstdio>
#include <initializer_list>
#include <string>

#include "../host/kext_plan.h"
#include "../host/narrow_plan.h"

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
    args.out_gmem = reinterpret_cast<void*>(0x3001);  // nothing is asked of how `out` lies
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
        args.ldv = r;
    }
    return args;
}

size_t bytes_of_parts(int64_t parts, int64_t size) {
    return parts > 1 ? static_cast<size_t>(parts * size) * sizeof(float) : 0;
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
    CHECK(nsru::choose_splits(128, 8, 132) == 1);
    CHECK(nsru::choose_splits(66, 8, 132) == 1);
    CHECK(nsru::choose_splits(16, 64, 132) == 17);
    CHECK(nsru::choose_splits(1, 8, 132) == 8);
    CHECK(nsru::choose_splits(1, 1, 132) == 1);
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
    CHECK(refused(columns_args(7, 64, 3, true), ""));
    CHECK(refused(columns_args(7, 64, 40, false), ""));
    CHECK(refused(columns_args(7, 64, 40, true), "r=40 must be at most 32"));
    auto columns = columns_args(7, 64, 3, false);
    columns.ldp = 3;
    CHECK(refused(columns, "ldp=3: rows of p must start at multiples of 16 bytes"));
    columns.v_gmem = address(0x2000);
    CHECK(refused(columns, "v and rows must both be given"));
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
    return failures;
}
