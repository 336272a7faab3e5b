// SPDX-License-Identifier: Apache-2.0
//
// The dense micro-kernel: MR x NV accumulators stay in registers over the whole reduction, A is
// broadcast from memory, B is loaded once per step. Rows of A may overlap (a_row smaller than the
// reduction): that is im2win's GEMM, where window j starts j * sw * Kh * C behind the strip.
#pragma once

#include "kernels/kernels.h"
#include "kernels/vec.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

enum class Form { kPacked, kAhead, kStrided, kIndirect };

template <int MR, int NV, Form kForm, typename T>
void gemm_tile(const GemmArgs* g) {
  using V = Vec<T>;
  constexpr int W = kWidth<T>;
  V acc[MR][NV];
  const Mask<T> tail = make_mask<T>(g->cols - (NV - 1) * W);
  T* c = static_cast<T*>(g->c);
  const int64_t c_row = g->c_row;
  if (g->load != 0) {
    JAXWIN_UNROLL
    for (int r = 0; r < MR; ++r) {
      JAXWIN_UNROLL
      for (int v = 0; v < NV; ++v) {
        const T* at = c + r * c_row + v * W;
        acc[r][v] = v + 1 < NV ? load(at) : load(at, tail);
      }
    }
  } else {
    JAXWIN_UNROLL
    for (int r = 0; r < MR; ++r) {
      JAXWIN_UNROLL
      for (int v = 0; v < NV; ++v) acc[r][v] = zero<T>();
    }
  }

  // Four rows share a base pointer: row offsets 0, 1, 2, 3 * a_row are addressing modes.
  // Rows that lie anywhere have each its own.
  constexpr bool kStrided = kForm == Form::kStrided;
  constexpr bool kIndirect = kForm == Form::kIndirect;
  constexpr int kShare = kIndirect ? 1 : 4;
  constexpr int kBases = (MR + kShare - 1) / kShare;
  const int64_t row = g->a_row;
  const int64_t a_step = kStrided ? g->a_step : 1;
  const int64_t b_step = g->b_step;
  const T* ahead = static_cast<const T*>(g->ahead);
  for (int64_t t = 0; t < g->n_runs; ++t) {
    const Run run = g->runs[t];
    const T* b = static_cast<const T*>(g->b) + run.b;
    const T* base[kBases];
    JAXWIN_UNROLL
    for (int q = 0; q < kBases; ++q) {
      if constexpr (kIndirect) {
        const int64_t at = g->table[q * g->table_row + run.a];
        base[q] = at < 0 ? static_cast<const T*>(g->zeros) : static_cast<const T*>(g->a) + at;
      } else {
        base[q] = static_cast<const T*>(g->a) + run.a + q * 4 * row;
      }
    }
    for (int64_t i = 0; i < run.len; ++i) {
      if constexpr (kForm == Form::kAhead) {
        __builtin_prefetch(ahead, 0, 2);  // the second level
        ahead += g->ahead_step;
      }
      V bv[NV];
      JAXWIN_UNROLL
      for (int v = 0; v < NV; ++v) {
        bv[v] = (kStrided && v + 1 == NV) ? load(b + v * W, tail) : load(b + v * W);
        keep(&bv[v]);
      }
      JAXWIN_UNROLL
      for (int r = 0; r < MR; ++r) {
        const V av = set1(base[r / kShare][(r % kShare) * row]);
        JAXWIN_UNROLL
        for (int v = 0; v < NV; ++v) acc[r][v] = fma(av, bv[v], acc[r][v]);
      }
      JAXWIN_UNROLL
      for (int q = 0; q < kBases; ++q) base[q] += a_step;
      b += b_step;
    }
  }

  if (g->add != 0) {
    JAXWIN_UNROLL
    for (int r = 0; r < MR; ++r) {
      JAXWIN_UNROLL
      for (int v = 0; v < NV; ++v) {
        const T* at = c + r * c_row + v * W;
        acc[r][v] = add(v + 1 < NV ? load(at) : load(at, tail), acc[r][v]);
      }
    }
  }
  if (g->stream != 0) {
    JAXWIN_UNROLL
    for (int r = 0; r < MR; ++r) {
      JAXWIN_UNROLL
      for (int v = 0; v < NV; ++v) stream(c + r * c_row + v * W, acc[r][v]);
    }
    return;
  }
  JAXWIN_UNROLL
  for (int r = 0; r < MR; ++r) {
    JAXWIN_UNROLL
    for (int v = 0; v < NV; ++v) {
      T* at = c + r * c_row + v * W;
      if (v + 1 < NV) {
        store(at, acc[r][v]);
      } else {
        store(at, acc[r][v], tail);
      }
    }
  }
}

}  // namespace
}  // namespace jaxwin::JAXWIN_TARGET
