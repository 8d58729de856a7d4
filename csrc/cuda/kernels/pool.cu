// Pooling of relu(scale * x + shift), which is never stored: the average over windows side by side, each
// pixel read once, and the maximum over windows that may overlap. A thread has the channels of one Place and
// takes one window after another.
#include "kernels/sums.cuh"

namespace effdense::kernels {
namespace {

__host__ __device__ int product(const int (&size)[3]) { return size[0] * size[1] * size[2]; }

struct Spot {
  int64_t image;
  int at[3];
};

// Places in images of some size, counted from the first-th on, row-major. The one 64-bit division comes
// first: the device has none in hardware.
struct Spots {
  int size[3];
  int64_t image;
  unsigned pixel;

  __device__ Spots(const int (&images)[3], int64_t first) : size{images[0], images[1], images[2]} {
    image = first / product(images);
    pixel = static_cast<unsigned>(first % product(images));
  }
  __device__ Spot operator[](int64_t offset) const {
    unsigned index = pixel + static_cast<unsigned>(offset);
    Spot spot;
    for (int axis = 2; axis >= 0; --axis) {
      spot.at[axis] = static_cast<int>(index % size[axis]);
      index /= size[axis];
    }
    spot.image = image + index;
    return spot;
  }
};

__device__ __forceinline__ int64_t row_of(int64_t image, const int (&size)[3], int z, int y, int x) {
  return ((image * size[0] + z) * size[1] + y) * size[2] + x;
}

// ---- Average. A small window is one thread's, a large one `slices` threads' of a column of the block, which
// share its pixels; a block has `slots` windows at a time.
struct PoolCut : Cut {
  int slices, slots;

