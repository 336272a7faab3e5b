// SPDX-License-Identifier: Apache-2.0
//
// Transforms of tiles, channels as lanes; compiled once per instruction set.
//
// Winograd's F(2x2, 3x3) and F(4x4, 3x3): Lavin and Gray, arXiv 1509.09308, section 4.
//
// SFC-6(6x6, 3x3), "symbolic Fourier convolution": He et al., arXiv 2407.02913. Six outputs
// y[n] = x[n] h[0] + x[n+1] h[1] + x[n+2] h[2] of eight inputs are a cyclic correlation of length
// six over x[6], x[1], ..., x[5], and two corrections: (x[0] - x[6]) h[0] is missing in y[0],
// (x[7] - x[1]) h[2] in y[5]. The roots of unity of order six are a + b s with a, b in {-1, 0, 1},
// s = exp(i pi / 3), s * s = s - 1, so that the Fourier transforms are additions. In two
// dimensions: 4 real products and 16 of complex numbers (the others are conjugates) with three
// multiplications each, 2 * 16 of one dimension's corrections with the other's frequencies, and 4
// corrections of both: 88. The frequencies are sums of x[n] s^(k n) and h[v] s^(-k v).

#include "kernels/transforms.h"

#include "kernels/kernels.h"
#include "kernels/vec.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

// A vector with the arithmetic of a stage: of pairs, operands are int16 and sums int32. Both wrap
// around.
template <typename T, bool kSum>
struct Lanes {
  using Word = T;
  static constexpr bool kIsSum = kSum;
  Vec<T> v;
};

template <bool kSum>
JAXWIN_INLINE Lanes<float, kSum> operator+(Lanes<float, kSum> a, Lanes<float, kSum> b) {
  return {add(a.v, b.v)};
}
template <bool kSum>
JAXWIN_INLINE Lanes<float, kSum> operator-(Lanes<float, kSum> a, Lanes<float, kSum> b) {
  return {sub(a.v, b.v)};
}
// c * a + b, rounded once.
template <bool kSum>
JAXWIN_INLINE Lanes<float, kSum> fma(float c, Lanes<float, kSum> a, Lanes<float, kSum> b) {
  return {fma(set1(c), a.v, b.v)};
}
JAXWIN_INLINE Lanes<float, false> over(Lanes<float, false> a, float by) {
  return {div(a.v, set1(by))};
}
JAXWIN_INLINE Lanes<float, false> times(Lanes<float, false> a, float by) {
  return {mul(a.v, set1(by))};
}

#if defined(__AVX512F__)
#define JAXWIN_INT(name) _mm512_##name
#elif defined(__AVX2__)
#define JAXWIN_INT(name) _mm256_##name
#else
#define JAXWIN_INT(name) _mm_##name
#endif
JAXWIN_INLINE Lanes<Pair, false> operator+(Lanes<Pair, false> a, Lanes<Pair, false> b) {
  return {{JAXWIN_INT(add_epi16)(a.v.v, b.v.v)}};
}
JAXWIN_INLINE Lanes<Pair, false> operator-(Lanes<Pair, false> a, Lanes<Pair, false> b) {
  return {{JAXWIN_INT(sub_epi16)(a.v.v, b.v.v)}};
}
JAXWIN_INLINE Lanes<Pair, true> operator+(Lanes<Pair, true> a, Lanes<Pair, true> b) {
  return {{JAXWIN_INT(add_epi32)(a.v.v, b.v.v)}};
}
JAXWIN_INLINE Lanes<Pair, true> operator-(Lanes<Pair, true> a, Lanes<Pair, true> b) {
  return {{JAXWIN_INT(sub_epi32)(a.v.v, b.v.v)}};
}
JAXWIN_INLINE Lanes<Pair, false> times(Lanes<Pair, false> a, float by) {
  return {{JAXWIN_INT(mullo_epi16)(a.v.v, JAXWIN_INT(set1_epi16)(static_cast<int16_t>(by)))}};
}
JAXWIN_INLINE Lanes<Pair, false> over(Lanes<Pair, false> a, float) { return a; }  // see over_36
// Of multiples of 36, exactly: a quarter, times the inverse of 9 modulo 2^32.
JAXWIN_INLINE Lanes<Pair, true> over_36(Lanes<Pair, true> a) {
  const auto quarter = JAXWIN_INT(srai_epi32)(a.v.v, 2);
  const auto inverse = JAXWIN_INT(set1_epi32)(0x38E38E39);
#if defined(__AVX2__)
  return {{JAXWIN_INT(mullo_epi32)(quarter, inverse)}};
#else
  const __m128i even = _mm_mul_epu32(quarter, inverse);
  const __m128i odd = _mm_mul_epu32(_mm_srli_si128(quarter, 4), inverse);
  return {{_mm_unpacklo_epi32(_mm_shuffle_epi32(even, 0x08), _mm_shuffle_epi32(odd, 0x08))}};
#endif
}
#undef JAXWIN_INT
JAXWIN_INLINE Lanes<float, true> over_36(Lanes<float, true> a) { return a; }  // see over

