// SPDX-License-Identifier: Apache-2.0
//
// Scalar-matrix multiplication with zero packing (Ofir, Ben-Artzi: "SMM-Conv: Scalar Matrix
// Multiplication with Zero Packing for Accelerated Convolution", CVPR Workshops 2022). For a column
// v of the window, the input columns v, v + 1, ... under all outputs are copied, row below row
// without gaps. Then the pixels that window row u needs are one run of memory, u rows further down:
// moving a pointer takes the place of packing. A scalar of the filter times such a run is added to
// the plane of its feature. Vectors run on from row to row, so narrow images leave none of them
// half empty. The paper copies one channel at a time (Ho * Wo numbers and the window's rows) and
// walks over the window in it; the canonical chain has the channel innermost, so here all channels
// of a block of rows are copied for each v, and the sums go on from v to v. Several features and
// vectors of pixels are in registers. With a vertical stride the rows of each residue lie together.

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "algorithms/gemm_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {
namespace {

enum SmmParam { kSmmMr, kSmmNv, kSmmRows };

constexpr int64_t kStripBytes = 1 << 20;  // per thread

struct Layout {
  Problem p;  // collapsed
  int64_t mr, nv;
  int64_t rows;                     // output rows of a block
  int64_t phases;                   // residues of the input rows modulo the stride that are read
  int64_t slots;                    // rows of one residue in the copy
  int64_t channel;                  // floats of the copy per channel
  bool in_place;                    // output rows follow upon each other in y, pixel by pixel
  int64_t copy_floats, sum_floats;  // per thread
};

// Window rows u, u + period, ... read input rows of one residue modulo the stride: u reads row
// slot(u) + i of them for output row i.
int64_t period(const Problem& p) {
  return std::min(p.win[1], p.stride[1] / std::gcd(p.stride[1], p.rhs_dilation[1]));
}
int64_t slot(const Problem& p, int64_t u) { return u * p.rhs_dilation[1] / p.stride[1]; }

Layout make_layout(const Problem& problem, const Params& params) {
  Layout l{};
  l.p = collapse(problem);
  const Problem& p = l.p;
  l.mr = params[kSmmMr];
  l.nv = params[kSmmNv];
  l.rows = params[kSmmRows] == 0 ? p.out[1] : std::min(params[kSmmRows], p.out[1]);
  l.phases = period(p);
  l.slots = l.rows + slot(p, p.win[1] - 1);
  l.channel = l.phases * l.slots * p.out[2];
  l.in_place = p.y.sp[2] == 1 && (p.y.sp[1] == p.out[2] || p.out[1] == 1);
  l.copy_floats = round_up(p.win[0] * p.c * l.channel, 16);
  l.sum_floats = l.in_place ? 0 : round_up(p.k * l.rows * p.out[2], 16);
  return l;
}

// Column v of the windows of output rows [y0, y0 + rows): dst[window z][channel][residue][row][x].
void fill(const Layout& l, const Kernels& k, ConstPtr x, int64_t v, int64_t oz, int64_t y0,
          int64_t rows, Ptr dst) {
  const Problem& p = l.p;
  const int64_t first = v * p.rhs_dilation[2] - p.pad[2];  // what output pixel 0 reads
  const int64_t begin =
      std::clamp<int64_t>(first >= 0 ? 0 : ceil_div(-first, p.stride[2]), 0, p.out[2]);
  const int64_t end = p.in[2] <= first
                          ? begin
                          : std::clamp(ceil_div(p.in[2] - first, p.stride[2]), begin, p.out[2]);
  const int64_t slots = l.slots - l.rows + rows;
  for (int64_t z = 0; z < p.win[0]; ++z) {
    const int64_t iz = oz * p.stride[0] - p.pad[0] + z * p.rhs_dilation[0];
    for (int64_t phase = 0; phase < l.phases; ++phase) {
      for (int64_t s = 0; s < slots; ++s) {
        const int64_t iy =
            (y0 + s) * p.stride[1] + phase * p.rhs_dilation[1] % p.stride[1] - p.pad[1];
        const Ptr to = dst + z * p.c * l.channel + (phase * l.slots + s) * p.out[2];
        const bool real = iz >= 0 && iz < p.in[0] && iy >= 0 && iy < p.in[1] && end > begin;
        if (real) {
          k.copy(to + begin, l.channel,
                 x + iz * p.x.sp[0] + iy * p.x.sp[1] + (first + begin * p.stride[2]) * p.x.sp[2],
                 p.x.c, p.stride[2] * p.x.sp[2], p.c, end - begin);
        }
        for (int64_t c = 0; c < p.c && !(real && begin == 0 && end == p.out[2]); ++c) {
          (to + c * l.channel).zero(real ? begin : p.out[2]);
          if (real) (to + c * l.channel + end).zero(p.out[2] - end);
        }
      }
    }
  }
}

void run(const Problem& problem, const Params& params, const Operands& o, const Execution& e) {
  const Layout l = make_layout(problem, params);
  const Problem& p = l.p;
  const Kernels& k = *e.target.kernels;
  const int64_t blocks = ceil_div(p.out[1], l.rows);
  // The runs of one column of the window, in the order of the reduction.
  std::vector<Run> runs;
  for (int64_t u = 0; u < p.win[1]; ++u) {
    const int64_t row = u % l.phases * l.slots + slot(p, u);
    for (int64_t z = 0; z < p.win[0]; ++z) {
      runs.push_back({u * p.w.sp[1] + z * p.w.sp[0], z * p.c * l.channel + row * p.out[2], p.c});
    }
  }
  useful_pool(problem, e).run(p.g * p.n * p.out[0] * blocks, [&](int64_t task, int64_t worker) {
    const int64_t y0 = task % blocks * l.rows;
    const int64_t rows = std::min(l.rows, p.out[1] - y0);
    const int64_t oz = task / blocks % p.out[0];
    const int64_t n = task / blocks / p.out[0] % p.n;
    const int64_t g = task / blocks / p.out[0] / p.n;
    const Ptr copy = e.workspace + worker * (l.copy_floats + l.sum_floats);
    const ConstPtr x = o.x + n * p.x.n + g * p.x.g;
    const int64_t at = n * p.y.n + g * p.y.g + oz * p.y.sp[0] + y0 * p.y.sp[1];
    const Ptr sums = l.in_place ? o.y + at : copy + l.copy_floats;
    const int64_t pixels = rows * p.out[2];
    GemmArgs args{};
    args.runs = runs.data();
    args.n_runs = static_cast<int64_t>(runs.size());
    args.a_row = p.w.k;
    args.a_step = p.w.c;
    args.b_step = l.channel;
    args.c_row = l.in_place ? p.y.k : l.rows * p.out[2];
    const int64_t vectors = ceil_div(pixels, k.width);
    const int64_t tiles = ceil_div(vectors, l.nv);
    for (int64_t v = 0; v < p.win[2]; ++v) {
      fill(l, k, x, v, oz, y0, rows, copy);
      args.load = v > 0 ? 1 : 0;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t j0 = vectors * i / tiles * k.width;
        args.cols = std::min(vectors * (i + 1) / tiles * k.width, pixels) - j0;
        args.b = copy + j0;
        const int64_t nv = ceil_div(args.cols, k.width);
        const int64_t row_tiles = ceil_div(p.k, std::min<int64_t>(l.mr, k.max_mr[nv]));
        for (int64_t f = 0; f < row_tiles; ++f) {
          const int64_t m0 = p.k * f / row_tiles;
          args.a = o.w + g * p.w.g + v * p.w.sp[2] + m0 * p.w.k;
          args.c = sums + m0 * args.c_row + j0;
          k.strided[nv][p.k * (f + 1) / row_tiles - m0](&args);
        }
      }
    }
    if (l.in_place && !o.has_epilogue()) return;
    for (int64_t r = 0; r < rows; ++r) {
      finish_planes(p, k, o, sums + r * p.out[2], args.c_row, p.k, p.out[2], g, 0,
                    at + r * p.y.sp[1]);
    }
  });
}

