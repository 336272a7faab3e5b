// SPDX-License-Identifier: Apache-2.0

#include "algorithms/lanes_driver.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "algorithms/gemm_driver.h"

namespace jaxwin {
namespace {

// Groups become lanes: the outputs of all groups are one row of g * k features.
Problem flatten_groups(const Problem& p) {
  Problem q = p;
  q.k = p.g * p.k;
  q.g = 1;
  return q;
}

// How the lanes of one block of `width` features read their input: from `channels` channel values
// starting at `base`, lane l of multiple m from entry table[m * width + l].
struct Lanes {
  int64_t lanes;               // active ones
  int64_t base;                // element offset of the block's first channel
  int64_t multiples;           // input values per lane
  int64_t step;                // between channels in memory, where uniform
  int64_t channels;            // of the block
  bool uniform;                // channel i lies at base + i * step
  bool identity;               // lane l reads channel l, one value per lane
  std::vector<int64_t> table;  // in channels if uniform, else element offsets from base
};

// `multiples` values per lane, m-th at m * stride from the group's origin.
Lanes make_lanes(const Problem& p, int64_t width, int64_t block, int64_t multiples,
                 int64_t stride) {
  Lanes s{};
  const int64_t f0 = block * width;
  s.lanes = std::min(width, p.g * p.k - f0);
  const int64_t g0 = f0 / p.k;
  const int64_t g1 = (f0 + s.lanes - 1) / p.k;
  s.base = g0 * p.x.g;
  s.multiples = multiples;
  s.uniform = multiples == 1 || p.x.g == multiples * stride;
  s.step = multiples == 1 ? p.x.g : stride;
  s.channels = (g1 - g0 + 1) * multiples;
  s.identity = multiples == 1 && p.k == 1;
  s.table.resize(multiples * width, 0);
  for (int64_t m = 0; m < multiples; ++m) {
    for (int64_t l = 0; l < s.lanes; ++l) {
      const int64_t group = (f0 + l) / p.k - g0;
      s.table[m * width + l] = s.uniform ? group * multiples + m : group * p.x.g + m * stride;
    }
  }
  return s;
}

// n columns of one input row: dst[i][m][l], ld floats per column. `temporary`: n * channels floats.
void fill_lanes(const Problem& p, const Kernels& k, const Lanes& s, ConstPtr row, int64_t src_ld,
                int64_t n, Ptr dst, int64_t ld, Ptr temporary) {
  ConstPtr src = row + s.base;
  if (s.identity) {
    k.read[p.dtype](dst, ld, src, src_ld, s.step, n, s.lanes);
  } else if (!s.uniform) {
    k.expand(dst, ld, src, src_ld, n, s.table.data(), s.multiples, s.lanes, 0);
  } else if (s.step == 1 && p.plain()) {
    k.expand(dst, ld, src, src_ld, n, s.table.data(), s.multiples, s.lanes, s.channels);
  } else {
    k.read[p.dtype](temporary, s.channels, src, src_ld, s.step, n, s.channels);
    k.expand(dst, ld, temporary, s.channels, n, s.table.data(), s.multiples, s.lanes, s.channels);
  }
}

int64_t temporary_floats(const Problem& p, int64_t width, int64_t multiples, int64_t columns) {
  return columns * (ceil_div(width, p.k) + 1) * multiples;
}

// ---------------------------------------------------------------------------------------------
// Forward: the reduction is (window, channel of the group).

struct Forward {
  int64_t width, blocks, rows, cols, pixels;
  int64_t group;  // vectors of features that a sweep writes to the buffer before they are finished
  bool strip;
  int64_t row_blocks, col_blocks;
  int64_t in_rows, in_cols;  // of a strip
  int64_t column;            // floats of a strip column: c * width
  int64_t span;              // window: pixels that are finished together
  int64_t w_floats, zero_floats, strip_floats, temporary, buffer_floats;
  int64_t shared_floats() const { return round_up(w_floats, 16) + round_up(zero_floats, 16); }
  int64_t thread_floats() const { return strip_floats + temporary + buffer_floats; }
};

// The lanes of a block lie side by side in the input.
bool readable_in_place(const Problem& p, const Kernels& k) {
  return p.c == 1 && p.k == 1 && p.x.g == 1 && max_lanes(k, p.dtype) > 0;
}

// Whether the micro-kernel stores to y; an epilogue then works on words there.
bool writes_in_place(const Problem& p, const Kernels& k, const Operands& o) {
  return p.y.k == 1 && stores_result(k, p.dtype, p.out_dtype) &&
         (is_word(k, p.out_dtype) || !o.has_epilogue());
}

constexpr int64_t kFewFeatures = 32;  // one group is taken for a few vectors of them only

// Whether a sweep spreads the channels of a group over its features.
bool expands(const Problem& p) { return p.c > 1 || p.k > 1; }

// How a sweep's lanes come to their input: a vector of features is of one group, or of whole ones.
SweepForm sweep_form(const Problem& p, int64_t width) {
  if (!expands(p)) return kSweepOwn;
  return p.k % width == 0 || (p.g == 1 && p.k > width / 2) ? kSweepBroadcast : kSweepPermuted;
}

// Whether sweeps read the elements of the input themselves; else words, from a strip.
bool sweeps_elements(const Problem& p, const Kernels& k) {
  const SweepForm form = sweep_form(p, k.width);
  return max_sweep(k, p.dtype, form, p.win[2], p.stride[2]) > 0;
}

Forward make_forward(const Problem& p, const Target& t, const Params& params) {
  Forward f{};
  f.width = t.kernels->width;
  f.blocks = ceil_div(p.g * p.k, f.width);
  f.rows = params[kLanesRows] == 0 ? p.out[1] : std::min(params[kLanesRows], p.out[1]);
  f.cols = params[kLanesCols] == 0 ? p.out[2] : std::min(params[kLanesCols], p.out[2]);
  f.pixels = params[kLanesPixels];
  f.strip = params[kLanesStrip] != 0;
  f.row_blocks = ceil_div(p.out[1], f.rows);
  f.col_blocks = ceil_div(p.out[2], f.cols);
  f.in_rows = (f.rows - 1) * p.stride[1] + (p.win[1] - 1) * p.rhs_dilation[1] + 1;
  f.in_cols = (f.cols - 1) * p.stride[2] + (p.win[2] - 1) * p.rhs_dilation[2] + 1;
  f.column = p.c * f.width;
  const int64_t row = std::max<int64_t>(1, params[kLanesWindow]) * f.blocks * f.width;
  const int64_t fit = caches().l1 / 4 / t.kernels->size / row;
  f.span = std::clamp<int64_t>(fit / f.pixels, 1, ceil_div(p.out[2], f.pixels)) * f.pixels;
  f.w_floats = f.blocks * p.reduction() * f.width;
  f.zero_floats = params[kLanesSweep] > 0 && sweep_form(p, f.width) == kSweepBroadcast ? p.c : 0;
  if (f.strip) {
    f.strip_floats = round_up(p.win[0] * f.in_rows * f.in_cols * f.column, 16);
    f.temporary = round_up(temporary_floats(p, f.width, p.c, f.in_cols), 16);
  } else if (params[kLanesSweep] > 0 && !sweeps_elements(p, *t.kernels)) {
    f.in_rows = std::min(f.in_rows, p.in[1]);
    f.strip_floats = round_up(p.win[0] * f.in_rows * p.in[2] * p.g * p.c, 16);
  }
  if (p.y.k != 1 || !is_word(*t.kernels, p.out_dtype)) {  // for an epilogue at least
    int64_t vectors = f.strip ? std::max(f.rows, f.cols) : f.pixels;
    if (params[kLanesSweep] > 0) {
      // Whole cache lines of the result, but a part of the cache.
      const int64_t one = params[kLanesSweep] * p.out[2];
      const int64_t limit = caches().l2 / 8 / t.kernels->size;
      f.group = std::clamp<int64_t>(limit / (one * f.width), 1, f.blocks);
      vectors = one * f.group;
    }
    if (params[kLanesWindow] > 0) vectors = params[kLanesWindow] * f.span * f.blocks;
    f.buffer_floats = round_up(vectors * f.width, 16);
  }
  return f;
}

// packed[block][tap][channel][lane]
void pack_filters(const Problem& p, const Forward& f, const Kernels& k, ConstPtr w,
                  const Threads& pool, Ptr packed) {
  const int64_t reduction = p.reduction();
  const int64_t features = p.g * p.k;
  constexpr int64_t kFew = 32768;  // words, which take less time than to wake a thread
  const int64_t tasks = f.w_floats <= kFew ? 1 : std::min(f.blocks, pool.count());
  pool.run(tasks, [&](int64_t task, int64_t) {
    const int64_t b0 = f.blocks * task / tasks;
    const int64_t b1 = f.blocks * (task + 1) / tasks;
    const int64_t whole = std::min(b1, features / f.width) - b0;
    const int64_t lanes = features - (b1 - 1) * f.width;  // of the last block
    const int64_t ld = reduction * f.width;
    const auto filter = [&](int64_t tap) {
      return w + tap % p.win[0] * p.w.sp[0] + tap / p.win[0] % p.win[1] * p.w.sp[1] +
             tap / p.win[0] / p.win[1] * p.w.sp[2];
    };
    if (p.c > b1 - b0) {  // all channels of a block at a time
      for (int64_t b = b0; b < b1; ++b) {
        const int64_t count = std::min(f.width, features - b * f.width);
        if (count < f.width) (packed + b * ld).zero(ld);
        for (int64_t tap = 0; tap < p.window(); ++tap) {
          k.pack[p.dtype](packed + b * ld + tap * p.c * f.width, f.width,
                          filter(tap) + b * f.width * p.w.k, p.w.c, p.w.k, p.c, count);
        }
      }
      return;
    }
    for (int64_t r = 0; r < reduction; ++r) {
      ConstPtr from = filter(r / p.c) + (r % p.c) * p.w.c;
      k.pack[p.dtype](packed + b0 * ld + r * f.width, ld, from + b0 * f.width * p.w.k,
                      f.width * p.w.k, p.w.k, whole, f.width);
      if (lanes >= f.width) continue;
      Ptr dst = packed + (b1 - 1) * ld + r * f.width;
      k.pack[p.dtype](dst, 0, from + (b1 - 1) * f.width * p.w.k, 0, p.w.k, 1, lanes);
      (dst + lanes).zero(f.width - lanes);
    }
  });
}

// Depthwise, channels side by side in the input: a few pixels at a time, all channels of them, so
// that memory is walked in its order. Window positions on padding are left out.
void run_in_place(const Problem& p, const Params& params, const Operands& o, const Execution& e) {
  const Forward f = make_forward(p, e.target, params);
  const Kernels& k = *e.target.kernels;
  const Problem flat = flatten_groups(p);
  Problem flat_along_y = flat;  // output lines that run along y
  flat_along_y.y.sp[2] = p.y.sp[1];
  const Threads pool = useful_pool(p, e);
  Ptr packed = e.workspace;
  Ptr scratch = packed + round_up(f.w_floats, 16);
  pack_filters(p, f, k, o.w, pool, packed);
  const bool in_place = writes_in_place(p, k, o);

  pool.run(p.n * p.out[0] * f.row_blocks * f.col_blocks, [&](int64_t task, int64_t worker) {
    const int64_t cb = task % f.col_blocks;
    const int64_t rblock = task / f.col_blocks % f.row_blocks;
    const int64_t oz = task / f.col_blocks / f.row_blocks % p.out[0];
    const int64_t n = task / f.col_blocks / f.row_blocks / p.out[0];
    const int64_t j0 = cb * f.cols;
    const int64_t j1 = std::min(j0 + f.cols, p.out[2]);
    const int64_t r1 = std::min((rblock + 1) * f.rows, p.out[1]);
    Ptr buffer = scratch + worker * f.thread_floats();
    const Progression z = window_positions(p, 0, oz);
    std::vector<Run> runs;
    const auto make_runs = [&](const Progression& y, const Progression& v) {
      runs.clear();
      for (int64_t iv = v.first; iv < v.first + v.n; ++iv) {
        for (int64_t iy = y.first; iy < y.first + y.n; ++iy) {
          for (int64_t iz = z.first; iz < z.first + z.n; ++iz) {
            runs.push_back({iz * p.rhs_dilation[0] * p.x.sp[0] +
                                iy * p.rhs_dilation[1] * p.x.sp[1] +
                                iv * p.rhs_dilation[2] * p.x.sp[2],
                            ((iv * p.win[1] + iy) * p.win[0] + iz) * f.width, 1});
          }
        }
      }
    };
    // `pixels` outputs from (r, j) on, along y or x, all channels, by `runs`.
    const auto compute = [&](int64_t r, int64_t j, int64_t pixels, bool along_y) {
      ConstPtr a = o.x + n * p.x.n + (oz * p.stride[0] - p.pad[0]) * p.x.sp[0] +
                   (r * p.stride[1] - p.pad[1]) * p.x.sp[1] +
                   (j * p.stride[2] - p.pad[2]) * p.x.sp[2];
      const int64_t at = n * p.y.n + oz * p.y.sp[0] + r * p.y.sp[1] + j * p.y.sp[2];
      const Problem& line = along_y ? flat_along_y : flat;
      GemmArgs args{};
      args.runs = runs.data();
      args.n_runs = static_cast<int64_t>(runs.size());
      args.a_row = along_y ? p.stride[1] * p.x.sp[1] : p.stride[2] * p.x.sp[2];
      args.c_row = in_place ? line.y.sp[2] : f.width;
      args.result = k.stores[in_place ? p.out_dtype : k.word];
      const int64_t tiles = ceil_div(pixels, f.pixels);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t i0 = pixels * t / tiles;
        const int64_t count = pixels * (t + 1) / tiles - i0;
        // All channels at once, or a vector of them at a time through the buffer.
        const int64_t blocks = in_place ? f.blocks : 1;
        for (int64_t block = 0; block < f.blocks; block += blocks) {
          const int64_t k0 = block * f.width;
          const int64_t y_at = at + i0 * line.y.sp[2] + k0 * p.y.k;
          args.a = a + i0 * args.a_row + k0;
          args.b = packed + k0 * p.window();
          args.b_block = p.window() * f.width;
          const Ptr c = in_place ? o.y + y_at : buffer;
          args.c = c;
          args.blocks = blocks;
          args.cols = std::min(blocks * f.width, flat.k - k0);
          k.lanes[p.dtype][count](&args);
          if (!in_place || o.has_epilogue()) {
            finish_rows(line, k, o, c, args.c_row, count, args.cols, 0, k0, y_at);
          }
        }
      }
    };

    // Columns whose windows lie inside the input; the others are done one by one.
    int64_t ja = j0;
    int64_t jb = j1;
    while (ja < jb && window_positions(p, 2, ja).n < p.win[2]) ++ja;
    while (jb > ja && window_positions(p, 2, jb - 1).n < p.win[2]) --jb;
    for (int64_t r = rblock * f.rows; r < r1;) {
      // Rows that see the same part of the window.
      const Progression y = window_positions(p, 1, r);
      int64_t end = r + 1;
      for (; end < r1; ++end) {
        const Progression other = window_positions(p, 1, end);
        if (other.first != y.first || other.n != y.n) break;
      }
      if (ja < jb) make_runs(y, window_positions(p, 2, ja));
      for (int64_t row = r; row < end && ja < jb; ++row) compute(row, ja, jb - ja, false);
      for (const auto& [from, to] : {std::pair{j0, ja}, std::pair{jb, j1}}) {
        for (int64_t j = from; j < to; ++j) {
          make_runs(y, window_positions(p, 2, j));
          compute(r, j, end - r, true);
        }
      }
      r = end;
    }
  });
  add_skipped_nonfinite(p, o, e);
}

// All channels of a pixel lie side by side.
bool channels_together(const Problem& p) {
  return (p.c == 1 || p.x.c == 1) && (p.g == 1 || p.x.g == p.c);
}

// Output rows of the highest sweep, 0 where there is none. The channels of a group lie side by
// side, and fit one vector where lanes are whole groups.
int64_t max_sweep(const Problem& p, const Kernels& k) {
  const SweepForm form = sweep_form(p, k.width);
  const bool fits = form == kSweepBroadcast || (p.c <= p.k && k.width % p.k == 0);
  if (!channels_together(p) || !fits || (p.stride[2] > 1 && p.rhs_dilation[2] > 1)) return 0;
  return max_sweep(k, sweeps_elements(p, k) ? p.dtype : k.word, form, p.win[2], p.stride[2]);
}

// Pixels of the widest tile of whole windows in so many rows, 0 where there is none.
int64_t max_window(const Problem& p, const Kernels& k, int64_t rows) {
  const bool square = p.win == Dim3{1, kWindow, kWindow} && p.stride[1] == p.stride[2] &&
                      p.rhs_dilation[1] == 1 && p.rhs_dilation[2] == 1;
  // At most one column of padding at either end.
  const int64_t last = (p.out[2] - 1) * p.stride[2] - p.pad[2] + kWindow - 1;
  if (!square || expands(p) || !channels_together(p) || p.pad[2] > 1 || last > p.in[2]) return 0;
  return max_window(k, p.dtype, p.stride[2], rows);
}

// Features as lanes, side by side in the input: some output rows and a vector of features at a
// time, swept along x, so that an input vector is loaded once for all columns of the window.
// Columns of the window on padding are left out. Elements that are not words are copied to a strip
// of rows.
void run_sweep(const Problem& p, const Params& params, const Operands& o, const Execution& e) {
  const Forward f = make_forward(p, e.target, params);
  const Kernels& k = *e.target.kernels;
  const Problem flat = flatten_groups(p);
  const Threads pool = useful_pool(p, e);
  Ptr packed = e.workspace;
  Ptr scratch = packed + f.shared_floats();
  pack_filters(p, f, k, o.w, pool, packed);
  const bool in_place = writes_in_place(p, k, o);
  const bool direct = sweeps_elements(p, k);
  // Strides of the input or the strip: of window position z, rows, columns.
  const int64_t col = direct ? p.x.sp[2] : p.g * p.c;
  const int64_t in_row = direct ? p.x.sp[1] : p.in[2] * col;
  const int64_t plane = direct ? p.rhs_dilation[0] * p.x.sp[0] : f.in_rows * in_row;
  const int64_t most = params[kLanesSweep];
  const int64_t dilation = p.rhs_dilation[2];
  Problem line = flat;  // the outputs of one residue of the dilation
  line.y.sp[2] *= dilation;
  const SweepForm form = sweep_form(p, f.width);
  const Ptr zeros = packed + round_up(f.w_floats, 16);
  zeros.zero(f.zero_floats);
  std::vector<int32_t> table(form == kSweepPermuted ? f.column : 0);
  for (int64_t i = 0; i < static_cast<int64_t>(table.size()); ++i) {
    table[i] = static_cast<int32_t>(i % f.width / p.k * p.c + i / f.width);
  }
  SweepArgs shared{};
  shared.w = packed;
  shared.cols = flat.k;
  shared.x_row = p.stride[1] * in_row;
  shared.x_col = dilation * col;
  shared.w_col = p.win[1] * p.win[0] * f.column;
  shared.w_block = p.reduction() * f.width;
  shared.y_row = p.y.sp[1];
  shared.y_col = dilation * p.y.sp[2];
  shared.row_step = p.stride[1];
  shared.rows = p.in[1];
  shared.in_cols = p.g * p.c;
  shared.channels = p.c;
  shared.span = form == kSweepBroadcast ? 0 : f.width / p.k * p.c;
  shared.table = table.data();
  shared.features = p.k;
  shared.zeros = zeros;
  shared.result = k.stores[in_place ? p.out_dtype : k.word];
  shared.follow = p.win[0] == 1 && p.stride[1] == p.rhs_dilation[1] ? 1 : 0;

  pool.run(p.n * p.out[0] * f.row_blocks, [&](int64_t task, int64_t worker) {
    const int64_t rblock = task % f.row_blocks;
    const int64_t oz = task / f.row_blocks % p.out[0];
    const int64_t n = task / f.row_blocks / p.out[0];
    Ptr buffer = scratch + worker * f.thread_floats();
    const int64_t r0 = rblock * f.rows;
    const int64_t r1 = std::min(r0 + f.rows, p.out[1]);
    const Progression z = window_positions(p, 0, oz);
    // Where column 0 of input row 0 lies, for window position z = 0.
    ConstPtr x = o.x + n * p.x.n + (oz * p.stride[0] - p.pad[0]) * p.x.sp[0];
    if (!direct) {
      Ptr strip = buffer + f.buffer_floats;
      const int64_t top = std::max<int64_t>(0, r0 * p.stride[1] - p.pad[1]);
      const int64_t last = (r1 - 1) * p.stride[1] - p.pad[1] + (p.win[1] - 1) * p.rhs_dilation[1];
      for (int64_t i = 0; i < z.n; ++i) {
        for (int64_t y = top; y <= std::min(last, p.in[1] - 1); ++y) {
          ConstPtr from = o.x + n * p.x.n + (z.at + i * z.at_step) * p.x.sp[0] + y * p.x.sp[1];
          k.read[p.dtype](strip + i * plane + (y - top) * in_row, col, from, p.x.sp[2], 1, p.in[2],
                          col);
        }
      }
      x = ConstPtr(strip) - (z.first * plane + top * in_row);
    }
    std::vector<Run> runs;
    const int64_t tiles = ceil_div(r1 - r0, most);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = r0 + (r1 - r0) * t / tiles;
      const int64_t rows = r0 + (r1 - r0) * (t + 1) / tiles - row;
      SweepArgs args = shared;
      runs.clear();
      for (int64_t iy = 0; iy < p.win[1]; ++iy) {
        // Rows of the input for the first and the last row of the tile.
        const int64_t first = row * p.stride[1] - p.pad[1] + iy * p.rhs_dilation[1];
        const int64_t last = first + (rows - 1) * p.stride[1];
        if (last < 0 || first >= p.in[1]) continue;
        if (first < 0 || last >= p.in[1]) args.border = 1;
        for (int64_t iz = z.first; iz < z.first + z.n; ++iz) {
          runs.push_back({iz * plane + iy * p.rhs_dilation[1] * in_row,
                          (iy * p.win[0] + iz) * f.column, first});
        }
      }
      args.runs = runs.data();
      args.n_runs = static_cast<int64_t>(runs.size());
      const int64_t at = n * p.y.n + oz * p.y.sp[0] + row * p.y.sp[1];
      // With dilation, the columns of one residue after those of another.
      for (int64_t j = 0; j < std::min(dilation, p.out[2]); ++j) {
        const int64_t first = j * p.stride[2] - p.pad[2];  // input column of q = 0
        ConstPtr from = x + (row * p.stride[1] - p.pad[1]) * in_row + first * col;
        args.x = from;
        args.y = o.y + at + j * p.y.sp[2];
        args.n = ceil_div(p.out[2] - j, dilation);
        args.q_begin = std::max<int64_t>(0, ceil_div(-first, dilation));
        args.q_end = std::max(args.q_begin, ceil_div(p.in[2] - first, dilation));
        const SweepFn sweep = k.sweep[direct ? p.dtype : k.word][form][p.win[2]][p.stride[2]][rows];
        if (in_place) {
          sweep(&args);
          continue;
        }
        // Some vectors of features at a time, by way of the buffer.
        const int64_t ld = f.group * f.width;
        args.y = buffer;
        args.y_col = ld;
        args.y_row = args.n * ld;
        for (int64_t block = 0; block < f.blocks; block += f.group) {
          const int64_t k0 = block * f.width;
          SweepArgs one = args;
          one.x = from + block * shared.span;
          one.w = packed + block * shared.w_block;
          one.cols = std::min(ld, flat.k - k0);
          one.in_cols = shared.in_cols - block * shared.span;
          one.first = k0;
          sweep(&one);
          for (int64_t i = 0; i < rows; ++i) {
            finish_rows(line, k, o, buffer + i * args.y_row, ld, args.n, one.cols, 0, k0,
                        at + i * p.y.sp[1] + j * p.y.sp[2] + k0 * p.y.k);
          }
        }
      }
      for (int64_t i = row; in_place && i < row + rows && o.has_epilogue(); ++i) {
        const int64_t y_at = at + (i - row) * p.y.sp[1];
        finish_rows(flat, k, o, o.y + y_at, p.y.sp[2], p.out[2], flat.k, 0, 0, y_at);
      }
    }
  });
  add_skipped_nonfinite(p, o, e);
}

