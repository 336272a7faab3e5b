// SPDX-License-Identifier: Apache-2.0
//
// Between the elements of arrays and floats, scalars and vectors: exact to float, rounded to
// nearest even back; integers, which are low enough to be exact, give their low bits back.
#pragma once

#include <cstring>
#include <type_traits>

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

// Stored only: rounded by an instruction of AVX512-BF16, for which no target is compiled. It makes
// denormals zero, and kernels run where no sum is one.
#if defined(__AVX512F__) && __GNUC__ >= 10
#define JAXWIN_BF16_BY_CPU
struct BFloat16ByCpu : BFloat16 {};
#endif

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
inline double widen(double x) { return x; }
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

inline float widen(int8_t x) { return x; }
inline float widen(uint8_t x) { return x; }

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, BFloat16* to) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16;
  const uint32_t nan = bits >> 16 | 0x40U;
  to->bits = static_cast<uint16_t>((bits & 0x7FFFFFFFU) > 0x7F800000U ? nan : rounded);
}
template <typename S, std::enable_if_t<std::is_integral_v<S>, int> = 0>
inline void narrow(float x, S* to) {  // low bits
  *to = static_cast<S>(static_cast<int32_t>(x));
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

// A vector of elements, or the first lanes of one; see widen_load. Not defined for the baseline.
template <bool kSpare, typename S>
V widen_vector(const S* p);
template <bool kSpare, typename S>
V widen_vector(const S* p, Mask<float> m);

#if defined(__AVX512F__)

inline V widen_vector(__m256i bits, BFloat16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline V widen_vector(__m256i bits, Float16) { return {_mm512_cvtph_ps(bits)}; }
inline V widen_vector(__m128i bits, int8_t) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bits))};
}
inline V widen_vector(__m128i bits, uint8_t) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bits))};
}
template <bool kSpare, typename B, typename S>
inline V widen_bits(B bits, S s) {
  return widen_vector(bits, s);
}
// With a register to spare for where the halves of lanes come from, in one step: to extend and to
// shift takes the port of a product as well.
template <bool kSpare>
inline V widen_bits(__m256i bits, BFloat16 s) {
  if constexpr (!kSpare) return widen_vector(bits, s);
  alignas(64) static constexpr uint16_t kIndex[32] = {0, 0,  0, 1,  0, 2,  0, 3,  0, 4, 0,
                                                      5, 0,  6, 0,  7, 0,  8, 0,  9, 0, 10,
                                                      0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, _mm512_load_si512(kIndex),
                                                             _mm512_castsi256_si512(bits)))};
}
template <bool kSpare, typename S>
inline V widen_vector(const S* p) {
  if constexpr (sizeof(S) == 2) {
    return widen_bits<kSpare>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), S{});
  } else {
    return widen_bits<kSpare>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), S{});
  }
}
template <bool kSpare, typename S>
inline V widen_vector(const S* p, Mask<float> m) {
  if constexpr (sizeof(S) == 2) {
    return widen_bits<kSpare>(_mm256_maskz_loadu_epi16(m.m, p), S{});
  } else {
    return widen_bits<kSpare>(_mm_maskz_loadu_epi8(m.m, p), S{});
  }
}

// The low halves of the vector are the high ones of its lanes.
inline __m512i high_halves() {
  alignas(64) static constexpr uint16_t kIndex[32] = {1,  3,  5,  7,  9,  11, 13, 15,
                                                      17, 19, 21, 23, 25, 27, 29, 31};
  return _mm512_load_si512(kIndex);
}
// The results are the high halves of lanes.
inline __m512i round_to_bf16(V a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  __m512i result = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
  result = _mm512_mask_add_epi32(result, odd, bits, _mm512_set1_epi32(0x8000));
  return _mm512_mask_or_epi32(result, nan, bits, _mm512_set1_epi32(0x400000));
}
inline __m256i narrow_vector(V a, BFloat16) {
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(high_halves(), round_to_bf16(a)));
}
#if defined(JAXWIN_BF16_BY_CPU)
inline __m256i narrow_vector(V a, BFloat16ByCpu) {
  __m256i result;
  asm("vcvtneps2bf16 %1, %0" : "=v"(result) : "v"(a.v));
  return result;
}
#endif
inline __m256i narrow_vector(V a, Float16) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
}
// Two vectors to one.
template <typename S>
inline __m512i narrow_pair(V low, V high, S s) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow_vector(low, s)), narrow_vector(high, s),
                            1);
}
#if defined(JAXWIN_BF16_BY_CPU)
inline __m512i narrow_pair(V low, V high, BFloat16ByCpu) {
  __m512i result;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(result) : "v"(low.v), "v"(high.v));
  return result;
}
#endif
template <typename S>
inline void narrow_store(S* p, V low, V high) {
  _mm512_storeu_si512(p, narrow_pair(low, high, S{}));
}
template <typename S>
inline void narrow_stream(S* p, V low, V high) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow_pair(low, high, S{}));
}
template <typename S>
inline void narrow_store(S* p, V a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_vector(a, S{}));
}
template <typename S>
inline void narrow_store(S* p, V a, Mask<float> m) {
  _mm256_mask_storeu_epi16(p, m.m, narrow_vector(a, S{}));
}

