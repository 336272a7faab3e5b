// SPDX-License-Identifier: Apache-2.0

#include "algorithms/tile_driver.h"

#include <algorithm>
#include <cstring>

#include "algorithms/gemm_driver.h"

namespace jaxwin {
namespace {

constexpr int64_t kMostTiles = 4096;  // of a block
constexpr int64_t kChannelsPerTask = 16;
// Strides of products are no multiples of a page: many of them are read or written at a time.
constexpr int64_t kSkew = 16;

Scheme scheme_of(int64_t tile) { return tile == 2 ? kWinograd2 : tile == 4 ? kWinograd4 : kSfc6; }

const Transforms& transforms_of(const Kernels& k, Dtype dtype) {
  const Word word = kDtypeRows[dtype].word;
  if (std::strcmp(k.isa, "avx512") == 0) return *avx512::transforms(word);
  if (std::strcmp(k.isa, "avx2") == 0) return *avx2::transforms(word);
  return *baseline::transforms(word);
}

struct Layout {
  Problem p;         // its channels are words
  int64_t channels;  // of the operands, per group
  Scheme scheme;
  int64_t in, out, products;
  int64_t width, panel, panels;             // vector lanes; features of a panel; panels of a group
  int64_t tiles_y, tiles_x, tiles;          // of an image; of all images
  int64_t block, blocks;                    // tiles at a time; per group
  int64_t u_product, v_product, m_product;  // words between two products
  int64_t u_panel, shared;                  // words of a panel's filters; of all
  bool once;                                // the filters are transformed once for all blocks
  int64_t kc;  // channels (words) whose filters are transformed at a time
  int64_t u_words, v_words, m_words, patch_words, result_words;  // per thread

