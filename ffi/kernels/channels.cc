// SPDX-License-Identifier: Apache-2.0
//
// Sums and scaling by channel, channels as lanes; compiled once per instruction set. Without fma,
// which the baseline has to emulate: memory, not arithmetic, is what these passes wait for.

#include "kernels/channels.h"

#include "kernels/elementwise.h"
#include "kernels/vec.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

// The mask of a vector with all its lanes.
struct Whole {};
template <typename T>
JAXWIN_INLINE Vec<T> load(const T* p, Whole /*mask*/) {
  return load(p);
}
template <typename T>
JAXWIN_INLINE void store(T* p, Vec<T> a, Whole /*mask*/) {
  store(p, a);
}

// Calls body(c, mask) for every vector of columns; the mask's type says whether it is a whole one.
template <typename T, typename Body>
JAXWIN_INLINE void over_columns(int64_t cols, const Body& body) {
  int64_t c = 0;
  for (; c + kWidth<T> <= cols; c += kWidth<T>) body(c, Whole{});
  if (c < cols) body(c, make_mask<T>(cols - c));
}

template <typename T, bool kResidual, typename Finish>
void scale_rows(const ScaleArgs* a, const Finish& finish) {
  const T* offset = static_cast<const T*>(a->line);
  const T* factor = offset + a->cols;
  for (int64_t r = 0; r < a->rows; ++r) {
    const T* x = static_cast<const T*>(a->x) + r * a->cols;
    T* y = static_cast<T*>(a->y) + r * a->cols;
    over_columns<T>(a->cols, [&](int64_t c, auto mask) {
      Vec<T> v = add(mul(load(x + c, mask), load(factor + c, mask)), load(offset + c, mask));
      if constexpr (kResidual) {
        v = add(v, load(static_cast<const T*>(a->residual) + r * a->cols + c, mask));
      }
      store(y + c, finish(v), mask);
    });
  }
}

template <typename T, typename Finish>
void scale_as(const ScaleArgs* a, const Finish& finish) {
  if (a->residual != nullptr) {
    scale_rows<T, true>(a, finish);
  } else {
    scale_rows<T, false>(a, finish);
  }
}

template <typename T>
void scale(const ScaleArgs* a) {
  switch (a->activation) {
    case Activation::kNone:
      return scale_as<T>(a, [](Vec<T> v) { return v; });
    case Activation::kRelu:
      return scale_as<T>(a, [](Vec<T> v) { return max(zero<T>(), v); });
    default:
      return scale_as<T>(a, [a](Vec<T> v) { return activate(v, a->activation); });
  }
}

// The sums of so many rows at a time are read and written once.
template <typename T, int kRows>
JAXWIN_INLINE void add_rows(const MomentsArgs* a, int64_t row) {
  const T* x = static_cast<const T*>(a->x) + row * a->cols;
  const T* g = static_cast<const T*>(a->g) + row * a->cols;
  T* first = static_cast<T*>(a->moments);
  T* second = first + a->cols;
  over_columns<T>(a->cols, [&](int64_t c, auto mask) {
    Vec<T> sum = load(first + c, mask);
    Vec<T> products = load(second + c, mask);
    JAXWIN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> v = load(g + r * a->cols + c, mask);
      sum = add(sum, v);
      products = add(products, mul(load(x + r * a->cols + c, mask), v));
    }
    store(first + c, sum, mask);
    store(second + c, products, mask);
  });
}

template <typename T>
void moments(const MomentsArgs* a) {
  constexpr int kRows = 8;
  int64_t row = 0;
  for (; row + kRows <= a->rows; row += kRows) add_rows<T, kRows>(a, row);
  for (; row < a->rows; ++row) add_rows<T, 1>(a, row);
}

constexpr uint32_t kAllActivations = (1U << kActivationCount) - 1;
constexpr ChannelKernels kTables[kWords] = {{scale<float>, moments<float>, kAllActivations},
                                            {scale<double>, moments<double>, kExactActivations},
                                            {}};

}  // namespace

const ChannelKernels* channel_kernels(Word word) { return &kTables[word]; }

}  // namespace jaxwin::JAXWIN_TARGET
