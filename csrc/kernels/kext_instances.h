// The compiled kernels of the K-extended GEMM, one table row for each dtype and layout.
#pragma once

#include <array>

#include "../host/kext_plan.h"
#include "../kext_gemm.h"

namespace nsru {

struct KextEntry {
    int stages;
    int threads;
    int shared_bytes;
    size_t (*workspace)(const KextGemmArgs& args, int multiprocessors);
    void (*launch)(const KextGemmArgs& args, int multiprocessors);
};

using KextEntries = std::array<KextEntry, kConfigs.size()>;

extern const KextEntries kKextBf16Nk;
extern const KextEntries kKextBf16Kn;
extern const KextEntries kKextFp16Nk;
extern const KextEntries kKextFp16Kn;

}  // namespace nsru
