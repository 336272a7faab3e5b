// SPDX-License-Identifier: Apache-2.0
//
// Memory-efficient convolution (Cho, Brand: "MEC: Memory-efficient Convolution for Deep Neural
// Network", ICML 2017, arXiv 1706.06873): the input is lowered along the width only. For every
// output column the Kw input columns of its window are copied, all rows of them; the window of
// output row i is then a part of that copy, i * sh rows below the window of row 0, and the matrix
// product reads overlapping rows by its leading dimension. `full` builds the paper's whole tensor
// of N * Wo * Kw * H * C; otherwise a block of output rows and columns per thread. The paper's
// order (row, window column, channel) is exchanged for (window column, row, channel), so that the
// reduction is the canonical chain and its pieces are Kh * C long; with three dimensions, each
// output plane is lowered for itself.

#include "algorithms/gemm_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {

const Algorithm& algorithm_mec() {
  static const Algorithm a = [] {
    Algorithm row = gemm_algorithm<Lowering::kWidth>(
        "mec", "lowering along the width only; rows of windows overlap in the matrix product",
        "arXiv 1706.06873, section 3");
    row.last_resort = true;
    return row;
  }();
  return a;
}

}  // namespace jaxwin
