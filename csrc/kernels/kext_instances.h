// The compiled kernels of the K-extended GEMM, one table for each dtype and layout.
#pragma once

#include <array>

#include "../host/kext_plan.h"

namespace nsru {

struct KextEntry {
    int stages;
    int threads;
    int shared_bytes;
    void (*launch)(const KextGemmArgs& args, const Place& place, int multiprocessors);
};

// In the order of kConfigs.
using KextEntries = std::array<KextEntry, kConfigs.size()>;

extern const KextEntries kKextBf16Nk;
extern const KextEntries kKextBf16Kn;
extern const KextEntries kKextFp16Nk;
extern const KextEntries kKextFp16Kn;

}  // namespace nsru
