#include <stdexcept>
#include <string>

#include "cuda_check.h"
#include "host/kext_plan.h"
#include "kernels/kext_instances.h"
#include "kext_gemm.h"

namespace nsru {
namespace {

const KextEntries* const kEntries[kKextDtypes][kKextLayouts] = {{&kKextBf16Nk, &kKextBf16Kn},
                                                                {&kKextFp16Nk, &kKextFp16Kn}};

// Makes `device` current for the lifetime of the object.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check("cudaGetDevice", cudaGetDevice(&before_));
        if (device != before_) check("cudaSetDevice", cudaSetDevice(device));
        changed_ = device != before_;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

// Validated arguments with the config chosen.
struct Call {
    KextGemmArgs args;
    int multiprocessors;
    const KextEntry* entry;
};

Call prepare(const char* function, KextGemmArgs args) {
    if (const std::string reason = refusal(args); !reason.empty()) {
        throw std::invalid_argument(std::string(function) + ": " + reason + " (" + describe(args) +
                                    ")");
    }
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, args.device);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, args.device);
    if (major != 9 || minor != 0) {  // sm_90a code runs on 9.0 and nowhere else
        throw std::runtime_error(std::string(function) + ": needs compute capability 9.0, device " +
                                 std::to_string(args.device) + " has " + std::to_string(major) +
                                 "." + std::to_string(minor));
    }
    const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, args.device);
    if (args.config == kChooseConfig) args.config = choose_config(args.m, args.n, multiprocessors);
    const KextEntries& entries =
        *kEntries[static_cast<int>(args.dtype)][static_cast<int>(args.layout)];
    return {args, multiprocessors, &entries[args.config]};
}

}  // namespace

std::vector<KextKernel> kext_kernels() {
    std::vector<KextKernel> kernels;
    for (int dtype = 0; dtype < kKextDtypes; ++dtype) {
        for (int layout = 0; layout < kKextLayouts; ++layout) {
            for (size_t i = 0; i < kConfigs.size(); ++i) {
                const KextEntry& entry = (*kEntries[dtype][layout])[i];
                kernels.push_back({kConfigs[i].name, static_cast<KextDtype>(dtype),
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
    if (needed > args.workspace_bytes || (needed && !args.workspace_gmem)) {
        throw std::invalid_argument("launch_kext_gemm: the workspace has " +
                                    std::to_string(args.workspace_bytes) + " bytes, " +
                                    std::to_string(needed) + " are needed");
    }
    const DeviceGuard guard(args.device);
    call.entry->launch(call.args, call.multiprocessors);
}

}  // namespace nsru
