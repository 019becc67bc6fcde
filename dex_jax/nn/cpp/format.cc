// One format of kernels: -DDEX_JAX_FORMAT= says which, TilesOf<Q4_1> or NumbersOf<float>.

#include "format.h"

extern "C" const dex_jax::Format dex_jax_format = [] {
  using namespace dex_jax;
  return DEX_JAX_FORMAT();
}();