// Where vectors come from and go to; kTail: only the lanes of the mask.
template <typename X, bool kTail>
struct Place {
  using T = typename X::Word;
  const T* src;
  T* dst;
  int64_t src_row, src_col, dst_row, dst_col;
  Mask<T> mask;

  X get(int64_t i, int64_t j = 0) const {
    const T* at = src + i * src_row + j * src_col;
    return {kTail ? load(at, mask) : load(at)};
  }
  void put(X x, int64_t i, int64_t j = 0) const {
    T* at = dst + i * dst_row + j * dst_col;
    if (kTail) {
      store(at, x.v, mask);
    } else {
      store(at, x.v);
    }
  }
};

template <typename X, template <typename, bool> typename Transform>
void over_channels(const TransformArgs* a) {
  using T = typename X::Word;
  constexpr int W = kWidth<T>;
  const T* src = static_cast<const T*>(a->src);
  T* dst = static_cast<T*>(a->dst);
  int64_t c = 0;
  for (; c + W <= a->cols; c += W) {
    Transform<X, false>::run(
        {src + c, dst + c, a->src_row, a->src_col, a->dst_row, a->dst_col, make_mask<T>(W)});
  }
  if (c < a->cols) {
    const Mask<T> mask = make_mask<T>(a->cols - c);
    Transform<X, true>::run(
        {src + c, dst + c, a->src_row, a->src_col, a->dst_row, a->dst_col, mask});
  }
}

// --- Winograd ------------------------------------------------------------------------------------

// One dimension of F(2, 3) and F(4, 3). The rows of the filters' transform have the common
// denominator kUnit; without it they are so many times what `filter` gives. Divisions are slow, so
// the nine weights are divided, by both dimensions' units at once.
template <int kOut>
struct Winograd;
template <>
struct Winograd<2> {
  template <typename X>
  static JAXWIN_INLINE void input(const X (&d)[4], X (&v)[4]) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  template <typename X>
  static JAXWIN_INLINE void filter(const X (&g)[3], X (&u)[4]) {
    const X even = g[0] + g[2];
    u[0] = g[0];
    u[1] = even + g[1];
    u[2] = even - g[1];
    u[3] = g[2];
  }
  static constexpr float kUnit = 2;
  static constexpr float kTimes[4] = {2, 1, 1, 2};
  template <typename X>
  static JAXWIN_INLINE void output(const X (&m)[4], X (&y)[2]) {
    y[0] = (m[0] + m[1]) + m[2];
    y[1] = (m[1] - m[2]) - m[3];
  }
};
template <>
struct Winograd<4> {
  template <typename X>
  static JAXWIN_INLINE void input(const X (&d)[6], X (&v)[6]) {
    const X even = fma(-4, d[2], d[4]);
    const X odd = fma(-4, d[1], d[3]);
    const X narrow = d[4] - d[2];
    const X twice = (d[3] - d[1]) + (d[3] - d[1]);
    v[0] = fma(4, d[0], fma(-5, d[2], d[4]));
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = narrow + twice;
    v[4] = narrow - twice;
    v[5] = fma(4, d[1], fma(-5, d[3], d[5]));
  }
  template <typename X>
  static JAXWIN_INLINE void filter(const X (&g)[3], X (&u)[6]) {
    const X even = g[0] + g[2];
    const X wide = fma(4, g[2], g[0]);
    u[0] = g[0];
    u[1] = even + g[1];
    u[2] = even - g[1];
    u[3] = fma(2, g[1], wide);
    u[4] = fma(-2, g[1], wide);
    u[5] = g[2];
  }
  static constexpr float kUnit = 24;
  static constexpr float kTimes[6] = {6, -4, -4, 1, 1, 24};
  template <typename X>
  static JAXWIN_INLINE void output(const X (&m)[6], X (&y)[4]) {
    const X s = m[1] + m[2];
    const X d = m[1] - m[2];
    const X t = m[3] + m[4];
    const X e = m[3] - m[4];
    y[0] = (m[0] + s) + t;
    y[1] = fma(2, e, d);
    y[2] = fma(4, t, s);
    y[3] = fma(8, e, d) + m[5];
  }
};

