// Products of rows with a kernel [out, in], which is read as it lies: numbers, or blocks that are taken to pieces on the
// way.
//
// A result is the sum of one vector of lanes, added up from the first column to the last and then over its lanes,
// however many rows are beside it: few are multiplied while a weight goes by, many in tiles.

#ifndef DEX_JAX_PRODUCT_H_
#define DEX_JAX_PRODUCT_H_

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "share.h"
#include "vectors.h"

namespace dex_jax {

// Up to so many rows wait for memory, and weights are multiplied as they come from there. More wait for arithmetic.
constexpr int kFewRows = 16;

// Few rows that are multiplied at once.
constexpr int kGroup = 8;
// What a thread takes at a time, in weights, and a number of outputs that all numbers of outputs at once divide.
constexpr int64_t kPiece = 1 << 14;
constexpr int64_t kPieceOutputs = 6;
// How far ahead of the weight in use memory is asked for, in bytes.
constexpr int kAhead = 2048;

// Many rows: a tile of rows and outputs, whose sums stay in registers while a vector of each row is loaded once.
#if defined(__AVX512F__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 3;
#endif
constexpr int kTileOutputs = 4;
constexpr int kTile = kTileRows * kTileOutputs;
// What stays in a core's first cache: tiles' rows, and vectors of each.
constexpr int kTilesOfRows = 2;
constexpr int kDepth = 640 / kLanes;
// Bytes of widened weights that stay in its second cache.
constexpr int64_t kWeights = 192 << 10;
// Rows that weights are widened for at least.
constexpr int64_t kManyRows = 64;

// The same, which the compiler keeps in a register: it would load it anew for every product otherwise.
inline Vector InRegister(Vector x) {
#if defined(__AVX__)
  asm("" : "+v"(x));
#endif
  return x;
}

// Kernels. Each says what a row of `in` columns takes in bytes and, made of a row and the number of a group of columns,
// gives these, a vector at a time; how many outputs R rows are multiplied with at once, for whose sums there are vector
// registers; whether it takes rows of so many columns; and whether these may end within a group, which LastOf(row, in)
// gives.

template <typename Weight>
struct Numbers {
  static constexpr int kVectors = 1;
  static constexpr bool kMayEnd = true;
  static constexpr bool Takes(int64_t) { return true; }
  static constexpr int64_t BytesOf(int64_t in) { return in * static_cast<int64_t>(sizeof(Weight)); }
  // A few rows wait for memory, which a single stream reads fastest; of more, each vector is loaded once for all outputs.
  static constexpr int OutputsOf(int rows) {
#if defined(__AVX512F__)
    return rows > 4 ? 3 : 1;
#else
    return 1;
#endif
  }
  const Weight* const from;

  Numbers(const uint8_t* row, int64_t group) : from(reinterpret_cast<const Weight*>(row) + group * kLanes) {}
  Vector At(int) const { return Load(from); }
  static Vector LastOf(const uint8_t* row, int64_t in) {
    return LoadSome(reinterpret_cast<const Weight*>(row) + in / kLanes * kLanes, in % kLanes);
  }
};

template <typename Format>
struct Blocks : Format {
  static constexpr int kVectors = kGroupVectors;
  static constexpr bool kMayEnd = false;
  static constexpr bool Takes(int64_t in) { return in % Format::kColumns == 0; }
  static constexpr int64_t BytesOf(int64_t in) { return in / Format::kColumns * Format::kBytes; }
  // A row's sums are added up one after another, and wait for each other: those of several outputs fill the time.
  static constexpr int OutputsOf(int rows) { return rows == 1 ? 6 : rows == 2 ? 3 : rows < 5 ? 2 : 1; }

