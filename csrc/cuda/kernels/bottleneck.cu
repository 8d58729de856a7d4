// Launches of the bottleneck's forward: the choice of the tile and of the arithmetic.
#include "kernels/bottleneck.cuh"
#include "kernels/fill.cuh"

namespace effdense::kernels {
namespace {

// What a block makes.
struct Shape {
  int64_t pixels, out;
  int64_t blocks(int64_t rows, int64_t out_channels) const {
    return divide_up(rows, pixels) * divide_up(out_channels, out);
  }
};

// The largest tile whose blocks fill the card, from the sizes and the card alone. double has one tile: its
// accumulators take the registers, and nobody trains in it.
template <typename T>
Shape choose_shape(int64_t rows, int64_t out_channels) {
  if (sizeof(T) == 8) return {128, 64};
  // As few tiles of out channels as there must be, and those as narrow as can be.
  const int64_t width = divide_up(out_channels, divide_up(out_channels, 192));
  const Shape shapes[] = {{128, width > 128 ? 192 : width > 64 ? 128 : 64}, {64, 64}, {32, 64}, {16, 32}};
  for (const Shape& shape : shapes)
    if (shape.blocks(rows, out_channels) >= enough_blocks()) return shape;
  return shapes[3];
}

template <typename Math, int kOut, int kPixels, typename Arguments>
void launch_bottleneck(Arguments arguments, Stream stream) {
  using Tile = BottleneckTile<Math, kOut, kPixels, Architecture::ampere>;
  using OnTuring = BottleneckTile<Math, kOut, kPixels, Architecture::turing>;
  static_assert(Tile::kBytes <= most_shared_bytes(Architecture::ampere));
  static_assert(OnTuring::kBytes <= most_shared_bytes(Architecture::turing));
  const int bytes = architecture() == Architecture::turing ? OnTuring::kBytes : Tile::kBytes;
  const dim3 grid(static_cast<unsigned>(divide_up(arguments.y.rows, kPixels)),
                  static_cast<unsigned>(divide_up(arguments.y.columns, kOut)));
  if (!last_block_merges(grid.x, grid.y, Tile::kThreads, kOut)) arguments.counters = nullptr;
  launch(bottleneck_kernel<Math, kOut, kPixels>, grid, dim3(Tile::kThreads), bytes, stream, arguments);
  if (arguments.statistics != nullptr && arguments.counters == nullptr)
    merge(arguments.moments, grid.x, arguments.statistics, stream);
}

template <typename Math, typename Arguments>
void launch_shape(Shape shape, const Arguments& arguments, Stream stream) {
  if constexpr (sizeof(typename Math::Sum) == 4) {
    if (shape.pixels == 16) return launch_bottleneck<Math, 32, 16>(arguments, stream);
    if (shape.pixels == 32) return launch_bottleneck<Math, 64, 32>(arguments, stream);
    if (shape.pixels == 64) return launch_bottleneck<Math, 64, 64>(arguments, stream);
    if (shape.out == 192) return launch_bottleneck<Math, 192, 128>(arguments, stream);
    if (shape.out == 128) return launch_bottleneck<Math, 128, 128>(arguments, stream);
  }
  launch_bottleneck<Math, 64, 128>(arguments, stream);
}

}  // namespace

template <typename T>
int64_t bottleneck_workspace_size(Size size, int64_t out_channels) {
  return 3 * divide_up(size.rows, choose_shape<T>(size.rows, out_channels).pixels) * out_channels;
}

template <typename T>
void bottleneck(Size size, int64_t out_channels, Matrix<const T> x, Norm<acc_t<T>> norm,
                Matrix<const T> weight, Epilogue<acc_t<T>> epilogue, bool tf32, Matrix<T> y,
                StatisticsOut<acc_t<T>> to, Scratch<acc_t<T>> scratch, Stream stream) {
  if (size.rows == 0 || out_channels == 0) return;
  const Shape shape = choose_shape<T>(size.rows, out_channels);
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
      {{size.rows, out_channels}, static_cast<int>(shape.pixels), to}};
  if constexpr (sizeof(T) == 2) {
    launch_shape<TensorCore<T>>(shape, arguments, stream);
  } else if constexpr (std::is_same_v<T, float>) {
    tf32 ? launch_shape<Tf32>(shape, arguments, stream)
         : launch_shape<Plain<float>>(shape, arguments, stream);
  } else {
    launch_shape<Plain<T>>(shape, arguments, stream);
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
