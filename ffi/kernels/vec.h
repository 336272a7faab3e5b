// SPDX-License-Identifier: Apache-2.0
//
// The whole SIMD abstraction: one vector type V of kWidth floats and the few operations that the
// kernels need, for the instruction set this translation unit is compiled for (JAXWIN_TARGET is
// `baseline`, `avx2` or `avx512`).
//
// Contract: every operation gives the same bits per lane on every target. fma() rounds once; where
// the hardware has none (baseline) it is emulated exactly. Everything lives in an unnamed
// namespace inside the target's own, so that no inline function compiled for a newer instruction
// set can be picked by the linker for a caller on an older one.
#pragma once

#include <immintrin.h>

#include <cstdint>

// Every loop over an accumulator array must be unrolled before scalar replacement, or GCC keeps
// the array in memory (a factor of three in speed).
#define JAXWIN_UNROLL _Pragma("GCC unroll 16")
// The same for a function that is handed such an array.
#define JAXWIN_INLINE __attribute__((always_inline)) inline

namespace jaxwin::JAXWIN_TARGET {
namespace {

// Keeps a value in a register: in tiles of few rows GCC otherwise folds the load of B into every
// multiplication, and vectors that touch two cache lines are paid for each time.
#define JAXWIN_KEEP(constraint) \
  inline void keep(V* a) { asm("" : "+" constraint(a->v)); }

#if defined(__AVX512F__)

inline constexpr int kWidth = 16;
inline constexpr int kRegisters = 32;
struct V {
  __m512 v;
};
JAXWIN_KEEP("v")
struct Mask {
  __mmask16 m;
};
// Lanes [0, n) are active; n may be outside [0, kWidth].
inline Mask make_mask(int64_t n) {
  return {static_cast<__mmask16>(n >= 16 ? 0xFFFFu : n <= 0 ? 0u : (1u << n) - 1u)};
}
inline V zero() { return {_mm512_setzero_ps()}; }
inline V set1(float x) { return {_mm512_set1_ps(x)}; }
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V load(const float* p, Mask m) { return {_mm512_maskz_loadu_ps(m.m, p)}; }
inline void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
inline void stream(float* p, V a) { _mm512_stream_ps(p, a.v); }  // p on a whole vector
inline void store(float* p, V a, Mask m) { _mm512_mask_storeu_ps(p, m.m, a.v); }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
// x86 semantics: the second operand where either is NaN.
inline V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
inline V select_less(V a, V b, V yes, V no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
// 2^(bits(a) - bits(b) as integers, halved down / the rest): see exp() in elementwise.cc.
inline V power_of_two(V a, V b, bool low_half) {
  const __m512i n = _mm512_sub_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v));
  const __m512i half = _mm512_srai_epi32(n, 1);
  const __m512i e = low_half ? half : _mm512_sub_epi32(n, half);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(e, _mm512_set1_epi32(127)), 23))};
}
// lane i of the result is lane index[i] of a.
inline V permute(V a, const int32_t* index) {
  return {_mm512_permutexvar_ps(_mm512_loadu_si512(index), a.v)};
}

#elif defined(__AVX2__)

inline constexpr int kWidth = 8;
inline constexpr int kRegisters = 16;
struct V {
  __m256 v;
};
JAXWIN_KEEP("x")
struct Mask {
  __m256i m;
};
alignas(32) constexpr int32_t kMaskBits[16] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                               0,  0,  0,  0,  0,  0,  0,  0};
inline Mask make_mask(int64_t n) {
  const int64_t k = n < 0 ? 0 : n > 8 ? 8 : n;
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMaskBits + 8 - k))};
}
inline V zero() { return {_mm256_setzero_ps()}; }
inline V set1(float x) { return {_mm256_set1_ps(x)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline V load(const float* p, Mask m) { return {_mm256_maskload_ps(p, m.m)}; }
inline void store(float* p, V a) { _mm256_storeu_ps(p, a.v); }
inline void stream(float* p, V a) { _mm256_stream_ps(p, a.v); }
inline void store(float* p, V a, Mask m) { _mm256_maskstore_ps(p, m.m, a.v); }
inline V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline V add(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
inline V sub(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline V mul(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline V div(V a, V b) { return {_mm256_div_ps(a.v, b.v)}; }
inline V max(V a, V b) { return {_mm256_max_ps(a.v, b.v)}; }
inline V min(V a, V b) { return {_mm256_min_ps(a.v, b.v)}; }
inline V select_less(V a, V b, V yes, V no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline V power_of_two(V a, V b, bool low_half) {
  const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v));
  const __m256i half = _mm256_srai_epi32(n, 1);
  const __m256i e = low_half ? half : _mm256_sub_epi32(n, half);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23))};
}
inline V permute(V a, const int32_t* index) {
  return {
      _mm256_permutevar8x32_ps(a.v, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)))};
}

