// SPDX-License-Identifier: Apache-2.0
//
// Grouped convolution with few channels per group, and its weight gradient: output features of
// several groups share a vector, their groups' input channels are expanded to lanes.

#include "algorithms/lanes_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {

const Algorithm& algorithm_grouped() {
  static const Algorithm a{"grouped",
                           "output features of several groups as lanes, their inputs expanded",
                           "lanes_driver.h",
                           lanes_param_specs(),
                           [](const Problem& p) {
                             const bool depthwise = (p.chunk_rows > 0 ? p.n : p.c) == 1;
                             if (depthwise) return std::string("depthwise");
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
