// SPDX-License-Identifier: Apache-2.0
//
// Several rows of elements to one, and back, whole vectors at a time: element i of row r of S lies
// at i * S + r.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"
#include "kernels/vec.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

// How S vectors become S others by merges with one of them after another: lane i of result q is
// lane index % W of vector index / W.
template <typename T, int S>
struct Moves {
  alignas(kVectorBytes) int32_t step[S][S - 1][kWidth<T>];
};

template <typename T, int S>
constexpr Moves<T, S> make_moves(bool join) {
  constexpr int W = kWidth<T>;
  Moves<T, S> moves{};
  for (int q = 0; q < S; ++q) {
    for (int i = 0; i < W; ++i) {
      const int e = q * W + i;
      const int from = join ? e % S * W + e / S : i * S + q;
      moves.step[q][0][i] = from < 2 * W ? from : 0;
      for (int t = 2; t < S; ++t) {  // what is in its lane already stays there
        moves.step[q][t - 1][i] = from / W == t ? W + from % W : i;
      }
    }
  }
  return moves;
}
template <typename T, int S>
inline constexpr Moves<T, S> kJoin = make_moves<T, S>(true);
template <typename T, int S>
inline constexpr Moves<T, S> kSplit = make_moves<T, S>(false);

template <typename T, int S>
JAXWIN_INLINE void move(const Moves<T, S>& moves, const Vec<T> (&in)[S], Vec<T> (&out)[S]) {
  JAXWIN_UNROLL
  for (int q = 0; q < S; ++q) {
    out[q] = merge(in[0], in[1], moves.step[q][0]);
    JAXWIN_UNROLL
    for (int t = 2; t < S; ++t) out[q] = merge(out[q], in[t], moves.step[q][t - 1]);
  }
}

// A vector of each of S rows to S vectors of one row. Of an even number, the rows S / 2 apart come
// together first, in fewer steps.
template <typename T, int S>
JAXWIN_INLINE void join(const Vec<T> (&in)[S], Vec<T> (&out)[S]) {
  if constexpr (S == 2 || S % 2 == 1) {
    move(kJoin<T, S>, in, out);
  } else {
    constexpr int kHalf = S / 2;
    Vec<T> halves[2][kHalf];
    JAXWIN_UNROLL
    for (int r = 0; r < kHalf; ++r) {
      const Vec<T> pair[2] = {in[r], in[r + kHalf]};
      Vec<T> joined[2];
      move(kJoin<T, 2>, pair, joined);
      halves[0][r] = joined[0];
      halves[1][r] = joined[1];
    }
    JAXWIN_UNROLL
    for (int h = 0; h < 2; ++h) {
      Vec<T> part[kHalf];
      join<T, kHalf>(halves[h], part);
      JAXWIN_UNROLL
      for (int r = 0; r < kHalf; ++r) out[h * kHalf + r] = part[r];
    }
  }
}

// dst[i * S + r] = rows[r][i], i < n; a null row counts as zeros.
template <typename T, int S>
inline void join_rows(T* dst, const void* const* rows, int64_t n) {
  constexpr int W = kWidth<T>;
  for (int64_t i = 0; i < n; i += W, dst += S * W) {
    Vec<T> in[S], out[S];
    const bool whole = i + W <= n;
    const Mask<T> mask = make_mask<T>(n - i);
    JAXWIN_UNROLL
    for (int r = 0; r < S; ++r) {
      const T* row = static_cast<const T*>(rows[r]);
      in[r] = row == nullptr ? zero<T>() : whole ? load(row + i) : load(row + i, mask);
    }
    join<T, S>(in, out);
    JAXWIN_UNROLL
    for (int q = 0; q < S; ++q) {
      if (whole) {
        store(dst + q * W, out[q]);
      } else {
        store(dst + q * W, out[q], make_mask<T>((n - i) * S - q * W));
      }
    }
  }
}

// dst[r * dst_ld + i] = src[i * S + r], i < count, r < n <= S.
template <typename T, int S>
inline void split_rows(T* dst, int64_t dst_ld, const T* src, int64_t n, int64_t count) {
  constexpr int W = kWidth<T>;
  for (int64_t i = 0; i < count; i += W, src += S * W) {
    const int64_t rest = (count - 1 - i) * S + n;  // elements that may be read
    const bool whole = rest >= S * W;
    const Mask<T> mask = make_mask<T>(count - i);
    Vec<T> in[S], out[S];
    JAXWIN_UNROLL
    for (int q = 0; q < S; ++q) {
      in[q] = whole ? load(src + q * W) : load(src + q * W, make_mask<T>(rest - q * W));
    }
    move(kSplit<T, S>, in, out);
    JAXWIN_UNROLL
    for (int r = 0; r < S; ++r) {
      if (r >= n) break;
      if (whole) {
        store(dst + r * dst_ld + i, out[r]);
      } else {
        store(dst + r * dst_ld + i, out[r], mask);
      }
    }
  }
}

}  // namespace
}  // namespace jaxwin::JAXWIN_TARGET
