// Weights as GGUF files pack them: blocks of a row's columns, which share a scale, and how they become floats again.
//
// A format says how many columns and bytes a block has. Made of a row and the number of a group of 32 columns, it gives
// these columns, a vector at a time: to the last bit what the gguf package makes of them, since of all that is
// multiplied and added here no more than one operation rounds.

#ifndef DEX_JAX_BLOCKS_H_
#define DEX_JAX_BLOCKS_H_

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace dex_jax {

// Columns that are taken to pieces at once.
constexpr int kGroupColumns = 32;
constexpr int kGroupVectors = kGroupColumns / kLanes;

inline Vector Float(Integers codes) { return __builtin_convertvector(codes, Vector); }

// As many bytes as there are lanes. (Compilers take a converted vector of bytes to pieces, one after another.)
inline Integers Codes(const uint8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Integers>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<Integers>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  Integers codes;
  for (int lane = 0; lane < kLanes; ++lane) codes[lane] = from[lane];
  return codes;
#endif
}

inline Vector All(float value) { return Vector{} + value; }

// A float16 as float32.
inline float HalfAt(const uint8_t* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof(half));
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  // By hand: XLA's threads take numbers that are not normal for zeros, and small scales are such.
  const uint32_t exponent = half >> 10 & 31, fraction = half & 1023;
  float value = static_cast<float>(fraction) * 0x1p-24f;
  if (exponent > 0) {
    const uint32_t bits = (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    std::memcpy(&value, &bits, sizeof(value));
  }
  return half & 0x8000 ? -value : value;
#endif
}

// Two float16 that lie side by side, each in all lanes.
struct Pair {
  Vector first, second;

  explicit Pair(const uint8_t* from) {
#if defined(__F16C__) && defined(__AVX2__)
    int32_t both;
    std::memcpy(&both, from, sizeof(both));
#if defined(__AVX512F__)
    const __m512 floats = _mm512_cvtph_ps(_mm256_set1_epi32(both));
    first = _mm512_moveldup_ps(floats), second = _mm512_movehdup_ps(floats);
#else
    const __m256 floats = _mm256_cvtph_ps(_mm_set1_epi32(both));
    first = _mm256_moveldup_ps(floats), second = _mm256_movehdup_ps(floats);
#endif
#else
    first = All(HalfAt(from)), second = All(HalfAt(from + 2));
#endif
  }
};

// Of two codes of 4 bits in a byte the low one, and the high one where it is: 16 times too large.
inline Integers Low(const uint8_t* from) { return Codes(from) & 15; }
inline Integers High(const uint8_t* from) { return Codes(from) & 240; }

// Bit `bit` of as many bytes as there are lanes, worth 16.
inline Integers Sixteen(const uint8_t* from, int bit) { return (Codes(from) >> bit & 1) << 4; }

// Bits `first` and those that follow of a word, one in each lane, worth 16.
inline Integers Sixteen(uint32_t word, int first) {
  Integers lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return ((Integers{} + static_cast<int32_t>(word >> first)) >> lanes & 1) << 4;
}

// The formats. `row` is where a row begins, columns 32 * group and those after it are given: by At(v) the vth vector. In
// blocks of 32 columns the first 16 have the low codes of 16 bytes, the others the high ones.

struct Q4_0 {
  static constexpr int kColumns = 32, kBytes = 18;
  const uint8_t* const codes;
  const Vector scale, high_scale;

  Q4_0(const uint8_t* row, int64_t group)
      : codes(row + group * kBytes + 2), scale(All(HalfAt(codes - 2))), high_scale(scale * 0.0625f) {}
  Vector At(int v) const {
    const int at = v * kLanes;
    return at < 16 ? Float(Low(codes + at) - 8) * scale : Float(High(codes + at - 16) - 128) * high_scale;
  }
};

struct Q4_1 {
  static constexpr int kColumns = 32, kBytes = 20;
  const uint8_t* const codes;
  const Pair pair;
  const Vector high_scale;

  Q4_1(const uint8_t* row, int64_t group)
      : codes(row + group * kBytes + 4), pair(codes - 4), high_scale(pair.first * 0.0625f) {}
  Vector At(int v) const {
    const int at = v * kLanes;
    return at < 16 ? MultiplyAdd(Float(Low(codes + at)), pair.first, pair.second)
                   : MultiplyAdd(Float(High(codes + at - 16)), high_scale, pair.second);
  }
};

struct Q5_0 {
  static constexpr int kColumns = 32, kBytes = 22;
  const uint8_t* const codes;
  const Vector scale;
  uint32_t fifth;

  Q5_0(const uint8_t* row, int64_t group) : codes(row + group * kBytes + 6), scale(All(HalfAt(codes - 6))) {
    std::memcpy(&fifth, codes - 4, sizeof(fifth));
  }
  Vector At(int v) const {
    const int at = v * kLanes;
    const Integers four = at < 16 ? Low(codes + at) : High(codes + at - 16) >> 4;
    return Float((four | Sixteen(fifth, at)) - 16) * scale;
  }
};

struct Q8_0 {
  static constexpr int kColumns = 32, kBytes = 34;
  const uint8_t* const codes;
  const Vector scale;

  Q8_0(const uint8_t* row, int64_t group) : codes(row + group * kBytes + 2), scale(All(HalfAt(codes - 2))) {}
  Vector At(int v) const { return Load(reinterpret_cast<const int8_t*>(codes) + v * kLanes) * scale; }
};

// Blocks of 256 columns: eight scales and eight numbers to subtract of 6 bits each, in 12 bytes, and two scales of
// these.
struct K {
  Vector scale, least;

  K(const uint8_t* block, int group) {
    const Pair both(block);
    const uint8_t* const six = block + 4;
    int multiple, less;
    if (group < 4) {
      multiple = six[group] & 63, less = six[group + 4] & 63;
    } else {
      multiple = (six[group + 4] & 15) | (six[group - 4] >> 6) << 4;
      less = six[group + 4] >> 4 | (six[group] >> 6) << 4;
    }
    scale = both.first * static_cast<float>(multiple), least = both.second * static_cast<float>(-less);
  }
};

struct Q4_K {
  static constexpr int kColumns = 256, kBytes = 144;
  const uint8_t* const codes;
  const bool high;
  const K k;

  Q4_K(const uint8_t* row, int64_t group)
      : codes(row + group / 8 * kBytes + 16 + group % 8 / 2 * 32),
        high(group % 2),
        k(row + group / 8 * kBytes, group % 8) {}
  Vector At(int v) const {
    const Integers both = Codes(codes + v * kLanes);
    return MultiplyAdd(Float(high ? both >> 4 : both & 15), k.scale, k.least);
  }
};

struct Q5_K {
  static constexpr int kColumns = 256, kBytes = 176;
  const uint8_t *const block, *const codes;
  const int group;
  const K k;

  Q5_K(const uint8_t* row, int64_t at)
      : block(row + at / 8 * kBytes), codes(block + 48 + at % 8 / 2 * 32), group(at % 8), k(block, group) {}
  Vector At(int v) const {
    const Integers both = Codes(codes + v * kLanes), four = group % 2 ? both >> 4 : both & 15;
    return MultiplyAdd(Float(four | Sixteen(block + 16 + v * kLanes, group)), k.scale, k.least);
  }
};

// 16 scales of 8 bits for 16 columns each, and a scale of these behind them. Of each 128 columns two bits are in 32
// bytes.
struct Q6_K {
  static constexpr int kColumns = 256, kBytes = 210;
  const uint8_t *const block, *const low, *const high;
  const int group;
  Vector scales[2];

  Q6_K(const uint8_t* row, int64_t at)
      : block(row + at / 8 * kBytes),
        low(block + at % 8 / 4 * 64 + at % 2 * 32),
        high(block + 128 + at % 8 / 4 * 32),
        group(at % 4) {
    const float scale = HalfAt(block + 208);
    const auto* const eight = reinterpret_cast<const int8_t*>(block + 192) + at % 8 * 2;
    for (int half = 0; half < 2; ++half) scales[half] = All(scale * eight[half]);
  }
  Vector At(int v) const {
    const Integers both = Codes(low + v * kLanes), four = group < 2 ? both & 15 : both >> 4;
    const Integers two = Codes(high + v * kLanes) >> 2 * group & 3;
    return Float((four | two << 4) - 32) * scales[v * kLanes / 16];
  }
};

}  // namespace dex_jax

#endif  // DEX_JAX_BLOCKS_H_
