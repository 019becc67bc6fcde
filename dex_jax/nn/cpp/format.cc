// One format of kernels: -DDEX_JAX_FORMAT= says which, Blocks<Q4_1> or Numbers<float>.

#include "format.h"

extern "C" const dex_jax::Format dex_jax_format = [] {
  using namespace dex_jax;
  return FormatOf<DEX_JAX_FORMAT>();
}();
