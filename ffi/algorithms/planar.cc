// SPDX-License-Identifier: Apache-2.0
//
// Output pixels as lanes: the matrix product of im2win with the operands exchanged. The input rows
// that a block of output rows needs are laid out channel by channel (NCHW data is copied, NHWC data
// transposed, columns in between strides are set apart), so that a window position is a vector load
// of neighbouring pixels; the filter is broadcast. Pays where output features are too few to fill
// vectors: the input gradients of first layers, the last layers of generators. With lhs_dilation
// the outputs of one residue are neighbours in the same strip, as in the segregated algorithm
// (arXiv 2209.03704). Rows that lie on padding are skipped.

#include <algorithm>
#include <limits>
#include <vector>

#include "algorithms/gemm_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {
namespace {

enum PlanarParam { kPlanarMr, kPlanarNv, kPlanarRows, kPlanarCols, kPlanarParams };

constexpr int64_t kStripLimit = (1 << 20) / sizeof(float);  // per thread

struct Layout {
  Problem p;  // collapsed
  int64_t mr, nv, rows, cols;
  int64_t width;
  int64_t period;              // residues of the output columns
  int64_t advance;             // input columns from one output of a residue to its next
  int64_t pixels;              // outputs of one residue
  bool in_place;               // the micro-kernel reads the input itself
  int64_t in_rows, lane, row;  // of the strip: input rows, floats of one set of columns, of a row
  int64_t row_blocks, col_blocks;
  int64_t w_floats, strip_floats, tile_floats;  // shared; per thread
};

// The columns that outputs [t0, t1) of every residue read: from `first` on, `count` of them.
struct Columns {
  int64_t first, count;
};
Columns columns(const Problem& p, int64_t period, int64_t t0, int64_t t1) {
  int64_t first = std::numeric_limits<int64_t>::max();
  int64_t last = std::numeric_limits<int64_t>::min();
  for (int64_t r = 0; r < std::min(period, p.out[2]); ++r) {
    const Residue s = residue(p, 2, r);
    if (s.win == 0) continue;
    first = std::min(first, t0 * s.stride - s.pad);
    last = std::max(last, (t1 - 1) * s.stride + (s.win - 1) * s.dilation - s.pad);
  }
  return first > last ? Columns{0, 0} : Columns{first, last - first + 1};
}

int64_t strip_rows(const Problem& p, int64_t rows) {
  const int64_t span =
      ((rows - 1) * p.stride[1] + (p.win[1] - 1) * p.rhs_dilation[1]) / p.lhs_dilation[1] + 2;
  return std::min(span, p.in[1]);
}

Layout make_layout(const Problem& problem, const Target& t, const Params& params) {
  Layout l{};
  l.p = collapse(problem);
  const Problem& p = l.p;
  l.width = t.kernels->width;
  l.mr = params[kPlanarMr];
  l.nv = params[kPlanarNv];
  l.period = residue_period(p, 2);
  l.advance = l.period * p.stride[2] / p.lhs_dilation[2];
  l.pixels = ceil_div(p.out[2], l.period);
  l.rows = params[kPlanarRows] == 0 ? p.out[1] : std::min(params[kPlanarRows], p.out[1]);
  l.cols = params[kPlanarCols] == 0 ? l.pixels : std::min(params[kPlanarCols], l.pixels);
  l.row_blocks = ceil_div(p.out[1], l.rows);
  l.col_blocks = ceil_div(l.pixels, l.cols);
  const Columns all = columns(p, l.period, 0, l.pixels);
  l.in_place =
      p.x.sp[2] == 1 && l.advance == 1 && all.first >= 0 && all.first + all.count <= p.in[2];
  if (!l.in_place) {
    const Columns block = columns(p, l.period, 0, l.cols);
    l.in_rows = strip_rows(p, l.rows);
    // Vectors may read past the last column of a set.
    l.lane = round_up(ceil_div(block.count, l.advance), l.width) + l.width;
    l.row = l.lane * l.advance;
    l.strip_floats =
        round_up(std::min(p.win[0], p.in[0]) * l.in_rows * p.c * l.row + l.nv * l.width, 16);
  }
  l.w_floats = round_up(p.g * p.k * p.reduction(), 16);
  l.tile_floats = l.mr * l.nv * l.width;
  return l;
}

// The filters of all groups as [g][k][reduction in canonical order].
void gather_filters(const Problem& p, const float* w, float* dst) {
  for (int64_t g = 0; g < p.g; ++g) {
    for (int64_t k = 0; k < p.k; ++k) {
      const float* from = w + g * p.w.g + k * p.w.k;
      for (int64_t v = 0; v < p.win[2]; ++v) {
        for (int64_t y = 0; y < p.win[1]; ++y) {
          for (int64_t z = 0; z < p.win[0]; ++z) {
            const float* tap = from + z * p.w.sp[0] + y * p.w.sp[1] + v * p.w.sp[2];
            for (int64_t c = 0; c < p.c; ++c) *dst++ = tap[c * p.w.c];
          }
        }
      }
    }
  }
}

struct Strip {
  const float* data;
  int64_t plane, row, channel;  // strides: window z, input row, input channel
  int64_t first_row, first_col;
};

// Input rows [y0, y1) of the planes that window_positions `z` names, columns from `cols.first` on.
void fill_strip(const Layout& l, const Kernels& k, const float* x, const Progression& z, int64_t y0,
                int64_t y1, const Columns& cols, float* strip) {
  const Problem& p = l.p;
  for (int64_t i = 0; i < z.n; ++i) {
    for (int64_t y = y0; y < y1; ++y) {
      const float* row = x + (z.at + i * z.at_step) * p.x.sp[0] + y * p.x.sp[1];
      float* to = strip + (i * l.in_rows + y - y0) * p.c * l.row;
      for (int64_t s = 0; s < l.advance; ++s) {
        // Columns cols.first + s + j * advance, those inside the input for j in [begin, end).
        const int64_t q = cols.first + s;
        const int64_t count = ceil_div(cols.count - s, l.advance);
        const int64_t begin =
            std::clamp<int64_t>(ceil_div(-q, l.advance), 0, std::max<int64_t>(0, count));
        const int64_t end =
            std::clamp<int64_t>(ceil_div(p.in[2] - q, l.advance), begin, std::max(begin, count));
        float* lane = to + s * l.lane;
        if (end > begin) {
          k.copy(lane + begin, l.row, row + (q + begin * l.advance) * p.x.sp[2], p.x.c,
                 p.x.sp[2] * l.advance, p.c, end - begin);
        }
        for (int64_t c = 0; c < p.c && (begin > 0 || end < l.lane); ++c) {
          float* at = lane + c * l.row;
          std::fill(at, at + begin, 0.0F);
          std::fill(at + end, at + l.lane, 0.0F);
        }
      }
    }
  }
}

// The reduction of the outputs of residue `s` in one output row.
void make_runs(const Layout& l, const Strip& strip, const Progression& z, const Progression& y,
               const Residue& s, std::vector<Run>* runs) {
  const Problem& p = l.p;
  runs->clear();
  for (int64_t i = 0; i < s.win; ++i) {
    const int64_t q = i * s.dilation - s.pad - strip.first_col;
    const int64_t column = l.in_place ? q : q % l.advance * l.lane + q / l.advance;
    for (int64_t u = 0; u < y.n; ++u) {
      for (int64_t d = 0; d < z.n; ++d) {
        const int64_t tap = ((s.first + i * s.step) * p.win[1] + y.first + u * y.step) * p.win[0] +
                            z.first + d * z.step;
        const int64_t a = tap * p.c;
        const int64_t b =
            d * strip.plane + (y.at + u * y.at_step - strip.first_row) * strip.row + column;
        if (!runs->empty() && runs->back().a + runs->back().len == a &&
            runs->back().b + runs->back().len * strip.channel == b) {
          runs->back().len += p.c;
        } else {
          runs->push_back({a, b, p.c});
        }
      }
    }
  }
}

// Pixels [0, n) of features k0 .. k0 + features: c[feature][pixel] goes to y (in place if it is
// there), then the epilogue. p.y.sp[2] is the distance of two pixels.
void finish(const Problem& p, const Kernels& k, const Operands& o, const float* c, int64_t ld,
            int64_t features, int64_t n, int64_t g, int64_t k0, int64_t y_offset) {
  float* y = o.y + y_offset;
  const float* bias = o.bias == nullptr ? nullptr : o.bias + g * p.k + k0;
  const float* residual = o.residual == nullptr ? nullptr : o.residual + y_offset;
  if (p.y.sp[2] == 1) {
    if (c != y) k.copy(y, p.y.k, c, ld, 1, features, n);
    if (!o.has_epilogue()) return;
    const EpilogueArgs e{y, p.y.k, features, n, bias, 1, 0, residual, p.y.k, o.activation};
    k.epilogue(&e);
    return;
  }
  if (p.y.k == 1) {
    k.copy(y, p.y.sp[2], c, 1, ld, n, features);
    if (!o.has_epilogue()) return;
    const EpilogueArgs e{y, p.y.sp[2], n, features, bias, 0, 1, residual, p.y.sp[2], o.activation};
    k.epilogue(&e);
    return;
  }
  for (int64_t j = 0; j < features; ++j) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = i * p.y.sp[2] + j * p.y.k;
      y[at] = c[j * ld + i];
      if (!o.has_epilogue()) continue;
      const EpilogueArgs e{y + at,
                           0,
                           1,
                           1,
                           bias == nullptr ? nullptr : bias + j,
                           0,
                           0,
                           residual == nullptr ? nullptr : residual + at,
                           0,
                           o.activation};
      k.epilogue(&e);
    }
  }
}

