// SPDX-License-Identifier: Apache-2.0
//
// kn2col, accumulating in place: kn2row (kn2row_aa.cc) with the operands exchanged. For every
// window position the input's W x C times the filters' C x K, added to the shifted output row:
// pixels that lie channel by channel as results do (NHWC), features as lanes. Nothing is copied
// where neighbouring features of the filters are neighbours, else a few channels of a panel.

#include "algorithms/kn2_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {

const Algorithm& algorithm_kn2col_aa() {
  static const Algorithm a = kn2_algorithm<Kn2::kColAa>(
      "kn2col_aa", "one product per window position, added to shifted output rows; NHWC results",
      "arXiv 1709.03395 (accumulating, hole-free rows)");
  return a;
}

}  // namespace jaxwin
