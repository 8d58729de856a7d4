// What a kernel asks of its block and warp: barriers, shuffles, votes, and the tensor cores' ldmatrix and mma
// with the fragment layouts of the PTX ISA (sections "Matrix Fragments for mma.m16n8k8 / m16n8k16" and
// "ldmatrix").
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cmath>

#include "memory.h"

namespace simt {

constexpr uint32_t kFullWarp = 0xFFFFFFFF;

template <typename Operand>
SIMT_UNINSTRUMENTED inline Operand& operand(Warp& warp, int lane) {
  return *static_cast<Operand*>(warp.operands[lane]);
}

SIMT_UNINSTRUMENTED inline void compute_nothing(Warp&, uint32_t) {}

// ---- Shuffles

enum class Shuffle { index, exclusive_or, up, down };

template <typename T>
struct ShuffleOperand {
  T value;
  int argument, width;
  T result;
};

// Lanes exchange within segments of `width`. Who would read beyond its segment keeps its own value.
template <Shuffle kShuffle>
SIMT_UNINSTRUMENTED inline int shuffle_source(int lane, int argument, int width) {
  const int first = lane & ~(width - 1), end = first + width;
  int source = lane;
  if constexpr (kShuffle == Shuffle::index) return first | (argument & (width - 1));
  if constexpr (kShuffle == Shuffle::exclusive_or) source = lane ^ argument;
  if constexpr (kShuffle == Shuffle::up) source = lane - argument;
  if constexpr (kShuffle == Shuffle::down) source = lane + argument;
  const bool inside = source < end && (source >= first || kShuffle == Shuffle::exclusive_or);
  return inside ? source : lane;
}

template <typename T, Shuffle kShuffle>
SIMT_UNINSTRUMENTED inline void compute_shuffle(Warp& warp, uint32_t mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    auto& to = operand<ShuffleOperand<T>>(warp, lane);
    const int source = shuffle_source<kShuffle>(lane, to.argument, to.width);
    if ((mask >> source & 1) == 0) {
      const Thread& thread = *warp.threads[lane];
      fail(thread, thread.site, "lane %d reads lane %d, which is not in the mask 0x%08x", lane, source, mask);
    }
    to.result = operand<ShuffleOperand<T>>(warp, source).value;
  }
}

template <typename T, Shuffle kShuffle>
SIMT_UNINSTRUMENTED inline T shuffle(const char* name, uint32_t mask, T value, int argument, int width,
                                     Site site) {
  static_assert(sizeof(T) <= 8);
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail(*machine.current, site, "%s: the width %d is not a power of two up to 32", name, width);
  }
  ShuffleOperand<T> mine{value, argument, width, value};
  collective(name, compute_shuffle<T, kShuffle>, mask, &mine, false, site);
  return mine.result;
}

// ---- Votes

struct Vote {
  bool value;
  uint32_t result;
};

SIMT_UNINSTRUMENTED inline void compute_vote(Warp& warp, uint32_t mask) {
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) && operand<Vote>(warp, lane).value) result |= 1u << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) operand<Vote>(warp, lane).result = result;
  }
}

SIMT_UNINSTRUMENTED inline uint32_t vote(const char* name, uint32_t mask, bool value, Site site) {
  Vote mine{value, 0};
  collective(name, compute_vote, mask, &mine, false, site);
  return mine.result;
}

// ---- ldmatrix: lane 8m + i gives the address of row i of matrix m, of 8x8 elements of 16 bits. Lane l
// receives, of every matrix, elements (l / 4, 2 * (l % 4)) and the one right of it; transposed, of the
// transposed matrix.

struct LdMatrix {
  const void* row;
  uint32_t* result;
};

struct alignas(16) MatrixRow {
  uint16_t elements[8];
};

// Instrumented: it reads the kernel's memory.
inline MatrixRow read_row(const void* row) { return *static_cast<const MatrixRow*>(row); }

template <bool kTransposed>
SIMT_UNINSTRUMENTED inline void compute_ldmatrix(Warp& warp, uint32_t) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    MatrixRow rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = read_row(operand<LdMatrix>(warp, 8 * matrix + i).row);
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = 2 * (lane % 4);
      const uint32_t low = kTransposed ? rows[j].elements[i] : rows[i].elements[j];
      const uint32_t high = kTransposed ? rows[j + 1].elements[i] : rows[i].elements[j + 1];
      operand<LdMatrix>(warp, lane).result[matrix] = low | high << 16;
    }
  }
}

