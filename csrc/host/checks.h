// Checks of operands that all launchers share. They throw std::invalid_argument, which names the
// argument and its value. No CUDA.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>

#include "../dtype.h"

namespace nsru {

constexpr int64_t kAlignment = 16;       // bytes, of addresses and of distances between rows
constexpr int64_t kAlignedElements = 8;  // of 16 bits in kAlignment
constexpr int64_t kElementBytes = 2;
// Sizes have 32 bits on the device; tiles may reach beyond the edge.
constexpr int64_t kSizeLimit = std::numeric_limits<int32_t>::max() - 1024;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

[[noreturn]] inline void refuse(const std::string& reason) { throw std::invalid_argument(reason); }

inline std::string value(const char* name, int64_t number) {
    return std::string(name) + "=" + std::to_string(number);
}

inline void check_address(const char* name, const void* gmem, int64_t alignment) {
    const auto address = reinterpret_cast<uintptr_t>(gmem);
    if (address == 0) refuse(std::string(name) + " is a null pointer");
    if (address % alignment) {
        refuse(std::string(name) + " must start at a multiple of " + std::to_string(alignment) +
               " bytes, got address " + std::to_string(address));
    }
}

struct Size {
    const char* name;
    int64_t size;
};

inline void check_sizes(std::initializer_list<Size> sizes) {
    for (const auto& [name, size] : sizes) {
        if (size < 1 || size > kSizeLimit) {
            refuse(value(name, size) + " must be between 1 and " + std::to_string(kSizeLimit));
        }
    }
}

inline void check_short(Dtype dtype) {
    if (dtype != Dtype::kBf16 && dtype != Dtype::kFp16) refuse("dtype must be bf16 or fp16");
}

// Of rows of 16-bit elements, which are read in whole words.
inline void check_row_length(const char* name, int64_t size, const char* matrix) {
    if (size % kAlignedElements) {
        refuse(value(name, size) + " must be a multiple of 8: rows of " + matrix +
               " are read in words of 16 bytes");
    }
}

// Rows of `columns` 16-bit elements, `ld` elements apart.
struct Matrix {
    const char* name;
    const void* gmem;
    int64_t columns;
    const char* ld_name;
    int64_t ld;
    bool aligned;  // must be
};

inline void check_matrices(std::initializer_list<Matrix> matrices) {
    for (const auto& [name, gmem, columns, ld_name, ld, aligned] : matrices) {
        check_address(name, gmem, aligned ? kAlignment : kElementBytes);
        if (ld < columns) {
            refuse(value(ld_name, ld) + " is less than the " + std::to_string(columns) +
                   " columns of " + name);
        }
        if (aligned && ld % kAlignedElements) {
            refuse(value(ld_name, ld) + ": rows of " + name +
                   " must start at multiples of 16 bytes, so it must be a multiple of " +
                   std::to_string(kAlignedElements));
        }
    }
}

}  // namespace nsru
