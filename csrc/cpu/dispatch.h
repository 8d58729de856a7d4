// The types that the CPU operators are built for.
#pragma once

#include <ATen/Dispatch.h>

#include <type_traits>

#include "cpu/products.h"

namespace effdense {

template <typename scalar_t>
using storage_t = std::conditional_t<std::is_same_v<scalar_t, at::BFloat16>, bfloat16, scalar_t>;

// The types that the CPU operators are built for; T is the storage type, A the one for sums.
#define EFFDENSE_DISPATCH(type, name, ...)                        \
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, type, name, [&] { \
    using T = storage_t<scalar_t>;                                \
    using A = acc_t<T>;                                           \
    __VA_ARGS__();                                                \
  })

}  // namespace effdense
