// Launches of the bottleneck's backward: the choice of the tile, the cut of the pixels, and the sum of the
// parts. The file is separate so that it compiles beside the forward's.
#include "kernels/bottleneck_backward.cuh"
#include "kernels/fill.cuh"

namespace effdense::kernels {
namespace {

// How a call is cut: from its sizes and the card, so that on one card the result depends on nothing else.
template <typename T>
struct BackwardCut {
  static constexpr int kPixels = sizeof(T) == 8 ? 16 : 32, kColumns = sizeof(T) == 2 ? 64 : 32;
  // A block with fewer pixels writes a part of grad_weight that is much beside what it reads.
  static constexpr int64_t kLeastPixels = 512;
  int64_t width, tiles_per_block, blocks;  // blocks: along the pixels
  int64_t launches, out_per_launch;

  // Along the pixels as many blocks of kLeastPixels as there can be, and as the card holds at a time: more
  // would only be more parts of grad_weight to write and read again. Where these do not fill the card,
  // smaller ones.
  BackwardCut(Size size, int64_t out_channels) {
    const int64_t columns = divide_up(size.channels, kColumns), tiles = divide_up(size.rows, kPixels);
    width = columns * kColumns;
    launches = divide_up(out_channels, most_out<T>(architecture()));
    out_per_launch = divide_up(divide_up(out_channels, launches), 16) * 16;  // keeps pieces of 16 bytes whole
    const auto at_least_1 = [](int64_t count) { return std::max<int64_t>(count, 1); };
    const int64_t across = at_least_1(columns);
    const int64_t held = at_least_1(resident() * multiprocessors_to_fill() / across);
    const int64_t large = at_least_1(std::min(tiles / (kLeastPixels / kPixels), held));
    tiles_per_block = at_least_1(divide_up(tiles, large));
    if (divide_up(tiles, tiles_per_block) * across < enough_blocks())
      tiles_per_block =
          at_least_1(std::max(tiles / divide_up(enough_blocks(), across), divide_up(tiles, held)));
    blocks = divide_up(tiles, tiles_per_block);
  }
  // One block along the pixels has no partial results: it writes where the caller wants them.
  bool has_parts() const { return launches * blocks > 1; }
  int64_t weight_parts(int64_t out_channels) const { return has_parts() ? blocks * out_channels * width : 0; }
  int64_t sum_parts() const { return has_parts() ? launches * blocks * 2 * width : 0; }

