// SPDX-License-Identifier: Apache-2.0
//
// What the CUDA kernels are told. Compiled by the host's compiler and by NVRTC: no headers, plain
// structs. Offsets and strides count elements and fit 32 bits (the host refuses larger arrays).
#pragma once

namespace jaxwin {
namespace cuda {

// One ordinary convolution: the whole problem, or the outputs of one residue of a transposed one.
// Triples are ordered z, y, x.
struct Part {
  int out[3], win[3], stride[3], pad[3], dilation[3];
  int w_sp[3], y_sp[3];
  int w_first, y_first;
  int taps;         // window positions; 0 where none is real (then `win` is 1, 1, 1)
  int rows;         // images times output pixels
  int first_block;  // blocks of rows are counted through the parts
};

constexpr int kMaxParts = 8;

struct ConvArgs {
  const void* x;
  const void* w;
  const void* bias;      // g * k values, may be null
  const void* residual;  // the layout of y, may be null
  void* y;               // or partial sums [chunk][group][row][k_pitch]
  int n, g, c, k;
  int in[3];
  int x_n, x_g, x_c, x_sp[3];
  int w_g, w_k, w_c;
  int y_n, y_g, y_k;
  int lhs_dilation[3];  // `direct` only: elsewhere parts take its place
  int row_blocks, column_blocks;
  // The reduction is cut into chunks of so many elements, counted in its own order.
  int chunk_length, chunks, first_chunk;
  int k_pitch;
  int parts;
  Part part[kMaxParts];
};

// y = act(sum of conv.chunks partial sums in order + bias + residual). Where the chunks come in
// several rounds, the sum so far is kept behind `capacity` partial ones in between.
struct SumArgs {
  float* partial;  // [chunk][group][row][k_pitch]
  ConvArgs conv;
  int capacity;
  int first, last;  // whether this is the first, the last round
};

// dst[g][x][y][z][c][k_pitch] = w.
struct PackArgs {
  const void* w;
  void* dst;
  int g, c, k, k_pitch;
  int win[3];
  int w_g, w_k, w_c, w_sp[3];
};

// The im2win tensor: dst[n][g][oz][oy][column][y][z][c], column: of the padded input.
struct WindowArgs {
  const void* x;
  void* dst;
  int n, g, c;
  int in[3], out[3], win[3], stride[3], pad[3], dilation[3];
  int columns;
  int x_n, x_g, x_c, x_sp[3];
};

}  // namespace cuda
}  // namespace jaxwin
