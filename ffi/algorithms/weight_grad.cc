// SPDX-License-Identifier: Apache-2.0
//
// Convolutions whose rows are "images": what lax's transpose makes of a weight gradient. There the
// window is the output gradient, an image is an input channel, and
//   y[n, k, u] = sum over c and window positions i of x[n, c, u * stride + i * rhs_dilation] * w[k,
//   c, i]
// is an outer product of an input row and a gradient row, summed over pixels. The micro-kernel
// takes MR images (input channels: neighbours in memory) by NR features, and walks along window
// rows in place: no transform. Inserted zeros (lhs_dilation: the gradient of a transposed
// convolution) and padding are skipped, not multiplied.
//
// The reduction follows Problem::chunk_rows: either the canonical chain or chunks of whole rows.

#include <algorithm>
#include <cstring>

#include "algorithms/gemm_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {
namespace {

enum GradParam { kGradMr, kGradNv };

struct Layout {
  int64_t mr, nv, panel, panels;
  bool chunked;
  int64_t window_rows;  // c * z * y rows of the window, if chunked
  int64_t chunk_rows, chunks;
  bool merged;     // rows run over (u_x, n): Kw * C neighbours
  int64_t rows;    // of one output position: n, or n * out_x
  Dim3 positions;  // output positions that are walked one by one
  bool pack_w;     // features of w are not contiguous: rows are copied per chunk
  bool buffered;   // features of y are not contiguous
  int64_t tasks_row_tiles;
  int64_t w_floats, y_floats;
};

Layout make_layout(const Problem& p, const Target& t, const Params& params) {
  Layout l;
  l.mr = params[kGradMr];
  l.nv = params[kGradNv];
  l.panel = l.nv * t.kernels->width;
  l.panels = ceil_div(p.k, l.panel);
  l.chunked = p.chunk_rows > 0;
  l.window_rows = p.c * p.win[0] * p.win[1];
  l.chunk_rows = l.chunked ? std::min(p.chunk_rows, l.window_rows) : l.window_rows;
  l.chunks = l.chunked ? ceil_div(l.window_rows, l.chunk_rows) : 1;
  const int64_t span = (p.win[2] - 1) * p.rhs_dilation[2] + (p.out[2] - 1) * p.stride[2] + 1;
  const bool inside = p.pad[2] <= 0 && span - p.pad[2] <= p.in[2] && p.lhs_dilation[2] == 1;
  l.buffered = p.y.k != 1;
  l.merged = inside && p.n < 2 * l.mr && p.out[2] > 1 && p.stride[2] * p.x.sp[2] == p.n * p.x.n &&
             (l.buffered || p.y.sp[2] == p.n * p.y.n);
  l.rows = l.merged ? p.n * p.out[2] : p.n;
  l.positions = p.out;
  if (l.merged) l.positions[2] = 1;
  l.pack_w = p.w.k != 1;
  l.w_floats = l.pack_w ? round_up(p.g * p.reduction() * p.k, 16) : 0;
  l.y_floats = l.buffered ? round_up(p.g * p.n * p.pixels() * p.k, 16) : 0;
  return l;
}

// w seen with contiguous features: w itself or the packed copy.
struct Filter {
  const float* data;
  int64_t g, c;
  Dim3 sp;
};

void make_runs(const Problem& p, const Layout& l, const Filter& w, const Dim3& at, int64_t chunk,
               std::vector<Run>* runs, int64_t* a_step, int64_t* b_step) {
  runs->clear();
  Progression in[3];
  for (int d = 0; d < 3; ++d) in[d] = window_positions(p, d, at[d]);
  if (in[2].n == 0 || in[1].n == 0 || in[0].n == 0) return;
  if (l.chunked) {  // (c, z, y) rows of this chunk, along x
    *a_step = in[2].at_step * p.x.sp[2];
    *b_step = in[2].step * w.sp[2];
    const int64_t first = chunk * l.chunk_rows;
    const int64_t last = std::min(first + l.chunk_rows, l.window_rows);
    for (int64_t row = first; row < last; ++row) {
      const int64_t y = row % p.win[1];
      const int64_t z = row / p.win[1] % p.win[0];
      const int64_t c = row / p.win[1] / p.win[0];
      const int64_t ty = y - in[1].first;
      const int64_t tz = z - in[0].first;
      if (ty < 0 || ty % in[1].step != 0 || ty / in[1].step >= in[1].n) continue;
      if (tz < 0 || tz % in[0].step != 0 || tz / in[0].step >= in[0].n) continue;
      const int64_t iy = in[1].at + ty / in[1].step * in[1].at_step;
      const int64_t iz = in[0].at + tz / in[0].step * in[0].at_step;
      runs->push_back({c * p.x.c + iz * p.x.sp[0] + iy * p.x.sp[1] + in[2].at * p.x.sp[2],
                       c * w.c + z * w.sp[0] + y * w.sp[1] + in[2].first * w.sp[2], in[2].n});
    }
    return;
  }
  *a_step = p.x.c;
  *b_step = w.c;
  for (int64_t tx = 0; tx < in[2].n; ++tx) {
    for (int64_t ty = 0; ty < in[1].n; ++ty) {
      for (int64_t tz = 0; tz < in[0].n; ++tz) {
        runs->push_back({(in[2].at + tx * in[2].at_step) * p.x.sp[2] +
                             (in[1].at + ty * in[1].at_step) * p.x.sp[1] +
                             (in[0].at + tz * in[0].at_step) * p.x.sp[0],
                         (in[2].first + tx * in[2].step) * w.sp[2] +
                             (in[1].first + ty * in[1].step) * w.sp[1] +
                             (in[0].first + tz * in[0].step) * w.sp[0],
                         p.c});
      }
    }
  }
}

std::string rejects(const Problem&) { return {}; }

Params defaults(const Problem& p, const Target& t) {
  Params params{};
  const Tile tile = best_tile(*t.kernels, std::max<int64_t>(p.n, 1), p.k);
  params[kGradMr] = tile.mr;
  params[kGradNv] = tile.nv;
  const Layout l = make_layout(p, t, params);
  if (l.merged) {
    const Tile merged = best_tile(*t.kernels, l.rows, p.k);
    params[kGradMr] = merged.mr;
    params[kGradNv] = merged.nv;
    if (!make_layout(p, t, params).merged) return {tile.mr, tile.nv};
  }
  return params;
}

std::string check(const Problem&, const Target& t, const Params& params) {
  const int64_t nv = params[kGradNv];
  if (nv < 1 || nv > kMaxNv || t.kernels->max_mr[nv] == 0) return "nv: no such tile";
  if (params[kGradMr] < 1 || params[kGradMr] > t.kernels->max_mr[nv]) return "mr: no such tile";
  return {};
}

int64_t workspace(const Problem& p, const Target& t, const Params& params) {
  const Layout l = make_layout(p, t, params);
  return l.w_floats + l.y_floats;
}

void run(const Problem& p, const Params& params, const Operands& o, const Execution& e) {
  const Layout l = make_layout(p, e.target, params);
  const Kernels& k = *e.target.kernels;
  const Threads pool = e.pool->limited(useful_threads(p, e.target.threads));

  Filter w{o.w, p.w.g, p.w.c, p.w.sp};
  if (l.pack_w) {  // [g][c][z][y][x][k]
    float* packed = e.workspace;
    const int64_t window = p.window();
    pool.run(p.g * p.c * p.win[0] * p.win[1], [&](int64_t task, int64_t) {
      const int64_t y = task % p.win[1];
      const int64_t z = task / p.win[1] % p.win[0];
      const int64_t c = task / p.win[1] / p.win[0] % p.c;
      const int64_t g = task / p.win[1] / p.win[0] / p.c;
      const float* from = o.w + g * p.w.g + c * p.w.c + z * p.w.sp[0] + y * p.w.sp[1];
      k.copy(packed + task * p.win[2] * p.k, p.k, from, p.w.sp[2], p.w.k, p.win[2], p.k);
    });
    w = {
        packed, p.c * window * p.k, window * p.k, {p.win[1] * p.win[2] * p.k, p.win[2] * p.k, p.k}};
  }
  // y seen with contiguous features: y itself or a buffer [g][z][y][x][n][k].
  float* y = o.y;
  int64_t y_g = p.y.g, y_n = p.y.n;
  Dim3 y_sp = p.y.sp;
  if (l.buffered) {
    y = e.workspace + l.w_floats;
    y_n = p.k;
    y_sp = {p.out[1] * p.out[2] * p.n * p.k, p.out[2] * p.n * p.k, p.n * p.k};
    y_g = p.pixels() * p.n * p.k;
  }

  // Tiles in the order (group, output position, rows, features); each task owns a contiguous part
  // and walks it once per chunk, so that a chunk's rows are used while they are in the cache.
  const int64_t row_tiles = ceil_div(l.rows, l.mr);
  const int64_t per_position = row_tiles * l.panels;
  const int64_t positions = l.positions[0] * l.positions[1] * l.positions[2];
  const int64_t total = p.g * positions * per_position;
  const int64_t tasks = std::min(total, pool.count());
  pool.run(tasks, [&](int64_t task, int64_t) {
    const int64_t begin = total * task / tasks;
    const int64_t end = total * (task + 1) / tasks;
    std::vector<Run> runs;
    GemmArgs args{};
    for (int64_t chunk = 0; chunk < l.chunks; ++chunk) {
      int64_t at_position = -1;
      Dim3 at{};
      int64_t g = 0;
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t position = tile / per_position;
        if (position != at_position) {
          at_position = position;
          g = position / positions;
          const int64_t u = position % positions;
          at = {u / l.positions[2] / l.positions[1], u / l.positions[2] % l.positions[1],
                u % l.positions[2]};
          make_runs(p, l, w, at, chunk, &runs, &args.a_step, &args.b_step);
        }
        const int64_t within = tile % per_position;
        // Features outermost: a panel of w stays in the cache while the rows go by.
        const int64_t panel = within / row_tiles;
        const int64_t t = within % row_tiles;
        const int64_t i0 = l.rows * t / row_tiles;
        const int64_t mr = l.rows * (t + 1) / row_tiles - i0;
        const int64_t features = std::min(l.panel, p.k - panel * l.panel);
        args.a = o.x + g * p.x.g + i0 * p.x.n;
        args.a_row = p.x.n;
        args.b = w.data + g * w.g + panel * l.panel;
        args.runs = runs.data();
        args.n_runs = static_cast<int64_t>(runs.size());
        args.c = y + g * y_g + at[0] * y_sp[0] + at[1] * y_sp[1] + at[2] * y_sp[2] + i0 * y_n +
                 panel * l.panel;
        args.c_row = y_n;
        args.cols = features;
        args.add = chunk > 0 ? 1 : 0;
        k.strided[ceil_div(features, k.width)][mr](&args);
      }
    }
  });