template <bool kTransposed>
SIMT_UNINSTRUMENTED inline void ldmatrix(const char* name, uint32_t (&result)[4], const void* row,
                                         Site site) {
  if (!in_shared_memory(row, 16))
    fail(*machine.current, site, "%s: 16 bytes at %p are not in shared memory", name, row);
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail_alignment(row, 16, site);
  LdMatrix mine{row, result};
  collective(name, compute_ldmatrix<kTransposed>, kFullWarp, &mine, false, site);
}

inline void ldmatrix_x4(uint32_t (&result)[4], const void* row, Site site = Site::current()) {
  ldmatrix<false>("ldmatrix_x4", result, row, site);
}

inline void ldmatrix_x4_trans(uint32_t (&result)[4], const void* row, Site site = Site::current()) {
  ldmatrix<true>("ldmatrix_x4_trans", result, row, site);
}

// ---- mma: accumulator += A B, A of 16 x K, B of K x 8. With g = lane / 4 and t = lane % 4, a lane holds
//   accumulator   (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
//   A, 16 bits    (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8), each with the column after it
//   B, 16 bits    (2t, g) (2t + 8, g), each with the row after it
//   of K = 8      the first two of A, the first one of B
//   A, TF32       (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4)
//   B, TF32       (t, g) (t + 4, g)

struct Mma {
  float* accumulator;
  const uint32_t* a;
  uint32_t b[2];
};

// The float of a bit pattern. Branch-free, unlike cuda_fp16.h's: a product with 2^112 moves the exponent's
// bias, and normalises what is subnormal.
template <typename T>
SIMT_UNINSTRUMENTED inline float widen(uint16_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return std::bit_cast<float>(uint32_t{bits} << 16);
  const uint32_t magnitude = bits & 0x7FFFu, sign = (bits & 0x8000u) << 16;
  const auto finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f);
  const uint32_t special = magnitude >= 0x7C00u ? 0x7F800000u : 0u;
  return std::bit_cast<float>(finite | special | sign);
}

template <typename T, int kLines, int kDepth>
SIMT_UNINSTRUMENTED inline void widen_all(const uint32_t (&pairs)[kLines][kDepth / 2],
                                          float (&values)[kLines][kDepth]) {
  uint16_t bits[kLines * kDepth];
  float wide[kLines * kDepth];
  memcpy(bits, pairs, sizeof bits);
  for (int i = 0; i < kLines * kDepth; ++i) wide[i] = widen<T>(bits[i]);
  memcpy(values, wide, sizeof wide);
}

using Quad = float __attribute__((vector_size(16)));

// b is transposed: [8][kDepth].
template <int kDepth>
SIMT_UNINSTRUMENTED inline void multiply_accumulate(Warp& warp, const float (&a)[16][kDepth],
                                                    const float (&b)[8][kDepth]) {
  Quad left[kDepth], right[kDepth];
  for (int k = 0; k < kDepth; ++k) {
    left[k] = Quad{b[0][k], b[1][k], b[2][k], b[3][k]};
    right[k] = Quad{b[4][k], b[5][k], b[6][k], b[7][k]};
  }
  for (int row = 0; row < 16; ++row) {
    float* parts[4];  // of the accumulator's row, in four lanes
    for (int t = 0; t < 4; ++t) parts[t] = operand<Mma>(warp, row % 8 * 4 + t).accumulator + row / 8 * 2;
    Quad low = {parts[0][0], parts[0][1], parts[1][0], parts[1][1]};
    Quad high = {parts[2][0], parts[2][1], parts[3][0], parts[3][1]};
    for (int k = 0; k < kDepth; ++k) {
      low += a[row][k] * left[k];
      high += a[row][k] * right[k];
    }
    for (int j = 0; j < 4; ++j) {
      parts[j / 2][j % 2] = low[j];
      parts[2 + j / 2][j % 2] = high[j];
    }
  }
}

