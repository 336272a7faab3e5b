// SPDX-License-Identifier: Apache-2.0
//
// An array's dimensions in another order, as fast as memory is: what XLA's own transposition on the
// CPU is not.
#pragma once

#include <vector>

#include "algorithms/algorithm.h"

namespace jaxwin {

struct TransposedDim {
  int64_t size;
  int64_t src, dst;  // strides in words
};

// dst[i . dst strides] = src[i . src strides] for every i. The elements are words of `k`.
void transpose(std::vector<TransposedDim> dims, ConstPtr src, Ptr dst, const Kernels& k,
               const Threads& pool);

}  // namespace jaxwin