template <int kOut>
struct Separable {
  static constexpr int kIn = kOut + 2;

  template <typename X, bool kTail>
  struct Input {
    static void run(const Place<X, kTail>& at) {
      X half[kIn][kIn];
      JAXWIN_UNROLL
      for (int j = 0; j < kIn; ++j) {
        X d[kIn], v[kIn];
        JAXWIN_UNROLL
        for (int i = 0; i < kIn; ++i) d[i] = at.get(i, j);
        Winograd<kOut>::input(d, v);
        JAXWIN_UNROLL
        for (int i = 0; i < kIn; ++i) half[i][j] = v[i];
      }
      JAXWIN_UNROLL
      for (int i = 0; i < kIn; ++i) {
        X v[kIn];
        Winograd<kOut>::input(half[i], v);
        JAXWIN_UNROLL
        for (int j = 0; j < kIn; ++j) at.put(v[j], i * kIn + j);
      }
    }
  };

  template <typename X, bool kTail>
  struct Filter {
    static void run(const Place<X, kTail>& at) {
      X half[kIn][3];
      JAXWIN_UNROLL
      for (int j = 0; j < 3; ++j) {
        X g[3], u[kIn];
        JAXWIN_UNROLL
        for (int i = 0; i < 3; ++i) {
          g[i] = over(at.get(i, j), Winograd<kOut>::kUnit * Winograd<kOut>::kUnit);
        }
        Winograd<kOut>::filter(g, u);
        JAXWIN_UNROLL
        for (int i = 0; i < kIn; ++i) half[i][j] = u[i];
      }
      JAXWIN_UNROLL
      for (int i = 0; i < kIn; ++i) {
        X u[kIn];
        Winograd<kOut>::filter(half[i], u);
        JAXWIN_UNROLL
        for (int j = 0; j < kIn; ++j) {
          at.put(times(u[j], Winograd<kOut>::kTimes[i] * Winograd<kOut>::kTimes[j]), i * kIn + j);
        }
      }
    }
  };

  template <typename X, bool kTail>
  struct Output {
    static void run(const Place<X, kTail>& at) {
      X half[kOut][kIn];
      JAXWIN_UNROLL
      for (int j = 0; j < kIn; ++j) {
        X m[kIn], y[kOut];
        JAXWIN_UNROLL
        for (int i = 0; i < kIn; ++i) m[i] = at.get(i * kIn + j);
        Winograd<kOut>::output(m, y);
        JAXWIN_UNROLL
        for (int i = 0; i < kOut; ++i) half[i][j] = y[i];
      }
      JAXWIN_UNROLL
      for (int i = 0; i < kOut; ++i) {
        X y[kOut];
        Winograd<kOut>::output(half[i], y);
        JAXWIN_UNROLL
        for (int j = 0; j < kOut; ++j) at.put(y[j], i, j);
      }
    }
  };
};

