#include <algorithm>

#include "host/narrow_plan.h"
#include "kernels/choose.h"
#include "kernels/narrow.cuh"
#include "launch.h"
#include "narrow.h"

namespace nsru {
namespace {

using ColumnsKernel = void (*)(ColumnsKernelParams);

template <class T>
ColumnsKernel kernel_for(const NarrowPlan& plan) {
    return with_constant<1, 2, 4>(plan.rank_tiles, [](auto rank_tiles) -> ColumnsKernel {
        return columns_kernel<T, rank_tiles()>;
    });
}

template <class T>
void add_parts(const Sum& first, const Sum& second, void* stream) {
    const int64_t size =
        std::max(first.parts_gmem ? first.size : 0, second.parts_gmem ? second.size : 0);
    if (!size) return;
    const Grid grid{ceil_div(size, kNarrowThreads), second.parts_gmem ? 2 : 1};
    launch({"sum_parts_kernel", grid, kNarrowThreads, 0, stream}, sum_parts_kernel<T>,
           SumParams{first, second});
}

}  // namespace

void launch_columns_product(const ColumnsProductArgs& args, const Place& place) {
    const NarrowPlan plan = plan_launch(args, place.device);
    unsigned char* const parts = workspace(place, plan.parts_bytes + plan.row_parts_bytes);
    const auto parts_at = [&](int64_t offset, int64_t bytes) {
        return bytes ? reinterpret_cast<float*>(parts + offset) : nullptr;
    };
    ColumnsKernelParams params{};
    params.x_gmem = static_cast<const uint16_t*>(args.x_gmem);
    params.p_gmem = static_cast<const uint16_t*>(args.p_gmem);
    params.v_gmem = static_cast<const uint16_t*>(args.v_gmem);
    params.m = static_cast<int>(args.m), params.c = static_cast<int>(args.c);
    params.r = static_cast<int>(args.r);
    params.ldx = args.ldx, params.ldp = args.ldp, params.ldv = args.ldv;
    params.per_split = static_cast<int>(plan.per_split);
    params.d = {parts_at(0, plan.parts_bytes),
                static_cast<uint16_t*>(args.d_gmem),
                args.c * args.r,
                static_cast<int>(plan.splits),
                params.r,
                args.r,
                args.scaling};
    params.rows = {parts_at(plan.parts_bytes, plan.row_parts_bytes),
                   static_cast<uint16_t*>(args.rows_gmem),
                   args.m * args.r,
                   static_cast<int>(plan.blocks),
                   params.r,
                   args.ldrows,
                   args.rows_scaling};

    const DeviceGuard guard(place.device);
    const Grid grid{plan.blocks, plan.splits};
    with_type<Bf16, Fp16>(args.dtype, [&](auto element) {
        using T = decltype(element);
        launch({"columns_kernel", grid, kNarrowThreads, plan.shared_bytes, place.stream},
               kernel_for<T>(plan), params);
        add_parts<T>(params.d, params.rows, place.stream);
    });
}

}  // namespace nsru
