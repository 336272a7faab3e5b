// SPDX-License-Identifier: Apache-2.0
//
// im2win (Lu, Chu, Liu: "Im2win: Memory Efficient Convolution On SIMD Architectures", HPEC 2022,
// section III; arXiv 2306.14320). The Kh input rows under one output row are interleaved so that
// window j is one contiguous run of Kw * Kh * C floats at offset j * sw * Kh * C: a matrix product
// with overlapping rows, without im2col's copy per window. Here the strip is built for a block of
// output rows per thread, in the second-level cache, and absorbs padding and layout; `full` builds
// the paper's whole tensor. Unlike the paper, lanes are output features, not window elements.

#include "algorithms/gemm_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {

const Algorithm& algorithm_im2win() {
  static const Algorithm a = gemm_algorithm<Lowering::kWindow>(
      "im2win", "window-order strips of the input per thread, matrix product with overlapping rows",
      "arXiv 2306.14320, section III");
  return a;
}

}  // namespace jaxwin
