// SPDX-License-Identifier: Apache-2.0

#include "cuda/algorithms.h"

#include <algorithm>
#include <limits>

namespace jaxwin::cuda {
namespace {

// A device of some hundred multiprocessors, for heuristics alone: plans are made where there may be
// no device, and no result depends on them.
constexpr double kProcessors = 132;
// What every device from compute capability 8.0 on can give a block.
constexpr int64_t kMostShared = int64_t{99} << 10;
constexpr int64_t kMostBlocks = 0x7FFFFFFF;
constexpr int64_t kMostParts = 4096;
constexpr int64_t kMostPartialBytes = int64_t{1} << 40;
constexpr int64_t kPartialBytes = int64_t{64} << 20;  // about, of sums of chunks at a time

int32_t small(int64_t v) { return static_cast<int32_t>(v); }
bool is_power_of_two(int64_t v) { return v > 0 && (v & (v - 1)) == 0; }

// --- what all have in common --------------------------------------------------------------------

// One past the last element that is reached with these sizes and strides.
int64_t span(std::initializer_list<std::pair<int64_t, int64_t>> dimensions) {
  int64_t last = 0;
  for (const auto& [size, stride] : dimensions) last += (size - 1) * std::abs(stride);
  return last + 1;
}

std::string rejects_size(const Problem& p) {
  constexpr int64_t kMostElements = int64_t{1} << 31;
  constexpr int64_t kMostReach = 1 << 28;
  const int64_t x = span({{p.n, p.x.n},
                          {p.g, p.x.g},
                          {p.c, p.x.c},
                          {p.in[0], p.x.sp[0]},
                          {p.in[1], p.x.sp[1]},
                          {p.in[2], p.x.sp[2]}});
  const int64_t w = span({{p.g, p.w.g},
                          {p.k, p.w.k},
                          {p.c, p.w.c},
                          {p.win[0], p.w.sp[0]},
                          {p.win[1], p.w.sp[1]},
                          {p.win[2], p.w.sp[2]}});
  const int64_t y = span({{p.n, p.y.n},
                          {p.g, p.y.g},
                          {p.k, p.y.k},
                          {p.out[0], p.y.sp[0]},
                          {p.out[1], p.y.sp[1]},
                          {p.out[2], p.y.sp[2]}});
  if (std::max({x, w, y}) >= kMostElements) return "an operand has 2^31 elements or more";
  if (p.reduction() >= kMostReach) return "the reduction is too long";
  for (int d = 0; d < 3; ++d) {
    const int64_t reach = std::max({std::abs(p.pad[d]), p.win[d] * p.rhs_dilation[d],
                                    p.out[d] * p.stride[d], p.in[d] * p.lhs_dilation[d]});
    // The whole input is within reach of every output's position, as element offsets too.
    if (reach >= kMostReach || reach * std::abs(p.x.sp[d]) >= kMostElements / 2) {
      return "padding or dilation reaches too far";
    }
  }
  return {};
}

std::string rejects_narrow(const Types& t) {
  return t.operand == Type::kF32 ? std::string() : "float32 only";
}

int64_t parts_of(const Problem& p) {
  return residue_period(p, 0) * residue_period(p, 1) * residue_period(p, 2);
}

ConvArgs common_args(const Problem& p, const Buffers& b) {
  ConvArgs a{};
  a.x = b.x;
  a.w = b.w;
  a.bias = b.bias;
  a.residual = b.residual;
  a.y = b.y;
  a.n = small(p.n);
  a.g = small(p.g);
  a.c = small(p.c);
  a.k = small(p.k);
  a.x_n = small(p.x.n);
  a.x_g = small(p.x.g);
  a.x_c = small(p.x.c);
  a.w_g = small(p.w.g);
  a.w_k = small(p.w.k);
  a.w_c = small(p.w.c);
  a.y_n = small(p.y.n);
  a.y_g = small(p.y.g);
  a.y_k = small(p.y.k);
  for (int d = 0; d < 3; ++d) {
    a.in[d] = small(p.in[d]);
    a.x_sp[d] = small(p.x.sp[d]);
    a.lhs_dilation[d] = small(p.lhs_dilation[d]);
  }
  a.chunks = 1;
  return a;
}

// The whole problem as one part, inserted zeros included (`direct`).
Part whole(const Problem& p) {
  Part q{};
  for (int d = 0; d < 3; ++d) {
    q.out[d] = small(p.out[d]);
    q.win[d] = small(p.win[d]);
    q.stride[d] = small(p.stride[d]);
    q.pad[d] = small(p.pad[d]);
    q.dilation[d] = small(p.rhs_dilation[d]);
    q.w_sp[d] = small(p.w.sp[d]);
    q.y_sp[d] = small(p.y.sp[d]);
  }
  q.w_first = small(p.w_first);
  q.taps = small(p.window());
  q.rows = small(p.n * p.pixels());
  return q;
}

// The parts of a convolution: itself, or with lhs_dilation one per residue of the output position
// (arXiv 2209.03704, 2502.20493), in which no zeros are inserted.
std::vector<Part> parts(const Problem& p) {
  std::vector<Part> list;
  for (int64_t z = 0; z < residue_period(p, 0); ++z) {
    for (int64_t y = 0; y < residue_period(p, 1); ++y) {
      for (int64_t x = 0; x < residue_period(p, 2); ++x) {
        const std::array<int64_t, 3> at{z, y, x};
        Part q = whole(p);
        q.taps = 1;
        int64_t pixels = 1;
        for (int d = 0; d < 3; ++d) {
          const Residue s = residue(p, d, at[d]);
          q.out[d] = small(s.out);
          q.win[d] = small(s.win);
          q.stride[d] = small(s.stride);
          q.dilation[d] = small(s.dilation);
          q.pad[d] = small(s.pad);
          q.w_sp[d] = small(p.w.sp[d] * s.step);
          q.y_sp[d] = small(p.y.sp[d] * residue_period(p, d));
          q.w_first += s.win == 0 ? 0 : small(s.first * p.w.sp[d]);
          q.y_first += small(at[d] * p.y.sp[d]);
          q.taps *= small(s.win);
          pixels *= s.out;
        }
        if (pixels == 0) continue;
        if (q.taps == 0) q.win[0] = q.win[1] = q.win[2] = 1;
        q.rows = small(p.n * pixels);
        list.push_back(q);
      }
    }
  }
  return list;
}

// One launch for every kMaxParts parts; `blocks_of` tells how many blocks of rows a part has, and
// `finish` completes the launch.
template <typename Blocks, typename Finish>
void launch_parts(const std::vector<Part>& list, const ConvArgs& common, const Blocks& blocks_of,
                  const Finish& finish) {
  for (size_t first = 0; first < list.size(); first += kMaxParts) {
    ConvArgs a = common;
    int64_t blocks = 0;
    for (size_t i = first; i < std::min(list.size(), first + kMaxParts); ++i) {
      Part& q = a.part[a.parts++];
      q = list[i];
      q.first_block = small(blocks);
      blocks += blocks_of(q);
    }
    a.row_blocks = small(blocks);
    finish(a);
  }
}

bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Every stride that is used is a multiple of `lanes`.
bool multiples(std::initializer_list<std::pair<int64_t, int64_t>> sizes_and_strides,
               int64_t lanes) {
  for (const auto& [size, stride] : sizes_and_strides) {
    if (size > 1 && stride % lanes != 0) return false;
  }
  return true;
}

int dims(const Problem& p) {
  const auto trivial = [&](int d) {
    return p.in[d] == 1 && p.out[d] == 1 && p.win[d] == 1 && p.pad[d] == 0;
  };
  if (!trivial(0)) return 3;
  return trivial(1) ? 1 : 2;
}

// `last`: the launch writes the result, not partial sums.
void set_types(const Types& t, const Buffers& b, bool last, Options* o) {
  o->set("JAXWIN_TYPE", static_cast<int>(t.operand));
  o->set("JAXWIN_RESULT_F32", t.wide_result ? 1 : 0);
  o->set("JAXWIN_EPILOGUE", last && b.has_epilogue() ? 1 : 0);
  o->set("JAXWIN_ACTIVATION", last ? static_cast<int>(b.activation) : 0);
}

// --- chunked reductions -------------------------------------------------------------------------

struct Chunks {
  int64_t length;    // elements of the reduction
  int64_t count;     // 1: no partial sums are needed
  int64_t capacity;  // chunks of one launch
  int64_t floats;    // of one chunk's partial sums
  int64_t pitch;
};

// `at_a_time`: chunks of one launch; 0: as many as kPartialBytes hold.
Chunks chunks_of(const Problem& p, int64_t at_a_time = 0) {
  Chunks c{};
  if (p.chunk_rows == 0) {
    c.length = p.reduction();
    c.count = 1;
    return c;
  }
  const int64_t rows = p.c * p.win[0] * p.win[1];
  const int64_t chunk_rows = std::min(p.chunk_rows, rows);
  c.length = chunk_rows * p.win[2];
  c.count = ceil_div(rows, chunk_rows);
  c.pitch = p.k > 1 ? round_up(p.k, 4) : 1;
  c.floats = p.g * p.n * p.pixels() * c.pitch;
  const int64_t wanted =
      at_a_time > 0 ? at_a_time : kPartialBytes / 4 / std::max<int64_t>(c.floats, 1);
  c.capacity = std::clamp<int64_t>(wanted, 1, c.count);
  return c;
}

int64_t partial_bytes(const Chunks& c) {
  if (c.count == 1) return 0;
  return (c.capacity + (c.capacity < c.count ? 1 : 0)) * c.floats * 4;
}

constexpr int kHelperThreads = 256;

// `launch(args, chunks)` makes the launch for so many chunks; sums follow each.
template <typename LaunchChunks>
void launch_chunked(const Problem& p, const Types& t, const Buffers& b, const Chunks& c,
                    const ConvArgs& whole_args, float* partial, bool images_first,
                    const LaunchChunks& launch, Program* program) {
  for (int64_t first = 0; first < c.count; first += c.capacity) {
    ConvArgs a = whole_args;
    a.y = partial;
    a.k_pitch = small(c.pitch);
    a.chunk_length = small(c.length);
    a.first_chunk = small(first);
    a.chunks = small(std::min(c.capacity, c.count - first));
    launch(a);
    Launch sum{};
    sum.kernel = "jaxwin_sum";
    sum.source = "helpers";
    set_types(t, b, true, &sum.options);
    sum.options.set("JAXWIN_SUM", 1);
    sum.options.set("JAXWIN_THREADS", kHelperThreads);
    sum.options.set("JAXWIN_IMAGES_FIRST", images_first ? 1 : 0);
    sum.blocks = ceil_div(p.g * p.n * p.pixels() * p.k, kHelperThreads);
    sum.threads = kHelperThreads;
    SumArgs s{};
    s.partial = partial;
    s.conv = a;
    s.conv.y = b.y;
    s.capacity = small(c.capacity);
    s.first = first == 0 ? 1 : 0;
    s.last = first + c.capacity >= c.count ? 1 : 0;
    sum.set_args(s);
    program->launches.push_back(sum);
  }
}

// --- filters in a regular order -----------------------------------------------------------------

// The same problem on a filter packed as [g][x][y][z][c][k], k padded to `pitch`.
Problem packed_problem(const Problem& p, int64_t pitch) {
  Problem q = p;
  q.w_first = 0;
  q.w.k = 1;
  q.w.c = pitch;
  q.w.sp[0] = p.c * q.w.c;
  q.w.sp[1] = p.win[0] * q.w.sp[0];
  q.w.sp[2] = p.win[1] * q.w.sp[1];
  q.w.g = p.win[2] * q.w.sp[2];
  return q;
}

void launch_pack(const Problem& p, const Types& t, const Buffers& b, int64_t pitch, void* dst,
                 Program* program) {
  Launch l{};
  l.kernel = "jaxwin_pack";
  l.source = "helpers";
  l.options.set("JAXWIN_TYPE", static_cast<int>(t.operand));
  l.options.set("JAXWIN_PACK", 1);
  l.options.set("JAXWIN_THREADS", kHelperThreads);
  l.threads = kHelperThreads;
  l.blocks = ceil_div(p.g * p.window() * p.c * pitch, kHelperThreads);
  PackArgs a{};
  a.w = static_cast<const char*>(b.w) + p.w_first * type_bytes(t.operand);
  a.dst = dst;
  a.g = small(p.g);
  a.c = small(p.c);
  a.k = small(p.k);
  a.k_pitch = small(pitch);
  a.w_g = small(p.w.g);
  a.w_k = small(p.w.k);
  a.w_c = small(p.w.c);
  for (int d = 0; d < 3; ++d) {
    a.win[d] = small(p.win[d]);
    a.w_sp[d] = small(p.w.sp[d]);
  }
  l.set_args(a);
  program->launches.push_back(l);
}

// Takes `bytes` of the workspace, on a boundary that suits every copy.
void* take(const Buffers& b, int64_t bytes, Program* program) {
  constexpr int64_t kBoundary = 256;
  const int64_t at = round_up(program->workspace_bytes, kBoundary);
  program->workspace_bytes = at + bytes;
  return b.workspace == nullptr ? nullptr : static_cast<char*>(b.workspace) + at;
}

// --- matrix products ----------------------------------------------------------------------------

// kUnroll: not for tensor cores; kChunks: where it may be needed.
enum GemmParam { kBm, kBn, kBk, kTm, kTn, kStages, kPack, kUnroll, kChunks };

struct GemmShape {
  bool mma;
  int64_t bm, bn, bk, tm, tn, stages, threads, lanes;
};

GemmShape gemm_shape(const Types& t, const Params& v, bool mma) {
  GemmShape s{
      mma, v[kBm], v[kBn], v[kBk], v[kTm], v[kTn], v[kStages], 0, 16 / type_bytes(t.operand)};
  if (s.tm > 0 && s.tn > 0) s.threads = (s.bm / s.tm) * (s.bn / s.tn) * (mma ? 32 : 1);
  return s;
}

// The layout of A in shared memory (JAXWIN_A), and whether rows run over images first.
struct Sides {
  int a, b;
  bool images_first, vector_y;
};

Sides sides(const Problem& p, const GemmShape& s, const Types& t, const Buffers& b, bool packed,
            const std::vector<Part>& list) {
  Sides r{};
  const int64_t v = s.lanes;
  const bool spatial = multiples(
      {{p.g, p.x.g}, {p.in[0], p.x.sp[0]}, {p.in[1], p.x.sp[1]}, {p.in[2], p.x.sp[2]}}, v);
  r.images_first = p.x.n == 1 && p.n > 1;
  r.a = 2;
  if (aligned(b.x, 16) && spatial) {
    if (p.chunk_rows == 0 && p.x.c == 1 && p.c % v == 0 && multiples({{p.n, p.x.n}}, v)) {
      r.a = 0;
    } else if (p.x.n == 1 && p.n % v == 0 && multiples({{p.c, p.x.c}}, v)) {
      r.a = 1;
    }
  }
  const bool side_by_side = aligned(b.w, 16) && p.w.k == 1 && p.k % v == 0 && p.w_first % v == 0 &&
                            multiples({{p.g, p.w.g},
                                       {p.c, p.w.c},
                                       {p.win[0], p.w.sp[0]},
                                       {p.win[1], p.w.sp[1]},
                                       {p.win[2], p.w.sp[2]}},
                                      v);
  r.b = packed || side_by_side ? 0 : 1;
  const int64_t group = s.mma ? 2 : 4;
  const int64_t result_bytes = t.wide_result ? 4 : type_bytes(t.operand);
  r.vector_y = p.y.k == 1 && p.k % group == 0 && aligned(b.y, group * result_bytes) &&
               multiples({{p.g, p.y.g},
                          {p.n, p.y.n},
                          {p.out[0], p.y.sp[0]},
                          {p.out[1], p.y.sp[1]},
                          {p.out[2], p.y.sp[2]}},
                         group);
  for (const Part& q : list) r.vector_y = r.vector_y && q.y_first % group == 0;
  return r;
}

int64_t gemm_shared_bytes(const Types& t, const GemmShape& s, int a_side) {
  const int64_t walk = 4 * (2 * s.bk * 5 + s.bk * 4 + 4 + s.bk);  // struct Walk
  const int64_t ld_a = a_side == 0 ? s.bk + s.lanes : s.bm + (s.mma ? 8 : 0);
  const int64_t size_a = (a_side == 0 ? s.bm : s.bk) * ld_a;
  const int64_t size_b = s.bk * (s.bn + (s.mma ? 8 : 0));
  return round_up(walk, 128) + s.stages * (size_a + size_b) * type_bytes(t.operand);
}

std::string gemm_check(const Problem& p, const Types& t, const Params& v, bool mma) {
  const GemmShape s = gemm_shape(t, v, mma);
  for (const int64_t size : {s.bm, s.bn, s.bk, s.tm, s.tn}) {
    if (!is_power_of_two(size)) return "bm, bn, bk, tm, tn: must be powers of two";
  }
  if (s.bm > 256 || s.bn > 256 || s.tm > s.bm || s.tn > s.bn) return "bm, bn, tm, tn: no such tile";
  if (s.stages < 2 || s.stages > 8) return "stages: 2 to 8";
  if (s.threads < 32 || s.threads > 512) return "bm, bn, tm, tn: 32 to 512 threads are needed";
  if (s.bk > std::min<int64_t>(s.threads, 64)) return "bk: at most 64, and one thread for each";
  if (mma) {
    if (s.tm < 16 || s.tn < 16 || s.bk < 16) return "tm, tn, bk: at least 16";
    if (s.tm * s.tn > int64_t{64} * 64) return "tm, tn: too many sums for a warp's registers";
  } else {
    if (s.tm < 4 || s.tn < 4 || s.bk < 4) return "tm, tn, bk: at least 4";
    if (v[kUnroll] < 1 || v[kUnroll] > 32) return "unroll: 1 to 32";
    if (s.tm > 8 || s.tn > 8) return "tm, tn: too many sums for a thread's registers";
    const int64_t across = std::min<int64_t>(s.bn / s.tn, 8);
    if ((s.bm / s.tm) % (32 / across) != 0) return "bm: too few rows for a warp";
  }
  if (v[kPack] != 0 && v[kPack] != 1) return "pack: 0 or 1";
  if (v[kChunks] < 0) return "chunks: must not be negative";
  if (partial_bytes(chunks_of(p, v[kChunks])) > kMostPartialBytes) return "chunks: too many sums";
  for (int side = 0; side < 3; ++side) {
    if (gemm_shared_bytes(t, s, side) > kMostShared) return "stages: too much shared memory";
  }
  const int64_t blocks = (ceil_div(p.n * p.pixels(), s.bm) + std::min(parts_of(p), p.pixels())) *
                         ceil_div(p.k, s.bn) * p.g * chunks_of(p, v[kChunks]).capacity;
  if (blocks > kMostBlocks) return "bm, bn: too many blocks";
  return {};
}

double gemm_cost(const Problem& p, const Types& t, const Params& v, bool mma) {
  const GemmShape s = gemm_shape(t, v, mma);
  const double chunks = static_cast<double>(std::max<int64_t>(1, chunks_of(p).count));
  const double tiles =
      static_cast<double>(ceil_div(p.n * p.pixels(), s.bm) * ceil_div(p.k, s.bn) * p.g) * chunks;
  const double steps = p.flops() / 2 / static_cast<double>(p.n * p.g * p.k * p.pixels()) / chunks;
  // 128 multiply-adds per cycle; small tiles are held up by shared memory. Tensor cores: eight
  // (tf32) or sixteen times that, held up by more.
  double rate = 128.0 * (s.tm * s.tn >= 64 ? 0.8 : s.tm * s.tn >= 32 ? 0.6 : 0.4);
  if (mma) rate = (t.operand == Type::kF32 ? 1024.0 : 2048.0) * (s.tm * s.tn >= 2048 ? 0.5 : 0.3);
  const double tile = static_cast<double>(s.bm * s.bn) * (steps + 40) / rate + 1500;
  // Blocks run side by side on a processor, but share its units: whole rounds of blocks count.
  const double rounds = std::max(1.0, tiles / kProcessors);
  const double whole_rounds =
      rounds < 8 ? static_cast<double>(static_cast<int64_t>(rounds + 0.999)) : rounds;
  double total = whole_rounds * tile + 4000;
  if (v[kPack] != 0) total += 3000 + static_cast<double>(p.g * p.k * p.reduction()) / 500;
  if (chunks > 1) total += 4000 + chunks * static_cast<double>(p.g * p.n * p.pixels() * p.k) / 300;
  return total;
}

Params gemm_defaults(const Problem& p, const Types& t, bool mma) {
  // Tiles with the shape of a thread's (or warp's) part, best first where all else is equal.
  static constexpr int64_t kTiles[][5] = {{128, 128, 8, 8, 16}, {128, 64, 8, 8, 16},
                                          {64, 64, 8, 4, 16},   {128, 32, 8, 4, 16},
                                          {64, 32, 4, 4, 16},   {32, 32, 4, 4, 16}};
  static constexpr int64_t kMmaTiles[][5] = {{128, 128, 64, 32, 32}, {128, 64, 32, 32, 32},
                                             {64, 64, 32, 32, 32},   {128, 32, 32, 16, 32},
                                             {64, 32, 32, 16, 32},   {32, 32, 16, 16, 32}};
  // Packing costs a launch; without it features that are not neighbours come one by one.
  const bool apart = p.w.k != 1 && p.k > 1;
  const bool odd = p.k % (16 / type_bytes(t.operand)) != 0 && p.k > 8;
  const int64_t pack = p.chunk_rows == 0 && (apart || odd) ? 1 : 0;
  Params best{};
  double best_cost = std::numeric_limits<double>::infinity();
  for (const auto& tile : mma ? kMmaTiles : kTiles) {
    Params v{};
    v[kBm] = tile[0];
    v[kBn] = tile[1];
    v[kTm] = tile[2];
    v[kTn] = tile[3];
    v[kBk] = tile[4];
    v[kStages] = 3;
    v[kPack] = pack;
    v[kUnroll] = mma ? 0 : 1;
    const double cost = gemm_cost(p, t, v, mma);
    if (cost < best_cost && gemm_check(p, t, v, mma).empty()) {
      best_cost = cost;
      best = v;
    }
  }
  return best;
}

void gemm_build(const Problem& original, const Types& t, const Params& v, const Buffers& given,
                bool mma, Program* program) {
  const GemmShape s = gemm_shape(t, v, mma);
  Problem p = original;
  Buffers b = given;
  const bool packed = v[kPack] != 0;
  if (packed) {
    const int64_t pitch = round_up(p.k, s.lanes);
    void* const dst = take(b, p.g * p.window() * p.c * pitch * type_bytes(t.operand), program);
    launch_pack(p, t, b, pitch, dst, program);
    p = packed_problem(p, pitch);
    b.w = dst;
  }
  const Chunks c = chunks_of(p, v[kChunks]);
  const bool chunked = p.chunk_rows > 0;
  const bool partial = c.count > 1;
  const std::vector<Part> list = chunked ? std::vector<Part>{whole(p)} : parts(p);
  const Sides side = sides(p, s, t, b, packed, list);

  const auto launch = [&](ConvArgs a) {
    Launch l{};
    l.kernel = "jaxwin_gemm";
    l.source = "gemm";
    Options& o = l.options;
    set_types(t, b, !partial, &o);
    o.set("JAXWIN_MMA", mma ? 1 : 0);
    o.set("JAXWIN_BM", s.bm);
    o.set("JAXWIN_BN", s.bn);
    o.set("JAXWIN_BK", s.bk);
    o.set("JAXWIN_TM", s.tm);
    o.set("JAXWIN_TN", s.tn);
    o.set("JAXWIN_STAGES", s.stages);
    o.set("JAXWIN_THREADS", s.threads);
    const int64_t sums = mma ? s.tm * s.tn / 32 : s.tm * s.tn;
    // Registers: 128 for each of 512 threads, more for few large blocks.
    const int64_t resident = sums > 64 ? 256 : sums == 64 && s.threads < 256 ? 384 : 512;
    o.set("JAXWIN_BLOCKS", std::max<int64_t>(1, resident / s.threads));
    o.set("JAXWIN_UNROLL", mma ? 1 : v[kUnroll]);
    o.set("JAXWIN_A", side.a);
    o.set("JAXWIN_B", side.b);
    o.set("JAXWIN_CHUNKED", chunked ? 1 : 0);
    o.set("JAXWIN_PARTIAL", partial ? 1 : 0);
    o.set("JAXWIN_IMAGES_FIRST", side.images_first ? 1 : 0);
    o.set("JAXWIN_DIMS", dims(original));
    o.set("JAXWIN_Y_VECTOR", side.vector_y && !partial ? 1 : 0);
    a.column_blocks = small(ceil_div(p.k, s.bn));
    l.blocks = int64_t{a.row_blocks} * a.column_blocks * p.g * a.chunks;
    l.threads = static_cast<int>(s.threads);
    l.shared_bytes = gemm_shared_bytes(t, s, side.a);
    l.set_args(a);
    program->launches.push_back(l);
  };
  const auto blocks_of = [&](const Part& q) { return ceil_div(q.rows, s.bm); };
  ConvArgs a = common_args(p, b);
  if (!partial) {
    a.chunk_length = small(c.length);
    launch_parts(list, a, blocks_of, launch);
    return;
  }
  a.part[a.parts++] = list[0];
  a.row_blocks = small(blocks_of(list[0]));
  auto* const sums = static_cast<float*>(take(b, partial_bytes(c), program));
  launch_chunked(p, t, b, c, a, sums, side.images_first, launch, program);
}

std::vector<ParamSpec> gemm_params(bool mma) {
  const std::vector<int64_t> part =
      mma ? std::vector<int64_t>{16, 32, 64} : std::vector<int64_t>{4, 8};
  std::vector<ParamSpec> params{
      {"bm", "rows (pixels) of a block's tile", {32, 64, 128}},
      {"bn", "columns (features) of a block's tile", {32, 64, 128}},
      {"bk", "steps of the reduction in shared memory at a time",
       mma ? std::vector<int64_t>{16, 32, 64} : std::vector<int64_t>{8, 16, 32}},
      {"tm", mma ? "rows of a warp's part of it" : "rows of a thread's part of it", part},
      {"tn", "columns of the same part", part},
      {"stages", "such pieces under way at a time", {2, 3, 4}},
      {"pack", "1: the filter is first copied into the order of the reduction", {0, 1}}};
  if (!mma) params.push_back({"unroll", "pairs of steps that are unrolled", {1, 2, 8}});
  return params;
}

std::string im2win_rejects(const Problem& p, const Types& t) {
  if (p.dilated_input()) return "lhs_dilation";
  if (p.chunk_rows > 0) return "the reduction is chunked (weight gradient)";
  std::string why = rejects_narrow(t);
  return why.empty() ? rejects_size(p) : why;
}

std::string segregated_rejects(const Problem& p, const Types& t) {
  if (!p.dilated_input()) return "no lhs_dilation";
  if (p.chunk_rows > 0) return "the reduction is chunked (weight gradient)";
  if (parts_of(p) > kMostParts) return "more than 4096 residues";
  std::string why = rejects_narrow(t);
  return why.empty() ? rejects_size(p) : why;
}

std::string weight_grad_rejects(const Problem& p, const Types& t) {
  if (p.chunk_rows == 0) return "the reduction is not chunked (no weight gradient)";
  if (p.dilated_input()) return "lhs_dilation in a weight gradient";
  std::string why = rejects_narrow(t);
  return why.empty() ? rejects_size(p) : why;
}

std::string tensor_rejects(const Problem& p, const Types&) {
  if (p.chunk_rows > 0 && p.dilated_input()) return "lhs_dilation in a weight gradient";
  if (parts_of(p) > kMostParts) return "more than 4096 residues";
  return rejects_size(p);
}

template <bool kMma>
Algorithm gemm_algorithm(const char* name, const char* summary, const char* source,
                         std::string (*rejects)(const Problem&, const Types&)) {
  Algorithm a{};
  a.name = name;
  a.summary = summary;
  a.source = source;
  a.family = kMma ? "tensor" : "canonical";
  a.dtypes = {"float32"};
  if (kMma) a.dtypes = {"float32", "bfloat16", "float16"};
  a.params = gemm_params(kMma);
  a.rejects = rejects;
  a.defaults = [](const Problem& p, const Types& t) { return gemm_defaults(p, t, kMma); };
  a.check = [](const Problem& p, const Types& t, const Params& v) {
    return gemm_check(p, t, v, kMma);
  };
  a.build = [](const Problem& p, const Types& t, const Params& v, const Buffers& b, Program* out) {
    gemm_build(p, t, v, b, kMma, out);
  };
  a.cost = [](const Problem& p, const Types& t, const Params& v) {
    return gemm_cost(p, t, v, kMma);
  };
  return a;
}

// --- im2win, materialised -----------------------------------------------------------------------

int64_t window_columns(const Problem& p) {
  return (p.out[2] - 1) * p.stride[2] + (p.win[2] - 1) * p.rhs_dilation[2] + 1;
}

// The problem that is left when the windows are runs of memory: channels are (y, z, c).
Problem windowed_problem(const Problem& p) {
  const int64_t pitch = round_up(p.k, 4);
  Problem q = packed_problem(p, pitch);
  q.c = p.win[1] * p.win[0] * p.c;
  q.in = {p.out[0], p.out[1], window_columns(p)};
  q.win = {1, 1, p.win[2]};
  q.stride = {1, 1, p.stride[2]};
  q.pad = {0, 0, 0};
  q.rhs_dilation = {1, 1, p.rhs_dilation[2]};
  q.x.c = 1;
  q.x.sp[2] = q.c;
  q.x.sp[1] = q.in[2] * q.x.sp[2];
  q.x.sp[0] = q.in[1] * q.x.sp[1];
  q.x.g = q.in[0] * q.x.sp[0];
  q.x.n = p.g * q.x.g;
  return q;
}

Params full_params(const Params& v) {
  Params r = v;
  r[kPack] = 0;
  return r;
}

std::string full_rejects(const Problem& p, const Types& t) {
  const std::string why = im2win_rejects(p, t);
  return why.empty() ? rejects_size(windowed_problem(p)) : why;
}

std::string full_check(const Problem& p, const Types& t, const Params& v) {
  if (v[kPack] != 1) return "pack: must be 1";
  return gemm_check(windowed_problem(p), t, full_params(v), false);
}

void full_build(const Problem& p, const Types& t, const Params& v, const Buffers& given,
                Program* program) {
  const Problem q = windowed_problem(p);
  Buffers b = given;
  void* const filter = take(b, q.g * q.w.g * 4, program);
  void* const windows = take(b, q.n * q.x.n * 4, program);
  launch_pack(p, t, given, round_up(p.k, 4), filter, program);
  Launch l{};
  l.kernel = "jaxwin_window";
  l.source = "helpers";
  l.options.set("JAXWIN_WINDOW", 1);
  l.options.set("JAXWIN_THREADS", kHelperThreads);
  l.threads = kHelperThreads;
  l.blocks = ceil_div(q.n * q.x.n, kHelperThreads);
  WindowArgs a{};
  a.x = b.x;
  a.dst = windows;
  a.n = small(p.n);
  a.g = small(p.g);
  a.c = small(p.c);
  a.columns = small(q.in[2]);
  a.x_n = small(p.x.n);
  a.x_g = small(p.x.g);
  a.x_c = small(p.x.c);
  for (int d = 0; d < 3; ++d) {
    a.in[d] = small(p.in[d]);
    a.out[d] = small(p.out[d]);
    a.win[d] = small(p.win[d]);
    a.stride[d] = small(p.stride[d]);
    a.pad[d] = small(p.pad[d]);
    a.dilation[d] = small(p.rhs_dilation[d]);
    a.x_sp[d] = small(p.x.sp[d]);
  }
  l.set_args(a);
  program->launches.push_back(l);
  b.x = windows;
  b.w = filter;
  gemm_build(q, t, full_params(v), b, false, program);
}

// --- lanes --------------------------------------------------------------------------------------

// Of a thread of `depthwise` for the window; JAXWIN_WINDOW_X is 0 beyond.
constexpr int64_t kWindowRegisters = 64;

enum LanesParam { kStrip, kVector, kThreads };

bool lanes_along_x(const Problem& p) {
  // Where pixels are neighbours in memory, and channels are not.
  const bool channels = p.c == 1 && p.k == 1 ? p.x.g == 1 : p.y.k == 1 || p.y.g == 1;
  return !channels && p.out[2] > 1 && p.y.sp[2] == 1;
}

bool depthwise_vector(const Problem& p, const Buffers& b, int64_t v) {
  return v == 1 || (p.x.g == 1 && p.y.g == 1 && p.w.g == 1 && p.g % v == 0 && p.w_first % v == 0 &&
                    aligned(b.x, 4 * v) && aligned(b.w, 4 * v) && aligned(b.y, 4 * v) &&
                    multiples({{p.n, p.x.n},
                               {p.in[0], p.x.sp[0]},
                               {p.in[1], p.x.sp[1]},
                               {p.in[2], p.x.sp[2]},
                               {p.n, p.y.n},
                               {p.out[0], p.y.sp[0]},
                               {p.out[1], p.y.sp[1]},
                               {p.out[2], p.y.sp[2]},
                               {p.win[0], p.w.sp[0]},
                               {p.win[1], p.w.sp[1]},
                               {p.win[2], p.w.sp[2]}},
                              v));
}

bool grouped_vector(const Problem& p, const Buffers& b, int64_t v) {
  return v == 1 || (p.x.c == 1 && p.c % v == 0 && aligned(b.x, 4 * v) &&
                    multiples({{p.n, p.x.n},
                               {p.g, p.x.g},
                               {p.in[0], p.x.sp[0]},
                               {p.in[1], p.x.sp[1]},
                               {p.in[2], p.x.sp[2]}},
                              v));
}

std::vector<ParamSpec> lanes_params() {
  return {{"strip", "pixels along x of a thread", {1, 2, 4, 8}},
          {"vector", "neighbouring channels that are loaded at once", {1, 2, 4}},
          {"threads", "threads of a block", {64, 128, 256}}};
}

template <bool kDepthwise>
std::string lanes_rejects(const Problem& p, const Types& t) {
  if (p.chunk_rows > 0) return "the reduction is chunked (weight gradient)";
  if (kDepthwise && (p.c != 1 || p.k != 1)) return "more than one channel or feature per group";
  if (!kDepthwise && p.c * p.window() > 65536) return "too many channels per group";
  if (parts_of(p) > kMostParts) return "more than 4096 residues";
  std::string why = rejects_narrow(t);
  return why.empty() ? rejects_size(p) : why;
}

template <bool kDepthwise>
std::string lanes_check(const Problem& p, const Types&, const Params& v) {
  if (!is_power_of_two(v[kStrip]) || v[kStrip] > 16) return "strip: 1, 2, 4, 8 or 16";
  if (v[kVector] != 1 && v[kVector] != 2 && v[kVector] != 4) return "vector: 1, 2 or 4";
  if (!is_power_of_two(v[kThreads]) || v[kThreads] < 32 || v[kThreads] > 1024) {
    return "threads: a power of two from 32 to 1024";
  }
  const bool fits =
      kDepthwise ? depthwise_vector(p, {}, v[kVector]) : grouped_vector(p, {}, v[kVector]);
  if (!fits) return "vector: channels do not lie so";
  if (v[kStrip] > 1 && lanes_along_x(p)) return "strip: neighbouring threads have the pixels";
  if (v[kStrip] * v[kVector] > 32) return "strip, vector: too many sums for a thread's registers";
  return {};
}

template <bool kDepthwise>
Params lanes_defaults(const Problem& p, const Types&) {
  Params v{};
  v[kVector] = 1;
  // A window that stays in registers saves more than wide loads do.
  const bool small_window = kDepthwise && p.window() <= kWindowRegisters;
  for (const int64_t vector : {4, 2}) {
    if (small_window && p.window() * vector > kWindowRegisters) continue;
    const bool fits = kDepthwise ? depthwise_vector(p, {}, vector) : grouped_vector(p, {}, vector);
    if (fits) {
      v[kVector] = vector;
      break;
    }
  }
  v[kStrip] = lanes_along_x(p) ? 1 : p.out[2] >= 4 ? 4 : 1;
  v[kThreads] = 128;
  return v;
}

template <bool kDepthwise>
void lanes_build(const Problem& p, const Types& t, const Params& v, const Buffers& b,
                 Program* program) {
  const std::vector<Part> list = parts(p);
  int64_t vector = v[kVector];
  if (!(kDepthwise ? depthwise_vector(p, b, vector) : grouped_vector(p, b, vector))) vector = 1;
  for (const Part& q : list) {
    if (kDepthwise && (q.y_first % vector != 0 || q.w_first % vector != 0)) vector = 1;
  }
  const int64_t lanes = kDepthwise ? p.g / vector : p.g * p.k;
  const auto blocks_of = [&](const Part& q) {
    const int64_t strips = p.n * q.out[0] * q.out[1] * ceil_div(q.out[2], v[kStrip]);
    return ceil_div(strips * lanes, v[kThreads]);
  };
  launch_parts(list, common_args(p, b), blocks_of, [&](const ConvArgs& a) {
    Launch l{};
    l.kernel = kDepthwise ? "jaxwin_depthwise" : "jaxwin_grouped";
    l.source = "lanes";
    Options& o = l.options;
    set_types(t, b, true, &o);
    o.set(kDepthwise ? "JAXWIN_DEPTHWISE" : "JAXWIN_GROUPED", 1);
    o.set("JAXWIN_THREADS", v[kThreads]);
    o.set("JAXWIN_STRIP", v[kStrip]);
    o.set("JAXWIN_VECTOR", vector);
    o.set("JAXWIN_LANES_X", lanes_along_x(p) ? 1 : 0);
    if (kDepthwise) {
      // The window as constants where that unrolls to a reasonable size.
      const Part& q = a.part[0];
      const bool known =
          list.size() == 1 && q.taps > 0 && q.taps * vector <= kWindowRegisters &&
          (v[kStrip] - 1) * q.stride[2] + int64_t{q.win[2] - 1} * q.dilation[2] <= 128;
      o.set("JAXWIN_WINDOW_X", known ? q.win[2] : 0);
      o.set("JAXWIN_WINDOW_Y", known ? q.win[1] : 0);
      o.set("JAXWIN_WINDOW_Z", known ? q.win[0] : 0);
      o.set("JAXWIN_STRIDE_X", known ? q.stride[2] : 0);
      o.set("JAXWIN_DILATION_X", known ? q.dilation[2] : 0);
    }
    l.blocks = a.row_blocks;
    l.threads = static_cast<int>(v[kThreads]);
    l.set_args(a);
    program->launches.push_back(l);
  });
}

template <bool kDepthwise>
double lanes_cost(const Problem& p, const Types&, const Params& v) {
  // Loads through the first-level cache: 32 threads' worth per cycle where they are neighbours.
  const double steps = p.flops() / 2;
  const double loads =
      kDepthwise
          ? steps * 0.6
          : steps * (1.0 / static_cast<double>(v[kVector]) + 1.0 / static_cast<double>(v[kStrip]));
  const double moved =
      static_cast<double>(p.n * p.g * (p.c * p.in[0] * p.in[1] * p.in[2] + p.k * p.pixels()));
  // A chain is as long as its reduction, whatever runs beside it.
  const double chain = static_cast<double>(p.reduction()) * 6;
  return std::max({loads / 32 / kProcessors, moved * 4 / 18 / kProcessors, chain}) + 4000;
}

// --- one result per thread ----------------------------------------------------------------------

constexpr int64_t kDirectThreads = 128;

std::string direct_rejects(const Problem& p, const Types& t) {
  const std::string why = rejects_narrow(t);
  return why.empty() ? rejects_size(p) : why;
}

std::string direct_check(const Problem& p, const Types&, const Params&) {
  const int64_t blocks = ceil_div(p.n * p.pixels() * p.g * p.k, kDirectThreads);
  return blocks * chunks_of(p).capacity > kMostBlocks ? "too many blocks" : "";
}

void direct_build(const Problem& p, const Types& t, const Params&, const Buffers& b,
                  Program* program) {
  const Chunks c = chunks_of(p);
  const bool partial = c.count > 1;
  ConvArgs a = common_args(p, b);
  a.part[a.parts++] = whole(p);
  a.row_blocks = small(ceil_div(p.n * p.pixels() * p.g * p.k, kDirectThreads));
  a.chunk_length = small(c.length);
  const auto launch = [&](const ConvArgs& args) {
    Launch l{};
    l.kernel = "jaxwin_direct";
    l.source = "lanes";
    Options& o = l.options;
    set_types(t, b, !partial, &o);
    o.set("JAXWIN_DIRECT", 1);
    o.set("JAXWIN_THREADS", kDirectThreads);
    o.set("JAXWIN_STRIP", 1);
    o.set("JAXWIN_VECTOR", 1);
    o.set("JAXWIN_LANES_X", lanes_along_x(p) ? 1 : 0);
    o.set("JAXWIN_CHUNKED", p.chunk_rows > 0 ? 1 : 0);
    o.set("JAXWIN_PARTIAL", partial ? 1 : 0);
    l.blocks = int64_t{args.row_blocks} * args.chunks;
    l.threads = kDirectThreads;
    l.set_args(args);
    program->launches.push_back(l);
  };
  if (!partial) {
    launch(a);
    return;
  }
  auto* const sums = static_cast<float*>(take(b, partial_bytes(c), program));
  launch_chunked(p, t, b, c, a, sums, false, launch, program);
}

double direct_cost(const Problem& p, const Types&, const Params&) {
  double taps = 1;
  for (int d = 0; d < 3; ++d) taps *= static_cast<double>(p.lhs_dilation[d]);
  const double loads = p.flops() * 1.5 * (1 + (taps - 1) / 4);
  const double results = static_cast<double>(p.n * p.g * p.k * p.pixels());
  const double moved = static_cast<double>(p.n * p.g * p.c * p.in[0] * p.in[1] * p.in[2]) + results;
  const double chain = static_cast<double>(chunks_of(p).length) * 6;
  return std::max({loads / 32 / kProcessors, moved * 4 / 18 / kProcessors, chain}) +
         results * static_cast<double>(chunks_of(p).count) / 300 + 5000;
}

}  // namespace

std::vector<std::string> Options::text() const {
  std::vector<std::string> result;
  for (int i = 0; i < count; ++i) {
    const Definition& d = list[static_cast<size_t>(i)];
    result.push_back("-D" + std::string(d.name) + "=" + std::to_string(d.value));
  }
  return result;
}

const std::vector<const Algorithm*>& algorithms() {
  static const std::vector<Algorithm> rows = [] {
    std::vector<Algorithm> r;
    r.push_back(gemm_algorithm<false>(
        "im2win", "implicit im2win: window order in shared memory, tiles by asynchronous copies",
        "arXiv 2306.14316, with the window tensor never built", im2win_rejects));
    Algorithm full =
        gemm_algorithm<false>("im2win_full", "the window tensor is built first, then multiplied",
                              "arXiv 2306.14316", full_rejects);
    full.defaults = [](const Problem& p, const Types& t) {
      Params v = gemm_defaults(windowed_problem(p), t, false);
      v[kPack] = 1;
      return v;
    };
    full.check = full_check;
    full.build = full_build;
    full.cost = [](const Problem& p, const Types& t, const Params& v) {
      const Problem q = windowed_problem(p);
      const double moved = static_cast<double>(q.n * q.x.n) * 8;
      return gemm_cost(q, t, full_params(v), false) + moved / 18 / kProcessors + 6000;
    };
    r.push_back(full);
    r.push_back(gemm_algorithm<false>(
        "segregated", "transposed convolution by output residues in one launch, no zero insertion",
        "arXiv 2209.03704, 2502.20493", segregated_rejects));
    Algorithm grad = gemm_algorithm<false>(
        "weight_grad", "outer products over chunks of pixels, the chunks' sums added in order",
        "canonical order of the reduction: numerical contract, chunked sums", weight_grad_rejects);
    grad.params.push_back({"chunks", "chunks of one launch; 0: as many as 64 MiB hold", {0}});
    r.push_back(grad);
    Algorithm lanes{};
    lanes.source = "one result per thread, channels as lanes";
    lanes.family = "canonical";
    lanes.dtypes = {"float32"};
    lanes.params = lanes_params();
    lanes.name = "depthwise";
    lanes.summary =
        "channels as lanes, the columns of the window loaded once for a strip of pixels";
    lanes.rejects = lanes_rejects<true>;
    lanes.defaults = lanes_defaults<true>;
    lanes.check = lanes_check<true>;
    lanes.build = lanes_build<true>;
    lanes.cost = lanes_cost<true>;
    r.push_back(lanes);
    lanes.name = "grouped";
    lanes.summary = "features as lanes, a group's channels broadcast; few channels per group";
    lanes.rejects = lanes_rejects<false>;
    lanes.defaults = lanes_defaults<false>;
    lanes.check = lanes_check<false>;
    lanes.build = lanes_build<false>;
    lanes.cost = lanes_cost<false>;
    r.push_back(lanes);
    Algorithm direct = lanes;
    direct.name = "direct";
    direct.summary = "one result per thread: every convolution, and gradients of small groups";
    direct.params = {};
    direct.rejects = direct_rejects;
    direct.defaults = [](const Problem&, const Types&) { return Params{}; };
    direct.check = direct_check;
    direct.build = direct_build;
    direct.cost = direct_cost;
    r.push_back(direct);
    r.push_back(gemm_algorithm<true>(
        "tensor", "implicit im2win on tensor cores (tf32, bfloat16, float16), sums in float32",
        "arXiv 2306.14316; PTX ISA, mma.sync", tensor_rejects));
    return r;
  }();
  static const std::vector<const Algorithm*> list = [] {
    std::vector<const Algorithm*> l;
    l.reserve(rows.size());
    for (const Algorithm& a : rows) l.push_back(&a);
    return l;
  }();
  return list;
}

const Algorithm* find_algorithm(const std::string& name) {
  for (const Algorithm* a : algorithms()) {
    if (name == a->name) return a;
  }
  return nullptr;
}

std::string make_plan(const Problem& p, const PlanRequest& request, Plan* plan) {
  const auto workspace = [&](const Algorithm& a, const Params& params) {
    Program program;
    a.build(p, request.types, params, {}, &program);
    return program.workspace_bytes;
  };
  const auto allowed = [&](int64_t bytes) {
    return request.max_workspace < 0 || bytes <= request.max_workspace;
  };
  if (request.algorithm == "auto") {
    double best = std::numeric_limits<double>::infinity();
    for (const Algorithm* a : algorithms()) {
      if (std::string(a->family) != "canonical" || !a->rejects(p, request.types).empty()) continue;
      const Params params = a->defaults(p, request.types);
      if (!a->check(p, request.types, params).empty()) continue;
      const double cost = a->cost(p, request.types, params);
      if (cost < best && allowed(workspace(*a, params))) {
        best = cost;
        plan->algorithm = a;
      }
    }
    if (plan->algorithm == nullptr) return "no algorithm computes this problem";
  } else {
    plan->algorithm = find_algorithm(request.algorithm);
    if (plan->algorithm == nullptr) return "algorithm: unknown '" + request.algorithm + "'";
    const std::string why = plan->algorithm->rejects(p, request.types);
    if (!why.empty()) return request.algorithm + ": " + why;
  }
  const Algorithm& a = *plan->algorithm;
  if (request.params.empty()) {
    plan->params = a.defaults(p, request.types);
  } else {
    if (request.params.size() != a.params.size()) {
      return "params: " + std::string(a.name) + " takes " + std::to_string(a.params.size()) +
             " values, got " + std::to_string(request.params.size());
    }
    std::copy(request.params.begin(), request.params.end(), plan->params.begin());
  }
  const std::string wrong = a.check(p, request.types, plan->params);
  if (!wrong.empty()) return "params: " + std::string(a.name) + ": " + wrong;
  plan->workspace_bytes = workspace(a, plan->params);
  if (!allowed(plan->workspace_bytes)) {
    return "max_workspace: " + std::string(a.name) + " needs " +
           std::to_string(plan->workspace_bytes) + " bytes, allowed are " +
           std::to_string(request.max_workspace);
  }
  return {};
}

const char* kernel_source(const std::string& name) {
#define JAXWIN_KERNEL_SOURCE(source, text) \
  if (name == #source) return text;
#include "kernel_sources.inc"
#undef JAXWIN_KERNEL_SOURCE
  return nullptr;
}

std::string translation_unit(const std::string& source) {
  // In place of #include lines, which would need files where the program runs.
  return std::string(kernel_source("args")) + kernel_source("device") + kernel_source(source);
}

}  // namespace jaxwin::cuda
