// A format of kernels [out, in] for products: numbers, or packed weights in tiles. Each is compiled alone (format.cc), when a
// model needs it.

#ifndef DEX_JAX_FORMAT_H_
#define DEX_JAX_FORMAT_H_

#include <cstdint>

#include "numbers.h"
#include "tiles.h"
#include "vectors.h"

namespace dex_jax {

// How rows lie that a product reads: in vectors of 8 or of 16 numbers, or rounded, as digits of bytes or as 16-bit numbers.
enum Layout : int64_t { kVectorsOf8 = 8, kVectorsOf16 = 16, kBytes = 1, kPairs = 2 };

constexpr Layout kPacked = static_cast<Layout>(kLanes);
#if defined(DEX_JAX_BYTES)
constexpr Layout kRounded = kBytes;
#else
constexpr Layout kRounded = kPairs;
#endif

// How rows are rounded: to which layout, in how many bytes a block, and RoundRow.
struct Rounding {
  Layout layout;
  int64_t block_bytes;
  void (*round_row)(const float* row, int64_t in, void* digits, About* about);
};

struct Format {
  int64_t weight_bytes;  // of numbers; 0 for tiles
  Layout layout;         // of the rows that it reads

  // For numbers: the product of few rows with outputs [begin, end), and Pack for outputs that many rows are multiplied with.
  void (*multiply)(const FewRows& rows, int64_t begin, int64_t end);
  void (*pack)(const void* kernel, int64_t count, int64_t in, Vector* packed);

  // For tiles: their columns, words and halves, how their rows are rounded, and Tiles::Multiply.
  int64_t columns, words, halves;
  Rounding rounding;
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
  return {sizeof(Weight), kPacked, multiply, Pack<kTileOutputs, Weight>};
}

template <typename Packed>
constexpr Format TilesOf() {
  return {0,
          kRounded,
          nullptr,
          nullptr,
          Packed::kColumns,
          Packed::kTileWords,
          Packed::kHalves,
          {kRounded, sizeof(Digits), RoundRow},
          Tiles<Packed>::Multiply};
}

}  // namespace dex_jax

#endif  // DEX_JAX_FORMAT_H_
