// SPDX-License-Identifier: Apache-2.0

#include "algorithms/gemm_driver.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>

namespace jaxwin {
namespace {

constexpr int64_t kStripBytes = 1 << 20;  // per thread
constexpr int64_t kTableBytes = 8;        // of an entry of the indirection buffer
constexpr int64_t kFewPixels = 48;        // that leave no time to wait for filters
// Bytes that a tile adds to what the last one read, if windows overlap: fewer come without
// prefetch.
constexpr int64_t kManyAhead = 2048;

int64_t strip_limit(const Kernels& k) { return kStripBytes / k.size; }

// Values of the parameter `pack`.
enum Pack {
  kInPlace,  // the micro-kernel reads the filters where they lie
  kShared,   // all panels are packed first, once per call
  kLocal,    // every block packs the panels it is about to use, for itself
  kBefore,   // the filters are panels already (Problem::panel)
};

// What becomes of padding along x. (Along y and z, output rows leave it out: RowKinds.)
enum class Edges {
  kPadded,    // A holds it: it is multiplied
  kByTile,    // a tile that meets it leaves it out, at one window position along x after another
  kByColumn,  // all pixels of a row: each window position along x has tiles of its own
};

// As much of B as leaves most of the second-level cache to A and C.
int64_t panel_floats(const Kernels& k) { return caches().l2 / k.size / 4; }

// Everything that follows from problem, parameters and machine: computed the same way when the
// workspace is declared and when the convolution runs.
struct Layout {
  Problem p;         // collapsed; its channels are words of them, its strides those of the operands
  int64_t channels;  // of the operands, per group
  Lowering lowering;
  int64_t mr, nv, kc, pack, full;
  int64_t width;       // vector lanes
  int64_t panel;       // features per panel, nv * width
  int64_t panels;      // per group
  int64_t reduction;   // c * window
  int64_t out_rows;    // z * y
  int64_t all_rows;    // n * z * y
  int64_t rows, cols;  // of one block: output rows, output pixels
  int64_t row_blocks, col_blocks;
  int64_t panel_split;  // tasks along the features
  int64_t group;        // panels that are passed over together, kc steps of the reduction at a time
  int64_t unit;         // window order: floats per input column, Kd * Kh * C
  bool disjoint;        // window order: windows share no column
  bool bare;            // window order: that of the input's rows, but for their padding
  bool streams;         // the filters come from behind the second-level cache in every call
  bool in_order;        // they are fetched ahead in the order of memory, kc steps at a time
  bool follows;         // columns follow each other in the input, and are read by a panel or two
  int64_t next;         // then: floats from the next pixel's first column to one not yet read
  Edges edges;
  int64_t marked;     // a pixel of each output row that meets all window positions along x, or -1
  int64_t strip_row;  // floats of A per output row of a block
  // Padded rows, columns of windows: input rows of one (image, z) in a block, floats of one of
  // them.
  int64_t plane_rows, input_row;
  int64_t plane;  // floats of all of them
  int64_t pixel_stride, a_step;
  bool buffered;  // sums are not written to the result itself
  int64_t piece;  // pixels of a row that are finished, if at all, as soon as they are summed; or 0
  int64_t packed_floats, full_floats;                 // shared
  int64_t zero_floats, table_words;                   // shared: the indirection buffer
  int64_t strip_floats, local_floats, buffer_floats;  // per thread

