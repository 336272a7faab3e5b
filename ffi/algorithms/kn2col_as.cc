// SPDX-License-Identifier: Apache-2.0
//
// kn2col, adding after shifting: kn2row_as.cc with the operands exchanged, H * W x C times C x K,
// for results that lie pixel by pixel (NHWC). It gives kn2row_as's bits.

#include "algorithms/kn2_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {

const Algorithm& algorithm_kn2col_as() {
  static const Algorithm a = kn2_algorithm<Kn2::kColAs>(
      "kn2col_as",
      "one product per window position into a temporary, added to the results; NHWC results",
      "arXiv 1709.03395 (accumulating, shift-add)");
  return a;
}

}  // namespace jaxwin
