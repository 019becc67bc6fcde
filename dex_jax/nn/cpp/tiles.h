// Products of rows with packed weights, in whole numbers.
//
// Weights lie in tiles of 16 outputs (nn/tiles.py): a register holds four columns of as many outputs as it has lanes. A row is
// rounded to 16 bits in blocks of 32 columns with a scale each. Products of codes and these numbers are added up in int32,
// which is exact in any order; the sum of a block is scaled and added in float32, block after block. So the result of a row is
// the same to the last bit whatever rows are beside it, however many threads work, and whatever instructions the CPU has.
//
// CPUs with an instruction for dot products of four bytes (VNNI; ARM's dot product) multiply the two digits of 8 bits that a
// number has. All others widen the codes to 16 bits, once for all rows, and multiply pairs of whole numbers. Either layout of
// rows is compiled for any CPU with -DDEX_JAX_BYTES or -DDEX_JAX_PAIRS, as tests do; where the instruction is missing, plain
// C++ stands for it.

#ifndef DEX_JAX_TILES_H_
#define DEX_JAX_TILES_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include "vectors.h"

namespace dex_jax {

constexpr int kOutputs = 16;  // outputs of a tile
constexpr int kBlockColumns = 32;    // columns of a row that share a scale
constexpr int kWords = kBlockColumns / 4;
constexpr int kMostRows = 16;  // rows that are multiplied while a tile is in registers
// The largest number of a block: both digits of it, and of its opposite, fit into an int8.
constexpr float kLargest = 127 * 256;

#if !defined(DEX_JAX_BYTES) && !defined(DEX_JAX_PAIRS)
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__)) || defined(__ARM_FEATURE_DOTPROD)
#define DEX_JAX_BYTES
#endif
#endif

// A block of a row, whose numbers stand for `scale` times as much. Number i is 256 * high[i] + low[i], or lies in `numbers`: of
// each four columns the first and third, then the second and fourth, as widened codes lie.
struct alignas(64) Digits {
#if defined(DEX_JAX_BYTES)
  int8_t high[kBlockColumns], low[kBlockColumns];

  void Set(const int32_t* from) {
    for (int i = 0; i < kBlockColumns; ++i) low[i] = static_cast<int8_t>(from[i]);
    for (int i = 0; i < kBlockColumns; ++i) high[i] = static_cast<int8_t>((from[i] + 128) >> 8);
  }
#else
  int16_t numbers[kBlockColumns];

  void Set(const int32_t* from) {
    uint64_t fours[kWords];
    for (int i = 0; i < kBlockColumns; ++i) numbers[i] = static_cast<int16_t>(from[i]);
    std::memcpy(fours, numbers, sizeof(fours));
    for (uint64_t& four : fours)  // swaps the two in the middle
      four = (four & 0xffff00000000ffff) | (four >> 16 & 0xffff0000) | (four & 0xffff0000) << 16;
    std::memcpy(numbers, fours, sizeof(fours));
  }
#endif
};

struct About {
  float scale, sum;       // the sum of what the numbers stand for
  int32_t first, second;  // the sums of 16 numbers each
};

// Rounds `count` numbers of a row, padded with 0 to 32. A block that is not finite becomes NaN.
inline void Round(const float* row, int64_t count, Digits* digits, About* about) {
  int32_t bits[kBlockColumns] = {};
  if (count >= kBlockColumns) {
    std::memcpy(bits, row, sizeof(bits));  // of a fixed size, which is no call
  } else {
    std::memcpy(bits, row, count * sizeof(float));
  }
  int32_t most = 0;
  for (int i = 0; i < kBlockColumns; ++i) most = std::max(most, bits[i] & 0x7fffffff);
  float largest, block[kBlockColumns];
  std::memcpy(&largest, &most, sizeof(most));
  std::memcpy(block, bits, sizeof(bits));
  const float nothing = most < 0x7f800000 ? 0.0f : NAN;
  if (!(largest >= 1e-30f) || most >= 0x7f800000) {
    std::memset(digits, 0, sizeof(*digits));
    *about = {nothing, nothing, 0, 0};
    return;
  }
  const float inverse = kLargest / largest;
  // Adding 1.5 * 2^23 rounds to a whole number, whose last bits are then those of the sum.
  for (int i = 0; i < kBlockColumns; ++i) block[i] = block[i] * inverse + 12582912.0f;
  std::memcpy(bits, block, sizeof(bits));
  for (int i = 0; i < kBlockColumns; ++i) bits[i] -= 0x4b400000;
  digits->Set(bits);
  int32_t first = 0, second = 0;
  for (int i = 0; i < kBlockColumns / 2; ++i) first += bits[i], second += bits[kBlockColumns / 2 + i];
  const float scale = largest / kLargest;
  *about = {scale, scale * static_cast<float>(first + second), first, second};
}

