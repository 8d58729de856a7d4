// The number of blocks that a GEMM's launch must have to keep the GPU busy. The answer depends on nothing but
// the GPU, so that equal calls on one GPU give equal bits.
#pragma once

#include "kernels/architecture.cuh"
#include "kernels/bottleneck_launchers.h"

namespace effdense::kernels {

inline int64_t multiprocessors_to_fill() {
  return assumed_multiprocessors > 0 ? assumed_multiprocessors : multiprocessors();
}

// A block for four of five multiprocessors: smaller tiles would read more for the sake of the last fifth.
inline int64_t enough_blocks() { return divide_up(4 * multiprocessors_to_fill(), 5); }

// How many blocks with so much shared memory a multiprocessor holds, of `most` that registers have room for.
// The driver keeps 1 KB of every block (none on 7.5, where it makes no difference).
inline int64_t resident_blocks(int64_t shared_bytes, int64_t most) {
  return std::clamp<int64_t>(multiprocessor_shared_bytes() / (shared_bytes + 1024), 1, most);
}

}  // namespace effdense::kernels
