// SPDX-License-Identifier: Apache-2.0

#include "cuda/algorithms.h"

#include <algorithm>
#include <limits>

#include "cuda/building.h"

namespace jaxwin::cuda {

std::vector<std::string> Options::text() const {
  std::vector<std::string> result;
  for (int i = 0; i < count; ++i) {
    const Definition& d = list[static_cast<size_t>(i)];
    result.push_back("-D" + std::string(d.name) + "=" + std::to_string(d.value));
  }
  return result;
}

const std::vector<const Algorithm*>& algorithms() {
  static const std::vector<Algorithm> rows = [] {
    std::vector<Algorithm> r = gemm_algorithms();
    for (auto* const more : {&few_channels_algorithms, &lanes_algorithms}) {
      for (Algorithm& a : more()) r.push_back(a);
    }
    return r;
  }();
  static const std::vector<const Algorithm*> list = [] {
    std::vector<const Algorithm*> l;
    l.reserve(rows.size());
    for (const Algorithm& a : rows) l.push_back(&a);
    return l;
  }();
  return list;
}

const Algorithm* find_algorithm(const std::string& name) {
  for (const Algorithm* a : algorithms()) {
    if (name == a->name) return a;
  }
  return nullptr;
}

std::string make_plan(const Problem& p, const PlanRequest& request, Plan* plan) {
  const auto workspace = [&](const Algorithm& a, const Params& params) {
    Program program;
    a.build(p, request.types, params, {}, &program);
    return program.workspace_bytes;
  };
  const auto allowed = [&](int64_t bytes) {
    return request.max_workspace < 0 || bytes <= request.max_workspace;
  };
  if (request.algorithm == "auto") {
    double best = std::numeric_limits<double>::infinity();
    for (const Algorithm* a : algorithms()) {
      if (std::string(a->family) != "canonical" || !a->rejects(p, request.types).empty()) continue;
      const Params params = a->defaults(p, request.types);
      if (!a->check(p, request.types, params).empty()) continue;
      const double cost = a->cost(p, request.types, params);
      if (cost < best && allowed(workspace(*a, params))) {
        best = cost;
        plan->algorithm = a;
      }
    }
    if (plan->algorithm == nullptr) return "no algorithm computes this problem";
  } else {
    plan->algorithm = find_algorithm(request.algorithm);
    if (plan->algorithm == nullptr) return "algorithm: unknown '" + request.algorithm + "'";
    const std::string why = plan->algorithm->rejects(p, request.types);
    if (!why.empty()) return request.algorithm + ": " + why;
  }
  const Algorithm& a = *plan->algorithm;
  if (request.params.empty()) {
    plan->params = a.defaults(p, request.types);
  } else {
    if (request.params.size() != a.params.size()) {
      return "params: " + std::string(a.name) + " takes " + std::to_string(a.params.size()) +
             " values, got " + std::to_string(request.params.size());
    }
    std::copy(request.params.begin(), request.params.end(), plan->params.begin());
  }
  const std::string wrong = a.check(p, request.types, plan->params);
  if (!wrong.empty()) return "params: " + std::string(a.name) + ": " + wrong;
  plan->workspace_bytes = workspace(a, plan->params);
  if (!allowed(plan->workspace_bytes)) {
    return "max_workspace: " + std::string(a.name) + " needs " +
           std::to_string(plan->workspace_bytes) + " bytes, allowed are " +
           std::to_string(request.max_workspace);
  }
  return {};
}

const char* kernel_source(const std::string& name) {
#define JAXWIN_KERNEL_SOURCE(source, text) \
  if (name == #source) return text;
#define JAXWIN_CUDA_ABI(name, hash)
#include "kernel_sources.inc"
#undef JAXWIN_CUDA_ABI
#undef JAXWIN_KERNEL_SOURCE
  return nullptr;
}

const char* abi(const std::string& files) {
#define JAXWIN_KERNEL_SOURCE(source, text)
#define JAXWIN_CUDA_ABI(name, hash) \
  if (files == #name) return hash;
#include "kernel_sources.inc"
#undef JAXWIN_CUDA_ABI
#undef JAXWIN_KERNEL_SOURCE
  return "";
}

std::string translation_unit(const std::string& source) {
  // In place of #include lines, which would need files where the program runs.
  return std::string(kernel_source("args")) + kernel_source("device") + kernel_source(source);
}

}  // namespace jaxwin::cuda
