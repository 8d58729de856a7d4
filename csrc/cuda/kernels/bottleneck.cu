// Launches of the bottleneck's forward: which tile, and in which arithmetic.
#include "kernels/bottleneck.cuh"
#include "kernels/bottleneck_launchers.h"

namespace effdense::kernels {
namespace {

constexpr int64_t kPixelsPerBlock = 128;

template <typename Math, int kOut, typename Arguments>
void launch_bottleneck(Arguments arguments, Stream stream) {
  using Tile = BottleneckTile<Math, kOut, Architecture::ampere>;
  using OnTuring = BottleneckTile<Math, kOut, Architecture::turing>;
  static_assert(Tile::kPixels == kPixelsPerBlock && Tile::kBytes <= most_shared_bytes(Architecture::ampere));
  static_assert(OnTuring::kBytes <= most_shared_bytes(Architecture::turing));
  const int bytes = architecture() == Architecture::turing ? OnTuring::kBytes : Tile::kBytes;
  const dim3 grid(static_cast<unsigned>(divide_up(arguments.y.rows, Tile::kPixels)),
                  static_cast<unsigned>(divide_up(arguments.y.columns, kOut)));
  if (!last_block_merges(grid.x, grid.y, Tile::kThreads, kOut)) arguments.counters = nullptr;
  launch(bottleneck_kernel<Math, kOut>, grid, dim3(Tile::kThreads), bytes, stream, arguments);
  if (arguments.statistics != nullptr && arguments.counters == nullptr)
    merge(arguments.moments, grid.x, arguments.statistics, stream);
}

// As few tiles of out channels as there must be, and those as narrow as can be. double has tiles of 64 only:
// its accumulators take the registers.
template <typename Math, typename Arguments>
void choose_tile(const Arguments& arguments, Stream stream) {
  const int64_t out = arguments.y.columns, width = divide_up(out, divide_up(out, 192));
  if constexpr (sizeof(typename Math::Sum) == 4) {
    if (width > 128) return launch_bottleneck<Math, 192>(arguments, stream);
    if (width > 64) return launch_bottleneck<Math, 128>(arguments, stream);
  }
  launch_bottleneck<Math, 64>(arguments, stream);
}

}  // namespace

template <typename T>
int64_t bottleneck_workspace_size(Size size, int64_t out_channels) {
  return 3 * divide_up(size.rows, kPixelsPerBlock) * out_channels;
}

template <typename T>
void bottleneck(Size size, int64_t out_channels, Matrix<const T> x, Norm<acc_t<T>> norm,
                Matrix<const T> weight, Epilogue<acc_t<T>> epilogue, bool tf32, Matrix<T> y,
                StatisticsOut<acc_t<T>> to, Scratch<acc_t<T>> scratch, Stream stream) {
  if (size.rows == 0 || out_channels == 0) return;
  const BottleneckArguments<T, acc_t<T>> arguments{
      operand(x, size.rows, size.channels),
      operand(weight, out_channels, size.channels),
      norm.scale,
      norm.shift,
      epilogue.bias,
      epilogue.scale,
      epilogue.shift,
      operand(y, size.rows, out_channels),
      to.mean != nullptr ? scratch.partial : nullptr,
      scratch.counters,
      {{size.rows, out_channels}, static_cast<int>(kPixelsPerBlock), to}};
  if constexpr (sizeof(T) == 2) {
    choose_tile<TensorCore<T>>(arguments, stream);
  } else if constexpr (std::is_same_v<T, float>) {
    tf32 ? choose_tile<Tf32>(arguments, stream) : choose_tile<Plain<float>>(arguments, stream);
  } else {
    choose_tile<Plain<T>>(arguments, stream);
  }
}

#define INSTANTIATE(T)                                                                         \
  template int64_t bottleneck_workspace_size<T>(Size, int64_t);                                \
  template void bottleneck<T>(Size, int64_t, Matrix<const T>, Norm<acc_t<T>>, Matrix<const T>, \
                              Epilogue<acc_t<T>>, bool, Matrix<T>, StatisticsOut<acc_t<T>>,    \
                              Scratch<acc_t<T>>, Stream)
INSTANTIATE(float);
INSTANTIATE(double);
INSTANTIATE(__half);
INSTANTIATE(__nv_bfloat16);
#undef INSTANTIATE

}  // namespace effdense::kernels
