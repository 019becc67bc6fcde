// Grouped-query attention that reads only keys some row sees, and keeps scores in the caches.

#ifndef DEX_JAX_ATTENTION_H_
#define DEX_JAX_ATTENTION_H_

#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "exponential.h"
#include "product.h"
#include "share.h"
#include "vectors.h"

namespace dex_jax {

// The most queries that one piece of attention is done for; a multiple of kTileRows.
constexpr int kQueries = 12;
static_assert(kQueries % kTileRows == 0);
// Number of bytes of keys, or of values, that stay in a core's first cache while all of a piece's queries go by.
constexpr int64_t kBlock = 16 << 10;

// Keys and values [S, d] of one group, and the keys that each row sees: mask [R, S], or [1, S] for all rows.
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
      const void* const seen = begin > 0 ? std::memchr(own, true, begin) : nullptr;  // an empty mask may be null
      const int64_t low = seen ? static_cast<const bool*>(seen) - own : begin;
      int64_t high = length;
      for (uint64_t eight = 0; high - 8 >= end && eight == 0;) {
        std::memcpy(&eight, own + high - 8, sizeof(eight));
        if (eight == 0) high -= 8;
      }
      while (high > end && !own[high - 1]) --high;
      begin = std::min(begin, low);
      end = std::max(end, high);
    }
    first = std::min(begin, end);
    last = end;
  }
};

// Scores of R queries, packed by Pack, with keys [begin, end) of a source; those of query r begin at scores + r * step.
template <int R, typename Cached>
void Score(const Vector* queries, int64_t vectors, const Cached* all_keys, int64_t begin, int64_t end, float* scores,
           int64_t step) {
  const int64_t width = vectors * kLanes;
  for (int64_t s = begin; s < end; s += kTileOutputs) {
    const int64_t here = std::min<int64_t>(kTileOutputs, end - s);
    const Cached* keys[kTileOutputs];
    for (int64_t k = 0; k < kTileOutputs; ++k) keys[k] = all_keys + (s + std::min(k, here - 1)) * width;
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
      float* const to = scores + r * step + s - begin;
      if (here == kTileOutputs) {
        SumsOf(sums[r], to);
        continue;
      }
      float four[kTileOutputs];
      SumsOf(sums[r], four);
      std::copy(four, four + here, to);
    }
  }
}

