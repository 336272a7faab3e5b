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

const Algorithm& algorithm_im2col() {
  static const Algorithm a = [] {
    Algorithm row =
        gemm_algorithm<Lowering::kColumns>("im2col", "explicit patch matrix, whole or in blocks",
                                           "Chellapilla, Puri, Simard 2006, section 3");
    row.last_resort = true;
    return row;
  }();
  return a;
}

}  // namespace jaxwin