std::string rejects(const Problem& p) {
  if (p.dilated_input()) return "lhs_dilation > 1";
  if (p.chunk_rows > 0) return "the reduction is chunked (weight gradient)";
  if (!p.plain()) return "filters are read in place";
  return {};
}

Params defaults(const Problem& problem, const Target& t) {
  const Problem p = collapse(problem);
  Params params{};
  params[kSmmMr] = params[kSmmNv] = 1;
  // A copy and its sums that stay in the second-level cache, and a block for every thread.
  const int64_t limit = std::min(kStripBytes, caches().l2 / 2) / t.kernels->size;
  const int64_t others = p.g * p.n * p.out[0];
  const int64_t threads = useful_threads(problem, t.threads);
  int64_t rows = ceil_div(p.out[1], std::min(p.out[1], ceil_div(threads, others)));
  for (; rows > 1; rows = ceil_div(rows, 2)) {
    params[kSmmRows] = rows;
    const Layout l = make_layout(problem, params);
    if (l.copy_floats + p.k * rows * p.out[2] <= limit) break;
  }
  params[kSmmRows] = rows;
  const Tile tile = best_tile(*t.kernels, p.k, rows * p.out[2]);
  params[kSmmMr] = tile.mr;
  params[kSmmNv] = tile.nv;
  return params;
}

