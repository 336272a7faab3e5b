// SPDX-License-Identifier: Apache-2.0
//
// Kernels in which a thread computes results of its own from global memory: for few channels in a
// group. Neighbouring threads have neighbouring channels, or pixels where JAXWIN_LANES_X. The chain
// of each result is the canonical one, in float32 whatever the type of the operands.
//
// Definitions: JAXWIN_TYPE, _THREADS, _STRIP (pixels along x of a thread), _VECTOR (neighbouring
// channels that are loaded at once), _LANES_X, and for depthwise _WINDOW_X, _Y, _Z, _STRIDE_X,
// _DILATION_X.

namespace jaxwin {
namespace cuda {

constexpr int kThreads = JAXWIN_THREADS;
constexpr int kStrip = JAXWIN_STRIP;
constexpr int kVector = JAXWIN_VECTOR;

// Values in registers; as they lie in memory, and as results do.
struct Lanes {
  float v[kVector];
};
struct alignas(sizeof(Element) * kVector) Elements {
  Element v[kVector];
};
struct alignas(sizeof(Result) * kVector) Results {
  Result v[kVector];
};

JAXWIN_DEVICE Lanes zeros() {
  Lanes l;
#pragma unroll
  for (int i = 0; i < kVector; ++i) l.v[i] = 0.0F;
  return l;
}
JAXWIN_DEVICE Lanes lanes_at(const Element* from, bool real) {
  Lanes l = zeros();
  if (real) {
    const Elements e = *reinterpret_cast<const Elements*>(from);
#pragma unroll
    for (int i = 0; i < kVector; ++i) l.v[i] = widen(e.v[i]);
  }
  return l;
}

// What a thread computes: `lane` and a strip of pixels that begins at `o` of image `image`.
struct Work {
  int lane, image, o[3];
  bool any;
};
JAXWIN_DEVICE Work find_work(const ConvArgs& a, const Part& p, int block, int lanes) {
  Work r;
  const int across = (p.out[2] + kStrip - 1) / kStrip;
  const int strips = a.n * p.out[0] * p.out[1] * across;
  const int item = block * kThreads + static_cast<int>(threadIdx.x);
  int strip;
#if JAXWIN_LANES_X
  strip = item % strips;
  r.lane = item / strips;
  r.any = r.lane < lanes;
#else
  r.lane = item % lanes;
  strip = item / lanes;
  r.any = strip < strips;
#endif
  r.o[2] = strip % across * kStrip;
  strip /= across;
  r.o[1] = strip % p.out[1];
  strip /= p.out[1];
  r.o[0] = strip % p.out[0];
  r.image = strip / p.out[0];
  return r;
}

#if JAXWIN_DEPTHWISE && !JAXWIN_LANES_GRAD
// One channel per group, one feature: kVector groups per thread. Columns of the window one after
// the other, each loaded once for all pixels of the strip.
JAXWIN_KERNEL(JAXWIN_THREADS, 1) jaxwin_depthwise(JAXWIN_ARGS ConvArgs a) {
  const int part = part_of_block(a, static_cast<int>(blockIdx.x));
  const Part& p = a.part[part];
  const Work r = find_work(a, p, static_cast<int>(blockIdx.x) - p.first_block, a.g / kVector);
  if (!r.any) return;
  const int g = r.lane * kVector;
  const Element* const x = static_cast<const Element*>(a.x) + g * a.x_g + r.image * a.x_n;
  const Element* const w = static_cast<const Element*>(a.w) + g * a.w_g + p.w_first;
  const int at_z = r.o[0] * p.stride[0] - p.pad[0];
  const int at_y = r.o[1] * p.stride[1] - p.pad[1];
  const int at_x = r.o[2] * p.stride[2] - p.pad[2];

  Lanes sum[kStrip];
#pragma unroll
  for (int t = 0; t < kStrip; ++t) sum[t] = zeros();
#if JAXWIN_WINDOW_X > 0
  constexpr int kX = JAXWIN_WINDOW_X, kY = JAXWIN_WINDOW_Y, kZ = JAXWIN_WINDOW_Z;
  constexpr int kStride = JAXWIN_STRIDE_X, kDilation = JAXWIN_DILATION_X;
  constexpr int kColumns = (kStrip - 1) * kStride + (kX - 1) * kDilation + 1;
  Lanes window[kX * kY * kZ];
#pragma unroll
  for (int i = 0; i < kX * kY * kZ; ++i) {
    window[i] = lanes_at(
        w + i / (kY * kZ) * p.w_sp[2] + i / kZ % kY * p.w_sp[1] + i % kZ * p.w_sp[0], true);
  }
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const int ix = at_x + column;
    const bool real_x = static_cast<unsigned>(ix) < static_cast<unsigned>(a.in[2]);
#pragma unroll
    for (int u = 0; u < kY; ++u) {
      const int iy = at_y + u * p.dilation[1];
      const bool real_y = real_x && static_cast<unsigned>(iy) < static_cast<unsigned>(a.in[1]);
#pragma unroll
      for (int s = 0; s < kZ; ++s) {
        const int iz = at_z + s * p.dilation[0];
        const bool real = real_y && static_cast<unsigned>(iz) < static_cast<unsigned>(a.in[0]);
        Lanes value;
        bool loaded = false;
#pragma unroll
        for (int t = 0; t < kStrip; ++t) {
          const int from = column - t * kStride;
          if (from < 0 || from % kDilation != 0 || from / kDilation >= kX) continue;
          const int v = from / kDilation;
          if (!loaded) {
            value = lanes_at(x + iz * a.x_sp[0] + iy * a.x_sp[1] + ix * a.x_sp[2], real);
            loaded = true;
          }
          const Lanes weight = window[(v * kY + u) * kZ + s];
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            sum[t].v[i] = fma(value.v[i], weight.v[i], sum[t].v[i]);
          }
        }
      }
    }
  }
#else
  const int columns = p.taps == 0 ? 0 : p.win[2];
  for (int v = 0; v < columns; ++v) {
    for (int u = 0; u < p.win[1]; ++u) {
      const int iy = at_y + u * p.dilation[1];
      const bool real_y = static_cast<unsigned>(iy) < static_cast<unsigned>(a.in[1]);
      for (int s = 0; s < p.win[0]; ++s) {
        const int iz = at_z + s * p.dilation[0];
        const bool real = real_y && static_cast<unsigned>(iz) < static_cast<unsigned>(a.in[0]);
        const Lanes weight = lanes_at(w + v * p.w_sp[2] + u * p.w_sp[1] + s * p.w_sp[0], true);
#pragma unroll
        for (int t = 0; t < kStrip; ++t) {
          const int ix = at_x + t * p.stride[2] + v * p.dilation[2];
          const Lanes value =
              lanes_at(x + iz * a.x_sp[0] + iy * a.x_sp[1] + ix * a.x_sp[2],
                       real && static_cast<unsigned>(ix) < static_cast<unsigned>(a.in[2]));
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            sum[t].v[i] = fma(value.v[i], weight.v[i], sum[t].v[i]);
          }
        }
      }
    }
  }
