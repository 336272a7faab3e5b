// SPDX-License-Identifier: Apache-2.0
//
// Between the elements of arrays and the words of the kernels: bfloat16 and float16 (exact to
// float32, rounded to nearest even back), integers (two channels to a pair, or each a float where
// sums are exact; low bits back).
#pragma once

#include <type_traits>

#include "kernels/elementwise.h"
#include "kernels/kernels.h"
#include "kernels/widen.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

// By whole vectors: most rows are short, and a loop that the compiler has vectorised takes as long
// to begin.
template <typename S>
inline void widen_row(float* dst, const S* src, int64_t n) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + kWidth<float> <= n; i += kWidth<float>) store(dst + i, widen_load<float>(src + i));
#endif
#if defined(__AVX512F__)
  const Mask<float> m = make_mask<float>(n - i);
  if (i < n) store(dst + i, widen_load<float>(src + i, m), m);
#else
  for (; i < n; ++i) dst[i] = widen(src[i]);
#endif
}
template <typename S>
inline void narrow_row(S* dst, const float* src, int64_t n) {
  int64_t i = 0;
#if defined(__AVX2__)
  constexpr int W = kWidth<float>;
  if constexpr (!std::is_integral_v<S>) {
    for (; i + 2 * W <= n; i += 2 * W) narrow_store(dst + i, load(src + i), load(src + i + W));
  }
  for (; i + W <= n; i += W) narrow_store(dst + i, load(src + i));
#endif
#if defined(__AVX512F__)
  if constexpr (!std::is_integral_v<S>) {
    const Mask<float> m = make_mask<float>(n - i);
    if (i < n) narrow_store(dst + i, load(src + i, m), m);
    return;
  }
#endif
  for (; i < n; ++i) narrow(src[i], dst + i);
}

// How elements S become words T: `channels` of them to a word.
template <typename S, typename T>
struct Words {
  using W = T;
  static constexpr int64_t kChannels = 1;
  // Neighbouring channels.
  static void row(W* dst, const S* src, int64_t count) { widen_row(dst, src, count); }
  // The words of n pixels, neighbours; channels are `step` apart, `count` of them left.
  static void pixels(W* dst, const S* src, int64_t, int64_t, int64_t n) { widen_row(dst, src, n); }
  static W word(const S* src, int64_t, int64_t) { return widen(*src); }
};

#if defined(__AVX2__)
// 16 integers, made halves of pairs.
template <typename S>
inline __m256i to_halves(const S* src) {
  const auto* from = reinterpret_cast<const __m128i*>(src);
  if constexpr (sizeof(S) == 2) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
  return std::is_signed_v<S> ? _mm256_cvtepi8_epi16(_mm_loadu_si128(from))
                             : _mm256_cvtepu8_epi16(_mm_loadu_si128(from));
}
// 16 pairs, of neighbouring integers and of those `step` further on.
#if defined(__AVX512F__)
template <typename S>
inline void join_vector(Pair* dst, const S* src, int64_t step) {
  const __m512i low = _mm512_cvtepu16_epi32(to_halves(src));
  const __m512i high = _mm512_cvtepu16_epi32(to_halves(src + step));
  _mm512_storeu_si512(dst, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#else
template <typename S>
inline void join_vector(Pair* dst, const S* src, int64_t step) {
  const __m256i low = to_halves(src);
  const __m256i high = to_halves(src + step);
  // Of either half of these a half each: the first and the third, the second and the fourth.
  const __m256i first = _mm256_unpacklo_epi16(low, high);
  const __m256i second = _mm256_unpackhi_epi16(low, high);
  auto* to = reinterpret_cast<__m256i*>(dst);
  _mm256_storeu_si256(to, _mm256_permute2x128_si256(first, second, 0x20));
  _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(first, second, 0x31));
}
#endif
#endif

template <typename S>
struct Words<S, Pair> {
  using W = Pair;
  static constexpr int64_t kChannels = 2;
  static void row(W* dst, const S* src, int64_t count) {
    using Half __attribute__((may_alias)) = int16_t;
    Half* to = reinterpret_cast<Half*>(dst);
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; sizeof(S) == 1 && i + 32 <= count; i += 32) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
      _mm512_storeu_si512(
          to + i, std::is_signed_v<S> ? _mm512_cvtepi8_epi16(bytes) : _mm512_cvtepu8_epi16(bytes));
    }
#endif
#if defined(__AVX2__)
    for (; i + 16 <= count; i += 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), to_halves(src + i));
    }
