// SPDX-License-Identifier: Apache-2.0
//
// The element types of arrays, and the words that kernels compute with. This header is compiled for
// every target (kernels.h).
#pragma once

#include <cstdint>

namespace jaxwin {

enum Dtype : int {
  kF32,
  kF64,
  kBF16,
  kF16,
  kS8,
  kU8,
  kS16,
  kU16,
  kS32,
  kU32,
  kDtypes,  // none of them
};

// What the micro-kernels multiply: floats, doubles, and for integers two channels' int16 in 32
// bits, whose products are added to an int32. Operands become words where they are copied; a result
// is rounded, or cut to its low bits, where it is stored.
enum Word : int { kFloat, kDouble, kPair, kWords };
inline constexpr int64_t kWordSizes[kWords] = {4, 8, 4};  // bytes
inline constexpr int64_t kWordChannels[kWords] = {1, 1, 2};

struct DtypeRow {
  const char* name;
  int64_t size;  // bytes
  Word word;     // kWords: no kernel reads it, it is a result only
};
inline constexpr DtypeRow kDtypeRows[kDtypes] = {
    {"float32", 4, kFloat}, {"float64", 8, kDouble}, {"bfloat16", 2, kFloat},
    {"float16", 2, kFloat}, {"int8", 1, kPair},      {"uint8", 1, kPair},
    {"int16", 2, kPair},    {"uint16", 2, kWords},   {"int32", 4, kWords},
    {"uint32", 4, kWords},
};

// Whether there are kernels from operands of one type to a result of another: not to a narrower
// one, and from integers to integers.
static inline bool has_kernels(Dtype operand, Dtype result) {
  if (operand == kDtypes || result == kDtypes || kDtypeRows[operand].word == kWords) return false;
  if (kDtypeRows[operand].word == kPair) {
    return result >= kS8 && kDtypeRows[result].size >= kDtypeRows[operand].size;
  }
  return kDtypeRows[result].word == kDtypeRows[operand].word &&
         kDtypeRows[result].size >= kDtypeRows[operand].size;
}

// Whether operands and results are words themselves, which kernels read and write in place.
static inline bool is_plain(Dtype operand, Dtype result) {
  return operand == result && (operand == kF32 || operand == kF64);
}

}  // namespace jaxwin
