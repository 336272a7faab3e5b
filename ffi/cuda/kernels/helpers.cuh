// SPDX-License-Identifier: Apache-2.0
//
// Small kernels around the others: filters packed, the im2win tensor, sums of chunks. One element
// per thread.

namespace jaxwin {
namespace cuda {

JAXWIN_DEVICE long long element_of_thread() {
  return static_cast<long long>(blockIdx.x) * JAXWIN_THREADS + static_cast<int>(threadIdx.x);
}

#if JAXWIN_PACK
JAXWIN_KERNEL(JAXWIN_THREADS, 1) jaxwin_pack(JAXWIN_ARGS PackArgs a) {
  long long rest = element_of_thread();
  const long long total =
      static_cast<long long>(a.g) * a.win[0] * a.win[1] * a.win[2] * a.c * a.k_pitch;
  if (rest >= total) return;
  Element* const to = static_cast<Element*>(a.dst) + rest;
  const int k = static_cast<int>(rest % a.k_pitch);
  rest /= a.k_pitch;
  const int c = static_cast<int>(rest % a.c);
  rest /= a.c;
  const int z = static_cast<int>(rest % a.win[0]);
  rest /= a.win[0];
  const int y = static_cast<int>(rest % a.win[1]);
  rest /= a.win[1];
  const int x = static_cast<int>(rest % a.win[2]);
  const int g = static_cast<int>(rest / a.win[2]);
  *to = k < a.k ? static_cast<const Element*>(a.w)[g * a.w_g + k * a.w_k + c * a.w_c +
                                                   z * a.w_sp[0] + y * a.w_sp[1] + x * a.w_sp[2]]
                : static_cast<Element>(0);
}
#endif

#if JAXWIN_WINDOW
JAXWIN_KERNEL(JAXWIN_THREADS, 1) jaxwin_window(JAXWIN_ARGS WindowArgs a) {
  long long rest = element_of_thread();
  const long long total = static_cast<long long>(a.n) * a.g * a.out[0] * a.out[1] * a.columns *
                          a.win[1] * a.win[0] * a.c;
  if (rest >= total) return;
  Element* const to = static_cast<Element*>(a.dst) + rest;
  const int c = static_cast<int>(rest % a.c);
  rest /= a.c;
  const int z = static_cast<int>(rest % a.win[0]);
  rest /= a.win[0];
  const int y = static_cast<int>(rest % a.win[1]);
  rest /= a.win[1];
  const int ix = static_cast<int>(rest % a.columns) - a.pad[2];
  rest /= a.columns;
  const int iy = static_cast<int>(rest % a.out[1]) * a.stride[1] - a.pad[1] + y * a.dilation[1];
  rest /= a.out[1];
  const int iz = static_cast<int>(rest % a.out[0]) * a.stride[0] - a.pad[0] + z * a.dilation[0];
  rest /= a.out[0];
  const int g = static_cast<int>(rest % a.g);
  const int n = static_cast<int>(rest / a.g);
  const bool real = static_cast<unsigned>(ix) < static_cast<unsigned>(a.in[2]) &&
                    static_cast<unsigned>(iy) < static_cast<unsigned>(a.in[1]) &&
                    static_cast<unsigned>(iz) < static_cast<unsigned>(a.in[0]);
  *to = real ? static_cast<const Element*>(a.x)[n * a.x_n + g * a.x_g + c * a.x_c + iz * a.x_sp[0] +
                                                iy * a.x_sp[1] + ix * a.x_sp[2]]
             : static_cast<Element>(0);
}
#endif

#if JAXWIN_SUM
JAXWIN_KERNEL(JAXWIN_THREADS, 1) jaxwin_sum(JAXWIN_ARGS SumArgs a) {
  const ConvArgs& conv = a.conv;
  const Part& p = conv.part[0];
  const long long element = element_of_thread();
  if (element >= static_cast<long long>(conv.g) * p.rows * conv.k) return;
  const int k = static_cast<int>(element % conv.k);
  const long long line = element / conv.k;  // group and row
  const int row = static_cast<int>(line % p.rows);
  const int g = static_cast<int>(line / p.rows);
  int o[3];
  const int image = row_position(conv, p, row, o);
  const int at = g * conv.y_g + image * conv.y_n + k * conv.y_k + o[0] * p.y_sp[0] +
                 o[1] * p.y_sp[1] + o[2] * p.y_sp[2];
  const long long size = static_cast<long long>(conv.g) * p.rows * conv.k_pitch;
  float* const from = a.partial + line * conv.k_pitch + k;
  float sum = a.first ? *from : add(from[a.capacity * size], *from);
  for (int chunk = 1; chunk < conv.chunks; ++chunk) sum = add(sum, from[chunk * size]);
  if (!a.last) {
    from[a.capacity * size] = sum;
    return;
  }
  static_cast<Result*>(conv.y)[at] = round_result(finish(conv, sum, g * conv.k + k, at));
}
#endif

}  // namespace cuda
}  // namespace jaxwin
