#include "kext_kernel.cuh"

namespace nsru {

// In the order of kConfigs.
const KextEntries kKextBf16Kn = {
    KextGemm<cutlass::bfloat16_t, KextLayout::kKN, 128, 256, false>::entry(),
    KextGemm<cutlass::bfloat16_t, KextLayout::kKN, 128, 128, true>::entry(),
};

}  // namespace nsru
