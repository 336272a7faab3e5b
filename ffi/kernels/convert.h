// SPDX-License-Identifier: Apache-2.0
//
// Between the elements of arrays and the words of the kernels: bfloat16 and float16 (exact to
// float32, rounded to nearest even back), integers (two channels to a pair, low bits back).
#pragma once

#include <cstring>

#include "kernels/elementwise.h"
#include "kernels/kernels.h"
#include "kernels/vec.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
// By integers: a conversion by arithmetic would lose denormals where they are flushed.
inline float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000U) << 16;
  const uint32_t exponent = x.bits >> 10 & 0x1FU;
  uint32_t fraction = x.bits & 0x3FFU;
  if (exponent == 0x1FU) {  // a NaN becomes quiet
    return float_of(sign | 0x7F800000U | (fraction != 0 ? 0x400000U : 0U) | fraction << 13);
  }
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  if (fraction == 0) return float_of(sign);
  uint32_t shift = 0;
  for (; (fraction & 0x400U) == 0; fraction <<= 1) ++shift;
  return float_of(sign | (113 - shift) << 23 | (fraction & 0x3FFU) << 13);
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, BFloat16* to) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16;
  const uint32_t nan = bits >> 16 | 0x40U;
  to->bits = static_cast<uint16_t>((bits & 0x7FFFFFFFU) > 0x7F800000U ? nan : rounded);
}
inline void narrow(float x, Float16* to) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = bits >> 16 & 0x8000U;
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  uint32_t result;
  if (magnitude > 0x7F800000U) {
    result = 0x7E00U | (magnitude >> 13 & 0x3FFU);
  } else if (magnitude >= 0x47800000U) {  // 2^16 and more
    result = 0x7C00U;
  } else if (magnitude >= 0x38800000U) {  // 2^-14: normal; a carry goes on into the exponent
    result = (magnitude - 0x38000000U + 0xFFFU + (magnitude >> 13 & 1U)) >> 13;
  } else if (magnitude > 0x33000000U) {  // more than half of the least denormal
    const uint32_t fraction = (magnitude & 0x7FFFFFU) | 0x800000U;
    const uint32_t shift = 126 - (magnitude >> 23);
    const uint32_t half = 1U << (shift - 1);
    result = (fraction + half - 1 + (fraction >> shift & 1U)) >> shift;
  } else {
    result = 0;
  }
  to->bits = static_cast<uint16_t>(sign | result);
}

template <typename S>
inline void widen_row(float* dst, const S* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = widen(src[i]);
}
template <typename S>
inline void narrow_row(S* dst, const float* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(src[i], dst + i);
}
#if defined(__F16C__)
template <>
inline void widen_row(float* dst, const Float16* src, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(dst + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  }
  for (; i < n; ++i) dst[i] = widen(src[i]);
}
template <>
inline void narrow_row(Float16* dst, const float* src, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) narrow(src[i], dst + i);
}
#endif

// How elements S become words: `channels` of them to a word.
template <typename S>
struct Words {
  using W = float;
  static constexpr int64_t kChannels = 1;
  // Neighbouring channels.
  static void row(W* dst, const S* src, int64_t count) { widen_row(dst, src, count); }
  // The words of n pixels, neighbours; channels are `step` apart, `count` of them left.
  static void pixels(W* dst, const S* src, int64_t, int64_t, int64_t n) { widen_row(dst, src, n); }
  static W word(const S* src, int64_t, int64_t) { return widen(*src); }
};
template <typename S>
struct PairWords {
  using W = Pair;
  static constexpr int64_t kChannels = 2;
  static void row(W* dst, const S* src, int64_t count) {
    using Half __attribute__((may_alias)) = int16_t;
    Half* to = reinterpret_cast<Half*>(dst);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<int16_t>(src[i]);
    if (count % 2 != 0) to[count] = 0;
  }
  static void pixels(W* dst, const S* src, int64_t step, int64_t count, int64_t n) {
    if (count < 2) {
      for (int64_t i = 0; i < n; ++i) dst[i] = join(src[i], 0);
    } else {
      for (int64_t i = 0; i < n; ++i) dst[i] = join(src[i], src[i + step]);
    }
  }
  static W word(const S* src, int64_t step, int64_t count) {
    return join(*src, count < 2 ? S{0} : src[step]);
  }
  static W join(S low, S high) {
    const auto half = [](S s) { return static_cast<uint32_t>(static_cast<uint16_t>(s)); };
    return {static_cast<int32_t>(half(low) | half(high) << 16)};
  }
};
template <>
struct Words<int8_t> : PairWords<int8_t> {};
template <>
struct Words<uint8_t> : PairWords<uint8_t> {};
template <>
struct Words<int16_t> : PairWords<int16_t> {};

template <typename S>
inline void result_row(S* dst, const float* src, int64_t n) {
  narrow_row(dst, src, n);
}
template <typename S>
inline void result_row(S* dst, const Pair* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<S>(src[i].bits);
}

// Blocks of this many elements are turned in the first-level cache.
inline constexpr int64_t kTurn = 16;

// dst[j * dst_ld + c] = src[c * src_ld + j] for j < kTurn, c < count <= kTurn.
template <typename W>
inline void turn_block(W* dst, int64_t dst_ld, const W* src, int64_t src_ld, int64_t count) {
  int64_t c = 0;
#if defined(__AVX2__)
  for (; c + 8 <= count; c += 8) {
    for (int64_t j = 0; j < kTurn; j += 8) {
      transpose_block(reinterpret_cast<float*>(dst + j * dst_ld + c), dst_ld,
                      reinterpret_cast<const float*>(src + c * src_ld + j), src_ld);
    }
  }
#endif
  for (; c < count; ++c) {
    for (int64_t j = 0; j < kTurn; ++j) dst[j * dst_ld + c] = src[c * src_ld + j];
  }
}

