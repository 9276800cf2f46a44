// Runs a kernel's threads as fibers of one CPU thread: block by block, switching wherever a thread
// waits. For tests only; see csrc/README.md.
#pragma once

#include <cstdint>
#include <functional>

namespace nsru::emulator {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

// Of the thread that runs.
const Index& thread_index();
const Index& block_index();
unsigned char* shared_memory();
size_t shared_bytes();

// __syncthreads().
void meet_block();

// All 32 lanes of a warp meet; the last to come calls combine(lanes), lanes[i] being what lane i
// handed in.
void meet_warp(void* mine, const std::function<void(void* const* lanes)>& combine);

// Copies started by this thread become visible in shared memory when it waits for them, not before.
void start_copy(void* smem, const void* gmem, bool inside);
void close_copies();
void wait_for_copies(int under_way);

// Calls body() in every thread of the grid. Shared memory starts as NaN. Throws what body() throws,
// and std::logic_error where all threads of a block wait for each other.
void run(const Index& grid, unsigned threads, size_t shared_bytes,
         const std::function<void()>& body);

}  // namespace nsru::emulator
