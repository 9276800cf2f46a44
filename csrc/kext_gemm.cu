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

void launch_kext_gemm(const KextGemmArgs& args, const Place& place) {
    try {
        check_args(args);
    } catch (const std::invalid_argument& error) {
        refuse(error.what() + (" (" + describe(args) + ")"));
    }
    const Gpu gpu = gpu_of(place.device);
    if (gpu.major != 9 || gpu.minor != 0) {  // sm_90a code runs on 9.0 and nowhere else
        throw std::runtime_error("needs compute capability 9.0, device " +
                                 std::to_string(place.device) + " has " +
                                 std::to_string(gpu.major) + "." + std::to_string(gpu.minor));
    }
    const int config = args.config == kChooseConfig
                           ? choose_config(args.m, args.n, gpu.multiprocessors)
                           : args.config;
    const KextEntries& entries =
        *kEntries[static_cast<int>(args.dtype)][static_cast<int>(args.layout)];
    const DeviceGuard guard(place.device);
    entries[config].launch(args, place, gpu.multiprocessors);
}

}  // namespace nsru
