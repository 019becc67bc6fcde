// How kernels [out, in] are kept: as numbers, or in blocks that are taken to pieces on the way. What is here is compiled for
// each format alone (format.cc), when a model needs it.

#ifndef DEX_JAX_FORMAT_H_
#define DEX_JAX_FORMAT_H_

#include <algorithm>
#include <cstdint>
#include <utility>

#include "blocks.h"
#include "vectors.h"

namespace dex_jax {

// Few rows that are multiplied at once.
constexpr int kGroup = 8;
// How far ahead of the weight in use memory is asked for, in bytes.
constexpr int kAhead = 2048;
// Of memory, in bytes.
constexpr int kPage = 4096;
// Outputs of a tile of many rows.
constexpr int kTileOutputs = 4;
// Whether there are 32 vector registers, and not 16.
constexpr bool kManyRegisters = kLanes == 16;

// Kernels. Each says what a row of `in` columns takes in bytes; about how many bytes a group of columns is; how many outputs
// R rows are multiplied with at once, for whose sums there are vector registers; whether it takes rows of so many columns;
// and whether these may end within a group, which LastOf(row, in) gives. Made of a row, the number of a group, and what
// Write has written of it, kNumbers of them, it gives the group's columns, a vector at a time.

template <typename Weight>
struct Numbers {
  static constexpr int kVectors = 1;
  static constexpr int64_t kGroupBytes = kLanes * sizeof(Weight);
  static constexpr bool kMayEnd = true;
  static constexpr bool Takes(int64_t) { return true; }
  static constexpr int64_t BytesOf(int64_t in) { return in * static_cast<int64_t>(sizeof(Weight)); }
  // One or two rows of floats wait for memory, which is read fastest one output after another; else a row's vector is loaded
  // once for all outputs, and sums do not wait for each other.
  static constexpr int OutputsOf(int rows) {
    if (sizeof(Weight) == 4) return rows < 3 ? 1 : kManyRegisters ? 4 : 2;
    if (sizeof(Weight) == 2) return kManyRegisters && rows > 4 ? 4 : 2;
    return kManyRegisters || rows < 3 ? 3 : 2;
  }
  static constexpr int kNumbers = 0;
  const Weight* const from;

  static void Write(const uint8_t*, int64_t, Number*) {}
  Numbers(const uint8_t* row, int64_t group, const Number*) : from(reinterpret_cast<const Weight*>(row) + group * kLanes) {}
  Vector At(int) const { return Load(from); }
  static Vector LastOf(const uint8_t* row, int64_t in) {
    return LoadSome(reinterpret_cast<const Weight*>(row) + in / kLanes * kLanes, in % kLanes);
  }
};

template <typename Format>
struct Blocks : Format {
  static constexpr int kVectors = Format::kGroupColumns / kLanes;
  static constexpr int64_t kGroupBytes = Format::kGroupColumns * Format::kBytes / Format::kColumns;
  static constexpr bool kMayEnd = false;
  static constexpr bool Takes(int64_t in) { return in % Format::kColumns == 0; }
  static constexpr int64_t BytesOf(int64_t in) { return in / Format::kColumns * Format::kBytes; }
  // A row's sums are added up one after another, and wait for each other: those of several outputs fill the time.
  static constexpr int OutputsOf(int rows) {
    if (kManyRegisters) return rows < 5 ? 4 : rows < 7 ? 3 : 2;
    return rows < 3 ? 3 : rows < 5 ? 2 : 1;
  }

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
    Number numbers[Kernel::kNumbers + 1];  // an array cannot be empty
    Kernel::Write(row, group, numbers);
    const Kernel kernel(row, group, numbers);
#pragma GCC unroll 8
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

// A product of `count` rows, of which there are few, packed by PackGroups.
struct FewRows {
  const Vector* rows;
  const uint8_t* kernel;
  float* result;
  int64_t count, in, out;
};

template <typename Kernel>
struct FewRowsOf : FewRows {
  static constexpr int64_t kColumns = Kernel::kVectors * kLanes;

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
    const int64_t groups = in / kColumns, bytes = Kernel::BytesOf(in);
    // Memory is asked for from front to back, but for rows of whole pages, which the CPU itself follows side by side.
    const bool follows = bytes >= kPage;
    const int64_t output_step = follows ? bytes : Kernel::kGroupBytes;
    const int64_t group_step = (follows ? 1 : O) * Kernel::kGroupBytes;
    int64_t output = begin;
    for (; output + O <= end; output += O) {
      const Vector* values = rows + first * VectorsOf(in);
      const uint8_t* const weights = kernel + output * bytes;
      const uint8_t* const next = weights + (O > 1 ? std::max<int64_t>(O * bytes, kAhead) : kAhead);
      Vector sums[O][R] = {};
      for (int64_t group = 0; group < groups; ++group, values += R * Kernel::kVectors) {
        for (int o = 0; o < O; ++o) __builtin_prefetch(next + group * group_step + o * output_step);
        Add<R, O>(weights, bytes, group, values, sums, std::make_integer_sequence<int, O>());
      }
      if (Kernel::kMayEnd && in % kColumns > 0) {
        for (int o = 0; o < O; ++o) {
          const Vector weight = Kernel::LastOf(weights + o * bytes, in);
          for (int r = 0; r < R; ++r) sums[o][r] = MultiplyAdd(weight, values[r], sums[o][r]);
        }
      }
      for (int r = 0; r < R; ++r) {
        float* const to = result + (first + r) * out + output;
        if constexpr (O == 4) {
          const Vector four[] = {sums[0][r], sums[1][r], sums[2][r], sums[3][r]};
          SumsOf(four, to);
        } else {
          for (int o = 0; o < O; ++o) to[o] = SumOf(sums[o][r]);
        }
      }
    }
    return output;
  }

  // A group of columns. A row's vector is loaded once for all outputs.
  template <int R, int O, int... I>
  static __attribute__((always_inline)) void Add(const uint8_t* weights, int64_t bytes, int64_t group,
                                                 const Vector* values, Vector (&sums)[O][R],
                                                 std::integer_sequence<int, I...>) {
    Number numbers[O][Kernel::kNumbers + 1];
    (Kernel::Write(weights + I * bytes, group, numbers[I]), ...);
    const Kernel kernels[O] = {Kernel(weights + I * bytes, group, numbers[I])...};
#pragma GCC unroll 8
    for (int v = 0; v < Kernel::kVectors; ++v) {
      const Vector own[O] = {kernels[I].At(v)...};
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vector value = InRegister(values[v * R + r]);
        ((sums[I][r] = MultiplyAdd(own[I], value, sums[I][r])), ...);
      }
    }
  }
};

// What products know of a format: whether it takes rows of so many columns, and their bytes; how few rows are multiplied
// with outputs [begin, end); and Pack of a tile's outputs.
struct Format {
  bool (*takes)(int64_t in);
  int64_t (*bytes_of)(int64_t in);
  void (*multiply)(const FewRows& rows, int64_t begin, int64_t end);
  void (*pack)(const uint8_t* kernel, int64_t count, int64_t in, Vector* packed);
};

template <typename Kernel>
constexpr Format FormatOf() {
  const auto multiply = [](const FewRows& rows, int64_t begin, int64_t end) {
    FewRowsOf<Kernel>{rows}.Outputs(begin, end);
  };
  return {Kernel::Takes, Kernel::BytesOf, multiply, Pack<kTileOutputs, Kernel>};
}

}  // namespace dex_jax

#endif  // DEX_JAX_FORMAT_H_
