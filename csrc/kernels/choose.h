// Template arguments from what is known when a kernel is launched.
#pragma once

#include <type_traits>

namespace nsru {

// use(constant), the constant being the one of VALUES that is `value`, else the last.
template <int VALUE, int... OTHERS, class USE>
auto with_constant(int value, const USE& use) {
    if constexpr (sizeof...(OTHERS) > 0) {
        if (value != VALUE) return with_constant<OTHERS...>(value, use);
    }
    return use(std::integral_constant<int, VALUE>{});
}

// use(TYPE{}) with the type at this place among TYPES, else with the last: Bf16 and Fp16 in the
// order of Dtype.
template <class TYPE, class... OTHERS, class INDEX, class USE>
auto with_type(INDEX index, const USE& use) {
    if constexpr (sizeof...(OTHERS) > 0) {
        if (static_cast<int>(index) > 0) {
            return with_type<OTHERS...>(static_cast<int>(index) - 1, use);
        }
    }
    return use(TYPE{});
}

}  // namespace nsru
