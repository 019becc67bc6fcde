// What decoding does with few rows on a CPU, in float32: their norms, their products with large kernels, and their
// attention. Kernels and caches may be kept in bfloat16.
//
// A product, result[r, o] = sum over i of rows[r, i] * kernel[o, i], reads every weight for a handful of rows. For
// more rows than one XLA first lays the kernel out anew, which takes about as long as reading it. Here a weight is
// loaded once and multiplied with all rows while it is in a register, and the kernel is read from front to back.
//
// Attention reads only keys that some row sees, where XLA computes with the whole cache, and keeps scores in the
// caches.
//
// What comes out for a row does not depend on the rows beside it, nor on how many threads work: sums are added up in
// one order.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float))));

// Rows that are multiplied at once, and outputs: there are vector registers for the sums of all pairs of them. A row's
// vector is loaded once for all outputs, which further rows would otherwise wait for.
constexpr int kGroup = 8;
#if defined(__AVX512F__)
constexpr int kOutputs = 3;
#else
constexpr int kOutputs = 1;
#endif
// Up to so many rows are multiplied with one output after another.
constexpr int kFew = 4;
// What a thread takes at a time, in bytes of the kernel.
constexpr int64_t kPiece = 1 << 16;
// How far ahead of the weight in use memory is asked for, in bytes.
constexpr int kAhead = 2048;
// Of a cache, in bytes.
constexpr int kLine = 64;
// Vectors of values that attention adds up at once.
constexpr int kMixed = 8;
// Queries that one piece of attention is done for.
constexpr int kQueries = 4;

// a * b + c. A compiler that may choose rounds once here and twice there, and a row would come out differently beside
// others; so it is told.
inline Vector MultiplyAdd(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_FEATURE_FMA)
  for (int lane = 0; lane < kLanes; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return c;
#else
  return a * b + c;
#endif
}

// This thread's own memory for `count` vectors, until it asks again. It begins with a cache line: to load a vector that
// lies across two takes twice as long. No other core reads it: what one has read is slow to write to.
Vector* Scratch(int64_t count) {
  thread_local std::vector<char> memory;
  if (memory.size() < count * sizeof(Vector) + kLine) memory.resize(count * sizeof(Vector) + kLine);
  return reinterpret_cast<Vector*>((reinterpret_cast<uintptr_t>(memory.data()) + kLine - 1) / kLine * kLine);
}

inline Vector Load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

// A bfloat16 is the first half of a float32.
using BFloat16 = uint16_t;

inline Vector Load(const BFloat16* from) {
  typedef BFloat16 Halves __attribute__((vector_size(kLanes * sizeof(BFloat16)), aligned(sizeof(BFloat16))));
  typedef uint32_t Integers __attribute__((vector_size(kLanes * sizeof(uint32_t))));
  return reinterpret_cast<Vector>(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Integers) << 16);
}

// The first `count` of a vector, then zeros.
template <typename Weight>
Vector LoadSome(const Weight* from, int64_t count) {
  Weight lanes[kLanes] = {};
  std::memcpy(lanes, from, count * sizeof(Weight));
  return Load(lanes);
}

int64_t VectorsOf(int64_t columns) { return (columns + kLanes - 1) / kLanes; }

// Writes rows [count, in] in the order in which they are multiplied: by groups of kGroup or fewer, and within a group
// one vector of each row in turn. Columns are padded with zeros.
void Pack(const float* rows, int64_t count, int64_t in, Vector* packed) {
  const int64_t whole = in / kLanes, rest = in % kLanes;
  for (int64_t first = 0; first < count; first += kGroup) {
    const int64_t end = std::min(first + kGroup, count);
    for (int64_t v = 0; v < whole; ++v)
      for (int64_t r = first; r < end; ++r) *packed++ = Load(rows + r * in + v * kLanes);
    for (int64_t r = first; rest > 0 && r < end; ++r) *packed++ = LoadSome(rows + r * in + whole * kLanes, rest);
  }
}

