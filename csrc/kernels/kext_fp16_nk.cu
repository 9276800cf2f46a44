#include "kext_kernel.cuh"

namespace nsru {

const KextEntries kKextFp16Nk = kext_entries<cutlass::half_t, KextLayout::kNK>();

}  // namespace nsru