#endif

  const int at = p.y_first + g * a.y_g + r.image * a.y_n + r.o[0] * p.y_sp[0] + r.o[1] * p.y_sp[1] +
                 r.o[2] * p.y_sp[2];
  Result* const y = static_cast<Result*>(a.y);
#pragma unroll
  for (int t = 0; t < kStrip; ++t) {
    if (r.o[2] + t >= p.out[2]) break;
    const int there = at + t * p.y_sp[2];
    Results result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      result.v[i] = round_result(finish(a, sum[t].v[i], g + i, there + i));
    }
    *reinterpret_cast<Results*>(y + there) = result;
  }
}
#endif

#if JAXWIN_GROUPED
// Few channels per group: a thread has one feature; its group's channels come kVector at a time.
JAXWIN_KERNEL(JAXWIN_THREADS, 1) jaxwin_grouped(JAXWIN_ARGS ConvArgs a) {
  const int part = part_of_block(a, static_cast<int>(blockIdx.x));
  const Part& p = a.part[part];
  const Work r = find_work(a, p, static_cast<int>(blockIdx.x) - p.first_block, a.g * a.k);
  if (!r.any) return;
  const int g = r.lane / a.k;
  const int k = r.lane % a.k;
  const Element* const x = static_cast<const Element*>(a.x) + g * a.x_g + r.image * a.x_n;
  const Element* const w = static_cast<const Element*>(a.w) + g * a.w_g + k * a.w_k + p.w_first;
  const int at_z = r.o[0] * p.stride[0] - p.pad[0];
  const int at_y = r.o[1] * p.stride[1] - p.pad[1];
  const int at_x = r.o[2] * p.stride[2] - p.pad[2];

  float sum[kStrip];
#pragma unroll
  for (int t = 0; t < kStrip; ++t) sum[t] = 0.0F;
  const int columns = p.taps == 0 ? 0 : p.win[2];
  for (int v = 0; v < columns; ++v) {
    for (int u = 0; u < p.win[1]; ++u) {
      const int iy = at_y + u * p.dilation[1];
      const bool real_y = static_cast<unsigned>(iy) < static_cast<unsigned>(a.in[1]);
      for (int s = 0; s < p.win[0]; ++s) {
        const int iz = at_z + s * p.dilation[0];
        const bool real = real_y && static_cast<unsigned>(iz) < static_cast<unsigned>(a.in[0]);
        const int from = iz * a.x_sp[0] + iy * a.x_sp[1] + (at_x + v * p.dilation[2]) * a.x_sp[2];
        const Element* const tap = w + v * p.w_sp[2] + u * p.w_sp[1] + s * p.w_sp[0];
        for (int c = 0; c < a.c; c += kVector) {
          float weight[kVector];
#pragma unroll
          for (int i = 0; i < kVector; ++i) weight[i] = widen(tap[(c + i) * a.w_c]);
#pragma unroll
          for (int t = 0; t < kStrip; ++t) {
            const int ix = at_x + t * p.stride[2] + v * p.dilation[2];
            const Lanes value =
                lanes_at(x + from + t * p.stride[2] * a.x_sp[2] + c * a.x_c,
                         real && static_cast<unsigned>(ix) < static_cast<unsigned>(a.in[2]));
#pragma unroll
            for (int i = 0; i < kVector; ++i) sum[t] = fma(value.v[i], weight[i], sum[t]);
          }
        }
      }
    }
  }

  const int at = p.y_first + g * a.y_g + k * a.y_k + r.image * a.y_n + r.o[0] * p.y_sp[0] +
                 r.o[1] * p.y_sp[1] + r.o[2] * p.y_sp[2];
  Result* const y = static_cast<Result*>(a.y);
#pragma unroll
  for (int t = 0; t < kStrip; ++t) {
    if (r.o[2] + t >= p.out[2]) break;
    const int there = at + t * p.y_sp[2];
    y[there] = round_result(finish(a, sum[t], r.lane, there));
  }
}
#endif

