// The operations of a model's layers on a CPU in float32, over kernels and caches in float32 or bfloat16: norms, products,
// attention, rotated heads and gates, as XLA calls them. Here shapes and dtypes are checked; the headers do the work.
//
// The result of a row does not depend on the rows beside it, nor on how many threads work: sums are added up in
// one order.

#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "attention.h"
#include "elements.h"
#include "norm.h"
#include "product.h"
#include "xla.h"

namespace {

using namespace dex_jax;

constexpr XLA_FFI_DataType kFloat32 = XLA_FFI_DataType_F32, kBFloat16 = XLA_FFI_DataType_BF16,
                           kInt8 = XLA_FFI_DataType_S8, kUint8 = XLA_FFI_DataType_U8, kInt32 = XLA_FFI_DataType_S32,
                           kBool = XLA_FFI_DataType_PRED;

// The reason why a handler refuses a call; "" where it has done it.
using Refusal = std::string;

// Returns whether the first `leading` dimensions of an operand are those of the result, or 1.
bool Leads(Dimensions operand, Dimensions result, size_t leading) {
  for (size_t d = 0; d < leading; ++d)
    if (operand[d] != 1 && operand[d] != result[d]) return false;
  return true;
}

// The formats that have been loaded, by name.
std::mutex loading;
std::map<std::string, const Format*, std::less<>> loaded;

// Returns the name of a kernel's format: the one that a program gives, or the dtype of its numbers.
std::string_view NameOf(XLA_FFI_DataType type, std::string_view format) {
  if (!format.empty()) return type == kUint8 || type == kInt8 ? format : "tiles of another dtype than bytes";
  if (type == kFloat32) return "float32";
  return type == kBFloat16 ? "bfloat16" : "numbers of another dtype";
}

const Format* Loaded(std::string_view name) {
  const std::lock_guard<std::mutex> lock(loading);
  const auto found = loaded.find(name);
  return found == loaded.end() ? nullptr : found->second;
}

// Returns the operand, of `count` from `first` on, with the number that `number` holds, or the only one; null where there is
// no such number.
const XLA_FFI_Buffer* OneOf(const Call& call, int64_t first, int64_t count, const Array& number) {
  if (count == 1) return call.buffer(first);
  if (number.type != kInt32 || SizeOf(number.dimensions, 0, number.dimensions.size()) != 1) return nullptr;
  const int64_t index = *number.As<int32_t>();
  return index < 0 || index >= count ? nullptr : call.buffer(first + index);
}

Refusal Product(const Call& call) {
  if (call.size() < 2 || call.size() == 3 || call[0].type != kFloat32 || call.result().type != kFloat32)
    return "a product takes rows and kernels, and gives float32 for float32";
  const int64_t last = call.size() - 1;
  const XLA_FFI_Buffer* const chosen = OneOf(call, 1, std::max<int64_t>(1, last - 1), call[last]);
  if (!chosen) return "of several kernels a number says which";
  const Array rows = call[0], kernel(*chosen), result = call.result();
  const Dimensions of_rows = rows.dimensions, of_kernel = kernel.dimensions, shape = result.dimensions;
  const size_t rank = shape.size();
  if (rank < 2 || of_rows.size() != rank || of_kernel.size() != rank)
    return "rows, kernel and result of a product have the same number of dimensions, at least two";
  if (!Leads(of_rows, shape, rank - 2) || !Leads(of_kernel, shape, rank - 2))
    return "a product's leading dimensions are the result's or 1";
  if (of_rows[rank - 2] != shape[rank - 2] || of_kernel[rank - 2] != shape[rank - 1])
    return "a product takes rows [R, in] and a kernel [out, in] to [R, out]";
  const std::string_view name = NameOf(kernel.type, call.String("format"));
  const Format* const format = Loaded(name);
  if (!format) return "kernels in " + std::string(name) + " have not been loaded";
  // A row has as many numbers as columns, or as many bytes as its tiles take.
  const int64_t in = of_rows[rank - 1], width = format->weight_bytes > 0 ? in : format->bytes_of(in);
  if (!format->takes(in) || of_kernel[rank - 1] != width)
    return "a kernel's rows are as long as those that it is multiplied with";
  Multiply(call.threads(), *format, of_rows, rows.As<float>(), of_kernel, kernel.As<uint8_t>(), shape,
           result.As<float>());
  return "";
}

Refusal Norm(const Call& call) {
  if (call.size() != 2) return "a norm takes rows and their scale";
  const Array rows = call[0], scale = call[1], result = call.result();
  if (rows.type != kFloat32 || scale.type != kFloat32 || result.type != kFloat32) return "norms are float32";
  const Dimensions of_rows = rows.dimensions, of_scale = scale.dimensions, shape = result.dimensions;
  const size_t rank = shape.size(), leading = of_scale.size() - 1;
  if (of_scale.size() < 1 || rank < of_scale.size() || of_rows.size() != rank)
    return "rows and result of a norm have the same number of dimensions, its scale one or more";
  if (!Leads(of_rows, shape, leading) || !Leads(of_scale, shape, leading))
    return "a norm's leading dimensions are the result's or 1";
  for (size_t d = leading; d < rank; ++d)
    if (of_rows[d] != shape[d]) return "rows and result of a norm are of one shape";
  if (of_scale[leading] != shape[rank - 1]) return "a norm's scale is as wide as its rows";
  Normalise(call.threads(), of_rows, rows.As<float>(), of_scale, scale.As<float>(), shape, call.Float("epsilon"),
            result.As<float>());
  return "";
}

// Each source has keys and values [..., G, S, d] and mask [..., R or 1, S]. `choices` says how many keys and values each
// source has; the number behind the queries says which are meant. Without it there is one of each.
Refusal Attention(const Call& call) {
  const std::pair<const int64_t*, int64_t> choices = call.Integers("choices");
  const int64_t begin = choices.second > 0 ? 2 : 1;
  if (call.size() <= begin || call[0].type != kFloat32 || call.result().type != kFloat32)
    return "attention takes queries in float32 and of each source keys, values and a mask";
  const Array queries = call[0], result = call.result();
  const Dimensions of_queries = queries.dimensions, shape = result.dimensions;
  if (shape.size() < 3 || of_queries.size() != shape.size()) return "queries of attention are [..., R, H, d]";
  const size_t leading = shape.size() - 3;
  for (size_t d = leading; d < shape.size(); ++d)
    if (of_queries[d] != shape[d]) return "queries and result of attention are of one shape";
  if (shape[leading + 2] % kLanes != 0) return "the width of heads is a multiple of 16";
  const XLA_FFI_DataType cached = call[begin].type;
  if (cached != kFloat32 && cached != kBFloat16) return "keys and values are float32 or bfloat16";
  std::vector<Operand<Dimensions>> operands;
  int64_t groups = -1;
  for (int64_t i = begin, source = 0; i < call.size(); ++source) {
    const int64_t several = begin == 1 ? 1 : source < choices.second ? choices.first[source] : 0;
    if (several < 1 || call.size() - i <= 2 * several) return "of each source there are keys, values and a mask";
    const XLA_FFI_Buffer* const own[] = {OneOf(call, i, several, call[1]), OneOf(call, i + several, several, call[1])};
    if (!own[0]) return "of several keys and values a number says which";
    const Array keys(*own[0]), values(*own[1]), mask = call[i + 2 * several];
    i += 2 * several + 1;
    const Dimensions of_keys = keys.dimensions, of_values = values.dimensions, of_mask = mask.dimensions;
    if (keys.type != cached || values.type != cached || mask.type != kBool)
      return "keys and values of all sources are of one dtype, masks are bool";
    if (of_keys.size() != shape.size() || of_values.size() != shape.size() || of_mask.size() + 1 != shape.size())
      return "keys and values have as many dimensions as queries, masks one less";
    if (!Leads(of_queries, shape, leading) || !Leads(of_keys, shape, leading) || !Leads(of_values, shape, leading) ||
        !Leads(of_mask, shape, leading))
      return "leading dimensions of attention are the result's or 1";
    if (groups == -1) groups = of_keys[leading];
    const int64_t length = of_keys[leading + 1], width = shape[leading + 2];
    if (of_keys[leading] != groups || of_keys[leading + 2] != width || of_values[leading] != groups ||
        of_values[leading + 1] != length || of_values[leading + 2] != width)
      return "keys and values are of one shape [..., G, S, d]";
    if (of_mask[leading + 1] != length || (of_mask[leading] != 1 && of_mask[leading] != shape[leading]))
      return "a mask is [..., R, S] or [..., 1, S]";
    operands.push_back({keys.data, values.data, mask.As<bool>(), of_keys, of_values, of_mask});
  }
  if (groups < 1 || shape[leading + 1] % groups != 0) return "groups divide the heads of queries";
  const auto attend = cached == kFloat32 ? AttendAll<float, Threads, Dimensions>
                                         : AttendAll<BFloat16, Threads, Dimensions>;
  attend(call.threads(), of_queries, queries.As<float>(), operands, shape, call.Float("cap"), result.As<float>());
  return "";
}

// Splits heads side by side into queries, keys and values, and rotates queries and keys by cosines and sines.
Refusal Turn(const Call& call) {
  if (call.size() != 3 || call.results() != 3) return "heads come with cosines and sines, and become three arrays";
  const Array heads = call[0], cos = call[1], sin = call[2], queries = call.result(0), keys = call.result(1);
  for (const Array& array : {heads, cos, sin, queries, keys, call.result(2)})
    if (array.type != kFloat32) return "heads are turned in float32";
  const Dimensions of_heads = heads.dimensions, of_angles = cos.dimensions, of_sines = sin.dimensions;
  const Dimensions of_queries = queries.dimensions, of_keys = keys.dimensions, of_values = call.result(2).dimensions;
  const size_t rank = of_heads.size(), leading = rank - 2;
  if (rank < 2 || of_angles.size() != rank || of_sines.size() != rank || of_queries.size() != rank + 1 ||
      of_keys.size() != rank + 1 || of_values.size() != rank + 1)
    return "heads, cosines and sines are [..., R, numbers], queries [..., R, H, d], keys and values [..., G, R, d]";
  for (size_t d = 0; d <= rank; ++d)
    if (of_values[d] != of_keys[d] || (d < rank && of_sines[d] != of_angles[d]))
      return "keys and values are of one shape, and cosines and sines";
  for (size_t d = 0; d < leading; ++d)
    if (of_keys[d] != of_queries[d]) return "queries and keys have the same leading dimensions";
  const int64_t rows = of_heads[leading], width = of_queries[rank];
  if (!Leads(of_heads, of_queries, leading) || !Leads(of_angles, of_queries, leading) || of_angles[leading] != rows ||
      of_queries[leading] != rows || of_keys[leading + 1] != rows || of_keys[rank] != width ||
      of_heads[leading + 1] != (of_queries[leading + 1] + 2 * of_keys[leading]) * width ||
      2 * of_angles[leading + 1] > width)
    return "queries, keys and values are as many numbers as the heads, of which at most all are turned";
  dex_jax::Turn(call.threads(), of_heads, heads.As<float>(), of_angles, cos.As<float>(), sin.As<float>(), of_queries,
                of_keys, queries.As<float>(), keys.As<float>(), call.result(2).As<float>());
  return "";
}

Refusal Gate(const Call& call) {
  if (call.size() != 1 || call[0].type != kFloat32 || call.result().type != kFloat32)
    return "a gate takes rows, and gives float32 for float32";
  const Dimensions of_rows = call[0].dimensions, shape = call.result().dimensions;
  const size_t last = shape.size() - 1;
  if (shape.size() < 1 || of_rows.size() != shape.size() || of_rows[last] != 2 * shape[last])
    return "a gate's rows are twice as wide as its result";
  for (size_t d = 0; d < last; ++d)
    if (of_rows[d] != shape[d]) return "a gate has as many rows as its result";
  const std::string_view name = call.String("activation");
  if (name != "silu" && name != "gelu") return "a gate is activated by silu or gelu";
  dex_jax::Gate(call.threads(), call[0].As<float>(), SizeOf(shape, 0, last), shape[last],
                name == "silu" ? Silu : Gelu, call.result().As<float>());
  return "";
}

// Writes rows `row` [B, P] at positions from `start` [B] on into the keys and values of layers, in place.
// The rows to choose from are keys and values of all layers, [L, B, G, N, d], or of each, [B, G, N, d].
Refusal Write(const Call& call) {
  const int64_t caches = call.results(), layers = caches / 2, margin = call.Integer("margin");
  const int64_t given = call.size() - 2 - caches;
  const std::pair<const int64_t*, int64_t> rings = call.Integers("rings");
  if (caches == 0 || caches % 2 != 0 || (given != 2 && given != caches) || rings.second != layers)
    return "rows are written into the keys and values of layers that each have a ring or none";
  const Array start = call[0], row = call[1];
  const Dimensions of_start = start.dimensions, of_row = row.dimensions;
  const size_t lead = call[2].dimensions.size() == 5 ? 1 : 0;
  if (start.type != kInt32 || row.type != kInt32 || of_start.size() != 1 || of_row.size() != 2 ||
      of_row[0] != of_start[0] || (lead == 0 && given != caches) || (lead == 1 && given != 2))
    return "positions are [B], rows to choose [B, P], and those to choose from [L, B, G, N, d] or of each layer";
  const auto fresh = [&](int64_t c) { return call[2 + (lead ? c / layers : c)]; };
  const Dimensions first = fresh(0).dimensions;
  const XLA_FFI_DataType type = fresh(0).type;
  if (first.size() != 4 + lead || (type != kFloat32 && type != kBFloat16)) return "keys are float32 or bfloat16";
  const int64_t batch = first[lead], groups = first[lead + 1], from = first[lead + 2], width = first[lead + 3];
  const int64_t count = of_row[1], bytes = width * (type == kFloat32 ? 4 : 2);
  if (batch != of_row[0] || (count > 0 && from == 0)) return "each sequence has rows to choose from";
  for (int64_t c = 0; c < caches; ++c) {
    const Array own = fresh(c), cache = call[2 + given + c];
    const Dimensions of_own = own.dimensions, shape = cache.dimensions;
    bool fits = of_own.size() == first.size() && shape.size() == 4 && own.type == type && cache.type == type &&
                cache.data == call.result(c).data && (lead == 0 || of_own[0] == layers);
    for (size_t d = lead; d < first.size() && fits; ++d) fits = of_own[d] == first[d];
    const int64_t ring = rings.first[c % layers];
    if (!fits || shape[0] != batch || shape[1] != groups || shape[3] != width || count > (ring ? margin : shape[2]) ||
        (ring && shape[2] != ring + 2 * margin))
      return "caches are [B, G, S, d], of the rows' dtype, with room for what is written in place";
  }
  EachRow(call.threads(), caches * batch * groups, count * width, [&](int64_t index) {
    const int64_t c = index / (batch * groups), within = index % (batch * groups), sequence = within / groups;
    const int64_t ring = rings.first[c % layers], position = start.As<int32_t>()[sequence];
    if (position < 0) return;
    const int64_t length = call[2 + given + c].dimensions[2], block = (lead ? c % layers : 0) * batch * groups + within;
    char* const cache = call.result(c).As<char>() + within * length * bytes;
    const char* const rows = fresh(c).As<char>() + block * from * bytes;
    const auto put = [&](int64_t at) {
      for (int64_t p = 0; p < count; ++p) {
        const int64_t chosen = std::clamp<int64_t>(row.As<int32_t>()[sequence * count + p], 0, from - 1);
        std::memcpy(cache + (at + p) * bytes, rows + chosen * bytes, bytes);
      }
    };
    const int64_t place = ring ? margin + position % ring : std::min(position, length - count);
    put(place);
    // A run that passes the ring's end goes on in the margin behind it, and belongs where the ring begins.
    if (ring && place >= ring) put(place - ring);
  });
  return "";
}

}  // namespace