  int64_t thread_words() const { return u_words + v_words + m_words + patch_words + result_words; }
};

Layout make_layout(const Problem& problem, const Target& t, const Params& params) {
  const Kernels& k = *t.kernels;
  Layout l;
  l.p = problem;
  l.channels = problem.c;
  l.p.c = ceil_div(problem.c, k.channels);
  const Problem& p = l.p;
  l.scheme = scheme_of(params[kTile]);
  const SchemeSize size = kSchemeSizes[l.scheme];
  l.in = size.in;
  l.out = size.out;
  l.products = size.products;
  l.width = k.width;
  int64_t nv = p.panel > 0 ? p.panel / l.width : params[kVectors];
  while (k.max_mr[nv] == 0) --nv;
  l.panel = nv * l.width;
  l.panels = ceil_div(p.k, l.panel);
  l.tiles_y = ceil_div(p.out[1], l.out);
  l.tiles_x = ceil_div(p.out[2], l.out);
  l.tiles = p.n * l.tiles_y * l.tiles_x;
  l.block = std::min(params[kTilesPerBlock], l.tiles);
  l.blocks = ceil_div(l.tiles, l.block);
  l.once = params[kOnce] != 0;
  const int64_t channel_bytes = l.products * l.panel * k.size;
  l.kc = l.once ? p.c : std::min(p.c, std::max<int64_t>(8, caches().l2 / 4 / channel_bytes));
  l.u_product = l.kc * l.panel + kSkew;
  l.u_panel = l.products * l.u_product;
  l.shared = l.once ? p.g * l.panels * l.u_panel : 0;
  l.u_words = l.once ? 0 : l.u_panel;
  l.v_product = round_up(l.block * p.c, kSkew) + kSkew;
  l.m_product = l.block * l.panel + kSkew;
  l.v_words = l.products * l.v_product;
  l.m_words = l.products * l.m_product;
  l.patch_words = round_up(std::max(l.in * l.in * p.c, 9 * l.panel), kSkew);
  l.result_words = l.out * l.out * l.panel;
  return l;
}

// One panel's filters of channels (words) [c0, c1), transformed; the first goes to u.
void transform_filters(const Layout& l, const Kernels& k, TransformFn transform, ConstPtr w,
                       int64_t g, int64_t panel, int64_t c0, int64_t c1, Ptr u, Ptr taps) {
  const Problem& p = l.p;
  const int64_t features = std::min(l.panel, p.k - panel * l.panel);
  const bool packed = p.panel > 0;  // whole panels, in the order of the reduction
  const bool in_place = packed || (p.plain() && p.w.k == 1 && features == l.panel);
  TransformArgs args{};
  args.cols = l.panel;
  args.dst_row = l.u_product;
  args.src_row = 3 * l.panel;
  args.src_col = l.panel;
  if (packed) {
    args.src_row = p.c * l.panel;
    args.src_col = 3 * p.c * l.panel;
  } else if (in_place) {
    args.src_row = p.w.sp[1];
    args.src_col = p.w.sp[2];
  } else {
    taps.zero(9 * l.panel);
  }
  for (int64_t c = c0; c < c1; ++c) {
    const int64_t channel = c * k.channels;
    const ConstPtr from = packed ? w + ((g * l.panels + panel) * p.reduction() + c) * l.panel
                                 : w + g * p.w.g + panel * l.panel * p.w.k + channel * p.w.c;
    for (int64_t i = 0; i < 9 && !in_place; ++i) {
      k.pack[p.dtype](taps + i * l.panel, l.panel, from + i / 3 * p.w.sp[1] + i % 3 * p.w.sp[2],
                      p.w.c, p.w.k, std::min(k.channels, l.channels - channel), features);
    }
    const char* source = in_place ? from.at : taps.at;
    const Ptr to = u + (c - c0) * l.panel;
    args.src = source;
    args.dst = to.at;
    transform(&args);
  }
}

// Where a tile lies: its image and its first output row and column.
struct Corner {
  int64_t n, y, x;
};
Corner tile_at(const Layout& l, int64_t index) {
  const int64_t of_image = index % (l.tiles_y * l.tiles_x);
  return {index / (l.tiles_y * l.tiles_x), of_image / l.tiles_x * l.out,
          of_image % l.tiles_x * l.out};
}

// The inputs of a tile as words with their padding, channels innermost.
void fill_patch(const Layout& l, const Kernels& k, ConstPtr x, int64_t y0, int64_t x0, Ptr patch) {
  const Problem& p = l.p;
  const int64_t begin = std::clamp<int64_t>(-x0, 0, l.in);
  const int64_t end = std::clamp<int64_t>(p.in[2] - x0, begin, l.in);
  for (int64_t i = 0; i < l.in; ++i) {
    const Ptr row = patch + i * l.in * p.c;
    const int64_t y = y0 + i;
    if (y < 0 || y >= p.in[1] || begin == end) {
      row.zero(l.in * p.c);
      continue;
    }
    row.zero(begin * p.c);
    k.read[p.dtype](row + begin * p.c, p.c, x + y * p.x.sp[1] + (x0 + begin) * p.x.sp[2], p.x.sp[2],
                    p.x.c, end - begin, l.channels);
    (row + end * p.c).zero((l.in - end) * p.c);
  }
}

void transform_input(const Layout& l, const Kernels& k, TransformFn transform, ConstPtr x,
                     const Corner& tile, Ptr v, Ptr patch) {
  const Problem& p = l.p;
  const int64_t y0 = tile.y - p.pad[1];
  const int64_t x0 = tile.x - p.pad[2];
  TransformArgs args{};
  args.dst = v.at;
  args.dst_row = l.v_product;
  args.cols = p.c;
  const bool inside = y0 >= 0 && y0 + l.in <= p.in[1] && x0 >= 0 && x0 + l.in <= p.in[2];
  if (inside && p.x.c == 1 && p.plain()) {
    args.src = (x + y0 * p.x.sp[1] + x0 * p.x.sp[2]).at;
    args.src_row = p.x.sp[1];
    args.src_col = p.x.sp[2];
  } else {
    fill_patch(l, k, x, y0, x0, patch);
    args.src = patch.at;
    args.src_row = l.in * p.c;
    args.src_col = p.c;
  }
  transform(&args);
}

void transform_output(const Layout& l, const Kernels& k, TransformFn transform, const Operands& o,
                      const Corner& tile, int64_t g, int64_t panel, Ptr m, Ptr result) {
  const Problem& p = l.p;
  const int64_t k0 = panel * l.panel;
  const int64_t features = std::min(l.panel, p.k - k0);
  const int64_t height = std::min(l.out, p.out[1] - tile.y);
  const int64_t width = std::min(l.out, p.out[2] - tile.x);
  const int64_t at =
      tile.n * p.y.n + g * p.y.g + tile.y * p.y.sp[1] + tile.x * p.y.sp[2] + k0 * p.y.k;
  const bool in_place = p.plain() && p.y.k == 1 && height == l.out && width == l.out;
  const Ptr to = in_place ? o.y + at : result;
  TransformArgs args{};
  args.src = m.at;
  args.src_row = l.m_product;
  args.dst = to.at;
  args.dst_row = in_place ? p.y.sp[1] : l.out * l.panel;
  args.dst_col = in_place ? p.y.sp[2] : l.panel;
  args.cols = features;
  transform(&args);
  if (in_place && !o.has_epilogue()) return;
  for (int64_t i = 0; i < height; ++i) {
    finish_rows(p, k, o, to + i * args.dst_row, args.dst_col, width, features, g, k0,
                at + i * p.y.sp[1]);
  }
}

// One product of all tiles of a block, for one panel of features and channels [c0, c1).
void multiply(const Layout& l, const Kernels& k, ConstPtr v, ConstPtr u, Ptr m, int64_t tiles,
              int64_t features, int64_t c0, int64_t c1) {
  const int64_t nv = ceil_div(features, l.width);
  const Run run{c0, 0, c1 - c0};
  GemmArgs args{};
  args.b = u.at;
  args.runs = &run;
  args.n_runs = 1;
  args.a_row = l.p.c;
  args.b_step = l.panel;
  args.c_row = l.panel;
  args.cols = features;
  args.load = c0 > 0 ? 1 : 0;
  const int64_t parts = ceil_div(tiles, k.max_mr[nv]);
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t first = tiles * i / parts;
    const int64_t mr = tiles * (i + 1) / parts - first;
    args.a = (v + first * l.p.c).at;
    args.c = (m + first * l.panel).at;
    k.packed[nv][mr](&args);
  }
}

}  // namespace

