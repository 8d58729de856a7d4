// Copies tiles of a matrix from global memory to shared memory and back, for the GEMM kernels: in pieces of
// 16 bytes where base and step of the matrix permit, else of 8, 4 or one element. What lies beyond the matrix
// becomes zero on the way in and is not touched on the way out, whatever the piece: an edge costs no more
// than its own last pieces.
#pragma once

#include "kernels/architecture.cuh"

namespace effdense::kernels {

// A matrix of which a kernel sees rows x columns; `piece` is what one access moves, in elements.
template <typename T>
struct Operand {
  T* data;
  int64_t step, rows;
  int columns, piece;
};

template <typename T>
Operand<T> operand(Matrix<T> matrix, int64_t rows, int64_t columns) {
  return {matrix.data, matrix.step, rows, static_cast<int>(columns), aligned_elements(matrix)};
}

template <typename T>
__device__ __forceinline__ Operand<const T> read_only(const Operand<T>& from) {
  return {from.data, from.step, from.rows, from.columns, from.piece};
}

// Elements between the rows of a tile in shared memory: 16 bytes more than they need. Every piece is aligned,
// and the 8 rows that ldmatrix reads at a time fall into different banks, as kColumns is an even number of 16
// bytes.
template <typename T, int kColumns>
constexpr int kTileStep = kColumns + 16 / static_cast<int>(sizeof(T));

// Calls body with the size of a piece as a constant.
template <typename T, typename Body>
__device__ __forceinline__ void with_piece(int piece, const Body& body) {
  constexpr int kMost = 16 / sizeof(T);
  if (piece == kMost)
    body(std::integral_constant<int, kMost>{});
  else if (piece == kMost / 2)
    body(std::integral_constant<int, kMost / 2>{});
  else if constexpr (kMost >= 4) {
    if (piece == kMost / 4)
      body(std::integral_constant<int, kMost / 4>{});
    else if constexpr (kMost >= 8)
      body(std::integral_constant<int, kMost / 8>{});
  }
}

// Calls body(row, column, valid) for the pieces of a tile that are the calling thread's: the same ones
// whenever tile, piece and threads are the same. `valid` elements of the piece are within rows x columns.
template <int kRows, int kColumns, int kThreads, int kPiece, int kAtOnce, typename Body>
__device__ __forceinline__ void for_pieces(int thread, int64_t rows, int columns, const Body& body) {
  constexpr int kAcross = kColumns / kPiece;
  static_assert(kColumns % kPiece == 0);
  const int inside = static_cast<int>(min(rows, int64_t{kRows}));
  constexpr int kCount = kRows * kAcross;
#pragma unroll kAtOnce
  for (int first = 0; first < kCount; first += kThreads) {
    const int i = first + thread;
    if (kCount % kThreads != 0 && i >= kCount) break;
    const int row = i / kAcross, column = i % kAcross * kPiece;
    body(row, column, row < inside ? min(max(columns - column, 0), kPiece) : 0);
  }
}

// Starts the copy of the tile at (first_row, first_column); the threads of the block share it.
template <int kRows, int kColumns, int kThreads, typename T>
__device__ __forceinline__ void copy_tile(T* tile, const Operand<const T>& from, int64_t first_row,
                                          int first_column) {
  const T* const origin = from.data + first_row * from.step + first_column;
  with_piece<T>(from.piece, [&](auto piece) {
    constexpr int kPiece = decltype(piece)::value, kBytes = kPiece * static_cast<int>(sizeof(T));
    // Only the widest pieces deserve the code that unrolling costs.
    for_pieces<kRows, kColumns, kThreads, kPiece, kBytes == 16 ? 4 : 1>(
        static_cast<int>(threadIdx.x), from.rows - first_row, from.columns - first_column,
        [&](int row, int column, int valid) {
          const T* const source = valid > 0 ? origin + row * from.step + column : from.data;
          T* const to = tile + row * kTileStep<T, kColumns> + column;
          if constexpr (kBytes >= 4)
            cp_async<kBytes>(to, source, valid * static_cast<int>(sizeof(T)));
          else  // too narrow for cp.async
            *to = valid > 0 ? load(source) : static_cast<T>(0.0f);
        });
  });
}

// The way back. `thread`: of the kThreads that share the tile.
template <int kRows, int kColumns, int kThreads, typename T>
__device__ __forceinline__ void store_tile(const T* tile, const Operand<T>& to, int64_t first_row,
                                           int first_column, int thread) {
  T* const origin = to.data + first_row * to.step + first_column;
  with_piece<T>(to.piece, [&](auto piece) {
    constexpr int kPiece = decltype(piece)::value;
    for_pieces<kRows, kColumns, kThreads, kPiece, kPiece * sizeof(T) == 16 ? 4 : 1>(
        thread, to.rows - first_row, to.columns - first_column, [&](int row, int column, int valid) {
          const T* const from = tile + row * kTileStep<T, kColumns> + column;
          T* const target = origin + row * to.step + column;
          if (valid == kPiece) {
            store(reinterpret_cast<Vec<T, kPiece>*>(target), *reinterpret_cast<const Vec<T, kPiece>*>(from));
          } else {
#pragma unroll 1
            for (int e = 0; e < valid; ++e) store(target + e, from[e]);
          }
        });
  });
}

// `count` numbers of a vector from `first` on, 0 behind its end.
template <int kCount, int kThreads, typename A>
__device__ __forceinline__ void read_vector(A* to, const A* from, int first, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < kCount; i += kThreads)
    to[i] = first + i < count ? load(from + first + i) : A(0);
}

}  // namespace effdense::kernels
