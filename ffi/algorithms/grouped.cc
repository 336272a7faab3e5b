// SPDX-License-Identifier: Apache-2.0
//
// Grouped convolution with few channels per group, and its weight gradient: output features of
// several groups share a vector, their groups' input channels are expanded to lanes. Also groups,
// or a single one, whose few features fill vectors of their own: windows of three columns are swept
// along a row, so that a broadcast serves three products, where the dense kernels, with one vector
// of features, need a broadcast for each.

#include "algorithms/lanes_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {

const Algorithm& algorithm_grouped() {
  static const Algorithm a =
      lanes_algorithm("grouped", "output features as lanes, of several groups or few ones", false);
  return a;
}

}  // namespace jaxwin
