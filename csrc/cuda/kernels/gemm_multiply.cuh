// The products of one warp, of tiles in shared memory, in the arithmetic of each type:
//
//   TensorCore<T>   __half, __nv_bfloat16: mma m16n8k16, float sums
//   Tf32            float: mma m16n8k8, operands rounded to TF32
//   Plain<T>        any: exact operands, fused multiply-adds in the type of the sums
//
// Where the architecture has no mma for a type, Available makes the first two the third.
//
// All share the accumulators of mma: with g = lane / 4 and t = lane % 4 a lane has of every 16 x 8 results
//   (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
// so that kernels are written once.
#pragma once

#include "kernels/gemm_tiles.cuh"

namespace effdense::kernels {

// Which index of an operand runs along the rows of its tile: that of the sum, or the other one.
enum class Along { depth, side };

// What is done to the left operand on its way into the fragments.
struct AsIs {};
// relu(scale * x + shift), rounded to the operand's type; both vectors run along the depth.
template <typename Sum>
struct BnRelu {
  const Sum *scale, *shift;
};

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % 32; }

template <typename Sum>
__device__ __forceinline__ Sum bn_relu_value(Sum x, Sum scale, Sum shift) {
  return relu(multiply_add(scale, x, shift));
}

// Two elements that share a register.
__device__ __forceinline__ float2 unpack(__half, uint32_t bits) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}
__device__ __forceinline__ float2 unpack(__nv_bfloat16, uint32_t bits) {
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u)};
}

// Each of the three: A is the fragment of 16 rows by kDepth, B that of kDepth by kColumnTiles * 8 columns,
// and kSteps of kDepth at a time hide the loads, where there are registers for that. A tile is [side][depth]
// (Along::depth) or [depth][side] (Along::side), `step` elements from row to row.
template <typename T>
struct TensorCore {
  using Element = T;
  using Sum = float;
  using A = uint32_t[4];
  using B = uint32_t[4];
  static constexpr int kDepth = 16, kColumnTiles = 2, kSteps = 2;

  template <Along kAlong>
  static __device__ __forceinline__ void load_a(A& a, const T* tile, int step, int row, int depth) {
    const int lane = lane_id();
    if constexpr (kAlong == Along::depth)
      ldmatrix_x4(a, tile + (row + lane % 16) * step + depth + lane / 16 * 8);
    else
      ldmatrix_x4_trans(a, tile + (depth + lane / 16 * 8 + lane % 8) * step + row + lane / 8 % 2 * 8);
  }

  template <Along kAlong>
  static __device__ __forceinline__ void load_b(B& b, const T* tile, int step, int column, int depth) {
    const int lane = lane_id();
    if constexpr (kAlong == Along::depth)
      ldmatrix_x4(b, tile + (column + lane / 16 * 8 + lane % 8) * step + depth + lane / 8 % 2 * 8);
    else
      ldmatrix_x4_trans(b, tile + (depth + lane % 16) * step + column + lane / 16 * 8);
  }

  template <int kTiles>
  static __device__ __forceinline__ void prepare(A (&)[kTiles], AsIs, int) {}

  template <int kTiles>
  static __device__ __forceinline__ void prepare(A (&a)[kTiles], const BnRelu<float>& norm, int depth) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // the fragment's left and right 8 columns
      const int k = depth + 8 * half + lane_id() % 4 * 2;
      const auto scale = *reinterpret_cast<const Vec<float, 2>*>(norm.scale + k);
      const auto shift = *reinterpret_cast<const Vec<float, 2>*>(norm.shift + k);
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        uint32_t& bits = a[i / 2][2 * half + i % 2];
        const float2 x = unpack(T{}, bits);
        bits = pack_relu<T>(multiply_add(scale[0], x.x, shift[0]), multiply_add(scale[1], x.y, shift[1]));
      }
    }
  }

  static __device__ __forceinline__ void multiply(float (&sums)[4], const A& a, const B& b, int tile) {
    mma_16x8x16<T>(sums, a, b[2 * tile], b[2 * tile + 1]);
  }
};

struct Tf32 {
  using Element = float;
  using Sum = float;
  using A = uint32_t[4];
  using B = uint32_t[2];
  static constexpr int kDepth = 8, kColumnTiles = 1, kSteps = 2;

  // Left as float: `prepare` rounds.
  template <Along kAlong>
  static __device__ __forceinline__ void load_a(A& a, const float* tile, int step, int row, int depth) {
    const int lane = lane_id();
    if constexpr (kAlong == Along::depth) {  // 4 floats are a row of 8 elements to ldmatrix
      ldmatrix_x4(a, tile + (row + lane % 16) * step + depth + lane / 16 * 4);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = __float_as_uint(tile[(depth + lane % 4 + i / 2 * 4) * step + row + lane / 4 + i % 2 * 8]);
    }
  }

