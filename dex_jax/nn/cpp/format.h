// A format of kernels [out, in] for products: numbers, or packed weights in tiles. Each is compiled alone (format.cc), when a
// model needs it.

#ifndef DEX_JAX_FORMAT_H_
#define DEX_JAX_FORMAT_H_

#include <cstdint>

#include "numbers.h"
#include "tiles.h"
#include "vectors.h"

namespace dex_jax {

struct Format {
  int64_t weight_bytes;  // of numbers; 0 for tiles

  // For numbers: the product of few rows with outputs [begin, end), and Pack for outputs that many rows are multiplied with.
  void (*multiply)(const FewRows& rows, int64_t begin, int64_t end);
  void (*pack)(const void* kernel, int64_t count, int64_t in, Vector* packed);

  // For tiles: their columns, words and halves, RoundRow and Tiles::Multiply.
  int64_t columns, words, halves;
  void (*round_row)(const float* row, int64_t in, Digits* digits, About* about);
  void (*multiply_tiles)(const Rows& rows, int64_t first, int64_t count, const uint8_t* tiles, float* result);

  int64_t bytes_of(int64_t in) const {  // of a row of the kernel
    if (weight_bytes > 0) return in * weight_bytes;
    return halves == 0 ? in : in / columns * (4 * words + 2 * halves);
  }
  // Codes alone may end within a tile.
  bool takes(int64_t in) const { return weight_bytes > 0 || halves == 0 || in % columns == 0; }
};

template <typename Weight>
constexpr Format NumbersOf() {
  const auto multiply = [](const FewRows& rows, int64_t begin, int64_t end) {
    FewRowsOf<Weight>{rows}.Outputs(begin, end);
  };
  return {sizeof(Weight), multiply, Pack<kTileOutputs, Weight>};
}

template <typename Packed>
constexpr Format TilesOf() {
  return {0, nullptr, nullptr, Packed::kColumns, Packed::kTileWords, Packed::kHalves, RoundRow, Tiles<Packed>::Multiply};
}

}  // namespace dex_jax

#endif  // DEX_JAX_FORMAT_H_