void run(const Problem& problem, const Params& params, const Operands& o, const Execution& e) {
  const Layout l = make_layout(problem, e.target, params);
  const Problem& p = l.p;
  const Kernels& k = *e.target.kernels;
  Problem apart = p;  // the outputs of one residue
  apart.y.sp[2] *= l.period;
  const bool direct_store = apart.y.sp[2] == 1 && p.y.k >= l.pixels;
  float* w = e.workspace;
  float* scratch = w + l.w_floats;
  const int64_t own = l.strip_floats + round_up(l.tile_floats, 16);
  const int64_t reduction = p.reduction();
  gather_filters(p, o.w, w);

  const int64_t threads = std::min(useful_threads(problem, e.target.threads), e.pool->count());
  const Threads pool = e.pool->limited(threads);
  const int64_t tasks = p.g * p.n * p.out[0] * l.row_blocks * l.col_blocks;
  pool.run(tasks, [&](int64_t task, int64_t worker) {
    const int64_t cb = task % l.col_blocks;
    const int64_t rb = task / l.col_blocks % l.row_blocks;
    const int64_t oz = task / l.col_blocks / l.row_blocks % p.out[0];
    const int64_t n = task / l.col_blocks / l.row_blocks / p.out[0] % p.n;
    const int64_t g = task / l.col_blocks / l.row_blocks / p.out[0] / p.n;
    const int64_t y0 = rb * l.rows;
    const int64_t y1 = std::min(y0 + l.rows, p.out[1]);
    const int64_t t0 = cb * l.cols;
    const int64_t t1 = std::min(t0 + l.cols, l.pixels);
    float* strip_data = scratch + worker * own;
    float* tile = strip_data + l.strip_floats;
    const float* x = o.x + n * p.x.n + g * p.x.g;

    const Progression z = window_positions(p, 0, oz);
    int64_t in0 = p.in[1];
    int64_t in1 = 0;
    for (int64_t oy = y0; oy < y1; ++oy) {
      const Progression y = window_positions(p, 1, oy);
      if (y.n == 0) continue;
      in0 = std::min(in0, y.at);
      in1 = std::max(in1, y.at + (y.n - 1) * y.at_step + 1);
    }
    const Columns cols = columns(p, l.period, t0, t1);
    Strip strip{};
    if (l.in_place) {
      strip = {x + z.at * p.x.sp[0], z.at_step * p.x.sp[0], p.x.sp[1], p.x.c, 0, 0};
    } else {
      if (z.n > 0 && cols.count > 0) {
        fill_strip(l, k, x, z, in0, std::max(in0, in1), cols, strip_data);
      }
      // Offsets are those of output t0: the strip begins at its first column.
      strip = {strip_data, l.in_rows * p.c * l.row,    p.c * l.row, l.row,
               in0,        cols.first - t0 * l.advance};
    }

    std::vector<Run> runs;
    for (int64_t oy = y0; oy < y1; ++oy) {
      const Progression y = window_positions(p, 1, oy);
      for (int64_t r = 0; r < l.period; ++r) {
        const Residue s = residue(p, 2, r);
        const int64_t count = std::min(t1, s.out) - t0;
        if (count <= 0) continue;
        make_runs(l, strip, z, y, s, &runs);
        const int64_t vectors = ceil_div(count, l.width);
        const int64_t tiles = ceil_div(vectors, l.nv);
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t from = vectors * i / tiles * l.width;
          const int64_t pixels = std::min(vectors * (i + 1) / tiles * l.width, count) - from;
          const int64_t nv = ceil_div(pixels, l.width);
          const int64_t feature_tiles = ceil_div(p.k, std::min<int64_t>(l.mr, k.max_mr[nv]));
          for (int64_t f = 0; f < feature_tiles; ++f) {
            const int64_t k0 = p.k * f / feature_tiles;
            const int64_t features = p.k * (f + 1) / feature_tiles - k0;
            const int64_t at = n * p.y.n + g * p.y.g + oz * p.y.sp[0] + oy * p.y.sp[1] +
                               r * p.y.sp[2] + (t0 + from) * apart.y.sp[2] + k0 * p.y.k;
            GemmArgs args{};
            args.a = w + (g * p.k + k0) * reduction;
            args.a_row = reduction;
            args.a_step = 1;
            args.b = strip.data + from + (l.in_place ? t0 : 0);
            args.b_step = strip.channel;
            args.runs = runs.data();
            args.n_runs = static_cast<int64_t>(runs.size());
            args.cols = pixels;
            args.c = direct_store ? o.y + at : tile;
            args.c_row = direct_store ? p.y.k : nv * l.width;
            // In place, nothing of the input may follow the last pixel.
            (l.in_place ? k.strided : k.packed)[nv][features](&args);
            finish(apart, k, o, args.c, args.c_row, features, pixels, g, k0, at);
          }
        }
      }
    }
  });
  add_skipped_nonfinite(p, o, e);
}

