// Large pages for large tensors: fresh memory costs a page fault per page, and a feature buffer is walked
// with a wide step.
#pragma once

#include <ATen/core/Tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace effdense {

// Advice only; what is not wholly the tensor's is left alone.
inline void use_large_pages(const at::Tensor& x) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + x.storage().nbytes() - x.storage_offset() * x.itemsize()) / kPage * kPage;
  if (x.is_cpu() && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace effdense