#if JAXWIN_LANES_GRAD
// Weight gradients of few channels in a group. A thread follows the chains of kTapsY x kTapsX
// results side by side, for kVector neighbouring groups (JAXWIN_DEPTHWISE: one channel and feature
// each) or features of one group. Of the input, columns that the next step needs again move along
// in registers (kShift of them are new then; 0: all).
constexpr int kTapsY = JAXWIN_TAPS_Y, kTapsX = JAXWIN_TAPS_X, kShift = JAXWIN_SHIFT;
#if JAXWIN_DEPTHWISE
using Value = Lanes;
JAXWIN_DEVICE float part_of(const Value& v, int i) { return v.v[i]; }
JAXWIN_DEVICE Value value_at(const Element* from, bool real) { return lanes_at(from, real); }
#else
using Value = float;
JAXWIN_DEVICE float part_of(Value v, int) { return v; }
JAXWIN_DEVICE Value value_at(const Element* from, bool real) { return real ? widen(*from) : 0.0F; }
#endif

JAXWIN_KERNEL(JAXWIN_THREADS, 1) jaxwin_lanes_grad(JAXWIN_ARGS ConvArgs a) {
  const Part& p = a.part[0];
  const int chunk = static_cast<int>(blockIdx.x) / a.row_blocks;  // of this launch
  const int tiles_x = (p.out[2] + kTapsX - 1) / kTapsX, tiles_y = (p.out[1] + kTapsY - 1) / kTapsY;
  int rest = static_cast<int>(blockIdx.x) % a.row_blocks * kThreads + static_cast<int>(threadIdx.x);
  const int lanes = a.g * a.k / kVector;
  const int lane = rest % lanes * kVector;
  rest /= lanes;
  const int ox = rest % tiles_x * kTapsX;
  rest /= tiles_x;
  const int oy = rest % tiles_y * kTapsY;
  rest /= tiles_y;
  const int oz = rest % p.out[0];
  const int image = rest / p.out[0];
  if (image >= a.n) return;
  const int g = lane / a.k;
  const int k = lane % a.k;
  const Element* const x = static_cast<const Element*>(a.x) + g * a.x_g + image * a.x_n;
  const Element* const w = static_cast<const Element*>(a.w) + g * a.w_g + k * a.w_k + p.w_first;
  const int at_z = oz * p.stride[0] - p.pad[0];
  const int at_y = oy * p.stride[1] - p.pad[1];
  const int at_x = ox * p.stride[2] - p.pad[2];

  Lanes sum[kTapsY][kTapsX];
#pragma unroll
  for (int i = 0; i < kTapsY; ++i) {
#pragma unroll
    for (int j = 0; j < kTapsX; ++j) sum[i][j] = zeros();
  }
  // Rows (channel, z, y) of the window, each along x.
  const int height = p.win[1];
  const int all = a.c * p.win[0] * height;
  const int of_chunk = a.chunk_length / p.win[2];
  const int first = (a.first_chunk + chunk) * of_chunk;
  const int last = first + of_chunk < all ? first + of_chunk : all;
  for (int row = first; row < last; ++row) {
    const int u = row % height;
    const int s = row / height % p.win[0];
    const int c = row / height / p.win[0];
    const int iz = at_z + s * p.dilation[0];
    const bool real_z = static_cast<unsigned>(iz) < static_cast<unsigned>(a.in[0]);
    const Element* const tap = w + c * a.w_c + s * p.w_sp[0] + u * p.w_sp[1];
    const Element* const from = x + c * a.x_c + iz * a.x_sp[0];
    const auto load = [&](int i, int ix) {
      const int iy = at_y + i * p.stride[1] + u * p.dilation[1];
      const bool real = real_z && static_cast<unsigned>(iy) < static_cast<unsigned>(a.in[1]) &&
                        static_cast<unsigned>(ix) < static_cast<unsigned>(a.in[2]);
      return value_at(from + iy * a.x_sp[1] + ix * a.x_sp[2], real);
    };
    Value columns[kTapsY][kTapsX];
#if JAXWIN_SHIFT > 0
    // One step early: the first step moves them.
#pragma unroll
    for (int i = 0; i < kTapsY; ++i) {
#pragma unroll
      for (int j = kShift; j < kTapsX; ++j) {
        columns[i][j] = load(i, at_x + (j - kShift) * p.stride[2]);
      }
    }
#endif
    for (int v = 0; v < p.win[2]; ++v) {
      const Lanes weight = lanes_at(tap + v * p.w_sp[2], true);
#pragma unroll
      for (int i = 0; i < kTapsY; ++i) {
#pragma unroll
        for (int j = 0; j < kTapsX; ++j) {
          if (kShift > 0 && j + kShift < kTapsX) {
            columns[i][j] = columns[i][j + kShift];
          } else {
            columns[i][j] = load(i, at_x + j * p.stride[2] + v * p.dilation[2]);
          }
        }
#pragma unroll
        for (int j = 0; j < kTapsX; ++j) {
#pragma unroll
          for (int q = 0; q < kVector; ++q) {
            sum[i][j].v[q] = fma(part_of(columns[i][j], q), weight.v[q], sum[i][j].v[q]);
          }
        }
      }
    }
  }

#if JAXWIN_PARTIAL
  float* const y = static_cast<float*>(a.y);
#else
  Result* const y = static_cast<Result*>(a.y);
#endif
#pragma unroll
  for (int i = 0; i < kTapsY; ++i) {
#pragma unroll
    for (int j = 0; j < kTapsX; ++j) {
      if (oy + i >= p.out[1] || ox + j >= p.out[2]) continue;
#pragma unroll
      for (int q = 0; q < kVector; ++q) {
        const int group = JAXWIN_DEPTHWISE ? g + q : g, feature = JAXWIN_DEPTHWISE ? 0 : k + q;
#if JAXWIN_PARTIAL
        const int row = ((image * p.out[0] + oz) * p.out[1] + oy + i) * p.out[2] + ox + j;
        y[(static_cast<long long>(chunk * a.g + group) * p.rows + row) * a.k_pitch + feature] =
            sum[i][j].v[q];
#else
        const int at = group * a.y_g + feature * a.y_k + image * a.y_n + oz * p.y_sp[0] +
                       (oy + i) * p.y_sp[1] + (ox + j) * p.y_sp[2];
        y[at] = round_result(finish(a, sum[i][j].v[q], lane + q, at));
        static_cast<void>(chunk);
#endif
      }
    }
  }
}
#endif