// Depthwise 3x3, channels side by side in the input: a tile of pixels at a time, all channels of
// them, whole windows.
void run_window(const Problem& p, const Params& params, const Operands& o, const Execution& e) {
  const Forward f = make_forward(p, e.target, params);
  const Kernels& k = *e.target.kernels;
  const Problem flat = flatten_groups(p);
  const Threads pool = useful_pool(p, e);
  Ptr packed = e.workspace;
  Ptr scratch = packed + round_up(f.w_floats, 16);
  pack_filters(p, f, k, o.w, pool, packed);
  const bool in_place = writes_in_place(p, k, o);
  const int64_t stride = p.stride[2];
  if (k.window_filters[p.dtype][stride] != nullptr) {
    k.window_filters[p.dtype][stride](packed, flat.k);
  }

  pool.run(p.n * p.out[0] * f.row_blocks, [&](int64_t task, int64_t worker) {
    const int64_t rblock = task % f.row_blocks;
    const int64_t oz = task / f.row_blocks % p.out[0];
    const int64_t n = task / f.row_blocks / p.out[0];
    const int64_t r1 = std::min((rblock + 1) * f.rows, p.out[1]);
    Ptr buffer = scratch + worker * f.thread_floats();
    const Progression z = window_positions(p, 0, oz);
    ConstPtr plane = o.x + n * p.x.n + z.at * p.x.sp[0];
    WindowArgs args{};
    args.w = packed;
    args.cols = flat.k;
    args.x_row = p.x.sp[1];
    args.x_col = p.x.sp[2];
    args.result = k.stores[in_place ? p.out_dtype : k.word];
    for (int64_t r = rblock * f.rows; r < r1;) {
      const int64_t rows = std::min(params[kLanesWindow], r1 - r);
      const int64_t iy = r * stride - p.pad[1];
      args.rows = 0;
      for (int64_t i = 0; z.n > 0 && i < (rows - 1) * stride + kWindow; ++i) {
        if (iy + i >= 0 && iy + i < p.in[1]) args.rows |= int64_t{1} << i;
      }
      const WindowFn* const tiles = k.window[p.dtype][stride][rows];
      for (int64_t j0 = 0; j0 < p.out[2]; j0 += f.span) {
        const int64_t j1 = std::min(j0 + f.span, p.out[2]);
        const int64_t at = n * p.y.n + oz * p.y.sp[0] + r * p.y.sp[1] + j0 * p.y.sp[2];
        const Ptr y = in_place ? o.y + at : buffer;
        args.y_col = in_place ? p.y.sp[2] : flat.k;
        args.y_row = in_place ? p.y.sp[1] : (j1 - j0) * flat.k;
        int64_t pixels = 0;
        for (int64_t j = j0; j < j1; j += pixels) {
          pixels = std::min(f.pixels, j1 - j);
          while (tiles[pixels] == nullptr) --pixels;
          const int64_t ix = j * stride - p.pad[2];
          const int64_t last = ix + (pixels - 1) * stride + kWindow - 1;
          args.edges = (ix < 0 ? kWindowLeft : 0) | (last >= p.in[2] ? kWindowRight : 0);
          args.x = plane + iy * p.x.sp[1] + ix * p.x.sp[2];
          args.y = y + (j - j0) * args.y_col;
          tiles[pixels](&args);
        }
        for (int64_t i = 0; i < rows && (!in_place || o.has_epilogue()); ++i) {
          finish_rows(flat, k, o, y + i * args.y_row, args.y_col, j1 - j0, flat.k, 0, 0,
                      at + i * p.y.sp[1]);
        }
      }
      r += rows;
    }
  });
  add_skipped_nonfinite(p, o, e);
}

