// SPDX-License-Identifier: Apache-2.0
//
// The tiled matrix products of kernels/gemm.cuh.

#include <limits>

#include "cuda/building.h"

namespace jaxwin::cuda {
namespace {

// By what the kernel multiplies, and whether the reduction may be cut where the contract has one
// chain.
enum class Kind { kChain, kPieces, kTensor };

// kUnroll: not for tensor cores, which have kPieces there; kLast: chunks of a launch where the
// contract has some, else pieces.
enum GemmParam { kBm, kBn, kBk, kTm, kTn, kStages, kPack, kUnroll, kLast };

struct GemmShape {
  bool mma;
  int64_t bm, bn, bk, tm, tn, stages, threads, lanes;
  int64_t pieces;  // 1: the reduction is not cut
  int64_t unroll;
};

GemmShape gemm_shape(const Types& t, const Params& v, Kind kind) {
  const bool mma = kind == Kind::kTensor;
  GemmShape s{
      mma, v[kBm], v[kBn], v[kBk], v[kTm], v[kTn], v[kStages], 0, 16 / type_bytes(t.operand), 1, 1};
  if (s.tm > 0 && s.tn > 0) s.threads = (s.bm / s.tm) * (s.bn / s.tn) * (mma ? 32 : 1);
  if (mma) s.pieces = v[kUnroll];
  if (kind == Kind::kPieces) s.pieces = v[kLast];
  if (!mma) s.unroll = v[kUnroll];
  return s;
}

// How the reduction is cut; `at_a_time` as for chunks_of.
Chunks cuts(const Problem& p, const GemmShape& s, int64_t at_a_time) {
  return p.chunk_rows > 0 ? chunks_of(p, at_a_time) : pieces_of(p, s.pieces);
}

// The layout of A in shared memory (JAXWIN_A), and whether rows run over images first.
struct Sides {
  int a, b;
  bool images_first;
  bool vector_y;  // features are neighbours in y, some at a time
  bool staged_y;  // rows are, and features are not: results go through shared memory
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
  r.vector_y = p.y.k == 1 && p.k % group == 0 && aligned(b.y, group * result_bytes(t)) &&
               multiples({{p.g, p.y.g},
                          {p.n, p.y.n},
                          {p.out[0], p.y.sp[0]},
                          {p.out[1], p.y.sp[1]},
                          {p.out[2], p.y.sp[2]}},
                         group);
  r.staged_y = p.y.k != 1 && p.k > 1 && (!r.images_first || p.y.n == 1);
  for (const Part& q : list) {
    r.vector_y = r.vector_y && q.y_first % group == 0;
    r.staged_y = r.staged_y && (r.images_first || q.y_sp[2] == 1);
  }
  return r;
}

constexpr int64_t kMostPieces = 64;
constexpr int64_t kLeastPiece = 16;    // elements of a piece
constexpr int64_t kSliceColumns = 32;  // kSlice of kernels/gemm.cuh

int64_t gemm_shared_bytes(const Types& t, const GemmShape& s, int a_side) {
  const int64_t walk = 4 * (2 * s.bk * 5 + s.bk * 4 + 4 + s.bk);  // struct Walk
  const int64_t ld_a = a_side == 0 ? s.bk + s.lanes : s.bm + (s.mma ? 8 : 0);
  const int64_t size_a = (a_side == 0 ? s.bm : s.bk) * ld_a;
  const int64_t size_b = s.bk * (s.bn + (s.mma ? 8 : 0));
  const int64_t staged = std::min<int64_t>(s.bn, kSliceColumns) * (s.bm + 1) * 4;
  return round_up(walk, 128) +
         std::max(s.stages * (size_a + size_b) * type_bytes(t.operand), staged);
}

std::string gemm_check(const Problem& p, const Types& t, const Params& v, Kind kind) {
  const GemmShape s = gemm_shape(t, v, kind);
  const bool mma = s.mma;
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
  if (v[kPack] == 1 && !rejects_size(packed_problem(p, round_up(p.k, s.lanes))).empty()) {
    return "pack: the packed filter is too large";
  }
  if (v[kLast] < 0) return "chunks, pieces: must not be negative";
  if (s.pieces < 1 || s.pieces > kMostPieces) return "pieces: 1 to 64";
  if (s.pieces > 1 && (p.chunk_rows > 0 || parts_of(p) > 1)) {
    return "pieces: must be 1 in weight gradients and with lhs_dilation";
  }
  const Chunks c = cuts(p, s, v[kLast]);
  if (partial_bytes(c) > kMostPartialBytes) return "chunks, pieces: too many sums";
  for (int side = 0; side < 3; ++side) {
    if (gemm_shared_bytes(t, s, side) > kMostShared) return "stages: too much shared memory";
  }
  const int64_t blocks = (ceil_div(p.n * p.pixels(), s.bm) + std::min(parts_of(p), p.pixels())) *
                         ceil_div(p.k, s.bn) * p.g * c.capacity;
  if (blocks > kMostBlocks) return "bm, bn: too many blocks";
  return {};
}

double gemm_cost(const Problem& p, const Types& t, const Params& v, Kind kind) {
  const GemmShape s = gemm_shape(t, v, kind);
  const bool mma = s.mma;
  const double chunks = static_cast<double>(std::max<int64_t>(1, cuts(p, s, 0).count));
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

// So many pieces that their blocks fill the device twice.
int64_t default_pieces(const Problem& p, const Params& v) {
  const int64_t tiles = ceil_div(p.n * p.pixels(), v[kBm]) * ceil_div(p.k, v[kBn]) * p.g;
  const int64_t wanted = 2 * static_cast<int64_t>(kProcessors) / std::max<int64_t>(tiles, 1);
  constexpr int64_t kLeastLength = 64;
  int64_t pieces = 2;
  while (pieces < 16 && pieces * 2 <= wanted && p.reduction() / (pieces * 2) >= kLeastLength) {
    pieces *= 2;
  }
  return pieces;
}

Params gemm_defaults(const Problem& p, const Types& t, Kind kind) {
  const bool mma = kind == Kind::kTensor;
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
  const int64_t lanes = 16 / type_bytes(t.operand);
  const bool fits = rejects_size(packed_problem(p, round_up(p.k, lanes))).empty();
  const int64_t pack = p.chunk_rows == 0 && (apart || odd) && fits ? 1 : 0;
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
    v[kUnroll] = 1;  // tensor cores: one piece
    if (kind == Kind::kPieces) v[kLast] = default_pieces(p, v);
    const double cost = gemm_cost(p, t, v, kind);
    if (cost < best_cost && gemm_check(p, t, v, kind).empty()) {
      best_cost = cost;
      best = v;
    }
  }
  return best;
}

void gemm_build(const Problem& original, const Types& t, const Params& v, const Buffers& given,
                Kind kind, Program* program) {
  const GemmShape s = gemm_shape(t, v, kind);
  const bool mma = s.mma;
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
  const Chunks c = cuts(p, s, v[kLast]);
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
    o.set("JAXWIN_UNROLL", s.unroll);
    o.set("JAXWIN_A", side.a);
    o.set("JAXWIN_B", side.b);
    o.set("JAXWIN_CHUNKED", chunked ? 1 : 0);
    o.set("JAXWIN_PARTIAL", partial ? 1 : 0);
    o.set("JAXWIN_IMAGES_FIRST", side.images_first ? 1 : 0);
    o.set("JAXWIN_DIMS", dims(original));
    o.set("JAXWIN_Y_VECTOR", side.vector_y && !partial ? 1 : 0);
    o.set("JAXWIN_Y_STAGED", side.staged_y && !partial ? 1 : 0);
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
  launch_chunked(p, t, b, c, a, side.images_first, launch, program);
}

std::vector<ParamSpec> gemm_params(Kind kind) {
  const bool mma = kind == Kind::kTensor;
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
  if (kind != Kind::kChain) {
    std::vector<int64_t> pieces{2, 4, 8, 16};
    if (mma) pieces.insert(pieces.begin(), 1);
    params.push_back({"pieces", "into so many the reduction is cut, if it is long", pieces});
  }
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

std::string pieces_rejects(const Problem& p, const Types& t) {
  if (p.reduction() < 2 * kLeastPiece) return "the reduction is too short to be cut";
  return im2win_rejects(p, t);
}

std::string tensor_rejects(const Problem& p, const Types&) {
  if (p.chunk_rows > 0 && p.dilated_input()) return "lhs_dilation in a weight gradient";
  if (parts_of(p) > kMostParts) return "more than 4096 residues";
  return rejects_size(p);
}

template <Kind kKind>
Algorithm gemm_algorithm(const char* name, const char* summary, const char* source,
                         std::string (*rejects)(const Problem&, const Types&)) {
  Algorithm a{};
  a.name = name;
  a.summary = summary;
  a.source = source;
  a.files = "gemm";
  a.family = kKind == Kind::kChain ? "canonical" : kKind == Kind::kPieces ? "pieces" : "tensor";
  a.dtypes = {"float32"};
  if (kKind == Kind::kTensor) a.dtypes = {"float32", "bfloat16", "float16"};
  a.params = gemm_params(kKind);
  a.rejects = rejects;
  a.defaults = [](const Problem& p, const Types& t) { return gemm_defaults(p, t, kKind); };
  a.check = [](const Problem& p, const Types& t, const Params& v) {
    return gemm_check(p, t, v, kKind);
  };
  a.build = [](const Problem& p, const Types& t, const Params& v, const Buffers& b, Program* out) {
    gemm_build(p, t, v, b, kKind, out);
  };
  a.cost = [](const Problem& p, const Types& t, const Params& v) {
    return gemm_cost(p, t, v, kKind);
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
  return gemm_check(windowed_problem(p), t, full_params(v), Kind::kChain);
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
  gemm_build(q, t, full_params(v), b, Kind::kChain, program);
}

}  // namespace

std::vector<Algorithm> gemm_algorithms() {
  std::vector<Algorithm> r;
  r.push_back(gemm_algorithm<Kind::kChain>(
      "im2win", "implicit im2win: window order in shared memory, tiles by asynchronous copies",
      "arXiv 2306.14316, with the window tensor never built", im2win_rejects));
  Algorithm full = gemm_algorithm<Kind::kChain>("im2win_full",
                                                "the window tensor is built first, then multiplied",
                                                "arXiv 2306.14316", full_rejects);
  full.defaults = [](const Problem& p, const Types& t) {
    Params v = gemm_defaults(windowed_problem(p), t, Kind::kChain);
    v[kPack] = 1;
    return v;
  };
  full.check = full_check;
  full.build = full_build;
  full.cost = [](const Problem& p, const Types& t, const Params& v) {
    const Problem q = windowed_problem(p);
    const double moved = static_cast<double>(q.n * q.x.n) * 8;
    return gemm_cost(q, t, full_params(v), Kind::kChain) + moved / 18 / kProcessors + 6000;
  };
  r.push_back(full);
  r.push_back(gemm_algorithm<Kind::kChain>(
      "segregated", "transposed convolution by output residues in one launch, no zero insertion",
      "arXiv 2209.03704, 2502.20493", segregated_rejects));
  Algorithm grad = gemm_algorithm<Kind::kChain>(
      "weight_grad", "outer products over chunks of pixels, the chunks' sums added in order",
      "canonical order of the reduction: numerical contract, chunked sums", weight_grad_rejects);
  grad.params.push_back({"chunks", "chunks of one launch; 0: as many as 64 MiB hold", {0}});
  r.push_back(grad);
  r.push_back(gemm_algorithm<Kind::kPieces>(
      "two_stage", "for small batches: pieces of the window side by side, then added in order",
      "arXiv 2103.16234", pieces_rejects));
  r.push_back(gemm_algorithm<Kind::kTensor>(
      "tensor", "implicit im2win on tensor cores (tf32, bfloat16, float16), sums in float32",
      "arXiv 2306.14316; PTX ISA, mma.sync", tensor_rejects));
  return r;
}

}  // namespace jaxwin::cuda
