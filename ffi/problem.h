// SPDX-License-Identifier: Apache-2.0
//
// One convolution in canonical form: any rank up to three spatial dimensions, any dimension
// numbers (they become strides), feature and batch groups (they become strides of one group
// axis), any stride, padding and dilation. The only place with output-size arithmetic.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "dtypes.h"

namespace jaxwin {

// Spatial triples are ordered z, y, x; missing leading dimensions have size 1.
using Dim3 = std::array<int64_t, 3>;

// What the caller says, in the terms of jax.lax.conv_general_dilated.
struct ConvParams {
  std::vector<int64_t> lhs_shape, rhs_shape, out_shape;
  std::vector<int64_t> lhs_spec, rhs_spec, out_spec;  // batch/out feature, feature, spatial...
  std::vector<int64_t> window_strides, padding_low, padding_high, lhs_dilation, rhs_dilation;
  std::vector<int64_t> rhs_reversal;  // 1: the window runs backwards along this dimension
  int64_t feature_group_count = 1;
  int64_t batch_group_count = 1;
  Dtype dtype = kF32;      // of both operands, bias and residual
  Dtype out_dtype = kF32;  // of the result
  int64_t rhs_panel = 0;   // 0: rhs lies as its shape and specification say; else see packed_shape
};

// The shape in which packed filters lie: groups, panels of `rhs_panel` features (the last one
// filled up with zeros), window positions and channels in the order of the reduction, features.
std::vector<int64_t> packed_shape(const ConvParams& params);

struct Problem {
  Dtype dtype = kF32;  // of both operands, bias and residual
  Dtype out_dtype = kF32;
  int64_t n = 1;  // images per batch group
  int64_t g = 1;  // groups
  int64_t c = 1;  // input channels per group
  int64_t k = 1;  // output features per group
  Dim3 in{1, 1, 1}, out{1, 1, 1}, win{1, 1, 1};
  Dim3 stride{1, 1, 1}, pad{0, 0, 0}, lhs_dilation{1, 1, 1}, rhs_dilation{1, 1, 1};

  // Strides in elements: x[n, g, c, in], w[g, k, c, win], y[n, g, k, out]. Those of the window are
  // negative where it is reversed; w_first is where its position 0 then lies.
  int64_t w_first = 0;
  struct {
    int64_t n, g, c;
    Dim3 sp;
  } x{};
  struct {
    int64_t g, k, c;
    Dim3 sp;
  } w{};
  int64_t panel = 0;  // of packed filters, whose strides w does not say; see packed_shape
  struct {
    int64_t n, g, k;
    Dim3 sp;
  } y{};

  int64_t window() const { return win[0] * win[1] * win[2]; }
  int64_t pixels() const { return out[0] * out[1] * out[2]; }
  int64_t reduction() const { return c * window(); }
  bool plain() const { return is_plain(dtype, out_dtype); }
  double flops() const;

  // The order of the reduction (README.md, "What the numbers promise"), set by make_problem from
  // the logical shape alone. 0: one chain over (x, y, z, channel). Else, for shapes that look like
  // weight gradients (a window larger than the output, overlapping from pixel to pixel): chains
  // over the rows (channel, z, y) of the window, each along x; so many rows to a chunk, chunks
  // added in order. A depth that is only summed over comes before the channels: there, make_problem
  // lets the two change places, so that images in blocks have the order of images.
  int64_t chunk_rows = 0;

  // Some window position reads padding.
  bool touches_padding() const;
  bool dilated_input() const {
    return lhs_dilation[0] > 1 || lhs_dilation[1] > 1 || lhs_dilation[2] > 1;
  }
};

// An empty string, or what is wrong with which argument.
std::string make_problem(const ConvParams& params, Problem* problem);

// The same convolution with spatial dimensions and images merged where that changes neither the
// operands nor any reduction (1x1 windows over contiguous pixels).
Problem collapse(const Problem& p);

// The positions i in [0, count) of one window dimension, for a fixed output position, that read
// real input: i = first + t * step, reading input index at + t * at_step, for t < n.
struct Progression {
  int64_t first, step, n, at, at_step;
};
Progression window_positions(const Problem& p, int dim, int64_t out_position);

// First output position at or after j0 (limit j1) whose input index o * s + offset is >= 0, and
// first whose index is >= size.
struct Range {
  int64_t begin, end;
};
Range inside(int64_t j0, int64_t j1, int64_t s, int64_t offset, int64_t size);

// Of the window positions of one dimension, for all its outputs, the share that reads real input.
double real_share(const Problem& p, int dim);

// With lhs_dilation l and stride s, the outputs o = r + t * period (period = l / gcd(l, s)) of one
// dimension see the same window positions of the dilated input, and among themselves form an
// ordinary convolution: window positions first + i * step, i < win (0: none is real), reading input
// index t * stride + i * dilation - pad, for t < out.
struct Residue {
  int64_t out, first, step, win, stride, dilation, pad;
};
int64_t residue_period(const Problem& p, int dim);
Residue residue(const Problem& p, int dim, int64_t r);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace jaxwin
