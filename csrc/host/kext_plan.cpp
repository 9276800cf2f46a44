#include "kext_plan.h"

#include <limits>

namespace nsru {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string value(const char* name, int64_t number) {
    return std::string(name) + "=" + std::to_string(number);
}

// A matrix as TMA sees it: rows of `columns` contiguous elements, `ld` elements apart.
struct Matrix {
    const char* name;
    const void* gmem;
    int64_t rows;
    int64_t columns;
    const char* ld_name;
    int64_t ld;
};

std::string refusal(const Matrix& matrix) {
    // The format stores the distance of rows in 40 bits.
    constexpr int64_t kStrideLimit = int64_t{1} << 40;
    const auto address = reinterpret_cast<uintptr_t>(matrix.gmem);
    const std::string name = matrix.name;
    if (address == 0) return name + " is a null pointer";
    if (address % kTmaAlignment) {
        return name + " must start at a multiple of 16 bytes, got address " +
               std::to_string(address);
    }
    if (matrix.ld < matrix.columns) {
        return value(matrix.ld_name, matrix.ld) + " is less than the " +
               std::to_string(matrix.columns) + " columns of " + name;
    }
    if (matrix.ld * kElementBytes % kTmaAlignment) {
        return value(matrix.ld_name, matrix.ld) + ": rows of " + name +
               " must start at multiples of 16 bytes, so it must be a multiple of " +
               std::to_string(kTmaAlignment / kElementBytes);
    }
    if (matrix.ld * kElementBytes >= kStrideLimit) {
        return value(matrix.ld_name, matrix.ld) + ": rows of " + name + " are too far apart";
    }
    return "";
}

}  // namespace

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

std::string refusal(const KextGemmArgs& args) {
    // Coordinates of TMA and CUTLASS's sizes have 32 bits; tiles may reach beyond the edge.
    constexpr int64_t kSizeLimit = std::numeric_limits<int32_t>::max() - 1024;
    const struct {
        const char* name;
        int64_t size;
    } sizes[] = {{"m", args.m}, {"n", args.n}, {"k", args.k}, {"r", args.r}};
    for (const auto& [name, size] : sizes) {
        if (size < 1 || size > kSizeLimit) {
            return value(name, size) + " must be between 1 and " + std::to_string(kSizeLimit);
        }
    }
    if (split_k(args.k, args.r).total() * kBlockK > kSizeLimit) {
        return value("k", args.k) + " and " + value("r", args.r) + " are too large together";
    }
    const auto dtype = static_cast<int>(args.dtype), layout = static_cast<int>(args.layout);
    if (dtype < 0 || dtype >= kKextDtypes) return value("dtype", dtype) + " must be 0 or 1";
    if (layout < 0 || layout >= kKextLayouts) return value("layout", layout) + " must be 0 or 1";
    const int configs = static_cast<int>(kConfigs.size());
    if (args.config != kChooseConfig && (args.config < 0 || args.config >= configs)) {
        return value("config", args.config) + " must be -1 or below " + std::to_string(configs);
    }
    if (args.swizzle != 1 && args.swizzle != 2 && args.swizzle != 4 && args.swizzle != 8) {
        return value("swizzle", args.swizzle) + " must be 1, 2, 4 or 8";
    }
    const bool nk = args.layout == KextLayout::kNK;
    const Matrix matrices[] = {
        {"x", args.x_gmem, args.m, args.k, "ldx", args.ldx},
        {"w", args.w_gmem, nk ? args.n : args.k, nk ? args.k : args.n, "ldw", args.ldw},
        {"p", args.p_gmem, args.m, args.r, "ldp", args.ldp},
        {"v", args.v_gmem, nk ? args.n : args.r, nk ? args.r : args.n, "ldv", args.ldv},
        {"out", args.out_gmem, args.m, args.n, "ldo", args.ldo},
    };
    for (const Matrix& matrix : matrices) {
        if (const std::string reason = refusal(matrix); !reason.empty()) return reason;
    }
    if (args.n * kElementBytes % kTmaAlignment) {  // the epilogue's vectors are 16 bytes
        return value("n", args.n) + " must be a multiple of 8";
    }
    if (reinterpret_cast<uintptr_t>(args.bias_gmem) % kTmaAlignment) {
        return "bias must start at a multiple of 16 bytes";
    }
    return "";
}

std::string describe(const KextGemmArgs& args) {
    const std::string names[] = {args.dtype == KextDtype::kBf16 ? "bf16" : "fp16",
                                 args.layout == KextLayout::kNK ? "NK" : "KN"};
    std::string text = names[0] + " " + names[1];
    const struct {
        const char* name;
        int64_t number;
    } numbers[] = {{"m", args.m},
                   {"n", args.n},
                   {"k", args.k},
                   {"r", args.r},
                   {"ldx", args.ldx},
                   {"ldw", args.ldw},
                   {"ldp", args.ldp},
                   {"ldv", args.ldv},
                   {"ldo", args.ldo},
                   {"config", args.config},
                   {"swizzle", args.swizzle},
                   {"device", args.device}};
    for (const auto& [name, number] : numbers) text += " " + value(name, number);
    return text;
}

}  // namespace nsru