// Rounds the blocks of a row of `in` numbers into Digits.
inline void RoundRow(const float* row, int64_t in, void* digits, About* about) {
  auto* to = static_cast<Digits*>(digits);
  for (; in > 0; row += kBlockColumns, in -= kBlockColumns) Round(row, in, to++, about++);
}

// The codes of four columns for the output of each lane.
typedef uint8_t Bytes __attribute__((vector_size(4 * kLanes)));

#if defined(__ARM_FEATURE_DOTPROD)
constexpr int kSignedZero = 0;  // Instructions there take signed codes.
#else
constexpr int kSignedZero = 128;  // Elsewhere they take unsigned ones: signed codes are raised by this number.
#endif

#if defined(DEX_JAX_BYTES)
// Adds products of codes and four digits, which are the same for all lanes.
inline Integers Dot(Integers sum, Bytes codes, const int8_t* four) {
  [[maybe_unused]] int32_t word;
  std::memcpy(&word, four, sizeof(word));
#if defined(__AVX512VNNI__)
  return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(word));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return (Integers)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, _mm256_set1_epi32(word));
#elif defined(__ARM_FEATURE_DOTPROD)
  int32x4_t sums[kLanes / 4];
  int8x16_t own[kLanes / 4];
  std::memcpy(sums, &sum, sizeof(sum)), std::memcpy(own, &codes, sizeof(codes));
  for (int i = 0; i < kLanes / 4; ++i) sums[i] = vdotq_s32(sums[i], own[i], vreinterpretq_s8_s32(vdupq_n_s32(word)));
  std::memcpy(&sum, sums, sizeof(sum));
  return sum;
#else
  for (int i = 0; i < 4; ++i) sum += ((Integers)codes >> 8 * i & 255) * four[i];
  return sum;
#endif
}
#else
// The codes of two columns for the output of each lane.
typedef int16_t Pairs __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(4 * kLanes)));

// Adds products of codes and two numbers, which are the same for all lanes.
inline Integers Dot(Integers sum, Pairs codes, const int16_t* two) {
#if defined(__AVX2__)
  int32_t word;
  std::memcpy(&word, two, sizeof(word));
#if defined(__AVX512BW__)
  return sum + (Integers)_mm512_madd_epi16((__m512i)codes, _mm512_set1_epi32(word));
#elif !defined(__AVX512F__)
  return sum + (Integers)_mm256_madd_epi16((__m256i)codes, _mm256_set1_epi32(word));
#endif
#endif
  return sum + ((Integers)codes << 16 >> 16) * two[0] + ((Integers)codes >> 16) * two[1];
}
#endif

// Returns a float16 as float32. It is done by hand where there is no instruction: XLA's threads take subnormal numbers for
// zeros, and small scales are such.
inline float HalfAt(const uint8_t* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof(half));
  const uint32_t exponent = half >> 10 & 31, fraction = half & 1023;
  float value = static_cast<float>(fraction) * 0x1p-24f;
  if (exponent > 0) {
    const uint32_t bits = (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    std::memcpy(&value, &bits, sizeof(value));
  }
  return half & 0x8000 ? -value : value;
}

// The part of a tile that belongs to the outputs in a register: words of 4 bytes, then halves.
struct Tile {
  const uint8_t* words;
  const uint8_t* halves;