  int64_t thread_floats() const { return strip_floats + local_floats + buffer_floats; }
  bool by_column() const { return edges != Edges::kPadded; }
};

int64_t strip_columns(const Problem& p, bool disjoint, int64_t pixels) {
  if (disjoint) return pixels * p.win[2];
  return (pixels - 1) * p.stride[2] + (p.win[2] - 1) * p.rhs_dilation[2] + 1;
}

// Padded rows: the input rows that `rows` output rows of one (image, z) read.
int64_t rows_read(const Problem& p, int64_t rows) {
  return std::min((rows - 1) * p.stride[1] + (p.win[1] - 1) * p.rhs_dilation[1] + 1, p.in[1]);
}

// Padded rows: floats of the strip for `rows` output rows of `cols` pixels.
int64_t padded_floats(const Problem& p, int64_t rows, int64_t cols) {
  const int64_t planes = std::max<int64_t>(1, rows / p.out[1]) * p.win[0];
  return planes * rows_read(p, std::min(rows, p.out[1])) * strip_columns(p, false, cols) * p.c;
}

// Columns of windows (MEC): floats of the strip for `rows` output rows of `cols` pixels.
int64_t lowered_floats(const Problem& p, int64_t rows, int64_t cols) {
  const int64_t parts = std::max<int64_t>(1, rows / p.out[1]);
  return parts * cols * p.win[2] * rows_read(p, std::min(rows, p.out[1])) * p.win[0] * p.c;
}

// Floats of the strip where it holds input rows that several output rows share.
int64_t shared_floats(const Problem& p, Lowering lowering, int64_t rows, int64_t cols) {
  return lowering == Lowering::kRows ? padded_floats(p, rows, cols) : lowered_floats(p, rows, cols);
}

// Output rows of a block share the input rows that they read.
bool shares_rows(Lowering lowering) {
  return lowering == Lowering::kRows || lowering == Lowering::kWidth;
}

// Whether sums are not written to the result itself.
bool is_buffered(const Problem& p, const Kernels& k) {
  return p.y.k != 1 || !is_word(k, p.out_dtype);
}

// Pixels of a row of `cols` whose sums, of a panel of features, stay in the first-level cache until
// they are finished: whole tiles. Transposed, the more there are the fewer cache lines of the
// result are written in parts.
int64_t piece_of(const Problem& p, const Kernels& k, int64_t mr, int64_t panel, int64_t cols) {
  if (p.y.k != 1) return cols;
  const int64_t fit = caches().l1 / 4 / k.size / panel;
  return std::min(cols, std::max<int64_t>(1, fit / mr) * mr);
}

// Whether rows in window order, of windows that overlap, are rows of the input with their padding.
bool is_bare(const Problem& p) {
  return p.win[0] * p.win[1] == 1 && p.plain() && (p.x.c == 1 || p.c == 1) && p.x.sp[2] == p.c;
}

// The most reduction steps up to `most` that are one piece of the filters' memory, which leaves
// room in the second-level cache for the next one; 0: there are none, or they are too few to pay.
int64_t steps_in_order(const Problem& p, const Kernels& k, int64_t most) {
  if (p.w.k != 1 || p.w.c != p.k || !p.plain() || p.n * p.pixels() > kFewPixels) return 0;
  const int64_t fit = std::min(most, panel_floats(k) * 4 / 5 / p.w.c) / 8 * 8;
  for (int64_t steps = fit; steps >= std::max<int64_t>(32, fit / 2); steps -= 8) {
    if (p.c % steps == 0) return steps;
  }
  return 0;
}

// Whether that many reduction steps always are one piece of the filters' memory, for all features
// or, where each feature's channels follow each other, for any that do.
bool in_one_piece(const Problem& p, const Kernels& k, int64_t steps) {
  if (k.channels != 1) return false;
  if (p.w.c == 1) return p.w.k == p.c && steps == p.c;
  return p.w.k == 1 && p.w.c == p.k && p.c % steps == 0;
}

// Rows of a panel of filters in place that the second-level cache holds at a time: they lie as far
// apart as all features of all groups, and meet in the same few of its sets where that is a
// multiple of many.
int64_t rows_held(const Problem& p, const Kernels& k, int64_t panel) {
  constexpr int64_t kWays = 16;
  const int64_t apart = std::gcd(p.w.c * k.size, caches().l2 / kWays);
  return caches().l2 / std::max(apart, panel * k.size);
}

// Steps per pass over filters in place: near the most of them that stay in the second-level cache
// for all features, in whole window positions or equal parts of one.
int64_t steps_in_place(const Problem& p, const Kernels& k) {
  const int64_t fit = std::clamp<int64_t>(panel_floats(k) * 4 / 5 / p.w.c / 8 * 8, 128, 512);
  const int64_t most = fit * 5 / 4 + 8;
  const int64_t parts = ceil_div(p.c, most);
  const int64_t steps = parts == 1 ? most / p.c * p.c : p.c % parts == 0 ? p.c / parts : 0;
  if (steps % 8 == 0 && steps * 5 >= fit * 3) return steps;
  return fit;
}

Problem words_of(const Problem& problem, const Kernels& k) {
  Problem p = collapse(problem);
  p.c = ceil_div(p.c, k.channels);
  return p;
}

// The pixels of [j0, j1) that read the input at window position v along x.
Range pixels_at(const Problem& p, int64_t v, int64_t j0, int64_t j1) {
  return inside(j0, j1, p.stride[2], v * p.rhs_dilation[2] - p.pad[2], p.in[2]);
}

// Whether some pixel of [j0, j1) reads padding along x.
bool meets_padding(const Problem& p, int64_t j0, int64_t j1) {
  const int64_t span = (p.win[2] - 1) * p.rhs_dilation[2] + 1;
  return j0 * p.stride[2] < p.pad[2] || (j1 - 1) * p.stride[2] - p.pad[2] + span > p.in[2];
}

// Cycles of a reduction step over so many pixels and a panel, in tiles of nearly equal height.
double step_cycles(const Kernels& k, int64_t pixels, int64_t mr, int64_t nv,
                   double a_cycles = kNearCycles) {
  if (pixels == 0) return 0;
  const int64_t most = std::max<int64_t>(1, k.max_mr[nv]);  // 0: no such tile, which is refused
  const int64_t tiles = ceil_div(pixels, std::min(mr, most));
  const int64_t high = pixels % tiles;
  return static_cast<double>(high) * tile_step_cycles(k, pixels / tiles + 1, nv, a_cycles) +
         static_cast<double>(tiles - high) * tile_step_cycles(k, pixels / tiles, nv, a_cycles);
}

// Cycles of a window row and a panel over the pixels of an output row: all of them, or at each
// window position those that it reads, whose sums are loaded and stored in between.
double whole_cycles(const Problem& p, const Kernels& k, int64_t mr, int64_t nv) {
  return step_cycles(k, p.out[2], mr, nv) * static_cast<double>(p.win[2] * p.c);
}
double trimmed_cycles(const Problem& p, const Kernels& k, int64_t mr, int64_t nv) {
  const double rows = static_cast<double>(p.win[0] * p.win[1]);
  double cycles = 0;
  for (int64_t v = 0; v < p.win[2]; ++v) {
    const Range real = pixels_at(p, v, 0, p.out[2]);
    const int64_t pixels = real.end - real.begin;
    cycles += step_cycles(k, pixels, mr, nv) * static_cast<double>(p.c) +
              2.0 * static_cast<double>(pixels * nv) / rows;
  }
  return cycles;
}

// Of tiles of mr pixels and nv vectors of features. What is not sure to pay is left alone.
Edges edges_of(const Problem& p, const Kernels& k, Lowering lowering, int64_t mr, int64_t nv) {
  const int64_t span = (p.win[2] - 1) * p.rhs_dilation[2] + 1;
  const bool in_place = lowering == Lowering::kDirect;
  const bool overlaps = lowering == Lowering::kWindow && p.stride[2] < span;
  if (!in_place && !overlaps && lowering != Lowering::kRows) return Edges::kPadded;
  const int64_t right = (p.out[2] - 1) * p.stride[2] + span - p.pad[2] - p.in[2];
  const int64_t most = std::max(p.pad[2], right);
  if (most <= 0) return Edges::kPadded;
  if (trimmed_cycles(p, k, mr, nv) < 0.97 * whole_cycles(p, k, mr, nv)) return Edges::kByColumn;
  return in_place || most >= mr * p.stride[2] ? Edges::kByTile : Edges::kPadded;
}

// Cycles of a window row over the pixels of an output row and all features.
double row_cycles(const Problem& p, const Kernels& k, Lowering lowering, const Tile& tile) {
  const int64_t vectors = ceil_div(p.k, k.width);
  const int64_t panels = ceil_div(vectors, tile.nv);
  const auto of_panel = [&](int64_t nv) {
    return edges_of(p, k, lowering, tile.mr, nv) == Edges::kByColumn
               ? trimmed_cycles(p, k, tile.mr, nv)
               : whole_cycles(p, k, tile.mr, nv);
  };
  return static_cast<double>(panels - 1) * of_panel(tile.nv) +
         of_panel(vectors - (panels - 1) * tile.nv);
}

// The parts that the panels of a block are split in, where there are fewer blocks than threads: the
// fewest of which all threads are done soonest, as each of them makes the block's input anew.
int64_t parts_of_panels(int64_t blocks, int64_t panels, int64_t threads) {
  const auto busiest = [&](int64_t parts) {
    return ceil_div(blocks * parts, threads) * ceil_div(panels, parts);
  };
  int64_t best = 1;
  for (int64_t parts = 2; blocks < threads && parts <= std::min(panels, threads); ++parts) {
    if (busiest(parts) < busiest(best)) best = parts;
  }
  return best;
}

// Blocks of so many output rows; where rows share what they read, each is of one (image, z).
int64_t blocks_of_rows(const Problem& p, Lowering lowering, int64_t rows) {
  const int64_t planes = p.n * p.out[0];
  if (!shares_rows(lowering)) return ceil_div(planes * p.out[1], rows);
  return rows < p.out[1] ? planes * ceil_div(p.out[1], rows) : ceil_div(planes, rows / p.out[1]);
}

struct Extent {
  int64_t rows, cols;
};

// Output rows of a block and pixels of each, at most so many: the most with which all threads are
// done soonest, the filters being read by panels. Each block comes to them `again`, for the time of
// some more pixels. Rows are parted, in multiples of a tile, where there are few of them.
Extent blocks_for(const Problem& p, const Kernels& k, Lowering lowering, const Extent& most,
                  const Tile& tile, int64_t again, int64_t threads) {
  constexpr int64_t kTried = 64;
  if (threads == 1) return most;
  const int64_t panels = ceil_div(p.k, tile.nv * k.width);
  const double cycles = tile_step_cycles(k, tile.mr, tile.nv, kNearCycles) *
                        static_cast<double>(p.reduction()) / static_cast<double>(tile.mr);
  Extent best = most;
  double best_time = 1e300;
  const auto consider = [&](int64_t rows, int64_t cols) {
    const int64_t blocks = p.g * blocks_of_rows(p, lowering, rows) * ceil_div(p.out[2], cols);
    const int64_t parts = parts_of_panels(blocks, panels, threads);
    const int64_t pixels = (rows * cols + again) * ceil_div(panels, parts);
    const double time =
        finish_cycles(blocks * parts, cycles * static_cast<double>(pixels), threads);
    if (time < 0.95 * best_time) {
      best = {rows, cols};
      best_time = time;
    }
  };
  const int64_t step = ceil_div(most.rows, kTried);
  for (int64_t rows = most.rows; rows > 0; rows -= step) consider(rows, most.cols);
  if (p.g * p.n * p.out[0] * p.out[1] < 2 * threads) {
    for (int64_t parts = 2; parts <= 4 * threads; ++parts) {
      const int64_t cols = round_up(ceil_div(most.cols, parts), tile.mr);
      if (cols < most.cols) consider(1, cols);
    }
  }
  return best;
}

Layout make_layout(const Problem& problem, const Target& t, const Params& params,
                   Lowering lowering) {
  Layout l{};
  l.p = words_of(problem, *t.kernels);
  l.channels = problem.c;
  const Problem& p = l.p;
  l.lowering = lowering;
  l.mr = params[kMr];
  l.nv = params[kNv];
  l.pack = params[kPack];
  l.full = params[kFull];
  l.width = t.kernels->width;
  l.panel = l.nv * l.width;
  l.panels = ceil_div(p.k, l.panel);
  l.reduction = p.reduction();
  l.kc = params[kKc] == 0 ? l.reduction : std::min(params[kKc], l.reduction);
  l.out_rows = p.out[0] * p.out[1];
  l.all_rows = p.n * l.out_rows;
  l.rows = l.full != 0 ? 1 : params[kRows] == 0 ? l.all_rows : std::min(params[kRows], l.all_rows);
  l.cols = l.full != 0 || params[kCols] == 0 ? p.out[2] : std::min(params[kCols], p.out[2]);
  if (shares_rows(lowering) && l.full == 0 && l.rows >= p.out[1]) {
    l.rows = l.rows / p.out[1] * p.out[1];
  }
  l.row_blocks = l.full != 0 ? l.all_rows : blocks_of_rows(p, lowering, l.rows);
  if (shares_rows(lowering)) {
    l.plane_rows = rows_read(p, l.full != 0 ? p.out[1] : std::min(l.rows, p.out[1]));
    l.input_row = (lowering == Lowering::kRows ? strip_columns(p, false, l.cols) : p.win[0]) * p.c;
    l.plane = l.plane_rows * l.input_row;
  }
  l.col_blocks = ceil_div(p.out[2], l.cols);
  l.unit = p.win[0] * p.win[1] * p.c;
  const int64_t span = (p.win[2] - 1) * p.rhs_dilation[2] + 1;
  l.disjoint = p.stride[2] >= span;
  l.bare = lowering == Lowering::kWindow && l.full == 0 && !l.disjoint && is_bare(p);
  l.a_step = lowering == Lowering::kDirect ? p.x.c : 1;
  l.strip_row = 0;
  if (lowering == Lowering::kDirect) {
    l.pixel_stride = p.stride[2] * p.x.sp[2];
  } else if (lowering == Lowering::kWindow) {
    l.pixel_stride = (l.disjoint ? p.win[2] : p.stride[2]) * l.unit;
    l.strip_row = strip_columns(p, l.disjoint, l.cols) * l.unit;
  } else if (lowering == Lowering::kRows) {
    l.pixel_stride = p.stride[2] * p.c;
  } else if (lowering == Lowering::kWidth) {
    l.pixel_stride = p.win[2] * l.plane;
  } else if (lowering == Lowering::kIndirect) {
    l.pixel_stride = p.window();  // of the indirection buffer
  } else {
    l.pixel_stride = l.full != 0 ? l.reduction : l.kc;
    l.strip_row = l.cols * l.pixel_stride;
  }
  l.buffered = is_buffered(p, *t.kernels);
  // The blocked patch matrix is made once per kc steps, for all features.
  const bool columns = lowering == Lowering::kColumns && l.full == 0;
  const int64_t blocks = p.g * l.row_blocks * l.col_blocks;
  const int64_t wanted = useful_threads(problem, t.threads);
  l.panel_split = columns ? 1 : parts_of_panels(blocks, l.panels, wanted);
  l.group = columns             ? l.panels
            : l.pack == kShared ? 1
                                : std::clamp<int64_t>(panel_floats(*t.kernels) / (l.kc * l.panel),
                                                      1, ceil_div(l.panels, l.panel_split));
  l.streams = p.k * l.reduction * t.kernels->size > caches().l2 / 2;
  const bool all = l.panel_split == 1 && l.group >= l.panels;
  l.in_order = l.streams && (l.pack == kInPlace ? all && steps_in_order(p, *t.kernels, l.kc) == l.kc
                                                : l.pack == kLocal && (all || p.w.c == 1) &&
                                                      in_one_piece(p, *t.kernels, l.kc));
  l.follows = (lowering == Lowering::kDirect || l.bare) && p.window() == p.win[2] && p.x.c == 1 &&
              p.x.sp[2] == p.c && l.pixel_stride <= l.reduction && l.panels <= 2 &&
              (p.window() == 1 || l.mr * l.pixel_stride * t.kernels->size >= kManyAhead);
  l.next = (span - p.stride[2]) * p.c;
  l.edges = edges_of(p, *t.kernels, lowering, l.mr, std::min(l.nv, ceil_div(p.k, l.width)));
  l.marked = 0;
  if (l.by_column()) {
    const int64_t first = std::max<int64_t>(0, ceil_div(p.pad[2], p.stride[2]));
    l.marked = first < p.out[2] && !meets_padding(p, first, first + 1) ? first : -1;
  }
  l.packed_floats = l.pack == kShared ? round_up(p.g * l.panels * l.panel * l.reduction, 16) : 0;
  int64_t strip = l.full != 0 ? l.strip_row * p.g * l.all_rows : l.strip_row * l.rows;
  if (lowering == Lowering::kWidth && l.full != 0) {
    strip = p.g * p.n * p.out[0] * p.out[2] * l.pixel_stride;
  } else if (shares_rows(lowering)) {
    strip = shared_floats(p, lowering, l.rows, l.cols);
  }
  strip = round_up(strip, 16);
  l.full_floats = l.full != 0 ? strip : 0;
  l.strip_floats = l.full != 0 ? 0 : strip;
  if (lowering == Lowering::kIndirect) {
    l.zero_floats = round_up(p.c, 16);
    l.table_words = round_up(p.pixels() * p.window() * kTableBytes / t.kernels->size, 16);
  }
  l.local_floats = l.pack == kLocal ? round_up(l.group * l.panel * l.kc, 16) : 0;
  if (!l.buffered || l.kc == l.reduction) {
    l.piece = piece_of(p, *t.kernels, l.mr, l.panel, l.cols);
  }
  if (l.buffered && l.piece > 0) {
    l.buffer_floats = round_up(l.piece * l.panel, 16);
  } else if (l.buffered) {
    l.buffer_floats = round_up(l.rows * l.cols * l.group * l.panel, 16);
  }
  return l;
}

// The input row that window row (z, y) of output row r reads, or null on padding.
ConstPtr input_row(const Problem& p, ConstPtr x, int64_t r, int64_t z, int64_t y) {
  const int64_t iz = (r / p.out[1]) * p.stride[0] - p.pad[0] + z * p.rhs_dilation[0];
  const int64_t iy = (r % p.out[1]) * p.stride[1] - p.pad[1] + y * p.rhs_dilation[1];
  if (iz < 0 || iz >= p.in[0] || iy < 0 || iy >= p.in[1]) return {};
  return x + iz * p.x.sp[0] + iy * p.x.sp[1];
}

void zero_columns(Ptr dst, int64_t ld, int64_t n, int64_t count) {
  for (int64_t i = 0; i < n; ++i) (dst + i * ld).zero(count);
}

// The strip of output row r, pixels [j0, j1): dst[column][window y][window z][channel], where a
// column is an input column (or, for disjoint windows, pixel and window x).
void fill_window_order(const Layout& l, const Kernels& k, ConstPtr x, int64_t r, int64_t j0,
                       int64_t j1, Ptr dst) {
  const Problem& p = l.p;
  const int64_t taps = p.win[0] * p.win[1];
  if (!l.disjoint && p.c <= 4 && p.x.c == 1 && taps <= 64 && p.plain()) {
    const void* rows[64];
    const int64_t columns = strip_columns(p, false, j1 - j0);
    const int64_t offset = j0 * p.stride[2] - p.pad[2];
    const Range in = inside(0, columns, 1, offset, p.in[2]);
    for (int64_t y = 0, slot = 0; y < p.win[1]; ++y) {
      for (int64_t z = 0; z < p.win[0]; ++z, ++slot) {
        ConstPtr row = input_row(p, x, r, z, y);
        rows[slot] = (row == nullptr ? row : row + (in.begin + offset) * p.x.sp[2]).at;
      }
    }
    dst.zero(in.begin * l.unit);
    k.interleave(dst + in.begin * l.unit, l.unit, rows, taps, p.x.sp[2], in.end - in.begin, p.c);
    (dst + in.end * l.unit).zero((columns - in.end) * l.unit);
    return;
  }
  for (int64_t y = 0, slot = 0; y < p.win[1]; ++y) {
    for (int64_t z = 0; z < p.win[0]; ++z, ++slot) {
      ConstPtr row = input_row(p, x, r, z, y);
      Ptr at = dst + slot * p.c;
      if (!l.disjoint) {
        const int64_t columns = strip_columns(p, false, j1 - j0);
        const int64_t offset = j0 * p.stride[2] - p.pad[2];
        const Range in =
            row == nullptr ? Range{columns, columns} : inside(0, columns, 1, offset, p.in[2]);
        zero_columns(at, l.unit, in.begin, p.c);
        if (in.end > in.begin) {
          k.read[p.dtype](at + in.begin * l.unit, l.unit, row + (in.begin + offset) * p.x.sp[2],
                          p.x.sp[2], p.x.c, in.end - in.begin, l.channels);
        }
        zero_columns(at + in.end * l.unit, l.unit, columns - in.end, p.c);
        continue;
      }
      for (int64_t v = 0; v < p.win[2]; ++v) {
        Ptr to = at + v * l.unit;
        const int64_t offset = v * p.rhs_dilation[2] - p.pad[2];
        const Range in =
            row == nullptr ? Range{j1, j1} : inside(j0, j1, p.stride[2], offset, p.in[2]);
        zero_columns(to, l.pixel_stride, in.begin - j0, p.c);
        if (in.end > in.begin) {
          k.read[p.dtype](to + (in.begin - j0) * l.pixel_stride, l.pixel_stride,
                          row + (in.begin * p.stride[2] + offset) * p.x.sp[2],
                          p.stride[2] * p.x.sp[2], p.x.c, in.end - in.begin, l.channels);
        }
        zero_columns(to + (in.end - j0) * l.pixel_stride, l.pixel_stride, j1 - in.end, p.c);
      }
    }
  }
}

// The input rows under output rows [r0, r1), with their padding along x, channels innermost:
// dst[image and z][window z][input row][column][channel]. Rows that are all padding are left out.
void fill_rows(const Layout& l, const Kernels& k, const Problem& p, ConstPtr x, int64_t r0,
               int64_t r1, int64_t j0, int64_t j1, Ptr dst) {
  const int64_t columns = strip_columns(p, false, j1 - j0);
  const int64_t offset = j0 * p.stride[2] - p.pad[2];
  const Range in = inside(0, columns, 1, offset, p.in[2]);
  // No word has channels of two pixels.
  const bool contiguous = p.x.c == 1 && p.x.sp[2] == l.channels && l.channels % k.channels == 0;
  for (int64_t r = r0; r < r1;) {  // one (image, z) after another
    const int64_t part = r / p.out[1];
    const int64_t end = std::min(r1, (part + 1) * p.out[1]);
    const int64_t y0 = std::max<int64_t>(0, r % p.out[1] * p.stride[1] - p.pad[1]);
    const int64_t y1 = std::min(p.in[1], (end - 1 - part * p.out[1]) * p.stride[1] - p.pad[1] +
                                             (p.win[1] - 1) * p.rhs_dilation[1] + 1);
    for (int64_t z = 0; z < p.win[0]; ++z, dst += l.plane_rows * l.input_row) {
      const int64_t iz = part % p.out[0] * p.stride[0] - p.pad[0] + z * p.rhs_dilation[0];
      if (iz < 0 || iz >= p.in[0]) continue;
      ConstPtr plane = x + part / p.out[0] * p.x.n + iz * p.x.sp[0];
      for (int64_t y = y0; y < y1; ++y) {
        Ptr to = dst + (y - y0) * l.input_row;
        ConstPtr from = plane + y * p.x.sp[1] + (in.begin + offset) * p.x.sp[2];
        to.zero(in.begin * p.c);
        if (contiguous && p.plain()) {
          std::memcpy(to + in.begin * p.c, from, (in.end - in.begin) * p.c * k.size);
        } else if (contiguous) {
          k.read[p.dtype](to + in.begin * p.c, 0, from, 0, 1, 1, (in.end - in.begin) * l.channels);
        } else if (in.end > in.begin) {
          k.read[p.dtype](to + in.begin * p.c, p.c, from, p.x.sp[2], p.x.c, in.end - in.begin,
                          l.channels);
        }
        (to + in.end * p.c).zero((columns - in.end) * p.c);
      }
    }
    r = end;
  }
}

// The input rows under output rows [r0, r1), for the pixels [j0, j1) of each one column after
// another of its window, columns [v0, v1) of them: dst[image and z][pixel][window x][input row]
// [window z][channel]. Rows that are all padding are left out.
void fill_width(const Layout& l, const Kernels& k, ConstPtr x, int64_t r0, int64_t r1, int64_t j0,
                int64_t j1, int64_t v0, int64_t v1, Ptr dst) {
  const Problem& p = l.p;
  for (int64_t r = r0; r < r1; dst += l.cols * l.pixel_stride) {  // one (image, z) after another
    const int64_t part = r / p.out[1];
    const int64_t end = std::min(r1, (part + 1) * p.out[1]);
    const int64_t y0 = std::max<int64_t>(0, r % p.out[1] * p.stride[1] - p.pad[1]);
    const int64_t y1 = std::min(p.in[1], (end - 1 - part * p.out[1]) * p.stride[1] - p.pad[1] +
                                             (p.win[1] - 1) * p.rhs_dilation[1] + 1);
    for (int64_t v = v0; v < v1; ++v) {
      const int64_t offset = v * p.rhs_dilation[2] - p.pad[2];
      const Range in = inside(j0, j1, p.stride[2], offset, p.in[2]);
      for (int64_t y = y0; y < y1; ++y) {
        for (int64_t z = 0; z < p.win[0]; ++z) {
          const int64_t iz = part % p.out[0] * p.stride[0] - p.pad[0] + z * p.rhs_dilation[0];
          if (iz < 0 || iz >= p.in[0]) continue;
          Ptr to = dst + v * l.plane + (y - y0) * l.input_row + z * p.c;
          zero_columns(to, l.pixel_stride, in.begin - j0, p.c);
          if (in.end > in.begin) {
            ConstPtr row = x + part / p.out[0] * p.x.n + iz * p.x.sp[0] + y * p.x.sp[1];
            k.read[p.dtype](to + (in.begin - j0) * l.pixel_stride, l.pixel_stride,
                            row + (in.begin * p.stride[2] + offset) * p.x.sp[2],
                            p.stride[2] * p.x.sp[2], p.x.c, in.end - in.begin, l.channels);
          }
          zero_columns(to + (in.end - j0) * l.pixel_stride, l.pixel_stride, j1 - in.end, p.c);
        }
      }
    }
    r = end;
  }
}

// The indirection buffer's part for output row r: where each window position of each pixel lies in
// its image, or -1 on padding.
void fill_table(const Layout& l, int64_t r, int64_t* table) {
  const Problem& p = l.p;
  int64_t* at = table + r * p.out[2] * p.window();
  for (int64_t j = 0; j < p.out[2]; ++j) {
    for (int64_t v = 0; v < p.win[2]; ++v) {
      const int64_t ix = j * p.stride[2] - p.pad[2] + v * p.rhs_dilation[2];
      for (int64_t y = 0; y < p.win[1]; ++y) {
        const int64_t iy = r % p.out[1] * p.stride[1] - p.pad[1] + y * p.rhs_dilation[1];
        for (int64_t z = 0; z < p.win[0]; ++z, ++at) {
          const int64_t iz = r / p.out[1] * p.stride[0] - p.pad[0] + z * p.rhs_dilation[0];
          const bool real =
              ix >= 0 && ix < p.in[2] && iy >= 0 && iy < p.in[1] && iz >= 0 && iz < p.in[0];
          *at = real ? iz * p.x.sp[0] + iy * p.x.sp[1] + ix * p.x.sp[2] : -1;
        }
      }
    }
  }
}

// Rows [k0, k1) of the patch matrix's reduction for pixels [j0, j1) of output row r.
void fill_columns(const Layout& l, const Kernels& k, ConstPtr x, int64_t r, int64_t j0, int64_t j1,
                  int64_t k0, int64_t k1, Ptr dst) {
  const Problem& p = l.p;
  for (int64_t at = k0; at < k1;) {
    const int64_t tap = at / p.c;
    const int64_t c0 = at % p.c;
    const int64_t count = std::min(p.c - c0, k1 - at);
    const int64_t z = tap % p.win[0];
    const int64_t y = (tap / p.win[0]) % p.win[1];
    const int64_t v = tap / (p.win[0] * p.win[1]);
    ConstPtr row = input_row(p, x, r, z, y);
    Ptr to = dst + (at - k0);
    const int64_t offset = v * p.rhs_dilation[2] - p.pad[2];
    const Range in = row == nullptr ? Range{j1, j1} : inside(j0, j1, p.stride[2], offset, p.in[2]);
    zero_columns(to, l.pixel_stride, in.begin - j0, count);
    if (in.end > in.begin) {
      const int64_t channel = c0 * k.channels;
      k.read[p.dtype](to + (in.begin - j0) * l.pixel_stride, l.pixel_stride,
                      row + (in.begin * p.stride[2] + offset) * p.x.sp[2] + channel * p.x.c,
                      p.stride[2] * p.x.sp[2], p.x.c, in.end - in.begin,
                      std::min(count * k.channels, l.channels - channel));
    }
    zero_columns(to + (in.end - j0) * l.pixel_stride, l.pixel_stride, j1 - in.end, count);
    at += count;
  }
}

// Window positions along z and y that an output row reads from the input; the others are padding.
struct Real {
  int64_t z0, z1, y0, y1;