// Two vectors of bfloat16, the even ones and the odd ones: they are halves of the same lanes, and
// each takes one step where a vector of neighbours takes two, both on the ports of products.
template <typename S>
constexpr bool kByHalves = std::is_same_v<S, BFloat16>;
inline void widen_halves(const BFloat16* p, V& even, V& odd) {
  const __m512i bits = _mm512_loadu_si512(p);
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  odd.v = _mm512_castsi512_ps(
      _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000))));
}
// From neighbours to halves, and back.
inline void split_halves(V low, V high, V& even, V& odd) {
  const __m512i lanes =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i next = _mm512_add_epi32(lanes, _mm512_set1_epi32(1));
  even.v = _mm512_permutex2var_ps(low.v, lanes, high.v);
  odd.v = _mm512_permutex2var_ps(low.v, next, high.v);
}
inline void store_halves(float* p, V even, V odd) {
  const __m512i lanes = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i next = _mm512_add_epi32(lanes, _mm512_set1_epi32(8));
  _mm512_storeu_ps(p, _mm512_permutex2var_ps(even.v, lanes, odd.v));
  _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(even.v, next, odd.v));
}
inline void store_halves(BFloat16* p, V even, V odd) {
  const __m512i low = _mm512_srli_epi32(round_to_bf16(even), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xAAAAAAAA, low, round_to_bf16(odd)));
}
#if defined(JAXWIN_BF16_BY_CPU)
inline void store_halves(BFloat16ByCpu* p, V even, V odd) {
  alignas(64) static constexpr uint16_t kIndex[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kIndex),
                                                  narrow_pair(even, odd, BFloat16ByCpu{})));
}
#endif

inline void narrow_store(int32_t* p, V a) { _mm512_storeu_si512(p, _mm512_cvttps_epi32(a.v)); }
inline void narrow_store(int32_t* p, V a, Mask<float> m) {
  _mm512_mask_storeu_epi32(p, m.m, _mm512_cvttps_epi32(a.v));
}
inline void narrow_store(uint16_t* p, V a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_cvttps_epi32(a.v)));
}
inline void narrow_store(uint8_t* p, V a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a.v)));
}

#elif defined(__AVX2__)

inline V widen_vector(__m128i bits, BFloat16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline V widen_vector(__m128i bits, Float16) { return {_mm256_cvtph_ps(bits)}; }
inline V widen_vector(__m128i bits, int8_t) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bits))};
}
inline V widen_vector(__m128i bits, uint8_t) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bits))};
}
template <bool kSpare, typename S>
inline V widen_vector(const S* p) {
  const auto* at = reinterpret_cast<const __m128i*>(p);
  return widen_vector(sizeof(S) == 2 ? _mm_loadu_si128(at) : _mm_loadl_epi64(at), S{});
}
// Elements of less than four bytes have no masked loads, nor stores.
inline int active_lanes(Mask<float> m) {
  return __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(m.m)));
}
template <bool kSpare, typename S>
inline V widen_vector(const S* p, Mask<float> m) {
  const int n = active_lanes(m);
  if (n == 8) return widen_vector<kSpare>(p);
  S lanes[8] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return widen_vector<kSpare>(lanes);
}

