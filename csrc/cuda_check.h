// CUDA return codes as exceptions that name the call, the code and its meaning.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace nsru {

inline std::string describe(const char* call, cudaError_t status) {
    return std::string(call) + ": " + cudaGetErrorName(status) + " (" +
           std::to_string(static_cast<int>(status)) + "): " + cudaGetErrorString(status);
}

inline void check(const char* call, cudaError_t status) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // clears the error, so that the next caller does not inherit it
    throw std::runtime_error(describe(call, status));
}

inline int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, name, device));
    return value;
}

}  // namespace nsru
