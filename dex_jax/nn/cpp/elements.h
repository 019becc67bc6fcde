// Operations on rows number by number: heads are rotated by their positions, and mlps gated.

#ifndef DEX_JAX_ELEMENTS_H_
#define DEX_JAX_ELEMENTS_H_

#include <algorithm>
#include <cstring>

#include "exponential.h"
#include "share.h"
#include "vectors.h"

namespace dex_jax {

// Number of elements that are work enough to wake another thread for.
constexpr int64_t kElements = 1 << 14;

// Does `work` with rows 0..count-1 of `width` numbers each, on all threads.
template <typename Threads, typename Work>
void EachRow(const Threads& threads, int64_t count, int64_t width, const Work& work) {
  const int64_t some = std::max<int64_t>(1, kElements / std::max<int64_t>(1, width));
  const auto part = [&](int64_t piece) {
    for (int64_t r = piece * some; r < std::min(count, (piece + 1) * some); ++r) work(r);
  };
  Share(threads, Quotient(count, some), [&]() -> Pieces::Worker { return part; });
}

// Rotates the pairs (i, i + half) of a head by their angles; what is behind them stays.
inline void TurnHead(const float* __restrict head, const float* __restrict cos, const float* __restrict sin,
                     int64_t half, int64_t width, float* __restrict turned) {
  for (int64_t i = 0; i < half; ++i) {
    const float left = head[i], right = head[i + half];
    turned[i] = left * cos[i] - right * sin[i];
    turned[i + half] = right * cos[i] + left * sin[i];
  }
  std::copy(head + 2 * half, head + width, turned + 2 * half);
}

// Heads side by side [..., R, (H + 2 G) d], cosines and sines [..., R, half] -> queries [..., R, H, d], keys and values
// [..., G, R, d]; queries and keys are rotated. Leading dimensions are those of Multiply.
template <typename Threads, typename Dimensions>
void Turn(const Threads& threads, const Dimensions& of_heads, const float* heads, const Dimensions& of_angles,
          const float* cos, const float* sin, const Dimensions& of_queries, const Dimensions& of_keys, float* queries,
          float* keys, float* values) {
  const size_t leading = of_heads.size() - 2;
  const int64_t rows = of_heads[leading], all = of_heads[leading + 1], half = of_angles[leading + 1];
  const int64_t asking = of_queries[leading + 1], width = of_queries[leading + 2], groups = of_keys[leading];
  EachRow(threads, SizeOf(of_queries, 0, leading) * rows, all, [=, &of_heads, &of_angles, &of_queries](int64_t r) {
    const int64_t index = r / rows, within = r % rows;
    const float* from = heads + (BlockOf(index, of_heads, of_queries, leading) * rows + within) * all;
    const int64_t angle = (BlockOf(index, of_angles, of_queries, leading) * rows + within) * half;
    for (int64_t h = 0; h < asking; ++h, from += width)
      TurnHead(from, cos + angle, sin + angle, half, width, queries + (r * asking + h) * width);
    const auto place = [=](int64_t g) { return ((index * groups + g) * rows + within) * width; };
    for (int64_t g = 0; g < groups; ++g, from += width)
      TurnHead(from, cos + angle, sin + angle, half, width, keys + place(g));
    for (int64_t g = 0; g < groups; ++g, from += width) std::copy(from, from + width, values + place(g));
  });
}

// x / (1 + e^-x) of each lane.
inline Vector Silu(Vector x) {
  const Integers negative = x < 0.0f;
  const Vector power = Exponential(negative ? x : -x);
  return (negative ? x * power : x) / (1.0f + power);
}

// x times about the share of a normal distribution below x, by a hyperbolic tangent.
inline Vector Gelu(Vector x) {
  return 0.5f * x * (1.0f + Capped(0.797884561f * (x + 0.044715f * x * x * x), 1));
}

// A gate's numbers and then as many others, [count, 2 width] -> their products [count, width], with the gate activated.
template <typename Threads>
void Gate(const Threads& threads, const float* rows, int64_t count, int64_t width, Vector (*activate)(Vector),
          float* gated) {
  EachRow(threads, count, 2 * width, [=](int64_t r) {
    const float* const gate = rows + r * 2 * width;
    float* const to = gated + r * width;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      const Vector product = activate(Load(gate + i)) * Load(gate + width + i);
      std::memcpy(to + i, &product, sizeof(product));
    }
    if (i == width) return;
    const Vector product = activate(LoadSome(gate + i, width - i)) * LoadSome(gate + width + i, width - i);
    std::memcpy(to + i, &product, (width - i) * sizeof(float));
  });
}

}  // namespace dex_jax

#endif  // DEX_JAX_ELEMENTS_H_