// Any layout and groups, through padded and expanded copies of the input.
void run_forward(const Problem& p, const Params& params, const Operands& o, const Execution& e) {
  const Forward f = make_forward(p, e.target, params);
  const Kernels& k = *e.target.kernels;
  const Problem flat = flatten_groups(p);
  Problem flat_along_y = flat;  // output lines that run along y
  flat_along_y.y.sp[2] = p.y.sp[1];
  const Threads pool = useful_pool(p, e);
  const int64_t reduction = p.reduction();
  Ptr packed = e.workspace;
  Ptr scratch = packed + round_up(f.w_floats, 16);
  pack_filters(p, f, k, o.w, pool, packed);

  // The window's positions in a strip.
  std::vector<Run> runs;
  for (int64_t r = 0; r < reduction; ++r) {
    const int64_t tap = r / p.c;
    const int64_t z = tap % p.win[0];
    const int64_t y = tap / p.win[0] % p.win[1];
    const int64_t v = tap / p.win[0] / p.win[1];
    runs.push_back(
        {((z * f.in_rows + y * p.rhs_dilation[1]) * f.in_cols + v * p.rhs_dilation[2]) * f.column +
             (r % p.c) * f.width,
         r * f.width, 1});
  }

  const int64_t tasks = p.n * f.blocks * p.out[0] * f.row_blocks * f.col_blocks;
  pool.run(tasks, [&](int64_t task, int64_t worker) {
    // Feature blocks innermost: neighbours share cache lines of the input.
    const int64_t block = task % f.blocks;
    const int64_t cb = task / f.blocks % f.col_blocks;
    const int64_t rblock = task / f.blocks / f.col_blocks % f.row_blocks;
    const int64_t oz = task / f.blocks / f.col_blocks / f.row_blocks % p.out[0];
    const int64_t n = task / f.blocks / f.col_blocks / f.row_blocks / p.out[0];
    const int64_t r0 = rblock * f.rows;
    const int64_t r1 = std::min(r0 + f.rows, p.out[1]);
    const int64_t j0 = cb * f.cols;
    const int64_t j1 = std::min(j0 + f.cols, p.out[2]);
    Ptr strip = scratch + worker * f.thread_floats();
    Ptr buffer = strip + f.strip_floats + f.temporary;
    ConstPtr x = o.x + n * p.x.n;
    const int64_t lanes = std::min(f.width, flat.k - block * f.width);

    const Lanes s = make_lanes(p, f.width, block, p.c, p.x.c);
    ConstPtr weights = packed + block * reduction * f.width;

    // `pixels` outputs from (r, j) along y or x, from A rows at `a`, a_row floats apart.
    const auto compute = [&](int64_t r, int64_t j, int64_t pixels, bool along_y, ConstPtr a,
                             int64_t a_row) {
      const int64_t at =
          n * p.y.n + oz * p.y.sp[0] + r * p.y.sp[1] + j * p.y.sp[2] + block * f.width * p.y.k;
      const Problem& line = along_y ? flat_along_y : flat;
      const bool in_place = writes_in_place(p, k, o);
      Ptr c = in_place ? o.y + at : buffer;
      GemmArgs args{};
      args.b = weights;
      args.runs = runs.data();
      args.n_runs = reduction;
      args.a_row = a_row;
      args.c_row = in_place ? line.y.sp[2] : f.width;
      args.result = k.stores[in_place ? p.out_dtype : k.word];
      args.cols = lanes;
      args.blocks = 1;
      const int64_t tiles = ceil_div(pixels, f.pixels);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t i0 = pixels * t / tiles;
        const int64_t i1 = pixels * (t + 1) / tiles;
        args.a = a + i0 * args.a_row;
        args.c = c + i0 * args.c_row;
        k.lanes[k.word][i1 - i0](&args);
      }
      if (!in_place || o.has_epilogue()) {
        finish_rows(line, k, o, c, args.c_row, pixels, lanes, 0, block * f.width, at);
      }
    };

    // A padded copy of what the outputs read.
    const int64_t rows = (r1 - r0 - 1) * p.stride[1] + (p.win[1] - 1) * p.rhs_dilation[1] + 1;
    const int64_t columns = (j1 - j0 - 1) * p.stride[2] + (p.win[2] - 1) * p.rhs_dilation[2] + 1;
    const int64_t ix0 = j0 * p.stride[2] - p.pad[2];
    const int64_t left = std::clamp<int64_t>(-ix0, 0, columns);
    const int64_t right = std::clamp<int64_t>(p.in[2] - ix0, left, columns);
    for (int64_t z = 0; z < p.win[0]; ++z) {
      const int64_t iz = oz * p.stride[0] - p.pad[0] + z * p.rhs_dilation[0];
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t iy = r0 * p.stride[1] - p.pad[1] + r;
        Ptr to = strip + (z * f.in_rows + r) * f.in_cols * f.column;
        if (iz < 0 || iz >= p.in[0] || iy < 0 || iy >= p.in[1]) {
          to.zero(columns * f.column);
          continue;
        }
        to.zero(left * f.column);
        if (right > left) {
          ConstPtr row = x + iz * p.x.sp[0] + iy * p.x.sp[1] + (ix0 + left) * p.x.sp[2];
          fill_lanes(p, k, s, row, p.x.sp[2], right - left, to + left * f.column, f.column,
                     strip + f.strip_floats);
        }
        (to + right * f.column).zero((columns - right) * f.column);
      }
    }
    const int64_t down = p.stride[1] * f.in_cols * f.column;
    const int64_t right_step = p.stride[2] * f.column;
    if (r1 - r0 > j1 - j0) {  // a border of few columns: pixels below each other
      for (int64_t j = j0; j < j1; ++j) {
        compute(r0, j, r1 - r0, true, strip + (j - j0) * right_step, down);
      }
      return;
    }
    for (int64_t r = r0; r < r1; ++r) {
      compute(r, j0, j1 - j0, false, strip + (r - r0) * down, right_step);
    }
  });
}

