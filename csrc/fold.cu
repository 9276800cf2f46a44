#include <algorithm>
#include <string>

#include "fold.h"
#include "host/fold_plan.h"
#include "host/matrix.h"
#include "kernels/fold.cuh"
#include "launch.h"

namespace nsru {
namespace {

using FoldKernel = void (*)(FoldParams);

template <class A>
FoldKernel aligned_kernel_for(Dtype basis) {
    switch (basis) {
        case Dtype::kBf16:
            return fold_kernel<A, Bf16, true>;
        case Dtype::kFp16:
            return fold_kernel<A, Fp16, true>;
        default:
            return fold_kernel<A, Fp32, true>;
    }
}

FoldKernel kernel_for(const FoldArgs& args) {
    if (!args.aligned) return fold_kernel<Fp32, Fp32, false>;
    switch (args.adapter) {
        case Dtype::kBf16:
            return aligned_kernel_for<Bf16>(args.basis);
        case Dtype::kFp16:
            return aligned_kernel_for<Fp16>(args.basis);
        default:
            return aligned_kernel_for<Fp32>(args.basis);
    }
}

}  // namespace

void launch_fold(const FoldArgs& args) {
    refuse_for(refusal(args), "launch_fold");
    const Gpu gpu = gpu_of(args.device);
    check_gpu("launch_fold", gpu, args.device, kFoldShared);
    FoldParams params{};
    params.table_gmem = args.table_gmem;
    params.workspace_gmem = static_cast<float*>(args.workspace_gmem);
    params.counters_gmem = args.counters_gmem;
    params.first_row = static_cast<int>(kFoldFields * args.problems);
    params.first_out = params.first_row + static_cast<int>(args.rows);
    params.first_item = params.first_out + static_cast<int>(args.rows);
    params.items = static_cast<int>(args.items);
    params.adapter = args.adapter, params.basis = args.basis;
    params.has_core = args.has_core;
    const int64_t blocks =
        std::min<int64_t>(args.items, kFoldBlocksPerMultiprocessor * gpu.multiprocessors);
    const DeviceGuard guard(args.device);
    launch({"fold_kernel", {blocks}, kFoldThreads, kFoldShared, args.stream}, kernel_for(args),
           params);
}

void launch_write_table(const WriteTableArgs& args) {
    refuse_for(refusal(args), "launch_write_table");
    const DeviceGuard guard(args.device);
    for (int64_t first = 0; first < args.size; first += kTableValues) {
        WriteTableParams params{};
        params.table_gmem = args.table_gmem + first;
        params.size = static_cast<int>(std::min<int64_t>(args.size - first, kTableValues));
        std::copy_n(args.values + first, params.size, params.values);
        launch({"write_table_kernel", {}, kFoldThreads, 0, args.stream}, write_table_kernel,
               params);
    }
}

}  // namespace nsru
