// Products of rows with a kernel [out, in] of any format, which is read as it lies.
//
// With a kernel of numbers, a result is the sum of one vector of lanes, added up from the first column to the last and then
// over its lanes, however many rows are beside it: few are multiplied as weights go by, many in tiles. Packed weights lie in
// tiles.

#ifndef DEX_JAX_PRODUCT_H_
#define DEX_JAX_PRODUCT_H_

#include <algorithm>
#include <cstring>
#include <vector>

#include "elements.h"
#include "format.h"
#include "share.h"
#include "vectors.h"

namespace dex_jax {

// The most rows that wait for memory: weights are multiplied as they come from there. More rows wait for arithmetic.
constexpr int kFewRows = 16;

// Returns tiles with fewer than 16 outputs, or fewer than 32 columns in the last one, as whole ones, filled up with 0.
inline const uint8_t* Padded(const Format& format, const uint8_t* tiles, int64_t outputs, int64_t in) {
  const int64_t bytes = kOutputs * (4 * format.words + 2 * format.halves), count = Quotient(in, format.columns);
  auto* const padded = reinterpret_cast<uint8_t*>(Scratch(Quotient(count * bytes + kAhead, sizeof(Vector))));
  std::memset(padded, 0, count * bytes);
  for (int64_t tile = 0; tile < count; ++tile) {
    uint8_t* const to = padded + tile * bytes;
    const auto copy = [&](int64_t unit, int64_t size, uint8_t* at) {
      for (int64_t o = 0; o < outputs; ++o, tiles += size) std::memcpy(at + o * unit, tiles, size);
    };
    const int64_t left = in - tile * format.columns, words = left < format.columns ? left / 4 : format.words;
    for (int64_t w = 0; w < words; ++w) copy(4, 4, to + w * 4 * kOutputs);
    if (left < format.columns && left % 4 > 0) copy(4, left % 4, to + words * 4 * kOutputs);
    for (int64_t h = 0; h < format.halves; ++h) copy(2, 2, to + (4 * format.words + 2 * h) * kOutputs);
  }
  return padded;
}

// Number of weights that a thread takes at a time, and a number that all numbers of outputs at once divide.
constexpr int64_t kPiece = 1 << 14;
constexpr int64_t kPieceOutputs = 12;

// A tile of many rows and of outputs: its sums stay in registers while a vector of each row is loaded once.
#if defined(__AVX512F__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 3;
#endif
constexpr int kTile = kTileRows * kTileOutputs;
// Numbers of tiles of rows, and of vectors of each row, that stay in a core's first cache.
constexpr int kTilesOfRows = 2;
constexpr int kDepth = 640 / kLanes;
// Number of bytes of widened weights that stay in its second cache.
constexpr int64_t kWeights = 192 << 10;
// The fewest rows that weights are widened for.
constexpr int64_t kManyRows = 64;

// Packs `count` rows, or N if there are more, as one group.
template <int N>
void PackGroup(const float* rows, int64_t count, int64_t in, Vector* packed) {
  if constexpr (N > 1) {
    if (count < N) return PackGroup<N - 1>(rows, count, in, packed);
  }
  Pack<N, float>(rows, N, in, packed);
}

// Packs `count` rows in groups of kGroup or fewer.
inline void PackGroups(const float* rows, int64_t count, int64_t in, Vector* packed) {
  for (int64_t first = 0; first < count; first += kGroup)
    PackGroup<kGroup>(rows + first * in, count - first, in, packed + first * VectorsOf(in));
}

// A product of many rows, packed by Pack in tiles of kTileRows; the results of packed row r belong to row index[r].
struct ManyRows {
  const Format& format;
  const Vector* rows;
  const int64_t* index;
  const uint8_t* kernel;
  float* result;
  int64_t count, in, out;

  // Computes outputs [begin, end) of rows [first, last), first a multiple of kTileRows.
  void Outputs(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    const int64_t vectors = VectorsOf(in), panels = Quotient(end - begin, kTileOutputs);
    const int64_t parts = std::max<int64_t>(1, Quotient(vectors, kDepth)), depth = Quotient(vectors, parts);
    Vector* const weights = Scratch(panels * kTileOutputs * vectors + panels * kTilesOfRows * kTile);
    Vector* const sums = weights + panels * kTileOutputs * vectors;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t output = begin + p * kTileOutputs;
      format.pack(kernel + output * format.bytes_of(in), end - output, in, weights + p * kTileOutputs * vectors);
    }
    for (int64_t row = first; row < last; row += kTilesOfRows * kTileRows) {
      const int64_t tiles = std::min<int64_t>(kTilesOfRows, Quotient(last - row, kTileRows));
      for (int64_t from = 0; from == 0 || from < vectors; from += std::max<int64_t>(1, depth)) {
        const int64_t here = std::min(depth, vectors - from);
        const bool begins = from == 0, ends = from + here == vectors;
        for (int64_t p = 0; p < panels; ++p) {
          const Vector* const panel = weights + (p * vectors + from) * kTileOutputs;
          for (int64_t t = 0; t < tiles; ++t) {
            Vector* const own = sums + (p * kTilesOfRows + t) * kTile;
            const int64_t at = row + t * kTileRows, output = begin + p * kTileOutputs;
            const Vector* const tile = rows + at * vectors + from * kTileRows;
            const bool whole = at + kTileRows <= last && output + kTileOutputs <= end;
            float* results[kTileRows];
            if (ends && whole)
              for (int64_t r = 0; r < kTileRows; ++r) results[r] = result + index[at + r] * out + output;
            Add(tile, panel, here, begins, own, ends && whole ? results : nullptr);
            if (ends && !whole) Finish(own, at, last, output, end);
          }
        }
      }
    }
  }