// ---------------------------------------------------------------------------------------------
// Weight gradient (chunked reduction): "images" n are the channels of a group, the window is the
// output gradient.

// Groups whose features are the lanes of a vector in turn, so that one load spreads a channel of
// all of them; 0: lanes are features in their order, and the input is copied for each. The channels
// of a vector's groups lie side by side, and fit one where they are of several groups.
int64_t interleaved_groups(const Problem& p, const Kernels& k) {
  if (p.n == 1 || p.w.k != 1 || p.x.n != 1 || p.x.g != p.n || p.dtype != kF32) return 0;
  const int64_t groups = std::max<int64_t>(1, k.width / p.k);
  const bool fits =
      groups == 1 ? p.k % k.width == 0 : k.width % p.k == 0 && groups * p.n <= k.width;
  return fits && max_grad_channels(k, groups) > 0 ? groups : 0;
}

struct Grad {
  int64_t width, blocks, split, per_split;
  int64_t groups;                 // that are interleaved, or 0
  int64_t rows;                   // of the window, walked in one go
  int64_t ring, columns, column;  // rows of the input kept, columns of a row, floats of a column
  int64_t outputs;                // accumulators of one output row: out_x * n
  int64_t together;               // blocks that are walked side by side
  int64_t ring_floats, temporary, w_floats, sum_floats;
  int64_t tasks() const { return ceil_div(blocks, together) * split; }
  int64_t block_floats() const { return ring_floats + 2 * sum_floats; }
  int64_t thread_floats() const { return temporary + w_floats + together * block_floats(); }
};

