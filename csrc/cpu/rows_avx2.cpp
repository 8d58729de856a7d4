// Row loops and products for x86-64 with AVX2. The options hold for these alone: all headers come before.
#include "cpu/products.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define EFFDENSE_ISA avx2
#include "cpu/products.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