  PoolCut(int64_t windows, int64_t pixels, int64_t channels, int vector) : Cut(channels, vector) {
    slices = static_cast<int>(std::clamp<int64_t>(pixels / 8, 1, height));
    slots = height / slices;
    cut_rows(windows, std::max(slots * std::max<int64_t>(1, 16 / pixels), divide_up(kLeastRows, pixels)));
  }
};

// Calls body(z, y, x) for every `slices`-th pixel of the window that begins at `first`, from `slice` on.
template <typename Body>
__device__ __forceinline__ void for_pixels(const int (&first)[3], const int (&kernel)[3], int slice,
                                           int slices, const Body& body) {
  int i = 0, j = 0;
  for (int k = slice;; k += slices) {
    for (; k >= kernel[2]; k -= kernel[2]) ++j;
    for (; j >= kernel[1]; j -= kernel[1]) ++i;
    if (i >= kernel[0]) return;
    body(first[0] + i, first[1] + j, first[2] + k);
  }
}

__device__ __forceinline__ void first_pixel(const Spot& window, const int (&kernel)[3], int (&first)[3]) {
  for (int axis = 0; axis < 3; ++axis) first[axis] = window.at[axis] * kernel[axis];
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kResident)
    avg_pool_kernel(PoolCut cut, Windows windows, Matrix<const T> x, Norm<acc_t<T>> norm, Matrix<T> out) {
  using A = acc_t<T>;
  __shared__ A shared[kVector][kThreads];
  const Place<kVector> at(cut, windows.channels);
  const int slot = at.y / cut.slices, slice = at.y % cut.slices;
  const bool works = slot < cut.slots && at.count > 0;
  A vectors[2][kVector];
  share_channels({norm.scale, norm.shift}, at, vectors);
  const auto& [scale, shift] = vectors;
  const A share = A(1) / static_cast<A>(product(windows.kernel));
  const int64_t begin = int64_t{blockIdx.x} * cut.rows_per_block;
  const int64_t end = min(begin + cut.rows_per_block, windows.images * product(windows.out));
  const Spots spots(windows.out, begin);
  for (int64_t next = begin; next < end; next += cut.slots) {  // the same for the whole block: barriers
    const int64_t window = next + slot;
    A sums[kVector] = {};
    if (works && window < end) {
      const Spot spot = spots[window - begin];
      int first[3];
      first_pixel(spot, windows.kernel, first);
      for_pixels(first, windows.kernel, slice, cut.slices, [&](int i, int j, int k) {
        const T* const pixel = x.data + row_of(spot.image, windows.in, i, j, k) * x.step + at.channel;
        const Vec<T, kVector> in = load_some<kVector>(pixel, at.count);
        for (int c = 0; c < kVector; ++c)
          sums[c] += relu(multiply_add(scale[c], static_cast<A>(in[c]), shift[c]));
      });
    }
    if (cut.slices > 1) {
      add_up(sums, shared, slot < cut.slots ? slice : cut.slices, cut.slices, cut.width);
      __syncthreads();
    }
    if (slice > 0 || !works || window >= end) continue;
    Vec<T, kVector> result;
    for (int c = 0; c < kVector; ++c) result[c] = static_cast<T>(sums[c] * share);
    store_some<kVector>(out.data + window * out.step + at.channel, result, at.count);
  }
}

// The windows that the image cuts off are gone through too: nobody reads their pixels, whose gradient is 0.
__host__ __device__ void all_windows(const Windows& windows, int (&size)[3]) {
  for (int axis = 0; axis < 3; ++axis)
    size[axis] = static_cast<int>(divide_up(windows.in[axis], windows.kernel[axis]));
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kResident)
    avg_pool_backward_kernel(PoolCut cut, Windows windows, Matrix<const T> grad, Matrix<const T> x,
                             Norm<acc_t<T>> norm, Matrix<T> grad_x, acc_t<T>* workspace) {
  using A = acc_t<T>;
  __shared__ A shared[2 * kVector][kThreads];
  const Place<kVector> at(cut, windows.channels);
  const int slot = at.y / cut.slices, slice = at.y % cut.slices;
  A vectors[3][kVector];
  share_channels({norm.scale, norm.shift, norm.mean}, at, vectors);
  const auto& [scale, shift, mean] = vectors;
  Sum<A> sums[2][kVector] = {};
  const A share = A(1) / static_cast<A>(product(windows.kernel));
  int size[3];
  all_windows(windows, size);
  const int64_t begin = int64_t{blockIdx.x} * cut.rows_per_block;
  const int64_t end = slot < cut.slots && at.count > 0
                          ? min(begin + cut.rows_per_block, windows.images * product(size))
                          : begin;
  const Spots spots(size, begin);
  for (int64_t window = begin + slot; window < end; window += cut.slots) {
    const Spot spot = spots[window - begin];
    bool whole = true;
    for (int axis = 0; axis < 3; ++axis) whole = whole && spot.at[axis] < windows.out[axis];
    Vec<T, kVector> from{};
    if (whole) {
      const int64_t row = row_of(spot.image, windows.out, spot.at[0], spot.at[1], spot.at[2]);
      from = load_some<kVector>(grad.data + row * grad.step + at.channel, at.count);
    }
    int first[3];
    first_pixel(spot, windows.kernel, first);
    for_pixels(first, windows.kernel, slice, cut.slices, [&](int i, int j, int k) {
      if (i >= windows.in[0] || j >= windows.in[1] || k >= windows.in[2]) return;
      const int64_t row = row_of(spot.image, windows.in, i, j, k);
      Vec<T, kVector> result{};
      if (whole) {
        const Vec<T, kVector> in = load_some<kVector>(x.data + row * x.step + at.channel, at.count);
        for (int c = 0; c < kVector; ++c) {
          const A value = static_cast<A>(in[c]);
          const A d = masked(multiply_add(scale[c], value, shift[c]), share * static_cast<A>(from[c]));
          sums[0][c].add(d);
          sums[1][c].add_product(d, value - mean[c]);
          result[c] = static_cast<T>(scale[c] * d);
        }
      }
      store_some<kVector>(grad_x.data + row * grad_x.step + at.channel, result, at.count);
    });
  }
  store_sums<Gradients<A>::kLines>(sums, shared, at, cut, windows.channels, workspace);
}

// ---- Maximum, one thread a window.

// The pixels, or windows, first..last along one axis.
struct Range {
  int first, last;
};

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kResident)
    max_pool_kernel(Cut cut, Windows windows, Matrix<const T> x, Norm<acc_t<T>> norm, Matrix<T> out,
                    Matrix<uint8_t> where) {
  using A = acc_t<T>;
  const Place<kVector> at(cut, windows.channels);
  A vectors[2][kVector];
  share_channels({norm.scale, norm.shift}, at, vectors);
  const auto& [scale, shift] = vectors;
  const int64_t begin = int64_t{blockIdx.x} * cut.rows_per_block;
  const int64_t end =
      at.count > 0 ? min(begin + cut.rows_per_block, windows.images * product(windows.out)) : begin;
  const Spots spots(windows.out, begin);
  for (int64_t window = begin + at.y; window < end; window += cut.height) {
    const Spot spot = spots[window - begin];
    int corner[3];  // may lie in the padding
    Range inside[3];
    for (int axis = 0; axis < 3; ++axis) {
      corner[axis] = spot.at[axis] * windows.stride[axis] - windows.padding[axis];
      inside[axis] = {max(corner[axis], 0), min(corner[axis] + windows.kernel[axis], windows.in[axis])};
    }
    A best[kVector];
    for (int c = 0; c < kVector; ++c) best[c] = A(-1);  // less than any
    Vec<uint8_t, kVector> taps{};
    for (int i = inside[0].first; i < inside[0].last; ++i)
      for (int j = inside[1].first; j < inside[1].last; ++j)
        for (int k = inside[2].first; k < inside[2].last; ++k) {
          const T* const pixel = x.data + row_of(spot.image, windows.in, i, j, k) * x.step + at.channel;
          const Vec<T, kVector> in = load_some<kVector>(pixel, at.count);
          const auto tap = static_cast<uint8_t>(
              ((i - corner[0]) * windows.kernel[1] + j - corner[1]) * windows.kernel[2] + k - corner[2]);
          for (int c = 0; c < kVector; ++c) {
            const A z = relu(multiply_add(scale[c], static_cast<A>(in[c]), shift[c]));
            const bool larger = z > best[c] || z != z;  // the first of equals, the last NaN
            best[c] = larger ? z : best[c];
            taps[c] = larger ? tap : taps[c];
          }
        }
    Vec<T, kVector> result;
    for (int c = 0; c < kVector; ++c) result[c] = static_cast<T>(best[c]);
    store_some<kVector>(out.data + window * out.step + at.channel, result, at.count);
    store_some<kVector>(where.data + window * where.step + at.channel, taps, at.count);
  }
}

// A pixel gathers from the windows that it is in.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kResident)
    max_pool_backward_kernel(Cut cut, Windows windows, Matrix<const T> grad, Matrix<const uint8_t> where,
                             Matrix<T> grad_z) {
  using A = acc_t<T>;
  const Place<kVector> at(cut, windows.channels);
  if (at.count <= 0) return;
  const int64_t begin = int64_t{blockIdx.x} * cut.rows_per_block;
  const int64_t end = min(begin + cut.rows_per_block, windows.images * product(windows.in));
  const Spots spots(windows.in, begin);
  for (int64_t pixel = begin + at.y; pixel < end; pixel += cut.height) {
    const Spot spot = spots[pixel - begin];
    Range over[3];
    for (int axis = 0; axis < 3; ++axis) {
      const int stride = windows.stride[axis], from = spot.at[axis] + windows.padding[axis];
      over[axis] = {max(from - windows.kernel[axis] + stride, 0) / stride,
                    min(from / stride + 1, windows.out[axis])};
    }
    A sums[kVector] = {};
    for (int i = over[0].first; i < over[0].last; ++i)
      for (int j = over[1].first; j < over[1].last; ++j)
        for (int k = over[2].first; k < over[2].last; ++k) {
          const int64_t row = row_of(spot.image, windows.out, i, j, k);
          const int window[3] = {i, j, k};
          int tap = 0;
          for (int axis = 0; axis < 3; ++axis)
            tap = tap * windows.kernel[axis] + spot.at[axis] + windows.padding[axis] -
                  window[axis] * windows.stride[axis];
          const Vec<T, kVector> from = load_some<kVector>(grad.data + row * grad.step + at.channel, at.count);
          const Vec<uint8_t, kVector> taps =
              load_some<kVector>(where.data + row * where.step + at.channel, at.count);
          for (int c = 0; c < kVector; ++c) sums[c] += taps[c] == tap ? static_cast<A>(from[c]) : A(0);
        }
    Vec<T, kVector> result;
    for (int c = 0; c < kVector; ++c) result[c] = static_cast<T>(sums[c]);
    store_some<kVector>(grad_z.data + pixel * grad_z.step + at.channel, result, at.count);
  }
}

int64_t count_all_windows(const Windows& windows) {
  int size[3];
  all_windows(windows, size);
  return windows.images * product(size);
}

template <typename T>
void for_windows(int64_t count, const Windows& windows, int aligned, const auto& launch_with) {
  if (count == 0) return;
  with_vector<T>(aligned, windows.channels, [&](auto vector) {
    Cut cut(windows.channels, vector);
    cut.cut_rows(count, 4 * cut.height);
    launch_with(vector, cut);
  });
}

}  // namespace

