// Weights as GGUF files pack them: blocks of a row's columns, which share a scale, and how they become floats again.
//
// A format says how many columns and bytes a block has. Made of a row and the number of a group of columns, it gives
// these columns, a vector at a time: to the last bit what the gguf package makes of them, since of all that is
// multiplied and added here no more than one operation rounds.

#ifndef DEX_JAX_BLOCKS_H_
#define DEX_JAX_BLOCKS_H_

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace dex_jax {

// Columns that are taken to pieces at once: a block of 32, or of one of 256 the two times 32 whose codes share bytes.
constexpr int kShort = 32, kLong = 64;

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

// Of the 4 bytes at `from` bit `first` in the first lane, the next one in the second, and so on: each worth `value`, a power
// of two that lies lower than all of them.
inline Integers Bits(const uint8_t* from, int first, int value) {
  int32_t word;
  std::memcpy(&word, from, sizeof(word));
  Integers by;
  for (int lane = 0; lane < kLanes; ++lane) by[lane] = lane + first - __builtin_ctz(value);
  return (Integers{} + word) >> by & value;
}

// What the 16 codes of 4 bits stand for: scale * code + least. A register that holds as many numbers is a table of them.
struct Sixteen {
#if defined(__AVX512F__)
  const Vector table;

  Sixteen(Vector scale, Vector least)
      : table(MultiplyAdd(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), scale, least)) {}
  // Only the last 4 bits of an index count.
  Vector At(Integers index) const { return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), table); }
  Vector OfLow(const uint8_t* from) const { return At(Codes(from)); }
  Vector OfHigh(const uint8_t* from) const { return At(Codes(from) >> 4); }
#else
  const Vector scale, high_scale, least;

  Sixteen(Vector scale, Vector least) : scale(scale), high_scale(scale * 0.0625f), least(least) {}
  Vector OfLow(const uint8_t* from) const { return MultiplyAdd(Float(Low(from)), scale, least); }
  Vector OfHigh(const uint8_t* from) const { return MultiplyAdd(Float(High(from)), high_scale, least); }
#endif
};

// The formats. `row` is where a row begins, columns kGroupColumns * group and those after it are given: by At(v) the vth
// vector. In blocks of 32 columns the first 16 have the low codes of 16 bytes, the others the high ones. What a code is
// less than is multiplied first: (code - 8) * scale has so few digits that nothing is rounded in either way.

// What Q4_0 and Q4_1 have in common.
struct Nibbles {
  static constexpr int kColumns = 32, kGroupColumns = kShort;
  const uint8_t* const codes;
  const Sixteen numbers;

  Nibbles(const uint8_t* codes, Vector scale, Vector least) : codes(codes), numbers(scale, least) {}
  Vector At(int v) const {
    const int at = v * kLanes;
    return at < 16 ? numbers.OfLow(codes + at) : numbers.OfHigh(codes + at - 16);
  }
};

struct Q4_0 : Nibbles {
  static constexpr int kBytes = 18;

  Q4_0(const uint8_t* row, int64_t group) : Q4_0(row + group * kBytes) {}

 private:
  explicit Q4_0(const uint8_t* block) : Q4_0(block, All(HalfAt(block))) {}
  Q4_0(const uint8_t* block, Vector scale) : Nibbles(block + 2, scale, scale * -8.0f) {}
};

struct Q4_1 : Nibbles {
  static constexpr int kBytes = 20;

  Q4_1(const uint8_t* row, int64_t group) : Q4_1(row + group * kBytes, Pair(row + group * kBytes)) {}

 private:
  Q4_1(const uint8_t* block, Pair pair) : Nibbles(block + 4, pair.first, pair.second) {}
};

struct Q5_0 {
  static constexpr int kColumns = 32, kBytes = 22, kGroupColumns = kShort;
  const uint8_t* const codes;
  const Vector scale, high_scale, least;

  Q5_0(const uint8_t* row, int64_t group)
      : codes(row + group * kBytes + 6),
        scale(All(HalfAt(codes - 6))),
        high_scale(scale * 0.0625f),
        least(scale * -16.0f) {}
  // The fifth bits are in the 4 bytes before the codes. Those of low codes are looked for from a byte further in front, and
  // lie higher than where they are wanted.
  Vector At(int v) const {
    const int at = v * kLanes;
    return at < 16 ? MultiplyAdd(Float(Low(codes + at) | Bits(codes - 5, at + 8, 16)), scale, least)
                   : MultiplyAdd(Float(High(codes + at - 16) | Bits(codes - 4, at, 256)), high_scale, least);
  }
};

