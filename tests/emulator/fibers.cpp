#undef _FORTIFY_SOURCE  // which takes a jump to another stack for a mistake

#include "fibers.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace nsru::emulator {
namespace {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 256 * 1024;

struct Meeting {
    unsigned arrived = 0;
    unsigned generation = 0;
};

struct Warp : Meeting {
    void* lanes[kLanes] = {};
};

struct Block {
    Index index;
    std::vector<unsigned char> memory;
    unsigned char* shared = nullptr;
    Meeting meeting;
    unsigned threads = 0;
    std::vector<Warp> warps;
};

struct Copy {
    void* smem;
    const void* gmem;
    bool inside;
};

struct Thread {
    ucontext_t context;  // where it begins
    jmp_buf place;       // where it goes on
    bool begun = false;
    std::unique_ptr<char[]> stack;
    Index index;
    Block* block = nullptr;
    bool ended = false;
    std::deque<std::vector<Copy>> closed;
    std::vector<Copy> open;
};

jmp_buf scheduler;
Thread* current = nullptr;
Index grid;
size_t dynamic_bytes = 0;
const std::function<void()>* kernel_body = nullptr;
std::exception_ptr failure;
uint64_t progress = 0;

// By jumps, as swapcontext asks the system for the signal mask each time.
void yield() {
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

void go_on(Thread& thread) {
    current = &thread;
    if (_setjmp(scheduler)) return;
    if (thread.begun) _longjmp(thread.place, 1);
    thread.begun = true;
    setcontext(&thread.context);
}

void enter() {
    try {
        (*kernel_body)();
    } catch (...) {
        if (!failure) failure = std::current_exception();
    }
    current->ended = true;
    yield();
}

// The last of `expected` to arrive runs `combine`; the others wait for it.
template <class COMBINE>
void meet(Meeting& meeting, unsigned expected, const COMBINE& combine) {
    const unsigned generation = meeting.generation;
    if (++meeting.arrived == expected) {
        combine();
        meeting.arrived = 0;
        ++meeting.generation;
        ++progress;
    } else {
        while (meeting.generation == generation) yield();
    }
}

void perform(const std::vector<Copy>& copies) {
    for (const Copy& copy : copies) {
        if (copy.inside) {
            std::memcpy(copy.smem, copy.gmem, 16);
        } else {
            std::memset(copy.smem, 0, 16);
        }
    }
}

Index index_of(uint64_t linear) {
    return {static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
            static_cast<unsigned>(linear / grid.x / grid.y)};
}

void start(Thread& thread, Block& block, unsigned index) {
    if (!thread.stack) thread.stack = std::make_unique<char[]>(kStackBytes);
    thread.index = {index, 0, 0};
    thread.block = &block;
    thread.begun = thread.ended = false;
    thread.closed.clear();
    thread.open.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
}

// All threads of a block, to their end.
void run_block(Block& block, std::vector<Thread>& threads) {
    block.memory.assign(dynamic_bytes + 128, 0xFF);  // NaN in every float format
    const auto address = reinterpret_cast<uintptr_t>(block.memory.data());
    block.shared = reinterpret_cast<unsigned char*>((address + 127) / 128 * 128);
    block.warps.resize(threads.size() / kLanes);
    for (size_t i = 0; i < threads.size(); ++i) {
        start(threads[i], block, static_cast<unsigned>(i));
    }
    size_t running = threads.size();
    for (bool forward = true; running && !failure; forward = !forward) {
        const uint64_t before = progress;
        // There and back: no kernel may count on threads running in the order of their numbers.
        for (size_t n = 0; n < threads.size() && !failure; ++n) {
            Thread& thread = threads[forward ? n : threads.size() - 1 - n];
            if (thread.ended) continue;
            go_on(thread);
            if (thread.ended) --running, ++progress;
        }
        if (progress == before && !failure) {
            throw std::logic_error("every thread of the emulated block waits for another");
        }
    }
}

}  // namespace

const Index& thread_index() { return current->index; }
const Index& block_index() { return current->block->index; }
unsigned char* shared_memory() { return current->block->shared; }
size_t shared_bytes() { return dynamic_bytes; }

void meet_block() {
    meet(current->block->meeting, current->block->threads, [] {});
}

void meet_warp(void* mine, const std::function<void(void* const*)>& combine) {
    Warp& warp = current->block->warps[current->index.x / kLanes];
    warp.lanes[current->index.x % kLanes] = mine;
    meet(warp, kLanes, [&] { combine(warp.lanes); });
}

void start_copy(void* smem, const void* gmem, bool inside) {
    const auto offset = static_cast<unsigned char*>(smem) - current->block->shared;
    const auto address = reinterpret_cast<uintptr_t>(gmem);
    if (offset < 0 || static_cast<size_t>(offset) + 16 > dynamic_bytes || offset % 16 ||
        (inside && address % 16)) {
        throw std::logic_error("copy_async: byte " + std::to_string(offset) +
                               " of shared memory from address " + std::to_string(address));
    }
    current->open.push_back({smem, gmem, inside});
}

void close_copies() {
    current->closed.push_back(std::move(current->open));
    current->open.clear();
}

void wait_for_copies(int under_way) {
    while (current->closed.size() > static_cast<size_t>(under_way)) {
        perform(current->closed.front());
        current->closed.pop_front();
    }
}

void run(const Index& grid_shape, unsigned threads, size_t bytes,
         const std::function<void()>& body) {
    grid = grid_shape;
    dynamic_bytes = bytes;
    kernel_body = &body;
    failure = nullptr;
    static std::vector<Thread> pool;
    pool.resize(threads);
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    for (uint64_t linear = 0; linear < blocks && !failure; ++linear) {
        Block block;
        block.index = index_of(linear);
        block.threads = threads;
        run_block(block, pool);
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace nsru::emulator
