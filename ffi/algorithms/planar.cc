// SPDX-License-Identifier: Apache-2.0
//
// Output pixels as lanes: the matrix product of im2win with the operands exchanged. The input rows
// that a block of output rows needs are laid out channel by channel (NCHW data is copied, NHWC data
// transposed, columns in between strides are set apart), so that a window position is a vector load
// of neighbouring pixels; the filter is broadcast. Pays where output features are too few to fill
// vectors: the input gradients of first layers, the last layers of generators. With lhs_dilation
// the outputs of all residues share their loads, as rows of one tile (residues as in the segregated
// algorithm, arXiv 2209.03704), and where all features of all residues lie one after another in the
// result, their rows are joined before they are written. Input rows that are padding are skipped.
//
// Few features leave the arithmetic waiting for loads: then the windows of output rows one below
// the other share what they load of the input rows, as rows of one tile (`stack`).
//
// Rows that are short fill the last of their vectors badly. Where an output row of a residue reads
// one input row more than the one before, the strip can hold the rows of a channel one after
// another
// (`flat`): then the rows of a block, and the few columns between them, are one row of lanes.
//
// Where the images lie next to each other (CHWN, and CHWN8, whose blocks of images are the z of
// this problem), the images of neighbouring pixels are lanes together, so that vectors are full for
// any batch (the CHWN and CHWN8 kernels of arXiv 2408.00278 take vectors of images alone). Without
// strips that is the direct algorithm of these layouts, with them im2win: the rows under a window
// lie in the order of the reduction.

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "algorithms/gemm_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {
namespace {

enum PlanarParam {
  kPlanarMr,
  kPlanarNv,
  kPlanarRows,
  kPlanarCols,
  kPlanarStrip,
  kPlanarFlat,
  kPlanarParams
};

constexpr int64_t kStripBytes = 1 << 20;  // per thread
constexpr int64_t kLine = 16;             // words, as many as a cache line has floats
constexpr int64_t kMaxJoined = 16;        // rows of results
constexpr int64_t kMaxStack = 4;          // output rows that share what they load
constexpr int64_t kLeastStacked = 16;     // channels
constexpr int64_t kLeastAhead = 4096;     // words of input rows that are fetched before their copy

// The outputs of one residue of the last dimension. Pixel j of the lanes is output t = j + shift,
// from columns j * advance + i * dilation - pad, i < win: the same for every residue.
struct Class {
  int64_t residue, out, win, first, step, shift;
};

struct Layout {
  Problem p;       // collapsed, n = 1 where images are lanes
  int64_t images;  // lanes of a pixel
  int64_t mr, nv, rows, cols;
  int64_t width;
  int64_t period;              // residues of the output columns
  std::vector<Class> classes;  // by decreasing `win`: these times p.k are the rows of the product
  int64_t advance, dilation, pad;
  int64_t win;         // window positions of the first class
  int64_t stack;       // output rows that share what they load, see multiply_stack(); or 1
  int64_t taps;        // window rows, and by how many the windows of these output rows differ
  int64_t filter;      // floats of one row of the gathered filter
  int64_t begin, end;  // pixels that the lanes are
  bool in_place;       // the micro-kernel reads the input itself
  bool flat;           // the output rows of a block are lanes together
  int64_t row_period;  // residues of the output rows
  // The results of a band lie in rows of so many floats until they are joined to rows of pixels;
  // 0: each tile is written by itself.
  int64_t joined;
  // Of the strip: input rows, floats of one set of columns, and how far apart these sets, rows,
  // channels and the planes of window z are.
  int64_t in_rows, lane, set, row, channel, plane;
  int64_t row_blocks, col_blocks;
  int64_t w_floats, strip_floats, tile_floats;  // shared; per thread
  int64_t row_floats;  // per thread: a joined row, where its words are not the results

