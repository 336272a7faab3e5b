// SPDX-License-Identifier: Apache-2.0
//
// Micro-kernels with channels as lanes, for depthwise and narrow grouped convolutions: every lane
// has its own filter, so the product is elementwise and A is loaded as a vector.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/kernels.h"
#include "kernels/widen.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

// The i-th vector of channels.
template <int P, bool kWhole, typename T, typename S>
void lanes_block(const GemmArgs* g, int64_t i, Mask<T> tail) {
  using V = Vec<T>;
  const int64_t j = i * kWidth<T>;
  const S* const a = static_cast<const S*>(g->a) + j;
  const T* const b = static_cast<const T*>(g->b) + i * g->b_block;
  V acc[P];
  JAXWIN_UNROLL
  for (int p = 0; p < P; ++p) acc[p] = zero<T>();
  constexpr int kBases = (P + 3) / 4;
  const int64_t row = g->a_row;
  const Run* const end = g->runs + g->n_runs;
  for (const Run* run = g->runs; run != end; ++run) {
    const V w = load(b + run->b);
    const S* base[kBases];
    JAXWIN_UNROLL
    for (int q = 0; q < kBases; ++q) base[q] = a + run->a + q * 4 * row;
    JAXWIN_UNROLL
    for (int p = 0; p < P; ++p) {
      const S* at = base[p / 4] + (p % 4) * row;
      acc[p] = fma(kWhole ? widen_load<T>(at) : widen_load<T>(at, tail), w, acc[p]);
    }
  }
  with_results<T, S, true>(
      g->result, g->c, [&](auto* c) __attribute__((always_inline)) {
        JAXWIN_UNROLL
        for (int p = 0; p < P; ++p) {
          result_store<kWhole>(c + (j + p * g->c_row), acc[p], tail);
        }
      });
}

template <int P, typename T, typename S>
void lanes_tile(const GemmArgs* g) {
  constexpr int W = kWidth<T>;
  const int64_t whole = g->cols / W;
  const Mask<T> tail = make_mask<T>(g->cols - whole * W);
  for (int64_t i = 0; i < whole; ++i) lanes_block<P, true, T, S>(g, i, tail);
  if (whole < g->blocks) lanes_block<P, false, T, S>(g, whole, tail);
}

// Outputs under way while a window of KW columns passes, and how many rows of them fit the
// registers. With lanes that read their own channel: with a column of input and a vector of the
// filter. Otherwise with one of the filter for every output under way and an input in all lanes it
// is for; permuted, also with a column of input and what says where the lanes come from, and where
// results are rounded, with what that takes, which GCC keeps there.
template <int KW, int SX>
constexpr int kSweepLive = (KW - 1) / SX + 1;
template <typename T, typename S, int KW, int SX, SweepForm kForm>
constexpr int kSweepRows = [] {
  constexpr int kLive = kSweepLive<KW, SX>;
  if constexpr (kForm == kSweepOwn) return std::min((kRegisters - 2) / (kLive + 1), 5);
  constexpr int kIndex = kForm == kSweepPermuted ? kIndexRegisters<T> : 0;
  constexpr int kInput = kForm == kSweepPermuted ? 1 : 0;
  constexpr int kMost = std::is_same_v<S, T> ? kMaxSweep : kMaxSweep - 1;
  return std::min((kRegisters - kLive - 1 - kIndex) / (kLive + kInput), kMost);
}();

template <typename T, typename S>
struct Sweep {
  const S* x;
  const T* w;
  int64_t y;           // of the output column that is stored next
  int64_t q, columns;  // from the first column that is read; how many there are
  int64_t o, steps;
  Mask<T> in_tail, tail;
};

// One channel of an input column, number i of those that output column o has first: each output row
// has it in all lanes that it is for, `in_of(r)`, once for the windows' columns i + m * SX of
// outputs o - m.
template <int KW, int SX, int R, int kPhase, typename T, typename InOf>
JAXWIN_INLINE void sweep_channel(const T* w, int64_t w_col, int i, const InOf& in_of,
                                 Vec<T> (&acc)[kSweepLive<KW, SX>][R]) {
  constexpr int kLive = kSweepLive<KW, SX>;
  Vec<T> filter[kLive];
  JAXWIN_UNROLL
  for (int m = 0; m < kLive; ++m) {
    if (i + m * SX < KW) filter[m] = load(w + m * SX * w_col);
  }
  JAXWIN_UNROLL
  for (int r = 0; r < R; ++r) {
    const Vec<T> in = in_of(r);
    JAXWIN_UNROLL
    for (int m = 0; m < kLive; ++m) {
      if (i + m * SX < KW) {
        Vec<T>& to = acc[(kPhase - m + kLive) % kLive][r];
        to = fma(in, filter[m], to);
      }
    }
  }
}

