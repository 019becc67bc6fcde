// Grouped-query attention that reads only keys some row sees, and keeps scores in the caches.

#ifndef DEX_JAX_ATTENTION_H_
#define DEX_JAX_ATTENTION_H_

#include <cmath>
#include <vector>

#include "product.h"
#include "share.h"
#include "vectors.h"

namespace dex_jax {

// Queries that one piece of attention is done for, at most; a multiple of kTileRows.
constexpr int kQueries = 12;
static_assert(kQueries % kTileRows == 0);

// e to each of a vector's lanes, to about 1e-7 of it, for lanes up to 0; 0 where nothing of it is left in float32.
inline Vector Exponential(Vector x) {
  typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));
  const Integers gone = x < -87.0f;  // Not so a NaN, which stays one.
  x = x < -87.0f ? Vector{} - 87.0f : x;
  // x = n ln 2 + rest: adding and taking away 1.5 * 2^23 rounds to a whole number.
  const Vector shifted = x * 1.44269504f + 12582912.0f;
  const Vector n = shifted - 12582912.0f;
  const Vector rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // The series of e^rest, |rest| <= ln 2 / 2, whose next term is below 1e-8.
  Vector power = Vector{} + 1.0f / 5040;
  power = power * rest + 1.0f / 720;
  power = power * rest + 1.0f / 120;
  power = power * rest + 1.0f / 24;
  power = power * rest + 1.0f / 6;
  power = power * rest + 0.5f;
  power = power * rest + 1.0f;
  power = power * rest + 1.0f;
  // A NaN has no whole number: the sum's last bits are one in any case.
  Integers bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = ((bits - 0x4b400000 + 127) << 23) & ~gone;
  Vector scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return power * scale;
}

// Keys and values [S, d] of one group, and which keys each row sees: mask [R, S], or [1, S] for all rows.
template <typename Cached>
struct Source {
  const Cached* keys;
  const Cached* values;
  const bool* mask;
  int64_t length, mask_step;
  // Keys that any row of a piece sees lie in [first, last).
  int64_t first, last;

  void Narrow(const int64_t* rows, int count) {
    int64_t begin = length, end = 0;
    for (int q = 0; q < count; ++q) {
      if (q > 0 && (mask_step == 0 || rows[q] == rows[q - 1])) continue;
      const bool* const own = mask + rows[q] * mask_step;
      int64_t low = 0, high = length;
      while (low < begin && !own[low]) ++low;
      while (high > end && !own[high - 1]) --high;
      begin = std::min(begin, low);
      end = std::max(end, high);
    }
    first = std::min(begin, end);
    last = end;
  }
};

// Scores of R queries, packed by Pack, with the keys that a piece sees of a source; those of query r begin at
// scores + r * step.
template <int R, typename Cached>
void Score(const Vector* queries, int64_t vectors, const Source<Cached>& source, float* scores, int64_t step) {
  const int64_t width = vectors * kLanes;
  for (int64_t s = source.first; s < source.last; s += kTileOutputs) {
    const int64_t here = std::min<int64_t>(kTileOutputs, source.last - s);
    const Cached* keys[kTileOutputs];
    for (int64_t k = 0; k < kTileOutputs; ++k) keys[k] = source.keys + (s + std::min(k, here - 1)) * width;
    Vector sums[R][kTileOutputs] = {};
    for (int64_t v = 0; v < vectors; ++v) {
      Vector query[R];
      for (int r = 0; r < R; ++r) query[r] = InRegister(queries[v * R + r]);
      for (int k = 0; k < kTileOutputs; ++k) {
        const Vector key = InRegister(Load(keys[k] + v * kLanes));
        for (int r = 0; r < R; ++r) sums[r][k] = MultiplyAdd(key, query[r], sums[r][k]);
      }
    }
    for (int r = 0; r < R; ++r) {
      float four[kTileOutputs];
      SumsOf(sums[r], four);
      std::copy(four, four + here, scores + r * step + s - source.first);
    }
  }
}

