// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

namespace jaxwin::cuda {

// The rows of the registry that belong to CUDA.
nanobind::dict registry();

// What Python may ask: plans, launches, images, devices.
void bind(nanobind::module_& m);

}  // namespace jaxwin::cuda
