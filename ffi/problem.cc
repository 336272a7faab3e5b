// SPDX-License-Identifier: Apache-2.0

#include "problem.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace jaxwin {
namespace {

// Sizes up to here leave room for every product and offset in int64.
constexpr int64_t kMaxSize = int64_t{1} << 40;

bool is_permutation_of_rank(const std::vector<int64_t>& spec, size_t rank) {
  if (spec.size() != rank) return false;
  std::vector<bool> seen(rank, false);
  for (const int64_t d : spec) {
    if (d < 0 || d >= static_cast<int64_t>(rank) || seen[d]) return false;
    seen[d] = true;
  }
  return true;
}

std::vector<int64_t> row_major_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * shape[d];
  return strides;
}

// The number of elements, or -1 where a size is negative or the product too large.
int64_t elements(const std::vector<int64_t>& shape) {
  int64_t total = 1;
  for (const int64_t d : shape) {
    if (d < 0 || (d > 0 && total > kMaxSize / d)) return -1;
    total *= d;
  }
  return total;
}

// A depth over which is only summed, as over the images: that of the weight gradient of a window of
// depth 1. Where the images come in blocks (CHWN8), their number is such a depth.
bool sums_over_depth(const Problem& p) {
  return p.out[0] == 1 && p.win[0] > 1 && p.win[0] == p.in[0] && p.pad[0] == 0 &&
         p.rhs_dilation[0] == 1 && p.lhs_dilation[0] == 1 && p.w.sp[0] > 0;
}

int64_t chunk_rows(const Problem& p) {
  const int64_t depth = sums_over_depth(p) ? p.win[0] : 1;
  if (p.window() / depth <= p.pixels()) return 0;
  bool overlapping = false;
  for (int d = depth > 1 ? 1 : 0; d < 3; ++d) overlapping = overlapping || p.stride[d] < p.win[d];
  if (!overlapping) return 0;
  // About a thousand pixels: their rows of input and output gradient stay in a second-level cache.
  constexpr int64_t kChunkPixels = 1024;
  return std::max<int64_t>(1, kChunkPixels / p.win[2]);
}

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

}  // namespace

std::vector<int64_t> packed_shape(const ConvParams& a) {
  const int64_t groups = std::max(a.feature_group_count, a.batch_group_count);
  int64_t reduction = 1;
  for (size_t d = 1; d < a.rhs_spec.size(); ++d) reduction *= a.rhs_shape[a.rhs_spec[d]];
  return {groups, ceil_div(a.rhs_shape[a.rhs_spec[0]] / groups, a.rhs_panel), reduction,
          a.rhs_panel};
}

double Problem::flops() const {
  double real_taps = static_cast<double>(window());
  for (int d = 0; d < 3; ++d) real_taps /= static_cast<double>(lhs_dilation[d]);
  return 2.0 * static_cast<double>(n * g * k) * static_cast<double>(pixels()) *
         static_cast<double>(c) * real_taps;
}

bool Problem::touches_padding() const {
  for (int d = 0; d < 3; ++d) {
    const int64_t extent = in[d] == 0 ? 0 : (in[d] - 1) * lhs_dilation[d] + 1;
    const int64_t last = (out[d] - 1) * stride[d] - pad[d] + (win[d] - 1) * rhs_dilation[d];
    if (pad[d] > 0 || last >= extent) return true;
  }
  return false;
}