// The sum of N lanes, halves first.
template <int N>
float SumOf(const float* lanes) {
  typedef float Half __attribute__((vector_size(N / 2 * sizeof(float)), aligned(sizeof(float))));
  if constexpr (N == 2) {
    return lanes[0] + lanes[1];
  } else {
    const Half sum = *reinterpret_cast<const Half*>(lanes) + *reinterpret_cast<const Half*>(lanes + N / 2);
    return SumOf<N / 2>(reinterpret_cast<const float*>(&sum));
  }
}

inline float SumOf(const Vector& vector) { return SumOf<kLanes>(reinterpret_cast<const float*>(&vector)); }

// A product of `count` packed rows with one kernel [out, in].
template <typename Weight>
struct Product {
  const Vector* rows;
  const Weight* kernel;
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
    // A few rows wait for memory, which a single stream reads fastest.
    if constexpr (R > kFew && kOutputs > 1) begin = Blocks<R, kOutputs>(first, begin, end);
    Blocks<R, 1>(first, begin, end);
  }

  // Outputs [begin, end) of R rows, O at a time, as far as there are so many; returns the next. Inlined into its callers
  // this loop runs short of registers.
  template <int R, int O>
  __attribute__((noinline)) int64_t Blocks(int64_t first, int64_t begin, int64_t end) const {
    const int64_t whole = in / kLanes, rest = in % kLanes, ahead = O > 1 ? O * in : kAhead / sizeof(Weight);
    int64_t output = begin;
    for (; output + O <= end; output += O) {
      const Vector* values = rows + first * VectorsOf(in);
      const Weight* weights = kernel + output * in;
      const Weight* next = weights + ahead;
      Vector sums[O][R] = {};
      for (int64_t v = 0; v < whole; ++v, values += R, weights += kLanes) {
        for (int o = 0; o < O; ++o, next += kLanes) __builtin_prefetch(next);
        for (int o = 0; o < O; ++o) {
          const Vector weight = Load(weights + o * in);
          for (int r = 0; r < R; ++r) sums[o][r] = MultiplyAdd(weight, values[r], sums[o][r]);
        }
      }
      if (rest > 0) {
        for (int o = 0; o < O; ++o) {
          const Vector weight = LoadSome(weights + o * in, rest);
          for (int r = 0; r < R; ++r) sums[o][r] = MultiplyAdd(weight, values[r], sums[o][r]);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int o = 0; o < O; ++o) result[(first + r) * out + output + o] = SumOf(sums[o][r]);
    }
    return output;
  }
};

// Pieces of work that whoever is free takes. The caller works too, and then waits only for pieces that somebody is at
// work on: it cannot wait for a thread that never comes.
class Pieces {
 public:
  using Worker = std::function<void(int64_t)>;

  Pieces(int64_t count, std::function<Worker()> begin) : count_(count), begin_(std::move(begin)) {}

  void Work() {
    int64_t piece = next_.fetch_add(1);
    if (piece >= count_) return;
    for (const Worker work = begin_(); piece < count_; piece = next_.fetch_add(1)) {
      work(piece);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void Wait() const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < count_; ++spins)
      if (spins > 1000) std::this_thread::yield();
  }

 private:
  const int64_t count_;
  const std::function<Worker()> begin_;
  std::atomic<int64_t> next_{0}, done_{0};
};

// Does pieces 0..count-1 on all threads, each with a worker of its own that begin() gives.
template <typename Begin>
void Share(ffi::ThreadPool& threads, int64_t count, const Begin& begin) {
  // A helper that comes late finds no piece left and touches nothing but these, which it shares.
  const auto pieces = std::make_shared<Pieces>(count, [&begin] { return begin(); });
  const int64_t helpers = std::min<int64_t>(threads.num_threads(), count) - 1;
  for (int64_t helper = 0; helper < helpers; ++helper) threads.Schedule([pieces] { pieces->Work(); });
  pieces->Work();
  pieces->Wait();
}

using Dimensions = ffi::Span<const int64_t>;

int64_t SizeOf(Dimensions shape, size_t begin, size_t end) {
  int64_t size = 1;
  for (size_t d = begin; d < end; ++d) size *= shape[d];
  return size;
}

