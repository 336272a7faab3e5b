// SPDX-License-Identifier: Apache-2.0
//
// The attributes of a custom call, the same for every platform.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jaxwin {

struct CallAttributes {
  ConvParams conv;  // without shapes
  std::string algorithm, isa;
  int64_t threads = 1;
  std::vector<int64_t> params;
  bool has_bias = false;
  bool has_residual = false;
  Activation activation = Activation::kNone;
  std::vector<int64_t> rhs_shape;  // of packed filters, before they were packed
};

inline bool get_attribute(const xla::ffi::Dictionary& attributes, const char* name,
                          std::vector<int64_t>* out) {
  const auto value = attributes.get<xla::ffi::Span<const int64_t>>(name);
  if (!value.has_value()) return false;
  out->assign(value->begin(), value->end());
  return true;
}

inline bool get_attribute(const xla::ffi::Dictionary& attributes, const char* name, int64_t* out) {
  const auto value = attributes.get<int64_t>(name);
  if (!value.has_value()) return false;
  *out = *value;
  return true;
}

inline bool get_attribute(const xla::ffi::Dictionary& attributes, const char* name,
                          std::string* out) {
  const auto value = attributes.get<std::string_view>(name);
  if (!value.has_value()) return false;
  *out = std::string(*value);
  return true;
}

// Empty, or what is wrong.
inline std::string decode_attributes(const xla::ffi::Dictionary& attributes, CallAttributes* call) {
  std::vector<int64_t> padding;
  int64_t has_bias = 0;
  int64_t has_residual = 0;
  int64_t activation = 0;
#define JAXWIN_ATTRIBUTE(name, target)                         \
  if (!get_attribute(attributes, name, &(target))) {           \
    return "attribute " name " is missing or of a wrong type"; \
  }
  JAXWIN_ATTRIBUTE("lhs_spec", call->conv.lhs_spec);
  JAXWIN_ATTRIBUTE("rhs_spec", call->conv.rhs_spec);
  JAXWIN_ATTRIBUTE("out_spec", call->conv.out_spec);
  JAXWIN_ATTRIBUTE("window_strides", call->conv.window_strides);
  JAXWIN_ATTRIBUTE("padding", padding);
  JAXWIN_ATTRIBUTE("lhs_dilation", call->conv.lhs_dilation);
  JAXWIN_ATTRIBUTE("rhs_dilation", call->conv.rhs_dilation);
  JAXWIN_ATTRIBUTE("rhs_reversal", call->conv.rhs_reversal);
  JAXWIN_ATTRIBUTE("feature_group_count", call->conv.feature_group_count);
  JAXWIN_ATTRIBUTE("batch_group_count", call->conv.batch_group_count);
  JAXWIN_ATTRIBUTE("algorithm", call->algorithm);
  JAXWIN_ATTRIBUTE("isa", call->isa);
  JAXWIN_ATTRIBUTE("threads", call->threads);
  JAXWIN_ATTRIBUTE("params", call->params);
  JAXWIN_ATTRIBUTE("has_bias", has_bias);
  JAXWIN_ATTRIBUTE("has_residual", has_residual);
  JAXWIN_ATTRIBUTE("activation", activation);
  JAXWIN_ATTRIBUTE("rhs_panel", call->conv.rhs_panel);
  if (call->conv.rhs_panel != 0) JAXWIN_ATTRIBUTE("rhs_shape", call->rhs_shape);
#undef JAXWIN_ATTRIBUTE
  if (padding.size() % 2 != 0) return "padding: pairs of low and high are needed";
  for (size_t d = 0; d < padding.size(); d += 2) {
    call->conv.padding_low.push_back(padding[d]);
    call->conv.padding_high.push_back(padding[d + 1]);
  }
  if (activation < 0 || activation >= kActivationCount) return "activation: unknown";
  call->has_bias = has_bias != 0;
  call->has_residual = has_residual != 0;
  call->activation = static_cast<Activation>(activation);
  return {};
}

}  // namespace jaxwin
