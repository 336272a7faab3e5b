// SPDX-License-Identifier: Apache-2.0
//
// Grouped convolution with few channels per group, and its weight gradient: output features of
// several groups share a vector, their groups' input channels are expanded to lanes.

#include "algorithms/lanes_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {

const Algorithm& algorithm_grouped() {
  static const Algorithm a = lanes_algorithm(
      "grouped", "output features of several groups as lanes, their inputs expanded", false);
  return a;
}

}  // namespace jaxwin
