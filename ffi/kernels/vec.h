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

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

// Every loop over an accumulator array must be unrolled before scalar replacement, or GCC keeps
// the array in memory (a factor of three in speed).
#define JAXWIN_UNROLL _Pragma("GCC unroll 16")

namespace jaxwin::JAXWIN_TARGET {
namespace {

#if defined(__AVX512F__)

inline constexpr int kWidth = 16;
inline constexpr int kRegisters = 32;
struct V {
  __m512 v;
};
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

#else  // baseline x86-64: no FMA unit

inline constexpr int kWidth = 4;
inline constexpr int kRegisters = 16;
struct V {
  float v[4];
};
struct Mask {
  int64_t n;
};

// fma(a, b, c) in float through doubles: the product of two floats is exact in double; the sum is
// rounded to odd, after which the conversion to float rounds once and right (Boldo and Melquiond,
// "Emulation of FMA and correctly rounded sums", 2008, section 3).
inline float fma1(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double addend = static_cast<double>(c);
  double sum = product + addend;
  const double back = sum - product;
  const double error = (product - (sum - back)) + (addend - back);
  int64_t bits;
  std::memcpy(&bits, &sum, sizeof(bits));
  const bool finite = (bits & 0x7FF0000000000000) != 0x7FF0000000000000;
  if (finite && error != 0.0 && (bits & 1) == 0) {
    bits += ((error > 0.0) == (sum > 0.0)) ? 1 : -1;
    std::memcpy(&sum, &bits, sizeof(bits));
  }
  return static_cast<float>(sum);
}

#define JAXWIN_LANES(expression)                     \
  V r;                                               \
  for (int i = 0; i < 4; ++i) r.v[i] = (expression); \
  return r
inline Mask make_mask(int64_t n) { return {n}; }
inline V set1(float x) { JAXWIN_LANES(x); }
inline V zero() { return set1(0.0F); }
inline V load(const float* p) { JAXWIN_LANES(p[i]); }
inline V load(const float* p, Mask m) { JAXWIN_LANES(i < m.n ? p[i] : 0.0F); }
inline void store(float* p, V a) {
  for (int i = 0; i < 4; ++i) p[i] = a.v[i];
}
inline void store(float* p, V a, Mask m) {
  for (int i = 0; i < 4 && i < m.n; ++i) p[i] = a.v[i];
}
inline V fma(V a, V b, V c) { JAXWIN_LANES(fma1(a.v[i], b.v[i], c.v[i])); }
inline V add(V a, V b) { JAXWIN_LANES(a.v[i] + b.v[i]); }
inline V sub(V a, V b) { JAXWIN_LANES(a.v[i] - b.v[i]); }
inline V mul(V a, V b) { JAXWIN_LANES(a.v[i] * b.v[i]); }
inline V div(V a, V b) { JAXWIN_LANES(a.v[i] / b.v[i]); }
inline V max(V a, V b) { JAXWIN_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline V min(V a, V b) { JAXWIN_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline V select_less(V a, V b, V yes, V no) { JAXWIN_LANES(a.v[i] < b.v[i] ? yes.v[i] : no.v[i]); }
inline V power_of_two(V a, V b, bool low_half) {
  V r;
  for (int i = 0; i < 4; ++i) {
    int32_t x, y;
    std::memcpy(&x, &a.v[i], 4);
    std::memcpy(&y, &b.v[i], 4);
    const int32_t n = static_cast<int32_t>(static_cast<uint32_t>(x) - static_cast<uint32_t>(y));
    const int32_t half = n >> 1;
    const int32_t e = low_half ? half : n - half;
    const uint32_t out = static_cast<uint32_t>(e + 127) << 23;
    std::memcpy(&r.v[i], &out, 4);
  }
  return r;
}
inline V permute(V a, const int32_t* index) { JAXWIN_LANES(a.v[index[i] & 3]); }
#undef JAXWIN_LANES

#endif

}  // namespace
}  // namespace jaxwin::JAXWIN_TARGET
