// SPDX-License-Identifier: Apache-2.0

#include "algorithms/channels_last.h"

#include <array>

namespace jaxwin {
namespace {

int64_t x_size(const Problem& p) { return p.g * p.n * p.c * p.in[0] * p.in[1] * p.in[2]; }
int64_t w_size(const Problem& p) { return p.g * p.k * p.reduction(); }

// One operand: [c][z][y][x][group][channel] is written, from these strides.
struct Source {
  ConstPtr data;
  int64_t groups, group, channels, channel;
  std::array<int64_t, 4> size, stride;  // c, z, y, x
};

void copy(const Source& s, const Kernels& k, const Threads& pool, Ptr to) {
  std::array<int64_t, 4> dst{};
  dst[3] = s.groups * s.channels;
  for (int d = 2; d >= 0; --d) dst[d] = dst[d + 1] * s.size[d + 1];
  // What is next to each other in the source becomes rows of a matrix that is transposed.
  int rows = 3;
  for (int d = 0; d < 4; ++d) {
    if (s.stride[d] == 1 && s.size[d] > 1) rows = d;
  }
  const bool merged = s.groups == 1 || s.group == s.channels * s.channel;
  const int64_t groups = merged ? 1 : s.groups;
  const int64_t channels = s.groups * s.channels / groups;
  int64_t tasks = groups;
  const int64_t columns = rows == 3 ? 1 : s.size[3];
  for (int d = 0; d < 3; ++d) tasks *= d == rows ? 1 : s.size[d];
  pool.run(tasks, [&](int64_t task, int64_t) {
    const int64_t g = task % groups;
    int64_t rest = task / groups;
    int64_t from = g * s.group;
    int64_t at = g * s.channels;
    for (int d = 2; d >= 0; --d) {
      if (d == rows) continue;
      from += rest % s.size[d] * s.stride[d];
      at += rest % s.size[d] * dst[d];
      rest /= s.size[d];
    }
    // So few channels at a time that each is read as a stream, along x.
    constexpr int64_t kStreams = 16;
    for (int64_t c = 0; c < channels; c += kStreams) {
      for (int64_t x = 0; x < columns; ++x) {
        k.copy(to + at + c + x * dst[3], dst[rows], s.data + from + c * s.channel + x * s.stride[3],
               s.stride[rows], s.channel, s.size[rows], std::min(kStreams, channels - c));
      }
    }
  });
}

}  // namespace

Problem channels_last(const Problem& p) {
  Problem q = p;
  if (q.out[0] == 1 && q.win[0] == q.in[0] && q.pad[0] == 0 && q.rhs_dilation[0] == 1 &&
      q.lhs_dilation[0] == 1 && q.chunk_rows > 0) {
    q.c *= q.win[0];
    q.in[0] = q.win[0] = 1;
  }
  q.x.n = q.w.k = 1;
  q.x.g = q.n;
  q.w.g = q.k;
  q.x.sp[2] = q.g * q.n;
  q.w.sp[2] = q.g * q.k;
  for (int d = 1; d >= 0; --d) {
    q.x.sp[d] = q.x.sp[d + 1] * q.in[d + 1];
    q.w.sp[d] = q.w.sp[d + 1] * q.win[d + 1];
  }
  q.x.c = q.x.sp[0] * q.in[0];
  q.w.c = q.w.sp[0] * q.win[0];
  q.w_first = 0;
  return q;
}

int64_t channels_last_floats(const Problem& p) {
  return round_up(x_size(p), 16) + round_up(w_size(p), 16);
}

Operands copy_channels_last(const Problem& p, const Operands& o, const Kernels& k,
                            const Threads& pool, Ptr to) {
  Ptr w = to + round_up(x_size(p), 16);
  copy({o.x,
        p.g,
        p.x.g,
        p.n,
        p.x.n,
        {p.c, p.in[0], p.in[1], p.in[2]},
        {p.x.c, p.x.sp[0], p.x.sp[1], p.x.sp[2]}},
       k, pool, to);
  copy({o.w,
        p.g,
        p.w.g,
        p.k,
        p.w.k,
        {p.c, p.win[0], p.win[1], p.win[2]},
        {p.w.c, p.w.sp[0], p.w.sp[1], p.w.sp[2]}},
       k, pool, w);
  Operands copies = o;
  copies.x = to;
  copies.w = w;
  return copies;
}

bool images_innermost(const Problem& p) {
  return p.plain() && ((p.c > 1 && p.x.c == 1 && p.w.c == 1) ||
                       (p.win[0] > 1 && p.x.sp[0] == 1 && p.w.sp[0] == 1));
}

}  // namespace jaxwin
