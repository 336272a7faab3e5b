// SPDX-License-Identifier: Apache-2.0
//
// im2col: the explicit patch matrix and the same micro-kernel, the in-library baseline
// (Chellapilla, Puri, Simard: "High Performance Convolutional Neural Networks for Document
// Processing", 2006). `full` builds the whole matrix; otherwise blocks of pixels and of the
// reduction, so that the workspace is bounded whatever the window's size: the fallback where one
// im2win strip is too big.

#include "algorithms/gemm_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {
namespace {
constexpr Lowering kLowering = Lowering::kColumns;
}

const Algorithm& algorithm_im2col() {
  static const Algorithm a{
      "im2col",
      "explicit patch matrix, whole or in blocks",
      "Chellapilla, Puri, Simard 2006, section 3",
      gemm_param_specs(kLowering),
      [](const Problem& p) { return gemm_rejects(p, kLowering); },
      [](const Problem& p, const Target& t) { return gemm_defaults(p, t, kLowering); },
      [](const Problem& p, const Target& t, const Params& q) {
        return gemm_check(p, t, q, kLowering);
      },
      [](const Problem& p, const Target& t, const Params& q) {
        return gemm_workspace(p, t, q, kLowering);
      },
      [](const Problem& p, const Params& q, const Operands& o, const Execution& e) {
        gemm_run(p, q, o, e, kLowering);
      },
      [](const Problem& p, const Target& t, const Params& q) {
        return gemm_cost(p, t, q, kLowering);
      }};
  return a;
}

}  // namespace jaxwin
