// SPDX-License-Identifier: Apache-2.0
//
// XLA's side of a call into the CUDA handler, for tests: a call frame as XLA makes it, a stream,
// and errors as XLA keeps them.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "xla/ffi/api/c_api.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

struct XLA_FFI_Error {
  int code;
  std::string text;
};

struct Tensor {
  int dtype;  // of XLA_FFI_DataType
  void* data;
  int64_t rank;
  int64_t* sizes;
};

struct Attribute {
  const char* name;
  int kind;  // 0: one int64; 1: an array of them; 2: a string
  void* data;
  int64_t count;
};

static void* stream;  // null: this program has none

static XLA_FFI_Error* make_error(XLA_FFI_Error_Create_Args* args) {
  return new XLA_FFI_Error{static_cast<int>(args->errc), args->message};
}
static void error_message(XLA_FFI_Error_GetMessage_Args* args) {
  args->message = args->error->text.c_str();
}
static void destroy_error(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }
static XLA_FFI_Error* get_stream(XLA_FFI_Stream_Get_Args* args) {
  if (stream == nullptr) {
    return new XLA_FFI_Error{XLA_FFI_Error_Code_UNIMPLEMENTED, "no stream here"};
  }
  args->stream = stream;
  return nullptr;
}

static XLA_FFI_Api make_api() {
  XLA_FFI_Api api{};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                     XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = make_error;
  api.XLA_FFI_Error_GetMessage = error_message;
  api.XLA_FFI_Error_Destroy = destroy_error;
  api.XLA_FFI_Stream_Get = get_stream;
  return api;
}
static const XLA_FFI_Api api = make_api();

static int told(XLA_FFI_Error* error, char* text, int64_t bytes) {
  std::snprintf(text, static_cast<size_t>(bytes), "%s",
                error == nullptr ? "" : error->text.c_str());
  const int code = error == nullptr ? 0 : error->code;
  delete error;
  return code;
}

// The handler's traits; negative: it failed.
EXPORT int fake_traits(XLA_FFI_Handler* handler) {
  XLA_FFI_Metadata metadata{};
  metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
  metadata.api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
  XLA_FFI_Metadata_Extension extension{};
  extension.extension_base.struct_size = XLA_FFI_Metadata_Extension_STRUCT_SIZE;
  extension.extension_base.type = XLA_FFI_Extension_Metadata;
  extension.metadata = &metadata;
  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.extension_start = &extension.extension_base;
  frame.api = &api;
  char text[8];
  if (told(handler(&frame), text, sizeof(text)) != 0) return -1;
  return static_cast<int>(metadata.traits);
}

// The code of the status (0: none), and its text.
EXPORT int fake_call(XLA_FFI_Handler* handler, void* on_stream, int operands, const Tensor* operand,
                     int results, const Tensor* result, int attributes, const Attribute* attribute,
                     char* text, int64_t text_bytes) {
  stream = on_stream;
  std::vector<XLA_FFI_Buffer> buffers;
  for (int i = 0; i < operands + results; ++i) {
    const Tensor& t = i < operands ? operand[i] : result[i - operands];
    buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, static_cast<XLA_FFI_DataType>(t.dtype),
                       t.data, t.rank, t.sizes});
  }
  std::vector<void*> pointers;
  for (XLA_FFI_Buffer& b : buffers) pointers.push_back(&b);
  std::vector<XLA_FFI_ArgType> arg_types(operands, XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(results, XLA_FFI_RetType_BUFFER);

  std::vector<XLA_FFI_ByteSpan> names(attributes), strings(attributes);
  std::vector<XLA_FFI_Scalar> scalars(attributes);
  std::vector<XLA_FFI_Array> arrays(attributes);
  std::vector<XLA_FFI_ByteSpan*> name_pointers;
  std::vector<XLA_FFI_AttrType> types;
  std::vector<void*> values;
  for (int i = 0; i < attributes; ++i) {
    const Attribute& a = attribute[i];
    names[i] = {a.name, std::strlen(a.name)};
    name_pointers.push_back(&names[i]);
    if (a.kind == 0) {
      scalars[i] = {XLA_FFI_DataType_S64, a.data};
      types.push_back(XLA_FFI_AttrType_SCALAR);
      values.push_back(&scalars[i]);
    } else if (a.kind == 1) {
      arrays[i] = {XLA_FFI_DataType_S64, static_cast<size_t>(a.count), a.data};
      types.push_back(XLA_FFI_AttrType_ARRAY);
      values.push_back(&arrays[i]);
    } else {
      strings[i] = {static_cast<const char*>(a.data), static_cast<size_t>(a.count)};
      types.push_back(XLA_FFI_AttrType_STRING);
      values.push_back(&strings[i]);
    }
  }

  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, operands, arg_types.data(), pointers.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, results, ret_types.data(),
                pointers.data() + operands};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,      attributes, types.data(),
                 name_pointers.data(),      values.data()};
  return told(handler(&frame), text, text_bytes);
}
