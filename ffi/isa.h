// SPDX-License-Identifier: Apache-2.0
//
// Which instruction sets this process may use.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace jaxwin {

// Every instruction set that is compiled in, worst first.
const std::vector<const Kernels*>& compiled_kernels();

// Those of them that this CPU and operating system run, in the same order.
const std::vector<const Kernels*>& all_kernels();

// The best set that does not lie above `cap` ("" for no cap); null where the cap is no known name.
const Kernels* best_kernels(const std::string& cap);

// Null where this CPU does not run it.
const Kernels* kernels_by_name(const std::string& name);

}  // namespace jaxwin
