// One format of kernels, which -DDEX_JAX_FORMAT= names: TilesOf<Q4_1> or NumbersOf<float>.

#include "format.h"

extern "C" const dex_jax::Format dex_jax_format = [] {
  using namespace dex_jax;
  return DEX_JAX_FORMAT();
}();
