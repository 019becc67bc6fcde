// Vectors of float32 as wide as this CPU's registers: how they are loaded, and how their lanes are added up.

#ifndef DEX_JAX_VECTORS_H_
#define DEX_JAX_VECTORS_H_

#include <cstdint>
#include <cstring>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dex_jax {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float))));

// As many integers; a comparison of vectors gives -1 or 0 in each lane.
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));

inline bool AnyOf(Integers lanes) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(lanes), reinterpret_cast<__m512i>(lanes)) != 0;
#elif defined(__AVX__)
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(lanes), reinterpret_cast<__m256i>(lanes));
#else
  int32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= lanes[lane];
  return any != 0;
#endif
}

// Size of a cache line, and distance between the weight in use and the one that is prefetched, in bytes.
constexpr int kLine = 64, kAhead = 2048;

// Returns a * b + c. The instruction is explicit, as a compiler that may choose rounds once here and twice there, and a row
// would come out differently beside others.
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

// Returns x, which the compiler then keeps in a register: it would load it anew for every product, or store it, otherwise.
template <typename Register>
Register InRegister(Register x) {
#if defined(__AVX__)
  asm("" : "+v"(x));
#endif
  return x;
}

// Returns this thread's own memory for `count` vectors, until its next call. It begins with a cache line: to load a vector
// that lies across two takes twice as long. Memory that other cores read, which is slow to write to, is kept apart.
template <bool kForOthers = false>
Vector* Scratch(int64_t count) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local int64_t size = 0;
  const int64_t needed = count * static_cast<int64_t>(sizeof(Vector)) + kLine;
  if (size < needed) {
    memory.reset(new char[needed]);
    size = needed;
  }
  return reinterpret_cast<Vector*>((reinterpret_cast<uintptr_t>(memory.get()) + kLine - 1) / kLine * kLine);
}

inline Vector Load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

// A bfloat16 is the first half of a float32.
using BFloat16 = uint16_t;

inline Vector Load(const BFloat16* from) {
  typedef BFloat16 Halves __attribute__((vector_size(kLanes * sizeof(BFloat16)), aligned(sizeof(BFloat16))));
  typedef uint32_t Integers __attribute__((vector_size(kLanes * sizeof(uint32_t))));
  return reinterpret_cast<Vector>(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Integers) << 16);
}

// Loads the first `count` numbers of a vector, then zeros.
template <typename Weight>
Vector LoadSome(const Weight* from, int64_t count) {
  Weight lanes[kLanes] = {};
  std::memcpy(lanes, from, count * sizeof(Weight));
  return Load(lanes);
}

inline int64_t VectorsOf(int64_t columns) { return (columns + kLanes - 1) / kLanes; }

// Returns the sum of N lanes, halves first.
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

// Writes the sums of four vectors, each to the last bit as SumOf gives it.
inline void SumsOf(const Vector* of, float* sums) {
#if defined(__AVX__)
#if defined(__AVX512F__)
  const auto halved = [](Vector x) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
    return _mm256_add_ps(_mm512_castps512_ps256(x), high);
  };
  const __m256 a = halved(of[0]), b = halved(of[1]), c = halved(of[2]), d = halved(of[3]);
#else
  const __m256 a = of[0], b = of[1], c = of[2], d = of[3];
#endif
  const __m256 ac = _mm256_add_ps(_mm256_permute2f128_ps(a, c, 0x20), _mm256_permute2f128_ps(a, c, 0x31));
  const __m256 bd = _mm256_add_ps(_mm256_permute2f128_ps(b, d, 0x20), _mm256_permute2f128_ps(b, d, 0x31));
  // Two lanes of each are left: a and b below, c and d above.
  const __m256 pairs = _mm256_add_ps(_mm256_shuffle_ps(ac, bd, 0x44), _mm256_shuffle_ps(ac, bd, 0xee));
  const __m128 low = _mm256_castps256_ps128(pairs), high = _mm256_extractf128_ps(pairs, 1);
  _mm_storeu_ps(sums, _mm_add_ps(_mm_shuffle_ps(low, high, 0x88), _mm_shuffle_ps(low, high, 0xdd)));
#else
  for (int i = 0; i < 4; ++i) sums[i] = SumOf(of[i]);
#endif
}

}  // namespace dex_jax

#endif  // DEX_JAX_VECTORS_H_