 private:
  // Blocks on a multiprocessor.
  int64_t resident() const {
    constexpr int64_t kMost = 2;  // the kernel's launch bounds
    const auto with_room_for = [](auto most) {
      using Tile = BackwardTile<Plain<T>, decltype(most)::value, Architecture::ampere>;
      using OnTuring = BackwardTile<Plain<T>, decltype(most)::value, Architecture::turing>;
      return resident_blocks(architecture() == Architecture::turing ? OnTuring::kBytes : Tile::kBytes, kMost);
    };
    if (out_per_launch > 128) return with_room_for(std::integral_constant<int, 192>{});
    if (out_per_launch > 64) return with_room_for(std::integral_constant<int, 128>{});
    return with_room_for(std::integral_constant<int, 64>{});
  }
};

template <typename Math, int kOut, typename Arguments>
void launch_backward(const Arguments& arguments, dim3 grid, Stream stream) {
  using Tile = BackwardTile<Math, kOut, Architecture::ampere>;
  using OnTuring = BackwardTile<Math, kOut, Architecture::turing>;
  using Cut = BackwardCut<typename Tile::E>;
  static_assert(Tile::kPixels == Cut::kPixels && Tile::kColumns == Cut::kColumns);
  static_assert(Tile::kBytes <= most_shared_bytes(Architecture::ampere));
  static_assert(!OnTuring::kIsLaunched || OnTuring::kBytes <= most_shared_bytes(Architecture::turing));
  const bool corrected = arguments.y.data != nullptr;
  const int bytes = architecture() == Architecture::turing ? OnTuring::kBytes
                    : corrected                            ? Tile::kBytes
                                                           : Tile::kBytesUncorrected;
  launch(bottleneck_backward_kernel<Math, kOut>, grid, dim3(Tile::kThreads), bytes, stream, arguments);
}

template <typename Math, typename Arguments>
void choose_tile(const Arguments& arguments, dim3 grid, Stream stream) {
  constexpr int kMost = most_out<typename Math::Element>(Architecture::ampere);
  if constexpr (kMost >= 192) {
    if (arguments.grad_y.columns > 128) return launch_backward<Math, 192>(arguments, grid, stream);
  }
  if constexpr (kMost >= 128) {
    if (arguments.grad_y.columns > 64) return launch_backward<Math, 128>(arguments, grid, stream);
  }
  launch_backward<Math, 64>(arguments, grid, stream);
}

template <typename T>
Matrix<T> columns_from(Matrix<T> matrix, int64_t first) {
  return {matrix.data == nullptr ? nullptr : matrix.data + first, matrix.step};
}

}  // namespace

template <typename T>
int64_t bottleneck_backward_workspace_size(Size size, int64_t out_channels) {
  const BackwardCut<T> cut(size, out_channels);
  return cut.weight_parts(out_channels) + cut.sum_parts();
}

template <typename T>
void bottleneck_backward(Size size, int64_t out_channels, Matrix<const T> x, Matrix<const T> grad_y,
                         Correction<T> correction, Norm<acc_t<T>> norm, Matrix<const T> weight, bool tf32,
                         Matrix<T> grad_x, bool accumulate, acc_t<T>* grad_weight, SumsOut<acc_t<T>> to,
                         acc_t<T>* workspace, Stream stream) {
  using A = acc_t<T>;
  if (size.rows == 0 || size.channels == 0 || out_channels == 0) return;
  if (grad_weight == nullptr && to.sum_d == nullptr) return;
  const BackwardCut<T> cut(size, out_channels);
  A* const sum_parts = workspace;
  A* const weight_parts = workspace + cut.sum_parts();
  const dim3 grid(static_cast<unsigned>(cut.width / cut.kColumns), static_cast<unsigned>(cut.blocks));
  for (int64_t i = 0, first = 0; first < out_channels; ++i, first += cut.out_per_launch) {
    const int64_t out = std::min(cut.out_per_launch, out_channels - first);
    const auto of_out = [&](const A* vector) { return vector == nullptr ? nullptr : vector + first; };
    BackwardArguments<T, A> arguments{
        operand(x, size.rows, size.channels),
        operand(columns_from(grad_y, first), size.rows, out),
        operand(columns_from(correction.y, first), size.rows, out),
        operand(Matrix<const T>{weight.data + first * weight.step, weight.step}, out, size.channels),
        norm.scale,
        norm.shift,
        norm.mean,
        of_out(correction.mean),
        of_out(correction.a),
        of_out(correction.b),
        of_out(correction.scale),
        of_out(correction.shift),
        operand(grad_x, size.rows, size.channels),
        grad_x.data != nullptr && (accumulate || i > 0),
        cut.tiles_per_block,
        grad_weight,
        to.sum_d,
        to.sum_dx,
        size.channels,
        0,
        0,
        to};
    if (cut.has_parts()) {  // [blocks][out channels][width]; a launch fills its out channels
      arguments.width = cut.width;
      arguments.weight_step = out_channels * cut.width;
      arguments.sums_step = 2 * cut.width;
      if (grad_weight != nullptr) arguments.grad_weight = weight_parts + first * cut.width;
      if (to.sum_d != nullptr) arguments.sum_d = sum_parts + i * cut.blocks * 2 * cut.width;
      if (to.sum_d != nullptr) arguments.sum_dx = arguments.sum_d + cut.width;
    }
    if (correction.y.data != nullptr)  // who copies a piece of one has that of the other
      arguments.y.piece = arguments.grad_y.piece = std::min(arguments.y.piece, arguments.grad_y.piece);
    if constexpr (sizeof(T) == 2) {
      choose_tile<TensorCore<T>>(arguments, grid, stream);
    } else if constexpr (std::is_same_v<T, float>) {
      tf32 ? choose_tile<Tf32>(arguments, grid, stream) : choose_tile<Plain<float>>(arguments, grid, stream);
    } else {
      choose_tile<Plain<T>>(arguments, grid, stream);
    }
  }
  if (!cut.has_parts()) return;
  const int64_t lines = grad_weight == nullptr ? 0 : out_channels;
  const AddPartsArguments<A> parts{weight_parts,
                                   sum_parts,
                                   lines,
                                   cut.width,
                                   size.channels,
                                   static_cast<int>(cut.blocks),
                                   static_cast<int>(cut.launches * cut.blocks),
                                   grad_weight,
                                   to};
  const dim3 add_grid(static_cast<unsigned>(divide_up(size.channels, kPartColumns)),
                      static_cast<unsigned>(lines + (to.sum_d == nullptr ? 0 : 1)));
  launch(add_parts_kernel<A>, add_grid, dim3(kPartThreads), 0, stream, parts);
}

#define INSTANTIATE(T)                                                                                    \
  template int64_t bottleneck_backward_workspace_size<T>(Size, int64_t);                                  \
  template void bottleneck_backward<T>(Size, int64_t, Matrix<const T>, Matrix<const T>, Correction<T>,    \
                                       Norm<acc_t<T>>, Matrix<const T>, bool, Matrix<T>, bool, acc_t<T>*, \
                                       SumsOut<acc_t<T>>, acc_t<T>*, Stream)
INSTANTIATE(float);
INSTANTIATE(double);
INSTANTIATE(__half);
INSTANTIATE(__nv_bfloat16);
#undef INSTANTIATE

}  // namespace effdense::kernels
