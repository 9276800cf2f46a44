#include <stdexcept>
#include <string>

#include "host/matrix.h"
#include "host/sketch_plan.h"
#include "kernels/sketch.cuh"
#include "launch.h"
#include "sketch.h"

namespace nsru {
namespace {

using SketchKernel = void (*)(SketchKernelParams);

template <class T>
SketchKernel kernel_for(int tile_width) {
    switch (tile_width) {
        case 32:
            return sketch_update_kernel<T, 32>;
        case 64:
            return sketch_update_kernel<T, 64>;
        case 96:
            return sketch_update_kernel<T, 96>;
        case 128:
            return sketch_update_kernel<T, 128>;
        case 160:
            return sketch_update_kernel<T, 160>;
        default:
            return sketch_update_kernel<T, 192>;
    }
}

}  // namespace

size_t sketch_update_workspace(const SketchUpdateArgs& args) {
    return plan_launch("sketch_update_workspace", args).workspace_bytes;
}

void launch_sketch_update(const SketchUpdateArgs& args) {
    const SketchPlan plan = plan_launch("launch_sketch_update", args);
    check_workspace("launch_sketch_update", args.workspace_gmem, args.workspace_bytes,
                    plan.workspace_bytes);
    auto* const workspace = static_cast<unsigned char*>(args.workspace_gmem);
    SketchKernelParams params{};
    params.x_gmem = static_cast<const uint16_t*>(args.x_gmem);
    params.omega_gmem = static_cast<const uint16_t*>(args.omega_gmem);
    params.mask_gmem = static_cast<const uint8_t*>(args.mask_gmem);
    params.y_gmem = args.y_gmem;
    params.h_gmem = args.h_gmem;
    params.trace_gmem = args.trace_gmem;
    params.counters_gmem = reinterpret_cast<int*>(workspace);
    params.energy_gmem = reinterpret_cast<double*>(workspace + plan.energy_at);
    params.s_gmem = reinterpret_cast<uint16_t*>(workspace + plan.s_at);
    params.s_sums_gmem = reinterpret_cast<float*>(workspace + plan.s_sums_at);
    params.product_sums_gmem = reinterpret_cast<float*>(workspace + plan.product_sums_at);
    params.ldx = args.ldx, params.ldomega = args.ldomega;
    params.limit = args.limit;
    params.m = static_cast<int>(args.m), params.k = static_cast<int>(args.k);
    params.l = static_cast<int>(args.l), params.width = plan.width;
    params.planes = plan.planes, params.l_tiles = plan.l_tiles;
    params.row_blocks = plan.row_blocks;
    params.panel_blocks = plan.panel_blocks, params.panels = plan.panels;
    params.k_chunk = plan.k_chunk, params.k_chunks = plan.k_chunks;
    params.y_tiles = plan.y_tiles, params.tiles = plan.tiles;
    params.m_chunk = plan.m_chunk, params.m_chunks = plan.m_chunks;

    const DeviceGuard guard(args.device);
    zero_async(params.counters_gmem, plan.counters_bytes, args.stream);
    launch({"sketch_update_kernel", {plan.blocks}, kSketchThreads, plan.shared_bytes, args.stream},
           (args.dtype == Dtype::kBf16 ? kernel_for<Bf16> : kernel_for<Fp16>)(plan.tile_width),
           params);
}

}  // namespace nsru
