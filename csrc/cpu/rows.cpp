// Picks the row loops, and who multiplies, for the instruction set of this machine.
#include "cpu/rows.h"

#include <ATen/Version.h>

#include <string>

#include "cpu/products.h"

namespace effdense {
namespace {

enum class Isa { baseline, avx2, avx512 };

// ATen's own answer, so that ATEN_CPU_CAPABILITY and its checks of the operating system hold here too.
Isa detect() {
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return Isa::avx512;
  if (capability == "AVX2") return Isa::avx2;
  return Isa::baseline;
}

Isa isa() {
  static const Isa found = detect();
  return found;
}

template <typename T>
const Rows<T>& pick(const Rows<T>& baseline, const Rows<T>& avx2, const Rows<T>& avx512) {
  return isa() == Isa::avx512 ? avx512 : isa() == Isa::avx2 ? avx2 : baseline;
}

}  // namespace

#if defined(__x86_64__)
#define EFFDENSE_PICK(T) pick<T>(baseline::rows_##T, avx2::rows_##T, avx512::rows_##T)
#else
#define EFFDENSE_PICK(T) baseline::rows_##T
#endif

template <>
const Rows<float>& rows<float>() {
  return EFFDENSE_PICK(float);
}
template <>
const Rows<double>& rows<double>() {
  return EFFDENSE_PICK(double);
}
template <>
const Rows<bfloat16>& rows<bfloat16>() {
  return EFFDENSE_PICK(bfloat16);
}

// oneDNN's micro-kernel has the masks and registers of AVX-512 to itself; on AVX2 ours are faster
// (docs/log.md).
const Products* products() {
#if defined(__x86_64__)
  if (isa() == Isa::avx2) return &avx2::products;
#endif
  return nullptr;
}

bool blas_multiplies() { return isa() == Isa::baseline; }

}  // namespace effdense