#endif
    for (; i < count; ++i) to[i] = static_cast<int16_t>(src[i]);
    if (count % 2 != 0) to[count] = 0;
  }
  static void pixels(W* dst, const S* src, int64_t step, int64_t count, int64_t n) {
    int64_t i = 0;
    if (count < 2) {
      for (; i < n; ++i) dst[i] = join(src[i], 0);
      return;
    }
#if defined(__AVX2__)
    for (; i + 16 <= n; i += 16) join_vector(dst + i, src + i, step);
#endif
    for (; i < n; ++i) dst[i] = join(src[i], src[i + step]);
  }
  static W word(const S* src, int64_t step, int64_t count) {
    return join(*src, count < 2 ? S{0} : src[step]);
  }
  static W join(S low, S high) {
    const auto half = [](S s) { return static_cast<uint32_t>(static_cast<uint16_t>(s)); };
    return {static_cast<int32_t>(half(low) | half(high) << 16)};
  }
};
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

template <typename S, typename T>
inline void read(void* to, int64_t dst_ld, const void* from, int64_t src_ld, int64_t src_step,
                 int64_t n, int64_t count) {
  using R = Words<S, T>;
  using W = T;
  W* dst = static_cast<W*>(to);
  const S* src = static_cast<const S*>(from);
  if (src_step == 1) {
    if (R::kChannels == 1 && dst_ld == count && src_ld == count) return R::row(dst, src, n * count);
    for (int64_t j = 0; j < n; ++j) R::row(dst + j * dst_ld, src + j * src_ld, count);
    return;
  }
#if defined(__AVX2__)
  if constexpr (R::kChannels == 1) {
    // Few rows that lie between each other: made words together, then taken apart as words.
    constexpr int64_t kMost = 768;  // words
    if (src_ld == 1 && n <= src_step && src_step <= 16) {
      W words[kMost];
      for (int64_t c = 0; c < count; c += kMost / src_step) {
        const int64_t part = count - c < kMost / src_step ? count - c : kMost / src_step;
        R::row(words, src + c * src_step, (part - 1) * src_step + n);
        copy<W>(dst + c, dst_ld, words, 1, src_step, n, part);
      }
      return;
    }
  }
#endif
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

template <typename S, typename T>
inline void pack(void* to, int64_t dst_ld, const void* from, int64_t src_ld, int64_t src_step,
                 int64_t n, int64_t count) {
  using R = Words<S, T>;
  if constexpr (R::kChannels == 1) {
    read<S, T>(to, dst_ld, from, src_ld, src_step, n, count);
  } else {
    T* dst = static_cast<T*>(to);
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
    if (dst_ld == count && src_ld == count) return result_row(dst, src, n * count);
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

#if defined(__AVX2__)
// Whole vectors of results, which pass the caches by.
template <typename S>
inline void narrow_streams(void* to, int64_t dst_ld, const void* from, int64_t src_ld, int64_t,
                           int64_t n, int64_t count) {
  constexpr int W = kWidth<float>;
  S* dst = static_cast<S*>(to);
  const float* src = static_cast<const float*>(from);
  for (int64_t j = 0; j < n; ++j, dst += dst_ld, src += src_ld) {
    for (int64_t i = 0; i < count; i += 2 * W) {
      narrow_stream(dst + i, load(src + i), load(src + i + W));
    }
  }
}
#endif

// What an epilogue adds to n neighbouring words, at most a vector.
template <typename T, typename S>
JAXWIN_INLINE Vec<T> operand_load(const S* p, int64_t n) {
  constexpr int W = kWidth<T>;
#if !defined(__AVX2__)
  if constexpr (!std::is_same_v<S, T>) {
    T lanes[W] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = widen(p[i]);
    return load(lanes);
  } else
#endif
    return n == W ? widen_load<T>(p) : widen_load<T>(p, make_mask<T>(n));
}

// The first n words of a vector to results R.
template <typename R, typename T>
JAXWIN_INLINE void put(R* p, Vec<T> x, int64_t n) {
  constexpr int W = kWidth<T>;
#if !defined(__AVX2__)
  if constexpr (!std::is_same_v<R, T>) {
    T lanes[W];
    store(lanes, x);
    for (int64_t i = 0; i < n; ++i) narrow(lanes[i], p + i);
  } else
#endif
    n == W ? result_store<true>(p, x, make_mask<T>(W)) : result_store<false>(p, x, make_mask<T>(n));
}

// results[j ...] = f(c[j ...], j, n) for the n words from j on, a vector at a time.
template <typename R, typename T, typename F>
JAXWIN_INLINE void each_vector(R* results, const T* c, int64_t cols, const F& f) {
  constexpr int64_t W = kWidth<T>;
  int64_t j = 0;
  for (; j + W <= cols; j += W) put<R, T>(results + j, f(load(c + j), j, W), W);
  if (j < cols) {
    const int64_t n = cols - j;
    put<R, T>(results + j, f(load(c + j, make_mask<T>(n)), j, n), n);
  }
}

// Row r of the results: words in place of the sums, else elements of their own.
template <typename R, typename T>
inline R* results_row(const EpilogueArgs& e, int64_t r) {
  if constexpr (std::is_same_v<R, T>) {
    return static_cast<T*>(e.c) + r * e.c_row;
  } else {
    return static_cast<R*>(e.y) + r * e.y_row;
  }
}

// The epilogue's sums, and an activation that is known here. What is asked in the loop over a row
// takes longer than the sums do.
template <Activation kActivation, typename R, typename T, typename S>
inline void add_operands(const EpilogueArgs& e) {
  const S* bias = static_cast<const S*>(e.bias);
  const S* residual = static_cast<const S*>(e.residual);
  const auto rows = [&](const auto& sums_of) {
    for (int64_t r = 0; r < e.rows; ++r) {
      const auto sum = sums_of(r);
      each_vector(
          results_row<R, T>(e, r), static_cast<const T*>(e.c) + r * e.c_row, e.cols,
          [&](Vec<T> x, int64_t j, int64_t n) { return activate(sum(x, j, n), kActivation); });
    }
  };
  // By row, by column and none; each a function of the row, of a function of a vector.
  const auto same = [](int64_t) { return [](Vec<T> x, int64_t, int64_t) { return x; }; };
  const auto by_row = [&](int64_t r) {
    const Vec<T> b = set1(widen(bias[r * e.bias_row]));
    return [b](Vec<T> x, int64_t, int64_t) { return add(x, b); };
  };
  const auto by_column = [&](int64_t r) {
    const S* b = bias + r * e.bias_row;
    return [b](Vec<T> x, int64_t j, int64_t n) { return add(x, operand_load<T>(b + j, n)); };
  };
  const auto with_residual = [&](const auto& biased_of) {
    if (residual == nullptr) return rows(biased_of);
    rows([&](int64_t r) {
      const S* from = residual + r * e.residual_row;
      return [biased = biased_of(r), from](Vec<T> x, int64_t j, int64_t n) {
        return add(biased(x, j, n), operand_load<T>(from + j, n));
      };
    });
  };
  if (bias == nullptr) return with_residual(same);
  e.bias_col == 0 ? with_residual(by_row) : with_residual(by_column);
}

// The epilogue on words T, its bias and residual being of S, its results of R.
template <typename T, typename S, typename R>
inline void epilogue(const EpilogueArgs* args) {
  const EpilogueArgs& e = *args;
  switch (e.activation) {
    case Activation::kNone:
      return add_operands<Activation::kNone, R, T, S>(e);
    case Activation::kRelu:
      return add_operands<Activation::kRelu, R, T, S>(e);
    case Activation::kRelu6:
      return add_operands<Activation::kRelu6, R, T, S>(e);
    default:
      break;
  }
  if (e.bias != nullptr || e.residual != nullptr) add_operands<Activation::kNone, T, T, S>(e);
  for (int64_t r = 0; r < e.rows; ++r) {
    each_vector(results_row<R, T>(e, r), static_cast<const T*>(e.c) + r * e.c_row, e.cols,
                [&](Vec<T> x, int64_t, int64_t) { return activate(x, e.activation); });
  }
}

template <typename S>
inline int64_t narrow_finite(const void* src, int64_t n) {
  constexpr uint16_t kInfinity = std::is_same_v<S, BFloat16> ? 0x7F80 : 0x7C00;
  const S* at = static_cast<const S*>(src);
  int64_t i = 0;
  bool found = false;
#if defined(__AVX512BW__)
  const __m512i infinity = _mm512_set1_epi16(kInfinity);
  __mmask32 lanes = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512i exponents = _mm512_and_si512(_mm512_loadu_si512(at + i), infinity);
    lanes |= _mm512_cmpeq_epi16_mask(exponents, infinity);
  }
  found = lanes != 0;
#elif defined(__AVX2__)
  const __m256i infinity = _mm256_set1_epi16(kInfinity);
  __m256i lanes = _mm256_setzero_si256();
  for (; i + 16 <= n; i += 16) {
    const auto* from = reinterpret_cast<const __m256i*>(at + i);
    const __m256i exponents = _mm256_and_si256(_mm256_loadu_si256(from), infinity);
    lanes = _mm256_or_si256(lanes, _mm256_cmpeq_epi16(exponents, infinity));
  }
  found = _mm256_testz_si256(lanes, lanes) == 0;
#endif
  for (; i < n; ++i) found |= (at[i].bits & kInfinity) == kInfinity;
  return found ? 0 : 1;
}

inline int64_t always_finite(const void*, int64_t) { return 1; }

}  // namespace
}  // namespace jaxwin::JAXWIN_TARGET
