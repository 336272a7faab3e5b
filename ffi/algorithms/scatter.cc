// SPDX-License-Identifier: Apache-2.0
//
// Window positions and features as lanes: each input pixel is multiplied with all of its window and
// added to the sums of the outputs that it reaches (input stationary, where the other algorithms
// are output stationary). Three features of a 3x3 window are 27 lanes of two vectors where features
// alone would fill 3 of one, the input is read where it lies, once, and inserted zeros
// (lhs_dilation) are never met. Pays where features are few and channels many: input gradients of
// first layers, the last layers of generators.
//
// The canonical chain of an output goes over the window's columns, and down each of them. So the
// input is walked through column by column, and down each column: a pixel finds the sums of its
// outputs with all that comes before it. Only the sums of outputs under a column of the input are
// open at a time. They lie in a ring, sums[output row][output column modulo the window's
// width][feature], in which the outputs of a pixel are one run of memory, whose lanes the next
// column of the input meets turned by a column (`turns` of the filters).
//
// Elements that are not words are made words first, some columns of the input at a time.
//
// Pixels below each other share outputs and cannot be rows of one tile. Those of several bands of
// rows can (`walkers`; rows next to two bands are read for both), or those of several images.

#include <algorithm>
#include <vector>

#include "algorithms/gemm_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {
namespace {

constexpr int64_t kLineBytes = 64;   // of the caches
constexpr double kReadCycles = 0.2;  // that making an element a word takes

enum ScatterParam { kScatterMr, kScatterNv, kScatterCols, kScatterImages };

struct Layout {
  Problem p;  // collapsed
  int64_t mr, nv, width;
  bool images;      // walkers are images, not bands of rows
  int64_t rows;     // output rows of a walker
  int64_t cols;     // output columns of a task
  int64_t walkers;  // of a task
  int64_t groups;   // of walkers, in all images
  int64_t col_blocks;
  int64_t words;             // of an input pixel
  int64_t strip;             // columns of the input that become words together; 0: they are words
  int64_t in_image, in_row;  // strides of the input or the strip, from image to image, row to row
  int64_t in_col;            // from column to column
  int64_t row;               // floats of a row of sums
  int64_t lanes;             // a pixel's sums
  int64_t panel, panels;     // lanes of a tile
  int64_t turn;              // floats of the filters of a group, turned by one column
  int64_t w_floats;          // shared
  int64_t zero_floats;
  int64_t walker_floats, sum_floats, strip_floats;  // per thread
  int64_t thread_floats() const { return sum_floats + strip_floats; }
};

// The input positions along dimension d that reach outputs [o0, o1): [begin, end), maybe outside.
Range reaching(const Problem& p, int d, int64_t o0, int64_t o1) {
  const auto floor_div = [](int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); };
  const int64_t s = p.lhs_dilation[d];
  return {-floor_div(p.pad[d] - o0, s), floor_div(o1 - 1 - p.pad[d] + p.win[d] - 1, s) + 1};
}

// The first output that input position i reaches.
int64_t first_output(const Problem& p, int d, int64_t i) {
  return i * p.lhs_dilation[d] + p.pad[d] - (p.win[d] - 1);
}

int64_t modulo(int64_t a, int64_t b) { return (a % b + b) % b; }

Layout make_layout(const Problem& problem, const Target& t, const Params& params) {
  Layout l{};
  l.p = collapse(problem);
  const Problem& p = l.p;
  l.mr = params[kScatterMr];
  l.nv = params[kScatterNv];
  l.width = t.kernels->width;
  l.images = params[kScatterImages] != 0;
  // Walkers begin in the same way.
  const int64_t s = p.lhs_dilation[1];
  l.rows = round_up(l.images ? p.out[1] : ceil_div(p.out[1], l.mr), s);
  l.walkers = l.images ? std::min(l.mr, p.n) : ceil_div(p.out[1], l.rows);
  l.groups = l.images ? ceil_div(p.n, l.mr) : p.n;
  l.cols = params[kScatterCols] == 0 ? p.out[2] : std::min(params[kScatterCols], p.out[2]);
  l.col_blocks = ceil_div(p.out[2], l.cols);
  l.words = ceil_div(p.c, t.kernels->channels);
  l.in_image = p.x.n;
  l.in_row = p.x.sp[1];
  l.in_col = p.x.sp[2];
  if (!is_word(*t.kernels, p.dtype)) {
    // A quarter of the second-level cache.
    const int64_t limit = caches().l2 / 4 / t.kernels->size;
    const int64_t images = l.images ? l.walkers : 1;
    l.strip = std::clamp<int64_t>(limit / (images * p.in[1] * l.words), 1, p.in[2]);
    l.in_col = l.words;
    l.in_row = l.strip * l.in_col;
    l.in_image = p.in[1] * l.in_row;
    l.strip_floats = round_up(images * l.in_image, 16);
  }
  l.row = p.win[2] * p.k;
  l.lanes = p.win[1] * l.row;
  l.panel = l.nv * l.width;
  l.panels = ceil_div(l.lanes, l.panel);
  l.turn = l.panels * l.panel * l.words;
  l.w_floats = p.g * p.win[2] * l.turn;
  l.zero_floats = round_up(p.k, 16);
  // Sums of rows above and below those of the walker are begun and thrown away.
  l.walker_floats = round_up((l.rows + 2 * (p.win[1] - 1)) * l.row, 16);
  l.sum_floats = l.walkers * l.walker_floats;
  return l;
}

