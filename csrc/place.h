// Where a launcher enqueues its kernels, and where their memory comes from. No CUDA header.
#pragma once

#include <cstddef>
#include <functional>

namespace nsru {

struct Place {
    int device;    // of all pointers that the launcher gets
    void* stream;  // cudaStream_t
    // Memory of the device that nothing else uses before the kernels enqueued by the launcher have
    // ended.
    std::function<void*(size_t bytes)> allocate;
};

}  // namespace nsru
