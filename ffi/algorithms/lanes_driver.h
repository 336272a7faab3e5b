// SPDX-License-Identifier: Apache-2.0
//
// The loops around the channel-as-lane micro-kernels: depthwise and narrow grouped convolutions
// and their weight gradients. A lane is an output feature; where a group has several input
// channels, they are expanded so that lane l of the strip holds its own group's channel.
#pragma once

#include "algorithms/algorithm.h"

namespace jaxwin {

enum LanesParam { kLanesRows, kLanesCols, kLanesPixels, kLanesStrip };

std::vector<ParamSpec> lanes_param_specs();
std::string lanes_rejects(const Problem& p);
Params lanes_defaults(const Problem& p, const Target& t);
std::string lanes_check(const Problem& p, const Target& t, const Params& params);
int64_t lanes_workspace(const Problem& p, const Target& t, const Params& params);
void lanes_run(const Problem& p, const Params& params, const Operands& o, const Execution& e);
double lanes_cost(const Problem& p, const Target& t, const Params& params);

}  // namespace jaxwin