// The filters as panels, w[group][turn][panel][channel][lane], for input columns whose outputs
// begin in slot `turn` of the ring. Lanes are rows, slots, features of outputs; the further on, the
// earlier in the window.
void turn_filters(const Layout& l, const Kernels& k, ConstPtr w, Ptr to) {
  const Problem& p = l.p;
  to.zero(l.w_floats);
  const int64_t turns = p.win[2];
  const auto place = [&](int64_t g, int64_t turn, int64_t lane) {
    return to + ((g * turns + turn) * l.turn + lane / l.panel * l.panel * l.words + lane % l.panel);
  };
  const auto left = [](int64_t at, int64_t size) { return size - at % size; };
  int64_t made = -1;  // the first turn
  std::vector<bool> done(turns, false);
  for (int64_t q = 0; q < turns; ++q) {
    const int64_t turn = modulo(first_output(p, 2, q), turns);
    if (done[turn]) continue;
    done[turn] = true;
    int64_t count = 0;
    for (int64_t lane = 0; lane < l.lanes; lane += count) {
      const int64_t slot = lane % l.row / p.k;
      if (made < 0) {
        const int64_t u = p.win[1] - 1 - lane / l.row;
        const int64_t v = turns - 1 - modulo(slot - turn, turns);
        const ConstPtr from = w + (u * p.w.sp[1] + v * p.w.sp[2] + lane % p.k * p.w.k);
        count = std::min(left(lane, p.k), left(lane, l.panel));
        for (int64_t g = 0; g < p.g; ++g) {
          k.pack[p.dtype](place(g, turn, lane), l.panel, from + g * p.w.g, p.w.c, p.w.k, p.c,
                          count);
        }
        continue;
      }
      // The same lanes, turned within their row.
      const int64_t other =
          lane / l.row * l.row + modulo(slot - turn + made, turns) * p.k + lane % p.k;
      count = std::min(
          {left(lane, l.row), left(other, l.row), left(lane, l.panel), left(other, l.panel)});
      for (int64_t g = 0; g < p.g; ++g) {
        k.copy(place(g, turn, lane), l.panel, place(g, made, other), l.panel, 1, l.words, count);
      }
    }
    if (made < 0) made = turn;
  }
}

