// SPDX-License-Identifier: Apache-2.0
//
// Symbolic Fourier convolution SFC-6(6x6, 3x3): 88 products for 36 outputs, where a direct sum
// takes 324, by transforms of additions alone. Errors stay near a direct sum's, and integers are
// exact.

#include <limits>

#include "algorithms/registry.h"
#include "algorithms/tile_driver.h"

namespace jaxwin {
namespace {

std::string rejects(const Problem& p) {
  std::string why = tile_rejects(p);
  if (!why.empty() || kDtypeRows[p.dtype].word != kPair) return why;
  // The transform of the results gives 36 times them, in 32 bits.
  const double most = p.dtype == kU8 ? 255.0 * 255.0 : 128.0 * 128.0;
  if (36.0 * 9.0 * static_cast<double>(p.c) * most > std::numeric_limits<int32_t>::max()) {
    return "too many channels: 36 times a sum must fit 32 bits";
  }
  return {};
}

}  // namespace

const Algorithm& algorithm_sfc() {
  static const Algorithm a = [] {
    Algorithm row = tile_algorithm<6>(
        "sfc", "3x3 windows by SFC-6(6x6, 3x3): fewer products, transforms of additions alone",
        "arXiv 2407.02913", {kF32, kBF16, kF16, kS8, kU8});
    row.rejects = rejects;
    return row;
  }();
  return a;
}

}  // namespace jaxwin