  template <Along kAlong>
  static __device__ __forceinline__ void load_b(B& b, const float* tile, int step, int column, int depth) {
    const int side = column + lane_id() / 4, k = depth + lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = kAlong == Along::depth ? side * step + k + 4 * i : (k + 4 * i) * step + side;
      b[i] = ampere::to_tf32(tile[at]);
    }
  }

  template <int kTiles>
  static __device__ __forceinline__ void prepare(A (&a)[kTiles], AsIs, int) {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) a[i / 4][i % 4] = ampere::to_tf32(__uint_as_float(a[i / 4][i % 4]));
  }

  template <int kTiles>
  static __device__ __forceinline__ void prepare(A (&a)[kTiles], const BnRelu<float>& norm, int depth) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = depth + 4 * half + lane_id() % 4;
      const float scale = norm.scale[k], shift = norm.shift[k];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        uint32_t& bits = a[i / 2][2 * half + i % 2];
        bits = ampere::to_tf32(bn_relu_value(__uint_as_float(bits), scale, shift));
      }
    }
  }

  static __device__ __forceinline__ void multiply(float (&sums)[4], const A& a, const B& b, int) {
    ampere::mma_16x8x8_tf32(sums, a, b[0], b[1]);
  }
};

// The products that a lane needs for its four results: rows g and g + 8 of the left operand by columns 2t and
// 2t + 1 of the right one, over a depth that makes 16 bytes of sums.
template <typename T>
struct Plain {
  using Element = T;
  using Sum = acc_t<T>;
  static constexpr int kDepth = 16 / sizeof(Sum), kColumnTiles = 1, kSteps = sizeof(T) == 2 ? 1 : 2;
  using A = Sum[2][kDepth];
  using B = Sum[2][kDepth];

  template <Along kAlong>
  static __device__ __forceinline__ void load_a(A& a, const T* tile, int step, int row, int depth) {
    read<kAlong>(a, tile, step, row + lane_id() / 4, 8, depth);
  }

  template <Along kAlong>
  static __device__ __forceinline__ void load_b(B& b, const T* tile, int step, int column, int depth) {
    read<kAlong>(b, tile, step, column + lane_id() % 4 * 2, 1, depth);
  }

  template <int kTiles>
  static __device__ __forceinline__ void prepare(A (&)[kTiles], AsIs, int) {}

  template <int kTiles>
  static __device__ __forceinline__ void prepare(A (&a)[kTiles], const BnRelu<Sum>& norm, int depth) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const Sum scale = norm.scale[depth + k], shift = norm.shift[depth + k];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        Sum& value = a[i / 2][i % 2][k];
        value = static_cast<Sum>(narrow<T>(bn_relu_value(value, scale, shift)));
      }
    }
  }

  static __device__ __forceinline__ void multiply(Sum (&sums)[4], const A& a, const B& b, int) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] += a[e / 2][k] * b[e % 2][k];
    }
  }

 private:
  // Two of the side's elements, `apart` from each other.
  template <Along kAlong>
  static __device__ __forceinline__ void read(Sum (&to)[2][kDepth], const T* tile, int step, int side,
                                              int apart, int depth) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kAlong == Along::depth) {
        const auto piece = *reinterpret_cast<const Vec<T, kDepth>*>(tile + (side + i * apart) * step + depth);
#pragma unroll
        for (int k = 0; k < kDepth; ++k) to[i][k] = static_cast<Sum>(piece[k]);
      } else {
#pragma unroll
        for (int k = 0; k < kDepth; ++k)
          to[i][k] = static_cast<Sum>(tile[(depth + k) * step + side + i * apart]);
      }
    }
  }
};

// Where there is no mma of a type, exact products: what is asked for permits rounding, and does not demand
// it.
template <typename Math, Architecture kOn>
struct AvailableOn {
  using Type = Math;
};
template <>
struct AvailableOn<TensorCore<__nv_bfloat16>, Architecture::turing> {
  using Type = Plain<__nv_bfloat16>;
};
template <>
struct AvailableOn<Tf32, Architecture::turing> {
  using Type = Plain<float>;
};
template <typename Math>
using Available = AvailableOn<Math, kArchitecture>::Type;

// sums += a(row.., depth) b(depth, column..), 16 * kRowTiles by 8 * kColumnTiles results of one warp, over
// the tiles' first `depth`, a multiple of Math::kDepth.
template <typename Math, Along kAlongA, Along kAlongB, int kRowTiles, int kColumnTiles, typename Prologue>
__device__ __forceinline__ void multiply(typename Math::Sum (&sums)[kRowTiles][kColumnTiles][4],
                                         const typename Math::Element* a_tile, int a_step, int row,
                                         const typename Math::Element* b_tile, int b_step, int column,
                                         int depth, const Prologue& prologue) {
  static_assert(kColumnTiles % Math::kColumnTiles == 0);
  // Where the results take the registers there is no room for more than one.
#pragma unroll(kRowTiles > 2 ? 1 : Math::kSteps)
  for (int k = 0; k < depth; k += Math::kDepth) {
    typename Math::A a[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) Math::template load_a<kAlongA>(a[i], a_tile, a_step, row + 16 * i, k);
    Math::prepare(a, prologue, k);
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += Math::kColumnTiles) {
      typename Math::B b;
      Math::template load_b<kAlongB>(b, b_tile, b_step, column + 8 * j, k);
#pragma unroll
      for (int tile = 0; tile < Math::kColumnTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) Math::multiply(sums[i][j + tile], a[i], b, tile);
      }
    }
  }
}

// The sum over the 8 lanes that share t, that is over a 16 x 8 tile's rows; all of them get it.
template <typename Sum>
__device__ __forceinline__ Sum sum_over_rows(Sum value) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
  return value;
}

}  // namespace effdense::kernels