void run(const Problem& problem, const Params& params, const Operands& o, const Execution& e) {
  const Layout l = make_layout(problem, e.target, params);
  const Problem& p = l.p;
  const Kernels& k = *e.target.kernels;
  turn_filters(l, k, o.w, e.workspace);
  const Ptr zeros = e.workspace + l.w_floats;
  zeros.zero(l.zero_floats);
  Problem down = p;  // pixels below each other
  down.y.sp[2] = p.y.sp[1];
  const int64_t s = p.lhs_dilation[1];
  const int64_t line = kLineBytes / k.size;
  const Run whole{0, 0, l.words};

  useful_pool(problem, e).run(p.g * l.groups * l.col_blocks, [&](int64_t task, int64_t worker) {
    const int64_t x0 = task % l.col_blocks * l.cols;
    const int64_t x1 = std::min(x0 + l.cols, p.out[2]);
    const int64_t group = task / l.col_blocks % l.groups;
    const int64_t g = task / l.col_blocks / l.groups;
    const int64_t image = l.images ? group * l.mr : group;
    const int64_t walkers = l.images ? std::min(l.mr, p.n - image) : l.walkers;
    const Ptr sums = zeros + l.zero_floats + worker * l.thread_floats();
    const Ptr strip = sums + l.sum_floats;
    sums.zero(l.sum_floats);
    const ConstPtr x = o.x + image * p.x.n + g * p.x.g;
    const ConstPtr filters = e.workspace + g * p.win[2] * l.turn;

    // Walker i does in step t what the first one does, so many input rows further down.
    const int64_t apart = l.images ? 0 : l.rows / s;
    GemmArgs args{};
    args.runs = &whole;
    args.n_runs = 1;
    args.a_row = l.images ? l.in_image : apart * l.in_row;
    args.a_step = 1;
    args.b_step = l.panel;
    args.c_row = l.walker_floats;
    args.load = 1;
    args.ahead_step = line;
    // Those of them whose input row is real.
    struct Step {
      int64_t walkers, a, c;
    };
    std::vector<Step> steps;
    const Range rows = reaching(p, 1, 0, l.rows);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      int64_t begin = 0;
      int64_t end = 0;
      for (int64_t i = walkers; i-- > 0;) {
        const int64_t own = row + i * apart;
        if (own < 0 || own >= p.in[1]) continue;
        begin = i;
        end = std::max(end, i + 1);
      }
      if (end == 0) continue;
      steps.push_back({end - begin, begin * args.a_row + row * l.in_row,
                       begin * l.walker_floats + (first_output(p, 1, row) + p.win[1] - 1) * l.row});
    }
    // A tile of the first panel fetches what comes next in the row of one of its walkers.
    const int64_t fetched = std::max<int64_t>(1, line * p.c / p.x.sp[2]);
    const int64_t last_nv = ceil_div(l.lanes - (l.panels - 1) * l.panel, l.width);

    // Output columns [from, to) are complete.
    const auto finish = [&](int64_t from, int64_t to) {
      for (int64_t ox = from; ox < to; ++ox) {
        const Ptr slot = sums + ((p.win[1] - 1) * l.row + modulo(ox, p.win[2]) * p.k);
        for (int64_t i = 0; i < walkers; ++i) {
          const Ptr c = slot + i * l.walker_floats;
          const int64_t y0 = l.images ? 0 : i * l.rows;
          if (ox >= x0) {
            finish_rows(down, k, o, c, l.row, std::min(l.rows, p.out[1] - y0), p.k, g, 0,
                        (l.images ? image + i : image) * p.y.n + g * p.y.g + y0 * p.y.sp[1] +
                            ox * p.y.sp[2]);
          }
          k.copy(c, l.row, zeros, 0, 1, l.rows, p.k);
        }
      }
    };
    const Range q = reaching(p, 2, x0, x1);
    const int64_t begin = std::max<int64_t>(q.begin, 0);
    const int64_t end = std::min(q.end, p.in[2]);
    const auto make_words = [&](int64_t column, int64_t columns) {
      for (int64_t i = 0; i < (l.images ? walkers : 1); ++i) {
        for (int64_t row = 0; row < p.in[1]; ++row) {
          k.read[p.dtype](strip + (i * l.in_image + row * l.in_row), l.in_col,
                          x + (i * p.x.n + row * p.x.sp[1] + column * p.x.sp[2]), p.x.sp[2], 1,
                          columns, p.c);
        }
      }
    };
    int64_t done = std::min(x0, first_output(p, 2, begin));
    for (int64_t column = begin; column < end; ++column) {
      const int64_t first = first_output(p, 2, column);
      finish(done, std::min(first, x1));
      done = std::max(done, first);
      const ConstPtr b = filters + modulo(first, p.win[2]) * l.turn;
      ConstPtr pixels = x + column * p.x.sp[2];
      if (l.strip > 0) {
        const int64_t at = (column - begin) % l.strip;
        if (at == 0) make_words(column, std::min(l.strip, end - column));
        pixels = strip + at * l.in_col;
      }
      const int64_t fetcher = column % fetched;
      for (const Step& step : steps) {
        args.a = pixels + step.a;
        for (int64_t panel = 0; panel < l.panels; ++panel) {
          args.cols = std::min(l.panel, l.lanes - panel * l.panel);
          args.b = b + panel * l.panel * l.words;
          args.c = sums + step.c + panel * l.panel;
          const int64_t nv = panel + 1 < l.panels ? l.nv : last_nv;
          if (l.strip == 0 && panel == 0 && fetcher < step.walkers &&
              k.ahead[nv][step.walkers] != nullptr) {
            args.ahead = pixels + (step.a + fetcher * args.a_row + p.x.sp[2]);
            k.ahead[nv][step.walkers](&args);
          } else {
            k.packed[nv][step.walkers](&args);
          }
        }
      }
    }
    finish(done, x1);
  });
  add_skipped_nonfinite(problem, o, e);
}

std::string rejects(const Problem& problem) {
  const Problem p = collapse(problem);
  if (p.chunk_rows > 0) return "the reduction is chunked (weight gradient)";
  if (p.x.c != 1 && p.c > 1) return "channels are not neighbours";
  if (p.win[0] > 1 || p.out[0] > 1 || p.in[0] > 1) return "three dimensions";
  for (int d = 1; d < 3; ++d) {
    if (p.stride[d] > 1 && p.out[d] > 1) return "stride > 1";
    if (p.rhs_dilation[d] > 1 && p.win[d] > 1) return "rhs_dilation > 1";
  }
  return {};
}