void tile_run(const Problem& problem, const Params& params, const Operands& o, const Execution& e) {
  const Layout l = make_layout(problem, e.target, params);
  const Problem& p = l.p;
  const Kernels& k = *e.target.kernels;
  const Transforms& transforms = transforms_of(k, p.dtype);
  const Ptr filters = e.workspace;
  const Threads pool = useful_pool(problem, e);
  const auto scratch = [&](int64_t worker) {
    return filters + l.shared + worker * l.thread_words();
  };

  const int64_t pieces = l.once ? ceil_div(p.c, kChannelsPerTask) : 0;
  pool.run(p.g * l.panels * pieces, [&](int64_t task, int64_t worker) {
    const int64_t panel = task / pieces;  // of all groups
    const int64_t c0 = task % pieces * kChannelsPerTask;
    transform_filters(l, k, transforms.filter[l.scheme], o.w, panel / l.panels, panel % l.panels,
                      c0, std::min(c0 + kChannelsPerTask, p.c),
                      filters + panel * l.u_panel + c0 * l.panel,
                      scratch(worker) + l.v_words + l.m_words);
  });

  pool.run(p.g * l.blocks, [&](int64_t task, int64_t worker) {
    const int64_t g = task / l.blocks;
    const int64_t first = task % l.blocks * l.block;
    const int64_t tiles = std::min(l.block, l.tiles - first);
    const Ptr v = scratch(worker);
    const Ptr m = v + l.v_words;
    const Ptr patch = m + l.m_words;
    const Ptr result = patch + l.patch_words;
    const Ptr own = result + l.result_words;
    for (int64_t i = 0; i < tiles; ++i) {
      const Corner tile = tile_at(l, first + i);
      transform_input(l, k, transforms.input[l.scheme], o.x + tile.n * p.x.n + g * p.x.g, tile,
                      v + i * p.c, patch);
    }
    for (int64_t panel = 0; panel < l.panels; ++panel) {
      const Ptr u = l.once ? filters + (g * l.panels + panel) * l.u_panel : own;
      const int64_t features = std::min(l.panel, p.k - panel * l.panel);
      for (int64_t c0 = 0; c0 < p.c; c0 += l.kc) {
        const int64_t c1 = std::min(c0 + l.kc, p.c);
        if (!l.once) {
          transform_filters(l, k, transforms.filter[l.scheme], o.w, g, panel, c0, c1, u, patch);
        }
        for (int64_t q = 0; q < l.products; ++q) {
          multiply(l, k, v + q * l.v_product, u + q * l.u_product, m + q * l.m_product, tiles,
                   features, c0, c1);
        }
      }
      for (int64_t i = 0; i < tiles; ++i) {
        transform_output(l, k, transforms.output[l.scheme], o, tile_at(l, first + i), g, panel,
                         m + i * l.panel, result);
      }
    }
  });
}