  int64_t pixels() const { return end - begin; }
  int64_t product_rows() const { return static_cast<int64_t>(classes.size()) * p.k; }
  int64_t block_lanes() const { return std::min(cols, pixels()) * images; }
  // Of the longest band.
  int64_t band_lanes() const {
    return flat ? (ceil_div(rows, row_period) - 1) * row + block_lanes() : block_lanes();
  }
};

struct Columns {
  int64_t first, count;
};
Columns columns(const Layout& l, int64_t pixel0, int64_t pixel1) {
  return {pixel0 * l.advance - l.pad,
          (pixel1 - 1 - pixel0) * l.advance + (l.win - 1) * l.dilation + 1};
}

// Where a strip begins in its memory: such that the first real pixel lies on a cache line. Whole
// vectors are written there; what is read begins at any pixel.
int64_t first_pixel(const Layout& l, const Columns& cols) {
  if (l.images > 1 || cols.first >= 0) return 0;
  const int64_t padding = ceil_div(-cols.first, l.advance);
  return round_up(padding, kLine) - padding;
}

// Input rows from the first to the last that `rows` output rows read.
int64_t strip_rows(const Problem& p, int64_t rows) {
  const int64_t more = p.lhs_dilation[1] > 1 ? 2 : 1;
  const int64_t span = (rows - 1) * p.stride[1] + (p.win[1] - 1) * p.rhs_dilation[1];
  return std::min(span / p.lhs_dilation[1] + more, p.in[1]);
}

// An odd number of cache lines, or channels one after another would share few sets.
int64_t odd_lines(int64_t words) {
  const int64_t lines = ceil_div(words, kLine);
  return (lines + (lines % 2 == 0 ? 1 : 0)) * kLine;
}

// Whether output rows of a residue can be lanes together.
bool can_be_flat(const Problem& p, int64_t images) {
  return images == 1 && p.out[1] > 1 && residue(p, 1, 0).stride == 1;
}

// Floats of a row of results that are joined, or 0. All features of all residues of an output row
// must lie one after another in y, and be so few that vectors of features do not pay.
int64_t joined_row(const Layout& l, const Kernels& k, int64_t stack) {
  const Problem& p = l.p;
  const int64_t rows = l.product_rows();
  const bool follow = p.y.sp[2] == p.k && (p.y.k == 1 || p.k == 1) &&
                      static_cast<int64_t>(l.classes.size()) == l.period;
  const bool few =
      (rows > 1 || stack > 1) && p.k < 8 && (rows <= 8 || rows == 12 || rows == kMaxJoined);
  if (l.images > 1 || k.interleave == nullptr || !follow || !few) return 0;
  const int64_t row = odd_lines(l.band_lanes());
  return stack * rows * row * k.size <= caches().l2 / 4 ? row : 0;
}

// As many output rows as a tile of `mr` rows has room for. Those of few features leave the
// arithmetic waiting for loads; of fewer channels, the micro-kernel would be called for a few
// steps.
int64_t stack_of(const Layout& l, const Kernels& k, int64_t mr) {
  const Problem& p = l.p;
  const bool plane = p.in[0] == 1 && p.win[0] == 1 && p.out[0] == 1 && p.pad[0] == 0;
  const bool dense = p.stride[1] == 1 && p.rhs_dilation[1] == 1 && p.lhs_dilation[1] == 1;
  if (!plane || !dense || l.period > 1 || l.flat || p.win[1] == 1 || p.c < kLeastStacked) return 1;
  const int64_t rows = std::clamp<int64_t>(mr / p.k, 1, std::min(kMaxStack, l.rows));
  return joined_row(l, k, rows) > 0 ? rows : 1;
}

Layout make_layout(const Problem& problem, const Target& t, const Params& params) {
  Layout l{};
  l.p = collapse(problem);
  const Problem& p = l.p;
  l.images = 1;
  if (p.n > 1 && p.x.n == 1 && p.y.n == 1) {
    l.images = p.n;
    l.p.n = 1;
  }
  l.width = t.kernels->width;
  l.mr = params[kPlanarMr];
  l.nv = params[kPlanarNv];
  l.period = residue_period(p, 2);
  std::vector<Residue> residues;
  for (int64_t r = 0; r < std::min(l.period, p.out[2]); ++r) residues.push_back(residue(p, 2, r));
  const Residue* reference = nullptr;
  for (const Residue& s : residues) {
    if (s.win > 0 && (reference == nullptr || s.pad > reference->pad)) reference = &s;
  }
  l.advance = residues[0].stride;
  l.dilation = residues[0].dilation;
  l.pad = reference == nullptr ? 0 : reference->pad;
  l.begin = std::numeric_limits<int64_t>::max();
  for (size_t r = 0; r < residues.size(); ++r) {
    const Residue& s = residues[r];
    const int64_t shift = s.win == 0 ? 0 : (s.pad - l.pad) / l.advance;
    l.classes.push_back({static_cast<int64_t>(r), s.out, s.win, s.first, s.step, shift});
    l.begin = std::min(l.begin, -shift);
    l.end = std::max(l.end, s.out - shift);
  }
  std::stable_sort(l.classes.begin(), l.classes.end(),
                   [](const Class& a, const Class& b) { return a.win > b.win; });
  l.win = l.classes[0].win;
  l.rows = params[kPlanarRows] == 0 ? p.out[1] : std::min(params[kPlanarRows], p.out[1]);
  l.cols = params[kPlanarCols] == 0 ? l.pixels()
                                    : std::min(ceil_div(params[kPlanarCols], l.images), l.pixels());
  l.row_blocks = ceil_div(p.out[1], l.rows);
  l.col_blocks = ceil_div(l.pixels(), l.cols);
  const Columns all = columns(l, l.begin, l.end);
  l.flat = params[kPlanarFlat] != 0;
  l.in_place = params[kPlanarStrip] == 0 && !l.flat && p.plain() && p.x.sp[2] == l.images &&
               l.advance == 1 && all.first >= 0 && all.first + all.count <= p.in[2];
  l.row_period = residue_period(p, 1);
  l.stack = stack_of(l, *t.kernels, l.mr);
  l.taps = p.win[1] + l.stack - 1;
  l.filter = l.win * l.taps * p.win[0] * p.c;
  if (!l.in_place) {
    const Columns block = columns(l, 0, l.cols);
    l.in_rows = strip_rows(p, l.flat ? l.rows : l.stack);
    // At least the pixels: a window without real positions reads no columns.
    l.lane = std::max(ceil_div(block.count, l.advance), l.cols) * l.images;
    // Vectors may read past the last column of a set, and what the strip holds may be moved by less
    // than a line, see first_pixel().
    if (l.flat) {
      l.row = l.lane;
      l.set = l.in_rows * l.row + l.width;
      l.channel = odd_lines(l.set * l.advance + kLine);
      l.plane = p.c * l.channel;
    } else {
      l.lane = round_up(l.lane, l.width) + l.width;
      l.set = l.lane;
      l.channel = odd_lines(l.set * l.advance + (l.images == 1 ? kLine : 0));
      l.row = p.c * l.channel;
      l.plane = l.in_rows * l.row;
    }
    l.strip_floats =
        round_up(std::min(p.win[0], p.in[0]) * l.plane + l.nv * l.width + kLine, kLine);
  }
  l.w_floats = round_up(p.g * l.stack * l.product_rows() * l.filter, 16);
  l.joined = joined_row(l, *t.kernels, l.stack);
  l.tile_floats =
      round_up(l.joined > 0 ? l.stack * l.product_rows() * l.joined : l.mr * l.nv * l.width, 16);
  const bool words = is_word(*t.kernels, p.out_dtype);
  l.row_floats = l.joined > 0 && !words ? round_up(l.product_rows() * l.block_lanes(), 16) : 0;
  return l;
}

// The filters as [group][class][feature][window x of the class][window y][window z][channel]; once
// for each output row of a stack, a window row further on than for the one before.
void gather_filters(const Layout& l, const Kernels& k, ConstPtr w, Ptr dst) {
  const Problem& p = l.p;
  for (int64_t g = 0; g < p.g; ++g) {
    for (int64_t part = 0; part < l.stack * static_cast<int64_t>(l.classes.size()); ++part) {
      const Class& s = l.classes[l.stack > 1 ? 0 : part];
      const int64_t further = l.stack > 1 ? part : 0;
      for (int64_t i = 0; i < s.win; ++i) {
        for (int64_t y = 0; y < p.win[1]; ++y) {
          for (int64_t z = 0; z < p.win[0]; ++z) {
            ConstPtr from =
                w + g * p.w.g + z * p.w.sp[0] + y * p.w.sp[1] + (s.first + i * s.step) * p.w.sp[2];
            k.pack[p.dtype](dst + ((i * l.taps + y + further) * p.win[0] + z) * p.c, l.filter, from,
                            p.w.k, p.w.c, p.k, p.c);
          }
        }
      }
      dst += p.k * l.filter;
    }
  }
}

struct Strip {
  ConstPtr data;
  int64_t plane, row, channel;  // strides: window z, input row, input channel
  int64_t slots, top;           // input row y lies at (y - top) % slots
};

// The columns of set s, cols.first + s + j * advance, that are inside the input: j in [begin, end).
struct Inside {
  int64_t begin, end;
};
Inside inside(const Layout& l, const Columns& cols, int64_t s) {
  const int64_t q = cols.first + s;
  const int64_t count = std::max<int64_t>(0, ceil_div(cols.count - s, l.advance));
  const int64_t begin = std::clamp<int64_t>(ceil_div(-q, l.advance), 0, count);
  return {begin, std::clamp(ceil_div(l.p.in[2] - q, l.advance), begin, count)};
}

// Zeros beside the columns that fill_strip writes, which are the same in every row.
void clear_edges(const Layout& l, const Columns& cols, Ptr strip) {
  const Problem& p = l.p;
  const int64_t planes = std::min(p.win[0], p.in[0]);
  if (l.flat) {  // edges are short, and many
    strip.zero(planes * l.plane);
    return;
  }
  for (int64_t i = 0; i < planes * l.in_rows * p.c; ++i) {
    for (int64_t s = 0; s < l.advance; ++s) {
      const Inside in = inside(l, cols, s);
      Ptr at = strip + i * l.channel + s * l.set;
      at.zero(in.begin * l.images);
      (at + in.end * l.images).zero(l.lane - in.end * l.images);
    }
  }
}

// Channels [c0, c1) of input rows [y0, y1) of the planes that window_positions `z` names, columns
// from `cols.first` on, each row to its slot.
void fill_channels(const Layout& l, const Kernels& k, ConstPtr x, const Progression& z, int64_t y0,
                   int64_t y1, const Columns& cols, const Strip& strip, Ptr data, int64_t c0,
                   int64_t c1) {
  const Problem& p = l.p;
  for (int64_t i = 0; i < z.n; ++i) {
    for (int64_t y = y0; y < y1; ++y) {
      ConstPtr row = x + (z.at + i * z.at_step) * p.x.sp[0] + y * p.x.sp[1] + c0 * p.x.c;
      Ptr to = data + i * l.plane + (y - strip.top) % strip.slots * l.row + c0 * l.channel;
      for (int64_t s = 0; s < l.advance; ++s) {
        const Inside in = inside(l, cols, s);
        const int64_t columns = in.end - in.begin;
        if (columns <= 0) continue;
        Ptr lane = to + s * l.set + in.begin * l.images;
        const int64_t step = p.x.sp[2] * l.advance;
        ConstPtr from = row + (cols.first + s + in.begin * l.advance) * p.x.sp[2];
        if (l.images == 1) {
          k.read[p.dtype](lane, l.channel, from, p.x.c, step, c1 - c0, columns);
        } else if (step == l.images) {
          k.read[p.dtype](lane, l.channel, from, p.x.c, 1, c1 - c0, columns * l.images);
        } else {
          for (int64_t c = c0; c < c1; ++c, lane += l.channel) {
            k.read[p.dtype](lane, l.images, from + (c - c0) * p.x.c, step, 1, columns, l.images);
          }
        }
      }
    }
  }
}

void fill_strip(const Layout& l, const Kernels& k, ConstPtr x, const Progression& z, int64_t y0,
                int64_t y1, const Columns& cols, const Strip& strip, Ptr data) {
  // Rows that share cache lines in the strip: those of few channels at a time, which are a line of
  // the input.
  const int64_t most = l.flat && l.p.x.c == 1 ? kLine : l.p.c;
  for (int64_t c = 0; c < l.p.c; c += most) {
    fill_channels(l, k, x, z, y0, y1, cols, strip, data, c, std::min(c + most, l.p.c));
  }
}

// The reduction of one output row: runs [begin[i], begin[i + 1]) are window position i along x.
struct Reduction {
  std::vector<Run> runs;
  std::vector<int64_t> begin;
  std::vector<int64_t> steps;  // before run begin[i]
  std::vector<int64_t> rows;   // where the window's rows are in the strip
};
void make_reduction(const Layout& l, const Strip& strip, const Progression& z, const Progression& y,
                    Reduction* reduction) {
  const Problem& p = l.p;
  std::vector<Run>& runs = reduction->runs;
  runs.clear();
  reduction->begin.assign(1, 0);
  reduction->steps.assign(1, 0);
  reduction->rows.resize(y.n);
  for (int64_t u = 0; u < y.n; ++u) {
    reduction->rows[u] = (y.at + u * y.at_step - strip.top) % strip.slots * strip.row;
  }
  int64_t set = 0;  // q % advance and q / advance for q = i * dilation
  int64_t column = 0;
  for (int64_t i = 0; i < l.win; ++i) {
    const int64_t at = set * l.set + column * l.images;
    for (int64_t u = 0; u < y.n; ++u) {
      for (int64_t d = 0; d < z.n; ++d) {
        const int64_t a =
            ((i * p.win[1] + y.first + u * y.step) * p.win[0] + z.first + d * z.step) * p.c;
        const int64_t b = d * strip.plane + reduction->rows[u] + at;
        if (static_cast<int64_t>(runs.size()) > reduction->begin.back() &&
            runs.back().a + runs.back().len == a &&
            runs.back().b + runs.back().len * strip.channel == b) {
          runs.back().len += p.c;
        } else {
          runs.push_back({a, b, p.c});
        }
      }
    }
    reduction->begin.push_back(static_cast<int64_t>(runs.size()));
    reduction->steps.push_back(reduction->steps.back() + y.n * z.n * p.c);
    for (set += l.dilation; set >= l.advance; set -= l.advance) ++column;
  }
}

// Lanes [0, n) from output (t, image 0) + `lane` on of one class, for features k0 ...; p: its
// outputs.
void finish_lanes(const Layout& l, const Problem& p, const Kernels& k, const Operands& o, Ptr c,
                  int64_t ld, int64_t features, int64_t lane, int64_t n, int64_t g, int64_t k0,
                  int64_t y_offset) {
  if (l.images == 1) {
    finish_planes(p, k, o, c, ld, features, n, g, k0, y_offset + lane * p.y.sp[2]);
    return;
  }
  Problem pixel = p;  // the images of one, or of all where these follow each other
  pixel.y.sp[2] = 1;
  const int64_t together = p.y.sp[2] == l.images ? lane + n : l.images;
  for (int64_t at = lane; at < lane + n;) {
    const int64_t count = std::min(lane + n, (at / together + 1) * together) - at;
    finish_planes(pixel, k, o, c + (at - lane), ld, features, count, g, k0,
                  y_offset + at / l.images * p.y.sp[2] + at % l.images);
    at += count;
  }
}

// Output rows that are lanes together: `count` of one residue, whose windows have the same rows,
// each an input row below those of the one before.
struct Band {
  int64_t row, count;
};
std::vector<Band> make_bands(const Layout& l, int64_t y0, int64_t y1) {
  const Problem& p = l.p;
  std::vector<Band> bands;
  if (!l.flat) {
    for (int64_t y = y0; y < y1; y += l.stack) bands.push_back({y, std::min(l.stack, y1 - y)});
    return bands;
  }
  for (int64_t r = 0; r < l.row_period; ++r) {
    Progression last{};
    for (int64_t y = y0 + r; y < y1; y += l.row_period) {
      const Progression next = window_positions(p, 1, y);
      const bool goes_on = y > y0 + r && next.n == last.n && next.first == last.first &&
                           (next.n == 0 || next.at == last.at + 1);
      if (goes_on) {
        ++bands.back().count;
      } else {
        bands.push_back({y, 1});
      }
      last = next;
    }
  }
  return bands;
}

// One call of the micro-kernel, the same for all bands with as many lanes: product rows [m0, m1),
// lanes [from, from + count). Rows of later classes have fewer window positions, the last of them:
// one call takes positions [first, last), the next one goes on with the rows that have more.
struct Call {
  GemmFn kernel, ahead;  // the second may be null
  int64_t m0, m1, from, count;
  int64_t first, last;
  int64_t c_row;
  bool to_y;  // else to the buffer
  bool done;  // nothing is left of these rows
};
// to_y: the outputs of a class are neighbours in y, and all lanes of the band are such.
void make_calls(const Layout& l, const Kernels& k, int64_t lanes, bool to_y,
                std::vector<Call>* calls) {
  const int64_t product_rows = l.product_rows();
  const int64_t vectors = ceil_div(lanes, l.width);
  const int64_t tiles = ceil_div(vectors, l.nv);
  calls->clear();
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t from = vectors * i / tiles * l.width;
    const int64_t count = std::min(vectors * (i + 1) / tiles * l.width, lanes) - from;
    const int64_t nv = ceil_div(count, l.width);
    const int64_t row_tiles = ceil_div(product_rows, std::min<int64_t>(l.mr, k.max_mr[nv]));
    for (int64_t f = 0; f < row_tiles; ++f) {
      const int64_t m0 = product_rows * f / row_tiles;
      const int64_t m1 = product_rows * (f + 1) / row_tiles;
      Call call{};
      call.m0 = m0;
      call.m1 = m1;
      call.from = from;
      call.count = count;
      // To y itself where all lanes of the tile are outputs.
      call.to_y = to_y && l.pixels() == l.classes[m0 / l.p.k].out;
      call.c_row = call.to_y ? l.p.y.k : l.joined > 0 ? l.joined : nv * l.width;
      for (int64_t rows = m1 - m0; rows > 0;) {
        call.last = l.classes[(m0 + rows - 1) / l.p.k].win;
        // In place, nothing of the input may follow the last pixel.
        call.kernel = (l.in_place ? k.strided : k.packed)[nv][rows];
        call.ahead = l.in_place ? nullptr : k.ahead[nv][rows];
        while (rows > 0 && l.classes[(m0 + rows - 1) / l.p.k].win == call.last) --rows;
        call.done = rows == 0;
        calls->push_back(call);
        call.first = call.last;
      }
    }
  }
}

