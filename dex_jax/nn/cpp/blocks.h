// Weights as GGUF files pack them: blocks of a row's columns, which share a scale, and how they become floats again.
//
// A format says how many columns and bytes a block has, and writes down the scales of a group of columns, and what goes with
// them. Made of the row, the number of the group, and these numbers, it gives the columns, a vector at a time: to the last
// bit what the gguf package makes of them, since of all that is multiplied and added here no more than one operation
// rounds.

#ifndef DEX_JAX_BLOCKS_H_
#define DEX_JAX_BLOCKS_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

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

// A scale, or what else goes with a block's codes, on its way to all lanes of a register. Where there are 16 it is written
// to memory and loaded from there into all of them: shuffling it there would take turns with the codes.
#if defined(__AVX512F__)
using Number = float;
inline Number NumberOf(float value) { return value; }
inline Vector All(Number number) { return _mm512_set1_ps(number); }
#else
using Number = Vector;
inline Number NumberOf(float value) { return Vector{} + value; }
inline Vector All(Number number) { return number; }
#endif

inline uint32_t WordAt(const uint8_t* from) {
  uint32_t word;
  std::memcpy(&word, from, sizeof(word));
  return word;
}

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

// Two float16 that lie side by side.
inline void HalvesAt(const uint8_t* from, Number* two) {
#if defined(__AVX512F__)
  _mm_storel_pi(reinterpret_cast<__m64*>(two), _mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(WordAt(from)))));
#elif defined(__F16C__) && defined(__AVX2__)
  const __m256 floats = _mm256_cvtph_ps(_mm_set1_epi32(static_cast<int>(WordAt(from))));
  two[0] = _mm256_moveldup_ps(floats), two[1] = _mm256_movehdup_ps(floats);
#else
  two[0] = NumberOf(HalfAt(from)), two[1] = NumberOf(HalfAt(from + 2));
#endif
}

// Four bytes, the first one lowest, times a factor of each.
template <typename Byte>
void FourOf(uint32_t bytes, const float (&factors)[4], Number* four) {
#if defined(__AVX512F__)
  const __m128i packed = _mm_cvtsi32_si128(static_cast<int>(bytes));
  const __m128i wide = std::is_signed<Byte>() ? _mm_cvtepi8_epi32(packed) : _mm_cvtepu8_epi32(packed);
  _mm_storeu_ps(four, _mm_mul_ps(_mm_cvtepi32_ps(wide), _mm_loadu_ps(factors)));
#else
  for (int i = 0; i < 4; ++i) four[i] = NumberOf(static_cast<Byte>(bytes >> 8 * i) * factors[i]);
#endif
}

// Of two codes of 4 bits in a byte the low one, and the high one where it is: 16 times too large.
inline Integers Low(const uint8_t* from) { return Codes(from) & 15; }
inline Integers High(const uint8_t* from) { return Codes(from) & 240; }

// Of the 4 bytes at `from` bit `first` in the first lane, the next one in the second, and so on: each worth `value`, a power
// of two that lies lower than all of them.
inline Integers Bits(const uint8_t* from, int first, int value) {
  const auto word = static_cast<int32_t>(WordAt(from));
  Integers by;
  for (int lane = 0; lane < kLanes; ++lane) by[lane] = lane + first - __builtin_ctz(value);
  return (Integers{} + word) >> by & value;
}

#if defined(__AVX512F__)
// A register of 16 numbers is a table of them: what codes stand for is looked up. Of a code only its last 4 bits count.
template <typename Function>
Vector TableOf(Function number_of) {
  Vector table;
  for (int code = 0; code < 16; ++code) table[code] = number_of(code);
  return table;
}

inline Vector LookUp(Vector table, Integers codes) {
  return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(codes), table);
}

// The code itself.
inline Vector Last4(Integers codes) {
  return LookUp(TableOf([](int code) { return code; }), codes);
}
#endif

// What the 16 codes of 4 bits stand for: scale * code + least.
struct Sixteen {
#if defined(__AVX512F__)
  const Vector table;

