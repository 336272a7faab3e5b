// SPDX-License-Identifier: Apache-2.0
//
// Sums and scaling by channel of arrays with channels last, in one pass over memory each: what a
// batch normalisation does between convolutions. A table of function pointers per instruction set.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace jaxwin {

// Arrays of rows x cols words lie row by row, with nothing between.

// y[r][c] = act((line[cols + c] * x[r][c] + line[c]) + residual[r][c]), each operation rounded.
struct ScaleArgs {
  const void* x;
  const void* line;
  const void* residual;  // may be null
  void* y;
  int64_t rows, cols;
  Activation activation;
};

// moments[c] += g[r][c] and moments[cols + c] += x[r][c] * g[r][c], row after row, each operation
// rounded.
struct MomentsArgs {
  const void* x;
  const void* g;
  void* moments;
  int64_t rows, cols;
};

struct ChannelKernels {
  void (*scale)(const ScaleArgs*);  // null, as moments: not for these words
  void (*moments)(const MomentsArgs*);
  uint32_t activations;  // bit i: scale has Activation i
};

namespace baseline {
const ChannelKernels* channel_kernels(Word word);
}
namespace avx2 {
const ChannelKernels* channel_kernels(Word word);
}
namespace avx512 {
const ChannelKernels* channel_kernels(Word word);
}
namespace avx512vnni {
const ChannelKernels* channel_kernels(Word word);
}

}  // namespace jaxwin
