#include <algorithm>

#include "host/project_plan.h"
#include "kernels/choose.h"
#include "kernels/project.cuh"
#include "launch.h"
#include "project.h"

namespace nsru {
namespace {

using ProjectKernel = void (*)(ProjectParams);

ProjectKernel kernel_for(const ProjectArgs& args) {
    if (!args.aligned) return project_kernel<Fp32, Fp32, false>;
    return with_type<Bf16, Fp16, Fp32>(args.adapter, [&](auto adapter) {
        return with_type<Bf16, Fp16, Fp32>(args.basis, [](auto basis) -> ProjectKernel {
            return project_kernel<decltype(adapter), decltype(basis), true>;
        });
    });
}

}  // namespace

void launch_project(const ProjectArgs& args, const Place& place) {
    const ProjectPlan plan = plan_launch(args, place.device);
    ProjectParams params{};
    params.table_gmem = args.table_gmem;
    params.workspace_gmem = static_cast<float*>(args.workspace_gmem);
    params.counters_gmem = args.counters_gmem;
    params.first_row = static_cast<int>(kProjectFields * args.problems);
    params.first_out = params.first_row + static_cast<int>(args.rows);
    params.first_item = params.first_out + static_cast<int>(args.rows);
    params.items = static_cast<int>(args.items);
    params.adapter = args.adapter, params.basis = args.basis;
    params.has_gram_inverse = args.has_gram_inverse;
    const DeviceGuard guard(place.device);
    launch({"project_kernel", {plan.blocks}, kProjectThreads, plan.shared_bytes, place.stream},
           kernel_for(args), params);
}

void launch_write_table(const WriteTableArgs& args, const Place& place) {
    check_args(args);
    const DeviceGuard guard(place.device);
    for (int64_t first = 0; first < args.size; first += kTableValues) {
        WriteTableParams params{};
        params.table_gmem = args.table_gmem + first;
        params.size = static_cast<int>(std::min<int64_t>(args.size - first, kTableValues));
        std::copy_n(args.values + first, params.size, params.values);
        launch({"write_table_kernel", {}, kProjectThreads, 0, place.stream}, write_table_kernel,
               params);
    }
}

}  // namespace nsru
