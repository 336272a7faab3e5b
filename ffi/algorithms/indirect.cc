// SPDX-License-Identifier: Apache-2.0
//
// Indirect convolution (Dukhan: "The Indirect Convolution Algorithm", 2019, arXiv 1907.02129): a
// buffer tells for every output pixel and window position where that pixel of the input lies, and
// the micro-kernel looks its rows up there. Padding points to zeros. Nothing of the input is
// copied; the buffer has Ho * Wo * Kh * Kw entries of 8 bytes, whatever the number of channels and
// images. Unlike the paper's, entries are offsets, not pointers: XLA's arrays move from call to
// call. They are computed in each call.

#include "algorithms/gemm_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {

const Algorithm& algorithm_indirect() {
  static const Algorithm a = [] {
    Algorithm row = gemm_algorithm<Lowering::kIndirect>(
        "indirect", "no copy of the input: a buffer of offsets says where each window's pixels lie",
        "arXiv 1907.02129, section 3");
    row.last_resort = true;
    return row;
  }();
  return a;
}

}  // namespace jaxwin
