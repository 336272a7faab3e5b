// SPDX-License-Identifier: Apache-2.0
//
// Depthwise convolution, any channel multiplier, and its weight gradient: channels as lanes, each
// with its own filter; a padded strip of the input stays in the cache.

#include "algorithms/lanes_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {

const Algorithm& algorithm_depthwise() {
  static const Algorithm a{"depthwise",
                           "channels as lanes, one input channel per group",
                           "lanes_driver.h",
                           lanes_param_specs(),
                           [](const Problem& p) {
                             const bool depthwise = (p.chunk_rows > 0 ? p.n : p.c) == 1;
                             if (!depthwise) return std::string("several input channels per group");
                             return lanes_rejects(p);
                           },
                           lanes_defaults,
                           lanes_check,
                           lanes_workspace,
                           lanes_run,
                           lanes_cost};
  return a;
}

}  // namespace jaxwin
