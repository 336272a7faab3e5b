// SPDX-License-Identifier: Apache-2.0
//
// What the handlers of calls on the CPU share.
#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "dtypes.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jaxwin {

inline xla::ffi::Error invalid(const std::string& text) {
  return {xla::ffi::ErrorCode::kInvalidArgument, "jaxwin: " + text};
}

// Of a buffer's elements; false where there are no kernels for them.
inline bool get_dtype(const xla::ffi::AnyBuffer& buffer, Dtype* dtype) {
  using Type = xla::ffi::DataType;
  constexpr std::array<Type, kDtypes> kTypes{Type::F32, Type::F64, Type::BF16, Type::F16,
                                             Type::S8,  Type::U8,  Type::S16,  Type::U16,
                                             Type::S32, Type::U32};
  const auto* const found = std::find(kTypes.begin(), kTypes.end(), buffer.element_type());
  *dtype = static_cast<Dtype>(found - kTypes.begin());
  return found != kTypes.end();
}

// At most `count` threads of XLA's pool, which must outlive it.
inline Threads threads_of(xla::ffi::ThreadPool* pool, int64_t count) {
  return {[pool](std::function<void()> work) { pool->Schedule(std::move(work)); },
          std::min<int64_t>(count, pool->num_threads() + 1)};
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// `bytes` of memory for vectors; null where there is none.
inline std::unique_ptr<void, Free> allocate(int64_t bytes) {
  constexpr int64_t kAlignment = 64;
  const int64_t whole = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return std::unique_ptr<void, Free>(std::aligned_alloc(kAlignment, static_cast<size_t>(whole)));
}

}  // namespace jaxwin
