// SPDX-License-Identifier: Apache-2.0
//
// Winograd's minimal filtering: F(2x2, 3x3) takes 16 products for 4 outputs, F(4x4, 3x3) 36 for 16,
// where a direct sum takes 9 for each.

#include "algorithms/registry.h"
#include "algorithms/tile_driver.h"

namespace jaxwin {

const Algorithm& algorithm_winograd() {
  static const Algorithm a = tile_algorithm<2, 4>(
      "winograd", "3x3 windows by F(2x2, 3x3) or F(4x4, 3x3): fewer products, larger errors",
      "arXiv 1509.09308", {kF32, kBF16, kF16});
  return a;
}

}  // namespace jaxwin