  Bytes Word(int i) const {
    Bytes word;
    std::memcpy(&word, words + i * 4 * kOutputs, sizeof(word));
    return word;
  }
  Integers Int(int i) const { return (Integers)Word(i); }
  Vector Half(int i) const {
    const uint8_t* const from = halves + i * 2 * kOutputs;
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    Vector halves;
    for (int lane = 0; lane < kLanes; ++lane) halves[lane] = HalfAt(from + 2 * lane);
    return halves;
#endif
  }
};

// 32 columns of a tile: a number is scale * (code - zero of the format) + least; each 16 columns may have a scale.
struct Part {
  Bytes codes[kWords];
  Vector scale, second, least;

  // Reads the low codes of 4 bits of `count` words, and the high ones.
  void Nibbles(const Tile& tile, int from, int count, bool low, bool high) {
    for (int i = 0; i < count; ++i) {
      if (low) codes[i] = tile.Word(from + i) & 15;
      if (high) codes[low * count + i] = tile.Word(from + i) >> 4;
    }
  }
};

// a * b + c, rounded once on every machine.
inline Vector Fused(Vector a, Vector b, Vector c) {
#if defined(__FMA__)
  return MultiplyAdd(a, b, c);
#else
  for (int lane = 0; lane < kLanes; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return c;
#endif
}

inline Vector Float(Integers numbers) { return __builtin_convertvector(numbers, Vector); }

// The formats: columns, words and halves of a tile; and the code that stands for 0.

// In Q4_0 and Q4_1 the first 16 columns have the low codes of 16 bytes, the others the high ones.
struct Q4_0 {
  static constexpr int kColumns = 32, kTileWords = 4, kHalves = 1, kZero = 8;
  static constexpr bool kLeast = false, kTwo = false;
  static void Read(const Tile& tile, int, Part& part) {
    part.Nibbles(tile, 0, 4, true, true);
    part.scale = tile.Half(0);
  }
};

struct Q4_1 : Q4_0 {
  static constexpr int kHalves = 2, kZero = 0;
  static constexpr bool kLeast = true;
  static void Read(const Tile& tile, int, Part& part) {
    Q4_0::Read(tile, 0, part);
    part.least = tile.Half(1);
  }
};

// The fifth bits are in a word in front.
struct Q5_0 : Q4_0 {
  static constexpr int kTileWords = 5, kZero = 16;
  static void Read(const Tile& tile, int, Part& part) {
    part.Nibbles(tile, 1, 4, true, true);
    const Integers fifth = tile.Int(0);
    // A bit of four goes into each byte.
    for (int i = 0; i < kWords; ++i) part.codes[i] |= (Bytes)((fifth >> 4 * i & 15) * 0x02040810) & 16;
    part.scale = tile.Half(0);
  }
};

struct Q8_0 : Q4_0 {
  static constexpr int kTileWords = 8, kZero = kSignedZero;
  static void Read(const Tile& tile, int, Part& part) {
    for (int i = 0; i < kWords; ++i) part.codes[i] = tile.Word(i) ^ static_cast<uint8_t>(kSignedZero);
    part.scale = tile.Half(0);
  }
};

// Codes alone: the caller scales the products.
struct INT8 : Q8_0 {
  static constexpr int kHalves = 0;
  static void Read(const Tile& tile, int, Part& part) {
    for (int i = 0; i < kWords; ++i) part.codes[i] = tile.Word(i) ^ static_cast<uint8_t>(kSignedZero);
    part.scale = Vector{} + 1.0f;
  }
};

// 256 columns: eight scales and eight numbers to subtract, of 6 bits each, in the first three words, and two scales of these.
// Each two times 32 columns share 32 bytes: the first have the low codes, the others the high ones.
struct Q4_K : Q4_0 {
  static constexpr int kColumns = 256, kTileWords = 35, kHalves = 2, kZero = 0;
  static constexpr bool kLeast = true;
  static constexpr int kCodes = 3;
  static void Scales(const Tile& tile, int p, Part& part) {
    const Integers low = tile.Int(0), high = tile.Int(1), last = tile.Int(2);
    const int at = p % 4 * 8;
    Integers multiple = low >> at & 63, less = high >> at & 63;
    if (p >= 4) {
      multiple = (last >> at & 15) | (low >> (at + 6) & 3) << 4;
      less = (last >> (at + 4) & 15) | (high >> (at + 6) & 3) << 4;
    }
    part.scale = Float(multiple) * tile.Half(0);
    part.least = -(Float(less) * tile.Half(1));
  }
  static void Read(const Tile& tile, int p, Part& part) {
    Scales(tile, p, part);
    part.Nibbles(tile, 3 + p / 2 * 8, 8, p % 2 == 0, p % 2 == 1);
  }
};

// The fifth bits of all columns are in eight words, one of each byte for every 32 columns.
struct Q5_K : Q4_K {
  static constexpr int kTileWords = 43;
  static void Read(const Tile& tile, int p, Part& part) {
    Scales(tile, p, part);
    part.Nibbles(tile, 11 + p / 2 * 8, 8, p % 2 == 0, p % 2 == 1);
    for (int i = 0; i < kWords; ++i) part.codes[i] |= (Bytes)((tile.Int(3 + i) >> p & 0x01010101) << 4);
  }
};

// 16 scales of 8 bits for 16 columns each, and a scale of these. Each 128 columns share 64 bytes: the first 64 have the low
// codes, the others the high ones, and two more bits of all are in 32 bytes.
struct Q6_K : Q4_0 {
  static constexpr int kColumns = 256, kTileWords = 52, kHalves = 1, kZero = 32;
  static constexpr bool kTwo = true;
  static void Read(const Tile& tile, int p, Part& part) {
    const int of_128 = p / 4, quarter = p % 4;
    part.Nibbles(tile, of_128 * 16 + quarter % 2 * 8, 8, quarter < 2, quarter >= 2);
    for (int i = 0; i < kWords; ++i) part.codes[i] |= (Bytes)((tile.Int(32 + of_128 * 8 + i) >> 2 * quarter & 0x03030303) << 4);
    const Integers scales = tile.Int(48 + p / 2) << (16 - p % 2 * 16);
    part.scale = Float(scales << 8 >> 24) * tile.Half(0);
    part.second = Float(scales >> 24) * tile.Half(0);
  }
};

// Rounded rows: the blocks of row r, which are Digits, begin at r * blocks.
struct Rows {
  const void* digits;
  const About* about;
  int64_t blocks;
};

// The codes of a part as they are multiplied: `kWide` registers of outputs with `kTogether` rows, whose sums stay in registers.
#if defined(DEX_JAX_BYTES)
constexpr int kWide = 1, kTogether = 1, kUnrolled = kMostRows;

struct Codes {
  const Part* parts;
  explicit Codes(const Part* parts) : parts(parts) {}

  // Computes the products of words [kBegin, kEnd) with a block of each of R rows, which lie `blocks` apart.
  template <int kBegin, int kEnd, int R>
  __attribute__((always_inline)) void Multiply(const Digits* digits, int64_t blocks, Integers (*sums)[kWide]) const {
    for (int r = 0; r < R; ++r) {
      Integers high[2] = {}, low[2] = {};  // sums that do not wait for each other
#pragma GCC unroll 8
      for (int i = kBegin; i < kEnd; ++i) {
        high[i % 2] = Dot(high[i % 2], parts->codes[i], digits[r * blocks].high + 4 * i);
        low[i % 2] = Dot(low[i % 2], parts->codes[i], digits[r * blocks].low + 4 * i);
      }
      sums[r][0] = ((high[0] + high[1]) << 8) + low[0] + low[1];
    }
  }
};
#else
// The rows' loop stays one: unrolled, it is too long for the cache of decoded instructions, and 16 rows take twice as long.
constexpr int kWide = kOutputs / kLanes, kTogether = 2, kUnrolled = 1;

struct Codes {
  Pairs pairs[2 * kWords][kWide];
  explicit Codes(const Part* parts) {
    for (int w = 0; w < kWide; ++w)
      for (int i = 0; i < kWords; ++i) {
        pairs[2 * i][w] = (Pairs)parts[w].codes[i] & 255;
        pairs[2 * i + 1][w] = (Pairs)((Halves)parts[w].codes[i] >> 8);
      }
  }

  // Computes the products of words [kBegin, kEnd) with a block of each of R rows, which lie `blocks` apart.
  template <int kBegin, int kEnd, int R>
  __attribute__((always_inline)) void Multiply(const Digits* digits, int64_t blocks, Integers (*sums)[kWide]) const {
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < kWide; ++w) sums[r][w] = Integers{};
#pragma GCC unroll 16
    for (int i = 2 * kBegin; i < 2 * kEnd; ++i)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int w = 0; w < kWide; ++w)
          sums[r][w] = InRegister(Dot(sums[r][w], pairs[i][w], digits[r * blocks].numbers + 2 * i));
  }
};
#endif