template <typename T, int kDepth>
SIMT_UNINSTRUMENTED inline void compute_mma(Warp& warp, uint32_t) {
  uint32_t a_pairs[16][kDepth / 2], b_pairs[8][kDepth / 2];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& mine = operand<Mma>(warp, lane);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kDepth / 4; ++i) a_pairs[g + 8 * (i % 2)][t + 4 * (i / 2)] = mine.a[i];
    for (int i = 0; i < kDepth / 8; ++i) b_pairs[g][t + 4 * i] = mine.b[i];
  }
  float a[16][kDepth], b[8][kDepth];
  widen_all<T, 16, kDepth>(a_pairs, a);
  widen_all<T, 8, kDepth>(b_pairs, b);
  multiply_accumulate(warp, a, b);
}

SIMT_UNINSTRUMENTED inline void compute_mma_tf32(Warp& warp, uint32_t) {
  constexpr uint32_t kUsed = 0xFFFFE000;  // the tensor core ignores the other bits
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& mine = operand<Mma>(warp, lane);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = std::bit_cast<float>(mine.a[i] & kUsed);
    for (int i = 0; i < 2; ++i) b[g][t + 4 * i] = std::bit_cast<float>(mine.b[i] & kUsed);
  }
  multiply_accumulate(warp, a, b);
}

// T is __half or __nv_bfloat16.
template <typename T>
SIMT_UNINSTRUMENTED inline void mma_16x8x16(float (&accumulator)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1, Site site = Site::current()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  Mma mine{accumulator, a, {b0, b1}};
  collective("mma_16x8x16", compute_mma<T, 16>, kFullWarp, &mine, false, site);
}

inline void mma_16x8x8_half(float (&accumulator)[4], uint32_t a0, uint32_t a1, uint32_t b,
                            Site site = Site::current()) {
  const uint32_t a[2] = {a0, a1};
  Mma mine{accumulator, a, {b, 0}};
  collective("mma_16x8x8_half", compute_mma<__half, 8>, kFullWarp, &mine, false, site);
}

SIMT_UNINSTRUMENTED inline void mma_16x8x8_tf32(float (&accumulator)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1, Site site = Site::current()) {
  Mma mine{accumulator, a, {b0, b1}};
  collective("mma_16x8x8_tf32", compute_mma_tf32, kFullWarp, &mine, false, site);
}

// relu of two floats as a pair of T, `low` in the lower half. NaN stays NaN, and -0 becomes 0.
template <typename T>
uint32_t pack_relu(float low, float high) {
  const auto half = [](float value) -> uint32_t {
    return std::bit_cast<uint16_t>(static_cast<T>(value <= 0.0f ? 0.0f : value));
  };
  return half(low) | half(high) << 16;
}

// The nearest TF32, ties away from zero (cvt.rna), as a pattern of bits. NaN and infinity stay what they are.
inline uint32_t to_tf32(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return (bits & 0x7F800000u) == 0x7F800000u ? bits : (bits + 0x1000u) & 0xFFFFE000u;
}

}  // namespace simt

// ---- CUDA's own names

inline void __syncthreads(simt::Site site = simt::Site::current()) { simt::barrier("__syncthreads", site); }

inline void __syncwarp(unsigned mask = simt::kFullWarp, simt::Site site = simt::Site::current()) {
  simt::collective("__syncwarp", simt::compute_nothing, mask, nullptr, true, site);
}

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
                     simt::Site site = simt::Site::current()) {
  return simt::shuffle<T, simt::Shuffle::index>("__shfl_sync", mask, value, lane, width, site);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                         simt::Site site = simt::Site::current()) {
  return simt::shuffle<T, simt::Shuffle::exclusive_or>("__shfl_xor_sync", mask, value, lanes, width, site);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                        simt::Site site = simt::Site::current()) {
  return simt::shuffle<T, simt::Shuffle::up>("__shfl_up_sync", mask, value, static_cast<int>(delta), width,
                                             site);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                          simt::Site site = simt::Site::current()) {
  return simt::shuffle<T, simt::Shuffle::down>("__shfl_down_sync", mask, value, static_cast<int>(delta),
                                               width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::vote("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::vote("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::vote("__all_sync", mask, predicate != 0, site) == mask;
}

// Arithmetic that a host compiler does not know.
#if !__GLIBC_PREREQ(2, 42)
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
#endif
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
using std::max;
using std::min;
