// SPDX-License-Identifier: Apache-2.0
//
// The transforms of convolutions that compute a tile of outputs from fewer products than a direct
// sum has (algorithms/tile_driver.h), as a table of function pointers per instruction set.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace jaxwin {

// Each computes out x out results of a 3x3 window from in x in inputs with this many products.
enum Scheme : int { kWinograd2, kWinograd4, kSfc6, kSchemes };
struct SchemeSize {
  int in, out, products;
};
inline constexpr SchemeSize kSchemeSizes[kSchemes] = {{4, 2, 16}, {6, 4, 36}, {8, 6, 88}};

// Lanes [0, cols) are channels or features, one by one. Of inputs and filters, element (i, j) lies
// at src + i * src_row + j * src_col and product q goes to dst + q * dst_row; of outputs, product q
// lies at src + q * src_row and result (i, j) goes to dst + i * dst_row + j * dst_col.
struct TransformArgs {
  const void* src;
  void* dst;
  int64_t src_row, src_col;
  int64_t dst_row, dst_col;
  int64_t cols;
};
using TransformFn = void (*)(const TransformArgs*);

struct Transforms {
  TransformFn input[kSchemes], filter[kSchemes], output[kSchemes];  // null: not for these words
};

namespace baseline {
const Transforms* transforms(Word word);
}
namespace avx2 {
const Transforms* transforms(Word word);
}
namespace avx512 {
const Transforms* transforms(Word word);
}
namespace avx512vnni {
const Transforms* transforms(Word word);
}

}  // namespace jaxwin
