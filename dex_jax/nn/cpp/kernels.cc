// What the model's layers do on a CPU in float32, over kernels and caches that may be kept in bfloat16: norms, products
// and attention, as XLA calls them. Here shapes and dtypes are checked; the headers do the work.
//
// What comes out for a row does not depend on the rows beside it, nor on how many threads work: sums are added up in
// one order.

#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "attention.h"
#include "norm.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Dimensions = ffi::Span<const int64_t>;

ffi::Error Refused(const std::string& why) { return ffi::Error::InvalidArgument("dex_jax: " + why); }

// Whether the first `leading` dimensions of an operand are those of the result, or 1.
bool Leads(Dimensions operand, Dimensions result, size_t leading) {
  for (size_t d = 0; d < leading; ++d)
    if (operand[d] != 1 && operand[d] != result[d]) return false;
  return true;
}

// The formats that have been loaded, by name.
std::mutex loading;
std::map<std::string, const dex_jax::Format*, std::less<>> loaded;

// The format of a kernel: what a program calls it, and numbers of a dtype where it does not.
std::string_view NameOf(ffi::DataType type, std::string_view format) {
  if (!format.empty()) return type == ffi::U8 ? format : "blocks of another dtype than uint8";
  if (type == ffi::F32) return "float32";
  if (type == ffi::BF16) return "bfloat16";
  return type == ffi::S8 ? "int8" : "numbers of another dtype";
}

const dex_jax::Format* Loaded(std::string_view name) {
  const std::lock_guard<std::mutex> lock(loading);
  const auto found = loaded.find(name);
  return found == loaded.end() ? nullptr : found->second;
}

ffi::Error Product(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> rows, ffi::AnyBuffer kernel,
                   ffi::ResultBuffer<ffi::F32> result, std::string_view format) {
  const Dimensions of_rows = rows.dimensions(), of_kernel = kernel.dimensions(), shape = result->dimensions();
  const size_t rank = shape.size();
  if (rank < 2 || of_rows.size() != rank || of_kernel.size() != rank)
    return Refused("rows, kernel and result of a product have the same number of dimensions, at least two");
  if (!Leads(of_rows, shape, rank - 2) || !Leads(of_kernel, shape, rank - 2))
    return Refused("a product's leading dimensions are the result's or 1");
  if (of_rows[rank - 2] != shape[rank - 2] || of_kernel[rank - 2] != shape[rank - 1])
    return Refused("a product takes rows [R, in] and a kernel [out, in] to [R, out]");
  const std::string_view name = NameOf(kernel.element_type(), format);
  const dex_jax::Format* const known = Loaded(name);
  if (!known) return Refused("kernels in " + std::string(name) + " have not been loaded");
  const int64_t in = of_rows[rank - 1], bytes = of_kernel[rank - 1] * ffi::ByteWidth(kernel.element_type());
  if (!known->takes(in) || known->bytes_of(in) != bytes)
    return Refused("a kernel's rows are as long as those that it is multiplied with");
  dex_jax::Multiply(threads, *known, of_rows, rows.typed_data(), of_kernel,
                    static_cast<const uint8_t*>(kernel.untyped_data()), shape, result->typed_data());
  return ffi::Error::Success();
}

ffi::Error Norm(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> rows, ffi::Buffer<ffi::F32> scale,
                ffi::ResultBuffer<ffi::F32> result, float epsilon) {
  const Dimensions of_rows = rows.dimensions(), of_scale = scale.dimensions(), shape = result->dimensions();
  const size_t rank = shape.size(), leading = of_scale.size() - 1;
  if (of_scale.size() < 1 || rank < of_scale.size() || of_rows.size() != rank)
    return Refused("rows and result of a norm have the same number of dimensions, its scale one or more");
  if (!Leads(of_rows, shape, leading) || !Leads(of_scale, shape, leading))
    return Refused("a norm's leading dimensions are the result's or 1");
  for (size_t d = leading; d < rank; ++d)
    if (of_rows[d] != shape[d]) return Refused("rows and result of a norm are of one shape");
  if (of_scale[leading] != shape[rank - 1]) return Refused("a norm's scale is as wide as its rows");
  dex_jax::Normalise(threads, of_rows, rows.typed_data(), of_scale, scale.typed_data(), shape, epsilon,
                     result->typed_data());
  return ffi::Error::Success();
}

