#include "project_plan.h"

#include <algorithm>

#include "checks.h"

namespace nsru {
namespace {

constexpr int64_t kTableAlignment = 8;

void check_least(const char* name, int64_t number, int64_t least, const char* why) {
    if (number >= least) return;
    refuse(value(name, number) + " is less than " + std::to_string(least) + ", " + why);
}

void check_dtype(const char* name, Dtype dtype) {
    if (dtype == Dtype::kBf16 || dtype == Dtype::kFp16 || dtype == Dtype::kFp32) return;
    refuse(std::string(name) + " must be bf16, fp16 or fp32");
}

}  // namespace

ProjectPlan plan(const ProjectArgs& args, int multiprocessors) {
    return {std::min<int64_t>(args.items, kProjectBlocksPerMultiprocessor * multiprocessors),
            kProjectShared};
}

void check_args(const ProjectArgs& args) {
    check_dtype("adapter", args.adapter);
    check_dtype("basis", args.basis);
    check_sizes({{"problems", args.problems},
                 {"rows", args.rows},
                 {"items", args.items},
                 {"table_size", args.table_size}});
    check_address("table", args.table_gmem, kTableAlignment);
    check_address("counters", args.counters_gmem, sizeof(int));
    check_address("workspace", args.workspace_gmem, kAlignment);
    const int64_t described = kProjectFields * args.problems + 2 * args.rows + args.items;
    if (args.table_size != described) {
        refuse(value("table_size", args.table_size) + " must be " + std::to_string(described) +
               ": 11 values a problem, two addresses a row, and the items");
    }
    check_least("counters_size", args.counters_size, 1 + 2 * args.problems,
                "the ticket and two for every problem");
    // A part of T and its sum for every row, in one tile at least.
    const int64_t parts = 2 * args.rows * kProjectColumns * static_cast<int64_t>(sizeof(float));
    check_least("workspace_bytes", static_cast<int64_t>(args.workspace_bytes), parts,
                "two tiles for every row");
}

void check_args(const WriteTableArgs& args) {
    check_sizes({{"size", args.size}});
    check_address("values", args.values, kTableAlignment);
    check_address("table", args.table_gmem, kTableAlignment);
}

}  // namespace nsru