// Elements of the input and of the window.
int64_t grad_operands(const Problem& p) {
  return p.g * p.c * (p.n * p.in[0] * p.in[1] * p.in[2] + p.k * p.window());
}

Grad make_grad(const Problem& p, const Target& t) {
  Grad f{};
  f.width = t.kernels->width;
  f.blocks = ceil_div(p.g * p.k, f.width);
  const int64_t out_rows = p.out[0] * p.out[1];
  f.split = f.blocks >= t.threads ? 1 : std::min(out_rows, ceil_div(t.threads, f.blocks));
  f.per_split = ceil_div(out_rows, f.split);
  f.columns = (p.win[2] - 1) * p.rhs_dilation[2] + (p.out[2] - 1) * p.stride[2] + 1;
  f.groups = interleaved_groups(p, *t.kernels);
  f.column = f.groups == 0 ? p.n * f.width : f.groups == 1 ? p.n : f.width;
  // Several rows of the window in one go save calls; rows of the input that they share with those
  // before are then read again. One alone keeps them, in turn.
  const int64_t reach = (p.out[1] - 1) * p.stride[1] + 1;
  const int64_t fit = caches().l1 / 2 / t.kernels->size / (p.out[0] * f.columns * f.column);
  f.rows = std::min({(fit - reach) / p.rhs_dilation[1] + 1, p.win[1], p.chunk_rows});
  if (fit < reach || f.rows < std::min(4 * (reach - 1), p.win[1])) f.rows = 1;
  f.ring = (f.rows - 1) * p.rhs_dilation[1] + reach;
  f.outputs = p.out[2] * p.n;
  f.ring_floats = round_up(p.out[0] * f.ring * f.columns * f.column, 16);
  f.temporary = f.groups > 0 ? 0 : round_up(temporary_floats(p, f.width, p.n, f.columns), 16);
  f.w_floats = p.w.k == 1 && f.groups == 0 ? 0 : round_up(f.rows * p.win[2] * f.width, 16);
  f.sum_floats = round_up(f.per_split * f.outputs * f.width, 16);
  // Where the second-level cache does not hold the operands, whole pixels are read before the next:
  // a line of a pixel alone comes from memory at half the speed.
  const bool neighbours = p.w.k == 1 && p.x.g == p.n && (p.n == 1 || p.x.n == 1);
  f.together = 1;
  if (neighbours && grad_operands(p) * t.kernels->size > caches().l2) {
    const int64_t share = ceil_div(f.blocks, t.threads);
    const int64_t limit = caches().l2 / 4 / t.kernels->size / f.block_floats();
    f.together = ceil_div(share, ceil_div(share, std::max<int64_t>(1, limit)));
  }
  return f;
}

// What one task sums up: some output rows of some blocks.
class GradTask {
 public:
  GradTask(const Problem& p, const Grad& f, const Operands& o, const Kernels& k, int64_t task,
           Ptr memory);
  void sum();
  void finish() const;

 private:
  struct Block {
    int64_t number;
    Lanes lanes;
    Ptr ring, partial, sum;
    std::vector<int64_t> tags;  // of the rows of the input in the ring
  };
  // Output rows whose sums share a tile, as far as they fill it: a sum alone waits for itself.
  struct Rows {
    int64_t uz, begin, end;
  };

  int64_t input_row(int64_t uy, int64_t y) const {
    return uy * p_.stride[1] - p_.pad[1] + y * p_.rhs_dilation[1];
  }
  // Of a row of the input, where window rows from y0 on are walked.
  int64_t slot(int64_t uz, int64_t iy, int64_t y0) const {
    return uz * f_.ring + (f_.rows == 1 ? iy % f_.ring : iy - input_row(0, y0));
  }
  void interleave();
  void fill(Block* b, int64_t slot, int64_t c, int64_t iz, int64_t iy) const;
  void fill_interleaved(const Block& b, ConstPtr from, int64_t n, Ptr to) const;
  void walk(Block* b, int64_t c, int64_t z, int64_t y0, int64_t y1);
  void multiply(const Block& b, const Rows& rows, int64_t y0, int64_t first);
  void multiply_row(const Block& b, const Rows& rows, int64_t y0, int64_t first);

  const Problem& p_;
  const Grad& f_;
  const Operands& o_;
  const Kernels& k_;
  int64_t u0_, u1_;  // output rows
  Ptr temporary_, w_row_;
  std::vector<Block> blocks_;
  std::vector<Rows> rows_;
  std::vector<int64_t> in_row_;  // where outputs of a row read
  std::vector<int64_t> offsets_;
  // The element that each lane takes, of the input, the window and, at last, the sums.
  std::vector<int64_t> take_input_, take_window_, take_sums_;
  std::vector<Run> runs_;
  GemmArgs args_{};
};

GradTask::GradTask(const Problem& p, const Grad& f, const Operands& o, const Kernels& k,
                   int64_t task, Ptr memory)
    : p_(p), f_(f), o_(o), k_(k), in_row_(f.outputs), runs_(f.rows) {
  const int64_t out_rows = p.out[0] * p.out[1];
  u0_ = out_rows * (task % f.split) / f.split;
  u1_ = out_rows * (task % f.split + 1) / f.split;
  temporary_ = memory;
  w_row_ = temporary_ + f.temporary;
  const int64_t block0 = task / f.split * f.together;
  blocks_.resize(std::min(f.together, f.blocks - block0));
  Ptr at = w_row_ + f.w_floats;
  for (Block& b : blocks_) {
    b.number = block0 + (&b - blocks_.data());
    b.lanes = make_lanes(p, f.width, b.number, p.n, p.x.n);
    b.tags.assign(p.out[0] * f.ring, -1);
    b.ring = at;
    b.partial = b.ring + f.ring_floats;
    b.sum = b.partial + f.sum_floats;
    at = b.sum + f.sum_floats;
  }
  if (f.groups > 1) interleave();
  const int64_t tiles = ceil_div(p.out[1] * f.outputs, max_lanes(k, k.word));
  const int64_t most = f.groups > 0 ? 1 : ceil_div(p.out[1], tiles);
  for (int64_t u = u0_; u < u1_;) {
    const int64_t uz = u / p.out[1];
    const int64_t begin = u - uz * p.out[1];
    const int64_t end = std::min({begin + most, p.out[1], begin + u1_ - u});
    rows_.push_back({uz, begin, end});
    u += end - begin;
  }
  for (int64_t u = 0; u < p.out[2]; ++u) {
    for (int64_t i = 0; i < p.n; ++i) {
      in_row_[u * p.n + i] = u * p.stride[2] * f.column + i * f.width;
    }
  }
  args_.runs = runs_.data();
  args_.a_step = p.rhs_dilation[2] * f.column;
  args_.a_row = p.stride[2] * f.column;
  args_.c_row = f.groups > 0 ? p.n * f.width : f.width;
  args_.load = 1;
}

