#include "kext_kernel.cuh"

namespace nsru {

// In the order of kConfigs.
const KextEntries kKextFp16Kn = {
    KextGemm<cutlass::half_t, KextLayout::kKN, 128, 256, false>::entry(),
    KextGemm<cutlass::half_t, KextLayout::kKN, 128, 128, true>::entry(),
};

}  // namespace nsru
