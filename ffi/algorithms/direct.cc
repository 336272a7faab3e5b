// SPDX-License-Identifier: Apache-2.0
//
// Direct convolution: the micro-kernel broadcasts from the input itself, window position by window
// position. No transform and no workspace but the packed filter. Window positions on padding are
// left out: the kernels never see it.

#include "algorithms/gemm_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {

const Algorithm& algorithm_direct() {
  static const Algorithm a = gemm_algorithm<Lowering::kDirect>(
      "direct", "no transform: the micro-kernel reads the input in place",
      "arXiv 2408.00278 (NHWC direct)");
  return a;
}

}  // namespace jaxwin
