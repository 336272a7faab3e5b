// SPDX-License-Identifier: Apache-2.0
//
// The loops around the channel-as-lane micro-kernels: depthwise and narrow grouped convolutions
// and their weight gradients. A lane is an output feature; where a group has several input
// channels, they are expanded so that lane l of the strip holds its own group's channel. In weight
// gradients, groups that fill a vector take turns as its lanes instead.
#pragma once

#include "algorithms/algorithm.h"

namespace jaxwin {

enum LanesParam { kLanesRows, kLanesCols, kLanesPixels, kLanesStrip, kLanesSweep, kLanesWindow };

// The registry's row of an algorithm on this driver, for one input channel per group or for
// several.
Algorithm lanes_algorithm(const char* name, const char* summary, bool depthwise);

}  // namespace jaxwin
