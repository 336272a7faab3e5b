// SPDX-License-Identifier: Apache-2.0

#include "isa.h"

#include <cpuid.h>

#include <algorithm>
#include <iterator>

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

// CPUs of the kind that has AVX512-FP16, Golden Cove and later, load two vectors of 512 bits in a
// cycle, as many as they have products: there the narrow forms only keep the ports of the products
// from their work (124 instead of 164 GFLOP/s for 16x1). Older compilers do not know its name.
bool loads_two_vectors() {
  unsigned int a = 0;
  unsigned int b = 0;
  unsigned int c = 0;
  unsigned int d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 23 & 1U) != 0;
}

const Kernels* avx512_kernels(Word word) {
  static const bool vnni = __builtin_cpu_supports("avx512vnni");
  static const Kernels floats = [] {
    Kernels k = *avx512::kernels(kFloat);
    if (loads_two_vectors()) {
      std::fill(std::begin(k.narrow), std::end(k.narrow), nullptr);
      std::copy(std::begin(k.near), std::end(k.near), std::begin(k.narrow_ahead));
    }
    return k;
  }();
  if (word == kFloat) return &floats;
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
