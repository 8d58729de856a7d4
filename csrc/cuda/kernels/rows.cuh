// One pass over the rows of one to three matrices, for all element-wise operators, with two sums per channel
// where they are needed. A functor says what is done to an element:
//
//   struct Body {
//     static constexpr int kIn, kOut, kVectors;            // matrices read and written, vectors read
//     static constexpr Reduce kReduce;                      // a result of sums.cuh says what is made of them
//     const A* vectors[kVectors];
//     // k: the channel's elements of the vectors (of Reduce::moments: its pivot)
//     void operator()(const A (&k)[kVectors], const A (&in)[kIn], A (&out)[kOut or 1], Sum<A>& sum,
//                     Sum<A>& other) const;
//   };
#pragma once

#include "kernels/sums.cuh"

namespace effdense::kernels {

enum class Reduce { nothing, moments, gradients };

// What is made of a body's sums.
struct Nothing {};

template <typename T, int kIn, int kOut>
struct Operands {
  Matrix<const T> in[kIn];
  Matrix<T> out[kOut > 0 ? kOut : 1];
};

// The rows of a thread, kBatch at a time: all loads of a batch are on their way before the first is needed.
// An output may be an input: whoever writes an element has read it.
// Without counters the blocks' sums are left to a kernel of its own.
template <typename T, int kVector, typename Body, typename Result>
__global__ void __launch_bounds__(kThreads, kResident)
    rows_kernel(Body body, Cut cut, Size size, Operands<T, Body::kIn, Body::kOut> operands, Result result,
                Scratch<acc_t<T>> scratch) {
  using A = acc_t<T>;
  constexpr int kIn = Body::kIn, kOut = Body::kOut, kVectors = Body::kVectors;
  constexpr int kBatch = 4 / kIn;
  constexpr bool kPivots = Body::kReduce == Reduce::moments;
  const Place<kVector> at(cut, size.channels);
  const int64_t first = int64_t{blockIdx.x} * cut.rows_per_block;
  const int64_t last = at.count > 0 ? min(first + cut.rows_per_block, size.rows) : first;

  Vec<T, kVector> in[kBatch][kIn];
  const auto fetch = [&](int64_t row) {
    for (int b = 0; b < kBatch; ++b, row += cut.height) {
      if (row >= last) return;
      for (int i = 0; i < kIn; ++i) {
        const Matrix<const T>& from = operands.in[i];
        in[b][i] = load_some<kVector>(from.data + row * from.step + at.channel, at.count);
      }
    }
  };
  fetch(first + at.y);

  constexpr bool kSums = Body::kReduce != Reduce::nothing;
  __shared__ A shared[kSums ? 2 * kVector : 1][kThreads];
  A k[kVectors][kVector] = {};
  if constexpr (kPivots) {  // the mean of the block's first batch
    for (int b = 0; b < kBatch; ++b) {
      if (first + at.y + b * cut.height >= last) break;
      for (int j = 0; j < kVector; ++j) k[0][j] += static_cast<A>(in[b][0][j]);
    }
    add_up(k[0], shared, at.y, cut.height, cut.width);
    __syncthreads();
    const A count = static_cast<A>(min(last - first, int64_t{kBatch} * cut.height));
    A* const to = scratch.partial + int64_t{blockIdx.x} * Result::kLines * size.channels + at.channel;
    for (int j = 0; j < kVector; ++j) {
      k[0][j] = shared[j][at.x] / count;
      if (at.y == 0 && j < at.count) store(to + j, k[0][j]);
    }
    __syncthreads();
  } else {
    share_channels(body.vectors, at, k);
  }

  Sum<A> sums[2][kVector] = {};
  for (int64_t row = first + at.y; row < last; fetch(row)) {
    for (int b = 0; b < kBatch; ++b, row += cut.height) {
      if (row >= last) continue;
      Vec<T, kVector> out[kOut > 0 ? kOut : 1];
      for (int j = 0; j < kVector; ++j) {
        A constants[kVectors], from[kIn], to[kOut > 0 ? kOut : 1];
        for (int v = 0; v < kVectors; ++v) constants[v] = k[v][j];
        for (int i = 0; i < kIn; ++i) from[i] = static_cast<A>(in[b][i][j]);
        body(constants, from, to, sums[0][j], sums[1][j]);
        for (int o = 0; o < kOut; ++o) out[o][j] = static_cast<T>(to[o]);
      }
      for (int o = 0; o < kOut; ++o) {
        const Matrix<T>& into = operands.out[o];
        store_some<kVector>(into.data + row * into.step + at.channel, out[o], at.count);
      }
    }
  }
  if constexpr (kSums) {
    store_sums<Result::kLines>(sums, shared, at, cut, size.channels, scratch.partial);
    if (scratch.counters == nullptr) return;
    if (blockIdx.x == 0 && blockIdx.y == 0) result.rest();
    if (!comes_last(scratch.counters + blockIdx.y, static_cast<int>(gridDim.x))) return;
    __shared__ double of_parts[2][kThreads];
    const int64_t channel = int64_t{blockIdx.y} * cut.width * kVector;
    merge_parts(result, gridDim.x, scratch.partial, channel,
                static_cast<int>(min(size.channels - channel, int64_t{cut.width} * kVector)), of_parts);
  }
}

// Blocks that are to be there at least, before their parts get fewer for the last block's sake: two on each
// multiprocessor of the largest card.
constexpr int64_t kEnoughBlocks = 264;

template <typename T, typename Body, typename Result = Nothing>
void for_rows(Size size, const Body& body, const Operands<T, Body::kIn, Body::kOut>& operands, Stream stream,
              Result result = {}, Scratch<acc_t<T>> scratch = {}) {
  constexpr bool kSums = Body::kReduce != Reduce::nothing;
  int aligned = 16 / sizeof(T);
  for (const auto& in : operands.in) aligned = std::min(aligned, aligned_elements(in));
  if constexpr (Body::kOut > 0)
    for (const auto& out : operands.out) aligned = std::min(aligned, aligned_elements(out));
  with_vector<T>(aligned, size.channels, [&](auto vector) {
    Cut cut(size.channels, vector);
    const int threads = cut.width * cut.height;
    const int of_tile = static_cast<int>(std::min<int64_t>(size.channels, int64_t{cut.width} * vector));
    int64_t at_least = std::max<int64_t>(kLeastRows, 4 * cut.height);
    if (const int64_t few = kMostInTurn * (threads / of_tile); kSums && few * cut.tiles >= kEnoughBlocks)
      at_least = std::max(at_least, divide_up(size.rows, few));
    cut.cut_rows(size.rows, at_least);
    Scratch<acc_t<T>> own = scratch;
    if (!last_block_merges(cut.row_blocks, cut.tiles, threads, of_tile)) own.counters = nullptr;
    if constexpr (Body::kReduce == Reduce::moments) result.rows_per_block = cut.rows_per_block;
    launch(rows_kernel<T, vector, Body, Result>, cut.grid(), cut.block(), 0, stream, body, cut, size,
           operands, result, own);
    if constexpr (kSums) {
      if (own.counters == nullptr) merge(result, cut.row_blocks, scratch.partial, stream);
    }
  });
}

}  // namespace effdense::kernels