// The low halves of eight integers.
inline __m128i low_halves(__m256i a) {
  const __m256i low = _mm256_and_si256(a, _mm256_set1_epi32(0xFFFF));
  return _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
}
inline __m128i narrow_vector(V a, BFloat16) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), even);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, quiet, nan);
  return low_halves(_mm256_srli_epi32(result, 16));
}
inline __m128i narrow_vector(V a, Float16) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
}
// Two vectors to one.
template <typename S>
inline __m256i narrow_pair(V low, V high, S s) {
  return _mm256_set_m128i(narrow_vector(high, s), narrow_vector(low, s));
}
template <typename S>
inline void narrow_store(S* p, V low, V high) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_pair(low, high, S{}));
}
template <typename S>
inline void narrow_stream(S* p, V low, V high) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_pair(low, high, S{}));
}
template <typename S>
inline void narrow_store(S* p, V a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_vector(a, S{}));
}
inline void narrow_store(int32_t* p, V a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvttps_epi32(a.v));
}
inline void narrow_store(uint16_t* p, V a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low_halves(_mm256_cvttps_epi32(a.v)));
}
inline void narrow_store(uint8_t* p, V a) {
  const __m128i low = _mm_and_si128(low_halves(_mm256_cvttps_epi32(a.v)), _mm_set1_epi16(0xFF));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(low, low));
}
template <typename S>
inline void narrow_store(S* p, V a, Mask<float> m) {
  const int n = active_lanes(m);
  if (n == 8) return narrow_store(p, a);
  S lanes[8];
  narrow_store(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

#endif

#if !defined(__AVX512F__)
template <typename S>
constexpr bool kByHalves = false;
#endif

// A vector of words from neighbouring elements; with a mask some first lanes of one, the others
// zero. The baseline has them for words alone. Spare: the kernel has a register for a constant.
template <typename T, bool kSpare = true, typename S>
inline Vec<T> widen_load(const S* p) {
  if constexpr (std::is_same_v<S, T>) {
    return load(p);
  } else {
    return widen_vector<kSpare>(p);
  }
}
template <typename T, bool kSpare = true, typename S>
inline Vec<T> widen_load(const S* p, Mask<T> m) {
  if constexpr (std::is_same_v<S, T>) {
    return load(p, m);
  } else {
    return widen_vector<kSpare>(p, m);
  }
}

// Results, words or made elements: whole vectors, or the first lanes.
template <bool kWhole, typename S, typename T>
JAXWIN_INLINE void result_store(S* p, Vec<T> a, Mask<T> m) {
  if constexpr (std::is_same_v<S, T>) {
    kWhole ? store(p, a) : store(p, a, m);
  } else {
    kWhole ? narrow_store(p, a) : narrow_store(p, a, m);
  }
}

// f(y), y as the address of results that are stored so. Kernels that read elements store words or
// elements of that type, or of integers int32 (stores_result); those that read words do so in every
// way where `any`, as words may be what a strip was made of. The usual way last, as the likely one.
template <typename T, typename S, bool kAny, typename F>
JAXWIN_INLINE void with_results([[maybe_unused]] int64_t store, void* y, const F& f) {
#if defined(__AVX2__)
  if constexpr (kAny && std::is_same_v<T, float>) {
    constexpr bool kWords = std::is_same_v<S, T>;
    if (!kWords && store == kStoreWords) return f(static_cast<T*>(y));
    if constexpr (kWords || std::is_same_v<S, BFloat16>) {
#if defined(JAXWIN_BF16_BY_CPU)
      if (store == kStoreBF16) return f(static_cast<BFloat16*>(y));
      if (!kWords || store == kStoreBF16ByCpu) return f(static_cast<BFloat16ByCpu*>(y));
#else
      if (!kWords || store == kStoreBF16) return f(static_cast<BFloat16*>(y));
#endif
    }
    if constexpr (kWords || std::is_same_v<S, Float16>) {
      if (!kWords || store == kStoreF16) return f(static_cast<Float16*>(y));
    }
    if constexpr (kWords || std::is_integral_v<S>) {
      if (!kWords || store == kStoreS32) return f(static_cast<int32_t*>(y));
    }
  }
#endif
  f(static_cast<T*>(y));
}

}  // namespace
}  // namespace jaxwin::JAXWIN_TARGET