// --- SFC-6
// -----------------------------------------------------------------------------------------

// The terms of one dimension: frequencies 0 and 3 (real), 1 and 2 (a + b s), two corrections.
enum Term { kZero, kThree, kOneA, kOneB, kTwoA, kTwoB, kFirst, kLast, kTerms };
constexpr int kRealTerms[4] = {kZero, kThree, kFirst, kLast};
constexpr int kComplexTerms[2] = {kOneA, kTwoA};

template <typename X>
JAXWIN_INLINE void input_terms(const X (&x)[8], X (&t)[kTerms]) {
  const X d0 = x[6] - x[3];
  const X d1 = x[1] - x[4];
  const X d2 = x[2] - x[5];
  const X e0 = x[6] + x[3];
  const X e1 = x[1] + x[4];
  const X e2 = x[2] + x[5];
  t[kZero] = (e0 + e1) + e2;
  t[kThree] = (d0 - d1) + d2;
  t[kOneA] = d0 - d2;
  t[kOneB] = d1 + d2;
  t[kTwoA] = e0 - e1;
  t[kTwoB] = e1 - e2;
  t[kFirst] = x[0] - x[6];
  t[kLast] = x[7] - x[1];
}

template <typename X>
JAXWIN_INLINE void filter_terms(const X (&h)[3], X (&t)[kTerms]) {
  const X even = h[0] + h[2];
  t[kZero] = even + h[1];
  t[kThree] = even - h[1];
  t[kOneA] = h[0] + h[1];
  t[kOneB] = (h[1] - (h[1] + h[1])) - h[2];
  t[kTwoA] = h[0] - h[2];
  t[kTwoB] = h[2] - h[1];
  t[kFirst] = h[0];
  t[kLast] = h[2];
}

// From the terms of rows (`get`, term of column i) to the 88 factors of the products, in this
// order: for each real term of the rows the ten products of the columns, then for each complex one
// those of its six frequencies and two corrections, three products each: of a, of b, and of a + b.
// put(factor, index, whether the columns' term is a correction, likewise the rows').
template <typename X, int N, typename Terms, typename Get, typename Put>
JAXWIN_INLINE void factors(const Terms& terms, const Get& get, const Put& put) {
  int q = 0;
  JAXWIN_UNROLL
  for (int r = 0; r < 4; ++r) {
    const bool border = r >= 2;
    X x[N], t[kTerms];
    JAXWIN_UNROLL
    for (int i = 0; i < N; ++i) x[i] = get(i, kRealTerms[r]);
    terms(x, t);
    put(t[kZero], q, false, border);
    put(t[kThree], q + 1, false, border);
    put(t[kOneA], q + 2, false, border);
    put(t[kOneB], q + 3, false, border);
    put(t[kOneA] + t[kOneB], q + 4, false, border);
    put(t[kTwoA], q + 5, false, border);
    put(t[kTwoB], q + 6, false, border);
    put(t[kTwoA] + t[kTwoB], q + 7, false, border);
    put(t[kFirst], q + 8, true, border);
    put(t[kLast], q + 9, true, border);
    q += 10;
  }
  JAXWIN_UNROLL
  for (int r = 0; r < 2; ++r) {
    X x[N], a[kTerms], b[kTerms];
    JAXWIN_UNROLL
    for (int i = 0; i < N; ++i) x[i] = get(i, kComplexTerms[r]);
    terms(x, a);
    JAXWIN_UNROLL
    for (int i = 0; i < N; ++i) x[i] = get(i, kComplexTerms[r] + 1);
    terms(x, b);
    const auto three = [&](X re, X im, bool correction) {
      put(re, q, correction, false);
      put(im, q + 1, correction, false);
      put(re + im, q + 2, correction, false);
      q += 3;
    };
    // a + b s at the frequencies 0, 3, 1, 5, 2, 4; 5 and 4 from the conjugates of those of a and b.
    three(a[kZero], b[kZero], false);
    three(a[kThree], b[kThree], false);
    three(a[kOneA] - b[kOneB], (a[kOneB] + b[kOneA]) + b[kOneB], false);
    three((a[kOneA] + a[kOneB]) + b[kOneB], b[kOneA] - a[kOneB], false);
    three(a[kTwoA] - b[kTwoB], (a[kTwoB] + b[kTwoA]) + b[kTwoB], false);
    three((a[kTwoA] + a[kTwoB]) + b[kTwoB], b[kTwoA] - a[kTwoB], false);
    three(a[kFirst], b[kFirst], true);
    three(a[kLast], b[kLast], true);
  }
}

