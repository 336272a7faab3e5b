// SPDX-License-Identifier: Apache-2.0

#include "isa.h"

namespace jaxwin {

const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = [] {
    // __builtin_cpu_supports checks the operating system's register state (XGETBV) too.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    return std::vector<Isa>{{"baseline", baseline::kernels, true},
                            {"avx2", avx2::kernels, avx2},
                            {"avx512", avx512::kernels, avx512}};
  }();
  return list;
}

const Isa* best_isa(const std::string& cap) {
  const Isa* best = nullptr;
  for (const Isa& set : isas()) {
    if (set.runnable) best = &set;
    if (cap == set.name) return best;
  }
  return cap.empty() ? best : nullptr;
}

const Kernels* find_kernels(const std::string& isa, Dtype dtype) {
  if (isa.empty()) return best_isa("")->kernels(dtype);
  for (const Isa& set : isas()) {
    if (set.runnable && isa == set.name) return set.kernels(dtype);
  }
  return nullptr;
}

}  // namespace jaxwin
