// Launching kernels on a device: what all launchers share. tests/emulator/launch.h is its twin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "host/matrix.h"

namespace nsru {

struct Grid {
    int64_t x = 1, y = 1, z = 1;
};

// How a kernel is launched on the current device.
struct Launch {
    const char* kernel;  // for messages
    Grid grid;
    int threads;
    int shared_bytes;
    void* stream;
};

// What a launcher plans by.
struct Gpu {
    int major;
    int minor;
    int multiprocessors;
    int shared_bytes_per_block;
};

// Throws std::invalid_argument with the reason, where there is one.
inline void refuse_for(const std::string& reason, const char* function) {
    if (!reason.empty()) throw std::invalid_argument(std::string(function) + ": " + reason);
}

// What the kernels of kernels/warp.cuh need. Throws std::runtime_error.
inline void check_gpu(const char* function, const Gpu& gpu, int device, int shared_bytes) {
    if (gpu.major < 8 || shared_bytes > gpu.shared_bytes_per_block) {
        throw std::runtime_error(
            std::string(function) + ": needs compute capability 8.0 and " +
            std::to_string(shared_bytes) + " bytes of shared memory a block, device " +
            std::to_string(device) + " has " + std::to_string(gpu.major) + "." +
            std::to_string(gpu.minor) + " and " + std::to_string(gpu.shared_bytes_per_block));
    }
}

// Throws std::invalid_argument.
inline void check_workspace(const char* function, const void* workspace_gmem, size_t bytes,
                            size_t needed) {
    if (!needed) return;
    std::string reason = address_refusal("workspace", workspace_gmem, kAlignment);
    if (needed > bytes) {
        reason = "workspace_bytes=" + std::to_string(bytes) + " is less than the " +
                 std::to_string(needed) + " needed";
    }
    refuse_for(reason, function);
}

}  // namespace nsru

#ifdef NSRU_EMULATED
#include "emulator/launch.h"
#else
#include "cuda_check.h"

namespace nsru {

inline Gpu gpu_of(int device) {
    return {attribute(cudaDevAttrComputeCapabilityMajor, device),
            attribute(cudaDevAttrComputeCapabilityMinor, device),
            attribute(cudaDevAttrMultiProcessorCount, device),
            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

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

template <class... PARAMS>
void launch(const Launch& how, void (*kernel)(PARAMS...), const PARAMS&... args) {
    constexpr int kWithoutAsking = 48 * 1024;
    if (how.shared_bytes > kWithoutAsking) {
        check("cudaFuncSetAttribute(MaxDynamicSharedMemorySize)",
              cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   how.shared_bytes));
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(how.grid.x), static_cast<unsigned>(how.grid.y),
                          static_cast<unsigned>(how.grid.z));
    config.blockDim = dim3(how.threads);
    config.dynamicSmemBytes = how.shared_bytes;
    config.stream = static_cast<cudaStream_t>(how.stream);
    check(how.kernel, cudaLaunchKernelEx(&config, kernel, args...));
}

inline void zero_async(void* gmem, size_t bytes, void* stream) {
    check("cudaMemsetAsync", cudaMemsetAsync(gmem, 0, bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace nsru
#endif

namespace nsru {

// The plan of a launch, checked against its arguments and its device. Throws std::invalid_argument
// and std::runtime_error.
template <class ARGS>
auto plan_launch(const char* function, const ARGS& args) {
    refuse_for(refusal(args), function);
    const Gpu gpu = gpu_of(args.device);
    const auto out = plan(args, gpu.multiprocessors);
    check_gpu(function, gpu, args.device, out.shared_bytes);
    return out;
}

}  // namespace nsru
