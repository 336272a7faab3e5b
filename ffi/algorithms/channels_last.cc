// SPDX-License-Identifier: Apache-2.0

#include "algorithms/channels_last.h"

#include <array>
#include <utility>
#include <vector>

#include "transpose.h"

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
  std::vector<TransposedDim> dims{{s.channels, s.channel, 1}, {s.groups, s.group, s.channels}};
  int64_t dst = s.groups * s.channels;
  for (int d = 3; d >= 0; --d) {
    dims.push_back({s.size[d], s.stride[d], dst});
    dst *= s.size[d];
  }
  transpose(std::move(dims), s.data, to, k, pool);
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
  copy({o.x, p.g, p.x.g, p.n, p.x.n, {p.c, p.in[0], p.in[1], p.in[2]},
        {p.x.c, p.x.sp[0], p.x.sp[1], p.x.sp[2]}},
       k, pool, to);
  copy({o.w, p.g, p.w.g, p.k, p.w.k, {p.c, p.win[0], p.win[1], p.win[2]},
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
