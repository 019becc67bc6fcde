// The exponential function of vectors, and functions that are made of it.

#ifndef DEX_JAX_EXPONENTIAL_H_
#define DEX_JAX_EXPONENTIAL_H_

#include <cstring>

#include "vectors.h"

namespace dex_jax {

// e to each of a vector's lanes, to about 1e-7 of it, for lanes up to 0; 0 where nothing of it is left in float32.
inline Vector Exponential(Vector x) {
  const Integers gone = x < -87.0f;  // This is false for a NaN, which stays one.
  x = x < -87.0f ? Vector{} - 87.0f : x;
  // x = n ln 2 + rest: adding and taking away 1.5 * 2^23 rounds to a whole number.
  const Vector shifted = x * 1.44269504f + 12582912.0f;
  const Vector n = shifted - 12582912.0f;
  const Vector rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // The series of e^rest, |rest| <= ln 2 / 2, whose next term is below 1e-8.
  Vector power = Vector{} + 1.0f / 5040;
  power = MultiplyAdd(power, rest, Vector{} + 1.0f / 720);
  power = MultiplyAdd(power, rest, Vector{} + 1.0f / 120);
  power = MultiplyAdd(power, rest, Vector{} + 1.0f / 24);
  power = MultiplyAdd(power, rest, Vector{} + 1.0f / 6);
  power = MultiplyAdd(power, rest, Vector{} + 0.5f);
  power = MultiplyAdd(power, rest, Vector{} + 1.0f);
  power = MultiplyAdd(power, rest, Vector{} + 1.0f);
  // A NaN has no whole number: the sum's last bits are one in any case.
  Integers bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = ((bits - 0x4b400000 + 127) << 23) & ~gone;
  Vector scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return power * scale;
}

// cap tanh(x / cap) of each lane, to about 1e-7 of cap.
inline Vector Capped(Vector x, float cap) {
  const Integers negative = x < 0.0f;
  const Vector power = Exponential((negative ? x : -x) * (2 / cap));
  const Vector capped = (1.0f - power) / (1.0f + power) * cap;
  return negative ? -capped : capped;
}

}  // namespace dex_jax

#endif  // DEX_JAX_EXPONENTIAL_H_