  using Format::Format;
  static Vector LastOf(const uint8_t*, int64_t) { return Vector{}; }
};

// Writes a row [in], or zeros for none, as one of N that are multiplied at once: every Nth vector is its own. Columns are
// padded with zeros.
template <int N, typename Kernel>
void PackRow(const uint8_t* row, int64_t in, Vector* packed) {
  constexpr int64_t columns = Kernel::kVectors * kLanes;
  const int64_t all = VectorsOf(in);
  if (!row) {
    for (int64_t v = 0; v < all; ++v) packed[v * N] = Vector{};
    return;
  }
  for (int64_t group = 0; group < in / columns; ++group) {
    const Kernel kernel(row, group);
#pragma GCC unroll 4
    for (int v = 0; v < Kernel::kVectors; ++v, packed += N) *packed = kernel.At(v);
  }
  if (Kernel::kMayEnd && in % columns > 0) *packed = Kernel::LastOf(row, in);
}

// Writes N rows [in], zeros for those from `count` on, in the order in which they are multiplied: one vector of each in
// turn.
template <int N, typename Kernel>
void Pack(const uint8_t* rows, int64_t count, int64_t in, Vector* packed) {
  for (int n = 0; n < N; ++n)
    PackRow<N, Kernel>(n < count ? rows + n * Kernel::BytesOf(in) : nullptr, in, packed + n);
}

// As many rows as there are up to N, the group of so many.
template <int N>
void PackGroup(const float* rows, int64_t count, int64_t in, Vector* packed) {
  if constexpr (N > 1) {
    if (count < N) return PackGroup<N - 1>(rows, count, in, packed);
  }
  Pack<N, Numbers<float>>(reinterpret_cast<const uint8_t*>(rows), N, in, packed);
}

// `count` rows in groups of kGroup or fewer.
inline void PackGroups(const float* rows, int64_t count, int64_t in, Vector* packed) {
  for (int64_t first = 0; first < count; first += kGroup)
    PackGroup<kGroup>(rows + first * in, count - first, in, packed + first * VectorsOf(in));
}

// A product of `count` rows, of which there are few, packed by PackGroups.
template <typename Kernel>
struct FewRows {
  const Vector* rows;
  const uint8_t* kernel;
  float* result;
  int64_t count, in, out;

  // Outputs [begin, end) of all rows.
  void Outputs(int64_t begin, int64_t end) const {
    for (int64_t first = 0; first < count; first += kGroup) AtMost<kGroup>(first, begin, end);
  }

 private:
  template <int R>
  void AtMost(int64_t first, int64_t begin, int64_t end) const {
    if constexpr (R > 1) {
      if (count - first < R) return AtMost<R - 1>(first, begin, end);
    }
    constexpr int outputs = Kernel::OutputsOf(R);
    if constexpr (outputs > 1) begin = Block<R, outputs>(first, begin, end);
    Block<R, 1>(first, begin, end);
  }

  // Outputs [begin, end) of R rows, O at a time, as far as there are so many; returns the next. Inlined into its callers
  // this loop runs short of registers.
  template <int R, int O>
  __attribute__((noinline)) int64_t Block(int64_t first, int64_t begin, int64_t end) const {
    constexpr int64_t columns = Kernel::kVectors * kLanes;
    const int64_t groups = in / columns, bytes = Kernel::BytesOf(in);
    int64_t output = begin;
    for (; output + O <= end; output += O) {
      const Vector* values = rows + first * VectorsOf(in);
      const uint8_t* const weights = kernel + output * bytes;
      const uint8_t* next = weights + (O > 1 ? O * bytes : kAhead);
      Vector sums[O][R] = {};
      for (int64_t group = 0; group < groups; ++group, values += R * Kernel::kVectors) {
#pragma GCC unroll 4
        for (int o = 0; o < O; ++o) {
          __builtin_prefetch(next + group * Kernel::BytesOf(columns) + o * bytes);
          const Kernel own(weights + o * bytes, group);
#pragma GCC unroll 4
          for (int v = 0; v < Kernel::kVectors; ++v) {
            const Vector weight = own.At(v);
            for (int r = 0; r < R; ++r) sums[o][r] = MultiplyAdd(weight, values[v * R + r], sums[o][r]);
          }
        }
      }
      if (Kernel::kMayEnd && in % columns > 0) {
        for (int o = 0; o < O; ++o) {
          const Vector weight = Kernel::LastOf(weights + o * bytes, in);
          for (int r = 0; r < R; ++r) sums[o][r] = MultiplyAdd(weight, values[r], sums[o][r]);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int o = 0; o < O; ++o) result[(first + r) * out + output + o] = SumOf(sums[o][r]);
    }
    return output;
  }
};

// A product of many rows, packed by Pack in tiles of kTileRows, of which index[r] says whose results they give.
template <typename Kernel>
struct ManyRows {
  const Vector* rows;
  const int64_t* index;
  const uint8_t* kernel;
  float* result;
  int64_t count, in, out;

