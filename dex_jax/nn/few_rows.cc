// Few rows times a large kernel on a CPU: result[r, o] = sum over i of rows[r, i] * kernel[o, i], all float32.
//
// Decoding reads every weight for a handful of rows. For more rows than one XLA first lays the kernel out anew, which
// takes about as long as reading it. Here a weight is loaded once and multiplied with all rows while it is in a register,
// and the kernel is read from front to back.
//
// An element of the result is the sum of the lanes of one vector, which were added up in the order of the columns: it
// does not depend on how many rows there are, nor on how many threads work.

#include <algorithm>
#include <atomic>
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

// Rows that are multiplied at once: as many as there are vector registers for their sums.
constexpr int kGroup = 8;
// What a thread takes at a time, in bytes of the kernel.
constexpr int64_t kPiece = 1 << 16;
// How far ahead of the weight in use memory is asked for, in floats.
constexpr int kAhead = 512;
// Of a cache, in bytes.
constexpr int kLine = 64;

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

int64_t VectorsOf(int64_t columns) { return (columns + kLanes - 1) / kLanes; }

// Writes rows [count, in] in the order in which they are multiplied: by groups of kGroup or fewer, and within a group
// one vector of each row in turn. Columns are padded with zeros. Returns
// where it ends.
Vector* Pack(const float* rows, int64_t count, int64_t in, Vector* packed) {
  for (int64_t first = 0; first < count; first += kGroup)
    for (int64_t begin = 0; begin < in; begin += kLanes)
      for (int64_t r = first; r < std::min(first + kGroup, count); ++r) {
        Vector values = {};
        std::memcpy(&values, rows + r * in + begin, std::min<int64_t>(kLanes, in - begin) * sizeof(float));
        *packed++ = values;
      }
  return packed;
}

// The sum of a vector's lanes, halves first.
template <int N>
float SumOf(const float* lanes) {
  typedef float Half __attribute__((vector_size(N / 2 * sizeof(float)), aligned(sizeof(float))));
  if constexpr (N == 2) return lanes[0] + lanes[1];
  else {
    const Half sum = *reinterpret_cast<const Half*>(lanes) + *reinterpret_cast<const Half*>(lanes + N / 2);
    return SumOf<N / 2>(reinterpret_cast<const float*>(&sum));
  }
}

// A product of `count` packed rows with one kernel [out, in].
struct Product {
  const Vector* rows;
  const float* kernel;
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
    OfGroup<R>(first, begin, end);
  }

  // One output after another, so that the kernel is read as one stream. Inlined into its callers this loop runs short of
  // registers.
  template <int R>
  __attribute__((noinline)) void OfGroup(int64_t first, int64_t begin, int64_t end) const {
    const int64_t whole = in / kLanes, rest = in % kLanes;
    for (int64_t o = begin; o < end; ++o) {
      const Vector* values = rows + first * VectorsOf(in);
      const float* weights = kernel + o * in;
      Vector sums[R] = {};
      for (int64_t v = 0; v < whole; ++v, values += R, weights += kLanes) {
        __builtin_prefetch(weights + kAhead);
        const Vector weight = *reinterpret_cast<const Vector*>(weights);
        for (int r = 0; r < R; ++r) sums[r] = MultiplyAdd(weight, values[r], sums[r]);
      }
      if (rest > 0) {
        Vector weight = {};
        std::memcpy(&weight, weights, rest * sizeof(float));
        for (int r = 0; r < R; ++r) sums[r] = MultiplyAdd(weight, values[r], sums[r]);
      }
      for (int r = 0; r < R; ++r)
        result[(first + r) * out + o] = SumOf<kLanes>(reinterpret_cast<const float*>(&sums[r]));
    }
  }
};

// Pieces of work that whoever is free takes. The caller works too, and then waits only for pieces that somebody is at
// work on: it cannot wait for a thread that never comes.
class Pieces {
 public:
  Pieces(int64_t count, std::function<void(int64_t)> work) : count_(count), work_(std::move(work)) {}

  void Work() {
    for (int64_t piece; (piece = next_.fetch_add(1)) < count_;) {
      work_(piece);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void Wait() const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < count_; ++spins)
      if (spins > 1000) std::this_thread::yield();
  }

 private:
  const int64_t count_;
  const std::function<void(int64_t)> work_;
  std::atomic<int64_t> next_{0}, done_{0};
};

// rows [..., R, in], kernel [..., out, in] -> [..., R, out]. A leading dimension is that of the result, or 1 in an operand
// that all have in common.
ffi::Error FewRows(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> rows, ffi::Buffer<ffi::F32> kernel,
                   ffi::ResultBuffer<ffi::F32> result) {
  const auto of_rows = rows.dimensions(), of_kernel = kernel.dimensions(), shape = result->dimensions();
  if (of_rows.size() != shape.size() || of_kernel.size() != shape.size())
    return ffi::Error::InvalidArgument("few_rows: rows, kernel and result differ in their number of dimensions");
  const size_t leading = shape.size() - 2;
  const int64_t in = of_rows[leading + 1], out = shape[leading + 1];
  int64_t count = shape[leading], products = 1, row_sets = 1, kernels = 1;
  for (size_t d = 0; d < leading; ++d) {
    products *= shape[d];
    row_sets *= of_rows[d];
    kernels *= of_kernel[d];
  }
  // Rows that have one kernel in common are rows of one product.
  if (kernels == 1) {
    count *= row_sets;
    products = row_sets = 1;
  }
  // A vector that lies across two cache lines takes twice as long to load.
  std::vector<char> memory(row_sets * count * VectorsOf(in) * sizeof(Vector) + kLine);
  Vector* const packed = reinterpret_cast<Vector*>((reinterpret_cast<uintptr_t>(memory.data()) + kLine - 1) / kLine * kLine);
  Vector* end = packed;
  for (int64_t set = 0; set < row_sets; ++set) end = Pack(rows.typed_data() + set * count * in, count, in, end);

  const auto product = [&](int64_t index) {
    int64_t row_set = 0, row_step = 1, kernel_at = 0, kernel_step = 1, rest = index;
    for (size_t d = leading; d-- > 0 && products > 1; rest /= shape[d]) {
      if (of_rows[d] > 1) row_set += rest % shape[d] * row_step;
      if (of_kernel[d] > 1) kernel_at += rest % shape[d] * kernel_step;
      row_step *= of_rows[d];
      kernel_step *= of_kernel[d];
    }
    return Product{packed + row_set * count * VectorsOf(in), kernel.typed_data() + kernel_at * out * in,
                   result->typed_data() + index * count * out, count, in, out};
  };
  const int64_t outputs = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, in * int64_t{sizeof(float)}));
  const int64_t pieces = (out + outputs - 1) / outputs;
  // A helper that comes late finds no piece left and touches nothing but `work`, which it shares.
  const auto work = std::make_shared<Pieces>(products * pieces, [&](int64_t piece) {
    const int64_t begin = piece % pieces * outputs;
    product(piece / pieces).Outputs(begin, std::min(begin + outputs, out));
  });
  const int64_t helpers = std::min<int64_t>(threads.num_threads(), products * pieces) - 1;
  for (int64_t helper = 0; helper < helpers; ++helper) threads.Schedule([work] { work->Work(); });
  work->Work();
  work->Wait();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dex_jax_few_rows, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
