// SPDX-License-Identifier: Apache-2.0
//
// The XLA FFI entry point on CUDA. As on the CPU it trusts nothing: problem and plan are rebuilt
// and checked. It only queues work on XLA's stream and may be recorded into a command buffer.

#include "cuda/handler.h"

#include <algorithm>
#include <array>
#include <exception>
#include <new>
#include <string>

#include "attributes.h"
#include "cuda/algorithms.h"
#include "cuda/building.h"
#include "cuda/runtime.h"
#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jaxwin::cuda {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kWorkspaceAlignment = 16;  // what the widest copies need

ffi::Error invalid(const std::string& text) {
  return {ffi::ErrorCode::kInvalidArgument, "jaxwin: " + text};
}

ffi::Error error_of(const Status& status) {
  const auto code = [&] {
    switch (status.failure) {
      case Failure::kUnavailable:
        return ffi::ErrorCode::kUnavailable;
      case Failure::kInvalid:
        return ffi::ErrorCode::kInvalidArgument;
      case Failure::kOutOfMemory:
        return ffi::ErrorCode::kResourceExhausted;
      default:
        return ffi::ErrorCode::kInternal;
    }
  }();
  return {code, "jaxwin: " + status.text};
}

std::vector<int64_t> shape(const ffi::AnyBuffer& buffer) {
  return {buffer.dimensions().begin(), buffer.dimensions().end()};
}

bool type_of(const ffi::AnyBuffer& buffer, Type* type) {
  constexpr std::array<ffi::DataType, kTypeCount> kTypes{ffi::DataType::F32, ffi::DataType::BF16,
                                                         ffi::DataType::F16};
  const auto* const found = std::find(kTypes.begin(), kTypes.end(), buffer.element_type());
  if (found == kTypes.end()) return false;
  *type = static_cast<Type>(found - kTypes.begin());
  return true;
}

ffi::Error compute(void* stream, const ffi::Dictionary& attributes, const ffi::RemainingArgs& args,
                   const ffi::RemainingRets& rets) {
  CallAttributes call;
  std::string wrong = decode_attributes(attributes, &call);
  if (!wrong.empty()) return invalid(wrong);
  if (call.conv.rhs_panel != 0) return invalid("packed filters are for the CPU");
  const size_t operands = 2 + (call.has_bias ? 1 : 0) + (call.has_residual ? 1 : 0);
  if (args.size() != operands || rets.empty() || rets.size() > 2) {
    return invalid("expected " + std::to_string(operands) + " operands and one or two results");
  }
  PlanRequest request;
  constexpr size_t kMostOperands = 4;
  std::array<const void*, kMostOperands> data{};
  for (size_t i = 0; i < operands; ++i) {
    const auto buffer = args.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    Type type{};
    if (!type_of(*buffer, &type) || (i > 0 && type != request.types.operand)) {
      return invalid("operands: must all be float32, bfloat16 or float16");
    }
    request.types.operand = type;
    data[i] = buffer->untyped_data();
  }
  auto out = rets.get<ffi::AnyBuffer>(0);
  if (!out.has_value()) return out.error();
  Type result{};
  if (!type_of(**out, &result) || (result != request.types.operand && result != Type::kF32)) {
    return invalid("the result must have the operands' type or be float32");
  }
  request.types.wide_result = result != request.types.operand;

  call.conv.lhs_shape = shape(*args.get<ffi::AnyBuffer>(0));
  call.conv.rhs_shape = shape(*args.get<ffi::AnyBuffer>(1));
  call.conv.out_shape = shape(**out);
  Problem problem;
  wrong = make_problem(call.conv, &problem);
  if (!wrong.empty()) return invalid(wrong);
  request.algorithm = call.algorithm;
  request.params = call.params;
  Plan plan;
  wrong = make_plan(problem, request, &plan);
  if (!wrong.empty()) return invalid(wrong);

  Buffers buffers;
  buffers.x = data[0];
  buffers.w = data[1];
  buffers.y = (*out)->untyped_data();
  buffers.activation = call.activation;
  size_t next = 2;
  if (call.has_bias) {
    const auto bias = args.get<ffi::AnyBuffer>(next);
    if (bias->dimensions().size() != 1 || bias->dimensions()[0] != problem.g * problem.k) {
      return invalid("bias: must have one value per output feature");
    }
    buffers.bias = data[next++];
  }
  if (call.has_residual) {
    if (shape(*args.get<ffi::AnyBuffer>(next)) != call.conv.out_shape) {
      return invalid("residual: must have the shape of the result");
    }
    buffers.residual = data[next];
  }
  if (plan.workspace_bytes > 0) {
    if (rets.size() != 2) return invalid("a workspace is needed as second result");
    auto workspace = rets.get<ffi::AnyBuffer>(1);
    if (!workspace.has_value()) return workspace.error();
    if (static_cast<int64_t>((*workspace)->size_bytes()) < plan.workspace_bytes) {
      return invalid("the workspace has " + std::to_string((*workspace)->size_bytes()) +
                     " bytes, " + std::to_string(plan.workspace_bytes) + " are needed");
    }
    buffers.workspace = (*workspace)->untyped_data();
    if (!aligned(buffers.workspace, kWorkspaceAlignment)) {
      return invalid("the workspace must begin on a boundary of 16 bytes");
    }
  }
  Program program;
  plan.algorithm->build(problem, request.types, plan.params, buffers, &program);
  const Status status = process_runtime().run(program, stream);
  return status.ok() ? ffi::Error::Success() : error_of(status);
}

// No exception may pass into XLA.
ffi::Error convolve(void* stream, ffi::Dictionary attributes, ffi::RemainingArgs args,
                    ffi::RemainingRets rets) {
  try {
    return compute(stream, attributes, args, rets);
  } catch (const std::bad_alloc&) {
    return {ffi::ErrorCode::kResourceExhausted, "jaxwin: out of memory"};
  } catch (const std::exception& error) {
    return {ffi::ErrorCode::kInternal, "jaxwin: " + std::string(error.what())};
  }
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxwin_conv_cuda, convolve,
    ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().Attrs().RemainingArgs().RemainingRets(),
    {ffi::Traits::kCmdBufferCompatible});

}  // namespace

void* conv_handler() { return reinterpret_cast<void*>(jaxwin_conv_cuda); }

}  // namespace jaxwin::cuda