  bool operator==(const Real& o) const {
    return z0 == o.z0 && z1 == o.z1 && y0 == o.y0 && y1 == o.y1;
  }
};

// The runs of one kc block; where window positions along x are told apart, those of v begin with
// number begin[v], and `before[v]` steps come before them.
struct Runs {
  std::vector<Run> all;
  std::vector<int64_t> begin, before;
  int64_t steps = 0;  // of all
};

// The reduction over these positions as runs over A and B, cut at multiples of kc.
std::vector<Runs> make_runs(const Layout& l, const Real& real) {
  const Problem& p = l.p;
  const int64_t taps = p.window();
  std::vector<Runs> blocks(ceil_div(l.reduction, l.kc));
  const auto push = [&](int64_t r, int64_t a, int64_t b, int64_t b_step, int64_t len) {
    while (len > 0) {
      std::vector<Run>& block = blocks[r / l.kc].all;
      const int64_t piece = std::min(len, l.kc - r % l.kc);
      blocks[r / l.kc].steps += piece;
      // What is packed locally begins with its block.
      const int64_t base = l.pack == kLocal ? r / l.kc * l.kc * l.panel : 0;
      const bool first =
          l.by_column() && static_cast<int64_t>(block.size()) == blocks[r / l.kc].begin.back();
      if (!block.empty() && !first && l.lowering != Lowering::kIndirect &&
          block.back().a + block.back().len * l.a_step == a &&
          block.back().b + block.back().len * b_step == b - base) {
        block.back().len += piece;
      } else {
        block.push_back({a, b - base, piece});
      }
      r += piece;
      a += piece * l.a_step;
      b += piece * b_step;
      len -= piece;
    }
  };
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t z = tap % p.win[0];
    const int64_t y = (tap / p.win[0]) % p.win[1];
    const int64_t v = tap / (p.win[0] * p.win[1]);
    if (l.by_column() && tap % (p.win[0] * p.win[1]) == 0) {
      for (Runs& block : blocks) {
        block.begin.push_back(static_cast<int64_t>(block.all.size()));
        block.before.push_back(block.steps);
      }
    }
    if (z < real.z0 || z >= real.z1 || y < real.y0 || y >= real.y1) continue;
    int64_t a = 0;
    switch (l.lowering) {
      case Lowering::kDirect:
        a = z * p.rhs_dilation[0] * p.x.sp[0] + y * p.rhs_dilation[1] * p.x.sp[1] +
            v * p.rhs_dilation[2] * p.x.sp[2];
        break;
      case Lowering::kRows:
        a = (z * l.plane_rows + y * p.rhs_dilation[1]) * l.input_row + v * p.rhs_dilation[2] * p.c;
        break;
      case Lowering::kWindow:
        a = (l.disjoint ? v : v * p.rhs_dilation[2]) * l.unit + (y * p.win[0] + z) * p.c;
        break;
      case Lowering::kColumns:
        a = l.full != 0 ? tap * p.c : 0;  // blocked: see below
        break;
      case Lowering::kWidth:
        a = v * l.plane + y * p.rhs_dilation[1] * l.input_row + z * p.c;
        break;
      case Lowering::kIndirect:
        a = tap;
        break;
    }
    const int64_t b =
        l.pack != kInPlace ? tap * p.c * l.panel : z * p.w.sp[0] + y * p.w.sp[1] + v * p.w.sp[2];
    const int64_t b_step = l.pack != kInPlace ? l.panel : p.w.c;
    if (l.lowering == Lowering::kColumns && l.full == 0) {
      // Each block is lowered on its own, so its A begins at 0.
      for (int64_t c = 0; c < p.c;) {
        const int64_t r = tap * p.c + c;
        const int64_t piece = std::min(p.c - c, l.kc - r % l.kc);
        push(r, r % l.kc, b + c * b_step, b_step, piece);
        c += piece;
      }
    } else {
      push(tap * p.c, a, b, b_step, p.c);
    }
  }
  for (Runs& block : blocks) {
    block.begin.push_back(static_cast<int64_t>(block.all.size()));
    block.before.push_back(block.steps);
  }
  return blocks;
}

// Output rows that read the same window positions share their runs. A position on padding adds
// fma(0, w, sum) = sum, so leaving it out changes no bit where w is finite.
struct RowKinds {
  std::vector<Real> real;
  std::vector<std::vector<Runs>> runs;  // of a kind, of a kc block
  std::vector<int64_t> first_row;       // of a kind, in [0, out_rows)
  std::vector<int64_t> of_row;          // in [0, out_rows)
  bool skips = false;                   // some kind leaves positions out
  bool covers = true;                   // every position is in some kind
};

// The window positions of dimension d that lie inside the input for an output from o0 to o1.
std::array<int64_t, 2> real_positions(const Problem& p, int d, int64_t o0, int64_t o1) {
  const int64_t first = o0 * p.stride[d] - p.pad[d];
  const int64_t last = o1 * p.stride[d] - p.pad[d];
  const int64_t rd = p.rhs_dilation[d];
  const int64_t begin = std::clamp<int64_t>(last >= 0 ? 0 : ceil_div(-last, rd), 0, p.win[d]);
  const int64_t end =
      std::clamp<int64_t>(p.in[d] <= first ? 0 : ceil_div(p.in[d] - first, rd), begin, p.win[d]);
  return {begin, end};
}

RowKinds make_row_kinds(const Layout& l) {
  const Problem& p = l.p;
  RowKinds kinds;
  kinds.of_row.resize(l.out_rows);
  std::vector<bool> covered(p.win[0] * p.win[1], false);
  for (int64_t r = 0; r < l.out_rows; ++r) {
    const auto z = real_positions(p, 0, r / p.out[1], r / p.out[1]);
    const auto y = real_positions(p, 1, r % p.out[1], r % p.out[1]);
    const Real real{z[0], z[1], y[0], y[1]};
    const auto known = std::find(kinds.real.begin(), kinds.real.end(), real);
    kinds.of_row[r] = known - kinds.real.begin();
    if (known != kinds.real.end()) continue;
    kinds.real.push_back(real);
    kinds.runs.push_back(make_runs(l, real));
    kinds.first_row.push_back(r);
    for (int64_t i = z[0]; i < z[1]; ++i) {
      for (int64_t u = y[0]; u < y[1]; ++u) covered[i * p.win[1] + u] = true;
    }
    kinds.skips = kinds.skips || (z[1] - z[0]) * (y[1] - y[0]) < p.win[0] * p.win[1];
  }
  kinds.covers = std::find(covered.begin(), covered.end(), false) == covered.end();
  return kinds;
}

struct Block {  // one block of A rows, ready for the micro-kernel
  ConstPtr a;
  int64_t row_stride;  // between output rows
  int64_t rows, cols;
  int64_t first_row;  // in [0, all_rows)
  int64_t first_col;
  bool stream;           // results pass the caches by
  const int64_t* table;  // indirect: of the first output row's first pixel
  ConstPtr zeros;
  bool new_input;  // no panel before this one has read it
};

// What is read of the filters after the panel at hand, a matrix of kc rows with this stride. Its
// columns of cache lines are prefetched one by one, by the first tiles of the panel. Or what all
// panels read next, in the order of memory, so much per step.
struct Ahead {
  ConstPtr at;  // may be null
  int64_t step;
  int64_t columns;    // that are left
  int64_t words = 0;  // that are left, in the order of memory
};

// One panel of features against a block: rows x cols pixels, block kb of the reduction.
void multiply(const Layout& l, const Kernels& k, const Block& block, ConstPtr b,
              const RowKinds& kinds, int64_t kb, int64_t features, Ptr c, const int64_t* c_rows,
              int64_t c_pixel, Ahead* ahead) {
  const int64_t nv = ceil_div(features, l.width);
  // The strided kernel also masks what it reads of B: in place, nothing may follow the features.
  const bool strided = l.a_step != 1 || (l.pack == kInPlace && features % l.width != 0);
  const int64_t mr_max = std::min<int64_t>(l.mr, k.max_mr[nv]);
  GemmArgs args{};
  args.b = b;
  args.a_row = l.pixel_stride;
  args.a_step = l.a_step;
  args.b_step = l.pack != kInPlace ? l.panel : l.p.w.c;
  args.c_row = c_pixel;
  args.cols = features;
  args.load = kb > 0 ? 1 : 0;
  args.zeros = block.zeros;
  args.table_row = l.pixel_stride;
  const auto& tile = (l.lowering == Lowering::kIndirect ? k.indirect
                      : strided                         ? k.strided
                                                        : k.packed)[nv];
  const bool dense = l.lowering != Lowering::kIndirect && !strided;
  args.stream =
      block.stream && !l.by_column() && features % l.width == 0 && (kb + 1) * l.kc >= l.reduction
          ? 1
          : 0;

  const bool overlap = l.p.window() > 1;

  // The tile of mr pixels from j0 of row r, over args.runs. `column`: of filters, to be fetched
  // ahead, or null; returned is how many were.
  const auto one_tile = [&](int64_t r, int64_t j0, int64_t mr, int64_t steps, ConstPtr column) {
    if (block.table == nullptr) {
      args.a = block.a + r * block.row_stride + j0 * l.pixel_stride;
    } else {
      args.a = block.a;
      args.table = block.table + j0 * l.pixel_stride;
    }
    args.c = c + c_rows[r] + j0 * c_pixel;
    const bool fetches = dense && args.n_runs > 0 && k.ahead[nv][mr] != nullptr;
    if (fetches && ahead->words > 0) {
      args.ahead = ahead->at;
      args.ahead_step = ahead->step;
      ahead->at = ahead->at + steps * ahead->step;
      ahead->words -= steps * ahead->step;
      k.ahead[nv][mr](&args);
    } else if (fetches && column != nullptr) {
      args.ahead = column;
      args.ahead_step = ahead->step;
      k.ahead[nv][mr](&args);
      return 1;
    } else if (const GemmFn narrow = dense && nv == 1 ? narrow_form(k, mr, overlap) : nullptr;
               narrow != nullptr && args.n_runs > 0 && args.runs->len >= 8) {
      // The next pixels follow these.
      args.ahead = block.a + r * block.row_stride + (j0 + mr) * l.pixel_stride;
      narrow(&args);
    } else if (fetches && l.follows && block.new_input) {
      args.ahead = block.a + r * block.row_stride + (j0 + mr) * l.pixel_stride + l.next;
      args.ahead_step = ceil_div(mr * l.pixel_stride, l.reduction);  // all that the next tile adds
      k.ahead[nv][mr](&args);
    } else {
      tile[mr](&args);
    }
    return 0;
  };

  // Pixels [j0, j1) of row r, tile by tile at one window position along x after another, without
  // padding. Each position fetches its rows of the columns of filters; returned is how many.
  const auto by_column = [&](int64_t r, int64_t j0, int64_t j1, const Runs& runs) {
    const Ptr row = c + c_rows[r];
    bool written = kb > 0;
    int64_t fetched = -1;
    for (int64_t v = 0; v < l.p.win[2]; ++v) {
      args.runs = runs.all.data() + runs.begin[v];
      args.n_runs = runs.begin[v + 1] - runs.begin[v];
      if (args.n_runs == 0) continue;
      const Range real = pixels_at(l.p, v, block.first_col + j0, block.first_col + j1);
      const int64_t begin = real.begin - block.first_col;
      const int64_t pixels = real.end - real.begin;
      if (!written) {
        zero_columns(row + j0 * c_pixel, c_pixel, begin - j0, features);
        zero_columns(row + (begin + pixels) * c_pixel, c_pixel, j1 - begin - pixels, features);
      }
      args.load = written ? 1 : 0;
      written = true;
      const int64_t tiles = ceil_div(pixels, mr_max);
      const int64_t columns = std::min(ahead->columns, tiles);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t at = pixels * t / tiles;
        const ConstPtr column =
            t < columns ? ahead->at + (runs.before[v] * ahead->step + t * l.width) : ConstPtr{};
        one_tile(r, begin + at, pixels * (t + 1) / tiles - at, runs.before[v + 1] - runs.before[v],
                 column);
      }
      fetched = fetched < 0 ? columns : std::min(fetched, columns);
    }
    args.load = kb > 0 ? 1 : 0;
    if (!written) zero_columns(row + j0 * c_pixel, c_pixel, j1 - j0, features);
    return std::max<int64_t>(0, fetched);
  };