// The outputs of a class among `count` lanes of an output row, from pixel `pixel` on.
struct Outputs {
  int64_t begin, end;
};
Outputs outputs(const Class& s, int64_t pixel, int64_t count) {
  const int64_t begin = std::max<int64_t>(0, pixel + s.shift);
  return {begin, std::max(begin, std::min(s.out, pixel + s.shift + count))};
}

// Writes an output row, `count` pixels of every residue from lane 0 of c on, whose rows are those
// of the product; by way of `joined` where results are not words.
void finish_joined(const Layout& l, const Problem& apart, const Kernels& k, const Operands& o,
                   Ptr c, Ptr joined, int64_t pixel, int64_t count, int64_t g, int64_t y_offset) {
  const Problem& p = l.p;
  int64_t begin = 0;  // outputs t that all classes have here
  int64_t end = std::numeric_limits<int64_t>::max();
  for (const Class& s : l.classes) {
    const Outputs of = outputs(s, pixel, count);
    begin = std::max(begin, of.begin);
    end = std::min(end, of.end);
  }
  end = std::max(begin, end);
  const int64_t rows = l.product_rows();
  // Bias, and activation unless a residual comes between, before results are joined: features are
  // few there, pixels many.
  const bool words = l.row_floats == 0;
  Operands rest = o;
  if (o.bias != nullptr || (o.residual == nullptr && o.has_epilogue())) {
    rest.bias = {};
    if (o.residual == nullptr) rest.activation = Activation::kNone;
    const ConstPtr bias = o.bias == nullptr ? o.bias : o.bias + g * p.k;
    const Activation activation = o.residual == nullptr ? o.activation : Activation::kNone;
    const auto epilogue = p.plain() ? k.epilogue : k.narrow_epilogue[p.dtype];
    for (int64_t m = 0; m < rows; m += p.k) {
      const EpilogueArgs of_class{c + m * l.joined, l.joined, p.k,       count, bias, 1, 0,
                                  nullptr,          0,        activation};
      epilogue(&of_class);
    }
  }
  std::array<const void*, kMaxJoined> row{};
  for (size_t i = 0; i < l.classes.size(); ++i) {
    const Class& s = l.classes[i];
    const Ptr of_class = c + static_cast<int64_t>(i) * p.k * l.joined;
    const int64_t lane0 = pixel + s.shift;  // output of lane 0
    for (int64_t f = 0; f < p.k; ++f) {
      row[s.residue * p.k + f] = (of_class + f * l.joined + (begin - lane0)).at;
    }
    const Outputs of = outputs(s, pixel, count);
    for (const Outputs& part :
         {Outputs{of.begin, std::min(begin, of.end)}, Outputs{std::max(end, of.begin), of.end}}) {
      if (part.end <= part.begin) continue;
      finish_planes(apart, k, rest, of_class + (part.begin - lane0), l.joined, p.k,
                    part.end - part.begin, g, 0,
                    y_offset + s.residue * p.y.sp[2] + part.begin * apart.y.sp[2]);
    }
  }
  if (end == begin) return;
  const int64_t at = y_offset + begin * rows;
  const Ptr to = words ? o.y + at : joined;
  if (rows > 1) {
    k.interleave(to, rows, row.data(), rows, 1, end - begin, 1);
  } else {
    k.copy(to, 0, row[0], 0, 1, 1, end - begin);
  }
  if (words && !rest.has_epilogue()) return;
  EpilogueArgs e{};  // pixels follow each other: one row
  e.c = to.at;
  e.rows = 1;
  e.cols = (end - begin) * rows;
  e.activation = rest.activation;
  if (!p.plain()) return finish_words(p, k, rest, e, at, 0, 1);
  e.residual = (rest.residual + at).at;
  k.epilogue(&e);
}

