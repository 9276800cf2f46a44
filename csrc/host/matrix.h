// Checks of operands that all launchers share. No CUDA.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>

namespace nsru {

constexpr int64_t kAlignment = 16;       // bytes, of addresses and of distances between rows
constexpr int64_t kAlignedElements = 8;  // of 16 bits in kAlignment
constexpr int64_t kElementBytes = 2;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline std::string value(const char* name, int64_t number) {
    return std::string(name) + "=" + std::to_string(number);
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

// The first that is not empty.
inline std::string first_reason(std::initializer_list<std::string> reasons) {
    for (const std::string& reason : reasons) {
        if (!reason.empty()) return reason;
    }
    return "";
}

// Why an operand cannot lie at this address; "" where it can.
inline std::string address_refusal(const char* name, const void* gmem, int64_t alignment) {
    const auto address = reinterpret_cast<uintptr_t>(gmem);
    if (address == 0) return std::string(name) + " is a null pointer";
    if (address % alignment == 0) return "";
    return std::string(name) + " must start at a multiple of " + std::to_string(alignment) +
           " bytes, got address " + std::to_string(address);
}

// Why a kernel cannot read a matrix; "" where it can.
inline std::string refusal(const Matrix& matrix) {
    const std::string name = matrix.name;
    if (auto reason =
            address_refusal(matrix.name, matrix.gmem, matrix.aligned ? kAlignment : kElementBytes);
        !reason.empty()) {
        return reason;
    }
    if (matrix.ld < matrix.columns) {
        return value(matrix.ld_name, matrix.ld) + " is less than the " +
               std::to_string(matrix.columns) + " columns of " + name;
    }
    if (matrix.aligned && matrix.ld % kAlignedElements) {
        return value(matrix.ld_name, matrix.ld) + ": rows of " + name +
               " must start at multiples of 16 bytes, so it must be a multiple of " +
               std::to_string(kAlignedElements);
    }
    return "";
}

inline std::string first_refusal(std::initializer_list<Matrix> matrices) {
    for (const Matrix& matrix : matrices) {
        if (std::string reason = refusal(matrix); !reason.empty()) return reason;
    }
    return "";
}

struct Size {
    const char* name;
    int64_t size;
};

// Sizes have 32 bits on the device; tiles may reach beyond the edge.
constexpr int64_t kSizeLimit = std::numeric_limits<int32_t>::max() - 1024;

inline std::string size_refusal(std::initializer_list<Size> sizes) {
    for (const auto& [name, size] : sizes) {
        if (size < 1 || size > kSizeLimit) {
            return value(name, size) + " must be between 1 and " + std::to_string(kSizeLimit);
        }
    }
    return "";
}

}  // namespace nsru
