#include "kext_kernel.cuh"

namespace nsru {

const KextEntries kKextFp16Kn = kext_entries<cutlass::half_t, KextLayout::kKN>();

}  // namespace nsru