std::string make_problem(const ConvParams& a, Problem* p) {
  const size_t rank = a.lhs_shape.size();
  if (rank < 3 || rank > 5) return "lhs: one to three spatial dimensions are supported";
  const size_t spatial = rank - 2;
  if (a.rhs_shape.size() != rank || a.out_shape.size() != rank) {
    return "rhs, out: ranks differ from lhs";
  }
  if (!is_permutation_of_rank(a.lhs_spec, rank) || !is_permutation_of_rank(a.rhs_spec, rank) ||
      !is_permutation_of_rank(a.out_spec, rank)) {
    return "dimension_numbers: each specification must be a permutation of the dimensions";
  }
  if (a.window_strides.size() != spatial || a.padding_low.size() != spatial ||
      a.padding_high.size() != spatial || a.lhs_dilation.size() != spatial ||
      a.rhs_dilation.size() != spatial || a.rhs_reversal.size() != spatial) {
    return "window_strides, padding, dilation, rhs_reversal: one value per spatial dimension is "
           "needed";
  }
  if (elements(a.lhs_shape) < 0 || elements(a.rhs_shape) < 0 || elements(a.out_shape) < 0) {
    return "shapes: an operand is negative or too large";
  }
  const int64_t fg = a.feature_group_count;
  const int64_t bg = a.batch_group_count;
  if (fg < 1 || bg < 1 || (fg > 1 && bg > 1)) {
    return "feature_group_count, batch_group_count: must be positive, and one of them 1";
  }
  const int64_t batch = a.lhs_shape[a.lhs_spec[0]];
  const int64_t channels = a.lhs_shape[a.lhs_spec[1]];
  const int64_t features = a.rhs_shape[a.rhs_spec[0]];
  const int64_t filter_channels = a.rhs_shape[a.rhs_spec[1]];
  const int64_t groups = std::max(fg, bg);
  if (features % groups != 0) return "rhs: output features are not a multiple of the groups";
  if (channels % fg != 0 || channels / fg != filter_channels) {
    return "rhs: input features differ from those of lhs divided by feature_group_count";
  }
  if (batch % bg != 0) return "lhs: batch is not a multiple of batch_group_count";
  if (a.out_shape[a.out_spec[0]] != batch / bg || a.out_shape[a.out_spec[1]] != features) {
    return "out: batch or feature size is wrong";
  }

  *p = Problem{};
  p->dtype = a.dtype;
  p->out_dtype = a.out_dtype;
  p->n = batch / bg;
  p->g = groups;
  p->c = filter_channels;
  p->k = features / groups;
  const auto xs = row_major_strides(a.lhs_shape);
  const auto ws = row_major_strides(a.rhs_shape);
  const auto ys = row_major_strides(a.out_shape);
  p->x.n = xs[a.lhs_spec[0]];
  p->x.c = xs[a.lhs_spec[1]];
  p->x.g = fg > 1 ? p->c * p->x.c : p->n * p->x.n;
  p->w.k = ws[a.rhs_spec[0]];
  p->w.c = ws[a.rhs_spec[1]];
  p->w.g = p->k * p->w.k;
  p->y.n = ys[a.out_spec[0]];
  p->y.k = ys[a.out_spec[1]];
  p->y.g = p->k * p->y.k;
  for (size_t s = 0; s < spatial; ++s) {
    const size_t d = 3 - spatial + s;
    p->in[d] = a.lhs_shape[a.lhs_spec[2 + s]];
    p->win[d] = a.rhs_shape[a.rhs_spec[2 + s]];
    p->out[d] = a.out_shape[a.out_spec[2 + s]];
    p->stride[d] = a.window_strides[s];
    p->pad[d] = a.padding_low[s];
    p->lhs_dilation[d] = a.lhs_dilation[s];
    p->rhs_dilation[d] = a.rhs_dilation[s];
    p->x.sp[d] = xs[a.lhs_spec[2 + s]];
    p->w.sp[d] = ws[a.rhs_spec[2 + s]];
    p->y.sp[d] = ys[a.out_spec[2 + s]];
    if (a.rhs_reversal[s] != 0) {
      if (a.rhs_reversal[s] != 1) return "rhs_reversal: must be 0 or 1";
      p->w_first += std::max<int64_t>(0, p->win[d] - 1) * p->w.sp[d];
      p->w.sp[d] = -p->w.sp[d];
    }
    if (p->stride[d] < 1 || p->lhs_dilation[d] < 1 || p->rhs_dilation[d] < 1) {
      return "window_strides, lhs_dilation, rhs_dilation: must be at least 1";
    }
    for (const int64_t v : {p->stride[d], p->lhs_dilation[d], p->rhs_dilation[d]}) {
      if (v > kMaxSize) return "window_strides, lhs_dilation, rhs_dilation: too large";
    }
    for (const int64_t v : {a.padding_low[s], a.padding_high[s]}) {
      if (v > kMaxSize || v < -kMaxSize) return "padding: too large";
    }
    if (p->in[d] == 0 || p->win[d] == 0 || p->out[d] == 0) continue;
    if ((p->in[d] - 1) > kMaxSize / p->lhs_dilation[d] ||
        (p->win[d] - 1) > kMaxSize / p->rhs_dilation[d]) {
      return "lhs_dilation, rhs_dilation: the dilated size is too large";
    }
    const int64_t extent =
        (p->in[d] - 1) * p->lhs_dilation[d] + 1 + a.padding_low[s] + a.padding_high[s];
    const int64_t span = (p->win[d] - 1) * p->rhs_dilation[d] + 1;
    const int64_t expected = std::max<int64_t>(0, floor_div(extent - span, p->stride[d]) + 1);
    if (p->out[d] != expected) return "out: a spatial size does not follow from the operands";
  }
  for (const int64_t size : {p->n, p->g, p->c, p->k, p->window(), p->pixels()}) {
    if (size == 0) return "shapes: a size is zero";
  }
  for (int d = 0; d < 3; ++d) {
    if (p->in[d] == 0) return "shapes: a size is zero";
  }
  constexpr int64_t kMaxPanel = 1 << 16;
  if (a.rhs_panel < 0 || a.rhs_panel > kMaxPanel) return "rhs_panel: must be 0 or a size";
  if (a.rhs_panel > 0 && p->w_first != 0) return "rhs_panel: packed filters cannot be reversed";
  p->panel = a.rhs_panel;
  p->chunk_rows = chunk_rows(*p);
  if (p->chunk_rows > 0 && sums_over_depth(*p)) {
    std::swap(p->c, p->win[0]);
    std::swap(p->x.c, p->x.sp[0]);
    std::swap(p->w.c, p->w.sp[0]);
    p->in[0] = p->win[0];
  }
  return {};
}

