// Tests of csrc/host without CUDA: exits with the number of failed checks.
#include <cstdio>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../host/kext_plan.h"
#include "../host/narrow_plan.h"

using namespace nsru;

namespace {

int failures = 0;

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            ++failures;                                                          \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
        }                                                                        \
    } while (0)

void* address(uintptr_t value) { return reinterpret_cast<void*>(value); }

// Whether the reason why the arguments are refused begins with this text; "": whether they are
// taken.
template <class ARGS>
bool refused(const ARGS& args, const std::string& text) {
    std::string got;
    try {
        check_args(args);
    } catch (const std::invalid_argument& error) {
        got = error.what();
    }
    const bool right = text.empty() ? got.empty() : got.find(text) == 0;
    if (!right) std::fprintf(stderr, "refused for '%s', not for '%s'\n", got.c_str(), text.c_str());
    return right;
}

template <class ARGS>
struct Refusal {
    void (*change)(ARGS&);
    const char* reason;
};

// Each change makes arguments that are taken ones that are refused.
template <class ARGS>
void check_refusals(const ARGS& taken, std::initializer_list<Refusal<ARGS>> refusals) {
    CHECK(refused(taken, ""));
    for (const auto& [change, reason] : refusals) {
        ARGS args = taken;
        change(args);
        CHECK(refused(args, reason));
    }
}

// y of a 64x4096 -> 128 linear with rank 16, as forward passes it.
KextGemmArgs forward_args() {
    KextGemmArgs args{};
    args.x_gmem = address(0x1000);
    args.w_gmem = address(0x2000);
    args.p_gmem = address(0x3000);
    args.v_gmem = address(0x4000);
    args.out_gmem = address(0x5000);
    args.m = 64, args.n = 128, args.k = 4096, args.r = 16;
    args.ldx = args.ldw = 4096;
    args.ldp = args.ldv = 16;
    args.ldo = 128;
    args.layout = KextLayout::kNK;
    args.config = kChooseConfig;
    args.swizzle = 1;
    return args;
}

// Whether so many tiles of this size hold `total`, and one less does not.
bool cover(int64_t count, int64_t size, int64_t total) {
    return count * size >= total && (count - 1) * size < total;
}

void test_k_tiles_cover_both_sources() {
    for (const int64_t k : {1, 63, 64, 65, 4096, 14336}) {
        for (const int64_t r : {1, 8, 16, 64, 65, 100}) {
            const KTiles tiles = split_k(k, r);
            CHECK(cover(tiles.main, kBlockK, k));
            CHECK(cover(tiles.tail, kBlockK, r));
            CHECK(tiles.total() == tiles.main + tiles.tail);
        }
    }
    CHECK(split_k(4096, 16).total() == 65);
}

void test_the_last_tile_of_p_is_multiplied_as_far_as_it_holds_columns() {
    for (int64_t r = 1; r <= 3 * kBlockK; ++r) {
        const int64_t in_last = r - (split_k(64, r).tail - 1) * kBlockK;
        CHECK(cover(last_steps(r), kStepK, in_last));
    }
    CHECK(last_steps(16) == 1 && last_steps(64) == 4 && last_steps(65) == 1);
}

void test_every_k_tile_is_loaded_once_from_its_source() {
    const int main_tiles = 5, tail_tiles = 2, total = main_tiles + tail_tiles;
    for (int first = 0; first <= total; ++first) {
        for (int count = 0; count <= total - first; ++count) {
            const int main = main_share(first, count, main_tiles);
            CHECK(main >= 0 && main <= count);
            CHECK(main == 0 || first + main <= main_tiles);
            CHECK(main == count || first + main >= main_tiles);
        }
    }
}

void test_tiles_come_in_whole_clusters() {
    const KextConfig config{"", 128, 256, false};
    CHECK(tile_count(config, 1, 1) == 2);
    CHECK(tile_count(config, 256, 256) == 2);
    CHECK(tile_count(config, 257, 257) == 8);
    CHECK(tile_count(config, 8191, 4096) == 64 * 16);
}

void test_the_default_config_serves_sizes_that_fill_the_gpu() {
    CHECK(choose_config(8192, 4096, 132) == 0);
    CHECK(choose_config(16384, 2048, 132) == 0);
    const int small = choose_config(512, 1024, 132);
    for (const KextConfig& config : kConfigs) {
        CHECK(tile_count(config, 512, 1024) <= tile_count(kConfigs[small], 512, 1024));
    }
}

void test_what_fits_is_taken() {
    KextGemmArgs args = forward_args();
    args.m = 8191, args.k = 4090, args.r = 1;  // odd sizes in padded rows
    args.ldp = args.ldv = 8;
    args.bias_gmem = address(0x6000);
    CHECK(refused(args, ""));
    args = forward_args();  // dX: W is [K, N], V is [R, N]
    args.layout = KextLayout::kKN;
    CHECK(refused(args, "ldv=16 is less than the 128 columns of v"));
    args.ldw = args.ldv = 128;
    CHECK(refused(args, ""));
}

