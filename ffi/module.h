// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "algorithms/algorithm.h"
#include "problem.h"

namespace jaxwin {

// A convolution as Python describes it: the fields of its Problem. Throws where one is missing.
ConvParams conv_params(const nanobind::dict& d);

// What an algorithm can be tuned by, as Python's registry has it.
nanobind::list param_specs(const std::vector<ParamSpec>& specs);

}  // namespace jaxwin