  // Tiles of nearly equal height: 55 pixels are 14 + 14 + 14 + 13.
  const int64_t tiles = ceil_div(block.cols, mr_max);
  for (int64_t r = 0; r < block.rows; ++r) {
    const Runs& runs = kinds.runs[kinds.of_row[(block.first_row + r) % l.out_rows]][kb];
    const auto count = [&](int64_t columns) {
      if (columns == 0) return;
      ahead->at = ahead->at + columns * l.width;
      ahead->columns -= columns;
    };
    if (l.edges == Edges::kByColumn) {
      count(by_column(r, 0, block.cols, runs));
      continue;
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t j0 = block.cols * t / tiles;
      const int64_t j1 = block.cols * (t + 1) / tiles;
      if (l.edges == Edges::kByTile &&
          meets_padding(l.p, block.first_col + j0, block.first_col + j1)) {
        count(by_column(r, j0, j1, runs));
        continue;
      }
      args.runs = runs.all.data();
      args.n_runs = static_cast<int64_t>(runs.all.size());
      count(one_tile(r, j0, j1 - j0, runs.steps, ahead->columns > 0 ? ahead->at : ConstPtr{}));
    }
  }
}

// Adds the residual, whose elements are `row` and `col` apart, and applies the activation: blocks
// of it are made words in order first.
void add_strided(const Problem& p, const Kernels& k, ConstPtr residual, int64_t row, int64_t col,
                 Activation activation, const EpilogueArgs& words) {
  constexpr int64_t kRows = 16;
  constexpr int64_t kCols = 64;
  alignas(64) std::array<float, kRows * kCols> block;
  for (int64_t r = 0; r < words.rows; r += kRows) {
    for (int64_t j = 0; j < words.cols; j += kCols) {
      const int64_t rows = std::min(kRows, words.rows - r);
      const int64_t cols = std::min(kCols, words.cols - j);
      k.pack[p.dtype](block.data(), kCols, (residual + r * row + j * col).at, row, col, rows, cols);
      EpilogueArgs part = words;
      part.c = static_cast<float*>(words.c) + r * words.c_row + j;
      part.rows = rows;
      part.cols = cols;
      part.bias = nullptr;
      part.residual = block.data();
      part.residual_row = kCols;
      part.activation = activation;
      k.epilogue(&part);
    }
  }
}

}  // namespace

void finish_words(const Problem& p, const Kernels& k, const Operands& o, EpilogueArgs words,
                  int64_t y_offset, int64_t y_row, int64_t y_col, bool stream) {
  if (o.has_epilogue() && y_col != 1 && o.residual != nullptr) {
    const Activation activation = words.activation;
    words.activation = Activation::kNone;
    if (words.bias != nullptr) k.narrow_epilogue[p.dtype](&words);
    add_strided(p, k, o.residual + y_offset, y_row, y_col, activation, words);
  } else if (o.has_epilogue()) {
    if (o.residual != nullptr) words.residual = o.residual + y_offset;
    words.residual_row = y_row;
    if (y_col == 1 && p.out_dtype == p.dtype && !stream) {
      words.y = (o.y + y_offset).at;
      words.y_row = y_row;
      return k.finish[p.dtype](&words);
    }
    k.narrow_epilogue[p.dtype](&words);
  }
  const CopyFn write = (stream ? k.stream : k.write)[p.out_dtype];
  const Ptr c{static_cast<char*>(words.c), k.size};
  const Ptr y = o.y + y_offset;
  if (c.at == y.at) return;
  if (y_col == 1) {
    write(y, y_row, c, words.c_row, 1, words.rows, words.cols);
  } else if (y_row == 1) {
    write(y, y_col, c, 1, words.c_row, words.cols, words.rows);
  } else {
    for (int64_t r = 0; r < words.rows; ++r) {
      write(y + r * y_row, y_col, c + r * words.c_row, 1, 0, words.cols, 1);
    }
  }
}