template <typename X, bool kTail>
struct SfcInput {
  static void run(const Place<X, kTail>& at) {
    X rows[8][kTerms];
    for (int i = 0; i < 8; ++i) {
      X x[8];
      JAXWIN_UNROLL
      for (int j = 0; j < 8; ++j) x[j] = at.get(i, j);
      input_terms(x, rows[i]);
    }
    factors<X, 8>([](const X(&x)[8], X(&t)[kTerms]) { input_terms(x, t); },
                  [&](int i, int term) { return rows[i][term]; },
                  [&](X x, int q, bool, bool) { at.put(x, q); });
  }
};

template <typename X, bool kTail>
struct SfcFilter {
  static void run(const Place<X, kTail>& at) {
    X rows[3][kTerms];
    for (int i = 0; i < 3; ++i) {
      X h[3];
      JAXWIN_UNROLL
      for (int j = 0; j < 3; ++j) h[j] = over(at.get(i, j), 36);
      filter_terms(h, rows[i]);
    }
    // The inverse transform of a dimension's frequencies is without its division by six:
    // corrections make up for it. The division by 36 is that of the weights, or in integers of the
    // results.
    factors<X, 3>([](const X(&h)[3], X(&t)[kTerms]) { filter_terms(h, t); },
                  [&](int i, int term) { return rows[i][term]; },
                  [&](X x, int q, bool column, bool row) {
                    at.put(column || row ? times(x, column && row ? 36.0F : 6.0F) : x, q);
                  });
  }
};

// Six results of one dimension from its terms.
template <typename X>
JAXWIN_INLINE void output_terms(const X (&t)[kTerms], X (&y)[6]) {
  const X one = t[kOneA] + t[kOneB];
  const X two = t[kTwoA] + t[kTwoB];
  const X u0 = t[kZero] + (two + t[kTwoA]);
  const X u1 = t[kZero] + (t[kTwoB] - t[kTwoA]);
  const X u2 = t[kZero] - (two + t[kTwoB]);
  const X v0 = t[kThree] + (one + t[kOneA]);
  const X v1 = (one + t[kOneB]) - t[kThree];
  const X v2 = t[kThree] + (t[kOneB] - t[kOneA]);
  y[0] = (u0 + v0) + t[kFirst];
  y[1] = u1 + v1;
  y[2] = u2 + v2;
  y[3] = u0 - v0;
  y[4] = u1 - v1;
  y[5] = (u2 - v2) + t[kLast];
}

