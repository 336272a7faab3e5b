// SPDX-License-Identifier: Apache-2.0
//
// The XLA FFI entry points of passes over arrays by channel. They trust nothing, as handler.cc.

#include "channels.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>

#include "call.h"
#include "isa.h"
#include "pages.h"
#include "xla/ffi/api/ffi.h"

namespace jaxwin {
namespace {

namespace ffi = xla::ffi;

// What one task takes at a time, in bytes of an array.
constexpr int64_t kTask = int64_t{1} << 18;
// A partial sum has so many bytes of rows, and no more rows than leave a long sum its digits. Part
// of what the numbers are, so it depends on the shape alone.
constexpr int64_t kChunk = int64_t{1} << 19;
constexpr int64_t kChunkRows = 4096;

struct Rows {
  int64_t rows = 0;
  int64_t cols = 0;
  Dtype dtype = kF32;
  int64_t row_bytes() const { return cols * kDtypeRows[dtype].size; }
};

bool has_shape(const ffi::AnyBuffer& buffer, const Rows& a, int64_t rows) {
  Dtype dtype = kF32;
  const auto dimensions = buffer.dimensions();
  return get_dtype(buffer, &dtype) && dtype == a.dtype && dimensions.size() == 2 &&
         dimensions[0] == rows && dimensions[1] == a.cols;
}

// Empty, or what is wrong with x.
std::string get_rows(const ffi::AnyBuffer& x, Rows* a) {
  if (!get_dtype(x, &a->dtype) || !is_plain(a->dtype, a->dtype)) {
    return "x: no kernels for its element type";
  }
  if (x.dimensions().size() != 2) return "x: must have two dimensions, rows and channels";
  a->rows = x.dimensions()[0];
  a->cols = x.dimensions()[1];
  return {};
}

// Those of the named set, or of the best one where the program comes from another machine.
const Isa& isa_of_call(std::string_view name) {
  const Isa* set = find_isa(std::string(name));
  return set == nullptr ? *best_isa("") : *set;
}

// One thread per task's worth of bytes, and no more than there are.
Threads pool_for(ffi::ThreadPool* pool, int64_t threads, int64_t bytes) {
  return threads_of(pool, std::clamp<int64_t>(bytes / kTask, 1, std::max<int64_t>(1, threads)));
}

ffi::Error scale(ffi::ThreadPool thread_pool, std::string_view isa, int64_t threads,
                 int64_t activation, ffi::AnyBuffer x, ffi::AnyBuffer line, ffi::RemainingArgs rest,
                 ffi::Result<ffi::AnyBuffer> y) {
  Rows a;
  const std::string wrong = get_rows(x, &a);
  if (!wrong.empty()) return invalid(wrong);
  if (!has_shape(line, a, 2)) return invalid("line: must have two rows of the width and type of x");
  if (!has_shape(*y, a, a.rows)) return invalid("result: must have the shape and type of x");
  if (rest.size() > 1) return invalid("expected two or three operands");
  const char* residual = nullptr;
  if (rest.size() == 1) {
    const auto buffer = rest.get<ffi::AnyBuffer>(0);
    if (!buffer.has_value()) return buffer.error();
    if (!has_shape(*buffer, a, a.rows)) {
      return invalid("residual: must have the shape and type of x");
    }
    residual = static_cast<const char*>(buffer->untyped_data());
  }
  const ChannelKernels& k = *isa_of_call(isa).channels(kDtypeRows[a.dtype].word);
  if (activation < 0 || activation >= kActivationCount || (k.activations >> activation & 1U) == 0) {
    return invalid("activation: unknown, or not one of the kernels for this element type");
  }
  if (a.rows == 0 || a.cols == 0) return ffi::Error::Success();

  const auto* from = static_cast<const char*>(x.untyped_data());
  auto* to = static_cast<char*>(y->untyped_data());
  const int64_t bytes = a.rows * a.row_bytes();
  advise_huge_pages(to, bytes);
  const int64_t step = std::max<int64_t>(1, kTask / a.row_bytes());
  pool_for(&thread_pool, threads, bytes)
      .run((a.rows + step - 1) / step, [&](int64_t task, int64_t) {
        const int64_t first = task * step;
        const int64_t at = first * a.row_bytes();
        const ScaleArgs args{from + at,
                             line.untyped_data(),
                             residual == nullptr ? nullptr : residual + at,
                             to + at,
                             std::min(step, a.rows - first),
                             a.cols,
                             static_cast<Activation>(activation)};
        k.scale(&args);
      });
  return ffi::Error::Success();
}

ffi::Error moments(ffi::ThreadPool thread_pool, std::string_view isa, int64_t threads,
                   ffi::AnyBuffer x, ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> out) {
  Rows a;
  const std::string wrong = get_rows(x, &a);
  if (!wrong.empty()) return invalid(wrong);
  if (!has_shape(g, a, a.rows)) return invalid("g: must have the shape and type of x");
  if (!has_shape(*out, a, 2)) {
    return invalid("result: must have two rows of the width and type of x");
  }
  if (a.cols == 0) return ffi::Error::Success();
  const Isa& set = isa_of_call(isa);
  const Word word = kDtypeRows[a.dtype].word;
  const ChannelKernels& k = *set.channels(word);

  const int64_t step = std::clamp<int64_t>(kChunk / a.row_bytes(), 1, kChunkRows);
  const int64_t chunks = std::max<int64_t>(1, (a.rows + step - 1) / step);
  const int64_t pair = 2 * a.row_bytes();
  auto* result = static_cast<char*>(out->untyped_data());
  // Those of the first chunk go to the result at once.
  const std::unique_ptr<void, Free> own = allocate((chunks - 1) * pair);
  if (own == nullptr && chunks > 1) {
    return {ffi::ErrorCode::kResourceExhausted, "jaxwin: no memory for partial sums"};
  }
  const auto sums_of = [&](int64_t chunk) {
    return chunk == 0 ? result : static_cast<char*>(own.get()) + (chunk - 1) * pair;
  };
  const Threads pool = pool_for(&thread_pool, threads, a.rows * a.row_bytes());
  pool.run(chunks, [&](int64_t chunk, int64_t) {
    char* sums = sums_of(chunk);
    std::memset(sums, 0, static_cast<size_t>(pair));
    const int64_t at = chunk * step * a.row_bytes();
    const MomentsArgs args{static_cast<const char*>(x.untyped_data()) + at,
                           static_cast<const char*>(g.untyped_data()) + at, sums,
                           std::min(step, a.rows - chunk * step), a.cols};
    k.moments(&args);
  });
  pool.run(1, [&](int64_t, int64_t) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      set.kernels(word)->accumulate(result, sums_of(chunk), 2 * a.cols);
    }
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxwin_scale, scale,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<std::string_view>("isa")
                                  .Attr<int64_t>("threads")
                                  .Attr<int64_t>("activation")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxwin_moments, moments,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<std::string_view>("isa")
                                  .Attr<int64_t>("threads")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace

void* scale_handler() { return reinterpret_cast<void*>(jaxwin_scale); }
void* moments_handler() { return reinterpret_cast<void*>(jaxwin_moments); }

}  // namespace jaxwin