// Lane j of a block is feature j / G of its group j % G.
void GradTask::interleave() {
  take_input_.resize(f_.width, 0);
  take_window_.resize(f_.width);
  take_sums_.resize(f_.width);
  for (int64_t group = 0; group < f_.groups; ++group) {
    for (int64_t i = 0; i < p_.n; ++i) take_input_[i * f_.groups + group] = group * p_.n + i;
    for (int64_t i = 0; i < p_.k; ++i) {
      const int64_t lane = i * f_.groups + group;
      const int64_t feature = group * p_.k + i;
      take_window_[lane] = feature;
      take_sums_[feature] = lane;
    }
  }
}

void GradTask::fill_interleaved(const Block& b, ConstPtr from, int64_t n, Ptr to) const {
  if (f_.groups == 1) {
    k_.copy(to, f_.column, from + b.lanes.base, p_.x.sp[2], 1, n, p_.n);
  } else {
    k_.expand(to, f_.column, from + b.lanes.base, p_.x.sp[2], n, take_input_.data(), 1, f_.width,
              b.lanes.channels);
  }
}

// Puts a row of the input into a slot of the ring, unless it is there.
void GradTask::fill(Block* b, int64_t slot, int64_t c, int64_t iz, int64_t iy) const {
  const int64_t tag = (c * p_.in[0] + iz) * p_.in[1] + iy;
  if (b->tags[slot] == tag) return;
  b->tags[slot] = tag;
  const Ptr to = b->ring + slot * f_.columns * f_.column;
  const int64_t left = std::clamp<int64_t>(p_.pad[2], 0, f_.columns);
  const int64_t right = std::clamp<int64_t>(p_.in[2] + p_.pad[2], left, f_.columns);
  to.zero(left * f_.column);
  if (right > left) {
    ConstPtr from =
        o_.x + c * p_.x.c + iz * p_.x.sp[0] + iy * p_.x.sp[1] + (left - p_.pad[2]) * p_.x.sp[2];
    if (f_.groups > 0) {
      fill_interleaved(*b, from, right - left, to + left * f_.column);
    } else {
      fill_lanes(p_, k_, b->lanes, from, p_.x.sp[2], right - left, to + left * f_.column, f_.column,
                 temporary_);
    }
  }
  (to + right * f_.column).zero((f_.columns - right) * f_.column);
}

// Adds the window rows of args_ to the sums of some output rows; `first`: that of the first run.
void GradTask::multiply(const Block& b, const Rows& rows, int64_t y0, int64_t first) {
  if (args_.n_runs == 0) return;
  if (f_.groups > 0) return multiply_row(b, rows, y0, first);
  offsets_.clear();
  for (int64_t uy = rows.begin; uy < rows.end; ++uy) {
    const int64_t at = slot(rows.uz, input_row(uy, first), y0) * f_.columns * f_.column;
    for (const int64_t within : in_row_) offsets_.push_back(at + within);
  }
  const auto outputs = static_cast<int64_t>(offsets_.size());
  const int64_t tiles = ceil_div(outputs, max_lanes(k_, k_.word));
  const int64_t u = rows.uz * p_.out[1] + rows.begin;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t q0 = outputs * t / tiles;
    const int64_t q1 = outputs * (t + 1) / tiles;
    args_.c = b.partial + ((u - u0_) * f_.outputs + q0) * f_.width;
    k_.lanes_grad[q1 - q0](&args_, offsets_.data() + q0);
  }
  args_.n_runs = 0;
}

// The same for one output row and interleaved groups.
void GradTask::multiply_row(const Block& b, const Rows& rows, int64_t y0, int64_t first) {
  const int64_t slot0 = slot(rows.uz, input_row(rows.begin, first), y0);
  const Ptr row = b.ring + slot0 * f_.columns * f_.column;
  const Ptr sums = b.partial + (rows.uz * p_.out[1] + rows.begin - u0_) * f_.outputs * f_.width;
  const int64_t most = max_grad_channels(k_, f_.groups);
  for (int64_t u = 0, columns = 0; u < p_.out[2]; u += columns) {
    columns = p_.out[2] - u < kMaxGradColumns ? 1 : kMaxGradColumns;
    for (int64_t i = 0, channels = most; i < p_.n; i += channels) {
      while (channels > p_.n - i) channels /= 2;
      args_.a = row + u * args_.a_row + i * f_.groups;
      args_.c = sums + (u * p_.n + i) * f_.width;
      k_.groups_grad[columns][channels][f_.groups](&args_);
    }
  }
  args_.n_runs = 0;
}

// Rows [y0, y1) of the window at (c, z).
void GradTask::walk(Block* b, int64_t c, int64_t z, int64_t y0, int64_t y1) {
  ConstPtr w = o_.w + b->number * f_.width * p_.w.k + c * p_.w.c + z * p_.w.sp[0] + y0 * p_.w.sp[1];
  int64_t w_y = p_.w.sp[1];
  args_.b_step = p_.w.sp[2];
  if (f_.w_floats > 0) {
    args_.b_step = f_.width;
    w_y = p_.win[2] * f_.width;
    for (int64_t y = y0; y < y1; ++y) {
      const Ptr to = w_row_ + (y - y0) * w_y;
      ConstPtr from = w + (y - y0) * p_.w.sp[1];
      if (f_.groups > 1) {
        k_.expand(to, f_.width, from, p_.w.sp[2], p_.win[2], take_window_.data(), 1, f_.width,
                  b->lanes.lanes);
      } else {
        k_.copy(to, f_.width, from, p_.w.sp[2], p_.w.k, p_.win[2], b->lanes.lanes);
      }
    }
    w = w_row_;
  }
  args_.a = b->ring;
  args_.cols = b->lanes.lanes;
  for (const Rows& shared : rows_) {
    const int64_t iz = shared.uz * p_.stride[0] - p_.pad[0] + z * p_.rhs_dilation[0];
    if (iz < 0 || iz >= p_.in[0]) continue;
    // Window rows, from `first` on, that the same output rows read input for.
    Rows rows{shared.uz, 0, 0};
    int64_t first = y0;
    args_.n_runs = 0;
    for (int64_t y = y0; y < y1; ++y) {
      Rows real = shared;
      while (real.begin < real.end && input_row(real.begin, y) < 0) ++real.begin;
      while (real.begin < real.end && input_row(real.end - 1, y) >= p_.in[1]) --real.end;
      if (real.begin != rows.begin || real.end != rows.end) multiply(*b, rows, y0, first);
      if (real.begin == real.end) continue;
      for (int64_t uy = real.begin; uy < real.end; ++uy) {
        const int64_t iy = input_row(uy, y);
        fill(b, slot(shared.uz, iy, y0), c, iz, iy);
      }
      if (args_.n_runs == 0) {
        rows = real;
        first = y;
        args_.b = w + (y - y0) * w_y;
      }
      Run& run = runs_[args_.n_runs++];
      run.a = (y - first) * p_.rhs_dilation[1] * f_.columns * f_.column;
      run.b = (y - first) * w_y;
      run.len = p_.win[2];
    }
    multiply(*b, rows, y0, first);
  }
}