// What the strip will hold next, fetched piece by piece in the steps of the product: copies that
// wait for memory are slow. Spread over all steps, or what they load from the second-level cache
// waits.
struct Ahead {
  ConstPtr at;
  int64_t words;
};
// Input rows [y0, y1) of a plane.
Ahead ahead_of(const Layout& l, ConstPtr plane, const Columns& cols, int64_t y0, int64_t y1) {
  const Problem& p = l.p;
  const int64_t bytes = p.c * p.in[1] * p.in[2] * plane.size;
  if (y1 <= y0 || l.images > 1 || p.x.c != 1 || bytes <= caches().l2 / 2) return {plane, 0};
  const int64_t first = std::clamp<int64_t>(cols.first, 0, p.in[2]);
  const int64_t last = std::clamp(cols.first + cols.count, first, p.in[2]);
  const int64_t words = (y1 - y0 - 1) * p.x.sp[1] + (last - first) * p.x.sp[2];
  return {plane + y0 * p.x.sp[1] + first * p.x.sp[2], words >= kLeastAhead ? words : 0};
}

// A part of the reduction of a stack, in which these of its output rows take part.
struct Piece {
  int64_t row, rows;
  int64_t begin, end;  // runs
  int64_t steps;
};

// The products of a few output rows, one below the other, that begin an input row apart: for each
// window position along x they pass over all input rows together, and each input row is loaded once
// for all output rows whose windows it is in. Row after row of the results lies in `buffer`.
void multiply_stack(const Layout& l, const Kernels& k, const Strip& strip, const Band& band,
                    int64_t lanes, ConstPtr w, Ptr buffer, Ahead ahead, std::vector<Run>* runs,
                    std::vector<Piece>* pieces) {
  const Problem& p = l.p;
  runs->clear();
  pieces->clear();
  const int64_t top = band.row - p.pad[1];
  int64_t steps = 1;
  for (int64_t i = 0; i < l.win; ++i) {
    const int64_t q = i * l.dilation;
    const int64_t column = l.in_place ? q : q % l.advance * l.set + q / l.advance;
    const size_t first = pieces->size();
    for (int64_t u = 0; u < p.win[1] + band.count - 1; ++u) {
      const int64_t y = top + u;
      if (y < 0 || y >= p.in[1]) continue;
      const int64_t row = std::max<int64_t>(0, u - p.win[1] + 1);
      const int64_t rows = std::min(band.count - 1, u) + 1 - row;
      if (pieces->size() == first || pieces->back().row != row || pieces->back().rows != rows) {
        const auto at = static_cast<int64_t>(runs->size());
        pieces->push_back({row, rows, at, at, 0});
      }
      runs->push_back({(i * l.taps + u) * p.c, y % strip.slots * strip.row + column, p.c});
      ++pieces->back().end;
      pieces->back().steps += p.c;
      steps += p.c;
    }
  }
  buffer.zero(band.count * p.k * l.joined);
  const int64_t vectors = ceil_div(lanes, l.width);
  const int64_t tiles = ceil_div(vectors, l.nv);
  GemmArgs args{};
  args.ahead_step = std::min(kLine, ceil_div(ahead.words, steps * tiles));
  args.a_row = l.filter;
  args.a_step = 1;
  args.b_step = strip.channel;
  args.c_row = l.joined;
  args.load = 1;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t from = vectors * i / tiles * l.width;
    args.cols = std::min(vectors * (i + 1) / tiles * l.width, lanes) - from;
    args.b = strip.data + from;
    const int64_t nv = ceil_div(args.cols, l.width);
    for (const Piece& piece : *pieces) {
      const int64_t mr = piece.rows * p.k;
      args.a = w + piece.row * p.k * l.filter;
      args.c = buffer + (piece.row * p.k * l.joined + from);
      args.runs = runs->data() + piece.begin;
      args.n_runs = piece.end - piece.begin;
      if (ahead.words > 0 && !l.in_place && k.ahead[nv][mr] != nullptr) {
        args.ahead = ahead.at;
        const int64_t words = piece.steps * args.ahead_step;
        ahead = {ahead.at + words, ahead.words - words};
        k.ahead[nv][mr](&args);
      } else {
        (l.in_place ? k.strided : k.packed)[nv][mr](&args);
      }
    }
  }
}