// Makes a format known that format.cc has been compiled for; it stays loaded. Returns null, or the reason for a refusal: rows
// that lie otherwise than it reads them would give wrong numbers.
extern "C" const char* dex_jax_load(const char* name, const Format* format) {
  const Layout given = format->weight_bytes > 0 ? kPacked : format->rounding.layout;
  if (format->layout != given) return "it reads rows in another layout than they are given in";
  const std::lock_guard<std::mutex> lock(loading);
  loaded[name] = format;
  return nullptr;
}

extern "C" XLA_FFI_Error* dex_jax_product(XLA_FFI_CallFrame* frame) { return Handle(frame, Product); }
extern "C" XLA_FFI_Error* dex_jax_norm(XLA_FFI_CallFrame* frame) { return Handle(frame, Norm); }
extern "C" XLA_FFI_Error* dex_jax_turn(XLA_FFI_CallFrame* frame) { return Handle(frame, ::Turn); }
extern "C" XLA_FFI_Error* dex_jax_gate(XLA_FFI_CallFrame* frame) { return Handle(frame, ::Gate); }
extern "C" XLA_FFI_Error* dex_jax_write(XLA_FFI_CallFrame* frame) { return Handle(frame, Write); }
extern "C" XLA_FFI_Error* dex_jax_attention(XLA_FFI_CallFrame* frame) { return Handle(frame, ::Attention); }