void GradTask::sum() {
  const int64_t window_rows = p_.c * p_.win[0] * p_.win[1];
  const int64_t used = (u1_ - u0_) * f_.outputs * f_.width;
  for (int64_t row0 = 0; row0 < window_rows; row0 += p_.chunk_rows) {
    const int64_t row1 = std::min(row0 + p_.chunk_rows, window_rows);
    for (const Block& b : blocks_) b.partial.zero(used);
    for (int64_t row = row0; row < row1;) {
      const int64_t plane = row / p_.win[1];
      const int64_t y0 = row - plane * p_.win[1];
      const int64_t y1 = std::min({y0 + f_.rows, p_.win[1], y0 + row1 - row});
      for (Block& b : blocks_) walk(&b, plane / p_.win[0], plane % p_.win[0], y0, y1);
      row += y1 - y0;
    }
    for (const Block& b : blocks_) {
      if (row0 == 0) {
        std::memcpy(b.sum, b.partial, used * k_.size);
      } else {
        k_.accumulate(b.sum, b.partial, used);
      }
    }
  }
}

void GradTask::finish() const {
  Problem rows = flatten_groups(p_);  // images take the place of output pixels
  rows.y.sp[2] = p_.y.n;
  for (const Block& b : blocks_) {
    const int64_t feature = b.number * f_.width;
    if (f_.groups > 1) {
      k_.expand(b.sum, f_.width, b.sum, f_.width, (u1_ - u0_) * f_.outputs, take_sums_.data(), 1,
                f_.width, f_.width);
    }
    for (int64_t u = u0_; u < u1_; ++u) {
      for (int64_t v = 0; v < p_.out[2]; ++v) {
        finish_rows(rows, k_, o_, b.sum + ((u - u0_) * f_.outputs + v * p_.n) * f_.width, f_.width,
                    p_.n, b.lanes.lanes, 0, feature,
                    (u / p_.out[1]) * p_.y.sp[0] + (u % p_.out[1]) * p_.y.sp[1] + v * p_.y.sp[2] +
                        feature * p_.y.k);
      }
    }
  }
}

void run_grad(const Problem& p, const Operands& o, const Execution& e) {
  const Grad f = make_grad(p, e.target);
  useful_pool(p, e).run(f.tasks(), [&](int64_t task, int64_t worker) {
    const Ptr memory = e.workspace + worker * f.thread_floats();
    GradTask one(p, f, o, *e.target.kernels, task, memory);
    one.sum();
    one.finish();
  });
  add_skipped_nonfinite(p, o, e);
}

std::string lanes_rejects(const Problem& p) {
  if (p.dilated_input()) return "lhs_dilation > 1";
  if (!p.plain() && p.chunk_rows > 0) return "weight gradients need float32 or float64";
  if (!p.plain() && p.c > 1 && p.x.g != p.c * p.x.c) return "the channels of a group lie apart";
  const int64_t multiples = p.chunk_rows > 0 ? p.n : p.c;
  const bool narrow = p.chunk_rows == 0 && p.k <= kFewFeatures && p.win[2] > 1;
  if (p.g == 1 && multiples > 1 && !narrow) return "one group";
  if (multiples > (narrow ? 256 : 64)) return "too many channels per group";
  if (p.chunk_rows > 0) {
    const double ring =
        static_cast<double>(p.out[0]) * static_cast<double>(p.out[1]) *
        static_cast<double>(p.stride[1]) *
        static_cast<double>((p.win[2] - 1) * p.rhs_dilation[2] + p.out[2] * p.stride[2]) *
        static_cast<double>(p.n);
    if (ring > 4e6) return "the window rows do not fit the workspace";
  }
  return {};
}

// How much of an extent, output rows or pixels, a task has, so that all threads are done soonest:
// `others` times as many tasks, in tiles of so much; `cycles` for each of the extent.
int64_t extent_of_tasks(int64_t extent, int64_t others, double cycles, int64_t tile,
                        int64_t threads) {
  // A tile of one row loads as many filters as one of many rows.
  constexpr double kTile = 1;
  int64_t best = extent;
  double best_time = 1e300;
  for (int64_t parts = 1; parts <= std::min(extent, 8 * threads); ++parts) {
    const int64_t own = ceil_div(extent, parts);
    const double tiles =
        static_cast<double>(own) + kTile * static_cast<double>(ceil_div(own, tile));
    const double time = finish_cycles(others * ceil_div(extent, own), cycles * tiles, threads);
    if (time < 0.97 * best_time) {
      best = own;
      best_time = time;
    }
  }
  return best;
}

// Of all channels, one product of a vector in a cycle.
double pixel_cycles(const Problem& p, const Target& t) {
  return static_cast<double>(ceil_div(p.g * p.k, t.kernels->width) * p.reduction());
}

// Output rows of a task, in tiles of so many rows; 0: all.
int64_t rows_of_tasks(const Problem& p, const Target& t, int64_t tile) {
  const int64_t threads = useful_threads(p, t.threads);
  const int64_t others = p.n * p.out[0];
  if (threads == 1 || others >= 4 * threads) return 0;
  const double cycles = static_cast<double>(p.out[2]) * pixel_cycles(p, t);
  return extent_of_tasks(p.out[1], others, cycles, tile, threads);
}

// Output pixels of a task, where there are few rows, in tiles of so many pixels; 0: all.
int64_t cols_of_tasks(const Problem& p, const Target& t, int64_t tile) {
  const int64_t threads = useful_threads(p, t.threads);
  const int64_t rows = p.n * p.out[0] * p.out[1];
  if (threads == 1 || rows >= 2 * threads) return 0;
  const int64_t cols = extent_of_tasks(p.out[2], rows, pixel_cycles(p, t), tile, threads);
  return cols < p.out[2] ? round_up(cols, tile) : 0;
}

// Output rows of a task, at most as asked, whose input rows fit a quarter of the second-level
// cache: whole tiles of them, all of about the same size.
int64_t rows_of_strip(const Problem& p, const Target& t, const Params& params) {
  const int64_t limit = caches().l2 / 4 / t.kernels->size;
  const int64_t tile = params[kLanesSweep];
  const int64_t most = params[kLanesRows] == 0 ? p.out[1] : params[kLanesRows];
  const int64_t in_rows = limit / (p.win[0] * p.in[2] * p.g * p.c);
  int64_t fitting = p.out[1];
  if (in_rows < p.in[1]) {
    const int64_t tiles = (in_rows - (p.win[1] - 1) * p.rhs_dilation[1] - 1) / p.stride[1] / tile;
    fitting = std::max<int64_t>(1, tiles) * tile;
  }
  const int64_t tasks = ceil_div(p.out[1], std::min(most, fitting));
  return round_up(ceil_div(p.out[1], tasks), tile);
}

int64_t most_pixels(const Target& t) { return max_lanes(*t.kernels, t.kernels->word); }

Params lanes_defaults(const Problem& p, const Target& t) {
  Params params{};
  params[kLanesPixels] = most_pixels(t);
  params[kLanesStrip] = 1;
  if (p.chunk_rows > 0) return params;
  if (max_window(p, *t.kernels, 1) > 0) {
    params[kLanesWindow] = std::min<int64_t>(kMaxWindowRows, p.out[1]);
    params[kLanesPixels] = max_window(p, *t.kernels, params[kLanesWindow]);
    // A large image is read in few streams at a time.
    const int64_t image = p.g * p.in[0] * p.in[1] * p.in[2] * kDtypeRows[p.dtype].size;
    if (p.out[2] > params[kLanesPixels] && image > caches().l2 / 4) {
      params[kLanesPixels] = p.stride[2] == 1 ? 4 : 2;
    }
    params[kLanesStrip] = 0;
    params[kLanesRows] = rows_of_tasks(p, t, params[kLanesWindow]);
    return params;
  }
  // One row has nothing to share, nor have narrow windows of a channel that move by two columns.
  if (expands(p) || (p.out[1] > 1 && (p.stride[2] == 1 || p.win[2] > 3))) {
    params[kLanesSweep] = max_sweep(p, *t.kernels);
    // An image beyond the cache is read in fewer streams.
    const int64_t image = p.g * p.c * p.in[0] * p.in[1] * p.in[2] * t.kernels->size;
    if (p.stride[2] == 1 && image > caches().l2) {
      params[kLanesSweep] = std::min<int64_t>(params[kLanesSweep], 5);
    }
  }
  // In place, elements are made words at every position of the window.
  constexpr int64_t kFewPositions = 9;
  const bool pays = is_word(*t.kernels, p.dtype) || p.window() <= kFewPositions;
  const bool in_place = pays && readable_in_place(p, *t.kernels);
  if (params[kLanesSweep] > 0 || in_place) params[kLanesStrip] = 0;
  if (params[kLanesStrip] == 0) {
    params[kLanesPixels] = std::min<int64_t>(p.stride[2] == 1 ? 8 : 4, most_pixels(t));
    params[kLanesRows] = rows_of_tasks(p, t, std::max<int64_t>(1, params[kLanesSweep]));
    if (params[kLanesSweep] == 0) params[kLanesCols] = cols_of_tasks(p, t, params[kLanesPixels]);
    if (params[kLanesSweep] > 0 && !sweeps_elements(p, *t.kernels)) {
      params[kLanesRows] = rows_of_strip(p, t, params);
    }
    return params;
  }
  // A strip of at most a quarter of the second-level cache, and some tasks for every thread.
  const int64_t limit = caches().l2 / 4 / t.kernels->size;
  const int64_t column = p.c * t.kernels->width;
  const int64_t rows1 = p.win[0] * ((p.win[1] - 1) * p.rhs_dilation[1] + 1);
  const int64_t window_cols = (p.win[2] - 1) * p.rhs_dilation[2] + 1;
  const int64_t max_pixels = most_pixels(t);
  int64_t cols = p.out[2];
  while (cols > 2 * max_pixels &&
         rows1 * ((cols - 1) * p.stride[2] + window_cols) * column > limit) {
    cols = ceil_div(cols, 2);
  }
  params[kLanesCols] = cols;
  const int64_t row = p.win[0] * ((cols - 1) * p.stride[2] + window_cols) * column * p.stride[1];
  int64_t rows = std::clamp<int64_t>((limit - rows1 * row / p.stride[1]) / row, 1, p.out[1]);
  const int64_t others = p.n * ceil_div(p.g * p.k, t.kernels->width) * p.out[0];
  const int64_t threads = useful_threads(p, t.threads);
  if (threads > 1 && others < 4 * threads) {
    rows = std::min(rows, ceil_div(p.out[1], ceil_div(4 * threads, others)));
  }
  params[kLanesRows] = std::max<int64_t>(1, rows);
  return params;
}