  Sixteen(Vector scale, Vector least) : table(MultiplyAdd(TableOf([](int code) { return code; }), scale, least)) {}
  Vector OfLow(const uint8_t* from) const { return LookUp(table, Codes(from)); }
  Vector OfHigh(const uint8_t* from) const { return LookUp(table, Codes(from) >> 4); }
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

// What Q4_0 and Q4_1 have in common: a scale and what is added, then codes.
template <int HeaderBytes>
struct Nibbles {
  static constexpr int kColumns = 32, kGroupColumns = kShort, kBytes = HeaderBytes + 16, kNumbers = 2;
  const uint8_t* const codes;
  const Sixteen numbers;

  Nibbles(const uint8_t* row, int64_t group, const Number* numbers)
      : codes(row + group * kBytes + HeaderBytes), numbers(All(numbers[0]), All(numbers[1])) {}
  Vector At(int v) const {
    const int at = v * kLanes;
    return at < 16 ? numbers.OfLow(codes + at) : numbers.OfHigh(codes + at - 16);
  }
};

struct Q4_0 : Nibbles<2> {
  using Nibbles::Nibbles;
  static void Write(const uint8_t* row, int64_t group, Number* numbers) {
    numbers[0] = NumberOf(HalfAt(row + group * kBytes));
    numbers[1] = numbers[0] * -8.0f;
  }
};

struct Q4_1 : Nibbles<4> {
  using Nibbles::Nibbles;
  static void Write(const uint8_t* row, int64_t group, Number* numbers) { HalvesAt(row + group * kBytes, numbers); }
};

struct Q5_0 {
  static constexpr int kColumns = 32, kBytes = 22, kGroupColumns = kShort, kNumbers = 3;
  const uint8_t* const codes;
  const Vector scale, high_scale, least;

  static void Write(const uint8_t* row, int64_t group, Number* numbers) {
    numbers[0] = NumberOf(HalfAt(row + group * kBytes));
    numbers[1] = numbers[0] * 0.0625f;
    numbers[2] = numbers[0] * -16.0f;
  }
  Q5_0(const uint8_t* row, int64_t group, const Number* numbers)
      : codes(row + group * kBytes + 6), scale(All(numbers[0])), high_scale(All(numbers[1])), least(All(numbers[2])) {}
  // The fifth bits are in the 4 bytes before the codes. Those of low codes are looked for from a byte further in front, and
  // lie higher than where they are wanted.
  Vector At(int v) const {
    const int at = v * kLanes;
#if defined(__AVX512F__)
    const Integers both = Codes(codes);
    const Vector four = Last4(at < 16 ? both : both >> 4);
    const auto fifth = static_cast<__mmask16>(WordAt(codes - 4) >> at);
    return MultiplyAdd(_mm512_mask_add_ps(four, fifth, four, All(16)), scale, least);
#else
    return at < 16 ? MultiplyAdd(Float(Low(codes + at) | Bits(codes - 5, at + 8, 16)), scale, least)
                   : MultiplyAdd(Float(High(codes + at - 16) | Bits(codes - 4, at, 256)), high_scale, least);
#endif
  }
};

struct Q8_0 {
  static constexpr int kColumns = 32, kBytes = 34, kGroupColumns = kShort, kNumbers = 1;
  const uint8_t* const codes;
  const Vector scale;

  static void Write(const uint8_t* row, int64_t group, Number* numbers) {
    *numbers = NumberOf(HalfAt(row + group * kBytes));
  }
  Q8_0(const uint8_t* row, int64_t group, const Number* numbers)
      : codes(row + group * kBytes + 2), scale(All(*numbers)) {}
  Vector At(int v) const { return Load(reinterpret_cast<const int8_t*>(codes) + v * kLanes) * scale; }
};

// Blocks of 256 columns: eight scales and eight numbers to subtract of 6 bits each, in 12 bytes, and two scales of
// these. A group's first 32 columns have the low codes of 32 bytes, the others the high ones.
template <int Bytes>
struct K {
  static constexpr int kColumns = 256, kBytes = Bytes, kGroupColumns = kLong, kNumbers = 4;

