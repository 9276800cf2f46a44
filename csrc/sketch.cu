#include "host/sketch_plan.h"
#include "kernels/choose.h"
#include "kernels/sketch.cuh"
#include "launch.h"
#include "sketch.h"

namespace nsru {
namespace {

using SketchKernel = void (*)(SketchKernelParams);

SketchKernel kernel_for(Dtype dtype, int tile_width) {
    return with_type<Bf16, Fp16>(dtype, [&](auto element) {
        return with_constant<32, 64, 96, 128, 160, 192>(tile_width, [](auto width) -> SketchKernel {
            return sketch_update_kernel<decltype(element), width()>;
        });
    });
}

}  // namespace

void launch_sketch_update(const SketchUpdateArgs& args, const Place& place) {
    const SketchPlan plan = plan_launch(args, place.device);
    unsigned char* const memory = workspace(place, plan.workspace_bytes);
    SketchKernelParams params{};
    static_cast<SketchTiles&>(params) = plan;
    params.x_gmem = static_cast<const uint16_t*>(args.x_gmem);
    params.omega_gmem = static_cast<const uint16_t*>(args.omega_gmem);
    params.mask_gmem = static_cast<const uint8_t*>(args.mask_gmem);
    params.y_gmem = args.y_gmem;
    params.h_gmem = args.h_gmem;
    params.trace_gmem = args.trace_gmem;
    params.counters_gmem = reinterpret_cast<int*>(memory);
    params.energy_gmem = reinterpret_cast<double*>(memory + plan.energy_at);
    params.s_gmem = reinterpret_cast<uint16_t*>(memory + plan.s_at);
    params.s_sums_gmem = reinterpret_cast<float*>(memory + plan.s_sums_at);
    params.product_sums_gmem = reinterpret_cast<float*>(memory + plan.product_sums_at);
    params.ldx = args.ldx, params.ldomega = args.ldomega;
    params.limit = args.limit;

    const DeviceGuard guard(place.device);
    zero_async(params.counters_gmem, plan.counters_bytes, place.stream);
    launch({"sketch_update_kernel", {plan.blocks}, kSketchThreads, plan.shared_bytes, place.stream},
           kernel_for(args.dtype, plan.tile_width), params);
}

}  // namespace nsru
