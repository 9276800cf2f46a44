#include "kext_kernel.cuh"

namespace nsru {

const KextEntries kKextBf16Nk = kext_entries<cutlass::bfloat16_t, KextLayout::kNK>();

}  // namespace nsru