void run(const Problem& problem, const Params& params, const Operands& o, const Execution& e) {
  const Layout l = make_layout(problem, e.target, params);
  const Problem& p = l.p;
  const Kernels& k = *e.target.kernels;
  Problem apart = p;  // the outputs of one class
  apart.y.sp[2] *= l.period;
  const bool direct_store = apart.y.sp[2] == l.images && is_word(k, p.out_dtype);
  Ptr w = e.workspace;
  Ptr scratch = w + l.w_floats;
  const int64_t own = l.strip_floats + l.tile_floats + l.row_floats;
  gather_filters(l, k, o.w, w);

  const Threads pool = useful_pool(problem, e);
  const int64_t tasks = p.g * p.n * p.out[0] * l.row_blocks * l.col_blocks;
  std::vector<char> cleared(pool.count(), 0);
  pool.run(tasks, [&](int64_t task, int64_t worker) {
    const int64_t cb = task % l.col_blocks;
    const int64_t rb = task / l.col_blocks % l.row_blocks;
    const int64_t oz = task / l.col_blocks / l.row_blocks % p.out[0];
    const int64_t n = task / l.col_blocks / l.row_blocks / p.out[0] % p.n;
    const int64_t g = task / l.col_blocks / l.row_blocks / p.out[0] / p.n;
    const int64_t y0 = rb * l.rows;
    const int64_t y1 = std::min(y0 + l.rows, p.out[1]);
    const int64_t pixel0 = l.begin + cb * l.cols;
    const int64_t pixel1 = std::min(pixel0 + l.cols, l.end);
    const int64_t row_lanes = (pixel1 - pixel0) * l.images;
    Ptr strip_data = scratch + worker * own;
    Ptr buffer = strip_data + l.strip_floats;
    const Ptr joined = buffer + l.tile_floats;
    ConstPtr x = o.x + n * p.x.n + g * p.x.g;

    const Progression z = window_positions(p, 0, oz);
    const Columns cols = columns(l, pixel0, pixel1);
    Strip strip{x + z.at * p.x.sp[0] + cols.first * l.images,
                z.at_step * p.x.sp[0],
                p.x.sp[1],
                p.x.c,
                p.in[1],
                0};
    int64_t filled = 0;  // input rows before this one are in their slots, or were
    if (!l.in_place) {
      strip_data = strip_data + first_pixel(l, cols);
      // Blocks of the same columns leave the edges as they are.
      if (l.col_blocks > 1 || cleared[worker] == 0) clear_edges(l, cols, strip_data);
      cleared[worker] = 1;
      strip = {strip_data, l.plane, l.row, l.channel, l.in_rows, 0};
    }
    if (l.flat) {
      int64_t top = p.in[1];
      for (int64_t oy = y0; oy < y1; ++oy) {
        const Progression y = window_positions(p, 1, oy);
        if (y.n == 0) continue;
        top = std::min(top, y.at);
        filled = std::max(filled, y.at + (y.n - 1) * y.at_step + 1);
      }
      strip.top = top;
      fill_strip(l, k, x, z, top, filled, cols, strip, strip_data);
    }

    Reduction reduction;
    std::vector<Call> calls;
    int64_t calls_lanes = -1;
    std::vector<Piece> pieces;
    for (const Band& band : make_bands(l, y0, y1)) {
      if (l.stack > 1) {
        const auto end_of = [&](int64_t row) {
          return std::clamp<int64_t>(row - p.pad[1] + p.win[1] - 1, 0, p.in[1]);
        };
        const int64_t next = band.row + band.count;
        const int64_t begin = std::max<int64_t>(filled, band.row - p.pad[1]);
        const int64_t end = end_of(next);
        if (!l.in_place) fill_strip(l, k, x, z, begin, end, cols, strip, strip_data);
        filled = std::max(filled, end);
        const Ahead ahead = ahead_of(l, x, cols, filled, end_of(std::min(next + l.stack, y1)));
        multiply_stack(l, k, strip, band, row_lanes, w + g * l.stack * p.k * l.filter, buffer,
                       next < y1 ? ahead : Ahead{}, &reduction.runs, &pieces);
        for (int64_t i = 0; i < band.count; ++i) {
          finish_joined(l, apart, k, o, buffer + i * p.k * l.joined, joined, pixel0, row_lanes, g,
                        n * p.y.n + g * p.y.g + (band.row + i) * p.y.sp[1]);
        }
        continue;
      }
      const Progression y = window_positions(p, 1, band.row);
      if (!l.in_place && !l.flat && y.n > 0) {
        // From where the window begins, not from its first row on real input: with rhs_dilation the
        // next output row may need earlier ones.
        const int64_t begin =
            std::max<int64_t>(0, ceil_div(band.row * p.stride[1] - p.pad[1], p.lhs_dilation[1]));
        const int64_t end = y.at + (y.n - 1) * y.at_step + 1;
        fill_strip(l, k, x, z, std::max(filled, begin), end, cols, strip, strip_data);
        filled = std::max(filled, end);
      }
      make_reduction(l, strip, z, y, &reduction);
      const int64_t y_row = n * p.y.n + g * p.y.g + oz * p.y.sp[0] + band.row * p.y.sp[1];
      const int64_t pitch = band.count > 1 ? l.row : row_lanes;  // lanes from one row to the next
      const int64_t lanes = (band.count - 1) * pitch + row_lanes;
      if (lanes != calls_lanes) {
        make_calls(l, k, lanes, direct_store && band.count == 1, &calls);
        calls_lanes = lanes;
      }
      Ahead ahead{};
      if (!l.in_place && !l.flat && band.row + 1 < y1) {
        const Progression next = window_positions(p, 1, band.row + 1);
        const int64_t end = next.n == 0 ? 0 : next.at + (next.n - 1) * next.at_step + 1;
        ahead = ahead_of(l, x + z.at * p.x.sp[0], cols, filled, end);
      }
      GemmArgs args{};
      if (ahead.words > 0) {
        int64_t steps = 1;
        for (const Call& call : calls) {
          steps += reduction.steps[call.last] - reduction.steps[call.first];
        }
        args.ahead_step = std::min(kLine, ceil_div(ahead.words, steps));
      }
      args.a_row = l.filter;
      args.a_step = 1;
      args.b_step = strip.channel;
      for (const Call& call : calls) {
        const Ptr c = call.to_y ? o.y + (y_row + call.m0 * p.y.k + pixel0 * l.images + call.from)
                      : l.joined > 0 ? buffer + (call.m0 * l.joined + call.from)
                                     : buffer;
        args.a = w + (g * l.product_rows() + call.m0) * l.filter;
        args.b = strip.data + call.from;
        args.c = c;
        args.c_row = call.c_row;
        args.cols = call.count;
        args.runs = reduction.runs.data() + reduction.begin[call.first];
        args.n_runs = reduction.begin[call.last] - reduction.begin[call.first];
        args.load = call.first > 0 ? 1 : 0;
        if (ahead.words > 0 && call.ahead != nullptr) {
          args.ahead = ahead.at;
          call.ahead(&args);
          const int64_t words =
              (reduction.steps[call.last] - reduction.steps[call.first]) * args.ahead_step;
          ahead = {ahead.at + words, ahead.words - words};
        } else {
          call.kernel(&args);
        }
        if (!call.done || l.joined > 0) continue;
        for (int64_t m = call.m0; m < call.m1;) {
          const Class& s = l.classes[m / p.k];
          const int64_t features = std::min(call.m1, (m / p.k + 1) * p.k) - m;
          // The lanes of this tile that are outputs of this class, row by row.
          const int64_t t = (pixel0 + s.shift) * l.images;
          for (int64_t j = call.from / pitch; j * pitch < call.from + call.count; ++j) {
            const int64_t begin = std::max({int64_t{0}, call.from - j * pitch, -t});
            const int64_t end =
                std::min({row_lanes, call.from + call.count - j * pitch, s.out * l.images - t});
            if (end <= begin) continue;
            finish_lanes(
                l, apart, k, o, c + (m - call.m0) * call.c_row + (j * pitch + begin - call.from),
                call.c_row, features, t + begin, end - begin, g, m % p.k,
                y_row + j * l.row_period * p.y.sp[1] + s.residue * p.y.sp[2] + m % p.k * p.y.k);
          }
          m += features;
        }
      }
      if (l.joined == 0) continue;
      for (int64_t j = 0; j < band.count; ++j) {
        finish_joined(l, apart, k, o, buffer + j * pitch, joined, pixel0, row_lanes, g,
                      y_row + j * l.row_period * p.y.sp[1]);
      }
    }
  });
  add_skipped_nonfinite(problem, o, e);
}

