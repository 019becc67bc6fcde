// Root-mean-square norms of rows.

#ifndef DEX_JAX_NORM_H_
#define DEX_JAX_NORM_H_

#include <cmath>

#include "elements.h"
#include "vectors.h"

namespace dex_jax {

inline void NormRow(const float* row, const float* scale, int64_t width, float epsilon, float* normed) {
  const int64_t whole = width / kLanes, rest = width % kLanes;
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
  for (int64_t i = 0; i < width; ++i) normed[i] = row[i] * inverse * scale[i];
}

// rows [..., R, width], scale [..., width] -> rows over their root mean square, times the scale. Leading dimensions are all
// but the scale's last, and may be 1 as in Multiply.
template <typename Threads, typename Dimensions>
void Normalise(const Threads& threads, const Dimensions& of_rows, const float* rows, const Dimensions& of_scale,
               const float* scale, const Dimensions& shape, float epsilon, float* result) {
  const size_t leading = of_scale.size() - 1;
  const int64_t width = of_scale[leading], count = SizeOf(shape, leading, shape.size() - 1);
  EachRow(threads, SizeOf(shape, 0, leading) * count, width, [=, &of_rows, &of_scale, &shape](int64_t r) {
    const int64_t index = r / count, within = r % count;
    NormRow(rows + (BlockOf(index, of_rows, shape, leading) * count + within) * width,
            scale + BlockOf(index, of_scale, shape, leading) * width, width, epsilon, result + r * width);
  });
}

}  // namespace dex_jax

#endif  // DEX_JAX_NORM_H_