  if (l.buffered || o.has_epilogue()) {
    Problem rows = p;  // finish_rows walks output pixels: here images take that place
    rows.y.sp[2] = p.y.n;
    pool.run(p.g * p.pixels(), [&](int64_t task, int64_t) {
      const int64_t u = task % p.pixels();
      const int64_t g = task / p.pixels();
      const Dim3 at{u / p.out[2] / p.out[1], u / p.out[2] % p.out[1], u % p.out[2]};
      const int64_t from = g * y_g + at[0] * y_sp[0] + at[1] * y_sp[1] + at[2] * y_sp[2];
      const int64_t to = g * p.y.g + at[0] * p.y.sp[0] + at[1] * p.y.sp[1] + at[2] * p.y.sp[2];
      finish_rows(rows, k, o, y + from, y_n, p.n, p.k, g, 0, to);
    });
  }
  add_skipped_nonfinite(p, o, e);
}

double cost(const Problem& p, const Target& t, const Params& params) {
  const Layout l = make_layout(p, t, params);
  const double mr = static_cast<double>(l.mr);
  const double nv = static_cast<double>(l.nv);
  const double tiles = static_cast<double>(p.g * l.positions[0] * l.positions[1] * l.positions[2] *
                                           ceil_div(l.rows, l.mr) * l.panels);
  const double step = tile_step_cycles(*t.kernels, l.mr, l.nv);
  const double reduction = p.flops() / 2 / static_cast<double>(p.n * p.g * p.k * p.pixels());
  double total = tiles * (reduction * step * 1.15 + mr * nv);
  if (l.pack_w) total += static_cast<double>(l.w_floats);
  return total;
}

}  // namespace

const Algorithm& algorithm_weight_grad() {
  static const Algorithm a{
      "weight_grad",
      "rows are images: outer products of input rows and gradient rows, no transform",
      "canonical order of the reduction: numerical contract, chunked sums",
      {{"mr", "rows (images) of the register tile", {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16}},
       {"nv", "vectors of features of the register tile", {1, 2, 3, 4}}},
      rejects,
      defaults,
      check,
      workspace,
      run,
      cost};
  return a;
}

}  // namespace jaxwin
