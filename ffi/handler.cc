// SPDX-License-Identifier: Apache-2.0
//
// The XLA FFI entry point. It trusts nothing: problem and plan are rebuilt and checked from the
// buffers and attributes of the call, and every failure is a status with one line of text.

#include "handler.h"

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "algorithms/registry.h"
#include "attributes.h"
#include "call.h"
#include "pages.h"
#include "plan.h"
#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jaxwin {
namespace {

namespace ffi = xla::ffi;

std::vector<int64_t> shape(const ffi::AnyBuffer& buffer) {
  return {buffer.dimensions().begin(), buffer.dimensions().end()};
}

// What a call site keeps: its attributes, decoded once when the program is loaded, and the plan
// for its shapes, made and checked at the first call.
struct CallSite {
  static ffi::TypeId id;

  ConvParams params;  // without shapes
  PlanRequest request;
  bool has_bias = false;
  bool has_residual = false;
  Activation activation = Activation::kNone;
  std::vector<int64_t> rhs_shape;  // of packed filters, before they were packed

  struct Prepared {
    ConvParams params;
    std::vector<int64_t> rhs_shape;  // of the buffer
    Problem problem;
    Plan plan;
    std::shared_ptr<const void> by_algorithm;
  };
  std::mutex mutex;
  std::shared_ptr<const Prepared> prepared;
};
ffi::TypeId CallSite::id = {};

ffi::ErrorOr<std::unique_ptr<CallSite>> instantiate(ffi::Dictionary attributes) {
  auto site = std::make_unique<CallSite>();
  CallAttributes call;
  const std::string wrong = decode_attributes(attributes, &call);
  if (!wrong.empty()) return ffi::Unexpected(invalid(wrong));
  site->params = call.conv;
  site->request.algorithm = call.algorithm;
  site->request.isa = call.isa;
  site->request.threads = call.threads;
  site->request.params = call.params;
  site->has_bias = call.has_bias;
  site->has_residual = call.has_residual;
  site->activation = call.activation;
  site->rhs_shape = call.rhs_shape;
  return site;
}

bool same_shape(const ffi::AnyBuffer& buffer, const std::vector<int64_t>& shape) {
  const auto dimensions = buffer.dimensions();
  return std::equal(dimensions.begin(), dimensions.end(), shape.begin(), shape.end());
}

// Problem and plan for these buffers; `wrong` says why there is none.
std::shared_ptr<const CallSite::Prepared> prepare(CallSite* site, Dtype dtype, Dtype out_dtype,
                                                  const ffi::AnyBuffer& lhs,
                                                  const ffi::AnyBuffer& rhs,
                                                  const ffi::AnyBuffer& out, std::string* wrong) {
  const std::lock_guard<std::mutex> lock(site->mutex);
  if (site->prepared != nullptr && site->prepared->params.dtype == dtype &&
      site->prepared->params.out_dtype == out_dtype &&
      same_shape(lhs, site->prepared->params.lhs_shape) &&
      same_shape(rhs, site->prepared->rhs_shape) &&
      same_shape(out, site->prepared->params.out_shape)) {
    return site->prepared;
  }
  auto fresh = std::make_shared<CallSite::Prepared>();
  fresh->params = site->params;
  fresh->params.dtype = dtype;
  fresh->params.out_dtype = out_dtype;
  fresh->params.lhs_shape = shape(lhs);
  fresh->rhs_shape = shape(rhs);
  fresh->params.rhs_shape = site->params.rhs_panel == 0 ? fresh->rhs_shape : site->rhs_shape;
  fresh->params.out_shape = shape(out);
  *wrong = make_problem(fresh->params, &fresh->problem);
  if (wrong->empty() && site->params.rhs_panel > 0 &&
      fresh->rhs_shape != packed_shape(fresh->params)) {
    *wrong = "rhs: packed filters of another shape";
  }
  if (!wrong->empty()) return nullptr;
  *wrong = make_plan(fresh->problem, site->request, &fresh->plan);
  if (!wrong->empty() && fresh->plan.target.kernels == nullptr) {
    // The program was compiled on a machine with another instruction set: the same bits by a
    // plan of this one. In other families than the canonical they depend on the parameters.
    PlanRequest request = site->request;
    request.isa.clear();
    const Algorithm* named = find_algorithm(request.algorithm);
    if (named == nullptr || named->canonical()) request.params.clear();
    *wrong = make_plan(fresh->problem, request, &fresh->plan);
  }
  const bool epilogue =
      site->has_bias || site->has_residual || site->activation != Activation::kNone;
  if (wrong->empty() && epilogue &&
      !has_activation(*fresh->plan.target.kernels, dtype, site->activation)) {
    *wrong = std::string("activation: the kernels for ") + kDtypeRows[dtype].name + " lack it";
  }
  if (!wrong->empty()) return nullptr;
  const Algorithm& a = *fresh->plan.algorithm;
  if (a.prepare != nullptr) {
    fresh->by_algorithm = a.prepare(fresh->problem, fresh->plan.target, fresh->plan.params);
  }
  site->prepared = fresh;
  return fresh;
}

ffi::Error convolve(ffi::ThreadPool thread_pool, CallSite* site, ffi::RemainingArgs args,
                    ffi::RemainingRets rets) {
  const size_t operands = 2 + (site->has_bias ? 1 : 0) + (site->has_residual ? 1 : 0);
  if (args.size() != operands || rets.empty() || rets.size() > 2) {
    return invalid("expected " + std::to_string(operands) + " operands and one or two results");
  }
  constexpr size_t kMostOperands = 4;
  std::array<ConstPtr, kMostOperands> data{};
  Dtype dtype = kF32;
  for (size_t i = 0; i < operands; ++i) {
    const auto buffer = args.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    Dtype own = kF32;
    if (!get_dtype(*buffer, &own)) return invalid("operands: no kernels for their element type");
    if (i == 0) dtype = own;
    if (own != dtype) return invalid("operands: must have one element type");
    data[i] = {static_cast<const char*>(buffer->untyped_data()), kDtypeRows[dtype].size};
  }
  const auto lhs = args.get<ffi::AnyBuffer>(0);
  const auto rhs = args.get<ffi::AnyBuffer>(1);
  auto out = rets.get<ffi::AnyBuffer>(0);
  if (!out.has_value()) return out.error();
  Dtype out_dtype = kF32;
  if (!get_dtype(**out, &out_dtype) || !has_kernels(dtype, out_dtype)) {
    return invalid(std::string("no kernels from ") + kDtypeRows[dtype].name +
                   " operands to a result of this element type");
  }

  std::string wrong;
  std::shared_ptr<const CallSite::Prepared> prepared;
  try {
    prepared = prepare(site, dtype, out_dtype, *lhs, *rhs, **out, &wrong);
  } catch (const std::bad_alloc&) {
    return {ffi::ErrorCode::kResourceExhausted, "jaxwin: out of memory"};
  }
  if (prepared == nullptr) return invalid(wrong);
  const Problem& problem = prepared->problem;
  const Plan& plan = prepared->plan;

  Operands o{};
  o.x = data[0];
  o.w = data[1] + problem.w_first;
  o.y = {static_cast<char*>((*out)->untyped_data()), kDtypeRows[out_dtype].size};
  o.activation = site->activation;
  size_t next = 2;
  if (site->has_bias) {
    const auto bias = args.get<ffi::AnyBuffer>(next);
    if (bias->dimensions().size() != 1 || bias->dimensions()[0] != problem.g * problem.k) {
      return invalid("bias: must have one value per output feature");
    }
    o.bias = data[next++];
  }
  if (site->has_residual) {
    if (!same_shape(*args.get<ffi::AnyBuffer>(next), prepared->params.out_shape)) {
      return invalid("residual: must have the shape of the result");
    }
    o.residual = data[next];
  }

  const int64_t size = plan.target.kernels->size;
  char* workspace = nullptr;
  int64_t available = 0;
  if (rets.size() == 2) {
    auto buffer = rets.get<ffi::AnyBuffer>(1);
    if (!buffer.has_value()) return buffer.error();
    workspace = static_cast<char*>((*buffer)->untyped_data());
    available = static_cast<int64_t>((*buffer)->size_bytes());
  }
  std::unique_ptr<void, Free> own;
  if (available < plan.workspace_bytes ||
      reinterpret_cast<uintptr_t>(workspace) % static_cast<uintptr_t>(size) != 0) {
    own = allocate(plan.workspace_bytes);
    if (own == nullptr) {
      return {ffi::ErrorCode::kResourceExhausted, "jaxwin: no memory for a workspace of " +
                                                      std::to_string(plan.workspace_bytes) +
                                                      " bytes"};
    }
    workspace = static_cast<char*>(own.get());
  }

  advise_huge_pages((*out)->untyped_data(), static_cast<int64_t>((*out)->size_bytes()));
  const Threads pool = threads_of(&thread_pool, plan.target.threads);
  try {
    plan.algorithm->run(problem, plan.params, o,
                        {plan.target, &pool, {workspace, size}, prepared->by_algorithm.get()});
  } catch (const std::bad_alloc&) {
    return {ffi::ErrorCode::kResourceExhausted, "jaxwin: out of memory"};
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxwin_conv_instantiate, instantiate,
                              ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxwin_conv_execute, convolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Ctx<ffi::State<CallSite>>()
                                  .RemainingArgs()
                                  .RemainingRets());

}  // namespace

ConvHandlers conv_handlers() {
  static const ffi::TypeInfo type_info = ffi::MakeTypeInfo<CallSite>();
  return {reinterpret_cast<void*>(jaxwin_conv_instantiate),
          reinterpret_cast<void*>(jaxwin_conv_execute), &CallSite::id, &type_info};
}

}  // namespace jaxwin