// Adds `count` values, V vectors of each, by the weights of R queries, to their results.
template <int R, int V, typename Cached>
void Mix(const float* weights, int64_t step, const Cached* value, int64_t count, int64_t width, float* const* results) {
  Vector sums[R][V];
  for (int r = 0; r < R; ++r) std::memcpy(sums[r], results[r], sizeof(sums[r]));
  for (int64_t s = 0; s < count; s += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, count - s);
    Integers none = {};
    for (int r = 0; r < R && here == kLanes; ++r) none |= Load(weights + r * step + s) == 0.0f;
    if (here == kLanes && !AnyOf(none)) {
      for (int64_t i = s; i < s + kLanes; ++i, value += width) {
        Vector weight[R];
        for (int r = 0; r < R; ++r) weight[r] = InRegister(Vector{} + weights[r * step + i]);
        for (int v = 0; v < V; ++v) {
          const Vector one = InRegister(Load(value + v * kLanes));
          for (int r = 0; r < R; ++r) sums[r][v] = MultiplyAdd(weight[r], one, sums[r][v]);
        }
      }
      continue;
    }
    // Values that a query does not see may be NaN.
    for (int64_t i = s; i < s + here; ++i, value += width) {
      for (int r = 0; r < R; ++r) {
        if (weights[r * step + i] == 0) continue;
        const Vector weight = Vector{} + weights[r * step + i];
        for (int v = 0; v < V; ++v) sums[r][v] = MultiplyAdd(weight, Load(value + v * kLanes), sums[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r) std::memcpy(results[r], sums[r], sizeof(sums[r]));
}

// Attention of `count` queries [d] of one group, up to kQueries, over all sources. Query q is one of row rows[q]. Scores
// are capped, unless cap is 0.
template <typename Cached>
class Attention {
 public:
  Attention(const float* const* queries, const int64_t* rows, float* const* results, int count, int64_t width, float cap,
            std::vector<Source<Cached>>& sources)
      : queries_(queries), rows_(rows), results_(results), count_(count), width_(width), cap_(cap), sources_(sources) {
    for (Source<Cached>& source : sources_) {
      source.Narrow(rows, count);
      length_ += source.last - source.first;
    }
    const int64_t vectors = width / kLanes;
    step_ = VectorsOf(length_) * kLanes;
    packed_ = Scratch(count * (vectors + step_ / kLanes));
    scores_ = reinterpret_cast<float*>(packed_ + count * vectors);
    for (int first = 0; first < count; first += kTileRows) AtMost<kTileRows>(first, [&](auto r) { Pack<r>(first); });
    EachBlock([&](const Source<Cached>& source, int64_t begin, int64_t end, int64_t at) {
      for (int first = 0; first < count; first += kTileRows) {
        AtMost<kTileRows>(first, [&](auto r) {
          Score<r>(packed_ + first * vectors, vectors, source.keys, begin, end, scores_ + first * step_ + at, step_);
        });
      }
    });
    bool sees[kQueries];
    for (int q = 0; q < count; ++q) {
      sees[q] = Weigh(scores_ + q * step_, rows[q]);
      std::fill(results[q], results[q] + width, 0.0f);
    }
    EachBlock([&](const Source<Cached>& source, int64_t begin, int64_t end, int64_t at) {
      for (int first = 0; first < count; first += kTileRows) {
        AtMost<kTileRows>(first, [&](auto r) {
          MixAll<r>(first, source.values + begin * width, end - begin, scores_ + first * step_ + at);
        });
      }
    });
    for (int q = 0; q < count; ++q) {
      const float factor = sees[q] ? 1 / totals_[q] : 0;
      for (int64_t i = 0; i < width; ++i) results[q][i] *= factor;
    }
  }

 private:
  // Does `work` with the number of queries from `first` on that make a tile, a constant of the compiler.
  template <int R, typename Work>
  void AtMost(int first, const Work& work) {
    if constexpr (R > 1) {
      if (count_ - first < R) return AtMost<R - 1>(first, work);
    }
    work(std::integral_constant<int, R>());
  }

  // Does `work` with each block of keys that the piece sees, and the place of its scores.
  template <typename Work>
  void EachBlock(const Work& work) const {
    const int64_t block = std::max<int64_t>(1, kBlock / (width_ * static_cast<int64_t>(sizeof(Cached))));
    int64_t at = 0;
    for (const Source<Cached>& source : sources_) {
      for (int64_t begin = source.first; begin < source.last; begin += block) {
        const int64_t end = std::min(begin + block, source.last);
        work(source, begin, end, at);
        at += end - begin;
      }
    }
  }

  template <int R>
  void Pack(int first) {
    const int64_t vectors = width_ / kLanes;
    const float factor = 1 / std::sqrt(static_cast<float>(width_));
    for (int64_t v = 0; v < vectors; ++v)
      for (int r = 0; r < R; ++r)
        packed_[first * vectors + v * R + r] = Load(queries_[first + r] + v * kLanes) * factor;
  }

  template <int R>
  void MixAll(int first, const Cached* values, int64_t count, const float* weights) {
    constexpr int kMost = R == 1 ? 8 : 4;  // sums that are in registers, and enough of them to wait for none
    const int64_t vectors = width_ / kLanes;
    for (int64_t s = 0; s < count; ++s)
      for (int r = 0; r < R; ++r) totals_[first + r] += weights[r * step_ + s];
    int64_t v = 0;
    const auto mix = [&](auto most) {
      for (; v + most <= vectors; v += most) {
        float* results[R];
        for (int r = 0; r < R; ++r) results[r] = results_[first + r] + v * kLanes;
        Mix<R, most>(weights, step_, values + v * kLanes, count, width_, results);
      }
    };
    mix(std::integral_constant<int, kMost>());
    mix(std::integral_constant<int, 1>());
  }

  // Turns a query's scores into weights, 0 for keys that its row does not see; returns whether it sees any.
  bool Weigh(float* scores, int64_t row) const {
    for (int64_t s = 0; s < step_ && cap_ > 0; s += kLanes) {
      const Vector capped = Capped(Load(scores + s), cap_);
      std::memcpy(scores + s, &capped, sizeof(capped));
    }
    std::fill(scores + length_, scores + step_, -INFINITY);
    float* own = scores;
    bool sees = false;
    for (const Source<Cached>& source : sources_) {
      const bool* const mask = source.mask + row * source.mask_step + source.first;
      const int64_t here = source.last - source.first;
      if (here == 0) continue;  // and its mask may be null
      sees |= std::memchr(mask, true, here) != nullptr;
      // Most rows see all that there is up to themselves.
      const void* const unseen = std::memchr(mask, false, here);
      for (int64_t s = unseen ? static_cast<const bool*>(unseen) - mask : here; s < here; ++s)
        if (!mask[s]) own[s] = -INFINITY;
      own += here;
    }
    if (!sees) {
      std::fill(scores, scores + step_, 0.0f);
      return false;
    }
    Vector most = Vector{} - INFINITY;
    for (int64_t s = 0; s < step_; s += kLanes) most = most < Load(scores + s) ? Load(scores + s) : most;
    float largest = -INFINITY;
    for (int lane = 0; lane < kLanes; ++lane) largest = std::max(largest, most[lane]);
    for (int64_t s = 0; s < step_; s += kLanes) {
      const Vector weights = Exponential(Load(scores + s) - largest);
      std::memcpy(scores + s, &weights, sizeof(weights));
    }
    return true;
  }

  const float* const* queries_;
  const int64_t* rows_;
  float* const* results_;
  const int count_;
  const int64_t width_;
  const float cap_;
  std::vector<Source<Cached>>& sources_;
  Vector* packed_;
  float* scores_;
  float totals_[kQueries] = {};
  int64_t length_ = 0, step_;
};

// The operands of attention for one source: arrays as in kernels.cc.
template <typename Dimensions>
struct Operand {
  const void* keys;
  const void* values;
  const bool* mask;
  Dimensions of_keys, of_values, of_mask;
};

// queries [..., R, H, d]; for each source keys and values [..., G, S, d] and mask [..., R or 1, S] -> [..., R, H, d].
template <typename Cached, typename Threads, typename Dimensions>
void AttendAll(const Threads& threads, const Dimensions& of_queries, const float* queries,
               const std::vector<Operand<Dimensions>>& operands, const Dimensions& shape, float cap, float* result) {
  const size_t leading = shape.size() - 3;
  const int64_t rows = shape[leading], heads = shape[leading + 1], width = shape[leading + 2];
  const int64_t groups = operands[0].of_keys[leading];
  if (SizeOf(shape, 0, shape.size()) == 0) return;
  const int64_t of_group = heads / groups, count = rows * of_group;
  // A piece has so many of a group's queries that threads end together, and at least three if that leaves a piece for each
  // thread: three take little longer than one.
  const int64_t all = SizeOf(shape, 0, leading) * groups * count, each = all / std::max<int64_t>(1, threads.num_threads());
  const int64_t some = std::min(count, std::clamp<int64_t>(each / 6, std::clamp<int64_t>(each, 1, 3), kQueries));
  const int64_t parts = Quotient(count, some);
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
    Attention<Cached>(inputs, row, outputs, here, width, cap, sources);
  };
  Share(threads, SizeOf(shape, 0, leading) * groups * parts, [&]() -> Pieces::Worker { return attend_part; });
}

}  // namespace dex_jax

#endif  // DEX_JAX_ATTENTION_H_