void finish_rows(const Problem& p, const Kernels& k, const Operands& o, Ptr c, int64_t ld,
                 int64_t rows, int64_t cols, int64_t g, int64_t k0, int64_t y_offset, bool stream) {
  // y_offset addresses (pixel, feature k0).
  if (!p.plain()) {
    const ConstPtr bias = o.bias == nullptr ? o.bias : o.bias + g * p.k + k0;
    const EpilogueArgs words{c, ld, rows, cols, bias, 0, 1, nullptr, 0, o.activation};
    finish_words(p, k, o, words, y_offset, p.y.sp[2], p.y.k, stream);
    return;
  }
  Ptr y = o.y + y_offset;
  const bool in_place = c.at == y.at;
  EpilogueArgs e{};
  e.activation = o.activation;
  ConstPtr bias = o.bias == nullptr ? ConstPtr{} : o.bias + g * p.k + k0;
  ConstPtr residual = o.residual == nullptr ? ConstPtr{} : o.residual + y_offset;
  if (p.y.k == 1) {
    if (!in_place) k.copy(y, p.y.sp[2], c, ld, 1, rows, cols);
    if (!o.has_epilogue()) return;
    e = {y, p.y.sp[2], rows, cols, bias, 0, 1, residual, p.y.sp[2], o.activation};
    k.epilogue(&e);
    return;
  }
  if (p.y.sp[2] == 1) {  // features apart, pixels together: transpose
    k.copy(y, p.y.k, c, 1, ld, cols, rows);
    if (!o.has_epilogue()) return;
    e = {y, p.y.k, cols, rows, bias, 1, 0, residual, p.y.k, o.activation};
    k.epilogue(&e);
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    k.copy(y + r * p.y.sp[2], p.y.k, c + r * ld, 1, 0, cols, 1);
    for (int64_t j = 0; j < cols && o.has_epilogue(); ++j) {
      const int64_t at = r * p.y.sp[2] + j * p.y.k;
      e = {y + at,
           0,
           1,
           1,
           bias == nullptr ? ConstPtr{} : bias + j,
           0,
           0,
           residual == nullptr ? ConstPtr{} : residual + at,
           0,
           o.activation};
      k.epilogue(&e);
    }
  }
}

void finish_planes(const Problem& p, const Kernels& k, const Operands& o, Ptr c, int64_t ld,
                   int64_t features, int64_t n, int64_t g, int64_t k0, int64_t y_offset) {
  if (!p.plain()) {
    const ConstPtr bias = o.bias == nullptr ? o.bias : o.bias + g * p.k + k0;
    const EpilogueArgs words{c, ld, features, n, bias, 1, 0, nullptr, 0, o.activation};
    finish_words(p, k, o, words, y_offset, p.y.k, p.y.sp[2]);
    return;
  }
  Ptr y = o.y + y_offset;
  ConstPtr bias = o.bias == nullptr ? ConstPtr{} : o.bias + g * p.k + k0;
  ConstPtr residual = o.residual == nullptr ? ConstPtr{} : o.residual + y_offset;
  if (p.y.sp[2] == 1) {
    if (c.at != y.at) k.copy(y, p.y.k, c, ld, 1, features, n);
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
    k.copy(y + j * p.y.k, p.y.sp[2], c + j * ld, 1, 0, n, 1);
    for (int64_t i = 0; i < n && o.has_epilogue(); ++i) {
      const int64_t at = i * p.y.sp[2] + j * p.y.k;
      const EpilogueArgs e{y + at,
                           0,
                           1,
                           1,
                           bias == nullptr ? ConstPtr{} : bias + j,
                           0,
                           0,
                           residual == nullptr ? ConstPtr{} : residual + at,
                           0,
                           o.activation};
      k.epilogue(&e);
    }
  }
}

namespace {

// Where row r of the reduction lies in the filters of a group.
int64_t filter_row(const Problem& p, int64_t r) {
  const int64_t tap = r / p.c;
  return r % p.c * p.w.c + tap % p.win[0] * p.w.sp[0] + tap / p.win[0] % p.win[1] * p.w.sp[1] +
         tap / (p.win[0] * p.win[1]) * p.w.sp[2];
}

// Packs rows [r0, r1) of the reduction, panels [panel0, panel1) of group g: panel after panel
// (stride `ld` in dst), each [r - r0][feature], features beyond k zero.
void pack_panels(const Layout& l, const Kernels& k, ConstPtr w, int64_t g, int64_t panel0,
                 int64_t panel1, int64_t r0, int64_t r1, Ptr dst, int64_t ld) {
  const Problem& p = l.p;
  const int64_t taps = p.window();
  ConstPtr base = w + g * p.w.g;
  const auto features = [&](int64_t panel) { return std::min(l.panel, p.k - panel * l.panel); };
  if (features(panel1 - 1) < l.panel) {
    (dst + (panel1 - 1 - panel0) * ld).zero((r1 - r0) * l.panel);
  }
  // Filters stored with the window innermost (OIHW): walk each filter's memory in order.
  if (p.w.k != 1 && p.w.c != 1 && taps > 1 && p.w.sp[2] == 1 && r0 == 0 && r1 == l.reduction &&
      k.channels == 1) {
    for (int64_t panel = panel0; panel < panel1; ++panel) {
      Ptr to = dst + (panel - panel0) * ld;
      for (int64_t c = 0; c < p.c; ++c) {
        for (int64_t z = 0; z < p.win[0]; ++z) {
          for (int64_t y = 0; y < p.win[1]; ++y) {
            k.pack[p.dtype](
                to + ((y * p.win[0] + z) * p.c + c) * l.panel, l.unit * l.panel,
                base + panel * l.panel * p.w.k + c * p.w.c + z * p.w.sp[0] + y * p.w.sp[1], 1,
                p.w.k, p.win[2], features(panel));
          }
        }
      }
    }
    return;
  }
  // Otherwise a few rows at a time, all panels of them: filters stored with the features innermost
  // are read in the order of their memory.
  for (int64_t r = r0; r < r1;) {
    const int64_t c = r % p.c;
    const int64_t rows = std::min({p.c - c, r1 - r, p.w.k == 1 ? int64_t{16} : r1 - r});
    const int64_t channel = c * k.channels;
    ConstPtr from = base + filter_row(p, r) + (channel - c) * p.w.c;
    for (int64_t panel = panel0; panel < panel1; ++panel) {
      k.pack[p.dtype](dst + (panel - panel0) * ld + (r - r0) * l.panel, l.panel,
                      from + panel * l.panel * p.w.k, p.w.c, p.w.k,
                      std::min(rows * k.channels, l.channels - channel), features(panel));
    }
    r += rows;
  }
}

// add_skipped_nonfinite for packed filters: each panel is a convolution of its own.
void add_skipped_by_panel(const Problem& p, const Operands& o, const Execution& e) {
  const int64_t panels = ceil_div(p.k, p.panel);
  if (!p.touches_padding()) return;
  for (int64_t i = 0; i < p.g * panels; ++i) {
    const int64_t g = i / panels;
    const int64_t k0 = i % panels * p.panel;
    Problem part = p;
    part.g = 1;
    part.k = std::min(p.panel, p.k - k0);
    const int64_t z = p.c * p.panel;
    part.w = {0, 1, p.panel, {z, z * p.win[0], z * p.win[0] * p.win[1]}};
    Operands own = o;
    own.w = o.w + i * p.panel * p.reduction();
    own.y = o.y + g * p.y.g + k0 * p.y.k;
    if (e.target.kernels->all_finite(own.w, p.panel * p.reduction()) != 0) continue;
    mark_skipped_nonfinite(part, own, e);
  }
}

struct Prepared {
  Layout l;
  RowKinds kinds;
};

// Room for n values; few need no allocation.
template <typename T>
class Room {
 public:
  explicit Room(int64_t n) : many_(n > kFew ? n : 0) {}
  T* data() { return many_.empty() ? few_.data() : many_.data(); }

 private:
  static constexpr int64_t kFew = 32;
  std::array<T, kFew> few_;
  std::vector<T> many_;
};

}  // namespace

std::shared_ptr<const void> gemm_prepare(const Problem& problem, const Target& t,
                                         const Params& params, Lowering lowering) {
  auto prepared = std::make_shared<Prepared>();
  prepared->l = make_layout(problem, t, params, lowering);
  prepared->kinds = make_row_kinds(prepared->l);
  return prepared;
}