std::string rejects(const Problem& p) {
  if (p.chunk_rows > 0) return "the reduction is chunked (weight gradient)";
  const int64_t period = residue_period(p, 2);
  if (period > 64) return "more than 64 residues of the output columns";
  if (period > 1 && period * p.stride[2] != p.lhs_dilation[2]) {
    return "stride that neither divides lhs_dilation nor is a multiple of it";
  }
  return {};
}

// Modelled cycles of one reduction step of a tile of mr rows and nv vectors of pixels.
double step_cycles(const Layout& l, const Kernels& k, int64_t mr, int64_t nv) {
  const Problem& p = l.p;
  const auto as_double = [](int64_t v) { return static_cast<double>(v); };
  // A window position along x reads what the last one read, moved by a pixel: from the first-level
  // cache if that holds a tile's part of all rows and channels. A vector of the strip touches two
  // lines.
  const int64_t rows =
      ceil_div(p.win[1], p.lhs_dilation[1]) * ceil_div(p.win[0], p.lhs_dilation[0]) * p.c;
  const int64_t lines = nv * k.width / 16 + 1;
  const bool stays = rows * lines * 64 <= caches().l1 * 3 / 4;
  const double from_l2 =
      3.0 * as_double(lines) / (stays ? as_double(std::max<int64_t>(1, l.win)) : 1.0);
  const double arithmetic = std::max(as_double(mr * nv) / 2.0, 4.0);
  return std::max(arithmetic, from_l2) + 0.45 * as_double(mr) + 1.1 * as_double(nv);
}

