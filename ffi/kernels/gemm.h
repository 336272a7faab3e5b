// SPDX-License-Identifier: Apache-2.0
//
// The dense micro-kernel: MR x NV accumulators stay in registers over the whole reduction, A is
// broadcast from memory, B is loaded once per step. Rows of A may overlap (a_row smaller than the
// reduction): that is im2win's GEMM, where window j starts j * sw * Kh * C behind the strip.
#pragma once

#include <type_traits>

#include "kernels/kernels.h"
#include "kernels/vec.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

enum class Form { kPacked, kAhead, kStrided, kIndirect, kNarrow, kNarrowAhead, kNear };

// The narrow forms: where B is one vector every product needs a broadcast of its own, and Ice Lake
// loads hardly one vector of 512 bits per cycle, for two products. So some rows of A are loaded
// four steps at a time and spread in registers, which takes the port of a product instead: seven
// rows of sixteen balance the ports.
// With prefetches: of B into the second-level cache, or of A into the first (near, narrow ahead).
template <int MR, Form kForm>
inline constexpr int kQuadRows =
    kForm == Form::kNarrow || kForm == Form::kNarrowAhead ? MR * 7 / 16 : 0;

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
  // Rows that lie anywhere have each its own, as have those that are broadcast beside quads: an
  // index in the address of a product's operand takes another slot of the front end, and there are
  // more slots taken then. Quads are every other one of the first rows, at the pointer of the row
  // before.
  constexpr bool kStrided = kForm == Form::kStrided;
  constexpr bool kIndirect = kForm == Form::kIndirect;
  constexpr int kQuads = kQuadRows<MR, kForm>;
  constexpr int kShare = kIndirect ? 1 : 4;
  constexpr int kBases = kQuads > 0 ? MR - kQuads : (MR + kShare - 1) / kShare;
  const auto base_of = [](int r) {
    return kQuads == 0 ? r / kShare : r < 2 * kQuads ? r / 2 : r - kQuads;
  };
  const auto row_of = [](int r) { return kQuads == 0 ? r % kShare : r < 2 * kQuads ? r % 2 : 0; };
  const int64_t row = g->a_row;
  const int64_t a_step = kStrided ? g->a_step : 1;
  const int64_t b_step = g->b_step;
  const T* ahead = static_cast<const T*>(g->ahead);
  // A cache line, where the registers for addresses are few.
  constexpr bool kNear = kForm == Form::kNear || kForm == Form::kNarrowAhead;
  const int64_t ahead_step = kNear ? W : g->ahead_step;
  for (int64_t t = 0; t < g->n_runs; ++t) {
    const Run run = g->runs[t];
    const T* b = static_cast<const T*>(g->b) + run.b;
    const T* base[kBases];
    JAXWIN_UNROLL
    for (int r = MR - 1; r >= 0; --r) {
      const int q = base_of(r);
      if constexpr (kIndirect) {
        const int64_t at = g->table[q * g->table_row + run.a];
        base[q] = at < 0 ? static_cast<const T*>(g->zeros) : static_cast<const T*>(g->a) + at;
      } else if (row_of(r) == 0) {
        base[q] = static_cast<const T*>(g->a) + run.a + r * row;
      }
    }
    // One step at the base pointers, or of four the one of this number.
    V quads[kQuads + 1];
    const auto step = [&](auto of_four) __attribute__((always_inline)) {
      constexpr int kOf = decltype(of_four)::value;
      if constexpr (kForm == Form::kAhead || kNear) {
        __builtin_prefetch(ahead, 0, kNear ? 3 : 2);
        ahead += ahead_step;
      }
      V bv[NV];
      JAXWIN_UNROLL
      for (int v = 0; v < NV; ++v) {
        bv[v] = (kStrided && v + 1 == NV) ? load(b + v * W, tail) : load(b + v * W);
        keep(&bv[v]);
      }
      JAXWIN_UNROLL
      for (int r = 0; r < MR; ++r) {
        V av;
        if constexpr (kOf >= 0 && kQuads > 0) {
          av = r < 2 * kQuads && r % 2 == 1 ? of_quad<kOf>(quads[r / 2])
                                            : set1(base[base_of(r)][kOf]);
        } else {
          av = set1(base[base_of(r)][row_of(r) * row]);
        }
        JAXWIN_UNROLL
        for (int v = 0; v < NV; ++v) acc[r][v] = fma(av, bv[v], acc[r][v]);
      }
      b += b_step;
    };
    int64_t i = 0;
    if constexpr (kQuads > 0) {
      for (; i + 4 <= run.len; i += 4) {
        JAXWIN_UNROLL
        for (int q = 0; q < kQuads; ++q) {
          quads[q] = quad(base[q] + row);
          keep(&quads[q]);
        }
        step(std::integral_constant<int, 0>{});
        step(std::integral_constant<int, 1>{});
        step(std::integral_constant<int, 2>{});
        step(std::integral_constant<int, 3>{});
        JAXWIN_UNROLL
        for (int q = 0; q < kBases; ++q) {
          base[q] += 4;
          asm("" : "+r"(base[q]));  // or GCC makes indices of them
        }
      }
    }
    for (; i < run.len; ++i) {
      step(std::integral_constant<int, -1>{});
      JAXWIN_UNROLL
      for (int q = 0; q < kBases; ++q) base[q] += a_step;
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