void gemm_run(const Problem& problem, const Params& params, const Operands& o, const Execution& e,
              Lowering lowering) {
  std::shared_ptr<const void> own;
  if (e.prepared == nullptr) own = gemm_prepare(problem, e.target, params, lowering);
  const auto& prepared =
      *static_cast<const Prepared*>(e.prepared != nullptr ? e.prepared : own.get());
  const Layout& l = prepared.l;
  const RowKinds& kinds = prepared.kinds;
  const Problem& p = l.p;
  const Kernels& k = *e.target.kernels;
  const int64_t n_blocks = ceil_div(l.reduction, l.kc);
  std::atomic<bool> suspicious{!kinds.covers || l.marked < 0};
  const ConstPtr packed = l.pack == kBefore ? o.w : e.workspace;
  Ptr full = e.workspace + l.packed_floats;
  const Ptr zeros = full + l.full_floats;
  const Ptr table_words = zeros + l.zero_floats;
  Ptr scratch = table_words + l.table_words;
  // Words of a workspace are floats or doubles, and it begins on a cache line.
  auto* table = reinterpret_cast<int64_t*>(table_words.at);
  zeros.zero(l.zero_floats);
  const Threads pool = useful_pool(problem, e);
  const bool columns = lowering == Lowering::kColumns && l.full == 0;
  const bool streams = params[kStream] != 0 && streamable(p, k, o.y);
  const int64_t piece_of_row = l.buffered || o.has_epilogue() ? l.piece : 0;
  const bool stream = streams && !l.buffered && !o.has_epilogue();
  const bool stream_pieces =
      streams && l.buffered && l.piece > 0 && k.stream[p.out_dtype] != nullptr;
  // Row R of all_rows is row r of image n.
  const auto input = [&](int64_t g, int64_t row) {
    return o.x + g * p.x.g + row / l.out_rows * p.x.n;
  };
  const auto output = [&](int64_t g, int64_t row) {
    const int64_t r = row % l.out_rows;
    return row / l.out_rows * p.y.n + g * p.y.g + r / p.out[1] * p.y.sp[0] +
           r % p.out[1] * p.y.sp[1];
  };

  const int64_t packs = l.pack == kShared ? p.g * l.panels : 0;
  // Of the whole tensor: an output row, or one column of the windows of one (group, image, z).
  const int64_t pieces = lowering == Lowering::kWidth ? p.n * p.out[0] * p.win[2] : l.all_rows;
  const int64_t fills = lowering == Lowering::kIndirect ? l.out_rows
                        : l.full != 0                   ? p.g * pieces
                                                        : 0;
  pool.run(packs + fills, [&](int64_t task, int64_t) {
    if (task < packs) {
      const int64_t panel = task % l.panels;
      pack_panels(l, k, o.w, task / l.panels, panel, panel + 1, 0, l.reduction,
                  e.workspace + task * l.panel * l.reduction, 0);
      return;
    }
    if (lowering == Lowering::kIndirect) {
      fill_table(l, task - packs, table);
      return;
    }
    if (lowering == Lowering::kWidth) {
      const int64_t part = (task - packs) / p.win[2];
      const int64_t v = (task - packs) % p.win[2];
      const int64_t r0 = part % (p.n * p.out[0]) * p.out[1];
      fill_width(l, k, o.x + part / (p.n * p.out[0]) * p.x.g, r0, r0 + p.out[1], 0, p.out[2], v,
                 v + 1, full + part * p.out[2] * l.pixel_stride);
      return;
    }
    const int64_t row = (task - packs) % l.all_rows;
    ConstPtr x = input((task - packs) / l.all_rows, row);
    Ptr to = full + (task - packs) * l.strip_row;
    if (lowering == Lowering::kWindow) {
      fill_window_order(l, k, x, row % l.out_rows, 0, p.out[2], to);
    } else {
      fill_columns(l, k, x, row % l.out_rows, 0, p.out[2], 0, l.reduction, to);
    }
  });

  pool.run(p.g * l.row_blocks * l.col_blocks * l.panel_split, [&](int64_t task, int64_t worker) {
    const int64_t split = task % l.panel_split;
    const int64_t cb = task / l.panel_split % l.col_blocks;
    const int64_t rb = task / l.panel_split / l.col_blocks % l.row_blocks;
    const int64_t g = task / l.panel_split / l.col_blocks / l.row_blocks;
    int64_t r0 = rb * l.rows;
    int64_t r1 = std::min(r0 + l.rows, l.all_rows);
    if (shares_rows(lowering) && l.full == 0 && l.rows < p.out[1]) {
      const int64_t parts = ceil_div(p.out[1], l.rows);
      r0 = rb / parts * p.out[1] + rb % parts * l.rows;
      r1 = std::min(r0 + l.rows, (rb / parts + 1) * p.out[1]);
    }
    const int64_t j0 = cb * l.cols;
    const int64_t j1 = std::min(j0 + l.cols, p.out[2]);
    Ptr strip = scratch + worker * l.thread_floats();
    Ptr local = strip + l.strip_floats;
    Ptr buffer = local + l.local_floats;
    const int64_t buffer_ld = l.group * l.panel;

    Block block{};
    block.cols = j1 - j0;
    block.rows = r1 - r0;
    block.row_stride = l.strip_row;
    block.first_row = r0;
    block.first_col = j0;
    block.stream = stream;
    block.a = l.full != 0 ? full + (g * l.all_rows + r0) * l.strip_row : strip;
    // Where each output row begins in A, if not at equal distances.
    Room<ConstPtr> a_rows_room(block.rows);
    ConstPtr* a_rows = a_rows_room.data();
    const bool apart = lowering == Lowering::kDirect || lowering == Lowering::kIndirect ||
                       shares_rows(lowering) || l.bare;
    for (int64_t r = r0; r < r1 && lowering == Lowering::kWindow && l.full == 0; ++r) {
      const Ptr to = strip + (r - r0) * l.strip_row;
      a_rows[r - r0] = to;
      if (l.bare) {
        const int64_t first = j0 * p.stride[2] - p.pad[2];
        const ConstPtr row = input_row(p, input(g, r), r % l.out_rows, 0, 0);
        if (row != nullptr && first >= 0 && first + strip_columns(p, false, j1 - j0) <= p.in[2]) {
          a_rows[r - r0] = row + first * p.x.sp[2];
          continue;
        }
      }
      fill_window_order(l, k, input(g, r), r % l.out_rows, j0, j1, to);
    }
    if (lowering == Lowering::kRows) fill_rows(l, k, p, input(g, 0), r0, r1, j0, j1, strip);
    if (lowering == Lowering::kWidth && l.full == 0) {
      fill_width(l, k, input(g, 0), r0, r1, j0, j1, 0, p.win[2], strip);
    }
    for (int64_t r = r0; r < r1 && apart && !l.bare; ++r) {
      const int64_t y = r % p.out[1] * p.stride[1] - p.pad[1];
      if (lowering == Lowering::kIndirect) {
        a_rows[r - r0] = input(g, r);
      } else if (lowering == Lowering::kWidth) {
        const int64_t part = r / p.out[1];
        const int64_t top = l.full != 0
                                ? -p.pad[1]
                                : std::max(r0, part * p.out[1]) % p.out[1] * p.stride[1] - p.pad[1];
        const int64_t slot = l.full != 0 ? g * p.n * p.out[0] + part : part - r0 / p.out[1];
        a_rows[r - r0] = (l.full != 0 ? full : strip) + slot * l.cols * l.pixel_stride +
                         (y - std::max<int64_t>(0, top)) * l.input_row;
      } else if (lowering == Lowering::kRows) {
        const int64_t part = r / p.out[1];
        const int64_t top = std::max(r0, part * p.out[1]) % p.out[1] * p.stride[1] - p.pad[1];
        a_rows[r - r0] = strip + ((part - r0 / p.out[1]) * p.win[0] * l.plane_rows + y -
                                  std::max<int64_t>(0, top)) *
                                     l.input_row;
      } else {
        a_rows[r - r0] = input(g, r) +
                         (r % l.out_rows / p.out[1] * p.stride[0] - p.pad[0]) * p.x.sp[0] +
                         y * p.x.sp[1] + (j0 * p.stride[2] - p.pad[2]) * p.x.sp[2];
      }
    }

    Room<int64_t> c_rows_room(block.rows);
    int64_t* c_rows = c_rows_room.data();
    for (int64_t r = r0; r < r1; ++r) {
      c_rows[r - r0] =
          l.buffered ? (r - r0) * block.cols * buffer_ld : output(g, r) + j0 * p.y.sp[2];
    }
    const int64_t panel_end = l.panels * (split + 1) / l.panel_split;
    // The filters that are read after panel `panel` of block kb.
    const auto ahead_of = [&](int64_t panel, int64_t first, int64_t kb) -> Ahead {
      if (!l.streams || l.pack == kLocal) return {};
      int64_t next = panel + 1;
      int64_t next_kb = kb;
      if (next == std::min(first + l.group, panel_end)) {
        next_kb = kb + 1 < n_blocks ? kb + 1 : 0;
        if (next_kb > 0) next = first;
        if (next == panel_end) return {};
      }
      const int64_t r = next_kb * l.kc;
      const int64_t columns = ceil_div(std::min(l.panel, p.k - next * l.panel), l.width);
      if (l.pack == kInPlace) {
        return {o.w + g * p.w.g + filter_row(p, r) + next * l.panel, p.w.c, columns};
      }
      return {packed + ((g * l.panels + next) * l.reduction + r) * l.panel, l.panel, columns};
    };
    // The filters that are read after those of block kb, for which its panels, [first, last), have
    // time.
    const auto block_after = [&](int64_t first, int64_t last, int64_t kb) -> Ahead {
      const bool same = kb + 1 < n_blocks;
      const int64_t next = same ? first : last;
      if (!l.in_order || next == panel_end) return {};
      int64_t steps = 0;
      for (int64_t r = r0; r < r1; ++r) {
        const Runs& runs = kinds.runs[kinds.of_row[r % l.out_rows]][kb];
        if (l.edges != Edges::kByColumn) steps += runs.steps * ceil_div(block.cols, l.mr);
        for (int64_t v = 0; v < p.win[2] && l.edges == Edges::kByColumn; ++v) {
          const Range real = pixels_at(p, v, j0, j1);
          steps += (runs.before[v + 1] - runs.before[v]) * ceil_div(real.end - real.begin, l.mr);
        }
      }
      steps = std::max<int64_t>(1, steps * (last - first));
      const int64_t features = std::min(std::min(next + l.group, panel_end) * l.panel, p.k);
      const int64_t words = l.kc * (features - next * l.panel) * o.w.size / k.size;
      const ConstPtr from =
          o.w + g * p.w.g + filter_row(p, same ? (kb + 1) * l.kc : 0) + next * l.panel * p.w.k;
      return {{from.at, k.size},
              std::clamp<int64_t>(ceil_div(words, steps), l.width / 2, l.width),
              0,
              words};
    };
    Ahead after{};
    // A filter value that is not finite leaves its mark on every output that did not skip it: one
    // pixel of each kind of row, here of row r, tells whether the skipped ones must be looked at.
    const auto look_at = [&](int64_t r, ConstPtr pixel, int64_t features) {
      if (!kinds.skips && !l.by_column()) return;
      if (r >= l.out_rows || kinds.first_row[kinds.of_row[r]] != r) return;
      if (k.all_finite(pixel, features) == 0) suspicious = true;
    };
    // Where the sums of a panel are, and how far apart those of neighbouring pixels.
    const int64_t c_pixel = l.buffered ? buffer_ld : p.y.sp[2];
    const auto sums_of = [&](int64_t panel, int64_t first) {
      return l.buffered ? buffer + (panel - first) * l.panel : o.y + panel * l.panel;
    };
    const auto one_panel = [&](int64_t panel, int64_t first, int64_t kb) {
      const int64_t features = std::min(l.panel, p.k - panel * l.panel);
      ConstPtr b = l.pack == kInPlace ? o.w + g * p.w.g + panel * l.panel
                   : l.pack == kLocal ? local + (panel - first) * l.panel * l.kc
                                      : packed + (g * l.panels + panel) * l.panel * l.reduction;
      const Ptr c = sums_of(panel, first);
      Ahead of_panel = l.in_order ? Ahead{} : ahead_of(panel, first, kb);
      Ahead* ahead = l.in_order ? &after : &of_panel;
      const int64_t piece = kb + 1 == n_blocks ? piece_of_row : 0;
      if (!apart && piece == 0) {
        multiply(l, k, block, b, kinds, kb, features, c, c_rows, c_pixel, ahead);
        return;
      }
      for (int64_t r = r0; r < r1; ++r) {
        Block row = block;
        row.rows = 1;
        row.first_row = r;
        row.a = apart ? a_rows[r - r0] : block.a + (r - r0) * block.row_stride;
        row.new_input = panel == first && kb == 0;
        if (lowering == Lowering::kIndirect) {
          row.table = table + (r % l.out_rows * p.out[2] + j0) * l.pixel_stride;
          row.zeros = zeros;
        }
        if (piece == 0) {
          multiply(l, k, row, b, kinds, kb, features, c, c_rows + (r - r0), c_pixel, ahead);
          continue;
        }
        for (int64_t j = j0; j < j1; j += piece) {
          Block part = row;
          part.cols = std::min(piece, j1 - j);
          part.first_col = j;
          if (row.table != nullptr) {
            part.table = row.table + (j - j0) * l.pixel_stride;
          } else {
            part.a = row.a + (j - j0) * l.pixel_stride;
          }
          const int64_t at = output(g, r) + j * p.y.sp[2] + panel * l.panel * p.y.k;
          const Ptr sums = l.buffered ? buffer : o.y + at;
          const int64_t pixel = l.buffered ? l.panel : p.y.sp[2];
          const int64_t first_row = 0;
          multiply(l, k, part, b, kinds, kb, features, sums, &first_row, pixel, ahead);
          if (l.marked >= j && l.marked < j + part.cols) {
            look_at(r, sums + (l.marked - j) * pixel, features);
          }
          finish_rows(p, k, o, sums, pixel, part.cols, features, g, panel * l.panel, at,
                      stream_pieces && features * o.y.size % (k.width * k.size) == 0);
        }
      }
    };
    const auto finish_panel = [&](int64_t panel, int64_t first) {
      if (piece_of_row > 0) return;
      const int64_t features = std::min(l.panel, p.k - panel * l.panel);
      const Ptr c = sums_of(panel, first);
      for (int64_t r = r0; r < r1 && l.marked >= j0 && l.marked < j1; ++r) {
        look_at(r, c + c_rows[r - r0] + (l.marked - j0) * c_pixel, features);
      }
      if (!l.buffered) return;
      for (int64_t r = r0; r < r1; ++r) {
        const int64_t at = output(g, r) + j0 * p.y.sp[2] + panel * l.panel * p.y.k;
        finish_rows(p, k, o, c + c_rows[r - r0], c_pixel, block.cols, features, g, panel * l.panel,
                    at);
      }
    };

    for (int64_t first = l.panels * split / l.panel_split; first < panel_end; first += l.group) {
      const int64_t last = std::min(first + l.group, panel_end);
      for (int64_t kb = 0; kb < n_blocks; ++kb) {
        const int64_t k0 = kb * l.kc;
        const int64_t k1 = std::min(k0 + l.kc, l.reduction);
        if (columns) {
          for (int64_t r = r0; r < r1; ++r) {
            fill_columns(l, k, input(g, r), r % l.out_rows, j0, j1, k0, k1,
                         strip + (r - r0) * l.strip_row);
          }
        }
        if (l.pack == kLocal) {
          pack_panels(l, k, o.w, g, first, last, k0, k1, local, l.panel * l.kc);
        }
        after = block_after(first, last, kb);
        for (int64_t panel = first; panel < last; ++panel) one_panel(panel, first, kb);
      }
      for (int64_t panel = first; panel < last; ++panel) finish_panel(panel, first);
    }
    if (streams) publish_streams();
  });
  if (suspicious && p.panel == 0) add_skipped_nonfinite(p, o, e);
  if (suspicious && p.panel > 0) add_skipped_by_panel(p, o, e);
}

int64_t gemm_workspace(const Problem& p, const Target& t, const Params& params, Lowering lowering) {
  const Layout l = make_layout(p, t, params, lowering);
  return l.packed_floats + l.full_floats + l.zero_floats + l.table_words +
         l.thread_floats() * useful_threads(p, t.threads);
}

double tile_step_cycles(const Kernels& k, int64_t mr, int64_t nv, double a_cycles) {
  // What a step waits for: two FMA ports, the four cycles until a sum can be added to again, the
  // loads of A and B, and B's way from the second-level cache. They overlap, but less where two
  // take nearly as long: the sum of fourth powers is within a twentieth of what was measured for
  // nearly every tile. Golden Cove and later load two vectors of 512 bits in a cycle: 14x2, 12x2
  // and 8x3 are as fast as 6x4, and 10x2 is faster than 5x4. Ice Lake loads one: 6x4 beats 14x2 by
  // an eighth.
  const double m = static_cast<double>(mr);
  const double v = static_cast<double>(nv);
  const int64_t vector = k.width * k.size;
  const double loads = vector == 64 && !k.loads_two ? 1.0 : 2.0;
  const double l2_bytes = k.loads_two ? 36.0 : 28.0;
  const auto fourth = [](double x) { return x * x * x * x; };
  const double waits = fourth(m * v / 2.0) + fourth(4.0) + fourth((m + v) / loads) +
                       fourth(v * static_cast<double>(vector) / l2_bytes);
  const double a_waits = a_cycles * m * static_cast<double>(vector) / 64.0;
  // By experience a step takes a third to a half more: runs and panels begin and end.
  return (vector == 64 ? 1.3 : 1.5) * (std::sqrt(std::sqrt(waits)) + a_waits);
}

