// The twin of kernels/warp.cuh on a CPU: same functions, same fragments, NVIDIA's arithmetic up to
// the order of additions within a tensor-core product.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "fibers.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (nsru::emulator::thread_index())
#define blockIdx (nsru::emulator::block_index())
#define __syncthreads nsru::emulator::meet_block

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

namespace nsru {

struct Bf16 {
    using Bits = uint16_t;
    static float widen(Bits bits) { return __uint_as_float(uint32_t{bits} << 16); }
    static Bits round(float value) {
        if (std::isnan(value)) return 0x7FFF;
        const uint32_t bits = __float_as_uint(value);
        return static_cast<Bits>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
};

struct Fp16 {
    using Bits = uint16_t;
    static float widen(Bits bits) {
        const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
        const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                           : exponent
                               ? std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25)
                               : std::ldexp(static_cast<float>(mantissa), -24);
        return bits >> 15 ? -size : size;
    }
    static Bits round(float value) {
        const auto sign = static_cast<Bits>(std::signbit(value) ? 0x8000 : 0);
        const float size = std::fabs(value);
        if (std::isnan(value)) return 0x7FFF;
        if (size >= 65520.0f) return sign | 0x7C00;
        if (size < 6.103515625e-5f) {  // subnormal
            return sign | static_cast<Bits>(std::nearbyint(std::ldexp(size, 24)));
        }
        int exponent;
        const float fraction = std::frexp(size, &exponent);  // in [0.5, 1)
        const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(fraction, 11)));
        return sign | static_cast<Bits>(((exponent + 14) << 10) + (mantissa - 1024));
    }
};

inline unsigned char* shared_memory() { return emulator::shared_memory(); }

struct Product {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

// d += a·b; a register of a and b holds two numbers.
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    constexpr int kDepth = 16;
    Product mine{d, a, {b0, b1}};
    emulator::meet_warp(&mine, [](void* const* lanes) {
        const auto element = [](uint32_t word, int i) {
            return T::widen(static_cast<uint16_t>(word >> 16 * i));
        };
        float a_full[16][kDepth], b_full[kDepth][8];
        for (int lane = 0; lane < 32; ++lane) {
            const auto& from = *static_cast<Product*>(lanes[lane]);
            const int g = lane / 4, t = lane % 4;
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < 2; ++i) {
                    const int k = 2 * (4 * half + t) + i;
                    a_full[g][k] = element(from.a[2 * half], i);
                    a_full[g + 8][k] = element(from.a[2 * half + 1], i);
                    b_full[k][g] = element(from.b[half], i);
                }
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            auto& to = *static_cast<Product*>(lanes[lane]);
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                float sum = to.d[i];
                for (int k = 0; k < kDepth; ++k) sum += a_full[row][k] * b_full[k][column];
                to.d[i] = sum;
            }
        }
    });
}

template <bool TRANSPOSED>
void load_four_matrices(uint32_t (&r)[4], const void* row_smem) {
    struct Lane {
        uint32_t* r;
        const uint16_t* row;
    } mine{r, static_cast<const uint16_t*>(row_smem)};
    const auto offset = static_cast<const unsigned char*>(row_smem) - emulator::shared_memory();
    if (offset < 0 || offset % 16 || static_cast<size_t>(offset) + 16 > emulator::shared_bytes()) {
        throw std::logic_error("load_matrices: byte " + std::to_string(offset));
    }
    emulator::meet_warp(&mine, [](void* const* lanes) {
        const auto lane_of = [&](int i) -> Lane& { return *static_cast<Lane*>(lanes[i]); };
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int matrix = 0; matrix < 4; ++matrix) {
                uint32_t word = 0;
                for (int i = 0; i < 2; ++i) {
                    const int row = TRANSPOSED ? 2 * t + i : g, column = TRANSPOSED ? g : 2 * t + i;
                    word |= uint32_t{lane_of(8 * matrix + row).row[column]} << 16 * i;
                }
                lane_of(lane).r[matrix] = word;
            }
        }
    });
}

inline void load_matrices(uint32_t (&r)[4], const void* row_smem) {
    load_four_matrices<false>(r, row_smem);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row_smem) {
    load_four_matrices<true>(r, row_smem);
}

inline void copy_async(void* smem, const void* gmem, bool inside) {
    emulator::start_copy(smem, gmem, inside);
}
inline void close_copies() { emulator::close_copies(); }
template <int UNDER_WAY>
void wait_for_copies() {
    emulator::wait_for_copies(UNDER_WAY);
}

inline void let_dependents_launch() {}

}  // namespace nsru