void test_refusals_name_the_argument_and_its_value() {
    using Args = KextGemmArgs;
    check_refusals<Args>(
        forward_args(),
        {
            {[](Args& a) { a.m = 0; }, "m=0 must be between 1"},
            {[](Args& a) { a.r = -3; }, "r=-3 must be between 1"},
            {[](Args& a) { a.k = int64_t{1} << 31; }, "k=2147483648 must be between 1"},
            {[](Args& a) { a.n = 124; }, "n=124 must be a multiple of 8"},
            {[](Args& a) { a.ldx = 4095; }, "ldx=4095 is less than the 4096 columns of x"},
            {[](Args& a) { a.ldw = 4100; }, "ldw=4100: rows of w must start at multiples of 16"},
            {[](Args& a) { a.ldp = int64_t{1} << 40; },
             "ldp=1099511627776: rows of p are too far apart"},
            {[](Args& a) { a.v_gmem = address(0x4008); }, "v must start at a multiple of 16 bytes"},
            {[](Args& a) { a.p_gmem = nullptr; }, "p is a null pointer"},
            {[](Args& a) { a.bias_gmem = address(0x6002); }, "bias must start at"},
            {[](Args& a) { a.config = 99; }, "config=99 must be -1 or below"},
            {[](Args& a) { a.swizzle = 3; }, "swizzle=3 must be 1, 2, 4 or 8"},
            {[](Args& a) { a.dtype = static_cast<Dtype>(2); }, "dtype=2"},
        });
    CHECK(describe(forward_args()).find("bf16 NK m=64 n=128 k=4096 r=16") == 0);
}

ColumnsProductArgs columns_args(int64_t m, int64_t c, int64_t r) {
    ColumnsProductArgs args{};
    args.x_gmem = address(0x1000);
    args.p_gmem = address(0x2000);
    args.d_gmem = address(0x3002);  // the rows of the others need not start at 16 bytes
    args.v_gmem = address(0x4002);
    args.rows_gmem = address(0x5002);
    args.m = m, args.c = c, args.r = r;
    args.ldx = c;
    args.ldp = (r + 7) / 8 * 8;
    args.ldv = args.ldrows = r;
    return args;
}

int64_t bytes_of_parts(int64_t parts, int64_t size) {
    return parts > 1 ? parts * size * static_cast<int64_t>(sizeof(float)) : 0;
}

void test_narrow_plans_cover_everything_once() {
    for (const int64_t m : {1, 16, 17, 63, 8192}) {
        for (const int64_t c : {8, 256, 520, 4096, 14336}) {
            for (const int64_t r : {1, 8, 9, 16, 32}) {
                const NarrowPlan made = plan(columns_args(m, c, r), 132);
                CHECK(cover(made.blocks, kColumnsBlock, c));
                CHECK(cover(made.splits, made.per_split, m));
                CHECK(made.parts_bytes == bytes_of_parts(made.splits, c * r));
                CHECK(made.row_parts_bytes == bytes_of_parts(made.blocks, m * r));
                CHECK(8 * made.rank_tiles >= r);
                CHECK(made.rank_tiles == 1 || 4 * made.rank_tiles < r);
                CHECK(made.shared_bytes <= 99 * 1024);  // of sm_86 and sm_89
            }
        }
    }
}

void test_sums_are_split_where_multiprocessors_would_idle() {
    const auto splits = [](int64_t m) {
        return plan(columns_args(m, 4096, 16), 132).splits;  // of 16 blocks
    };
    CHECK(splits(8192) == 16);  // 256 blocks, two on nearly every multiprocessor
    CHECK(splits(32) == 1);
    CHECK(splits(1000) > 1);
}

void test_narrow_products_refuse_what_they_cannot_read() {
    using Args = ColumnsProductArgs;
    check_refusals<Args>(
        columns_args(7, 64, 3),
        {
            {[](Args& a) { a.c = a.ldx = 60; }, "c=60 must be a multiple of 8"},
            {[](Args& a) { a.m = 0; }, "m=0 must be between 1 and"},
            {[](Args& a) { a.r = a.ldv = a.ldrows = 40; }, "r=40 must be at most 32"},
            {[](Args& a) { a.x_gmem = address(0x1008); }, "x must start at a multiple of 16 bytes"},
            {[](Args& a) { a.dtype = static_cast<Dtype>(2); }, "dtype must be bf16 or fp16"},
            {[](Args& a) { a.ldp = 3; }, "ldp=3: rows of p must start at multiples of 16 bytes"},
            {[](Args& a) { a.ldrows = 2; }, "ldrows=2 is less than the 3 columns of rows"},
            {[](Args& a) { a.rows_gmem = address(0x5001); }, "rows must start at a multiple of 2"},
            {[](Args& a) { a.rows_gmem = nullptr; }, "rows is a null pointer"},
        });
}

}  // namespace

int main() {
    test_k_tiles_cover_both_sources();
    test_the_last_tile_of_p_is_multiplied_as_far_as_it_holds_columns();
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