Tile best_tile(const Kernels& k, int64_t rows, int64_t columns, int64_t most, double a_cycles,
               int64_t unit) {
  Tile best{1, 1};
  double best_cost = 1e300;
  for (int64_t nv = unit; nv <= kMaxNv; nv += unit) {
    if (k.max_mr[nv] == 0) continue;
    const int64_t panels = ceil_div(columns, nv * k.width);
    const int64_t last_nv = ceil_div(columns - (panels - 1) * nv * k.width, k.width);
    const int64_t mr = ceil_div(rows, ceil_div(rows, std::min<int64_t>(most, k.max_mr[nv])));
    const double cost = static_cast<double>(panels - 1) * step_cycles(k, rows, mr, nv, a_cycles) +
                        step_cycles(k, rows, mr, last_nv, a_cycles);
    if (cost < best_cost * 0.999) {
      best_cost = cost;
      best = {mr, nv};
    }
  }
  return best;
}

std::string gemm_rejects(const Problem& p, Lowering lowering) {
  if (p.dilated_input()) return "lhs_dilation > 1";
  if (p.chunk_rows > 0) return "the reduction is chunked (weight gradient)";
  if (lowering == Lowering::kIndirect && p.x.c != 1 && p.c > 1) {
    return "the input's channels lie apart";
  }
  if (lowering == Lowering::kIndirect && !p.plain()) return "operands are read in place";
  return {};
}

namespace {

// Whether results of a tile of nv vectors should pass the caches by, as they would not stay there
// until they are read. With few products to a result, fetching the lines that are written takes a
// good part of the time, and a last-level cache that other cores share is no better than memory.
bool passes_by(const Problem& p, const Kernels& k, int64_t nv) {
  const int64_t bytes = p.g * p.n * p.k * p.pixels() * kDtypeRows[p.out_dtype].size;
  // With hardly any, and whole panels of the widest tile, that begins as soon as they leave the
  // second-level cache; narrower tiles lose by it in fresh memory. Elements that sums are made at
  // last wait for nothing else.
  const bool hardly_any = p.reduction() <= 16 && nv == kMaxNv;
  const bool words = is_word(k, p.out_dtype);
  const int64_t few = (words ? 4 : 2) * caches().l2 / (hardly_any ? 2 : 1);
  const int64_t kept = std::max(p.reduction() <= 128 ? 0 : caches().l3 / 2, few);
  const bool can_stream = words || k.stream[p.out_dtype] != nullptr;
  return p.y.k == 1 && can_stream && bytes >= kept;
}

}  // namespace

Params gemm_defaults(const Problem& problem, const Target& t, Lowering lowering) {
  const Kernels& k = *t.kernels;
  const Problem p = words_of(problem, k);
  Params params{};
  const int64_t highest = lowering == Lowering::kIndirect ? kMaxIndirectMr : kMaxMr;
  // Without a window, an element is read once in each pass: from where all of them fit. And short
  // sums are stored as often as they are added to, the better the more neighbours there are.
  const bool far_off =
      p.reduction() <= 64 || (p.window() == 1 && p.n * p.pixels() * p.c * k.size > caches().l2 / 2);
  Tile tile = best_tile(k, p.out[2], p.k, highest, far_off ? kFarCycles : kNearCycles);
  int64_t widest = 0;
  for (int64_t v = 0; v < p.win[2]; ++v) {
    const Range real = pixels_at(p, v, 0, p.out[2]);
    widest = std::max(widest, real.end - real.begin);
  }
  if (widest > 0 && widest < p.out[2]) {
    const Tile trimmed = best_tile(k, widest, p.k, highest);
    if (row_cycles(p, k, lowering, trimmed) < row_cycles(p, k, lowering, tile)) tile = trimmed;
  }
  // Results that pass the caches by leave in whole cache lines, or slowly.
  const int64_t line = std::max<int64_t>(1, 64 / (k.width * k.size));
  if (tile.nv % line != 0 && p.k > tile.nv * k.width && passes_by(p, k, tile.nv)) {
    tile = best_tile(k, p.out[2], p.k, highest, kFarCycles, line);
  }
  if (p.panel > 0) {
    tile.nv = std::clamp<int64_t>(p.panel / k.width, 1, kMaxNv);
    const int64_t most = std::clamp<int64_t>(k.max_mr[tile.nv], 1, highest);
    tile.mr = ceil_div(p.out[2], ceil_div(p.out[2], most));
    const Tile trimmed{ceil_div(widest, std::max<int64_t>(1, ceil_div(widest, most))), tile.nv};
    if (widest > 0 && row_cycles(p, k, lowering, trimmed) < row_cycles(p, k, lowering, tile)) {
      tile = trimmed;
    }
  }
  params[kMr] = tile.mr;
  params[kNv] = tile.nv;
  const int64_t panel = tile.nv * k.width;
  const int64_t kc_limit = std::max<int64_t>(256, panel_floats(k) / panel);
  params[kKc] = p.reduction() <= kc_limit || lowering == Lowering::kIndirect
                    ? 0
                    : round_up(ceil_div(p.reduction(), ceil_div(p.reduction(), kc_limit)), 8);
  params[kFull] = 0;
  params[kCols] = 0;
  const int64_t threads = useful_threads(problem, t.threads);
  const int64_t all_rows = p.n * p.out[0] * p.out[1];
  int64_t row_floats = p.out[2] * p.stride[2] * p.x.sp[2];  // direct: the input it walks over
  if (lowering == Lowering::kWindow) {
    const bool disjoint = p.stride[2] >= (p.win[2] - 1) * p.rhs_dilation[2] + 1;
    const int64_t unit = p.win[0] * p.win[1] * p.c;
    row_floats = strip_columns(p, disjoint, p.out[2]) * unit;
    // What is not plain is copied even where the window is a single pixel, and its results are too:
    // both copies stay in a quarter of the second-level cache.
    int64_t limit = p.plain() ? strip_limit(k) : std::min(strip_limit(k), panel_floats(k));
    const int64_t fixed = strip_columns(p, disjoint, 1) * unit;
    // Blocks without padding are read in place: the less is copied, the better.
    if (!disjoint && is_bare(p) && p.k * p.reduction() <= panel_floats(k)) {
      limit = std::min(limit, std::max(panel_floats(k) / 2, 4 * fixed));
    }
    if (row_floats > limit) {
      const int64_t per_pixel =
          (disjoint ? p.win[2] : p.stride[2]) * unit + (p.plain() ? 0 : panel);
      const int64_t pixels = 1 + std::max<int64_t>(0, (limit - fixed) / per_pixel);
      params[kCols] = std::max<int64_t>(1, pixels / tile.mr * tile.mr);
      if (pixels < tile.mr) params[kCols] = pixels;
      row_floats = strip_columns(p, disjoint, params[kCols]) * unit;
    }
  } else if (shares_rows(lowering)) {
    // MEC's columns gain by the rows that output rows share: a few of them at least.
    const int64_t least = lowering == Lowering::kRows ? 1 : std::min<int64_t>(4, p.out[1]);
    int64_t cols = p.out[2];
    while (shared_floats(p, lowering, least, cols) > strip_limit(k) && cols > tile.mr) {
      cols = round_up(ceil_div(cols, 2), tile.mr);
    }
    if (cols < p.out[2]) params[kCols] = cols;
    row_floats = std::min(p.stride[1], p.in[1]) * p.c * p.win[0] *
                 (lowering == Lowering::kRows ? strip_columns(p, false, cols) : cols * p.win[2]);
  } else if (lowering == Lowering::kColumns) {
    params[kKc] = std::min<int64_t>(p.reduction(), 512);
    params[kCols] = std::min<int64_t>(p.out[2], 8 * tile.mr);
    row_floats = params[kCols] * params[kKc];
  } else if (p.out[2] > 4096) {
    params[kCols] = round_up(1024, tile.mr);
  }
  // Where all pixels make one block or two, each block can afford to pass over the filters by
  // itself: as they lie if the pixels are few, else packed a piece at a time, which stays in the
  // second-level cache where the copy of all of them would not.
  const int64_t pixels = p.n * p.pixels();
  int64_t fitting = std::max<int64_t>(1, strip_limit(k) / std::max<int64_t>(1, row_floats));
  if (shares_rows(lowering)) {
    const int64_t cols = params[kCols] == 0 ? p.out[2] : params[kCols];
    if (fitting >= p.out[1]) fitting = fitting / p.out[1] * p.out[1];
    while (fitting > 1 && shared_floats(p, lowering, fitting, cols) > strip_limit(k)) {
      fitting -= fitting > p.out[1] ? p.out[1] : 1;
    }
  }
  const int64_t fewest = ceil_div(all_rows, std::min(fitting, all_rows));
  // Filters in place: the rows of a panel lie as far apart as all features of all groups, and meet
  // in the same few sets of the caches where that is much.
  const auto far = [&](int64_t rows) { return p.w.c * rows > panel_floats(k); };
  const bool apart = p.w.k == 1 && far(std::min(p.reduction(), kc_limit));
  const bool few_blocks = (p.w.k == 1 || p.w.c == 1 || p.panel > 0) &&
                          lowering != Lowering::kColumns && fewest <= 2 && params[kCols] == 0 &&
                          (p.k > panel || (apart && p.panel == 0));
  const int64_t in_order = steps_in_order(p, k, 512);
  // Panels that stay in the second-level cache as they lie are read in a single pass, by some more
  // pixels the fewer of its sets they fill.
  const int64_t held = rows_held(p, k, panel) / p.reduction();
  const int64_t most_vectors = held >= 4 ? 32 : held >= 2 ? 16 : 0;
  const bool one_pass = p.plain() && p.panel == 0 && p.w.k == 1 && p.w.c % k.width == 0 &&
                        p.k > panel && p.reduction() <= 512 && pixels <= most_vectors * k.width &&
                        lowering != Lowering::kColumns;
  if (lowering == Lowering::kIndirect) {
    params[kPack] = kShared;
  } else if (few_blocks && p.plain() && p.panel == 0 && p.w.k == 1 &&
             (rows_held(p, k, panel) >= 256 /* two passes */ || (threads == 1 && in_order > 0)) &&
             pixels <= std::clamp<int64_t>(panel_floats(k) / p.w.c, int64_t{8} * k.width,
                                           int64_t{48} * k.width)) {
    params[kPack] = kInPlace;
    // Of groups, the filters of one: all of them, where they fit.
    const bool fit = p.g > 1 && p.k * p.reduction() <= panel_floats(k) / 2;
    params[kKc] = threads == 1 && in_order > 0 ? in_order : fit ? 0 : steps_in_place(p, k);
  } else if (one_pass) {
    params[kPack] = kInPlace;
    params[kKc] = 0;
  } else if (few_blocks && (p.k * p.reduction() > panel_floats(k) || apart)) {
    params[kPack] = kLocal;
    // A panel and what its tiles read fill the second-level cache: sums are seldom put aside. Of
    // few pixels, a panel is still there when it is read.
    const bool few_pixels = pixels <= int64_t{8} * k.width;
    const int64_t room = few_pixels ? panel_floats(k) / 2 : panel_floats(k) * 9 / 8;
    params[kKc] = std::max<int64_t>(128, room / panel / 8 * 8);
    if (!few_pixels) {
      params[kKc] = round_up(ceil_div(p.reduction(), ceil_div(p.reduction(), params[kKc])), 8);
    }
    // Few pixels wait for the filters: all features of some rows, of which the next are fetched
    // meanwhile.
    const int64_t all = panel_floats(k) / round_up(p.k, panel) / 8 * 8;
    if (!p.plain() && few_pixels && all >= 128 && in_one_piece(p, k, all)) {
      params[kKc] = all;
    }
    // Filters that are transposed besides: a window position's, while those before compute.
    if (p.w.c == 1 && few_pixels && p.c >= 256 && p.c <= params[kKc] && in_one_piece(p, k, p.c)) {
      params[kKc] = p.c;
    }
  } else {
    // In place, features that do not fill a vector would not reach the narrow form.
    const bool narrow =
        p.k < k.width && p.c >= 8 && narrow_form(k, tile.mr, p.window() > 1) != nullptr;
    // Nor would their vectors begin on cache lines.
    const bool split = p.w.c % k.width != 0 && pixels >= 8 * tile.mr;
    params[kPack] = p.plain() && p.w.k == 1 && p.k <= 2 * panel && !apart && !narrow && !split
                        ? kInPlace
                        : kShared;
    // One row of many pixels: as many of them at a time as the first-level cache holds, for all
    // features.
    if (lowering == Lowering::kDirect && p.window() == 1 && all_rows == 1 && p.k > panel) {
      const int64_t fit = caches().l1 / k.size / p.c;
      const int64_t cols = round_up(std::clamp<int64_t>(fit, 48, 192), tile.mr);
      if (2 * cols < p.out[2]) params[kCols] = cols;
    }
    // As many as it holds beside the filters, where they are made words for it.
    if (lowering == Lowering::kWindow && p.window() == 1 && all_rows == 1 && !p.plain()) {
      const int64_t fit = caches().l1 / 2 / k.size / p.c;
      const int64_t most = std::max<int64_t>(112, 3584 / p.c);
      const int64_t cols = round_up(std::clamp<int64_t>(fit, 48, most), tile.mr);
      if (2 * cols < p.out[2]) params[kCols] = cols;
    }
    // Filters that one block needs, those of its group, are packed by it.
    if (params[kPack] == kShared && p.g > 1 && fewest == 1 && params[kCols] == 0 &&
        lowering != Lowering::kColumns) {
      params[kPack] = kLocal;
    }
  }
  if (p.panel > 0) params[kPack] = kBefore;
  if (params[kKc] >= p.reduction()) params[kKc] = 0;
  // A single pass over filters in place gains nothing by large blocks.
  const bool once = params[kPack] == kInPlace && params[kKc] == 0;
  const bool by_block =
      params[kPack] == kLocal || (few_blocks && params[kPack] != kShared && !once);
  int64_t rows = ceil_div(all_rows, fewest);
  if (!by_block) {
    // Enough pixels to use a panel of B many times, and a strip that stays in half the second-level
    // cache.
    rows = std::clamp<int64_t>(2 * panel_floats(k) / std::max<int64_t>(1, row_floats), 1, 8);
    rows = std::min({rows, fitting, all_rows});
  }
  const int64_t cols = params[kCols] == 0 ? p.out[2] : std::min(params[kCols], p.out[2]);
  const Extent blocks = blocks_for(p, k, lowering, {std::max<int64_t>(1, rows), cols}, tile,
                                   by_block ? 8 : 4, threads);
  params[kRows] = blocks.rows;
  if (blocks.cols < cols) params[kCols] = blocks.cols;
  // Each pass over a block's input beyond the second-level cache costs more than a panel that fills
  // most of that cache.
  if (lowering == Lowering::kDirect && !few_blocks && p.window() > 1 &&
      rows_read(p, rows) * p.win[0] * p.in[2] * p.c > 2 * panel_floats(k) &&
      p.reduction() * panel <= panel_floats(k) * 5 / 2) {
    params[kKc] = 0;
  }
  params[kStream] = passes_by(p, k, tile.nv) ? 1 : 0;
  // Sums that cannot be written to the result itself lie beside the strip, in the same limit.
  while (is_buffered(p, k)) {
    const Layout l = make_layout(problem, t, params, lowering);
    if (l.strip_floats + l.buffer_floats <= strip_limit(k)) break;
    if (l.rows > 1) {
      params[kRows] = ceil_div(l.rows, 2);
    } else if (l.cols > tile.mr) {
      params[kCols] = round_up(ceil_div(l.cols, 2), tile.mr);
    } else {
      break;
    }
  }
  return params;
}