Problem collapse(const Problem& p) {
  Problem q = p;
  for (int d = 0; d < 3; ++d) {
    if (q.win[d] != 1 || q.stride[d] != 1 || q.pad[d] != 0 || q.lhs_dilation[d] != 1 ||
        q.in[d] != q.out[d]) {
      return q;
    }
  }
  for (int d = 1; d >= 0; --d) {  // merge dimension d into x
    const bool free = q.in[d] == 1;
    if (!free && (q.x.sp[d] != q.in[2] * q.x.sp[2] || q.y.sp[d] != q.out[2] * q.y.sp[2])) return q;
    q.in[2] *= q.in[d];
    q.out[2] *= q.out[d];
    q.in[d] = q.out[d] = 1;
  }
  if (q.n > 1 && q.x.n == q.in[2] * q.x.sp[2] && q.y.n == q.out[2] * q.y.sp[2]) {
    q.in[2] *= q.n;
    q.out[2] *= q.n;
    q.n = 1;
  }
  return q;
}

Progression window_positions(const Problem& p, int d, int64_t o) {
  // Window position i reads position q = base + i * rd of the dilated input: real where ld | q
  // and 0 <= q / ld < in.
  const int64_t rd = p.rhs_dilation[d];
  const int64_t ld = p.lhs_dilation[d];
  const int64_t base = o * p.stride[d] - p.pad[d];
  const int64_t step = ld / std::gcd(ld, rd);
  int64_t first = 0;
  while (first < step && (base + first * rd) % ld != 0) ++first;
  if (first == step) return {0, 1, 0, 0, 0};
  int64_t q = base + first * rd;  // a multiple of ld from here on
  const int64_t q_step = step * rd;
  if (q < 0) {
    const int64_t skip = ceil_div(-q, q_step);
    first += skip * step;
    q += skip * q_step;
  }
  const int64_t last = (p.in[d] - 1) * ld;
  if (first >= p.win[d] || q > last) return {0, 1, 0, 0, 0};
  const int64_t n = std::min((p.win[d] - 1 - first) / step, (last - q) / q_step) + 1;
  return {first, step, n, q / ld, q_step / ld};
}

Range inside(int64_t j0, int64_t j1, int64_t s, int64_t offset, int64_t size) {
  int64_t begin = j0;
  if (begin * s + offset < 0) begin = ceil_div(-offset, s);
  int64_t end = j1;
  if (size - offset <= 0) {
    end = j0;
  } else {
    end = std::min(j1, ceil_div(size - offset, s));
  }
  begin = std::clamp(begin, j0, j1);
  return {begin, std::max(begin, end)};
}

double real_share(const Problem& p, int d) {
  if (p.out[d] == 0) return 1;
  // Of a few window positions at even distances, the outputs for which they lie inside the input.
  const int64_t samples = std::min<int64_t>(p.win[d], 16);
  const int64_t extent = (p.in[d] - 1) * p.lhs_dilation[d] + 1;
  int64_t real = 0;
  for (int64_t i = 0; i < samples; ++i) {
    const int64_t at = p.win[d] * (2 * i + 1) / (2 * samples);
    const Range r = inside(0, p.out[d], p.stride[d], at * p.rhs_dilation[d] - p.pad[d], extent);
    real += r.end - r.begin;
  }
  return static_cast<double>(real) / static_cast<double>(samples * p.out[d] * p.lhs_dilation[d]);
}

int64_t residue_period(const Problem& p, int d) {
  return p.lhs_dilation[d] / std::gcd(p.lhs_dilation[d], p.stride[d]);
}

Residue residue(const Problem& p, int d, int64_t r) {
  const int64_t l = p.lhs_dilation[d];
  Residue s{};
  s.out = r < p.out[d] ? ceil_div(p.out[d] - r, residue_period(p, d)) : 0;
  s.step = l / std::gcd(l, p.rhs_dilation[d]);
  s.stride = residue_period(p, d) * p.stride[d] / l;
  s.dilation = p.rhs_dilation[d] * s.step / l;
  const int64_t base = r * p.stride[d] - p.pad[d];
  while (s.first < s.step && (base + s.first * p.rhs_dilation[d]) % l != 0) ++s.first;
  if (s.first >= s.step || s.first >= p.win[d]) return s;  // win 0: no real positions
  s.win = (p.win[d] - 1 - s.first) / s.step + 1;
  s.pad = -(base + s.first * p.rhs_dilation[d]) / l;
  return s;
}

}  // namespace jaxwin