template <typename T>
void bn_relu_avg_pool(const Windows& windows, Matrix<const T> x, Norm<acc_t<T>> norm, Matrix<T> out,
                      Stream stream) {
  const int64_t count = windows.images * product(windows.out);
  if (count == 0) return;
  const int aligned = std::min(aligned_elements(x), aligned_elements(out));
  with_vector<T>(aligned, windows.channels, [&](auto vector) {
    const PoolCut cut(count, product(windows.kernel), windows.channels, vector);
    launch(avg_pool_kernel<T, vector>, cut.grid(), cut.block(), 0, stream, cut, windows, x, norm, out);
  });
}

template <typename T>
int64_t avg_pool_workspace_size(const Windows& windows) {
  return workspace_size<T>({count_all_windows(windows) * product(windows.kernel), windows.channels});
}

template <typename T>
void bn_relu_avg_pool_backward(const Windows& windows, Matrix<const T> grad, Matrix<const T> x,
                               Norm<acc_t<T>> norm, Matrix<T> grad_x, SumsOut<acc_t<T>> to,
                               Scratch<acc_t<T>> scratch, Stream stream) {
  const int64_t count = count_all_windows(windows);
  if (count == 0) return;
  const int aligned = std::min({aligned_elements(grad), aligned_elements(x), aligned_elements(grad_x)});
  with_vector<T>(aligned, windows.channels, [&](auto vector) {
    const PoolCut cut(count, product(windows.kernel), windows.channels, vector);
    launch(avg_pool_backward_kernel<T, vector>, cut.grid(), cut.block(), 0, stream, cut, windows, grad, x,
           norm, grad_x, scratch.partial);
    const Size size{windows.images * product(windows.in), windows.channels};
    merge(Gradients<acc_t<T>>{size, to}, cut.row_blocks, scratch.partial, stream);
  });
}

