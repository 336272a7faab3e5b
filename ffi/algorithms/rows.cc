// SPDX-License-Identifier: Apache-2.0
//
// Direct convolution on a copy of the input rows that a block of output rows reads: with their
// padding along x, channels innermost whatever the input's layout. Each input row is copied once
// per block, where im2win copies it once per window row; rows that are padding are skipped.

#include "algorithms/gemm_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {
namespace {
constexpr Lowering kLowering = Lowering::kRows;
}

const Algorithm& algorithm_rows() {
  static const Algorithm a{
      "rows",
      "direct convolution on copies of the input rows, with padding, channels innermost",
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