int64_t tile_workspace(const Problem& p, const Target& t, const Params& params) {
  const Layout l = make_layout(p, t, params);
  return l.shared + l.thread_words() * useful_threads(p, t.threads);
}

std::string tile_rejects(const Problem& p) {
  if (p.win[0] != 1 || p.win[1] != 3 || p.win[2] != 3) return "the window is not 3x3";
  if (p.out[0] != 1 || p.in[0] != 1 || p.pad[0] != 0) return "three dimensions";
  if (p.stride[1] != 1 || p.stride[2] != 1) return "window_strides > 1";
  if (p.rhs_dilation[1] != 1 || p.rhs_dilation[2] != 1) return "rhs_dilation > 1";
  if (p.dilated_input()) return "lhs_dilation > 1";
  if (p.chunk_rows > 0) return "the reduction is chunked (weight gradient)";
  return {};
}

Params tile_defaults(const Problem& problem, const Target& t, const std::vector<int64_t>& tiles) {
  const Kernels& k = *t.kernels;
  const int64_t threads = useful_threads(problem, t.threads);
  Params best{};
  double best_cost = 0;
  for (const int64_t tile : tiles) {
    const int64_t out = kSchemeSizes[scheme_of(tile)].out;
    const int64_t all = problem.n * ceil_div(problem.out[1], out) * ceil_div(problem.out[2], out);
    const int64_t most = ceil_div(all, ceil_div(threads, problem.g));  // a block for every thread
    for (const int64_t block : {8, 12, 16, 24, 32, 48, 64, 96}) {
      for (const int64_t once : {0, 1}) {
        Params params{};
        params[kTile] = tile;
        // Blocks of nearly equal size.
        params[kTilesPerBlock] = ceil_div(all, ceil_div(all, std::min(block, most)));
        params[kVectors] = best_tile(k, params[kTilesPerBlock], problem.k).nv;
        params[kOnce] = once;
        const double cost = tile_cost(problem, t, params);
        if (best[kTile] == 0 || cost < best_cost) {
          best = params;
          best_cost = cost;
        }
      }
      if (block >= most) break;
    }
  }
  return best;
}

