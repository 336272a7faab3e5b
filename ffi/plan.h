// SPDX-License-Identifier: Apache-2.0
//
// A plan: an algorithm, its parameters and what they were made for. Made in Python's name at
// lowering time, carried by the program as attributes, checked again before it runs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "algorithms/registry.h"

namespace jaxwin {

struct PlanRequest {
  std::string algorithm = "auto";  // or "auto": the best canonical one; "any": of all
  std::string isa;                 // "": the best
  int64_t threads = 1;
  int64_t max_workspace = -1;   // bytes; negative: any
  std::vector<int64_t> params;  // empty: the algorithm's defaults
};

// Empty, or why there is no such plan.
std::string make_plan(const Problem& p, const PlanRequest& request, Plan* plan);

// Whether the parameters are what make_plan takes where nothing is asked for ("auto"): mostly a
// matter of one algorithm, not of all.
bool is_heuristic(const Problem& p, const PlanRequest& request);

}  // namespace jaxwin