#if JAXWIN_DIRECT
// One result per thread, any convolution: inserted zeros are skipped one by one.
JAXWIN_DEVICE bool input_at(int q, int dilation, int size, bool& inserted, int& at) {
  inserted = dilation > 1 && q % dilation != 0;
  at = q / dilation;
  return q >= 0 && at < size;
}

JAXWIN_KERNEL(JAXWIN_THREADS, 1) jaxwin_direct(JAXWIN_ARGS ConvArgs a) {
  const Part& p = a.part[0];
  const int lanes = a.g * a.k;
  const int chunk = static_cast<int>(blockIdx.x) / a.row_blocks;  // of this launch
  const Work r = find_work(a, p, static_cast<int>(blockIdx.x) % a.row_blocks, lanes);
  if (!r.any) return;
  const int g = r.lane / a.k;
  const int k = r.lane % a.k;
  const Element* const x = static_cast<const Element*>(a.x) + g * a.x_g + r.image * a.x_n;
  const Element* const w = static_cast<const Element*>(a.w) + g * a.w_g + k * a.w_k + p.w_first;
  const int base[3] = {r.o[0] * p.stride[0] - p.pad[0], r.o[1] * p.stride[1] - p.pad[1],
                       r.o[2] * p.stride[2] - p.pad[2]};
  float sum = 0.0F;
  bool hole;
  int iz, iy, ix;
#if JAXWIN_CHUNKED
  // Rows (channel, z, y) of the window, each along x.
  const int height = p.win[1];
  const int all = a.c * p.win[0] * height;
  const int of_chunk = a.chunk_length / p.win[2];
  const int first = (a.first_chunk + chunk) * of_chunk;
  const int last = first + of_chunk < all ? first + of_chunk : all;
  for (int row = first; row < last; ++row) {
    const int u = row % height;
    const int s = row / height % p.win[0];
    const int c = row / height / p.win[0];
    const bool real_y = input_at(base[1] + u * p.dilation[1], a.lhs_dilation[1], a.in[1], hole, iy);
    if (hole) continue;
    const bool real_z = input_at(base[0] + s * p.dilation[0], a.lhs_dilation[0], a.in[0], hole, iz);
    if (hole) continue;
    const Element* const from = x + c * a.x_c + iz * a.x_sp[0] + iy * a.x_sp[1];
    const Element* const tap = w + c * a.w_c + s * p.w_sp[0] + u * p.w_sp[1];
    for (int v = 0; v < p.win[2]; ++v) {
      const bool real =
          input_at(base[2] + v * p.dilation[2], a.lhs_dilation[2], a.in[2], hole, ix) && real_y &&
          real_z;
      if (hole) continue;
      sum = fma(real ? widen(from[ix * a.x_sp[2]]) : 0.0F, widen(tap[v * p.w_sp[2]]), sum);
    }
  }
#else
  for (int v = 0; v < p.win[2]; ++v) {
    const bool real_x = input_at(base[2] + v * p.dilation[2], a.lhs_dilation[2], a.in[2], hole, ix);
    if (hole) continue;
    for (int u = 0; u < p.win[1]; ++u) {
      const bool real_y =
          input_at(base[1] + u * p.dilation[1], a.lhs_dilation[1], a.in[1], hole, iy);
      if (hole) continue;
      for (int s = 0; s < p.win[0]; ++s) {
        const bool real =
            input_at(base[0] + s * p.dilation[0], a.lhs_dilation[0], a.in[0], hole, iz) && real_x &&
            real_y;
        if (hole) continue;
        const Element* const from = x + iz * a.x_sp[0] + iy * a.x_sp[1] + ix * a.x_sp[2];
        const Element* const tap = w + s * p.w_sp[0] + u * p.w_sp[1] + v * p.w_sp[2];
        for (int c = 0; c < a.c; ++c) {
          sum = fma(real ? widen(from[c * a.x_c]) : 0.0F, widen(tap[c * a.w_c]), sum);
        }
      }
    }
  }
#endif
#if JAXWIN_PARTIAL
  const int row = ((r.image * p.out[0] + r.o[0]) * p.out[1] + r.o[1]) * p.out[2] + r.o[2];
  static_cast<float*>(
      a.y)[(static_cast<long long>(chunk * a.g + g) * p.rows + row) * a.k_pitch + k] = sum;
#else
  const int at = g * a.y_g + k * a.y_k + r.image * a.y_n + r.o[0] * p.y_sp[0] + r.o[1] * p.y_sp[1] +
                 r.o[2] * p.y_sp[2];
  static_cast<Result*>(a.y)[at] = round_result(finish(a, sum, r.lane, at));
  static_cast<void>(chunk);
#endif
}
#endif

}  // namespace cuda
}  // namespace jaxwin
