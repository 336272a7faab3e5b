// SPDX-License-Identifier: Apache-2.0
//
// Micro-kernels with channels as lanes, for depthwise and narrow grouped convolutions: every lane
// has its own filter, so the product is elementwise and A is loaded as a vector.
#pragma once

#include "kernels/kernels.h"
#include "kernels/vec.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

template <int P>
void lanes_tile(const GemmArgs* g) {
  V acc[P];
  JAXWIN_UNROLL
  for (int p = 0; p < P; ++p) acc[p] = zero();
  constexpr int kBases = (P + 3) / 4;
  const int64_t row = g->a_row;
  const Mask tail = make_mask(g->cols);
  for (int64_t t = 0; t < g->n_runs; ++t) {
    const V w = load(g->b + g->runs[t].b);
    const float* base[kBases];
    JAXWIN_UNROLL
    for (int q = 0; q < kBases; ++q) base[q] = g->a + g->runs[t].a + q * 4 * row;
    JAXWIN_UNROLL
    for (int p = 0; p < P; ++p) acc[p] = fma(load(base[p / 4] + (p % 4) * row, tail), w, acc[p]);
  }
  JAXWIN_UNROLL
  for (int p = 0; p < P; ++p) store(g->c + p * g->c_row, acc[p], tail);
}

// The same with whole vectors: no masks in the loop.
template <int P>
void lanes_tile_full(const GemmArgs* g) {
  if (g->cols < kWidth) {
    lanes_tile<P>(g);
    return;
  }
  V acc[P];
  JAXWIN_UNROLL
  for (int p = 0; p < P; ++p) acc[p] = zero();
  constexpr int kBases = (P + 3) / 4;
  const int64_t row = g->a_row;
  for (int64_t t = 0; t < g->n_runs; ++t) {
    const V w = load(g->b + g->runs[t].b);
    const float* base[kBases];
    JAXWIN_UNROLL
    for (int q = 0; q < kBases; ++q) base[q] = g->a + g->runs[t].a + q * 4 * row;
    JAXWIN_UNROLL
    for (int p = 0; p < P; ++p) acc[p] = fma(load(base[p / 4] + (p % 4) * row), w, acc[p]);
  }
  JAXWIN_UNROLL
  for (int p = 0; p < P; ++p) store(g->c + p * g->c_row, acc[p]);
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