template <typename S>
inline void read(void* to, int64_t dst_ld, const void* from, int64_t src_ld, int64_t src_step,
                 int64_t n, int64_t count) {
  using R = Words<S>;
  using W = typename R::W;
  W* dst = static_cast<W*>(to);
  const S* src = static_cast<const S*>(from);
  if (src_step == 1) {
    for (int64_t j = 0; j < n; ++j) R::row(dst + j * dst_ld, src + j * src_ld, count);
    return;
  }
  const int64_t words = (count + R::kChannels - 1) / R::kChannels;
  for (int64_t j = 0; j < n;) {
    if (src_ld == 1 && n - j >= kTurn) {
      for (int64_t c = 0; c < words; c += kTurn) {
        W turn[kTurn * kTurn];
        const int64_t block = words - c < kTurn ? words - c : kTurn;
        for (int64_t i = 0; i < block; ++i) {
          const int64_t channel = (c + i) * R::kChannels;
          R::pixels(turn + i * kTurn, src + j + channel * src_step, src_step, count - channel,
                    kTurn);
        }
        turn_block(dst + j * dst_ld + c, dst_ld, turn, kTurn, block);
      }
      j += kTurn;
      continue;
    }
    for (int64_t c = 0; c < words; ++c) {
      const int64_t channel = c * R::kChannels;
      dst[j * dst_ld + c] =
          R::word(src + j * src_ld + channel * src_step, src_step, count - channel);
    }
    ++j;
  }
}

template <typename S>
inline void pack(void* to, int64_t dst_ld, const void* from, int64_t src_ld, int64_t src_step,
                 int64_t n, int64_t count) {
  using R = Words<S>;
  if constexpr (R::kChannels == 1) {
    read<S>(to, dst_ld, from, src_ld, src_step, n, count);
  } else {
    typename R::W* dst = static_cast<typename R::W*>(to);
    const S* src = static_cast<const S*>(from);
    for (int64_t j = 0; j < n; j += R::kChannels, dst += dst_ld) {
      const S* row = src + j * src_ld;
      if (src_step == 1) {
        R::pixels(dst, row, src_ld, n - j, count);
        continue;
      }
      for (int64_t f = 0; f < count; ++f) dst[f] = R::word(row + f * src_step, src_ld, n - j);
    }
  }
}

template <typename W, typename S>
inline void write(void* to, int64_t dst_ld, const void* from, int64_t src_ld, int64_t src_step,
                  int64_t n, int64_t count) {
  S* dst = static_cast<S*>(to);
  const W* src = static_cast<const W*>(from);
  if (src_step == 1) {
    for (int64_t j = 0; j < n; ++j) result_row(dst + j * dst_ld, src + j * src_ld, count);
    return;
  }
  for (int64_t j = 0; j < n;) {
    if (src_ld == 1 && n - j >= kTurn) {
      for (int64_t c = 0; c < count; c += kTurn) {
        W turn[kTurn * kTurn];
        const int64_t block = count - c < kTurn ? count - c : kTurn;
        turn_block(turn, kTurn, src + j + c * src_step, src_step, block);
        for (int64_t i = 0; i < kTurn; ++i) {
          result_row(dst + (j + i) * dst_ld + c, turn + i * kTurn, block);
        }
      }
      j += kTurn;
      continue;
    }
    for (int64_t c = 0; c < count; ++c) {
      result_row(dst + j * dst_ld + c, src + j * src_ld + c * src_step, 1);
    }
    ++j;
  }
}

// The epilogue on words of floats, its bias and residual being of S.
template <typename S>
inline void narrow_epilogue(const EpilogueArgs* e) {
  constexpr int W = kWidth<float>;
  const S* bias = static_cast<const S*>(e->bias);
  const S* residual = static_cast<const S*>(e->residual);
  for (int64_t r = 0; r < e->rows; ++r) {
    float* c = static_cast<float*>(e->c) + r * e->c_row;
    for (int64_t j = 0; j < e->cols; j += W) {
      const int64_t n = e->cols - j < W ? e->cols - j : W;
      const Mask<float> m = make_mask<float>(n);
      float operand[W] = {};
      V x = load(c + j, m);
      if (bias != nullptr) {
        for (int64_t i = 0; i < n; ++i) {
          operand[i] = widen(bias[r * e->bias_row + (j + i) * e->bias_col]);
        }
        x = add(x, load(operand));
      }
      if (residual != nullptr) {
        const S* from = residual + r * e->residual_row + j * e->residual_col;
        if (e->residual_col == 1) {
          widen_row(operand, from, n);
        } else {
          for (int64_t i = 0; i < n; ++i) operand[i] = widen(from[i * e->residual_col]);
        }
        x = add(x, load(operand));
      }
      store(c + j, activate(x, e->activation), m);
    }
  }
}

template <typename S>
inline int64_t narrow_finite(const void* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = widen(static_cast<const S*>(src)[i]);
    if ((bits_of(x) & 0x7F800000U) == 0x7F800000U) return 0;
  }
  return 1;
}

inline int64_t always_finite(const void*, int64_t) { return 1; }

}  // namespace
}  // namespace jaxwin::JAXWIN_TARGET
