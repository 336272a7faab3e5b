// SPDX-License-Identifier: Apache-2.0
//
// Convolutions of few input channels: kernels/few_channels.cuh.

#include <limits>

#include "cuda/building.h"

namespace jaxwin::cuda {
namespace {

enum Param { kBx, kBy, kBn, kTm, kTn, kBk };

constexpr int64_t kMostChannels = 16;

int64_t threads_of(const Params& v) { return v[kBx] * v[kBy] / v[kTm] * (v[kBn] / v[kTn]); }

// Filters, the piece of the input that a block sees, offsets.
int64_t shared_bytes(const Problem& p, const Params& v) {
  const std::array<int64_t, 3> pixels{1, v[kBy], v[kBx]};
  int64_t patch = p.c;
  for (size_t d = 0; d < 3; ++d) {
    patch *= (pixels[d] - 1) * p.stride[d] + (p.win[d] - 1) * p.rhs_dilation[d] + 1;
    if (patch > kMostShared) return patch;
  }
  return 4 * (2 * v[kBk] * v[kBn] + patch + 2 * p.reduction());
}

int64_t tiles_of(const Problem& p, const Params& v) {
  return p.n * p.g * p.out[0] * ceil_div(p.out[1], v[kBy]) * ceil_div(p.out[2], v[kBx]);
}

std::string check(const Problem& p, const Types&, const Params& v) {
  for (const int i : {kBx, kBy, kBn, kTm, kTn, kBk}) {
    if (!is_power_of_two(v[static_cast<size_t>(i)])) return "all must be powers of two";
  }
  constexpr int64_t kMostPixels = 256;
  constexpr int64_t kMostSide = 64;
  if (v[kBx] > kMostSide || v[kBy] > kMostSide || v[kBx] * v[kBy] > kMostPixels) {
    return "bx, by: at most 64, and 256 pixels";
  }
  if (v[kBn] < 16 || v[kBn] > 128) return "bn: 16 to 128";
  if ((v[kTn] != 4 && v[kTn] != 8) || v[kTm] > 8) return "tm, tn: tm at most 8, tn 4 or 8";
  if (v[kTm] > v[kBx] * v[kBy] || v[kTn] > v[kBn]) return "tm, tn: larger than the tile";
  const int64_t threads = threads_of(v);
  if (threads < 32 || threads > 512) return "bx, by, bn, tm, tn: 32 to 512 threads are needed";
  const int64_t across = std::min<int64_t>(v[kBn] / v[kTn], 8);
  if (v[kBx] * v[kBy] / v[kTm] % (32 / across) != 0) return "bx, by: too few pixels for a warp";
  if (v[kBk] < 8 || v[kBk] > 64) return "bk: 8 to 64";
  if (shared_bytes(p, v) > kMostShared) return "bx, by: too much shared memory";
  if (tiles_of(p, v) * ceil_div(p.k, v[kBn]) > kMostBlocks) return "bx, by: too many blocks";
  return {};
}

double cost(const Problem& p, const Types&, const Params& v) {
  const auto blocks = static_cast<double>(tiles_of(p, v) * ceil_div(p.k, v[kBn]));
  const int64_t part = v[kTm] * v[kTn];
  // As for im2win, whose threads compute the addresses of each element instead.
  const double rate = 128.0 * (part >= 64 ? 0.85 : part >= 32 ? 0.65 : 0.4);
  const double tile = static_cast<double>(v[kBx] * v[kBy] * v[kBn]) *
                          (static_cast<double>(p.reduction()) + 20) / rate +
                      1500;
  const double rounds = std::max(1.0, blocks / kProcessors);
  const double whole =
      rounds < 8 ? static_cast<double>(static_cast<int64_t>(rounds + 0.999)) : rounds;
  return whole * tile + 4000;
}

Params defaults(const Problem& p, const Types& t) {
  static constexpr int64_t kTiles[][5] = {{16, 8, 64, 8, 8}, {16, 8, 32, 8, 4}, {32, 4, 64, 8, 8},
                                          {8, 8, 64, 8, 4},  {8, 8, 32, 4, 4},  {64, 2, 64, 8, 8},
                                          {64, 1, 32, 4, 4}, {8, 4, 32, 4, 4},  {4, 4, 32, 2, 4},
                                          {2, 2, 32, 1, 4},  {4, 1, 32, 1, 4}};
  Params best{};
  double best_cost = std::numeric_limits<double>::infinity();
  for (const auto& tile : kTiles) {
    Params v{};
    std::copy(std::begin(tile), std::end(tile), v.begin());
    v[kBk] = 16;
    if (const double c = cost(p, t, v); c < best_cost && check(p, t, v).empty()) {
      best_cost = c;
      best = v;
    }
  }
  return best;
}

std::string rejects(const Problem& p, const Types& t) {
  if (p.dilated_input()) return "lhs_dilation";
  if (p.chunk_rows > 0) return "the reduction is chunked (weight gradient)";
  if (p.c > kMostChannels) return "more than 16 channels per group";
  std::string why = rejects_narrow(t);
  if (why.empty()) why = rejects_size(p);
  if (!why.empty()) return why;
  return check(p, t, defaults(p, t)).empty() ? "" : "the window covers too much of the input";
}

void build(const Problem& p, const Types& t, const Params& v, const Buffers& b, Program* program) {
  const bool side_by_side = aligned(b.w, 16) && p.w.k == 1 && p.k % 4 == 0 && p.w_first % 4 == 0 &&
                            multiples({{p.g, p.w.g},
                                       {p.c, p.w.c},
                                       {p.win[0], p.w.sp[0]},
                                       {p.win[1], p.w.sp[1]},
                                       {p.win[2], p.w.sp[2]}},
                                      4);
  const bool vector_y = p.y.k == 1 && p.k % 4 == 0 && aligned(b.y, 16) &&
                        multiples({{p.g, p.y.g},
                                   {p.n, p.y.n},
                                   {p.out[0], p.y.sp[0]},
                                   {p.out[1], p.y.sp[1]},
                                   {p.out[2], p.y.sp[2]}},
                                  4);
  const int64_t threads = threads_of(v);
  Launch l{};
  l.kernel = "jaxwin_few_channels";
  l.source = "few_channels";
  Options& o = l.options;
  set_types(t, b, true, &o);
  o.set("JAXWIN_BX", v[kBx]);
  o.set("JAXWIN_BY", v[kBy]);
  o.set("JAXWIN_BN", v[kBn]);
  o.set("JAXWIN_BK", v[kBk]);
  o.set("JAXWIN_TM", v[kTm]);
  o.set("JAXWIN_TN", v[kTn]);
  o.set("JAXWIN_THREADS", threads);
  // Registers: 128 for each of 512 threads, more for many sums.
  const int64_t resident = v[kTm] * v[kTn] >= 64 && threads < 256 ? 384 : 512;
  o.set("JAXWIN_BLOCKS", std::max<int64_t>(1, resident / threads));
  o.set("JAXWIN_B", side_by_side ? 0 : 1);
  o.set("JAXWIN_X_PLANES", p.x.c != 1 && p.x.sp[2] == 1 ? 1 : 0);
  o.set("JAXWIN_Y_VECTOR", vector_y ? 1 : 0);
  ConvArgs a = common_args(p, b);
  a.part[a.parts++] = whole(p);
  a.column_blocks = small(ceil_div(p.k, v[kBn]));
  l.blocks = tiles_of(p, v) * a.column_blocks;
  l.threads = static_cast<int>(threads);
  l.shared_bytes = shared_bytes(p, v);
  l.set_args(a);
  program->launches.push_back(l);
}

}  // namespace

std::vector<Algorithm> few_channels_algorithms() {
  Algorithm a{};
  a.name = "few_channels";
  a.summary = "first layers: the window walks over a piece of the input in shared memory";
  a.source = "im2win's order (arXiv 2306.14316) by a table of offsets";
  a.family = "canonical";
  a.files = "few_channels";
  a.dtypes = {"float32"};
  a.params = {{"bx", "columns of pixels of a block", {8, 16, 32, 64}},
              {"by", "rows of pixels of a block", {1, 2, 4, 8, 16}},
              {"bn", "features of a block", {32, 64, 128}},
              {"tm", "pixels of a thread", {4, 8}},
              {"tn", "features of a thread", {4, 8}},
              {"bk", "steps of the filter in shared memory at a time", {8, 16, 32}}};
  a.rejects = rejects;
  a.defaults = defaults;
  a.check = check;
  a.build = build;
  a.cost = cost;
  return {a};
}

}  // namespace jaxwin::cuda
