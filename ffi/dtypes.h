// SPDX-License-Identifier: Apache-2.0
//
// The element types of arrays. This header is compiled for every target (kernels.h).
#pragma once

#include <cstdint>

namespace jaxwin {

enum Dtype : int { kF32, kF64, kDtypes };  // kDtypes: none of them

inline constexpr const char* kDtypeNames[kDtypes] = {"float32", "float64"};
inline constexpr int64_t kDtypeSizes[kDtypes] = {4, 8};  // bytes

}  // namespace jaxwin
