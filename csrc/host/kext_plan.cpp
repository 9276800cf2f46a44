#include "kext_plan.h"

#include <initializer_list>

#include "checks.h"

namespace nsru {

KTiles split_k(int64_t k, int64_t r) { return {ceil_div(k, kBlockK), ceil_div(r, kBlockK)}; }

int64_t tile_count(const KextConfig& config, int64_t m, int64_t n) {
    return ceil_div(m, config.block_m * kClusterM) * kClusterM * ceil_div(n, config.block_n);
}

int choose_config(int64_t m, int64_t n, int multiprocessors) {
    size_t most = 0;
    for (size_t i = 0; i < kConfigs.size(); ++i) {
        if (tile_count(kConfigs[i], m, n) >= multiprocessors) return static_cast<int>(i);
        if (tile_count(kConfigs[i], m, n) > tile_count(kConfigs[most], m, n)) most = i;
    }
    return static_cast<int>(most);
}

void check_args(const KextGemmArgs& args) {
    check_sizes({{"m", args.m}, {"n", args.n}, {"k", args.k}, {"r", args.r}});
    if (split_k(args.k, args.r).total() * kBlockK > kSizeLimit) {
        refuse(value("k", args.k) + " and " + value("r", args.r) + " are too large together");
    }
    const auto dtype = static_cast<int>(args.dtype), layout = static_cast<int>(args.layout);
    if (dtype < 0 || dtype >= kKextDtypes) refuse(value("dtype", dtype) + " must be 0 or 1");
    if (layout < 0 || layout >= kKextLayouts) refuse(value("layout", layout) + " must be 0 or 1");
    const int configs = static_cast<int>(kConfigs.size());
    if (args.config != kChooseConfig && (args.config < 0 || args.config >= configs)) {
        refuse(value("config", args.config) + " must be -1 or below " + std::to_string(configs));
    }
    if (args.swizzle != 1 && args.swizzle != 2 && args.swizzle != 4 && args.swizzle != 8) {
        refuse(value("swizzle", args.swizzle) + " must be 1, 2, 4 or 8");
    }
    const bool nk = args.layout == KextLayout::kNK;
    const std::initializer_list<Matrix> matrices = {
        {"x", args.x_gmem, args.k, "ldx", args.ldx, true},
        {"w", args.w_gmem, nk ? args.k : args.n, "ldw", args.ldw, true},
        {"p", args.p_gmem, args.r, "ldp", args.ldp, true},
        {"v", args.v_gmem, nk ? args.r : args.n, "ldv", args.ldv, true},
        {"out", args.out_gmem, args.n, "ldo", args.ldo, true},
    };
    check_matrices(matrices);
    for (const Matrix& matrix : matrices) {
        // TMA stores the distance of rows in 40 bits.
        if (matrix.ld * kElementBytes >= int64_t{1} << 40) {
            refuse(value(matrix.ld_name, matrix.ld) + ": rows of " + matrix.name +
                   " are too far apart");
        }
    }
    if (args.n % kAlignedElements) {  // the epilogue's vectors are 16 bytes
        refuse(value("n", args.n) + " must be a multiple of 8");
    }
    if (args.bias_gmem) check_address("bias", args.bias_gmem, kAlignment);
}

std::string describe(const KextGemmArgs& args) {
    std::string text = args.dtype == Dtype::kBf16 ? "bf16" : "fp16";
    text += args.layout == KextLayout::kNK ? " NK" : " KN";
    const Size numbers[] = {{"m", args.m},
                            {"n", args.n},
                            {"k", args.k},
                            {"r", args.r},
                            {"ldx", args.ldx},
                            {"ldw", args.ldw},
                            {"ldp", args.ldp},
                            {"ldv", args.ldv},
                            {"ldo", args.ldo},
                            {"config", args.config},
                            {"swizzle", args.swizzle}};
    for (const auto& [name, number] : numbers) text += " " + value(name, number);
    return text;
}

}  // namespace nsru
