// SPDX-License-Identifier: Apache-2.0
//
// Direct convolution: the micro-kernel broadcasts from the input itself, window position by window
// position. No transform and no workspace but the packed filter; needs windows that stay inside
// the input.

#include "algorithms/gemm_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {
namespace {
constexpr Lowering kLowering = Lowering::kDirect;
}

const Algorithm& algorithm_direct() {
  static const Algorithm a{
      "direct",
      "no transform: the micro-kernel reads the input in place",
      "arXiv 2408.00278 (NHWC direct)",
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