template <typename Format>
struct Tiles {
  static constexpr int64_t kTileBytes = kOutputs * (4 * Format::kTileWords + 2 * Format::kHalves);
  static constexpr int kParts = Format::kColumns / kBlockColumns;

  // Computes 16 outputs, with tiles one behind the other, of `count` rows from `first` on: [count, 16].
  static void Multiply(const Rows& rows, int64_t first, int64_t count, const uint8_t* tiles, float* result) {
    Some<kMostRows>(rows, first, count, tiles, result);
  }

 private:
  template <int R>
  static void Some(const Rows& rows, int64_t first, int64_t count, const uint8_t* tiles, float* result) {
    for (; count >= R; first += R, count -= R, result += R * kOutputs)
      for (int lane = 0; lane < kOutputs; lane += kWide * kLanes) Add<R>(rows, first, tiles, lane, result + lane);
    if constexpr (R > 1) Some<R / 2>(rows, first, count, tiles, result);
  }

  template <int R>
  static __attribute__((noinline)) void Add(const Rows& rows, int64_t first, const uint8_t* tiles, int lane, float* result) {
    constexpr int together = R < kTogether ? R : kTogether;
    Vector totals[R][kWide] = {};
    const Digits* digits = static_cast<const Digits*>(rows.digits) + first * rows.blocks;
    const About* about = rows.about + first * rows.blocks;
    for (int64_t block = 0; block < rows.blocks; tiles += kTileBytes) {
      for (int line = 0; line < kTileBytes; line += kLine) __builtin_prefetch(tiles + kAhead + line);
      for (int p = 0; p < kParts; ++p, ++block, ++digits, ++about) {
        Part parts[kWide];
        for (int w = 0; w < kWide; ++w) {
          const int at = lane + w * kLanes;
          Format::Read({tiles + 4 * at, tiles + 4 * Format::kTileWords * kOutputs + 2 * at}, p, parts[w]);
        }
        const Codes codes(parts);
#pragma GCC unroll kUnrolled
        for (int r = 0; r < R; r += together)
          Sum<together>(parts, codes, digits + r * rows.blocks, about + r * rows.blocks, rows.blocks, totals + r);
      }
    }
    for (int r = 0; r < R; ++r) std::memcpy(result + r * kOutputs, totals[r], sizeof(totals[r]));
  }

  // Adds the products of a part with a block of each of R rows to the rows' totals.
  template <int R>
  static __attribute__((always_inline)) void Sum(const Part* parts, const Codes& codes, const Digits* digits,
                                                 const About* about, int64_t blocks, Vector (*totals)[kWide]) {
    constexpr int half = kWords / 2;
    Integers first[R][kWide], second[R][kWide];
    codes.template Multiply<0, Format::kTwo ? half : kWords, R>(digits, blocks, first);
    if constexpr (Format::kTwo) codes.template Multiply<half, kWords, R>(digits, blocks, second);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int w = 0; w < kWide; ++w) {
        const About& own = about[r * blocks];
        const Part& part = parts[w];
        Integers whole = first[r][w];
        if (Format::kZero != 0) whole -= Format::kZero * (Format::kTwo ? own.first : own.first + own.second);
        Vector& total = totals[r][w];
        total = Fused(Float(whole) * own.scale, part.scale, total);
        if (Format::kTwo) total = Fused(Float(second[r][w] - Format::kZero * own.second) * own.scale, part.second, total);
        if (Format::kLeast) total = Fused(part.least, Vector{} + own.sum, total);
      }
  }
};

}  // namespace dex_jax

#endif  // DEX_JAX_TILES_H_
