// SPDX-License-Identifier: Apache-2.0
//
// kn2row, accumulating in place (Vasudevan, Anderson, Gregg: "Parallel Multi Channel Convolution
// using General Matrix Multiplication", 2017, arXiv 1704.04428; Anderson, Vasudevan, Keane, Gregg:
// "Low-memory GEMM-based convolution algorithms for deep neural networks", 2017, arXiv 1709.03395,
// "kn2row-aa"): for every window position the filters' matrix K x C times the input's C x W, row by
// row, added to the shifted output row by the matrix product itself. Shorter rows at the borders
// stand for the paper's punched holes. The sums are stored and loaded between window positions and
// go on by fma, in the order of the contract: the canonical chain. Nothing is copied where pixels
// of the input are neighbours, the stride is 1, and channels or features of the filters are
// neighbours. Else some channels of a row are, or of a window position's filters (OIHW): by default
// no more than four output rows each.

#include "algorithms/kn2_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {

const Algorithm& algorithm_kn2row_aa() {
  static const Algorithm a = kn2_algorithm<Kn2::kRowAa>(
      "kn2row_aa", "one product per window position, added to shifted output rows; NCHW results",
      "arXiv 1709.03395 (accumulating, hole-free rows)");
  return a;
}

}  // namespace jaxwin
