// One planted bug a kernel; test_simt_harness.py says who must catch it and how. Blocks of 64 threads.
#include <cstring>

#include "kernels/compat.cuh"
#include "samples.h"

namespace effdense::kernels {
namespace {

using namespace ampere;

constexpr int kBugThreads = 64;

__global__ void divergent_barrier(const float* x, float* y) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  store(y + threadIdx.x, load(x + threadIdx.x));
}

__global__ void skipped_barrier(const float* x, float* y) {
  if (threadIdx.x == 40) return;
  __syncthreads();
  store(y + threadIdx.x, load(x + threadIdx.x));
}

__global__ void missing_barrier(const float* x, float* y) {
  DYN_SHARED(float, tile);
  tile[threadIdx.x] = load(x + threadIdx.x);
  store(y + threadIdx.x, tile[kBugThreads - 1 - threadIdx.x]);
}

// The data come out right in the order fwd: only ThreadSanitizer can know.
__global__ void missing_barrier_that_works(const float* x, float* y) {
  DYN_SHARED(float, tile);
  tile[threadIdx.x] = load(x + threadIdx.x);
  __syncthreads();
  const float next = threadIdx.x + 1 < kBugThreads ? tile[threadIdx.x + 1] : 0.0f;
  tile[threadIdx.x] = 2 * next;
  __syncthreads();
  store(y + threadIdx.x, tile[threadIdx.x]);
}

__global__ void missing_syncwarp(const float* x, float* y) {
  __shared__ float tile[kBugThreads];
  tile[threadIdx.x] = load(x + threadIdx.x);
  const float sum = __shfl_xor_sync(kFullMask, tile[threadIdx.x], 1);  // orders no memory
  store(y + threadIdx.x, sum + tile[threadIdx.x ^ 1]);
}

__global__ void missing_wait(const float* x, float* y) {
  DYN_SHARED(float, tile);
  if (threadIdx.x < kBugThreads / 4) cp_async16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x);
  cp_async_commit();
  __syncthreads();
  store(y + threadIdx.x, tile[threadIdx.x]);
}

__global__ void load_out_of_bounds(const float* x, float* y) {
  store(y + threadIdx.x, load(x + threadIdx.x + 1));
}

__global__ void copy_out_of_bounds(const float* x, float* y) {
  DYN_SHARED(float, tile);
  cp_async<4>(tile + threadIdx.x, x + threadIdx.x + 1);
  cp_async_commit();
  cp_async_wait<0>();
  store(y + threadIdx.x, tile[threadIdx.x]);
}

__global__ void store_out_of_bounds(const float* x, float* y) {
  store(y + threadIdx.x + 1, load(x + threadIdx.x));
}

__global__ void dynamic_shared_out_of_bounds(const float* x, float* y) {
  DYN_SHARED(float, tile);
  tile[threadIdx.x + 1] = load(x + threadIdx.x);
  store(y + threadIdx.x, tile[threadIdx.x + 1]);
}

template <int kSize>
__global__ void static_shared_out_of_bounds(const float* x, float* y) {
  __shared__ float tile[kSize];
  const int i = static_cast<int>(load(x + threadIdx.x)) < 0 ? 0 : threadIdx.x + 1;
  tile[i] = load(x + threadIdx.x);
  store(y + threadIdx.x, tile[i]);
}

__global__ void unwritten_dynamic_shared(const float* x, float* y) {
  DYN_SHARED(float, tile);
  if (threadIdx.x != 17) tile[threadIdx.x] = load(x + threadIdx.x);
  __syncthreads();
  store(y + threadIdx.x, tile[threadIdx.x]);
}

// Written in one block, read in the other.
template <typename T>
__global__ void unwritten_static_shared(const T* x, T* y) {
  __shared__ T tile[kBugThreads];
  if (blockIdx.x == 0) tile[threadIdx.x] = load(x + threadIdx.x);
  __syncthreads();
  if (blockIdx.x == 1) store(y + threadIdx.x, tile[threadIdx.x]);
}

__global__ void mismatched_mask(const float* x, float* y) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000FFFFu : kFullMask;
  store(y + threadIdx.x, __shfl_xor_sync(mask, load(x + threadIdx.x), 1));
}

__global__ void mask_without_caller(const float* x, float* y) {
  store(y + threadIdx.x, __shfl_xor_sync(0x0000FFFFu, load(x + threadIdx.x), 1));
}

__global__ void shuffle_from_outside_the_mask(const float* x, float* y) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  store(y + threadIdx.x, __shfl_xor_sync(mask, load(x + threadIdx.x), 16));
}

__global__ void shuffle_with_exited_lane(const float* x, float* y) {
  if (threadIdx.x == 63) return;
  store(y + threadIdx.x, __shfl_xor_sync(kFullMask, load(x + threadIdx.x), 1));
}

__global__ void different_operations(const float* x, float* y) {
  float value = load(x + threadIdx.x);
  if (threadIdx.x % 2 == 0) {
    value = __shfl_xor_sync(kFullMask, value, 1);
  } else {
    value += static_cast<float>(__ballot_sync(kFullMask, 1));
  }
  store(y + threadIdx.x, value);
}

