// SPDX-License-Identifier: Apache-2.0

#include "isa.h"

#include <cpuid.h>

namespace jaxwin {
namespace {

// __builtin_cpu_supports knows it since GCC 11.
bool has_f16c() {
  unsigned int a = 0;
  unsigned int b = 0;
  unsigned int c = 0;
  unsigned int d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

const Kernels* avx512_kernels(Word word) {
  static const bool vnni = __builtin_cpu_supports("avx512vnni");
  return word == kPair && vnni ? avx512vnni::kernels(word) : avx512::kernels(word);
}

}  // namespace

const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = [] {
    // __builtin_cpu_supports checks the operating system's register state (XGETBV) too.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    return std::vector<Isa>{{"baseline", baseline::kernels, true},
                            {"avx2", avx2::kernels, avx2},
                            {"avx512", avx512_kernels, avx512}};
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

const Kernels* find_kernels(const std::string& isa, Word word) {
  if (isa.empty()) return best_isa("")->kernels(word);
  for (const Isa& set : isas()) {
    if (set.runnable && isa == set.name) return set.kernels(word);
  }
  return nullptr;
}

}  // namespace jaxwin
