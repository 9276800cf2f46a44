// The twin of launch.h on a CPU: kernels run to their end in the call, on any `device` and stream.
#pragma once

#include "fibers.h"

namespace nsru {

// Few multiprocessors, so that small tests split their sums as large problems do on a GPU.
inline Gpu gpu_of(int) { return {9, 0, 6, 227 * 1024}; }

struct DeviceGuard {
    explicit DeviceGuard(int) {}
};

template <class... PARAMS>
void launch(const Launch& how, void (*kernel)(PARAMS...), const PARAMS&... args) {
    emulator::run({static_cast<unsigned>(how.grid.x), static_cast<unsigned>(how.grid.y),
                   static_cast<unsigned>(how.grid.z)},
                  static_cast<unsigned>(how.threads), static_cast<size_t>(how.shared_bytes),
                  [&] { kernel(args...); });
}

}  // namespace nsru
