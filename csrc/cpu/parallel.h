// Threads of the OpenMP runtime that PyTorch has loaded; one of our own would compete with it.
#pragma once

#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <exception>

namespace nsru::cpu {

struct Range {
    int64_t first, last;
};

// What a thread does of so many items.
inline Range share(int64_t items, int thread, int threads) {
    return {items * thread / threads, items * (thread + 1) / threads};
}

// body(thread) for every thread below `threads`, in no order, side by side where there are cores.
// Throws what the first of them threw.
template <class BODY>
void parallel(int threads, BODY body) {
    using Start = void (*)(void (*)(void*), void*, unsigned, unsigned);
    static const auto start = reinterpret_cast<Start>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    struct Call {
        BODY& body;
        int threads;
        std::atomic<int> next{0};
        std::atomic_flag failed = ATOMIC_FLAG_INIT;
        std::exception_ptr error = nullptr;
    } call{body, threads};
    const auto work = [](void* argument) {
        auto& call = *static_cast<Call*>(argument);
        // The runtime may start fewer threads than it was asked for.
        for (int thread; (thread = call.next++) < call.threads;) {
            try {
                call.body(thread);
            } catch (...) {  // must not pass through the runtime
                if (!call.failed.test_and_set()) call.error = std::current_exception();
            }
        }
    };
    start(work, &call, threads, 0);
    if (call.error) std::rethrow_exception(call.error);
}

}  // namespace nsru::cpu