// Adds up values, V vectors of each from `first` on, by the weights of R queries, whose results and totals are set.
template <int R, int V, typename Cached>
void Mix(const float* weights, int64_t step, int64_t first, int64_t width, const std::vector<Source<Cached>>& sources,
         float* const* results, float* totals) {
  Vector sums[R][V] = {};
  float total[R] = {};
  for (const Source<Cached>& source : sources) {
    const Cached* value = source.values + source.first * width + first * kLanes;
    for (int64_t s = source.first; s < source.last; ++s, ++weights, value += width) {
      bool all = true;
      for (int r = 0; r < R; ++r) all &= weights[r * step] != 0;
      if (all) {
        Vector weight[R];
        for (int r = 0; r < R; ++r) {
          total[r] += weights[r * step];
          weight[r] = InRegister(Vector{} + weights[r * step]);
        }
        for (int v = 0; v < V; ++v) {
          const Vector here = InRegister(Load(value + v * kLanes));
          for (int r = 0; r < R; ++r) sums[r][v] = MultiplyAdd(weight[r], here, sums[r][v]);
        }
        continue;
      }
      // What a query does not see may be no number.
      for (int r = 0; r < R; ++r) {
        if (weights[r * step] == 0) continue;
        total[r] += weights[r * step];
        const Vector weight = Vector{} + weights[r * step];
        for (int v = 0; v < V; ++v) sums[r][v] = MultiplyAdd(weight, Load(value + v * kLanes), sums[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    std::memcpy(results[r] + first * kLanes, sums[r], sizeof(sums[r]));
    totals[r] = total[r];
  }
}

// Attention of `count` queries [d] of one group, up to kQueries, over all sources. Query q is one of row rows[q].
template <typename Cached>
class Attention {
 public:
  Attention(const float* const* queries, const int64_t* rows, float* const* results, int count, int64_t width,
            std::vector<Source<Cached>>& sources)
      : queries_(queries), rows_(rows), results_(results), count_(count), width_(width), sources_(sources) {
    int64_t length = 0;
    for (Source<Cached>& source : sources_) {
      source.Narrow(rows, count);
      length += source.last - source.first;
    }
    step_ = VectorsOf(length) * kLanes;
    packed_ = Scratch(kTileRows * width / kLanes + kTileRows * (step_ / kLanes));
    scores_ = reinterpret_cast<float*>(packed_ + kTileRows * width / kLanes);
    length_ = length;
    for (int first = 0; first < count; first += kTileRows) AtMost<kTileRows>(first);
  }

 private:
  template <int R>
  void AtMost(int first) {
    if constexpr (R > 1) {
      if (count_ - first < R) return AtMost<R - 1>(first);
    }
    Tile<R>(first);
  }

  template <int R>
  void Tile(int first) {
    const int64_t vectors = width_ / kLanes;
    for (int64_t v = 0; v < vectors; ++v)
      for (int r = 0; r < R; ++r)
        packed_[v * R + r] = Load(queries_[first + r] + v * kLanes) * (1 / std::sqrt(static_cast<float>(width_)));
    int64_t at = 0;
    for (const Source<Cached>& source : sources_) {
      Score<R>(packed_, vectors, source, scores_ + at, step_);
      at += source.last - source.first;
    }
    bool sees[R];
    for (int r = 0; r < R; ++r) sees[r] = Weigh(scores_ + r * step_, rows_[first + r]);
    float totals[R] = {};
    constexpr int kMost = R == 1 ? 8 : 4;  // sums that are in registers, and enough of them to wait for none
    int64_t v = 0;
    for (; v + kMost <= vectors; v += kMost)
      Mix<R, kMost>(scores_, step_, v, width_, sources_, results_ + first, totals);
    for (; v < vectors; ++v) Mix<R, 1>(scores_, step_, v, width_, sources_, results_ + first, totals);
    for (int r = 0; r < R; ++r) {
      const float factor = sees[r] ? 1 / totals[r] : 0;
      for (int64_t i = 0; i < width_; ++i) results_[first + r][i] *= factor;
    }
  }

  // Turns a query's scores into weights, 0 for keys that its row does not see; whether it sees any.
  bool Weigh(float* scores, int64_t row) const {
    std::fill(scores + length_, scores + step_, -INFINITY);
    float* own = scores;
    bool sees = false;
    for (const Source<Cached>& source : sources_) {
      const bool* const mask = source.mask + row * source.mask_step;
      for (int64_t s = source.first; s < source.last; ++s, ++own) {
        *own = mask[s] ? *own : -INFINITY;
        sees |= mask[s];
      }
    }
    if (!sees) {
      std::fill(scores, scores + step_, 0.0f);
      return false;
    }
    Vector lanes = Vector{} - INFINITY;
    for (int64_t s = 0; s < step_; s += kLanes) lanes = lanes < Load(scores + s) ? Load(scores + s) : lanes;
    float most = -INFINITY;
    for (int lane = 0; lane < kLanes; ++lane) most = std::max(most, lanes[lane]);
    for (int64_t s = 0; s < step_; s += kLanes) {
      const Vector weights = Exponential(Load(scores + s) - most);
      std::memcpy(scores + s, &weights, sizeof(weights));
    }
    return true;
  }

  const float* const* queries_;
  const int64_t* rows_;
  float* const* results_;
  const int count_;
  const int64_t width_;
  std::vector<Source<Cached>>& sources_;
  Vector* packed_;
  float* scores_;
  int64_t length_, step_;
};

// What attention is given of one source: arrays as in FewRowsAttention.
template <typename Dimensions>
struct Operand {
  const void* keys;
  const void* values;
  const bool* mask;
  Dimensions of_keys, of_values, of_mask;
};

// queries [..., R, H, d], of each source keys and values [..., G, S, d] and mask [..., R or 1, S] -> [..., R, H, d].
template <typename Cached, typename Threads, typename Dimensions>
void AttendAll(Threads& threads, const Dimensions& of_queries, const float* queries,
               const std::vector<Operand<Dimensions>>& operands, const Dimensions& shape, float* result) {
  const size_t leading = shape.size() - 3;
  const int64_t rows = shape[leading], heads = shape[leading + 1], width = shape[leading + 2];
  const int64_t groups = operands[0].of_keys[leading];
  if (SizeOf(shape, 0, shape.size()) == 0) return;
  const int64_t of_group = heads / groups, count = rows * of_group;
  // Of each group's queries so many at a time that there is something to do for several threads.
  const int64_t some = std::clamp<int64_t>(count / 4, 1, kQueries), parts = Quotient(count, some);
  const auto attend_part = [&](int64_t piece) {
    const int64_t index = piece / (groups * parts), group = piece / parts % groups, first = piece % parts * some;
    std::vector<Source<Cached>> sources;
    for (const Operand<Dimensions>& operand : operands) {
      const int64_t length = operand.of_keys[leading + 1], masks = operand.of_mask[leading];
      const auto cached = [&](const void* array, const Dimensions& of_array) {
        const int64_t block = BlockOf(index, of_array, shape, leading);
        return static_cast<const Cached*>(array) + (block * groups + group) * length * width;
      };
      sources.push_back({cached(operand.keys, operand.of_keys), cached(operand.values, operand.of_values),
                         operand.mask + BlockOf(index, operand.of_mask, shape, leading) * masks * length, length,
                         masks > 1 ? length : 0, 0, length});
    }
    const float* const own_queries = queries + BlockOf(index, of_queries, shape, leading) * rows * heads * width;
    const float* inputs[kQueries];
    float* outputs[kQueries];
    int64_t row[kQueries];
    const int here = static_cast<int>(std::min(some, count - first));
    for (int q = 0; q < here; ++q) {
      row[q] = (first + q) / of_group;
      const int64_t at = (row[q] * heads + group * of_group + (first + q) % of_group) * width;
      inputs[q] = own_queries + at;
      outputs[q] = result + index * rows * heads * width + at;
    }
    Attention<Cached>(inputs, row, outputs, here, width, sources);
  };
  Share(threads, SizeOf(shape, 0, leading) * groups * parts, [&]() -> Pieces::Worker { return attend_part; });
}

}  // namespace dex_jax

#endif  // DEX_JAX_ATTENTION_H_