// Which of an operand's blocks belongs to block `index` of the result, whose first `leading` dimensions number them:
// each is the same in the operand, or 1 there.
int64_t BlockOf(int64_t index, Dimensions operand, Dimensions result, size_t leading) {
  int64_t block = 0, step = 1;
  for (size_t d = leading; d-- > 0; index /= result[d]) {
    if (operand[d] > 1) block += index % result[d] * step;
    step *= operand[d];
  }
  return block;
}

template <typename Weight>
void Multiply(ffi::ThreadPool& threads, Dimensions of_rows, const float* rows, Dimensions of_kernel,
              const Weight* kernel, Dimensions shape, float* result) {
  const size_t leading = shape.size() - 2;
  const int64_t in = of_rows[leading + 1], out = shape[leading + 1];
  int64_t count = shape[leading], products = SizeOf(shape, 0, leading);
  // Rows that have one kernel in common are rows of one product.
  const bool together = SizeOf(of_kernel, 0, leading) == 1;
  if (together) {
    count *= SizeOf(of_rows, 0, leading);
    products = 1;
  }
  const int64_t outputs = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, in * int64_t{sizeof(Weight)}));
  const int64_t pieces = (out + outputs - 1) / outputs;
  Share(threads, products * pieces, [&]() -> Pieces::Worker {
    return [&, packed = Scratch(count * VectorsOf(in)), held = int64_t{-1}](int64_t piece) mutable {
      const int64_t index = piece / pieces, begin = piece % pieces * outputs;
      const int64_t row_set = together ? 0 : BlockOf(index, of_rows, shape, leading);
      const int64_t block = together ? 0 : BlockOf(index, of_kernel, shape, leading);
      if (held != row_set) Pack(rows + row_set * count * in, count, in, packed);
      held = row_set;
      const Product<Weight> product{packed, kernel + block * out * in, result + index * count * out, count, in, out};
      product.Outputs(begin, std::min(begin + outputs, out));
    };
  });
}

// rows [..., R, in], kernel [..., out, in] -> [..., R, out]. A leading dimension is that of the result, or 1 in an
// operand that all have in common.
ffi::Error FewRows(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> rows, ffi::AnyBuffer kernel,
                   ffi::ResultBuffer<ffi::F32> result) {
  const Dimensions of_rows = rows.dimensions(), of_kernel = kernel.dimensions(), shape = result->dimensions();
  if (of_rows.size() != shape.size() || of_kernel.size() != shape.size())
    return ffi::Error::InvalidArgument("few_rows: rows, kernel and result differ in their number of dimensions");
  const auto multiply = [&](auto weights) {
    Multiply(threads, of_rows, rows.typed_data(), of_kernel, weights, shape, result->typed_data());
    return ffi::Error::Success();
  };
  if (kernel.element_type() == ffi::F32) return multiply(static_cast<const float*>(kernel.untyped_data()));
  if (kernel.element_type() == ffi::BF16) return multiply(static_cast<const BFloat16*>(kernel.untyped_data()));
  return ffi::Error::InvalidArgument("few_rows: kernels are float32 or bfloat16");
}

// rows [..., R, width], scale [..., width] -> rows over their root mean square, times the scale. Leading dimensions as
// those of FewRows: all but the scale's last.
ffi::Error FewRowsNorm(ffi::Buffer<ffi::F32> rows, ffi::Buffer<ffi::F32> scale, ffi::ResultBuffer<ffi::F32> result,
                       float epsilon) {
  const Dimensions of_rows = rows.dimensions(), of_scale = scale.dimensions(), shape = result->dimensions();
  const size_t leading = of_scale.size() - 1;
  const int64_t width = of_scale[leading], count = SizeOf(shape, leading, shape.size() - 1);
  const int64_t whole = width / kLanes, rest = width % kLanes;
  for (int64_t index = 0; index < SizeOf(shape, 0, leading); ++index) {
    const float* row = rows.typed_data() + BlockOf(index, of_rows, shape, leading) * count * width;
    const float* const weights = scale.typed_data() + BlockOf(index, of_scale, shape, leading) * width;
    float* normed = result->typed_data() + index * count * width;
    for (int64_t r = 0; r < count; ++r, row += width, normed += width) {
      Vector squares{};
      for (int64_t v = 0; v < whole; ++v) {
        const Vector values = Load(row + v * kLanes);
        squares = MultiplyAdd(values, values, squares);
      }
      if (rest > 0) {
        const Vector values = LoadSome(row + whole * kLanes, rest);
        squares = MultiplyAdd(values, values, squares);
      }
      const float inverse = 1 / std::sqrt(SumOf(squares) / width + epsilon);
      for (int64_t i = 0; i < width; ++i) normed[i] = row[i] * inverse * weights[i];
    }
  }
  return ffi::Error::Success();
}

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
  const Integers exponent = __builtin_convertvector(n, Integers) + 127;
  Integers bits = exponent << 23;
  bits &= ~gone;
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
};