  // Outputs [begin, end) of rows [first, last), first a multiple of kTileRows.
  void Outputs(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    const int64_t vectors = VectorsOf(in), panels = Quotient(end - begin, kTileOutputs);
    const int64_t parts = std::max<int64_t>(1, Quotient(vectors, kDepth)), depth = Quotient(vectors, parts);
    Vector* const weights = Scratch(panels * kTileOutputs * vectors + panels * kTilesOfRows * kTile);
    Vector* const sums = weights + panels * kTileOutputs * vectors;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t output = begin + p * kTileOutputs;
      Pack<kTileOutputs, Kernel>(kernel + output * Kernel::BytesOf(in), end - output, in,
                                 weights + p * kTileOutputs * vectors);
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

// rows [count, in], kernel [out, in] -> result [count, out] of many rows. Rows of zeros, as those beyond a prompt's end are,
// give zeros without any work.
template <typename Kernel, typename Threads>
void MultiplyMany(Threads& threads, const float* rows, const uint8_t* kernel, float* result, int64_t count, int64_t in,
                  int64_t out) {
  std::vector<int64_t> index;
  for (int64_t r = 0; r < count; ++r) {
    if (std::any_of(rows + r * in, rows + (r + 1) * in, [](float value) { return value != 0; })) {
      index.push_back(r);
    } else {
      std::fill(result + r * out, result + (r + 1) * out, 0.0f);
    }
  }
  const int64_t live = index.size(), vectors = VectorsOf(in), tiles = Quotient(live, kTileRows);
  Vector* const packed = Scratch<true>(tiles * kTileRows * vectors);
  Share(threads, tiles, [&]() -> Pieces::Worker {
    return [&](int64_t tile) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t at = tile * kTileRows + r;
        const auto* const row = at < live ? reinterpret_cast<const uint8_t*>(rows + index[at] * in) : nullptr;
        PackRow<kTileRows, Numbers<float>>(row, in, packed + tile * kTileRows * vectors + r);
      }
    };
  });
  const int64_t bytes = std::max<int64_t>(1, in * static_cast<int64_t>(sizeof(float)));
  int64_t outputs = std::max<int64_t>(kTileOutputs, kWeights / bytes);
  // As much for every thread, and something for all of them.
  const int64_t workers = std::max<int64_t>(1, threads.num_threads());
  outputs = Quotient(Quotient(out, Quotient(Quotient(out, outputs), workers) * workers), kTileOutputs) * kTileOutputs;
  const int64_t pieces = Quotient(out, outputs);
  const int64_t row_parts = std::clamp<int64_t>(workers / pieces, 1, std::max<int64_t>(1, live / kManyRows));
  const int64_t rows_a_part = Quotient(Quotient(live, row_parts), kTileRows) * kTileRows;
  Share(threads, pieces * row_parts, [&]() -> Pieces::Worker {
    return [&](int64_t piece) {
      const int64_t begin = piece / row_parts * outputs, first = piece % row_parts * rows_a_part;
      ManyRows<Kernel>{packed, index.data(), kernel, result, live, in, out}.Outputs(
          begin, std::min(begin + outputs, out), first, std::min(first + rows_a_part, live));
    };
  });
}

// rows [..., R, in], kernel [..., out, in] as Kernel packs it -> result [..., R, out]. A leading dimension is that of the
// result, or 1 in an operand that all have in common.
template <typename Kernel, typename Threads, typename Dimensions>
void Multiply(Threads& threads, const Dimensions& of_rows, const float* rows, const Dimensions& of_kernel,
              const uint8_t* kernel, const Dimensions& shape, float* result) {
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
    return kernel + (together ? 0 : BlockOf(index, of_kernel, shape, leading)) * out * Kernel::BytesOf(in);
  };
  if (count > kFewRows) {
    for (int64_t index = 0; index < products; ++index)
      MultiplyMany<Kernel>(threads, rows + rows_of(index) * count * in, kernel_of(index), result + index * count * out,
                           count, in, out);
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
      FewRows<Kernel>{packed, kernel_of(index), result + index * count * out, count, in, out}.Outputs(
          begin, std::min(begin + outputs, out));
    };
  });
}

}  // namespace dex_jax

#endif  // DEX_JAX_PRODUCT_H_
