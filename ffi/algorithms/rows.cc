// SPDX-License-Identifier: Apache-2.0
//
// Direct convolution on a copy of the input rows that a block of output rows reads: with their
// padding along x, channels innermost whatever the input's layout. Each input row is copied once
// per block, where im2win copies it once per window row; rows that are padding are skipped.

#include "algorithms/gemm_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {

const Algorithm& algorithm_rows() {
  static const Algorithm a = gemm_algorithm<Lowering::kRows>(
      "rows", "direct convolution on copies of the input rows, with padding, channels innermost",
      "arXiv 2408.00278 (NHWC direct)");
  return a;
}

}  // namespace jaxwin