// Valid for every instruction set and on every machine, but for packed filters: the bits depend on
// the parameters.
std::string tile_check(const Problem& p, const Target& t, const Params& params,
                       const std::vector<int64_t>& tiles) {
  if (std::find(tiles.begin(), tiles.end(), params[kTile]) == tiles.end()) {
    return "tile: no such tile";
  }
  if (params[kTilesPerBlock] < 1 || params[kTilesPerBlock] > kMostTiles) {
    return "tiles: from 1 to " + std::to_string(kMostTiles);
  }
  if (params[kVectors] < 1 || params[kVectors] > kMaxNv) return "nv: from 1 to 4";
  const Kernels& k = *t.kernels;
  if (p.panel > 0 && (p.panel % k.width != 0 || p.panel > int64_t{kMaxNv} * k.width ||
                      k.max_mr[p.panel / k.width] == 0)) {
    return "the filters are packed in other panels";
  }
  if (params[kOnce] != 0 && params[kOnce] != 1) return "once: 0 or 1";
  // Room for one block and the transformed filters.
  constexpr double kMostWords = 1e10;
  const double products = kSchemeSizes[scheme_of(params[kTile])].products;
  const double words =
      products * static_cast<double>(p.c + 64) *
      (static_cast<double>(p.g * p.k + 64) + static_cast<double>(params[kTilesPerBlock]));
  if (words > kMostWords) return "tiles: the workspace is too large";
  return {};
}

// Fitted on Ice Lake, with layers of 64 to 512 channels on images of 7x7 to 112x112.
double tile_cost(const Problem& problem, const Target& t, const Params& params) {
  const Layout l = make_layout(problem, t, params);
  const Problem& p = l.p;
  const Kernels& k = *t.kernels;
  const int64_t nv = l.panel / l.width;
  const int64_t parts = ceil_div(l.block, k.max_mr[nv]);
  const int64_t mr = ceil_div(l.block, parts);
  const double products = static_cast<double>(l.products);
  const double c = static_cast<double>(p.c);
  const double groups = static_cast<double>(p.g);
  const double tiles = static_cast<double>(l.tiles);
  const double blocks = static_cast<double>(l.blocks);
  const double panels = static_cast<double>(l.panels);
  const double chunks = static_cast<double>(ceil_div(p.c, l.kc));
  const double c_vectors = static_cast<double>(ceil_div(p.c, l.width));
  const double k_vectors = static_cast<double>(ceil_div(p.k, l.width));
  // The products; and their sums, which are loaded and stored for each piece of the channels.
  double cost =
      blocks * static_cast<double>(parts) * panels * products *
      (c * tile_step_cycles(k, mr, nv) + chunks * (2.0 * static_cast<double>(mr * nv) + 20));
  // Transforms, mostly stores to the second-level cache.
  cost += tiles * products * (c_vectors + k_vectors) * 12;
  cost += (l.once ? 1.0 : blocks) * c * k_vectors * products * 14;
  // What does not stay in that cache between its uses.
  const double l2 = static_cast<double>(caches().l2);
  const double filters = static_cast<double>(l.panels * l.u_panel);
  const auto bytes = [&](double words) { return words * static_cast<double>(k.size); };
  if (l.once && bytes(filters) > l2 / 2) cost += filters * (4 + blocks * 0.25);
  if (bytes(static_cast<double>(l.v_words + l.m_words)) > l2 * 0.6) {
    cost += tiles * products * (c * (1 + panels) + panels * static_cast<double>(2 * l.panel));
  }
  return groups * cost;
}

// What is added up to a result is at most kGrowth times max |x| times the sum of |w|: by the
// absolute entries of the transforms, as tests/bilinear.py computes them. Each product is off by
// the roundings of its chain. The transforms add some; those of SFC pass by larger sums than they
// give, for which four times as many are counted.
double tile_error_bound(const Problem& p, const Params& params) {
  constexpr double kGrowth[kSchemes] = {16, 860.5, 80};
  constexpr double kRoundings[kSchemes] = {10, 24, 160};
  const Scheme scheme = scheme_of(params[kTile]);
  return kGrowth[scheme] * (static_cast<double>(p.c) + kRoundings[scheme]) * unit_roundoff(p);
}

std::vector<ParamSpec> tile_param_specs(const std::vector<int64_t>& tiles) {
  return {{"tile", "outputs of a tile's side; the numbers depend on it", tiles},
          {"tiles", "tiles per block", {4, 8, 12, 16, 24, 32, 48, 64, 96}},
          {"nv", "vectors of output features of the register tile, at most", {1, 2, 3, 4}},
          {"once", "filters are transformed 0: by every block, piece by piece, 1: once", {0, 1}}};
}

}  // namespace jaxwin
