// Launching kernels on a device: what all launchers share. tests/emulator/launch.h is its twin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "host/checks.h"
#include "place.h"

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

// Device memory for the kernels of one launcher; null for 0 bytes.
inline unsigned char* workspace(const Place& place, size_t bytes) {
    if (!bytes) return nullptr;
    void* const gmem = place.allocate(bytes);
    check_address("workspace", gmem, kAlignment);
    return static_cast<unsigned char*>(gmem);
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

}  // namespace nsru
#endif

namespace nsru {

// The plan of a launch, checked against its arguments and its device. Throws std::invalid_argument
// and std::runtime_error.
template <class ARGS>
auto plan_launch(const ARGS& args, int device) {
    check_args(args);
    const Gpu gpu = gpu_of(device);
    const auto out = plan(args, gpu.multiprocessors);
    if (gpu.major < 8 || out.shared_bytes > gpu.shared_bytes_per_block) {
        throw std::runtime_error(
            "needs compute capability 8.0 and " + std::to_string(out.shared_bytes) +
            " bytes of shared memory a block, device " + std::to_string(device) + " has " +
            std::to_string(gpu.major) + "." + std::to_string(gpu.minor) + " and " +
            std::to_string(gpu.shared_bytes_per_block));
    }
    return out;
}

}  // namespace nsru
