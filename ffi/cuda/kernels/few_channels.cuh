// SPDX-License-Identifier: Apache-2.0
//
// Convolutions of few input channels, such as first layers: a block loads the piece of the input
// that its tile of pixels sees once, as it lies in memory, and walks the window (x, y, z, channel)
// over it by a table of offsets. So the reduction has no padding, however few channels there are.
// Filters come in pieces by asynchronous copies. One chain per result, the canonical order.
//
// Definitions: JAXWIN_BX, _BY (columns and rows of pixels of a block), _BN (features), _BK (steps
// of the filter at a time), _TM, _TN (pixels and features of a thread), _THREADS, _BLOCKS, _B (how
// the filter lies, as in gemm.cuh), _X_PLANES (channels are not neighbours), _Y_VECTOR, _DIMS.

namespace jaxwin {
namespace cuda {

constexpr int kBx = JAXWIN_BX, kBm = JAXWIN_BX * JAXWIN_BY, kBn = JAXWIN_BN, kBk = JAXWIN_BK;
constexpr int kTm = JAXWIN_TM, kTn = JAXWIN_TN, kThreads = JAXWIN_THREADS;
constexpr int kAcross = kBn / kTn, kDown = kBm / kTm;
static_assert(kAcross * kDown == kThreads && kTn % 4 == 0, "threads");
// Warps of up to 8 x 4 threads, as in gemm.cuh.
constexpr int kWarpAcross = kAcross < 8 ? kAcross : 8, kWarpDown = 32 / kWarpAcross;
static_assert(kAcross % kWarpAcross == 0 && kDown % kWarpDown == 0, "warps");

struct alignas(16) Four {
  float v[4];
};

// The piece of the input: [z][y][column][channel] from `from` on, of `size` rows and columns.
struct Patch {
  int from[3], size[3];
};

JAXWIN_DEVICE void load_patch(const ConvArgs& a, const Part& p, const Patch& patch, const float* x,
                              float* to, int thread) {
  const int width = patch.size[2] * a.c;
  const int total = patch.size[0] * patch.size[1] * width;
  static_cast<void>(p);
  for (int i = thread; i < total; i += kThreads) {
    const int line = i / width, within = i % width;
#if JAXWIN_X_PLANES
    const int c = within / patch.size[2], column = within % patch.size[2];
#else
    const int column = within / a.c, c = within % a.c;
#endif
    const int iz = patch.from[0] + line / patch.size[1];
    const int iy = patch.from[1] + line % patch.size[1];
    const int ix = patch.from[2] + column;
    const bool real = static_cast<unsigned>(ix) < static_cast<unsigned>(a.in[2]) &&
                      static_cast<unsigned>(iy) < static_cast<unsigned>(a.in[1]) &&
                      static_cast<unsigned>(iz) < static_cast<unsigned>(a.in[0]);
    const int at = c * a.x_c + iz * a.x_sp[0] + iy * a.x_sp[1] + ix * a.x_sp[2];
    copy_async<4>(to + line * width + column * a.c + c, x + (real ? at : 0), real);
  }
}

// Step k of the reduction, channels fastest, then z, y, x.
struct Digits {
  int c, z, y, x;
};
JAXWIN_DEVICE Digits digits_of(int k, int channels, const Part& p) {
  Digits d;
  d.c = k % channels;
  k /= channels;
  d.z = k % p.win[0];
  k /= p.win[0];
  d.y = k % p.win[1];
  d.x = k / p.win[1];
  return d;
}

// `offsets`: of the filter's steps, of the whole reduction.
JAXWIN_DEVICE void load_filter(const ConvArgs& a, const float* w, const int* offsets, float* to,
                               int first_step, int total, int first_column, int thread) {
#if JAXWIN_B == 0
  for (int i = thread; i < kBk * kBn / 4; i += kThreads) {
    const int k = first_step + i / (kBn / 4), column = i % (kBn / 4) * 4;
    const bool real = k < total && first_column + column < a.k;
    copy_async<16>(to + i * 4, w + (real ? offsets[k] + first_column + column : 0), real);
  }
#else
  for (int i = thread; i < kBk * kBn; i += kThreads) {
    const int k = first_step + i / kBn, column = i % kBn;
    const bool real = k < total && first_column + column < a.k;
    copy_async<4>(to + i, w + (real ? offsets[k] + (first_column + column) * a.w_k : 0), real);
  }
#endif
  commit_group();
}

JAXWIN_KERNEL(JAXWIN_THREADS, JAXWIN_BLOCKS) jaxwin_few_channels(JAXWIN_ARGS ConvArgs a) {
  JAXWIN_DYNAMIC_SHARED(shared);
  const Part& p = a.part[0];
  const int thread = static_cast<int>(threadIdx.x);
  int rest = static_cast<int>(blockIdx.x);
  const int first_column = rest % a.column_blocks * kBn;
  rest /= a.column_blocks;
  const int tiles_x = (p.out[2] + kBx - 1) / kBx, tiles_y = (p.out[1] + JAXWIN_BY - 1) / JAXWIN_BY;
  const int ox = rest % tiles_x * kBx;
  rest /= tiles_x;
  const int oy = rest % tiles_y * JAXWIN_BY;
  rest /= tiles_y;
  const int oz = rest % p.out[0];
  rest /= p.out[0];
  const int g = rest % a.g;
  const int image = rest / a.g;

  Patch patch;
  const int o[3] = {oz, oy, ox}, pixels[3] = {1, JAXWIN_BY, kBx};
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    patch.from[d] = o[d] * p.stride[d] - p.pad[d];
    patch.size[d] = (pixels[d] - 1) * p.stride[d] + (p.win[d] - 1) * p.dilation[d] + 1;
  }
  const int line = patch.size[2] * a.c;
  const int total = a.c * p.taps;
  // Filters [2][kBk][kBn], the patch, and by step offsets in the patch and in the filter.
  float* const filters = reinterpret_cast<float*>(shared);
  float* const values = filters + 2 * kBk * kBn;
  int* const in_patch = reinterpret_cast<int*>(values + patch.size[0] * patch.size[1] * line);
  int* const in_filter = in_patch + total;
  for (int k = thread; k < total; k += kThreads) {
    const Digits d = digits_of(k, a.c, p);
    in_patch[k] = (d.z * p.dilation[0] * patch.size[1] + d.y * p.dilation[1]) * line +
                  d.x * p.dilation[2] * a.c + d.c;
    in_filter[k] = p.w_first + d.c * a.w_c + d.z * p.w_sp[0] + d.y * p.w_sp[1] + d.x * p.w_sp[2];
  }
  __syncthreads();
  load_patch(a, p, patch, static_cast<const float*>(a.x) + g * a.x_g + image * a.x_n, values,
             thread);
  const float* const w = static_cast<const float*>(a.w) + g * a.w_g;
  load_filter(a, w, in_filter, filters, 0, total, first_column, thread);

