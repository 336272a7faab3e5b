// SPDX-License-Identifier: Apache-2.0
//
// Everything that is not multiply-accumulate: the fused epilogue, copies into window order,
// transposition, lane expansion.
#pragma once

#include <cstring>

#include "kernels/kernels.h"
#include "kernels/vec.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

// e^x, within 1 ulp-ish of the exact value; -> 0 and inf at the ends, NaN stays NaN.
// Cody and Waite reduction x = n ln 2 + r, |r| <= ln 2 / 2, then a degree-7 Taylor-like polynomial.
inline V exp(V x) {
  const V magic = set1(12582912.0F);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  x = min(set1(89.0F), max(set1(-104.0F), x));
  const V shifted = fma(x, set1(1.44269504088896341F), magic);
  const V n = sub(shifted, magic);
  V r = fma(n, set1(-0.693145751953125F), x);
  r = fma(n, set1(-1.42860682030941723212e-6F), r);
  V p = set1(1.98412698e-4F);
  p = fma(p, r, set1(1.38888889e-3F));
  p = fma(p, r, set1(8.33333333e-3F));
  p = fma(p, r, set1(4.16666667e-2F));
  p = fma(p, r, set1(0.166666667F));
  p = fma(p, r, set1(0.5F));
  p = fma(p, r, set1(1.0F));
  p = fma(p, r, set1(1.0F));
  // 2^n in two factors, each of them normal.
  return mul(mul(p, power_of_two(shifted, magic, true)), power_of_two(shifted, magic, false));
}

inline V sigmoid(V x) { return div(set1(1.0F), add(set1(1.0F), exp(sub(set1(0.0F), x)))); }

inline V tanh(V x) {
  const V a = max(sub(set1(0.0F), x), x);  // |x|; NaN stays
  const V s = mul(x, x);
  V p = set1(-5.70498872745e-3F);  // minimax of tanh on [-0.625, 0.625], Cephes' split point
  p = fma(p, s, set1(2.06390887954e-2F));
  p = fma(p, s, set1(-5.37397155531e-2F));
  p = fma(p, s, set1(1.33314422036e-1F));
  p = fma(p, s, set1(-3.33332819422e-1F));
  const V small = fma(mul(p, s), x, x);
  V large = sub(set1(1.0F), div(set1(2.0F), add(exp(add(a, a)), set1(1.0F))));
  large = select_less(x, zero(), sub(zero(), large), large);
  return select_less(a, set1(0.625F), small, large);
}

inline V activate(V x, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return max(zero(), x);
    case Activation::kRelu6:
      return min(set1(6.0F), max(zero(), x));
    case Activation::kGelu: {
      const V cube = mul(mul(x, x), x);
      const V inner = mul(set1(0.797884560802865F), fma(set1(0.044715F), cube, x));
      return mul(mul(set1(0.5F), x), add(set1(1.0F), tanh(inner)));
    }
    case Activation::kSilu:
      return mul(x, sigmoid(x));
    case Activation::kLeakyRelu:
      return max(mul(set1(0.01F), x), x);
    case Activation::kTanh:
      return tanh(x);
    case Activation::kSigmoid:
      return sigmoid(x);
  }
  return x;
}

inline void epilogue(const EpilogueArgs* e) {
  for (int64_t r = 0; r < e->rows; ++r) {
    float* c = e->c + r * e->c_row;
    for (int64_t j = 0; j < e->cols; j += kWidth) {
      const Mask m = make_mask(e->cols - j);
      V x = load(c + j, m);
      if (e->bias != nullptr) {
        x = add(x, e->bias_col == 0 ? set1(e->bias[r * e->bias_row])
                                    : load(e->bias + r * e->bias_row + j, m));
      }
      if (e->residual != nullptr) {
        x = add(x, load(e->residual + r * e->residual_row + j, m));
      }
      store(c + j, activate(x, e->activation), m);
    }
  }
}

#if defined(__AVX2__)
// An 8 x 8 block: dst[c * dst_ld + r] = src[r * src_ld + c]. Halves of rows are put together as
// they are loaded, which leaves the shuffles of one lane.
inline void transpose8(float* dst, int64_t dst_ld, const float* src, int64_t src_ld) {
  JAXWIN_UNROLL
  for (int half = 0; half < 2; ++half) {
    __m256 r[4], t[4];
    JAXWIN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float* from = src + i * src_ld + 4 * half;
      r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)),
                                  _mm_loadu_ps(from + 4 * src_ld), 1);
    }
    t[0] = _mm256_unpacklo_ps(r[0], r[1]);
    t[1] = _mm256_unpackhi_ps(r[0], r[1]);
    t[2] = _mm256_unpacklo_ps(r[2], r[3]);
    t[3] = _mm256_unpackhi_ps(r[2], r[3]);
    float* to = dst + 4 * half * dst_ld;
    _mm256_storeu_ps(to, _mm256_shuffle_ps(t[0], t[2], 0x44));
    _mm256_storeu_ps(to + dst_ld, _mm256_shuffle_ps(t[0], t[2], 0xEE));
    _mm256_storeu_ps(to + 2 * dst_ld, _mm256_shuffle_ps(t[1], t[3], 0x44));
    _mm256_storeu_ps(to + 3 * dst_ld, _mm256_shuffle_ps(t[1], t[3], 0xEE));
  }
}
#endif

