// SPDX-License-Identifier: Apache-2.0
//
// The whole SIMD abstraction: vectors Vec<T> of kWidth<T> floats or doubles and the few operations
// that the kernels need, for the instruction set this translation unit is compiled for
// (JAXWIN_TARGET is `baseline`, `avx2` or `avx512`).
//
// Contract: every operation gives the same bits per lane on every target. fma() rounds once; where
// the hardware has none (baseline) it is emulated exactly. Everything lives in an unnamed
// namespace inside the target's own, so that no inline function compiled for a newer instruction
// set can be picked by the linker for a caller on an older one.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

// Every loop over an accumulator array must be unrolled before scalar replacement, or GCC keeps
// the array in memory (a factor of three in speed).
#define JAXWIN_UNROLL _Pragma("GCC unroll 16")
// The same for a function that is handed such an array.
#define JAXWIN_INLINE __attribute__((always_inline)) inline

namespace jaxwin::JAXWIN_TARGET {
namespace {

// Keeps a value in a register: in tiles of few rows GCC otherwise folds the load of B into every
// multiplication, and vectors that touch two cache lines are paid for each time.
#define JAXWIN_KEEP(constraint)     \
  template <typename T>             \
  inline void keep(Vec<T>* a) {     \
    asm("" : "+" constraint(a->v)); \
  }

// Two channels' int16: the word of the integer kernels, and their int32 sums.
struct Pair {
  int32_t bits;
};

template <typename T>
struct Vec;
template <typename T>
struct Mask;
// Lanes [0, n) are active; n may be outside [0, kWidth].
template <typename T>
Mask<T> make_mask(int64_t n);
template <typename T = float>
Vec<T> zero();

#if defined(__AVX512F__)

inline constexpr int kVectorBytes = 64;
inline constexpr int kRegisters = 32;
template <>
struct Vec<float> {
  __m512 v;
};
template <>
struct Vec<double> {
  __m512d v;
};
template <>
struct Vec<Pair> {
  __m512i v;
};
using V = Vec<float>;
using D = Vec<double>;
JAXWIN_KEEP("v")
template <>
struct Mask<float> {
  __mmask16 m;
};
template <>
struct Mask<Pair> {
  __mmask16 m;
};
template <>
struct Mask<double> {
  __mmask8 m;
};
template <>
inline Mask<float> make_mask<float>(int64_t n) {
  return {static_cast<__mmask16>(n >= 16 ? 0xFFFFu : n <= 0 ? 0u : (1u << n) - 1u)};
}
template <>
inline Mask<double> make_mask<double>(int64_t n) {
  return {static_cast<__mmask8>(n >= 8 ? 0xFFu : n <= 0 ? 0u : (1u << n) - 1u)};
}
template <>
inline V zero<float>() {
  return {_mm512_setzero_ps()};
}
template <>
inline D zero<double>() {
  return {_mm512_setzero_pd()};
}
template <>
inline Mask<Pair> make_mask<Pair>(int64_t n) {
  return {make_mask<float>(n).m};
}
template <>
inline Vec<Pair> zero<Pair>() {
  return {_mm512_setzero_si512()};
}
inline Vec<Pair> set1(Pair x) { return {_mm512_set1_epi32(x.bits)}; }
inline Vec<Pair> load(const Pair* p) { return {_mm512_loadu_si512(p)}; }
inline Vec<Pair> load(const Pair* p, Mask<Pair> m) { return {_mm512_maskz_loadu_epi32(m.m, p)}; }
inline void store(Pair* p, Vec<Pair> a) { _mm512_storeu_si512(p, a.v); }
inline void store(Pair* p, Vec<Pair> a, Mask<Pair> m) { _mm512_mask_storeu_epi32(p, m.m, a.v); }
inline Vec<Pair> add(Vec<Pair> a, Vec<Pair> b) { return {_mm512_add_epi32(a.v, b.v)}; }
// Modulo 2^32, like a sum of integers in any order.
inline Vec<Pair> fma(Vec<Pair> a, Vec<Pair> b, Vec<Pair> c) {
#if defined(__AVX512VNNI__)
  return {_mm512_dpwssd_epi32(c.v, a.v, b.v)};
#else
  return {_mm512_add_epi32(c.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}
inline V set1(float x) { return {_mm512_set1_ps(x)}; }
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V load(const float* p, Mask<float> m) { return {_mm512_maskz_loadu_ps(m.m, p)}; }
inline void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
inline void stream(float* p, V a) { _mm512_stream_ps(p, a.v); }  // p on a whole vector
inline void stream(double* p, D a) { _mm512_stream_pd(p, a.v); }
inline void stream(Pair* p, Vec<Pair> a) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), a.v);
}
inline void store(float* p, V a, Mask<float> m) { _mm512_mask_storeu_ps(p, m.m, a.v); }
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
// 2^n, for an integer n in the low bits of a float: see exp() in elementwise.h.
inline V power_of_two(V a) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(a.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_castps_si512(_mm512_set1_ps(1.0F))))};
}
// lane i of the result is lane index[i] of a.
inline V permute(V a, const int32_t* index) {
  return {_mm512_permutexvar_ps(_mm512_loadu_si512(index), a.v)};
}
// The same where lanes kWidth, kWidth + 1, ... are those of b. (The baseline has none.)
inline V merge(V a, V b, const int32_t* index) {
  return {_mm512_permutex2var_ps(a.v, _mm512_loadu_si512(index), b.v)};
}
// Four floats in every quarter of a vector, and the one of number I in every lane.
inline V quad(const float* p) { return {_mm512_broadcast_f32x4(_mm_loadu_ps(p))}; }
template <int I>
inline V of_quad(V a) {
  return {_mm512_permute_ps(a.v, I * 0x55)};
}
// The G floats at p, again and again; a double is loaded in one step, two floats are not by GCC.
template <int G>
inline V repeat(const float* p) {
  static_assert(G == 1 || G == 2 || G == 4 || G == 8);
  if constexpr (G == 1) return set1(*p);
  if constexpr (G == 2) {
    double two;
    std::memcpy(&two, p, sizeof(two));
    return {_mm512_castpd_ps(_mm512_set1_pd(two))};
  }
  if constexpr (G == 4) return quad(p);
  if constexpr (G == 8) return {_mm512_broadcast_f32x8(_mm256_loadu_ps(p))};
}
inline D set1(double x) { return {_mm512_set1_pd(x)}; }
inline D load(const double* p) { return {_mm512_loadu_pd(p)}; }
inline D load(const double* p, Mask<double> m) { return {_mm512_maskz_loadu_pd(m.m, p)}; }
inline void store(double* p, D a) { _mm512_storeu_pd(p, a.v); }
inline void store(double* p, D a, Mask<double> m) { _mm512_mask_storeu_pd(p, m.m, a.v); }
inline D fma(D a, D b, D c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline D add(D a, D b) { return {_mm512_add_pd(a.v, b.v)}; }
inline D mul(D a, D b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline D max(D a, D b) { return {_mm512_max_pd(a.v, b.v)}; }
inline D min(D a, D b) { return {_mm512_min_pd(a.v, b.v)}; }
inline D permute(D a, const int32_t* index) {
  const __m256i i = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
  return {_mm512_permutexvar_pd(_mm512_cvtepi32_epi64(i), a.v)};
}
inline D merge(D a, D b, const int32_t* index) {
  const __m256i i = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
  return {_mm512_permutex2var_pd(a.v, _mm512_cvtepi32_epi64(i), b.v)};
}

#elif defined(__AVX2__)

inline constexpr int kVectorBytes = 32;
inline constexpr int kRegisters = 16;
template <>
struct Vec<float> {
  __m256 v;
};
template <>
struct Vec<double> {
  __m256d v;
};
template <>
struct Vec<Pair> {
  __m256i v;
};
using V = Vec<float>;
using D = Vec<double>;
JAXWIN_KEEP("x")
template <typename T>
struct Mask {
  __m256i m;
};
alignas(32) constexpr int32_t kMaskBits[16] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                               0,  0,  0,  0,  0,  0,  0,  0};
template <>
inline Mask<float> make_mask<float>(int64_t n) {
  const int64_t k = n < 0 ? 0 : n > 8 ? 8 : n;
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMaskBits + 8 - k))};
}
template <>
inline Mask<double> make_mask<double>(int64_t n) {
  const int64_t k = n < 0 ? 0 : n > 4 ? 4 : n;
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMaskBits + 8 - 2 * k))};
}
template <>
inline V zero<float>() {
  return {_mm256_setzero_ps()};
}
template <>
inline D zero<double>() {
  return {_mm256_setzero_pd()};
}
template <>
inline Mask<Pair> make_mask<Pair>(int64_t n) {
  return {make_mask<float>(n).m};
}
template <>
inline Vec<Pair> zero<Pair>() {
  return {_mm256_setzero_si256()};
}
inline Vec<Pair> set1(Pair x) { return {_mm256_set1_epi32(x.bits)}; }
inline Vec<Pair> load(const Pair* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline Vec<Pair> load(const Pair* p, Mask<Pair> m) {
  return {_mm256_maskload_epi32(&p->bits, m.m)};
}
inline void store(Pair* p, Vec<Pair> a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
inline void store(Pair* p, Vec<Pair> a, Mask<Pair> m) {
  _mm256_maskstore_epi32(&p->bits, m.m, a.v);
}
inline Vec<Pair> add(Vec<Pair> a, Vec<Pair> b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Vec<Pair> fma(Vec<Pair> a, Vec<Pair> b, Vec<Pair> c) {
  return {_mm256_add_epi32(c.v, _mm256_madd_epi16(a.v, b.v))};
}
inline V set1(float x) { return {_mm256_set1_ps(x)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline V load(const float* p, Mask<float> m) { return {_mm256_maskload_ps(p, m.m)}; }
inline void store(float* p, V a) { _mm256_storeu_ps(p, a.v); }
inline void stream(float* p, V a) { _mm256_stream_ps(p, a.v); }
inline void stream(double* p, D a) { _mm256_stream_pd(p, a.v); }
inline void stream(Pair* p, Vec<Pair> a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), a.v);
}
inline void store(float* p, V a, Mask<float> m) { _mm256_maskstore_ps(p, m.m, a.v); }
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
inline V power_of_two(V a) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(a.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_castps_si256(_mm256_set1_ps(1.0F))))};
}
inline V permute(V a, const int32_t* index) {
  return {
      _mm256_permutevar8x32_ps(a.v, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)))};
}
inline V merge(V a, V b, const int32_t* index) {
  const __m256i i = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
  return {_mm256_blendv_ps(permute(a, index).v, permute(b, index).v,
                           _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)))};
}
inline V quad(const float* p) { return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))}; }
template <int I>
inline V of_quad(V a) {
  return {_mm256_permute_ps(a.v, I * 0x55)};
}
template <int G>
inline V repeat(const float* p) {
  static_assert(G == 1 || G == 2 || G == 4);
  if constexpr (G == 1) return set1(*p);
  if constexpr (G == 2) {
    double two;
    std::memcpy(&two, p, sizeof(two));
    return {_mm256_castpd_ps(_mm256_set1_pd(two))};
  }
  if constexpr (G == 4) return quad(p);
}
inline D set1(double x) { return {_mm256_set1_pd(x)}; }
inline D load(const double* p) { return {_mm256_loadu_pd(p)}; }
inline D load(const double* p, Mask<double> m) { return {_mm256_maskload_pd(p, m.m)}; }
inline void store(double* p, D a) { _mm256_storeu_pd(p, a.v); }
inline void store(double* p, D a, Mask<double> m) { _mm256_maskstore_pd(p, m.m, a.v); }
inline D fma(D a, D b, D c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline D add(D a, D b) { return {_mm256_add_pd(a.v, b.v)}; }
inline D mul(D a, D b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline D max(D a, D b) { return {_mm256_max_pd(a.v, b.v)}; }
inline D min(D a, D b) { return {_mm256_min_pd(a.v, b.v)}; }
inline D permute(D a, const int32_t* index) {
  // Lane i is the pair of 32-bit lanes 2 * index[i], 2 * index[i] + 1.
  const __m256i i = _mm256_slli_epi64(
      _mm256_cvtepi32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index))), 1);
  const __m256i odd = _mm256_slli_epi64(_mm256_add_epi64(i, _mm256_set1_epi64x(1)), 32);
  return {
      _mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(a.v), _mm256_or_si256(i, odd)))};
}
inline D merge(D a, D b, const int32_t* index) {
  const __m256i i = _mm256_cvtepi32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
  return {_mm256_blendv_pd(permute(a, index).v, permute(b, index).v,
                           _mm256_castsi256_pd(_mm256_slli_epi64(i, 61)))};
}

