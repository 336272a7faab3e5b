// SPDX-License-Identifier: Apache-2.0
//
// kn2row, adding after shifting (Anderson, Vasudevan, Keane, Gregg: "Low-memory GEMM-based
// convolution algorithms for deep neural networks", 2017, arXiv 1709.03395, "kn2row-as"): for every
// window position the filters' matrix K x C times the whole image C x H * W, into a temporary of K
// * H * W numbers, of which the part that outputs see is added to them. Large products without
// borders, but the temporary is written and read once per window position. The sums of each
// position are rounded before they are added: another numerical family than the canonical chain,
// never chosen by itself. With strides the image is one phase of the input, K * H * W / (sh * sw)
// numbers.

#include "algorithms/kn2_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {

const Algorithm& algorithm_kn2row_as() {
  static const Algorithm a = kn2_algorithm<Kn2::kRowAs>(
      "kn2row_as",
      "one product per window position into a temporary, added to the results; NCHW results",
      "arXiv 1709.03395 (accumulating, shift-add)");
  return a;
}

}  // namespace jaxwin
