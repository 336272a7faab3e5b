// SPDX-License-Identifier: Apache-2.0
//
// Depthwise convolution, any channel multiplier, and its weight gradient: channels as lanes, each
// with its own filter; a padded strip of the input stays in the cache.

#include "algorithms/lanes_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {

const Algorithm& algorithm_depthwise() {
  static const Algorithm a =
      lanes_algorithm("depthwise", "channels as lanes, one input channel per group", true);
  return a;
}

}  // namespace jaxwin
