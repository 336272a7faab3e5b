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
// The reduction follows Problem::chunk_rows: either the canonical chain or chunks of whole rows. A
// row that is a chunk for itself, as in wide one-dimensional layers, is walked in pieces that stay
// in the second-level cache for all output positions; the sums go on from piece to piece. That is
// the weight gradient by batch-reduced products of arXiv 2104.08002, with the chain kept.

#include <algorithm>
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
  kGradCols
};

Params without_copy(const Params& params) {
  Params rest = params;
  rest[kGradCopy] = 0;
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

// The two factors of a product in each other's place; the sums are the same.
Problem exchanged(const Problem& p) {
  Problem q = p;
  q.n = p.k;
  q.k = p.n;
  q.x = {p.w.k, p.w.g, p.w.c, p.w.sp};
  q.w = {p.x.g, p.x.n, p.x.c, p.x.sp};
  return q;
}

struct Layout {
  int64_t mr, nv, panel, panels;
  bool swap;      // rows are features, columns images
  bool exchange;  // by exchanging the operands
  int64_t columns;
  bool chunked;
  int64_t window_rows;  // c * z * y rows of the window, if chunked
  int64_t chunk_rows, chunks;
  bool merged;     // rows run over (u_x, n): Kw * C neighbours
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
  int64_t w_floats, y_floats;
  int64_t pack_floats;  // per thread: packed features, or results to be turned
  int64_t tile_floats;  // per thread
  // A chunk of one row, so many window positions at a time.
  int64_t cols, pieces;
  int64_t tile_cols;   // input columns of a piece
  int64_t sum_floats;  // shared: sums of a chunk whose pieces are not all done
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

Layout make_layout(const Problem& p, const Target& t, const Params& params) {
  Layout l{};
  l.mr = params[kGradMr];
  l.nv = params[kGradNv];
  l.panel = l.nv * t.kernels->width;
  l.swap = params[kGradSwap] != 0;
  l.exchange = l.swap && is_product(p);
  l.columns = l.swap ? p.n : p.k;
  l.panels = ceil_div(l.columns, l.panel);
  l.chunked = p.chunk_rows > 0;
  l.window_rows = p.c * p.win[0] * p.win[1];
  l.chunk_rows = l.chunked ? std::min(p.chunk_rows, l.window_rows) : l.window_rows;
  l.chunks = l.chunked ? ceil_div(l.window_rows, l.chunk_rows) : 1;
  const int64_t span = (p.win[2] - 1) * p.rhs_dilation[2] + (p.out[2] - 1) * p.stride[2] + 1;
  const bool inside = p.pad[2] <= 0 && span - p.pad[2] <= p.in[2] && p.lhs_dilation[2] == 1;
  l.buffered = l.swap || p.y.k != 1;
  l.merged = !l.swap && inside && p.n < 2 * l.mr && p.out[2] > 1 &&
             p.stride[2] * p.x.sp[2] == p.n * p.x.n && (l.buffered || p.y.sp[2] == p.n * p.y.n);
  l.rows = l.swap ? p.k : l.merged ? p.n * p.out[2] : p.n;
  l.positions = p.out;
  if (l.merged) l.positions[2] = 1;
  l.pack = params[kGradPack] != 0;
  l.copy_w = !l.pack && !l.swap && p.w.k != 1;
  l.cols = params[kGradCols] == 0 ? p.win[2] : std::min(params[kGradCols], p.win[2]);
  l.pieces = ceil_div(p.win[2], l.cols);
  l.tile_cols = p.in[2];
  if (l.pieces > 1) {
    l.tile_cols =
        std::min(p.in[2], (p.out[2] - 1) * p.stride[2] + (l.cols - 1) * p.rhs_dilation[2] + 1);
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

void make_runs(const Problem& p, const Layout& l, const Filter& w, const Dim3& at, int64_t chunk,
               const Piece& piece, std::vector<Run>* runs, int64_t* a_step, int64_t* b_step) {
  runs->clear();
  Progression in[3];
  for (int d = 0; d < 3; ++d) in[d] = window_positions(p, d, at[d]);
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
  if (l.copy_w) total += static_cast<double>(l.w_floats);
  return total;
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
  if (params[kGradCols] > 0 && params[kGradCols] < p.win[2] &&
      (p.chunk_rows == 0 || make_layout(p, t, params).chunk_rows > 1)) {
    return "cols: a chunk of the reduction is more than a row";
  }
  if (params[kGradSwap] != 0 && params[kGradSwap] != 1) return "swap: 0 or 1";
  if (params[kGradSwap] == 1 && p.x.n != 1) return "swap: needs images next to each other";
  if (params[kGradSwap] == 1 && (params[kGradPack] != 0 || params[kGradTile] != 0) &&
      (!is_product(p) || p.w.k != 1)) {
    return "swap: with pack or tile needs a product of two matrices with contiguous rows";
  }
  return {};
}

// Each step is at another pixel of A, and runs are short: narrow tiles lose by it (measured).
Tile tile_of(const Kernels& k, int64_t rows, int64_t columns) {
  return best_tile(k, rows, columns, kMaxMr, kFarCycles);
}

Params defaults(const Problem& problem, const Target& t) {
  Params params{};
  if (problem.chunk_rows > 0 && images_innermost(problem)) {
    params = defaults(channels_last(problem), t);
    params[kGradCopy] = 1;
    return params;
  }
  const Problem p = thinned(problem);
  const Tile tile = tile_of(*t.kernels, std::max<int64_t>(p.n, 1), p.k);
  params[kGradMr] = tile.mr;
  params[kGradNv] = tile.nv;
  const Layout l = make_layout(p, t, params);
  if (l.merged) {
    const Tile merged = tile_of(*t.kernels, l.rows, p.k);
    params[kGradMr] = merged.mr;
    params[kGradNv] = merged.nv;
    if (!make_layout(p, t, params).merged) {
      params[kGradMr] = tile.mr;
      params[kGradNv] = tile.nv;
    }
  }
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
    const Tile swapped = tile_of(*t.kernels, p.k, p.n);
    other[kGradMr] = swapped.mr;
    other[kGradNv] = swapped.nv;
    other[kGradSwap] = other[kGradPack] = other[kGradTile] = 1;
    other[kGradCols] = params[kGradCols];
    if (check(problem, t, other).empty() &&
        make_layout(p, t, other).panels >= 4 * useful_threads(p, t.threads)) {
      return other;
    }
  }
  // Half empty vectors of features against full ones of images.
  const int64_t width = t.kernels->width;
  if (p.x.n == 1 && 2 * p.k <= width && p.n >= 2 * p.k) {
    const Tile swapped = tile_of(*t.kernels, p.k, p.n);
    Params other{};
    other[kGradMr] = swapped.mr;
    other[kGradNv] = swapped.nv;
    other[kGradSwap] = 1;
    other[kGradCols] = params[kGradCols];
    if (cost(p, t, other) < cost(p, t, params)) return other;
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
  return l.w_floats + l.y_floats + l.sum_floats +
         (l.pack_floats + l.tile_floats) * useful_threads(p, t.threads);
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
  const Problem q = l.exchange ? exchanged(p) : p;
  const ConstPtr x = l.exchange ? o.w : o.x + x_first;
  const ConstPtr w_in_place = l.exchange ? o.x + x_first : o.w;
  const bool swap = l.swap && !l.exchange;
  Filter w{w_in_place, q.w.g, q.w.c, q.w.sp};
  if (l.copy_w) {  // [g][c][z][y][x][k]
    Ptr packed = e.workspace;
    const int64_t window = p.window();
    pool.run(p.g * p.c * p.win[0] * p.win[1], [&](int64_t task, int64_t) {
      const int64_t y = task % p.win[1];
      const int64_t z = task / p.win[1] % p.win[0];
      const int64_t c = task / p.win[1] / p.win[0] % p.c;
      const int64_t g = task / p.win[1] / p.win[0] / p.c;
      ConstPtr from = o.w + g * p.w.g + c * p.w.c + z * p.w.sp[0] + y * p.w.sp[1];
      k.copy(packed + task * p.win[2] * p.k, p.k, from, p.w.sp[2], p.w.k, p.win[2], p.k);
    });
    w = {
        packed, p.c * window * p.k, window * p.k, {p.win[1] * p.win[2] * p.k, p.win[2] * p.k, p.k}};
  }
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
  const int64_t positions = l.positions[0] * l.positions[1] * l.positions[2];
  const int64_t total = p.g * positions * l.panels * row_tiles;
  const int64_t tasks = std::min(total, pool.count());
  pool.run(tasks, [&](int64_t task, int64_t worker) {
    Ptr packed = e.workspace + l.w_floats + l.y_floats + l.sum_floats +
                 worker * (l.pack_floats + l.tile_floats);
    Ptr tiles = packed + l.pack_floats;
    const int64_t begin = total * task / tasks;
    const int64_t end = total * (task + 1) / tasks;
    std::vector<Run> runs;
    GemmArgs args{};
    for (int64_t chunk = 0; chunk < l.chunks; ++chunk) {
      const int64_t first = chunk * l.chunk_rows;
      const int64_t last = std::min(first + l.chunk_rows, l.window_rows);
      for (int64_t i = 0; i < l.pieces; ++i) {
        const Piece piece = make_piece(p, l, i);
        int64_t at_position = -1;
        int64_t at_panel = -1;
        int64_t at_group = -1;
        Dim3 at{};
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t t = tile % row_tiles;
          const int64_t g = tile / row_tiles / positions / l.panels;
          const int64_t within = tile / row_tiles % (positions * l.panels);
          const int64_t u = l.pack ? within % positions : within / l.panels;
          const int64_t panel = l.pack ? within / positions : within % l.panels;
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
          if (g * positions + u != at_position) {
            at_position = g * positions + u;
            at = {u / l.positions[2] / l.positions[1], u / l.positions[2] % l.positions[1],
                  u % l.positions[2]};
            make_runs(q, l, w, at, chunk, piece, &runs, &args.a_step, &args.b_step);
            if (swap) {
              std::swap(args.a_step, args.b_step);
              for (Run& run : runs) std::swap(run.a, run.b);
            }
          }
          const int64_t i0 = l.rows * t / row_tiles;
          const int64_t mr = l.rows * (t + 1) / row_tiles - i0;
          args.a = swap      ? o.w + g * p.w.g + i0 * p.w.k
                   : l.tiled ? tiles + t * l.slots * l.tile_cols * l.tile_rows
                             : x + g * q.x.g + i0 * q.x.n;
          args.a_row = swap ? p.w.k : q.x.n;
          args.b = l.pack ? packed
                   : swap ? x + g * p.x.g + panel * l.panel
                          : w.data + g * w.g + panel * l.panel;
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
      const int64_t from = g * y_g + at[0] * y_sp[0] + at[1] * y_sp[1] + at[2] * y_sp[2];
      const int64_t to = g * p.y.g + at[0] * p.y.sp[0] + at[1] * p.y.sp[1] + at[2] * p.y.sp[2];
      if (!l.swap) {
        finish_rows(rows, k, o, y + from, y_n, p.n, p.k, g, 0, to);
        return;
      }
      Ptr turned = e.workspace + l.w_floats + l.y_floats + l.sum_floats +
                   worker * (l.pack_floats + l.tile_floats);
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
         {"cols", "window positions at a time, where a row is a chunk; 0: all", {0, 1024, 4096}}},
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