// An input column, number i, whose channels are broadcast.
template <int KW, int SX, int R, bool kPlain, int kPhase, typename T>
JAXWIN_INLINE void sweep_column(const SweepArgs* g, const T* x, const T* w, int i,
                                Vec<T> (&acc)[kSweepLive<KW, SX>][R]) {
  const int64_t channels = g->channels;
  const Run* const end = g->runs + g->n_runs;
  for (const Run* run = g->runs; run != end; ++run) {
    const T* from[R];
    JAXWIN_UNROLL
    for (int r = 0; r < R; ++r) {
      const auto row = static_cast<uint64_t>(run->len + r * g->row_step);
      from[r] = kPlain || row < static_cast<uint64_t>(g->rows) ? x + run->a + r * g->x_row
                                                               : static_cast<const T*>(g->zeros);
    }
    const T* b = w + run->b;
    for (int64_t c = 0; c < channels; ++c, b += kWidth<T>) {
      const auto in_of = [&](int r) __attribute__((always_inline)) { return set1(from[r][c]); };
      sweep_channel<KW, SX, R, kPhase>(b, g->w_col, i, in_of, acc);
    }
  }
}

// One output column, o, begins in acc[kPhase]; the one that has seen its whole window is stored.
// kPlain: whole vectors of rows that exist.
template <int KW, int SX, int R, SweepForm kForm, bool kPlain, int kPhase, typename T, typename S>
JAXWIN_INLINE void sweep_step(const SweepArgs* g, Sweep<T, S>* s,
                              Vec<T> (&acc)[kSweepLive<KW, SX>][R]) {
  constexpr int kLive = kSweepLive<KW, SX>;
  constexpr bool kExpand = kForm == kSweepPermuted;
  // A register is moved faster than an input loaded, but for few products of each.
  constexpr bool kFollow = kForm == kSweepOwn && (KW > 3 || !std::is_same_v<S, T>);
  const Run* const end = g->runs + g->n_runs;
  JAXWIN_UNROLL
  for (int i = 0; i < SX; ++i) {
    if (static_cast<uint64_t>(s->q + i) < static_cast<uint64_t>(s->columns)) {
      const S* at = s->x + i * g->x_col;
      if constexpr (kForm == kSweepBroadcast) {
        sweep_column<KW, SX, R, kPlain, kPhase>(g, at, s->w + i * g->w_col, i, acc);
        continue;
      }
      Vec<T> in[R];
      for (const Run* run = g->runs; run != end; ++run) {
        const bool follows = kFollow && g->follow != 0 && run != g->runs;
        if (follows) {
          JAXWIN_UNROLL
          for (int r = 0; r < R - 1; ++r) in[r] = in[r + 1];
        }
        JAXWIN_UNROLL
        for (int r = 0; r < R; ++r) {
          if (follows && r + 1 < R) continue;
          const S* from = at + run->a + r * g->x_row;
          if (kPlain) {
            in[r] = widen_load<T, false>(from);
          } else {
            const auto row = static_cast<uint64_t>(run->len + r * g->row_step);
            const bool real = row < static_cast<uint64_t>(g->rows);
            in[r] = real ? widen_load<T, false>(from, s->in_tail) : zero<T>();
          }
        }
        if (kExpand) {
          // The neighbours in memory, which the next vector of features reads; a row once or twice.
          JAXWIN_UNROLL
          for (int r = 0; r < R; ++r) {
            if (r + 1 == R || run - g->runs < g->row_step) {
              __builtin_prefetch(at + run->a + r * g->x_row + kWidth<T>);
            }
          }
        }
        const T* w = s->w + run->b + i * g->w_col;
        if constexpr (kExpand) {
          const int32_t* index = g->table;
          const int32_t* const last = index + g->channels * kWidth<T>;
          for (; index != last; index += kWidth<T>, w += kWidth<T>) {
            const auto in_of = [&](int r) __attribute__((always_inline)) {
              return permute(in[r], index);
            };
            sweep_channel<KW, SX, R, kPhase>(w, g->w_col, i, in_of, acc);
          }
        } else {
          JAXWIN_UNROLL
          for (int m = 0; m < kLive; ++m) {
            if (i + m * SX < KW) {
              const Vec<T> filter = load(w + m * SX * g->w_col);
              JAXWIN_UNROLL
              for (int r = 0; r < R; ++r) {
                Vec<T>& to = acc[(kPhase - m + kLive) % kLive][r];
                to = fma(in[r], filter, to);
              }
            }
          }
        }
      }
    }
  }
  constexpr int kDone = (kPhase + 1) % kLive;  // output o - kLive + 1
  if (s->o >= kLive - 1) {
    // Words that are read for themselves, or spread over windows that elements have tiles for, come
    // from arrays: the results are words too.
    constexpr bool kAny = !std::is_same_v<S, T> || kForm == kSweepBroadcast || KW < 3;
    with_results<T, S, kAny>(
        g->result, g->y, [&](auto* y) __attribute__((always_inline)) {
          JAXWIN_UNROLL
          for (int r = 0; r < R; ++r) {
            auto* to = y + (s->y + r * g->y_row);
            result_store<kPlain>(to, acc[kDone][r], s->tail);
            if (kPlain && kExpand) __builtin_prefetch(to + kWidth<T>, 1);
          }
        });
    s->y += g->y_col;
  }
  JAXWIN_UNROLL
  for (int r = 0; r < R; ++r) acc[kDone][r] = zero<T>();
  s->q += SX;
  s->x += SX * g->x_col;
  ++s->o;
}

