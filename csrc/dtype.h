// Element types of the operands, as Python names them.
#pragma once

namespace nsru {

enum class Dtype { kBf16 = 0, kFp16 = 1 };

}  // namespace nsru
