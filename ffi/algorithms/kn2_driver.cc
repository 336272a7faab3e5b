// SPDX-License-Identifier: Apache-2.0

#include "algorithms/kn2_driver.h"

#include <algorithm>

#include "algorithms/gemm_driver.h"

namespace jaxwin {
namespace {

// Whether pixels are lanes; whether the products of a window position go to a temporary first.
bool by_rows(Kn2 form) { return form == Kn2::kRowAa || form == Kn2::kRowAs; }
bool shifted(Kn2 form) { return form == Kn2::kRowAs || form == Kn2::kColAs; }

struct Layout {
  Problem p;  // collapsed
  int64_t mr, nv, panel;
  int64_t kc;             // channels that are multiplied, and copied, at a time
  int64_t all_rows;       // n * z * y
  int64_t rows;           // output rows of a task
  bool copied;            // what the lanes read is copied: pixels that lie apart, or features
  int64_t copy_floats;    // per thread
  bool turned;            // filters are copied, channels next to each other
  int64_t filter_floats;  // per thread
  bool whole;             // shifted: all pixels of an image are multiplied as one row
  int64_t sum_floats;     // shifted: the temporary
};

Layout make_layout(const Problem& problem, const Target& t, const Params& params, Kn2 form) {
  Layout l{};
  l.p = collapse(problem);
  const Problem& p = l.p;
  l.mr = params[kKn2Mr];
  l.nv = params[kKn2Nv];
  l.panel = l.nv * t.kernels->width;
  l.kc = params[kKn2Kc] == 0 ? p.c : std::min(params[kKn2Kc], p.c);
  l.all_rows = p.n * p.out[0] * p.out[1];
  l.rows = params[kKn2Rows] == 0 ? ceil_div(l.all_rows, useful_threads(problem, t.threads))
                                 : std::min(params[kKn2Rows], l.all_rows);
  l.copied = by_rows(form) ? p.x.sp[2] != 1 || p.stride[2] != 1 : p.w.k != 1;
  l.turned = by_rows(form) && p.w.c != 1 && p.w.k != 1 && p.c > 1;
  if (shifted(form)) {
    l.whole = p.stride == Dim3{1, 1, 1} && !(by_rows(form) && l.copied) &&
              p.x.sp[1] == p.in[2] * p.x.sp[2] &&
              (p.in[0] == 1 || p.x.sp[0] == p.in[1] * p.x.sp[1]);
    l.sum_floats = round_up(p.k * ceil_div(p.in[0], p.stride[0]) * ceil_div(p.in[1], p.stride[1]) *
                                ceil_div(p.in[2], p.stride[2]),
                            16);
  }
  if (shifted(form) && !l.whole) l.turned = false;  // each row would copy them anew
  if (l.turned) l.filter_floats = round_up(l.kc * p.k, 16);
  const int64_t row = shifted(form) ? ceil_div(p.in[2], p.stride[2]) : p.out[2];
  if (l.copied) l.copy_floats = round_up(l.kc * (by_rows(form) ? row : l.panel), 16);
  return l;
}

// What window position `tap`, counted in the order of the reduction, reads.
struct Tap {
  int64_t z, y, x;  // of the window
  int64_t w;        // its filters, from o.w
  int64_t j0, j1;   // the output pixels for which it is inside the input, along x
};
Tap make_tap(const Problem& p, int64_t tap) {
  Tap t{};
  t.z = tap % p.win[0];
  t.y = tap / p.win[0] % p.win[1];
  t.x = tap / (p.win[0] * p.win[1]);
  t.w = t.z * p.w.sp[0] + t.y * p.w.sp[1] + t.x * p.w.sp[2];
  const int64_t first = t.x * p.rhs_dilation[2] - p.pad[2];  // what output pixel 0 reads
  t.j0 = std::clamp<int64_t>(first >= 0 ? 0 : ceil_div(-first, p.stride[2]), 0, p.out[2]);
  t.j1 = p.in[2] <= first ? 0 : std::min(p.out[2], ceil_div(p.in[2] - first, p.stride[2]));
  t.j1 = std::max(t.j0, t.j1);
  return t;
}

// The pixel of the input that output pixel `j` of output row `row` reads through a window position,
// or null where that row is padding.
ConstPtr input(const Problem& p, const Operands& o, const Tap& t, int64_t g, int64_t row,
               int64_t j) {
  const int64_t oy = row % p.out[1];
  const int64_t oz = row / p.out[1] % p.out[0];
  const int64_t iz = oz * p.stride[0] - p.pad[0] + t.z * p.rhs_dilation[0];
  const int64_t iy = oy * p.stride[1] - p.pad[1] + t.y * p.rhs_dilation[1];
  if (iz < 0 || iz >= p.in[0] || iy < 0 || iy >= p.in[1]) return {};
  return o.x + row / p.out[1] / p.out[0] * p.x.n + g * p.x.g + iz * p.x.sp[0] + iy * p.x.sp[1] +
         (j * p.stride[2] - p.pad[2] + t.x * p.rhs_dilation[2]) * p.x.sp[2];
}

int64_t output(const Problem& p, int64_t g, int64_t row) {
  return row / p.out[1] / p.out[0] * p.y.n + g * p.y.g + row / p.out[1] % p.out[0] * p.y.sp[0] +
         row % p.out[1] * p.y.sp[1];
}

// c[m][n] += a[m] * b[n] for `rows` x `cols` in tiles; args has everything but those.
void product(const Layout& l, const Kernels& k, GemmArgs args, ConstPtr a, ConstPtr b, Ptr c,
             int64_t rows, int64_t cols) {
  const int64_t vectors = ceil_div(cols, k.width);
  const int64_t col_tiles = ceil_div(vectors, l.nv);
  args.n_runs = 1;
  for (int64_t i = 0; i < col_tiles; ++i) {
    const int64_t n0 = vectors * i / col_tiles * k.width;
    args.cols = std::min(vectors * (i + 1) / col_tiles * k.width, cols) - n0;
    const int64_t nv = ceil_div(args.cols, k.width);
    const int64_t row_tiles = ceil_div(rows, std::min<int64_t>(l.mr, k.max_mr[nv]));
    args.b = b + n0;
    for (int64_t f = 0; f < row_tiles; ++f) {
      const int64_t m0 = rows * f / row_tiles;
      args.a = a + m0 * args.a_row;
      args.c = c + m0 * args.c_row + n0;
      k.strided[nv][rows * (f + 1) / row_tiles - m0](&args);
    }
  }
}

// Channels c0 ... of the filters of one window position as rows of features, in place or copied.
ConstPtr channels_of(const Layout& l, const Kernels& k, ConstPtr w, int64_t c0, int64_t channels,
                     Ptr filters, GemmArgs* args) {
  const Problem& p = l.p;
  const ConstPtr from = w + c0 * p.w.c;
  args->a_row = l.turned ? channels : p.w.k;
  args->a_step = l.turned ? 1 : p.w.c;
  if (!l.turned) return from;
  k.copy(filters, channels, from, p.w.k, p.w.c, p.k, channels);
  return filters;
}

// The results of one output row, in y.
void zero_row(const Problem& p, Ptr y, Kn2 form) {
  const bool rows = by_rows(form);
  for (int64_t i = 0; i < (rows ? p.k : p.out[2]); ++i) {
    (y + i * (rows ? p.y.k : p.y.sp[2])).zero(rows ? p.out[2] : p.k);
  }
}
void finish_row(const Problem& p, const Kernels& k, const Operands& o, int64_t g, int64_t row,
                Kn2 form) {
  const int64_t at = output(p, g, row);
  if (by_rows(form)) {
    finish_planes(p, k, o, o.y + at, p.y.k, p.k, p.out[2], g, 0, at);
  } else {
    finish_rows(p, k, o, o.y + at, p.y.sp[2], p.out[2], p.k, g, 0, at);
  }
}

void run_in_place(const Problem& problem, const Params& params, const Operands& o,
                  const Execution& e, Kn2 form) {
  const Layout l = make_layout(problem, e.target, params, form);
  const Problem& p = l.p;
  const Kernels& k = *e.target.kernels;
  const Threads pool = useful_pool(problem, e);
  const int64_t blocks = ceil_div(l.all_rows, l.rows);
  pool.run(p.g * blocks, [&](int64_t task, int64_t worker) {
    const int64_t g = task / blocks;
    const int64_t r0 = task % blocks * l.rows;
    const int64_t r1 = std::min(r0 + l.rows, l.all_rows);
    const Ptr copy = e.workspace + worker * (l.copy_floats + l.filter_floats);
    const Ptr filters = copy + l.copy_floats;
    for (int64_t r = r0; r < r1; ++r) zero_row(p, o.y + output(p, g, r), form);
    for (int64_t tap = 0; tap < p.window(); ++tap) {
      const Tap t = make_tap(p, tap);
      const int64_t pixels = t.j1 - t.j0;
      if (pixels == 0) continue;
      const ConstPtr w = o.w + g * p.w.g + t.w;
      GemmArgs args{};
      args.load = 1;
      if (by_rows(form)) {
        args.c_row = p.y.k;
        args.b_step = l.copied ? pixels : p.x.c;
        for (int64_t c0 = 0; c0 < p.c; c0 += l.kc) {
          const Run run{0, 0, std::min(l.kc, p.c - c0)};
          args.runs = &run;
          const ConstPtr a = channels_of(l, k, w, c0, run.len, filters, &args);
          for (int64_t r = r0; r < r1; ++r) {
            const ConstPtr x = input(p, o, t, g, r, t.j0);
            if (x == nullptr) continue;
            ConstPtr b = x + c0 * p.x.c;
            if (l.copied) {
              k.copy(copy, pixels, b, p.x.c, p.stride[2] * p.x.sp[2], run.len, pixels);
              b = copy;
            }
            product(l, k, args, a, b, o.y + output(p, g, r) + t.j0, p.k, pixels);
          }
        }
        continue;
      }
      args.a_row = p.stride[2] * p.x.sp[2];
      args.a_step = p.x.c;
      args.c_row = p.y.sp[2];
      for (int64_t f0 = 0; f0 < p.k; f0 += l.panel) {
        const int64_t features = std::min(l.panel, p.k - f0);
        args.b_step = l.copied ? features : p.w.c;
        for (int64_t c0 = 0; c0 < p.c; c0 += l.kc) {
          const Run run{0, 0, std::min(l.kc, p.c - c0)};
          args.runs = &run;
          ConstPtr b = w + f0 * p.w.k + c0 * p.w.c;
          if (l.copied) {
            k.copy(copy, features, b, p.w.c, p.w.k, run.len, features);
            b = copy;
          }
          for (int64_t r = r0; r < r1; ++r) {
            const ConstPtr x = input(p, o, t, g, r, t.j0);
            if (x == nullptr) continue;
            product(l, k, args, x + c0 * p.x.c, b, o.y + output(p, g, r) + t.j0 * p.y.sp[2] + f0,
                    pixels, features);
          }
        }
      }
    }
    for (int64_t r = r0; r < r1 && o.has_epilogue(); ++r) finish_row(p, k, o, g, r, form);
  });
}

// The phase of the input that a window position reads: pixels phase + i * stride, i < size; output
// pixel j reads pixel j + shift of it.
struct Phase {
  Dim3 first, size, shift;
};
Phase make_phase(const Problem& p, const Tap& t) {
  Phase f{};
  const Dim3 at{t.z, t.y, t.x};
  for (int d = 0; d < 3; ++d) {
    const int64_t q = at[d] * p.rhs_dilation[d] - p.pad[d];
    f.first[d] = (q % p.stride[d] + p.stride[d]) % p.stride[d];
    f.shift[d] = (q - f.first[d]) / p.stride[d];
    f.size[d] = p.in[d] <= f.first[d] ? 0 : ceil_div(p.in[d] - f.first[d], p.stride[d]);
  }
  return f;
}

// Window position t of one group and image: the products of all pixels of its phase with the
// filters, as [feature][pixel] or [pixel][feature].
void multiply_phase(const Layout& l, const Kernels& k, const Threads& pool, const Phase& f,
                    ConstPtr x, ConstPtr w, Ptr copies, Ptr sums, Kn2 form) {
  const Problem& p = l.p;
  const int64_t all = f.size[0] * f.size[1] * f.size[2];
  const int64_t line = l.whole ? all : f.size[2];
  const int64_t lines = all / line;
  const int64_t parts = std::clamp<int64_t>(pool.count() / lines, 1, line);
  pool.run(lines * parts, [&](int64_t task, int64_t worker) {
    const Ptr copy = copies + worker * (l.copy_floats + l.filter_floats);
    const Ptr filters = copy + l.copy_floats;
    const int64_t row = task / parts;
    const int64_t i0 = line * (task % parts) / parts;
    const int64_t pixels = line * (task % parts + 1) / parts - i0;
    const ConstPtr from = x + (f.first[0] + row / f.size[1] % f.size[0] * p.stride[0]) * p.x.sp[0] +
                          (f.first[1] + row % f.size[1] * p.stride[1]) * p.x.sp[1] +
                          (f.first[2] + i0 * p.stride[2]) * p.x.sp[2];
    GemmArgs args{};
    if (by_rows(form)) {
      args.c_row = all;
      args.b_step = l.copied ? pixels : p.x.c;
      for (int64_t c0 = 0; c0 < p.c; c0 += l.kc) {
        const Run run{0, 0, std::min(l.kc, p.c - c0)};
        args.runs = &run;
        args.load = c0 > 0 ? 1 : 0;
        ConstPtr b = from + c0 * p.x.c;
        if (l.copied) {
          k.copy(copy, pixels, b, p.x.c, p.stride[2] * p.x.sp[2], run.len, pixels);
          b = copy;
        }
        product(l, k, args, channels_of(l, k, w, c0, run.len, filters, &args), b,
                sums + row * line + i0, p.k, pixels);
      }
      return;
    }
    args.a_row = p.stride[2] * p.x.sp[2];
    args.a_step = p.x.c;
    args.c_row = p.k;
    for (int64_t f0 = 0; f0 < p.k; f0 += l.panel) {
      const int64_t features = std::min(l.panel, p.k - f0);
      args.b_step = l.copied ? features : p.w.c;
      for (int64_t c0 = 0; c0 < p.c; c0 += l.kc) {
        const Run run{0, 0, std::min(l.kc, p.c - c0)};
        args.runs = &run;
        args.load = c0 > 0 ? 1 : 0;
        ConstPtr b = w + f0 * p.w.k + c0 * p.w.c;
        if (l.copied) {
          k.copy(copy, features, b, p.w.c, p.w.k, run.len, features);
          b = copy;
        }
        product(l, k, args, from + c0 * p.x.c, b, sums + (row * line + i0) * p.k + f0, pixels,
                features);
      }
    }
  });
}

// Adds the products to the output rows that see them.
void add_phase(const Layout& l, const Kernels& k, const Threads& pool, const Phase& f,
               ConstPtr sums, Ptr y, Kn2 form) {
  const Problem& p = l.p;
  const int64_t all = f.size[0] * f.size[1] * f.size[2];
  const int64_t j0 = std::clamp<int64_t>(-f.shift[2], 0, p.out[2]);
  const int64_t j1 = std::clamp<int64_t>(f.size[2] - f.shift[2], j0, p.out[2]);
  if (j0 == j1) return;
  pool.run(p.out[0] * p.out[1], [&](int64_t task, int64_t) {
    const int64_t oy = task % p.out[1];
    const int64_t oz = task / p.out[1];
    const int64_t iy = oy + f.shift[1];
    const int64_t iz = oz + f.shift[0];
    if (iy < 0 || iy >= f.size[1] || iz < 0 || iz >= f.size[0]) return;
    const int64_t pixel = (iz * f.size[1] + iy) * f.size[2] + j0 + f.shift[2];
    const Ptr to = y + oz * p.y.sp[0] + oy * p.y.sp[1] + j0 * p.y.sp[2];
    if (by_rows(form)) {
      for (int64_t i = 0; i < p.k; ++i) {
        k.accumulate(to + i * p.y.k, sums + i * all + pixel, j1 - j0);
      }
    } else if (p.y.sp[2] == p.k) {
      k.accumulate(to, sums + pixel * p.k, (j1 - j0) * p.k);
    } else {
      for (int64_t j = 0; j < j1 - j0; ++j) {
        k.accumulate(to + j * p.y.sp[2], sums + (pixel + j) * p.k, p.k);
      }
    }
  });
}

void run_shifted(const Problem& problem, const Params& params, const Operands& o,
                 const Execution& e, Kn2 form) {
  const Layout l = make_layout(problem, e.target, params, form);
  const Problem& p = l.p;
  const Kernels& k = *e.target.kernels;
  const Threads pool = useful_pool(problem, e);
  const Ptr sums = e.workspace;
  const Ptr copies = sums + l.sum_floats;
  pool.run(p.g * l.all_rows, [&](int64_t task, int64_t) {
    zero_row(p, o.y + output(p, task / l.all_rows, task % l.all_rows), form);
  });
  for (int64_t g = 0; g < p.g; ++g) {
    for (int64_t n = 0; n < p.n; ++n) {
      for (int64_t tap = 0; tap < p.window(); ++tap) {
        const Tap t = make_tap(p, tap);
        const Phase f = make_phase(p, t);
        if (f.size[0] == 0 || f.size[1] == 0 || f.size[2] == 0) continue;
        multiply_phase(l, k, pool, f, o.x + n * p.x.n + g * p.x.g, o.w + g * p.w.g + t.w, copies,
                       sums, form);
        add_phase(l, k, pool, f, sums, o.y + n * p.y.n + g * p.y.g, form);
      }
    }
  }
  if (!o.has_epilogue()) return;
  pool.run(p.g * l.all_rows, [&](int64_t task, int64_t) {
    finish_row(p, k, o, task / l.all_rows, task % l.all_rows, form);
  });
}

}  // namespace

void kn2_run(const Problem& p, const Params& params, const Operands& o, const Execution& e,
             Kn2 form) {
  (shifted(form) ? run_shifted : run_in_place)(p, params, o, e, form);
  add_skipped_nonfinite(p, o, e);
}

double kn2_error(const Problem& p, const Params&) {
  return static_cast<double>(p.c + p.window()) * unit_roundoff(p);
}

std::string kn2_rejects(const Problem& p, Kn2 form) {
  if (p.dilated_input()) return "lhs_dilation > 1";
  if (p.chunk_rows > 0) return "the reduction is chunked (weight gradient)";
  if (!p.plain()) return "the result adds up in place";
  if (by_rows(form) && p.y.sp[2] != 1) return "neighbouring pixels of the result lie apart";
  if (!by_rows(form) && p.y.k != 1) return "neighbouring features of the result lie apart";
  return {};
}

Params kn2_defaults(const Problem& problem, const Target& t, Kn2 form) {
  const Problem p = collapse(problem);
  const Kernels& k = *t.kernels;
  Params params{};
  const Tile tile = by_rows(form) ? best_tile(k, p.k, p.out[2]) : best_tile(k, p.out[2], p.k);
  params[kKn2Mr] = tile.mr;
  params[kKn2Nv] = tile.nv;
  params[kKn2Rows] = 1;
  // A copy is no larger than a few output rows: the point of the algorithm.
  const int64_t line = by_rows(form) ? p.out[2] : tile.nv * k.width;
  const int64_t limit = 4 * p.k * p.out[2] / line;
  const Layout l = make_layout(problem, t, params, form);
  const int64_t most = std::min(l.copied ? limit : p.c, l.turned ? 4 * p.out[2] : p.c);
  if (most < p.c) params[kKn2Kc] = std::max<int64_t>(1, most);
  // The rows of the result stay in the second-level cache while one window position after another
  // is added to them.
  const int64_t row = p.out[2] * (p.k + p.c * p.stride[2]);
  const int64_t all = p.n * p.out[0] * p.out[1];
  const int64_t fit = std::max<int64_t>(1, caches().l2 / 2 / k.size / row);
  const int64_t share = ceil_div(all, useful_threads(problem, t.threads));
  params[kKn2Rows] = std::min(fit, share);
  return params;
}

std::string kn2_check(const Problem& p, const Target& t, const Params& params, Kn2 form) {
  const int64_t nv = params[kKn2Nv];
  if (nv < 1 || nv > kMaxNv || t.kernels->max_mr[nv] == 0) return "nv: no such tile";
  if (params[kKn2Mr] < 1 || params[kKn2Mr] > t.kernels->max_mr[nv]) return "mr: no such tile";
  if (params[kKn2Kc] < 0 || params[kKn2Rows] < 0) return "kc, rows: negative";
  const Layout l = make_layout(p, t, params, form);
  constexpr int64_t kLimit = 1 << 24;
  if (l.kc > 1 && l.copy_floats + l.filter_floats > kLimit) return "kc: the copy is too large";
  return {};
}

int64_t kn2_workspace(const Problem& p, const Target& t, const Params& params, Kn2 form) {
  const Layout l = make_layout(p, t, params, form);
  return l.sum_floats + (l.copy_floats + l.filter_floats) * useful_threads(p, t.threads);
}

double kn2_cost(const Problem& problem, const Target& t, const Params& params, Kn2 form) {
  const Layout l = make_layout(problem, t, params, form);
  const Problem& p = l.p;
  const Kernels& k = *t.kernels;
  const auto as_double = [](int64_t v) { return static_cast<double>(v); };
  const int64_t m = by_rows(form) ? p.k : p.out[2];
  const int64_t n = by_rows(form) ? p.out[2] : p.k;
  const double tiles = as_double(ceil_div(m, l.mr) * ceil_div(n, l.panel));
  const double passes = as_double(p.g * l.all_rows) * as_double(p.window());
  // Each pass loads and stores the result, and begins a chain anew.
  double cost = passes * tiles *
                (as_double(p.c) * tile_step_cycles(k, l.mr, l.nv) +
                 as_double(ceil_div(p.c, l.kc)) * (3.0 * as_double(l.mr * l.nv) + 20.0));
  if (l.copied) {
    const double width = as_double(k.width);
    cost += by_rows(form) ? passes * as_double(p.c * p.out[2]) *
                                (p.x.sp[2] * p.stride[2] == 1 ? 1 / width : 0.5)
                          : passes / as_double(l.rows) * as_double(p.c * p.k) * 0.5;
  }
  // Filters that lie one after another (OIHW): each of their lines is read for each of its
  // elements.
  if (by_rows(form) && p.w.k != 1 && p.window() > 1) {
    const double bytes = as_double(p.k * p.reduction() * k.size);
    const double times = passes / (l.turned ? as_double(l.rows) : 1.0);
    cost += times * as_double(p.k * p.c) * (bytes > as_double(caches().l2 / 2) ? 8.0 : 2.0);
  }
  if (shifted(form)) cost += passes * as_double(p.k * p.out[2]) * 4.0 / as_double(k.width);
  return 1.2 * cost;
}

std::vector<ParamSpec> kn2_param_specs(Kn2 form) {
  const bool row = by_rows(form);
  return {
      {"mr",
       row ? "output features of the register tile" : "output pixels of the register tile",
       {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16}},
      {"nv",
       row ? "vectors of output pixels of the register tile"
           : "vectors of output features of the register tile",
       {1, 2, 3, 4}},
      {"kc", "channels at a time; 0: all", {0, 16, 64, 256}},
      {"rows", "output rows per pass of a window position; 0: a thread's share", {0, 1, 2, 4, 8}}};
}

}  // namespace jaxwin
