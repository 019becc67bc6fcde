// Calls from XLA by its C API, as the C++ headers that jaxlib has for it take two seconds to compile.

#ifndef DEX_JAX_XLA_H_
#define DEX_JAX_XLA_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <string_view>
#include <utility>

#include "xla/ffi/api/c_api.h"

namespace dex_jax {

class Dimensions {
 public:
  Dimensions(const int64_t* first, size_t size) : first_(first), size_(size) {}
  size_t size() const { return size_; }
  int64_t operator[](size_t d) const { return first_[d]; }

 private:
  const int64_t* first_;
  size_t size_;
};

struct Array {
  XLA_FFI_DataType type;
  void* data;
  Dimensions dimensions;

  explicit Array(const void* from) : Array(*static_cast<const XLA_FFI_Buffer*>(from)) {}
  explicit Array(const XLA_FFI_Buffer& buffer)
      : type(buffer.dtype), data(buffer.data), dimensions(buffer.dims, static_cast<size_t>(buffer.rank)) {}

  template <typename Value>
  Value* As() const {
    return static_cast<Value*>(data);
  }
};

// The threads that XLA works with.
class Threads {
 public:
  explicit Threads(const XLA_FFI_CallFrame* frame) : api_(frame->api), context_(frame->ctx) {}

  int64_t num_threads() const {
    int64_t count = 1;
    XLA_FFI_ThreadPool_NumThreads_Args asked{XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr, context_, &count};
    return Failed(api_->XLA_FFI_ThreadPool_NumThreads(&asked)) ? 1 : count;
  }

  // Gives work to another thread; the caller does it where there is none.
  void Schedule(std::function<void()> work) const {
    auto* const held = new std::function<void()>(std::move(work));
    const auto run = [](void* data) {
      auto* const work = static_cast<std::function<void()>*>(data);
      (*work)();
      delete work;
    };
    XLA_FFI_ThreadPool_Schedule_Args asked{XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr, context_, run, held};
    if (Failed(api_->XLA_FFI_ThreadPool_Schedule(&asked))) run(held);
  }

 private:
  bool Failed(XLA_FFI_Error* error) const {
    if (!error) return false;
    XLA_FFI_Error_Destroy_Args destroyed{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
    api_->XLA_FFI_Error_Destroy(&destroyed);
    return true;
  }

  const XLA_FFI_Api* const api_;
  XLA_FFI_ExecutionContext* const context_;
};

// One call: arrays in, arrays out, and attributes.
class Call {
 public:
  explicit Call(const XLA_FFI_CallFrame* frame) : frame_(frame) {}

  int64_t size() const { return frame_->args.size; }
  const XLA_FFI_Buffer* buffer(int64_t index) const { return static_cast<XLA_FFI_Buffer*>(frame_->args.args[index]); }
  Array operator[](int64_t index) const { return Array(*buffer(index)); }
  int64_t results() const { return frame_->rets.size; }
  Array result(int64_t index = 0) const { return Array(frame_->rets.rets[index]); }
  Threads threads() const { return Threads(frame_); }

  std::string_view String(std::string_view name) const {
    const auto* const found = static_cast<const XLA_FFI_ByteSpan*>(Attribute(name, XLA_FFI_AttrType_STRING));
    return found ? std::string_view(found->ptr, found->len) : std::string_view();
  }

  float Float(std::string_view name) const { return Number<float>(name, XLA_FFI_DataType_F32); }
  int64_t Integer(std::string_view name) const { return Number<int64_t>(name, XLA_FFI_DataType_S64); }

  // Returns where an attribute's integers are, and their number.
  std::pair<const int64_t*, int64_t> Integers(std::string_view name) const {
    const auto* const found = static_cast<const XLA_FFI_Array*>(Attribute(name, XLA_FFI_AttrType_ARRAY));
    if (!found || found->dtype != XLA_FFI_DataType_S64) return {nullptr, 0};
    return {static_cast<const int64_t*>(found->data), static_cast<int64_t>(found->size)};
  }

 private:
  template <typename Value>
  Value Number(std::string_view name, XLA_FFI_DataType type) const {
    const auto* const found = static_cast<const XLA_FFI_Scalar*>(Attribute(name, XLA_FFI_AttrType_SCALAR));
    return found && found->dtype == type ? *static_cast<const Value*>(found->value) : 0;
  }

  const void* Attribute(std::string_view name, XLA_FFI_AttrType type) const {
    for (int64_t i = 0; i < frame_->attrs.size; ++i) {
      const XLA_FFI_ByteSpan& own = *frame_->attrs.names[i];
      if (frame_->attrs.types[i] == type && std::string_view(own.ptr, own.len) == name) return frame_->attrs.attrs[i];
    }
    return nullptr;
  }

  const XLA_FFI_CallFrame* const frame_;
};

// Returns what XLA expects of a call: null, or an error where `work` refuses it. XLA first asks for the version of the API.
inline XLA_FFI_Error* Handle(XLA_FFI_CallFrame* frame, std::string (*work)(const Call&)) {
  if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata* const asked = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
    *asked = {asked->struct_size,
              {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR}};
    return nullptr;
  }
  if (frame->stage != XLA_FFI_ExecutionStage_EXECUTE) return nullptr;
  const std::string refused = work(Call(frame));
  if (refused.empty()) return nullptr;
  const std::string message = "dex_jax: " + refused;
  XLA_FFI_Error_Create_Args error{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message.c_str(),
                                  XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return frame->api->XLA_FFI_Error_Create(&error);
}

}  // namespace dex_jax

#endif  // DEX_JAX_XLA_H_