 private:
  // Adds products of so many vectors to a tile's sums, or begins these; writes each row's results if there is a place for
  // them, else keeps the sums. Inlined, it runs short of registers.
  static __attribute__((noinline)) void Add(const Vector* values, const Vector* weights, int64_t depth, bool begins,
                                            Vector* kept, float* const* results) {
    Vector sums[kTileRows][kTileOutputs];
    for (int r = 0; r < kTileRows; ++r)
      for (int o = 0; o < kTileOutputs; ++o) sums[r][o] = begins ? Vector{} : kept[r * kTileOutputs + o];
    for (int64_t v = 0; v < depth; ++v, values += kTileRows, weights += kTileOutputs) {
      Vector value[kTileRows];
      for (int r = 0; r < kTileRows; ++r) value[r] = InRegister(values[r]);
      for (int o = 0; o < kTileOutputs; ++o) {
        const Vector weight = InRegister(weights[o]);
        for (int r = 0; r < kTileRows; ++r) sums[r][o] = MultiplyAdd(weight, value[r], sums[r][o]);
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      if (results) {
        SumsOf(sums[r], results[r]);
      } else {
        for (int o = 0; o < kTileOutputs; ++o) kept[r * kTileOutputs + o] = sums[r][o];
      }
    }
  }

  void Finish(const Vector* sums, int64_t row, int64_t last, int64_t output, int64_t end) const {
    const int64_t rows_here = std::min<int64_t>(kTileRows, last - row);
    const int64_t outputs = std::min<int64_t>(kTileOutputs, end - output);
    for (int64_t r = 0; r < rows_here; ++r) {
      float four[kTileOutputs];
      SumsOf(sums + r * kTileOutputs, four);
      std::copy(four, four + outputs, result + index[row + r] * out + output);
    }
  }
};

// Returns the indices of rows [count, in] that are not all zeros, as those beyond a prompt's end are; their results are 0.
inline std::vector<int64_t> Live(const float* rows, float* result, int64_t count, int64_t in, int64_t out) {
  std::vector<int64_t> index;
  for (int64_t r = 0; r < count; ++r) {
    if (std::any_of(rows + r * in, rows + (r + 1) * in, [](float value) { return value != 0; })) {
      index.push_back(r);
    } else {
      std::fill(result + r * out, result + (r + 1) * out, 0.0f);
    }
  }
  return index;
}

// rows [count, in], kernel [out, in] in tiles -> result [count, out].
template <typename Threads>
void MultiplyTiles(const Threads& threads, const Format& format, const float* rows, const uint8_t* kernel, float* result,
                   int64_t count, int64_t in, int64_t out) {
  const std::vector<int64_t> index = Live(rows, result, count, in, out);
  const int64_t live = index.size(), blocks = Quotient(in, kBlockColumns), bytes = format.bytes_of(in);
  const int64_t row_bytes = blocks * format.rounding.block_bytes;
  const int64_t needed = live * (row_bytes + blocks * static_cast<int64_t>(sizeof(About)));
  auto* const digits = reinterpret_cast<char*>(Scratch<true>(needed / sizeof(Vector) + 1));
  auto* const about = reinterpret_cast<About*>(digits + live * row_bytes);
  EachRow(threads, live, 4 * in, [&](int64_t r) {
    format.rounding.round_row(rows + index[r] * in, in, digits + r * row_bytes, about + r * blocks);
  });
  // Rows stay in a core's first cache while the tiles of a piece go by.
  const int64_t groups = Quotient(out, kOutputs), share = groups / std::max<int64_t>(1, 4 * threads.num_threads());
  const int64_t few = kPiece / (kOutputs * std::max<int64_t>(1, in));
  const int64_t some = std::max<int64_t>(1, live > kMostRows ? std::min<int64_t>(share, 8) : few);
  Share(threads, Quotient(groups, some), [&]() -> Pieces::Worker {
    return [&](int64_t piece) {
      for (int64_t first = 0; first < live; first += kMostRows) {
        const int64_t here = std::min<int64_t>(kMostRows, live - first);
        for (int64_t group = piece * some; group < std::min(groups, (piece + 1) * some); ++group) {
          const int64_t output = group * kOutputs, outputs = std::min<int64_t>(kOutputs, out - output);
          const uint8_t* tiles = kernel + output * bytes;
          if (outputs < kOutputs || in % kBlockColumns > 0) tiles = Padded(format, tiles, outputs, in);
          float results[kMostRows * kOutputs];
          format.multiply_tiles({digits, about, blocks}, first, here, tiles, results);
          for (int64_t r = 0; r < here; ++r)
            std::copy(results + r * kOutputs, results + r * kOutputs + outputs, result + index[first + r] * out + output);
        }
      }
    };
  });
}

// rows [count, in], kernel [out, in] of numbers -> result [count, out] of many rows.
template <typename Threads>
void MultiplyMany(const Threads& threads, const Format& format, const float* rows, const uint8_t* kernel, float* result,
                  int64_t count, int64_t in, int64_t out) {
  const std::vector<int64_t> index = Live(rows, result, count, in, out);
  const int64_t live = index.size(), vectors = VectorsOf(in), tiles = Quotient(live, kTileRows);
  Vector* const packed = Scratch<true>(tiles * kTileRows * vectors);
  Share(threads, tiles, [&]() -> Pieces::Worker {
    return [&](int64_t tile) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t at = tile * kTileRows + r;
        PackRow<kTileRows>(at < live ? rows + index[at] * in : nullptr, in, packed + tile * kTileRows * vectors + r);
      }
    };
  });
  const int64_t bytes = std::max<int64_t>(1, in * static_cast<int64_t>(sizeof(float)));
  int64_t outputs = std::max<int64_t>(kTileOutputs, kWeights / bytes);
  // Every thread gets as much as the others.
  const int64_t workers = std::max<int64_t>(1, threads.num_threads());
  outputs = Quotient(Quotient(out, Quotient(Quotient(out, outputs), workers) * workers), kTileOutputs) * kTileOutputs;
  const int64_t pieces = Quotient(out, outputs);
  const int64_t row_parts = std::clamp<int64_t>(workers / pieces, 1, std::max<int64_t>(1, live / kManyRows));
  const int64_t rows_a_part = Quotient(Quotient(live, row_parts), kTileRows) * kTileRows;
  Share(threads, pieces * row_parts, [&]() -> Pieces::Worker {
    return [&](int64_t piece) {
      const int64_t begin = piece / row_parts * outputs, first = piece % row_parts * rows_a_part;
      ManyRows{format, packed, index.data(), kernel, result, live, in, out}.Outputs(
          begin, std::min(begin + outputs, out), first, std::min(first + rows_a_part, live));
    };
  });
}

