// SPDX-License-Identifier: Apache-2.0
//
// Depthwise 3x3 windows, channels as lanes: a small tile of output pixels over all channels, with
// the positions of the window unrolled. So every load has an instruction of its own that walks
// memory in its order, which the prefetchers of CPUs follow; a loop over the positions is read as
// jumps (XNNPACK's microkernels for depthwise convolution are unrolled in the same way).
#pragma once

#include <type_traits>

#include "kernels/kernels.h"
#include "kernels/widen.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

constexpr int kTaps = kWindow * kWindow;

// N vectors of channels: neighbours, or where there are two halves (kByHalves). kInside: all window
// positions of all pixels are input.
template <int SX, int R, int P, int N, bool kInside, bool kWhole, typename T, typename S>
JAXWIN_INLINE void window_block(const WindowArgs* g, int64_t j, Mask<T> tail) {
  constexpr int kRows = (R - 1) * SX + kWindow;
  constexpr int kCols = (P - 1) * SX + kWindow;
  const int64_t col = g->x_col;
  const S* x = static_cast<const S*>(g->x) + j;
  const T* w = static_cast<const T*>(g->w) + j * kTaps;
  const S* row[kRows];
  JAXWIN_UNROLL
  for (int i = 0; i < kRows; ++i) row[i] = x + i * g->x_row;
  Vec<T> acc[R][P][N];
  JAXWIN_UNROLL
  for (int r = 0; r < R; ++r) {
    JAXWIN_UNROLL
    for (int p = 0; p < P; ++p) {
      JAXWIN_UNROLL
      for (int v = 0; v < N; ++v) acc[r][p][v] = zero<T>();
    }
  }
  if constexpr (std::is_same_v<S, T>) {
    // All results are under way at once. Inputs that windows share are loaded again: that is free
    // where they are an operand of the product.
    JAXWIN_UNROLL
    for (int kx = 0; kx < kWindow; ++kx) {
      JAXWIN_UNROLL
      for (int ky = 0; ky < kWindow; ++ky) {
        const Vec<T> filter = load(w + (kx * kWindow + ky) * kWidth<T>);
        JAXWIN_UNROLL
        for (int r = 0; r < R; ++r) {
          if (!kInside && (g->rows >> (r * SX + ky) & 1) == 0) continue;
          JAXWIN_UNROLL
          for (int p = 0; p < P; ++p) {
            if (!kInside && kx == 0 && p == 0 && (g->edges & kWindowLeft) != 0) continue;
            if (!kInside && kx == kWindow - 1 && p == P - 1 && (g->edges & kWindowRight) != 0) {
              continue;
            }
            const S* at = row[r * SX + ky] + (p * SX + kx) * col;
            const Vec<T> in = kWhole ? widen_load<T>(at) : widen_load<T>(at, tail);
            acc[r][p][0] = fma(in, filter, acc[r][p][0]);
          }
        }
      }
    }
  } else {
    // Column after column of the input, so that each input is made a float once: a result meets the
    // positions of its window in the same order.
    JAXWIN_UNROLL
    for (int q = 0; q < kCols; ++q) {
      if (!kInside && q == 0 && (g->edges & kWindowLeft) != 0) continue;
      if (!kInside && q == kCols - 1 && (g->edges & kWindowRight) != 0) continue;
      JAXWIN_UNROLL
      for (int i = 0; i < kRows; ++i) {
        if (!kInside && (g->rows >> i & 1) == 0) continue;
        const S* at = row[i] + q * col;
        Vec<T> in[N];
        if constexpr (N == 2) {
          widen_halves(at, in[0], in[1]);
        } else {
          in[0] = kWhole ? widen_load<T>(at) : widen_load<T>(at, tail);
        }
        JAXWIN_UNROLL
        for (int r = 0; r < R; ++r) {
          const int ky = i - r * SX;
          if (ky < 0 || ky >= kWindow) continue;
          JAXWIN_UNROLL
          for (int p = 0; p < P; ++p) {
            const int kx = q - p * SX;
            if (kx < 0 || kx >= kWindow) continue;
            JAXWIN_UNROLL
            for (int v = 0; v < N; ++v) {
              const T* filter = w + (v * kTaps + kx * kWindow + ky) * kWidth<T>;
              acc[r][p][v] = fma(in[v], load(filter), acc[r][p][v]);
            }
          }
        }
      }
    }
  }
  with_results<T, S, !std::is_same_v<S, T>>(
      g->result, g->y, [&](auto* y) __attribute__((always_inline)) {
        JAXWIN_UNROLL
        for (int r = 0; r < R; ++r) {
          JAXWIN_UNROLL
          for (int p = 0; p < P; ++p) {
            auto* at = y + (j + r * g->y_row + p * g->y_col);
            if constexpr (N == 2) {
              store_halves(at, acc[r][p][0], acc[r][p][1]);
            } else {
              result_store<kWhole>(at, acc[r][p][0], tail);
            }
          }
        }
      });
}

template <int SX, int R, int P, bool kInside, typename T, typename S>
JAXWIN_INLINE void window_blocks(const WindowArgs* g) {
  constexpr int W = kWidth<T>;
  int64_t j = 0;
  if constexpr (kByHalves<S>) {
    for (; j + 2 * W <= g->cols; j += 2 * W) {
      window_block<SX, R, P, 2, kInside, true, T, S>(g, j, Mask<T>{});
    }
  }
  for (; j + W <= g->cols; j += W) {
    window_block<SX, R, P, 1, kInside, true, T, S>(g, j, Mask<T>{});
  }
}

template <int SX, int R, int P, typename T, typename S>
void window_tile(const WindowArgs* g) {
  constexpr int64_t kAll = (1 << ((R - 1) * SX + kWindow)) - 1;
  if (g->rows == kAll && g->edges == 0) {
    window_blocks<SX, R, P, true, T, S>(g);
  } else {
    window_blocks<SX, R, P, false, T, S>(g);
  }
  const int64_t whole = g->cols / kWidth<T> * kWidth<T>;
  if (whole < g->cols) {
    window_block<SX, R, P, 1, false, false, T, S>(g, whole, make_mask<T>(g->cols - whole));
  }
}

#if defined(__AVX512F__)
// Filters in the order of such channels.
void halve_filters(void* filters, int64_t cols) {
  constexpr int W = kWidth<float>;
  for (int64_t j = 0; j + 2 * W <= cols; j += 2 * W) {
    float* at = static_cast<float*>(filters) + j * kTaps;
    for (int tap = 0; tap < kTaps; ++tap, at += W) {
      float* const second = at + kTaps * W;
      V even;
      V odd;
      split_halves(load(at), load(second), even, odd);
      store(at, even);
      store(second, odd);
    }
  }
}
#endif

}  // namespace
}  // namespace jaxwin::JAXWIN_TARGET
