// SPDX-License-Identifier: Apache-2.0
//
// The list of algorithms, generated from algorithms.inc.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "algorithms/algorithm.h"

namespace jaxwin {

#define JAXWIN_ALGORITHM(name) const Algorithm& algorithm_##name();
#include "algorithms/algorithms.inc"
#undef JAXWIN_ALGORITHM

const std::vector<const Algorithm*>& algorithms();
const Algorithm* find_algorithm(const std::string& name);

using Targets = std::array<Target, kWords>;  // by the words of their kernels, which may be null

// An algorithm with its parameters, and what they were made for.
struct Plan {
  const Algorithm* algorithm = nullptr;
  Target target{};
  Params params{};
  int64_t workspace_bytes = 0;
};

// The defaults of the algorithm with the lowest modelled cost among those that do not reject the
// problem and whose workspace fits `max_workspace` bytes (negative: any); of none if there is none.
// Of the canonical family, unless any will do; a last resort only where there is no other.
Plan choose_plan(const Problem& p, const Targets& targets, int64_t max_workspace,
                 bool any_family = false);

}  // namespace jaxwin
