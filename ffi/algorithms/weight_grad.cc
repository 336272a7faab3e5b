// SPDX-License-Identifier: Apache-2.0
//
// Convolutions whose rows are "images": what lax's transpose makes of a weight gradient. There the
// window is the output gradient, an image is an input channel, and
//   y[n, k, u] = sum over c and window positions i of x[n, c, u * stride + i * rhs_dilation] * w[k,
//   c, i]
// is an outer product of an input row and a gradient row, summed over pixels. The micro-kernel
// takes MR images (input channels: neighbours in memory) by NR features, and walks along window
// rows: those of the input in place, those of the gradient in place or packed, a chunk and a panel
// of features at a time. Where the features would not fill a vector, the two change places: images
// become lanes, features rows. Of pointwise layers, where both operands are matrices, the fewer
// channels are rows: they are what is packed in small pieces. Inserted zeros (lhs_dilation: the
// gradient of a transposed convolution) and padding are skipped, not multiplied.
//
// A few channels alone make low tiles. Where pixels follow each other without a gap, the rows of
// the tile are output columns too: each reads a pixel further. Along padding, this needs images
// with margins of zeros; they are copied.
//
// The reduction follows Problem::chunk_rows: either the canonical chain or chunks of whole rows. A
// row that is a chunk for itself, as in wide one-dimensional layers, is walked in pieces that stay
// in the second-level cache for all output positions; the sums go on from piece to piece. That is
// the weight gradient by batch-reduced products of arXiv 2104.08002, with the chain kept.

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "algorithms/channels_last.h"
#include "algorithms/gemm_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {
namespace {

enum GradParam {
  kGradMr,
  kGradNv,
  kGradPack,
  kGradSwap,
  kGradTile,
  kGradStream,
  kGradCopy,
  kGradCols,
  kGradMargins
};

Params without_copy(const Params& params) {
  Params rest = params;
  rest[kGradCopy] = 0;
  return rest;
}

Params without_margins(const Params& params) {
  Params rest = params;
  rest[kGradMargins] = 0;
  return rest;
}

// The same sums, where only some rows or columns of the input are read (1x1 with a stride): those
// alone, as if they were next to each other. x_first: where the first one lies.
Problem thinned(const Problem& problem, int64_t* x_first = nullptr) {
  Problem p = problem;
  int64_t first = 0;
  for (int d = 0; d < 3; ++d) {
    const int64_t step = p.rhs_dilation[d];
    if (p.out[d] != 1 || p.lhs_dilation[d] != 1 || step == 1) continue;
    const int64_t pad = p.pad[d] > 0 ? ceil_div(p.pad[d], step) : -(-p.pad[d] / step);
    const int64_t begin = pad * step - p.pad[d];
    if (begin >= p.in[d]) continue;
    first += begin * p.x.sp[d];
    p.pad[d] = pad;
    p.in[d] = ceil_div(p.in[d] - begin, step);
    p.x.sp[d] *= step;
    p.rhs_dilation[d] = 1;
  }
  if (x_first != nullptr) *x_first = first;
  return p;
}

// A product of two matrices: pixels by images and pixels by features.
bool is_product(const Problem& p) {
  for (int d = 0; d < 3; ++d) {
    if (p.out[d] != 1 || p.pad[d] != 0 || p.in[d] != p.win[d] || p.lhs_dilation[d] != 1 ||
        p.rhs_dilation[d] != 1) {
      return false;
    }
  }
  return true;
}

// The two factors in each other's place: features are images, the window is the input. The sums are
// the same, of output positions counted from the other end.
Problem exchanged(const Problem& p) {
  Problem q = p;
  q.n = p.k;
  q.k = p.n;
  q.x = {p.w.k, p.w.g, p.w.c, p.w.sp};
  q.w = {p.x.g, p.x.n, p.x.c, p.x.sp};
  q.in = p.win;
  q.win = p.in;
  q.lhs_dilation = p.rhs_dilation;
  q.rhs_dilation = p.lhs_dilation;
  for (int d = 0; d < 3; ++d) q.pad[d] = (p.out[d] - 1) * p.stride[d] - p.pad[d];
  return q;
}

Dim3 from_other_end(const Problem& p, const Dim3& at) {
  return {p.out[0] - 1 - at[0], p.out[1] - 1 - at[1], p.out[2] - 1 - at[2]};
}

// Input columns that the output reads beyond the last one.
int64_t columns_beyond(const Problem& p) {
  const int64_t span = (p.win[2] - 1) * p.rhs_dilation[2] + (p.out[2] - 1) * p.stride[2] + 1;
  return span - p.pad[2] - p.in[2];
}

// The images as a copy [group][c][z][y][x][n], with the zeros that their rows are padded with.
Problem with_margins(const Problem& p) {
  Problem q = p;
  const int64_t left = std::max<int64_t>(0, p.pad[2]);
  q.pad[2] -= left;
  q.in[2] += left + std::max<int64_t>(0, columns_beyond(p));
  q.x.n = 1;
  q.x.sp[2] = p.n;
  for (int d = 1; d >= 0; --d) q.x.sp[d] = q.x.sp[d + 1] * q.in[d + 1];
  q.x.c = q.x.sp[0] * q.in[0];
  q.x.g = q.x.c * p.c;
  return q;
}

struct Layout {
  int64_t mr, nv, panel, panels;
  bool swap;  // rows are features, columns images
  int64_t columns;
  bool chunked;
  int64_t window_rows;  // c * z * y rows of the window, if chunked
  int64_t chunk_rows, chunks;
  bool merged;     // rows run over (u_x, n): Kw * C neighbours
  bool margins;    // in a copy of the images
  int64_t rows;    // of one output position: n, or n * out_x
  Dim3 positions;  // output positions that are walked one by one
  bool pack;       // a chunk of w is packed panel by panel
  bool copy_w;     // features of w are not contiguous, and not packed: w is copied first
  bool buffered;   // features of y are not contiguous
  // Rows (images) of a chunk packed tile by tile: [row tile][slot][input column][row of the tile].
  bool tiled;
  int64_t slots;  // input rows, and how many of them each c that a chunk touches has
  int64_t c_slots;
  int64_t row_tiles;  // tiles along the rows, and how high the highest is
  int64_t tile_rows;
  int64_t w_floats, y_floats, x_floats;
  int64_t pack_floats;  // per thread: packed features, or results to be turned
  int64_t tile_floats;  // per thread
  // A chunk of one row, so many window positions at a time.
  int64_t cols, pieces;
  int64_t tile_cols;   // input columns of a piece
  int64_t sum_floats;  // shared: sums of a chunk whose pieces are not all done
  int64_t shared_floats() const { return w_floats + y_floats + sum_floats + x_floats; }
};

// Input rows under window rows [y0, y1) of one c.
struct InputRows {
  int64_t begin, end;
};
InputRows rows_under(const Problem& p, int64_t y0, int64_t y1) {
  const int64_t begin = y0 * p.rhs_dilation[1] - p.pad[1];
  const int64_t end = (p.out[1] - 1) * p.stride[1] + (y1 - 1) * p.rhs_dilation[1] - p.pad[1] + 1;
  return {std::clamp<int64_t>(begin, 0, p.in[1]), std::clamp<int64_t>(end, 0, p.in[1])};
}

bool can_tile(const Problem& p) {
  return p.chunk_rows > 0 && p.x.n == 1 && p.win[0] == 1 && p.in[0] == 1 && p.out[0] == 1 &&
         !p.dilated_input();
}

// What the tiles' rows and columns come from.
Problem factors(const Problem& p, const Params& params) {
  const Problem q = params[kGradSwap] != 0 ? exchanged(p) : p;
  return params[kGradMargins] != 0 ? with_margins(q) : q;
}

Layout make_layout(const Problem& p, const Target& t, const Params& params) {
  const Problem q = factors(p, params);
  Layout l{};
  l.mr = params[kGradMr];
  l.nv = params[kGradNv];
  l.panel = l.nv * t.kernels->width;
  l.swap = params[kGradSwap] != 0;
  l.columns = q.k;
  l.panels = ceil_div(l.columns, l.panel);
  l.chunked = p.chunk_rows > 0;
  l.window_rows = p.c * p.win[0] * p.win[1];
  l.chunk_rows = l.chunked ? std::min(p.chunk_rows, l.window_rows) : l.window_rows;
  l.chunks = l.chunked ? ceil_div(l.window_rows, l.chunk_rows) : 1;
  l.buffered = l.swap || p.y.k != 1;
  l.margins = params[kGradMargins] != 0;
  const bool inside = q.pad[2] <= 0 && columns_beyond(q) <= 0 && q.lhs_dilation[2] == 1;
  l.merged = inside && q.n < 2 * l.mr && q.out[2] > 1 && q.stride[2] * q.x.sp[2] == q.n * q.x.n &&
             (l.buffered || p.y.sp[2] == p.n * p.y.n);
  l.rows = l.merged ? q.n * q.out[2] : q.n;
  l.positions = p.out;
  if (l.merged) l.positions[2] = 1;
  l.pack = params[kGradPack] != 0;
  l.copy_w = !l.pack && !l.swap && p.w.k != 1;
  l.cols = params[kGradCols] == 0 ? q.win[2] : std::min(params[kGradCols], q.win[2]);
  l.pieces = ceil_div(q.win[2], l.cols);
  l.tile_cols = q.in[2];
  if (l.pieces > 1) {
    l.tile_cols =
        std::min(q.in[2], (q.out[2] - 1) * q.stride[2] + (l.cols - 1) * q.rhs_dilation[2] + 1);
    l.sum_floats = l.chunks > 1 ? round_up(p.g * p.n * p.pixels() * p.k, 16) : 0;
  }
  l.pack_floats = l.pack ? round_up(l.chunk_rows * l.cols * l.panel, 16) : 0;
  if (l.swap) l.pack_floats = std::max(l.pack_floats, round_up(p.n * p.k, 16));
  l.row_tiles = ceil_div(l.rows, l.mr);
  l.tile_rows = ceil_div(l.rows, l.row_tiles);
  l.tiled = params[kGradTile] != 0;
  if (l.tiled) {
    const int64_t touched = ceil_div(l.chunk_rows - 1, p.win[1]) + 1;
    const InputRows most = rows_under(p, 0, std::min(l.chunk_rows, p.win[1]));
    l.c_slots = std::min(most.end - most.begin + std::max<int64_t>(0, p.pad[1]), p.in[1]);
    l.slots = std::min(touched, p.c) * l.c_slots;
    l.tile_floats = round_up(l.row_tiles * l.slots * l.tile_cols * l.tile_rows, 16);
  }
  l.w_floats = l.copy_w ? round_up(p.g * p.reduction() * p.k, 16) : 0;
  l.y_floats = l.buffered ? round_up(p.g * p.n * p.pixels() * p.k, 16) : 0;
  l.x_floats = l.margins ? round_up(q.g * q.x.g, 16) : 0;
  return l;
}

// w seen with contiguous features: w itself or the copy.
struct Filter {
  ConstPtr data;
  int64_t g, c;
  Dim3 sp;
};

// Window positions [x0, x1) of a row, and the input columns [q0, q1) under them.
struct Piece {
  int64_t x0, x1, q0, q1;
};
Piece make_piece(const Problem& p, const Layout& l, int64_t i) {
  if (l.pieces == 1) return {0, p.win[2], 0, p.in[2]};
  const int64_t x0 = i * l.cols;
  const int64_t x1 = std::min(x0 + l.cols, p.win[2]);
  const int64_t q0 = x0 * p.rhs_dilation[2] - p.pad[2];
  const int64_t q1 = (p.out[2] - 1) * p.stride[2] + (x1 - 1) * p.rhs_dilation[2] - p.pad[2] + 1;
  return {x0, x1, std::clamp<int64_t>(q0, 0, p.in[2]), std::clamp<int64_t>(q1, 0, p.in[2])};
}

// Rows [first, last) of the window, a piece of them, features k0 .. k0 + features:
// dst[row][x][feature], features beyond zero.
void pack_rows(const Problem& p, const Layout& l, const Kernels& k, ConstPtr w, int64_t first,
               int64_t last, const Piece& piece, int64_t features, Ptr dst) {
  const int64_t cols = piece.x1 - piece.x0;
  if (features < l.panel) {
    dst.zero((last - first) * cols * l.panel);
  }
  for (int64_t row = first; row < last; ++row, dst += cols * l.panel) {
    const int64_t y = row % p.win[1];
    const int64_t z = row / p.win[1] % p.win[0];
    const int64_t c = row / p.win[1] / p.win[0];
    ConstPtr from = w + c * p.w.c + z * p.w.sp[0] + y * p.w.sp[1] + piece.x0 * p.w.sp[2];
    if (p.w.k == 1 || p.w.sp[2] == 1) {
      k.copy(dst, l.panel, from, p.w.sp[2], p.w.k, cols, features);
      continue;
    }
    for (int64_t x = 0; x < cols; ++x) {
      k.copy(dst + x * l.panel, 0, from + x * p.w.sp[2], 0, p.w.k, 1, features);
    }
  }
}

// The slot of input row iy of c, in a chunk that begins with window row `first`.
int64_t tile_slot(const Problem& p, const Layout& l, int64_t first, int64_t c, int64_t iy) {
  const int64_t c0 = first / p.win[1];
  return (c - c0) * l.c_slots + iy - rows_under(p, c == c0 ? first % p.win[1] : 0, p.win[1]).begin;
}

// The images of one group under a piece of window rows [first, last), for the tiled form.
void pack_tiles(const Problem& p, const Layout& l, const Kernels& k, ConstPtr x, int64_t first,
                int64_t last, const Piece& piece, Ptr dst) {
  for (int64_t row = first; row < last;) {
    const int64_t c = row / p.win[1];
    const int64_t end = std::min(last, (c + 1) * p.win[1]);
    const InputRows in = rows_under(p, row - c * p.win[1], end - c * p.win[1]);
    for (int64_t iy = in.begin; iy < in.end; ++iy) {
      const int64_t slot = tile_slot(p, l, first, c, iy);
      for (int64_t t = 0; t < l.row_tiles; ++t) {
        const int64_t i0 = l.rows * t / l.row_tiles;
        const int64_t i1 = l.rows * (t + 1) / l.row_tiles;
        k.copy(dst + (t * l.slots + slot) * l.tile_cols * l.tile_rows, l.tile_rows,
               x + c * p.x.c + iy * p.x.sp[1] + piece.q0 * p.x.sp[2] + i0, p.x.sp[2], 1,
               piece.q1 - piece.q0, i1 - i0);
      }
    }
    row = end;
  }
}

// Output positions that are walked one by one, and what of the input each reads.
struct Position {
  Dim3 at;
  std::array<Progression, 3> in;
};
std::vector<Position> make_positions(const Problem& p, const Layout& l) {
  std::vector<Position> positions;
  for (int64_t z = 0; z < l.positions[0]; ++z) {
    for (int64_t y = 0; y < l.positions[1]; ++y) {
      for (int64_t x = 0; x < l.positions[2]; ++x) {
        positions.push_back(
            {{z, y, x},
             {window_positions(p, 0, z), window_positions(p, 1, y), window_positions(p, 2, x)}});
      }
    }
  }
  return positions;
}

// Which rows of which position and panel of features a tile is. Panels that are packed are walked
// for all positions before the next.
struct TileAt {
  int64_t g, position, panel, t;
};
TileAt tile_at(const Layout& l, int64_t positions, int64_t tile) {
  const int64_t g = tile / l.row_tiles / positions / l.panels;
  const int64_t within = tile / l.row_tiles % (positions * l.panels);
  return {g, l.pack ? within % positions : within / l.panels,
          l.pack ? within / positions : within % l.panels, tile % l.row_tiles};
}
void advance(const Layout& l, int64_t positions, TileAt* at) {
  if (++at->t < l.row_tiles) return;
  at->t = 0;
  int64_t& inner = l.pack ? at->position : at->panel;
  int64_t& outer = l.pack ? at->panel : at->position;
  if (++inner < (l.pack ? positions : l.panels)) return;
  inner = 0;
  if (++outer < (l.pack ? l.panels : positions)) return;
  outer = 0;
  ++at->g;
}

void make_runs(const Problem& p, const Layout& l, const Filter& w, std::array<Progression, 3> in,
               int64_t chunk, const Piece& piece, std::vector<Run>* runs, int64_t* a_step,
               int64_t* b_step) {
  runs->clear();
  if (in[2].n == 0 || in[1].n == 0 || in[0].n == 0) return;
  if (l.pieces > 1) {
    Progression& x = in[2];
    const int64_t begin = std::max<int64_t>(0, ceil_div(piece.x0 - x.first, x.step));
    const int64_t end = std::min(x.n, ceil_div(piece.x1 - x.first, x.step));
    if (end <= begin) return;
    x = {x.first + begin * x.step, x.step, end - begin, x.at + begin * x.at_step, x.at_step};
  }
  if (l.chunked) {  // (c, z, y) rows of this chunk, along x
    *a_step = in[2].at_step * (l.tiled ? l.tile_rows : p.x.sp[2]);
    *b_step = in[2].step * (l.pack ? l.panel : w.sp[2]);
    const int64_t first = chunk * l.chunk_rows;
    const int64_t last = std::min(first + l.chunk_rows, l.window_rows);
    // Rows of what was the window before an exchange are rows of the input now.
    const Dim3& extent = l.swap ? p.in : p.win;
    const auto number = [&](int dim, int64_t at) {  // of a row among those at hand, or -1
      const int64_t from = at - (l.swap ? in[dim].at : in[dim].first);
      const int64_t step = l.swap ? in[dim].at_step : in[dim].step;
      const int64_t t = from / step;
      return from >= 0 && from % step == 0 && t < in[dim].n ? t : -1;
    };
    for (int64_t row = first; row < last; ++row) {
      const int64_t ty = number(1, row % extent[1]);
      const int64_t tz = number(0, row / extent[1] % extent[0]);
      const int64_t c = row / extent[1] / extent[0];
      if (ty < 0 || tz < 0) continue;
      const int64_t y = in[1].first + ty * in[1].step;
      const int64_t z = in[0].first + tz * in[0].step;
      const int64_t iy = in[1].at + ty * in[1].at_step;
      const int64_t iz = in[0].at + tz * in[0].at_step;
      const Run run{
          l.tiled
              ? (tile_slot(p, l, first, c, iy) * l.tile_cols + in[2].at - piece.q0) * l.tile_rows
              : c * p.x.c + iz * p.x.sp[0] + iy * p.x.sp[1] + in[2].at * p.x.sp[2],
          l.pack ? ((row - first) * (piece.x1 - piece.x0) + in[2].first - piece.x0) * l.panel
                 : c * w.c + z * w.sp[0] + y * w.sp[1] + in[2].first * w.sp[2],
          in[2].n};
      if (!runs->empty()) {  // rows that follow without a gap are one run
        Run& before = runs->back();
        if (before.a + before.len * *a_step == run.a && before.b + before.len * *b_step == run.b) {
          before.len += run.len;
          continue;
        }
      }
      runs->push_back(run);
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

double cost(const Problem& problem, const Target& t, const Params& params) {
  if (params[kGradCopy] != 0) {
    return static_cast<double>(channels_last_floats(problem)) +
           cost(channels_last(problem), t, without_copy(params));
  }
  const Problem p = thinned(problem);
  const Layout l = make_layout(p, t, params);
  const double mr = static_cast<double>(l.mr);
  const double nv = static_cast<double>(l.nv);
  const double tiles = static_cast<double>(p.g * l.positions[0] * l.positions[1] * l.positions[2] *
                                           ceil_div(l.rows, l.mr) * l.panels);
  const double step = tile_step_cycles(*t.kernels, l.mr, l.nv, kFarCycles);
  const double reduction =
      static_cast<double>(p.reduction()) * real_share(p, 0) * real_share(p, 1) * real_share(p, 2);
  double total = tiles * (reduction * step * 1.15 + mr * nv);
  // Each output position reads its part of the filters anew.
  const int64_t step_bytes = p.g * p.k * t.kernels->size;
  if (!l.chunked) {
    total += refetch_cycles(p.reduction() * step_bytes,
                            static_cast<double>(p.pixels() * step_bytes) * reduction);
  }
  // Images next to each other, channels pages apart: measured.
  if (!l.chunked && p.x.n == 1 && p.x.c != 1 && p.c > 1) total *= 1.7;
  if (l.chunked && images_innermost(p)) total *= 2;
  // Every group reads a part of the same lines, from beyond the second-level cache: measured.
  constexpr int64_t kLine = 64;
  const int64_t images = p.c * p.in[0] * p.in[1] * p.in[2] * p.g * p.n;
  if (p.g > 1 && p.x.n == 1 && p.n * t.kernels->size <= kLine &&
      images * t.kernels->size > caches().l2) {
    total += 3 * static_cast<double>(images);
  }
  if (l.copy_w) total += static_cast<double>(l.w_floats);
  return total + static_cast<double>(l.x_floats);
}

std::string rejects(const Problem&) { return {}; }

std::string check(const Problem& problem, const Target& t, const Params& params) {
  if (params[kGradCopy] != 0) {
    if (params[kGradCopy] != 1) return "copy: 0 or 1";
    return check(channels_last(problem), t, without_copy(params));
  }
  const Problem p = thinned(problem);
  const int64_t nv = params[kGradNv];
  if (nv < 1 || nv > kMaxNv || t.kernels->max_mr[nv] == 0) return "nv: no such tile";
  if (params[kGradMr] < 1 || params[kGradMr] > t.kernels->max_mr[nv]) return "mr: no such tile";
  if (params[kGradPack] != 0 && params[kGradPack] != 1) return "pack: 0 or 1";
  if (params[kGradPack] == 1 && p.chunk_rows == 0) return "pack: the reduction is not chunked";
  if (params[kGradStream] != 0 && params[kGradStream] != 1) return "stream: 0 or 1";
  if (params[kGradTile] != 0 && params[kGradTile] != 1) return "tile: 0 or 1";
  if (params[kGradTile] == 1 && (!can_tile(p) || make_layout(p, t, params).merged)) {
    return "tile: needs two dimensions, and images next to each other";
  }
  if (params[kGradCols] < 0) return "cols: negative";
  if (params[kGradCols] > 0 && params[kGradCols] < factors(p, params).win[2] &&
      (p.chunk_rows == 0 || make_layout(p, t, params).chunk_rows > 1)) {
    return "cols: a chunk of the reduction is more than a row";
  }
  if (params[kGradSwap] != 0 && params[kGradSwap] != 1) return "swap: 0 or 1";
  if (params[kGradSwap] == 1 && p.x.n != 1) return "swap: needs images next to each other";
  if (params[kGradMargins] != 0 && params[kGradMargins] != 1) return "margins: 0 or 1";
  if (params[kGradMargins] == 1 && !make_layout(p, t, params).merged) {
    return "margins: no tile of several output columns";
  }
  if (params[kGradSwap] == 1 && (params[kGradPack] != 0 || params[kGradTile] != 0) &&
      (!is_product(p) || p.w.k != 1)) {
    return "swap: with pack or tile needs a product of two matrices with contiguous rows";
  }
  return {};
}

// Each step is at another pixel of A, and runs are short: narrow tiles lose by it (measured).
Tile tile_of(const Kernels& k, int64_t rows, int64_t columns) {
  return best_tile(k, std::max<int64_t>(rows, 1), columns, kMaxMr, kFarCycles);
}

Params with_tile(const Tile& tile, const Params& params) {
  Params own = params;
  own[kGradMr] = tile.mr;
  own[kGradNv] = tile.nv;
  return own;
}

Params with_best_tile(const Problem& p, const Target& t, const Params& params) {
  const Problem q = factors(p, params);
  const Params own = with_tile(tile_of(*t.kernels, q.n, q.k), params);
  const Layout l = make_layout(p, t, own);
  if (!l.merged) return own;
  const Params merged = with_tile(tile_of(*t.kernels, l.rows, q.k), params);
  return make_layout(p, t, merged).merged ? merged : own;
}

Params defaults(const Problem& problem, const Target& t) {
  Params params{};
  if (problem.chunk_rows > 0 && images_innermost(problem)) {
    params = defaults(channels_last(problem), t);
    params[kGradCopy] = 1;
    return params;
  }
  const Problem p = thinned(problem);
  params = with_best_tile(p, t, params);
  const Layout l = make_layout(p, t, params);
  // Features far apart cost more in the memory's address translation than packing does, where a
  // panel is used several times.
  const int64_t positions = p.out[0] * p.out[1] * p.out[2];
  const int64_t tiles = positions * ceil_div(std::max<int64_t>(p.n, 1), params[kGradMr]);
  const bool apart = p.w.k != 1 || p.w.sp[2] >= 2 * params[kGradNv] * t.kernels->width;
  params[kGradPack] = l.chunked && apart && tiles >= 4 ? 1 : 0;
  // Each packed image is used for every output position and panel.
  params[kGradTile] = can_tile(p) && !make_layout(p, t, params).merged &&
                              positions * l.panels >= 4 * useful_threads(p, t.threads)
                          ? 1
                          : 0;
  // A row that the second-level cache does not hold, for every output position anew.
  const int64_t step_bytes = (p.n + p.k) * t.kernels->size;
  if (l.chunked && l.chunk_rows == 1 && positions > 1 && p.win[2] * step_bytes > caches().l2 / 2) {
    const int64_t halo = 4 * (p.out[2] - 1) * p.stride[2];
    const int64_t fit = std::max<int64_t>(256, caches().l2 / 4 / step_bytes);
    params[kGradCols] = std::min(std::max(fit, halo), p.win[2]);
  }
  // Rows of results lie apart: a store that first reads its line waits for it. And no other layer's
  // gradient reads them.
  const int64_t bytes = p.g * p.n * p.k * p.pixels() * t.kernels->size;
  params[kGradStream] = 2 * bytes >= caches().l2 ? 1 : 0;
  // Rows are packed a tile at a time, a few words each, columns by whole vectors: the rows had
  // better be the fewer ones, where what that saves for every pixel outweighs turning the result.
  if (p.chunk_rows > 0 && is_product(p) && p.x.n == 1 && p.w.k == 1 && p.n > p.k &&
      p.reduction() * (p.n - p.k) >= 2 * p.n * p.k) {
    Params other{};
    other[kGradSwap] = other[kGradPack] = other[kGradTile] = 1;
    other = with_best_tile(p, t, other);
    other[kGradCols] = params[kGradCols];
    if (check(problem, t, other).empty() &&
        make_layout(p, t, other).panels >= 4 * useful_threads(p, t.threads)) {
      return other;
    }
  }
  // Half empty vectors of features against full ones of images; low tiles against margins.
  const Params plain = params;
  const bool few = p.x.n == 1 && 2 * p.k <= t.kernels->width && p.n >= 2 * p.k;
  for (const int64_t swap : {0, 1}) {
    for (const int64_t margins : {0, 1}) {
      if (swap + margins == 0 || (swap == 1 && !few) || (margins == 1 && !l.chunked)) continue;
      Params other = swap == 1 ? Params{} : plain;
      other[kGradSwap] = swap;
      other[kGradMargins] = margins;
      other[kGradTile] = 0;
      other[kGradCols] = plain[kGradCols];
      other = with_best_tile(p, t, other);
      if (check(problem, t, other).empty() && cost(p, t, other) < cost(p, t, params)) {
        params = other;
      }
    }
  }
  return params;
}

int64_t workspace(const Problem& problem, const Target& t, const Params& params) {
  if (params[kGradCopy] != 0) {
    return channels_last_floats(problem) +
           workspace(channels_last(problem), t, without_copy(params));
  }
  const Problem p = thinned(problem);
  const Layout l = make_layout(p, t, params);
  const int64_t own =
      l.shared_floats() + (l.pack_floats + l.tile_floats) * useful_threads(p, t.threads);
  // See margins_spoil.
  return l.margins ? std::max(own, workspace(problem, t, without_margins(params))) : own;
}

// Where a row of an operand lies, counted in the order [g][c][z][y].
template <typename Strides>
int64_t row_offset(const Strides& strides, const Dim3& extent, int64_t channels, int64_t row) {
  const int64_t y = row % extent[1];
  const int64_t z = row / extent[1] % extent[0];
  const int64_t c = row / extent[1] / extent[0] % channels;
  const int64_t g = row / extent[1] / extent[0] / channels;
  return g * strides.g + c * strides.c + z * strides.sp[0] + y * strides.sp[1];
}

// After an exchange, the zeros of margins meet elements of the input for which the convolution has
// no product. Whether that changes a sum. p: before margins.
bool margins_spoil(const Problem& p, const Kernels& k, ConstPtr w) {
  const int64_t last = (p.out[2] - 1) * p.stride[2];
  const int64_t begin = inside(0, p.win[2], p.rhs_dilation[2], -p.pad[2], p.in[2]).begin;
  const int64_t end = inside(0, p.win[2], p.rhs_dilation[2], last - p.pad[2], p.in[2]).end;
  for (int64_t row = 0; row < p.g * p.c * p.win[0] * p.win[1]; ++row) {
    const ConstPtr at = w + row_offset(p.w, p.win, p.c, row);
    for (int64_t x = 0; x < p.win[2]; ++x) {
      if (x == begin) x = std::max(begin, end);
      if (x < p.win[2] && k.all_finite(at + x * p.w.sp[2], p.k) == 0) return true;
    }
  }
  return false;
}

void copy_with_margins(const Problem& p, const Problem& to, const Kernels& k, const Threads& pool,
                       ConstPtr x, Ptr copy) {
  const int64_t left = p.pad[2] - to.pad[2];
  pool.run(p.g * p.c * p.in[0] * p.in[1], [&](int64_t row, int64_t) {
    const Ptr begin = copy + row * to.x.sp[1];
    const int64_t real = p.in[2] * p.n;
    begin.zero(left * p.n);
    const ConstPtr from = x + row_offset(p.x, p.in, p.c, row);
    if (p.x.n == 1 && p.x.sp[2] == p.n) {
      k.copy(begin + left * p.n, 0, from, 0, 1, 1, real);
    } else {
      k.copy(begin + left * p.n, p.n, from, p.x.sp[2], p.x.n, p.in[2], p.n);
    }
    (begin + left * p.n + real).zero(to.x.sp[1] - left * p.n - real);
  });
}

void run(const Problem& problem, const Params& params, const Operands& o, const Execution& e) {
  if (params[kGradCopy] != 0) {
    const Threads pool = useful_pool(problem, e);
    const Operands copies = copy_channels_last(problem, o, *e.target.kernels, pool, e.workspace);
    Execution rest = e;
    rest.workspace += channels_last_floats(problem);
    run(channels_last(problem), without_copy(params), copies, rest);
    return;
  }
  int64_t x_first = 0;
  const Problem p = thinned(problem, &x_first);
  const Layout l = make_layout(p, e.target, params);
  const Kernels& k = *e.target.kernels;
  const Threads pool = useful_pool(p, e);

  // What the tiles' rows and columns come from.
  const Problem q = factors(p, params);
  ConstPtr x = l.swap ? o.w : o.x + x_first;
  const ConstPtr w_in_place = l.swap ? o.x + x_first : o.w;
  if (l.margins) {
    const Problem plain = factors(p, without_margins(params));
    if (l.swap && margins_spoil(plain, k, w_in_place)) {
      run(problem, without_margins(params), o, e);
      return;
    }
    const Ptr copy = e.workspace + l.w_floats + l.y_floats + l.sum_floats;
    copy_with_margins(plain, q, k, pool, x, copy);
    x = copy;
  }
  Filter w{w_in_place, q.w.g, q.w.c, q.w.sp};
  if (l.copy_w) {  // [g][c][z][y][x][k]
    Ptr packed = e.workspace;
    const int64_t window = p.window();
    pool.run(p.g * p.c * p.win[0] * p.win[1], [&](int64_t task, int64_t) {
      const ConstPtr from = o.w + row_offset(p.w, p.win, p.c, task);
      k.copy(packed + task * p.win[2] * p.k, p.k, from, p.w.sp[2], p.w.k, p.win[2], p.k);
    });
    w = {
        packed, p.c * window * p.k, window * p.k, {p.win[1] * p.win[2] * p.k, p.win[2] * p.k, p.k}};
  }
  const auto thread_memory = [&](int64_t worker) {
    return e.workspace + l.shared_floats() + worker * (l.pack_floats + l.tile_floats);
  };
  // y seen with contiguous columns: y itself or a buffer [g][z][y][x][row][column].
  Ptr y = o.y;
  int64_t y_g = p.y.g, y_n = p.y.n;
  Dim3 y_sp = p.y.sp;
  if (l.buffered) {
    y = e.workspace + l.w_floats;
    y_n = l.columns;
    y_sp = {p.out[1] * p.out[2] * p.n * p.k, p.out[2] * p.n * p.k, p.n * p.k};
    y_g = p.pixels() * p.n * p.k;
  }

  const Ptr sums = e.workspace + l.w_floats + l.y_floats;
  const bool stream = params[kGradStream] != 0 && l.chunks == 1 && l.pieces == 1 && !l.buffered &&
                      !o.has_epilogue() && streamable(p, k, o.y) && y_n % k.width == 0;

  // Tiles in the order (group, output position, features, rows), or (group, features, output
  // position, rows) where features are packed; each task owns a contiguous part and walks it once
  // per chunk, so that a chunk's rows are used while they are in the cache.
  const int64_t row_tiles = l.row_tiles;
  const std::vector<Position> positions = make_positions(q, l);
  const auto n_positions = static_cast<int64_t>(positions.size());
  const int64_t total = p.g * n_positions * l.panels * row_tiles;
  const int64_t tasks = std::min(total, pool.count());
  pool.run(tasks, [&](int64_t task, int64_t worker) {
    Ptr packed = thread_memory(worker);
    Ptr tiles = packed + l.pack_floats;
    const int64_t begin = total * task / tasks;
    const int64_t end = total * (task + 1) / tasks;
    std::vector<Run> runs;
    GemmArgs args{};
    for (int64_t chunk = 0; chunk < l.chunks; ++chunk) {
      const int64_t first = chunk * l.chunk_rows;
      const int64_t last = std::min(first + l.chunk_rows, l.window_rows);
      for (int64_t i = 0; i < l.pieces; ++i) {
        const Piece piece = make_piece(q, l, i);
        int64_t at_position = -1;
        int64_t at_panel = -1;
        int64_t at_group = -1;
        TileAt next = tile_at(l, n_positions, begin);
        for (int64_t tile = begin; tile < end; ++tile, advance(l, n_positions, &next)) {
          const auto [g, u, panel, t] = next;
          const Dim3& at = positions[u].at;
          const int64_t columns = std::min(l.panel, l.columns - panel * l.panel);
          if (l.tiled && g != at_group) {
            at_group = g;
            pack_tiles(q, l, k, x + g * q.x.g, first, last, piece, tiles);
          }
          if (l.pack && g * l.panels + panel != at_panel) {
            at_panel = g * l.panels + panel;
            pack_rows(q, l, k, w_in_place + g * q.w.g + panel * l.panel * q.w.k, first, last, piece,
                      columns, packed);
          }
          if (u != at_position) {
            at_position = u;
            make_runs(q, l, w, positions[u].in, chunk, piece, &runs, &args.a_step, &args.b_step);
          }
          const int64_t i0 = l.rows * t / row_tiles;
          const int64_t mr = l.rows * (t + 1) / row_tiles - i0;
          args.a = l.tiled ? tiles + t * l.slots * l.tile_cols * l.tile_rows
                           : x + g * q.x.g + i0 * q.x.n;
          args.a_row = q.x.n;
          args.b = l.pack ? packed : w.data + g * w.g + panel * l.panel;
          args.runs = runs.data();
          args.n_runs = static_cast<int64_t>(runs.size());
          args.c = y + g * y_g + at[0] * y_sp[0] + at[1] * y_sp[1] + at[2] * y_sp[2] + i0 * y_n +
                   panel * l.panel;
          args.c_row = y_n;
          args.cols = columns;
          args.add = chunk > 0 && l.pieces == 1 ? 1 : 0;
          args.load = i > 0 ? 1 : 0;
          const Ptr result{static_cast<char*>(args.c), k.size};
          const Ptr sum =
              sums + ((g * p.pixels() + (at[0] * p.out[1] + at[1]) * p.out[2] + at[2]) * p.n * p.k +
                      i0 * l.columns + panel * l.panel);
          const bool apart = l.pieces > 1 && chunk > 0;
          if (apart) {
            args.c = sum;
            args.c_row = l.columns;
          }
          args.stream = stream && columns % k.width == 0 ? 1 : 0;
          k.strided[ceil_div(columns, k.width)][mr](&args);
          for (int64_t r = 0; apart && i + 1 == l.pieces && r < mr; ++r) {
            k.accumulate(result + r * y_n, sum + r * l.columns, columns);
          }
        }
      }
    }
    if (stream) publish_streams();
  });

  if (l.buffered || o.has_epilogue()) {
    Problem rows = p;  // finish_rows walks output pixels: here images take that place
    rows.y.sp[2] = p.y.n;
    pool.run(p.g * p.pixels(), [&](int64_t task, int64_t worker) {
      const int64_t u = task % p.pixels();
      const int64_t g = task / p.pixels();
      const Dim3 at{u / p.out[2] / p.out[1], u / p.out[2] % p.out[1], u % p.out[2]};
      const Dim3 of = l.swap ? from_other_end(p, at) : at;
      const int64_t from = g * y_g + of[0] * y_sp[0] + of[1] * y_sp[1] + of[2] * y_sp[2];
      const int64_t to = g * p.y.g + at[0] * p.y.sp[0] + at[1] * p.y.sp[1] + at[2] * p.y.sp[2];
      if (!l.swap) {
        finish_rows(rows, k, o, y + from, y_n, p.n, p.k, g, 0, to);
        return;
      }
      const Ptr turned = thread_memory(worker);
      k.copy(turned, p.k, y + from, 1, p.n, p.n, p.k);
      finish_rows(rows, k, o, turned, p.k, p.n, p.k, g, 0, to);
    });
  }
  add_skipped_nonfinite(problem, o, e);
}

}  // namespace

const Algorithm& algorithm_weight_grad() {
  static const Algorithm a = [] {
    Algorithm row{
        "weight_grad",
        "rows are images: outer products of input rows and gradient rows, no transform",
        "canonical order of the reduction: numerical contract, chunked sums",
        {kF32, kF64},
        {{"mr", "rows (images) of the register tile", {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16}},
         {"nv", "vectors of features of the register tile", {1, 2, 3, 4}},
         {"pack", "1: a chunk's features are packed panel by panel; 0: read in place", {0, 1}},
         {"swap", "1: rows of the tile are features, columns images", {0, 1}},
         {"tile", "1: a chunk's images are packed tile by tile; 0: read in place", {0, 1}},
         {"stream", "1: results that are stored once pass the caches by", {0, 1}},
         {"copy", "1: both operands are first copied, channels and features innermost", {0, 1}},
         {"cols", "window positions at a time, where a row is a chunk; 0: all", {0, 1024, 4096}},
         {"margins",
          "1: few images are copied between zeros, and tiles have several output columns; 0: no",
          {0, 1}}},
        rejects,
        defaults,
        check,
        workspace,
        run,
        cost};
    row.knows_images = true;
    return row;
  }();
  return a;
}

}  // namespace jaxwin