std::string lanes_check(const Problem& p, const Target& t, const Params& params) {
  if (params[kLanesPixels] < 1 || params[kLanesPixels] > most_pixels(t)) {
    return "pixels: no such tile";
  }
  if (params[kLanesRows] < 0 || params[kLanesCols] < 0) return "rows, cols: negative";
  if (params[kLanesStrip] != 0 && params[kLanesStrip] != 1) return "strip: 0 or 1";
  if (params[kLanesWindow] != 0) {
    if (params[kLanesWindow] < 0 || params[kLanesStrip] != 0 || params[kLanesSweep] != 0 ||
        p.chunk_rows > 0 ||
        params[kLanesPixels] > max_window(p, *t.kernels, params[kLanesWindow])) {
      return "window: no such tile";
    }
    return {};
  }
  if (params[kLanesStrip] == 0 && params[kLanesSweep] == 0) {
    if (!readable_in_place(p, *t.kernels)) return "strip: the input cannot be read in place";
    if (params[kLanesPixels] > max_lanes(*t.kernels, p.dtype)) return "pixels: no such tile";
  }
  if (params[kLanesSweep] != 0 &&
      (params[kLanesSweep] < 0 || params[kLanesStrip] != 0 || p.chunk_rows > 0 ||
       params[kLanesSweep] > max_sweep(p, *t.kernels))) {
    return "sweep: no such tile";
  }
  return {};
}

int64_t lanes_workspace(const Problem& p, const Target& t, const Params& params) {
  const int64_t threads = useful_threads(p, t.threads);
  if (p.chunk_rows > 0) return make_grad(p, t).thread_floats() * threads;
  const Forward f = make_forward(p, t, params);
  return f.shared_floats() + f.thread_floats() * threads;
}

void lanes_run(const Problem& p, const Params& params, const Operands& o, const Execution& e) {
  if (p.chunk_rows > 0) {
    run_grad(p, o, e);
  } else if (params[kLanesWindow] != 0) {
    run_window(p, params, o, e);
  } else if (params[kLanesSweep] != 0) {
    run_sweep(p, params, o, e);
  } else {
    (params[kLanesStrip] != 0 ? run_forward : run_in_place)(p, params, o, e);
  }
}

double lanes_cost(const Problem& p, const Target& t, const Params& params) {
  const double vectors = static_cast<double>(ceil_div(p.g * p.k, t.kernels->width));
  const double taps = static_cast<double>(p.n * p.pixels()) * static_cast<double>(p.reduction());
  // One load per fma. Where a vector's lanes read few elements, or several channels per group,
  // these are copied into lanes first.
  const double read = static_cast<double>(p.n * p.in[0] * p.in[1] * p.in[2] * p.c);
  if (p.chunk_rows > 0) {
    const double channels = static_cast<double>(p.n);
    if (const int64_t groups = interleaved_groups(p, *t.kernels); groups > 0) {
      // Copies wait for lines that lie apart, half as long for half of a line, and longer where
      // each is on a page of its own; sums are set, added to and put in order.
      constexpr int64_t kPage = 4096;
      const bool far = grad_operands(p) * t.kernels->size > caches().l2;
      const bool pages = p.x.sp[2] * t.kernels->size >= kPage;
      const double wait = static_cast<double>(t.kernels->width) * (far || pages ? 2.1 : 1.2);
      const int64_t lines = groups > 1 ? 1 : ceil_div(p.n, t.kernels->width);
      const double copied = read / channels * static_cast<double>(lines) +
                            static_cast<double>(p.c) * static_cast<double>(p.window());
      const double sums = static_cast<double>(p.n * p.pixels()) * 40;
      return vectors * (taps * 0.85 + copied * wait + sums);
    }
    if (channels > 1) return vectors * taps * (1.35 + channels / 16.0);
    return vectors * (taps * 0.9 + (p.k > 1 ? read * 3.2 : 0.0));
  }
  if (p.c == 1) return vectors * (taps * 0.9 + (params[kLanesStrip] != 0 ? read * 3.2 : 0.0));
  // Filters are put into the order of lanes.
  const int64_t words = p.g * p.k * p.reduction();
  const double filters =
      static_cast<double>(words) * (words * t.kernels->size <= caches().l2 / 2 ? 0.4 : 1.6);
  // A permutation or a broadcast for every three of them, no copy. Broadcasts are for one vector of
  // features; where the window moves by two columns, some are for a single product.
  if (params[kLanesSweep] > 0 && sweep_form(p, t.kernels->width) == kSweepPermuted) {
    return filters + vectors * taps * (p.g == 1 ? 1.5 : 0.75);  // one group leaves lanes empty
  }
  if (params[kLanesSweep] > 0) {
    return filters + vectors * taps *
                         (p.stride[2] > 1          ? 1.02
                          : p.k > t.kernels->width ? 0.85
                                                   : 0.6);
  }
  return filters + vectors * (taps * 1.3 + read * 3.2);
}

std::vector<ParamSpec> lanes_param_specs() {
  return {
      {"rows", "output rows per block; 0: all", {0, 1, 2, 4, 8, 16}},
      {"cols", "output pixels per block; 0: the whole row", {0, 28, 56, 112, 448}},
      {"pixels", "output pixels of the register tile", {2, 4, 6, 7, 8, 10, 12, 14, 16}},
      {"strip", "1: a padded copy of the block's input; 0: read in place but at borders", {0, 1}},
      {"sweep",
       "output rows of the tile that is swept along x; 0: tiles of pixels",
       {0, 1, 2, 3, 4, 5, 6, 7}},
      {"window",
       "output rows of the tile of whole depthwise 3x3 windows; 0: other tiles",
       {0, 1, 2}},
  };
}

std::string rejects_unless(bool depthwise, const Problem& p) {
  if (((p.chunk_rows > 0 ? p.n : p.c) == 1) != depthwise) {
    return depthwise ? "several input channels per group" : "depthwise";
  }
  return lanes_rejects(p);
}

}  // namespace

Algorithm lanes_algorithm(const char* name, const char* summary, bool depthwise) {
  Algorithm row{name,
                summary,
                "lanes_driver.h",
                {kF32, kF64, kBF16, kF16, kS8, kU8},
                lanes_param_specs(),
                depthwise ? [](const Problem& p) { return rejects_unless(true, p); }
                          : [](const Problem& p) { return rejects_unless(false, p); },
                lanes_defaults,
                lanes_check,
                lanes_workspace,
                lanes_run,
                lanes_cost};
  row.integers_as_floats = true;
  return row;
}

}  // namespace jaxwin
