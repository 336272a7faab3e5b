// SPDX-License-Identifier: Apache-2.0
//
// Which instruction sets this process may use.
#pragma once

#include <string>
#include <vector>

#include "kernels/channels.h"
#include "kernels/kernels.h"

namespace jaxwin {

struct Isa {
  const char* name;
  const Kernels* (*kernels)(Word);
  const ChannelKernels* (*channels)(Word);
  bool runnable;  // by this CPU and operating system
};

// Every instruction set that is compiled in, worst first.
const std::vector<Isa>& isas();

// The best set that does not lie above `cap` ("" for no cap); null where the cap is no known name.
const Isa* best_isa(const std::string& cap);

// The set of this name ("" for the best), and its kernels for a word; null where this CPU does not
// run it.
const Isa* find_isa(const std::string& name);
const Kernels* find_kernels(const std::string& isa, Word word);

}  // namespace jaxwin
