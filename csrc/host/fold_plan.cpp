#include "fold_plan.h"

#include "matrix.h"

namespace nsru {
namespace {

constexpr int64_t kTableAlignment = 8;

std::string least_refusal(const char* name, int64_t number, int64_t least, const char* why) {
    if (number >= least) return "";
    return value(name, number) + " is less than " + std::to_string(least) + ", " + why;
}

std::string dtype_refusal(const char* name, Dtype dtype) {
    if (dtype == Dtype::kBf16 || dtype == Dtype::kFp16 || dtype == Dtype::kFp32) return "";
    return std::string(name) + " must be bf16, fp16 or fp32";
}

}  // namespace

std::string refusal(const FoldArgs& args) {
    const std::string reason = first_reason({
        dtype_refusal("adapter", args.adapter),
        dtype_refusal("basis", args.basis),
        size_refusal({{"problems", args.problems},
                      {"rows", args.rows},
                      {"items", args.items},
                      {"table_size", args.table_size}}),
        address_refusal("table", args.table_gmem, kTableAlignment),
        address_refusal("counters", args.counters_gmem, sizeof(int)),
        address_refusal("workspace", args.workspace_gmem, kAlignment),
    });
    if (!reason.empty()) return reason;
    const int64_t described = kFoldFields * args.problems + 2 * args.rows + args.items;
    if (args.table_size != described) {
        return value("table_size", args.table_size) + " must be " + std::to_string(described) +
               ": 11 values a problem, two addresses a row, and the items";
    }
    // A part of T and its sum for every row, in one tile at least.
    const int64_t parts = 2 * args.rows * kFoldColumns * static_cast<int64_t>(sizeof(float));
    return first_reason({
        least_refusal("counters_size", args.counters_size, 1 + 2 * args.problems,
                      "the ticket and two for every problem"),
        least_refusal("workspace_bytes", static_cast<int64_t>(args.workspace_bytes), parts,
                      "two tiles for every row"),
    });
}

std::string refusal(const WriteTableArgs& args) {
    return first_reason({
        size_refusal({{"size", args.size}}),
        address_refusal("values", args.values, kTableAlignment),
        address_refusal("table", args.table_gmem, kTableAlignment),
    });
}

}  // namespace nsru
