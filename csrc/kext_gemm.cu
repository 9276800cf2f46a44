#include <stdexcept>
#include <string>

#include "host/kext_plan.h"
#include "kernels/kext_instances.h"
#include "kext_gemm.h"
#include "launch.h"

namespace nsru {
namespace {

const KextEntries* const kEntries[kKextDtypes][kKextLayouts] = {{&kKextBf16Nk, &kKextBf16Kn},
                                                                {&kKextFp16Nk, &kKextFp16Kn}};

// Validated arguments with the config chosen.
struct Call {
    KextGemmArgs args;
    int multiprocessors;
    const KextEntry* entry;
};

Call prepare(const char* function, KextGemmArgs args) {
    if (const std::string reason = refusal(args); !reason.empty()) {
        refuse_for(reason + " (" + describe(args) + ")", function);
    }
    const Gpu gpu = gpu_of(args.device);
    if (gpu.major != 9 || gpu.minor != 0) {  // sm_90a code runs on 9.0 and nowhere else
        throw std::runtime_error(std::string(function) + ": needs compute capability 9.0, device " +
                                 std::to_string(args.device) + " has " + std::to_string(gpu.major) +
                                 "." + std::to_string(gpu.minor));
    }
    if (args.config == kChooseConfig) {
        args.config = choose_config(args.m, args.n, gpu.multiprocessors);
    }
    const KextEntries& entries =
        *kEntries[static_cast<int>(args.dtype)][static_cast<int>(args.layout)];
    return {args, gpu.multiprocessors, &entries[args.config]};
}

}  // namespace

std::vector<KextKernel> kext_kernels() {
    std::vector<KextKernel> kernels;
    for (int dtype = 0; dtype < kKextDtypes; ++dtype) {
        for (int layout = 0; layout < kKextLayouts; ++layout) {
            for (size_t i = 0; i < kConfigs.size(); ++i) {
                const KextEntry& entry = (*kEntries[dtype][layout])[i];
                kernels.push_back({kConfigs[i].name, static_cast<Dtype>(dtype),
                                   static_cast<KextLayout>(layout), entry.stages, entry.threads,
                                   entry.shared_bytes});
            }
        }
    }
    return kernels;
}

size_t kext_gemm_workspace(const KextGemmArgs& args) {
    const Call call = prepare("kext_gemm_workspace", args);
    return call.entry->workspace(call.args, call.multiprocessors);
}

void launch_kext_gemm(const KextGemmArgs& args) {
    const Call call = prepare("launch_kext_gemm", args);
    const size_t needed = call.entry->workspace(call.args, call.multiprocessors);
    check_workspace("launch_kext_gemm", args.workspace_gmem, args.workspace_bytes, needed);
    const DeviceGuard guard(args.device);
    call.entry->launch(call.args, call.multiprocessors);
}

}  // namespace nsru
