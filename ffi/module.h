// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include "problem.h"

namespace jaxwin {

// A convolution as Python describes it: the fields of the custom call's attributes, and the shapes.
// Throws where a field is missing.
ConvParams conv_params(const nanobind::dict& d);

}  // namespace jaxwin
