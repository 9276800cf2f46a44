// What our own kernels ask of the hardware (sm_80 and newer): 16-bit elements, matrix fragments of
// a warp, asynchronous copies. Up to the last #endif, tests/emulator/warp.h is its twin for a CPU.
//
// Fragments, with g = lane / 4 and t = lane % 4, as the PTX ISA numbers them:
//   16-bit a [16, 16]: rows g, g+8 at columns 2t..2t+1, then both again at columns 2t+8..2t+9
//          b [16, 8]:  column g at rows 2t..2t+1 and 2t+8..2t+9
//   float  d [16, 8]:  row g at columns 2t, 2t+1, then row g+8
#pragma once

#ifdef NSRU_EMULATED
#include "emulator/warp.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace nsru {

// Elements travel as their bits.
struct Bf16 {
    using Bits = uint16_t;
    static __device__ Bits round(float value) {
        return __bfloat16_as_ushort(__float2bfloat16_rn(value));
    }
};

struct Fp16 {
    using Bits = uint16_t;
    static __device__ Bits round(float value) { return __half_as_ushort(__float2half_rn(value)); }
};

// The block's dynamic shared memory.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

__device__ inline uint32_t shared_address(const void* smem) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

// d += a·b by the instruction for these shapes and types.
#define NSRU_MMA(SHAPES_AND_TYPES)                        \
    asm("mma.sync.aligned." SHAPES_AND_TYPES              \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
        "{%0, %1, %2, %3};"                               \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])  \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// d += a·b over 16-bit elements.
template <class T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void mma<Bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    NSRU_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}

template <>
__device__ inline void mma<Fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    NSRU_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}

// Four 8x8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8. Register j gets, of
// matrix j, row g at columns 2t..2t+1.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row_smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row_smem))
                 : "memory");
}

// The same, transposed: column g at rows 2t..2t+1.
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row_smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row_smem))
                 : "memory");
}

// Starts copying 16 aligned bytes to shared memory; zeros, and no read, where not `inside`.
__device__ inline void copy_async(void* smem, const void* gmem, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)),
                 "l"(gmem), "r"(inside ? 16 : 0)
                 : "memory");
}

// Closes the group of copies that this thread has started since the last call.
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the newest UNDER_WAY of this thread's groups are unfinished.
template <int UNDER_WAY>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(UNDER_WAY) : "memory");
}

// ---- Programmatic dependent launch, sm_90 and newer; nothing before.

// The next kernel of the stream may be launched as soon as every block has said so or ended.
__device__ inline void let_dependents_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace nsru
#endif

namespace nsru {

// Element at which a 16-byte word of a tile in shared memory lies. Eight rows of one word, which
// a fragment takes, are in different banks.
template <int WORDS>
__device__ __forceinline__ int place(int row, int word) {
    return 8 * (row * WORDS + (word ^ (WORDS % 8 ? row / 2 % 4 : row % 8)));
}

// A block's walk through STAGES stages of shared memory: multiply(step, stage) for each step, after
// what load(step, stage) started to copy STAGES - 1 steps ahead; `load` is called for the steps in
// their order.
template <int STAGES, class LOAD, class MULTIPLY>
__device__ __forceinline__ void walk(int steps, const LOAD& load, const MULTIPLY& multiply) {
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) load(step, step);
        close_copies();
    }
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();  // the copies of all threads; and the stage to fill next is read no more
        const int ahead = step + STAGES - 1;
        if (ahead < steps) load(ahead, ahead % STAGES);
        close_copies();
        multiply(step, step % STAGES);
    }
}

}  // namespace nsru
