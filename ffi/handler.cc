// SPDX-License-Identifier: Apache-2.0
//
// The XLA FFI entry point. It trusts nothing: problem and plan are rebuilt and checked from the
// buffers and attributes of the call, and every failure is a status with one line of text.

#include "handler.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "plan.h"
#include "problem.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jaxwin {
namespace {

namespace ffi = xla::ffi;

ffi::Error invalid(const std::string& text) {
  return {ffi::ErrorCode::kInvalidArgument, "jaxwin: " + text};
}

bool get(const ffi::Dictionary& attributes, const char* name, std::vector<int64_t>* out) {
  const auto value = attributes.get<ffi::Span<const int64_t>>(name);
  if (!value.has_value()) return false;
  out->assign(value->begin(), value->end());
  return true;
}

bool get(const ffi::Dictionary& attributes, const char* name, int64_t* out) {
  const auto value = attributes.get<int64_t>(name);
  if (!value.has_value()) return false;
  *out = *value;
  return true;
}

bool get(const ffi::Dictionary& attributes, const char* name, std::string* out) {
  const auto value = attributes.get<std::string_view>(name);
  if (!value.has_value()) return false;
  *out = std::string(*value);
  return true;
}

std::vector<int64_t> shape(const ffi::AnyBuffer& buffer) {
  return {buffer.dimensions().begin(), buffer.dimensions().end()};
}

bool is_f32(const ffi::AnyBuffer& buffer) { return buffer.element_type() == ffi::DataType::F32; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};

ffi::Error convolve(ffi::ThreadPool thread_pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                    ffi::Dictionary attributes) {
  ConvParams params;
  PlanRequest request;
  std::vector<int64_t> padding;
  int64_t has_bias = 0;
  int64_t has_residual = 0;
  int64_t activation = 0;
#define JAXWIN_ATTRIBUTE(name, target) \
  if (!get(attributes, name, &(target))) return invalid("attribute " name " is missing or of a wrong type")
  JAXWIN_ATTRIBUTE("lhs_spec", params.lhs_spec);
  JAXWIN_ATTRIBUTE("rhs_spec", params.rhs_spec);
  JAXWIN_ATTRIBUTE("out_spec", params.out_spec);
  JAXWIN_ATTRIBUTE("window_strides", params.window_strides);
  JAXWIN_ATTRIBUTE("padding", padding);
  JAXWIN_ATTRIBUTE("lhs_dilation", params.lhs_dilation);
  JAXWIN_ATTRIBUTE("rhs_dilation", params.rhs_dilation);
  JAXWIN_ATTRIBUTE("feature_group_count", params.feature_group_count);
  JAXWIN_ATTRIBUTE("batch_group_count", params.batch_group_count);
  JAXWIN_ATTRIBUTE("algorithm", request.algorithm);
  JAXWIN_ATTRIBUTE("isa", request.isa);
  JAXWIN_ATTRIBUTE("threads", request.threads);
  JAXWIN_ATTRIBUTE("params", request.params);
  JAXWIN_ATTRIBUTE("has_bias", has_bias);
  JAXWIN_ATTRIBUTE("has_residual", has_residual);
  JAXWIN_ATTRIBUTE("activation", activation);
#undef JAXWIN_ATTRIBUTE
  if (padding.size() % 2 != 0) return invalid("padding: pairs of low and high are needed");
  for (size_t d = 0; d < padding.size(); d += 2) {
    params.padding_low.push_back(padding[d]);
    params.padding_high.push_back(padding[d + 1]);
  }
  if (activation < 0 || activation >= kActivationCount) return invalid("activation: unknown");
  const size_t operands = 2 + (has_bias != 0 ? 1 : 0) + (has_residual != 0 ? 1 : 0);
  if (args.size() != operands || rets.size() < 1 || rets.size() > 2) {
    return invalid("expected " + std::to_string(operands) + " operands and one or two results");
  }

  std::vector<ffi::AnyBuffer> in;
  for (size_t i = 0; i < operands; ++i) {
    auto buffer = args.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    if (!is_f32(*buffer)) return invalid("operands must be float32");
    in.push_back(*buffer);
  }
  auto out = rets.get<ffi::AnyBuffer>(0);
  if (!out.has_value()) return out.error();
  if (!is_f32(**out)) return invalid("the result must be float32");

  params.lhs_shape = shape(in[0]);
  params.rhs_shape = shape(in[1]);
  params.out_shape = shape(**out);
  Problem problem;
  if (const std::string wrong = make_problem(params, &problem); !wrong.empty()) {
    return invalid(wrong);
  }
  Operands o{};
  o.x = static_cast<const float*>(in[0].untyped_data());
  o.w = static_cast<const float*>(in[1].untyped_data());
  o.y = static_cast<float*>((*out)->untyped_data());
  o.activation = static_cast<Activation>(activation);
  size_t next = 2;
  if (has_bias != 0) {
    if (in[next].dimensions().size() != 1 || in[next].dimensions()[0] != problem.g * problem.k) {
      return invalid("bias: must have one value per output feature");
    }
    o.bias = static_cast<const float*>(in[next++].untyped_data());
  }
  if (has_residual != 0) {
    if (shape(in[next]) != params.out_shape) {
      return invalid("residual: must have the shape of the result");
    }
    o.residual = static_cast<const float*>(in[next].untyped_data());
  }

  Plan plan;
  std::string wrong = make_plan(problem, request, &plan);
  if (!wrong.empty() && plan.target.kernels == nullptr) {
    // The program was compiled on a machine with another instruction set: the same bits by a
    // plan of this one.
    request.isa.clear();
    request.params.clear();
    wrong = make_plan(problem, request, &plan);
  }
  if (!wrong.empty()) return invalid(wrong);

  float* workspace = nullptr;
  int64_t available = 0;
  if (rets.size() == 2) {
    auto buffer = rets.get<ffi::AnyBuffer>(1);
    if (!buffer.has_value()) return buffer.error();
    workspace = static_cast<float*>((*buffer)->untyped_data());
    available = static_cast<int64_t>((*buffer)->size_bytes());
  }
  std::unique_ptr<void, Free> own;
  if (available < plan.workspace_bytes ||
      reinterpret_cast<uintptr_t>(workspace) % alignof(float) != 0) {
    constexpr size_t kAlignment = 64;
    own.reset(std::aligned_alloc(
        kAlignment, static_cast<size_t>(round_up(plan.workspace_bytes, kAlignment))));
    if (own == nullptr) {
      return {ffi::ErrorCode::kResourceExhausted,
              "jaxwin: no memory for a workspace of " + std::to_string(plan.workspace_bytes) +
                  " bytes"};
    }
    workspace = static_cast<float*>(own.get());
  }

  const int64_t threads =
      std::min<int64_t>(plan.target.threads, static_cast<int64_t>(thread_pool.num_threads()) + 1);
  const Threads pool(
      [&thread_pool](std::function<void()> work) { thread_pool.Schedule(std::move(work)); },
      threads);
  try {
    plan.algorithm->run(problem, plan.params, o, {plan.target, &pool, workspace});
  } catch (const std::bad_alloc&) {
    return {ffi::ErrorCode::kResourceExhausted, "jaxwin: out of memory"};
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxwin_conv_handler, convolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs());

}  // namespace

void* conv_handler() { return reinterpret_cast<void*>(jaxwin_conv_handler); }

}  // namespace jaxwin
