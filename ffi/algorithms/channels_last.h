// SPDX-License-Identifier: Apache-2.0
//
// Copies of both operands with their channels (those of the filters: features) innermost. What
// reads an operand many times, weight gradients, may first bring it into the order that it reads
// fast.
#pragma once

#include "algorithms/algorithm.h"

namespace jaxwin {

// The problem of the copies. A depth that is only summed over is merged with its channels.
Problem channels_last(const Problem& p);

// Words of both copies.
int64_t channels_last_floats(const Problem& p);

// Makes them in `to`; the rest of the operands is as before. For plain problems.
Operands copy_channels_last(const Problem& p, const Operands& o, const Kernels& k,
                            const Threads& pool, Ptr to);

// Both operands lie with the images innermost (or, with a depth that is swapped with these, blocks
// of them): the copies pay.
bool images_innermost(const Problem& p);

}  // namespace jaxwin
