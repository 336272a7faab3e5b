// SPDX-License-Identifier: Apache-2.0

#include "plan.h"

#include <algorithm>

#include "isa.h"

namespace jaxwin {
namespace {

Targets targets_of(const PlanRequest& request) {
  Targets targets{};
  for (int word = 0; word < kWords; ++word) {
    targets[word] = {find_kernels(request.isa, static_cast<Word>(word)), request.threads};
  }
  return targets;
}

}  // namespace

std::string make_plan(const Problem& p, const PlanRequest& request, Plan* plan) {
  constexpr int64_t kMaxThreads = 4096;
  if (request.threads < 1 || request.threads > kMaxThreads) {
    return "threads: must be from 1 to 4096, got " + std::to_string(request.threads);
  }
  if (!has_kernels(p.dtype, p.out_dtype)) return "no kernels for these dtypes";
  const Targets targets = targets_of(request);
  if (targets[0].kernels == nullptr) return "isa: this CPU does not run '" + request.isa + "'";
  const bool any_family = request.algorithm == "any";
  if (request.algorithm == "auto" || any_family) {
    *plan = choose_plan(p, targets, request.max_workspace, any_family);
    if (plan->algorithm == nullptr) return "no algorithm computes this problem";
    if (request.params.empty()) return {};
  } else {
    plan->algorithm = find_algorithm(request.algorithm);
    if (plan->algorithm == nullptr) return "algorithm: unknown '" + request.algorithm + "'";
    const std::string why = plan->algorithm->refuses(p);
    if (!why.empty()) return request.algorithm + ": " + why;
  }
  const Algorithm& a = *plan->algorithm;
  plan->target = targets[a.word(p.dtype)];
  if (request.params.empty()) {
    plan->params = a.defaults(p, plan->target);
  } else {
    if (request.params.size() != a.params.size()) {
      return "params: " + std::string(a.name) + " takes " + std::to_string(a.params.size()) +
             " values, got " + std::to_string(request.params.size());
    }
    std::copy(request.params.begin(), request.params.end(), plan->params.begin());
  }
  const std::string wrong = a.check(p, plan->target, plan->params);
  if (!wrong.empty()) return "params: " + std::string(a.name) + ": " + wrong;
  plan->workspace_bytes = a.workspace(p, plan->target, plan->params) * plan->target.kernels->size;
  if (request.max_workspace >= 0 && plan->workspace_bytes > request.max_workspace) {
    return "max_workspace: " + std::string(a.name) + " needs " +
           std::to_string(plan->workspace_bytes) + " bytes, allowed are " +
           std::to_string(request.max_workspace);
  }
  return {};
}

bool is_heuristic(const Problem& p, const PlanRequest& request) {
  Plan usual;
  if (!make_plan(p, {request.algorithm, request.isa, request.threads, -1, {}}, &usual).empty()) {
    return false;
  }
  return request.params.size() == usual.algorithm->params.size() &&
         std::equal(request.params.begin(), request.params.end(), usual.params.begin()) &&
         choose_plan(p, targets_of(request), -1).algorithm == usual.algorithm;
}

}  // namespace jaxwin