// Of each source keys and values [..., G, S, d] and mask [..., R or 1, S].
ffi::Error Attention(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> queries, ffi::RemainingArgs rest,
                     ffi::ResultBuffer<ffi::F32> result, float cap) {
  const Dimensions of_queries = queries.dimensions(), shape = result->dimensions();
  if (shape.size() < 3 || of_queries.size() != shape.size() || rest.size() == 0 || rest.size() % 3 != 0)
    return Refused("attention takes queries [..., R, H, d] and of each source keys, values and a mask");
  const size_t leading = shape.size() - 3;
  for (size_t d = leading; d < shape.size(); ++d)
    if (of_queries[d] != shape[d]) return Refused("queries and result of attention are of one shape");
  if (shape[leading + 2] % dex_jax::kLanes != 0) return Refused("the width of heads is a multiple of 16");
  std::vector<ffi::AnyBuffer> buffers;
  for (size_t i = 0; i < rest.size(); ++i) {
    const auto buffer = rest.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    buffers.push_back(*buffer);
  }
  const ffi::DataType cached = buffers[0].element_type();
  if (cached != ffi::F32 && cached != ffi::BF16) return Refused("keys and values are float32 or bfloat16");
  std::vector<dex_jax::Operand<Dimensions>> operands;
  int64_t groups = -1;
  for (size_t i = 0; i < buffers.size(); i += 3) {
    const ffi::AnyBuffer &keys = buffers[i], &values = buffers[i + 1], &mask = buffers[i + 2];
    const Dimensions of_keys = keys.dimensions(), of_values = values.dimensions(), of_mask = mask.dimensions();
    if (keys.element_type() != cached || values.element_type() != cached || mask.element_type() != ffi::PRED)
      return Refused("keys and values of all sources are of one dtype, masks are bool");
    if (of_keys.size() != shape.size() || of_values.size() != shape.size() || of_mask.size() + 1 != shape.size())
      return Refused("keys and values have as many dimensions as queries, masks one less");
    if (!Leads(of_queries, shape, leading) || !Leads(of_keys, shape, leading) || !Leads(of_values, shape, leading) ||
        !Leads(of_mask, shape, leading))
      return Refused("leading dimensions of attention are the result's or 1");
    if (groups == -1) groups = of_keys[leading];
    const int64_t length = of_keys[leading + 1], width = shape[leading + 2];
    if (of_keys[leading] != groups || of_keys[leading + 2] != width || of_values[leading] != groups ||
        of_values[leading + 1] != length || of_values[leading + 2] != width)
      return Refused("keys and values are of one shape [..., G, S, d]");
    if (of_mask[leading + 1] != length || (of_mask[leading] != 1 && of_mask[leading] != shape[leading]))
      return Refused("a mask is [..., R, S] or [..., 1, S]");
    operands.push_back({keys.untyped_data(), values.untyped_data(), static_cast<const bool*>(mask.untyped_data()),
                        of_keys, of_values, of_mask});
  }
  if (groups < 1 || shape[leading + 1] % groups != 0) return Refused("groups divide the heads of queries");
  const auto attend = cached == ffi::F32 ? dex_jax::AttendAll<float, ffi::ThreadPool, Dimensions>
                                         : dex_jax::AttendAll<dex_jax::BFloat16, ffi::ThreadPool, Dimensions>;
  attend(threads, of_queries, queries.typed_data(), operands, shape, cap, result->typed_data());
  return ffi::Error::Success();
}

}  // namespace

// Makes a format known that format.cc has been compiled for; it stays loaded.
extern "C" void dex_jax_load(const char* name, const dex_jax::Format* format) {
  const std::lock_guard<std::mutex> lock(loading);
  loaded[name] = format;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(dex_jax_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<std::string_view>("format"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dex_jax_norm, Norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dex_jax_attention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("cap"));