  const int warp = thread / 32, lane = thread % 32;
  const int across = warp % (kAcross / kWarpAcross) * kWarpAcross + lane % kWarpAcross;
  const int down = warp / (kAcross / kWarpAcross) * kWarpDown + lane / kWarpAcross;
  int at[kTm];
  float sum[kTm][kTn];
#pragma unroll
  for (int i = 0; i < kTm; ++i) {
    const int pixel = i * kDown + down;
    at[i] = pixel / kBx * p.stride[1] * line + pixel % kBx * p.stride[2] * a.c;
#pragma unroll
    for (int j = 0; j < kTn; ++j) sum[i][j] = 0.0F;
  }
  for (int first = 0; first < total; first += kBk) {
    const int piece = first / kBk;
    wait_groups<0>();
    __syncthreads();
    load_filter(a, w, in_filter, filters + (piece + 1) % 2 * kBk * kBn, first + kBk, total,
                first_column, thread);
    const float* const b = filters + piece % 2 * kBk * kBn;
    const int steps = total - first < kBk ? total - first : kBk;
#pragma unroll 4
    for (int k = 0; k < steps; ++k) {
      const int offset = in_patch[first + k];
      float left[kTm];
      Four right[kTn / 4];
#pragma unroll
      for (int i = 0; i < kTm; ++i) left[i] = values[at[i] + offset];
#pragma unroll
      for (int j = 0; j < kTn / 4; ++j) {
        right[j] = *reinterpret_cast<const Four*>(b + k * kBn + (j * kAcross + across) * 4);
      }
#pragma unroll
      for (int i = 0; i < kTm; ++i) {
#pragma unroll
        for (int j = 0; j < kTn; ++j) sum[i][j] = fma(left[i], right[j / 4].v[j % 4], sum[i][j]);
      }
    }
  }
  wait_groups<0>();

  float* const y = static_cast<float*>(a.y);
#pragma unroll
  for (int i = 0; i < kTm; ++i) {
    const int pixel = i * kDown + down;
    const int py = oy + pixel / kBx, px = ox + pixel % kBx;
    if (py >= p.out[1] || px >= p.out[2]) continue;
    const int there =
        p.y_first + g * a.y_g + image * a.y_n + oz * p.y_sp[0] + py * p.y_sp[1] + px * p.y_sp[2];
#pragma unroll
    for (int j = 0; j < kTn; j += 4) {
      const int column = first_column + (j / 4 * kAcross + across) * 4;
#if JAXWIN_Y_VECTOR
      if (column >= a.k) continue;
      Four four;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        four.v[q] = finish(a, sum[i][j + q], g * a.k + column + q, there + column + q);
      }
      *reinterpret_cast<Four*>(y + there + column) = four;
#else
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        if (column + q >= a.k) break;
        const int to = there + (column + q) * a.y_k;
        y[to] = finish(a, sum[i][j + q], g * a.k + column + q, to);
      }
#endif
    }
  }
}

}  // namespace cuda
}  // namespace jaxwin