std::string rejects(const Problem& p) {
  if (p.chunk_rows > 0) return "the reduction is chunked (weight gradient)";
  if (residue_period(p, 2) > 64) return "more than 64 residues of the output columns";
  return {};
}

Params defaults(const Problem& problem, const Target& t) {
  const Problem p = collapse(problem);
  const int64_t pixels = ceil_div(p.out[2], residue_period(p, 2));
  const Tile tile = best_tile(*t.kernels, p.k, pixels);
  Params params{};
  params[kPlanarMr] = tile.mr;
  params[kPlanarNv] = tile.nv;
  params[kPlanarRows] = 1;
  const auto strip = [&] { return make_layout(problem, t, params).strip_floats; };
  const int64_t limit =
      std::min(kStripLimit, caches().l2 / static_cast<int64_t>(sizeof(float)) / 2);
  while (strip() > limit) {
    const int64_t cols = params[kPlanarCols] == 0 ? pixels : params[kPlanarCols];
    const int64_t vector = tile.nv * t.kernels->width;
    if (cols <= vector) break;
    params[kPlanarCols] = round_up(ceil_div(cols, 2), vector);
    if (params[kPlanarCols] >= cols) break;
  }
  // Rows of a block share what they read: as many as fit, and a block for every thread.
  const int64_t threads = useful_threads(problem, t.threads);
  const int64_t most = ceil_div(p.out[1] * p.g * p.n * p.out[0], threads);
  for (const int64_t rows : {2, 4, 8, 16, 32}) {
    if (rows > std::min(most, p.out[1])) break;
    Params more = params;
    more[kPlanarRows] = rows;
    if (make_layout(problem, t, more).strip_floats > limit) break;
    params = more;
  }
  return params;
}

