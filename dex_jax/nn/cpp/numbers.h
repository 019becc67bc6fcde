// Kernels [out, in] of numbers, float32 or bfloat16: products of few rows as weights go by, and the packing of rows.

#ifndef DEX_JAX_NUMBERS_H_
#define DEX_JAX_NUMBERS_H_

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace dex_jax {

// Number of few rows that are multiplied at once.
constexpr int kGroup = 8;
// Size of a page of memory in bytes.
constexpr int kPage = 4096;
// Number of outputs in a tile of many rows.
constexpr int kTileOutputs = 4;

// Number of outputs that R rows are multiplied with at once, as far as vector registers hold their sums. One or two rows of
// floats wait for memory, which is read fastest one output after another; else a row's vector is loaded once for all outputs,
// and sums do not wait for each other.
template <typename Weight>
constexpr int OutputsOf(int rows) {
  constexpr bool many_registers = kLanes == 16;
  if (sizeof(Weight) == 4) return rows < 3 ? 1 : many_registers ? 4 : 2;
  return many_registers && rows > 4 ? 4 : 2;
}

// Writes a row [in], or zeros for none, as one of N that are multiplied at once: every Nth vector is its own. Columns are
// padded with zeros.
template <int N, typename Weight>
void PackRow(const Weight* row, int64_t in, Vector* packed) {
  const int64_t whole = in / kLanes;
  for (int64_t v = 0; v < whole; ++v) packed[v * N] = row ? Load(row + v * kLanes) : Vector{};
  if (in % kLanes > 0) packed[whole * N] = row ? LoadSome(row + whole * kLanes, in % kLanes) : Vector{};
}

// Writes N rows [in], zeros for those from `count` on, in the order in which they are multiplied: one vector of each in
// turn.
template <int N, typename Weight>
void Pack(const void* rows, int64_t count, int64_t in, Vector* packed) {
  for (int n = 0; n < N; ++n)
    PackRow<N, Weight>(n < count ? static_cast<const Weight*>(rows) + n * in : nullptr, in, packed + n);
}

// A product of `count` rows, of which there are few, packed by PackGroups.
struct FewRows {
  const Vector* rows;
  const void* kernel;
  float* result;
  int64_t count, in, out;
};

template <typename Weight>
struct FewRowsOf : FewRows {
  // Computes outputs [begin, end) of all rows.
  void Outputs(int64_t begin, int64_t end) const {
    for (int64_t first = 0; first < count; first += kGroup) AtMost<kGroup>(first, begin, end);
  }

 private:
  template <int R>
  void AtMost(int64_t first, int64_t begin, int64_t end) const {
    if constexpr (R > 1) {
      if (count - first < R) return AtMost<R - 1>(first, begin, end);
    }
    constexpr int outputs = OutputsOf<Weight>(R);
    if constexpr (outputs > 1) begin = Block<R, outputs>(first, begin, end);
    Block<R, 1>(first, begin, end);
  }

  // Computes outputs [begin, end) of R rows, O at a time as long as there are O; returns the next output. Inlined into its
  // callers this loop runs short of registers.
  template <int R, int O>
  __attribute__((noinline)) int64_t Block(int64_t first, int64_t begin, int64_t end) const {
    const int64_t whole = in / kLanes;
    // Memory is prefetched from front to back, except for rows of whole pages, which the CPU itself follows side by side.
    const bool follows = in * static_cast<int64_t>(sizeof(Weight)) >= kPage;
    const int64_t output_step = follows ? in : kLanes, vector_step = (follows ? 1 : O) * kLanes;
    const int64_t ahead = kAhead / static_cast<int64_t>(sizeof(Weight));
    int64_t output = begin;
    for (; output + O <= end; output += O) {
      const Vector* values = rows + first * VectorsOf(in);
      const Weight* const weights = static_cast<const Weight*>(kernel) + output * in;
      const Weight* const next = weights + (O > 1 ? std::max<int64_t>(O * in, ahead) : ahead);
      Vector sums[O][R] = {};
      for (int64_t v = 0; v < whole; ++v, values += R) {
        for (int o = 0; o < O; ++o) __builtin_prefetch(next + v * vector_step + o * output_step);
        Vector own[O];
        for (int o = 0; o < O; ++o) own[o] = Load(weights + o * in + v * kLanes);
        // A row's vector is loaded once for all outputs.
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vector value = InRegister(values[r]);
          for (int o = 0; o < O; ++o) sums[o][r] = MultiplyAdd(own[o], value, sums[o][r]);
        }
      }
      if (in % kLanes > 0) {
        for (int o = 0; o < O; ++o) {
          const Vector weight = LoadSome(weights + o * in + whole * kLanes, in % kLanes);
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
};

}  // namespace dex_jax

#endif  // DEX_JAX_NUMBERS_H_