template <typename T>
void bn_relu_max_pool(const Windows& windows, Matrix<const T> x, Norm<acc_t<T>> norm, Matrix<T> out,
                      Matrix<uint8_t> where, Stream stream) {
  const int aligned = std::min({aligned_elements(x), aligned_elements(out), aligned_elements(where)});
  for_windows<T>(windows.images * product(windows.out), windows, aligned, [&](auto vector, const Cut& cut) {
    launch(max_pool_kernel<T, vector>, cut.grid(), cut.block(), 0, stream, cut, windows, x, norm, out, where);
  });
}

template <typename T>
void max_pool_backward(const Windows& windows, Matrix<const T> grad, Matrix<const uint8_t> where,
                       Matrix<T> grad_z, Stream stream) {
  const int aligned = std::min({aligned_elements(grad), aligned_elements(where), aligned_elements(grad_z)});
  for_windows<T>(windows.images * product(windows.in), windows, aligned, [&](auto vector, const Cut& cut) {
    launch(max_pool_backward_kernel<T, vector>, cut.grid(), cut.block(), 0, stream, cut, windows, grad, where,
           grad_z);
  });
}

#define EFFDENSE_INSTANTIATE(T)                                                                             \
  template void bn_relu_avg_pool(const Windows&, Matrix<const T>, Norm<acc_t<T>>, Matrix<T>, Stream);       \
  template int64_t avg_pool_workspace_size<T>(const Windows&);                                              \
  template void bn_relu_avg_pool_backward(const Windows&, Matrix<const T>, Matrix<const T>, Norm<acc_t<T>>, \
                                          Matrix<T>, SumsOut<acc_t<T>>, Scratch<acc_t<T>>, Stream);         \
  template void bn_relu_max_pool(const Windows&, Matrix<const T>, Norm<acc_t<T>>, Matrix<T>,                \
                                 Matrix<uint8_t>, Stream);                                                  \
  template void max_pool_backward(const Windows&, Matrix<const T>, Matrix<const uint8_t>, Matrix<T>, Stream)
EFFDENSE_INSTANTIATE(float);
EFFDENSE_INSTANTIATE(double);
EFFDENSE_INSTANTIATE(__half);
EFFDENSE_INSTANTIATE(__nv_bfloat16);
#undef EFFDENSE_INSTANTIATE

}  // namespace effdense::kernels
