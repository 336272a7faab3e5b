// SPDX-License-Identifier: Apache-2.0

#include "isa.h"

#include <algorithm>

namespace jaxwin {

const std::vector<const Kernels*>& compiled_kernels() {
  static const std::vector<const Kernels*> list{baseline::kernels(), avx2::kernels(),
                                                avx512::kernels()};
  return list;
}

const std::vector<const Kernels*>& all_kernels() {
  static const std::vector<const Kernels*> list = [] {
    // __builtin_cpu_supports checks the operating system's register state (XGETBV) too.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    const auto& sets = compiled_kernels();
    return std::vector<const Kernels*>(sets.begin(),
                                       sets.begin() + 1 + (avx2 ? 1 : 0) + (avx512 ? 1 : 0));
  }();
  return list;
}

const Kernels* kernels_by_name(const std::string& name) {
  for (const Kernels* k : all_kernels()) {
    if (name == k->isa) return k;
  }
  return nullptr;
}

const Kernels* best_kernels(const std::string& cap) {
  if (cap.empty()) return all_kernels().back();
  const auto& sets = compiled_kernels();
  for (size_t i = 0; i < sets.size(); ++i) {
    if (cap == sets[i]->isa) return all_kernels()[std::min(i, all_kernels().size() - 1)];
  }
  return nullptr;
}

}  // namespace jaxwin
