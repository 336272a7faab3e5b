// SPDX-License-Identifier: Apache-2.0
//
// Micro-kernels with channels as lanes, for depthwise and narrow grouped convolutions: every lane
// has its own filter, so the product is elementwise and A is loaded as a vector.
#pragma once

#include "kernels/kernels.h"
#include "kernels/vec.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

template <int P, bool kWhole>
void lanes_block(const GemmArgs* g, const float* a, const float* b, float* c, Mask tail) {
  V acc[P];
  JAXWIN_UNROLL
  for (int p = 0; p < P; ++p) acc[p] = zero();
  constexpr int kBases = (P + 3) / 4;
  const int64_t row = g->a_row;
  const Run* const end = g->runs + g->n_runs;
  for (const Run* run = g->runs; run != end; ++run) {
    const V w = load(b + run->b);
    const float* base[kBases];
    JAXWIN_UNROLL
    for (int q = 0; q < kBases; ++q) base[q] = a + run->a + q * 4 * row;
    JAXWIN_UNROLL
    for (int p = 0; p < P; ++p) {
      const float* at = base[p / 4] + (p % 4) * row;
      acc[p] = fma(kWhole ? load(at) : load(at, tail), w, acc[p]);
    }
  }
  JAXWIN_UNROLL
  for (int p = 0; p < P; ++p) {
    if (kWhole) {
      store(c + p * g->c_row, acc[p]);
    } else {
      store(c + p * g->c_row, acc[p], tail);
    }
  }
}

template <int P>
void lanes_tile(const GemmArgs* g) {
  const int64_t whole = g->cols / kWidth;
  const Mask tail = make_mask(g->cols - whole * kWidth);
  for (int64_t i = 0; i < whole; ++i) {
    lanes_block<P, true>(g, g->a + i * kWidth, g->b + i * g->b_block, g->c + i * kWidth, tail);
  }
  if (whole < g->blocks) {
    lanes_block<P, false>(g, g->a + whole * kWidth, g->b + whole * g->b_block,
                          g->c + whole * kWidth, tail);
  }
}

template <int Q>
void lanes_grad_tile(const GemmArgs* g, const int64_t* offsets) {
  V acc[Q];
  const Mask tail = make_mask(g->cols);
  JAXWIN_UNROLL
  for (int q = 0; q < Q; ++q) acc[q] = g->load != 0 ? load(g->c + q * g->c_row, tail) : zero();
  for (int64_t t = 0; t < g->n_runs; ++t) {
    const Run run = g->runs[t];
    const float* a = g->a + run.a;
    const float* b = g->b + run.b;
    for (int64_t i = 0; i < run.len; ++i) {
      const V w = load(b, tail);
      JAXWIN_UNROLL
      for (int q = 0; q < Q; ++q) acc[q] = fma(load(a + offsets[q], tail), w, acc[q]);
      a += g->a_step;
      b += g->b_step;
    }
  }
  JAXWIN_UNROLL
  for (int q = 0; q < Q; ++q) store(g->c + q * g->c_row, acc[q], tail);
}

}  // namespace
}  // namespace jaxwin::JAXWIN_TARGET
