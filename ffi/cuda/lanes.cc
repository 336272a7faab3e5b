// SPDX-License-Identifier: Apache-2.0
//
// Results of a thread of its own, as in kernels/lanes.cuh.

#include "cuda/building.h"

namespace jaxwin::cuda {
namespace {

// Of a thread of `depthwise` for the window; JAXWIN_WINDOW_X is 0 beyond.
constexpr int64_t kWindowRegisters = 64;

enum LanesParam { kStrip, kVector, kThreads };

bool lanes_along_x(const Problem& p) {
  // Where pixels are neighbours in memory, and channels are not.
  const bool channels = p.c == 1 && p.k == 1 ? p.x.g == 1 : p.y.k == 1 || p.y.g == 1;
  return !channels && p.out[2] > 1 && p.y.sp[2] == 1;
}

bool depthwise_vector(const Problem& p, const Types& t, const Buffers& b, int64_t v) {
  const int64_t bytes = v * type_bytes(t.operand);
  return v == 1 ||
         (p.x.g == 1 && p.y.g == 1 && p.w.g == 1 && p.g % v == 0 && p.w_first % v == 0 &&
          aligned(b.x, bytes) && aligned(b.w, bytes) && aligned(b.y, v * result_bytes(t)) &&
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

bool grouped_vector(const Problem& p, const Types& t, const Buffers& b, int64_t v) {
  return v == 1 || (p.x.c == 1 && p.c % v == 0 && aligned(b.x, v * type_bytes(t.operand)) &&
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
std::string lanes_rejects(const Problem& p, const Types&) {
  if (p.chunk_rows > 0) return "the reduction is chunked (weight gradient)";
  if (kDepthwise && (p.c != 1 || p.k != 1)) return "more than one channel or feature per group";
  if (!kDepthwise && p.c * p.window() > 65536) return "too many channels per group";
  if (parts_of(p) > kMostParts) return "more than 4096 residues";
  return rejects_size(p);
}

template <bool kDepthwise>
std::string lanes_check(const Problem& p, const Types& t, const Params& v) {
  if (!is_power_of_two(v[kStrip]) || v[kStrip] > 16) return "strip: 1, 2, 4, 8 or 16";
  if (v[kVector] != 1 && v[kVector] != 2 && v[kVector] != 4) return "vector: 1, 2 or 4";
  if (!is_power_of_two(v[kThreads]) || v[kThreads] < 32 || v[kThreads] > 1024) {
    return "threads: a power of two from 32 to 1024";
  }
  const bool fits =
      kDepthwise ? depthwise_vector(p, t, {}, v[kVector]) : grouped_vector(p, t, {}, v[kVector]);
  if (!fits) return "vector: channels do not lie so";
  if (v[kStrip] > 1 && lanes_along_x(p)) return "strip: neighbouring threads have the pixels";
  if (v[kStrip] * v[kVector] > 32) return "strip, vector: too many sums for a thread's registers";
  return {};
}

template <bool kDepthwise>
Params lanes_defaults(const Problem& p, const Types& t) {
  Params v{};
  v[kVector] = 1;
  // A window that stays in registers saves more than wide loads do.
  const bool small_window = kDepthwise && p.window() <= kWindowRegisters;
  for (const int64_t vector : {4, 2}) {
    if (small_window && p.window() * vector > kWindowRegisters) continue;
    const bool fits =
        kDepthwise ? depthwise_vector(p, t, {}, vector) : grouped_vector(p, t, {}, vector);
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
  if (!(kDepthwise ? depthwise_vector(p, t, b, vector) : grouped_vector(p, t, b, vector))) {
    vector = 1;
  }
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
double lanes_cost(const Problem& p, const Types& t, const Params& v) {
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
  const auto width = static_cast<double>(type_bytes(t.operand));
  return std::max({loads / 32 / kProcessors, moved * width / 18 / kProcessors, chain}) + 4000;
}

// --- weight gradients of few channels in a group ------------------------------------------------

enum GradParam { kTapsY, kTapsX, kGradVector, kGradThreads };

bool is_depthwise(const Problem& p) { return p.k == 1 && p.n == 1 && p.g > 1; }

bool grad_vector(const Problem& p, const Types& t, const Buffers& b, int64_t v) {
  if (v == 1) return true;
  const int64_t bytes = v * type_bytes(t.operand);
  const bool w =
      aligned(b.w, bytes) && p.w_first % v == 0 &&
      multiples({{p.c, p.w.c}, {p.win[0], p.w.sp[0]}, {p.win[1], p.w.sp[1]}, {p.win[2], p.w.sp[2]}},
                v);
  if (!is_depthwise(p)) return w && p.w.k == 1 && p.k % v == 0 && multiples({{p.g, p.w.g}}, v);
  return w && p.w.g == 1 && p.x.g == 1 && p.g % v == 0 && aligned(b.x, bytes) &&
         multiples({{p.c, p.x.c}, {p.in[0], p.x.sp[0]}, {p.in[1], p.x.sp[1]}, {p.in[2], p.x.sp[2]}},
                   v);
}

int64_t grad_items(const Problem& p, const Params& v) {
  return p.g * p.k / v[kGradVector] * p.n * p.out[0] * ceil_div(p.out[1], v[kTapsY]) *
         ceil_div(p.out[2], v[kTapsX]);
}

std::string grad_rejects(const Problem& p, const Types&) {
  if (p.chunk_rows == 0) return "the reduction is not chunked (no weight gradient)";
  if (p.dilated_input()) return "lhs_dilation in a weight gradient";
  constexpr int64_t kMostPairs = 1024;
  if (p.n * p.k > kMostPairs) return "too many channels per group";
  return rejects_size(p);
}

std::string grad_check(const Problem& p, const Types& t, const Params& v) {
  constexpr int64_t kMostTaps = 16;
  for (const int64_t taps : {v[kTapsY], v[kTapsX]}) {
    if (taps < 1 || taps > kMostTaps) return "taps_y, taps_x: 1 to 16";
  }
  if (v[kGradVector] != 1 && v[kGradVector] != 2 && v[kGradVector] != 4) {
    return "vector: 1, 2 or 4";
  }
  if (v[kTapsY] * v[kTapsX] * v[kGradVector] > kWindowRegisters) {
    return "taps_y, taps_x, vector: too many sums for a thread's registers";
  }
  if (!is_power_of_two(v[kGradThreads]) || v[kGradThreads] < 32 || v[kGradThreads] > 512) {
    return "threads: a power of two from 32 to 512";
  }
  if (!grad_vector(p, t, {}, v[kGradVector])) return "vector: channels do not lie so";
  const int64_t blocks = ceil_div(grad_items(p, v), v[kGradThreads]);
  return blocks * chunks_of(p).capacity > kMostBlocks ? "threads: too many blocks" : "";
}

Params grad_defaults(const Problem& p, const Types& t) {
  constexpr int64_t kUsualTaps = 8;
  const double enough = kProcessors * 32 * 8;  // threads
  const auto chunks = static_cast<double>(chunks_of(p).count);
  Params v{};
  v[kTapsY] = std::min(p.out[1], kUsualTaps);
  v[kTapsX] = std::min(p.out[2], kUsualTaps);
  v[kGradThreads] = 128;
  for (const int64_t vector : {4, 2, 1}) {
    v[kGradVector] = vector;
    if (vector == 1) break;
    const bool few = v[kTapsY] * v[kTapsX] * vector <= kWindowRegisters;
    if (few && grad_vector(p, t, {}, vector) &&
        static_cast<double>(grad_items(p, v)) * chunks >= enough) {
      break;
    }
  }
  // Fewer rows of results in a thread, where there are too few threads.
  while (v[kTapsY] > 1 && static_cast<double>(grad_items(p, v)) * chunks < enough) --v[kTapsY];
  return v;
}

void grad_build(const Problem& p, const Types& t, const Params& v, const Buffers& b,
                Program* program) {
  const Chunks c = chunks_of(p);
  const bool partial = c.count > 1;
  Params actual = v;
  if (!grad_vector(p, t, b, v[kGradVector])) actual[kGradVector] = 1;
  ConvArgs a = common_args(p, b);
  a.part[a.parts++] = whole(p);
  a.row_blocks = small(ceil_div(grad_items(p, actual), v[kGradThreads]));
  const int64_t shift = p.rhs_dilation[2] / p.stride[2];
  const auto launch = [&](const ConvArgs& args) {
    Launch l{};
    l.kernel = "jaxwin_lanes_grad";
    l.source = "lanes";
    Options& o = l.options;
    set_types(t, b, !partial, &o);
    o.set("JAXWIN_LANES_GRAD", 1);
    o.set("JAXWIN_DEPTHWISE", is_depthwise(p) ? 1 : 0);
    o.set("JAXWIN_THREADS", v[kGradThreads]);
    o.set("JAXWIN_STRIP", 1);
    o.set("JAXWIN_VECTOR", actual[kGradVector]);
    o.set("JAXWIN_LANES_X", 0);
    o.set("JAXWIN_TAPS_Y", v[kTapsY]);
    o.set("JAXWIN_TAPS_X", v[kTapsX]);
    o.set("JAXWIN_SHIFT", p.rhs_dilation[2] % p.stride[2] == 0 && shift < v[kTapsX] ? shift : 0);
    o.set("JAXWIN_PARTIAL", partial ? 1 : 0);
    l.blocks = int64_t{args.row_blocks} * args.chunks;
    l.threads = static_cast<int>(v[kGradThreads]);
    l.set_args(args);
    program->launches.push_back(l);
  };
  launch_chunked(p, t, b, c, a, false, launch, program);
}

double grad_cost(const Problem& p, const Types& t, const Params& v) {
  const auto taps = static_cast<double>(v[kTapsY] * v[kTapsX]);
  const double steps = p.flops() / 2;
  // Per step of a thread: the weight, and of the input what did not move along.
  const auto fresh = static_cast<double>(
      v[kTapsY] * std::min<int64_t>(v[kTapsX], ceil_div(p.rhs_dilation[2], p.stride[2])));
  const auto side_by_side = static_cast<double>(is_depthwise(p) ? v[kGradVector] : 1);
  const double loads = steps / taps * (1 + fresh) / side_by_side;
  const double results = static_cast<double>(p.n * p.g * p.k * p.pixels());
  const auto chunks = static_cast<double>(chunks_of(p).count);
  const double moved = static_cast<double>(p.n * p.g * p.c * p.in[0] * p.in[1] * p.in[2]);
  const double threads = static_cast<double>(grad_items(p, v)) * chunks;
  const double chain = static_cast<double>(chunks_of(p).length) *
                       (40 + taps * static_cast<double>(v[kGradVector])) *
                       std::max(1.0, threads / (kProcessors * 32 * 16));
  const auto width = static_cast<double>(type_bytes(t.operand));
  return std::max({loads / 32 / kProcessors, steps / 100 / kProcessors,
                   moved * width / 18 / kProcessors, chain}) +
         results * chunks / 300 + 5000;
}

// --- one result per thread ----------------------------------------------------------------------

constexpr int64_t kDirectThreads = 128;

std::string direct_rejects(const Problem& p, const Types&) { return rejects_size(p); }

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
  launch_chunked(p, t, b, c, a, false, launch, program);
}

double direct_cost(const Problem& p, const Types& t, const Params&) {
  double taps = 1;
  for (int d = 0; d < 3; ++d) taps *= static_cast<double>(p.lhs_dilation[d]);
  const double loads = p.flops() * 1.5 * (1 + (taps - 1) / 4);
  const double results = static_cast<double>(p.n * p.g * p.k * p.pixels());
  const double moved = static_cast<double>(p.n * p.g * p.c * p.in[0] * p.in[1] * p.in[2]) + results;
  const double chain = static_cast<double>(chunks_of(p).length) * 6;
  const auto width = static_cast<double>(type_bytes(t.operand));
  return std::max({loads / 32 / kProcessors, moved * width / 18 / kProcessors, chain}) +
         results * static_cast<double>(chunks_of(p).count) / 300 + 5000;
}

}  // namespace

std::vector<Algorithm> lanes_algorithms() {
  std::vector<Algorithm> r;
  Algorithm lanes{};
  lanes.source = "one result per thread, channels as lanes";
  lanes.family = "canonical";
  lanes.files = "lanes";
  lanes.dtypes = {"float32", "bfloat16", "float16"};
  lanes.params = lanes_params();
  lanes.name = "depthwise";
  lanes.summary = "channels as lanes, the columns of the window loaded once for a strip of pixels";
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
  Algorithm grad = lanes;
  grad.name = "lanes_grad";
  grad.summary = "weight gradients of depthwise and grouped convolutions: a thread's tile of taps";
  grad.params = {{"taps_y", "rows of results of a thread", {1, 2, 3, 5, 7}},
                 {"taps_x", "columns of the same", {1, 2, 3, 5, 7}},
                 {"vector", "neighbouring groups or features of a thread", {1, 2, 4}},
                 {"threads", "threads of a block", {64, 128, 256}}};
  grad.rejects = grad_rejects;
  grad.defaults = grad_defaults;
  grad.check = grad_check;
  grad.build = grad_build;
  grad.cost = grad_cost;
  r.push_back(grad);
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
  return r;
}

}  // namespace jaxwin::cuda
