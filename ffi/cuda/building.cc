// SPDX-License-Identifier: Apache-2.0

#include "cuda/building.h"

namespace jaxwin::cuda {
namespace {

constexpr int64_t kPartialBytes = int64_t{64} << 20;  // about, of sums of chunks at a time

// One past the last element that is reached with these sizes and strides.
int64_t span(std::initializer_list<std::pair<int64_t, int64_t>> dimensions) {
  int64_t last = 0;
  for (const auto& [size, stride] : dimensions) last += (size - 1) * std::abs(stride);
  return last + 1;
}

}  // namespace

std::string rejects_size(const Problem& p) {
  // Threads of a last block that have nothing to do must be able to count theirs, too.
  constexpr int64_t kMostElements = (int64_t{1} << 31) - (1 << 16);
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
  if (std::max({x, w, y}) >= kMostElements) return "an operand has nearly 2^31 elements, or more";
  if (p.reduction() >= kMostReach) return "the reduction is too long";
  int64_t padded = x;  // offsets of windows that begin in the padding
  for (int d = 0; d < 3; ++d) {
    const int64_t reach = std::max({std::abs(p.pad[d]), p.win[d] * p.rhs_dilation[d],
                                    p.out[d] * p.stride[d], p.in[d] * p.lhs_dilation[d]});
    // The whole input is within reach of every output's position, as element offsets too.
    if (reach >= kMostReach || reach * std::abs(p.x.sp[d]) >= kMostElements / 2) {
      return "padding or dilation reaches too far";
    }
    padded += std::max<int64_t>(p.pad[d], 0) * std::abs(p.x.sp[d]);
  }
  if (padded >= kMostElements) return "padding reaches too far";
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

void set_types(const Types& t, const Buffers& b, bool last, Options* o) {
  o->set("JAXWIN_TYPE", static_cast<int>(t.operand));
  o->set("JAXWIN_RESULT_F32", t.wide_result ? 1 : 0);
  o->set("JAXWIN_EPILOGUE", last && b.has_epilogue() ? 1 : 0);
  o->set("JAXWIN_ACTIVATION", last ? static_cast<int>(b.activation) : 0);
}

// --- chunked reductions -------------------------------------------------------------------------

Chunks chunks_of(const Problem& p, int64_t at_a_time) {
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

Chunks pieces_of(const Problem& p, int64_t pieces) {
  constexpr int64_t kPieceStep = 8;  // 16 bytes of every type
  Chunks c{};
  c.length = round_up(ceil_div(p.reduction(), std::max<int64_t>(pieces, 1)), kPieceStep);
  c.count = ceil_div(p.reduction(), c.length);
  c.pitch = p.k > 1 ? round_up(p.k, 4) : 1;
  c.floats = p.g * p.n * p.pixels() * c.pitch;
  c.capacity = c.count;
  return c;
}

int64_t partial_bytes(const Chunks& c) {
  if (c.count == 1) return 0;
  return (c.capacity + (c.capacity < c.count ? 1 : 0)) * c.floats * 4;
}

void launch_sum(const Problem& p, const Types& t, const Buffers& b, const Chunks& c,
                const ConvArgs& a, float* partial, bool images_first, int64_t first,
                Program* program) {
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

// --- filters in a regular order -----------------------------------------------------------------

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

void* take(const Buffers& b, int64_t bytes, Program* program) {
  constexpr int64_t kBoundary = 256;
  const int64_t at = round_up(program->workspace_bytes, kBoundary);
  program->workspace_bytes = at + bytes;
  return b.workspace == nullptr ? nullptr : static_cast<char*>(b.workspace) + at;
}

}  // namespace jaxwin::cuda