// Adds up values, `some` vectors of each from `first` on, by their weights, and gives the sum of the weights. S is
// `some`, or 0 where it is not known when this is compiled; the sums stay in registers where it is.
template <int S, typename Cached>
float Mix(const float* weights, int64_t some, int64_t first, int64_t width, const std::vector<Source<Cached>>& sources,
          float* result) {
  Vector sums[kMixed] = {};
  float total = 0;
  const int64_t here = S ? S : some;
  for (const Source<Cached>& source : sources) {
    const Cached* value = source.values + first * kLanes;
    for (int64_t s = 0; s < source.length; ++s, ++weights, value += width) {
      if (*weights == 0) continue;
      total += *weights;
      const Vector weight = Vector{} + *weights;
      for (int64_t v = 0; v < here; ++v) sums[v] = MultiplyAdd(weight, Load(value + v * kLanes), sums[v]);
    }
  }
  std::memcpy(result + first * kLanes, sums, here * sizeof(Vector));
  return total;
}

// Attention over all sources of C queries [d] of one group. Query q is one of row row[q].
template <int C, typename Cached>
void Attend(const float* const* queries, const int64_t* row, float* const* results, int64_t width,
            const std::vector<Source<Cached>>& sources) {
  const int64_t vectors = width / kLanes;
  int64_t length = 0;
  for (const Source<Cached>& source : sources) length += source.length;
  const int64_t padded = VectorsOf(length);
  Vector* const scaled = Scratch(C * (vectors + padded));
  Vector* const all_scores = scaled + C * vectors;
  std::fill(all_scores, all_scores + C * padded, Vector{} - INFINITY);
  for (int64_t v = 0; v < vectors; ++v)
    for (int q = 0; q < C; ++q)
      scaled[v * C + q] = Load(queries[q] + v * kLanes) * (1 / std::sqrt(static_cast<float>(width)));

  float most[C];
  std::fill(most, most + C, -INFINITY);
  int64_t at = 0;
  for (const Source<Cached>& source : sources) {
    for (int64_t s = 0; s < source.length; ++s, ++at) {
      bool sees[C], any = false;
      for (int q = 0; q < C; ++q) any |= sees[q] = source.mask[row[q] * source.mask_step + s];
      if (!any) continue;
      Vector products[C] = {};
      for (int64_t v = 0; v < vectors; ++v) {
        const Vector key = Load(source.keys + s * width + v * kLanes);
        for (int q = 0; q < C; ++q) products[q] = MultiplyAdd(key, scaled[v * C + q], products[q]);
      }
      for (int q = 0; q < C; ++q) {
        const float score = sees[q] ? SumOf(products[q]) : -INFINITY;
        reinterpret_cast<float*>(all_scores + q * padded)[at] = score;
        most[q] = std::max(score, most[q]);  // In this order a NaN alone stays one.
      }
    }
  }
  for (int q = 0; q < C; ++q) {
    if (most[q] == -INFINITY) {  // A row that sees nothing.
      std::fill(results[q], results[q] + width, 0.0f);
      continue;
    }
    Vector* const scores = all_scores + q * padded;
    for (int64_t v = 0; v < padded; ++v) scores[v] = Exponential(scores[v] - most[q]);
    const float* const weights = reinterpret_cast<const float*>(scores);
    float total = 0;
    int64_t first = 0;
    for (; first + kMixed <= vectors; first += kMixed)
      total = Mix<kMixed>(weights, kMixed, first, width, sources, results[q]);
    if (first < vectors) total = Mix<0>(weights, vectors - first, first, width, sources, results[q]);
    const float factor = 1 / total;
    for (int64_t i = 0; i < width; ++i) results[q][i] *= factor;
  }
}

