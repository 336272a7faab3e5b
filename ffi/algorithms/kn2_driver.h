// SPDX-License-Identifier: Apache-2.0
//
// kn2row and kn2col: a convolution as one 1x1 convolution per window position, each shifted by that
// position and added to the result. Strides take the input apart into phases, each window position
// reads one of them.
#pragma once

#include "algorithms/algorithm.h"

namespace jaxwin {

enum class Kn2 {
  kRowAa,  // results lie feature by feature (NCHW): pixels are lanes
  kColAa,  // results lie pixel by pixel (NHWC): features are lanes
  kRowAs,  // the same with a temporary for the products of one window position, added afterwards
  kColAs,
};

enum Kn2Param { kKn2Mr, kKn2Nv, kKn2Kc, kKn2Rows };

std::vector<ParamSpec> kn2_param_specs(Kn2 form);
std::string kn2_rejects(const Problem& p, Kn2 form);
Params kn2_defaults(const Problem& p, const Target& t, Kn2 form);
std::string kn2_check(const Problem& p, const Target& t, const Params& params, Kn2 form);
int64_t kn2_workspace(const Problem& p, const Target& t, const Params& params, Kn2 form);
void kn2_run(const Problem& p, const Params& params, const Operands& o, const Execution& e,
             Kn2 form);
double kn2_cost(const Problem& p, const Target& t, const Params& params, Kn2 form);

// Algorithm::error_bound of chains over the channels, added up over the window.
double kn2_error(const Problem& p, const Params& params);

// The registry's row of an algorithm on this driver.
template <Kn2 kForm>
Algorithm kn2_algorithm(const char* name, const char* summary, const char* source) {
  return {
      name,
      summary,
      source,
      {kF32, kF64},
      kn2_param_specs(kForm),
      [](const Problem& p) { return kn2_rejects(p, kForm); },
      [](const Problem& p, const Target& t) { return kn2_defaults(p, t, kForm); },
      [](const Problem& p, const Target& t, const Params& q) { return kn2_check(p, t, q, kForm); },
      [](const Problem& p, const Target& t, const Params& q) {
        return kn2_workspace(p, t, q, kForm);
      },
      [](const Problem& p, const Params& q, const Operands& o, const Execution& e) {
        kn2_run(p, q, o, e, kForm);
      },
      [](const Problem& p, const Target& t, const Params& q) { return kn2_cost(p, t, q, kForm); },
      false,
      nullptr,
      kForm == Kn2::kRowAs || kForm == Kn2::kColAs ? "kn2" : kCanonical,
      kForm == Kn2::kRowAs || kForm == Kn2::kColAs ? kn2_error : nullptr};
}

}  // namespace jaxwin