std::string check(const Problem& p, const Target& t, const Params& params) {
  const int64_t nv = params[kPlanarNv];
  if (nv < 1 || nv > kMaxNv || t.kernels->max_mr[nv] == 0) return "nv: no such tile";
  if (params[kPlanarMr] < 1 || params[kPlanarMr] > t.kernels->max_mr[nv]) return "mr: no such tile";
  if (params[kPlanarRows] < 0 || params[kPlanarCols] < 0) return "rows, cols: negative";
  Params least = params;
  least[kPlanarRows] = 1;
  const int64_t limit = std::max(kStripLimit, make_layout(p, t, least).strip_floats);
  if (make_layout(p, t, params).strip_floats > limit) {
    return "rows: the strip is larger than its limit";
  }
  return {};
}

int64_t workspace(const Problem& p, const Target& t, const Params& params) {
  const Layout l = make_layout(p, t, params);
  return l.w_floats + (l.strip_floats + round_up(l.tile_floats, 16)) * useful_threads(p, t.threads);
}

double cost(const Problem& problem, const Target& t, const Params& params) {
  const Layout l = make_layout(problem, t, params);
  const Problem& p = l.p;
  const auto as_double = [](int64_t v) { return static_cast<double>(v); };
  const Kernels& k = *t.kernels;
  const double rows = as_double(p.g * p.n * p.out[0] * p.out[1] * std::min(l.period, p.out[2]));
  double taps = as_double(p.reduction());
  for (int d = 0; d < 3; ++d) taps /= as_double(p.lhs_dilation[d]);
  const int64_t vectors = ceil_div(l.pixels, l.width);
  const int64_t tiles = ceil_div(vectors, l.nv);
  const int64_t nv = ceil_div(vectors, tiles);
  const int64_t feature_tiles = ceil_div(p.k, std::min<int64_t>(l.mr, k.max_mr[nv]));
  const int64_t mr = ceil_div(p.k, feature_tiles);
  // Vectors of the strip are not aligned: half of the loads touch two lines.
  const double step = tile_step_cycles(k, mr, nv) + 0.5 * as_double(nv);
  double total =
      rows * as_double(tiles * feature_tiles) * (taps * step + 20.0 + as_double(mr * nv));
  if (!l.in_place) {
    const double blocks = as_double(p.g * p.n * p.out[0] * l.row_blocks * l.col_blocks);
    const double floats = blocks * as_double(l.strip_floats);
    total += floats * (p.x.sp[2] == 1 && l.advance == 1 ? 2.0 / as_double(l.width) : 0.8);
  }
  if (l.period != 1 || p.y.sp[2] != 1) total += rows * as_double(l.pixels * p.k);
  return total + 2.0 * as_double(l.w_floats);
}

}  // namespace

const Algorithm& algorithm_planar() {
  static const Algorithm a{
      "planar",
      "output pixels as lanes over channel-planar strips of the input, filter broadcast",
      "this project; residues after arXiv 2209.03704",
      {{"mr", "output features of the register tile", {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16}},
       {"nv", "vectors of output pixels of the register tile", {1, 2, 3, 4}},
       {"rows", "output rows per block; 0: all", {1, 2, 4, 8, 16, 32}},
       {"cols", "output pixels of a residue per block; 0: the whole row", {0, 64, 128, 256}}},
      rejects,
      defaults,
      check,
      workspace,
      run,
      cost};
  return a;
}

}  // namespace jaxwin