// rows [..., R, in], kernel [..., out, in] of a format -> result [..., R, out]. A leading dimension is that of the
// result, or 1 in an operand that all have in common.
template <typename Threads, typename Dimensions>
void Multiply(const Threads& threads, const Format& format, const Dimensions& of_rows, const float* rows,
              const Dimensions& of_kernel, const uint8_t* kernel, const Dimensions& shape, float* result) {
  const size_t leading = shape.size() - 2;
  const int64_t in = of_rows[leading + 1], out = shape[leading + 1];
  int64_t count = shape[leading], products = SizeOf(shape, 0, leading);
  // Rows that have one kernel in common are rows of one product.
  const bool together = SizeOf(of_kernel, 0, leading) == 1;
  if (together) {
    count *= SizeOf(of_rows, 0, leading);
    products = 1;
  }
  if (count * out == 0) return;
  const auto rows_of = [&](int64_t index) { return together ? 0 : BlockOf(index, of_rows, shape, leading); };
  const auto kernel_of = [&](int64_t index) {
    return kernel + (together ? 0 : BlockOf(index, of_kernel, shape, leading)) * out * format.bytes_of(in);
  };
  const bool tiles = format.weight_bytes == 0;
  if (tiles || count > kFewRows) {
    for (int64_t index = 0; index < products; ++index)
      (tiles ? MultiplyTiles<Threads> : MultiplyMany<Threads>)(threads, format, rows + rows_of(index) * count * in,
                                                               kernel_of(index), result + index * count * out, count, in, out);
    return;
  }
  const int64_t outputs = Quotient(kPiece, std::max<int64_t>(1, in) * kPieceOutputs) * kPieceOutputs;
  const int64_t pieces = Quotient(out, outputs);
  Share(threads, products * pieces, [&]() -> Pieces::Worker {
    Vector* const packed = Scratch(count * VectorsOf(in));
    return [&, packed, held = int64_t{-1}](int64_t piece) mutable {
      const int64_t index = piece / pieces, begin = piece % pieces * outputs, row_set = rows_of(index);
      if (held != row_set) PackGroups(rows + row_set * count * in, count, in, packed);
      held = row_set;
      format.multiply({packed, kernel_of(index), result + index * count * out, count, in, out}, begin,
                      std::min(begin + outputs, out));
    };
  });
}

}  // namespace dex_jax

#endif  // DEX_JAX_PRODUCT_H_
