// SPDX-License-Identifier: Apache-2.0
//
// Micro-kernels with channels as lanes, for depthwise and narrow grouped convolutions: every lane
// has its own filter, so the product is elementwise and A is loaded as a vector.
#pragma once

#include "kernels/kernels.h"
#include "kernels/vec.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

template <int P, bool kWhole, typename T>
void lanes_block(const GemmArgs* g, const T* a, const T* b, T* c, Mask<T> tail) {
  using V = Vec<T>;
  V acc[P];
  JAXWIN_UNROLL
  for (int p = 0; p < P; ++p) acc[p] = zero<T>();
  constexpr int kBases = (P + 3) / 4;
  const int64_t row = g->a_row;
  const Run* const end = g->runs + g->n_runs;
  for (const Run* run = g->runs; run != end; ++run) {
    const V w = load(b + run->b);
    const T* base[kBases];
    JAXWIN_UNROLL
    for (int q = 0; q < kBases; ++q) base[q] = a + run->a + q * 4 * row;
    JAXWIN_UNROLL
    for (int p = 0; p < P; ++p) {
      const T* at = base[p / 4] + (p % 4) * row;
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

template <int P, typename T>
void lanes_tile(const GemmArgs* g) {
  constexpr int W = kWidth<T>;
  const int64_t whole = g->cols / W;
  const Mask<T> tail = make_mask<T>(g->cols - whole * W);
  const T* a = static_cast<const T*>(g->a);
  const T* b = static_cast<const T*>(g->b);
  T* c = static_cast<T*>(g->c);
  for (int64_t i = 0; i < whole; ++i) {
    lanes_block<P, true>(g, a + i * W, b + i * g->b_block, c + i * W, tail);
  }
  if (whole < g->blocks) {
    lanes_block<P, false>(g, a + whole * W, b + whole * g->b_block, c + whole * W, tail);
  }
}

template <int Q, typename T>
void lanes_grad_tile(const GemmArgs* g, const int64_t* offsets) {
  using V = Vec<T>;
  V acc[Q];
  const Mask<T> tail = make_mask<T>(g->cols);
  T* c = static_cast<T*>(g->c);
  JAXWIN_UNROLL
  for (int q = 0; q < Q; ++q) acc[q] = g->load != 0 ? load(c + q * g->c_row, tail) : zero<T>();
  for (int64_t t = 0; t < g->n_runs; ++t) {
    const Run run = g->runs[t];
    const T* a = static_cast<const T*>(g->a) + run.a;
    const T* b = static_cast<const T*>(g->b) + run.b;
    for (int64_t i = 0; i < run.len; ++i) {
      const V w = load(b, tail);
      JAXWIN_UNROLL
      for (int q = 0; q < Q; ++q) acc[q] = fma(load(a + offsets[q], tail), w, acc[q]);
      a += g->a_step;
      b += g->b_step;
    }
  }
  JAXWIN_UNROLL
  for (int q = 0; q < Q; ++q) store(c + q * g->c_row, acc[q], tail);
}

}  // namespace
}  // namespace jaxwin::JAXWIN_TARGET