#else  // baseline x86-64: SSE2, no FMA unit

inline constexpr int kWidth = 4;
inline constexpr int kRegisters = 16;
struct V {
  __m128 v;
};
JAXWIN_KEEP("x")
struct Mask {
  int64_t n;
};

// a * b + c for two lanes, rounded to odd in double: the product of two floats is exact there, and
// a sum rounded to odd converts to float with one correct rounding (Boldo and Melquiond,
// "Emulation of FMA and correctly rounded sums", 2008, section 3). Rounding to odd: truncate
// towards zero, and set the last bit where something was lost.
inline __m128d fma_round_to_odd(__m128d a, __m128d b, __m128d c) {
  const __m128d product = _mm_mul_pd(a, b);
  const __m128d sum = _mm_add_pd(product, c);
  const __m128d back = _mm_sub_pd(sum, product);
  const __m128d error = _mm_add_pd(_mm_sub_pd(product, _mm_sub_pd(sum, back)), _mm_sub_pd(c, back));
  // Ordered comparisons: false where the error is NaN, as it is for infinite sums.
  const __m128d zero = _mm_setzero_pd();
  const __m128d inexact = _mm_or_pd(_mm_cmplt_pd(error, zero), _mm_cmpgt_pd(error, zero));
  const __m128i last = _mm_and_si128(_mm_castpd_si128(inexact), _mm_set_epi32(0, 1, 0, 1));
  const __m128i opposite =
      _mm_and_si128(_mm_srli_epi64(_mm_castpd_si128(_mm_xor_pd(error, sum)), 63), last);
  const __m128i odd = _mm_or_si128(_mm_sub_epi64(_mm_castpd_si128(sum), opposite), last);
  return _mm_castsi128_pd(odd);
}

inline Mask make_mask(int64_t n) { return {n}; }
inline V zero() { return {_mm_setzero_ps()}; }
inline V set1(float x) { return {_mm_set1_ps(x)}; }
inline V load(const float* p) { return {_mm_loadu_ps(p)}; }
inline V load(const float* p, Mask m) {
  float lanes[4] = {0.0F, 0.0F, 0.0F, 0.0F};
  for (int i = 0; i < 4 && i < m.n; ++i) lanes[i] = p[i];
  return load(lanes);
}
inline void store(float* p, V a) { _mm_storeu_ps(p, a.v); }
inline void stream(float* p, V a) { _mm_stream_ps(p, a.v); }
inline void store(float* p, V a, Mask m) {
  float lanes[4];
  store(lanes, a);
  for (int i = 0; i < 4 && i < m.n; ++i) p[i] = lanes[i];
}
inline V fma(V a, V b, V c) {
  const __m128d low = fma_round_to_odd(_mm_cvtps_pd(a.v), _mm_cvtps_pd(b.v), _mm_cvtps_pd(c.v));
  const __m128d high =
      fma_round_to_odd(_mm_cvtps_pd(_mm_movehl_ps(a.v, a.v)), _mm_cvtps_pd(_mm_movehl_ps(b.v, b.v)),
                       _mm_cvtps_pd(_mm_movehl_ps(c.v, c.v)));
  return {_mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high))};
}
inline V add(V a, V b) { return {_mm_add_ps(a.v, b.v)}; }
inline V sub(V a, V b) { return {_mm_sub_ps(a.v, b.v)}; }
inline V mul(V a, V b) { return {_mm_mul_ps(a.v, b.v)}; }
inline V div(V a, V b) { return {_mm_div_ps(a.v, b.v)}; }
inline V max(V a, V b) { return {_mm_max_ps(a.v, b.v)}; }
inline V min(V a, V b) { return {_mm_min_ps(a.v, b.v)}; }
inline V select_less(V a, V b, V yes, V no) {
  const __m128 less = _mm_cmplt_ps(a.v, b.v);
  return {_mm_or_ps(_mm_and_ps(less, yes.v), _mm_andnot_ps(less, no.v))};
}
inline V power_of_two(V a, V b, bool low_half) {
  const __m128i n = _mm_sub_epi32(_mm_castps_si128(a.v), _mm_castps_si128(b.v));
  const __m128i half = _mm_srai_epi32(n, 1);
  const __m128i e = low_half ? half : _mm_sub_epi32(n, half);
  return {_mm_castsi128_ps(_mm_slli_epi32(_mm_add_epi32(e, _mm_set1_epi32(127)), 23))};
}
inline V permute(V a, const int32_t* index) {
  float lanes[4];
  store(lanes, a);
  return {_mm_setr_ps(lanes[index[0] & 3], lanes[index[1] & 3], lanes[index[2] & 3],
                      lanes[index[3] & 3])};
}

#endif
#undef JAXWIN_KEEP

}  // namespace
}  // namespace jaxwin::JAXWIN_TARGET