// The same for a stack of so many output rows, for each of them.
double stack_cycles(const Layout& l, int64_t stack, int64_t nv) {
  const Problem& p = l.p;
  const auto as_double = [](int64_t v) { return static_cast<double>(v); };
  constexpr double kCallCycles = 40;
  const double from_l2 = 1.9 * as_double(nv * l.width / 16 + 1);
  double total = 0;
  int64_t last = 0;
  for (int64_t u = 0; u < p.win[1] + stack - 1; ++u) {
    const int64_t row = std::max<int64_t>(0, u - p.win[1] + 1);
    const int64_t rows = std::min(stack - 1, u) + 1 - row;
    total += std::max(as_double(rows * p.k * nv) / 2.0, from_l2) + 0.45 * as_double(rows * p.k) +
             1.1 * as_double(nv);
    const int64_t active = row * kMaxStack + rows;
    if (active != last) total += kCallCycles / as_double(p.c);
    last = active;
  }
  return total / as_double(p.win[1] * stack);
}

// Of one step of all tiles of a band.
double product_cycles(const Layout& l, const Kernels& k, int64_t mr_limit, int64_t nv_limit) {
  const int64_t vectors = ceil_div(l.band_lanes(), l.width);
  const int64_t tiles = ceil_div(vectors, nv_limit);
  const int64_t stack = stack_of(l, k, mr_limit);
  const auto tile_cycles = [&](int64_t nv) {
    if (stack > 1) return stack_cycles(l, stack, nv);
    const int64_t row_tiles = ceil_div(l.product_rows(), std::min<int64_t>(mr_limit, k.max_mr[nv]));
    const int64_t mr = ceil_div(l.product_rows(), row_tiles);
    return static_cast<double>(row_tiles) * step_cycles(l, k, mr, nv);
  };
  const int64_t wide = vectors % tiles;  // tiles with a vector more than the others
  return static_cast<double>(tiles - wide) * tile_cycles(vectors / tiles) +
         (wide > 0 ? static_cast<double>(wide) * tile_cycles(vectors / tiles + 1) : 0.0);
}

// Sets the tile with the fewest cycles. The layout, but that its tile is the smallest.
Layout set_tile(const Problem& problem, const Target& t, Params* params) {
  const Kernels& k = *t.kernels;
  (*params)[kPlanarMr] = (*params)[kPlanarNv] = 1;
  const Layout l = make_layout(problem, t, *params);
  double best = std::numeric_limits<double>::infinity();
  for (int64_t nv = 1; nv <= kMaxNv; ++nv) {
    if (k.max_mr[nv] == 0) continue;
    const double cycles = product_cycles(l, k, k.max_mr[nv], nv);
    if (cycles >= best * 0.999) continue;
    best = cycles;
    (*params)[kPlanarMr] = k.max_mr[nv];
    (*params)[kPlanarNv] = nv;
  }
  return l;
}

double cost(const Problem& problem, const Target& t, const Params& params);