__global__ void deadlock(const float* x, float* y) {
  float value = load(x + threadIdx.x);
  if (threadIdx.x % 2 == 0) value = __shfl_xor_sync(kFullMask, value, 2);
  __syncthreads();
  store(y + threadIdx.x, value);
}

__global__ void misaligned_load(const float* x, float* y) {
  store(y + threadIdx.x, load(reinterpret_cast<const Vec<float, 4>*>(x + 1))[0]);
}

__global__ void ldmatrix_of_global_memory(const float* x, float* y) {
  uint32_t matrix[4];
  ldmatrix_x4(matrix, x);
  store(y + threadIdx.x, static_cast<float>(matrix[0]));
}

// Two that only concern arrays that are watched.
__global__ void blocks_store_to_one_place(const float* x, float* y) {
  if (threadIdx.x == 5 + blockIdx.x) store(y + 6, load(x + threadIdx.x));
}

__global__ void blocks_read_each_other(const float*, float* y) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  if (threadIdx.x < 32) store(y + i, load(y + (i + 32) % 64));
}

// What the block that comes last makes of both blocks' parts, and what goes wrong with that. The counter is
// y's last element.
enum class Wrong {
  nothing,
  no_release,         // no fence between the parts and the counter
  no_acquire,         // none between the counter and the parts
  no_barrier_before,  // the first thread counts before the others have stored
  no_barrier_after,   // the others do not wait for the first thread's fence
  too_early,          // a block takes itself for the last one too early
  not_reset,          // the counter is left for the next launch
};

template <Wrong kWrong>
__global__ void last_block(const float* x, float* y) {
  __shared__ int before;
  const int me = static_cast<int>(threadIdx.x), mine = 16 * static_cast<int>(blockIdx.x);
  if (me < 16) store(y + mine + me, load(x + mine + me));
  if (kWrong != Wrong::no_barrier_before) __syncthreads();
  int* const counter = reinterpret_cast<int*>(y + kBugThreads - 1);
  if (me == 0) {
    if (kWrong != Wrong::no_release) fence();
    before = count_up(counter);
    if (kWrong != Wrong::no_acquire) fence();
  }
  if (kWrong == Wrong::no_barrier_after)
    before = load(counter) - 1;
  else
    __syncthreads();
  if (before != (kWrong == Wrong::too_early ? 0 : 1)) return;
  if (me < 16) store(y + 32 + me, load(y + me) + load(y + 16 + me));
  __syncthreads();
  if (me == 0 && kWrong != Wrong::not_reset) store(counter, 0);
}

struct Bug {
  const char* name;
  void (*kernel)(const float*, float*);
};

const Bug kBugs[] = {
    {"divergent_barrier", divergent_barrier},
    {"skipped_barrier", skipped_barrier},
    {"missing_barrier", missing_barrier},
    {"missing_barrier_that_works", missing_barrier_that_works},
    {"missing_syncwarp", missing_syncwarp},
    {"missing_wait", missing_wait},
    {"load_out_of_bounds", load_out_of_bounds},
    {"copy_out_of_bounds", copy_out_of_bounds},
    {"store_out_of_bounds", store_out_of_bounds},
    {"dynamic_shared_out_of_bounds", dynamic_shared_out_of_bounds},
    {"static_shared_out_of_bounds", static_shared_out_of_bounds<kBugThreads>},
    {"unwritten_dynamic_shared", unwritten_dynamic_shared},
    {"unwritten_static_shared", unwritten_static_shared<float>},
    {"mismatched_mask", mismatched_mask},
    {"mask_without_caller", mask_without_caller},
    {"shuffle_from_outside_the_mask", shuffle_from_outside_the_mask},
    {"shuffle_with_exited_lane", shuffle_with_exited_lane},
    {"different_operations", different_operations},
    {"deadlock", deadlock},
    {"misaligned_load", misaligned_load},
    {"blocks_store_to_one_place", blocks_store_to_one_place},
    {"blocks_read_each_other", blocks_read_each_other},
    {"ldmatrix_of_global_memory", ldmatrix_of_global_memory},
    {"last_block", last_block<Wrong::nothing>},
    {"last_block_no_release", last_block<Wrong::no_release>},
    {"last_block_no_acquire", last_block<Wrong::no_acquire>},
    {"last_block_no_barrier_before", last_block<Wrong::no_barrier_before>},
    {"last_block_no_barrier_after", last_block<Wrong::no_barrier_after>},
    {"last_block_too_early", last_block<Wrong::too_early>},
    {"last_block_not_reset", last_block<Wrong::not_reset>},
};

}  // namespace

bool launch_bug(const char* name, const float* x, float* y) {
  for (const Bug& bug : kBugs) {
    if (strcmp(name, bug.name) != 0) continue;
    launch(bug.kernel, 2, kBugThreads, kBugThreads * sizeof(float), nullptr, x, y);
    return true;
  }
  return false;
}

}  // namespace effdense::kernels