  // Two scales, and what is added to the columns of each.
  static void Write(const uint8_t* row, int64_t group, Number* numbers) {
    const uint8_t* const block = row + group / 4 * kBytes;
    const uint32_t low = WordAt(block + 4), high = WordAt(block + 8), last = WordAt(block + 12);
    uint32_t multiples = low & 0x3f3f3f3f, less = high & 0x3f3f3f3f;
    if (group % 4 >= 2) {
      multiples = (last & 0x0f0f0f0f) | (low >> 2 & 0x30303030);
      less = (last >> 4 & 0x0f0f0f0f) | (high >> 2 & 0x30303030);
    }
    const int first = group % 2 * 16;
    const float scale = HalfAt(block), least = -HalfAt(block + 2);
    const float factors[] = {scale, scale, least, least};
    FourOf<uint8_t>((multiples >> first & 0xffff) | less >> first << 16, factors, numbers);
  }
};

struct Q4_K : K<144> {
  const uint8_t* const codes;
  const Sixteen first, second;

  Q4_K(const uint8_t* row, int64_t group, const Number* numbers)
      : codes(row + group / 4 * kBytes + 16 + group % 4 * 32),
        first(All(numbers[0]), All(numbers[2])),
        second(All(numbers[1]), All(numbers[3])) {}
  Vector At(int v) const {
    const int at = v * kLanes;
    return at < 32 ? first.OfLow(codes + at) : second.OfHigh(codes + at - 32);
  }
};

// The fifth bits of all columns are in 32 bytes, two of each for every group.
struct Q5_K : K<176> {
  const uint8_t *const fifth, *const codes;
  const int shift;
  const Vector scales[2], least[2];

  Q5_K(const uint8_t* row, int64_t group, const Number* numbers)
      : fifth(row + group / 4 * kBytes + 16),
        codes(fifth + 32 + group % 4 * 32),
        shift(static_cast<int>(group % 4) * 2),
        scales{All(numbers[0]), All(numbers[1])},
        least{All(numbers[2]), All(numbers[3])} {}
  Vector At(int v) const {
    const int half = v * kLanes / 32, at = v * kLanes % 32;
    const Integers both = Codes(codes + at), bits = Codes(fifth + at) >> shift;
#if defined(__AVX512F__)
    const Vector fifth = LookUp(TableOf([half](int code) { return code >> half & 1 ? 16 : 0; }), bits);
    const Vector code = Last4(half ? both >> 4 : both) + fifth;
#else
    const Vector code = Float(half ? both >> 4 | (bits & 2) << 3 : (both & 15) | (bits & 1) << 4);
#endif
    return MultiplyAdd(code, scales[half], least[half]);
  }
};

// 16 scales of 8 bits for 16 columns each, and a scale of these behind them. Of each 128 columns the first 64 have the low
// codes of 64 bytes, the others the high ones, and two bits more are in 32 bytes.
struct Q6_K {
  static constexpr int kColumns = 256, kBytes = 210, kGroupColumns = kLong, kNumbers = 4;
  const uint8_t *const low, *const high;
  const int shift;
  const Vector scales[4];

  static void Write(const uint8_t* row, int64_t group, Number* numbers) {
    const uint8_t* const block = row + group / 4 * kBytes;
    const float scale = HalfAt(block + 208);
    const float factors[] = {scale, scale, scale, scale};
    FourOf<int8_t>(WordAt(block + 192 + group % 4 * 4), factors, numbers);
  }
  Q6_K(const uint8_t* row, int64_t group, const Number* numbers)
      : low(row + group / 4 * kBytes + group % 4 / 2 * 64),
        high(row + group / 4 * kBytes + 128 + group % 4 / 2 * 32),
        shift(static_cast<int>(group % 2) * 4),
        scales{All(numbers[0]), All(numbers[1]), All(numbers[2]), All(numbers[3])} {}
  Vector At(int v) const {
    const int at = v * kLanes;
    const int half = at / 32;
    const Integers four = Codes(low + at) >> shift, bits = Codes(high + at % 32) >> shift;
#if defined(__AVX512F__)
    const Vector two = LookUp(TableOf([half](int code) { return (code >> 2 * half & 3) * 16 - 32; }), bits);
    return (Last4(four) + two) * scales[at / 16];
#else
    const Integers two = half ? (bits & 12) << 2 : (bits & 3) << 4;
    return Float(((four & 15) | two) - 32) * scales[at / 16];
#endif
  }
};

}  // namespace dex_jax

#endif  // DEX_JAX_BLOCKS_H_
