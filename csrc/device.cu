#include "cuda_check.h"
#include "device.h"

namespace nsru {
namespace {

// Never launched: asking for its attributes makes the driver pick the image it would run.
__global__ void probe_kernel() {}

}  // namespace

int toolkit_version() { return CUDART_VERSION; }

DeviceReport device_report() {
    DeviceReport report{};
    check("cudaRuntimeGetVersion", cudaRuntimeGetVersion(&report.runtime_version));
    check("cudaDriverGetVersion", cudaDriverGetVersion(&report.driver_version));
    int count = 0;
    if (const cudaError_t status = cudaGetDeviceCount(&count); status != cudaSuccess) {
        cudaGetLastError();
        report.reason = describe("cudaGetDeviceCount", status);
        return report;
    }
    if (count == 0) report.reason = "cudaGetDeviceCount: 0 devices";
    for (int device = 0; device < count; ++device) {
        cudaDeviceProp properties{};
        check("cudaGetDeviceProperties", cudaGetDeviceProperties(&properties, device));
        report.devices.push_back({properties.name, properties.major, properties.minor,
                                  properties.multiProcessorCount,
                                  attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                                  properties.l2CacheSize, properties.totalGlobalMem});
    }
    return report;
}

int kernel_image() {
    cudaFuncAttributes attributes{};
    check("cudaFuncGetAttributes", cudaFuncGetAttributes(&attributes, probe_kernel));
    return attributes.binaryVersion;
}

}  // namespace nsru