Params defaults(const Problem& problem, const Target& t) {
  const Kernels& k = *t.kernels;
  Params params{};
  const Layout l = set_tile(problem, t, &params);
  const auto strip = [&](const Params& of) { return make_layout(problem, t, of).strip_floats; };
  int64_t floats = stack_of(l, k, params[kPlanarMr]) > 1 ? strip(params) : l.strip_floats;
  // Rows of images are long: in place, channels of one pixel would be pages apart and share few
  // sets of the caches.
  if (l.images > 1) {
    params[kPlanarStrip] = 1;
    floats = strip(params);
  }
  const int64_t limit = std::min(kStripBytes, caches().l2 / (l.images > 1 ? 4 : 2)) / k.size;
  const int64_t vector = params[kPlanarNv] * k.width;
  for (int64_t cols = l.pixels() * l.images; floats > limit && cols > vector;) {
    cols = round_up(ceil_div(cols, 2), vector);
    params[kPlanarCols] = cols;
    floats = strip(params);
  }
  // Consecutive rows share what they read; some blocks for every thread.
  const int64_t threads = useful_threads(problem, t.threads);
  const int64_t others = l.p.g * l.p.n * l.p.out[0];
  params[kPlanarRows] =
      threads == 1 ? 0 : ceil_div(l.p.out[1], std::min(l.p.out[1], ceil_div(4 * threads, others)));
  // And parts of rows, where these are few.
  const int64_t all_rows = others * l.p.out[1];
  if (threads > 1 && all_rows < 2 * threads) {
    const int64_t lanes = l.pixels() * l.images;
    const int64_t cols = round_up(ceil_div(lanes, ceil_div(2 * threads, all_rows)), vector);
    const int64_t most = params[kPlanarCols] == 0 ? lanes : params[kPlanarCols];
    if (cols < most) params[kPlanarCols] = cols;
  }
  // Long rows fill their vectors anyway, and many features fill vectors of their own.
  if (!can_be_flat(l.p, l.images) || l.pixels() > 6 * l.width || l.product_rows() >= l.width) {
    return params;
  }
  // As many rows together as a quarter of the second-level cache holds.
  Params flat = params;
  flat[kPlanarCols] = 0;
  flat[kPlanarFlat] = 1;
  int64_t rows = params[kPlanarRows] == 0 ? l.p.out[1] : params[kPlanarRows];
  for (flat[kPlanarRows] = rows; strip(flat) > limit / 2 && rows > 1;) {
    rows = ceil_div(rows, 2);
    flat[kPlanarRows] = rows;
  }
  if (rows == 1 || strip(flat) > limit) return params;
  set_tile(problem, t, &flat);
  return cost(problem, t, flat) < cost(problem, t, params) ? flat : params;
}

std::string check(const Problem& p, const Target& t, const Params& params) {
  const int64_t nv = params[kPlanarNv];
  if (nv < 1 || nv > kMaxNv || t.kernels->max_mr[nv] == 0) return "nv: no such tile";
  if (params[kPlanarMr] < 1 || params[kPlanarMr] > t.kernels->max_mr[nv]) return "mr: no such tile";
  if (params[kPlanarRows] < 0 || params[kPlanarCols] < 0) return "rows, cols: negative";
  if (params[kPlanarStrip] != 0 && params[kPlanarStrip] != 1) return "strip: 0 or 1";
  if (params[kPlanarFlat] != 0 && params[kPlanarFlat] != 1) return "flat: 0 or 1";
  Params least = params;
  least[kPlanarFlat] = 0;
  if (params[kPlanarFlat] != 0) {
    const Layout l = make_layout(p, t, least);
    if (!can_be_flat(l.p, l.images)) return "flat: output rows are not an input row apart";
  }
  least[kPlanarCols] = nv * t.kernels->width;
  const int64_t limit =
      std::max(kStripBytes / t.kernels->size, make_layout(p, t, least).strip_floats);
  if (make_layout(p, t, params).strip_floats > limit) {
    return "rows, cols: the strip is larger than its limit";
  }
  return {};
}

int64_t workspace(const Problem& p, const Target& t, const Params& params) {
  const Layout l = make_layout(p, t, params);
  return l.w_floats +
         (l.strip_floats + l.tile_floats + l.row_floats) * useful_threads(p, t.threads);
}

double cost(const Problem& problem, const Target& t, const Params& params) {
  const Layout l = make_layout(problem, t, params);
  const Problem& p = l.p;
  const auto as_double = [](int64_t v) { return static_cast<double>(v); };
  const double rows = as_double(p.g * p.n * p.out[0] * p.out[1]);
  const double bands =
      l.flat ? as_double(p.g * p.n * p.out[0] * l.row_blocks * l.row_period) : rows;
  const double taps = as_double(l.win * p.win[1] * p.win[0] * p.c) /
                      as_double(p.lhs_dilation[1] * p.lhs_dilation[0]);
  double total = bands * as_double(l.col_blocks) * (taps + 4.0) *
                 product_cycles(l, *t.kernels, params[kPlanarMr], params[kPlanarNv]);
  if (!l.in_place) {
    const double blocks = as_double(p.g * p.n * p.out[0] * l.col_blocks);
    const double rows_read =
        as_double(l.flat ? l.row_blocks * l.in_rows : p.in[1] + (l.row_blocks - 1) * l.in_rows);
    const int64_t row = p.c * (l.flat ? l.row * l.advance : l.channel);
    const double floats = blocks * rows_read * as_double(std::min(p.win[0], p.in[0]) * row);
    const bool contiguous = l.images > 1 || (p.x.sp[2] == 1 && l.advance == 1);
    // Rows that are lanes together lie across cache lines, and fill more of the second-level cache.
    const double flat = l.flat ? 2.5 : 1.0;
    total += floats * flat * (contiguous ? 2.0 / as_double(l.width) : 0.8);
  }
  if (l.period != 1 || p.y.sp[2] != l.images) {
    total += rows * as_double(p.out[2] * p.k) *
             (l.images == 1 ? 1.0 : as_double(l.images) / as_double(l.width) + 2.0);
  }
  if (l.images == 1) {
    total += lone_element_cycles(p);
  }
  return total + 2.0 * as_double(l.w_floats);
}

}  // namespace

const Algorithm& algorithm_planar() {
  static const Algorithm a = [] {
    Algorithm row{
        "planar",
        "output pixels as lanes over channel-planar strips of the input, filter broadcast; with "
        "them "
        "the images, where these lie next to each other",
        "this project; residues after arXiv 2209.03704, layouts after arXiv 2408.00278",
        {kF32, kF64, kBF16, kF16, kS8, kU8},
        {{"mr",
          "output features of the register tile, in as many output rows as it has room for",
          {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16}},
         {"nv", "vectors of output pixels of the register tile", {1, 2, 3, 4}},
         {"rows", "output rows per task; 0: all", {0, 1, 2, 4, 8, 16, 32}},
         {"cols",
          "lanes (output pixels of a residue, and images) per block; 0: the whole row",
          {0, 64, 128, 256, 512}},
         {"strip", "1: always a copy of the rows; 0: the input in place where it can be", {0, 1}},
         {"flat", "1: the output rows of a task are lanes together; 0: each by itself", {0, 1}}},
        rejects,
        defaults,
        check,
        workspace,
        run,
        cost};
    row.knows_images = true;
    row.integers_as_floats = true;
    return row;
  }();
  return a;
}

}  // namespace jaxwin