struct Q8_0 {
  static constexpr int kColumns = 32, kBytes = 34, kGroupColumns = kShort;
  const uint8_t* const codes;
  const Vector scale;

  Q8_0(const uint8_t* row, int64_t group) : codes(row + group * kBytes + 2), scale(All(HalfAt(codes - 2))) {}
  Vector At(int v) const { return Load(reinterpret_cast<const int8_t*>(codes) + v * kLanes) * scale; }
};

// Blocks of 256 columns: eight scales and eight numbers to subtract of 6 bits each, in 12 bytes, and two scales of
// these. A group's first 32 columns have the low codes of 32 bytes, the others the high ones.
struct K {
  Vector scales[2], least[2];

  K(const uint8_t* block, int pair) {
    const Pair both(block);
    uint32_t words[3];
    std::memcpy(words, block + 4, sizeof(words));
    uint32_t multiples = words[0] & 0x3f3f3f3f, less = words[1] & 0x3f3f3f3f;
    if (pair >= 2) {
      multiples = (words[2] & 0x0f0f0f0f) | (words[0] >> 2 & 0x30303030);
      less = (words[2] >> 4 & 0x0f0f0f0f) | (words[1] >> 2 & 0x30303030);
    }
    const int first = pair % 2 * 16;
    for (int half = 0; half < 2; ++half) {
      scales[half] = both.first * static_cast<float>(static_cast<int32_t>(multiples >> (first + 8 * half) & 63));
      least[half] = both.second * static_cast<float>(-static_cast<int32_t>(less >> (first + 8 * half) & 63));
    }
  }
};

struct Q4_K {
  static constexpr int kColumns = 256, kBytes = 144, kGroupColumns = kLong;
  const uint8_t* const codes;
  const Sixteen first, second;

  Q4_K(const uint8_t* row, int64_t group)
      : Q4_K(row + group / 4 * kBytes + 16 + group % 4 * 32, K(row + group / 4 * kBytes, group % 4)) {}
  Vector At(int v) const {
    const int at = v * kLanes;
    return at < 32 ? first.OfLow(codes + at) : second.OfHigh(codes + at - 32);
  }

 private:
  Q4_K(const uint8_t* codes, const K& k)
      : codes(codes), first(k.scales[0], k.least[0]), second(k.scales[1], k.least[1]) {}
};

// The fifth bits of all columns are in 32 bytes, two of each for every group.
struct Q5_K {
  static constexpr int kColumns = 256, kBytes = 176, kGroupColumns = kLong;
  const uint8_t *const fifth, *const codes;
  const int shift;
  const K k;

  Q5_K(const uint8_t* row, int64_t group)
      : fifth(row + group / 4 * kBytes + 16),
        codes(fifth + 32 + group % 4 * 32),
        shift(static_cast<int>(group % 4) * 2),
        k(fifth - 16, group % 4) {}
  Vector At(int v) const {
    const int half = v * kLanes / 32, at = v * kLanes % 32;
    const Integers both = Codes(codes + at), bits = Codes(fifth + at) >> shift;
    const Integers code = half ? both >> 4 | (bits & 2) << 3 : (both & 15) | (bits & 1) << 4;
    return MultiplyAdd(Float(code), k.scales[half], k.least[half]);
  }
};

// 16 scales of 8 bits for 16 columns each, and a scale of these behind them. Of each 128 columns the first 64 have the low
// codes of 64 bytes, the others the high ones, and two bits more are in 32 bytes.
struct Q6_K {
  static constexpr int kColumns = 256, kBytes = 210, kGroupColumns = kLong;
  const uint8_t *const block, *const low, *const high;
  const int shift;
  Vector scales[4];

  Q6_K(const uint8_t* row, int64_t group)
      : block(row + group / 4 * kBytes),
        low(block + group % 4 / 2 * 64),
        high(block + 128 + group % 4 / 2 * 32),
        shift(static_cast<int>(group % 2) * 4) {
    const float scale = HalfAt(block + 208);
    const auto* const eight = reinterpret_cast<const int8_t*>(block + 192) + group % 4 * 4;
    for (int part = 0; part < 4; ++part) scales[part] = All(scale * eight[part]);
  }
  Vector At(int v) const {
    const int at = v * kLanes;
    const Integers four = Codes(low + at) >> shift & 15, bits = Codes(high + at % 32) >> shift;
    const Integers two = at < 32 ? (bits & 3) << 4 : (bits & 12) << 2;
    return Float((four | two) - 32) * scales[at / 16];
  }
};

}  // namespace dex_jax

#endif  // DEX_JAX_BLOCKS_H_
