// SPDX-License-Identifier: Apache-2.0
//
// A convolution as one writes it down: seven loops, nothing blocked, nothing packed. The output
// features are innermost, so that a compiler can vectorise, and each output is added up in memory.
#include <stdint.h>
#include <string.h>

// x[n][h][w][c], f[kh][kw][c][k], y[n][oh][ow][k]; s: the sizes in the order below.
void jaxwin_loops(const float* restrict x, const float* restrict f, float* restrict y,
                  const int64_t* s) {
  const int64_t n = s[0], h = s[1], w = s[2], c = s[3], k = s[4], kh = s[5], kw = s[6];
  const int64_t oh = s[7], ow = s[8], sh = s[9], sw = s[10], dh = s[11], dw = s[12];
  const int64_t ph = s[13], pw = s[14];
  memset(y, 0, sizeof(float) * n * oh * ow * k);
  for (int64_t image = 0; image < n; ++image) {
    for (int64_t i = 0; i < oh; ++i) {
      for (int64_t j = 0; j < ow; ++j) {
        float* out = y + ((image * oh + i) * ow + j) * k;
        for (int64_t u = 0; u < kh; ++u) {
          const int64_t row = i * sh + u * dh - ph;
          if (row < 0 || row >= h) continue;
          for (int64_t v = 0; v < kw; ++v) {
            const int64_t col = j * sw + v * dw - pw;
            if (col < 0 || col >= w) continue;
            const float* in = x + ((image * h + row) * w + col) * c;
            const float* filter = f + (u * kw + v) * c * k;
            for (int64_t a = 0; a < c; ++a) {
              for (int64_t b = 0; b < k; ++b) out[b] += in[a] * filter[a * k + b];
            }
          }
        }
      }
    }
  }
}
