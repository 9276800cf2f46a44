#include "kext_kernel.cuh"

namespace nsru {

const KextEntries kKextBf16Kn = kext_entries<cutlass::bfloat16_t, KextLayout::kKN>();

}  // namespace nsru
