#include <algorithm>
#include <string>

#include "host/matrix.h"
#include "host/narrow_plan.h"
#include "kernels/narrow.cuh"
#include "launch.h"
#include "narrow.h"

namespace nsru {
namespace {

using RowsKernel = void (*)(RowsKernelParams);
using ColumnsKernel = void (*)(ColumnsKernelParams);

template <class T>
RowsKernel rows_kernel_for(const NarrowPlan& plan) {
    const bool few = plan.row_tiles == 1;
    switch (plan.rank_tiles) {
        case 1:
            return few ? rows_kernel<T, 1, 1> : rows_kernel<T, 4, 1>;
        case 2:
            return few ? rows_kernel<T, 1, 2> : rows_kernel<T, 4, 2>;
        case 4:
            return few ? rows_kernel<T, 1, 4> : rows_kernel<T, 4, 4>;
        default:
            return few ? rows_kernel<T, 1, 8> : rows_kernel<T, 2, 8>;
    }
}

template <class T>
ColumnsKernel columns_kernel_for(const NarrowPlan& plan, bool with_rows) {
    switch (plan.rank_tiles) {
        case 1:
            return with_rows ? columns_kernel<T, 1, true> : columns_kernel<T, 1, false>;
        case 2:
            return with_rows ? columns_kernel<T, 2, true> : columns_kernel<T, 2, false>;
        case 4:
            return with_rows ? columns_kernel<T, 4, true> : columns_kernel<T, 4, false>;
        default:
            return columns_kernel<T, 8, false>;
    }
}

template <class T>
void add_parts(const Sum& first, const Sum& second, void* stream) {
    const int64_t size =
        std::max(first.parts_gmem ? first.size : 0, second.parts_gmem ? second.size : 0);
    if (!size) return;
    launch({"sum_parts_kernel",
            {ceil_div(size, kNarrowThreads), second.parts_gmem ? 2 : 1},
            kNarrowThreads,
            0,
            stream},
           sum_parts_kernel<T>, SumParams{first, second});
}

template <class T>
void launch_rows(const RowsProductArgs& args, const NarrowPlan& plan) {
    RowsKernelParams params{};
    params.x_gmem = static_cast<const uint16_t*>(args.x_gmem);
    params.v_gmem = static_cast<const uint16_t*>(args.v_gmem);
    params.out_gmem = static_cast<uint16_t*>(args.out_gmem);
    params.parts_gmem = plan.parts_bytes ? static_cast<float*>(args.workspace_gmem) : nullptr;
    params.m = static_cast<int>(args.m), params.c = static_cast<int>(args.c);
    params.r = static_cast<int>(args.r);
    params.ldx = args.ldx, params.ldv = args.ldv, params.ldo = args.ldo;
    params.scaling = args.scaling;
    params.per_split = static_cast<int>(plan.per_split);
    launch({"rows_kernel",
            {plan.blocks, plan.ranks, plan.splits},
            kNarrowThreads,
            plan.shared_bytes,
            args.stream},
           rows_kernel_for<T>(plan), params);
    add_parts<T>({params.parts_gmem, params.out_gmem, args.m * args.r,
                  static_cast<int>(plan.splits), params.r, args.ldo, args.scaling},
                 Sum{}, args.stream);
}

template <class T>
void launch_columns(const ColumnsProductArgs& args, const NarrowPlan& plan) {
    auto* const workspace = static_cast<unsigned char*>(args.workspace_gmem);
    ColumnsKernelParams params{};
    params.x_gmem = static_cast<const uint16_t*>(args.x_gmem);
    params.p_gmem = static_cast<const uint16_t*>(args.p_gmem);
    params.d_gmem = static_cast<uint16_t*>(args.d_gmem);
    params.v_gmem = static_cast<const uint16_t*>(args.v_gmem);
    params.rows_gmem = static_cast<uint16_t*>(args.rows_gmem);
    if (plan.parts_bytes) params.d_parts_gmem = reinterpret_cast<float*>(workspace);
    if (plan.row_parts_bytes) {
        params.row_parts_gmem = reinterpret_cast<float*>(workspace + plan.parts_bytes);
    }
    params.m = static_cast<int>(args.m), params.c = static_cast<int>(args.c);
    params.r = static_cast<int>(args.r);
    params.ldx = args.ldx, params.ldp = args.ldp, params.ldv = args.ldv;
    params.ldrows = args.ldrows;
    params.stride_dc = args.rank_first ? 1 : args.r;
    params.stride_dr = args.rank_first ? args.c : 1;
    params.scaling = args.scaling, params.rows_scaling = args.rows_scaling;
    params.per_split = static_cast<int>(plan.per_split);
    launch({"columns_kernel",
            {plan.blocks, plan.ranks, plan.splits},
            kNarrowThreads,
            plan.shared_bytes,
            args.stream},
           columns_kernel_for<T>(plan, args.v_gmem != nullptr), params);
    const int row_length = static_cast<int>(args.rank_first ? args.c : args.r);
    add_parts<T>({params.d_parts_gmem, params.d_gmem, args.c * args.r,
                  static_cast<int>(plan.splits), row_length, row_length, args.scaling},
                 {params.row_parts_gmem, params.rows_gmem, args.m * args.r,
                  static_cast<int>(plan.blocks), params.r, args.ldrows, args.rows_scaling},
                 args.stream);
}

}  // namespace

size_t rows_product_workspace(const RowsProductArgs& args) {
    return static_cast<size_t>(plan_launch("rows_product_workspace", args).parts_bytes);
}

size_t columns_product_workspace(const ColumnsProductArgs& args) {
    const NarrowPlan plan = plan_launch("columns_product_workspace", args);
    return static_cast<size_t>(plan.parts_bytes + plan.row_parts_bytes);
}

void launch_rows_product(const RowsProductArgs& args) {
    const NarrowPlan plan = plan_launch("launch_rows_product", args);
    check_workspace("launch_rows_product", args.workspace_gmem, args.workspace_bytes,
                    plan.parts_bytes);
    const DeviceGuard guard(args.device);
    (args.dtype == Dtype::kBf16 ? launch_rows<Bf16> : launch_rows<Fp16>)(args, plan);
}

void launch_columns_product(const ColumnsProductArgs& args) {
    const NarrowPlan plan = plan_launch("launch_columns_product", args);
    check_workspace("launch_columns_product", args.workspace_gmem, args.workspace_bytes,
                    plan.parts_bytes + plan.row_parts_bytes);
    const DeviceGuard guard(args.device);
    (args.dtype == Dtype::kBf16 ? launch_columns<Bf16> : launch_columns<Fp16>)(args, plan);
}

}  // namespace nsru