template <int KW, int SX, int R, SweepForm kForm, bool kPlain, int kPhase, typename T, typename S>
JAXWIN_INLINE void sweep_steps(const SweepArgs* g, Sweep<T, S>* s,
                               Vec<T> (&acc)[kSweepLive<KW, SX>][R]) {
  if (s->o == s->steps) return;
  sweep_step<KW, SX, R, kForm, kPlain, kPhase>(g, s, acc);
  if constexpr (kPhase + 1 < kSweepLive<KW, SX>) {
    sweep_steps<KW, SX, R, kForm, kPlain, kPhase + 1>(g, s, acc);
  }
}

template <int KW, int SX, int R, SweepForm kForm, bool kPlain, typename T, typename S>
__attribute__((noinline)) void sweep_block(const SweepArgs* g, const S* x, const T* w, int64_t y,
                                           Mask<T> in_tail, Mask<T> tail) {
  constexpr int kLive = kSweepLive<KW, SX>;
  Vec<T> acc[kLive][R];
  JAXWIN_UNROLL
  for (int l = 0; l < kLive; ++l) {
    JAXWIN_UNROLL
    for (int r = 0; r < R; ++r) acc[l][r] = zero<T>();
  }
  Sweep<T, S> s{x, w, y, -g->q_begin, g->q_end - g->q_begin, 0, g->n + kLive - 1, in_tail, tail};
  while (s.o < s.steps) sweep_steps<KW, SX, R, kForm, kPlain, 0>(g, &s, acc);
}

template <int KW, int SX, int R, SweepForm kForm, typename T, typename S>
void sweep_tile(const SweepArgs* g) {
  constexpr int W = kWidth<T>;
  const S* x = static_cast<const S*>(g->x);
  const T* w = static_cast<const T*>(g->w);
  for (int64_t j = 0, in = 0; j < g->cols; j += W, in += g->span, w += g->w_block) {
    if (kForm == kSweepBroadcast) in = (g->first + j) / g->features * g->channels;
    const int64_t in_lanes = std::min(g->span, g->in_cols - in);
    const Mask<T> in_tail = make_mask<T>(in_lanes);
    const Mask<T> tail = make_mask<T>(g->cols - j);
    const bool whole = kForm == kSweepBroadcast || in_lanes == W;
    if (g->border == 0 && whole && g->cols - j >= W) {
      sweep_block<KW, SX, R, kForm, true>(g, x + in, w, j, in_tail, tail);
    } else {
      sweep_block<KW, SX, R, kForm, false>(g, x + in, w, j, in_tail, tail);
    }
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
      for (int q = 0; q < Q; ++q) acc[q] = fma(load(a + offsets[q]), w, acc[q]);
      a += g->a_step;
      b += g->b_step;
    }
  }
  JAXWIN_UNROLL
  for (int q = 0; q < Q; ++q) store(c + q * g->c_row, acc[q], tail);
}

#if defined(__AVX2__)
// Channels of a tile of the weight gradient of interleaved groups, a power of two.
constexpr int kGroupsGradChannels = kRegisters >= 32 ? 8 : 4;

template <int KW, int C, int G>
void groups_grad_tile(const GemmArgs* g) {
  constexpr int W = kWidth<float>;
  V acc[KW][C];
  float* const c = static_cast<float*>(g->c);
  JAXWIN_UNROLL
  for (int u = 0; u < KW; ++u) {
    JAXWIN_UNROLL
    for (int i = 0; i < C; ++i) acc[u][i] = load(c + u * g->c_row + i * W);
  }
  for (int64_t t = 0; t < g->n_runs; ++t) {
    const Run run = g->runs[t];
    const float* a = static_cast<const float*>(g->a) + run.a;
    const float* b = static_cast<const float*>(g->b) + run.b;
    for (int64_t s = 0; s < run.len; ++s) {
      const V w = load(b);
      JAXWIN_UNROLL
      for (int u = 0; u < KW; ++u) {
        JAXWIN_UNROLL
        for (int i = 0; i < C; ++i) {
          acc[u][i] = fma(repeat<G>(a + u * g->a_row + i * G), w, acc[u][i]);
        }
      }
      a += g->a_step;
      b += g->b_step;
    }
  }
  JAXWIN_UNROLL
  for (int u = 0; u < KW; ++u) {
    JAXWIN_UNROLL
    for (int i = 0; i < C; ++i) store(c + u * g->c_row + i * W, acc[u][i]);
  }
}
#endif

}  // namespace
}  // namespace jaxwin::JAXWIN_TARGET