inline void copy(float* dst, int64_t dst_ld, const float* src, int64_t src_ld, int64_t src_step,
                 int64_t n, int64_t count) {
  if (src_step == 1) {
    for (int64_t j = 0; j < n; ++j) {
      float* d = dst + j * dst_ld;
      const float* s = src + j * src_ld;
      int64_t c = 0;
      for (; c + kWidth <= count; c += kWidth) store(d + c, load(s + c));
      if (c < count) {
        const Mask m = make_mask(count - c);
        store(d + c, load(s + c, m), m);
      }
    }
    return;
  }
  int64_t j = 0;
#if defined(__AVX2__)
  if (src_ld == 1 && n < count && n >= 8) {
    // Lines of the longer side are used up before the next ones are needed.
    const int64_t whole = n / 8 * 8;
    int64_t c = 0;
    for (; c + 16 <= count; c += 16) {
      for (j = 0; j < whole; j += 8) {
        transpose8(dst + j * dst_ld + c, dst_ld, src + j + c * src_step, src_step);
        transpose8(dst + j * dst_ld + c + 8, dst_ld, src + j + (c + 8) * src_step, src_step);
      }
    }
    for (; c < count; ++c) {
      for (j = 0; j < whole; ++j) dst[j * dst_ld + c] = src[j + c * src_step];
    }
    j = whole;
  } else if (src_ld == 1) {
    for (; j + 8 <= n; j += 8) {
      int64_t c = 0;
      for (; c + 8 <= count; c += 8) {
        transpose8(dst + j * dst_ld + c, dst_ld, src + j + c * src_step, src_step);
      }
      for (; c < count; ++c) {
        for (int64_t q = 0; q < 8; ++q) dst[(j + q) * dst_ld + c] = src[j + q + c * src_step];
      }
    }
  }
#endif
  for (; j < n; ++j) {
    for (int64_t c = 0; c < count; ++c) dst[j * dst_ld + c] = src[j * src_ld + c * src_step];
  }
}

inline void interleave(float* dst, int64_t dst_ld, const float* const* rows, int64_t n_rows,
                       int64_t src_ld, int64_t n, int64_t count) {
  for (int64_t i = 0; i < n; ++i) {
    float* d = dst + i * dst_ld;
    const int64_t at = i * src_ld;
    // Four floats at a time where as many remain to be read in the row, and where what is written
    // too much is overwritten by the next slot.
    const bool wide = (n - 1 - i) * src_ld + count >= 4 && (n - 1 - i) * dst_ld >= 4;
    for (int64_t r = 0; r < n_rows; ++r, d += count) {
      const float* s = rows[r];
      if (s == nullptr) {
        for (int64_t c = 0; c < count; ++c) d[c] = 0.0F;
      } else if (wide) {
        std::memcpy(d, s + at, 16);
      } else {
        for (int64_t c = 0; c < count; ++c) d[c] = s[at + c];
      }
    }
  }
}

inline void expand(float* dst, int64_t dst_ld, const float* src, int64_t src_ld, int64_t n,
                   const int64_t* table, int64_t multiplicity, int64_t lanes, int64_t span) {
  if (span > 0 && span <= kWidth) {
    int32_t index[kWidth];
    for (int64_t m = 0; m < multiplicity; ++m) {
      for (int l = 0; l < kWidth; ++l) {
        index[l] = l < lanes ? static_cast<int32_t>(table[m * kWidth + l]) : 0;
      }
      const Mask in = make_mask(span);
      for (int64_t i = 0; i < n; ++i) {
        store(dst + i * dst_ld + m * kWidth, permute(load(src + i * src_ld, in), index));
      }
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const float* s = src + i * src_ld;
    float* d = dst + i * dst_ld;
    for (int64_t m = 0; m < multiplicity; ++m) {
      for (int64_t l = 0; l < kWidth; ++l) {
        d[m * kWidth + l] = l < lanes ? s[table[m * kWidth + l]] : 0.0F;
      }
    }
  }
}

inline int64_t all_finite(const float* src, int64_t n) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, src + i, 4);
    bad |= static_cast<uint32_t>((bits & 0x7F800000U) == 0x7F800000U);
  }
  return bad == 0 ? 1 : 0;
}

// Enough independent chains for two units with six cycles of latency.
inline double peak(int64_t iterations) {
  constexpr int kChains = 12;
  V chain[kChains];
  JAXWIN_UNROLL
  for (int c = 0; c < kChains; ++c) chain[c] = set1(static_cast<float>(c));
  const V factor = set1(0.5F);
  const V addend = set1(1.0F);
  for (int64_t i = 0; i < iterations; ++i) {
    JAXWIN_UNROLL
    for (int c = 0; c < kChains; ++c) {
      chain[c] = fma(chain[c], factor, addend);
      keep(&chain[c]);
    }
  }
  V sum = zero();
  JAXWIN_UNROLL
  for (int c = 0; c < kChains; ++c) sum = add(sum, chain[c]);
  float lanes[kWidth];
  store(lanes, sum);
  volatile float sink = lanes[0];  // or all of it would be left out
  static_cast<void>(sink);
  return 2.0 * static_cast<double>(iterations) * kChains * kWidth;
}

}  // namespace
}  // namespace jaxwin::JAXWIN_TARGET