template <typename X, bool kTail>
struct SfcOutput {
  static void run(const Place<X, kTail>& at) {
    X rows[6][kTerms];
    int q = 0;
    JAXWIN_UNROLL
    for (int r = 0; r < 4; ++r) {
      X t[kTerms], y[6];
      t[kZero] = at.get(q);
      t[kThree] = at.get(q + 1);
      t[kOneA] = at.get(q + 2) - at.get(q + 3);
      t[kOneB] = at.get(q + 4) - at.get(q + 2);
      t[kTwoA] = at.get(q + 5) - at.get(q + 6);
      t[kTwoB] = at.get(q + 7) - at.get(q + 5);
      t[kFirst] = at.get(q + 8);
      t[kLast] = at.get(q + 9);
      output_terms(t, y);
      JAXWIN_UNROLL
      for (int i = 0; i < 6; ++i) rows[i][kRealTerms[r]] = y[i];
      q += 10;
    }
    JAXWIN_UNROLL
    for (int r = 0; r < 2; ++r) {
      X a[8], b[8];  // z = a + b s at the frequencies 0, 3, 1, 5, 2, 4; then the corrections
      JAXWIN_UNROLL
      for (int i = 0; i < 8; ++i) {
        const X first = at.get(q);
        a[i] = first - at.get(q + 1);
        b[i] = at.get(q + 2) - first;
        q += 3;
      }
      // z times a power of s: s^2 = s - 1 and -s = s^4 below, s^-1 = 1 - s and s above.
      const X sum1 = a[2] + b[2];
      const X sum5 = a[3] + b[3];
      const X sum2 = a[4] + b[4];
      const X sum4 = a[5] + b[5];
      // Of frequencies 0, 2, 4 at n = 0, 1, 2, and of 3, 1, 5.
      const X ua[3] = {(a[0] + a[4]) + a[5], (a[0] + b[4]) - sum4, (a[0] - sum2) + b[5]};
      const X ub[3] = {(b[0] + b[4]) + b[5], (b[0] - sum2) + a[5], (b[0] + a[4]) - sum4};
      const X va[3] = {(a[1] + a[2]) + a[3], (sum1 - a[1]) - b[3], (a[1] + b[2]) - sum5};
      const X vb[3] = {(b[1] + b[2]) + b[3], (sum5 - b[1]) - a[2], (b[1] - sum1) + a[3]};
      JAXWIN_UNROLL
      for (int n = 0; n < 3; ++n) {
        X ya = ua[n] + va[n];
        X yb = ub[n] + vb[n];
        X za = ua[n] - va[n];
        X zb = ub[n] - vb[n];
        if (n == 0) {
          ya = ya + a[6];
          yb = yb + b[6];
        }
        if (n == 2) {
          za = za + a[7];
          zb = zb + b[7];
        }
        rows[n][kComplexTerms[r]] = ya;
        rows[n][kComplexTerms[r] + 1] = yb;
        rows[n + 3][kComplexTerms[r]] = za;
        rows[n + 3][kComplexTerms[r] + 1] = zb;
      }
    }
    for (int i = 0; i < 6; ++i) {
      X y[6];
      output_terms(rows[i], y);
      JAXWIN_UNROLL
      for (int j = 0; j < 6; ++j) at.put(over_36(y[j]), i, j);
    }
  }
};

constexpr Transforms make_float() {
  using Operand = Lanes<float, false>;
  using Sum = Lanes<float, true>;
  Transforms t{};
  t.input[kWinograd2] = over_channels<Operand, Separable<2>::template Input>;
  t.filter[kWinograd2] = over_channels<Operand, Separable<2>::template Filter>;
  t.output[kWinograd2] = over_channels<Sum, Separable<2>::template Output>;
  t.input[kWinograd4] = over_channels<Operand, Separable<4>::template Input>;
  t.filter[kWinograd4] = over_channels<Operand, Separable<4>::template Filter>;
  t.output[kWinograd4] = over_channels<Sum, Separable<4>::template Output>;
  t.input[kSfc6] = over_channels<Operand, SfcInput>;
  t.filter[kSfc6] = over_channels<Operand, SfcFilter>;
  t.output[kSfc6] = over_channels<Sum, SfcOutput>;
  return t;
}

constexpr Transforms make_pair() {
  Transforms t{};
  t.input[kSfc6] = over_channels<Lanes<Pair, false>, SfcInput>;
  t.filter[kSfc6] = over_channels<Lanes<Pair, false>, SfcFilter>;
  t.output[kSfc6] = over_channels<Lanes<Pair, true>, SfcOutput>;
  return t;
}

constexpr Transforms kTables[kWords] = {make_float(), {}, make_pair()};

}  // namespace

const Transforms* transforms(Word word) { return &kTables[word]; }

}  // namespace jaxwin::JAXWIN_TARGET