#else  // baseline x86-64: SSE2, no FMA unit

inline constexpr int kVectorBytes = 16;
inline constexpr int kRegisters = 16;
template <>
struct Vec<float> {
  __m128 v;
};
template <>
struct Vec<double> {
  __m128d v;
};
template <>
struct Vec<Pair> {
  __m128i v;
};
using V = Vec<float>;
using D = Vec<double>;
JAXWIN_KEEP("x")
template <typename T>
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

template <typename T>
inline Mask<T> make_mask(int64_t n) {
  return {n};
}
template <>
inline V zero<float>() {
  return {_mm_setzero_ps()};
}
template <>
inline D zero<double>() {
  return {_mm_setzero_pd()};
}
template <>
inline Vec<Pair> zero<Pair>() {
  return {_mm_setzero_si128()};
}
inline Vec<Pair> set1(Pair x) { return {_mm_set1_epi32(x.bits)}; }
inline Vec<Pair> load(const Pair* p) {
  return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))};
}
inline Vec<Pair> load(const Pair* p, Mask<Pair> m) {
  Pair lanes[4] = {};
  for (int i = 0; i < 4 && i < m.n; ++i) lanes[i] = p[i];
  return load(lanes);
}
inline void store(Pair* p, Vec<Pair> a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a.v); }
inline void store(Pair* p, Vec<Pair> a, Mask<Pair> m) {
  Pair lanes[4];
  store(lanes, a);
  for (int i = 0; i < 4 && i < m.n; ++i) p[i] = lanes[i];
}
inline Vec<Pair> add(Vec<Pair> a, Vec<Pair> b) { return {_mm_add_epi32(a.v, b.v)}; }
inline Vec<Pair> fma(Vec<Pair> a, Vec<Pair> b, Vec<Pair> c) {
  return {_mm_add_epi32(c.v, _mm_madd_epi16(a.v, b.v))};
}
inline V set1(float x) { return {_mm_set1_ps(x)}; }
inline V load(const float* p) { return {_mm_loadu_ps(p)}; }
inline V load(const float* p, Mask<float> m) {
  float lanes[4] = {0.0F, 0.0F, 0.0F, 0.0F};
  for (int i = 0; i < 4 && i < m.n; ++i) lanes[i] = p[i];
  return load(lanes);
}
inline void store(float* p, V a) { _mm_storeu_ps(p, a.v); }
inline void stream(float* p, V a) { _mm_stream_ps(p, a.v); }
inline void stream(double* p, D a) { _mm_stream_pd(p, a.v); }
inline void stream(Pair* p, Vec<Pair> a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), a.v); }
inline void store(float* p, V a, Mask<float> m) {
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
inline V power_of_two(V a) {
  const __m128i n = _mm_slli_epi32(_mm_castps_si128(a.v), 23);
  return {_mm_castsi128_ps(_mm_add_epi32(n, _mm_castps_si128(_mm_set1_ps(1.0F))))};
}
inline V permute(V a, const int32_t* index) {
  float lanes[4];
  store(lanes, a);
  return {_mm_setr_ps(lanes[index[0] & 3], lanes[index[1] & 3], lanes[index[2] & 3],
                      lanes[index[3] & 3])};
}
inline V quad(const float* p) { return load(p); }
template <int I>
inline V of_quad(V a) {
  return {_mm_shuffle_ps(a.v, a.v, I * 0x55)};
}
inline D set1(double x) { return {_mm_set1_pd(x)}; }
inline D load(const double* p) { return {_mm_loadu_pd(p)}; }
inline D load(const double* p, Mask<double> m) {
  return {_mm_setr_pd(m.n > 0 ? p[0] : 0.0, m.n > 1 ? p[1] : 0.0)};
}
inline void store(double* p, D a) { _mm_storeu_pd(p, a.v); }
inline void store(double* p, D a, Mask<double> m) {
  if (m.n > 0) _mm_storel_pd(p, a.v);
  if (m.n > 1) _mm_storeh_pd(p + 1, a.v);
}
// No wider type helps here: libm's, which uses the CPU's own where it has one.
inline D fma(D a, D b, D c) {
  double x[2], y[2], z[2];
  store(x, a);
  store(y, b);
  store(z, c);
  return {_mm_setr_pd(std::fma(x[0], y[0], z[0]), std::fma(x[1], y[1], z[1]))};
}
inline D add(D a, D b) { return {_mm_add_pd(a.v, b.v)}; }
inline D mul(D a, D b) { return {_mm_mul_pd(a.v, b.v)}; }
inline D max(D a, D b) { return {_mm_max_pd(a.v, b.v)}; }
inline D min(D a, D b) { return {_mm_min_pd(a.v, b.v)}; }
inline D permute(D a, const int32_t* index) {
  double lanes[2];
  store(lanes, a);
  return {_mm_setr_pd(lanes[index[0] & 1], lanes[index[1] & 1])};
}

#endif
#undef JAXWIN_KEEP

template <typename T>
inline constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
// Registers that permute() takes for its indices: AVX2 has to make those of doubles.
template <typename T>
inline constexpr int kIndexRegisters = kVectorBytes == 32 && sizeof(T) == 8 ? 2 : 1;

}  // namespace
}  // namespace jaxwin::JAXWIN_TARGET