std::string check(const Problem& p, const Target& t, const Params& params) {
  const int64_t nv = params[kSmmNv];
  if (nv < 1 || nv > kMaxNv || t.kernels->max_mr[nv] == 0) return "nv: no such tile";
  if (params[kSmmMr] < 1 || params[kSmmMr] > t.kernels->max_mr[nv]) return "mr: no such tile";
  if (params[kSmmRows] < 0) return "rows: negative";
  Params least = params;
  least[kSmmRows] = 1;
  const auto floats = [&](const Params& q) {
    const Layout l = make_layout(p, q);
    return l.copy_floats + l.sum_floats;
  };
  if (floats(params) > kStripBytes / t.kernels->size + floats(least)) {
    return "rows: the copy is larger than its limit";
  }
  return {};
}

int64_t workspace(const Problem& p, const Target& t, const Params& params) {
  const Layout l = make_layout(p, params);
  return (l.copy_floats + l.sum_floats) * useful_threads(p, t.threads);
}

double cost(const Problem& problem, const Target& t, const Params& params) {
  const Layout l = make_layout(problem, params);
  const Problem& p = l.p;
  const Kernels& k = *t.kernels;
  const auto as_double = [](int64_t v) { return static_cast<double>(v); };
  const double blocks = as_double(p.g * p.n * p.out[0] * ceil_div(p.out[1], l.rows) * p.win[2]);
  const double tiles = as_double(ceil_div(p.k, l.mr) * ceil_div(l.rows * p.out[2], l.nv * k.width));
  // Filters whose channels are neighbours are read as they lie; of others each step is on other
  // lines.
  const bool in_order = p.w.c == 1;
  const double step = in_order ? 1.15 * tile_step_cycles(k, l.mr, l.nv)
                               : 1.2 * (tile_step_cycles(k, l.mr, l.nv) + 0.5 * as_double(l.nv));
  const double products =
      tiles * (as_double(p.win[1] * p.win[0] * p.c) * step + 3.0 * as_double(l.mr * l.nv) + 20.0);
  const bool vectors = p.x.sp[2] == 1 && p.stride[2] == 1;
  const double copies =
      as_double(p.win[0] * p.c * l.channel) * (vectors ? 2.0 / as_double(k.width) : 0.8);
  // Where filters lie one after another (OIHW), every column of the window reads all of their
  // lines.
  const double w_bytes = as_double(p.k * p.reduction() * k.size);
  const bool window_last = std::abs(p.w.sp[2]) < std::max(p.w.c, p.w.k);
  const double read = window_last ? w_bytes : w_bytes / as_double(p.win[2]);
  const double filters = read / (w_bytes <= as_double(caches().l2 / 2) ? 32.0
                                 : in_order                            ? 24.0
                                 : p.w.c <= p.w.k                      ? 8.0
                                                                       : 2.0);
  return blocks * (products + 1.2 * (copies + filters));
}

}  // namespace

const Algorithm& algorithm_smm() {
  static const Algorithm a{
      "smm",
      "scalars of the filter times runs of the input, packed once per column of the window",
      "SMM-Conv, CVPR Workshops 2022, section 3",
      {kF32, kF64},
      {{"mr", "output features of the register tile", {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16}},
       {"nv", "vectors of output pixels of the register tile", {1, 2, 3, 4}},
       {"rows", "output rows per block; 0: all", {0, 1, 2, 4, 8, 16, 32}}},
      rejects,
      defaults,
      check,
      workspace,
      run,
      cost};
  return a;
}

}  // namespace jaxwin
