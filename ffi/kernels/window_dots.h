// SPDX-License-Identifier: Apache-2.0
//
// Depthwise 3x3 windows of bytes, a column apart, by VNNI: the three inputs of a window's column
// and a fourth, of the next row, are the bytes of one lane, so that one instruction adds a column's
// three products to a result, and the same bytes serve the output row below. Exact, as int32.
//
// The instruction multiplies unsigned by signed bytes. So int8 inputs are taken with 128 added, and
// results begin at -128 times the sum of their filter; uint8 inputs with 128 taken away, and
// results begin at 128 times that sum. Both change the same bit, that of padding too.
#pragma once

#if defined(__AVX512VNNI__)

#include <type_traits>

#include "kernels/kernels.h"
#include "kernels/widen.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

// Of a block: the filter's columns, each as the bytes of a vector's lanes; where results begin.
constexpr int kDotBegin = kWindow;

// Filters as floats to this.
template <typename S>
void dot_filters(void* filters, int64_t cols) {
  constexpr int W = kWidth<float>;
  for (int64_t j = 0; j < cols; j += W) {
    float* const at = static_cast<float*>(filters) + j * kWindow * kWindow;
    const __m512i byte = _mm512_set1_epi32(0xFF);
    __m512i columns[kWindow];
    __m512i sum = _mm512_setzero_si512();
    for (int kx = 0; kx < kWindow; ++kx) {
      columns[kx] = _mm512_setzero_si512();
      for (int ky = 0; ky < kWindow; ++ky) {
        const __m512i w = _mm512_cvttps_epi32(load(at + (kx * kWindow + ky) * W).v);
        sum = _mm512_add_epi32(sum, w);
        columns[kx] = _mm512_or_si512(
            columns[kx], _mm512_sllv_epi32(_mm512_and_si512(w, byte), _mm512_set1_epi32(8 * ky)));
      }
    }
    for (int kx = 0; kx < kWindow; ++kx) _mm512_storeu_si512(at + kx * W, columns[kx]);
    const __m512i offset = _mm512_slli_epi32(sum, 7);
    _mm512_storeu_si512(at + kDotBegin * W, std::is_signed_v<S>
                                                ? _mm512_sub_epi32(_mm512_setzero_si512(), offset)
                                                : offset);
  }
}

template <typename S>
inline __m512i add_dots(__m512i sums, __m512i in, __m512i filter) {
  return std::is_signed_v<S> ? _mm512_dpbusd_epi32(sums, in, filter)
                             : _mm512_dpbusd_epi32(sums, filter, in);
}

// 16 channels of four rows: the bytes of lane c are channel c of each.
inline __m512i interleave_rows(__m128i r0, __m128i r1, __m128i r2, __m128i r3) {
  __m512i rows = _mm512_castsi128_si512(r0);
  rows = _mm512_inserti32x4(rows, r1, 1);
  rows = _mm512_inserti32x4(rows, r2, 2);
  rows = _mm512_inserti32x4(rows, r3, 3);
  // Four channels of each row to one quarter of the vector, then channel by channel.
  const __m512i quarters = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(quarters, rows), bytes);
}

// kInside: all window positions of all pixels are input.
template <int R, int P, bool kInside, bool kWhole, typename S>
JAXWIN_INLINE void dot_block(const WindowArgs* g, int64_t j, Mask<float> tail) {
  constexpr int W = kWidth<float>;
  constexpr int kRows = 4;
  const S* x = static_cast<const S*>(g->x) + j;
  const float* w = static_cast<const float*>(g->w) + j * kWindow * kWindow;
  const auto filter = [w](int i) __attribute__((always_inline)) {
    return _mm512_loadu_si512(w + i * W);
  };
  const S* row[kRows];
  __mmask16 lanes[kRows];
  JAXWIN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    row[i] = x + i * g->x_row;
    lanes[i] = kWhole ? 0xFFFF : tail.m;
    if (i >= R - 1 + kWindow || (!kInside && (g->rows >> i & 1) == 0)) lanes[i] = 0;
  }
  const auto read = [&](int i, int64_t at) __attribute__((always_inline)) {
    if (i >= R - 1 + kWindow) return _mm_setzero_si128();
    if (kInside && kWhole) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[i] + at));
    }
    return _mm_maskz_loadu_epi8(lanes[i], row[i] + at);
  };
  __m512i columns[R][kWindow];  // of the output row below, a byte further on
  JAXWIN_UNROLL
  for (int kx = 0; kx < kWindow; ++kx) {
    columns[0][kx] = filter(kx);
    if (R > 1) columns[R - 1][kx] = _mm512_slli_epi32(columns[0][kx], 8);
  }
  __m512i acc[R][P];
  JAXWIN_UNROLL
  for (int r = 0; r < R; ++r) {
    JAXWIN_UNROLL
    for (int p = 0; p < P; ++p) acc[r][p] = filter(kDotBegin);
  }
  const __m512i padding = _mm512_set1_epi8(-128);
  JAXWIN_UNROLL
  for (int q = 0; q < P + kWindow - 1; ++q) {
    const bool outside = !kInside && ((q == 0 && (g->edges & kWindowLeft) != 0) ||
                                      (q == P + kWindow - 2 && (g->edges & kWindowRight) != 0));
    __m512i in = padding;
    if (!outside) {
      const int64_t at = q * g->x_col;
      in =
          _mm512_xor_si512(in, interleave_rows(read(0, at), read(1, at), read(2, at), read(3, at)));
    }
    JAXWIN_UNROLL
    for (int p = 0; p < P; ++p) {
      const int kx = q - p;
      if (kx < 0 || kx >= kWindow) continue;
      JAXWIN_UNROLL
      for (int r = 0; r < R; ++r) {
        acc[r][p] = add_dots<S>(acc[r][p], in, columns[r][kx]);
      }
    }
  }
  const bool integers = g->result == kStoreS32;  // else words
  JAXWIN_UNROLL
  for (int r = 0; r < R; ++r) {
    JAXWIN_UNROLL
    for (int p = 0; p < P; ++p) {
      const int64_t to = j + r * g->y_row + p * g->y_col;
      if (integers) {
        result_store<kWhole>(static_cast<Pair*>(g->y) + to, Vec<Pair>{acc[r][p]},
                             Mask<Pair>{tail.m});
      } else {
        result_store<kWhole>(static_cast<float*>(g->y) + to, V{_mm512_cvtepi32_ps(acc[r][p])},
                             tail);
      }
    }
  }
}

template <int R, int P, typename S>
void dot_tile(const WindowArgs* g) {
  constexpr int W = kWidth<float>;
  constexpr int64_t kAll = (1 << (R - 1 + kWindow)) - 1;
  const bool inside = g->rows == kAll && g->edges == 0;
  const int64_t whole = g->cols / W * W;
  for (int64_t j = 0; j < whole && inside; j += W) dot_block<R, P, true, true, S>(g, j, {});
  for (int64_t j = 0; j < whole && !inside; j += W) dot_block<R, P, false, true, S>(g, j, {});
  if (whole < g->cols) {
    dot_block<R, P, false, false, S>(g, whole, make_mask<float>(g->cols - whole));
  }
}

}  // namespace
}  // namespace jaxwin::JAXWIN_TARGET

#endif
