// The grouped projection: Ā = A - (A U) C Uᵀ for every adapter of a model in one launch, with
// float32's accuracy. What it works on is described by a table in device memory, which
// nsru_kernels/ops/project/tables.py lays out. No torch, no CUDA header.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"
#include "place.h"

namespace nsru {

struct ProjectArgs {
    // Problems, 11 values each | addresses of adapter rows | of output rows | items.
    const int64_t* table_gmem;
    int64_t table_size;
    int64_t problems, rows, items;
    int* counters_gmem;  // zeros
    int64_t counters_size;
    void* workspace_gmem;  // float32, of a size that the table goes by
    size_t workspace_bytes;
    Dtype adapter, basis;
    bool has_gram_inverse;  // every problem has a C [Q, Q], float32 and contiguous
    // K, Q and the distances of U's rows, in elements, are multiples of 16, all rows are contiguous
    // and start at multiples of 16 bytes. Else right, but slow.
    bool aligned;
};

struct WriteTableArgs {
    const int64_t* values;  // in host memory, not needed after the call
    int64_t size;
    int64_t* table_gmem;
};

// Enqueue; leave the current device as it was. Throw std::invalid_argument naming the argument and
// its value, std::runtime_error naming the CUDA call.
void launch_project(const ProjectArgs& args, const Place& place);

// Copies a table to the device as kernel arguments, which a CUDA graph keeps.
void launch_write_table(const WriteTableArgs& args, const Place& place);

}  // namespace nsru
