// SPDX-License-Identifier: Apache-2.0

#include "isa.h"

#include <cpuid.h>

#include <array>
#include <cstring>

namespace jaxwin {
namespace {

struct Cpuid {
  unsigned int a, b, c, d;
};
// All zero where the CPU has no such leaf.
Cpuid cpuid(unsigned int leaf, unsigned int subleaf) {
  Cpuid r{};
  if (__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d) == 0) return {};
  return r;
}

// What __builtin_cpu_supports knows since GCC 11 only, or later.
bool has_f16c() { return (cpuid(1, 0).c & bit_F16C) != 0; }
bool has_avx512_fp16() { return (cpuid(7, 0).d >> 23 & 1U) != 0; }
bool has_avx512_bf16() { return (cpuid(7, 1).a >> 5 & 1U) != 0; }

// The tables of avx512, with what this CPU has besides.
std::array<Kernels, kWords> avx512_tables() {
  const bool vnni = __builtin_cpu_supports("avx512vnni") != 0;
  std::array<Kernels, kWords> tables{};
  for (const Word word : {kFloat, kDouble, kPair}) {
    Kernels& k = tables[word];
    k = *(word == kPair && vnni ? avx512vnni::kernels(word) : avx512::kernels(word));
    // CPUs of the kind that has AVX512-FP16, Golden Cove and later, load two vectors of 512 bits in
    // a cycle: there the narrow forms only keep the ports of the products from their work (124
    // instead of 164 GFLOP/s for 16x1), and tiles of few columns are as good as wide ones.
    k.loads_two = has_avx512_fp16();
  }
  Kernels& floats = tables[kFloat];
  if (vnni) {
    const Kernels& dots = *avx512vnni::kernels(kFloat);
    for (int d = 0; d < kDtypes; ++d) {
      for (int stride = 0; stride <= kMaxWindowStride; ++stride) {
        if (dots.window_filters[d][stride] == nullptr) continue;
        floats.window_filters[d][stride] = dots.window_filters[d][stride];
        std::memcpy(floats.window[d][stride], dots.window[d][stride],
                    sizeof floats.window[d][stride]);
      }
    }
  }
  if (has_avx512_bf16() && floats.write_bf16_by_cpu != nullptr) {
    floats.stores[kBF16] = kStoreBF16ByCpu;
    floats.write[kBF16] = floats.write_bf16_by_cpu;
    floats.stream[kBF16] = floats.stream_bf16_by_cpu;
    floats.finish[kBF16] = floats.finish_bf16_by_cpu;
  }
  return tables;
}

const Kernels* avx512_kernels(Word word) {
  static const std::array<Kernels, kWords> tables = avx512_tables();
  return &tables[word];
}

}  // namespace

const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = [] {
    // __builtin_cpu_supports checks the operating system's register state (XGETBV) too.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    return std::vector<Isa>{{"baseline", baseline::kernels, baseline::channel_kernels, true},
                            {"avx2", avx2::kernels, avx2::channel_kernels, avx2},
                            {"avx512", avx512_kernels, avx512::channel_kernels, avx512}};
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

const Isa* find_isa(const std::string& name) {
  if (name.empty()) return best_isa("");
  for (const Isa& set : isas()) {
    if (set.runnable && name == set.name) return &set;
  }
  return nullptr;
}

const Kernels* find_kernels(const std::string& isa, Word word) {
  const Isa* set = find_isa(isa);
  return set == nullptr ? nullptr : set->kernels(word);
}

}  // namespace jaxwin