template <typename Cached>
void AttendAll(ffi::ThreadPool& threads, Dimensions of_queries, const float* queries,
               const std::vector<ffi::AnyBuffer>& operands, Dimensions shape, float* result) {
  const size_t leading = shape.size() - 3;
  const int64_t rows = shape[leading], heads = shape[leading + 1], width = shape[leading + 2];
  const int64_t groups = operands[0].dimensions()[leading], of_group = heads / groups, count = rows * of_group;
  // Of each group's queries so many at a time that there is something to do for several threads.
  const int64_t some = std::clamp<int64_t>(count / 2, 1, kQueries), parts = (count + some - 1) / some;
  const auto attend_part = [&](int64_t piece) {
    const int64_t index = piece / (groups * parts), group = piece / parts % groups, first = piece % parts * some;
    std::vector<Source<Cached>> sources;
    for (size_t i = 0; i < operands.size(); i += 3) {
      const Dimensions of_keys = operands[i].dimensions(), of_mask = operands[i + 2].dimensions();
      const int64_t length = of_keys[leading + 1], size = groups * length * width;
      const int64_t own = group * length * width, masks = of_mask[leading];
      const auto block = [&](Dimensions operand) { return BlockOf(index, operand, shape, leading); };
      sources.push_back({static_cast<const Cached*>(operands[i].untyped_data()) + block(of_keys) * size + own,
                         static_cast<const Cached*>(operands[i + 1].untyped_data()) +
                             block(operands[i + 1].dimensions()) * size + own,
                         static_cast<const bool*>(operands[i + 2].untyped_data()) + block(of_mask) * masks * length,
                         length, masks > 1 ? length : 0});
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
    static_assert(kQueries == 4);
    const auto attend = here == 4   ? Attend<4, Cached>
                        : here == 3 ? Attend<3, Cached>
                        : here == 2 ? Attend<2, Cached>
                                    : Attend<1, Cached>;
    attend(inputs, row, outputs, width, sources);
  };
  Share(threads, SizeOf(shape, 0, leading) * groups * parts, [&]() -> Pieces::Worker { return attend_part; });
}

// queries [..., R, H, d], then of each source keys and values [..., G, S, d] and mask [..., R or 1, S] -> [..., R, H,
// d]. Leading dimensions as those of FewRows; d is a multiple of kLanes.
ffi::Error FewRowsAttention(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> queries, ffi::RemainingArgs rest,
                            ffi::ResultBuffer<ffi::F32> result) {
  const Dimensions shape = result->dimensions();
  if (shape[shape.size() - 1] % kLanes)
    return ffi::Error::InvalidArgument("few_rows: the width of heads must be a multiple of 16");
  std::vector<ffi::AnyBuffer> operands;
  for (size_t i = 0; i < rest.size(); ++i) {
    const auto operand = rest.get<ffi::AnyBuffer>(i);
    if (!operand.has_value()) return operand.error();
    operands.push_back(*operand);
  }
  const ffi::DataType cached = operands[0].element_type();
  for (size_t i = 0; i < operands.size(); ++i)
    if (i % 3 < 2 && operands[i].element_type() != cached)
      return ffi::Error::InvalidArgument("few_rows: keys and values are of one dtype");
  const auto attend_all = cached == ffi::F32 ? AttendAll<float> : cached == ffi::BF16 ? AttendAll<BFloat16> : nullptr;
  if (attend_all == nullptr) return ffi::Error::InvalidArgument("few_rows: keys and values are float32 or bfloat16");
  attend_all(threads, queries.dimensions(), queries.typed_data(), operands, shape, result->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dex_jax_few_rows_product, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(dex_jax_few_rows_norm, FewRowsNorm,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dex_jax_few_rows_attention, FewRowsAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>());
