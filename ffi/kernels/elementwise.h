// SPDX-License-Identifier: Apache-2.0
//
// Everything that is not multiply-accumulate: activations, copies into window order, transposition,
// lane expansion.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels/kernels.h"
#include "kernels/moves.h"
#include "kernels/vec.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

// e^x for a sum with 1, within 2 ulp; NaN stays NaN. Cut off where that sum is 1, or where what is
// divided by it is flushed to zero: 2^n then is a normal number.
// Cody and Waite reduction x = n ln 2 + r, |r| <= ln 2 / 2, then the polynomial of degree 6 that
// begins with 1 + r and has the least relative error there (3e-9).
inline V exp(V x) {
  x = min(set1(88.0F), max(set1(-87.0F), x));
  const V magic = set1(12582912.0F);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const V shifted = fma(x, set1(1.44269504088896341F), magic);
  const V n = sub(shifted, magic);
  V r = fma(n, set1(-0.693145751953125F), x);
  r = fma(n, set1(-1.42860682030941723212e-6F), r);
  V p = set1(1.381461e-3F);
  p = fma(p, r, set1(8.368711e-3F));
  p = fma(p, r, set1(4.166839e-2F));
  p = fma(p, r, set1(0.16666521F));
  p = fma(p, r, set1(0.49999994F));
  p = fma(p, r, set1(1.0F));
  p = fma(p, r, set1(1.0F));
  return mul(p, power_of_two(shifted));
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

inline V approximate(V x, Activation activation) {
  switch (activation) {
    case Activation::kGelu: {  // 1 + tanh(u) is 2 sigmoid(2 u)
      const V cube = mul(mul(x, x), x);
      return mul(x, sigmoid(mul(set1(1.59576912160573F), fma(set1(0.044715F), cube, x))));
    }
    case Activation::kSilu:
      return mul(x, sigmoid(x));
    case Activation::kTanh:
      return tanh(x);
    case Activation::kSigmoid:
      return sigmoid(x);
    default:
      return x;
  }
}

// The activations that need no approximation, of any type.
inline constexpr uint32_t kExactActivations =
    1U << static_cast<int>(Activation::kNone) | 1U << static_cast<int>(Activation::kRelu) |
    1U << static_cast<int>(Activation::kRelu6) | 1U << static_cast<int>(Activation::kLeakyRelu);

template <typename T>
inline Vec<T> activate(Vec<T> x, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return max(zero<T>(), x);
    case Activation::kRelu6:
      return min(set1(T{6}), max(zero<T>(), x));
    case Activation::kLeakyRelu:
      return max(mul(set1(static_cast<T>(0.01)), x), x);
    default:
      break;
  }
  if constexpr (sizeof(T) == sizeof(float)) return approximate(x, activation);
  return x;
}