std::string gemm_check(const Problem& problem, const Target& t, const Params& params,
                       Lowering lowering) {
  const Kernels& k = *t.kernels;
  const Problem p = words_of(problem, k);
  const int64_t nv = params[kNv];
  if (nv < 1 || nv > kMaxNv || k.max_mr[nv] == 0) return "nv: no such tile";
  if (params[kMr] < 1 || params[kMr] > k.max_mr[nv]) return "mr: no such tile";
  if (params[kKc] < 0) return "kc: negative";
  if (params[kKc] > 0 && params[kKc] < std::min<int64_t>(8, p.reduction())) return "kc: too small";
  if (params[kRows] < 0 || params[kCols] < 0) return "rows, cols: negative";
  if (params[kPack] < kInPlace || params[kPack] > kBefore) return "pack: 0, 1, 2 or 3";
  if ((params[kPack] == kBefore) != (p.panel > 0)) {
    return "pack: 3 is for filters that are packed already, and for no others";
  }
  if (p.panel > 0 && p.panel != nv * k.width) return "nv: the filters are packed in other panels";
  if (params[kPack] == kInPlace && !p.plain()) {
    return std::string("pack: filters of ") + kDtypeRows[p.dtype].name + " are not read in place";
  }
  if (params[kPack] == kInPlace && p.w.k != 1) {
    return "pack: reading the filters in place needs contiguous features";
  }
  if (lowering == Lowering::kIndirect) {
    if (params[kMr] > kMaxIndirectMr) return "mr: no such tile";
    if (params[kKc] != 0) return "kc: must be 0";
    if (params[kPack] == kInPlace) return "pack: filters are not read in place";
  }
  const bool has_full = lowering == Lowering::kWindow || lowering == Lowering::kColumns ||
                        lowering == Lowering::kWidth;
  if (params[kFull] != 0 && (params[kFull] != 1 || !has_full)) {
    return "full: 0 or 1";
  }
  if (params[kStream] != 0 && params[kStream] != 1) return "stream: 0 or 1";
  const double floats = static_cast<double>(p.g * p.n * p.out[0] * p.out[1]) *
                        static_cast<double>(p.out[2] + p.win[2] * p.rhs_dilation[2]) *
                        static_cast<double>(p.stride[2]) * static_cast<double>(p.reduction());
  if (params[kFull] != 0 && floats > 1e12) return "full: too large";
  const Layout l = make_layout(problem, t, params, lowering);
  const int64_t least = shares_rows(lowering) ? shared_floats(p, lowering, 1, l.cols) : l.strip_row;
  if (l.strip_floats > strip_limit(k) + least) {
    return "rows, cols: the strip is larger than its limit";
  }
  return {};
}

namespace {

// Cycles per float of packing the filters. Those that lie one after another (OIHW) are packed all
// at once: read, written and read again past the second-level cache where they do not fit into it.
double pack_cycles(const Problem& p, const Kernels& k) {
  const double width = static_cast<double>(k.width);
  if (p.w.k == 1) return 3 / width;
  const int64_t bytes = p.g * p.k * p.reduction() * k.size;
  if (bytes <= caches().l2 / 2) return 6 / width;
  if (p.w.c == 1) return 12 / width;
  return bytes <= caches().l3 / 4 ? 4.5 : 9.0;
}

}  // namespace

double gemm_cost(const Problem& problem, const Target& t, const Params& params, Lowering lowering) {
  const Kernels& k = *t.kernels;
  const Problem p = words_of(problem, k);
  const double mr = static_cast<double>(params[kMr]);
  const double nv = static_cast<double>(params[kNv]);
  const double panels = static_cast<double>(ceil_div(p.k, params[kNv] * k.width));
  const double tiles = static_cast<double>(ceil_div(p.out[2], params[kMr]));
  const double rows = static_cast<double>(p.g * p.n * p.out[0] * p.out[1]);
  const double step = tile_step_cycles(k, params[kMr], params[kNv]);
  // Window rows on padding are left out.
  double cost = rows * tiles * panels * static_cast<double>(p.reduction()) * step *
                real_share(p, 0) * real_share(p, 1);
  const int64_t vectors = std::min(params[kNv], ceil_div(p.k, k.width));
  const Edges edges = edges_of(p, k, lowering, params[kMr], vectors);
  if (edges == Edges::kByColumn) {
    cost *= trimmed_cycles(p, k, params[kMr], vectors) / whole_cycles(p, k, params[kMr], vectors);
  } else if (edges == Edges::kByTile) {
    // The first and the last tile are loaded and stored for every window position along x.
    cost += rows * panels * 2.0 * mr * nv * static_cast<double>(p.win[2] - 1);
  }
  cost += rows * tiles * panels * mr * nv;  // loading and storing the tile
  const double width = static_cast<double>(k.width);
  const double w_floats = static_cast<double>(p.g * p.k * p.reduction());
  if (params[kPack] != kInPlace && p.panel == 0) cost += w_floats * pack_cycles(p, k);
  const double unit = static_cast<double>(p.win[0] * p.win[1]);
  const double copy = p.x.c == 1 ? 2.0 : 4.0;
  const double run = static_cast<double>(ceil_div(p.c, k.width));
  if (lowering == Lowering::kWindow) {
    const bool disjoint = p.stride[2] >= (p.win[2] - 1) * p.rhs_dilation[2] + 1;
    cost += rows * static_cast<double>(strip_columns(p, disjoint, p.out[2])) * unit * run * copy;
  } else if (lowering == Lowering::kColumns) {
    cost += rows * static_cast<double>(p.out[2]) * unit * static_cast<double>(p.win[2]) * run *
            copy * 1.5;
  } else if (shares_rows(lowering)) {
    const Layout l = make_layout(problem, t, params, lowering);
    const double blocks = static_cast<double>(p.g * l.row_blocks * l.col_blocks);
    const double columns =
        static_cast<double>(shared_floats(p, lowering, l.rows, l.cols)) / static_cast<double>(p.c);
    const bool whole = lowering == Lowering::kRows && p.x.c == 1 && p.x.sp[2] == p.c;
    cost += blocks * columns * (whole ? static_cast<double>(p.c) / width : run) * copy;
    cost += rows * tiles * panels * 0.5 *
            static_cast<double>(lowering == Lowering::kRows ? p.window() : p.win[2]);
  } else if (lowering == Lowering::kIndirect) {
    // The buffer is filled, and every row of a tile looks up every window position.
    const double taps = static_cast<double>(p.window());
    cost += rows * tiles * panels * taps * (0.5 + 1.5 * mr);
    cost += static_cast<double>(p.pixels()) * taps * 2.0;
  } else if (p.window() > 1) {
    // Every window position is a run of its own. Rows that lie apart stay in the first-level cache
    // as well as a strip does, channels that lie apart do not.
    cost += rows * tiles * panels * 0.5 * static_cast<double>(p.window());
    if (p.x.c != 1) cost *= 1.3;
    // Few channels of many: pixels that meet in the same sets of the first-level cache, or all in
    // one.
    const bool one_set = p.stride[2] * p.x.sp[2] * k.size % 4096 == 0;
    const bool few = p.c <= int64_t{2} * k.width;
    if (p.x.c == 1 && p.x.sp[2] > p.c) cost *= one_set ? (few ? 1.5 : 1.15) : few ? 1.05 : 1.0;
  }
  // Measured: never faster than im2win and direct, where the model sees no difference.
  if (lowering == Lowering::kWidth || lowering == Lowering::kIndirect) cost *= 1.2;
  return cost;
}

std::vector<Dtype> gemm_dtypes(Lowering lowering) {
  if (lowering == Lowering::kDirect || lowering == Lowering::kIndirect) return {kF32, kF64};
  return {kF32, kF64, kBF16, kF16, kS8, kU8, kS16};
}

std::vector<ParamSpec> gemm_param_specs(Lowering lowering) {
  std::vector<ParamSpec> specs{
      {"mr",
       "rows (output pixels) of the register tile",
       {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16}},
      {"nv", "vectors of output features of the register tile", {1, 2, 3, 4}},
      {"kc", "reduction steps per pass over the tile's panel; 0: all", {0, 128, 256, 512, 1024}},
      {"rows", "output rows per block, of any images; 0: all", {0, 1, 2, 3, 4, 6, 8, 12, 16}},
      {"cols", "output pixels per block; 0: the whole row", {0, 56, 112, 448, 1024}},
      {"pack",
       "filters are 0: read in place, 1: packed into panels first, 2: packed by every block, 3: "
       "packed before the call",
       {0, 1, 2, 3}},
      {"full", "1: the whole lowered tensor at once, as in the paper; 0: blocks", {0}},
      {"stream", "1: results pass the caches by on their way to memory", {0, 1}, false},
  };
  if (lowering == Lowering::kIndirect) {
    specs[kMr].values = {1, 2, 3, 4, 5, 6, 7, 8};
    specs[kKc].values = {0};
    specs[kPack].values = {1, 2, 3};
  }
  const bool has_full = lowering == Lowering::kWindow || lowering == Lowering::kColumns ||
                        lowering == Lowering::kWidth;
  if (has_full) specs[kFull].values = {0, 1};
  return specs;
}

}  // namespace jaxwin