double cost(const Problem& problem, const Target& t, const Params& params) {
  const Layout l = make_layout(problem, t, params);
  const Problem& p = l.p;
  const auto as_double = [](int64_t v) { return static_cast<double>(v); };
  const auto steps = [&](int d, int64_t outputs) {
    const Range r = reaching(p, d, 0, outputs);
    return as_double(std::min(r.end - r.begin, p.in[d]));
  };
  const double rows = steps(1, l.rows);
  const double tiles = as_double(p.g * l.groups * l.col_blocks) * rows * steps(2, l.cols);
  const auto vectors = as_double(ceil_div(l.lanes, l.width));
  const auto walkers = as_double(l.walkers);
  double products =
      std::max(walkers * vectors / 2.0, 4.0 * as_double(l.panels)) * as_double(l.words);
  // Lines that share a set of the first-level cache; more lines ahead than the second-level cache
  // holds.
  const int64_t apart =
      (l.images ? l.in_image : l.rows / p.lhs_dilation[1] * l.in_row) * t.kernels->size;
  const double ahead = l.strip > 0 ? 0 : walkers * rows * as_double(p.c) * kLineBytes;
  if (l.walkers > 8 && apart % 4096 == 0) products *= 1.5;
  if (ahead > as_double(caches().l2)) products *= 1.7;
  // Each tile reads the filters anew.
  products += refetch_cycles(p.k * p.reduction() * t.kernels->size,
                             as_double(l.lanes * l.words * t.kernels->size));
  const double outputs = as_double(p.g * p.n * p.pixels()) * (6.0 + 2.0 * as_double(p.k));
  const double reads =
      l.strip > 0 ? as_double(p.g * p.n * p.in[1] * p.in[2] * l.words) * kReadCycles : 0;
  return 1.6 * (tiles * (products + 120.0 * as_double(l.panels) + 4.0 * walkers * vectors) +
                outputs + reads + as_double(l.w_floats));
}

Params defaults(const Problem& problem, const Target& t) {
  const Kernels& k = *t.kernels;
  const Problem p = collapse(problem);
  Params best{};
  double least = 0;
  const int64_t tasks = useful_threads(problem, t.threads);
  for (int64_t nv = 1; nv <= kMaxNv; ++nv) {
    for (int64_t mr = 1; mr <= k.max_mr[nv]; ++mr) {
      for (const int64_t images : {0, 1}) {
        if (images != 0 && p.n == 1) continue;
        Params params{};
        params[kScatterMr] = mr;
        params[kScatterNv] = nv;
        params[kScatterImages] = images;
        const Layout l = make_layout(problem, t, params);
        // A block for every thread.
        const int64_t blocks = std::min(p.out[2], ceil_div(tasks, p.g * l.groups));
        params[kScatterCols] = blocks == 1 ? 0 : ceil_div(p.out[2], blocks);
        const double cycles = cost(problem, t, params);
        if (best[kScatterMr] != 0 && cycles >= least) continue;
        least = cycles;
        best = params;
      }
    }
  }
  return best;
}

std::string check(const Problem&, const Target& t, const Params& params) {
  // (Tiles of fewer vectors can be as high.)
  const int64_t nv = params[kScatterNv];
  if (nv < 1 || nv > kMaxNv || t.kernels->max_mr[nv] == 0) return "nv: no such tile";
  if (params[kScatterMr] < 1 || params[kScatterMr] > t.kernels->max_mr[nv]) {
    return "mr: no such tile";
  }
  if (params[kScatterCols] < 0) return "cols: negative";
  if (params[kScatterImages] != 0 && params[kScatterImages] != 1) return "images: 0 or 1";
  return {};
}

int64_t workspace(const Problem& p, const Target& t, const Params& params) {
  const Layout l = make_layout(p, t, params);
  return l.w_floats + l.zero_floats + l.thread_floats() * useful_threads(p, t.threads);
}

}  // namespace

const Algorithm& algorithm_scatter() {
  static const Algorithm a{
      "scatter",
      "window positions and features as lanes: each input pixel is added to all outputs it reaches",
      "this project",
      {kF32, kF64, kBF16, kF16, kS8, kU8},
      {{"mr",
        "walkers: pixels of bands of rows, or of images, in the register tile",
        {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16}},
       {"nv", "vectors of window positions and features of the register tile", {1, 2, 3, 4}},
       {"cols", "output columns per task; 0: all", {0, 16, 32, 64, 128}},
       {"images", "1: the walkers are images; 0: bands of rows of one", {0, 1}}},
      rejects,
      defaults,
      check,
      workspace,
      run,
      cost};
  return a;
}

}  // namespace jaxwin