#if defined(__AVX2__)
// An 8 x 8 block: dst[c * dst_ld + r] = src[r * src_ld + c]. Halves of rows are put together as
// they are loaded, which leaves the shuffles of one lane.
inline void transpose_block(float* dst, int64_t dst_ld, const float* src, int64_t src_ld) {
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

// 4 x 4.
inline void transpose_block(double* dst, int64_t dst_ld, const double* src, int64_t src_ld) {
  __m256d r[4], t[4];
  for (int i = 0; i < 4; ++i) r[i] = _mm256_loadu_pd(src + i * src_ld);
  for (int i = 0; i < 2; ++i) {
    t[2 * i] = _mm256_unpacklo_pd(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_pd(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    _mm256_storeu_pd(dst + i * dst_ld, _mm256_permute2f128_pd(t[i], t[i + 2], 0x20));
    _mm256_storeu_pd(dst + (i + 2) * dst_ld, _mm256_permute2f128_pd(t[i], t[i + 2], 0x31));
  }
}
#endif

template <typename T>
inline void copy(void* to, int64_t dst_ld, const void* from, int64_t src_ld, int64_t src_step,
                 int64_t n, int64_t count) {
  T* dst = static_cast<T*>(to);
  const T* src = static_cast<const T*>(from);
  constexpr int W = kWidth<T>;
#if defined(__AVX512VL__)
  // A masked access of 64 bytes crosses a cache line nearly always, whatever its mask says.
  if (sizeof(T) == 4 && src_step == 1 && count > 0 && count <= 8) {
    const auto m = static_cast<__mmask8>((1U << count) - 1);
    for (int64_t j = 0; j < n; ++j) {
      _mm256_mask_storeu_epi32(dst + j * dst_ld, m, _mm256_maskz_loadu_epi32(m, src + j * src_ld));
    }
    return;
  }
#endif
  if (src_step == 1) {
    for (int64_t j = 0; j < n; ++j) {
      T* d = dst + j * dst_ld;
      const T* s = src + j * src_ld;
      int64_t c = 0;
      for (; c + W <= count; c += W) store(d + c, load(s + c));
      if (c < count) {
        const Mask<T> m = make_mask<T>(count - c);
        store(d + c, load(s + c, m), m);
      }
    }
    return;
  }
  int64_t j = 0;
#if defined(__AVX2__)
  if ((src_ld == 1 || n == 1) && n <= src_step && 2 * count >= W) {  // few channels apart
    switch (src_step) {
      case 2:
        return split_rows<T, 2>(dst, dst_ld, src, n, count);
      case 3:
        return split_rows<T, 3>(dst, dst_ld, src, n, count);
      case 4:
        return split_rows<T, 4>(dst, dst_ld, src, n, count);
      default:
        break;
    }
  }
  // The last blocks overlap those before.
  constexpr int B = 32 / sizeof(T);
  if (src_ld == 1 && n >= B && count >= B) {
    const auto block = [=](int64_t row, int64_t column) {
      transpose_block(dst + row * dst_ld + column, dst_ld, src + row + column * src_step, src_step);
    };
    if (n < count) {
      // Lines of the longer side are used up before the next ones are needed.
      const int step = count >= 2 * B ? 2 * B : B;
      for (int64_t c = 0; c < count; c += step) {
        const int64_t column = c + step <= count ? c : count - step;
        for (int64_t r = 0; r < n; r += B) {
          const int64_t row = r + B <= n ? r : n - B;
          block(row, column);
          if (step > B) block(row, column + B);
        }
      }
      return;
    }
    // The other way about, lines of what is read.
    const int step = n >= 2 * B ? 2 * B : B;
    for (int64_t r = 0; r < n; r += step) {
      const int64_t row = r + step <= n ? r : n - step;
      for (int64_t c = 0; c < count; c += B) {
        const int64_t column = c + B <= count ? c : count - B;
        block(row, column);
        if (step > B) block(row + B, column);
      }
    }
    return;
  }
  if (src_ld == 1) {
    for (; j + B <= n; j += B) {
      for (int64_t c = 0; c < count; ++c) {
        for (int64_t q = 0; q < B; ++q) dst[(j + q) * dst_ld + c] = src[j + q + c * src_step];
      }
    }
  }
#endif
  for (; j < n; ++j) {
    for (int64_t c = 0; c < count; ++c) dst[j * dst_ld + c] = src[j * src_ld + c * src_step];
  }
}

template <typename T>
inline void interleave(void* dst, int64_t dst_ld, const void* const* rows, int64_t n_rows,
                       int64_t src_ld, int64_t n, int64_t count) {
#if defined(__AVX2__)
  if (count == 1 && src_ld == 1 && dst_ld == n_rows) {
    T* d = static_cast<T*>(dst);
    switch (n_rows) {
      case 2:
        return join_rows<T, 2>(d, rows, n);
      case 3:
        return join_rows<T, 3>(d, rows, n);
      case 4:
        return join_rows<T, 4>(d, rows, n);
      case 5:
        return join_rows<T, 5>(d, rows, n);
      case 6:
        return join_rows<T, 6>(d, rows, n);
      case 7:
        return join_rows<T, 7>(d, rows, n);
      case 8:
        return join_rows<T, 8>(d, rows, n);
      case 12:
        return join_rows<T, 12>(d, rows, n);
      case 16:
        return join_rows<T, 16>(d, rows, n);
      default:
        break;
    }
  }
#endif
  for (int64_t i = 0; i < n; ++i) {
    T* d = static_cast<T*>(dst) + i * dst_ld;
    const int64_t at = i * src_ld;
    // Four elements at a time where as many remain to be read in the row, and where what is written
    // too much is overwritten by the next slot.
    const bool wide = (n - 1 - i) * src_ld + count >= 4 && (n - 1 - i) * dst_ld >= 4;
    for (int64_t r = 0; r < n_rows; ++r, d += count) {
      const T* s = static_cast<const T*>(rows[r]);
      if (s == nullptr) {
        for (int64_t c = 0; c < count; ++c) d[c] = T{};
      } else if (wide) {
        std::memcpy(d, s + at, 4 * sizeof(T));
      } else {
        for (int64_t c = 0; c < count; ++c) d[c] = s[at + c];
      }
    }
  }
}

template <typename T>
inline void expand(void* to, int64_t dst_ld, const void* from, int64_t src_ld, int64_t n,
                   const int64_t* table, int64_t multiplicity, int64_t lanes, int64_t span) {
  T* dst = static_cast<T*>(to);
  const T* src = static_cast<const T*>(from);
  constexpr int W = kWidth<T>;
  if (span > 0 && span <= W) {
    int32_t index[W];
    for (int64_t m = 0; m < multiplicity; ++m) {
      for (int l = 0; l < W; ++l) {
        index[l] = l < lanes ? static_cast<int32_t>(table[m * W + l]) : 0;
      }
      const Mask<T> in = make_mask<T>(span);
      for (int64_t i = 0; i < n; ++i) {
        store(dst + i * dst_ld + m * W, permute(load(src + i * src_ld, in), index));
      }
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const T* s = src + i * src_ld;
    T* d = dst + i * dst_ld;
    for (int64_t m = 0; m < multiplicity; ++m) {
      for (int64_t l = 0; l < W; ++l) {
        d[m * W + l] = l < lanes ? s[table[m * W + l]] : T{};
      }
    }
  }
}

template <typename T>
inline int64_t all_finite(const void* src, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr Bits kExponent =
      sizeof(T) == 4 ? Bits{0x7F800000U} : static_cast<Bits>(0x7FF0000000000000U);
  Bits bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, static_cast<const T*>(src) + i, sizeof(T));
    bad |= static_cast<Bits>((bits & kExponent) == kExponent);
  }
  return bad == 0 ? 1 : 0;
}

template <typename T>
inline void accumulate(void* dst, const void* src, int64_t n) {
  T* d = static_cast<T*>(dst);
  const T* s = static_cast<const T*>(src);
  for (int64_t i = 0; i < n; ++i) d[i] += s[i];
}

// Enough independent chains for two units with six cycles of latency.
template <typename T>
inline double peak(int64_t iterations) {
  constexpr int kChains = 12;
  Vec<T> chain[kChains];
  JAXWIN_UNROLL
  for (int c = 0; c < kChains; ++c) chain[c] = set1(static_cast<T>(c));
  const Vec<T> factor = set1(static_cast<T>(0.5));
  const Vec<T> addend = set1(T{1});
  for (int64_t i = 0; i < iterations; ++i) {
    JAXWIN_UNROLL
    for (int c = 0; c < kChains; ++c) {
      chain[c] = fma(chain[c], factor, addend);
      keep(&chain[c]);
    }
  }
  Vec<T> sum = zero<T>();
  JAXWIN_UNROLL
  for (int c = 0; c < kChains; ++c) sum = add(sum, chain[c]);
  T lanes[kWidth<T>];
  store(lanes, sum);
  volatile T sink = lanes[0];  // or all of it would be left out
  static_cast<void>(sink);
  return 2.0 * static_cast<double>(iterations) * kChains * kWidth<T>;
}

}  // namespace
}  // namespace jaxwin::JAXWIN_TARGET
